//! Reads on in all logs of the hosts for words that must never be there. Used by the eye.
//!
//! All hosts of the lab share one kernel, so QEMU's own locks on disk files hold across them and would hide a second
//! copy: a refused lock counts as one.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use crate::lab::Lab;

/// Words, and the rule that they break.
const FORBIDDEN: [(&str, &str); 3] = [
    (
        "Failed to get \"write\" lock",
        "one copy: no image lock is refused",
    ),
    (
        "Failed to get shared \"write\" lock",
        "one copy: no image lock is refused",
    ),
    ("panicked at", "no daemon panics"),
];

/// What must not be in a log.
#[derive(Debug)]
pub struct Forbidden {
    /// The rule that it breaks.
    pub rule: &'static str,
    /// The line, with the file's name.
    pub line: String,
    /// The host whose log it is; the controller's is nobody's.
    pub host: Option<u8>,
}

/// How far each file was read.
#[derive(Debug, Default)]
pub struct Logs {
    read: BTreeMap<PathBuf, (u64, Vec<u8>)>,
}

impl Logs {
    /// Reads on; answers what must not be there.
    pub fn read_on(&mut self, lab: &Lab) -> Vec<Forbidden> {
        let daemons = files_in(&lab.layout().dir().join("log"));
        let mut files: Vec<_> = daemons.into_iter().map(|path| (host_of(&path), path)).collect();
        for host in lab.hosts() {
            let guests = files_in(&host.outside("/var/log/libvirt/qemu"));
            files.extend(guests.into_iter().map(|path| (Some(host.number), path)));
        }
        let mut found = Vec::new();
        for (host, path) in files {
            let broken = self.read_file(&path).into_iter();
            found.extend(broken.map(|(rule, line)| Forbidden { rule, line, host }));
        }
        found
    }

    fn read_file(&mut self, path: &Path) -> Vec<(&'static str, String)> {
        let (at, rest) = self.read.entry(path.to_path_buf()).or_default();
        let Ok(mut file) = File::open(path) else {
            return Vec::new();
        };
        // A file that was made anew is read from its beginning.
        if file.metadata().is_ok_and(|meta| meta.len() < *at) {
            *at = 0;
            rest.clear();
        }
        if file.seek(SeekFrom::Start(*at)).is_ok()
            && let Ok(more) = file.read_to_end(rest)
        {
            *at += more as u64;
        }
        let whole = rest
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |end| end + 1);
        let lines: Vec<u8> = rest.drain(..whole).collect();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        forbidden_in(&String::from_utf8_lossy(&lines))
            .into_iter()
            .map(|(rule, line)| (rule, format!("{name}: {line}")))
            .collect()
    }
}

/// The host whose daemon writes this log: `h2-libvirtd.log` is the second's.
fn host_of(path: &Path) -> Option<u8> {
    let name = path.file_name()?.to_str()?;
    name.strip_prefix('h')?.split_once('-')?.0.parse().ok()
}

fn forbidden_in(text: &str) -> Vec<(&'static str, String)> {
    let broken = |line: &str| {
        // Logs in JSON or with debug output put a backslash before a quotation mark.
        let plain = line.replace('\\', "");
        FORBIDDEN
            .iter()
            .find(|(words, _)| plain.contains(words))
            .map(|(_, rule)| (*rule, line.to_owned()))
    };
    text.lines().filter_map(broken).collect()
}

fn files_in(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| path.is_file())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_bears_the_number_of_its_host() {
        let of = |name: &str| host_of(&Path::new("log").join(name));
        assert_eq!(of("h2-libvirtd.log"), Some(2));
        assert_eq!(of("controller.log"), None);
    }

    #[test]
    fn a_refused_lock_is_seen_also_where_it_is_quoted() {
        let lines = [
            r#"qemu: -blockdev x: Failed to get "write" lock"#,
            r#"WARN source="internal error: Failed to get \"write\" lock" vm=c1"#,
            "thread 'main' panicked at src/x.rs:1:2",
        ];
        for line in lines {
            assert_eq!(forbidden_in(line).len(), 1, "{line}");
        }
        assert!(forbidden_in("qemu: terminating on signal 15").is_empty());
    }
}
