//! From counters to rates: pure, on the clock since boot.
//!
//! A rate needs two readings of one counter. There is none (`None`, `rates_valid` false) for the first reading,
//! after a counter went down (the device or process began anew, or a driver's 32-bit counter wrapped; how often,
//! nobody can know), and when the readings lie too close together to divide by.

use std::{collections::HashMap, time::Duration};

use dalgu_proto::{host::VmUsage, ids::VmId};

/// Least time between two readings; /proc/stat counts in ticks of 10 ms, so below this a rate is mostly rounding.
const LEAST_INTERVAL: Duration = Duration::from_millis(100);

/// One reading of a counter at a time since boot.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reading<T> {
    /// When, since boot.
    pub at: Duration,
    /// What it said.
    pub value: T,
}

/// Seconds between two readings, where they can make a rate.
fn interval(before: Duration, now: Duration) -> Option<f64> {
    now.checked_sub(before)
        .filter(|span| *span >= LEAST_INTERVAL)
        .map(|span| span.as_secs_f64())
}

/// Counts per second between two readings of a whole-number counter.
pub fn per_second(before: Reading<u64>, now: Reading<u64>) -> Option<f64> {
    let counted = now.value.checked_sub(before.value)?;
    // To f64 only after the subtraction: large counters differ in digits that f64 does not hold.
    Some(counted as f64 / interval(before.at, now.at)?)
}

/// Seconds spent per second between two readings of a counter of seconds: how many processors were used.
/// `most` bounds what rounding of the counter's ticks may add.
pub fn busy(before: Reading<f64>, now: Reading<f64>, most: f64) -> Option<f64> {
    let spent = now.value - before.value;
    let rate = spent / interval(before.at, now.at)?;
    (spent >= 0.0 && rate.is_finite()).then(|| rate.min(most.max(0.0)))
}

/// Remembers the processor time of each VM from sample to sample.
///
/// The owner of the VM samples calls [`Self::fill`] with all of them each time.
#[derive(Debug, Default)]
pub struct VmRates {
    last: HashMap<VmId, Reading<f64>>,
}

