//! What a replay came to, as a table for people. Pure: text out.

use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};

use super::Outcome;

/// A table without lines: the first column to the left, figures to the right.
pub(super) fn layout(columns: &[&str], rows: &[Vec<String>]) -> String {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .force_no_tty()
        .set_header(columns);
    for row in rows {
        table.add_row(row.iter().map(Cell::new));
    }
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if index > 0 {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let lines = table.lines().map(|line| line.trim_end().to_owned() + "\n");
    lines.collect()
}

/// One line for each policy.
pub(super) fn of(outcomes: &[Outcome]) -> String {
    const COLUMNS: [&str; 11] = [
        "POLICY",
        "ACCEPTED",
        "REFUSED",
        "PEAK HOSTS",
        "CPU %",
        "MEMORY %",
        "FRAGMENTED %",
        "MOVES",
        "MOVED GiB",
        "HOST-HOURS",
        "CONTENDED %",
    ];
    let rows: Vec<_> = outcomes
        .iter()
        .map(|outcome| {
            vec![
                outcome.policy.to_owned(),
                outcome.accepted.to_string(),
                outcome.refused.to_string(),
                outcome.peak_hosts.to_string(),
                format!("{:.1}", outcome.cpu_percent),
                format!("{:.1}", outcome.memory_percent),
                format!("{:.1}", outcome.fragmentation_percent),
                outcome.moves.to_string(),
                format!("{:.0}", outcome.moved_gib),
                format!("{:.0}", outcome.host_hours),
                outcome
                    .contended_percent
                    .map_or_else(|| "-".to_owned(), |percent| format!("{percent:.2}")),
            ]
        })
        .collect();
    layout(&COLUMNS, &rows)
}
