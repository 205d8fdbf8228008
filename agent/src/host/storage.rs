//! Room in the pools and file systems, without ever waiting long for one.
//!
//! `statvfs` of a file system on a dead server does not return. So each place has one thread of its own that
//! is asked and may answer late or never; there is at most one question open per place, and a sample waits for
//! new questions only a moment.

mod probe;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use dalgu_proto::host::{FileSystem, Pool};
use probe::{Ask, Probe, Room, ask_kernel};

use super::Root;
use crate::config::PoolType;

/// A pool as the agent is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolConfig {
    /// Name, the same on each host that has it.
    pub name: String,
    /// Directory on this host.
    pub path: PathBuf,
    /// Whether every host of the site sees the same files there.
    pub shared: bool,
    /// What it is.
    pub kind: PoolType,
}

impl PoolConfig {
    /// Why no disk can be there, whatever its state.
    const fn unsupported(&self) -> Option<&'static str> {
        match self.kind {
            PoolType::Dir | PoolType::Nfs => None,
            PoolType::LvmThin => Some(
                "pools of type lvm-thin are not used yet: the agent checks their configuration and writes their definition for libvirt",
            ),
            PoolType::Rbd => Some(
                "pools of type rbd are not used yet: the agent checks their configuration and writes their definition for libvirt",
            ),
        }
    }
}

/// That a file system is mounted at a directory: below it is otherwise an empty directory of another one. May block.
///
/// # Errors
/// If none is, or that cannot be found out.
pub fn check_mounted(path: &Path) -> Result<(), String> {
    let unknown = |error: std::io::Error| error.to_string();
    let real = std::fs::canonicalize(path).map_err(unknown)?;
    let text = std::fs::read_to_string("/proc/self/mountinfo").map_err(unknown)?;
    if mounts(&text).iter().any(|(point, _)| *point == real) {
        return Ok(());
    }
    Err(format!(
        "nothing is mounted at {}: mount its network file system; until then nothing is made or removed there",
        path.display()
    ))
}

/// The pools and data directories of this host.
pub(super) struct Storage {
    pools: Vec<PoolConfig>,
    data: Vec<PathBuf>,
    probes: BTreeMap<PathBuf, Probe>,
    ask: Ask,
}

impl std::fmt::Debug for Storage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Storage")
            .field("pools", &self.pools)
            .field("data", &self.data)
            .finish_non_exhaustive()
    }
}

impl Storage {
    /// Watches the pools, and the file systems that hold them and `data`.
    pub(super) fn new(pools: Vec<PoolConfig>, data: Vec<PathBuf>) -> Self {
        Self::with(pools, data, Arc::new(ask_kernel))
    }

    fn with(pools: Vec<PoolConfig>, data: Vec<PathBuf>, ask: Ask) -> Self {
        let watched = pools.iter().filter(|pool| pool.kind.is_directory());
        let watched = watched.map(|pool| (&pool.path, pool.kind == PoolType::Nfs));
        let places = watched.chain(data.iter().map(|path| (path, false)));
        let probes = places
            .map(|(path, mounted)| (path.clone(), Probe::new(path.clone(), mounted)))
            .collect();
        Self {
            pools,
            data,
            probes,
            ask,
        }
    }

    /// Asks every place that has no question open, and waits a moment for the answers; at the first sample of a place
    /// until it counts as silent.
    pub(super) fn refresh(&mut self, now: Duration) {
        let mut new: Vec<(&mut Probe, Duration)> = Vec::with_capacity(self.probes.len());
        for probe in self.probes.values_mut() {
            let patience = probe.ask(&self.ask, now);
            new.push((probe, patience));
        }
        // All were asked before the first is waited for, so the waits do not add up.
        let asked_at = tokio::time::Instant::now();
        for (probe, patience) in new {
            probe.wait(patience.saturating_sub(asked_at.elapsed()));
        }
    }

    fn state(&self, path: &Path, now: Duration) -> Result<Room, String> {
        self.probes
            .get(path)
            .map_or_else(|| Err("is not watched".to_owned()), |probe| probe.state(now))
    }

    /// The pools with their room as known at `now`.
    pub(super) fn pools(&self, now: Duration) -> Vec<Pool> {
        let pool = |config: &PoolConfig| {
            let state = match config.unsupported() {
                Some(why) => Err(why.to_owned()),
                None => self.state(&config.path, now),
            };
            let (room, error) = match state {
                Ok(room) => (room, None),
                Err(error) => (Room::default(), Some(error)),
            };
            Pool {
                name: config.name.clone(),
                path: config.path.to_string_lossy().into_owned(),
                shared: config.shared,
                capacity_bytes: room.size_bytes,
                available_bytes: room.available_bytes,
                used_bytes: room.used_bytes,
                error,
            }
        };
        self.pools.iter().map(pool).collect()
    }

