//! The store under every way to die: what its tests write, what must be there afterwards, and disks that forget.
//!
//! [`model`] says what the store must hold after each batch; the program `store-writer` writes the batches and tells
//! which of them were acknowledged; [`histories`] lets clients work at once and judges what they saw; [`power`] rebuilds the
//! directory as a power cut at any moment could have left it. [`ledger`] is the same for an agent's ledger. Used by
//! `tests/store.rs`, `tests/linear.rs` and `tests/ledger.rs`.

pub mod cut;
pub mod histories;
pub mod ledger;
pub mod model;
pub mod power;
pub mod trace;

/// Small random numbers that are the same for the same seed, so that a failure can be repeated.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Numbers that follow from `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0x9e37_79b9_7f4a_7c15)
    }

    /// The next number below `limit`, which is not 0. (xorshift64*, Vigna 2014.)
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }

    /// Heads or tails.
    pub fn coin(&mut self) -> bool {
        self.below(2) == 0
    }
}
