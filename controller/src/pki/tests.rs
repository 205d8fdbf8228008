//! What is issued is loaded by the code that uses it, and shaken hands with both ways.

use std::{os::unix::fs::PermissionsExt, sync::Arc};

use dalgu_proto::tls::{ALPN_H2, CONTROLLER_NAME, Identity, Role, agent_name, identity_of};
use rustls::{ClientConfig, ServerConfig, pki_types::ServerName};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;

struct Site {
    dir: TempDir,
}

impl Site {
    fn new() -> Self {
        let site = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        init(
            &site.data(),
            "daegu",
            &["10.77.0.1:7443".into(), "[fd00::1]:7443".into(), "0.0.0.0".into()],
        )
        .unwrap();
        issue_agent(
            &site.data(),
            &host("h1"),
            &["10.77.0.11".into()],
            &site.agent_dir(),
        )
        .unwrap();
        site
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn agent_dir(&self) -> PathBuf {
        self.dir.path().join("agent")
    }

    fn identity(&self, name: &str) -> Identity {
        let dir = if name == "agent" {
            self.agent_dir()
        } else {
            self.data()
        };
        Identity::load_dir(&dir, name).unwrap()
    }
}

fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

/// Shakes hands in memory and sends a byte each way, as TLS 1.3 tells a client of its refusal only afterwards. Gives
/// who the server saw.
async fn handshake(client: Arc<ClientConfig>, server: Arc<ServerConfig>, name: &str) -> Result<Role, String> {
    let (near, far) = duplex(16 << 10);
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let dialled = async move {
        let mut io = TlsConnector::from(client).connect(name, near).await?;
        io.write_all(b"?").await?;
        io.read_u8().await
    };
    let accepted = async move {
        let mut io = TlsAcceptor::from(server).accept(far).await?;
        io.read_u8().await?;
        io.write_all(b"!").await?;
        let certificate = io.get_ref().1.peer_certificates().unwrap()[0].clone();
        Ok::<_, std::io::Error>(identity_of(&certificate).unwrap().1.role)
    };
    let (dialled, accepted) = tokio::join!(dialled, accepted);
    dialled.map_err(|error| format!("client: {error}"))?;
    accepted.map_err(|error| format!("server: {error}"))
}

async fn meet(client: &Identity, server: &Identity, name: &str) -> Result<Role, String> {
    handshake(
        client.client_config(ALPN_H2).unwrap(),
        server.server_config(&[ALPN_H2]).unwrap(),
        name,
    )
    .await
}

#[tokio::test]
async fn controller_agent_and_operator_know_each_other() {
    let site = Site::new();
    for name in ["controller", "agent", "admin"] {
        assert_eq!(
            site.identity(name).site().unwrap(),
            cluster_id(&site.data()).unwrap(),
            "{name}"
        );
    }
    let (controller, agent, admin) = (
        site.identity("controller"),
        site.identity("agent"),
        site.identity("admin"),
    );
    assert_eq!(
        meet(&agent, &controller, CONTROLLER_NAME).await,
        Ok(Role::Agent(host("h1")))
    );
    assert_eq!(
        meet(&controller, &agent, &agent_name(&host("h1"))).await,
        Ok(Role::Controller)
    );
    assert_eq!(
        meet(&admin, &controller, CONTROLLER_NAME).await,
        Ok(Role::Operator)
    );
    for name in ["localhost", "10.77.0.1", "fd00::1"] {
        assert_eq!(
            meet(&admin, &controller, name).await,
            Ok(Role::Operator),
            "{name}"
        );
    }
    for name in ["h1", "10.77.0.11"] {
        assert_eq!(meet(&admin, &agent, name).await, Ok(Role::Operator), "{name}");
    }
}

#[tokio::test]
async fn a_server_of_another_name_is_refused() {
    let site = Site::new();
    let (controller, agent) = (site.identity("controller"), site.identity("agent"));
    for name in [
        agent_name(&host("h2")),
        CONTROLLER_NAME.to_owned(),
        "10.77.0.12".to_owned(),
    ] {
        let refused = meet(&controller, &agent, &name).await.unwrap_err();
        assert!(refused.contains("not valid for name"), "{name}: {refused}");
    }
}

#[tokio::test]
async fn an_operator_cannot_pose_as_a_server() {
    let site = Site::new();
    let refused = meet(&site.identity("agent"), &site.identity("admin"), "localhost")
        .await
        .unwrap_err();
    assert!(refused.starts_with("client:"), "{refused}");
}

#[tokio::test]
async fn an_identity_of_another_authority_is_refused_by_both_sides() {
    let (site, other) = (Site::new(), Site::new());
    let (controller, stranger) = (site.identity("controller"), other.identity("agent"));
    // The client sees it first.
    let refused = meet(&stranger, &controller, CONTROLLER_NAME).await.unwrap_err();
    assert!(refused.contains("invalid peer certificate"), "{refused}");
    // A client that trusts the server, but whose own certificate is of the other site.
    std::fs::copy(site.data().join("ca.pem"), other.agent_dir().join("ca.pem")).unwrap();
    let stranger = other.identity("agent");
    let client = stranger.client_config(ALPN_H2).unwrap();
    let refused = handshake(
        client,
        controller.server_config(&[ALPN_H2]).unwrap(),
        CONTROLLER_NAME,
    )
    .await
    .unwrap_err();
    assert!(refused.starts_with("client: received fatal alert"), "{refused}");
}

#[tokio::test]
async fn a_caller_without_a_certificate_is_refused() {
    let site = Site::new();
    let mut roots = rustls::RootCertStore::empty();
    let pem = std::fs::read(site.data().join("ca.pem")).unwrap();
    let (_, pem) = x509_parser::pem::parse_x509_pem(&pem).unwrap();
    roots.add(pem.contents.into()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let server = site.identity("controller").server_config(&[ALPN_H2]).unwrap();
    let refused = handshake(Arc::new(client), server, CONTROLLER_NAME)
        .await
        .unwrap_err();
    assert!(refused.contains("CertificateRequired"), "{refused}");
}

#[test]
fn an_authority_is_never_overwritten() {
    let site = Site::new();
    let read = |name: &str| std::fs::read(site.data().join(name)).unwrap();
    let all = [
        "ca.pem",
        "ca.key",
        "controller.pem",
        "controller.key",
        "admin.pem",
        "admin.key",
        CLUSTER_ID_FILE,
    ];
    let before = all.map(read);
    let refused = init(&site.data(), "daegu", &[]).unwrap_err();
    assert!(matches!(refused, Error::AlreadyInitialised(_)), "{refused}");
    assert_eq!(all.map(read), before);
}

#[test]
fn an_init_that_was_interrupted_can_be_run_again() {
    let site = Site::new();
    let key = std::fs::read(site.data().join("ca.key")).unwrap();
    std::fs::remove_file(site.data().join("ca.pem")).unwrap();
    let cluster = init(&site.data(), "daegu", &[]).unwrap();
    assert_eq!(cluster_id(&site.data()).unwrap(), cluster);
    assert_eq!(std::fs::read(site.data().join("ca.key")).unwrap(), key);
    assert_eq!(site.identity("controller").peer().unwrap().role, Role::Controller);
}

#[test]
fn keys_are_for_their_owner_only_and_nothing_half_written_stays() {
    let site = Site::new();
    let mode = |path: PathBuf| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(site.data()), 0o700);
    let deep = site.dir.path().join("a").join("b");
    issue_operator(&site.data(), "kim", &deep).unwrap();
    assert_eq!(mode(deep.clone()), 0o700);
    assert_ne!(
        mode(deep.parent().unwrap().to_owned()),
        0o700,
        "others may pass through"
    );
    std::fs::write(site.dir.path().join("file"), "").unwrap();
    let refused = issue_operator(&site.data(), "kim", &site.dir.path().join("file")).unwrap_err();
    assert!(
        matches!(
            refused,
            Error::File {
                action: "make directory",
                ..
            }
        ),
        "{refused}"
    );
    for name in ["ca.key", "controller.key", "admin.key"] {
        assert_eq!(mode(site.data().join(name)), 0o600, "{name}");
    }
    assert_eq!(mode(site.agent_dir().join("agent.key")), 0o600);
    assert_eq!(mode(site.data().join("ca.pem")), 0o644);
    for dir in [site.data(), site.agent_dir()] {
        for entry in std::fs::read_dir(dir).unwrap() {
            let name = entry.unwrap().file_name();
            assert!(
                !name.to_string_lossy().starts_with('.'),
                "{name:?} was left behind"
            );
        }
    }
}

#[test]
#[ignore = "gives files to another user, which only root can"]
fn what_root_writes_belongs_to_the_owner_of_the_directory() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(dir.path(), Some(65_534), Some(65_534)).unwrap();
    init(dir.path(), "daegu", &[]).unwrap();
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().uid(), 65_534, "{:?}", entry.file_name());
    }
}

