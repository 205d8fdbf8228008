//! What only some seeds are about: power cuts that lose what was not synced, clocks that go wrong, a controller restored
//! from an old backup, two controllers at once, objects of the site beside its VMs, plans. The others keep their histories.

use std::time::Duration;

use fastrand::Rng;

use super::{
    objects,
    plan::{Event, Node, Plan, Size},
};

/// See the module. Which of them a seed is about follows from its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Nature {
    /// Hosts lose what was not synced when they lose power, and lose it amid writes to their ledgers.
    pub power: bool,
    /// Wall clocks go faster and slower.
    pub clocks: bool,
    /// The controller is restored from an old backup.
    pub restore: bool,
    /// A second controller runs on a copy of the store.
    pub second: bool,
    /// Clients ask for volumes and networks too.
    pub objects: bool,
    /// Clients have plans made and carried out.
    pub plans: bool,
}

/// Plans of a part.
const PLANS: usize = 12;

/// How much faster a clock goes, in thousandths.
const RATES: [i64; 5] = [-100, -20, 0, 20, 100];

impl Nature {
    /// What a seed is about: nearly half have something of their own.
    pub fn of(seed: u64) -> Self {
        let (kind, own) = (seed / 5 % 8, seed % 5 == 2);
        Self {
            power: own && matches!(kind, 0 | 4 | 6),
            clocks: own && matches!(kind, 1 | 5 | 7),
            restore: own && matches!(kind, 2 | 4 | 5),
            second: own && matches!(kind, 3 | 6 | 7),
            objects: seed.is_multiple_of(5),
            plans: seed % 5 == 3 && seed / 5 % 4 == 2,
        }
    }

    /// Whether it is about what bears this name: "power", "clocks", "restore", "second", "objects" or "plans".
    pub fn is_about(self, name: &str) -> bool {
        match name {
            "power" => self.power,
            "clocks" => self.clocks,
            "restore" => self.restore,
            "second" => self.second,
            "objects" => self.objects,
            "plans" => self.plans,
            _ => false,
        }
    }

    /// How much faster the clocks of controllers and hosts go, in thousandths.
    pub fn rates(self, rng: &mut Rng, hosts: usize) -> Vec<(Node, i64)> {
        if !self.clocks {
            return Vec::new();
        }
        let nodes = (0..2).map(Node::Controller).chain((0..hosts).map(Node::Host));
        nodes
            .map(|node| (node, RATES[rng.usize(..RATES.len())]))
            .collect()
    }

    /// Puts into a part what the seed is about.
    pub fn add(self, plan: &mut Plan, rng: &mut Rng, size: Size, begin: Duration) {
        let at = |share: f64| begin + size.time.mul_f64(share);
        if self.restore {
            let backup = rng.f64() * 0.6;
            let restore = backup + rng.f64() * (0.9 - backup);
            plan.push((at(backup), Event::Backup));
            plan.push((
                at(restore),
                Event::Restore {
                    time: Duration::from_secs_f64(rng.f64() * 12.0),
                    patience: Duration::from_secs(rng.u64(5..60)),
                    lost: rng.u8(..4) == 0,
                },
            ));
        }
        if self.second {
            let copied = rng.f64() * 0.4;
            let begins = copied + rng.f64() * (0.5 - copied);
            let time = size.time.mul_f64(0.2 + rng.f64() * 0.3);
            plan.push((at(copied), Event::Backup));
            plan.push((at(begins), Event::Second { time }));
            for _ in 0..4 {
                let event = Event::Turns {
                    host: rng.usize(..size.hosts),
                };
                plan.push((at(begins) + time.mul_f64(rng.f64()), event));
            }
        }
        if self.plans {
            for _ in 0..PLANS {
                plan.push((at(rng.f64()), Event::Request(objects::plan(rng, size))));
            }
        }
        if self.objects {
            for request in objects::first(begin) {
                plan.push((at(rng.f64() * 0.1), Event::Request(request)));
            }
            for _ in 0..size.requests {
                let time = at(rng.f64());
                plan.push((time, Event::Request(objects::request(rng, size))));
            }
            // An hour passes for whoever goes by its clock: the grace of what was deleted is over.
            if rng.bool() {
                let jump = Event::ClockJump {
                    node: Node::Controller(0),
                    seconds: 3_700,
                };
                plan.push((at(rng.f64()), jump));
            }
        }
        plan.sort_by_key(|(time, _)| *time);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn most_seeds_have_nothing_of_their_own_and_each_kind_has_some() {
        let natures: Vec<_> = (1..=200).map(Nature::of).collect();
        let own = natures.iter().filter(|nature| **nature != Nature::default());
        assert_eq!(own.count(), 90);
        for name in ["power", "clocks", "restore", "second", "objects", "plans"] {
            assert!(natures.iter().any(|nature| nature.is_about(name)), "{name}");
        }
    }
}
