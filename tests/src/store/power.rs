//! A disk that forgets what was not synced: a directory as it can be after a power cut.
//!
//! A file's bytes are safe when the file was synced, its name when the directory was; until then each write may be there,
//! not there, or there in part, in any order. That is more than real file systems do to a program, which is the point.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
};

use super::{Random, trace::Call};

/// Pieces in which a write can be torn: a disk's sector.
const SECTOR: usize = 512;

/// What became of what was not synced.
#[derive(Debug, Clone)]
pub enum Fate {
    /// All of it is lost.
    Lost,
    /// All of it is there.
    Kept,
    /// Some of it is there, some is not, some in part.
    Torn(Random),
}

#[derive(Debug, Clone)]
enum Change {
    Write(usize, Vec<u8>),
    Length(usize),
}

#[derive(Debug, Clone, Default)]
struct File {
    safe: Vec<u8>,
    pending: Vec<Change>,
}

#[derive(Debug, Clone)]
enum Naming {
    Put(PathBuf, usize),
    Remove(PathBuf),
    Directory(PathBuf),
}

impl Naming {
    fn path(&self) -> &Path {
        match self {
            Self::Put(path, _) | Self::Remove(path) | Self::Directory(path) => path,
        }
    }
}

/// Names of files, and of the directories that were made. Those that were there before are safe.
#[derive(Debug, Clone, Default)]
struct Names {
    /// By their paths, as text: a path is compared with another part by part, which takes ten times as long.
    files: BTreeMap<OsString, usize>,
    made: BTreeSet<OsString>,
}

impl Names {
    fn take(&mut self, naming: &Naming) {
        match naming {
            Naming::Put(path, file) => {
                self.files.insert(path.into(), *file);
            }
            Naming::Remove(path) => {
                self.files.remove(path.as_os_str());
            }
            Naming::Directory(path) => {
                self.made.insert(path.into());
            }
        }
    }
}

#[derive(Debug, Clone)]
enum Opened {
    File(usize, usize),
    Directory(PathBuf),
}

/// A directory and what of it is safe.
#[derive(Debug, Clone)]
pub struct Disk {
    root: PathBuf,
    files: Vec<File>,
    names: Names,
    safe_names: Names,
    pending_names: Vec<Naming>,
    open: HashMap<i32, Opened>,
}

impl Disk {
    /// An empty directory; calls about anything else are passed over.
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            files: Vec::new(),
            names: Names::default(),
            safe_names: Names::default(),
            pending_names: Vec::new(),
            open: HashMap::new(),
        }
    }

    /// Takes a call. Whether it was about this directory.
    pub fn take(&mut self, call: &Call) -> bool {
        match call {
            Call::Open {
                fd,
                path,
                create,
                truncate,
            } => self.open(*fd, path, *create, *truncate),
            Call::Seek { fd, to } => match self.open.get_mut(fd) {
                Some(Opened::File(_, position)) => {
                    *position = *to;
                    false
                }
                _ => false,
            },
            Call::Write { fd, at, bytes } => {
                let Some(Opened::File(file, position)) = self.open.get_mut(fd) else {
                    return false;
                };
                let start = at.unwrap_or(*position);
                if at.is_none() {
                    *position += bytes.len();
                }
                self.files[*file]
                    .pending
                    .push(Change::Write(start, bytes.clone()));
                true
            }
            Call::Truncate { fd, length } => self.change(*fd, Change::Length(*length)),
            Call::Sync { fd } => self.sync(*fd),
            Call::Rename { from, to } => {
                let Some(file) = self.names.files.remove(from.as_os_str()) else {
                    return false;
                };
                self.names.files.insert(to.into(), file);
                self.pending_names.push(Naming::Put(to.clone(), file));
                self.pending_names.push(Naming::Remove(from.clone()));
                true
            }
            Call::MakeDir { path } => {
                let inside = path.starts_with(&self.root) && *path != self.root;
                if inside && !self.names.made.contains(path.as_os_str()) {
                    self.names.made.insert(path.into());
                    self.pending_names.push(Naming::Directory(path.clone()));
                }
                inside
            }
            Call::Unlink { path } => {
                let known = self.names.files.remove(path.as_os_str()).is_some();
                if known {
                    self.pending_names.push(Naming::Remove(path.clone()));
                }
                known
            }
        }
    }

    fn open(&mut self, fd: i32, path: &Path, create: bool, truncate: bool) -> bool {
        self.open.remove(&fd);
        // What is never written through the descriptor: a lock, and memory that SQLite makes anew after a crash.
        let passed_over =
            path.extension().is_some_and(|e| e == "lock") || path.to_string_lossy().ends_with("-shm");
        if !path.starts_with(&self.root) || passed_over {
            return false;
        }
        if !create && !self.names.files.contains_key(path.as_os_str()) {
            self.open.insert(fd, Opened::Directory(path.to_owned()));
            return false;
        }
        let known = self.names.files.get(path.as_os_str()).copied();
        let file = known.unwrap_or_else(|| {
            self.files.push(File::default());
            let file = self.files.len() - 1;
            self.names.files.insert(path.into(), file);
            self.pending_names.push(Naming::Put(path.to_owned(), file));
            file
        });
        self.open.insert(fd, Opened::File(file, 0));
        if truncate {
            self.files[file].pending.push(Change::Length(0));
        }
        known.is_none() || truncate
    }

    fn change(&mut self, fd: i32, change: Change) -> bool {
        match self.open.get(&fd) {
            Some(Opened::File(file, _)) => {
                self.files[*file].pending.push(change);
                true
            }
            _ => false,
        }
    }

    fn sync(&mut self, fd: i32) -> bool {
        match self.open.get(&fd).cloned() {
            Some(Opened::File(file, _)) => {
                let file = &mut self.files[file];
                for change in std::mem::take(&mut file.pending) {
                    apply(&mut file.safe, &change);
                }
                true
            }
            Some(Opened::Directory(directory)) => {
                let inside = |naming: &Naming| {
                    let parent = naming.path().parent();
                    parent.is_some_and(|parent| parent.as_os_str() == directory.as_os_str())
                };
                let (safe, pending) = std::mem::take(&mut self.pending_names)
                    .into_iter()
                    .partition::<Vec<_>, _>(inside);
                self.pending_names = pending;
                safe.iter().for_each(|naming| self.safe_names.take(naming));
                true
            }
            None => false,
        }
    }

    /// What is in a file now, power or not.
    pub fn read(&self, path: &Path) -> Option<Vec<u8>> {
        let file = self.names.files.get(path.as_os_str())?;
        Some(content(&self.files[*file], &mut Fate::Kept))
    }

    /// Names of the files that are there now, in order.
    pub fn names(&self) -> impl Iterator<Item = &Path> {
        self.names.files.keys().map(Path::new)
    }

    /// Files as the power cut leaves them, by their path below the directory.
    pub fn left(&self, fate: &Fate) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut fate = fate.clone();
        let mut names = self.safe_names.clone();
        // Names are kept in a journal by every file system we know: in order, up to some point.
        let kept = match &mut fate {
            Fate::Lost => 0,
            Fate::Kept => self.pending_names.len(),
            Fate::Torn(random) => {
                usize::try_from(random.below(self.pending_names.len() as u64 + 1)).unwrap_or(0)
            }
        };
        self.pending_names
            .iter()
            .take(kept)
            .for_each(|naming| names.take(naming));
        // What is in a directory whose own name is lost is lost with it.
        let lost = |path: &Path| {
            let mut above = path.ancestors().skip(1);
            above.any(|dir| {
                let dir = dir.as_os_str();
                self.names.made.contains(dir) && !names.made.contains(dir)
            })
        };
        let mut left = BTreeMap::new();
        let files = names.files.iter().map(|(path, file)| (Path::new(path), file));
        for (path, file) in files.filter(|(path, _)| !lost(path)) {
            if let Ok(inside) = path.strip_prefix(&self.root) {
                left.insert(inside.to_owned(), content(&self.files[*file], &mut fate));
            }
        }
        left
    }

    /// Writes the directory into `to` as the power cut leaves it. Directories inside are made.
    pub fn leave(&self, fate: &Fate, to: &Path) -> io::Result<()> {
        for (inside, bytes) in self.left(fate) {
            let target = to.join(inside);
            if let Some(parent) = target.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::write(target, bytes)?;
        }
        Ok(())
    }
}

