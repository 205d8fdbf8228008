//! What snapshots look like in tables and on their own pages. Pure.

use std::borrow::Cow;

use dalgu_proto::v1;
use jiff::Timestamp;

use super::{BAD, Cell, GOOD, Resource, WARN, human};

fn state(snapshot: &v1::Snapshot) -> Cell {
    use v1::SnapshotState as S;
    let word = human::value::<S>(snapshot.state);
    match snapshot.state() {
        S::Ready => Cell::painted(word, GOOD),
        S::Lost => Cell::painted(word, BAD),
        _ => Cell::painted(word, WARN),
    }
}

const fn consistency(snapshot: &v1::Snapshot) -> &'static str {
    match snapshot.quiesced {
        true => "file systems",
        false => "as after a power cut",
    }
}

impl Resource for v1::Snapshot {
    const MESSAGE: &'static str = "dalgu.v1.Snapshot";
    const PLURAL: &'static str = "snapshots";

    fn key(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.name)
    }

    fn columns(wide: bool) -> &'static [&'static str] {
        const ALL: &[&str] = &["NAME", "STATE", "CONSISTENT", "WRITTEN", "AGE", "LAYER", "LABELS"];
        if wide { ALL } else { &ALL[..5] }
    }

    fn row(&self, wide: bool, now: Timestamp) -> Vec<Cell> {
        let mut row = vec![Cell::plain(self.name.clone()), state(self)];
        let mut rest = vec![
            consistency(self).to_owned(),
            human::bytes(self.written_bytes),
            human::age(self.create_time.as_ref(), now),
        ];
        if wide {
            rest.push(self.layer.to_string());
            rest.push(human::labels(&self.labels));
        }
        row.extend(rest.into_iter().map(Cell::plain));
        row
    }

    fn describe(&self, now: Timestamp) -> human::Page {
        let mut page = human::Page::default();
        page.line("Name", &self.name)
            .line("VM", &self.vm)
            .line("State", human::value::<v1::SnapshotState>(self.state))
            .line("Consistent", consistency(self))
            .line("Written since", human::bytes(self.written_bytes))
            .line("Layer", self.layer.to_string())
            .line_if("Description", &self.description)
            .line("Labels", human::labels(&self.labels))
            .line("Created", human::age(self.create_time.as_ref(), now))
            .line("UID", &self.uid)
            .line("Etag", &self.etag);
        page
    }
}
