//! What room on a host is worth to a site: a price for each size of VM, and from these the value of whatever is free.
//!
//! Two hosts may have equally much left once a VM is there, and yet what is left on one still holds another VM of those that the
//! site has, and on the other none. Prices tell them apart. They are the dual solution of the linear program behind cutting
//! stock (Gilmore, Gomory 1961): as few hosts as possible for the VMs that there are,
//!
//! ```text
//!   maximise  Σ count(s) · price(s)    so that for every set of VMs that fits on a host    Σ price(s) ≤ 1
//! ```
//!
//! a price being the part of a host that a VM of this size is good for. The sets are found as they are needed, each by a knapsack
//! over prices, until none is worth more than a host. That knapsack then gives the value of any room; to put a VM where the value falls
//! least is to place by a bid price.
//!
//! [`Worth::learn`] is called by the benchmark alone: these prices packed no better than best fit. [`Worth::lost`] is called by the
//! score. Pure.

mod program;
mod table;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use self::table::{Grid, Table};
use super::score::Size;

/// Sizes of VMs that get a price: the most common ones, by what they take.
const SIZES: usize = 32;
/// Capacities of hosts that get a table: the most common ones. On others pack is best fit alone.
const CAPACITIES: usize = 16;
/// Sets of VMs looked at before prices are taken as they are; some dozens are enough for any mix that was tried.
const ROUNDS: usize = 300;
/// What a host is worth, in the unit of prices.
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
        let tables = capacities.into_iter().filter_map(|(capacity, _)| {
            let table = Grid::of(capacity)?.values(&prices).into_table();
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
