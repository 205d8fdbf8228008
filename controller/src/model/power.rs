//! How a host is switched on and off, and how far that is: a part of the host's record.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Where a host's power is between on and off.
///
/// ```text
///   On ──off──> PoweringOff ──its controller reads off──> Off ──on──> PoweringOn ──it reports──> On
///   └──<──not off in time──┘                              └──<── forced off ──┘
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PowerPhase {
    /// Nobody has switched it off: its reports say how it is.
    On,
    /// It is to be off.
    PoweringOff,
    /// Its controller has read off.
    Off,
    /// It is to be on, and has not reported yet.
    PoweringOn,
}

impl PowerPhase {
    /// Those of which no report is missed.
    pub const ASLEEP: [Self; 3] = [Self::PoweringOff, Self::Off, Self::PoweringOn];

    /// Name in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::PoweringOff => "powering_off",
            Self::Off => "off",
            Self::PoweringOn => "powering_on",
        }
    }
}

/// The Redfish service of a host's management controller. The password is in a file of the controller's machine, and never here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redfish {
    /// `https://ADDRESS[:PORT]`.
    pub url: String,
    /// Id of the computer system; empty where the service has one only.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub system: String,
    /// SHA-256 of the service's certificate, 64 digits in small letters; empty where an authority has signed it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub fingerprint: String,
    /// Name of the file with user and password.
    pub credentials: String,
}

/// How a host is switched on and off, and how far that is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPower {
    /// By what.
    pub redfish: Redfish,
    /// How far it is.
    pub phase: PowerPhase,
    /// Since when.
    pub since: Timestamp,
    /// Who asked for that.
    pub principal: String,
    /// Its operating system is not asked to shut down.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub forced: bool,
    /// Who wants it on again as soon as it is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub then_on: Option<String>,
    /// It was told that it has not reported in time.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub overdue: bool,
    /// What went wrong last; empty where nothing did.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub fault: String,
    /// When the controller itself has switched it, of the last hour.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub switched: Vec<Timestamp>,
}

impl HostPower {
    /// Of a host that nobody has switched yet.
    pub fn new(redfish: Redfish, principal: String, now: Timestamp) -> Self {
        Self {
            redfish,
            phase: PowerPhase::On,
            since: now,
            principal,
            forced: false,
            then_on: None,
            overdue: false,
            fault: String::new(),
            switched: Vec::new(),
        }
    }

    /// The same one step further.
    #[must_use]
    pub fn at(self, phase: PowerPhase, principal: impl Into<String>, now: Timestamp) -> Self {
        Self {
            phase,
            since: now,
            principal: principal.into(),
            then_on: None,
            overdue: false,
            fault: String::new(),
            ..self
        }
    }
}
