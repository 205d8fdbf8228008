//! The value of any room on a host, by the prices of what fits there: an unbounded knapsack over processors and memory. In whole
//! numbers, so that equal losses are equal: what decides then is the fit.

use crate::placement::score::Size;

/// Memory is reckoned in so many parts of a host.
const PARTS: u64 = 640;
/// Larger tables are not made: 4 MB each.
const CELLS: usize = 1 << 20;

/// How a host's room is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Grid {
    capacity: Size,
    /// MiB of a part.
    part_mib: u64,
    /// Parts of memory that there are, and one.
    width: usize,
}

impl Grid {
    /// The grid of a capacity; `None` where there is none, or too much of it.
    pub(super) fn of(capacity: Size) -> Option<Self> {
        let part_mib = capacity.memory_mib.div_ceil(PARTS).max(1);
        let width = usize::try_from(capacity.memory_mib / part_mib).ok()? + 1;
        let height = usize::try_from(capacity.vcpus).ok()? + 1;
        let grid = Self {
            capacity,
            part_mib,
            width,
        };
        (width > 1 && height > 1 && height.checked_mul(width)? <= CELLS).then_some(grid)
    }

    /// Parts that a VM needs, begun ones too.
    fn parts(self, size: Size) -> usize {
        usize::try_from(size.memory_mib.div_ceil(self.part_mib)).unwrap_or(usize::MAX)
    }

    fn height(self) -> usize {
        usize::try_from(self.capacity.vcpus).unwrap_or(usize::MAX) + 1
    }

    /// Whether a VM of that size fits on an empty host.
    pub(super) fn takes(self, size: Size) -> bool {
        (1..=self.capacity.vcpus).contains(&size.vcpus) && self.parts(size) < self.width
    }

    /// How many of them fit there.
    pub(super) fn fits(self, size: Size) -> f64 {
        let by_vcpus = self.capacity.vcpus / size.vcpus.max(1);
        let by_memory = (self.width - 1) / self.parts(size).max(1);
        f64::from(by_vcpus).min(f64::from(u32::try_from(by_memory).unwrap_or(u32::MAX)))
    }

    /// The value of every room.
    pub(super) fn values(self, prices: &[(Size, u32)]) -> Values {
        let mut values = vec![0_u32; self.height() * self.width];
        let mut last = vec![Last::None; values.len()];
        let sizes: Vec<_> = prices
            .iter()
            .enumerate()
            .filter(|(_, (size, price))| *price > 0 && self.takes(*size))
            .map(|(index, (size, price))| {
                let vcpus = usize::try_from(size.vcpus).unwrap_or(usize::MAX);
                (index, vcpus, self.parts(*size), *price)
            })
            .collect();
        for vcpus in 1..self.height() {
            for parts in 0..self.width {
                let at = vcpus * self.width + parts;
                let (mut value, mut from) = (values[at - self.width], Last::FewerVcpus);
                if parts > 0 && values[at - 1] > value {
                    (value, from) = (values[at - 1], Last::LessMemory);
                }
                for (index, needed, memory, price) in &sizes {
                    if *needed <= vcpus && *memory <= parts {
                        let with = values[at - needed * self.width - memory].saturating_add(*price);
                        if with > value {
                            (value, from) = (with, Last::Vm(*index));
                        }
                    }
                }
                (values[at], last[at]) = (value, from);
            }
        }
        Values {
            grid: self,
            values,
            last,
            steps: sizes
                .iter()
                .map(|(index, vcpus, parts, _)| (*index, vcpus * self.width + parts))
                .collect(),
        }
    }
}

/// What a value came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Last {
    None,
    FewerVcpus,
    LessMemory,
    Vm(usize),
}

/// The value of every room, and of what it is made.
#[derive(Debug)]
pub(super) struct Values {
    grid: Grid,
    values: Vec<u32>,
    last: Vec<Last>,
    /// How far back a VM of a size leads.
    steps: Vec<(usize, usize)>,
}

impl Values {
    /// The value of an empty host.
    pub(super) fn whole(&self) -> u32 {
        self.values.last().copied().unwrap_or(0)
    }

    /// The VMs that make it, as a count of each of so many sizes.
    pub(super) fn set(&self, sizes: usize) -> Vec<f64> {
        let mut set = vec![0.0; sizes];
        let mut at = self.values.len() - 1;
        loop {
            at -= match self.last[at] {
                Last::None => return set,
                Last::FewerVcpus => self.grid.width,
                Last::LessMemory => 1,
                Last::Vm(size) => {
                    set[size] += 1.0;
                    let step = self.steps.iter().find(|(index, _)| *index == size);
                    step.map_or(at, |(_, back)| *back)
                }
            };
        }
    }

    /// The values alone, for decisions.
    pub(super) fn into_table(self) -> Table {
        Table {
            grid: self.grid,
            values: self.values.into(),
        }
    }
}

/// See [`Values::into_table`].
#[derive(Debug, PartialEq)]
pub(super) struct Table {
    grid: Grid,
    values: Box<[u32]>,
}

impl Table {
    /// The value of a room: of whole parts of memory alone.
    pub(super) fn value(&self, room: Size) -> u32 {
        let vcpus = usize::try_from(room.vcpus)
            .unwrap_or(usize::MAX)
            .min(self.grid.height() - 1);
        let parts = room.memory_mib / self.grid.part_mib;
        let parts = usize::try_from(parts)
            .unwrap_or(usize::MAX)
            .min(self.grid.width - 1);
        self.values[vcpus * self.grid.width + parts]
    }
}
