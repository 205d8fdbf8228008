//! What is replayed: VMs with their sizes, when they come and go, and what they use, where that is known.
//!
//! A trace is CSV; its first line names the columns, in any order, and with them the format:
//!
//! | format | columns |
//! |---|---|
//! | Dalgu's | `arrival_s`, `departure_s` (empty: it stays), `vcpus`, `memory_mib`; if wanted `system`, `cpu_percent`, `memory_percent` |
//! | Azure 2017 | `arrive_s`, `vcpu`, `mem_gb`, `dur_lo_s`, `dur_hi_s`, `censored` |
//! | Bitbrains | `vm`, `t`, `cores`, `cpu_cap_mhz`, `cpu_use_mhz`, `mem_cap_mib`, `mem_use_mib`: a line for each VM and sample |
//!
//! `cpu_percent` and `memory_percent` are what a VM uses of its own size: numbers with `;` between them, one for each [`STEP_S`] from its
//! arrival on, again from the first when they are at an end. One number is a use that never changes.
//!
//! Called by the command and the benchmarks. Pure: reads from whatever it is given.

mod formats;

use std::io::Read;

use csv::StringRecord;

/// Seconds between two samples of use, and between two points of a series.
pub const STEP_S: u64 = 300;
/// The longest trace: for each step of it something is kept in memory, by each policy and forecast that it is replayed with.
pub const MOST_DAYS: u64 = 366;
/// The columns that a trace of ours must have, as an example to show.
const COLUMNS: &str = "arrival_s,departure_s,vcpus,memory_mib";

/// Why a trace cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bytes cannot be read as CSV.
    #[error("the trace cannot be read as CSV")]
    Csv(#[from] csv::Error),
    /// There is no first line.
    #[error("the trace is empty: its first line must name the columns, at least \"{COLUMNS}\"")]
    Empty,
    /// The first line is of no known format.
    #[error(
        "line 1: no known format has the columns \"{found}\"; a trace of Dalgu's has at least \"{COLUMNS}\""
    )]
    Columns {
        /// What it says.
        found: String,
    },
    /// A value is not what its column has.
    #[error("line {line}: {column} is {value:?}, but must be {expected}")]
    Value {
        /// Line of the file, from 1 on.
        line: u64,
        /// The column.
        column: &'static str,
        /// What is there.
        value: String,
        /// What would do.
        expected: &'static str,
    },
    /// There are columns, and nothing else.
    #[error("the trace has columns but no VM: line 2 must be one")]
    NoVm,
    /// It is longer than what can be replayed.
    #[error(
        "the trace spans {days} days, from its first arrival to its last departure or sample, and no more than {MOST_DAYS} are replayed: \
         see that its times are in seconds, leave departures empty where VMs stay, or cut it into pieces"
    )]
    TooLong {
        /// How long it is.
        days: u64,
    },
}

/// Virtual processors and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size {
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory in MiB; of a VM, what is reserved for it.
    pub memory_mib: u64,
}

/// What a VM uses, as shares of its size, one for each [`STEP_S`]. Empty where it is not known.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Usage {
    /// Of the virtual processors.
    pub cpu: Vec<f32>,
    /// Of the memory.
    pub memory: Vec<f32>,
}

/// A VM of a trace.
#[derive(Debug, Clone, PartialEq)]
pub struct Vm {
    /// What is reserved for it.
    pub size: Size,
    /// When it comes, in seconds of the trace.
    pub arrive_s: u64,
    /// When it goes; `None` where it stays.
    pub leave_s: Option<u64>,
    /// Whose it is, where the trace says so.
    pub system: Option<String>,
    /// What it uses.
    pub usage: Usage,
}

impl Vm {
    /// Processors that it uses then; 0 where that is not known.
    pub fn cpus_used(&self, at_s: u64) -> f64 {
        f64::from(self.sample(&self.usage.cpu, at_s)) * f64::from(self.size.vcpus)
    }

    /// Memory in MiB that it uses then; 0 where that is not known.
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53 MiB")]
    pub fn memory_mib_used(&self, at_s: u64) -> f64 {
        f64::from(self.sample(&self.usage.memory, at_s)) * self.size.memory_mib as f64
    }

    fn sample(&self, samples: &[f32], at_s: u64) -> f32 {
        let steps = at_s.saturating_sub(self.arrive_s) / STEP_S;
        let Ok(steps) = usize::try_from(steps) else {
            return 0.0;
        };
        match samples.len() {
            0 => 0.0,
            len => samples[steps % len],
        }
    }
}

/// Something that happens: a VM comes or goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Event {
    /// When, in seconds of the trace.
    pub at_s: u64,
    /// Whether it comes. Who leaves at the same time makes room first.
    pub comes: bool,
    /// Its place among the trace's VMs.
    pub vm: usize,
}

/// VMs that come and go.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Trace {
    /// The VMs.
    pub vms: Vec<Vm>,
    /// When it begins.
    pub start_s: u64,
    /// When it is at an end: what happens later is not looked at.
    pub end_s: u64,
}

