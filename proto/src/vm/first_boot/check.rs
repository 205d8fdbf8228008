//! What the wire may say of a first boot. What is accepted is carried to the guest as it is; nothing of it can leave its place:
//! a key is one line, a name is a name, and a document is a file of its own.

use serde::Deserialize;

use super::{
    Documents, Fingerprint, FirstBoot, MAX_DOCUMENT_BYTES, MAX_KEY_BYTES, MAX_KEYS, MEDIUM, MEDIUM_MIB,
    yaml::{self, Kind},
};
use crate::{
    ids, v1,
    vm::{CloneMode, DEFAULT_POOL, Disk, DiskFormat, DiskLimits, Invalid},
};

/// How the documents begin that cloud-init knows; see "User-data formats" in its manual.
const BEGINNINGS: [&str; 8] = [
    "#cloud-config",
    "#!",
    "## template: jinja",
    "#include",
    "#cloud-boothook",
    "#part-handler",
    "Content-Type:",
    "MIME-Version:",
];
/// Types of keys, and how the Base64 of each begins: with its own type. See sshd(8), "AUTHORIZED_KEYS FILE FORMAT".
const KEY_TYPES: [(&str, &str); 7] = [
    ("ssh-ed25519", "AAAAC3NzaC1lZDI1NTE5"),
    ("ssh-rsa", "AAAAB3NzaC1yc2E"),
    ("ecdsa-sha2-nistp256", "AAAAE2VjZHNhLXNoYTItbmlzdHAyNTY"),
    ("ecdsa-sha2-nistp384", "AAAAE2VjZHNhLXNoYTItbmlzdHAzODQ"),
    ("ecdsa-sha2-nistp521", "AAAAE2VjZHNhLXNoYTItbmlzdHA1MjE"),
    (
        "sk-ssh-ed25519@openssh.com",
        "AAAAGnNrLXNzaC1lZDI1NTE5QG9wZW5zc2guY29t",
    ),
    (
        "sk-ecdsa-sha2-nistp256@openssh.com",
        "AAAAInNrLWVjZHNhLXNoYTItbmlzdHAyNTZAb3BlbnNzaC5jb2",
    ),
];

/// Checks a first boot of a VM with these disks.
pub(in crate::vm) fn first_boot(wire: &v1::FirstBoot, disks: &[Disk]) -> Result<FirstBoot, Invalid> {
    let at = |field: &str| format!("first_boot.{field}");
    let invalid = |field: &str| {
        let field = at(field);
        move |message| Invalid { field, message }
    };
    let documents = Documents::from(wire);
    if let Some(document) = &documents.user_data {
        user_data(document.expose()).map_err(invalid("user_data"))?;
    }
    if let Some(document) = &documents.network_config {
        network_config(document.expose()).map_err(invalid("network_config"))?;
    }
    if wire.ssh_authorized_keys.len() > MAX_KEYS {
        return Err(invalid("ssh_authorized_keys")(format!(
            "at most {MAX_KEYS} are allowed, got {}",
            wire.ssh_authorized_keys.len()
        )));
    }
    for (index, text) in wire.ssh_authorized_keys.iter().enumerate() {
        key(text).map_err(invalid(&format!("ssh_authorized_keys[{index}]")))?;
    }
    let hostname = Some(wire.hostname.clone()).filter(|name| !name.is_empty());
    hostname
        .as_deref()
        .map(host_name)
        .transpose()
        .map_err(invalid("hostname"))?;
    // Of a volume it is not known yet.
    let first = disks.first().filter(|first| !first.pool.is_empty());
    let pool = match (wire.pool.as_str(), first) {
        ("", Some(first)) => first.pool.clone(),
        ("", None) => DEFAULT_POOL.to_owned(),
        (named, _) => named.to_owned(),
    };
    ids::check_device_name(&pool).map_err(|error| invalid("pool")(error.to_string()))?;
    Ok(FirstBoot {
        hostname,
        ssh_keys: wire.ssh_authorized_keys.clone(),
        user_data: fingerprint(&wire.user_data, wire.user_data_digest.as_ref())
            .map_err(invalid("user_data_digest"))?,
        network_config: fingerprint(&wire.network_config, wire.network_config_digest.as_ref())
            .map_err(invalid("network_config_digest"))?,
        medium: medium(pool),
    })
}

