//! What a program did to the files of one directory, in order, as `strace` recorded it.
//!
//! Only programs that write from one thread at a time are understood, and only the calls named in [`CALLS`].

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

/// The calls that change files or sync them. An unknown one among them is an error, not left out.
const CALLS: &str = "openat,open,creat,lseek,write,pwrite64,writev,pwritev,pwritev2,fsync,fdatasync,sync_file_range,ftruncate,\
     fallocate,rename,renameat,renameat2,unlink,unlinkat,link,linkat,symlink,mkdir,mkdirat,copy_file_range";

/// One call that succeeded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// A file was opened; made if it was not there, when `create`.
    Open {
        /// Descriptor.
        fd: i32,
        /// Its path.
        path: PathBuf,
        /// It is made if it is not there.
        create: bool,
        /// What is in it goes.
        truncate: bool,
    },
    /// The position was set.
    Seek {
        /// Descriptor.
        fd: i32,
        /// The new position.
        to: usize,
    },
    /// Bytes were written; at the position when `at` is `None`.
    Write {
        /// Descriptor.
        fd: i32,
        /// Where.
        at: Option<usize>,
        /// What.
        bytes: Vec<u8>,
    },
    /// A file or directory was synced.
    Sync {
        /// Descriptor.
        fd: i32,
    },
    /// A file was cut or lengthened.
    Truncate {
        /// Descriptor.
        fd: i32,
        /// To that length.
        length: usize,
    },
    /// A file was renamed.
    Rename {
        /// Old path.
        from: PathBuf,
        /// New path.
        to: PathBuf,
    },
    /// A directory was made.
    MakeDir {
        /// The path.
        path: PathBuf,
    },
    /// A name was removed.
    Unlink {
        /// The path.
        path: PathBuf,
    },
}

/// `strace` in front of a program; what it records goes to `to`.
pub fn recorder(to: &Path) -> Command {
    let mut command = Command::new("strace");
    command
        .args(["-f", "-qq", "-xx", "-s", "1000000", "-e"])
        .arg(format!("trace={CALLS}"))
        .args(["-e", "signal=none", "-o"])
        .arg(to);
    command
}

/// Reads a record. Paths are as the program gave them.
pub fn read(text: &str) -> Result<Vec<Call>> {
    let mut calls = Vec::new();
    // A call of one thread can be told in two parts around another's.
    let mut begun: HashMap<&str, String> = HashMap::new();
    for line in text.lines() {
        let (thread, rest) = line
            .trim_start()
            .split_once(' ')
            .context("a line without a thread")?;
        let rest = rest.trim_start();
        let whole = if let Some(start) = rest.strip_suffix(" <unfinished ...>") {
            begun.insert(thread, start.to_owned());
            continue;
        } else if rest.starts_with("<... ") {
            let start = begun.remove(thread).context("an end without a beginning")?;
            start + rest.split_once("resumed>").context("no end")?.1
        } else {
            rest.to_owned()
        };
        if let Some(call) = one(&whole).with_context(|| whole.chars().take(200).collect::<String>())? {
            calls.push(call);
        }
    }
    Ok(calls)
}

fn one(line: &str) -> Result<Option<Call>> {
    let Some((name, rest)) = line.split_once('(') else {
        return Ok(None);
    };
    let (arguments, result) = rest
        .rsplit_once(") = ")
        .or_else(|| {
            // Short calls are padded before the equals sign.
            let (arguments, result) = rest.rsplit_once('=')?;
            Some((arguments.trim_end().strip_suffix(')')?, result.trim_start()))
        })
        .context("no result")?;
    let result: i64 = match result.split_whitespace().next().unwrap_or_default().parse() {
        Ok(-1) | Err(_) => return Ok(None),
        Ok(result) => result,
    };
    // Strings are in hexadecimal, so that no comma is inside one.
    let arguments: Vec<&str> = arguments.split(", ").collect();
    let get = |at: usize| arguments.get(at).copied().context("an argument is missing");
    let fd = || Ok::<i32, anyhow::Error>(get(0)?.parse()?);
    let size = |at: usize| Ok::<usize, anyhow::Error>(get(at)?.parse()?);
    Ok(Some(match name {
        "openat" => Call::Open {
            fd: i32::try_from(result)?,
            path: path(get(1)?)?,
            create: get(2)?.contains("O_CREAT"),
            truncate: get(2)?.contains("O_TRUNC"),
        },
        "lseek" => Call::Seek {
            fd: fd()?,
            to: usize::try_from(result)?,
        },
        "write" | "pwrite64" => {
            let mut bytes = string(get(1)?)?;
            bytes.truncate(usize::try_from(result)?);
            let at = if name == "write" { None } else { Some(size(3)?) };
            Call::Write { fd: fd()?, at, bytes }
        }
        "fsync" | "fdatasync" => Call::Sync { fd: fd()? },
        "ftruncate" => Call::Truncate {
            fd: fd()?,
            length: size(1)?,
        },
        "rename" => Call::Rename {
            from: path(get(0)?)?,
            to: path(get(1)?)?,
        },
        "unlink" => Call::Unlink { path: path(get(0)?)? },
        "mkdir" => Call::MakeDir { path: path(get(0)?)? },
        other => bail!("the call {other} is not understood"),
    }))
}

fn path(text: &str) -> Result<PathBuf> {
    Ok(PathBuf::from(String::from_utf8(string(text)?)?))
}

/// `"\x61\x62"`
fn string(text: &str) -> Result<Vec<u8>> {
    let inner = text
        .strip_prefix('"')
        .and_then(|text| text.strip_suffix('"'))
        .context("a text that was cut short")?;
    let digits = inner.as_bytes();
    ensure!(digits.len().is_multiple_of(4), "not in hexadecimal");
    let digit = |byte: u8| char::from(byte).to_digit(16).context("not a digit");
    let pair = |four: &[u8]| match four {
        [b'\\', b'x', high, low] => Ok(u8::try_from(digit(*high)? * 16 + digit(*low)?)?),
        _ => bail!("not in hexadecimal"),
    };
    digits.chunks(4).map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_with_calls_that_were_told_in_two_parts() {
        let text = r#"7 openat(AT_FDCWD, "\x2f\x61", O_RDWR|O_CREAT|O_CLOEXEC, 0644) = 3
7 openat(AT_FDCWD, "\x2f\x62", O_RDONLY) = -1 ENOENT (No such file or directory)
7 pwrite64(3, "\x68\x69", 2, 4096 <unfinished ...>
8 lseek(4, 24, SEEK_SET)          = 24
7 <... pwrite64 resumed>) = 2
7 fdatasync(3)                    = 0
"#;
        let calls = read(text).unwrap();
        let expected = [
            Call::Open {
                fd: 3,
                path: "/a".into(),
                create: true,
                truncate: false,
            },
            Call::Seek { fd: 4, to: 24 },
            Call::Write {
                fd: 3,
                at: Some(4096),
                bytes: b"hi".to_vec(),
            },
            Call::Sync { fd: 3 },
        ];
        assert_eq!(calls, expected);
        assert!(read("7 renameat2(3, \"\\x61\", 3, \"\\x62\", 0) = 0").is_err());
    }
}
