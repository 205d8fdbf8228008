//! What programs are told of a refusal: a code of gRPC, and a stable reason in capitals.

use tonic::Code;

use super::Error;
use crate::{model::Fault, networks, volumes};

impl Error {
    /// What is kept of it, where it is not an answer to anybody.
    pub fn fault(&self) -> Fault {
        let (code, reason) = self.reason();
        Fault {
            code: code as i32,
            reason: reason.to_owned(),
            message: self.to_string(),
        }
    }

    /// Code and reason.
    #[allow(clippy::too_many_lines, reason = "a table")]
    pub const fn reason(&self) -> (Code, &'static str) {
        use Error as E;
        match self {
            E::VmNotFound(_) => (Code::NotFound, "VM_NOT_FOUND"),
            E::HostNotFound(_) => (Code::NotFound, "HOST_NOT_FOUND"),
            E::ImageNotFound(_) => (Code::NotFound, "IMAGE_NOT_FOUND"),
            E::ImageExists(_) => (Code::AlreadyExists, "IMAGE_ALREADY_EXISTS"),
            E::ImageNotAvailable { .. } => (Code::FailedPrecondition, "IMAGE_NOT_AVAILABLE"),
            E::ImageInUse { .. } => (Code::FailedPrecondition, "IMAGE_IN_USE"),
            E::ImageDeleting(_) => (Code::FailedPrecondition, "IMAGE_DELETING"),
            E::NotAwaitingUpload { .. } => (Code::FailedPrecondition, "IMAGE_NOT_AWAITING_UPLOAD"),
            E::NoImageRoom { .. } => (Code::ResourceExhausted, "NO_CAPACITY"),
            E::PlanNotFound(_) => (Code::NotFound, "PLAN_NOT_FOUND"),
            E::PlanInProgress(_) => (Code::FailedPrecondition, "PLAN_IN_PROGRESS"),
            E::PlanNotProposed { .. } => (Code::FailedPrecondition, "PLAN_NOT_PROPOSED"),
            E::PlanHash(_) => (Code::FailedPrecondition, "PLAN_CHANGED"),
            E::PlanOutdated(_) => (Code::FailedPrecondition, "PLAN_OUTDATED"),
            E::PlanEnded { .. } => (Code::FailedPrecondition, "PLAN_ENDED"),
            E::VmMoved { .. } => (Code::FailedPrecondition, "VM_MOVED"),
            E::VmChanged(_) => (Code::FailedPrecondition, "VM_CHANGED"),
            E::OperationNotFound(_) => (Code::NotFound, "OPERATION_NOT_FOUND"),
            E::VmExists(_) => (Code::AlreadyExists, "VM_ALREADY_EXISTS"),
            E::MacInUse { .. } => (Code::AlreadyExists, "MAC_IN_USE"),
            E::NetworkExists(_) => (Code::AlreadyExists, "NETWORK_ALREADY_EXISTS"),
            E::VniInUse { .. } => (Code::AlreadyExists, "VNI_IN_USE"),
            E::NetworkInUse { .. } => (Code::FailedPrecondition, "NETWORK_IN_USE"),
            E::GroupExists(_) => (Code::AlreadyExists, "SECURITY_GROUP_ALREADY_EXISTS"),
            E::GroupInUse { .. } => (Code::FailedPrecondition, "SECURITY_GROUP_IN_USE"),
            E::PlacementGroupNotFound(_) => (Code::NotFound, "PLACEMENT_GROUP_NOT_FOUND"),
            E::PlacementGroupExists(_) => (Code::AlreadyExists, "PLACEMENT_GROUP_ALREADY_EXISTS"),
            E::PlacementGroupInUse { .. } => (Code::FailedPrecondition, "PLACEMENT_GROUP_IN_USE"),
            E::PlacementConflict(_) => (Code::FailedPrecondition, "PLACEMENT_CONFLICT"),
            E::TooMany { .. } | E::TooManySnapshots(_) => (Code::ResourceExhausted, "TOO_MANY"),
            E::Network(error) => network_reason(error),
            E::Volume(error) => volume_reason(error),
            E::VolumeExists(_) => (Code::AlreadyExists, "VOLUME_ALREADY_EXISTS"),
            E::VolumeShrinks { .. } => (Code::InvalidArgument, "VOLUME_SHRINKS"),
            E::VolumePurged(_) => (Code::FailedPrecondition, "VOLUME_PURGED"),
            E::NoPoolRoom { .. } => (Code::ResourceExhausted, "NO_CAPACITY"),
            E::PoolTooSmall { .. } => (Code::FailedPrecondition, "POOL_TOO_SMALL"),
            E::BackupNotFound(_) => (Code::NotFound, "BACKUP_NOT_FOUND"),
            E::BackupInProgress { .. } => (Code::FailedPrecondition, "BACKUP_IN_PROGRESS"),
            E::BackupHasChildren { .. } => (Code::FailedPrecondition, "BACKUP_HAS_CHILDREN"),
            E::BackupInUse { .. } => (Code::FailedPrecondition, "BACKUP_IN_USE"),
            E::BackupNotAvailable { .. } => (Code::FailedPrecondition, "BACKUP_NOT_AVAILABLE"),
            E::BackupElsewhere { .. } => (Code::FailedPrecondition, "BACKUP_NOT_THERE"),
            E::NoCheckpoint(_) => (Code::FailedPrecondition, "NO_CHECKPOINT"),
            E::PoolNotFound { .. } | E::NoSuchPool { .. } => (Code::FailedPrecondition, "POOL_NOT_FOUND"),
            E::LastOfPool { .. } => (Code::FailedPrecondition, "LAST_HOST_OF_POOL"),
            E::ScheduleNotFound(_) => (Code::NotFound, "BACKUP_SCHEDULE_NOT_FOUND"),
            E::ScheduleExists(_) => (Code::AlreadyExists, "BACKUP_SCHEDULE_ALREADY_EXISTS"),
            E::EtagMismatch(_) => (Code::Aborted, "ETAG_MISMATCH"),
            E::Observing => (Code::FailedPrecondition, "SITE_OBSERVING"),
            E::Replaced(_) => (Code::FailedPrecondition, "OTHER_CONTROLLER"),
            E::Unconfirmed(_) => (Code::FailedPrecondition, "VM_UNCONFIRMED"),
            E::LowSpace(_) => (Code::ResourceExhausted, "STORE_LOW_SPACE"),
            E::NoCapacity { .. } | E::NoRoomToMake { .. } => (Code::ResourceExhausted, "NO_CAPACITY"),
            E::NotRunning { .. } | E::PowerChanging { .. } => (Code::FailedPrecondition, "VM_NOT_RUNNING"),
            E::Running(_) | E::RunsAtRevert(_) => (Code::FailedPrecondition, "VM_RUNNING"),
            E::Deleting(_) => (Code::FailedPrecondition, "VM_DELETING"),
            E::SeveralHosts { .. } => (Code::FailedPrecondition, "VM_ON_SEVERAL_HOSTS"),
            E::MigrationInProgress(_) => (Code::FailedPrecondition, "MIGRATION_IN_PROGRESS"),
            E::SameHost { .. } => (Code::FailedPrecondition, "SAME_HOST"),
            E::Initializing => (Code::Unavailable, "HOSTS_INITIALIZING"),
            E::HostUnreachable(_) => (Code::FailedPrecondition, "HOST_UNREACHABLE"),
            E::NotCancellable(_) => (Code::FailedPrecondition, "NOT_CANCELLABLE"),
            E::RequestReused(_) => (Code::AlreadyExists, "REQUEST_ID_REUSED"),
            E::DrainInProgress { .. } => (Code::FailedPrecondition, "DRAIN_IN_PROGRESS"),
            E::NotDrained { .. } => (Code::FailedPrecondition, "HOST_NOT_DRAINED"),
            E::PowerUnknown(_) => (Code::FailedPrecondition, "HOST_POWER_UNKNOWN"),
            E::PowerChanges { .. } => (Code::FailedPrecondition, "HOST_POWER_CHANGES"),
            E::PowerFailed { .. } => (Code::FailedPrecondition, "HOST_POWER_FAILED"),
            E::HostNeeded { .. } => (Code::FailedPrecondition, "HOST_NEEDED"),
            E::HostOff { .. } => (Code::FailedPrecondition, "HOST_OFF"),
            E::HostRuns { .. } => (Code::FailedPrecondition, "HOST_NOT_EMPTY"),
            E::HostNotEmpty { .. } => (Code::FailedPrecondition, "HOST_NOT_EMPTY"),
            E::ChangeInProgress { .. } => (Code::FailedPrecondition, "CHANGE_IN_PROGRESS"),
            E::DevicesStay(_) => (Code::FailedPrecondition, "DEVICES_STAY"),
            E::SizeFixed(_) => (Code::FailedPrecondition, "SIZE_FIXED"),
            E::BootDisk { .. } => (Code::FailedPrecondition, "BOOT_DISK"),
            E::DiskLeaving { .. } => (Code::FailedPrecondition, "DISK_IN_USE"),
            E::DiskShrinks { .. } => (Code::InvalidArgument, "DISK_SHRINKS"),
            E::OverlayStays { .. } => (Code::FailedPrecondition, "OVERLAY_STAYS"),
            E::HostTooOld(_) | E::NoIcmpTypes { .. } | E::NoSnapshotsThere(_) | E::NoBackups(_) => {
                (Code::FailedPrecondition, "HOST_TOO_OLD")
            }
            E::SnapshotNotFound { .. } => (Code::NotFound, "SNAPSHOT_NOT_FOUND"),
            E::SnapshotExists { .. } => (Code::AlreadyExists, "SNAPSHOT_ALREADY_EXISTS"),
            E::SnapshotNotReady { .. } => (Code::FailedPrecondition, "SNAPSHOT_NOT_READY"),
            E::SnapshotsLater { .. } => (Code::FailedPrecondition, "SNAPSHOTS_LATER"),
            E::SnapshotsPresent { .. } => (Code::FailedPrecondition, "SNAPSHOTS_PRESENT"),
            E::NoDisks(_) => (Code::FailedPrecondition, "NO_DISKS"),
            E::FieldNotMutable { .. } | E::PartNotMutable { .. } => {
                (Code::InvalidArgument, "FIELD_NOT_MUTABLE")
            }
            E::Invalid { .. } => (Code::InvalidArgument, "INVALID_FIELD"),
        }
    }
}

