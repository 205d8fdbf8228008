//! The over-commit ratio of a host's processors, where the operator lets it follow the host's load within bounds.
//!
//! The ratio says how much is lent, the load how much of that is wanted at the same time. A host on which processors are short takes at once no more than
//! it has; one that has been well for an hour takes a little more than it has shown to bear, and so on, hour after hour. In between, and where nothing is
//! known, it stays as it is: under a constant load no ratio goes up and down. Lowering it refuses new VMs and touches none that is there.
//!
//! Looked at where the last hour of a host is, every five minutes ([`hosts::overcommit`](crate::hosts::overcommit)). Only remembered while the controller
//! runs. Pure. The limits are this project's own judgement, not figures from a paper.

/// Of what VMs share now, so much is what a host takes on which they are short.
const LOWERED: f64 = 0.9;
/// Looks in a row at which a host is well before it takes more: an hour.
const RAISED_AFTER: u8 = 12;
/// So much of the ratio is lent before more is: what nobody wants needs no more room, and nothing is known of how it would be.
const LENT: f64 = 0.8;
/// Ratios that the load gives are multiples of this, so that hosts of a model have few different capacities.
const STEP: f64 = 0.25;
/// From this step of its load on a host is short of processors.
const SHORT: u8 = 2;

/// Between which ratios a host's own may move.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds {
    /// At least so many virtual processors for each logical one.
    pub least: f64,
    /// At most so many.
    pub most: f64,
}

impl Default for Bounds {
    /// No ratio moves.
    fn default() -> Self {
        Self {
            least: 1.0,
            most: 1.0,
        }
    }
}

impl Bounds {
    /// Whether a host adapts whose ratio by its operator is this: one that is beyond the bounds is meant as it is.
    pub fn adapt(&self, own: f64) -> bool {
        self.least < self.most && (self.least..=self.most).contains(&own)
    }

    /// The most that a host with this ratio of its own may ever lend.
    pub fn most(&self, own: f64) -> f64 {
        if self.adapt(own) { self.most } else { own }
    }
}

/// What is seen of a host at one look.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Seen {
    /// Virtual processors that VMs share there, for each logical one that they share.
    pub lent: f64,
    /// Step of how short processors are there, and the same with what is expected ([`placement::processors`](crate::placement::processors)); `None`
    /// where that is not known.
    pub load: Option<(u8, u8)>,
}

/// What became of a host's ratio under its load.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Overcommit {
    /// Which ratio of the operator's it began with, and what it is now; `None` where it is the operator's.
    adapted: Option<(f64, f64)>,
    /// Looks in a row at which the host was well.
    well: u8,
}

impl Overcommit {
    /// The ratio that counts for a host with this one of its own.
    pub fn ratio(&self, own: f64, bounds: Bounds) -> f64 {
        // What the operator says anew is where it begins anew.
        let adapted = self.adapted.filter(|(from, _)| *from == own && bounds.adapt(own));
        adapted.map_or(own, |(_, ratio)| ratio.clamp(bounds.least, bounds.most))
    }

    /// After one more look.
    #[must_use]
    pub fn after(self, own: f64, bounds: Bounds, seen: Seen) -> Self {
        if !bounds.adapt(own) {
            return Self::default();
        }
        let now = self.ratio(own, bounds);
        let of = |ratio: f64, well| Self {
            adapted: (ratio != own).then_some((own, ratio)),
            well,
        };
        match seen.load {
            None => of(now, self.well),
            Some((short, _)) if short >= SHORT => {
                let bears = (seen.lent * LOWERED / STEP).floor() * STEP;
                of(now.min(bears.max(bounds.least)), 0)
            }
            Some((_, 0)) if self.well + 1 < RAISED_AFTER => of(now, self.well + 1),
            // What the operator has said may be lent needs no proof.
            Some((_, 0)) if now < own => of(above(now).min(own), 0),
            Some((_, 0)) if seen.lent >= now * LENT => of(above(now).min(bounds.most), 0),
            Some((_, 0)) => of(now, self.well),
            Some(_) => of(now, 0),
        }
    }
}

