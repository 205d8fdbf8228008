//! The formats of traces: which one the first line tells, and how its lines are read. See [`super`].

use std::{collections::BTreeMap, io::Read};

use csv::{StringRecord, StringRecordsIntoIter};

use super::{Column, Error, Line, STEP_S, Size, Trace, Usage, Vm, rounded, spans};

const OWN: [&str; 4] = ["arrival_s", "departure_s", "vcpus", "memory_mib"];
const AZURE: [&str; 6] = ["arrive_s", "vcpu", "mem_gb", "dur_lo_s", "dur_hi_s", "censored"];
const BITBRAINS: [&str; 7] = [
    "vm",
    "t",
    "cores",
    "cpu_cap_mhz",
    "cpu_use_mhz",
    "mem_cap_mib",
    "mem_use_mib",
];

const SECONDS: &str = "a whole number of seconds";
const SECONDS_OR_NONE: &str = "a whole number of seconds after arrival_s, or empty where the VM stays";
const MIB: &str = "a whole number of MiB, at least 1";
const SHARES: &str = "percentages from 0 to 100 with ; between them, as in 12;30.5;8, or empty";
const NUMBER: &str = "a number that is not negative";

/// Reads the lines of whatever format the columns are of.
pub(super) fn read<R: Read>(head: &StringRecord, lines: StringRecordsIntoIter<R>) -> Result<Trace, Error> {
    if let Some(columns) = find(head, OWN) {
        return own(head, columns, lines);
    }
    if let Some(columns) = find(head, AZURE) {
        return azure(columns, lines);
    }
    if let Some(columns) = find(head, BITBRAINS) {
        return bitbrains(columns, lines);
    }
    Err(Error::Columns {
        found: head.iter().collect::<Vec<_>>().join(","),
    })
}

fn place(head: &StringRecord, name: &'static str) -> Option<Column> {
    let at = head.iter().position(|column| column == name)?;
    Some((name, at))
}

