//! Names and numbers that identify things, each of its own type so that they cannot be mixed up.
//!
//! Used by every crate. Parsing is strict: what has one of these types is safe to put into a path, a log line or
//! a libvirt domain.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Why a text is not a valid name or number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not a name of the allowed form.
    #[error("{value:?} is not a valid {what}: {rule}")]
    Name {
        /// What it was meant to name.
        what: &'static str,
        /// The text, cut to 80 characters.
        value: String,
        /// The rule in words.
        rule: &'static str,
    },
    /// Not a UUID.
    #[error("{value:?} is not a valid {what}: must be a UUID")]
    Uuid {
        /// What it was meant to identify.
        what: &'static str,
        /// The text, cut to 80 characters.
        value: String,
    },
}

pub(crate) fn shorten(value: &str) -> String {
    value.chars().take(80).collect()
}

/// The rule for names of VMs and hosts: an RFC 1123 label that begins with a letter, so that a name is never
/// mistaken for a number by libvirt's tools.
pub const NAME_RULE: &str = "1 to 63 characters a-z, 0-9 and '-', the first a letter, the last not a '-'";

fn is_name(value: &str) -> bool {
    let bytes = value.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes[0].is_ascii_lowercase()
        && bytes[bytes.len() - 1] != b'-'
        && bytes
            .iter()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = Error;

            fn from_str(value: &str) -> Result<Self, Error> {
                if is_name(value) {
                    Ok(Self(value.to_owned()))
                } else {
                    Err(Error::Name { what: $what, value: shorten(value), rule: NAME_RULE })
                }
            }
        }

        impl TryFrom<String> for $type {
            type Error = Error;

            fn try_from(value: String) -> Result<Self, Error> {
                value.parse()
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> Self {
                name.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

macro_rules! id {
    ($(#[$doc:meta])* $type:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $type(Uuid);

        impl $type {
            /// Takes a UUID as it is.
            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            /// The UUID.
            pub const fn uuid(&self) -> Uuid {
                self.0
            }
        }

        impl FromStr for $type {
            type Err = Error;

            fn from_str(value: &str) -> Result<Self, Error> {
                Uuid::try_parse(value)
                    .map(Self)
                    .map_err(|_| Error::Uuid { what: $what, value: shorten(value) })
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.as_hyphenated().fmt(f)
            }
        }
    };
}

macro_rules! number {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $type(pub u64);

        impl $type {
            /// The number that follows. Saturates; 2^64 steps are out of reach.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0.saturating_add(1))
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

name!(
    /// Name of a VM, unique on the site.
    VmName, "VM name"
);
name!(
    /// Name of a host, unique on the site; the one in its certificate.
    HostName, "host name"
);
name!(
    /// Name of an image, shared by its versions.
    ImageName, "image name"
);
name!(
    /// Name of a network, unique on the site.
    NetworkName, "network name"
);
name!(
    /// Name of a security group, unique on the site.
    GroupName, "security group name"
);
name!(
    /// Name of a placement group, unique on the site.
    PlacementGroupName, "placement group name"
);
id!(
    /// Identifies a network.
    NetworkId, "network uid"
);
id!(
    /// Identifies a security group.
    GroupId, "security group uid"
);
name!(
    /// Name of a volume, unique on the site.
    VolumeName, "volume name"
);
id!(
    /// Identifies a volume.
    VolumeId, "volume uid"
);
name!(
    /// Name of a snapshot, unique within its VM.
    SnapshotName, "snapshot name"
);
id!(
    /// Identifies a snapshot of a VM.
    SnapshotId, "snapshot uid"
);
id!(
    /// Identifies a backup of a VM; also the name of its checkpoint.
    BackupId, "backup uid"
);
id!(
    /// Identifies a plan of moves.
    PlanId, "plan id"
);
name!(
    /// Name of a schedule of backups, unique on the site.
    ScheduleName, "backup schedule name"
);
id!(
    /// Identifies an image of the catalogue.
    ImageId, "image uid"
);
id!(
    /// Identifies a VM; also the UUID of its libvirt domain.
    VmId, "VM uid"
);
id!(
    /// Identifies an operation.
    OperationId, "operation id"
);
id!(
    /// Identifies a live migration on both hosts.
    MigrationId, "migration id"
);
id!(
    /// Identifies a site: one controller's set of hosts and VMs.
    ClusterId, "cluster id"
);
number!(
    /// Rises with each change of a VM's intent.
    Generation
);
number!(
    /// Ownership number of a VM: rises with each placement, start elsewhere and migration.
    Epoch
);
number!(
    /// A host's session: raised when the host is declared dead; no command of another session is obeyed.
    Session
);
number!(
    /// The controller's term: raised at each of its starts; agents refuse lower ones.
    Term
);

/// Where a program gets new ids from. Cheap to clone; all clones take from the same source.
#[derive(Clone)]
pub struct NewIds(Arc<dyn Fn() -> Uuid + Send + Sync>);

impl NewIds {
    /// Version 7 UUIDs: the time to the millisecond, then chance. Later ones sort behind earlier ones.
    pub fn random() -> Self {
        Self::from_fn(Uuid::now_v7)
    }

    /// Ids of somebody else's making; asked for each. They must never repeat, and a later one must sort behind an
    /// earlier one: lists of operations are in the order of their ids.
    pub fn from_fn(make: impl Fn() -> Uuid + Send + Sync + 'static) -> Self {
        Self(Arc::new(make))
    }

    /// An id that nothing has yet.
    pub fn next(&self) -> Uuid {
        (self.0)()
    }
}

impl fmt::Debug for NewIds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewIds").finish_non_exhaustive()
    }
}

/// Checks the name of a disk or network interface: 1 to 15 characters a-z, 0-9 and '-', first a letter.
pub fn check_device_name(value: &str) -> Result<(), Error> {
    if value.len() <= 15 && is_name(value) {
        return Ok(());
    }
    Err(Error::Name {
        what: "device name",
        value: shorten(value),
        rule: "1 to 15 characters a-z, 0-9 and '-', the first a letter, the last not a '-'",
    })
}

/// Checks the name of a file in a directory of Dalgu's: no separators, no leading dot.
pub fn check_file_name(value: &str) -> Result<(), Error> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    if (1..=128).contains(&value.len()) && value.bytes().all(allowed) && !value.starts_with(['.', '-']) {
        return Ok(());
    }
    Err(Error::Name {
        what: "file name",
        value: shorten(value),
        rule: "1 to 128 characters a-z, A-Z, 0-9, '.', '_' and '-', the first not '.' or '-'",
    })
}

/// Checks a label's key (or, with `key` false, its value, which may be empty).
pub fn check_label(value: &str, key: bool) -> Result<(), Error> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'/');
    if value.len() <= 63 && value.bytes().all(allowed) && !(key && value.is_empty()) {
        return Ok(());
    }
    Err(Error::Name {
        what: if key { "label key" } else { "label value" },
        value: shorten(value),
        rule: "at most 63 characters a-z, A-Z, 0-9, '.', '_', '-' and '/'; a key is not empty",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_do_harm_are_refused() {
        for bad in [
            "",
            "1vm",
            "-a",
            "a-",
            "A",
            "a/b",
            "a.b",
            "a b",
            "<a>",
            "a&b",
            "a\"b",
            "a\n",
            "ä",
            &"a".repeat(64),
        ] {
            assert!(bad.parse::<VmName>().is_err(), "{bad:?} was accepted");
        }
        for good in ["a", "web-1", "x0", &"a".repeat(63)] {
            assert!(good.parse::<VmName>().is_ok(), "{good:?} was refused");
        }
    }

    #[test]
    fn file_names_cannot_leave_their_directory() {
        for bad in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            ".hidden",
            "-rf",
            "a b",
            "a\0",
            &"a".repeat(129),
        ] {
            assert!(check_file_name(bad).is_err(), "{bad:?} was accepted");
        }
        assert!(check_file_name("debian-12_amd64.qcow2").is_ok());
    }

    #[test]
    fn a_name_read_from_json_is_checked_too() {
        assert!(serde_json_like("web").is_ok());
        assert!(serde_json_like("../etc").is_err());
    }

    #[test]
    fn new_ids_rise_and_never_repeat() {
        let ids = NewIds::random();
        let taken: Vec<Uuid> = (0..100).map(|_| ids.clone().next()).collect();
        assert!(taken.is_sorted_by(|earlier, later| earlier < later));
    }

    #[test]
    fn ids_that_were_handed_in_are_the_ones_that_are_given_out() {
        let count = std::sync::atomic::AtomicU64::new(0);
        let ids = NewIds::from_fn(move || {
            Uuid::from_u64_pair(0, count.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
        });
        assert_eq!(ids.next(), Uuid::from_u64_pair(0, 0));
        assert_eq!(ids.clone().next(), Uuid::from_u64_pair(0, 1));
    }

    fn serde_json_like(value: &str) -> Result<VmName, Error> {
        VmName::try_from(value.to_owned())
    }
}
