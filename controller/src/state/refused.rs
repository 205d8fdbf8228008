//! Requests that were refused a moment ago, so that another copy of one that was under way meanwhile is refused as well.
//!
//! A client that gets no answer asks again under the same id. Its first request may be read after the second was refused, as
//! when the controller had stood still: it must not be carried out then, for nobody waits for it any more. Only memory holds
//! this; what was under way ends with the controller. Used by [`super::Tx`].

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use tokio::time::Instant;

use crate::verbs::Error;

/// For so long: more than a message is under way and a controller stands still in all, and not for long where somebody asks under
/// the same id on purpose.
pub const KEPT: Duration = Duration::from_mins(4);
/// At most so many, the latest.
const MOST: usize = 10_000;

/// See the module.
#[derive(Debug, Default)]
pub struct Refused {
    /// Hash of the content, and why, by who asked and the id.
    known: HashMap<String, (String, Error)>,
    order: VecDeque<(Instant, String)>,
}

impl Refused {
    /// Why a request of the same content was refused.
    pub fn why(&self, key: &str, body: &str) -> Option<&Error> {
        let (known, why) = self.known.get(key)?;
        (known == body).then_some(why)
    }

    /// Remembers a refusal.
    pub fn note(&mut self, now: Instant, key: String, body: String, why: Error) {
        if self.known.insert(key.clone(), (body, why)).is_none() {
            self.order.push_back((now, key));
        }
    }

    /// Forgets what was refused too long ago, and what is too much.
    pub fn forget(&mut self, now: Instant) {
        while let Some((time, key)) = self.order.front()
            && (self.order.len() > MOST || now.duration_since(*time) > KEPT)
        {
            self.known.remove(key);
            self.order.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(refused: &mut Refused, now: Instant, key: &str) {
        refused.note(now, key.into(), "body".into(), Error::VmNotFound(key.into()));
    }

    #[test]
    fn a_refusal_is_known_for_four_minutes_and_by_its_content() {
        let (mut refused, begun) = (Refused::default(), Instant::now());
        note(&mut refused, begun, "a");
        refused.forget(begun + KEPT);
        assert!(refused.why("a", "body").is_some());
        assert!(refused.why("a", "other").is_none());
        assert!(refused.why("b", "body").is_none());
        refused.forget(begun + KEPT + Duration::from_secs(1));
        assert!(refused.why("a", "body").is_none());
        assert!(refused.order.is_empty());
    }

    #[test]
    fn no_more_are_kept_than_the_latest_ten_thousand() {
        let (mut refused, now) = (Refused::default(), Instant::now());
        for number in 0..MOST + 5 {
            note(&mut refused, now, &number.to_string());
        }
        refused.forget(now);
        assert_eq!((refused.order.len(), refused.known.len()), (MOST, MOST));
        assert!(refused.why("4", "body").is_none());
        assert!(refused.why("5", "body").is_some());
    }
}