fn medium(pool: String) -> Disk {
    Disk {
        name: MEDIUM.to_owned(),
        size_mib: MEDIUM_MIB,
        pool,
        image: None,
        format: DiskFormat::Raw,
        digest: None,
        clone_mode: CloneMode::Any,
        volume: None,
        limits: DiskLimits::default(),
        backup: None,
    }
}

/// Of the document that came, or of one that came before.
fn fingerprint(text: &str, told: Option<&v1::DocumentDigest>) -> Result<Option<Fingerprint>, String> {
    let told = match told {
        Some(told) => Some(Fingerprint {
            sha256: told
                .sha256
                .parse()
                .map_err(|error: ids::Error| error.to_string())?,
            size_bytes: told.size_bytes,
        }),
        None => None,
    };
    let found = (!text.is_empty()).then(|| Fingerprint::of(text));
    match (found, told) {
        (Some(found), Some(told)) if found != told => {
            Err("is not of the document that came with it".to_owned())
        }
        (found, told) => Ok(found.or(told)),
    }
}

fn document(text: &str) -> Result<(), String> {
    if text.len() > MAX_DOCUMENT_BYTES {
        return Err(format!(
            "must be at most {MAX_DOCUMENT_BYTES} bytes, got {}",
            text.len()
        ));
    }
    if text.contains('\0') {
        return Err("must not hold a NUL".to_owned());
    }
    Ok(())
}

fn user_data(text: &str) -> Result<(), String> {
    document(text)?;
    if !BEGINNINGS.iter().any(|beginning| text.starts_with(beginning)) {
        return Err(format!(
            "cloud-init would pass it over: it must begin with one of {}",
            BEGINNINGS.join(", ")
        ));
    }
    if !text.starts_with("#cloud-config") {
        return Ok(());
    }
    // #cloud-config-archive is a list.
    let mapping = text.lines().next().map(str::trim_end) == Some("#cloud-config");
    match yaml::read(text)? {
        Kind::Other if mapping => Err("must be a mapping: keys with values".to_owned()),
        _ => Ok(()),
    }
}

fn network_config(text: &str) -> Result<(), String> {
    #[derive(Deserialize)]
    struct Head {
        version: u64,
    }
    document(text)?;
    yaml::read(text)?;
    match serde_norway::from_str::<Head>(text) {
        Ok(Head { version: 2 }) => Ok(()),
        _ => Err("must be a mapping with `version: 2` at its top, not below `network:`".to_owned()),
    }
}

/// One public key: a known type, Base64 that begins with the same type, and a comment of words.
fn key(text: &str) -> Result<(), String> {
    let rule = || {
        let types: Vec<_> = KEY_TYPES.iter().map(|(name, _)| *name).collect();
        format!(
            "must be one line \"TYPE BASE64 [COMMENT]\" of at most {MAX_KEY_BYTES} bytes, a public key of one of the types {}, \
             without options",
            types.join(", ")
        )
    };
    let mut words = text.split(' ');
    let (Some(kind), Some(blob)) = (words.next(), words.next()) else {
        return Err(rule());
    };
    let beginning = KEY_TYPES
        .iter()
        .find(|(name, _)| *name == kind)
        .map(|(_, blob)| blob);
    let digits = blob.trim_end_matches('=');
    let base64 = blob.len().is_multiple_of(4)
        && blob.len() - digits.len() <= 2
        && digits
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/'));
    // Letters of any language, as names have them; no controls, no marks that turn or hide text.
    let comment = words.all(|word| word.chars().all(|c| c.is_ascii_graphic() || c.is_alphanumeric()));
    let good =
        beginning.is_some_and(|beginning| blob.starts_with(beginning) && blob.len() > beginning.len() + 16);
    if good && base64 && comment && text.len() <= MAX_KEY_BYTES {
        Ok(())
    } else {
        Err(rule())
    }
}

/// RFC 1123, section 2.1: labels of letters, digits and hyphens; not to be taken for an address.
fn host_name(name: &str) -> Result<(), String> {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let last = name.rsplit('.').next().unwrap_or_default();
    let number = last.bytes().all(|b| b.is_ascii_digit()) && name.contains('.');
    if name.len() <= 253 && name.split('.').all(label) && !number {
        return Ok(());
    }
    Err(
        "must be a host name by RFC 1123: labels of letters, digits and '-' with dots between them, at most 253 characters"
            .to_owned(),
    )
}
