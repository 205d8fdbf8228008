//! A directory of this process, in memory where the machine has such a place, for code that reads files. Used by targets
//! whose code under test is called with a path.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// See the module; removed with its value.
pub struct Scratch(tempfile::TempDir);

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Scratch {
    /// An empty one.
    pub fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let made = match tempfile::tempdir_in(memory) {
            Ok(dir) => Ok(dir),
            Err(_) => tempfile::tempdir(),
        };
        Self(made.expect("a directory for temporary files can be written to"))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Writes a file, with its directories.
    pub fn write(&self, relative: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(relative);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).expect("a directory of our own can be made");
        }
        fs::write(&path, content).expect("a file of our own can be written");
        path
    }
}
