//! Pages of lists: how many, from where, and a token that only fits the list it came from.

use dalgu_proto::reason;
use tonic::Status;

use super::request::hash;

const DEFAULT_SIZE: usize = 100;
const MAX_SIZE: usize = 1000;

/// Where a page begins and how long it may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Most items.
    pub size: usize,
    /// Key of the last item of the page before.
    pub after: Option<String>,
    list: String,
}

impl Page {
    /// Reads the two fields of a request. `list` names the list and holds all that must stay the same between pages.
    pub fn of(size: i32, token: &str, list: &str) -> Result<Self, Status> {
        let size = match usize::try_from(size) {
            Ok(0) => DEFAULT_SIZE,
            Ok(size) => size.min(MAX_SIZE),
            Err(_) => return Err(reason::invalid("page_size", "must not be negative")),
        };
        let list = hash(list.as_bytes());
        let bad = || {
            let message =
                "does not belong to this list: begin again without it, and keep the other fields the same";
            reason::invalid("page_token", message)
        };
        let after = match token {
            "" => None,
            token => {
                let text = String::from_utf8(from_hex(token).ok_or_else(bad)?).map_err(|_| bad())?;
                Some(text.strip_prefix(&list).ok_or_else(bad)?.to_owned())
            }
        };
        Ok(Self { size, after, list })
    }

    /// The token of the next page, given the key of this one's last item.
    pub fn next(&self, last: &str) -> String {
        format!("{}{last}", self.list)
            .bytes()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// Takes a page's worth of what matches, and the token of the next page if there is more.
    pub fn take<T>(
        &self,
        mut items: impl Iterator<Item = T>,
        key: impl Fn(&T) -> String,
    ) -> (Vec<T>, String) {
        let taken: Vec<T> = items.by_ref().take(self.size).collect();
        let more = items.next().is_some();
        let token = taken
            .last()
            .filter(|_| more)
            .map(|last| self.next(&key(last)))
            .unwrap_or_default();
        (taken, token)
    }
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text
        .chars()
        .map(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok()))
        .collect::<Option<_>>()?;
    let (pairs, rest) = digits.as_chunks::<2>();
    rest.is_empty()
        .then(|| pairs.iter().map(|[high, low]| high << 4 | low).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_cover_a_list_once_and_end() {
        let all: Vec<_> = (0..25).map(|n| format!("k{n:02}")).collect();
        let (mut token, mut seen) = (String::new(), vec![]);
        loop {
            let page = Page::of(10, &token, "things").unwrap();
            let rest = all
                .iter()
                .filter(|key| page.after.as_ref().is_none_or(|after| *key > after))
                .cloned();
            let (items, next) = page.take(rest, Clone::clone);
            seen.extend(items);
            if next.is_empty() {
                break;
            }
            token = next;
        }
        assert_eq!(seen, all);
    }

    #[test]
    fn sizes_follow_the_documentation() {
        for (given, size) in [(0, 100), (1, 1), (1000, 1000), (1001, 1000), (i32::MAX, 1000)] {
            assert_eq!(Page::of(given, "", "x").unwrap().size, size);
        }
        assert!(Page::of(-1, "", "x").is_err());
    }

    #[test]
    fn a_token_of_another_list_or_of_nobody_is_refused() {
        let token = Page::of(1, "", "vms host=h1").unwrap().next("a");
        assert_eq!(
            Page::of(1, &token, "vms host=h1").unwrap().after.as_deref(),
            Some("a")
        );
        assert!(Page::of(1, &token, "vms host=h2").is_err());
        for bad in ["x", "0", "zz", "ff", "é", "00"] {
            assert!(Page::of(1, bad, "vms").is_err(), "{bad}");
        }
    }
}
