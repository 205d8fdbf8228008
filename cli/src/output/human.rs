//! Words, sizes, times and pages for people. Pure.

use std::{collections::HashMap, fmt::Write as _, time::Duration};

use anstyle::Style;
use dalgu_proto::v1;
use jiff::Timestamp;

/// A text from outside, without anything that a terminal would obey.
pub fn clean(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' | '\t' | '\r' => ' ',
            c if c.is_control() => '?',
            c => c,
        })
        .collect()
}

/// A number of bytes with a unit, three figures.
#[allow(clippy::cast_precision_loss, reason = "three figures are shown")]
pub fn bytes(bytes: u64) -> String {
    scaled(bytes as f64, " ", "iB", "B")
}

/// A size in MiB with a unit.
pub fn mib(mib: u64) -> String {
    bytes(mib.saturating_mul(1 << 20))
}

/// A rate, short enough for a table: "1.2M".
pub fn short(bytes: f64) -> String {
    scaled(bytes, "", "", "")
}

/// A rate with its unit.
pub fn rate(bytes_per_second: f64) -> String {
    scaled(bytes_per_second, " ", "iB/s", "B/s")
}

fn scaled(value: f64, space: &str, suffix: &str, plain: &str) -> String {
    let (mut value, mut unit) = (value.max(0.0), "");
    for next in ["K", "M", "G", "T", "P", "E"] {
        if value < 1023.5 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    let suffix = if unit.is_empty() { plain } else { suffix };
    let whole = unit.is_empty() || value >= 99.95 || (value - value.round()).abs() < 0.05;
    let number = if whole {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    };
    format!("{number}{space}{unit}{suffix}").trim_end().to_owned()
}

/// Used of all, in one unit: "3.1/15.6 GiB".
#[allow(clippy::cast_precision_loss, reason = "three figures are shown")]
pub fn share(used: u64, total: u64) -> String {
    let text = bytes(total);
    let (number, unit) = text.split_once(' ').unwrap_or((&text, ""));
    let power = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
        .iter()
        .position(|known| *known == unit)
        .unwrap_or(0);
    let used = used as f64 / 1024_f64.powi(i32::try_from(power).unwrap_or(0));
    if power == 0 {
        format!("{used:.0}/{number} {unit}")
    } else {
        format!("{used:.1}/{number} {unit}")
    }
}

/// A percentage without figures behind the point; "-" where it makes no sense.
pub fn percent(part: f64, whole: f64) -> String {
    if whole > 0.0 {
        format!("{:.0}%", 100.0 * part / whole)
    } else {
        "-".to_owned()
    }
}

/// A span in at most two units: "3m", "2h5m", "4d".
pub fn span(span: Duration) -> String {
    let seconds = span.as_secs();
    let two = |large: u64, small: u64, names: (&str, &str)| {
        let (whole, rest) = (seconds / large, seconds % large / small);
        // The smaller unit says something only beside a small number of the larger.
        if rest == 0 || whole >= 10 {
            format!("{whole}{}", names.0)
        } else {
            format!("{whole}{}{rest}{}", names.0, names.1)
        }
    };
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => two(60, 1, ("m", "s")),
        3600..86400 => two(3600, 60, ("h", "m")),
        _ => two(86400, 3600, ("d", "h")),
    }
}

/// A short span with a figure behind the point: "84 ms", "2.1 s", "3m5s".
pub fn fine_span(span: Duration) -> String {
    match span.as_millis() {
        ms @ 0..1000 => format!("{ms} ms"),
        1000..60_000 => format!("{:.1} s", span.as_secs_f64()),
        _ => self::span(span),
    }
}

/// A time of the wire.
pub fn time(wire: Option<&prost_types::Timestamp>) -> Option<Timestamp> {
    wire.and_then(|time| Timestamp::new(time.seconds, time.nanos).ok())
}

/// A span of the wire; negative ones are none.
pub fn duration(wire: Option<&prost_types::Duration>) -> Option<Duration> {
    wire.and_then(|span| Duration::try_from(*span).ok())
}

/// How long ago something was, for tables.
pub fn age(wire: Option<&prost_types::Timestamp>, now: Timestamp) -> String {
    let Some(then) = time(wire) else {
        return "-".to_owned();
    };
    span(Duration::try_from(now.duration_since(then)).unwrap_or_default())
}

