//! What a version said and left on disk, one folder for each version in `tests/samples`:
//!
//! ```text
//!   descriptors.bin     its .proto files, compiled
//!   wire/CALL.bin       calls: request and answers, each [`Call`] behind its length
//!   store.sql           its store, as SQL
//!   ledger/HOST/        its agents' ledgers
//!   vms.bin ...         the lists that its API answered when store and ledgers were like that
//! ```

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use prost::Message;

use super::lens::Lens;

/// One call as it was made.
#[derive(Clone, PartialEq, Message)]
pub struct Call {
    /// Its place among all.
    #[prost(uint64, tag = "1")]
    pub number: u64,
    /// "/SERVICE/METHOD".
    #[prost(string, tag = "2")]
    pub path: String,
    /// What was asked.
    #[prost(bytes = "vec", tag = "3")]
    pub request: Vec<u8>,
    /// What was answered; several from a stream.
    #[prost(bytes = "vec", repeated, tag = "4")]
    pub answers: Vec<Vec<u8>>,
}

/// The lists that are kept with a store.
pub const LISTS: [(&str, &str); 3] = [
    ("vms.bin", "/dalgu.v1.VmService/ListVms"),
    ("hosts.bin", "/dalgu.v1.HostService/ListHosts"),
    ("operations.bin", "/dalgu.v1.OperationService/ListOperations"),
];

/// A version's samples.
pub struct Sample {
    /// Name of the version.
    pub name: String,
    /// Its messages.
    pub lens: Lens,
    /// Calls in the order in which they were made.
    pub calls: Vec<Call>,
    dir: PathBuf,
}

/// Where the samples are.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("samples")
}

/// The samples of all versions, oldest first by name.
///
/// # Errors
/// If one of them cannot be read.
pub fn all() -> Result<Vec<Sample>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder())? {
        names.push(entry?.file_name().into_string().ok().context("a strange name")?);
    }
    names.sort();
    names.iter().map(|name| Sample::read(name)).collect()
}

impl Sample {
    /// Reads a version's folder.
    ///
    /// # Errors
    /// If it is not as it should be.
    pub fn read(name: &str) -> Result<Self> {
        let dir = folder().join(name);
        let descriptors = fs::read(dir.join("descriptors.bin")).with_context(|| name.to_owned())?;
        let mut calls = Vec::new();
        for entry in fs::read_dir(dir.join("wire"))? {
            let bytes = fs::read(entry?.path())?;
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                calls.push(Call::decode_length_delimited(&mut rest)?);
            }
        }
        calls.sort_by_key(|call| call.number);
        Ok(Self {
            name: name.to_owned(),
            lens: Lens::new(&descriptors)?,
            calls,
            dir,
        })
    }

    /// Its store as SQL.
    ///
    /// # Errors
    /// If there is none.
    pub fn store(&self) -> Result<String> {
        fs::read_to_string(self.dir.join("store.sql")).context("store.sql")
    }

    /// A list that its API answered.
    ///
    /// # Errors
    /// If there is none.
    pub fn list(&self, file: &str) -> Result<Vec<u8>> {
        fs::read(self.dir.join(file)).with_context(|| file.to_owned())
    }

    /// The ledgers' files by host and name.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn ledgers(&self) -> Result<BTreeMap<String, BTreeMap<String, Vec<u8>>>> {
        let mut ledgers = BTreeMap::new();
        for host in fs::read_dir(self.dir.join("ledger"))? {
            let host = host?;
            let mut files = BTreeMap::new();
            for folder in ["", "vms", "migrations"] {
                let dir = host.path().join(folder);
                for file in fs::read_dir(&dir).into_iter().flatten() {
                    let path = file?.path();
                    if path.is_file() {
                        let name = path.strip_prefix(host.path())?.to_string_lossy().into_owned();
                        files.insert(name, fs::read(&path)?);
                    }
                }
            }
            ledgers.insert(host.file_name().to_string_lossy().into_owned(), files);
        }
        Ok(ledgers)
    }
}
