//! The controller's gRPC services: who may call, what the wire means, and nothing else.
//!
//! One file a service. Each call is checked, becomes a value of the domain, and goes to `verbs`, `hosts` or a durable
//! snapshot. Generated types stop here.

pub mod backup;
pub mod event;
pub mod host;
pub mod image;
pub mod network;
pub mod operation;
pub mod page;
pub mod placement;
pub mod registrar;
pub mod request;
pub mod site;
pub mod snapshot;
pub mod vm;
pub mod volume;
pub mod wire;

use std::{collections::HashMap, sync::Arc};

use dalgu_proto::{
    reason,
    tls::{Peer, Role},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Status};

use crate::{
    agent_client::Agents,
    config::Config,
    metrics::Metrics,
    networks::resolve,
    state::Db,
    verbs::{self, MacHolder},
    volumes,
};

/// What the services work with.
#[derive(Clone)]
pub struct Services {
    /// The state.
    pub db: Db,
    /// The agents.
    pub agents: Arc<Agents>,
    /// How the controller runs.
    pub config: Arc<Config>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// The controller is going down: streams and waits end.
    pub stop: CancellationToken,
}

fn peer<T>(request: &Request<T>) -> Result<&Peer, Status> {
    let missing = || {
        reason::status(
            Code::Unauthenticated,
            "NO_IDENTITY",
            "the connection has no identity",
        )
    };
    request.extensions().get::<Peer>().ok_or_else(missing)
}

/// Lets operators in.
#[allow(
    clippy::result_large_err,
    reason = "tonic's error is what an interceptor returns"
)]
pub fn only_operators(request: Request<()>) -> Result<Request<()>, Status> {
    let peer = peer(&request)?;
    if peer.role == Role::Operator {
        return Ok(request);
    }
    let message = format!("{peer} may not use the operator API; use an operator's certificate");
    Err(reason::status(Code::PermissionDenied, "NOT_OPERATOR", message))
}

/// Lets agents in.
#[allow(
    clippy::result_large_err,
    reason = "tonic's error is what an interceptor returns"
)]
pub fn only_agents(request: Request<()>) -> Result<Request<()>, Status> {
    let peer = peer(&request)?;
    if matches!(peer.role, Role::Agent(_)) {
        return Ok(request);
    }
    let message = format!("{peer} may not report for a host; use an agent's certificate");
    Err(reason::status(Code::PermissionDenied, "NOT_AGENT", message))
}

/// Lets everybody in who has an identity, which the connection has checked.
#[allow(
    clippy::result_large_err,
    reason = "tonic's error is what an interceptor returns"
)]
pub fn anybody(request: Request<()>) -> Result<Request<()>, Status> {
    peer(&request)?;
    Ok(request)
}

