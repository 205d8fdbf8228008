//! How hosts are switched on and off, and the orders to do so. The orders are written here; [`power::runner`](crate::power::runner) carries them out.

use dalgu_proto::ids::{self, HostName};

use super::{Caller, Error, drain::none_under_way, host::find};
use crate::{
    hosts,
    model::{EventKind, HostPower, HostRecord, HostState, Outcome, PowerPhase, Redfish},
    power::{
        look::{self, HOUR, Need},
        redfish,
    },
    state::{State, Tx},
};

/// Name of the file with user and password where nobody says.
pub const CREDENTIALS: &str = "bmc";
/// Characters of an address, and of a system's id.
const MAX_TEXT: usize = 256;
/// Digits of a SHA-256.
const FINGERPRINT: usize = 64;

/// Checks what an operator says of a management controller, and fills in what is left out. `ca` says whether there is an authority for
/// those without a fingerprint.
pub fn checked(mut given: Redfish, ca: bool) -> Result<Redfish, Error> {
    let invalid = |field: &str, message: &str| Err(Error::invalid(format!("redfish.{field}"), message));
    given.url = given.url.trim_end_matches('/').to_owned();
    if given.url.len() > MAX_TEXT || redfish::authority(&given.url).is_none() {
        return invalid(
            "url",
            "must be https://ADDRESS or https://ADDRESS:PORT, without user or path",
        );
    }
    let id = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | ':');
    if given.system.len() > MAX_TEXT || !given.system.chars().all(id) || given.system.starts_with('.') {
        return invalid(
            "system",
            "must be the id of a computer system: letters, digits, '.', '_', '-' and ':'",
        );
    }
    given.fingerprint = given.fingerprint.replace(':', "").to_ascii_lowercase();
    let digits = given.fingerprint.bytes().all(|byte| byte.is_ascii_hexdigit());
    match given.fingerprint.len() {
        FINGERPRINT if digits => {}
        0 if ca => {}
        0 => {
            let message = "must be given: the controller's configuration names no authority (power.ca) that signs management \
                           controllers' certificates";
            return invalid("fingerprint", message);
        }
        _ => {
            return invalid(
                "fingerprint",
                "must be the 64 hexadecimal digits of the certificate's SHA-256",
            );
        }
    }
    if given.credentials.is_empty() {
        CREDENTIALS.clone_into(&mut given.credentials);
    }
    match ids::check_file_name(&given.credentials) {
        Ok(()) => Ok(given),
        Err(error) => Err(Error::invalid("redfish.credentials", error)),
    }
}

/// Says how a host is switched on and off; `None` forgets it.
pub fn set(tx: &mut Tx, caller: &Caller, name: &str, redfish: Option<Redfish>) -> Result<Outcome, Error> {
    let mut host = find(tx, name)?;
    // Of one that is off, whose controller got another address or certificate, it can be corrected; it is not forgotten.
    match host.phase() {
        PowerPhase::PoweringOff | PowerPhase::PoweringOn if redfish.is_some() => {}
        PowerPhase::On => {}
        PowerPhase::Off if redfish.is_some() => {}
        _ => return Err(changes(&host)),
    }
    let now = tx.now();
    let power = match (redfish, host.power.take()) {
        (None, _) => None,
        (Some(redfish), Some(known)) => Some(HostPower {
            redfish,
            fault: String::new(),
            ..known
        }),
        (Some(redfish), None) => Some(HostPower::new(redfish, caller.principal.clone(), now)),
    };
    let message = match &power {
        Some(power) => format!("switched on and off by {}", power.redfish.url),
        None => "not switched on and off any more".to_owned(),
    };
    tx.event(EventKind::Host, "HostPowerSet", &host.name, message, None);
    let name = host.name.clone();
    host.power = power;
    tx.put_host(host);
    Ok(Outcome::Host(name))
}

