//! Jobs that a libvirtd was killed in, cleared away before the next one comes up (`dalgu-agent clear-cut-jobs`, run by
//! systemd/libvirtd-dalgu.conf).
//!
//! libvirt 11.3 ends a start that was cut short itself in most cases, after having shown the domain for a moment as paused or even
//! running; in about one of ten it takes the start's job up again, which nobody ends, and then no call about that domain
//! gets its lock. Without the note of the start it comes up with the domain off, as the agent expects. It is the same with a domain that
//! is to arrive by a migration, when libvirtd was killed before its QEMU ran.
//!
//! A backup is noted step by step. With a note that one is under way, but not yet of what, libvirt waits for an end that QEMU will
//! never tell, and no other backup and no migration can begin. A note that names the disks, but not yet how far they are, it cannot
//! read back at all: it forgets that the domain runs, and its QEMU goes on unknown to it. Without the backup in the note
//! the domain comes up with no job. Only a domain with Dalgu's mark is touched, and its QEMU only while libvirt itself has
//! noted that its guest does not run yet.

use std::{
    ffi::OsStr,
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use dalgu_proto::ids::VmId;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Signal, pidfd_send_signal},
};

use super::{
    process::{PID_FILES, watch},
    read,
    tree::Element,
};

/// A killed QEMU is gone within this; if not, it hangs in the kernel, and its note stays.
const END_WAIT: Timespec = Timespec {
    tv_sec: 5,
    tv_nsec: 0,
};

/// Clears every job that was cut short. Only right while libvirtd does not run.
///
/// # Errors
/// If libvirt's notes cannot be listed. What goes wrong with one domain is logged, and its note stays.
pub fn clear() -> io::Result<()> {
    for note in notes(Path::new(PID_FILES))? {
        let Some(text) = fs::read_to_string(&note).ok() else {
            continue;
        };
        let Some(Cut { job, name, id }) = cut(&text) else {
            continue;
        };
        let cleared = match job {
            Job::Start => end(&note, id),
            Job::Arrival => match qemu(&note, id) {
                // Where it runs libvirt ends it, or goes on.
                Ok(Some(_)) => continue,
                Ok(None) => fs::remove_file(&note),
                Err(error) => Err(error),
            },
            Job::Backup => forget_backup(&note, &text),
        };
        match (cleared, job) {
            (Ok(()), Job::Start) => {
                tracing::warn!(%id, %name, "libvirtd was killed amid its start: it is off");
            }
            (Ok(()), Job::Arrival) => {
                tracing::warn!(%id, %name, "libvirtd was killed before it could arrive: it has not");
            }
            (Ok(()), Job::Backup) => {
                tracing::warn!(%id, %name, "libvirtd was killed as it began its backup: there is none");
            }
            (Err(error), _) => {
                tracing::error!(%id, %name, %error, ?job, "a job of it was cut short and cannot be cleared");
            }
        }
    }
    Ok(())
}

/// What was cut short.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Job {
    Start,
    Arrival,
    Backup,
}

/// A job that was cut short, and of which domain.
#[derive(PartialEq, Eq, Debug)]
struct Cut {
    job: Job,
    name: String,
    id: VmId,
}

/// libvirt's notes of the domains that are not off.
fn notes(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut notes = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension() == Some(OsStr::new("xml")) {
            notes.push(path);
        }
    }
    Ok(notes)
}

/// The job that libvirt would wait for in vain, if a note of a domain of Dalgu's has one.
fn cut(note: &str) -> Option<Cut> {
    let note = Element::parse(note).ok()?;
    let starting =
        note.attribute("state") == Some("paused") && note.attribute("reason") == Some("starting up");
    let asynchronous = note.each("job").find_map(|job| job.attribute("async"));
    let job = match asynchronous {
        Some("start") if starting => Job::Start,
        Some("migration in") => Job::Arrival,
        Some("backup") if !is_whole(&note) => Job::Backup,
        _ => return None,
    };
    let domain = note.at(&["domain"])?;
    read::mark_in(domain)?;
    let id = domain.at(&["uuid"])?.own_text().parse().ok()?;
    Some(Cut {
        job,
        name: domain.at(&["name"])?.own_text(),
        id: VmId::from_uuid(id),
    })
}

/// Whether a note tells of a backup all that libvirt needs to go on with it.
fn is_whole(note: &Element) -> bool {
    let disks = note.at(&["backups", "domainbackup", "disks"]);
    disks.is_some_and(|disks| {
        disks
            .each("disk")
            .all(|disk| disk.attribute("backup") == Some("no") || disk.attribute("state").is_some())
    })
}

/// Writes the note anew without its backup; the rest is as libvirt left it.
fn forget_backup(note: &Path, text: &str) -> io::Result<()> {
    const END: &str = "</backups>";
    let mut text = text.replacen(" async='backup'", " async='none'", 1);
    if let (Some(begin), Some(end)) = (text.find("<backups>"), text.find(END)) {
        text.replace_range(begin..end + END.len(), "");
    }
    let new = note.with_extension("xml.new");
    fs::write(&new, text)?;
    fs::set_permissions(&new, fs::metadata(note)?.permissions())?;
    fs::rename(&new, note)
}