impl Trace {
    /// Reads a trace of any of the known formats.
    ///
    /// # Errors
    /// If it is of none, or a value is not what its column has; with the line and what would do. If it is longer than [`MOST_DAYS`].
    pub fn read(from: impl Read) -> Result<Self, Error> {
        let mut reader = csv::ReaderBuilder::new()
            .trim(csv::Trim::All)
            .comment(Some(b'#'))
            .from_reader(from);
        let head = reader.headers()?.clone();
        if head.is_empty() {
            return Err(Error::Empty);
        }
        let trace = formats::read(&head, reader.into_records())?;
        spans(trace.end_s - trace.start_s)?;
        match trace.vms.is_empty() {
            true => Err(Error::NoVm),
            false => Ok(trace),
        }
    }

    /// From its first arrival to the last of what is known of its VMs.
    pub fn of(vms: Vec<Vm>) -> Self {
        let start_s = vms.iter().map(|vm| vm.arrive_s).min().unwrap_or(0);
        let known = |vm: &Vm| {
            let samples = vm.usage.cpu.len().max(vm.usage.memory.len());
            let seen = vm.arrive_s + u64::try_from(samples).unwrap_or(0) * STEP_S;
            seen.max(vm.leave_s.unwrap_or(vm.arrive_s + 1))
        };
        let end_s = vms.iter().map(known).max().unwrap_or(0).max(start_s + STEP_S);
        Self { vms, start_s, end_s }
    }

    /// The same time with some of its VMs only.
    #[must_use]
    pub fn only(&self, vms: impl IntoIterator<Item = usize>) -> Self {
        Self {
            vms: vms.into_iter().map(|vm| self.vms[vm].clone()).collect(),
            ..*self
        }
    }

    /// All arrivals and departures, in order, also those after its end.
    pub fn events(&self) -> Vec<Event> {
        let mut events = Vec::with_capacity(self.vms.len() * 2);
        for (index, vm) in self.vms.iter().enumerate() {
            let event = |at_s, comes| Event {
                at_s,
                comes,
                vm: index,
            };
            events.push(event(vm.arrive_s, true));
            events.extend(vm.leave_s.map(|at_s| event(at_s.max(vm.arrive_s + 1), false)));
        }
        events.sort_unstable();
        events
    }

    /// Whether it says what VMs use.
    pub fn has_usage(&self) -> bool {
        self.vms
            .iter()
            .any(|vm| !vm.usage.cpu.is_empty() || !vm.usage.memory.is_empty())
    }

    /// A VM that is larger than this in a dimension, if there is one.
    pub fn larger_than(&self, size: Size) -> Option<&Vm> {
        self.vms
            .iter()
            .find(|vm| vm.size.vcpus > size.vcpus || vm.size.memory_mib > size.memory_mib)
    }

    /// The most that is reserved at once of each of the two.
    pub fn peak(&self) -> (u64, u64) {
        let (mut now, mut most) = ((0_u64, 0_u64), (0, 0));
        for event in self.events().iter().filter(|event| event.at_s <= self.end_s) {
            let size = self.vms[event.vm].size;
            let vcpus = u64::from(size.vcpus);
            now = match event.comes {
                true => (now.0 + vcpus, now.1 + size.memory_mib),
                false => (now.0 - vcpus, now.1 - size.memory_mib),
            };
            most = (most.0.max(now.0), most.1.max(now.1));
        }
        most
    }
}

/// A line, with its number for whoever cannot read it.
struct Line<'a> {
    number: u64,
    record: &'a StringRecord,
}

impl Line<'_> {
    fn of(record: &StringRecord) -> Line<'_> {
        Line {
            number: record.position().map_or(0, csv::Position::line),
            record,
        }
    }

    fn text(&self, (_, at): Column) -> &str {
        self.record.get(at).unwrap_or_default()
    }

    fn wrong(&self, column: Column, expected: &'static str) -> Error {
        Error::Value {
            line: self.number,
            column: column.0,
            value: self.text(column).to_owned(),
            expected,
        }
    }

    fn whole(&self, column: Column, expected: &'static str) -> Result<u64, Error> {
        let parsed = self.text(column).parse::<u64>().ok();
        parsed
            .filter(|value| *value < 1_000_000_000_000_000)
            .ok_or_else(|| self.wrong(column, expected))
    }

    /// A number that is finite and not negative.
    fn number(&self, column: Column, expected: &'static str) -> Result<f64, Error> {
        let parsed = self.text(column).parse::<f64>().ok();
        parsed
            .filter(|value| (0.0..1e15).contains(value))
            .ok_or_else(|| self.wrong(column, expected))
    }

    fn vcpus(&self, column: Column) -> Result<u32, Error> {
        let expected = "a whole number of virtual processors from 1 to 4096";
        let value = self.whole(column, expected)?;
        match u32::try_from(value) {
            Ok(vcpus @ 1..=4096) => Ok(vcpus),
            _ => Err(self.wrong(column, expected)),
        }
    }
}

/// Refuses a trace of so many seconds where that is too long.
fn spans(seconds: u64) -> Result<(), Error> {
    match seconds.div_ceil(24 * 3600) {
        ..=MOST_DAYS => Ok(()),
        days => Err(Error::TooLong { days }),
    }
}

/// A column's name and place.
type Column = (&'static str, usize);

/// To the nearest whole number of something that [`Line::number`] gave.
fn rounded(value: f64) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "from 0 to 10^15 times a small factor"
    )]
    let whole = value.round() as u64;
    whole
}