const fn network_reason(error: &networks::resolve::Error) -> (Code, &'static str) {
    use networks::resolve::Error as E;
    match error {
        E::NetworkNotFound(_) => (Code::NotFound, "NETWORK_NOT_FOUND"),
        E::GroupNotFound(_) => (Code::NotFound, "SECURITY_GROUP_NOT_FOUND"),
        E::AddressInUse { .. } => (Code::AlreadyExists, "ADDRESS_IN_USE"),
        E::NoAddress { .. } => (Code::ResourceExhausted, "NO_ADDRESS"),
        E::Full(_) => (Code::ResourceExhausted, "NETWORK_FULL"),
        E::Port { .. } => (Code::InvalidArgument, "INVALID_FIELD"),
    }
}

const fn volume_reason(error: &volumes::resolve::Error) -> (Code, &'static str) {
    use volumes::resolve::Error as E;
    match error {
        E::NotFound(_) => (Code::NotFound, "VOLUME_NOT_FOUND"),
        E::Deleted(_) => (Code::FailedPrecondition, "VOLUME_DELETED"),
        E::InUse { .. } => (Code::FailedPrecondition, "VOLUME_IN_USE"),
        E::Elsewhere { .. } => (Code::FailedPrecondition, "VOLUME_ELSEWHERE"),
        E::Disk { .. } => (Code::InvalidArgument, "INVALID_FIELD"),
    }
}
