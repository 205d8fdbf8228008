//! `qemu-img`, confined. Called by the hypervisor's storage and by the host's store of images, which have judged what it reads;
//! decides nothing about disks.
//!
//! Were the image to take it over all the same, it would be a process that
//! - has no name to open: the image is its standard input, the new disk its standard output, and both are opened anew through
//!   `/proc/self/fd`. No other process started meanwhile is given either of them;
//! - is told the format, and that there is no backing file;
//! - is a user of its own without capabilities, groups or a way to new privileges: [`USERS`]. Not QEMU's user: to that belong
//!   the disks and the processes of running guests;
//! - has no network: its network namespace is a new one;
//! - has limits on memory, processor time, file size and open files, writes no core, and yields to guests by its niceness,
//!   from which the kernel also takes its place among those who wait for disks;
//! - ends with the agent's thread that waits for it, at the deadline, and when the agent dies.
//!
//! Opening anew asks for the file's own permissions, not for those of the directories above it: the image must be readable for
//! that user by its mode, as with 0644, and the new disk is given to it until it is filled. An agent that is not root,
//! as in tests, runs it as itself and in its own network, with everything else as above.

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::{
        fd::AsFd as _,
        unix::{
            fs::{MetadataExt as _, fchown},
            process::ExitStatusExt as _,
        },
    },
    path::Path,
    process::{Output, Stdio},
    time::Duration,
};

use dalgu_proto::vm::DiskFormat;
use nix::{
    sys::signal::Signal,
    unistd::{User, geteuid},
};
use tokio::{io::AsyncReadExt as _, process::Command, time::Instant};

use crate::image::Format;

/// Whom it runs as: the first of these that the host has. The first is made by systemd/dalgu.sysusers; the second is shared with
/// whatever else wants to be nobody.
const USERS: [&str; 2] = ["dalgu-image", "nobody"];
/// Address space it may take, in bytes; it needs some 300 MiB with its threads.
const ADDRESS_SPACE: u64 = 2 << 30;
/// Bytes it may complain in.
const MOST_COMPLAINT: u64 = 64 << 10;
/// Files it may have open; it needs some ten.
const OPEN_FILES: u32 = 64;
/// Added to a disk's size for what qcow2 needs besides: below one part in a thousand, and some clusters.
const OVERHEAD: u64 = 64 << 20;
/// How far it stands back for others.
const NICENESS: u32 = 10;
/// How it opens the image and the disk.
const IMAGE: &str = "/proc/self/fd/0";
const DISK: &str = "/proc/self/fd/1";

/// Why it did not do what was asked.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It could not be run, or not do its work here.
    Here(String),
    /// It cannot make anything of what it reads, or reached one of its limits.
    Image(String),
    /// The deadline came.
    Late(Duration),
}

/// Fills one disk.
pub(crate) struct QemuImg<'a> {
    disk: &'a File,
    user: Option<User>,
    most_bytes: u64,
    deadline: Instant,
}

