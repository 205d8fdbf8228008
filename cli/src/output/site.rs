//! What the site looks like. Pure.

use std::borrow::Cow;

use dalgu_proto::v1;
use jiff::Timestamp;

use super::{BAD, Cell, GOOD, Resource, WARN, human};

impl Resource for v1::Site {
    const MESSAGE: &'static str = "dalgu.v1.Site";
    const PLURAL: &'static str = "sites";

    fn key(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.cluster_id)
    }

    fn columns(_wide: bool) -> &'static [&'static str] {
        &["SITE", "INCARNATION", "STATE", "DIFFERENCES"]
    }

    fn row(&self, _wide: bool, _now: Timestamp) -> Vec<Cell> {
        let state = match (&*self.replaced_by, self.observing) {
            ("", false) => Cell::painted("in charge", GOOD),
            ("", true) => Cell::painted("observing", WARN),
            _ => Cell::painted("replaced", BAD),
        };
        vec![
            Cell::plain(&self.cluster_id),
            Cell::plain(self.incarnation.to_string()),
            state,
            Cell::plain(self.differences.len().to_string()),
        ]
    }

    fn describe(&self, now: Timestamp) -> human::Page {
        let mut page = human::Page::default();
        page.line("Site", &self.cluster_id)
            .line("Incarnation", self.incarnation.to_string())
            .line("Term", self.term.to_string());
        match (&*self.replaced_by, self.observing) {
            ("", false) => page.line("State", "in charge"),
            ("", true) => page.line(
                "State",
                "observing: a backup was restored, and nobody is commanded",
            ),
            (by, _) => page.line("State", format!("agents obey another controller: {by}")),
        };
        if self.observing {
            page.line("Since", human::age(self.observe_since.as_ref(), now))
                .line("Waiting for", human::or_dash(&self.waiting_hosts.join(", ")))
                .line("Waived", human::or_dash(&self.waived_hosts.join(", ")));
        }
        if !self.differences.is_empty() {
            page.line("ETag", &self.etag);
        }
        let row = |difference: &v1::SiteDifference| {
            vec![
                Cell::plain(&difference.vm),
                Cell::plain(human::value::<v1::SiteDifferenceKind>(difference.kind)),
                Cell::plain(human::or_dash(&difference.hosts.join(", "))),
                Cell::plain(&difference.in_store),
                Cell::plain(&difference.on_hosts),
                Cell::plain(&difference.consequence),
            ]
        };
        if !self.differences.is_empty() {
            let columns = ["VM", "KIND", "HOSTS", "STORE SAYS", "HOSTS SAY", "RESUMING"];
            page.table(
                "Differences",
                &columns,
                self.differences.iter().map(row).collect(),
            );
        }
        page
    }
}
