//! What a seed has in store at this level: requests as the core fleet's clients make them, and faults of the network, of
//! the programs, of the store, of the hypervisors and their guests. Made from the seed alone before the run.

use std::time::Duration;

use dalgu_agent::hypervisor::sim::Call;
use fastrand::Rng;

use crate::fleet::plan::{self as fleet, Node, Request, Size, Verb};

/// How much there is of everything.
pub const SIZE: Size = Size {
    hosts: 3,
    vms: 5,
    time: Duration::from_secs(60),
    requests: 40,
    faults: 20,
};

/// Every host has registered by then.
const BEGIN: Duration = Duration::from_secs(3);
/// Nothing is asked for and nothing goes wrong any more.
pub const END: Duration = Duration::from_secs(63);

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing passes from one to the other, and where `both`, nothing back; connections of that time are broken.
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
    /// What is sent between two programs arrives when this is over, as TCP sends again what was lost.
    Held {
        /// One.
        a: Node,
        /// The other.
        b: Node,
        /// How long.
        time: Duration,
    },
    /// One message in twenty is lost between two programs, with what is under way.
    Lossy {
        /// One.
        a: Node,
        /// The other.
        b: Node,
        /// How long.
        time: Duration,
    },
    /// Messages between two programs take up to seconds.
    Slow {
        /// One.
        a: Node,
        /// The other.
        b: Node,
        /// How long.
        time: Duration,
    },
    /// What is open between two programs is reset.
    Cut {
        /// One.
        a: Node,
        /// The other.
        b: Node,
    },
    /// What is open between the two hosts of the next migration is reset, so long after it was opened.
    CutMigration {
        /// How long.
        after: Duration,
    },
    /// A program dies and is started again.
    Crash {
        /// Whose.
        node: Node,
        /// How long it is down.
        time: Duration,
    },
    /// The controller dies at its next commit, before it or after it.
    CrashAtCommit {
        /// After it.
        after: bool,
    },
    /// A guest ends by itself.
    Guest {
        /// Which VM, by number.
        vm: usize,
        /// It crashes; else it powers itself off.
        crash: bool,
    },
    /// The hypervisor's daemon restarts.
    Daemon {
        /// Of which host.
        host: usize,
        /// How long it is away.
        time: Duration,
    },
    /// The next call of this kind to a hypervisor does not do what it should.
    Call {
        /// Of which host.
        host: usize,
        /// Which.
        call: Call,
        /// What it does instead.
        fault: CallFault,
    },
}

/// What a call to a hypervisor does instead of what it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallFault {
    /// It fails and has no effect.
    Fails,
    /// It has its effect and fails all the same.
    Lies,
    /// It never answers.
    Hangs,
    /// It has its effect so long after its caller has given up.
    Late(Duration),
}

/// Calls that something is done with, and how many of the four faults they can have, in their order. A migration has no deadline:
/// one that hung would do so until it is cancelled. Only what changes one domain has a late effect. A hung one is given up before
/// the run must be at rest.
const CALLS: [(Call, u8); 11] = [
    (Call::Receive, 1),
    (Call::Migrate, 2),
    (Call::Get, 3),
    (Call::DeleteVolumes, 3),
    (Call::Progress, 3),
    (Call::AbortMigration, 3),
    (Call::Define, 4),
    (Call::Start, 4),
    (Call::Shutdown, 4),
    (Call::Destroy, 4),
    (Call::Undefine, 4),
];

impl Fault {
    /// Name in reports.
    pub fn class(&self) -> &'static str {
        match self {
            Self::Partition { both: true, .. } => "partition",
            Self::Partition { both: false, .. } => "partition, one way",
            Self::Held { .. } => "traffic held up",
            Self::Lossy { .. } => "messages lost",
            Self::Slow { .. } => "slow link",
            Self::Cut { .. } => "connections reset",
            Self::CutMigration { .. } => "connections of a migration reset",
            Self::Crash {
                node: Node::Controller(_),
                ..
            } => "controller killed",
            Self::Crash { .. } => "agent killed",
            Self::CrashAtCommit { after: false } => "controller crashed before a commit",
            Self::CrashAtCommit { after: true } => "controller crashed after a commit",
            Self::Guest { crash: false, .. } => "guest powered itself off",
            Self::Guest { crash: true, .. } => "guest crashed",
            Self::Daemon { .. } => "hypervisor restarted",
            Self::Call { fault, .. } => fault.class(),
        }
    }
}

