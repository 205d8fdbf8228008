//! Tables without lines, as kubectl prints them. Pure: text in, text out.

use anstyle::{AnsiColor, Style as Paint};
use comfy_table::{
    Attribute, Cell as TableCell, CellAlignment, Color, ColumnConstraint, ContentArrangement, Table, Width,
    presets,
};
use jiff::Timestamp;

use super::{Cell, Resource};

/// Space between two columns.
const GAP: u16 = 3;

/// How a table is drawn.
#[derive(Debug, Clone, Default)]
pub struct Style {
    /// Whether cells are painted.
    pub color: bool,
    /// Whether the column names are left out.
    pub no_header: bool,
    /// Least widths of the columns, so that rows added later stand under those before.
    pub widths: Vec<u16>,
}

impl Style {
    /// Without colours.
    pub fn plain() -> Self {
        Self::default()
    }
}

/// A table of objects.
pub fn of<R: Resource>(items: &[R], wide: bool, now: Timestamp, color: bool) -> String {
    let rows = items.iter().map(|item| item.row(wide, now)).collect();
    layout(
        R::columns(wide),
        rows,
        &Style {
            color,
            ..Style::default()
        },
    )
}

/// Lays a table out. Every line ends in a line feed.
pub fn layout(columns: &[&str], rows: Vec<Vec<Cell>>, style: &Style) -> String {
    build(columns, rows, style).0
}

/// As [`layout`]; also gives the widths that the columns got.
pub fn build(columns: &[&str], rows: Vec<Vec<Cell>>, style: &Style) -> (String, Vec<u16>) {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .force_no_tty();
    if style.color {
        table.enforce_styling();
    }
    if !style.no_header {
        table.set_header(columns.iter().map(TableCell::new));
    }
    for row in rows {
        table.add_row(row.into_iter().map(paint));
    }
    let own = table.column_max_content_widths();
    let widths: Vec<u16> = own
        .iter()
        .enumerate()
        .map(|(at, own)| style.widths.get(at).map_or(*own, |least| *least.max(own)))
        .collect();
    for (column, width) in table.column_iter_mut().zip(&widths) {
        column.set_padding((0, GAP));
        column.set_cell_alignment(CellAlignment::Left);
        if !style.widths.is_empty() {
            column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(width + GAP)));
        }
    }
    let mut text = String::new();
    for line in table.lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    (text, widths)
}

fn paint(cell: Cell) -> TableCell {
    let text = TableCell::new(&cell.text);
    let Some(style) = cell.style else { return text };
    let text = if style.get_effects().contains(anstyle::Effects::BOLD) {
        text.add_attribute(Attribute::Bold)
    } else {
        text
    };
    match foreground(style) {
        Some(color) => text.fg(color),
        None => text,
    }
}

fn foreground(style: Paint) -> Option<Color> {
    match style.get_fg_color()? {
        anstyle::Color::Ansi(AnsiColor::Green) => Some(Color::DarkGreen),
        anstyle::Color::Ansi(AnsiColor::Yellow) => Some(Color::DarkYellow),
        anstyle::Color::Ansi(AnsiColor::Red) => Some(Color::DarkRed),
        anstyle::Color::Ansi(AnsiColor::Cyan) => Some(Color::DarkCyan),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_under_each_other_and_lines_end_with_their_text() {
        let rows = vec![
            vec![Cell::plain("a"), Cell::plain("1")],
            vec![Cell::plain("대구"), Cell::plain("22")],
        ];
        assert_eq!(
            layout(&["NAME", "N"], rows, &Style::plain()),
            "NAME   N\na      1\n대구   22\n"
        );
    }

    #[test]
    fn rows_added_later_keep_the_widths() {
        let style = Style {
            no_header: true,
            widths: vec![8, 1],
            ..Style::default()
        };
        assert_eq!(
            layout(
                &["NAME", "N"],
                vec![vec![Cell::plain("a"), Cell::plain("1")]],
                &style
            ),
            "a          1\n"
        );
    }

    #[test]
    fn colours_come_only_when_asked_for_and_do_not_shift_columns() {
        let rows = || vec![vec![Cell::painted("ok", super::super::GOOD), Cell::plain("x")]];
        let plain = layout(&["S", "T"], rows(), &Style::plain());
        let painted = layout(
            &["S", "T"],
            rows(),
            &Style {
                color: true,
                ..Style::default()
            },
        );
        assert!(!plain.contains('\x1b') && painted.contains('\x1b'));
        let stripped = anstream::adapter::strip_str(&painted).to_string();
        assert_eq!(stripped, plain);
    }

    #[test]
    fn control_characters_from_outside_do_not_reach_the_terminal() {
        let row = vec![vec![Cell::plain("evil\x1b[2J\nname")]];
        assert_eq!(layout(&["NAME"], row, &Style::plain()), "NAME\nevil?[2J name\n");
    }
}
