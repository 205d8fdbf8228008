//! Certificates: what is in them, and for how long. Called by the parent module only; touches no file.
//!
//! Every identity is a URI `spiffe://CLUSTER-ID/ROLE/NAME`; servers have DNS names and addresses besides. The cluster id
//! is read back from the authority's own certificate, which bears `spiffe://CLUSTER-ID`.

use std::net::IpAddr;

use dalgu_proto::ids::ClusterId;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use time::{Duration, OffsetDateTime};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::Error;

/// How long an authority lasts.
const AUTHORITY_LIFETIME: Duration = Duration::days(3652);
/// How long an identity lasts. Renewed by issuing it again.
const IDENTITY_LIFETIME: Duration = Duration::days(365);
/// Certificates are valid from so long ago, as the clocks of a site's machines differ.
const CLOCK_TOLERANCE: Duration = Duration::hours(1);

/// What an identity may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// Dial only.
    Client,
    /// Accept and dial.
    ServerAndClient,
}

/// A new identity.
pub(super) struct Issued {
    /// The certificate.
    pub(super) certificate: String,
    /// Its key, PKCS #8.
    pub(super) key: String,
}

/// The site's authority, able to sign.
pub(super) struct Authority {
    cluster: ClusterId,
    not_after: OffsetDateTime,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Makes an authority, and its certificate as PEM.
    pub(super) fn create(key: KeyPair, site: &str, cluster: ClusterId) -> Result<(Self, String), Error> {
        let mut params = params(&format!("Dalgu authority of {site}"), AUTHORITY_LIFETIME);
        // No further authorities below it.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![uri(&format!("spiffe://{cluster}"))?];
        let pem = params.self_signed(&key)?.pem();
        let not_after = params.not_after;
        Ok((
            Self {
                cluster,
                not_after,
                issuer: Issuer::new(params, key),
            },
            pem,
        ))
    }

    /// Reads an authority; `None` when its certificate names no cluster id.
    pub(super) fn load(pem: &str, key: KeyPair) -> Result<Option<Self>, Error> {
        let issuer = Issuer::from_ca_cert_pem(pem, key)?;
        let unreadable = || Error::Certificate(rcgen::Error::CouldNotParseCertificate);
        let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).map_err(|_| unreadable())?;
        let (_, certificate) = X509Certificate::from_der(&pem.contents).map_err(|_| unreadable())?;
        let not_after = certificate.validity().not_after.to_datetime();
        Ok(cluster_of(&certificate).map(|cluster| Self {
            cluster,
            not_after,
            issuer,
        }))
    }

    /// Gives out an identity with a new key. `names` are DNS names and addresses.
    pub(super) fn issue(
        &self,
        role: &str,
        name: &str,
        names: &[String],
        purpose: Use,
    ) -> Result<Issued, Error> {
        let mut params = params(name, IDENTITY_LIFETIME);
        params.not_after = params.not_after.min(self.not_after);
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match purpose {
            Use::Client => vec![ExtendedKeyUsagePurpose::ClientAuth],
            Use::ServerAndClient => vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ],
        };
        params.subject_alt_names = vec![uri(&format!("spiffe://{}/{role}/{name}", self.cluster))?];
        for name in names {
            let entry = match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(name.as_str().try_into()?),
            };
            if !params.subject_alt_names.contains(&entry) {
                params.subject_alt_names.push(entry);
            }
        }
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Issued {
            certificate,
            key: key.serialize_pem(),
        })
    }
}

fn params(common_name: &str, lifetime: Duration) -> CertificateParams {
    let now = OffsetDateTime::now_utc();
    let mut params = CertificateParams::default();
    params.not_before = now - CLOCK_TOLERANCE;
    params.not_after = now + lifetime;
    params.distinguished_name = DistinguishedName::new();
    // RFC 5280, appendix A.1: at most 64 characters. The name that counts is the URI.
    let common_name: String = common_name.chars().take(64).collect();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params
}

fn uri(value: &str) -> Result<SanType, Error> {
    Ok(SanType::URI(value.try_into()?))
}

fn cluster_of(certificate: &X509Certificate<'_>) -> Option<ClusterId> {
    let names = certificate.subject_alternative_name().ok()??;
    names.value.general_names.iter().find_map(|name| match name {
        GeneralName::URI(uri) => uri.strip_prefix("spiffe://")?.parse().ok(),
        _ => None,
    })
}

/// Names and addresses for a certificate, from what people write: a port is left off, and an address that means "all
/// addresses" is left out.
pub(super) fn alternatives(addresses: &[String]) -> Result<Vec<String>, Error> {
    let mut names = Vec::with_capacity(addresses.len());
    for address in addresses {
        let host = without_port(address);
        match host.parse::<IpAddr>() {
            Ok(ip) if ip.is_unspecified() => {}
            Ok(ip) => names.push(ip.to_string()),
            Err(_) if is_dns_name(host) => names.push(host.to_ascii_lowercase()),
            Err(_) => {
                let rule = "must be a DNS name or an IP address, with or without a port";
                return Err(Error::Name {
                    what: "address",
                    value: address.clone(),
                    rule,
                });
            }
        }
    }
    Ok(names)
}

fn without_port(address: &str) -> &str {
    if let Some((host, _)) = address.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return host;
    }
    match address.split_once(':') {
        // More than one colon is an IPv6 address.
        Some((host, port)) if port.parse::<u16>().is_ok() => host,
        _ => address,
    }
}

fn is_dns_name(name: &str) -> bool {
    let label = |label: &str| {
        let bytes = label.as_bytes();
        (1..=63).contains(&bytes.len())
            && bytes
                .iter()
                .all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-')
            && bytes[0] != b'-'
            && bytes[bytes.len() - 1] != b'-'
    };
    // What is all digits and dots was meant to be an address.
    name.len() <= 253 && name.split('.').all(label) && name.bytes().any(|byte| byte.is_ascii_alphabetic())
}
