//! The wall clock, and what lies between the clock types of the project and those of the wire.
//!
//! [`jiff::Timestamp`] is wall-clock time throughout Dalgu and [`std::time::Duration`] a span. The programs read the
//! wall clock through a [`Clock`] alone, so that a test can give them another; how long something takes is
//! `tokio::time`'s business.

use std::{fmt, str::FromStr, sync::Arc, time::Duration};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::ids::shorten;

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

/// A time of day, in UTC or at a fixed distance from it: `02:00`, `02:00+09:00`. Without the name of a zone it means the same on every
/// machine, and on every day of the year.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct TimeOfDay {
    /// Minutes after midnight.
    minute: u16,
    /// So many minutes its midnight comes before that of UTC.
    offset: i16,
}

/// A text that is no time of day.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a time of day: write HH:MM for UTC, or with the distance from UTC behind it, as in 02:00+09:00"
)]
pub struct NoTimeOfDay(String);

impl TimeOfDay {
    /// Farthest from UTC that a zone is, in minutes.
    const MAX_OFFSET: u16 = 14 * 60;

    /// The first moment after another at which it is this time of day.
    pub fn after(self, time: Timestamp) -> Timestamp {
        let of_day = (i64::from(self.minute) - i64::from(self.offset)) * 60;
        let anchor = Timestamp::from_second(of_day).expect("within two days of 1970");
        next_of(anchor, Duration::from_secs(86_400), time)
    }
}

/// The first moment after another that is a whole number of steps before or after the anchor. To the second.
pub fn next_of(anchor: Timestamp, step: Duration, time: Timestamp) -> Timestamp {
    let step = i64::try_from(step.as_secs()).unwrap_or(i64::MAX).max(1);
    let from = time.as_second() + 1;
    let wait = (anchor.as_second() - from).rem_euclid(step);
    Timestamp::from_second(from.saturating_add(wait)).unwrap_or(Timestamp::MAX)
}

/// Minutes of `HH:MM`.
fn minutes(text: &str) -> Option<u16> {
    let (hours, minutes) = text.split_once(':')?;
    let number = |text: &str| text.parse().ok().filter(|_| text.len() == 2);
    let (hours, minutes): (u16, u16) = (number(hours)?, number(minutes)?);
    (hours < 24 && minutes < 60).then_some(hours * 60 + minutes)
}

impl FromStr for TimeOfDay {
    type Err = NoTimeOfDay;

    fn from_str(text: &str) -> Result<Self, NoTimeOfDay> {
        let read = || {
            let (time, offset) = text.split_at_checked(5)?;
            let offset = match offset.split_at_checked(1) {
                None => 0,
                Some((sign, offset)) => {
                    let offset = minutes(offset).filter(|offset| *offset <= Self::MAX_OFFSET)?;
                    let offset = i16::try_from(offset).ok()?;
                    if sign == "-" { -offset } else { offset }
                }
            };
            let minute = minutes(time)?;
            Some(Self { minute, offset })
        };
        // There is one way to write each, so that texts can be compared.
        let own = read().filter(|own| own.to_string() == text);
        own.ok_or_else(|| NoTimeOfDay(shorten(text)))
    }
}

impl fmt::Display for TimeOfDay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02}:{:02}", self.minute / 60, self.minute % 60)?;
        let (sign, offset) = (self.offset.signum(), self.offset.unsigned_abs());
        match sign {
            0 => return Ok(()),
            1 => f.write_str("+")?,
            _ => f.write_str("-")?,
        }
        write!(f, "{:02}:{:02}", offset / 60, offset % 60)
    }
}

impl From<TimeOfDay> for String {
    fn from(own: TimeOfDay) -> Self {
        own.to_string()
    }
}

impl TryFrom<String> for TimeOfDay {
    type Error = NoTimeOfDay;

    fn try_from(text: String) -> Result<Self, NoTimeOfDay> {
        text.parse()
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
    fn a_time_of_day_is_written_in_one_way_only() {
        for text in [
            "00:00",
            "02:00",
            "23:59",
            "02:00+09:00",
            "02:00-03:30",
            "12:00+14:00",
            "00:00+00:01",
        ] {
            assert_eq!(
                text.parse::<TimeOfDay>().map(|time| time.to_string()).as_deref(),
                Ok(text)
            );
        }
        for text in [
            "",
            "2:00",
            "02:0",
            "0200",
            "24:00",
            "02:60",
            "02:00Z",
            "02:00+9",
            "02:00+09",
            "02:00+00:00",
            "02:00-00:00",
            "02:00+14:01",
            "02:00 +09:00",
            "+2:00",
            "02:+0",
            " 02:00",
            "02:00\n",
            "둘:00",
            "2026-11-30T02:00",
        ] {
            assert_eq!(
                text.parse::<TimeOfDay>(),
                Err(NoTimeOfDay(text.to_owned())),
                "{text:?}"
            );
        }
    }

    #[test]
    fn a_time_of_day_comes_once_a_day_by_the_clocks_of_its_zone() {
        let next = |text: &str, time: &str| {
            let time = text.parse::<TimeOfDay>().unwrap().after(time.parse().unwrap());
            time.to_string()
        };
        for (text, time, expected) in [
            ("02:00", "2026-11-30T01:59:59.999Z", "2026-11-30T02:00:00Z"),
            ("02:00", "2026-11-30T02:00:00Z", "2026-12-01T02:00:00Z"),
            ("02:00", "2026-11-30T02:00:00.5Z", "2026-12-01T02:00:00Z"),
            ("02:00+09:00", "2026-11-30T00:00:00Z", "2026-11-30T17:00:00Z"),
            ("02:00+09:00", "2026-11-30T17:00:00Z", "2026-12-01T17:00:00Z"),
            ("23:30-03:30", "2026-12-31T12:00:00Z", "2027-01-01T03:00:00Z"),
        ] {
            assert_eq!(next(text, time), expected, "{text} after {time}");
        }
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
