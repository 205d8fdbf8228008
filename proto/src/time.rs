//! The wall clock, and what lies between the clock types of the project and those of the wire.
//!
//! [`jiff::Timestamp`] is wall-clock time throughout Dalgu and [`std::time::Duration`] a span. The programs read the
//! wall clock through a [`Clock`] alone, so that a test can give them another; how long something takes is
//! `tokio::time`'s business.

use std::{fmt, sync::Arc, time::Duration};

use jiff::Timestamp;

/// Most seconds of a `google.protobuf.Duration`: 10,000 years (its documentation).
const MAX_DURATION_SECONDS: u64 = 315_576_000_000;

/// Where a program reads the wall clock. Cheap to clone; all clones read the same clock.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> Timestamp + Send + Sync>);

impl Clock {
    /// The machine's clock.
    pub fn system() -> Self {
        Self::from_fn(Timestamp::now)
    }

    /// A clock of somebody else's making; asked at every reading.
    pub fn from_fn(read: impl Fn() -> Timestamp + Send + Sync + 'static) -> Self {
        Self(Arc::new(read))
    }

    /// What it shows. May go back, as any wall clock.
    pub fn now(&self) -> Timestamp {
        (self.0)()
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Clock").field(&self.now()).finish()
    }
}

/// A timestamp for the wire; exact, also before 1970.
pub fn to_wire(time: Timestamp) -> prost_types::Timestamp {
    // jiff gives both parts the same sign; the wire wants nanoseconds that count up.
    let (seconds, nanos) = (time.as_second(), time.subsec_nanosecond());
    if nanos < 0 {
        prost_types::Timestamp {
            seconds: seconds - 1,
            nanos: nanos + 1_000_000_000,
        }
    } else {
        prost_types::Timestamp { seconds, nanos }
    }
}

/// A timestamp from the wire; `None` where it is out of the allowed range.
pub fn from_wire(time: &prost_types::Timestamp) -> Option<Timestamp> {
    if !(0..1_000_000_000).contains(&time.nanos) {
        return None;
    }
    Timestamp::new(time.seconds, time.nanos).ok()
}

/// A span for the wire, cut to the 10,000 years it allows.
pub fn duration_to_wire(span: Duration) -> prost_types::Duration {
    let span = span.min(Duration::from_secs(MAX_DURATION_SECONDS));
    prost_types::Duration {
        seconds: i64::try_from(span.as_secs()).expect("at most MAX_DURATION_SECONDS"),
        nanos: i32::try_from(span.subsec_nanos()).expect("below one thousand million"),
    }
}

/// A span from the wire; `None` where it is negative or malformed.
pub fn duration_from_wire(span: &prost_types::Duration) -> Option<Duration> {
    let seconds = u64::try_from(span.seconds)
        .ok()
        .filter(|seconds| *seconds <= MAX_DURATION_SECONDS)?;
    let nanos = u32::try_from(span.nanos)
        .ok()
        .filter(|nanos| *nanos < 1_000_000_000)?;
    Some(Duration::new(seconds, nanos))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_timestamp_survives_the_wire(seconds in -62_135_596_800_i64..253_402_200_000, nanos in 0..1_000_000_000_i32) {
            let time = Timestamp::new(seconds, nanos).unwrap();
            let wire = to_wire(time);
            prop_assert!((0..1_000_000_000).contains(&wire.nanos));
            prop_assert_eq!(from_wire(&wire), Some(time));
        }

        #[test]
        fn every_span_survives_the_wire(seconds in 0..=MAX_DURATION_SECONDS, nanos in 0..1_000_000_000_u32) {
            let span = Duration::new(seconds, nanos).min(Duration::from_secs(MAX_DURATION_SECONDS));
            prop_assert_eq!(duration_from_wire(&duration_to_wire(span)), Some(span));
        }

        #[test]
        fn nothing_from_the_wire_panics(seconds: i64, nanos: i32) {
            let _ = from_wire(&prost_types::Timestamp { seconds, nanos });
            let _ = duration_from_wire(&prost_types::Duration { seconds, nanos });
        }
    }

    #[test]
    fn a_clock_that_was_handed_in_is_the_one_that_is_read() {
        let clock = Clock::from_fn(|| Timestamp::UNIX_EPOCH);
        assert_eq!(clock.clone().now(), Timestamp::UNIX_EPOCH);
        assert!(Clock::system().now() > clock.now());
    }

    #[test]
    fn a_moment_before_1970_counts_its_nanoseconds_up() {
        let time = Timestamp::new(-1, -500_000_000).unwrap();
        assert_eq!(
            to_wire(time),
            prost_types::Timestamp {
                seconds: -2,
                nanos: 500_000_000
            }
        );
    }

    #[test]
    fn a_span_without_end_is_cut_and_a_negative_one_refused() {
        assert_eq!(duration_to_wire(Duration::MAX).seconds, 315_576_000_000);
        assert_eq!(
            duration_from_wire(&prost_types::Duration {
                seconds: -1,
                nanos: 0
            }),
            None
        );
        assert_eq!(
            duration_from_wire(&prost_types::Duration {
                seconds: 0,
                nanos: -1
            }),
            None
        );
    }
}
