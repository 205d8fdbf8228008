//! The QEMU process of a domain, watched from outside: whether it has ended, at the moment it does. Called by
//! [`super::Libvirt`] during a migration; libvirt itself tells it only after a wait of its own.

use std::{fs, io, os::fd::OwnedFd, path::Path, thread};

use dalgu_proto::ids::VmId;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};
use tokio::sync::oneshot;

/// Where libvirt's system daemon notes the process of each domain, and what it is about to do with it.
pub(super) const PID_FILES: &str = "/run/libvirt/qemu";

/// The thread that waits looks so often whether anybody still wants to know.
const LOOK: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// Returns when the domain's QEMU has ended; never when it cannot be watched.
pub(super) async fn ended(name: &str, id: VmId) {
    let waited = match watch(&Path::new(PID_FILES).join(format!("{name}.pid")), id) {
        Ok(process) => wait(process).await,
        Err(error) => Err(error),
    };
    if let Err(error) = waited {
        tracing::debug!(%id, %error, "the domain's process cannot be watched");
        std::future::pending::<()>().await;
    }
}

/// Waits on a thread of its own, which ends soon after nobody waits any more.
async fn wait(process: OwnedFd) -> io::Result<()> {
    let (tell, told) = oneshot::channel();
    thread::Builder::new()
        .name("qemu-end".to_owned())
        .spawn(move || {
            let mut tell = Some(tell);
            while tell.as_ref().is_some_and(|tell| !tell.is_closed()) {
                // A process descriptor becomes readable when its process ends.
                let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&LOOK));
                if !matches!(ended, Ok(0) | Err(Errno::INTR))
                    && let Some(tell) = tell.take()
                {
                    // Whoever asked may have gone.
                    let _ = tell.send(ended.map(drop));
                }
            }
        })?;
    match told.await {
        Ok(ended) => Ok(ended?),
        Err(_) => Err(io::ErrorKind::BrokenPipe.into()),
    }
}

/// Opens the process that a pid file names, if it is the QEMU of this domain.
pub(super) fn watch(pid_file: &Path, id: VmId) -> io::Result<OwnedFd> {
    let number: i32 = fs::read_to_string(pid_file)?
        .trim()
        .parse()
        .map_err(|_| io::ErrorKind::InvalidData)?;
    let pid = Pid::from_raw(number).ok_or(io::ErrorKind::InvalidData)?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    // Read after it was opened: had the number been given to another process before, this tells.
    let command = fs::read(format!("/proc/{number}/cmdline"))?;
    let id = id.to_string();
    let ours = command
        .split(|byte| *byte == 0)
        .any(|argument| argument == id.as_bytes());
    if ours {
        Ok(process)
    } else {
        Err(io::ErrorKind::NotFound.into())
    }
}

/// A QEMU of this domain, by its command line: libvirt may know of none where one runs.
pub(super) fn running(id: VmId) -> io::Result<Option<u32>> {
    let id = id.to_string();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // It may have ended meanwhile.
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let arguments: Vec<_> = command.split(|byte| *byte == 0).collect();
        if arguments.windows(2).any(|pair| pair == [b"-uuid", id.as_bytes()]) {
            return Ok(Some(number));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_of_the_right_process_is_seen_and_another_is_not_taken_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("web.pid");
        let id = VmId::from_uuid(uuid::Uuid::from_u128(7));
        let mut stand_in = tokio::process::Command::new("sh");
        stand_in.args(["-c", "read line", &id.to_string()]);
        let mut stand_in = stand_in.stdin(std::process::Stdio::piped()).spawn().unwrap();
        fs::write(&file, format!("{}\n", stand_in.id().unwrap())).unwrap();
        assert!(watch(&file, VmId::from_uuid(uuid::Uuid::from_u128(8))).is_err());
        // Its command line can be read a moment after it has begun.
        let find = async {
            loop {
                match watch(&file, id) {
                    Ok(process) => break process,
                    Err(_) => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
                }
            }
        };
        let process = tokio::time::timeout(std::time::Duration::from_secs(10), find)
            .await
            .expect("it is found");
        let mut ended = Box::pin(wait(process));
        let early = tokio::time::timeout(std::time::Duration::from_millis(50), &mut ended).await;
        assert!(early.is_err(), "it has not ended yet");
        drop(stand_in.stdin.take());
        ended.await.unwrap();
        assert!(watch(&dir.path().join("none.pid"), id).is_err());
    }

    #[test]
    fn a_process_of_the_domain_is_found_by_its_command_line() {
        let id = VmId::from_uuid(uuid::Uuid::from_u128(9));
        assert_eq!(running(id).unwrap(), None);
        let mut stand_in = std::process::Command::new("sh");
        stand_in.args(["-c", "echo; read line", "-uuid", &id.to_string()]);
        stand_in
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped());
        let mut stand_in = stand_in.spawn().unwrap();
        // It has said something: its command line can be read.
        io::Read::read_exact(stand_in.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        assert_eq!(running(id).unwrap(), Some(stand_in.id()));
        drop(stand_in.stdin.take());
        stand_in.wait().unwrap();
        assert_eq!(running(id).unwrap(), None);
    }
}