/// A point in time, to the second, in UTC: "2026-11-23T18:50:01Z".
pub fn clock(wire: Option<&prost_types::Timestamp>) -> String {
    time(wire).map_or_else(
        || "-".to_owned(),
        |time| time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
    )
}

/// A point in time and how long ago it was.
pub fn clock_and_age(wire: Option<&prost_types::Timestamp>, now: Timestamp) -> String {
    if wire.is_none() {
        "-".to_owned()
    } else {
        format!("{} ({} ago)", clock(wire), age(wire, now))
    }
}

/// ("VM_STATE_RUNNING", "VM_STATE_") is "Running".
fn word(name: &str, prefix: &str) -> String {
    let name = name.strip_prefix(prefix).unwrap_or(name);
    if name == "UNSPECIFIED" {
        return "Unknown".to_owned();
    }
    let text = name.replace('_', " ").to_ascii_lowercase();
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| {
        first.to_ascii_uppercase().to_string() + letters.as_str()
    })
}

/// An enum of the API by the names of its values there.
pub trait Named: TryFrom<i32> + Default {
    /// The value's name.
    fn name(&self) -> &'static str;
}

macro_rules! named {
    ($($kind:ident)*) => {
        $(impl Named for v1::$kind {
            fn name(&self) -> &'static str {
                self.as_str_name()
            }
        })*
    };
}

named! {
    BackupKind BackupState CloneMode CpuPolicy Direction DiskFormat DrainMode DrainState DrainedVmState EventKind Firmware GuestFeature HostState ImageFormat ImageState ImageVisibility MigrationPhase OperationKind
    NumaPolicy OperationState PlacementRule PlanKind PlanState PlanStepState PowerReason PowerState Protocol RestartPolicy
    FindingSeverity SiteDifferenceKind SnapshotState VmState VolumeState
}

/// A value of an enum as a word. One that a newer controller knows and this version does not is told by its number.
pub fn value<E: Named>(value: i32) -> String {
    let Ok(known) = E::try_from(value) else {
        return format!("Unknown ({value})");
    };
    word(known.name(), E::default().name().trim_end_matches("UNSPECIFIED"))
}

/// Labels in the order of their keys: "a=1,b=2".
pub fn labels(labels: &HashMap<String, String>) -> String {
    let mut pairs: Vec<_> = labels
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    pairs.sort();
    if pairs.is_empty() {
        "-".to_owned()
    } else {
        pairs.join(",")
    }
}

/// Taints in the order of their keys: "a=1,b=2:prefer".
pub fn taints(taints: &[v1::Taint]) -> String {
    let soft = |taint: &v1::Taint| if taint.soft { ":prefer" } else { "" };
    let mut texts: Vec<_> = taints
        .iter()
        .map(|taint| format!("{}={}{}", taint.key, taint.value, soft(taint)))
        .collect();
    texts.sort();
    or_dash(&texts.join(","))
}

/// Tolerations: "a=1,b" where any value of b is.
pub fn tolerations(tolerations: &[v1::Toleration]) -> String {
    let text = |toleration: &v1::Toleration| match toleration.value.as_str() {
        "" => toleration.key.clone(),
        value => format!("{}={value}", toleration.key),
    };
    or_dash(&tolerations.iter().map(text).collect::<Vec<_>>().join(","))
}

/// What an operation does, as the start of a sentence.
pub fn operation_phrase(kind: v1::OperationKind) -> &'static str {
    match kind {
        v1::OperationKind::Unspecified => "working on",
        v1::OperationKind::CreateVm => "creating",
        v1::OperationKind::StartVm => "starting",
        v1::OperationKind::StopVm => "stopping",
        v1::OperationKind::RestartVm => "restarting",
        v1::OperationKind::PauseVm => "pausing",
        v1::OperationKind::ResumeVm => "resuming",
        v1::OperationKind::MigrateVm => "migrating",
        v1::OperationKind::DeleteVm => "deleting",
        v1::OperationKind::CreateSnapshot => "making a snapshot of",
        v1::OperationKind::DeleteSnapshot => "deleting a snapshot of",
        v1::OperationKind::RevertSnapshot => "going back to a snapshot of",
    }
}

/// "-" for nothing.
pub fn or_dash(text: &str) -> String {
    if text.is_empty() {
        "-".to_owned()
    } else {
        text.to_owned()
    }
}

/// All about one object: sections of lines, each a name and a value.
#[derive(Debug, Default)]
pub struct Page(Vec<Entry>);

