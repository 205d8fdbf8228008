//! How others choose a host, as small functions over the same hosts: what the simulator compares the engine with.
//!
//! Each is the peer's default, as its documentation and source say, for what a trace has: processors and memory on hosts of one shape.
//! What else a peer looks at (disks, builds under way, failures, tags) is the same for all hosts here and decides nothing. Ties go to the
//! host with the lower number. A host without room is never chosen, though some peers would: none of these rules over-commits more than the engine may.
//!
//! | rule | the host with |
//! |---|---|
//! | first fit | the lowest number |
//! | best fit | the least left once the VM is there: the shares of processors and memory added |
//! | Nova | the greatest sum of free memory and free processors, each scaled to 0..1 over the hosts that fit: `RAMWeigher` and `CPUWeigher` at their default multipliers of 1 |
//! | Proxmox VE | the best TOPSIS rank of the whole cluster with the VM there: root mean square and highest share of processors (weights 1, 2) and memory (5, 10): the cluster resource scheduler's static mode |
//! | Incus | the fewest instances: its placement where neither target nor scriptlet is given |
//! | hail | the lowest cluster score with the VM there: standard deviations over the hosts of processors and memory, and of the number of VMs four times, as without measured load each of four kinds counts a VM as one |
//!
//! Pure.

use super::{field::Host, trace::Size};

/// What counts in Ganeti's score: processors, memory, VMs.
const GANETI: [f64; 3] = [1.0, 1.0, 4.0];
/// Weights of Proxmox VE's criteria: average and highest share of processors, then of memory.
const PROXMOX: [f64; 4] = [1.0, 2.0, 5.0, 10.0];
/// Shares are compared in millionths, rounded down, as the engine does.
const WHOLE: u64 = 1_000_000;

/// Whose rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// The first host with room.
    FirstFit,
    /// The host with the least left.
    BestFit,
    /// OpenStack Nova's filter scheduler.
    Nova,
    /// Proxmox VE's cluster resource scheduler.
    Proxmox,
    /// Incus.
    Incus,
    /// Ganeti's allocator.
    Hail,
}

impl Rule {
    /// The host for a VM, of those that have room.
    pub fn choose(self, vm: Size, hosts: &[Host], capacity: Size) -> Option<usize> {
        let fitting = || {
            let numbered = hosts.iter().enumerate();
            numbered.filter(move |(_, host)| host.has_room(vm, capacity))
        };
        match self {
            Self::FirstFit => fitting().next().map(|(number, _)| number),
            Self::BestFit => {
                let left = |host: &Host| {
                    let vcpus = u64::from(capacity.vcpus - host.vcpus - vm.vcpus);
                    let memory_mib = capacity.memory_mib - host.memory_mib - vm.memory_mib;
                    vcpus * WHOLE / u64::from(capacity.vcpus) + memory_mib * WHOLE / capacity.memory_mib
                };
                fitting()
                    .min_by_key(|(number, host)| (left(host), *number))
                    .map(|(number, _)| number)
            }
            Self::Incus => fitting()
                .min_by_key(|(number, host)| (host.vms, *number))
                .map(|(number, _)| number),
            Self::Nova => nova(fitting().map(|(number, host)| (number, free(host, capacity)))),
            Self::Proxmox => proxmox(vm, hosts, capacity),
            Self::Hail => {
                let spread = Spread::of(hosts, capacity);
                let more = row(vm, 1.0, capacity);
                least(fitting().map(|(number, host)| {
                    let now = row(size(host), f64::from(host.vms), capacity);
                    (spread.with(&now, &more).score(), number)
                }))
            }
        }
    }
}

fn size(host: &Host) -> Size {
    Size {
        vcpus: host.vcpus,
        memory_mib: host.memory_mib,
    }
}

/// The first with the least value.
fn least(values: impl Iterator<Item = (f64, usize)>) -> Option<usize> {
    let best = values.reduce(|best, other| if other.0 < best.0 { other } else { best });
    best.map(|(_, number)| number)
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53 MiB")]
fn free(host: &Host, capacity: Size) -> [f64; 2] {
    [
        (capacity.memory_mib - host.memory_mib) as f64,
        f64::from(capacity.vcpus - host.vcpus),
    ]
}

/// Each weigher's values are scaled to 0..1 over the hosts that passed the filters; all alike become 0.
fn nova(fitting: impl Iterator<Item = (usize, [f64; 2])> + Clone) -> Option<usize> {
    let ends = |d: usize| {
        let values = fitting.clone().map(|(_, free)| free[d]);
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
            (low.min(value), high.max(value))
        })
    };
    let ends = [ends(0), ends(1)];
    let weight = |free: &[f64; 2]| -> f64 {
        let scaled = |d: usize| match ends[d].1 - ends[d].0 {
            0.0 => 0.0,
            range => (free[d] - ends[d].0) / range,
        };
        scaled(0) + scaled(1)
    };
    least(fitting.clone().map(|(number, free)| (-weight(&free), number)))
}

