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

/// How far each file was read.
#[derive(Debug, Default)]
pub struct Logs {
    read: BTreeMap<PathBuf, (u64, Vec<u8>)>,
}

impl Logs {
    /// Reads on; answers rules that were broken, with the line.
    pub fn read_on(&mut self, lab: &Lab) -> Vec<(&'static str, String)> {
        let mut files = files_in(&lab.layout().dir().join("log"));
        for host in lab.hosts() {
            files.extend(files_in(&host.outside("/var/log/libvirt/qemu")));
        }
        let mut found = Vec::new();
        for path in files {
            found.extend(self.read_file(&path));
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
