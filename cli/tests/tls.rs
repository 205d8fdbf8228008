//! Commands over mutual TLS with real certificates: what happens when they do not match.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

#[allow(dead_code, reason = "each test program uses a part of it")]
mod common;

use std::{fs, path::Path, sync::Arc};

use common::{Fake, Outcome};
use dalgu_proto::{
    tls::{ALPN_H2, CONTROLLER_NAME, Identity, server::Acceptor},
    v1,
    v1::vm_service_server::VmServiceServer,
};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;

const SITE: &str = "9b2d6a0e-0000-4000-8000-000000000001";

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Writes `ca.pem`, `id.pem` and `id.key` for a bearer, trusting `trusted`.
    fn issue(&self, bearer: &str, trusted: &Self, dir: &Path) {
        self.issue_for(SITE, bearer, trusted, dir);
    }

    fn issue_for(&self, site: &str, bearer: &str, trusted: &Self, dir: &Path) {
        self.issue_until(4096, site, bearer, trusted, dir);
    }

    fn issue_until(&self, year: i32, site: &str, bearer: &str, trusted: &Self, dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        let mut params = CertificateParams::new(vec![CONTROLLER_NAME.to_owned()]).unwrap();
        let uri = format!("spiffe://{site}/{bearer}");
        params
            .subject_alt_names
            .push(SanType::URI(uri.as_str().try_into().unwrap()));
        params.not_after = rcgen::date_time_ymd(year, 1, 1);
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        fs::write(dir.join("ca.pem"), trusted.0.pem()).unwrap();
        fs::write(dir.join("id.pem"), certificate.pem()).unwrap();
        fs::write(dir.join("id.key"), key.serialize_pem()).unwrap();
    }
}

/// A controller of one authority's site; gives its address.
async fn serve(fake: &Fake, dir: &Path) -> String {
    let identity = Identity::load_dir(dir, "id").unwrap();
    let config: Arc<_> = identity.server_config(&[ALPN_H2]).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (acceptor, connections) = Acceptor::new(identity.site().unwrap(), None);
    tokio::spawn(async move { acceptor.run(listener, config, |_| {}).await });
    let server = Server::builder().add_service(VmServiceServer::new(fake.clone()));
    tokio::spawn(server.serve_with_incoming(ReceiverStream::new(connections)));
    address
}

async fn list(address: &str, dir: &Path) -> Outcome {
    let config = dir.join("config.toml");
    let text = format!(
        "current_context = \"c\"\n[contexts.c]\nendpoint = \"https://{address}\"\nca = \"ca.pem\"\ncert = \"id.pem\"\nkey = \"id.key\"\n"
    );
    fs::write(&config, text).unwrap();
    common::run(&config, &[], &["vm", "list", "-o", "name"], |_| {}).await
}

#[tokio::test]
async fn only_matching_certificates_let_a_command_through() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (Authority::new(), Authority::new());
    let at = |name: &str| dir.path().join(name);
    ours.issue("controller/main", &ours, &at("controller"));
    let fake = Fake::default();
    let address = serve(&fake, &at("controller")).await;

    ours.issue("operator/kim", &ours, &at("right"));
    fake.script().lists.push_back(Ok(v1::ListVmsResponse::default()));
    let outcome = list(&address, &at("right")).await;
    assert_eq!(outcome.code, 0, "{}", outcome.err);

    // The controller is of another site than the caller trusts; the caller is of another site than the controller trusts.
    ours.issue("operator/kim", &theirs, &at("distrusting"));
    theirs.issue("operator/eve", &ours, &at("distrusted"));
    for case in ["distrusting", "distrusted"] {
        let outcome = list(&address, &at(case)).await;
        assert_eq!(outcome.code, 6, "{case}: {}", outcome.err);
        assert!(
            outcome.err.contains("hint: the certificates do not match"),
            "{case}: {}",
            outcome.err
        );
    }
    assert_eq!(fake.script().seen.len(), 1);
}

#[tokio::test]
async fn an_operator_of_another_site_with_the_same_authority_is_turned_away() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let at = |name: &str| dir.path().join(name);
    authority.issue("controller/main", &authority, &at("controller"));
    let fake = Fake::default();
    let address = serve(&fake, &at("controller")).await;
    let other = "9b2d6a0e-0000-4000-8000-000000000002";
    authority.issue_for(other, "operator/kim", &authority, &at("other"));
    fake.script().lists.push_back(Ok(v1::ListVmsResponse::default()));
    let outcome = list(&address, &at("other")).await;
    assert_ne!(outcome.code, 0, "it was let in");
    assert_eq!(fake.script().seen.len(), 0);
}

#[tokio::test]
async fn a_certificate_that_has_expired_is_told_as_such_on_either_side() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Authority::new();
    let at = |name: &str| dir.path().join(name);
    ours.issue("operator/kim", &ours, &at("right"));
    ours.issue_until(2020, SITE, "operator/kim", &ours, &at("expired"));
    ours.issue("controller/main", &ours, &at("controller"));
    ours.issue_until(2020, SITE, "controller/main", &ours, &at("expired-controller"));
    let fake = Fake::default();
    for (controller, operator) in [("controller", "expired"), ("expired-controller", "right")] {
        let address = serve(&fake, &at(controller)).await;
        let outcome = list(&address, &at(operator)).await;
        assert_eq!(outcome.code, 6, "{operator}: {}", outcome.err);
        assert!(
            outcome.err.to_lowercase().contains("expired"),
            "{operator}: {}",
            outcome.err
        );
    }
    assert_eq!(fake.script().seen.len(), 0, "nobody was let in");
}

#[tokio::test]
async fn a_port_where_nobody_listens_is_told_as_such() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Authority::new();
    ours.issue("operator/kim", &ours, dir.path());
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = free.local_addr().unwrap().to_string();
    drop(free);
    let outcome = list(&address, dir.path()).await;
    assert_eq!(outcome.code, 6, "{}", outcome.err);
    assert!(
        outcome.err.contains("hint: nothing listens there"),
        "{}",
        outcome.err
    );
}
