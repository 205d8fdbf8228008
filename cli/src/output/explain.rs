//! What a placement decision looks like: a sentence, the hosts that fit with their scores, the others with what they
//! lack, and the smallest change that would help. Pure.

use std::borrow::Cow;

use dalgu_proto::v1;
use jiff::Timestamp;

use super::{BAD, Cell, GOOD, Resource, human, table};

impl Resource for v1::Placement {
    const MESSAGE: &'static str = "dalgu.v1.Placement";
    const PLURAL: &'static str = "placements";

    fn key(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.host)
    }

    fn columns(_wide: bool) -> &'static [&'static str] {
        &["HOST", "SUMMARY"]
    }

    fn row(&self, _wide: bool, _now: Timestamp) -> Vec<Cell> {
        vec![
            Cell::plain(human::or_dash(&self.host)),
            Cell::plain(&self.summary),
        ]
    }

    fn describe(&self, _now: Timestamp) -> human::Page {
        let mut page = human::Page::default();
        page.line("Host", human::or_dash(&self.host))
            .line("Summary", &self.summary);
        if let Some(refused) = &self.refused {
            page.line(
                "Refused",
                format!(
                    "{}: {}",
                    human::value::<v1::OperationKind>(refused.kind),
                    refused.summary
                ),
            );
        }
        page
    }
}

/// Draws a decision about `subject`, for example "web"; `verb` leads to the host, for example "is on".
pub fn render(placement: &v1::Placement, subject: &str, verb: &str, color: bool) -> String {
    let (good, bad) = if color { (GOOD, BAD) } else { Default::default() };
    let subject = human::clean(subject);
    let is_missing = placement.host.is_empty() && placement.refused.is_some();
    let mut text = match human::clean(&placement.host).as_str() {
        _ if is_missing => format!("{subject}: {bad}does not exist{bad:#}"),
        "" => format!("{subject}: {bad}no host can take it{bad:#}"),
        host => format!("{subject} {verb} {good}{host}{good:#}"),
    };
    if !placement.summary.is_empty() {
        text += &format!(": {}", human::clean(&placement.summary));
    }
    text.push('\n');
    let style = table::Style {
        color,
        ..table::Style::default()
    };
    let fitting: Vec<_> = placement.verdicts.iter().filter(|verdict| verdict.fits).collect();
    if !fitting.is_empty() {
        text += "\nHosts that fit (scores: compared from left to right, lower is better):\n";
        text += &indented(&scores(&fitting, &placement.host, &style));
    }
    let others: Vec<_> = placement
        .verdicts
        .iter()
        .filter(|verdict| !verdict.fits)
        .collect();
    if !others.is_empty() {
        text += "\nHosts that do not:\n";
        text += &indented(&shortfalls(&others, &style));
    }
    if placement.verdicts.is_empty() && !is_missing {
        text += "\nThere is no host to look at: `dalgu host list` shows the hosts there are.\n";
    }
    if !placement.hint.is_empty() {
        text += &format!("\nWhat would make it fit: {}\n", human::clean(&placement.hint));
    }
    if placement.ignored_protection {
        text += "\nAsked for although room is kept for protected failure domains (--ignore-protection).\n";
    }
    if let Some(time) = placement.decide_time.as_ref() {
        text += &format!("\nDecided {}\n", human::clock(Some(time)));
    }
    if let Some(refused) = &placement.refused {
        text += &refusal(refused, &style);
    }
    text
}

/// What was refused since.
fn refusal(refused: &v1::RefusedPlacement, style: &table::Style) -> String {
    let what = match v1::OperationKind::try_from(refused.kind) {
        Ok(v1::OperationKind::CreateVm) => "creation".to_owned(),
        Ok(v1::OperationKind::MigrateVm) => "migration".to_owned(),
        _ => human::value::<v1::OperationKind>(refused.kind),
    };
    let mut text = format!(
        "\nIts last {what} was refused {}: {}\n",
        human::clock(refused.refuse_time.as_ref()),
        human::clean(&refused.summary)
    );
    if !refused.verdicts.is_empty() {
        let verdicts: Vec<_> = refused.verdicts.iter().collect();
        text += &indented(&shortfalls(&verdicts, style));
    }
    if !refused.hint.is_empty() {
        text += &format!("What would have made it fit: {}\n", human::clean(&refused.hint));
    }
    text
}

fn indented(table: &str) -> String {
    table.lines().map(|line| format!("  {line}\n")).collect()
}

fn scores(fitting: &[&v1::HostVerdict], chosen: &str, style: &table::Style) -> String {
    // All hosts are scored by the same parts; the union keeps the table right should one lack a part.
    let mut parts: Vec<&str> = Vec::new();
    for part in fitting.iter().flat_map(|verdict| &verdict.score) {
        if !parts.contains(&part.name.as_str()) {
            parts.push(&part.name);
        }
    }
    let mut columns = vec!["RANK".to_owned(), "HOST".to_owned()];
    columns.extend(
        parts
            .iter()
            .map(|part| human::clean(part).replace('_', " ").to_ascii_uppercase()),
    );
    let rows = fitting.iter().map(|verdict| {
        let name = if verdict.host == chosen {
            Cell::painted(&verdict.host, GOOD)
        } else {
            Cell::plain(&verdict.host)
        };
        let mut row = vec![Cell::plain(verdict.rank.to_string()), name];
        for part in &parts {
            let found = verdict.score.iter().find(|score| score.name == *part);
            row.push(Cell::plain(
                found.map_or_else(|| "-".to_owned(), |score| number(score.value)),
            ));
        }
        row
    });
    let names: Vec<&str> = columns.iter().map(String::as_str).collect();
    table::layout(&names, rows.collect(), style)
}

fn number(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn shortfalls(others: &[&v1::HostVerdict], style: &table::Style) -> String {
    let mut rows = Vec::new();
    for verdict in others {
        let mut host = verdict.host.as_str();
        for shortfall in &verdict.shortfalls {
            rows.push(vec![
                Cell::plain(host),
                Cell::painted(&shortfall.constraint, BAD),
                Cell::plain(&shortfall.message),
            ]);
            host = "";
        }
        if verdict.shortfalls.is_empty() {
            rows.push(vec![
                Cell::plain(host),
                Cell::plain("-"),
                Cell::plain("no reason given"),
            ]);
        }
    }
    table::layout(&["HOST", "LACKS", "WHY"], rows, style)
}
