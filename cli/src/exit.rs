//! What went wrong, for people (a line, a table, a next step) and for scripts (the exit code). Every command ends in
//! an [`Error`] of this module or in success.

use std::{error::Error as _, io};

use dalgu_proto::{reason, v1};
use tonic::Code;
use tonic_types::StatusExt;

use crate::{
    client, config,
    output::{self, Term, human},
};

/// Exit codes; documented in `dalgu --help`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Another failure.
    Other = 1,
    /// Wrong usage, or a value that is not allowed.
    Usage = 2,
    /// Not found.
    NotFound = 3,
    /// Exists already, or was changed meanwhile.
    Conflict = 4,
    /// Not possible in the present state, or no room.
    Refused = 5,
    /// The controller cannot be reached, or does not accept the caller.
    Unreachable = 6,
    /// Gave up waiting.
    TimedOut = 7,
    /// The operation failed or was cancelled.
    OperationFailed = 8,
    /// The doctor found something, or could not see every host.
    Unwell = 9,
    /// Interrupted.
    Interrupted = 130,
}

/// Why a command did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The arguments do not make sense together, or a file does not hold what it should.
    #[error("{0}")]
    Usage(String),
    /// What is there cannot be changed in its present state.
    #[error("{0}")]
    NotNow(String),
    /// No controller is configured.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// The controller cannot be reached.
    #[error(transparent)]
    Connect(#[from] client::Error),
    /// The controller refuses.
    #[error("{}", message_of(.0))]
    Rpc(Box<tonic::Status>),
    /// The operation has not ended in time.
    #[error("operation {operation} has not ended within {limit}; it goes on")]
    WaitTimedOut {
        /// Its id.
        operation: String,
        /// How long was waited, for people.
        limit: String,
    },
    /// The operation ended otherwise than asked.
    #[error("{}", ended(.0))]
    OperationEnded(Box<v1::Operation>),
    /// An operation that was to be cancelled had ended otherwise before.
    #[error("operation {} had {} before it could be cancelled", .0.id, end_of(.0))]
    TooLate(Box<v1::Operation>),
    /// A change of a VM has not been carried out in time.
    #[error("{0} has not been changed in time; the change goes on")]
    ChangeTimedOut(String),
    /// A VM's host cannot carry a change out.
    #[error("{0}")]
    NotChanged(String),
    /// An image has not become available in time.
    #[error("nothing has happened with image {image} for {limit}")]
    ImageTimedOut {
        /// The image.
        image: String,
        /// How long was waited, for people.
        limit: String,
    },
    /// An image was refused.
    #[error("image {image} was refused: {why}")]
    ImageRefused {
        /// The image.
        image: String,
        /// What its host said.
        why: String,
    },
    /// A host was not emptied or restored in full.
    #[error("{0}")]
    DrainEnded(String),
    /// Ctrl-C while waiting for that.
    #[error("interrupted; the drain of {0} goes on")]
    DrainInterrupted(String),
    /// Not all hosts were maintained.
    #[error("{0}")]
    RollEnded(String),
    /// Ctrl-C while hosts were empty.
    #[error("interrupted; what was begun goes on, and these hosts stay closed: {0}")]
    RollInterrupted(String),
    /// A plan was not carried out in full.
    #[error("{0}")]
    PlanEnded(String),
    /// Ctrl-C while waiting for its end.
    #[error("interrupted; plan {0} goes on")]
    PlanInterrupted(String),
    /// A backup was not taken.
    #[error("{}", not_taken(.0))]
    BackupFailed(Box<v1::Backup>),
    /// A backup has not ended in time.
    #[error("backup {} has not ended in time; it goes on", .0.uid)]
    BackupGoesOn(Box<v1::Backup>),
    /// Ctrl-C while an image was brought or imported.
    #[error("interrupted; what has come of image {0} is kept")]
    ImportInterrupted(String),
    /// Ctrl-C while waiting.
    #[error("interrupted; operation {0} goes on")]
    Interrupted(String),
    /// An examination of the site has found something, which has been shown.
    #[error("{0}")]
    Unwell(String),
    /// Standard output cannot be written.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
    /// The answer cannot be shown in the chosen form.
    #[error("cannot show the answer as {0}: {1}")]
    Format(&'static str, String),
}

impl From<tonic::Status> for Error {
    fn from(status: tonic::Status) -> Self {
        Self::Rpc(Box::new(status))
    }
}

fn not_taken(backup: &v1::Backup) -> String {
    let why = backup.error.as_ref().map_or_else(
        || "it was given up".to_owned(),
        |error| {
            format!(
                "{} ({})",
                human::clean(&error.message),
                human::clean(&error.reason)
            )
        },
    );
    format!(
        "backup {} of {} was not taken: {why}",
        backup.uid,
        human::clean(&backup.vm)
    )
}

fn message_of(status: &tonic::Status) -> String {
    let text = human::clean(status.message());
    match reason::of(status) {
        Some(reason) if !text.is_empty() => format!("{text} ({reason})"),
        Some(reason) => reason,
        None if client::is_certificate_refused(status) => {
            let why = client::transport_error(status).unwrap_or_default();
            format!("the controller refuses this certificate: {}", human::clean(&why))
        }
        None if status.source().is_some() => {
            let why = client::transport_error(status).unwrap_or_default();
            format!(
                "the connection to the controller was lost: {}",
                human::clean(&why)
            )
        }
        None if text.is_empty() => format!("the controller answered {:?}", status.code()),
        None => format!("{text} ({:?})", status.code()),
    }
}

fn end_of(operation: &v1::Operation) -> String {
    human::value::<v1::OperationState>(operation.state).to_ascii_lowercase()
}

fn ended(operation: &v1::Operation) -> String {
    let did = human::operation_phrase(operation.kind());
    let how = match operation.state() {
        v1::OperationState::Cancelled => "was cancelled",
        v1::OperationState::Failed => "failed",
        _ => "ended in a way that this version does not know",
    };
    let why =
        operation.error.as_ref().map(
            |error| match (error.message.is_empty(), error.reason.is_empty()) {
                (false, false) => format!(
                    ": {} ({})",
                    human::clean(&error.message),
                    human::clean(&error.reason)
                ),
                (false, true) => format!(": {}", human::clean(&error.message)),
                (true, _) => format!(": {}", human::clean(&error.reason)),
            },
        );
    format!(
        "{did} {} {how}{}",
        human::clean(&operation.vm),
        why.unwrap_or_default()
    )
}

impl Error {
    /// Whether the controller refused for this reason.
    pub fn has_reason(&self, wanted: &str) -> bool {
        matches!(self, Self::Rpc(status) if reason::of(status).as_deref() == Some(wanted))
    }

    /// The exit code.
    pub fn code(&self) -> Exit {
        match self {
            Self::Usage(_) => Exit::Usage,
            Self::Config(config::Error::Unknown { .. }) => Exit::NotFound,
            Self::Config(config::Error::Read { .. } | config::Error::Write { .. }) => Exit::Other,
            Self::Config(_) => Exit::Usage,
            Self::Connect(_) => Exit::Unreachable,
            Self::Rpc(status) => code_of(status),
            Self::WaitTimedOut { .. }
            | Self::ImageTimedOut { .. }
            | Self::ChangeTimedOut(_)
            | Self::BackupGoesOn(_) => Exit::TimedOut,
            Self::OperationEnded(_)
            | Self::ImageRefused { .. }
            | Self::NotChanged(_)
            | Self::DrainEnded(_)
            | Self::RollEnded(_)
            | Self::PlanEnded(_)
            | Self::BackupFailed(_) => Exit::OperationFailed,
            Self::TooLate(_) | Self::NotNow(_) => Exit::Refused,
            Self::Unwell(_) => Exit::Unwell,
            Self::Interrupted(_)
            | Self::ImportInterrupted(_)
            | Self::DrainInterrupted(_)
            | Self::RollInterrupted(_)
            | Self::PlanInterrupted(_) => Exit::Interrupted,
            Self::Output(_) | Self::Format(..) => Exit::Other,
        }
    }

    /// What to do next, where that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Config(error) => Some(error.hint()),
            Self::Connect(error) => Some(error.hint()),
            Self::Rpc(status) => rpc_hint(status),
            Self::WaitTimedOut { operation, .. } | Self::Interrupted(operation) => Some(format!(
                "wait for it with `dalgu op wait {operation}`, or give it up with `dalgu op cancel {operation}`"
            )),
            Self::DrainInterrupted(host) => Some(format!(
                "`dalgu host show {host} --watch` shows how far it is, `dalgu host cancel-drain {host}` gives it up"
            )),
            Self::RollInterrupted(_) => {
                Some("`dalgu host restore` opens each of them and brings its VMs back".to_owned())
            }
            Self::PlanInterrupted(plan) => Some(format!(
                "`dalgu plan show {plan}` shows how far it is, `dalgu plan cancel {plan}` gives it up"
            )),
            Self::ChangeTimedOut(vm) => Some(format!("`dalgu vm show {vm}` shows how far it is")),
            Self::ImageTimedOut { image, .. } => Some(format!(
                "`dalgu image get {image}` shows how far it is; the same command again goes on where it stands"
            )),
            Self::ImportInterrupted(_) => Some("the same command again goes on where it stands".to_owned()),
            Self::ImageRefused { image, .. } => Some(format!(
                "delete it with `dalgu image delete {image}`, then import a file that is sound"
            )),
            Self::OperationEnded(operation) if operation.state() == v1::OperationState::Failed => {
                Some(format!(
                    "`dalgu vm events {}` shows what happened",
                    human::clean(&operation.vm)
                ))
            }
            _ => None,
        }
    }

    /// Per host, why it cannot take the VM; empty for other errors.
    fn verdicts(&self) -> Vec<(String, String)> {
        let Self::Rpc(status) = self else {
            return Vec::new();
        };
        let Some(info) = status
            .get_details_error_info()
            .filter(|info| info.reason == "NO_CAPACITY")
        else {
            return Vec::new();
        };
        let mut hosts: Vec<_> = info
            .metadata
            .into_iter()
            .filter(|(key, _)| key != "hint")
            .collect();
        hosts.sort();
        hosts
    }
}

