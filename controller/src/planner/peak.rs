//! The most that VMs are going to use together, from what each used at most in every hour of a week.
//!
//! VMs that share a host are not all busy at once, but some of them always are at the same time: nightly backups, the first hour of an office day. So neither
//! the sum of their peaks nor a distribution around their means says what a host comes to. What is added up here is the VMs' peaks of the *same* hour, and the
//! fullest hour of the week is what is expected: a little more than has been seen, as the VMs' peaks within an hour need not meet.
//!
//! ```text
//!   expected  =  max over hours h of the last week   Σ over VMs   the most that the VM used in h
//! ```
//!
//! Of an hour in which a VM was not seen its own highest is taken, and all of its size until it has been seen for a day: nothing is packed on the strength of what
//! is not known. A week of one VM takes 672 bytes, so that this goes along with a VM wherever it moves. On a month of 500 VMs (Bitbrains 2013-8, hosts of 20)
//! a host exceeded what was expected in far fewer hours than with any simple rule that reserves as much; see docs/operations/simulator.md.

/// Hours of a week.
pub const HOURS: usize = 168;
/// Hours of a day.
const DAY: usize = 24;
/// Hours after which a VM counts as known.
const KNOWN: usize = DAY;

/// For each hour of a week, by the hour's number modulo [`HOURS`]: what is used then, of whatever is counted.
pub type Week = [f64; HOURS];

/// What one VM used at most in each hour of the last week.
#[derive(Debug, Clone, PartialEq)]
pub struct Peaks {
    /// Not a number where it was not seen.
    hours: Box<[f32; HOURS]>,
    last: Option<u64>,
}

impl Default for Peaks {
    fn default() -> Self {
        Self {
            hours: Box::new([f32::NAN; HOURS]),
            last: None,
        }
    }
}

fn place(hour: u64) -> usize {
    usize::try_from(hour % HOURS as u64).unwrap_or(0)
}

impl Peaks {
    /// It used so much in an hour; hours never go back.
    pub fn push(&mut self, hour: u64, used: f32) {
        let last = self.last.filter(|last| *last <= hour);
        if last == Some(hour) {
            let most = &mut self.hours[place(hour)];
            *most = most.max(used);
            return;
        }
        // It was not seen in between: what was a week before is forgotten.
        let unseen = last.map_or(0..0, |last| last + 1..hour);
        for hour in unseen.take(HOURS) {
            self.hours[place(hour)] = f32::NAN;
        }
        self.hours[place(hour)] = used;
        self.last = Some(hour);
    }

    /// What it used at most in each hour of the week, by the hours' numbers modulo [`HOURS`], and the last of these hours; `None` where it was never seen.
    pub fn known(&self) -> Option<(u64, impl Iterator<Item = Option<f32>>)> {
        let hours = self.hours.iter().map(|used| (!used.is_nan()).then_some(*used));
        Some((self.last?, hours))
    }

    /// As [`Peaks::known`] gave it.
    pub fn restored(last: u64, hours: impl IntoIterator<Item = Option<f32>>) -> Self {
        let mut peaks = Self::default();
        for (most, used) in peaks.hours.iter_mut().zip(hours) {
            *most = used.unwrap_or(f32::NAN);
        }
        peaks.last = Some(last);
        peaks
    }

    /// What is expected of it in each hour, if it can use no more than its size.
    pub fn week(&self, size: f64) -> Week {
        let known = self.hours.iter().filter(|used| !used.is_nan());
        let unseen = match known.clone().count() {
            KNOWN.. => known.copied().fold(0.0, f32::max).into(),
            _ => size,
        };
        self.hours
            .map(|used| if used.is_nan() { unseen } else { used.into() })
    }

    /// What was seen of it in each hour, else the most in the same hour of another day; 0 where that was not seen either.
    pub fn seen(&self) -> Week {
        let day = |hour: usize| {
            let days = self.hours.iter().skip(hour % DAY).step_by(DAY);
            days.copied().fold(0.0, f32::max)
        };
        std::array::from_fn(|hour| match self.hours[hour] {
            used if used.is_nan() => day(hour).into(),
            used => used.into(),
        })
    }
}

/// The fullest hour.
pub fn fullest(week: &Week) -> usize {
    let later = |best: usize, hour: usize| if week[hour] > week[best] { hour } else { best };
    (1..HOURS).fold(0, later)
}

/// What is used in the fullest hour, with another week's use too.
pub fn together(week: &Week, more: &Week) -> f64 {
    let sums = week.iter().zip(more).map(|(a, b)| a + b);
    sums.fold(0.0, f64::max)
}

/// Adds another week's use, or takes it away again.
pub fn add(week: &mut Week, more: &Week, sign: f64) {
    for (sum, value) in week.iter_mut().zip(more) {
        *sum += sign * value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(peaks: impl IntoIterator<Item = (u64, f32)>) -> Peaks {
        let mut seen = Peaks::default();
        peaks.into_iter().for_each(|(hour, used)| seen.push(hour, used));
        seen
    }

    #[test]
    fn a_vm_counts_in_full_until_it_has_been_seen_for_a_day() {
        let day = |hours: u64| seen((0..hours).map(|hour| (hour, 1.0)));
        assert_eq!(day(0).week(4.0), [4.0; HOURS]);
        assert_eq!(day(23).week(4.0)[100], 4.0);
        assert_eq!(day(23).week(4.0)[5], 1.0);
        assert_eq!(day(24).week(4.0), [1.0; HOURS]);
    }

    #[test]
    fn the_most_of_an_hour_is_kept_for_a_week_and_hours_unseen_are_taken_as_its_highest() {
        let mut peaks = seen((0..24).map(|hour| (hour, 1.0)));
        peaks.push(24, 2.0);
        peaks.push(24, 3.0);
        peaks.push(24, 0.5);
        assert_eq!((peaks.week(4.0)[24], peaks.week(4.0)[100]), (3.0, 3.0));
        // A week later, but for hours 25 to 191 in which it was not seen: 23 hours of the day before are forgotten.
        peaks.push(168 + 24, 0.25);
        assert_eq!(peaks.week(4.0)[24], 0.25);
        assert_eq!(peaks.week(4.0)[0], 4.0);
    }

    #[test]
    fn what_was_seen_of_an_hour_stands_for_that_hour_of_other_days() {
        let peaks = seen([(9, 2.0), (9 + 24, 3.0), (10, 1.0)]);
        let week = peaks.seen();
        assert_eq!((week[9], week[9 + 24], week[9 + 48]), (2.0, 3.0, 3.0));
        assert_eq!((week[10 + 48], week[11]), (1.0, 0.0));
    }

    #[test]
    fn peaks_of_the_same_hour_add_up_and_those_of_others_do_not() {
        let busy_at = |at: u64| seen((0..168).map(move |hour| (hour, if hour == at { 4.0 } else { 1.0 })));
        let (first, same, other) = (busy_at(9).week(4.0), busy_at(9).week(4.0), busy_at(20).week(4.0));
        assert_eq!(together(&first, &same), 8.0);
        assert_eq!(together(&first, &other), 5.0);
        let mut sum = first;
        add(&mut sum, &other, 1.0);
        assert_eq!(fullest(&sum), 9);
        add(&mut sum, &first, -1.0);
        assert_eq!(sum, other);
    }
}
