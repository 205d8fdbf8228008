//! The connection to the controller: dials it, repeats what is safe to repeat while it is away, and says in words
//! why it cannot be reached. The only place of this crate that opens a connection.

use std::{error::Error as StdError, io, time::Duration};

use dalgu_proto::{tls, v1};
use tokio::time::{Instant, sleep, sleep_until};
use tonic::{Code, Response, Status, transport::Channel};
use v1::{
    backup_service_client::BackupServiceClient, event_service_client::EventServiceClient,
    host_service_client::HostServiceClient, image_service_client::ImageServiceClient,
    network_service_client::NetworkServiceClient, operation_service_client::OperationServiceClient,
    placement_service_client::PlacementServiceClient, plan_service_client::PlanServiceClient,
    site_service_client::SiteServiceClient, snapshot_service_client::SnapshotServiceClient,
    vm_service_client::VmServiceClient, volume_service_client::VolumeServiceClient,
};

use crate::config::Target;

/// Longest answer to a call that should be quick.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// A page of a thousand hosts with all they are made of is larger than gRPC's usual 4 MiB.
const MAX_MESSAGE: usize = 64 << 20;
/// The next step when certificates are refused by either side.
pub const CERTIFICATES: &str = "the certificates do not match: check that ca, cert and key of the context are of this site and still valid";
/// First pause before a call is repeated; doubles up to [`MAX_BACKOFF`].
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
/// Longest pause before a call is repeated.
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The identity cannot be read.
    #[error("cannot use the certificate: {}", chain(.0))]
    Identity(#[source] tls::Error),
    /// The controller cannot be reached or is not the right one.
    #[error("cannot reach the controller at {endpoint}: {}", innermost(source))]
    Connect {
        /// Where it was expected.
        endpoint: String,
        /// Why.
        #[source]
        source: tls::Error,
    },
}

impl Error {
    /// What to do next.
    pub fn hint(&self) -> String {
        const SHOW: &str = "`dalgu context show` says which controller and certificate are used";
        let Self::Connect { source, .. } = self else {
            return "check the ca, cert and key of the context: `dalgu context show`".to_owned();
        };
        let cause = io_cause(source);
        let first = match cause.map(io::Error::kind) {
            Some(io::ErrorKind::ConnectionRefused) => "nothing listens there: check that the controller runs",
            Some(io::ErrorKind::NotFound) => {
                "there is no such socket: check that the controller runs on this machine"
            }
            Some(io::ErrorKind::PermissionDenied) => {
                "this user may not open the socket: try as root, or use a certificate"
            }
            Some(
                io::ErrorKind::TimedOut | io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable,
            ) => "check the address and the network in between",
            _ if chain(source).contains("certificate") => CERTIFICATES,
            _ if matches!(source, tls::Error::Endpoint(_)) => "correct the endpoint of the context",
            _ => "check that the controller runs",
        };
        format!("{first}; {SHOW}")
    }
}

/// All the texts of an error and its causes.
fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut texts = vec![error.to_string()];
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if !texts.iter().any(|seen| seen.contains(&text)) {
            texts.push(text);
        }
        next = cause.source();
    }
    texts.join(": ")
}

/// The text of the last cause: what the operating system or TLS said.
fn innermost(error: &(dyn StdError + 'static)) -> String {
    let mut last = error;
    while let Some(cause) = last.source() {
        last = cause;
    }
    last.to_string()
}

fn io_cause<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a io::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return Some(io);
        }
        next = error.source();
    }
    None
}

/// What the transport said, when the status was made on this side of the wire.
pub fn transport_error(status: &Status) -> Option<String> {
    status.source().map(chain)
}

/// Whether the controller refused this side's certificate. With TLS 1.3 the client learns so only after its own
/// handshake is done, from the first call.
pub fn is_certificate_refused(status: &Status) -> bool {
    transport_error(status).is_some_and(|text| text.contains("fatal alert"))
}

/// Whether a call failed for want of a connection, so that it may be repeated with the same request_id.
pub fn is_lost(status: &Status) -> bool {
    if is_certificate_refused(status) {
        return false;
    }
    // A status with a source was made on this side of the wire, by the transport.
    let broken = status.source().is_some()
        && matches!(status.code(), Code::Unknown | Code::Internal | Code::Cancelled);
    broken || status.code() == Code::Unavailable
}