fn code_of(status: &tonic::Status) -> Exit {
    if client::is_lost(status) || client::is_certificate_refused(status) {
        return Exit::Unreachable;
    }
    match status.code() {
        Code::NotFound => Exit::NotFound,
        Code::AlreadyExists | Code::Aborted => Exit::Conflict,
        Code::FailedPrecondition | Code::ResourceExhausted => Exit::Refused,
        Code::InvalidArgument => Exit::Usage,
        Code::Unauthenticated | Code::PermissionDenied => Exit::Unreachable,
        Code::DeadlineExceeded => Exit::TimedOut,
        _ => Exit::Other,
    }
}

fn rpc_hint(status: &tonic::Status) -> Option<String> {
    let known = match reason::of(status).as_deref() {
        Some("VM_NOT_FOUND") => "`dalgu vm list` shows the VMs there are",
        Some("HOST_NOT_FOUND") => "`dalgu host list` shows the hosts there are",
        Some("IMAGE_NOT_FOUND") => "`dalgu image list` shows the images there are",
        Some("IMAGE_ALREADY_EXISTS") => {
            "choose another version, or delete that one with `dalgu image delete`"
        }
        Some("IMAGE_IN_USE") => "`dalgu image get` shows how many VMs use it; delete those first",
        Some("IMAGE_NOT_AVAILABLE") => "`dalgu image get` shows how far it is",
        Some("NETWORK_NOT_FOUND") => "`dalgu network list` shows the networks there are",
        Some("SECURITY_GROUP_NOT_FOUND") => "`dalgu security-group list` shows the groups there are",
        Some("NETWORK_IN_USE") => {
            "`dalgu network interfaces NAME` shows which VMs are in it; delete those first"
        }
        Some("SECURITY_GROUP_IN_USE") => "take it out of those VMs and rules first",
        Some("NETWORK_ALREADY_EXISTS" | "SECURITY_GROUP_ALREADY_EXISTS") => "choose another name",
        Some("VOLUME_NOT_FOUND") => "`dalgu volume list` shows the volumes there are",
        Some("VOLUME_ALREADY_EXISTS") => {
            "choose another name; `dalgu volume list` shows the volumes there are"
        }
        Some("VOLUME_DELETED") => {
            "`dalgu volume undelete NAME` takes its deletion back; else choose another name"
        }
        Some("VOLUME_IN_USE") => "`dalgu volume show NAME` shows which VM has it",
        Some("VOLUME_ELSEWHERE") => "`dalgu volume show NAME` shows where it is; migrate the VM there first",
        Some("VNI_IN_USE") => "leave --vni out to get one that is free",
        Some("ADDRESS_IN_USE") => {
            "`dalgu network interfaces NETWORK` shows who has which address; leave `ip` out to get one that is free"
        }
        Some("NO_ADDRESS") => "`dalgu network interfaces NETWORK` shows who has the addresses",
        Some("OPERATION_NOT_FOUND") => "`dalgu op list` shows the operations that are kept",
        Some("VM_ALREADY_EXISTS") => "choose another name; `dalgu vm list` shows the VMs there are",
        Some("MAC_IN_USE") => {
            "another VM has that MAC address: leave `mac` out and Dalgu makes one, or choose another"
        }
        Some("REQUEST_ID_REUSED") => {
            "that --request-id belongs to another request; leave it out for a new one"
        }
        Some("ETAG_MISMATCH") => {
            "it was changed meanwhile: look at it again, as with `dalgu vm show` or `dalgu network get`, then repeat"
        }
        Some("VM_RUNNING") => "stop it with `dalgu vm stop` first, or add --force",
        Some("VM_NOT_RUNNING") => {
            "start it with `dalgu vm start` first, or `dalgu vm resume` if it is paused"
        }
        Some("MIGRATION_IN_PROGRESS") => {
            "`dalgu op list --active` shows the migration; `dalgu op wait` waits for it"
        }
        Some("SAME_HOST") => "name another host with --to, or leave it out to let the controller choose",
        Some("VM_ON_SEVERAL_HOSTS") => "`dalgu doctor` shows which hosts have it, and what to do",
        Some("HOST_NOT_EMPTY") => "`dalgu vm list --host HOST` shows its VMs; migrate or delete them first",
        Some("NOT_CANCELLABLE") => "it can only be waited for now: `dalgu op wait ID`",
        Some("NO_CAPACITY") => {
            let own = status
                .get_details_error_info()
                .and_then(|info| info.metadata.get("hint").cloned());
            let own = own
                .filter(|hint| !hint.is_empty())
                .map(|hint| human::clean(&hint) + "; ")
                .unwrap_or_default();
            return Some(format!(
                "{own}`dalgu explain` with the same flags (of a move: `dalgu explain NAME --move`) shows each host's numbers"
            ));
        }
        _ => return code_hint(status),
    };
    Some(known.to_owned())
}