    /// The file systems that hold the pools and the data, each once, by mount point. One that does not answer is left out;
    /// its pool says why.
    pub(super) fn file_systems(&self, root: &Root, now: Duration) -> Vec<FileSystem> {
        let mounts = mounts(&root.word("proc/self/mountinfo").unwrap_or_default());
        let mut found = BTreeMap::new();
        for path in self.pools.iter().map(|pool| &pool.path).chain(&self.data) {
            let Ok(room) = self.state(path, now) else { continue };
            // The last of several mounts on one directory hides those before it.
            let holds = |(mount, _): &&(PathBuf, String)| room.real.starts_with(mount);
            let Some((mount, kind)) = mounts
                .iter()
                .filter(holds)
                .max_by_key(|(mount, _)| mount.components().count())
            else {
                continue;
            };
            found.entry(mount.clone()).or_insert_with(|| FileSystem {
                mount_point: mount.to_string_lossy().into_owned(),
                kind: kind.clone(),
                size_bytes: room.size_bytes,
                available_bytes: room.available_bytes,
                inodes: room.inodes,
                inodes_free: room.inodes_free,
            });
        }
        found.into_values().collect()
    }
}

/// Mount points and types of /proc/self/mountinfo, in its order. Lines of another form are left out.
fn mounts(text: &str) -> Vec<(PathBuf, String)> {
    let mount = |line: &str| {
        // 36 35 98:0 /root /mount/point rw,noatime shared:1 - ext4 /dev/sda1 rw
        let (before, after) = line.split_once(" - ")?;
        let point = before.split(' ').nth(4)?;
        Some((
            PathBuf::from(unescape(point)),
            after.split(' ').next()?.to_owned(),
        ))
    };
    text.lines().filter_map(mount).collect()
}

