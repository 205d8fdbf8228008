//! What a process takes of the machine, by its files under /proc. Used by the benchmarks.

use std::fs;

use anyhow::Context as _;

/// A file of a process, such as "status".
///
/// # Errors
/// If the process does not run.
pub fn file(pid: u32, name: &str) -> anyhow::Result<String> {
    fs::read_to_string(format!("/proc/{pid}/{name}")).with_context(|| format!("process {pid} does not run"))
}

/// Processor time so far, in seconds.
///
/// # Errors
/// If the process does not run.
pub fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let stat = file(pid, "stat")?;
    // utime and stime are the 14th and 15th fields; the second may hold blanks, and ends with a parenthesis.
    let (_, rest) = stat.rsplit_once(')').context("read a process's stat")?;
    let ticks: f64 = rest
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|word| word.parse::<f64>().ok())
        .sum();
    Ok(ticks / ticks_per_second()?)
}

/// Processor time of all programs together so far, in seconds.
///
/// # Errors
/// If the kernel does not say.
pub fn busy_seconds() -> anyhow::Result<f64> {
    let stat = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let line = stat.lines().next().context("read /proc/stat")?;
    // user, nice, system; then idle and the wait for disks; then interrupts.
    let ticks: f64 = line
        .split_whitespace()
        .skip(1)
        .take(7)
        .enumerate()
        .filter(|(index, _)| ![3, 4].contains(index))
        .filter_map(|(_, word)| word.parse::<f64>().ok())
        .sum();
    Ok(ticks / ticks_per_second()?)
}

fn ticks_per_second() -> anyhow::Result<f64> {
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("clock ticks per second")?;
    Ok(f64::from(u32::try_from(ticks)?))
}

/// A line of a process's status, such as "VmRSS:", in MiB.
///
/// # Errors
/// If the process does not run, or there is no such line.
pub fn mib(pid: u32, label: &str) -> anyhow::Result<f64> {
    let kib = u32::try_from(kib_after(&file(pid, "status")?, label)?)?;
    Ok(f64::from(kib) / 1024.0)
}

/// Memory that the machine can still give, in KiB.
///
/// # Errors
/// If the kernel does not say.
pub fn available_kib() -> anyhow::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    kib_after(&text, "MemAvailable:")
}

fn kib_after(text: &str, label: &str) -> anyhow::Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(label));
    let word = line.and_then(|line| line.split_whitespace().next());
    Ok(word.with_context(|| format!("no {label}"))?.parse()?)
}
