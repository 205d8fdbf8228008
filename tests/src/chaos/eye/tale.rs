//! What one guest says on its serial line, over all hosts it is on, line by line and in order: each count follows the one
//! before, wherever it is said. Used by the eye. Pure; the files are read elsewhere.
//!
//! A guest that moves goes on in another host's file, perhaps in the middle of a line. Two copies of a guest say the same
//! count twice, or two counts that do not follow each other: no order of the lines then makes one tale.

use std::collections::VecDeque;

/// What was found while reading on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// The guest came up.
    Boot,
    /// The next count.
    Tick(u64),
    /// No file goes on where the tale stands: what was said last, and what the files say instead.
    Break(String),
}

/// One file of a guest.
#[derive(Debug)]
struct Page {
    /// The tale's name for it, for people.
    name: String,
    lines: VecDeque<String>,
    /// The line that has not ended yet.
    rest: Vec<u8>,
}

/// One guest's tale.
#[derive(Debug, Default)]
pub struct Tale {
    pages: Vec<Page>,
    current: usize,
    last: u64,
    /// Readings in a row that ended with lines which do not go on.
    stuck: u32,
}

/// The files are read one after the other, so that the newest may be ahead of the rest; after so many readings it is not.
const PATIENCE: u32 = 3;

const READY: &str = "dalgu-guest ready";

fn tick(line: &str) -> Option<u64> {
    let digits = line.trim().strip_prefix("tick ")?;
    digits.parse().ok()
}

impl Tale {
    /// Takes in a new file. Answers its number.
    pub fn open(&mut self, name: String) -> usize {
        self.pages.push(Page {
            name,
            lines: VecDeque::new(),
            rest: Vec::new(),
        });
        self.pages.len() - 1
    }

    /// Takes in what a file says next.
    pub fn hear(&mut self, page: usize, said: &[u8]) {
        let Some(page) = self.pages.get_mut(page) else {
            return;
        };
        for byte in said {
            if *byte == b'\n' {
                page.lines
                    .push_back(String::from_utf8_lossy(&page.rest).into_owned());
                page.rest.clear();
            } else {
                page.rest.push(*byte);
            }
        }
    }

    /// Goes on as far as the lines go. `boot_due` tells whether the guest may just have ended in the middle of a line.
    pub fn read_on(&mut self, boot_due: bool) -> Vec<Found> {
        let mut found = Vec::new();
        while let Some(next) = self.step(boot_due) {
            found.extend(next);
            self.stuck = 0;
        }
        if self.pages.iter().all(|page| page.lines.is_empty()) {
            self.stuck = 0;
            return found;
        }
        self.stuck += 1;
        if self.stuck >= PATIENCE {
            self.stuck = 0;
            found.push(self.give_up());
        }
        found
    }

    /// One line further; `None` where no file goes on.
    fn step(&mut self, boot_due: bool) -> Option<Option<Found>> {
        let wanted = self.last + 1;
        if let Some(page) = self.pages.get_mut(self.current)
            && let Some(line) = page.lines.front()
        {
            let found = match tick(line) {
                None => line.contains(READY).then_some(Found::Boot),
                Some(count) if count == wanted => Some(Found::Tick(count)),
                // The guest's end came in the middle of the line.
                Some(count) if boot_due && is_cut_off(count, wanted) => None,
                Some(_) => return None,
            };
            page.lines.pop_front();
            self.follow(found.as_ref());
            return Some(found);
        }
        let begun = self
            .pages
            .get(self.current)
            .map(|page| page.rest.clone())
            .unwrap_or_default();
        let other = (0..self.pages.len()).filter(|at| *at != self.current);
        let (at, found) = other
            .filter_map(|at| Some((at, goes_on(&begun, self.pages[at].lines.front()?, wanted)?)))
            .next()?;
        if found.is_some() {
            if let Some(page) = self.pages.get_mut(self.current) {
                page.rest.clear();
            }
            self.current = at;
        }
        self.pages[at].lines.pop_front();
        self.follow(found.as_ref());
        Some(found)
    }

    fn follow(&mut self, found: Option<&Found>) {
        match found {
            Some(Found::Boot) => self.last = 0,
            Some(Found::Tick(count)) => self.last = *count,
            _ => {}
        }
    }

    /// Tells what does not go on, and goes on from there.
    fn give_up(&mut self) -> Found {
        let current = self
            .pages
            .get(self.current)
            .map_or("nowhere", |page| page.name.as_str());
        let mut text = format!("after {} in {current}:", self.last);
        let mut from = None;
        for (at, page) in self.pages.iter().enumerate() {
            if let Some(line) = page.lines.front() {
                text += &format!(
                    " {} says {line:?} (and {} lines more)",
                    page.name,
                    page.lines.len() - 1
                );
                from = from.max(tick(line).map(|count| (count, at)));
            }
        }
        for page in &mut self.pages {
            page.lines
                .retain(|line| tick(line) >= from.map(|(count, _)| count));
        }
        if let Some((count, at)) = from {
            self.current = at;
            self.last = count.saturating_sub(1);
        }
        Found::Break(text)
    }
}