/// Where all of these are; `None` where one is not.
fn find<const N: usize>(head: &StringRecord, names: [&'static str; N]) -> Option<[Column; N]> {
    let mut columns = [("", 0); N];
    for (column, name) in columns.iter_mut().zip(names) {
        *column = place(head, name)?;
    }
    Some(columns)
}

fn own<R: Read>(
    head: &StringRecord,
    [arrival, departure, vcpus, memory]: [Column; 4],
    lines: StringRecordsIntoIter<R>,
) -> Result<Trace, Error> {
    let [system, cpu_percent, memory_percent] =
        ["system", "cpu_percent", "memory_percent"].map(|name| place(head, name));
    let mut vms = Vec::new();
    for record in lines {
        let record = record?;
        let line = Line::of(&record);
        let arrive_s = line.whole(arrival, SECONDS)?;
        let shares = |column: Option<Column>| column.map_or_else(|| Ok(Vec::new()), |at| shares(&line, at));
        let named = system.map(|at| line.text(at)).filter(|name| !name.is_empty());
        vms.push(Vm {
            size: Size {
                vcpus: line.vcpus(vcpus)?,
                memory_mib: match line.whole(memory, MIB)? {
                    0 => return Err(line.wrong(memory, MIB)),
                    mib => mib,
                },
            },
            arrive_s,
            leave_s: match line.text(departure) {
                "" => None,
                _ => match line.whole(departure, SECONDS_OR_NONE)? {
                    leave_s if leave_s > arrive_s => Some(leave_s),
                    _ => return Err(line.wrong(departure, SECONDS_OR_NONE)),
                },
            },
            system: named.map(str::to_owned),
            usage: Usage {
                cpu: shares(cpu_percent)?,
                memory: shares(memory_percent)?,
            },
        });
    }
    Ok(Trace::of(vms))
}

fn shares(line: &Line<'_>, column: Column) -> Result<Vec<f32>, Error> {
    let text = line.text(column);
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let share = |text: &str| {
        let percent: f32 = text.trim().parse().ok()?;
        (0.0..=100.0).contains(&percent).then_some(percent / 100.0)
    };
    let shares: Option<Vec<f32>> = text.split(';').map(share).collect();
    shares.ok_or_else(|| line.wrong(column, SHARES))
}

/// A lifetime is the middle of its bin; a VM that was still there when the trace was taken stays. Nothing is known after the last arrival.
fn azure<R: Read>(
    [arrive, vcpu, memory, low, high, censored]: [Column; 6],
    lines: StringRecordsIntoIter<R>,
) -> Result<Trace, Error> {
    let mut vms = Vec::new();
    for record in lines {
        let record = record?;
        let line = Line::of(&record);
        let arrive_s = line.whole(arrive, SECONDS)?;
        let stays = matches!(line.text(censored), "1" | "True" | "true");
        let life = || {
            Ok::<_, Error>(f64::midpoint(
                line.number(low, NUMBER)?,
                line.number(high, NUMBER)?,
            ))
        };
        vms.push(Vm {
            size: Size {
                vcpus: line.vcpus(vcpu)?,
                memory_mib: rounded(line.number(memory, NUMBER)? * 1024.0).max(1),
            },
            arrive_s,
            leave_s: match stays {
                true => None,
                false => Some(arrive_s + rounded(life()?)),
            },
            system: None,
            usage: Usage::default(),
        });
    }
    let trace = Trace::of(vms);
    let last = trace.vms.iter().map(|vm| vm.arrive_s).max().unwrap_or(0);
    Ok(Trace {
        end_s: last + STEP_S,
        ..trace
    })
}

/// What is known of a VM of that trace so far.
#[derive(Default)]
struct Seen {
    first: u64,
    cores: f64,
    memory_mib: f64,
    /// Cores used, memory in MiB used.
    samples: Vec<(f32, f32)>,
}

/// A VM reserves the most that it ever was given. A sample that is missing is taken to be as the one before.
fn bitbrains<R: Read>(columns: [Column; 7], lines: StringRecordsIntoIter<R>) -> Result<Trace, Error> {
    const NEXT: &str = "the number of a sample, later than the one of the same VM before";
    let [id, sample, cores, cap, used, memory_cap, memory_used] = columns;
    let mut seen = BTreeMap::<u64, Seen>::new();
    for record in lines {
        let record = record?;
        let line = Line::of(&record);
        let at = line.whole(sample, NEXT)?;
        let vm = seen
            .entry(line.whole(id, "the number of a VM")?)
            .or_insert_with(|| Seen {
                first: at,
                ..Seen::default()
            });
        let (given, cap) = (line.number(cores, NUMBER)?, line.number(cap, NUMBER)?);
        let share = line.number(used, NUMBER)? / cap.max(1e-9);
        let memory_mib = line.number(memory_cap, NUMBER)?;
        vm.cores = vm.cores.max(given);
        vm.memory_mib = vm.memory_mib.max(memory_mib);
        let place = at
            .checked_sub(vm.first)
            .and_then(|place| usize::try_from(place).ok());
        let place = place
            .filter(|place| *place >= vm.samples.len())
            .ok_or_else(|| line.wrong(sample, NEXT))?;
        // Before those that are missing are filled in.
        spans((at - vm.first) * STEP_S)?;
        let before = vm.samples.last().copied().unwrap_or_default();
        vm.samples.resize(place, before);
        #[expect(clippy::cast_possible_truncation, reason = "a few digits are enough")]
        vm.samples.push((
            (share.min(1.0) * given) as f32,
            line.number(memory_used, NUMBER)?.min(memory_mib) as f32,
        ));
    }
    let ends = |vm: &Seen| (vm.first + u64::try_from(vm.samples.len()).unwrap_or(0)) * STEP_S;
    let end_s = seen.values().map(ends).max().unwrap_or(0);
    let vms = seen.values().map(|vm| {
        let (cores, memory_mib) = (vm.cores.max(1.0), vm.memory_mib.max(1.0));
        #[expect(clippy::cast_possible_truncation, reason = "shares")]
        let share = |used: f32, of: f64| (f64::from(used) / of) as f32;
        Vm {
            size: Size {
                vcpus: u32::try_from(rounded(cores)).unwrap_or(u32::MAX),
                memory_mib: rounded(memory_mib),
            },
            arrive_s: vm.first * STEP_S,
            leave_s: Some(ends(vm)).filter(|at_s| *at_s < end_s),
            system: None,
            usage: Usage {
                cpu: vm.samples.iter().map(|(used, _)| share(*used, cores)).collect(),
                memory: vm
                    .samples
                    .iter()
                    .map(|(_, used)| share(*used, memory_mib))
                    .collect(),
            },
        }
    });
    Ok(Trace::of(vms.collect()))
}
