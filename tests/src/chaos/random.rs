//! The randomness of a chaos run: small, seeded, of our own, so that a seed means the same choices for ever. Used by
//! every part that chooses. Not for secrets.

use std::time::Duration;

/// A stream of numbers that follows from its seed (SplitMix64, by Steele, Lea and Flood, 2014).
#[derive(Debug, Clone)]
pub struct Random {
    state: u64,
}

impl Random {
    /// The stream of a seed; each `part` of a run has its own, so that one that draws more does not change another's.
    #[must_use]
    pub fn new(seed: u64, part: u64) -> Self {
        let mut random = Self {
            state: seed ^ part.wrapping_mul(0xd134_2543_de82_ef95),
        };
        random.next();
        random
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    /// True in so many of a hundred cases.
    pub fn percent(&mut self, of_hundred: u64) -> bool {
        self.between(0, 99) < of_hundred
    }

    /// One of a list; `None` where it is empty.
    pub fn pick<'a, T>(&mut self, list: &'a [T]) -> Option<&'a T> {
        let last = list.len().checked_sub(1)?;
        list.get(usize::try_from(self.between(0, last as u64)).ok()?)
    }

    /// One of a list of weights and things; `None` where there is no weight.
    pub fn weighed<T: Copy>(&mut self, list: &[(u64, T)]) -> Option<T> {
        let sum: u64 = list.iter().map(|(weight, _)| weight).sum();
        let mut at = self.between(1, sum.max(1));
        for (weight, thing) in list {
            if at <= *weight {
                return Some(*thing);
            }
            at -= weight;
        }
        None
    }

    /// A time from `low` to `high` milliseconds.
    pub fn millis(&mut self, low: u64, high: u64) -> Duration {
        Duration::from_millis(self.between(low, high))
    }

    /// A UUID (version 4) for a request.
    pub fn uuid(&mut self) -> String {
        let wide = (u128::from(self.next()) << 64) | u128::from(self.next());
        uuid::Builder::from_random_bytes(wide.to_be_bytes())
            .into_uuid()
            .to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_and_part_give_the_same_numbers_and_another_part_does_not() {
        let draw = |seed, part| {
            let mut random = Random::new(seed, part);
            [random.next(), random.next(), random.next()]
        };
        assert_eq!(draw(7, 1), draw(7, 1));
        assert_ne!(draw(7, 1), draw(7, 2));
        assert_ne!(draw(7, 1), draw(8, 1));
    }

    #[test]
    fn what_has_no_weight_is_never_chosen() {
        let mut random = Random::new(1, 1);
        for _ in 0..1000 {
            assert_eq!(random.weighed(&[(0, 'a'), (3, 'b'), (0, 'c')]), Some('b'));
        }
        assert_eq!(random.weighed(&[(0, 'a')]), None);
        assert_eq!(random.pick::<u8>(&[]), None);
    }
}
