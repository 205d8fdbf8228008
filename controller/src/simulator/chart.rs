//! What replays came to over time, drawn as SVG: a panel for each thing that counts, a line for each policy. Pure: text out.

use plotters::{
    chart::ChartBuilder,
    drawing::{DrawingArea, DrawingAreaErrorKind, IntoDrawingArea},
    element::{PathElement, Text},
    prelude::SVGBackend,
    series::LineSeries,
    style::{Color, IntoFont, RGBColor, ShapeStyle, TextStyle},
};

use super::{Outcome, Point};

/// Size of a picture without its panels, and of a panel.
const WIDTH: u32 = 1100;
const HEAD: u32 = 84;
const PANEL: u32 = 210;
/// Names of policies in a row of the head.
const NAMES: usize = 6;
/// Points of a line at most: more than that is not to be seen.
const POINTS: usize = 500;
/// Colours that are told apart also by who does not see all of them (M. Okabe, K. Ito, 2008), and darker ones of the same.
const COLOURS: [RGBColor; 11] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
    RGBColor(120, 60, 0),
    RGBColor(0, 90, 65),
    RGBColor(110, 60, 130),
    RGBColor(128, 128, 128),
];
const INK: RGBColor = RGBColor(51, 51, 51);
const GRID: RGBColor = RGBColor(225, 225, 225);

/// A picture cannot be drawn.
#[derive(Debug, thiserror::Error)]
#[error("the chart cannot be drawn: {0}")]
pub struct Error(String);

type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// What a panel shows: its title, and a point's value.
struct Panel {
    title: &'static str,
    value: fn(&Point) -> f64,
}

#[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
const PANELS: [Panel; 5] = [
    Panel {
        title: "Hosts in use",
        value: |point| point.hosts as f64,
    },
    Panel {
        title: "Processors reserved of hosts in use, %",
        value: |point| point.cpu_percent,
    },
    Panel {
        title: "Memory reserved of hosts in use, %",
        value: |point| point.memory_percent,
    },
    Panel {
        title: "Fragmentation: free room that the next VM cannot have, %",
        value: |point| point.fragmentation_percent,
    },
    Panel {
        title: "VMs refused so far",
        value: |point| point.refused as f64,
    },
];
/// Only where a contender moves VMs.
#[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
const MOVES: Panel = Panel {
    title: "Moves so far",
    value: |point| point.moves as f64,
};
/// Only where it is known what VMs use.
const CONTENDED: Panel = Panel {
    title: "Hosts in use that are contended, %",
    value: |point| point.contended_percent.unwrap_or(0.0),
};

/// Draws replays of one trace.
///
/// # Errors
/// If the picture cannot be drawn.
pub(super) fn draw(title: &str, outcomes: &[Outcome]) -> Result<String, Error> {
    let moves = outcomes.iter().any(|outcome| outcome.moves > 0);
    let contended = outcomes.iter().any(|outcome| outcome.contended_percent.is_some());
    let panels: Vec<_> = PANELS
        .into_iter()
        .chain(moves.then_some(MOVES))
        .chain(contended.then_some(CONTENDED))
        .collect();
    let mut svg = String::new();
    let count = u32::try_from(panels.len()).unwrap_or(0);
    let root = SVGBackend::with_string(&mut svg, (WIDTH, HEAD + count * PANEL)).into_drawing_area();
    picture(&root, title, &panels, outcomes).map_err(|error| Error(error.to_string()))?;
    drop(root);
    Ok(svg)
}

fn picture(root: &Area<'_>, title: &str, panels: &[Panel], outcomes: &[Outcome]) -> Drawn {
    root.fill(&RGBColor(255, 255, 255))?;
    let (head, body) = root.split_vertically(HEAD.cast_signed());
    head.draw(&Text::new(title.to_owned(), (16, 12), text(18)))?;
    for (index, outcome) in outcomes.iter().enumerate() {
        let place = |value: usize| i32::try_from(value).unwrap_or(i32::MAX);
        let (x, y) = (20 + place(index % NAMES) * 175, 44 + place(index / NAMES) * 20);
        let line = PathElement::new(vec![(x, y + 6), (x + 24, y + 6)], line(index));
        head.draw(&line)?;
        head.draw(&Text::new(outcome.policy, (x + 30, y), text(13)))?;
    }
    for (area, panel) in body.split_evenly((panels.len(), 1)).iter().zip(panels) {
        graph(area, panel, outcomes)?;
    }
    root.present()
}

fn graph(area: &Area<'_>, panel: &Panel, outcomes: &[Outcome]) -> Drawn {
    let lines: Vec<Vec<(f64, f64)>> = outcomes
        .iter()
        .map(|outcome| thinned(outcome, panel.value))
        .collect();
    let end = |pick: fn(&(f64, f64)) -> f64| lines.iter().flatten().map(pick).fold(0.0, f64::max);
    let (days, most) = (end(|point| point.0), end(|point| point.1));
    let top = if most > 0.0 { most * 1.08 } else { 1.0 };
    let mut chart = ChartBuilder::on(area)
        .margin(6)
        .margin_right(24)
        .caption(panel.title, text(14))
        .x_label_area_size(26)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..days.max(1.0 / 24.0), 0.0..top)?;
    chart
        .configure_mesh()
        .bold_line_style(GRID)
        .light_line_style(RGBColor(255, 255, 255))
        .axis_style(INK)
        .label_style(text(12))
        .y_labels(5)
        .x_labels(12)
        .x_label_formatter(&|days| format!("{days:.1} d"))
        .y_label_formatter(&|value| match *value {
            value if top <= 5.0 => format!("{value:.1}"),
            value => format!("{value:.0}"),
        })
        .draw()?;
    for (index, points) in lines.into_iter().enumerate() {
        chart.draw_series(LineSeries::new(points, line(index)))?;
    }
    Ok(())
}

/// Days and values, of the last point of each stretch: a count that only rises ends where it ended.
fn thinned(outcome: &Outcome, value: fn(&Point) -> f64) -> Vec<(f64, f64)> {
    let stretch = outcome.series.len().div_ceil(POINTS).max(1);
    let stretches = outcome.series.chunks(stretch).filter_map(<[Point]>::last);
    stretches.map(|point| (point.at_h / 24.0, value(point))).collect()
}

fn line(index: usize) -> ShapeStyle {
    COLOURS[index % COLOURS.len()].mix(0.85).stroke_width(2)
}

fn text(size: u32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&INK)
}
