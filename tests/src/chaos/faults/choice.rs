//! Which fault comes next, what it hits, and for how long. Called by the breaker; changes nothing.

use super::super::books::Books;
use super::super::cable::Way;
use super::super::eye::processes::{Process, scan};
use super::super::ground::Disk;
use super::super::random::Random;
use crate::lab::{Daemon, Lab};

/// A guest's QEMU.
pub type Guest = Process;

/// One fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL of a daemon; started again.
    Kill(Daemon),
    /// SIGSTOP of a daemon; SIGCONT.
    Freeze(Daemon),
    /// SIGKILL of agent and libvirtd of a host at once; guests run on.
    KillHostDaemons(u8),
    /// SIGKILL of a QEMU.
    KillGuest(Guest),
    /// SIGSTOP of a QEMU; SIGCONT.
    FreezeGuest(Guest),
    /// A host loses power, with all that runs there, and boots again.
    PowerCut(u8),
    /// A host's packets from and to the controller, or (by its number) another host, are dropped.
    Cut(u8, Option<u8>, Way),
    /// A file system of a host is full.
    Full(u8, Disk),
}

#[derive(Clone, Copy)]
enum Kind {
    KillController,
    KillAgent,
    KillLibvirtd,
    KillHostDaemons,
    FreezeController,
    FreezeAgent,
    FreezeLibvirtd,
    KillGuest,
    FreezeGuest,
    PowerCut,
    CutController,
    CutHost,
    FullLedger,
    FullPool,
}

/// How often each kind comes, of about a hundred.
const WEIGHTS: [(u64, Kind); 14] = [
    (9, Kind::KillController),
    (14, Kind::KillAgent),
    (9, Kind::KillLibvirtd),
    (4, Kind::KillHostDaemons),
    (5, Kind::FreezeController),
    (7, Kind::FreezeAgent),
    (7, Kind::FreezeLibvirtd),
    (10, Kind::KillGuest),
    (8, Kind::FreezeGuest),
    (3, Kind::PowerCut),
    (9, Kind::CutController),
    (9, Kind::CutHost),
    (4, Kind::FullLedger),
    (3, Kind::FullPool),
];

/// The next fault; `None` where what was drawn cannot be done at the moment.
pub fn choose(lab: &Lab, books: &Books, random: &mut Random) -> Option<Fault> {
    let hosts = lab.hosts();
    let host = random.pick(&hosts)?.number;
    let kind = random.weighed(&WEIGHTS)?;
    let way = random.weighed(&[(1, Way::Both), (1, Way::In), (1, Way::Out)])?;
    let chance = random.between(0, u64::MAX - 1);
    let guests = || {
        scan(&hosts)
            .into_iter()
            .filter(|guest| books.subjects.contains_key(&guest.uid))
    };
    let mortal = || {
        guests()
            .filter(|guest| books.may_die(&guest.uid))
            .collect::<Vec<_>>()
    };
    let mut chosen = Random::new(chance, 0);
    Some(match kind {
        Kind::KillController => Fault::Kill(Daemon::Controller),
        Kind::KillAgent => Fault::Kill(Daemon::Agent(host)),
        Kind::KillLibvirtd => Fault::Kill(Daemon::Libvirtd(host)),
        Kind::KillHostDaemons => Fault::KillHostDaemons(host),
        Kind::FreezeController => Fault::Freeze(Daemon::Controller),
        Kind::FreezeAgent => Fault::Freeze(Daemon::Agent(host)),
        Kind::FreezeLibvirtd => Fault::Freeze(Daemon::Libvirtd(host)),
        Kind::KillGuest => Fault::KillGuest(chosen.pick(&mortal())?.clone()),
        Kind::FreezeGuest => Fault::FreezeGuest(chosen.pick(&guests().collect::<Vec<_>>())?.clone()),
        Kind::PowerCut => {
            let mut here = guests().filter(|guest| guest.host == host);
            here.all(|guest| books.may_die(&guest.uid))
                .then_some(Fault::PowerCut(host))?
        }
        Kind::CutController => Fault::Cut(host, None, way),
        Kind::CutHost => {
            let others: Vec<_> = hosts
                .iter()
                .map(|host| host.number)
                .filter(|other| *other != host)
                .collect();
            Fault::Cut(host, Some(*chosen.pick(&others)?), way)
        }
        Kind::FullLedger => Fault::Full(host, Disk::Ledger),
        Kind::FullPool => Fault::Full(host, Disk::Pool),
    })
}

impl Fault {
    /// What is being broken, so that no two faults break the same.
    pub fn keys(&self) -> Vec<String> {
        let daemon = |daemon: &Daemon| match daemon {
            Daemon::Controller => "controller".to_owned(),
            Daemon::Agent(host) => format!("h{host}/agent"),
            Daemon::Libvirtd(host) => format!("h{host}/libvirtd"),
        };
        match self {
            Self::Kill(victim) | Self::Freeze(victim) => vec![daemon(victim)],
            Self::KillHostDaemons(host) => vec![format!("h{host}/agent"), format!("h{host}/libvirtd")],
            Self::PowerCut(host) => ["agent", "libvirtd", "disk"]
                .map(|part| format!("h{host}/{part}"))
                .to_vec(),
            Self::KillGuest(guest) | Self::FreezeGuest(guest) => vec![guest.uid.clone()],
            Self::Cut(host, peer, _) => vec![format!("h{host} to {peer:?}")],
            // A daemon that cannot write may end and be started again by another fault; it should have its disk then.
            Self::Full(host, _) => vec![format!("h{host}/agent"), format!("h{host}/disk")],
        }
    }

    /// The name under which it is counted.
    pub fn class(&self) -> &'static str {
        match self {
            Self::Kill(Daemon::Controller) => "controller killed",
            Self::Kill(Daemon::Agent(_)) => "agent killed",
            Self::Kill(Daemon::Libvirtd(_)) => "libvirtd killed",
            Self::Freeze(Daemon::Controller) => "controller frozen",
            Self::Freeze(Daemon::Agent(_)) => "agent frozen",
            Self::Freeze(Daemon::Libvirtd(_)) => "libvirtd frozen",
            Self::KillHostDaemons(_) => "agent and libvirtd killed",
            Self::KillGuest(_) => "QEMU killed",
            Self::FreezeGuest(_) => "QEMU frozen",
            Self::PowerCut(_) => "host without power",
            Self::Cut(_, None, Way::Both) => "controller cut off",
            Self::Cut(_, None, _) => "controller cut off, one way",
            Self::Cut(_, Some(_), Way::Both) => "hosts cut off",
            Self::Cut(_, Some(_), _) => "hosts cut off, one way",
            Self::Full(_, Disk::Ledger) => "ledger's disk full",
            Self::Full(_, Disk::Pool) => "pool's disk full",
        }
    }

    /// Shortest and longest, in ms.
    pub fn lasts(&self) -> (u64, u64) {
        match self {
            Self::Kill(_) | Self::KillHostDaemons(_) => (200, 4000),
            Self::KillGuest(_) => (100, 200),
            Self::Freeze(_) => (500, 12_000),
            Self::FreezeGuest(_) => (500, 7000),
            Self::PowerCut(_) => (2500, 6000),
            Self::Cut(..) => (1000, 15_000),
            Self::Full(..) => (2000, 10_000),
        }
    }
}
