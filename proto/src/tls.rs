//! Who is at the other end: mutual TLS for every connection, and the identities in the certificates.
//!
//! Every certificate of a site comes from the site's authority and names its bearer in a URI:
//! `spiffe://<cluster id>/controller/<name>`, `/agent/<host>` or `/operator/<name>`, where the cluster id is the site's
//! UUID ([`ClusterId`]), so that a program knows its site from its certificate. A server asks every caller for one; a
//! client checks that the server is the very one it meant, by a DNS name that follows from the role
//! ([`CONTROLLER_NAME`], [`agent_name`]), so that addresses may change without new certificates. TLS 1.3 only.
//!
//! Used by all three programs. [`client`] dials, [`server`] accepts, both on the [`network`] that the identity was given.

use std::{fmt, io, net::SocketAddr, path::Path, sync::Arc};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};

use self::network::{Listener, Machine, Network};
use crate::ids::{ClusterId, HostName};

pub mod client;
mod handshakes;
pub mod network;
pub mod server;

/// DNS name in every controller's certificate.
pub const CONTROLLER_NAME: &str = "controller.dalgu.internal";
/// Protocol (ALPN) of gRPC and HTTP/2.
pub const ALPN_H2: &[u8] = b"h2";
/// Protocol (ALPN) of HTTP/1.1, for scrapers.
pub const ALPN_HTTP1: &[u8] = b"http/1.1";
/// Protocol (ALPN) of a migration stream between agents.
pub const ALPN_STREAM: &[u8] = b"dalgu-migration/1";

/// DNS name in the certificate of a host's agent.
pub fn agent_name(host: &HostName) -> String {
    format!("{host}.agent.dalgu.internal")
}

/// Why an identity or a connection is no good.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A PEM file cannot be read or holds nothing of use.
    #[error("cannot read {what} from {path}")]
    Pem {
        /// "certificate", "key" or "authority".
        what: &'static str,
        /// The file.
        path: String,
        /// What the reader said.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// rustls refuses the material.
    #[error("the certificate, key or authority cannot be used")]
    Tls(#[from] rustls::Error),
    /// The authority's certificate cannot be used to check clients.
    #[error("the authority cannot be used to check callers")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
    /// The endpoint is not of the form that is expected.
    #[error("{0:?} is not an endpoint: give https://HOST:PORT or unix:/PATH")]
    Endpoint(String),
    /// The certificate is another site's, whose authority is the same.
    #[error("the certificate belongs to site {theirs}, this is site {ours}")]
    OtherSite {
        /// In the certificate.
        theirs: ClusterId,
        /// This site.
        ours: ClusterId,
    },
    /// The certificate names no role of this site.
    #[error("the certificate names no identity of Dalgu's (spiffe://SITE/ROLE/NAME)")]
    NoIdentity,
    /// The other side cannot be reached.
    #[error("cannot connect to {endpoint}")]
    Connect {
        /// Where to.
        endpoint: String,
        /// What the operating system or TLS said.
        #[source]
        source: std::io::Error,
    },
    /// The gRPC channel cannot be set up.
    #[error("cannot connect to {endpoint}")]
    Channel {
        /// Where to.
        endpoint: String,
        /// What the transport said.
        #[source]
        source: tonic::transport::Error,
    },
}

/// What a caller is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// The site's controller.
    Controller,
    /// The agent of a host.
    Agent(HostName),
    /// A person or a program that uses the operator API.
    Operator,
}

/// Who is at the other end of a connection. Servers find it in each request's extensions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// What it is.
    pub role: Role,
    /// Its name, for logs and the record of who asked for what.
    pub name: String,
}

impl Peer {
    /// Who is written so: `ROLE/NAME`.
    pub fn parse(text: &str) -> Option<Self> {
        let (role, name) = text.split_once('/')?;
        if name.is_empty() || name.contains('/') {
            return None;
        }
        let role = match role {
            "controller" => Role::Controller,
            "agent" => Role::Agent(name.parse().ok()?),
            "operator" => Role::Operator,
            _ => return None,
        };
        Some(Self {
            role,
            name: name.to_owned(),
        })
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let role = match self.role {
            Role::Controller => "controller",
            Role::Agent(_) => "agent",
            Role::Operator => "operator",
        };
        write!(f, "{role}/{}", self.name)
    }
}

/// A certificate with its key and the authority it trusts, and the network on which its bearer dials and listens.
#[derive(Clone)]
pub struct Identity {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: Arc<PrivateKeyDer<'static>>,
    network: Arc<dyn Network>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The key must not reach a log.
        f.debug_struct("Identity")
            .field("certificates", &self.chain.len())
            .finish_non_exhaustive()
    }
}

