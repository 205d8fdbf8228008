//! Less contention, or, where that is asked for, an even spread.
//!
//! How uneven a site is, is one number: the sum, over what counts, of the standard deviation of the hosts' shares, each with a weight. That is what
//! Ganeti's hbal goes by. A move changes the shares of two hosts, and so the sums and the sums of squares, in constant time; only moves from
//! the fullest hosts to the emptiest ones are looked at. What was chosen is then gone over: VMs that move change their destinations, or make way
//! for another VM of the same host, where that makes the site more even with no more moves.
//!
//! An operator does not want an even site but one on which no VM waits: by default only hosts that are contended give VMs away, and only to hosts
//! that do not become so. A move has to be worth what it copies.

use std::collections::BTreeSet;

use super::{
    Move, Plan,
    consolidate::{Fill, filled, runs_on},
    site::{Site, Slot},
};

/// Fullest hosts, and emptiest ones, that are looked at for each move.
const LOOKED_AT: usize = 6;
/// As many where those give nothing.
const LOOKED_AT_LAST: usize = 64;
/// Moves whose destinations are tried for one another, at most, from each.
const EXCHANGES: usize = 128;
/// Rounds of that.
const ROUNDS: usize = 24;
/// A smaller gain is none.
const NOTHING: f64 = 1e-9;

/// What counts; also the place in a row of shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dimension {
    /// What is used of the processors.
    Cpu,
    /// What is reserved of the memory.
    Memory,
    /// How many VMs there are.
    Vms,
}

/// Dimensions.
const COUNT: usize = 3;
type Row = [f64; COUNT];

/// What a plan goes by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Weights, in the order of [`Dimension`].
    pub weights: [f64; COUNT],
    /// Only contended hosts give VMs away, and none becomes contended: those that measure pressure, or that are fuller than this. `None`
    /// evens the whole site out.
    pub contended: Option<Fill>,
    /// The least that a move must gain for each GiB that it copies.
    pub gain_per_gib: f64,
    /// Moves of one plan at most.
    pub moves: usize,
    /// What a plan copies at most, in MiB.
    pub transfer_mib: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            weights: [1.0, 0.5, 0.0],
            contended: Some(Fill {
                deviations: 1.0,
                share: 0.85,
            }),
            gain_per_gib: 1e-5,
            moves: usize::MAX,
            transfer_mib: u64::MAX,
        }
    }
}

/// How uneven a site is.
pub fn score(site: &Site, weights: [f64; COUNT]) -> f64 {
    Spread::new(site, weights).score()
}

/// Makes a plan.
pub fn rebalance(site: &Site, settings: &Settings) -> Plan {
    let mut search = Search::new(site, settings);
    while search.step() {}
    let plan = search.plan;
    match settings.contended {
        None => improved(site, &plan, settings).unwrap_or(plan),
        Some(_) => plan,
    }
}

/// The hosts' shares, and their sums.
#[derive(Debug, Clone)]
struct Spread {
    weights: Row,
    /// By how much a VM's row is divided on each host.
    whole: Vec<Row>,
    shares: Vec<Row>,
    sums: Row,
    squares: Row,
    hosts: f64,
}

fn row(site: &Site, vm: Slot) -> Row {
    let vm = &site.vms()[vm];
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53 MiB")]
    let memory = vm.memory_mib as f64;
    [vm.load.mean, memory, 1.0]
}

impl Spread {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    fn new(site: &Site, weights: Row) -> Self {
        let hosts = 0..site.hosts().len();
        let whole: Vec<Row> = hosts
            .clone()
            .map(|host| {
                let host = &site.hosts()[host];
                [host.cpus.max(1e-9), (host.memory_mib as f64).max(1.0), 1.0]
            })
            .collect();
        let share = |host: Slot| -> Row {
            let held = site.held(host);
            let used = [held.mean, held.memory_mib as f64, site.here(host).len() as f64];
            std::array::from_fn(|d| used[d] / whole[host][d])
        };
        let shares: Vec<_> = hosts.map(share).collect();
        let sum = |of: fn(f64) -> f64| -> Row {
            std::array::from_fn(|d| shares.iter().map(|row| of(row[d])).sum())
        };
        let (sums, squares) = (sum(|x| x), sum(|x| x * x));
        let hosts = shares.len() as f64;
        Self {
            weights,
            whole,
            shares,
            sums,
            squares,
            hosts: hosts.max(1.0),
        }
    }

    fn deviation(&self, sum: f64, squares: f64) -> f64 {
        let mean = sum / self.hosts;
        (squares / self.hosts - mean * mean).max(0.0).sqrt()
    }

    fn score(&self) -> f64 {
        (0..COUNT)
            .map(|d| self.weights[d] * self.deviation(self.sums[d], self.squares[d]))
            .sum()
    }

