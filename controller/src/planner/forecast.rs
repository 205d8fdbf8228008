//! What a VM is going to use of the processors, from what it has used.
//!
//! A VM keeps a few samples, five minutes apart. In the long run the mean of all is expected, with a pull towards the last; next, what the last
//! says, with a pull towards the mean. A VM that has hardly been seen counts as if it were to vary somewhat, and one that has not been seen at all
//! as fully busy: nothing is packed on the strength of what is not known.
//!
//! The weights below were chosen on one day of the PlanetLab traces (20110303); `make bench-planner` measures with them.

use super::Load;

/// Samples that are kept.
const KEPT: usize = 32;
/// How far the last sample draws what is expected in the long run.
const LAST_IN_MEAN: f64 = 0.2;
/// How far it draws what is expected next.
const LAST_IN_NEXT: f64 = 0.9;
/// Standard deviation of a VM that has not been seen to vary, as a share of its size.
const UNSEEN_DEVIATION: f64 = 0.033;
/// How many samples that counts for.
const UNSEEN_SAMPLES: f64 = 2.0;

/// The last samples of one VM: processors used, each the mean over the time since the one before.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Samples {
    values: [f32; KEPT],
    /// How many there have been.
    count: usize,
}

impl Samples {
    /// Adds one; the oldest goes when there are enough.
    pub fn push(&mut self, cpus: f32) {
        self.values[self.count % KEPT] = cpus;
        self.count += 1;
    }

    /// How many are kept.
    pub fn len(&self) -> usize {
        self.count.min(KEPT)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The last one first.
    pub fn newest(&self) -> impl Iterator<Item = f64> {
        let kept = self.count - self.len()..self.count;
        kept.rev().map(|at| f64::from(self.values[at % KEPT]))
    }

    /// What is expected of a VM of this size, in processors.
    pub fn load(&self, size: f64) -> Load {
        let kept = &self.values[..self.len()];
        let Some(last) = self
            .count
            .checked_sub(1)
            .map(|last| f64::from(self.values[last % KEPT]))
        else {
            return Load {
                mean: size,
                variance: 0.0,
                next: size,
            };
        };
        #[expect(clippy::cast_precision_loss, reason = "a few")]
        let count = kept.len() as f64;
        let mean = kept.iter().map(|value| f64::from(*value)).sum::<f64>() / count;
        let squares: f64 = kept.iter().map(|value| (f64::from(*value) - mean).powi(2)).sum();
        let unseen = (UNSEEN_DEVIATION * size).powi(2) * UNSEEN_SAMPLES;
        Load {
            mean: mean + LAST_IN_MEAN * (last - mean),
            variance: (squares + unseen) / (count + UNSEEN_SAMPLES),
            next: mean + LAST_IN_NEXT * (last - mean),
        }
    }
}