#[test]
fn certificates_say_what_they_are_for_and_how_long() {
    let site = Site::new();
    let days = |name: &str| {
        let pem = std::fs::read(site.data().join(name)).unwrap();
        let (_, pem) = x509_parser::pem::parse_x509_pem(&pem).unwrap();
        let certificate = pem.parse_x509().unwrap();
        let usage = certificate
            .extended_key_usage()
            .unwrap()
            .map(|usage| (usage.value.server_auth, usage.value.client_auth));
        let validity = certificate.validity();
        let (from, to) = (validity.not_before.timestamp(), validity.not_after.timestamp());
        let age = x509_parser::time::ASN1Time::now().timestamp() - from;
        assert!((3600..3900).contains(&age), "valid since {age} s ago");
        ((to - from - 3600) / 86_400, usage, certificate.is_ca())
    };
    assert_eq!(days("ca.pem"), (3652, None, true));
    assert_eq!(days("controller.pem"), (365, Some((true, true)), false));
    assert_eq!(days("admin.pem"), (365, Some((false, true)), false));
}

#[test]
fn operators_get_their_own_identity_and_cannot_take_a_servers_files() {
    let site = Site::new();
    let out = site.dir.path().join("people").join("kim");
    issue_operator(&site.data(), "kim", &out).unwrap();
    let peer = Identity::load_dir(&out, "kim").unwrap().peer().unwrap();
    assert_eq!((peer.role, peer.name.as_str()), (Role::Operator, "kim"));
    for bad in [
        "",
        "ca",
        "agent",
        "controller",
        "../kim",
        "a/b",
        "kim\n",
        "-x",
        &"k".repeat(64),
    ] {
        let refused = issue_operator(&site.data(), bad, &out).unwrap_err();
        assert!(
            matches!(refused, Error::Name { what: "operator", .. }),
            "{bad:?}: {refused}"
        );
    }
}

