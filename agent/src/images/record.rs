//! What is known of an import, on disk; and what is found in the directory at start.

use std::io;

use dalgu_proto::{ids::ImageId, image::Digest};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tonic::codegen::Bytes;

use super::{
    Fetch, Images, Import, Need, State, Whole,
    files::{Entry, Files, Progress, copy_name, fetch_name, making_name, upload_name},
};
use crate::vm::status::Failure;

/// Largest record that is read.
const MAX_RECORD_BYTES: usize = 64 << 10;

/// How an import stands, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub(super) enum Record {
    /// Its bytes come.
    Receiving {
        /// All the bytes.
        size_bytes: u64,
        /// So many from the beginning are on stable storage.
        received_bytes: u64,
    },
    /// It is made from a file of the images directory. Never on disk: the controller asks again.
    Named,
    /// It has led to a copy.
    Ready {
        /// The copy.
        digest: Digest,
        /// SHA-256 of what was imported.
        source_sha256: Digest,
        /// Size of what was imported.
        source_bytes: u64,
        /// Size of the copy.
        bytes: u64,
        /// Size of the disk in it.
        virtual_size_bytes: u64,
    },
    /// It was refused for good.
    Refused {
        /// Stable reason.
        reason: String,
        /// For people.
        message: String,
        /// When.
        since: Timestamp,
    },
}

impl Record {
    /// Bytes of an upload that have not come.
    pub(super) const fn missing_bytes(&self) -> u64 {
        match self {
            Self::Receiving {
                size_bytes,
                received_bytes,
            } => size_bytes.saturating_sub(*received_bytes),
            _ => 0,
        }
    }
}

fn record_name(id: ImageId) -> String {
    format!("{id}.json")
}

/// A record that is being written.
fn passing_name(id: ImageId) -> String {
    format!("{id}.json.new")
}

/// Replaces an import's record: it is the old or the new one, whatever happens.
pub(super) async fn save(files: &dyn Files, id: ImageId, record: &Record) -> io::Result<()> {
    let bytes = serde_json::to_vec(record).map_err(io::Error::other)?;
    let passing = passing_name(id);
    // A longer one may have been left there.
    files.remove(&passing).await?;
    let saved = async {
        files.write(&passing, 0, Bytes::from(bytes)).await?;
        files.sync(&passing).await?;
        files.rename(&passing, &record_name(id)).await
    };
    let saved = saved.await;
    if saved.is_err() {
        // It may be there all the same. Where it stays, the import's end or the next start removes it.
        let _ = files.remove(&passing).await;
    }
    saved
}

/// Removes everything of an import but a copy that it led to.
pub(super) async fn forget(files: &dyn Files, id: ImageId) -> io::Result<()> {
    files.remove(&upload_name(id)).await?;
    files.remove(&making_name(id)).await?;
    files.remove(&passing_name(id)).await?;
    files.remove(&record_name(id)).await
}

/// What is found at start. What is neither whole nor can go on is removed.
pub(super) async fn find(files: &dyn Files, now: Timestamp) -> io::Result<State> {
    let mut state = State {
        available_bytes: files.available_bytes().await?,
        ..State::default()
    };
    let entries = files.list().await?;
    for entry in &entries {
        let Some((stem, kind)) = entry.name.split_once('.') else {
            continue;
        };
        match (kind, stem.parse::<Digest>(), stem.parse::<ImageId>()) {
            ("qcow2", Ok(digest), _) => found_copy(files, &mut state, entry, digest).await,
            ("fetch", Ok(digest), _) => {
                state
                    .fetches
                    .insert(digest.clone(), broken_off(digest, entry.bytes, now));
            }
            ("json", _, Ok(id)) => {
                let record = found_record(files, &entries, id).await?;
                state
                    .imports
                    .extend(record.map(|record| (id, Import::new(record))));
            }
            ("making" | "json.new", _, Ok(_)) => files.remove(&entry.name).await?,
            _ => {}
        }
    }
    for entry in &entries {
        let upload = entry.name.strip_suffix(".upload").map(str::parse::<ImageId>);
        if let Some(Ok(id)) = upload
            && !matches!(
                state.imports.get(&id).map(|import| &import.record),
                Some(Record::Receiving { .. })
            )
        {
            // An import has ended, or nothing is known of it.
            files.remove(&entry.name).await?;
        }
    }
    // It was renamed, and what it was renamed from is another's.
    let whole: Vec<_> = state.copies.keys().cloned().collect();
    for digest in whole {
        if state.fetches.remove(&digest).is_some() {
            files.remove(&fetch_name(&digest)).await?;
        }
    }
    Ok(state)
}

async fn found_copy(files: &dyn Files, state: &mut State, entry: &Entry, digest: Digest) {
    match files.inspect(&copy_name(&digest)).await {
        Ok(inspected) => {
            let copy = Whole {
                bytes: entry.bytes,
                virtual_size_bytes: inspected.virtual_size_bytes,
                last_use: entry.time,
            };
            state.copies.insert(digest, copy);
        }
        // Left where it is: disks may have it behind them.
        Err(refusal) => tracing::error!(%digest, %refusal, "a copy of an image has been damaged"),
    }
}

async fn found_record(files: &dyn Files, entries: &[Entry], id: ImageId) -> io::Result<Option<Record>> {
    let bytes = files.read(&record_name(id), 0, MAX_RECORD_BYTES).await?;
    let record: Record = match serde_json::from_slice(&bytes) {
        Ok(record) => record,
        Err(error) => {
            // Nothing depends on it but what was uploaded.
            tracing::error!(image = %id, %error, "the record of an import cannot be read; it is forgotten");
            forget(files, id).await?;
            return Ok(None);
        }
    };
    let entry = |name: &str| entries.iter().find(|entry| entry.name == name);
    let there = entry(&upload_name(id)).map_or(0, |entry| entry.bytes);
    match record {
        Record::Receiving {
            size_bytes,
            received_bytes,
        } => Ok(Some(Record::Receiving {
            size_bytes,
            received_bytes: received_bytes.min(there),
        })),
        // The agent ended before the copy had its name: it is made again, of a file when the controller asks.
        Record::Ready {
            digest, source_bytes, ..
        } if entry(&copy_name(&digest)).is_none() => {
            if there == source_bytes {
                return Ok(Some(Record::Receiving {
                    size_bytes: there,
                    received_bytes: there,
                }));
            }
            forget(files, id).await?;
            Ok(None)
        }
        Record::Ready { .. } | Record::Named | Record::Refused { .. } => Ok(Some(record)),
    }
}

/// A fetch of an earlier run. It goes on where it was when somebody asks for the image again.
fn broken_off(digest: Digest, bytes: u64, now: Timestamp) -> Fetch {
    let progress = Progress::default();
    progress.set(bytes);
    Fetch {
        need: Need {
            digest,
            size_bytes: 0,
            sources: Vec::new(),
        },
        progress,
        running: false,
        trouble: Some(Failure {
            reason: "AGENT_RESTARTED".to_owned(),
            message: "the agent was restarted while it fetched the image".to_owned(),
            retrying: true,
            since: now,
        }),
        cut: tokio_util::sync::CancellationToken::new(),
    }
}

impl Images {
    /// Replaces an import's record, on disk and in memory.
    pub(super) async fn record(&self, id: ImageId, record: Record) -> io::Result<()> {
        save(&*self.0.files, id, &record).await?;
        if let Some(import) = self.state().imports.get_mut(&id) {
            import.record = record;
        }
        Ok(())
    }
}
