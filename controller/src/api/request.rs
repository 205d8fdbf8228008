//! What requests have in common: who sent it, its id, its etag-independent hash, and the paths of update masks.

use std::collections::{BTreeMap, HashMap};

use dalgu_proto::{reason, vm::check_labels};
use tonic::{Request, Status};
use uuid::Uuid;

use super::peer;
use crate::verbs::{self, Caller};

/// FNV-1a of 128 bits in hexadecimal. The same in every version; not against attackers: whoever finds two bodies with
/// the same hash has fooled only themselves.
pub fn hash(bytes: &[u8]) -> String {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let hash = bytes.iter().fold(OFFSET, |hash, byte| {
        (hash ^ u128::from(*byte)).wrapping_mul(PRIME)
    });
    format!("{hash:032x}")
}

/// Who sent a request, and how its repetition is known. `body` is all of its content in a form that is always the same.
pub fn caller<T>(request: &Request<T>, request_id: &str, body: &str) -> Result<Caller, Status> {
    if !request_id.is_empty() && Uuid::try_parse(request_id).is_err() {
        return Err(reason::invalid(
            "request_id",
            "must be a UUID, a new one for each request",
        ));
    }
    let principal = peer(request)?.to_string();
    Ok(Caller {
        principal,
        request_id: request_id.to_ascii_lowercase(),
        body: hash(body.as_bytes()),
    })
}

/// Checks labels or a selector.
pub fn labels(field: &str, labels: &HashMap<String, String>) -> Result<BTreeMap<String, String>, Status> {
    check_labels(labels).map_err(|message| reason::invalid(field, message))
}

/// Checks an update mask: it names at least one field, and only those that can be changed.
pub fn mask(
    mask: Option<prost_types::FieldMask>,
    allowed: &[&str],
    text: &'static str,
) -> Result<Vec<String>, Status> {
    let paths = mask.map(|mask| mask.paths).unwrap_or_default();
    if paths.is_empty() {
        return Err(reason::invalid(
            "update_mask",
            format!("must name what to change: {text}"),
        ));
    }
    match paths.iter().find(|path| !allowed.contains(&path.as_str())) {
        None => Ok(paths),
        Some(path) => {
            let path = path.chars().take(80).collect();
            Err(verbs::Error::FieldNotMutable { path, allowed: text }.into())
        }
    }
}

/// Checks the length of free text.
pub fn text(field: &str, value: String, most: usize) -> Result<String, Status> {
    let count = value.chars().count();
    if count <= most {
        return Ok(value);
    }
    Err(reason::invalid(
        field,
        format!("must be at most {most} characters, got {count}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_the_published_one() {
        // Test vectors of the FNV authors for 128 bits.
        assert_eq!(hash(b""), "6c62272e07bb014262b821756295c58d");
        assert_eq!(hash(b"a"), "d228cb696f1a8caf78912b704e4a8964");
    }
}