fn code_hint(status: &tonic::Status) -> Option<String> {
    let known = match status.code() {
        _ if client::is_certificate_refused(status) => client::CERTIFICATES,
        _ if client::is_lost(status) => {
            "check that the controller runs; `dalgu context show` says where it is expected"
        }
        Code::Unauthenticated | Code::PermissionDenied => {
            "`dalgu context show` says which certificate is used"
        }
        Code::Unimplemented => {
            "the controller is older than this dalgu; `dalgu version` shows this one's version"
        }
        Code::ResourceExhausted => "the controller is busy; try again in a moment",
        _ => return None,
    };
    Some(known.to_owned())
}

/// Writes an error to standard error: what is wrong, the hosts' verdicts if any, and the next step.
pub fn report(term: &mut Term, error: &Error) -> io::Result<()> {
    let (red, cyan) = (term.paint_err(output::BAD), term.paint_err(output::HINT));
    writeln!(term.err, "{red}error:{red:#} {error}")?;
    let verdicts = error.verdicts();
    if !verdicts.is_empty() {
        let rows = verdicts
            .iter()
            .map(|(host, why)| vec![output::Cell::plain(host), output::Cell::plain(why)]);
        let table = output::table::layout(
            &["HOST", "WHY NOT"],
            rows.collect(),
            &output::table::Style::plain(),
        );
        for line in table.lines() {
            writeln!(term.err, "  {line}")?;
        }
    }
    if let Some(hint) = error.hint() {
        writeln!(term.err, "{cyan}hint:{cyan:#} {hint}")?;
    }
    term.err.flush()
}