/// Pauses between attempts: doubling, with a ceiling.
#[derive(Debug)]
pub struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(FIRST_BACKOFF)
    }
}

impl Backoff {
    /// Waits before the next attempt.
    pub async fn pause(&mut self) {
        sleep(self.0).await;
        self.0 = (self.0 * 2).min(MAX_BACKOFF);
    }
}

/// A connection to the controller. Cheap to clone; reconnects by itself.
#[derive(Debug, Clone)]
pub struct Client {
    channel: Channel,
}

impl Client {
    /// Connects.
    pub async fn connect(target: &Target) -> Result<Self, Error> {
        let failed = |source| Error::Connect {
            endpoint: target.endpoint.clone(),
            source,
        };
        let channel = match (&target.identity, target.endpoint.strip_prefix("unix:")) {
            (Some(files), None) => {
                let identity =
                    tls::Identity::load(&files.ca, &files.cert, &files.key).map_err(Error::Identity)?;
                tls::client::connect(&target.endpoint, tls::CONTROLLER_NAME, &identity)
                    .await
                    .map_err(failed)?
            }
            (_, path) => {
                let path = path.ok_or_else(|| failed(tls::Error::Endpoint(target.endpoint.clone())))?;
                tls::client::connect_unix(path.trim_start_matches("//").into())
                    .await
                    .map_err(failed)?
            }
        };
        Ok(Self { channel })
    }

    /// VMs.
    pub fn vms(&self) -> VmServiceClient<Channel> {
        VmServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// Hosts.
    pub fn hosts(&self) -> HostServiceClient<Channel> {
        HostServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// Images.
    pub fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// Backups and their schedules.
    pub fn backups(&self) -> BackupServiceClient<Channel> {
        BackupServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// Networks and security groups.
    pub fn networks(&self) -> NetworkServiceClient<Channel> {
        NetworkServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// Volumes.
    pub fn volumes(&self) -> VolumeServiceClient<Channel> {
        VolumeServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// Snapshots of VMs.
    pub fn snapshots(&self) -> SnapshotServiceClient<Channel> {
        SnapshotServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// Plans of moves.
    pub fn plans(&self) -> PlanServiceClient<Channel> {
        PlanServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// The site.
    pub fn site(&self) -> SiteServiceClient<Channel> {
        SiteServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// Operations.
    pub fn operations(&self) -> OperationServiceClient<Channel> {
        OperationServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// Events.
    pub fn events(&self) -> EventServiceClient<Channel> {
        EventServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// Placement.
    pub fn placement(&self) -> PlacementServiceClient<Channel> {
        PlacementServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// Makes a call once.
    pub async fn call<T>(
        &self,
        call: impl AsyncFn(&Self) -> Result<Response<T>, Status>,
    ) -> Result<T, Status> {
        // Cancel safe: nothing is done with an answer that comes too late.
        tokio::select! {
            answer = call(self) => answer.map(Response::into_inner),
            () = sleep(CALL_TIMEOUT) => {
                Err(Status::deadline_exceeded(format!("no answer within {} s", CALL_TIMEOUT.as_secs())))
            }
        }
    }

    /// Makes a call again and again while the controller is away, at most until the limit. For calls that are safe to
    /// repeat: reads, and changes that bear a request_id.
    pub async fn retry<T>(
        &self,
        limit: Duration,
        mut lost: impl FnMut(&Status),
        call: impl AsyncFn(&Self) -> Result<Response<T>, Status>,
    ) -> Result<T, Status> {
        let (deadline, mut backoff) = (Instant::now() + limit, Backoff::default());
        loop {
            let status = match self.call(&call).await {
                Err(status) if is_lost(&status) => status,
                outcome => return outcome,
            };
            lost(&status);
            // Cancel safe: both only wait.
            tokio::select! {
                () = backoff.pause() => {}
                () = sleep_until(deadline) => return Err(status),
            }
        }
    }
}
