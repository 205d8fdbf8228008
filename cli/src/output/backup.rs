//! What backups and their schedules look like in tables and on their own pages. Pure.

use std::borrow::Cow;

use dalgu_proto::v1;
use jiff::Timestamp;

use super::{BAD, Cell, GOOD, Resource, WARN, human};

fn state_cell(backup: &v1::Backup) -> Cell {
    let word = human::value::<v1::BackupState>(backup.state);
    match backup.state() {
        v1::BackupState::Available => Cell::painted(word, GOOD),
        v1::BackupState::Failed => Cell::painted(word, BAD),
        v1::BackupState::Running if backup.bytes_total > 0 => {
            let share = backup.bytes_done.saturating_mul(100) / backup.bytes_total;
            Cell::painted(format!("{word} {share}%"), WARN)
        }
        _ => Cell::painted(word, WARN),
    }
}

fn size(bytes: u64) -> String {
    match bytes {
        0 => "-".to_owned(),
        bytes => human::bytes(bytes),
    }
}

impl Resource for v1::Backup {
    const MESSAGE: &'static str = "dalgu.v1.Backup";
    const PLURAL: &'static str = "backups";

    fn key(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.uid)
    }

    fn columns(wide: bool) -> &'static [&'static str] {
        const ALL: &[&str] = &[
            "UID", "VM", "STATE", "KIND", "STORED", "POOL", "HOST", "AGE", "SCHEDULE", "QUIESCED", "PARENT",
        ];
        if wide { ALL } else { &ALL[..8] }
    }

    fn row(&self, wide: bool, now: Timestamp) -> Vec<Cell> {
        let mut row = vec![
            Cell::plain(&self.uid),
            Cell::plain(&self.vm),
            state_cell(self),
            Cell::plain(human::value::<v1::BackupKind>(self.kind).to_lowercase()),
            Cell::plain(size(self.stored_bytes)),
            Cell::plain(&self.pool),
            Cell::plain(&self.host),
            Cell::plain(human::age(self.create_time.as_ref(), now)),
        ];
        if wide {
            row.push(Cell::plain(human::or_dash(&self.schedule)));
            row.push(Cell::plain(if self.quiesced { "yes" } else { "no" }));
            row.push(Cell::plain(human::or_dash(&self.parent)));
        }
        row
    }

    fn describe(&self, now: Timestamp) -> human::Page {
        let mut page = human::Page::default();
        page.line("UID", &self.uid)
            .line("VM", &self.vm)
            .painted("State", &state_cell(self));
        if let Some(error) = &self.error {
            let text = format!("{} ({})", error.message, error.reason);
            page.painted("Error", &Cell::painted(text, BAD));
        }
        page.line("Kind", human::value::<v1::BackupKind>(self.kind).to_lowercase())
            .line_if("Full, since", &self.full_reason)
            .line("Parent", human::or_dash(&self.parent))
            .line("Pool", &self.pool)
            .line("Host", &self.host)
            .line("Stored", size(self.stored_bytes))
            .line("Quiesced", if self.quiesced { "yes" } else { "no" })
            .line(
                "Of the moment",
                human::clock_and_age(self.point_time.as_ref(), now),
            )
            .line("Asked for", human::clock_and_age(self.create_time.as_ref(), now))
            .line("Ended", human::clock_and_age(self.complete_time.as_ref(), now))
            .line("Schedule", human::or_dash(&self.schedule))
            .line("Labels", human::labels(&self.labels))
            .line_if("Description", &self.description)
            .line("Labels of the VM", human::labels(&self.vm_labels))
            .line_if("Its placement groups", &self.vm_placement_groups.join(", "))
            .line("UID of the VM", &self.vm_uid)
            .line("ETag", human::or_dash(&self.etag));
        let rows = self.files.iter().map(|file| {
            let texts = [
                file.disk.clone(),
                file.file.clone(),
                size(file.virtual_size_bytes),
                size(file.stored_bytes),
                file.sha256.clone(),
            ];
            texts.map(Cell::plain).to_vec()
        });
        page.table(
            "Files",
            &["DISK", "FILE", "SIZE", "STORED", "SHA-256"],
            rows.collect(),
        );
        page
    }
}

fn every(schedule: &v1::BackupSchedule) -> String {
    let every = human::duration(schedule.every.as_ref());
    let every = every.map_or_else(|| "-".to_owned(), human::span);
    match schedule.at.as_str() {
        "" => every,
        at => format!("{every} at {at}"),
    }
}

fn keeps(schedule: &v1::BackupSchedule) -> String {
    match schedule.keep_days {
        0 => format!("{}", schedule.keep_last),
        days => format!("{} or {days}d", schedule.keep_last),
    }
}

fn next(schedule: &v1::BackupSchedule) -> String {
    match schedule.paused {
        true => "paused".to_owned(),
        false => human::clock(schedule.next_time.as_ref()),
    }
}

fn failures(schedule: &v1::BackupSchedule) -> Cell {
    let text = schedule.failures.to_string();
    match schedule.failures {
        0 => Cell::plain(text),
        _ => Cell::painted(text, BAD),
    }
}

impl Resource for v1::BackupSchedule {
    const MESSAGE: &'static str = "dalgu.v1.BackupSchedule";
    const PLURAL: &'static str = "backup schedules";

    fn key(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.name)
    }

    fn columns(wide: bool) -> &'static [&'static str] {
        const ALL: &[&str] = &[
            "NAME",
            "SELECTOR",
            "VMS",
            "EVERY",
            "KEEPS",
            "FAILURES",
            "NEXT",
            "POOL",
            "LAST",
            "INCREMENTALS",
        ];
        if wide { ALL } else { &ALL[..7] }
    }

    fn row(&self, wide: bool, _: Timestamp) -> Vec<Cell> {
        let mut row = vec![
            Cell::plain(&self.name),
            Cell::plain(human::labels(&self.label_selector)),
            Cell::plain(self.vms.to_string()),
            Cell::plain(every(self)),
            Cell::plain(keeps(self)),
            failures(self),
            Cell::plain(next(self)),
        ];
        if wide {
            row.push(Cell::plain(&self.pool));
            row.push(Cell::plain(human::clock(self.last_time.as_ref())));
            row.push(Cell::plain(self.incrementals.to_string()));
        }
        row
    }

    fn describe(&self, now: Timestamp) -> human::Page {
        let mut page = human::Page::default();
        page.line("Name", &self.name)
            .line("Selector", human::labels(&self.label_selector))
            .line("VMs", self.vms.to_string())
            .line("Pool", &self.pool)
            .line("Every", every(self))
            .line("Incrementals", self.incrementals.to_string())
            .line("Keeps", keeps(self))
            .painted("Failures", &failures(self))
            .line("Last", human::clock_and_age(self.last_time.as_ref(), now))
            .line("Next", next(self))
            .line_if("Description", &self.description)
            .line("Created", human::clock_and_age(self.create_time.as_ref(), now))
            .line("ETag", human::or_dash(&self.etag));
        page
    }
}