/// Ends the domain's QEMU, if it came so far, and removes the note.
fn end(note: &Path, id: VmId) -> io::Result<()> {
    if let Some(process) = qemu(note, id)? {
        pidfd_send_signal(process.as_fd(), Signal::KILL)?;
        if poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&END_WAIT))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
    fs::remove_file(note)
}

/// The domain's QEMU, if it came so far.
fn qemu(note: &Path, id: VmId) -> io::Result<Option<OwnedFd>> {
    match watch(&note.with_extension("pid"), id) {
        Ok(process) => Ok(Some(process)),
        // No pid file, or it names another: libvirtd was killed before it let QEMU begin, which ended with it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "01a22116-c50c-769c-95ab-6c4937f22f9c";
    const MARK: &str = "<metadata><dalgu:vm xmlns:dalgu='urn:dalgu:domain:1' \
        cluster='85ea6896-b11a-450d-b75c-525401e7105e' epoch='1' generation='1' disks='root' nics=''/></metadata>";

    fn note(state: &str, job: &str, metadata: &str) -> String {
        format!(
            "<!-- libvirt's --><domstatus {state} pid='0'><qemuCaps/><job type='none' async='{job}' flags='0x0'/>\
             <domain type='qemu' id='3'><name>web</name><uuid>{ID}</uuid>{metadata}</domain></domstatus>"
        )
    }

    fn of_web(job: Job) -> Cut {
        Cut {
            job,
            name: "web".to_owned(),
            id: ID.parse().unwrap(),
        }
    }

    #[test]
    fn a_backup_is_cut_short_when_nothing_tells_what_is_backed_up() {
        let begun = note("state='running' reason='booted'", "backup", MARK);
        assert_eq!(cut(&begun), Some(of_web(Job::Backup)));
        assert_eq!(cut(&begun.replace(MARK, "")), None);
        let of = |disks: &str| {
            let told = format!(
                "<backups><domainbackup mode='push'><disks>{disks}</disks></domainbackup></backups><domain "
            );
            begun.replace("<domain ", &told)
        };
        let (runs, left_out) = (
            "<disk name='vda' backup='yes' state='running'/>",
            "<disk name='vdb' backup='no'/>",
        );
        assert_eq!(cut(&of(&[runs, left_out].concat())), None);
        let half = of(&[runs, "<disk name='vdb' backup='yes'/>"].concat());
        assert_eq!(cut(&half), Some(of_web(Job::Backup)));

        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("web.xml");
        for note in [&begun, &half] {
            fs::write(&file, note).unwrap();
            forget_backup(&file, note).unwrap();
            let after = fs::read_to_string(&file).unwrap();
            assert_eq!(after, begun.replace("async='backup'", "async='none'"));
            assert_eq!(cut(&after), None);
        }
        assert_eq!(notes(dir.path()).unwrap(), [file]);
    }

    #[test]
    fn only_a_start_or_an_arrival_of_dalgus_own_whose_guest_does_not_run_yet_is_cut_short() {
        let starting = "state='paused' reason='starting up'";
        assert_eq!(cut(&note(starting, "start", MARK)), Some(of_web(Job::Start)));
        let arriving = note("state='paused' reason='migration'", "migration in", MARK);
        assert_eq!(cut(&arriving), Some(of_web(Job::Arrival)));
        for other in [
            note("state='running' reason='booted'", "start", MARK),
            note("state='paused' reason='user'", "start", MARK),
            note(starting, "none", MARK),
            note(starting, "migration out", MARK),
            note(starting, "start", ""),
            note(
                starting,
                "start",
                "<metadata><nova:instance xmlns:nova='urn:x'/></metadata>",
            ),
            "<domstatus".to_owned(),
        ] {
            assert_eq!(cut(&other), None, "{other}");
        }
    }

    #[test]
    fn its_process_is_killed_and_its_note_goes_and_a_stranger_with_its_number_lives() {
        let dir = tempfile::tempdir().unwrap();
        let id: VmId = ID.parse().unwrap();
        let stand_in = |word: &str| {
            let mut command = std::process::Command::new("sh");
            command
                .args(["-c", "echo; read line", word])
                .stdin(std::process::Stdio::piped())
                .stdout(std::process::Stdio::piped());
            let mut child = command.spawn().unwrap();
            // It has said something: its command line can be read.
            let mut said = [0];
            io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut said).unwrap();
            child
        };
        let write = |name: &str, pid: Option<u32>| {
            let file = dir.path().join(name).with_extension("xml");
            fs::write(&file, "").unwrap();
            if let Some(pid) = pid {
                fs::write(file.with_extension("pid"), format!("{pid}\n")).unwrap();
            }
            file
        };
        let mut guest = stand_in(ID);
        let mut stranger = stand_in("stranger");
        let mine = write("mine", Some(guest.id()));
        let other = write("other", Some(stranger.id()));
        let none = write("none", None);
        assert_eq!(notes(dir.path()).unwrap().len(), 3);
        for note in [&mine, &other, &none] {
            end(note, id).unwrap();
        }
        assert!(!guest.wait().unwrap().success());
        assert!(stranger.try_wait().unwrap().is_none(), "it lives");
        drop(stranger.stdin.take());
        stranger.wait().unwrap();
        assert_eq!(notes(dir.path()).unwrap(), Vec::<PathBuf>::new());
        assert_eq!(notes(&dir.path().join("missing")).unwrap(), Vec::<PathBuf>::new());
    }
}
