//! What plans of moves look like in tables and on their own pages. Pure.

use std::borrow::Cow;

use dalgu_proto::v1::{self, PlanState as S, PlanStepState as Step};
use jiff::Timestamp;

use super::{BAD, Cell, GOOD, Resource, WARN, human};

const STEP_COLUMNS: &[&str] = &[
    "#", "VM", "FROM", "TO", "COPIES", "TIME", "STOP", "AFTER", "STATE",
];

fn state(plan: &v1::Plan) -> Cell {
    let text = human::value::<S>(plan.state);
    match plan.state() {
        S::Done => Cell::painted(text, GOOD),
        S::Proposed | S::Running => Cell::painted(text, WARN),
        S::Stopped => Cell::painted(text, BAD),
        S::Cancelled | S::Unspecified => Cell::plain(text),
    }
}

fn seconds(seconds: f64) -> String {
    match seconds {
        seconds if seconds < 90.0 => format!("{seconds:.0} s"),
        seconds => format!("{:.0} min", seconds / 60.0),
    }
}

/// A move in a sentence.
pub fn line(step: &v1::PlanStep) -> String {
    let state = human::value::<Step>(step.state).to_lowercase();
    let why = step
        .error
        .as_ref()
        .map(|error| format!(": {} ({})", error.message, error.reason));
    let text = format!(
        "{}: {state} to {}{}",
        step.vm,
        step.destination,
        why.unwrap_or_default()
    );
    human::clean(&text)
}

fn rows(plan: &v1::Plan) -> Vec<Vec<Cell>> {
    let row = |(number, step): (usize, &v1::PlanStep)| {
        let after: Vec<_> = step
            .after_steps
            .iter()
            .map(|before| (before + 1).to_string())
            .collect();
        let text = human::value::<Step>(step.state);
        let state = match step.state() {
            Step::Moved => Cell::painted(text, GOOD),
            Step::Failed => Cell::painted(text, BAD),
            _ => Cell::plain(text),
        };
        vec![
            Cell::plain((number + 1).to_string()),
            Cell::plain(&step.vm),
            Cell::plain(&step.source),
            Cell::plain(&step.destination),
            Cell::plain(human::bytes(step.copied_bytes)),
            Cell::plain(seconds(step.predicted_seconds)),
            Cell::plain(match step.predicted_downtime_ms {
                0 => "-".to_owned(),
                ms => format!("{ms} ms"),
            }),
            Cell::plain(human::or_dash(&after.join(","))),
            state,
        ]
    };
    plan.steps.iter().enumerate().map(row).collect()
}

fn figures(page: &mut human::Page, title: &str, figures: Option<&v1::PlanFigures>) {
    let Some(figures) = figures else { return };
    let spare = if figures.spare_host {
        "yes"
    } else {
        "not for certain"
    };
    page.line(
        title,
        format!(
            "hosts with VMs: {}, contended: {}, unevenness: {:.1} %, room for a host that fails: {spare}",
            figures.hosts_on, figures.hosts_contended, figures.unevenness_percent
        ),
    );
}

impl Resource for v1::Plan {
    const MESSAGE: &'static str = "dalgu.v1.Plan";
    const PLURAL: &'static str = "plans";

    fn key(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.id)
    }

    fn columns(_wide: bool) -> &'static [&'static str] {
        &["ID", "KIND", "STATE", "MOVES", "COPIES", "AGE", "MESSAGE"]
    }

    fn row(&self, _wide: bool, now: Timestamp) -> Vec<Cell> {
        vec![
            Cell::plain(&self.id),
            Cell::plain(human::value::<v1::PlanKind>(self.kind)),
            state(self),
            Cell::plain(self.steps.len().to_string()),
            Cell::plain(human::bytes(self.copied_bytes)),
            Cell::plain(human::age(self.create_time.as_ref(), now)),
            Cell::plain(&self.message),
        ]
    }

    fn describe(&self, now: Timestamp) -> human::Page {
        let mut page = human::Page::default();
        page.line("Id", &self.id)
            .line("Kind", human::value::<v1::PlanKind>(self.kind))
            .line_if("Hosts", &self.hosts.join(", "))
            .line("State", human::value::<S>(self.state))
            .line("Message", &self.message)
            .line("Hash", &self.hash)
            .line("Copies", human::bytes(self.copied_bytes))
            .line("Time", seconds(self.predicted_seconds))
            .line("Asked for by", human::or_dash(&self.principal))
            .line("Made", human::clock_and_age(self.create_time.as_ref(), now));
        if self.approve_time.is_some() {
            page.line("Approved by", human::or_dash(&self.approved_by))
                .line("Approved", human::clock_and_age(self.approve_time.as_ref(), now))
                .line("Deadline", human::clock(self.deadline.as_ref()));
        }
        if self.end_time.is_some() {
            page.line("Ended", human::clock_and_age(self.end_time.as_ref(), now));
        }
        page.section("The site");
        figures(&mut page, "Before", self.before.as_ref());
        figures(&mut page, "Predicted", self.predicted.as_ref());
        figures(&mut page, "Realised", self.realised.as_ref());
        page.table("Moves", STEP_COLUMNS, rows(self));
        page
    }
}

impl Resource for v1::MaintenancePlan {
    const MESSAGE: &'static str = "dalgu.v1.MaintenancePlan";
    const PLURAL: &'static str = "groups of hosts";

    fn key(&self) -> Cow<'_, str> {
        let hosts: Vec<_> = self
            .groups
            .iter()
            .flat_map(|group| &group.hosts)
            .map(String::as_str)
            .collect();
        Cow::Owned(hosts.join("\n"))
    }

    fn columns(_wide: bool) -> &'static [&'static str] {
        &["GROUPS", "HELD"]
    }

    fn row(&self, _wide: bool, _now: Timestamp) -> Vec<Cell> {
        vec![
            Cell::plain(self.groups.len().to_string()),
            Cell::plain(self.held.len().to_string()),
        ]
    }

    fn describe(&self, _now: Timestamp) -> human::Page {
        let group = |(number, group): (usize, &v1::MaintenanceGroup)| {
            vec![
                Cell::plain((number + 1).to_string()),
                Cell::plain(group.hosts.join(", ")),
                Cell::plain(group.moves.to_string()),
                Cell::plain(human::bytes(group.copied_bytes)),
                Cell::plain(seconds(group.predicted_seconds)),
            ]
        };
        let held = |held: &v1::HeldHost| {
            let error = held.error.clone().unwrap_or_default();
            vec![
                Cell::painted(&held.host, BAD),
                Cell::plain(human::or_dash(&held.vm)),
                Cell::plain(error.reason),
                Cell::plain(error.message),
            ]
        };
        let mut page = human::Page::default();
        page.line("Groups", self.groups.len().to_string());
        page.table(
            "Groups",
            &["#", "HOSTS", "VMS", "COPIES", "TIME"],
            self.groups.iter().enumerate().map(group).collect(),
        );
        page.table(
            "Held",
            &["HOST", "VM", "REASON", "MESSAGE"],
            self.held.iter().map(held).collect(),
        );
        page
    }
}