fn proxmox(vm: Size, hosts: &[Host], capacity: Size) -> Option<usize> {
    let shares: Vec<_> = hosts.iter().map(|host| row(size(host), 0.0, capacity)).collect();
    let more = row(vm, 0.0, capacity);
    #[expect(clippy::cast_precision_loss, reason = "a count of hosts")]
    let count = hosts.len() as f64;
    let whole = |d: usize| {
        let squares: f64 = shares.iter().map(|row| row[d] * row[d]).sum();
        // The highest but for one host is the highest, or the second where it is that host's.
        let top = shares
            .iter()
            .fold([0.0_f64; 2], |[first, second], row| match row[d] {
                share if share > first => [share, first],
                share => [first, second.max(share)],
            });
        (squares, top)
    };
    let whole = [whole(0), whole(1)];
    let alternative = |number: usize| -> [f64; 4] {
        let both = [0, 1].map(|d| {
            let (squares, [first, second]) = whole[d];
            let (now, then) = (shares[number][d], shares[number][d] + more[d]);
            let others = if now >= first { second } else { first };
            // One is added so that 0.004 does not count as twice as much as 0.002.
            [
                1.0 + ((squares - now * now + then * then).max(0.0) / count).sqrt(),
                1.0 + others.max(then),
            ]
        });
        [both[0][0], both[0][1], both[1][0], both[1][1]]
    };
    let fitting = (0..hosts.len()).filter(|number| hosts[*number].has_room(vm, capacity));
    let rows: Vec<_> = fitting.map(|number| (number, alternative(number))).collect();
    topsis(&rows)
}

/// The alternative closest to the ideal and farthest from its opposite (C. L. Hwang, K. Yoon, 1981); all criteria are the better the lower.
fn topsis(rows: &[(usize, [f64; 4])]) -> Option<usize> {
    let total: f64 = PROXMOX.iter().sum();
    let scale: [f64; 4] = std::array::from_fn(|c| {
        let norm = rows.iter().map(|(_, row)| row[c] * row[c]).sum::<f64>().sqrt();
        PROXMOX[c] / total / norm.max(f64::MIN_POSITIVE)
    });
    let end = |pick: fn(f64, f64) -> f64, from: f64| -> [f64; 4] {
        std::array::from_fn(|c| rows.iter().map(|(_, row)| row[c]).fold(from, pick))
    };
    let (ideal, worst) = (end(f64::min, f64::INFINITY), end(f64::max, f64::NEG_INFINITY));
    let distance = |row: &[f64; 4], to: &[f64; 4]| {
        let squares = (0..4).map(|c| ((row[c] - to[c]) * scale[c]).powi(2));
        squares.sum::<f64>().sqrt()
    };
    least(rows.iter().map(|(number, row)| {
        let (best, worst) = (distance(row, &ideal), distance(row, &worst));
        let rank = if best + worst > 0.0 {
            worst / (best + worst)
        } else {
            0.0
        };
        (-rank, *number)
    }))
}

/// Shares of processors and memory, and a number of VMs.
#[expect(clippy::cast_precision_loss, reason = "far below 2^53 MiB")]
fn row(size: Size, vms: f64, capacity: Size) -> [f64; 3] {
    [
        f64::from(size.vcpus) / f64::from(capacity.vcpus),
        size.memory_mib as f64 / capacity.memory_mib as f64,
        vms,
    ]
}

/// What Ganeti's score is made of: sums over the hosts.
#[derive(Debug, Clone, Copy)]
struct Spread {
    hosts: f64,
    sums: [f64; 3],
    squares: [f64; 3],
}

impl Spread {
    fn of(hosts: &[Host], capacity: Size) -> Self {
        let (mut sums, mut squares) = ([0.0; 3], [0.0; 3]);
        for host in hosts {
            let row = row(size(host), f64::from(host.vms), capacity);
            for d in 0..3 {
                sums[d] += row[d];
                squares[d] += row[d] * row[d];
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "a count of hosts")]
        let hosts = hosts.len() as f64;
        Self { hosts, sums, squares }
    }

    /// With so much more on a host that has this now; less, where it is negative.
    fn with(mut self, now: &[f64; 3], more: &[f64; 3]) -> Self {
        for d in 0..3 {
            self.sums[d] += more[d];
            self.squares[d] += more[d] * (more[d] + 2.0 * now[d]);
        }
        self
    }

    fn score(&self) -> f64 {
        let deviation = |d: usize| {
            let mean = self.sums[d] / self.hosts;
            (self.squares[d] / self.hosts - mean * mean).max(0.0).sqrt()
        };
        (0..3).map(|d| GANETI[d] * deviation(d)).sum()
    }
}

