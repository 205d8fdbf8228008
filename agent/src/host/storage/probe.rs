//! One place that is asked for its room on a thread of its own. Used by [`super::Storage`].
//!
//! ```text
//!            ask                  answer
//!   Idle ----------> Asked(since) ----------> Idle, value or error kept
//!                        | still open after 2 s: reported as an error, not asked again
//! ```

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel},
    },
    thread,
    time::Duration,
};

use nix::sys::statvfs::statvfs;

use super::check_mounted;

/// Time after which a place counts as not answering.
const DEADLINE: Duration = Duration::from_secs(2);
/// How long a sample waits for a place that has answered before; local ones answer in microseconds.
const MOMENT: Duration = Duration::from_millis(50);

/// Size and room of a file system.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Room {
    /// The place without symbolic links, to find its mount by.
    pub real: PathBuf,
    /// As in [`dalgu_proto::host::FileSystem`].
    pub size_bytes: u64,
    /// As in [`dalgu_proto::host::FileSystem`].
    pub available_bytes: u64,
    /// In use by anybody.
    pub used_bytes: u64,
    /// As in [`dalgu_proto::host::FileSystem`].
    pub inodes: u64,
    /// As in [`dalgu_proto::host::FileSystem`].
    pub inodes_free: u64,
}

/// Asks for the room at a place; may block.
pub(super) type Ask = Arc<dyn Fn(&Path) -> Result<Room, String> + Send + Sync>;

/// Asks the kernel.
pub(super) fn ask_kernel(path: &Path) -> Result<Room, String> {
    let stat = statvfs(path).map_err(|errno| errno.desc().to_owned())?;
    let bytes = |blocks: u64| blocks.saturating_mul(stat.fragment_size());
    Ok(Room {
        real: fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()),
        size_bytes: bytes(stat.blocks()),
        available_bytes: bytes(stat.blocks_available()),
        used_bytes: bytes(stat.blocks().saturating_sub(stat.blocks_free())),
        inodes: stat.files(),
        inodes_free: stat.files_free(),
    })
}

/// Questions to the thread of a place, and its answers.
type Line = (SyncSender<()>, Receiver<Result<Room, String>>);

/// One place with its thread.
#[derive(Debug)]
pub(super) struct Probe {
    path: PathBuf,
    /// A file system must be mounted there.
    mounted: bool,
    /// Present while the thread runs.
    line: Option<Line>,
    /// When the open question was asked, since boot.
    asked: Option<Duration>,
    last: Option<Result<Room, String>>,
}

impl Probe {
    /// A place not asked yet.
    pub(super) fn new(path: PathBuf, mounted: bool) -> Self {
        Self {
            path,
            mounted,
            line: None,
            asked: None,
            last: None,
        }
    }

    /// Asks, unless a question is open or no thread can be had; says how long to wait for the answer, zero when
    /// there is no new question.
    pub(super) fn ask(&mut self, ask: &Ask, now: Duration) -> Duration {
        self.take();
        if self.asked.is_some() {
            return Duration::ZERO;
        }
        if self.line.is_none() {
            self.line = spawn(&self.path, self.mounted, ask)
                .map_err(|error| self.last = Some(Err(error.to_string())))
                .ok();
        }
        let accepted = |(questions, _): &Line| questions.try_send(()).is_ok();
        if self.line.as_ref().is_none_or(|line| !accepted(line)) {
            return Duration::ZERO;
        }
        self.asked = Some(now);
        if self.last.is_none() { DEADLINE } else { MOMENT }
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
    pub(super) fn wait(&mut self, limit: Duration) {
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
    pub(super) fn state(&self, now: Duration) -> Result<Room, String> {
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
fn spawn(path: &Path, mounted: bool, ask: &Ask) -> std::io::Result<Line> {
    let (questions, asked) = sync_channel(1);
    let (answer, answers) = sync_channel(1);
    let (path, ask) = (path.to_owned(), Arc::clone(ask));
    thread::Builder::new()
        .name("statvfs".into())
        .stack_size(128 * 1024)
        .spawn(move || {
            while asked.recv().is_ok() {
                let there = if mounted { check_mounted(&path) } else { Ok(()) };
                if answer.send(there.and_then(|()| ask(&path))).is_err() {
                    return;
                }
            }
        })?;
    Ok((questions, answers))
}

#[cfg(test)]
mod tests {
    use super::{super::super::root::fake::Tree, *};

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