impl VmRates {
    /// Sets `cpus_busy` and `rates_valid` of every VM sampled at `now` (since boot), and forgets the VMs that are
    /// not among them, so that one that comes back begins anew.
    pub fn fill<'a>(&mut self, now: Duration, vms: impl IntoIterator<Item = (VmId, &'a mut VmUsage)>) {
        let mut seen = HashMap::with_capacity(self.last.len());
        for (id, usage) in vms {
            let reading = Reading {
                at: now,
                value: usage.cpu_seconds_total,
            };
            // QEMU's own threads come on top of the virtual processors, so their number is no bound.
            let rate = self
                .last
                .get(&id)
                .and_then(|before| busy(*before, reading, f64::MAX));
            usage.rates_valid = rate.is_some();
            usage.cpus_busy = rate.unwrap_or(0.0);
            seen.insert(id, reading);
        }
        self.last = seen;
    }

    /// How many VMs are remembered.
    pub fn len(&self) -> usize {
        self.last.len()
    }

    /// Whether no VM is remembered.
    pub fn is_empty(&self) -> bool {
        self.last.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    fn at<T>(millis: u64, value: T) -> Reading<T> {
        Reading {
            at: Duration::from_millis(millis),
            value,
        }
    }

    #[test]
    fn a_rate_is_what_was_counted_over_the_time_it_took() {
        for (before, now, expected) in [
            (at(1_000, 10), at(2_000, 30), Some(20.0)),
            (at(1_000, 10), at(3_500, 35), Some(10.0)),
            (at(1_000, 10), at(2_000, 10), Some(0.0)),
            // a reset, or a wrap of 32 bits
            (at(1_000, 10), at(2_000, 9), None),
            (at(1_000, u64::from(u32::MAX)), at(2_000, 5), None),
            (at(1_000, u64::MAX), at(2_000, 0), None),
            // differences that f64 would lose
            (at(0, u64::MAX - 3), at(1_000, u64::MAX), Some(3.0)),
            // too close, the same, backwards
            (at(1_000, 10), at(1_099, 30), None),
            (at(1_000, 10), at(1_000, 30), None),
            (at(2_000, 10), at(1_000, 30), None),
        ] {
            assert_eq!(per_second(before, now), expected, "{before:?} {now:?}");
        }
    }

    #[test]
    fn processors_in_use_never_exceed_those_there_are() {
        for (before, now, expected) in [
            (at(0, 1.0), at(2_000, 4.0), Some(1.5)),
            (at(0, 1.0), at(1_000, 6.0), Some(4.0)),
            (at(0, 4.0), at(1_000, 1.0), None),
            (at(0, f64::NAN), at(1_000, 1.0), None),
            (at(0, 0.0), at(1_000, f64::INFINITY), None),
        ] {
            assert_eq!(busy(before, now, 4.0), expected, "{before:?} {now:?}");
        }
    }

    proptest! {
        #[test]
        fn no_rate_is_negative_or_endless(a: u64, b: u64, before: u64, now: u64) {
            let (before, now) = (Reading { at: Duration::from_nanos(before), value: a }, Reading { at: Duration::from_nanos(now), value: b });
            if let Some(rate) = per_second(before, now) {
                prop_assert!(rate >= 0.0 && rate.is_finite());
                prop_assert!(now.value >= before.value && now.at > before.at);
            }
        }

        #[test]
        fn no_share_is_negative_endless_or_above_its_bound(a: f64, b: f64, before: u64, now: u64, most in 0.0..1e4) {
            let (before, now) = (Reading { at: Duration::from_nanos(before), value: a }, Reading { at: Duration::from_nanos(now), value: b });
            if let Some(share) = busy(before, now, most) {
                prop_assert!((0.0..=most).contains(&share));
            }
        }

        /// Against a model: a counter that grows by `steps` a second and is set to 0 wherever a step is `None`.
        #[test]
        fn resets_cost_one_sample_each_and_nothing_else(steps in prop::collection::vec(prop::option::of(0_u64..1 << 40), 1..40)) {
            let (mut value, mut last) = (1_u64, at(0, 1_u64));
            for (index, step) in steps.iter().enumerate() {
                let was = value;
                value = step.map_or(0, |step| value + step);
                let reading = at((index as u64 + 1) * 1_000, value);
                let expected = if value < was { None } else { Some((value - was) as f64) };
                prop_assert_eq!(per_second(last, reading), expected);
                last = reading;
            }
        }
    }

    fn sampled(rates: &mut VmRates, seconds: u64, vms: &[(u128, f64)]) -> Vec<Option<f64>> {
        let mut usages: Vec<_> = vms
            .iter()
            .map(|(id, cpu)| {
                (
                    VmId::from_uuid(Uuid::from_u128(*id)),
                    VmUsage {
                        cpu_seconds_total: *cpu,
                        ..Default::default()
                    },
                )
            })
            .collect();
        rates.fill(
            Duration::from_secs(seconds),
            usages.iter_mut().map(|(id, usage)| (*id, usage)),
        );
        usages
            .into_iter()
            .map(|(_, usage)| usage.rates_valid.then_some(usage.cpus_busy))
            .collect()
    }

    #[test]
    fn a_vm_has_a_rate_from_its_second_sample_and_none_after_a_restart() {
        let mut rates = VmRates::default();
        assert_eq!(sampled(&mut rates, 1, &[(1, 10.0)]), [None]);
        assert_eq!(sampled(&mut rates, 3, &[(1, 11.0), (2, 50.0)]), [Some(0.5), None]);
        assert_eq!(sampled(&mut rates, 4, &[(1, 0.1), (2, 52.0)]), [None, Some(2.0)]);
        assert_eq!(
            sampled(&mut rates, 5, &[(1, 0.6), (2, 52.0)]),
            [Some(0.5), Some(0.0)]
        );
    }

    #[test]
    fn a_vm_that_went_away_is_forgotten() {
        let mut rates = VmRates::default();
        sampled(&mut rates, 1, &[(1, 1.0), (2, 1.0)]);
        sampled(&mut rates, 2, &[(2, 1.0)]);
        assert_eq!(rates.len(), 1);
        assert_eq!(sampled(&mut rates, 3, &[(1, 5.0), (2, 1.0)]), [None, Some(0.0)]);
        sampled(&mut rates, 4, &[]);
        assert!(rates.is_empty());
    }
}
