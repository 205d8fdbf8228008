//! Who a management controller must be: signed by the site's authority for these, or known by its certificate's fingerprint. One of the two,
//! always. TLS 1.2 is taken as well, since many know nothing newer.

use std::{path::Path, sync::Arc};

use ring::digest;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring::default_provider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};

/// How to dial: with the fingerprint where there is one, else with the authority.
pub fn config(fingerprint: &str, ca: Option<&Path>) -> Result<Arc<ClientConfig>, String> {
    let provider = Arc::new(default_provider());
    let by = match (fingerprint, ca) {
        ("", Some(ca)) => By::Authority(authority(ca, provider.clone())?),
        (fingerprint, _) => By::Fingerprint(fingerprint.to_owned()),
    };
    let verifier = Verifier {
        by,
        provider: provider.clone(),
    };
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    Ok(Arc::new(config))
}

fn authority(path: &Path, provider: Arc<CryptoProvider>) -> Result<Arc<WebPkiServerVerifier>, String> {
    let failed = |error: &dyn std::fmt::Display| format!("the authority {}: {error}", path.display());
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(path).map_err(|error| failed(&error))? {
        let certificate = certificate.map_err(|error| failed(&error))?;
        roots.add(certificate).map_err(|error| failed(&error))?;
    }
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .map_err(|error| failed(&error))
}

/// SHA-256 of a certificate, in hexadecimal.
pub fn fingerprint(certificate: &[u8]) -> String {
    let digest = digest::digest(&digest::SHA256, certificate);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[derive(Debug)]
enum By {
    Authority(Arc<WebPkiServerVerifier>),
    /// Of the service's own certificate; empty for none, which nobody has.
    Fingerprint(String),
}

#[derive(Debug)]
struct Verifier {
    by: By,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let shown = fingerprint(certificate);
        let refusal = match &self.by {
            By::Fingerprint(known) if *known == shown => return Ok(ServerCertVerified::assertion()),
            By::Fingerprint(_) => Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure),
            By::Authority(webpki) => {
                match webpki.verify_server_cert(certificate, intermediates, name, ocsp, now) {
                    Ok(verified) => return Ok(verified),
                    Err(error) => error,
                }
            }
        };
        // Who looks it up on the machine can pin it.
        Err(Error::General(format!(
            "its certificate is not the one that is known ({refusal}); the SHA-256 fingerprint of the one it shows is {shown}"
        )))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(
            message,
            certificate,
            signed,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            certificate,
            signed,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
