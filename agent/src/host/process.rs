//! A QEMU process as the kernel sees it: waiting of its virtual processors, resident memory.
//!
//! Called by the part of the hypervisor that samples VMs, with the process id it has from there. Cost: two small
//! files a thread.

use std::{fs, io, time::Duration};

use procfs::process::StatM;

use super::{
    Error, Root,
    root::{page_size, since_boot},
};

/// What the kernel knows of a VM's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// Time the virtual processors were ready to run but waited for a host processor, since the process began.
    pub cpu_wait: Duration,
    /// Resident memory.
    pub resident_bytes: u64,
}

/// Time since the host's start: the clock for [`super::VmRates`].
///
/// # Errors
/// See [`Error::Clock`].
pub fn clock() -> Result<Duration, Error> {
    since_boot()
}

/// Reads the process of that id.
///
/// # Errors
/// When there is no such process (any more).
pub fn sample(root: &Root, pid: u32) -> Result<Sample, Error> {
    let statm: StatM = root.parse(&format!("proc/{pid}/statm"))?;
    Ok(Sample {
        cpu_wait: cpu_wait(root, pid)?,
        resident_bytes: statm.resident.saturating_mul(page_size()),
    })
}

/// Sum of the run-queue delay of the threads that are virtual processors. A thread that ends meanwhile is left out,
/// as is a kernel that keeps no schedstat.
fn cpu_wait(root: &Root, pid: u32) -> Result<Duration, Error> {
    let path = root.path(format!("proc/{pid}/task"));
    let threads = fs::read_dir(&path).map_err(|source| Error::Read {
        path: path.clone(),
        source,
    })?;
    let mut waited = 0_u64;
    for thread in threads {
        let thread = thread
            .map_err(|source| Error::Read {
                path: path.clone(),
                source,
            })?
            .path();
        let read = |name: &str| -> io::Result<String> { fs::read_to_string(thread.join(name)) };
        if read("comm").is_ok_and(|name| is_vcpu(name.trim_end()))
            && let Ok(schedstat) = read("schedstat")
        {
            waited = waited.saturating_add(run_delay(&schedstat).unwrap_or(0));
        }
    }
    Ok(Duration::from_nanos(waited))
}

/// QEMU names the threads `CPU 3/KVM`, `CPU 3/TCG`, and the one of single-threaded emulation `ALL CPUs/TCG`.
fn is_vcpu(name: &str) -> bool {
    let numbered = name
        .strip_prefix("CPU ")
        .and_then(|rest| rest.split_once('/'))
        .is_some_and(|(number, _)| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()));
    numbered || name == "ALL CPUs/TCG"
}

/// Second field of schedstat: nanoseconds spent ready but not running.
fn run_delay(schedstat: &str) -> Option<u64> {
    schedstat.split_ascii_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::{super::root::fake::Tree, *};

    fn qemu(threads: &[(&str, &str)]) -> Tree {
        let tree = Tree::new();
        tree.write("proc/42/statm", "100000 5000 300 10 0 900 0\n");
        for (index, (comm, schedstat)) in threads.iter().enumerate() {
            tree.write(&format!("proc/42/task/{index}/comm"), &format!("{comm}\n"));
            tree.write(
                &format!("proc/42/task/{index}/schedstat"),
                &format!("{schedstat}\n"),
            );
        }
        tree
    }

    #[test]
    fn only_the_waiting_of_virtual_processors_counts() {
        let tree = qemu(&[
            ("qemu-system-x86", "1 1000000000 1"),
            ("CPU 0/KVM", "900 250000000 5"),
            ("CPU 11/TCG", "900 500000000 5"),
            ("IO mon_iothread", "900 7000000000 5"),
            ("CPU x/KVM", "900 7000000000 5"),
        ]);
        let sample = sample(&tree.root(), 42).unwrap();
        assert_eq!(sample.cpu_wait, Duration::from_millis(750));
        assert_eq!(sample.resident_bytes, 5000 * page_size());
    }

    #[test]
    fn single_threaded_emulation_counts_too() {
        let tree = qemu(&[("ALL CPUs/TCG", "900 250000000 5")]);
        assert_eq!(
            sample(&tree.root(), 42).unwrap().cpu_wait,
            Duration::from_millis(250)
        );
    }

    #[test]
    fn a_thread_without_schedstat_is_left_out() {
        let tree = qemu(&[("CPU 0/KVM", "900 250000000 5"), ("CPU 1/KVM", "")]);
        tree.remove("proc/42/task/1/schedstat");
        assert_eq!(
            sample(&tree.root(), 42).unwrap().cpu_wait,
            Duration::from_millis(250)
        );
    }

    #[test]
    fn a_process_that_is_gone_is_an_error() {
        assert!(sample(&Tree::new().root(), 42).is_err());
    }
}
