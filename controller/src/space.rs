//! Room on the disk that the store is on. Below a reserve nothing new is made, so that what there is can still be
//! stopped, deleted and reported.
//!
//! A task samples the file system and notes what it finds in the state; who makes things asks [`Space::low`] there, so
//! that no change waits for the file system. It gets well by itself when there is room again.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use crate::{blocking::beside, state::Db};

/// Time between two samples.
const INTERVAL: Duration = Duration::from_secs(5);
/// Where nothing is configured the reserve is one part in so many of the file system: 5 %,
const RESERVE_PART: u64 = 20;
/// and at most this, many times what a store takes: 1 GiB.
const RESERVE_MOST: u64 = 1 << 30;
/// What is low is well again with one part in so many more than the reserve, so that it does not change with each write.
const WELL_PART: u64 = 10;

/// What a file system says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// Size.
    pub total_bytes: u64,
    /// What this process may still write.
    pub free_bytes: u64,
}

/// Room for the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// What may still be written.
    pub free_bytes: u64,
    /// Below this nothing new is made.
    pub reserve_bytes: u64,
    /// Nothing new is made.
    pub low: bool,
}

impl Space {
    /// What follows from a sample; `reserve_bytes` 0 takes the usual share.
    pub fn judge(before: Option<Self>, sample: Sample, reserve_bytes: u64) -> Self {
        let reserve_bytes = match reserve_bytes {
            0 => (sample.total_bytes / RESERVE_PART).min(RESERVE_MOST),
            given => given,
        };
        let was_low = before.is_some_and(|space| space.low);
        let limit = if was_low {
            reserve_bytes + reserve_bytes / WELL_PART
        } else {
            reserve_bytes
        };
        Self {
            free_bytes: sample.free_bytes,
            reserve_bytes,
            low: sample.free_bytes < limit,
        }
    }
}

/// Asks the file system that holds `path`. Blocks as long as that takes.
pub fn sample(path: &Path) -> io::Result<Sample> {
    let said = nix::sys::statvfs::statvfs(path)?;
    let block = said.fragment_size();
    Ok(Sample {
        total_bytes: said.blocks().saturating_mul(block),
        free_bytes: said.blocks_available().saturating_mul(block),
    })
}

/// Where samples come from: the file system, or what a test says.
pub type Source = Arc<dyn Fn() -> io::Result<Sample> + Send + Sync>;

/// Samples of the file system that holds `path`.
pub fn source(path: PathBuf) -> Source {
    Arc::new(move || sample(&path))
}

/// Runs until `stop`.
pub async fn run(db: Db, source: Source, reserve_bytes: u64, stop: CancellationToken) {
    let mut tick = tokio::time::interval(INTERVAL);
    loop {
        // Cancel safe: a tick that is lost comes again.
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        let source = source.clone();
        match beside(move || source()).await {
            Ok(sample) => note(&db, sample, reserve_bytes).await,
            Err(error) => tracing::warn!(%error, "the room for the store cannot be found out"),
        }
    }
}

async fn note(db: &Db, sample: Sample, reserve_bytes: u64) {
    let before = db.snapshot().space;
    let space = Space::judge(before, sample, reserve_bytes);
    if before == Some(space) {
        return;
    }
    db.change(|tx| tx.set_space(space)).await;
    let Space {
        free_bytes,
        reserve_bytes,
        low,
    } = space;
    match (before.is_some_and(|space| space.low), low) {
        (false, true) => tracing::error!(
            free_bytes,
            reserve_bytes,
            "there is little room for the store: nothing new is made until there is more"
        ),
        (true, false) => tracing::info!(free_bytes, reserve_bytes, "there is room for the store again"),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::{fixtures, state::Hooks, store::memory::Disk};

    #[test]
    fn it_is_low_below_the_reserve_and_well_again_some_way_above() {
        let of = |free_bytes| Sample {
            total_bytes: 2000,
            free_bytes,
        };
        let judge = |was_low: bool, free, reserve| {
            let before = Space {
                free_bytes: 0,
                reserve_bytes: 0,
                low: was_low,
            };
            Space::judge(Some(before), of(free), reserve).low
        };
        for (was_low, free, reserve, low) in [
            (false, 100, 0, false),
            (false, 99, 0, true),
            (true, 109, 0, true),
            (true, 110, 0, false),
            (false, 499, 500, true),
            (false, 500, 500, false),
        ] {
            assert_eq!(judge(was_low, free, reserve), low, "{was_low} {free} {reserve}");
        }
    }

    #[test]
    fn a_large_disk_keeps_no_more_free_than_a_store_could_need() {
        let of = |total_bytes| {
            let free_bytes = 0;
            Space::judge(
                None,
                Sample {
                    total_bytes,
                    free_bytes,
                },
                0,
            )
            .reserve_bytes
        };
        assert_eq!(of(10 << 30), 512 << 20);
        assert_eq!(of(8 << 40), 1 << 30);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_low_gets_well_by_itself_and_nothing_is_written_for_it() {
        let disk = Disk::default();
        let db = Db::open(disk.open(), fixtures::cluster_id(), Hooks::default()).unwrap();
        let commits = disk.commits();
        let free = Arc::new(AtomicU64::new(1));
        let source: Source = Arc::new({
            let free = free.clone();
            move || {
                Ok(Sample {
                    total_bytes: 1000,
                    free_bytes: free.load(Ordering::Relaxed),
                })
            }
        });
        tokio::spawn(run(db.clone(), source, 0, CancellationToken::new()));
        let until = async |low: bool| {
            while db.snapshot().space.is_none_or(|space| space.low != low) {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        until(true).await;
        free.store(900, Ordering::Relaxed);
        until(false).await;
        assert_eq!(disk.commits(), commits);
    }

    #[test]
    fn a_real_file_system_says_something() {
        let said = sample(Path::new("/")).unwrap();
        assert!(said.total_bytes > 0 && said.free_bytes <= said.total_bytes);
    }
}