/// The next step.
fn above(ratio: f64) -> f64 {
    ((ratio / STEP).floor() + 1.0) * STEP
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOUNDS: Bounds = Bounds {
        least: 2.0,
        most: 6.0,
    };

    /// A host whose own ratio is four, after so many looks of each kind.
    fn ratio(looks: &[(Seen, usize)]) -> f64 {
        let all = looks.iter().flat_map(|(seen, times)| [*seen].repeat(*times));
        let after = all.fold(Overcommit::default(), |before, seen| {
            before.after(4.0, BOUNDS, seen)
        });
        after.ratio(4.0, BOUNDS)
    }

    fn seen(lent: f64, load: impl Into<Option<(u8, u8)>>) -> Seen {
        Seen {
            lent,
            load: load.into(),
        }
    }

    #[test]
    fn a_ratio_falls_at_once_rises_by_the_hour_and_stays_in_between() {
        let (short, fair, well) = (seen(3.5, (2, 2)), seen(3.5, (1, 1)), seen(3.5, (0, 0)));
        assert_eq!(ratio(&[(fair, 100)]), 4.0, "nothing calls for a change");
        assert_eq!(ratio(&[(seen(3.5, None), 100)]), 4.0, "nothing is known");
        assert_eq!(
            ratio(&[(short, 1)]),
            3.0,
            "nine tenths of what is lent, in quarters"
        );
        assert_eq!(
            ratio(&[(short, 100)]),
            3.0,
            "and no further while no more is lent"
        );
        assert_eq!(ratio(&[(seen(1.0, (3, 3)), 1)]), 2.0, "the bound");
        assert_eq!(ratio(&[(short, 1), (fair, 100)]), 3.0);
        assert_eq!(ratio(&[(short, 1), (well, 11)]), 3.0, "not for an hour yet");
        assert_eq!(ratio(&[(short, 1), (well, 12)]), 3.25);
        assert_eq!(
            ratio(&[(short, 1), (well, 11), (fair, 1), (well, 11)]),
            3.0,
            "a pause"
        );
        assert_eq!(ratio(&[(well, 12)]), 4.25, "it has shown to bear what it lends");
        assert_eq!(ratio(&[(seen(5.8, (0, 0)), 1000)]), 6.0, "the other bound");
    }

    #[test]
    fn only_what_is_lent_and_borne_lets_more_be_lent_than_the_operator_said() {
        let idle = seen(1.0, (0, 0));
        assert_eq!(ratio(&[(idle, 1000)]), 4.0);
        assert_eq!(
            ratio(&[(seen(3.5, (2, 2)), 1), (idle, 1000)]),
            4.0,
            "back at what was said"
        );
        assert_eq!(
            ratio(&[(seen(3.5, (0, 1)), 1000)]),
            4.0,
            "a full hour is expected"
        );
    }

    #[test]
    fn equal_bounds_or_a_ratio_beyond_them_leave_a_host_as_it_is() {
        let short = seen(3.5, (3, 3));
        let own = |own: f64, bounds| Overcommit::default().after(own, bounds, short).ratio(own, bounds);
        assert_eq!(own(4.0, Bounds::default()), 4.0);
        assert_eq!(own(1.0, BOUNDS), 1.0, "never over-committed");
        assert_eq!(own(16.0, BOUNDS), 16.0);
        let lowered = Overcommit::default().after(4.0, BOUNDS, short);
        assert_eq!(
            lowered.ratio(5.0, BOUNDS),
            5.0,
            "the operator has said something new"
        );
        assert_eq!(lowered.ratio(4.0, Bounds::default()), 4.0);
    }

    proptest! {
        #[test]
        fn a_ratio_stays_within_its_bounds_and_moves_one_way_under_a_constant_load(
            own in 2.0..6.0_f64,
            looks in proptest::collection::vec((0.0..8.0_f64, proptest::option::of((0..4_u8, 0..4_u8))), 0..60),
            last in (0.0..8.0_f64, (0..4_u8, 0..4_u8)),
        ) {
            let look = |(lent, load): (f64, Option<(u8, u8)>)| {
                Seen { lent, load: load.map(|(now, expected)| (now, expected.max(now))) }
            };
            let mut at = Overcommit::default();
            for one in looks {
                let (before, seen) = (at.ratio(own, BOUNDS), look(one));
                at = at.after(own, BOUNDS, seen);
                let now = at.ratio(own, BOUNDS);
                prop_assert!((BOUNDS.least..=BOUNDS.most).contains(&now));
                prop_assert!(now <= before + STEP, "slowly up");
                prop_assert!(now <= before || seen.load.is_some_and(|(_, expected)| expected == 0));
            }
            let constant = look((last.0, Some(last.1)));
            let mut series = vec![at.ratio(own, BOUNDS)];
            for _ in 0..400 {
                at = at.after(own, BOUNDS, constant);
                series.push(at.ratio(own, BOUNDS));
            }
            let (rises, falls) = (
                series.windows(2).any(|two| two[0] < two[1]),
                series.windows(2).any(|two| two[0] > two[1]),
            );
            prop_assert!(!(rises && falls), "{series:?}");
        }
    }
}
