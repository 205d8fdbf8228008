//! Whether VMs are backed up as their schedules say.

use std::time::Duration;

use super::{Finding, Invariant, Look, Severity, View};
use crate::{
    backups::plan::{self, Overdue},
    model::ScheduleRecord,
};

/// Adds VMs that have gone without a good backup for too long.
pub(super) fn are_taken(view: &View<'_>, look: &mut Look) {
    for schedule in view.state.schedules.values() {
        let overdue = plan::overdue(view.state, schedule, view.now);
        look.findings
            .extend(overdue.map(|overdue| finding(view, schedule, &overdue)));
    }
}

fn finding(view: &View<'_>, schedule: &ScheduleRecord, overdue: &Overdue<'_>) -> Finding {
    let (vm, name) = (&overdue.vm.name, &schedule.name);
    let ago = minutes(view.since(overdue.since()));
    let what = match overdue.last_good {
        Some(_) => format!("the last good backup of it by schedule {name} is of {ago} ago"),
        None => format!("it has been there for {ago} and has no good backup by schedule {name}"),
    };
    let failed = overdue.failed.and_then(|backup| backup.error.as_ref());
    let failed =
        failed.map(|fault| format!("; the last attempt failed: {} ({})", fault.message, fault.reason));
    Finding {
        invariant: Invariant::I3,
        severity: Severity::Warning,
        kind: "BACKUP_OVERDUE",
        subject: format!("vm {vm}"),
        seen: format!(
            "{what}, which takes one every {}{}",
            minutes(schedule.every()),
            failed.unwrap_or_default()
        ),
        next_step: format!(
            "mend what `dalgu backup list --vm {vm} --schedule {name}` shows, or take one now: `dalgu backup create {vm} --pool {}`",
            schedule.pool
        ),
    }
}

/// A time in hours and minutes, as is exact enough here.
fn minutes(time: Duration) -> String {
    let minutes = time.as_secs() / 60;
    format!("{} h {} min", minutes / 60, minutes % 60)
}