fn content(file: &File, fate: &mut Fate) -> Vec<u8> {
    let mut bytes = file.safe.clone();
    for change in &file.pending {
        match fate {
            Fate::Lost => {}
            Fate::Kept => apply(&mut bytes, change),
            Fate::Torn(random) => match (random.below(3), change) {
                (0, _) => {}
                (1, Change::Write(at, new)) => tear(&mut bytes, *at, new, random),
                _ => apply(&mut bytes, change),
            },
        }
    }
    bytes
}

/// Some sectors of a write.
fn tear(bytes: &mut Vec<u8>, at: usize, new: &[u8], random: &mut Random) {
    let mut from = 0;
    while from < new.len() {
        let to = new.len().min(from + SECTOR - (at + from) % SECTOR);
        if random.coin() {
            apply(bytes, &Change::Write(at + from, new[from..to].to_vec()));
        }
        from = to;
    }
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Length(length) => bytes.resize(*length, 0),
        Change::Write(at, new) => {
            let end = at + new.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[*at..end].copy_from_slice(new);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(calls: &[Call], fate: &Fate) -> BTreeMap<String, Vec<u8>> {
        let mut disk = Disk::new(Path::new("/d"));
        calls.iter().for_each(|call| {
            disk.take(call);
        });
        let dir = tempfile::tempdir().unwrap();
        disk.leave(fate, dir.path()).unwrap();
        let files = fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().path());
        files
            .map(|path| {
                let name = path.file_name().unwrap().to_string_lossy().into_owned();
                (name, fs::read(path).unwrap())
            })
            .collect()
    }

    #[test]
    fn only_what_was_synced_with_its_name_outlives_a_power_cut() {
        let open = |fd, path: &str, create| Call::Open {
            fd,
            path: path.into(),
            create,
            truncate: false,
        };
        let write = |fd, bytes: &[u8]| Call::Write {
            fd,
            at: None,
            bytes: bytes.to_vec(),
        };
        let mut calls = vec![
            open(3, "/d/a", true),
            write(3, b"old"),
            Call::Sync { fd: 3 },
            open(4, "/d", false),
        ];
        assert!(left(&calls, &Fate::Lost).is_empty(), "its name is not safe");
        calls.push(Call::Sync { fd: 4 });
        calls.push(write(3, b"new"));
        calls.push(Call::Rename {
            from: "/d/a".into(),
            to: "/d/b".into(),
        });
        assert_eq!(
            left(&calls, &Fate::Lost),
            [("a".to_owned(), b"old".to_vec())].into()
        );
        assert_eq!(
            left(&calls, &Fate::Kept),
            [("b".to_owned(), b"oldnew".to_vec())].into()
        );
    }
}
