//! What room on a host is worth to a site, as long as it is in one piece.
//!
//! Two hosts may have equally much left once a VM is there, and yet what is left on one still holds another of the large VMs that the
//! site has, and on the other none. So a room is worth the most that VMs of the site's sizes could use of it (an unbounded knapsack), a VM being worth the mean of its
//! shares of the host's processors and memory. Sizes that make up little of the site do not count: with them every hole is of some use.
//!
//! [`Worth::hosts`] is the fewest hosts that anything could do with: the linear program behind cutting stock (Gilmore, Gomory 1961),
//!
//! ```text
//!   maximise  Σ count(s) · price(s)    so that for every set of VMs that fits on a host    Σ price(s) ≤ 1
//! ```
//!
//! whose sets are found as they are needed, each by that knapsack over prices, until none is worth more than a host. Its prices are the other way to say what a room is worth.
//! They packed no better than best fit, as they were learnt: while processors alone are short, memory has no price, and what is placed then stays.
//!
//! [`Worth::learn`] is called by the benchmark alone, since what is gained is paid for: hosts are begun before others are full. [`Worth::lost`] is called by the
//! score. Pure.

mod program;
mod table;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use self::table::{Grid, Table};
use super::score::Size;

/// A size whose VMs together take less than one part in so many of what all take does not count for what a room is worth.
const PART: u64 = 20;
/// Sizes of VMs that get a price: the most common ones, by what they take.
const SIZES: usize = 32;
/// Capacities of hosts that get a table: the most common ones. On others pack is best fit alone.
const CAPACITIES: usize = 16;
/// Sets of VMs looked at before prices are taken as they are; some dozens are enough for any mix that was tried.
const ROUNDS: usize = 300;
/// What a whole host is worth at most, in the unit of prices.
const HOST: u32 = 1_000_000;
/// So little above that is no better.
const CLOSE: u32 = HOST / 10_000;

/// See the module.
#[derive(Debug, PartialEq)]
pub struct Worth {
    /// What all VMs together are worth, in hosts.
    hosts: f64,
    tables: BTreeMap<Size, Table>,
}

impl Worth {
    /// Learns from the VMs that there are and the capacities of the hosts, each with a count. A size is virtual processors and
    /// reserved memory in MiB. `None` where there is nothing to learn from.
    pub fn learn(
        vms: impl IntoIterator<Item = ((u32, u64), u64)>,
        hosts: impl IntoIterator<Item = ((u32, u64), u64)>,
    ) -> Option<Self> {
        let capacities = common(hosts, CAPACITIES, |_| 1);
        let largest = capacities.first()?.0;
        let grid = Grid::of(largest)?;
        let weight = |size: Size| {
            let (vcpus, memory) = size.shares(largest);
            u64::from(vcpus.max(memory)) + 1
        };
        let mut sizes = common(vms, SIZES, weight);
        sizes.retain(|(size, _)| grid.takes(*size));
        if sizes.is_empty() {
            return None;
        }
        let prices = prices(grid, &sizes);
        #[expect(clippy::cast_precision_loss, reason = "a count of VMs is far below 2^53")]
        let paid: f64 = sizes
            .iter()
            .zip(&prices)
            .map(|((_, count), (_, price))| *count as f64 * f64::from(*price))
            .sum();
        let hosts = paid / f64::from(grid.values(&prices).whole().max(HOST));
        let taken = |(size, count): &(Size, u64)| count.saturating_mul(weight(*size));
        let all = sizes.iter().map(taken).fold(0, u64::saturating_add);
        sizes.retain(|size| taken(size).saturating_mul(PART) >= all);
        let tables = capacities.into_iter().filter_map(|(capacity, _)| {
            let worth = |(size, _): &(Size, u64)| {
                let (vcpus, memory) = size.shares(capacity);
                (*size, vcpus.midpoint(memory))
            };
            let worths: Vec<_> = sizes.iter().map(worth).collect();
            let table = Grid::of(capacity)?.values(&worths).into_table();
            Some((capacity, table))
        });
        Some(Self {
            hosts,
            tables: tables.collect(),
        })
    }

    /// Hosts of the most common capacity that VMs of the sizes learnt from need at least, were they packed at leisure.
    pub fn hosts(&self) -> f64 {
        self.hosts
    }

    /// What is lost, in millionths of a host's worth, when a VM takes of what is free, beyond what the VM itself is worth; 0 on a host of a
    /// capacity that is not known.
    pub(super) fn lost(&self, vm: Size, free: Size, left: Size, capacity: Size) -> u32 {
        let Some(table) = self.tables.get(&capacity) else {
            return 0;
        };
        let kept = table.value(left).saturating_add(table.value(vm));
        table.value(free).saturating_sub(kept)
    }
}

/// The most common sizes, the one that weighs most in all first.
fn common(
    sizes: impl IntoIterator<Item = ((u32, u64), u64)>,
    most: usize,
    weight: impl Fn(Size) -> u64,
) -> Vec<(Size, u64)> {
    let mut counts = BTreeMap::<Size, u64>::new();
    for ((vcpus, memory_mib), count) in sizes {
        *counts.entry(Size { vcpus, memory_mib }).or_default() += count;
    }
    let mut counts: Vec<_> = counts.into_iter().filter(|(_, count)| *count > 0).collect();
    counts.sort_by_key(|(size, count)| std::cmp::Reverse(count.saturating_mul(weight(*size))));
    counts.truncate(most);
    counts
}

/// The price of each size, in millionths of a host. See the module.
fn prices(grid: Grid, sizes: &[(Size, u64)]) -> Vec<(Size, u32)> {
    #[expect(clippy::cast_precision_loss, reason = "a count of VMs is far below 2^53")]
    let counts: Vec<_> = sizes.iter().map(|(_, count)| *count as f64).collect();
    let priced = |prices: &[f64]| -> Vec<_> {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "from 0 to a host's worth"
        )]
        let whole = |price: &f64| (price * f64::from(HOST)).round() as u32;
        let sizes = sizes.iter().map(|(size, _)| *size);
        sizes.zip(prices.iter().map(whole)).collect()
    };
    // Hosts full of one size each: they bound every price.
    let mut sets: Vec<Vec<f64>> = (0..sizes.len())
        .map(|index| {
            let mut set = vec![0.0; sizes.len()];
            set[index] = grid.fits(sizes[index].0);
            set
        })
        .collect();
    let mut best = priced(&program::maximise(&counts, &sets));
    for _ in 0..ROUNDS {
        let values = grid.values(&best);
        if values.whole() <= HOST + CLOSE {
            break;
        }
        sets.push(values.set(sizes.len()));
        best = priced(&program::maximise(&counts, &sets));
    }
    best
}
