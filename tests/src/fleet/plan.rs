//! What a seed has in store besides the fates of single points: the clients' requests, and faults with a duration.
//!
//! A plan is a list in the order of time, made from the seed alone before the run, so that the minimiser can cut pieces
//! out of it.

use std::{fmt, time::Duration};

use fastrand::Rng;

use super::objects::Thing;

/// One of the programs, with what it runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Node {
    /// A controller.
    Controller(usize),
    /// A host with its agent and its hypervisor.
    Host(usize),
    /// Whoever calls the API.
    Client,
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Controller(0) => write!(f, "controller"),
            Self::Controller(number) => write!(f, "controller-{}", number + 1),
            Self::Host(number) => write!(f, "h{}", number + 1),
            Self::Client => write!(f, "client"),
        }
    }
}

/// A request of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "each is the API's method")]
pub enum Verb {
    Create,
    CreateStopped,
    Start,
    Stop,
    ForceStop,
    Reboot,
    Reset,
    Pause,
    Resume,
    Migrate,
    Relabel,
    Delete,
    ForceDelete,
    Cancel,
    Get,
    List,
    Cordon,
    Uncordon,
    RelabelHost,
    ForgetHost,
    /// Something about an object beside the VMs.
    Thing(Thing),
}

impl Verb {
    /// Whether it is about a host, and not about a VM.
    pub fn is_of_host(self) -> bool {
        matches!(
            self,
            Self::Cordon | Self::Uncordon | Self::RelabelHost | Self::ForgetHost
        )
    }
}

/// A request, and how it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What is asked for.
    pub verb: Verb,
    /// Which VM or host, by number.
    pub object: usize,
    /// Where to, for a migration that names its destination; what else an object's request is about.
    pub other: Option<usize>,
    /// How often it is tried again with the same request id when its outcome is not known.
    pub retries: u8,
    /// Once more with the same id although it succeeded.
    pub again: bool,
}

/// What happens at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A client asks for something.
    Request(Request),
    /// A host is emptied by hand: closed, every VM there moved away, opened again.
    Drain {
        /// Which.
        host: usize,
        /// How long it stays closed after that.
        time: Duration,
    },
    /// Nothing passes from one to the other, and where `both`, nothing back.
    Partition {
        /// Whose messages are lost.
        from: Node,
        /// To whom.
        to: Node,
        /// Both ways.
        both: bool,
        /// How long.
        time: Duration,
    },
    /// A program dies and is started again.
    Crash {
        /// Whose.
        node: Node,
        /// How long it is down.
        time: Duration,
    },
    /// A program stops moving, and goes on later as if nothing had been.
    Freeze {
        /// Whose.
        node: Node,
        /// How long.
        time: Duration,
    },
    /// The hypervisor's daemon restarts.
    Daemon {
        /// Of which host.
        host: usize,
        /// How long it is away.
        time: Duration,
    },
    /// The host loses power.
    PowerLoss {
        /// Which.
        host: usize,
        /// How long it is off.
        time: Duration,
    },
    /// The host is fenced: it loses power, and what it was told before counts no more.
    Fenced {
        /// Which.
        host: usize,
        /// How long it is off.
        time: Duration,
    },
    /// A guest powers itself off.
    GuestOff {
        /// Which VM, by number.
        vm: usize,
    },
    /// A guest's QEMU dies.
    GuestCrash {
        /// Which VM, by number.
        vm: usize,
    },
    /// Somebody sets a clock.
    ClockJump {
        /// Whose.
        node: Node,
        /// By how many seconds.
        seconds: i64,
    },
    /// A backup of the controller's store is taken.
    Backup,
    /// The controller is restored from the last backup.
    Restore {
        /// How long it is down.
        time: Duration,
        /// How long its operator waits for hosts that do not come.
        patience: Duration,
        /// The store that it had is lost.
        lost: bool,
    },
    /// A second controller is started on a copy of the store, as old as the last backup.
    Second {
        /// How long until somebody ends it.
        time: Duration,
    },
    /// A host's agent finds the other controller where it looked for the one.
    Turns {
        /// Which host's.
        host: usize,
    },
}

impl Event {
    /// Name of the fault in reports; `None` for what clients and operators do.
    pub fn class(&self) -> Option<&'static str> {
        Some(match self {
            // Restores and second controllers are counted where they happen.
            Self::Request(_)
            | Self::Drain { .. }
            | Self::Backup
            | Self::Restore { .. }
            | Self::Second { .. }
            | Self::Turns { .. } => {
                return None;
            }
            Self::Partition { both: true, .. } => "partition",
            Self::Partition { both: false, .. } => "partition, one way",
            Self::Crash {
                node: Node::Controller(_),
                ..
            } => "controller killed",
            Self::Crash { .. } => "agent killed",
            Self::Freeze {
                node: Node::Controller(_),
                ..
            } => "controller frozen",
            Self::Freeze { .. } => "host frozen",
            Self::Daemon { .. } => "hypervisor restarted",
            Self::PowerLoss { .. } => "host lost power",
            Self::Fenced { .. } => "host fenced",
            Self::GuestOff { .. } => "guest powered itself off",
            Self::GuestCrash { .. } => "guest crashed",
            Self::ClockJump { .. } => "clock jumped",
        })
    }
}

/// What happens, and when, in the order of time.
pub type Plan = Vec<(Duration, Event)>;

