//! How each fault is made and healed. Called by the breaker.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::Write as _;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::{Instant, sleep};

use super::super::books::Books;
use super::super::cable::{self, Way};
use super::super::eye::processes::{Process, read_command_line};
use super::super::ground::Disk;
use super::{Fault, start};
use crate::lab::{Daemon, Lab};

/// Breaks, waits, heals.
///
/// # Errors
/// If that is not possible.
pub async fn carry_out(
    lab: &Lab,
    books: &Rc<RefCell<Books>>,
    fault: &Fault,
    lasts: Duration,
) -> anyhow::Result<()> {
    match fault {
        Fault::Kill(daemon) => {
            match daemon {
                Daemon::Libvirtd(host) => half_started(books, *host),
                Daemon::Agent(host) => carrier_killed(books, *host),
                Daemon::Controller => {}
            }
            kill_and_start(lab, &[*daemon], lasts).await
        }
        Fault::KillHostDaemons(host) => {
            half_started(books, *host);
            kill_and_start(lab, &[Daemon::Agent(*host), Daemon::Libvirtd(*host)], lasts).await
        }
        Fault::Freeze(daemon) => {
            // It may have ended by itself a moment ago; then that is noted, and there is nothing to freeze.
            if lab.signal(*daemon, Signal::SIGSTOP).await.is_ok() {
                sleep(lasts).await;
                lab.signal(*daemon, Signal::SIGCONT).await?;
            }
            Ok(())
        }
        Fault::KillGuest(guest) => {
            books.borrow_mut().killed(&guest.uid);
            signal_guest(guest, Signal::SIGKILL);
            Ok(())
        }
        Fault::FreezeGuest(guest) => {
            signal_guest(guest, Signal::SIGSTOP);
            sleep(lasts).await;
            signal_guest(guest, Signal::SIGCONT);
            Ok(())
        }
        Fault::PowerCut(host) => power_cut(lab, books, *host, lasts).await,
        Fault::Cut(host, peer, way) => cut(lab, *host, *peer, *way, lasts).await,
        Fault::Full(host, disk) => full(lab, books, *host, *disk, lasts).await,
    }
}

async fn kill_and_start(lab: &Lab, daemons: &[Daemon], lasts: Duration) -> anyhow::Result<()> {
    for daemon in daemons {
        // As above: it may be gone already.
        let _ = lab.signal(*daemon, Signal::SIGKILL).await;
    }
    sleep(lasts).await;
    for daemon in daemons.iter().rev() {
        start(lab, *daemon).await?;
    }
    Ok(())
}

/// A migration may be torn.
fn carrier_killed(books: &Rc<RefCell<Books>>, host: u8) {
    books.borrow_mut().carriers_killed.insert(host, Instant::now());
}

/// A libvirtd that dies while it starts a guest ends that guest when it comes back: it will boot once more.
fn half_started(books: &Rc<RefCell<Books>>, host: u8) {
    carrier_killed(books, host);
    let mut books = books.borrow_mut();
    for subject in books
        .subjects
        .values_mut()
        .filter(|subject| subject.settled.is_none())
    {
        subject.boots_due += 1;
    }
}

/// Signals a QEMU if it still is the one that was meant.
fn signal_guest(guest: &Process, signal: Signal) {
    let line = fs::read(format!("/proc/{}/cmdline", guest.pid)).unwrap_or_default();
    if read_command_line(&line).is_some_and(|(uid, _)| uid == guest.uid) {
        // It may end between the look and the signal.
        let _ = kill(Pid::from_raw(guest.pid), signal);
    }
}

async fn power_cut(lab: &Lab, books: &Rc<RefCell<Books>>, host: u8, lasts: Duration) -> anyhow::Result<()> {
    books.borrow_mut().dark.insert(host, Instant::now());
    lab.power_off(host).await?;
    sleep(lasts).await;
    let booted = lab.power_on(host).await;
    books.borrow_mut().dark.remove(&host);
    booted
}

async fn cut(lab: &Lab, host: u8, peer: Option<u8>, way: Way, lasts: Duration) -> anyhow::Result<()> {
    cable::cut(lab, host, peer, way).await?;
    sleep(lasts).await;
    cable::mend(lab, host, peer).await
}

async fn full(
    lab: &Lab,
    books: &Rc<RefCell<Books>>,
    host: u8,
    disk: Disk,
    lasts: Duration,
) -> anyhow::Result<()> {
    let path = disk.filler(lab, host);
    books.borrow_mut().full = Some(Instant::now());
    let mut file = File::create(&path).with_context(|| format!("fill with {}", path.display()))?;
    // Down to the last page.
    for size in [64 << 10, 4 << 10] {
        let zeros = vec![0; size];
        while file.write_all(&zeros).is_ok() {}
    }
    drop(file);
    sleep(lasts).await;
    fs::remove_file(&path).context("make room again")?;
    books.borrow_mut().full = Some(Instant::now());
    Ok(())
}
