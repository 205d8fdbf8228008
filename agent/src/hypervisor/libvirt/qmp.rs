//! Questions and orders to a domain's QEMU itself, through libvirt's channel to it, for what libvirt has no call for or no longer knows.

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use virt::domain::Domain;

use super::error;

type Raw = virt::error::Error;

#[derive(Deserialize)]
struct Answer<T> {
    #[serde(rename = "return")]
    value: Option<T>,
    error: Option<Refusal>,
}

#[derive(Deserialize)]
struct Refusal {
    desc: String,
}

/// What QEMU itself answers. `None`: it does not do it, or the domain is off.
fn exchange<T: DeserializeOwned>(
    domain: &Domain,
    command: &str,
    arguments: &Value,
) -> Result<Option<T>, Raw> {
    let question = json!({ "execute": command, "arguments": arguments }).to_string();
    let answer = match domain.qemu_monitor_command(&question, 0) {
        Err(error) if error::is_absent(&error) => return Ok(None),
        answer => answer?,
    };
    match serde_json::from_str::<Answer<T>>(&answer) {
        Ok(Answer { value, error: None }) => Ok(value),
        Ok(Answer {
            error: Some(refusal), ..
        }) => {
            tracing::debug!(command, %arguments, refusal.desc, "QEMU does not do it");
            Ok(None)
        }
        Err(error) => {
            tracing::warn!(command, %error, answer, "QEMU's answer is not what was expected");
            Ok(None)
        }
    }
}

/// A question to QEMU; a domain that is off has nothing.
pub(super) fn ask<T: DeserializeOwned + Default>(
    domain: &Domain,
    command: &str,
    arguments: &Value,
) -> Result<T, Raw> {
    Ok(exchange(domain, command, arguments)?.unwrap_or_default())
}

/// An order to QEMU; whether it has carried it out.
pub(super) fn tell(domain: &Domain, command: &str, arguments: &Value) -> Result<bool, Raw> {
    Ok(exchange::<Value>(domain, command, arguments)?.is_some())
}