impl<'a> QemuImg<'a> {
    /// For the empty file of a disk of so many bytes; gives the file to the user who is to fill it.
    pub(crate) fn new(disk: &'a File, size_bytes: u64, deadline: Instant) -> io::Result<Self> {
        let user = user()?;
        if let Some(user) = &user {
            fchown(disk, Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
        }
        Ok(Self {
            disk,
            user,
            most_bytes: size_bytes + size_bytes / 1024 + OVERHEAD,
            deadline,
        })
    }

    /// Gives a file to the user who is to read it.
    pub(crate) fn give(&self, file: &File) -> io::Result<()> {
        match &self.user {
            Some(user) => fchown(file, Some(user.uid.as_raw()), Some(user.gid.as_raw())),
            None => Ok(()),
        }
    }

    /// Says what to do where the user cannot read an image.
    pub(crate) fn check_readable(&self, image: &File, name: &str) -> io::Result<()> {
        let Some(user) = &self.user else { return Ok(()) };
        let metadata = image.metadata()?;
        let may = match (metadata.uid(), metadata.gid()) {
            (uid, _) if uid == user.uid.as_raw() => 0o400,
            (_, gid) if gid == user.gid.as_raw() => 0o040,
            _ => 0o004,
        };
        if metadata.mode() & may != 0 {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "image {name} cannot be read by user {}, as which it is converted: chmod 0644 it",
            user.name
        )))
    }

    /// Makes a blank disk.
    pub(crate) async fn create(&self, format: DiskFormat, bytes: u64) -> Result<(), Failure> {
        let size = bytes.to_string();
        self.run(&["create", "-q", "-f", format.as_str(), DISK, &size], None)
            .await
    }

    /// Makes a disk that holds only what differs from a file behind it. That is not opened.
    pub(crate) async fn create_overlay(
        &self,
        behind: &Path,
        format: DiskFormat,
        bytes: u64,
    ) -> Result<(), Failure> {
        let (behind, size) = (utf8(behind)?, bytes.to_string());
        let words = [
            "create",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-b",
            behind,
            "-F",
            format.as_str(),
            DISK,
            &size,
        ];
        self.run(&words, None).await
    }

    /// Writes what is in a layer to the disk that is behind it; the layer stays as it is. What is behind the disk in turn is not
    /// opened: the disk and the layer have clusters of the same size, so that each that is written is written whole. Something
    /// must stand in its place, so that zeros are written and not left out; it is the layer once more, as bytes that nobody reads.
    pub(crate) async fn commit(
        &self,
        layer: &File,
        format: DiskFormat,
        overlay: bool,
    ) -> Result<(), Failure> {
        let mut disk = serde_json::json!({
            "driver": format.as_str(),
            "file": { "driver": "file", "filename": DISK },
        });
        if format == DiskFormat::Qcow2 {
            let bytes = serde_json::json!({ "driver": "file", "filename": IMAGE, "locking": "off" });
            let last = serde_json::json!({ "driver": "raw", "file": bytes, "read-only": true });
            disk["backing"] = if overlay { last } else { serde_json::Value::Null };
        }
        let layer_graph = serde_json::json!({
            "driver": "qcow2",
            "backing": disk,
            "file": { "driver": "file", "filename": IMAGE },
        });
        self.give(layer)
            .map_err(|error| Failure::Here(error.to_string()))?;
        self.run(
            &["commit", "-q", "-d", &format!("json:{layer_graph}")],
            Some(layer),
        )
        .await
    }

    /// Puts another file behind the disk, of which it must hold the same differences. Neither is opened.
    pub(crate) async fn rebase(&self, behind: &Path, format: DiskFormat) -> Result<(), Failure> {
        let words = [
            "rebase",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-b",
            utf8(behind)?,
            "-F",
            format.as_str(),
            DISK,
        ];
        self.run(&words, None).await
    }

    /// Copies an image that was judged.
    pub(crate) async fn convert(&self, image: &File, from: Format, to: DiskFormat) -> Result<(), Failure> {
        let source = serde_json::json!({
            "driver": from.as_str(),
            "backing": null,
            "file": { "driver": "file", "filename": IMAGE },
        });
        let source = format!("json:{source}");
        self.run(&["convert", "-q", "-O", to.as_str(), &source, DISK], Some(image))
            .await
    }

    /// Enlarges the disk.
    pub(crate) async fn resize(&self, format: DiskFormat, bytes: u64) -> Result<(), Failure> {
        let size = bytes.to_string();
        self.run(&["resize", "-q", "-f", format.as_str(), DISK, &size], None)
            .await
    }

    /// Enlarges a disk that has been a guest's. What is behind it is not opened.
    pub(crate) async fn grow(&self, format: DiskFormat, bytes: u64) -> Result<(), Failure> {
        let size = bytes.to_string();
        let disk = match format {
            DiskFormat::Raw => return self.resize(format, bytes).await,
            DiskFormat::Qcow2 => serde_json::json!({
                "driver": "qcow2",
                "backing": null,
                "file": { "driver": "file", "filename": DISK },
            }),
        };
        self.run(&["resize", "-q", &format!("json:{disk}"), &size], None)
            .await
    }

    async fn run(&self, words: &[&str], image: Option<&File>) -> Result<(), Failure> {
        let output = self.output("qemu-img", words, image).await?;
        if output.status.success() {
            return Ok(());
        }
        let complaint = String::from_utf8_lossy(&output.stderr);
        let what = words.first().copied().unwrap_or_default();
        let detail = format!("qemu-img {what}: {} ({})", complaint.trim(), output.status);
        // Killed by somebody, or for want of memory on the host, it may succeed the next time.
        let limit = output
            .status
            .signal()
            .is_some_and(|signal| signal != Signal::SIGKILL as i32);
        match limit || is_about_image(&complaint) {
            true => Err(Failure::Image(detail)),
            false => Err(Failure::Here(detail)),
        }
    }

    /// Runs a program as `qemu-img` is run.
    pub(crate) async fn output(
        &self,
        program: &str,
        words: &[&str],
        image: Option<&File>,
    ) -> Result<Output, Failure> {
        let after = self
            .deadline
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(1));
        let here = |error: io::Error| Failure::Here(format!("cannot run {program}: {error}"));
        let given = |file: &File| file.as_fd().try_clone_to_owned().map(Stdio::from).map_err(here);
        let mut command = self.confined(after);
        command
            .arg(program)
            .args(words)
            .stdin(image.map_or_else(|| Ok(Stdio::null()), given)?)
            .stdout(given(self.disk)?)
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(here)?;
        let complaint = child.stderr.take();
        let ended = async {
            let mut stderr = Vec::new();
            if let Some(complaint) = complaint {
                // Whoever says more is not listened to, and cannot go on saying it.
                complaint.take(MOST_COMPLAINT).read_to_end(&mut stderr).await?;
            }
            let (status, stdout) = (child.wait().await?, Vec::new());
            Ok(Output {
                status,
                stdout,
                stderr,
            })
        };
        match tokio::time::timeout(after, ended).await {
            Err(_) => Err(Failure::Late(after)),
            Ok(output) => output.map_err(here),
        }
    }

    /// The commands that take everything away; the program's name is still to follow.
    fn confined(&self, after: Duration) -> Command {
        let mut command = Command::new(if self.user.is_some() { "unshare" } else { "setpriv" });
        if self.user.is_some() {
            command.args(["--net", "--", "setpriv"]);
        }
        command.env_clear().args(["--no-new-privs", "--pdeathsig=KILL"]);
        if let Some(path) = std::env::var_os("PATH") {
            command.env("PATH", path);
        }
        if let Some(user) = &self.user {
            // With the user goes every capability. The bounding set stays: with no-new-privs nothing is gained from it, and
            // giving it up would ask one capability more of the agent.
            command
                .arg(format!("--reuid={}", user.uid))
                .arg(format!("--regid={}", user.gid))
                .args(["--clear-groups", "--inh-caps=-all", "--ambient-caps=-all"]);
        }
        command
            .args(["--", "prlimit", "--core=0"])
            .arg(format!("--as={ADDRESS_SPACE}"))
            // What computes for longer than it waits for disks is up to no good; a slow disk brings it to the deadline.
            .arg(format!("--cpu={}", after.as_secs() / 2 + 1))
            .arg(format!("--fsize={}", self.most_bytes))
            .arg(format!("--nofile={OPEN_FILES}"))
            .args([OsStr::new("--"), OsStr::new("nice")])
            .arg(format!("--adjustment={NICENESS}"))
            .arg("--");
        command
    }
}

fn utf8(path: &Path) -> Result<&str, Failure> {
    let here = || Failure::Here(format!("{}: not a path of UTF-8", path.display()));
    path.to_str().ok_or_else(here)
}

fn user() -> io::Result<Option<User>> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    for name in USERS {
        if let Some(user) = User::from_name(name)? {
            return Ok(Some(user));
        }
    }
    Err(io::Error::other(format!(
        "there is none of the users {USERS:?} to run qemu-img as"
    )))
}

/// Whether a complaint of `qemu-img` is about what it read, or says that it makes more of it than the disk may have.
fn is_about_image(complaint: &str) -> bool {
    let about = ["Could not open 'json:", "error while reading", "File too large"];
    about.iter().any(|words| complaint.contains(words)) && !complaint.contains("Permission denied")
}

#[cfg(test)]
mod tests;