/// By what a host is switched on and off.
pub fn redfish_of(state: &State, name: &HostName) -> Result<Redfish, Error> {
    let host = state.hosts.get(name);
    let host = host.ok_or_else(|| Error::HostNotFound(name.to_string()))?;
    let power = host.power.as_ref();
    Ok(power
        .ok_or_else(|| Error::PowerUnknown(name.clone()))?
        .redfish
        .clone())
}

fn changes(host: &HostRecord) -> Error {
    Error::PowerChanges {
        host: host.name.clone(),
        is: match host.phase() {
            PowerPhase::On => "on",
            PowerPhase::PoweringOff => "being switched off",
            PowerPhase::Off => "off",
            PowerPhase::PoweringOn => "being switched on",
        },
    }
}

/// Orders a host on that is off, or as soon as it is.
pub fn on(tx: &mut Tx, principal: &str, name: &str, why: &str) -> Result<Outcome, Error> {
    let mut host = find(tx, name)?;
    let now = tx.now();
    let Some(mut power) = host.power.take() else {
        return Err(Error::PowerUnknown(host.name));
    };
    let (reason, power) = match power.phase {
        PowerPhase::Off => {
            note(&mut power, principal, now);
            ("HostPoweringOn", power.at(PowerPhase::PoweringOn, principal, now))
        }
        PowerPhase::PoweringOff => {
            power.then_on = Some(principal.to_owned());
            ("HostPowerOnWaits", power)
        }
        // It went off by itself, or after it was given up to switch it off. One that is on gets no order.
        PowerPhase::On if hosts::state_of(tx, &host.name) == HostState::Unreachable => {
            note(&mut power, principal, now);
            ("HostPoweringOn", power.at(PowerPhase::PoweringOn, principal, now))
        }
        PowerPhase::On | PowerPhase::PoweringOn => {
            host.power = Some(power);
            return Err(changes(&host));
        }
    };
    tx.event(EventKind::Host, reason, &host.name, why, None);
    let name = host.name.clone();
    host.power = Some(power);
    tx.put_host(host);
    Ok(Outcome::Host(name))
}

/// How a host is to be switched off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Off {
    /// Without its operating system.
    pub force: bool,
    /// Whether or not the site needs it.
    pub even_if_needed: bool,
}

/// Orders a host off. `need` is what the site needs it for, of a moment ago; what can change from one moment to the next is looked at here.
pub fn off(
    tx: &mut Tx,
    principal: &str,
    name: &str,
    how: Off,
    need: Option<Need>,
    why: &str,
) -> Result<Outcome, Error> {
    let mut host = find(tx, name)?;
    none_under_way(&host)?;
    let now = tx.now();
    let running = look::running(tx, &host.name).next().map(|vm| vm.name.clone());
    if let Some(vm) = running {
        return Err(Error::HostRuns { host: host.name, vm });
    }
    let need = need.or_else(|| look::kept(tx, &host.name));
    if let Some(need) = need.filter(|_| !how.even_if_needed) {
        return Err(Error::HostNeeded {
            host: host.name,
            need,
        });
    }
    let Some(mut power) = host.power.take() else {
        return Err(Error::PowerUnknown(host.name));
    };
    // One that hangs on its way, down or up, can be cut off.
    let may = match power.phase {
        PowerPhase::On => true,
        PowerPhase::PoweringOff | PowerPhase::PoweringOn => how.force,
        PowerPhase::Off => false,
    };
    if !may {
        host.power = Some(power);
        return Err(changes(&host));
    }
    note(&mut power, principal, now);
    power.forced = how.force;
    tx.event(EventKind::Host, "HostPoweringOff", &host.name, why, None);
    let name = host.name.clone();
    host.power = Some(power.at(PowerPhase::PoweringOff, principal, now));
    tx.put_host(host);
    Ok(Outcome::Host(name))
}

/// Counts a switch of the controller's own.
fn note(power: &mut HostPower, principal: &str, now: jiff::Timestamp) {
    power.switched.retain(|then| now.duration_since(*then) < HOUR);
    if principal == crate::power::PRINCIPAL {
        power.switched.push(now);
    }
}
