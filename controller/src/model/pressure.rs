//! When a host closes itself for new VMs, and when it opens again.
//!
//! A load comes and goes; a host that closed and opened with every sample would send creations back and forth. So it closes once it has been short
//! at every sample for [`CLOSES_AFTER`], and opens once it has been well at every sample for [`OPENS_AFTER`]. Pure.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

use crate::placement::Strain;

/// So long short before it closes.
const CLOSES_AFTER: Duration = Duration::from_secs(60);
/// So long well before it opens again.
const OPENS_AFTER: Duration = Duration::from_secs(300);

/// What became of a host under its load. Only remembered while the controller runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pressure {
    /// Since when it is closed, by the wall clock.
    closed: Option<Timestamp>,
    /// Since when each sample has spoken for a change: of one that is short, or of one that is closed and well.
    turning: Option<Instant>,
}

impl Pressure {
    /// Since when it takes no new VMs; `None` while it does.
    pub fn closed(&self) -> Option<Timestamp> {
        self.closed
    }

    /// After one more sample.
    #[must_use]
    pub fn after(self, strain: Strain, at: Instant, now: Timestamp) -> Self {
        let (turns, wait) = match self.closed {
            None => (strain == Strain::Short, CLOSES_AFTER),
            Some(_) => (strain == Strain::Well, OPENS_AFTER),
        };
        let since = turns.then(|| self.turning.unwrap_or(at));
        match since {
            Some(since) if at.saturating_duration_since(since) >= wait => Self {
                closed: self.closed.is_none().then_some(now),
                turning: None,
            },
            turning => Self { turning, ..self },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What becomes of an open host at samples ten seconds apart: the numbers of those after which it closes or opens.
    fn turns(samples: impl IntoIterator<Item = Strain>) -> Vec<usize> {
        let (start, now) = (Instant::now(), Timestamp::UNIX_EPOCH);
        let mut pressure = Pressure::default();
        let mut turns = Vec::new();
        for (number, strain) in samples.into_iter().enumerate() {
            let before = pressure.closed().is_some();
            let at = start + Duration::from_secs(10) * u32::try_from(number).unwrap();
            pressure = pressure.after(strain, at, now);
            if pressure.closed().is_some() != before {
                turns.push(number);
            }
        }
        turns
    }

    #[test]
    fn a_host_closes_after_a_minute_without_a_pause_and_opens_after_five() {
        use Strain::{Short, Some, Well};
        let series = |parts: &[(Strain, usize)]| {
            let all = parts.iter().flat_map(|(strain, count)| [*strain].repeat(*count));
            turns(all)
        };
        let nothing: [usize; 0] = [];
        assert_eq!(series(&[(Short, 6)]), nothing, "not yet");
        assert_eq!(series(&[(Short, 7)]), [6]);
        assert_eq!(series(&[(Short, 6), (Some, 1), (Short, 6)]), nothing, "a pause");
        assert_eq!(series(&[(Some, 100)]), nothing);
        assert_eq!(series(&[(Short, 7), (Well, 31)]), [6, 37]);
        assert_eq!(
            series(&[(Short, 7), (Well, 30), (Some, 1), (Well, 30)]),
            [6],
            "not well all the time"
        );
        assert_eq!(
            series(&[(Short, 7), (Some, 100)]),
            [6],
            "it is closed while in doubt"
        );
        assert_eq!(series(&[(Short, 7), (Well, 31), (Short, 7)]), [6, 37, 44]);
    }
}
