//! What goes wrong, and when: at every point where a program touches the world, [`Fates`] says what happens there.
//!
//! Points are numbered in the order in which they come, so that a seed can be replayed with some of its faults left
//! out (the minimiser) or with exactly one (the step matrix). Pure: a seed and the points decide everything.

use std::{collections::BTreeMap, ops::Range, time::Duration};

use fastrand::Rng;

use super::plan::Node;

/// What kind of thing a point is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A message between programs.
    Message,
    /// A transaction of the controller's store.
    Commit,
    /// An entry of an agent's ledger is written or removed.
    Ledger,
    /// A call that changes something in a hypervisor.
    Change,
    /// A call that only looks.
    Look,
    /// A transfer between hypervisors.
    Transfer,
}

/// A place in a run where something can go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Point {
    /// What it is.
    pub kind: Kind,
    /// The call's name.
    pub name: &'static str,
    /// Who does it.
    pub by: Node,
    /// For a message: to whom.
    pub to: Node,
}

/// What happens at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// What should.
    Pass,
    /// The message is lost.
    Lose,
    /// The answer is lost.
    LoseReply,
    /// It takes longer.
    Delay(Duration),
    /// It comes once more after this time.
    Repeat(Duration),
    /// It fails and has no effect.
    Fail,
    /// It has its effect and fails all the same.
    Lie,
    /// Whoever does it dies just before.
    CrashBefore,
    /// Whoever does it dies just after. For a message: who received it, having carried it out.
    CrashAfter,
    /// A transfer breaks in its phase of this number.
    Break(u8),
    /// The host loses power after so many of the calls that make up a write, and what was not synced is lost.
    PowerCut(u8),
}

impl Fate {
    /// Name of the fault in reports; `None` for [`Fate::Pass`].
    pub fn class(self, kind: Kind) -> Option<&'static str> {
        Some(match (kind, self) {
            (_, Self::Pass) => return None,
            (Kind::Message, Self::Lose) => "message lost",
            (Kind::Message, Self::LoseReply) => "reply lost",
            (Kind::Message, Self::Delay(time)) if time > Duration::from_secs(10) => "message late (to 95 s)",
            (Kind::Message, Self::Delay(_)) => "message delayed and reordered",
            (Kind::Message, Self::Repeat(_)) => "message doubled",
            (Kind::Message, Self::Fail) => "connection refused",
            (Kind::Message, Self::CrashBefore) => "receiver crashed before the message",
            (Kind::Message, Self::CrashAfter) => "receiver crashed after the message",
            (Kind::Commit, Self::Delay(_)) => "store slow",
            (Kind::Commit, Self::Fail) => "store failed",
            (Kind::Commit, Self::Lie) => "store written, sync failed",
            (Kind::Commit, Self::CrashBefore) => "controller crashed before a commit",
            (Kind::Commit, Self::CrashAfter) => "controller crashed after a commit",
            (Kind::Ledger, Self::Delay(_)) => "ledger slow",
            (Kind::Ledger, Self::Fail) => "ledger disk full",
            (Kind::Ledger, Self::Lie) => "ledger written, sync failed",
            (Kind::Ledger, Self::CrashBefore) => "agent crashed before a ledger write",
            (Kind::Ledger, Self::CrashAfter) => "agent crashed after a ledger write",
            (Kind::Ledger, Self::PowerCut(_)) => "power cut amid a ledger write",
            (Kind::Change | Kind::Look, Self::Delay(_)) => "hypervisor call slow",
            (Kind::Change | Kind::Look, Self::Fail) => "hypervisor call failed",
            (Kind::Change | Kind::Look, Self::Lie) => "hypervisor call took effect and failed",
            (Kind::Change | Kind::Look, Self::CrashBefore) => "agent crashed before a hypervisor call",
            (Kind::Change | Kind::Look, Self::CrashAfter) => "agent crashed after a hypervisor call",
            (Kind::Transfer, Self::Break(_)) => "migration broken in a phase",
            (Kind::Transfer, _) => "migration's call lied",
            _ => "other",
        })
    }
}

/// How often each fault comes, in thousandths of the points of its kind. Drawn anew for each seed: a fault that is
/// never there in one run and frequent in the next finds more than one that is always rare.
#[derive(Debug, Clone)]
pub struct Rates(BTreeMap<(Kind, usize), u32>);

