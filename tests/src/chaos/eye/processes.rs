//! QEMU processes on all hosts, by the process table alone. Used by the eye; asks nobody.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;

use crate::lab::layout::Host;

/// A QEMU process.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// UUID of its VM.
    pub uid: String,
    /// Number of the host whose network namespace it is in.
    pub host: u8,
    /// Process id.
    pub pid: i32,
    /// It was started to wait for a VM that comes by migration; it may have arrived since.
    pub incoming: bool,
    /// The kernel's letter for its state: R, S, T (stopped by a signal), ...
    pub state: char,
}

/// What a QEMU's command line says: its VM's UUID, and whether it waits for a migration.
#[must_use]
pub fn read_command_line(line: &[u8]) -> Option<(String, bool)> {
    let words: Vec<_> = line
        .split(|byte| *byte == 0)
        .map(String::from_utf8_lossy)
        .collect();
    if !words.first()?.contains("qemu-system") {
        return None;
    }
    let at = words.iter().position(|word| word == "-uuid")?;
    let uid = words.get(at + 1)?.to_string();
    Some((uid, words.iter().any(|word| word == "-incoming")))
}

/// Every QEMU process in the network namespaces of these hosts. One that just ends may be missed.
#[must_use]
pub fn scan(hosts: &[Host]) -> Vec<Process> {
    let identity = |path: String| fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let spaces: BTreeMap<_, _> = hosts
        .iter()
        .filter_map(|host| Some((identity(format!("/run/netns/{}", host.namespace))?, host.number)))
        .collect();
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let look = |entry: fs::DirEntry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let (uid, incoming) = read_command_line(&fs::read(entry.path().join("cmdline")).ok()?)?;
        let host = *spaces.get(&identity(format!("/proc/{pid}/ns/net"))?)?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let state = stat.rsplit_once(") ")?.1.chars().next()?;
        (!matches!(state, 'Z' | 'X')).then_some(Process {
            uid,
            host,
            pid,
            incoming,
            state,
        })
    };
    let mut found: Vec<_> = entries.flatten().filter_map(look).collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qemu_is_known_by_its_uuid_and_by_what_it_waits_for() {
        let line = b"/usr/bin/qemu-system-x86_64\0-name\0guest=c1\0-uuid\0abc\0-incoming\0defer\0";
        assert_eq!(read_command_line(line), Some(("abc".to_owned(), true)));
        let line = b"qemu-system-x86_64\0-uuid\0abc\0";
        assert_eq!(read_command_line(line), Some(("abc".to_owned(), false)));
        assert_eq!(read_command_line(b"grep\0qemu-system\0-uuid\0abc\0"), None);
        assert_eq!(read_command_line(b""), None);
    }
}
