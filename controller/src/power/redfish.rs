//! Management controllers by Redfish (DMTF DSP0266 1.15; ComputerSystem.Reset, PowerState), over HTTPS with Basic authentication.
//!
//! Each request has a connection of its own: management controllers take few, hold few sessions, and many close after an answer without
//! having said so. Nothing is followed to another address. An answer is judged as what it is, the word of a stranger: its size and time are bounded, and of what a
//! reset starts (a task that may never end) nothing is awaited; only the power state tells.

mod tls;

use std::{path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use http::{HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, pki_types::ServerName};
use serde::Deserialize;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;

use super::{Error, Power, Reading, Reset, credentials::Credentials};
use crate::model::Redfish as Machine;

/// What a call may take altogether. Management controllers are slow; one that takes longer than this does not work.
const TIMEOUT: Duration = Duration::from_secs(30);
/// What an answer may be.
const MAX_BYTES: usize = 1 << 20;
/// How much of what it says of a refusal is shown.
const MAX_SAID: usize = 200;
const SYSTEMS: &str = "/redfish/v1/Systems";

/// See the module.
#[derive(Debug, Clone)]
pub struct Redfish {
    /// Where the files with user and password are.
    pub credentials: PathBuf,
    /// Who signs the certificates of management controllers that are not known by their fingerprint.
    pub ca: Option<PathBuf>,
}

/// `host:port` of a service's address, and the name or address that its certificate must be for.
pub fn authority(url: &str) -> Option<(String, ServerName<'static>)> {
    let uri: Uri = url.parse().ok()?;
    let authority = uri.authority().filter(|_| uri.scheme_str() == Some("https"))?;
    let plain = uri.path().trim_end_matches('/').is_empty() && uri.query().is_none();
    if !plain || authority.as_str().contains('@') {
        return None;
    }
    let host = authority.host();
    let name = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let name = ServerName::try_from(name).ok()?;
    Some((format!("{host}:{}", authority.port_u16().unwrap_or(443)), name))
}

#[derive(Deserialize)]
struct Link {
    #[serde(rename = "@odata.id")]
    path: String,
}

#[derive(Deserialize)]
struct Collection {
    #[serde(rename = "Members")]
    members: Vec<Link>,
}

#[derive(Deserialize)]
struct System {
    #[serde(rename = "PowerState", default)]
    power_state: Option<String>,
    #[serde(rename = "Actions", default)]
    actions: Actions,
}

#[derive(Deserialize, Default)]
struct Actions {
    #[serde(rename = "#ComputerSystem.Reset", default)]
    reset: Option<ResetAction>,
}

#[derive(Deserialize)]
struct ResetAction {
    target: String,
    #[serde(rename = "ResetType@Redfish.AllowableValues", default)]
    allowed: Vec<String>,
}

/// One call.
struct Session<'a> {
    machine: &'a Machine,
    authority: String,
    name: ServerName<'static>,
    tls: Arc<ClientConfig>,
    authorization: HeaderValue,
}

impl Redfish {
    async fn within<T>(
        &self,
        machine: &Machine,
        call: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let late = |_| Error::Timeout {
            url: machine.url.clone(),
            seconds: TIMEOUT.as_secs(),
        };
        tokio::time::timeout(TIMEOUT, call).await.map_err(late)?
    }

    fn open<'a>(&self, machine: &'a Machine) -> Result<Session<'a>, Error> {
        let failed = |message: String| Error::Connect {
            url: machine.url.clone(),
            message,
        };
        let authorization = Credentials::read(&self.credentials, &machine.credentials)?.basic();
        let known = authority(&machine.url);
        let (authority, name) = known.ok_or_else(|| failed("it is no https address".to_owned()))?;
        Ok(Session {
            machine,
            authority,
            name,
            tls: tls::config(&machine.fingerprint, self.ca.as_deref()).map_err(failed)?,
            authorization,
        })
    }
}