    /// Changes of sum and sum of squares in one dimension when `value` goes from a host to another.
    fn change(&self, d: usize, value: f64, from: Slot, to: Slot) -> (f64, f64) {
        let (less, more) = (value / self.whole[from][d], value / self.whole[to][d]);
        let (left, come) = (self.shares[from][d], self.shares[to][d]);
        (
            more - less,
            less * (less - 2.0 * left) + more * (more + 2.0 * come),
        )
    }

    /// The score when this goes from a host to another.
    fn after(&self, values: &Row, from: Slot, to: Slot) -> f64 {
        let mut score = 0.0;
        for d in (0..COUNT).filter(|d| self.weights[*d] != 0.0) {
            let (sum, squares) = self.change(d, values[d], from, to);
            score += self.weights[d] * self.deviation(self.sums[d] + sum, self.squares[d] + squares);
        }
        score
    }

    fn apply(&mut self, values: &Row, from: Slot, to: Slot) {
        for (d, value) in values.iter().enumerate() {
            let (sum, squares) = self.change(d, *value, from, to);
            self.sums[d] += sum;
            self.squares[d] += squares;
            self.shares[from][d] -= value / self.whole[from][d];
            self.shares[to][d] += value / self.whole[to][d];
        }
    }

    /// How much the score falls as a host has a little less of everything, with these slopes.
    fn fullness(&self, host: Slot, slopes: &Row) -> f64 {
        (0..COUNT)
            .map(|d| slopes[d] * (self.shares[host][d] - self.sums[d] / self.hosts))
            .sum()
    }

    fn slopes(&self) -> Row {
        std::array::from_fn(|d| self.weights[d] / self.deviation(self.sums[d], self.squares[d]).max(1e-3))
    }
}

/// A number that is ordered as `f64::total_cmp` does.
fn ordered(value: f64) -> i64 {
    let bits = value.to_bits().cast_signed();
    bits ^ (((bits >> 63).cast_unsigned()) >> 1).cast_signed()
}

struct Search<'a> {
    settings: &'a Settings,
    plan: Plan,
    spread: Spread,
    score: f64,
    slopes: Row,
    rank: Vec<i64>,
    ranks: BTreeSet<(i64, Slot)>,
    moved: Vec<bool>,
    copied_mib: u64,
    /// Moves until the hosts are ranked anew.
    fresh: usize,
}

impl<'a> Search<'a> {
    fn new(site: &Site, settings: &'a Settings) -> Self {
        let spread = Spread::new(site, settings.weights);
        let mut search = Self {
            settings,
            plan: Plan::new(site),
            score: spread.score(),
            slopes: [0.0; COUNT],
            rank: vec![0; site.hosts().len()],
            ranks: BTreeSet::new(),
            moved: vec![false; site.vms().len()],
            copied_mib: 0,
            fresh: 0,
            spread,
        };
        search.order();
        search
    }

    /// Ranks all hosts anew: how much each thing counts changes as the site evens out.
    fn order(&mut self) {
        self.slopes = self.spread.slopes();
        self.rank = (0..self.rank.len())
            .map(|host| ordered(self.spread.fullness(host, &self.slopes)))
            .collect();
        self.ranks = self
            .rank
            .iter()
            .enumerate()
            .map(|(host, rank)| (*rank, host))
            .collect();
        self.fresh = self.rank.len() / 8 + 1;
    }

    fn rank_again(&mut self, host: Slot) {
        self.ranks.remove(&(self.rank[host], host));
        self.rank[host] = ordered(self.spread.fullness(host, &self.slopes));
        self.ranks.insert((self.rank[host], host));
    }

    fn gives(&self, host: Slot) -> bool {
        let Some(fill) = self.settings.contended else {
            return true;
        };
        let site = self.plan.site();
        let measured = site.hosts()[host].contended && site.here(host).len() > 1;
        let left = self.plan.moves().iter().any(|step| step.from == host);
        filled(site, host, fill, None) > fill.share || (measured && !left)
    }

    fn takes(&self, vm: Slot, host: Slot) -> bool {
        let Some(fill) = self.settings.contended else {
            return true;
        };
        let site = self.plan.site();
        !site.hosts()[host].contended
            && runs_on(site, vm, host, fill)
            && filled(site, host, fill, Some(&site.vms()[vm].load)) <= fill.share
    }

    /// Makes the best move, if any is worth it.
    fn step(&mut self) -> bool {
        if self.plan.moves().len() >= self.settings.moves {
            return false;
        }
        let best = self.best(LOOKED_AT).or_else(|| {
            // What was ranked some moves ago may hide what is there.
            self.order();
            self.best(LOOKED_AT_LAST)
        });
        let Some((vm, to, score)) = best else { return false };
        let (values, from) = (row(self.plan.site(), vm), self.plan.site().vms()[vm].host);
        self.copied_mib = self
            .copied_mib
            .saturating_add(self.plan.site().vms()[vm].transfer_mib);
        self.plan.push(vm, to);
        self.moved[vm] = true;
        self.spread.apply(&values, from, to);
        self.score = score;
        self.fresh -= 1;
        match self.fresh {
            0 => self.order(),
            _ => [from, to].into_iter().for_each(|host| self.rank_again(host)),
        }
        true
    }

