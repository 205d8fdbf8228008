//! What an operation looks like in tables and on its own page, and where a migration stands in words. Pure.

use std::{borrow::Cow, time::Duration};

use dalgu_proto::v1;
use jiff::Timestamp;

use super::{BAD, Cell, GOOD, Resource, WARN, human};

/// Whether an operation has ended. Of a state that only a newer controller knows, the time of the end tells it.
pub fn has_ended(operation: &v1::Operation) -> bool {
    use v1::OperationState as S;
    match S::try_from(operation.state) {
        Ok(state) => matches!(state, S::Succeeded | S::Failed | S::Cancelled),
        Err(_) => operation.end_time.is_some(),
    }
}

fn state_cell(operation: &v1::Operation) -> Cell {
    use v1::OperationState as S;
    let mut word = human::value::<v1::OperationState>(operation.state);
    if operation.cancel_requested && !has_ended(operation) {
        word += ", cancelling";
    }
    match operation.state() {
        S::Succeeded => Cell::painted(word, GOOD),
        S::Failed => Cell::painted(word, BAD),
        S::Pending | S::Running => Cell::painted(word, WARN),
        S::Cancelled | S::Unspecified => Cell::plain(word),
    }
}

fn kind(operation: &v1::Operation) -> String {
    human::value::<v1::OperationKind>(operation.kind)
        .trim_end_matches(" vm")
        .to_owned()
}

/// How long it took, or has taken so far.
pub fn took(operation: &v1::Operation, now: Timestamp) -> Option<Duration> {
    let start = human::time(operation.create_time.as_ref())?;
    let end = human::time(operation.end_time.as_ref()).unwrap_or(now);
    Duration::try_from(end.duration_since(start)).ok()
}

/// What it does now or why it ended, in a line.
pub fn detail(operation: &v1::Operation) -> String {
    if let Some(error) = &operation.error {
        return if error.message.is_empty() {
            error.reason.clone()
        } else {
            error.message.clone()
        };
    }
    match &operation.migration {
        Some(migration) if !has_ended(operation) => migration_line(migration),
        Some(migration) if operation.state() == v1::OperationState::Succeeded => moved(migration),
        _ => operation.status_message.clone(),
    }
}

/// From where to where, and how long the guest stood still.
fn moved(migration: &v1::MigrationProgress) -> String {
    let stood = match migration.downtime_ms {
        0 => String::new(),
        ms => format!(", guest stopped for {ms} ms"),
    };
    let blackout = blackout(migration);
    let unreachable = blackout.map_or_else(String::new, |ms| format!(", unreachable for {ms} ms"));
    format!(
        "{} -> {}{stood}{unreachable}",
        migration.source_host, migration.destination_host
    )
}

/// How long the VM could not be reached over its networks, in ms.
fn blackout(migration: &v1::MigrationProgress) -> Option<u128> {
    let blackout = human::duration(migration.network_blackout.as_ref())?;
    Some(blackout.as_millis())
}

/// The share that has been copied, of memory and disks together, 0 to 100. Pages that the guest wrote again are to be
/// copied again, so it may fall.
pub fn migration_percent(migration: &v1::MigrationProgress) -> u64 {
    use v1::MigrationPhase as P;
    match migration.phase() {
        P::CuttingOver | P::CleaningSource | P::Done => return 100,
        P::Transferring => {}
        _ => return 0,
    }
    let total = u128::from(migration.memory_total_bytes) + u128::from(migration.disk_total_bytes);
    let left = u128::from(migration.memory_remaining_bytes) + u128::from(migration.disk_remaining_bytes);
    let done = total.saturating_sub(left) * 100;
    done.checked_div(total)
        .and_then(|percent| u64::try_from(percent).ok())
        .unwrap_or(0)
}

/// The phase of a migration, and from where to where.
pub fn migration_phase(migration: &v1::MigrationProgress) -> String {
    let phase = human::value::<v1::MigrationPhase>(migration.phase).to_ascii_lowercase();
    let to = if migration.destination_host.is_empty() {
        "?"
    } else {
        &migration.destination_host
    };
    format!("{phase}, {} -> {to}", migration.source_host)
}

/// How much has been copied, how fast, and what QEMU expects; empty outside the transfer.
#[allow(clippy::cast_precision_loss, reason = "three figures are shown")]
pub fn migration_figures(migration: &v1::MigrationProgress) -> String {
    if migration.phase() != v1::MigrationPhase::Transferring {
        return String::new();
    }
    let mut parts = Vec::new();
    let copied = |what: &str, left: u64, total: u64| {
        let done = total.saturating_sub(left);
        format!(
            "{what} {} of {}",
            human::percent(done as f64, total as f64),
            human::bytes(total)
        )
    };
    if migration.memory_total_bytes > 0 {
        parts.push(copied(
            "memory",
            migration.memory_remaining_bytes,
            migration.memory_total_bytes,
        ));
    }
    if migration.disk_total_bytes > 0 {
        parts.push(copied(
            "disk",
            migration.disk_remaining_bytes,
            migration.disk_total_bytes,
        ));
    }
    if migration.rate_bytes_per_second > 0 {
        parts.push(human::rate(migration.rate_bytes_per_second as f64));
    }
    if migration.dirty_rate_bytes_per_second > 0 {
        parts.push(format!(
            "guest writes {}",
            human::rate(migration.dirty_rate_bytes_per_second as f64)
        ));
    }
    if migration.expected_downtime_ms > 0 {
        parts.push(format!("expected stop {} ms", migration.expected_downtime_ms));
    }
    parts.join(", ")
}

