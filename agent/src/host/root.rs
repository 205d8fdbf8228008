//! Where /proc and /sys are, and how their files are read.
//!
//! Every reader of this module tree takes a [`Root`], so that tests can give it a tree of their own.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    time::{ClockId, clock_gettime},
    unistd::{SysconfVar, sysconf},
};
use procfs::ExplicitSystemInfo;

/// Why the host could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file every Linux host has could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file of the kernel does not have the documented form.
    #[error("{path} is not of the documented form")]
    Form {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        #[source]
        source: procfs::ProcError,
    },
    /// The kernel does not tell the time since its start.
    #[error("the clock since boot cannot be read")]
    Clock(#[source] nix::Error),
}

/// The directory under which `proc` and `sys` are found; `/` but in tests.
#[derive(Debug, Clone)]
pub struct Root(PathBuf);

impl Default for Root {
    fn default() -> Self {
        Self::at("/")
    }
}

impl Root {
    /// A tree at a directory.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The path of a file of the tree; `relative` like `proc/stat`.
    pub fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.0.join(relative)
    }

    /// The file's text.
    pub(super) fn text(&self, relative: &str) -> Result<String, Error> {
        let path = self.path(relative);
        fs::read_to_string(&path).map_err(|source| Error::Read { path, source })
    }

    /// The file's text without the white space around it, where the file is there and can be read.
    pub(super) fn word(&self, relative: impl AsRef<Path>) -> Option<String> {
        fs::read_to_string(self.path(relative))
            .ok()
            .map(|text| text.trim().to_owned())
    }

    /// The file's number, where it is there and holds one.
    pub(super) fn number<N: std::str::FromStr>(&self, relative: impl AsRef<Path>) -> Option<N> {
        self.word(relative)?.parse().ok()
    }

    /// Whether there is such a file or directory.
    pub(super) fn has(&self, relative: impl AsRef<Path>) -> bool {
        self.path(relative).exists()
    }

    /// The last part of where a link leads, where it is one.
    pub(super) fn link(&self, relative: impl AsRef<Path>) -> Option<String> {
        let target = fs::read_link(self.path(relative)).ok()?;
        target.file_name()?.to_str().map(str::to_owned)
    }

    /// Names in a directory, sorted; none where it is not there.
    pub(super) fn names(&self, relative: impl AsRef<Path>) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(relative)) else {
            return Vec::new();
        };
        let mut names: Vec<_> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }

    /// A file of /proc in the form the procfs crate knows.
    pub(super) fn parse<T: procfs::FromRead>(&self, relative: &str) -> Result<T, Error> {
        let text = self.text(relative)?;
        T::from_read(text.as_bytes()).map_err(|source| Error::Form {
            path: self.path(relative),
            source,
        })
    }

    /// The error of a file that lacks something, or has it in another form.
    pub(super) fn malformed(&self, relative: &str, what: &str) -> Error {
        Error::Form {
            path: self.path(relative),
            source: procfs::ProcError::Other(what.to_owned()),
        }
    }

    /// As [`Self::parse`], for files that count in ticks.
    pub(super) fn parse_ticks<T: procfs::FromReadSI>(&self, relative: &str) -> Result<T, Error> {
        let text = self.text(relative)?;
        T::from_read(text.as_bytes(), &system_info()).map_err(|source| Error::Form {
            path: self.path(relative),
            source,
        })
    }
}

/// Sizes in which the kernel counts.
fn system_info() -> ExplicitSystemInfo {
    let configured = |variable, otherwise| {
        sysconf(variable)
            .ok()
            .flatten()
            .and_then(|value| u64::try_from(value).ok())
            .unwrap_or(otherwise)
    };
    ExplicitSystemInfo {
        boot_time_secs: 0,
        ticks_per_second: configured(SysconfVar::CLK_TCK, 100),
        page_size: page_size(),
        is_little_endian: cfg!(target_endian = "little"),
    }
}