#[derive(Debug)]
enum Entry {
    Section(String),
    Line(String, String, Option<Style>),
    Table(String),
}

impl Page {
    /// Adds a line.
    pub fn line(&mut self, name: &str, value: impl AsRef<str>) -> &mut Self {
        self.0
            .push(Entry::Line(name.to_owned(), clean(value.as_ref()), None));
        self
    }

    /// Adds a painted line.
    pub fn painted(&mut self, name: &str, cell: &super::Cell) -> &mut Self {
        self.0
            .push(Entry::Line(name.to_owned(), cell.text.clone(), cell.style));
        self
    }

    /// Adds a line unless the value is empty.
    pub fn line_if(&mut self, name: &str, value: &str) -> &mut Self {
        if value.is_empty() {
            self
        } else {
            self.line(name, value)
        }
    }

    /// Begins a section.
    pub fn section(&mut self, name: &str) -> &mut Self {
        self.0.push(Entry::Section(name.to_owned()));
        self
    }

    /// Adds a table under its own name, unless it has no rows.
    pub fn table(&mut self, name: &str, columns: &[&str], rows: Vec<Vec<super::Cell>>) -> &mut Self {
        if rows.is_empty() {
            return self;
        }
        self.section(name);
        self.0.push(Entry::Table(super::table::layout(
            columns,
            rows,
            &super::table::Style::plain(),
        )));
        self
    }

    /// The text.
    pub fn render(&self, color: bool) -> String {
        let names = self.0.iter().map(|entry| {
            if let Entry::Line(name, ..) = entry {
                name.len()
            } else {
                0
            }
        });
        let width = names.max().unwrap_or(0) + 2;
        let (mut text, mut indent) = (String::new(), "");
        for entry in &self.0 {
            // Writing to a String cannot fail.
            let _ = match entry {
                Entry::Section(name) => {
                    indent = "  ";
                    writeln!(text, "\n{name}:")
                }
                Entry::Line(name, value, style) => {
                    let style = style.filter(|_| color).unwrap_or_default();
                    writeln!(
                        text,
                        "{indent}{:<width$}{style}{value}{style:#}",
                        format!("{name}:")
                    )
                }
                Entry::Table(table) => table.lines().try_for_each(|line| writeln!(text, "  {line}")),
            };
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_figures_at_most() {
        for (value, text) in [
            (0, "0 B"),
            (1000, "1000 B"),
            (1024, "1 KiB"),
            (1 << 20, "1 MiB"),
            (1_610_612_736, "1.5 GiB"),
            (256 << 20, "256 MiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(bytes(value), text);
        }
        assert_eq!(share(3 << 30, 16 << 30), "3.0/16 GiB");
        assert_eq!(share(0, 0), "0/0 B");
        assert_eq!(short(1_258_291.0), "1.2M");
        assert_eq!(rate(0.0), "0 B/s");
        assert_eq!(short(f64::NAN), "0");
    }

    #[test]
    fn spans_are_short() {
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (200, "3m20s"),
            (660, "11m"),
            (7500, "2h5m"),
            (36_060, "10h"),
            (90_000, "1d1h"),
            (864_000, "10d"),
        ] {
            assert_eq!(span(Duration::from_secs(seconds)), text);
        }
        assert_eq!(fine_span(Duration::from_millis(84)), "84 ms");
        assert_eq!(fine_span(Duration::from_millis(2140)), "2.1 s");
    }

    #[test]
    fn an_age_of_a_clock_that_runs_ahead_is_zero() {
        let now = Timestamp::from_second(1000).unwrap();
        let at = |seconds| prost_types::Timestamp { seconds, nanos: 0 };
        assert_eq!(age(Some(&at(2000)), now), "0s");
        assert_eq!(age(Some(&at(940)), now), "1m");
        assert_eq!(age(None, now), "-");
        assert_eq!(age(Some(&at(i64::MAX)), now), "-");
    }

    #[test]
    fn enum_values_become_words() {
        let cutting_over = v1::MigrationPhase::CuttingOver.into();
        assert_eq!(value::<v1::MigrationPhase>(cutting_over), "Cutting over");
        assert_eq!(value::<v1::VmState>(v1::VmState::Unspecified.into()), "Unknown");
        assert_eq!(value::<v1::VmState>(77), "Unknown (77)");
    }
}