/// The move that lowers Ganeti's score the most, as its balancer makes one after the other: the place of a VM among `vms` (each with its size and
/// host), and where it goes. `None` where nothing is gained, or so little (0.01 below a score of 0.1) that it stops.
pub fn hbal(vms: &[(Size, usize)], hosts: &[Host], capacity: Size) -> Option<(usize, usize)> {
    const ENOUGH: f64 = 0.1;
    const LEAST: f64 = 0.01;
    let spread = Spread::of(hosts, capacity);
    let before = spread.score();
    let rows: Vec<_> = hosts
        .iter()
        .map(|host| row(size(host), f64::from(host.vms), capacity))
        .collect();
    let mut best: Option<(f64, usize, usize)> = None;
    let mut seen = std::collections::HashSet::new();
    for (index, (vm, from)) in vms.iter().enumerate() {
        // VMs of the same size on the same host are as good as one another.
        if !seen.insert((*vm, *from)) {
            continue;
        }
        let more = row(*vm, 1.0, capacity);
        let less = spread.with(&rows[*from], &more.map(|value| -value));
        for (to, host) in hosts.iter().enumerate() {
            if to == *from || !host.has_room(*vm, capacity) {
                continue;
            }
            let score = less.with(&rows[to], &more).score();
            if best.is_none_or(|(lowest, ..)| score < lowest) {
                best = Some((score, index, to));
            }
        }
    }
    let gains = |score: f64| before - score > if before < ENOUGH { LEAST } else { 1e-9 };
    best.filter(|(score, ..)| gains(*score))
        .map(|(_, vm, to)| (vm, to))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPACITY: Size = Size {
        vcpus: 16,
        memory_mib: 65_536,
    };
    const VM: Size = Size {
        vcpus: 2,
        memory_mib: 4096,
    };

    fn host(vcpus: u32, gib: u64, vms: u32) -> Host {
        Host {
            vcpus,
            memory_mib: gib << 10,
            vms,
        }
    }

    #[test]
    fn each_rule_chooses_what_its_peer_would() {
        // Full; nearly full by processors; half full with few VMs; empty; half full with many VMs.
        let hosts = [
            host(16, 60, 8),
            host(14, 20, 3),
            host(8, 30, 1),
            host(0, 0, 0),
            host(6, 28, 9),
        ];
        let chosen = |rule: Rule, hosts: &[Host]| rule.choose(VM, hosts, CAPACITY);
        assert_eq!(chosen(Rule::FirstFit, &hosts), Some(1));
        assert_eq!(chosen(Rule::BestFit, &hosts), Some(1));
        for rule in [Rule::Nova, Rule::Proxmox, Rule::Incus, Rule::Hail] {
            assert_eq!(chosen(rule, &hosts), Some(3), "{rule:?}");
        }
        // Without the empty one: the most free of both for Nova; the most free memory for Proxmox, where it counts five times; the fewest VMs.
        let hosts = [host(14, 20, 3), host(8, 30, 1), host(6, 28, 9)];
        assert_eq!(chosen(Rule::Nova, &hosts), Some(2));
        assert_eq!(chosen(Rule::Proxmox, &hosts), Some(0));
        assert_eq!(chosen(Rule::Incus, &hosts), Some(1));
        assert_eq!(chosen(Rule::Hail, &hosts), Some(1));
    }

    #[test]
    fn no_rule_chooses_a_host_without_room() {
        let hosts = [host(15, 0, 1), host(0, 61, 1)];
        for rule in [
            Rule::FirstFit,
            Rule::BestFit,
            Rule::Nova,
            Rule::Proxmox,
            Rule::Incus,
            Rule::Hail,
        ] {
            assert_eq!(rule.choose(VM, &hosts, CAPACITY), None, "{rule:?}");
        }
    }

    #[test]
    fn hbal_evens_out_and_stops_when_nothing_is_gained() {
        let mut hosts = [host(8, 16, 4), host(0, 0, 0)];
        let mut vms = vec![(VM, 0); 4];
        let mut moves = 0;
        while let Some((vm, to)) = hbal(&vms, &hosts, CAPACITY) {
            hosts[vms[vm].1].vms -= 1;
            hosts[vms[vm].1].vcpus -= VM.vcpus;
            hosts[vms[vm].1].memory_mib -= VM.memory_mib;
            hosts[to].vms += 1;
            hosts[to].vcpus += VM.vcpus;
            hosts[to].memory_mib += VM.memory_mib;
            vms[vm].1 = to;
            moves += 1;
        }
        assert_eq!(moves, 2);
        assert_eq!((hosts[0].vms, hosts[1].vms), (2, 2));
    }
}
