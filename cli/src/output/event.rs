//! What an event looks like, in a list and as it comes. Pure.

use std::borrow::Cow;

use dalgu_proto::v1;
use jiff::Timestamp;

use super::{BAD, Cell, Resource, human};

impl Resource for v1::Event {
    const MESSAGE: &'static str = "dalgu.v1.Event";
    const PLURAL: &'static str = "events";

    fn key(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.reason)
    }

    fn columns(wide: bool) -> &'static [&'static str] {
        if wide {
            &[
                "TIME",
                "KIND",
                "SUBJECT",
                "REASON",
                "MESSAGE",
                "OPERATION",
                "VERSION",
            ]
        } else {
            &["TIME", "KIND", "SUBJECT", "REASON", "MESSAGE"]
        }
    }

    fn row(&self, wide: bool, _now: Timestamp) -> Vec<Cell> {
        let bad = ["Failed", "Unreachable", "Crashed", "Lost"]
            .iter()
            .any(|word| self.reason.contains(word));
        let reason = if bad {
            Cell::painted(&self.reason, BAD)
        } else {
            Cell::plain(&self.reason)
        };
        let mut row = vec![
            Cell::plain(human::clock(self.time.as_ref())),
            Cell::plain(human::value::<v1::EventKind>(self.kind).to_ascii_lowercase()),
            Cell::plain(human::or_dash(&self.subject)),
            reason,
            Cell::plain(human::or_dash(&self.message)),
        ];
        if wide {
            row.push(Cell::plain(human::or_dash(&self.operation_id)));
            row.push(Cell::plain(self.resource_version.to_string()));
        }
        row
    }

    fn describe(&self, _now: Timestamp) -> human::Page {
        let mut page = human::Page::default();
        page.line("Time", human::clock(self.time.as_ref()))
            .line("Reason", &self.reason)
            .line("Message", &self.message);
        page
    }
}