/// Faults that each kind of point can suffer, with the highest rate of each.
const MENU: &[(Kind, &[(Fate, u32)])] = &[
    (
        Kind::Message,
        &[
            (Fate::Lose, 120),
            (Fate::LoseReply, 120),
            (Fate::Delay(Duration::from_millis(1_500)), 250),
            (Fate::Delay(Duration::from_secs(95)), 25),
            (Fate::Repeat(Duration::from_secs(20)), 150),
            (Fate::Fail, 60),
            (Fate::CrashBefore, 4),
            (Fate::CrashAfter, 4),
        ],
    ),
    (
        Kind::Commit,
        &[
            (Fate::Delay(Duration::from_millis(800)), 300),
            (Fate::Fail, 3),
            (Fate::Lie, 3),
            (Fate::CrashBefore, 3),
            (Fate::CrashAfter, 3),
        ],
    ),
    (
        Kind::Ledger,
        &[
            (Fate::Delay(Duration::from_millis(800)), 300),
            (Fate::Fail, 60),
            (Fate::Lie, 60),
            (Fate::CrashBefore, 15),
            (Fate::CrashAfter, 15),
        ],
    ),
    (
        Kind::Change,
        &[
            (Fate::Delay(Duration::from_secs(4)), 200),
            (Fate::Fail, 80),
            (Fate::Lie, 80),
            (Fate::CrashBefore, 20),
            (Fate::CrashAfter, 20),
        ],
    ),
    (
        Kind::Look,
        &[(Fate::Delay(Duration::from_secs(2)), 300), (Fate::Fail, 80)],
    ),
    (
        Kind::Transfer,
        &[
            (Fate::Break(0), 60),
            (Fate::Break(1), 60),
            (Fate::Break(2), 60),
            (Fate::Break(3), 60),
            (Fate::Break(4), 60),
            (Fate::Lie, 80),
        ],
    ),
];

/// Calls that make up a write of the ledger: after each of them the power can go.
const LEDGER_CALLS: u8 = 4;

/// How many of a thousand writes to a ledger have their power cut, in seeds that are about that.
const POWER_CUTS: u32 = 12;

fn menu(kind: Kind) -> &'static [(Fate, u32)] {
    let found = MENU.iter().find(|(k, _)| *k == kind);
    found.map_or(&[], |(_, faults)| faults)
}

/// Every fault that a point of this kind can suffer.
pub fn possible(kind: Kind) -> impl Iterator<Item = Fate> {
    let cuts = 0..=(if kind == Kind::Ledger { LEDGER_CALLS } else { 0 });
    let cuts = cuts.filter(move |_| kind == Kind::Ledger).map(Fate::PowerCut);
    menu(kind).iter().map(|(fate, _)| *fate).chain(cuts)
}

impl Rates {
    /// Draws the rates of a seed; of a dense one every fault comes often.
    pub fn draw(rng: &mut Rng, dense: bool) -> Self {
        let mut rates = BTreeMap::new();
        for (kind, faults) in MENU {
            for (index, (_, most)) in faults.iter().enumerate() {
                let rate = match rng.u32(..4) {
                    _ if dense => rng.u32(most / 2..=*most),
                    0 => 0,
                    _ => rng.u32(0..=*most),
                };
                rates.insert((*kind, index), rate);
            }
        }
        Self(rates)
    }

    fn pick(&self, kind: Kind, rng: &mut Rng) -> Fate {
        let mut drawn = rng.u32(..1000);
        // Drawn always, so that leaving a fault out changes nothing else.
        let share = rng.f64();
        for (index, (fate, _)) in menu(kind).iter().enumerate() {
            let rate = self.0.get(&(kind, index)).copied().unwrap_or(0);
            if drawn < rate {
                return match fate {
                    Fate::Delay(most) => Fate::Delay(most.mul_f64(share)),
                    Fate::Repeat(most) => Fate::Repeat(most.mul_f64(share)),
                    fate => *fate,
                };
            }
            drawn -= rate;
        }
        Fate::Pass
    }
}

/// Which faults of the points there are.
#[derive(Debug, Clone)]
pub enum Source {
    /// As the seed says, but for points in these ranges.
    Seed {
        /// Numbers of points that nothing happens to.
        without: Vec<Range<u64>>,
    },
    /// None but this one.
    Exactly {
        /// Number of the point.
        point: u64,
        /// What happens there.
        fate: Fate,
    },
}

