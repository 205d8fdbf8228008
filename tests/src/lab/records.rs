//! What the machine remembers of its labs, so that the next `lab` command, also after a crash of the last one,
//! knows what to remove: one record a lab, and one list of the directories that labs made in the machine's own file system.
//! Called when a lab goes up or down.

use std::fs;
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, umount2};
use serde::{Deserialize, Serialize};

use super::layout::{Layout, RECORDS};
use super::network::NAMESPACES;
use super::run::run;

/// Lies in every lab directory; without it, no directory is ever removed.
const MARKER: &str = ".dalgu-lab";
const MADE: &str = "made";

/// What is known of a lab that is up, or that was left half up.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// Where its state is.
    pub dir: PathBuf,
    /// How many hosts it has.
    pub hosts: u8,
    /// Whether the controller and the agents run too.
    pub dalgu: bool,
    /// It came up whole.
    pub complete: bool,
}

/// Keeps other lab commands from claiming or forgetting at the same time. `/run` itself is locked: a file of its own
/// would be left behind.
fn lock() -> anyhow::Result<Flock<fs::File>> {
    let run = fs::File::open("/run").context("open /run")?;
    Flock::lock(run, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .context("lock /run")
}

/// Claims the lab's id and its directory, before anything else is made.
///
/// # Errors
/// If another lab has this id, or the directory is not empty and no lab's.
pub fn claim(layout: &Layout, record: &Record) -> anyhow::Result<()> {
    let _held = lock()?;
    fs::create_dir_all(RECORDS).context("make the folder of lab records")?;
    let file = fs::File::options()
        .write(true)
        .create_new(true)
        .open(layout.record());
    match file {
        Ok(mut file) => file
            .write_all(text(record)?.as_bytes())
            .context("write the lab's record")?,
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            bail!(
                "lab {} is there already: `lab down` removes it, `lab --id N` makes another",
                layout.id()
            )
        }
        Err(error) => return Err(error).context("write the lab's record"),
    }
    let dir = layout.dir();
    if dir.exists() && !dir.join(MARKER).exists() && !is_empty(dir) {
        fs::remove_file(layout.record()).context("withdraw the lab's record")?;
        bail!("{} is not empty and is no lab's directory", dir.display());
    }
    fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    fs::write(
        dir.join(MARKER),
        "Made by the lab; `lab down` removes this directory.\n",
    )
    .context("mark the lab's directory")
}

/// Writes the record anew.
///
/// # Errors
/// If it cannot be written.
pub fn update(layout: &Layout, record: &Record) -> anyhow::Result<()> {
    fs::write(layout.record(), text(record)?).context("write the lab's record")
}

fn text(record: &Record) -> anyhow::Result<String> {
    serde_json::to_string(record).context("write the lab's record as JSON")
}

/// The record of this lab, if there is one.
///
/// # Errors
/// If it cannot be read.
pub fn read(layout: &Layout) -> anyhow::Result<Option<Record>> {
    match fs::read_to_string(layout.record()) {
        Ok(text) if text.is_empty() => Ok(None),
        Ok(text) => Ok(Some(
            serde_json::from_str(&text).context("read the lab's record")?,
        )),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context("read the lab's record"),
    }
}

/// Makes directories in the machine's own file system, to mount on, and remembers those that were not there;
/// the folder of network namespaces too, which `ip` will make.
///
/// # Errors
/// If one cannot be made.
pub fn make_mountpoints(paths: &[&str]) -> anyhow::Result<()> {
    let _held = lock()?;
    let missing: Vec<_> = paths
        .iter()
        .chain(&[NAMESPACES])
        .flat_map(|path| Path::new(path).ancestors())
        .filter(|path| !path.exists())
        .map(|path| format!("{}\n", path.display()))
        .collect();
    let mut list = fs::File::options()
        .create(true)
        .append(true)
        .open(Path::new(RECORDS).join(MADE))
        .context("open the list of made directories")?;
    list.write_all(missing.concat().as_bytes())
        .context("list made directories")?;
    for path in paths {
        fs::create_dir_all(path).with_context(|| format!("make {path}"))?;
    }
    Ok(())
}

/// Removes a lab's directory and record and, after the last lab, the directories that labs made on the machine.
///
/// # Errors
/// If something cannot be removed.
pub async fn forget(layout: &Layout) -> anyhow::Result<()> {
    let dir = layout.dir();
    if dir.join(MARKER).exists() {
        unmount_below(dir)?;
        fs::remove_dir_all(dir).with_context(|| format!("remove {}", dir.display()))?;
    }
    let _held = lock()?;
    match fs::remove_file(layout.record()) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).context("remove the lab's record");
        }
        _ => {}
    }
    let Ok(left) = fs::read_dir(RECORDS) else {
        return Ok(());
    };
    if left.flatten().any(|entry| entry.file_name() != MADE) {
        return Ok(());
    }
    remove_made().await;
    fs::remove_dir_all(RECORDS).context("remove the folder of lab records")
}

/// Unmounts what a test mounted in the lab's directory.
fn unmount_below(dir: &Path) -> anyhow::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("read the list of mounts")?;
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    // The last is on top.
    for place in places
        .filter(|place| Path::new(place).starts_with(dir))
        .collect::<Vec<_>>()
        .iter()
        .rev()
    {
        umount2(*place, MntFlags::MNT_DETACH).with_context(|| format!("unmount {place}"))?;
    }
    Ok(())
}

/// Removes what labs made and nobody filled. The deepest first.
async fn remove_made() {
    let list = fs::read_to_string(Path::new(RECORDS).join(MADE)).unwrap_or_default();
    let mut paths: Vec<_> = list.lines().map(PathBuf::from).collect();
    paths.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
    for path in paths {
        if path == Path::new(NAMESPACES) && is_empty(&path) {
            // `ip` has mounted it on itself. Where not, this fails, and removing still works.
            let _ = run("umount", [NAMESPACES]).await;
        }
        // Refused where somebody else has put something in: then it is not ours any more.
        let _ = fs::remove_dir(path);
    }
}

fn is_empty(dir: &Path) -> bool {
    fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none())
}