impl Session<'_> {
    fn unreachable(&self, error: impl std::fmt::Display) -> Error {
        Error::Connect {
            url: self.machine.url.clone(),
            message: error.to_string(),
        }
    }

    /// A connection; what carries it ends with what is returned beside it.
    async fn connect(&self) -> Result<(http1::SendRequest<Full<Bytes>>, AbortOnDropHandle<()>), Error> {
        let tcp = TcpStream::connect(&self.authority).await;
        let tcp = tcp.map_err(|error| self.unreachable(error))?;
        let tls = TlsConnector::from(self.tls.clone())
            .connect(self.name.clone(), tcp)
            .await;
        let tls = tls.map_err(|error| self.unreachable(error))?;
        let connected = http1::handshake(TokioIo::new(tls)).await;
        let (sender, connection) = connected.map_err(|error| self.unreachable(error))?;
        let connection = tokio::spawn(async move {
            // What goes wrong there, the request is told.
            let _ = connection.await;
        });
        Ok((sender, AbortOnDropHandle::new(connection)))
    }

    /// Asks, and returns the status, where it points to, and the body.
    async fn send(
        &self,
        method: &Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<(StatusCode, Option<String>, Bytes), Error> {
        let what = format!("{method} {path}");
        let malformed = |message: String| Error::Malformed {
            url: self.machine.url.clone(),
            what: what.clone(),
            message,
        };
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.authority)
            .header(header::CONNECTION, "close")
            .header(header::ACCEPT, "application/json")
            .header("OData-Version", "4.0")
            .header(header::AUTHORIZATION, &self.authorization);
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let bytes = body.map(|body| Bytes::from(body.to_string())).unwrap_or_default();
        let request = request
            .body(Full::new(bytes))
            .map_err(|error| malformed(error.to_string()))?;
        let (mut sender, _connection) = self.connect().await?;
        let answer = sender.send_request(request).await;
        let answer = answer.map_err(|error| self.unreachable(error))?;
        let status = answer.status();
        let location = answer.headers().get(header::LOCATION);
        let location = location.and_then(|value| value.to_str().ok()).map(str::to_owned);
        let body = Limited::new(answer.into_body(), MAX_BYTES).collect().await;
        let body = body.map_err(|error| malformed(error.to_string()))?.to_bytes();
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(Error::Unauthorized {
                url: self.machine.url.clone(),
                credentials: self.machine.credentials.clone(),
                status: status.as_u16(),
            }),
            _ if status.is_client_error() || status.is_server_error() => Err(Error::Status {
                url: self.machine.url.clone(),
                what,
                status: status.as_u16(),
                message: said(&body),
            }),
            _ => Ok((status, location, body)),
        }
    }

    async fn get<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        let mut path = path.to_owned();
        let mut answer = self.send(&Method::GET, &path, None).await?;
        if answer.0.is_redirection() {
            // Some add a slash; none has a reason to send elsewhere.
            let location = answer.1.unwrap_or_default();
            path = location
                .strip_prefix(self.machine.url.trim_end_matches('/'))
                .unwrap_or(&location)
                .to_owned();
            self.is_path("GET", &path)?;
            answer = self.send(&Method::GET, &path, None).await?;
        }
        serde_json::from_slice(&answer.2)
            .map_err(|error| self.malformed(&format!("GET {path}"), error.to_string()))
    }

    fn malformed(&self, what: &str, message: String) -> Error {
        Error::Malformed {
            url: self.machine.url.clone(),
            what: what.to_owned(),
            message,
        }
    }

    /// What it names is asked of itself alone.
    fn is_path(&self, what: &str, path: &str) -> Result<(), Error> {
        match path.starts_with('/') && !path.starts_with("//") {
            true => Ok(()),
            false => Err(self.malformed(what, format!("it points to {path:?}"))),
        }
    }

    async fn system(&self) -> Result<System, Error> {
        if !self.machine.system.is_empty() {
            let path = format!("{SYSTEMS}/{}", self.machine.system);
            return self.get(&path).await;
        }
        let all: Collection = self.get(SYSTEMS).await?;
        match &all.members[..] {
            [only] => {
                self.is_path("its computer system", &only.path)?;
                self.get(&only.path).await
            }
            members => {
                let ids = members
                    .iter()
                    .filter_map(|link| link.path.trim_end_matches('/').rsplit('/').next());
                let ids: Vec<_> = ids.map(clean).collect();
                Err(Error::System {
                    url: self.machine.url.clone(),
                    systems: if ids.is_empty() {
                        "(none)".to_owned()
                    } else {
                        ids.join(", ")
                    },
                })
            }
        }
    }
}

/// What it says of a refusal (DSP0266, "Error responses").
fn said(body: &[u8]) -> String {
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    let error = &body["error"];
    let texts = [&error["@Message.ExtendedInfo"][0]["Message"], &error["message"]];
    let text = texts.into_iter().find_map(Value::as_str).unwrap_or_default();
    clean(text)
}

/// What a stranger wrote, short and in one line.
fn clean(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MAX_SAID).collect()
}

#[async_trait]
impl Power for Redfish {
    async fn read(&self, machine: &Machine) -> Result<Reading, Error> {
        self.within(machine, async {
            let session = self.open(machine)?;
            let system = session.system().await?;
            let power_state = system.power_state.map(|state| clean(&state));
            let power_state = power_state
                .ok_or_else(|| session.malformed("its computer system", "it has no PowerState".to_owned()))?;
            let resets = system
                .actions
                .reset
                .map(|action| action.allowed)
                .unwrap_or_default();
            Ok(Reading {
                power_state,
                resets: resets.iter().map(|reset| clean(reset)).collect(),
            })
        })
        .await
    }

    async fn reset(&self, machine: &Machine, reset: Reset) -> Result<(), Error> {
        self.within(machine, async {
            let session = self.open(machine)?;
            let action = session.system().await?.actions.reset;
            let action = action.ok_or_else(|| {
                session.malformed("its computer system", "it has no ComputerSystem.Reset".to_owned())
            })?;
            session.is_path("its computer system", &action.target)?;
            let knows = |allowed: &String| allowed == reset.as_str();
            if !action.allowed.is_empty() && !action.allowed.iter().any(knows) {
                let known: Vec<_> = action.allowed.iter().map(|allowed| clean(allowed)).collect();
                return Err(Error::Unsupported {
                    url: machine.url.clone(),
                    reset: reset.as_str(),
                    known: known.join(", "),
                });
            }
            let body = serde_json::json!({ "ResetType": reset.as_str() });
            let (status, ..) = session.send(&Method::POST, &action.target, Some(&body)).await?;
            match status.is_success() {
                true => Ok(()),
                false => Err(session.malformed("the reset", format!("status {status}"))),
            }
        })
        .await
    }
}