#[test]
fn what_is_missing_or_malformed_is_named() {
    let empty = tempfile::tempdir().unwrap();
    let refused = issue_agent(empty.path(), &host("h1"), &[], empty.path()).unwrap_err();
    assert!(refused.to_string().contains("dalgu-controller init"), "{refused}");
    assert!(matches!(cluster_id(empty.path()), Err(Error::NotInitialised(_))));
    for bad in ["", "Daegu", "a/b", "a b", &"a".repeat(64)] {
        assert!(
            matches!(
                init(empty.path(), bad, &[]),
                Err(Error::Name { what: "site", .. })
            ),
            "{bad:?}"
        );
    }
    for bad in ["", "a b", "10.0.0.256", "1.2.3", "x..y", "-a", "https://x", "a:b"] {
        let refused = init(empty.path(), "daegu", &[bad.to_owned()]);
        assert!(
            matches!(refused, Err(Error::Name { what: "address", .. })),
            "{bad:?}"
        );
    }
    assert_eq!(
        std::fs::read_dir(empty.path()).unwrap().count(),
        0,
        "a refusal leaves nothing behind"
    );
    std::fs::write(empty.path().join(CLUSTER_ID_FILE), "not an id\n").unwrap();
    assert!(matches!(cluster_id(empty.path()), Err(Error::ClusterId { .. })));
}