/// Refusals of verbs on the wire: code, reason, and what programs can use.
impl From<verbs::Error> for Status {
    fn from(error: verbs::Error) -> Self {
        use verbs::Error as E;
        let (code, why) = match &error {
            E::VmNotFound(_) => (Code::NotFound, "VM_NOT_FOUND"),
            E::HostNotFound(_) => (Code::NotFound, "HOST_NOT_FOUND"),
            E::ImageNotFound(_) => (Code::NotFound, "IMAGE_NOT_FOUND"),
            E::ImageExists(_) => (Code::AlreadyExists, "IMAGE_ALREADY_EXISTS"),
            E::ImageNotAvailable { .. } => (Code::FailedPrecondition, "IMAGE_NOT_AVAILABLE"),
            E::ImageInUse { .. } => (Code::FailedPrecondition, "IMAGE_IN_USE"),
            E::ImageDeleting(_) => (Code::FailedPrecondition, "IMAGE_DELETING"),
            E::NotAwaitingUpload { .. } => (Code::FailedPrecondition, "IMAGE_NOT_AWAITING_UPLOAD"),
            E::NoImageRoom { .. } => (Code::ResourceExhausted, "NO_CAPACITY"),
            E::OperationNotFound(_) => (Code::NotFound, "OPERATION_NOT_FOUND"),
            E::VmExists(_) => (Code::AlreadyExists, "VM_ALREADY_EXISTS"),
            E::MacInUse { .. } => (Code::AlreadyExists, "MAC_IN_USE"),
            E::NetworkExists(_) => (Code::AlreadyExists, "NETWORK_ALREADY_EXISTS"),
            E::VniInUse { .. } => (Code::AlreadyExists, "VNI_IN_USE"),
            E::NetworkInUse { .. } => (Code::FailedPrecondition, "NETWORK_IN_USE"),
            E::GroupExists(_) => (Code::AlreadyExists, "SECURITY_GROUP_ALREADY_EXISTS"),
            E::GroupInUse { .. } => (Code::FailedPrecondition, "SECURITY_GROUP_IN_USE"),
            E::TooMany { .. } | E::TooManySnapshots(_) => (Code::ResourceExhausted, "TOO_MANY"),
            E::Network(error) => network_reason(error),
            E::Volume(error) => volume_reason(error),
            E::VolumeExists(_) => (Code::AlreadyExists, "VOLUME_ALREADY_EXISTS"),
            E::VolumeShrinks { .. } => (Code::InvalidArgument, "VOLUME_SHRINKS"),
            E::VolumePurged(_) => (Code::FailedPrecondition, "VOLUME_PURGED"),
            E::NoPoolRoom { .. } => (Code::ResourceExhausted, "NO_CAPACITY"),
            E::BackupNotFound(_) => (Code::NotFound, "BACKUP_NOT_FOUND"),
            E::BackupInProgress { .. } => (Code::FailedPrecondition, "BACKUP_IN_PROGRESS"),
            E::BackupHasChildren { .. } => (Code::FailedPrecondition, "BACKUP_HAS_CHILDREN"),
            E::BackupInUse { .. } => (Code::FailedPrecondition, "BACKUP_IN_USE"),
            E::BackupNotAvailable { .. } => (Code::FailedPrecondition, "BACKUP_NOT_AVAILABLE"),
            E::BackupElsewhere { .. } => (Code::FailedPrecondition, "BACKUP_NOT_THERE"),
            E::NoCheckpoint(_) => (Code::FailedPrecondition, "NO_CHECKPOINT"),
            E::PoolNotFound { .. } => (Code::FailedPrecondition, "POOL_NOT_FOUND"),
            E::ScheduleNotFound(_) => (Code::NotFound, "BACKUP_SCHEDULE_NOT_FOUND"),
            E::ScheduleExists(_) => (Code::AlreadyExists, "BACKUP_SCHEDULE_ALREADY_EXISTS"),
            E::EtagMismatch(_) => (Code::Aborted, "ETAG_MISMATCH"),
            E::Observing => (Code::FailedPrecondition, "SITE_OBSERVING"),
            E::Replaced(_) => (Code::FailedPrecondition, "OTHER_CONTROLLER"),
            E::Unconfirmed(_) => (Code::FailedPrecondition, "VM_UNCONFIRMED"),
            E::LowSpace(_) => (Code::ResourceExhausted, "STORE_LOW_SPACE"),
            E::NoCapacity { .. } => (Code::ResourceExhausted, "NO_CAPACITY"),
            E::NotRunning { .. } => (Code::FailedPrecondition, "VM_NOT_RUNNING"),
            E::Running(_) | E::RunsAtRevert(_) => (Code::FailedPrecondition, "VM_RUNNING"),
            E::Deleting(_) => (Code::FailedPrecondition, "VM_DELETING"),
            E::SeveralHosts { .. } => (Code::FailedPrecondition, "VM_ON_SEVERAL_HOSTS"),
            E::MigrationInProgress(_) => (Code::FailedPrecondition, "MIGRATION_IN_PROGRESS"),
            E::SameHost { .. } => (Code::FailedPrecondition, "SAME_HOST"),
            E::Initializing => (Code::Unavailable, "HOSTS_INITIALIZING"),
            E::HostUnreachable(_) => (Code::FailedPrecondition, "HOST_UNREACHABLE"),
            E::NotCancellable(_) => (Code::FailedPrecondition, "NOT_CANCELLABLE"),
            E::RequestReused(_) => (Code::AlreadyExists, "REQUEST_ID_REUSED"),
            E::HostNotEmpty { .. } => (Code::FailedPrecondition, "HOST_NOT_EMPTY"),
            E::ChangeInProgress { .. } => (Code::FailedPrecondition, "CHANGE_IN_PROGRESS"),
            E::BootDisk { .. } => (Code::FailedPrecondition, "BOOT_DISK"),
            E::DiskLeaving { .. } => (Code::FailedPrecondition, "DISK_IN_USE"),
            E::DiskShrinks { .. } => (Code::InvalidArgument, "DISK_SHRINKS"),
            E::OverlayStays { .. } => (Code::FailedPrecondition, "OVERLAY_STAYS"),
            E::HostTooOld(_) | E::NoSnapshotsThere(_) | E::NoBackups(_) => {
                (Code::FailedPrecondition, "HOST_TOO_OLD")
            }
            E::SnapshotNotFound { .. } => (Code::NotFound, "SNAPSHOT_NOT_FOUND"),
            E::SnapshotExists { .. } => (Code::AlreadyExists, "SNAPSHOT_ALREADY_EXISTS"),
            E::SnapshotNotReady { .. } => (Code::FailedPrecondition, "SNAPSHOT_NOT_READY"),
            E::SnapshotsLater { .. } => (Code::FailedPrecondition, "SNAPSHOTS_LATER"),
            E::SnapshotsPresent { .. } => (Code::FailedPrecondition, "SNAPSHOTS_PRESENT"),
            E::VolumeAttached { .. } => (Code::FailedPrecondition, "VOLUME_ATTACHED"),
            E::NoDisks(_) => (Code::FailedPrecondition, "NO_DISKS"),
            E::FieldNotMutable { .. } | E::PartNotMutable { .. } | E::VolumeStays { .. } => {
                (Code::InvalidArgument, "FIELD_NOT_MUTABLE")
            }
            E::Invalid { field, message } => return reason::invalid(field, message),
        };
        reason::status_with(code, why, error.to_string(), metadata(&error))
    }
}