/// Undoes the kernel's `\040` for space, tab, newline and backslash.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let code = rest
            .get(at + 1..at + 4)
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        let (character, length) = code.map_or(('\\', 1), |code| (char::from(code), 4));
        out.push(character);
        rest = &rest[at + length..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    };

    use super::{super::root::fake::Tree, *};

    fn room(path: &Path) -> Room {
        Room {
            real: path.to_owned(),
            size_bytes: 100,
            available_bytes: 40,
            used_bytes: 50,
            inodes: 9,
            inodes_free: 8,
        }
    }

    fn pool(name: &str, path: &str) -> PoolConfig {
        PoolConfig {
            name: name.into(),
            path: path.into(),
            shared: false,
            kind: PoolType::Dir,
        }
    }

    fn at(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// Answers at once, but for paths below /nfs while the gate is held; counts the questions.
    fn gated() -> (Ask, Arc<Mutex<()>>, Arc<AtomicUsize>) {
        let (gate, count) = (Arc::new(Mutex::new(())), Arc::new(AtomicUsize::new(0)));
        let (inner_gate, inner_count) = (gate.clone(), count.clone());
        let ask: Ask = Arc::new(move |path| {
            inner_count.fetch_add(1, Ordering::SeqCst);
            if path.starts_with("/nfs") {
                drop(inner_gate.lock());
            }
            if path.starts_with("/gone") {
                Err("No such file or directory".into())
            } else {
                Ok(room(path))
            }
        });
        (ask, gate, count)
    }

    #[test]
    fn a_pool_says_its_room_or_why_it_cannot() {
        let (ask, ..) = gated();
        let mut storage = Storage::with(vec![pool("local", "/data"), pool("lost", "/gone/x")], vec![], ask);
        storage.refresh(at(0));
        let pools = storage.pools(at(0));
        assert_eq!(
            (pools[0].capacity_bytes, pools[0].available_bytes, &pools[0].error),
            (100, 40, &None)
        );
        assert_eq!(pools[1].capacity_bytes, 0);
        assert_eq!(pools[1].error.as_deref(), Some("No such file or directory"));
    }

    #[test]
    fn a_pool_that_must_be_mounted_says_so_while_it_is_not_and_one_that_is_not_used_says_that() {
        let dir = tempfile::tempdir().unwrap();
        let of = |name: &str, path: &str, kind| PoolConfig {
            kind,
            ..pool(name, path)
        };
        let pools = vec![
            of("nfs", dir.path().to_str().unwrap(), PoolType::Nfs),
            of("proc", "/proc", PoolType::Nfs),
            of("thin", "vg0/thin", PoolType::LvmThin),
            of("ceph", "vms", PoolType::Rbd),
        ];
        let mut storage = Storage::new(pools, vec![]);
        storage.refresh(at(0));
        let errors: Vec<_> = storage.pools(at(0)).into_iter().map(|pool| pool.error).collect();
        let says =
            |place: usize, words: &str| errors[place].as_ref().is_some_and(|error| error.contains(words));
        assert!(says(0, "nothing is mounted"), "{errors:?}");
        assert_eq!(errors[1], None);
        assert!(says(2, "not used yet") && says(3, "not used yet"), "{errors:?}");
    }

    #[test]
    fn a_dead_pool_delays_nobody_after_its_first_sample_and_is_asked_once() {
        let (ask, gate, count) = gated();
        let mut storage = Storage::with(vec![pool("dead", "/nfs/a"), pool("local", "/data")], vec![], ask);
        storage.refresh(at(0));
        assert_eq!(storage.pools(at(0))[0].error, None);
        let held = gate.lock().unwrap();
        storage.refresh(at(1_000));
        // not silent long enough: the last answer stands
        assert_eq!(storage.pools(at(1_050))[0].error, None);
        let asked = count.load(Ordering::SeqCst);
        for now in [3_000, 5_000, 7_000] {
            storage.refresh(at(now));
            let pools = storage.pools(at(now));
            assert_eq!(pools[0].error.as_deref(), Some("did not answer within 2 s"));
            assert_eq!(pools[0].capacity_bytes, 0);
            assert_eq!(pools[1].error, None);
        }
        // the local pool was asked each time, the dead one not again
        assert_eq!(count.load(Ordering::SeqCst), asked + 3);
        drop(held);
        // the late answer comes as soon as the kernel lets go, and with it the pool is back
        let back = (0..200).any(|_| {
            storage.refresh(at(9_000));
            storage.probes.values_mut().for_each(|probe| probe.wait(at(20)));
            storage.pools(at(9_000))[0].error.is_none()
        });
        assert!(back);
    }

    #[test]
    fn a_pool_that_never_answered_is_an_error_and_not_an_empty_pool() {
        let (ask, gate, _) = gated();
        let _held = gate.lock().unwrap();
        let mut storage = Storage::with(vec![pool("dead", "/nfs/a")], vec![], ask);
        storage.refresh(at(0));
        assert_eq!(
            storage.pools(at(0))[0].error.as_deref(),
            Some("did not answer within 2 s")
        );
    }

    #[test]
    fn a_probe_that_panics_is_an_error_and_starts_again() {
        let count = Arc::new(AtomicUsize::new(0));
        let counter = count.clone();
        let ask: Ask = Arc::new(move |path| {
            assert!(
                counter.fetch_add(1, Ordering::SeqCst) > 0,
                "the first question fails by intent"
            );
            Ok(room(path))
        });
        let mut storage = Storage::with(vec![pool("local", "/data")], vec![], ask);
        storage.refresh(at(0));
        assert_eq!(
            storage.pools(at(0))[0].error.as_deref(),
            Some("the probe ended unexpectedly")
        );
        storage.refresh(at(1));
        assert_eq!(storage.pools(at(1))[0].error, None);
    }

    #[test]
    fn a_file_system_that_holds_two_places_is_listed_once() {
        let tree = Tree::new();
        tree.write(
            "proc/self/mountinfo",
            "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
             30 27 0:30 / /srv/my\\040pool rw shared:2 master:1 - xfs /dev/vdb rw\n\
             31 27 0:31 / /srv rw - tmpfs none rw\nnonsense\n",
        );
        let (ask, ..) = gated();
        let pools = vec![
            pool("a", "/srv/my pool/a"),
            pool("b", "/srv/my pool/b"),
            pool("lost", "/gone/x"),
        ];
        let mut storage = Storage::with(pools, vec!["/var/lib".into(), "/srvother".into()], ask);
        storage.refresh(at(0));
        let listed = storage.file_systems(&tree.root(), at(0));
        let names: Vec<_> = listed
            .iter()
            .map(|fs| (fs.mount_point.as_str(), fs.kind.as_str()))
            .collect();
        assert_eq!(names, [("/", "ext4"), ("/srv/my pool", "xfs")]);
        assert_eq!((listed[0].size_bytes, listed[0].inodes_free), (100, 8));
    }

    #[test]
    fn escapes_of_the_kernel_are_undone() {
        for (escaped, plain) in [
            ("/a\\040b", "/a b"),
            ("\\134", "\\"),
            ("/x\\", "/x\\"),
            ("/x\\9zz", "/x\\9zz"),
            ("/é\\é", "/é\\é"),
        ] {
            assert_eq!(unescape(escaped), plain);
        }
    }
}
