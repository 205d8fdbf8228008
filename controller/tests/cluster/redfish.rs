//! A management controller for tests: Redfish over real TLS, with what real ones do wrong.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use dalgu_controller::model::Redfish;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Bytes, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, CertifiedIssuer, KeyPair};
use rustls::{ServerConfig, pki_types::PrivateKeyDer};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// What it does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fault {
    #[default]
    None,
    /// Takes requests, and answers none.
    Hangs,
    /// Answers this status.
    Status(u16),
    /// Answers what is not JSON.
    Garbage,
    /// Answers more than anybody reads.
    Endless,
    /// Names another host for its system.
    Elsewhere,
    /// Answers a reset with a task, which never ends and changes nothing.
    EndlessTask,
    /// Does not know a graceful shutdown.
    OnlyForce,
    /// Has a second computer system.
    TwoSystems,
    /// Sends to the same path with a slash.
    Redirects,
    /// Closes the connection after each answer.
    Closes,
}

#[derive(Debug, Default)]
pub struct Machine {
    pub on: bool,
    pub fault: Fault,
    /// Resets that came, in order.
    pub resets: Vec<String>,
    /// Requests that came.
    pub requests: Vec<String>,
}

/// Called with whether the machine is on, when that has changed.
type Switched = Box<dyn Fn(bool) + Send + Sync>;

#[derive(Clone)]
pub struct Server {
    pub address: SocketAddr,
    /// SHA-256 of its certificate.
    pub fingerprint: String,
    /// The authority that has signed it, in PEM.
    pub ca: String,
    machine: Arc<Mutex<Machine>>,
    switched: Arc<Switched>,
}

pub const USER: &str = "dalgu";
pub const PASSWORD: &str = "a password that is nowhere";

impl Server {
    /// Begins to serve a machine that is on.
    pub async fn start(switched: impl Fn(bool) + Send + Sync + 'static) -> Self {
        let mut authority = CertificateParams::new(Vec::new()).unwrap();
        authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let own = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let own = own.signed_by(&key, &authority).unwrap();
        let digest = ring::digest::digest(&ring::digest::SHA256, own.der());
        let fingerprint = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![own.der().clone()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Self {
            address: listener.local_addr().unwrap(),
            fingerprint,
            ca: authority.pem(),
            machine: Arc::new(Mutex::new(Machine {
                on: true,
                ..Machine::default()
            })),
            switched: Arc::new(Box::new(switched)),
        };
        tokio::spawn(server.clone().serve(listener, TlsAcceptor::from(Arc::new(tls))));
        server
    }

    pub fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap()
    }

    pub fn set(&self, fault: Fault) {
        self.machine().fault = fault;
    }

    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// What a host is set to.
    pub fn known_by_fingerprint(&self) -> Redfish {
        Redfish {
            url: self.url(),
            system: String::new(),
            fingerprint: self.fingerprint.clone(),
            credentials: "bmc".into(),
        }
    }

    async fn serve(self, listener: TcpListener, acceptor: TlsAcceptor) {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let (server, acceptor) = (self.clone(), acceptor.clone());
            tokio::spawn(async move {
                // A client that does not trust it ends the handshake.
                let Ok(tls) = acceptor.accept(tcp).await else {
                    return;
                };
                let keeps = server.machine().fault != Fault::Closes;
                let service = service_fn(move |request| {
                    let server = server.clone();
                    async move { Ok::<_, Infallible>(server.answer(request).await) }
                });
                let _ = http1::Builder::new()
                    .keep_alive(keeps)
                    .serve_connection(TokioIo::new(tls), service)
                    .await;
            });
        }
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path().to_owned();
        let expected = format!("Basic {}", STANDARD.encode(format!("{USER}:{PASSWORD}")));
        let given = parts.headers.get("authorization");
        let authorized = given.is_some_and(|given| given.as_bytes() == expected.as_bytes());
        let fault = {
            let mut machine = self.machine();
            machine.requests.push(format!("{} {path}", parts.method));
            machine.fault
        };
        match fault {
            Fault::Hangs => tokio::time::sleep(Duration::from_secs(3600)).await,
            Fault::Status(status) => {
                let said = json!({"error": {"message": "see extended", "@Message.ExtendedInfo": [{"Message": "the fan is loose"}]}});
                return respond(status, said.to_string());
            }
            Fault::Garbage => return respond(200, "<html>Please log in</html>".into()),
            Fault::Endless => return respond(200, format!("\"{}\"", "x".repeat(2 << 20))),
            _ => {}
        }
        if !authorized {
            return respond(401, json!({"error": {"message": "no"}}).to_string());
        }
        let body = body.collect().await.unwrap().to_bytes();
        self.ask(fault, parts.method.as_str(), &path, &body)
    }

    fn ask(&self, fault: Fault, method: &str, path: &str, body: &[u8]) -> Response<Full<Bytes>> {
        const SYSTEM: &str = "/redfish/v1/Systems/1";
        let target = format!("{SYSTEM}/Actions/ComputerSystem.Reset");
        match (method, path) {
            ("GET", "/redfish/v1/Systems") => {
                let mut members = vec![json!({"@odata.id": match fault {
                    Fault::Elsewhere => "https://192.0.2.1/redfish/v1/Systems/1",
                    _ => SYSTEM,
                }})];
                if fault == Fault::TwoSystems {
                    members.push(json!({"@odata.id": "/redfish/v1/Systems/blade-2"}));
                }
                respond(200, json!({ "Members": members }).to_string())
            }
            ("GET", SYSTEM) if fault == Fault::Redirects => Response::builder()
                .status(308)
                .header("location", format!("{SYSTEM}/"))
                .body(Full::default())
                .unwrap(),
            ("GET", path) if path.trim_end_matches('/') == SYSTEM => {
                let resets = match fault {
                    Fault::OnlyForce => json!(["On", "ForceOff"]),
                    _ => json!(["On", "ForceOff", "GracefulShutdown"]),
                };
                let state = if self.machine().on { "On" } else { "Off" };
                let action = json!({"target": target, "ResetType@Redfish.AllowableValues": resets});
                let system =
                    json!({"Id": "1", "PowerState": state, "Actions": {"#ComputerSystem.Reset": action}});
                respond(200, system.to_string())
            }
            ("POST", path) if path == target => {
                let body: Value = serde_json::from_slice(body).unwrap();
                let reset = body["ResetType"].as_str().unwrap().to_owned();
                let on = reset == "On";
                self.machine().resets.push(reset);
                if fault == Fault::EndlessTask {
                    return respond(
                        202,
                        json!({"@odata.id": "/redfish/v1/TaskService/Tasks/1", "TaskState": "Running"})
                            .to_string(),
                    );
                }
                let changed = std::mem::replace(&mut self.machine().on, on) != on;
                if changed {
                    (self.switched)(on);
                }
                respond(204, String::new())
            }
            _ => respond(404, json!({"error": {"message": "no such resource"}}).to_string()),
        }
    }
}

fn respond(status: u16, body: String) -> Response<Full<Bytes>> {
    Response::builder()
        .status(status)
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))
        .unwrap()
}

/// A directory with the credentials that the server takes.
pub fn credentials(dir: &std::path::Path, password: &str) -> std::path::PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let own = dir.join("bmc");
    std::fs::create_dir_all(&own).unwrap();
    let file = own.join("bmc");
    std::fs::write(&file, format!("{USER}\n{password}\n")).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    own
}