impl CallFault {
    /// Name in reports.
    pub fn class(self) -> &'static str {
        match self {
            Self::Fails => "hypervisor call failed",
            Self::Lies => "hypervisor call took effect and failed",
            Self::Hangs => "hypervisor call hung",
            Self::Late(_) => "hypervisor call took effect too late",
        }
    }
}

/// What happens, each in the order of time.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// What the operator asks for.
    pub requests: Vec<(Duration, Request)>,
    /// What goes wrong.
    pub faults: Vec<(Duration, Fault)>,
}

/// The plan of a seed.
pub fn plan(seed: u64) -> Plan {
    let mut rng = Rng::with_seed(seed ^ 0x57ac);
    let mut plan = Plan::default();
    let at = |rng: &mut Rng| BEGIN + SIZE.time.mul_f64(rng.f64());
    // A site without VMs has little that could go wrong.
    for object in 0..SIZE.vms {
        let time = BEGIN + Duration::from_secs(2).mul_f64(rng.f64());
        let create = Request {
            verb: Verb::Create,
            object,
            other: None,
            retries: 3,
            again: rng.u8(..4) == 0,
        };
        plan.requests.push((time, create));
    }
    for _ in SIZE.vms..SIZE.requests {
        let time = at(&mut rng);
        plan.requests.push((time, fleet::request(&mut rng, SIZE)));
    }
    for _ in 0..SIZE.faults {
        let time = at(&mut rng);
        plan.faults.push((time, fault(&mut rng)));
    }
    plan.requests.sort_by_key(|(time, _)| *time);
    plan.faults.sort_by_key(|(time, _)| *time);
    plan
}

/// Two programs that speak to each other.
fn pair(rng: &mut Rng) -> (Node, Node) {
    let host = rng.usize(..SIZE.hosts);
    let other = match rng.u8(..8) {
        0..=3 => Node::Controller(0),
        4 => return (Node::Client, Node::Controller(0)),
        _ => Node::Host((host + 1 + rng.usize(..SIZE.hosts - 1)) % SIZE.hosts),
    };
    if rng.bool() {
        (Node::Host(host), other)
    } else {
        (other, Node::Host(host))
    }
}

fn fault(rng: &mut Rng) -> Fault {
    let (a, b) = pair(rng);
    // Most pass quickly; some last longer than the deadline of every call and the probes of every connection.
    let most = if rng.u8(..5) == 0 { 60.0 } else { 8.0 };
    let time = Duration::from_secs_f64(rng.f64() * most);
    // A site without its controller has little that could go wrong.
    let down = Duration::from_secs_f64(rng.f64() * 6.0);
    let host = rng.usize(..SIZE.hosts);
    match rng.u8(..28) {
        0..=2 => Fault::Partition {
            from: a,
            to: b,
            both: true,
            time,
        },
        3..=5 => Fault::Partition {
            from: a,
            to: b,
            both: false,
            time,
        },
        6..=7 => Fault::Held { a, b, time },
        8 => Fault::Lossy { a, b, time },
        9 => Fault::Slow { a, b, time },
        10..=11 => Fault::Cut { a, b },
        12..=13 => Fault::CutMigration {
            after: Duration::from_secs_f64(rng.f64()),
        },
        14..=16 => Fault::Crash {
            node: Node::Host(host),
            time: down,
        },
        17 => Fault::Crash {
            node: Node::Controller(0),
            time: down,
        },
        18..=19 => Fault::CrashAtCommit { after: rng.bool() },
        20..=21 => Fault::Guest {
            vm: rng.usize(..SIZE.vms),
            crash: rng.bool(),
        },
        22..=23 => Fault::Daemon { host, time: down },
        _ => {
            let (call, kinds) = CALLS[rng.usize(..CALLS.len())];
            let fault = match rng.u8(..kinds) {
                0 => CallFault::Fails,
                1 => CallFault::Lies,
                2 => CallFault::Hangs,
                _ => CallFault::Late(down),
            };
            Fault::Call { host, call, fault }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_has_one_plan() {
        assert_eq!(plan(1), plan(1));
        assert_ne!(plan(1), plan(2));
        assert!(plan(3).faults.windows(2).all(|pair| pair[0].0 <= pair[1].0));
    }
}