/// Bytes in a page of memory.
pub(super) fn page_size() -> u64 {
    sysconf(SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|value| u64::try_from(value).ok())
        .unwrap_or(4096)
}

/// Time since the host's start, with the time it was suspended.
///
/// # Errors
/// [`Error::Clock`] on kernels older than 2.6.39.
pub fn since_boot() -> Result<Duration, Error> {
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map(Duration::from)
        .map_err(Error::Clock)
}

/// The kernel's way to write a set of numbers, like `0-3,8`; ascending. What does not fit the form is left out.
pub fn number_list(text: &str) -> Vec<u32> {
    let mut numbers: Vec<u32> = text
        .trim()
        .split(',')
        .filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
            // The kernel has at most 8192 processors; anything longer is not its writing.
            (last >= first && last - first < 65_536).then_some(first..=last)
        })
        .flatten()
        .collect();
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

#[cfg(test)]
pub(super) mod fake {
    //! A tree of /proc and /sys written by a test.

    use super::*;

    /// What a kernel of today writes, cut to the lines the procfs crate insists on.
    pub const MEMINFO: &str = "MemTotal:       24684084 kB\nMemFree:        23321128 kB\n\
        MemAvailable:   24302616 kB\nBuffers:            3916 kB\nCached:          1136808 kB\nSwapCached:            0 kB\n\
        Active:           419500 kB\nInactive:         762308 kB\nSwapTotal:       1048576 kB\nSwapFree:         524288 kB\n\
        Dirty:                12 kB\nWriteback:             0 kB\nMapped:            41864 kB\nSlab:              66240 kB\n\
        Committed_AS:     105556 kB\nVmallocTotal:   34359738367 kB\nVmallocUsed:        8360 kB\nVmallocChunk:          0 kB\n";

    /// A tree that goes away with its value.
    pub struct Tree(tempfile::TempDir);

    impl Tree {
        /// An empty tree.
        pub fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        /// Its root.
        pub fn root(&self) -> Root {
            Root::at(self.0.path())
        }

        /// Writes a file, with its directories.
        pub fn write(&self, relative: &str, text: &str) -> &Self {
            let path = self.0.path().join(relative);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
            self
        }

        /// Makes a link to another place in the tree.
        pub fn link(&self, relative: &str, to: &str) -> &Self {
            let path = self.0.path().join(relative);
            std::os::unix::fs::symlink(self.0.path().join(to), path).unwrap();
            self
        }

        /// Removes a file, a link or a directory with all in it.
        pub fn remove(&self, relative: &str) -> &Self {
            let path = self.0.path().join(relative);
            if path.is_dir() && !path.is_symlink() {
                fs::remove_dir_all(path).unwrap()
            } else {
                fs::remove_file(path).unwrap()
            }
            self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_numbers_are_read_as_the_kernel_writes_them() {
        for (text, numbers) in [
            ("0-3,8\n", vec![0, 1, 2, 3, 8]),
            ("5", vec![5]),
            ("\n", vec![]),
            ("2,0-1,1", vec![0, 1, 2]),
            ("3-1,x,7", vec![7]),
            ("0-4294967295", vec![]),
        ] {
            assert_eq!(number_list(text), numbers, "{text:?}");
        }
    }

    #[test]
    fn an_error_names_the_file() {
        let tree = fake::Tree::new();
        let missing = tree.root().text("proc/stat").unwrap_err();
        assert!(missing.to_string().ends_with("proc/stat"), "{missing}");
        tree.write("proc/loadavg", "nonsense");
        let malformed = tree
            .root()
            .parse::<procfs::LoadAverage>("proc/loadavg")
            .unwrap_err();
        assert!(
            malformed.to_string().contains("proc/loadavg is not"),
            "{malformed}"
        );
    }

    #[test]
    fn the_clock_since_boot_moves_on() {
        let before = since_boot().unwrap();
        assert!(before > Duration::ZERO && since_boot().unwrap() >= before);
    }
}
