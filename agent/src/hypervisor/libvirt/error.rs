//! What libvirt's errors mean to the agent. Pure; called by everything here that calls libvirt.

use dalgu_proto::ids::VmId;

use super::tree::XmlError;
use crate::hypervisor::Error;

// Numbers of virErrorNumber and virErrorDomain; unchanged since they were given.
const INTERNAL_ERROR: u32 = 1;
const NO_SUPPORT: u32 = 3;
const NO_CONNECT: u32 = 5;
const INVALID_CONN: u32 = 6;
const INVALID_ARG: u32 = 8;
const OPERATION_FAILED: u32 = 9;
const XML_ERROR: u32 = 27;
const RPC: u32 = 39;
const NO_DOMAIN: u32 = 42;
const AUTH_FAILED: u32 = 45;
const OPERATION_INVALID: u32 = 55;
const CONFIG_UNSUPPORTED: u32 = 67;
const OPERATION_TIMEOUT: u32 = 68;
const OPERATION_ABORTED: u32 = 78;
const NO_DOMAIN_METADATA: u32 = 80;
const BLOCK_COPY_ACTIVE: u32 = 83;
const OPERATION_UNSUPPORTED: u32 = 84;
const ARGUMENT_UNSUPPORTED: u32 = 74;
const AGENT_UNRESPONSIVE: u32 = 86;
const AGENT_UNSYNCED: u32 = 97;
const AGENT_COMMAND_TIMEOUT: u32 = 112;
const AGENT_COMMAND_FAILED: u32 = 113;
const XML_INVALID_SCHEMA: u32 = 92;
const DEVICE_MISSING: u32 = 99;
const FROM_RPC: u32 = 7;
const FROM_REMOTE: u32 = 13;

/// libvirt's number of an error.
pub(super) fn code(error: &virt::error::Error) -> u32 {
    error.code().to_raw()
}

/// Whether it says that a driver has no such call.
pub(super) fn is_unsupported(error: &virt::error::Error) -> bool {
    code(error) == NO_SUPPORT
}

/// Whether it says that a domain bears no metadata of the kind asked for.
pub(super) fn is_no_metadata(error: &virt::error::Error) -> bool {
    code(error) == NO_DOMAIN_METADATA
}

/// Whether it says that a domain is not there.
pub(super) fn is_no_domain(error: &virt::error::Error) -> bool {
    code(error) == NO_DOMAIN
}

/// Whether it says that a domain is not in the right state.
pub(super) fn is_wrong_state(error: &virt::error::Error) -> bool {
    code(error) == OPERATION_INVALID
}

/// Whether it says that this cannot be done here, such as asking a migration's destination about its progress.
pub(super) fn is_unsupported_here(error: &virt::error::Error) -> bool {
    code(error) == OPERATION_UNSUPPORTED
}

/// Whether it says that a domain is not there, or off, or that its driver has no such call.
pub(super) fn is_absent(error: &virt::error::Error) -> bool {
    is_no_domain(error) || is_wrong_state(error) || is_unsupported_here(error) || is_unsupported(error)
}

/// Whether it says that an argument, such as a flag, is not known.
pub(super) fn is_invalid_argument(error: &virt::error::Error) -> bool {
    code(error) == INVALID_ARG
}

/// Whether it says that the guest has not let go of something in time, or has not since it was asked before: libvirt asks it, and
/// has no number of its own for the answer.
pub(super) fn is_guests_fault(error: &virt::error::Error) -> bool {
    let words = ["unplug", "in the process of", "timed out"];
    let said = error.message().to_ascii_lowercase();
    matches!(
        code(error),
        OPERATION_FAILED | OPERATION_TIMEOUT | INTERNAL_ERROR | DEVICE_MISSING
    ) && words.iter().any(|word| said.contains(word))
}

/// Whether it says that libvirt keeps a job of a domain which nobody does any more: the thread that found the domain when libvirtd
/// came up holds it, and it never began or ended long ago. See [`super::cut_jobs`].
pub(super) fn is_left_job(error: &virt::error::Error) -> bool {
    code(error) == OPERATION_TIMEOUT && error.message().contains("held by monitor=init-")
}

/// Whether it says that a disk has a job already.
pub(super) fn is_job_active(error: &virt::error::Error) -> bool {
    code(error) == BLOCK_COPY_ACTIVE
}

/// Whether it says that the agent in a guest does not do what it was asked.
pub(super) fn is_agents_fault(error: &virt::error::Error) -> bool {
    matches!(
        code(error),
        AGENT_UNRESPONSIVE
            | AGENT_UNSYNCED
            | AGENT_COMMAND_TIMEOUT
            | AGENT_COMMAND_FAILED
            | ARGUMENT_UNSUPPORTED
    ) || (code(error) == INTERNAL_ERROR && error.message().contains("agent"))
}

/// Whether it says that the agent in a guest has not answered: what it was asked for it may do later.
pub(super) fn is_agent_silent(error: &virt::error::Error) -> bool {
    is_agents_fault(error) && !matches!(code(error), AGENT_COMMAND_FAILED | ARGUMENT_UNSUPPORTED)
}

/// The agent's form of an error of a call that is not about one domain.
pub(super) fn general(call: &'static str, error: &virt::error::Error) -> Error {
    let detail = error.message().to_owned();
    let lost = matches!(error.domain().to_raw(), FROM_RPC | FROM_REMOTE);
    match code(error) {
        NO_CONNECT | INVALID_CONN | RPC | AUTH_FAILED => Error::Unavailable { detail },
        _ if lost => Error::Unavailable { detail },
        XML_ERROR | XML_INVALID_SCHEMA | CONFIG_UNSUPPORTED => Error::Invalid { detail },
        OPERATION_ABORTED => Error::Cancelled,
        code => Error::Failed { call, code, detail },
    }
}

/// The agent's form of an error of a call about one domain.
pub(super) fn of(call: &'static str, id: VmId, error: &virt::error::Error) -> Error {
    match code(error) {
        NO_DOMAIN => Error::NotFound { id },
        OPERATION_INVALID => Error::WrongState {
            id,
            detail: error.message().to_owned(),
        },
        _ if is_left_job(error) => Error::WrongState {
            id,
            detail: format!(
                "libvirt believes that a job goes on which nobody does ({}): stop libvirtd, run `dalgu-agent \
                 clear-cut-jobs`, start libvirtd; the VM runs on",
                error.message()
            ),
        },
        _ => general(call, error),
    }
}

impl From<XmlError> for Error {
    fn from(error: XmlError) -> Self {
        Self::Invalid {
            detail: error.to_string(),
        }
    }
}
