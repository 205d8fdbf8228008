//! Pressure stall information, from /proc/pressure.
//!
//! Parsed here and not by the procfs crate, which wants both lines of each file (kernels before 5.13 write only
//! `some` for the processor) and keeps single precision.

use dalgu_proto::host::{Pressure, Stall};

use super::Root;

/// Pressure now. A resource the kernel does not measure (no PSI, or `psi=0`) has none.
pub(super) fn usage(root: &Root) -> Pressure {
    let read = |resource: &str| root.word(format!("proc/pressure/{resource}")).unwrap_or_default();
    let (cpu, memory, io) = (read("cpu"), read("memory"), read("io"));
    Pressure {
        cpu_some: stall(&cpu, "some"),
        memory_some: stall(&memory, "some"),
        memory_full: stall(&memory, "full"),
        io_some: stall(&io, "some"),
        io_full: stall(&io, "full"),
    }
}

/// One line, like `some avg10=0.20 avg60=1.34 avg300=1.08 total=16567558` (microseconds).
fn stall(text: &str, kind: &str) -> Option<Stall> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(kind)?.strip_prefix(' '))?;
    let field = |name: &str| {
        line.split_ascii_whitespace()
            .find_map(|part| part.strip_prefix(name)?.strip_prefix('='))
    };
    let percent = |name| {
        field(name)?
            .parse()
            .ok()
            .filter(|value: &f64| value.is_finite())
            .map(|value| value.clamp(0.0, 100.0))
    };
    Some(Stall {
        avg10_percent: percent("avg10")?,
        avg60_percent: percent("avg60")?,
        avg300_percent: percent("avg300")?,
        stalled_seconds_total: field("total")?.parse::<u64>().ok()? as f64 / 1e6,
    })
}

#[cfg(test)]
mod tests {
    use super::{super::root::fake::Tree, *};

    #[test]
    fn a_kernel_without_psi_has_no_pressure() {
        assert_eq!(usage(&Tree::new().root()), Pressure::default());
    }

    #[test]
    fn each_line_is_read_for_itself() {
        let tree = Tree::new();
        tree.write(
            "proc/pressure/cpu",
            "some avg10=0.20 avg60=1.34 avg300=1.08 total=16567558\n",
        );
        tree.write(
            "proc/pressure/memory",
            "some avg10=1.00 avg60=2.00 avg300=3.00 total=5000000\nfull avg10=0.10 avg60=0.20 avg300=0.30 total=250000\n",
        );
        tree.write(
            "proc/pressure/io",
            "some avg10=broken avg60=0.00 avg300=0.00 total=1\nfull avg10=nan avg60=0 avg300=0 total=1\n",
        );
        let pressure = usage(&tree.root());
        let cpu = pressure.cpu_some.unwrap();
        assert_eq!(
            (cpu.avg10_percent, cpu.avg60_percent, cpu.avg300_percent),
            (0.2, 1.34, 1.08)
        );
        assert_eq!(cpu.stalled_seconds_total, 16.567_558);
        assert_eq!(pressure.memory_some.unwrap().stalled_seconds_total, 5.0);
        assert_eq!(pressure.memory_full.unwrap().avg300_percent, 0.3);
        assert_eq!((pressure.io_some, pressure.io_full), (None, None));
    }
}