fn read_certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let failed = |source| Error::Pem {
        what,
        path: path.display().to_string(),
        source,
    };
    let found: Vec<_> = CertificateDer::pem_file_iter(path)
        .map_err(failed)?
        .collect::<Result<_, _>>()
        .map_err(failed)?;
    if found.is_empty() {
        Err(failed(rustls::pki_types::pem::Error::NoItemsFound))
    } else {
        Ok(found)
    }
}

impl Identity {
    /// Reads an identity from three PEM files.
    pub fn load(ca: &Path, certificate: &Path, key: &Path) -> Result<Self, Error> {
        let mut roots = RootCertStore::empty();
        for authority in read_certificates("authority", ca)? {
            roots.add(authority)?;
        }
        let chain = read_certificates("certificate", certificate)?;
        let key = PrivateKeyDer::from_pem_file(key).map_err(|source| Error::Pem {
            what: "key",
            path: key.display().to_string(),
            source,
        })?;
        Ok(Self {
            roots: Arc::new(roots),
            chain,
            key: Arc::new(key),
            network: Arc::new(Machine),
        })
    }

    /// The same identity on another network than the machine's.
    #[must_use]
    pub fn on(self, network: Arc<dyn Network>) -> Self {
        Self { network, ..self }
    }

    /// Begins to listen at an address of its network.
    ///
    /// # Errors
    /// If the address is taken or not this machine's.
    pub async fn listen(&self, address: SocketAddr) -> io::Result<Box<dyn Listener>> {
        self.network.listen(address).await
    }

    /// Reads `ca.pem`, `NAME.pem` and `NAME.key` of a directory.
    pub fn load_dir(dir: &Path, name: &str) -> Result<Self, Error> {
        Self::load(
            &dir.join("ca.pem"),
            &dir.join(format!("{name}.pem")),
            &dir.join(format!("{name}.key")),
        )
    }

    /// Who this identity says its bearer is.
    pub fn peer(&self) -> Result<Peer, Error> {
        Ok(identity_of(self.chain.first().ok_or(Error::NoIdentity)?)?.1)
    }

    /// The site this identity belongs to.
    pub fn site(&self) -> Result<ClusterId, Error> {
        Ok(identity_of(self.chain.first().ok_or(Error::NoIdentity)?)?.0)
    }

    fn provider() -> Arc<rustls::crypto::CryptoProvider> {
        Arc::new(rustls::crypto::ring::default_provider())
    }

    /// How to dial with this identity, speaking one protocol.
    pub fn client_config(&self, alpn: &[u8]) -> Result<Arc<ClientConfig>, Error> {
        let mut config = ClientConfig::builder_with_provider(Self::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(self.roots.clone())
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())?;
        config.alpn_protocols = vec![alpn.to_vec()];
        Ok(Arc::new(config))
    }

    /// How to accept with this identity, offering these protocols.
    pub fn server_config(&self, alpn: &[&[u8]]) -> Result<Arc<ServerConfig>, Error> {
        let verifier =
            WebPkiClientVerifier::builder_with_provider(self.roots.clone(), Self::provider()).build()?;
        let mut config = ServerConfig::builder_with_provider(Self::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain.clone(), self.key.clone_key())?;
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(Arc::new(config))
    }
}

/// Reads the site and the identity out of a certificate that has been verified.
pub fn identity_of(certificate: &CertificateDer<'_>) -> Result<(ClusterId, Peer), Error> {
    use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| Error::NoIdentity)?;
    let names = parsed
        .subject_alternative_name()
        .map_err(|_| Error::NoIdentity)?
        .ok_or(Error::NoIdentity)?;
    names
        .value
        .general_names
        .iter()
        .find_map(|name| match name {
            GeneralName::URI(uri) => parse_identity(uri),
            _ => None,
        })
        .ok_or(Error::NoIdentity)
}

fn parse_identity(uri: &str) -> Option<(ClusterId, Peer)> {
    let (site, path) = uri.strip_prefix("spiffe://")?.split_once('/')?;
    Some((site.parse().ok()?, Peer::parse(path)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_read_and_anything_else_is_not() {
        const SITE: &str = "6f1c6c5e-5d8b-4c39-9f0e-0a4a7a6c1c55";
        let read = |path: &str| parse_identity(&format!("spiffe://{SITE}/{path}"));
        let agent = Peer {
            role: Role::Agent("h1".parse().unwrap()),
            name: "h1".into(),
        };
        assert_eq!(read("agent/h1"), Some((SITE.parse().unwrap(), agent)));
        assert_eq!(read("operator/kim").unwrap().1.role, Role::Operator);
        for bad in ["agent/", "agent/H1", "agent/a/b", "root/x", ""] {
            assert_eq!(read(bad), None, "{bad}");
        }
        for bad in ["", "https://site/agent/h1", "spiffe://lab/agent/h1"] {
            assert_eq!(parse_identity(bad), None, "{bad}");
        }
    }
}
