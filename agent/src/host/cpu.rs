//! Processor time and load of the host, from /proc/stat and /proc/loadavg.

use dalgu_proto::host::CpuTimes;
use procfs::{CpuTime, KernelStats, LoadAverage};

use super::{Error, Root};

/// Time per state, and how many processors are online.
pub(super) fn times(root: &Root) -> Result<(CpuTimes, usize), Error> {
    let stats: KernelStats = root.parse_ticks("proc/stat")?;
    Ok((convert(&stats.total), stats.cpu_time.len()))
}

fn convert(total: &CpuTime) -> CpuTimes {
    let seconds = |millis: u64| millis as f64 / 1_000.0;
    CpuTimes {
        user: seconds(total.user_ms()),
        nice: seconds(total.nice_ms()),
        system: seconds(total.system_ms()),
        idle: seconds(total.idle_ms()),
        iowait: seconds(total.iowait_ms().unwrap_or(0)),
        irq: seconds(total.irq_ms().unwrap_or(0)),
        softirq: seconds(total.softirq_ms().unwrap_or(0)),
        steal: seconds(total.steal_ms().unwrap_or(0)),
        guest: seconds(total.guest_ms().unwrap_or(0)),
    }
}

/// Load over 1, 5 and 15 minutes.
pub(super) fn load(root: &Root) -> Result<[f64; 3], Error> {
    let load: LoadAverage = root.parse("proc/loadavg")?;
    let load = [load.one, load.five, load.fifteen];
    if load.iter().any(|value| !(0.0..=f32::MAX).contains(value)) {
        return Err(root.malformed("proc/loadavg", "a load is no number of processes"));
    }
    // The kernel writes two decimals; an f32 like 0.3 is 0.30000001192… as an f64.
    Ok(load.map(|value| (f64::from(value) * 100.0).round() / 100.0))
}

#[cfg(test)]
mod tests {
    use super::{super::root::fake::Tree, *};

    #[test]
    fn ticks_become_seconds_and_guest_time_is_not_counted_twice() {
        let tree = Tree::new();
        tree.write(
            "proc/stat",
            "cpu  1000 200 300 4000 50 6 7 8 90 0\ncpu0 500 100 150 2000 25 3 3 4 45 0\ncpu1 500 100 150 2000 25 3 4 4 45 0\n\
             intr 5 0 0\nctxt 12\nbtime 1700000000\nprocesses 3\nprocs_running 1\nprocs_blocked 0\n",
        );
        let (times, cpus) = times(&tree.root()).unwrap();
        assert_eq!(cpus, 2);
        assert_eq!(
            (times.user, times.nice, times.system, times.idle),
            (10.0, 2.0, 3.0, 40.0)
        );
        assert_eq!(
            (times.iowait, times.irq, times.softirq, times.steal),
            (0.5, 0.06, 0.07, 0.08)
        );
        assert_eq!(times.guest, 0.9);
        assert!((times.busy() - 15.21).abs() < 1e-9, "{}", times.busy());
    }

    #[test]
    fn load_averages_keep_the_digits_the_kernel_wrote() {
        let tree = Tree::new();
        tree.write("proc/loadavg", "0.30 12.07 3.10 2/151 1234\n");
        assert_eq!(load(&tree.root()).unwrap(), [0.3, 12.07, 3.1]);
    }

    #[test]
    fn a_load_that_no_number_can_hold_is_none() {
        let tree = Tree::new();
        for text in [
            "0.30 12.07 1e99 2/151 1234",
            "-1.00 12.07 3.10 2/151 1234",
            "nan 0.10 0.10 2/151 1234",
        ] {
            tree.write("proc/loadavg", text);
            assert!(load(&tree.root()).is_err(), "{text}");
        }
    }
}
