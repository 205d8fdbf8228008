//! What an examination of the site looks like. Pure.

use std::borrow::Cow;

use dalgu_proto::v1;
use jiff::Timestamp;
use v1::FindingSeverity as Severity;

use super::{BAD, Cell, Resource, WARN, human};

impl Resource for v1::Diagnosis {
    const MESSAGE: &'static str = "dalgu.v1.Diagnosis";
    const PLURAL: &'static str = "examinations";

    fn key(&self) -> Cow<'_, str> {
        Cow::Borrowed("")
    }

    fn columns(_wide: bool) -> &'static [&'static str] {
        &["FOUND"]
    }

    fn row(&self, _wide: bool, _now: Timestamp) -> Vec<Cell> {
        vec![Cell::plain(found(self))]
    }

    fn describe(&self, _now: Timestamp) -> human::Page {
        page(self, false)
    }
}

/// An examination for people: what is wrong, what was looked at, what was not seen.
pub fn render(diagnosis: &v1::Diagnosis, wide: bool, color: bool) -> String {
    page(diagnosis, wide).render(color)
}

/// One line for each finding: its kind and what it is about.
pub fn names(diagnosis: &v1::Diagnosis) -> String {
    let line = |finding: &v1::Finding| {
        format!(
            "{} {}\n",
            human::clean(&finding.kind),
            human::clean(&finding.subject)
        )
    };
    diagnosis.findings.iter().map(line).collect()
}

/// Why the site is not well as far as it was seen; `None` when it is.
pub fn verdict(diagnosis: &v1::Diagnosis) -> Option<String> {
    let bad = diagnosis
        .findings
        .iter()
        .any(|finding| finding.severity() != Severity::Notice);
    let hosts = diagnosis.gaps.len();
    match (bad, hosts) {
        (false, 0) => None,
        (true, 0) => Some(format!("found {}", found(diagnosis))),
        (true, _) => Some(format!(
            "found {}; not seen: {}",
            found(diagnosis),
            plural(hosts, "host")
        )),
        (false, _) => Some(format!("not seen: {}", plural(hosts, "host"))),
    }
}

fn plural(count: usize, noun: &str) -> String {
    match count {
        1 => format!("1 {noun}"),
        _ => format!("{count} {noun}s"),
    }
}

/// How many findings of each severity.
fn found(diagnosis: &v1::Diagnosis) -> String {
    let count = |wanted: Severity, one: &str, more: &str| {
        let all = diagnosis.findings.iter();
        match all.filter(|finding| finding.severity() == wanted).count() {
            0 => None,
            1 => Some(format!("1 {one}")),
            count => Some(format!("{count} {more}")),
        }
    };
    let counts = [
        count(Severity::Critical, "critical", "critical"),
        count(Severity::Warning, "warning", "warnings"),
        count(Severity::Notice, "notice", "notices"),
        count(Severity::Unspecified, "other", "others"),
    ];
    let counts: Vec<_> = counts.into_iter().flatten().collect();
    match counts.is_empty() {
        true => "nothing in what was looked at".to_owned(),
        false => counts.join(", "),
    }
}

fn page(diagnosis: &v1::Diagnosis, wide: bool) -> human::Page {
    let mut page = human::Page::default();
    page.line("Examined", human::clock(diagnosis.time.as_ref()))
        .line("Found", found(diagnosis));
    match diagnosis.gaps.len() {
        0 => page.line("Not seen", "-"),
        hosts => page.line(
            "Not seen",
            format!(
                "{}; of their VMs only what they last reported",
                plural(hosts, "host")
            ),
        ),
    };
    for finding in &diagnosis.findings {
        of_finding(&mut page, finding);
    }
    let gap = |gap: &v1::DiagnosisGap| {
        [gap.host.clone(), gap.reason.clone(), gap.vms.to_string()]
            .map(Cell::plain)
            .to_vec()
    };
    page.table(
        "Not seen",
        &["HOST", "WHY", "ITS VMS"],
        diagnosis.gaps.iter().map(gap).collect(),
    );
    let (checked, not): (Vec<_>, Vec<_>) = diagnosis
        .checks
        .iter()
        .partition(|check| !check.subjects.is_empty());
    let columns = ["", "MUST HOLD", "LOOKED AT", "NOT LATELY", "FOUND", "CANNOT SEE"];
    let shown = if wide { columns.len() } else { columns.len() - 1 };
    let rows = checked.into_iter().map(|check| {
        let mut row = of_check(diagnosis, check);
        row.truncate(shown);
        row
    });
    page.table("Looked at", &columns[..shown], rows.collect());
    let rows = not.into_iter().map(|check| {
        [&check.invariant, &check.title, &check.limits]
            .map(Cell::plain)
            .to_vec()
    });
    page.table("Not looked at", &["", "MUST HOLD", "WHY"], rows.collect());
    page
}

fn of_finding(page: &mut human::Page, finding: &v1::Finding) {
    let word = human::value::<Severity>(finding.severity);
    let style = match finding.severity() {
        Severity::Critical => Some(BAD),
        Severity::Warning => Some(WARN),
        Severity::Notice | Severity::Unspecified => None,
    };
    let what = format!(
        "{} ({})",
        human::clean(&finding.subject),
        human::clean(&finding.invariant)
    );
    let kind = style.map_or_else(
        || Cell::plain(&finding.kind),
        |style| Cell::painted(&finding.kind, style),
    );
    page.section(&format!("{word}: {what}"))
        .painted("Kind", &kind)
        .line("Seen", &finding.seen)
        .line("Next", &finding.next_step);
}

fn of_check(diagnosis: &v1::Diagnosis, check: &v1::DiagnosisCheck) -> Vec<Cell> {
    let all = diagnosis.findings.iter();
    let found = all.filter(|finding| finding.invariant == check.invariant).count();
    vec![
        Cell::plain(&check.invariant),
        Cell::plain(&check.title),
        Cell::plain(format!("{} {}", check.checked, check.subjects)),
        Cell::plain(dash(check.unchecked)),
        match found {
            0 => Cell::plain("-"),
            found => Cell::painted(found.to_string(), WARN),
        },
        Cell::plain(human::or_dash(&check.limits)),
    ]
}

fn dash(count: u64) -> String {
    match count {
        0 => "-".to_owned(),
        count => count.to_string(),
    }
}