/// Where a migration stands, in a line.
pub fn migration_line(migration: &v1::MigrationProgress) -> String {
    match migration_figures(migration).as_str() {
        "" => migration_phase(migration),
        figures => format!("{}, {figures}", migration_phase(migration)),
    }
}

impl Resource for v1::Operation {
    const MESSAGE: &'static str = "dalgu.v1.Operation";
    const PLURAL: &'static str = "operations";

    fn key(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.id)
    }

    fn columns(wide: bool) -> &'static [&'static str] {
        const ALL: &[&str] = &[
            "ID",
            "KIND",
            "VM",
            "STATE",
            "AGE",
            "TOOK",
            "DETAIL",
            "PRINCIPAL",
            "GENERATION",
            "REQUEST ID",
        ];
        if wide { ALL } else { &ALL[..7] }
    }

    fn row(&self, wide: bool, now: Timestamp) -> Vec<Cell> {
        let mut row = vec![
            Cell::plain(&self.id),
            Cell::plain(kind(self)),
            Cell::plain(&self.vm),
            state_cell(self),
            Cell::plain(human::age(self.create_time.as_ref(), now)),
            Cell::plain(took(self, now).map_or_else(|| "-".to_owned(), human::fine_span)),
            Cell::plain(human::or_dash(&detail(self))),
        ];
        if wide {
            row.push(Cell::plain(human::or_dash(&self.principal)));
            row.push(Cell::plain(self.generation.to_string()));
            row.push(Cell::plain(human::or_dash(&self.request_id)));
        }
        row
    }

    fn describe(&self, now: Timestamp) -> human::Page {
        let mut page = human::Page::default();
        page.line("Id", &self.id)
            .line("Kind", kind(self))
            .line("VM", &self.vm)
            .line_if("VM UID", &self.vm_uid);
        page.painted("State", &state_cell(self))
            .line_if("Now", &self.status_message);
        if let Some(error) = &self.error {
            page.painted(
                "Error",
                &Cell::painted(format!("{} ({})", error.message, error.reason), BAD),
            );
        }
        page.line("Generation", self.generation.to_string())
            .line_if("Asked by", &self.principal);
        page.line_if("Request id", &self.request_id);
        page.line("Accepted", human::clock_and_age(self.create_time.as_ref(), now));
        if self.end_time.is_some() {
            page.line("Ended", human::clock_and_age(self.end_time.as_ref(), now));
        }
        page.line(
            "Took",
            took(self, now).map_or_else(|| "-".to_owned(), human::fine_span),
        );
        if let Some(migration) = &self.migration {
            describe_migration(&mut page, migration);
        }
        page
    }
}

#[allow(clippy::cast_precision_loss, reason = "three figures are shown")]
fn describe_migration(page: &mut human::Page, migration: &v1::MigrationProgress) {
    page.section("Migration").line("Id", &migration.migration_id);
    page.line("Phase", human::value::<v1::MigrationPhase>(migration.phase));
    page.line("From", human::or_dash(&migration.source_host))
        .line("To", human::or_dash(&migration.destination_host));
    let copied = |done: u64, left: u64, total: u64| {
        format!(
            "{} copied, {} left, {} in all",
            human::bytes(done),
            human::bytes(left),
            human::bytes(total)
        )
    };
    page.line(
        "Memory",
        copied(
            migration.memory_processed_bytes,
            migration.memory_remaining_bytes,
            migration.memory_total_bytes,
        ),
    );
    if migration.disk_total_bytes > 0 {
        page.line(
            "Disks",
            copied(
                migration.disk_processed_bytes,
                migration.disk_remaining_bytes,
                migration.disk_total_bytes,
            ),
        );
    }
    page.line("Rate", human::rate(migration.rate_bytes_per_second as f64));
    page.line(
        "Guest writes",
        human::rate(migration.dirty_rate_bytes_per_second as f64),
    );
    page.line("Passes", migration.iteration.to_string());
    if migration.expected_downtime_ms > 0 {
        page.line("Expected stop", format!("{} ms", migration.expected_downtime_ms));
    }
    if migration.downtime_ms > 0 {
        page.line("Guest stopped for", format!("{} ms", migration.downtime_ms));
    }
    if let Some(ms) = blackout(migration) {
        page.line("Unreachable for", format!("{ms} ms"));
    }
    if let Some(elapsed) = human::duration(migration.elapsed.as_ref()) {
        page.line("Transfer took", human::fine_span(elapsed));
    }
}
