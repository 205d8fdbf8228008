//! Room in the pools and file systems, without ever waiting long for one.
//!
//! `statvfs` of a file system on a dead server does not return. So each place has one thread of its own that
//! is asked and may answer late or never; there is at most one question open per place, and a sample waits for
//! new questions only a moment.
//!
//! ```text
//!            ask                  answer
//!   Idle ----------> Asked(since) ----------> Idle, value or error kept
//!                        | still open after 2 s: reported as an error, not asked again
//! ```

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel},
    },
    thread,
    time::Duration,
};

use dalgu_proto::host::{FileSystem, Pool};
use nix::sys::statvfs::statvfs;

use super::Root;

/// Time after which a place counts as not answering.
const DEADLINE: Duration = Duration::from_secs(2);
/// How long a sample waits for a place that has answered before; local ones answer in microseconds.
const MOMENT: Duration = Duration::from_millis(50);

/// A pool as the agent is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolConfig {
    /// Name, the same on each host that has it.
    pub name: String,
    /// Directory on this host.
    pub path: PathBuf,
    /// Whether every host of the site sees the same files there.
    pub shared: bool,
}

/// Size and room of a file system.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Room {
    /// The place without symbolic links, to find its mount by.
    real: PathBuf,
    size_bytes: u64,
    available_bytes: u64,
    inodes: u64,
    inodes_free: u64,
}

/// Asks for the room at a place; may block.
pub(super) type Ask = Arc<dyn Fn(&Path) -> Result<Room, String> + Send + Sync>;

fn ask_kernel(path: &Path) -> Result<Room, String> {
    let stat = statvfs(path).map_err(|errno| errno.desc().to_owned())?;
    let bytes = |blocks: u64| blocks.saturating_mul(stat.fragment_size());
    Ok(Room {
        real: fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()),
        size_bytes: bytes(stat.blocks()),
        available_bytes: bytes(stat.blocks_available()),
        inodes: stat.files(),
        inodes_free: stat.files_free(),
    })
}

/// Questions to the thread of a place, and its answers.
type Line = (SyncSender<()>, Receiver<Result<Room, String>>);

/// One place with its thread.
#[derive(Debug)]
struct Probe {
    path: PathBuf,
    /// Present while the thread runs.
    line: Option<Line>,
    /// When the open question was asked, since boot.
    asked: Option<Duration>,
    last: Option<Result<Room, String>>,
}

impl Probe {
    fn new(path: PathBuf) -> Self {
        Self {
            path,
            line: None,
            asked: None,
            last: None,
        }
    }

    /// Asks, unless a question is open or no thread can be had.
    fn ask(&mut self, ask: &Ask, now: Duration) {
        self.take();
        if self.asked.is_some() {
            return;
        }
        if self.line.is_none() {
            self.line = spawn(&self.path, ask)
                .map_err(|error| self.last = Some(Err(error.to_string())))
                .ok();
        }
        if self
            .line
            .as_ref()
            .is_some_and(|(questions, _)| questions.try_send(()).is_ok())
        {
            self.asked = Some(now);
        }
    }

    /// Takes an answer that is there.
    fn take(&mut self) {
        match self.line.as_ref().map(|(_, answers)| answers.try_recv()) {
            Some(Ok(answer)) => self.answered(answer),
            Some(Err(TryRecvError::Disconnected)) => self.lost(),
            Some(Err(TryRecvError::Empty)) | None => {}
        }
    }

    /// Waits for the answer.
    fn wait(&mut self, limit: Duration) {
        if self.asked.is_none() {
            return;
        }
        match self.line.as_ref().map(|(_, answers)| answers.recv_timeout(limit)) {
            Some(Ok(answer)) => self.answered(answer),
            Some(Err(RecvTimeoutError::Disconnected)) => self.lost(),
            Some(Err(RecvTimeoutError::Timeout)) | None => {}
        }
    }

    fn answered(&mut self, answer: Result<Room, String>) {
        self.asked = None;
        self.last = Some(answer);
    }

    /// The thread ended, which it does only by a panic; the next question starts another.
    fn lost(&mut self) {
        (self.line, self.asked) = (None, None);
        self.last = Some(Err("the probe ended unexpectedly".to_owned()));
    }

    /// What is known at `now`: the last answer, unless the place has kept a question open too long.
    fn state(&self, now: Duration) -> Result<Room, String> {
        let silent = self
            .asked
            .is_some_and(|since| now.saturating_sub(since) >= DEADLINE);
        match &self.last {
            Some(answer) if !silent => answer.clone(),
            _ => Err(format!("did not answer within {} s", DEADLINE.as_secs())),
        }
    }
}

/// Starts the thread of a place; it ends when the place is dropped, once the kernel lets it go.
fn spawn(path: &Path, ask: &Ask) -> std::io::Result<Line> {
    let (questions, asked) = sync_channel(1);
    let (answer, answers) = sync_channel(1);
    let (path, ask) = (path.to_owned(), Arc::clone(ask));
    thread::Builder::new()
        .name("statvfs".into())
        .stack_size(128 * 1024)
        .spawn(move || {
            while asked.recv().is_ok() {
                if answer.send(ask(&path)).is_err() {
                    return;
                }
            }
        })?;
    Ok((questions, answers))
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
        let paths = pools.iter().map(|pool| &pool.path).chain(&data);
        let probes = paths
            .map(|path| (path.clone(), Probe::new(path.clone())))
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
        let mut limit = Duration::ZERO;
        for probe in self.probes.values_mut() {
            probe.ask(&self.ask, now);
            if probe.asked == Some(now) {
                limit = limit.max(if probe.last.is_none() { DEADLINE } else { MOMENT });
            }
        }
        let until = tokio::time::Instant::now() + limit;
        for probe in self.probes.values_mut().filter(|probe| probe.asked == Some(now)) {
            probe.wait(until.saturating_duration_since(tokio::time::Instant::now()));
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
            let state = self.state(&config.path, now);
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
            inodes: 9,
            inodes_free: 8,
        }
    }

    fn pool(name: &str, path: &str) -> PoolConfig {
        PoolConfig {
            name: name.into(),
            path: path.into(),
            shared: false,
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

    #[test]
    fn the_kernel_tells_the_room_of_a_directory_and_the_error_of_none() {
        let tree = Tree::new();
        assert!(ask_kernel(&tree.root().path("")).unwrap().size_bytes > 0);
        assert_eq!(
            ask_kernel(Path::new("/not/there")).unwrap_err(),
            "No such file or directory"
        );
    }
}
