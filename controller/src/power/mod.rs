//! Hosts that are switched off while nobody needs them, and on again before somebody does.
//!
//! [`Power`] is what can be asked of a machine's management controller; [`redfish`] does it, [`credentials`] says as whom. The verbs
//! ([`verbs::host_power`](crate::verbs::host_power)) write into a host's record what its power should be; [`runner`] makes it so, host by
//! host, with patience: a controller that does not answer holds up its own host alone. Where the site is set to, [`policy`] (pure) decides which
//! host nobody needs and which one is needed, on what [`look`] makes of the state.
//!
//! What had begun is in the store, so a restart of this program goes on with it.

pub mod credentials;
pub mod look;
pub mod policy;
pub mod redfish;
pub mod runner;

use std::fmt;

use async_trait::async_trait;

use crate::model::Redfish;

/// Who switches hosts where the site is set to, in the record of who did what.
pub const PRINCIPAL: &str = "controller/power";

/// What is done to a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reset {
    /// It is switched on.
    On,
    /// Its operating system is asked to shut down, and then it goes off.
    GracefulShutdown,
    /// It goes off at once.
    ForceOff,
}

impl Reset {
    /// `ResetType` of Redfish (DMTF DSP0266, schema Resource).
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::On => "On",
            Self::GracefulShutdown => "GracefulShutdown",
            Self::ForceOff => "ForceOff",
        }
    }
}

/// What a machine's management controller says of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reading {
    /// `PowerState` of Redfish, as it was read.
    pub power_state: String,
    /// Kinds of reset that it knows; empty where it does not say.
    pub resets: Vec<String>,
}

impl Reading {
    /// Whether the machine is off, and not on its way there or back.
    pub fn is_off(&self) -> bool {
        self.power_state == "Off"
    }

    /// Whether the machine is on, and not on its way there or back.
    pub fn is_on(&self) -> bool {
        self.power_state == "On"
    }
}

/// Why a management controller did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The credentials cannot be read.
    #[error(transparent)]
    Credentials(#[from] credentials::Error),
    /// Nobody is there, or it is not who it should be.
    #[error("no connection to {url}: {message}")]
    Connect {
        /// Its service.
        url: String,
        /// What is wrong.
        message: String,
    },
    /// It did not answer in time.
    #[error("{url} has not answered within {seconds} s")]
    Timeout {
        /// Its service.
        url: String,
        /// How long it had.
        seconds: u64,
    },
    /// User or password are wrong.
    #[error("{url} refuses user and password of {credentials:?} (status {status})")]
    Unauthorized {
        /// Its service.
        url: String,
        /// Name of the credentials.
        credentials: String,
        /// 401 or 403.
        status: u16,
    },
    /// It refuses.
    #[error("{url} answers {what} with status {status}{said}", said = Said(message))]
    Status {
        /// Its service.
        url: String,
        /// What was asked.
        what: String,
        /// HTTP status.
        status: u16,
        /// What it says of it; may be empty.
        message: String,
    },
    /// The answer cannot be understood.
    #[error("{url} answers {what} with what is not Redfish: {message}")]
    Malformed {
        /// Its service.
        url: String,
        /// What was asked.
        what: String,
        /// What is wrong.
        message: String,
    },
    /// It has several computer systems, or not the one that is asked for.
    #[error("{url} has the computer systems {systems}: say which one the host is (--system)")]
    System {
        /// Its service.
        url: String,
        /// Their ids.
        systems: String,
    },
    /// It does not know this.
    #[error("{url} cannot do {reset}, only {known}")]
    Unsupported {
        /// Its service.
        url: String,
        /// What was asked.
        reset: &'static str,
        /// What it can do.
        known: String,
    },
}

struct Said<'a>(&'a str);

impl fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            "" => Ok(()),
            said => write!(f, ": {said}"),
        }
    }
}

/// What can be asked of machines' management controllers. Every call ends within a time of its own.
#[async_trait]
pub trait Power: Send + Sync {
    /// Whether the machine is on.
    async fn read(&self, machine: &Redfish) -> Result<Reading, Error>;

    /// Asks for a change. What becomes of it, only [`Power::read`] tells.
    async fn reset(&self, machine: &Redfish, reset: Reset) -> Result<(), Error>;
}