/// Whether a count is the beginning of the wanted one.
fn is_cut_off(count: u64, wanted: u64) -> bool {
    let (count, wanted) = (count.to_string(), wanted.to_string());
    count.len() < wanted.len() && wanted.starts_with(&count)
}

/// How another file's first line goes on with the tale, the beginning of a line in the present file before it. The inner
/// `None` is a line that says nothing.
fn goes_on(begun: &[u8], line: &str, wanted: u64) -> Option<Option<Found>> {
    let joined = format!("{}{line}", String::from_utf8_lossy(begun));
    if [tick(line), tick(&joined)].contains(&Some(wanted)) {
        return Some(Some(Found::Tick(wanted)));
    }
    if line.contains(READY) {
        return Some(Some(Found::Boot));
    }
    tick(line).is_none().then_some(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticks(found: &[Found]) -> Vec<u64> {
        found
            .iter()
            .filter_map(|found| match found {
                Found::Tick(count) => Some(*count),
                _ => None,
            })
            .collect()
    }

    fn breaks(tale: &mut Tale) -> usize {
        let found: Vec<_> = (0..PATIENCE).flat_map(|_| tale.read_on(false)).collect();
        found
            .iter()
            .filter(|found| matches!(found, Found::Break(_)))
            .count()
    }

    #[test]
    fn a_guest_that_moves_in_the_middle_of_a_line_goes_on_in_the_other_file() {
        let mut tale = Tale::default();
        let (one, two) = (tale.open("h1".into()), tale.open("h2".into()));
        tale.hear(one, b"\x1bc\r\ndalgu-guest ready\r\ntick 1\r\ntick 2\r\ntic");
        assert_eq!(ticks(&tale.read_on(false)), [1, 2]);
        tale.hear(two, b"k 3\r\ntick 4\r\n");
        assert_eq!(ticks(&tale.read_on(false)), [3, 4]);
        // And back, into a new file.
        let three = tale.open("h1 again".into());
        tale.hear(three, b"tick 5\r\n");
        assert_eq!(ticks(&tale.read_on(false)), [5]);
        assert_eq!(breaks(&mut tale), 0);
    }

    #[test]
    fn a_line_cut_right_before_its_end_is_not_counted_twice() {
        let mut tale = Tale::default();
        let (one, two) = (tale.open("h1".into()), tale.open("h2".into()));
        tale.hear(one, b"dalgu-guest ready\r\ntick 1\r");
        tale.hear(two, b"\ntick 2\r\n");
        let found: Vec<_> = (0..PATIENCE).flat_map(|_| tale.read_on(false)).collect();
        assert_eq!(ticks(&found), [1, 2]);
    }

    #[test]
    fn a_lost_count_is_a_break() {
        let mut tale = Tale::default();
        let one = tale.open("h1".into());
        tale.hear(one, b"dalgu-guest ready\r\ntick 1\r\ntick 3\r\n");
        assert_eq!(breaks(&mut tale), 1);
        tale.hear(one, b"tick 4\r\n");
        assert_eq!(breaks(&mut tale), 0);
    }

    #[test]
    fn two_copies_that_both_count_are_a_break() {
        let mut tale = Tale::default();
        let (one, two) = (tale.open("h1".into()), tale.open("h2".into()));
        tale.hear(one, b"dalgu-guest ready\r\ntick 1\r\ntick 2\r\ntick 3\r\n");
        tale.hear(two, b"tick 2\r\ntick 3\r\n");
        assert!(breaks(&mut tale) > 0);
    }

    #[test]
    fn a_second_start_while_the_first_copy_runs_is_a_break() {
        let mut tale = Tale::default();
        let (one, two) = (tale.open("h1".into()), tale.open("h2".into()));
        tale.hear(one, b"dalgu-guest ready\r\ntick 1\r\n");
        tale.hear(two, b"dalgu-guest ready\r\ntick 1\r\n");
        tale.read_on(true);
        tale.hear(one, b"tick 2\r\ntick 3\r\n");
        tale.hear(two, b"tick 2\r\n");
        assert!(breaks(&mut tale) > 0);
    }

    #[test]
    fn a_file_read_too_late_is_waited_for() {
        let mut tale = Tale::default();
        let (one, two) = (tale.open("h1".into()), tale.open("h2".into()));
        tale.hear(one, b"dalgu-guest ready\r\ntick 1\r\n");
        tale.hear(two, b"tick 3\r\n");
        assert_eq!(ticks(&tale.read_on(false)), [1]);
        tale.hear(one, b"tick 2\r\n");
        assert_eq!(ticks(&tale.read_on(false)), [2, 3]);
    }

    #[test]
    fn a_count_cut_off_by_death_is_no_break_and_the_next_boot_counts_anew() {
        let mut tale = Tale::default();
        let one = tale.open("h1".into());
        let mut said = "dalgu-guest ready\r\n".to_owned();
        for count in 1..=12 {
            said += &format!("tick {count}\r\n");
        }
        tale.hear(one, said.as_bytes());
        tale.hear(one, b"tick 1\ndalgu-guest ready\r\ntick 1\r\n");
        let found = tale.read_on(true);
        assert_eq!(found.iter().filter(|found| **found == Found::Boot).count(), 2);
        assert_eq!(tale.last, 1);
        assert_eq!(breaks(&mut tale), 0);
    }
}