fn network_reason(error: &resolve::Error) -> (Code, &'static str) {
    use resolve::Error as E;
    match error {
        E::NetworkNotFound(_) => (Code::NotFound, "NETWORK_NOT_FOUND"),
        E::GroupNotFound(_) => (Code::NotFound, "SECURITY_GROUP_NOT_FOUND"),
        E::AddressInUse { .. } => (Code::AlreadyExists, "ADDRESS_IN_USE"),
        E::NoAddress { .. } => (Code::ResourceExhausted, "NO_ADDRESS"),
        E::Full(_) => (Code::ResourceExhausted, "NETWORK_FULL"),
        E::Port { .. } => (Code::InvalidArgument, "INVALID_FIELD"),
    }
}

fn volume_reason(error: &volumes::resolve::Error) -> (Code, &'static str) {
    use volumes::resolve::Error as E;
    match error {
        E::NotFound(_) => (Code::NotFound, "VOLUME_NOT_FOUND"),
        E::Deleted(_) => (Code::FailedPrecondition, "VOLUME_DELETED"),
        E::InUse { .. } => (Code::FailedPrecondition, "VOLUME_IN_USE"),
        E::Elsewhere { .. } => (Code::FailedPrecondition, "VOLUME_ELSEWHERE"),
        E::Disk { .. } => (Code::InvalidArgument, "INVALID_FIELD"),
    }
}

/// At most so many bytes of verdicts travel in an error: it is carried in a header.
const VERDICTS_BYTES: usize = 4096;

fn metadata(error: &verbs::Error) -> HashMap<String, String> {
    let decision = match error {
        verbs::Error::NoCapacity { decision } => decision,
        verbs::Error::MacInUse { mac, holder } => {
            let holder = match holder {
                MacHolder::Vm(name) => ("vm".to_owned(), name.to_string()),
                MacHolder::Nic(name) => ("nic".to_owned(), name.clone()),
            };
            return HashMap::from([("mac".to_owned(), mac.clone()), holder]);
        }
        _ => return HashMap::new(),
    };
    let mut facts = HashMap::new();
    let mut room = VERDICTS_BYTES;
    for verdict in &decision.verdicts {
        let texts: Vec<_> = verdict.shortfalls.iter().map(|s| s.message.as_str()).collect();
        let text = texts.join("; ");
        let size = verdict.host.as_str().len() + text.len();
        if size > room {
            facts.insert(
                "omitted".to_owned(),
                (decision.verdicts.len() - facts.len()).to_string(),
            );
            break;
        }
        room -= size;
        facts.insert(verdict.host.to_string(), text);
    }
    if let Some(hint) = &decision.hint {
        facts.insert("hint".to_owned(), hint.text.clone());
    }
    facts
}