/// See the module.
#[derive(Debug)]
pub struct Fates {
    rng: Rng,
    rates: Rates,
    /// Draws power cuts, in seeds that have them; apart, so that other seeds keep their histories.
    power_cuts: Option<Rng>,
    source: Source,
    next: u64,
    /// No more faults: the run comes to rest.
    pub over: bool,
    /// The points that have come, when they are wanted.
    pub seen: Option<Vec<Point>>,
    /// Faults so far, by class.
    pub counts: BTreeMap<&'static str, u64>,
    /// Numbers of the points that something happened to.
    pub hit: Vec<u64>,
}

impl Fates {
    /// The fates of a seed, dense or not.
    pub fn new(mut rng: Rng, dense: bool, source: Source) -> Self {
        let rates = Rates::draw(&mut rng, dense);
        Self {
            rng,
            rates,
            power_cuts: None,
            source,
            next: 0,
            over: false,
            seen: None,
            counts: BTreeMap::new(),
            hit: Vec::new(),
        }
    }

    /// From now on the power goes now and then amid a write to a ledger.
    pub fn cut_power(&mut self, rng: Rng) {
        self.power_cuts = Some(rng);
    }

    /// What a seed has at a point. Everything is drawn always, so that leaving a fault out changes nothing else.
    fn drawn(&mut self, kind: Kind) -> Fate {
        let fate = self.rates.pick(kind, &mut self.rng);
        let Some(rng) = self.power_cuts.as_mut().filter(|_| kind == Kind::Ledger) else {
            return fate;
        };
        let (drawn, calls) = (rng.u32(..1000), rng.u8(..=LEDGER_CALLS));
        if drawn < POWER_CUTS {
            Fate::PowerCut(calls)
        } else {
            fate
        }
    }

    /// What happens at this point.
    pub fn at(&mut self, point: Point) -> Fate {
        if self.over {
            return Fate::Pass;
        }
        let number = self.next;
        self.next += 1;
        if let Some(seen) = &mut self.seen {
            seen.push(point);
        }
        let fate = match &self.source {
            Source::Exactly { point, fate } if *point == number => *fate,
            Source::Exactly { .. } => Fate::Pass,
            Source::Seed { without } => {
                let left_out = without.iter().any(|range| range.contains(&number));
                let fate = self.drawn(point.kind);
                if left_out { Fate::Pass } else { fate }
            }
        };
        if let Some(class) = fate.class(point.kind) {
            self.count(class);
            self.hit.push(number);
        }
        fate
    }

    /// Counts a fault that came otherwise than at a point.
    pub fn count(&mut self, class: &'static str) {
        *self.counts.entry(class).or_default() += 1;
    }

    /// How many faults there have been.
    pub fn faults(&self) -> u64 {
        self.counts.values().sum()
    }

    /// How many points there have been.
    pub fn points(&self) -> u64 {
        self.next
    }

    /// A number below `most`, for what is not a fault (latencies).
    pub fn below(&mut self, most: u64) -> u64 {
        self.rng.u64(..most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POINT: Point = Point {
        kind: Kind::Message,
        name: "Report",
        by: Node::Host(0),
        to: Node::Controller(0),
    };

    fn fates(source: Source) -> Vec<Fate> {
        let mut fates = Fates::new(Rng::with_seed(7), false, source);
        (0..500).map(|_| fates.at(POINT)).collect()
    }

    #[test]
    fn leaving_a_fault_out_changes_no_other() {
        let all = fates(Source::Seed { without: vec![] });
        let hit: Vec<_> = (0..500).filter(|i| all[*i] != Fate::Pass).collect();
        assert!(hit.len() > 10, "the seed has faults to leave out");
        let number = hit[hit.len() / 2] as u64;
        let less = fates(Source::Seed {
            without: [number].map(|number| number..number + 1).into(),
        });
        for (index, (with, without)) in all.iter().zip(&less).enumerate() {
            if index as u64 == number {
                assert_eq!(*without, Fate::Pass);
            } else {
                assert_eq!(with, without, "point {index}");
            }
        }
    }

    #[test]
    fn exactly_one_fault_is_exactly_one() {
        let fates = fates(Source::Exactly {
            point: 3,
            fate: Fate::Lose,
        });
        assert_eq!(fates[3], Fate::Lose);
        assert_eq!(fates.iter().filter(|fate| **fate != Fate::Pass).count(), 1);
    }
}