/// Size of a run. A run is made of parts of this size, as many as it takes to have the faults it should have.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Hosts.
    pub hosts: usize,
    /// Names of VMs that clients use.
    pub vms: usize,
    /// How long a part lasts.
    pub time: Duration,
    /// Requests of a part.
    pub requests: usize,
    /// Faults with a duration, of a part.
    pub faults: usize,
}

impl Default for Size {
    fn default() -> Self {
        Self {
            hosts: 3,
            vms: 6,
            time: Duration::from_secs(100),
            requests: 60,
            faults: 16,
        }
    }
}

/// Whether a seed's hosts have little room and are fenced now and then. Only some seeds, so that in the others placement
/// has a choice and hosts keep their sessions.
pub fn is_harsh(seed: u64) -> bool {
    Rng::with_seed(seed ^ 0x4a45).u8(..4) == 0
}

/// Whether everything that can fail at a point does so often: five of eight seeds. In the others operations come far before something
/// goes wrong, and some faults never come.
pub fn is_dense(seed: u64) -> bool {
    Rng::with_seed(seed ^ 0x4465).u8(..8) < 5
}

/// Puts into a part what only harsh seeds have.
pub fn add_harsh(plan: &mut Plan, rng: &mut Rng, size: Size, begin: Duration) {
    for _ in 0..2 {
        let time = begin + size.time.mul_f64(rng.f64());
        let host = rng.usize(..size.hosts);
        let off = Duration::from_secs_f64(rng.f64() * 12.0);
        plan.push((time, Event::Fenced { host, time: off }));
    }
    plan.sort_by_key(|(time, _)| *time);
}

/// The plan of a part of a run that begins at `begin`.
pub fn plan(rng: &mut Rng, size: Size, begin: Duration) -> Plan {
    let mut plan: Plan = Vec::with_capacity(size.requests + size.faults);
    let at = |rng: &mut Rng| begin + size.time.mul_f64(rng.f64());
    for _ in 0..size.requests {
        let time = at(rng);
        plan.push((time, Event::Request(request(rng, size))));
    }
    for _ in 0..size.faults {
        let time = at(rng);
        plan.push((time, fault(rng, size)));
    }
    if rng.bool() {
        let (time, host) = (at(rng), rng.usize(..size.hosts));
        let closed = Duration::from_secs_f64(rng.f64() * 30.0);
        plan.push((time, Event::Drain { host, time: closed }));
    }
    plan.sort_by_key(|(time, _)| *time);
    plan
}

/// A request, as likely as a site sees it.
pub fn request(rng: &mut Rng, size: Size) -> Request {
    const VERBS: &[(Verb, u32)] = &[
        (Verb::Create, 16),
        (Verb::CreateStopped, 3),
        (Verb::Start, 10),
        (Verb::Stop, 7),
        (Verb::ForceStop, 5),
        (Verb::Reboot, 3),
        (Verb::Reset, 3),
        (Verb::Pause, 4),
        (Verb::Resume, 5),
        (Verb::Migrate, 20),
        (Verb::Relabel, 4),
        (Verb::Delete, 4),
        (Verb::ForceDelete, 3),
        (Verb::Cancel, 5),
        (Verb::Get, 10),
        (Verb::List, 3),
        (Verb::Cordon, 1),
        (Verb::Uncordon, 2),
        (Verb::RelabelHost, 1),
        (Verb::ForgetHost, 1),
    ];
    let total: u32 = VERBS.iter().map(|(_, weight)| weight).sum();
    let mut drawn = rng.u32(..total);
    let mut verb = Verb::Get;
    for (candidate, weight) in VERBS {
        if drawn < *weight {
            verb = *candidate;
            break;
        }
        drawn -= weight;
    }
    let objects = if verb.is_of_host() { size.hosts } else { size.vms };
    Request {
        verb,
        object: rng.usize(..objects),
        other: (rng.u8(..3) == 0).then(|| rng.usize(..size.hosts)),
        retries: rng.u8(..4),
        again: rng.u8(..8) == 0,
    }
}

fn fault(rng: &mut Rng, size: Size) -> Event {
    let host = rng.usize(..size.hosts);
    let node = if rng.u8(..4) == 0 {
        Node::Controller(0)
    } else {
        Node::Host(host)
    };
    let vm = rng.usize(..size.vms);
    // Most pass quickly; some last longer than every deadline on the way.
    let most = if rng.u8(..5) == 0 { 90.0 } else { 12.0 };
    let time = Duration::from_secs_f64(rng.f64() * most);
    match rng.u8(..18) {
        0..=3 => {
            let other = match rng.usize(..=size.hosts) {
                0 => Node::Controller(0),
                number => Node::Host(number - 1),
            };
            let (from, to) = if other == Node::Host(host) {
                (Node::Controller(0), other)
            } else {
                (Node::Host(host), other)
            };
            let (from, to) = if rng.bool() { (from, to) } else { (to, from) };
            Event::Partition {
                from,
                to,
                both: rng.bool(),
                time,
            }
        }
        4..=8 => Event::Crash { node, time },
        9..=10 => Event::Freeze { node, time },
        11..=12 => Event::Daemon { host, time },
        13 => Event::PowerLoss { host, time },
        14 => Event::GuestOff { vm },
        15 => Event::GuestCrash { vm },
        _ => Event::ClockJump {
            node,
            seconds: rng.i64(-900..=900),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_has_one_plan() {
        let plan = |seed| plan(&mut Rng::with_seed(seed), Size::default(), Duration::ZERO);
        assert_eq!(plan(1), plan(1));
        assert_ne!(plan(1), plan(2));
        assert!(plan(3).windows(2).all(|pair| pair[0].0 <= pair[1].0));
    }
}
