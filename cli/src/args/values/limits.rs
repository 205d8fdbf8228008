//! Limits of disks as people write them. Pure.

use dalgu_proto::v1;

use super::{Error, size_mib};

const ALLOWED: &str = "limits are read-iops=N, write-iops=N, read-rate=SIZE and write-rate=SIZE (per second), each once, and `none` lifts one";

/// A change of a disk's limits: what is `None` stays, and 0 lifts a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Change {
    read_iops: Option<u64>,
    write_iops: Option<u64>,
    read_mib: Option<u64>,
    write_mib: Option<u64>,
}

impl Change {
    /// Takes an option of a disk, if it is a limit.
    pub(super) fn take(&mut self, option: &str, value: &str) -> Result<bool, Error> {
        let bad = || Error::Option {
            option: format!("{option}={value}"),
            allowed: ALLOWED,
        };
        let field = match option {
            "read-iops" => &mut self.read_iops,
            "write-iops" => &mut self.write_iops,
            "read-rate" => &mut self.read_mib,
            "write-rate" => &mut self.write_mib,
            _ => return Ok(false),
        };
        let most = match value {
            "none" => 0,
            value if option.ends_with("iops") => value.parse().map_err(|_| bad())?,
            value => size_mib(value)?,
        };
        if field.replace(most).is_some() {
            return Err(bad());
        }
        Ok(true)
    }

    /// The limits with this change made.
    pub fn of(self, limits: Option<&v1::DiskLimits>) -> Option<v1::DiskLimits> {
        let mut limits = limits.copied().unwrap_or_default();
        for (field, most) in [
            (&mut limits.read_operations_per_second, self.read_iops),
            (&mut limits.write_operations_per_second, self.write_iops),
            (&mut limits.read_mib_per_second, self.read_mib),
            (&mut limits.write_mib_per_second, self.write_mib),
        ] {
            *field = most.unwrap_or(*field);
        }
        (limits != v1::DiskLimits::default()).then_some(limits)
    }
}

/// Reads NAME,LIMIT[,LIMIT] or NAME,none.
pub fn disk_limits(text: &str) -> Result<(String, Change), Error> {
    let bad = || Error::Limits(text.to_owned());
    let (name, options) = text.split_once(',').ok_or_else(bad)?;
    if name.is_empty() {
        return Err(bad());
    }
    if options == "none" {
        let none = Some(0);
        let all = Change {
            read_iops: none,
            write_iops: none,
            read_mib: none,
            write_mib: none,
        };
        return Ok((name.to_owned(), all));
    }
    let mut change = Change::default();
    for option in options.split(',') {
        let (option, value) = option.split_once('=').ok_or_else(bad)?;
        if !change.take(option, value)? {
            return Err(bad());
        }
    }
    Ok((name.to_owned(), change))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_set_and_lifted_one_by_one_or_all() {
        let (name, change) = disk_limits("data,read-iops=500,write-rate=100MiB").unwrap();
        assert_eq!(name, "data");
        let set = change.of(None).unwrap();
        assert_eq!(
            (
                set.read_operations_per_second,
                set.write_mib_per_second,
                set.read_mib_per_second
            ),
            (500, 100, 0)
        );
        let (_, lift) = disk_limits("data,read-iops=none").unwrap();
        let left = lift.of(Some(&set)).unwrap();
        assert_eq!(
            (left.read_operations_per_second, left.write_mib_per_second),
            (0, 100)
        );
        let (_, all) = disk_limits("data,none").unwrap();
        assert_eq!(all.of(Some(&set)), None);
        for bad in [
            "data",
            ",none",
            "data,read-iops",
            "data,read-iops=x",
            "data,read-iops=1,read-iops=2",
            "data,read-rate=5",
            "data,pool=fast",
        ] {
            assert!(disk_limits(bad).is_err(), "{bad} was accepted");
        }
    }
}
