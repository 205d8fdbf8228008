//! The most of many rows of numbers, kept while single rows change: a tournament.

use super::share::{CLASSES, Shares};

/// A number that is below every other.
pub(super) const NONE: i64 = i64::MIN / 4;

/// See the module.
#[derive(Debug, Clone, Default)]
pub(super) struct Peaks {
    /// The winner of all at 1, the two that it comes from at 2 and 3, and so on; the rows themselves in the second half.
    nodes: Vec<Shares>,
}

impl Peaks {
    fn rows(&self) -> usize {
        self.nodes.len() / 2
    }

    /// Sets a row.
    pub(super) fn set(&mut self, row: usize, value: Shares) {
        if row >= self.rows() {
            let mut grown = Self {
                nodes: vec![[NONE; CLASSES]; (row + 1).next_power_of_two() * 2],
            };
            let (from, to) = (self.rows(), grown.rows());
            grown.nodes[to..to + from].copy_from_slice(&self.nodes[from..]);
            for node in (1..to).rev() {
                grown.play(node);
            }
            *self = grown;
        }
        let mut node = self.rows() + row;
        self.nodes[node] = value;
        while node > 1 {
            node /= 2;
            self.play(node);
        }
    }

    fn play(&mut self, node: usize) {
        let (one, other) = (self.nodes[node * 2], self.nodes[node * 2 + 1]);
        self.nodes[node] = std::array::from_fn(|class| one[class].max(other[class]));
    }

    /// A row.
    pub(super) fn get(&self, row: usize) -> Shares {
        let node = self.rows() + row;
        self.nodes.get(node).copied().unwrap_or([NONE; CLASSES])
    }

    /// The rows with a number above its limit, until one of them is not `passed`; whether all were.
    pub(super) fn above(&self, limits: &Shares, mut passed: impl FnMut(usize) -> bool) -> bool {
        self.nodes.len() < 2 || self.visit(1, limits, &mut passed)
    }

    fn visit(&self, node: usize, limits: &Shares, passed: &mut impl FnMut(usize) -> bool) -> bool {
        if !exceeds(&self.nodes[node], limits) {
            return true;
        }
        match node.checked_sub(self.rows()) {
            Some(row) => passed(row),
            None => self.visit(node * 2, limits, passed) && self.visit(node * 2 + 1, limits, passed),
        }
    }
}

/// Whether a number is above its limit.
pub(super) fn exceeds(numbers: &Shares, limits: &Shares) -> bool {
    let over = numbers.iter().zip(limits).map(|(number, limit)| number > limit);
    over.fold(false, |any, over| any | over)
}