    /// The move that gains the most beyond what it has to, and the score after it.
    fn best(&self, looked_at: usize) -> Option<(Slot, Slot, f64)> {
        let site = self.plan.site();
        let hosts = |(_, host): &(i64, Slot)| *host;
        let open = |host: &Slot| site.hosts()[*host].open;
        let receivers: Vec<_> = self
            .ranks
            .iter()
            .map(hosts)
            .filter(open)
            .take(looked_at)
            .collect();
        let donors = self
            .ranks
            .iter()
            .rev()
            .map(hosts)
            .filter(|host| self.gives(*host))
            .take(looked_at);
        let mut best: Option<(f64, Slot, Slot, f64)> = None;
        for donor in donors {
            let vms = site.here(donor).iter().copied();
            for vm in vms.filter(|vm| !self.moved[*vm] && site.vms()[*vm].pinned.is_empty()) {
                let size = site.vms()[vm].transfer_mib;
                if self.copied_mib.saturating_add(size) > self.settings.transfer_mib {
                    continue;
                }
                #[expect(clippy::cast_precision_loss, reason = "far below 2^53 MiB")]
                let owed = self.settings.gain_per_gib * size as f64 / 1024.0;
                let values = row(site, vm);
                for to in receivers.iter().copied().filter(|to| *to != donor) {
                    let score = self.spread.after(&values, donor, to);
                    let gain = self.score - score - owed;
                    let better = gain > NOTHING && best.is_none_or(|(most, ..)| gain > most);
                    if better && self.takes(vm, to) && site.check(vm, to).is_ok() {
                        best = Some((gain, vm, to, score));
                    }
                }
            }
        }
        best.map(|(_, vm, to, score)| (vm, to, score))
    }
}

/// The same number of moves with less unevenness in the end, where there is an order in which each of them is possible.
fn improved(site: &Site, plan: &Plan, settings: &Settings) -> Option<Plan> {
    let mut moves = plan.moves().to_vec();
    let mut moved = vec![false; site.vms().len()];
    moves.iter().for_each(|step| moved[step.vm] = true);
    let mut spread = Spread::new(plan.site(), settings.weights);
    for _ in 0..ROUNDS {
        let before = spread.score();
        for index in 0..moves.len() {
            replace(site, &mut spread, &mut moves[index], &mut moved);
            exchange(site, &mut spread, &mut moves, index);
        }
        if before - spread.score() < NOTHING {
            break;
        }
    }
    in_order(site, moves)
}

/// Another VM of the same host goes in place of one, the best.
fn replace(site: &Site, spread: &mut Spread, step: &mut Move, moved: &mut [bool]) {
    let now = row(site, step.vm);
    let instead = |vm: Slot| -> Row {
        let other = row(site, vm);
        std::array::from_fn(|d| other[d] - now[d])
    };
    let others = site.here(step.from).iter().copied();
    let others = others.filter(|vm| !moved[*vm] && may_go(site, *vm, step.to));
    let scored = others.map(|vm| (spread.after(&instead(vm), step.from, step.to), vm));
    let best = scored.min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    if let Some((_, vm)) = best.filter(|(score, _)| spread.score() - score > NOTHING) {
        spread.apply(&instead(vm), step.from, step.to);
        moved[step.vm] = false;
        moved[vm] = true;
        step.vm = vm;
    }
}

/// Two moves change their destinations, where that is better.
fn exchange(site: &Site, spread: &mut Spread, moves: &mut [Move], index: usize) {
    let last = moves.len().min(index + 1 + EXCHANGES);
    for other in index + 1..last {
        let (a, b) = (moves[index], moves[other]);
        if a.to == b.to || a.from == b.to || b.from == a.to {
            continue;
        }
        let (first, second) = (row(site, a.vm), row(site, b.vm));
        let difference: Row = std::array::from_fn(|d| first[d] - second[d]);
        let better = spread.score() - spread.after(&difference, a.to, b.to) > NOTHING;
        if better && may_go(site, a.vm, b.to) && may_go(site, b.vm, a.to) {
            spread.apply(&difference, a.to, b.to);
            moves[index].to = b.to;
            moves[other].to = a.to;
        }
    }
}

/// Whether a VM may be on a host but for what is free there.
fn may_go(site: &Site, vm: Slot, host: Slot) -> bool {
    site.vms()[vm].pinned.is_empty() && site.may_have(vm, host)
}

/// Brings moves into an order in which each is possible.
fn in_order(site: &Site, mut open: Vec<Move>) -> Option<Plan> {
    let mut plan = Plan::new(site);
    while !open.is_empty() {
        let waiting = open.len();
        open.retain(|step| {
            let possible = plan.site().check(step.vm, step.to).is_ok();
            if possible {
                plan.push(step.vm, step.to);
            }
            !possible
        });
        if open.len() == waiting {
            return None;
        }
    }
    Some(plan)
}
