//! Each host's own account of its load: a control group that holds its processes, whose stalls and processor time the host sees
//! in `/proc/pressure` and `/proc/stat`.
//!
//! All hosts of a lab share one kernel, whose own account is of all of them and of whatever else the machine does. The kernel keeps the stalls of every
//! control group as it keeps the machine's, so these files are mounted as they are. Of processor time a group only has a sum: the host's
//! anchor writes it down in the form of `/proc/stat`, several times a second.
//! Where no cgroup2 is mounted, or none that measures stalls, hosts see the machine's files.
//! Called when a host boots or ends, and by its anchor. It touches only groups that are named after the lab's hosts.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use super::host::bind;
use super::layout::Host;
use super::run::wait_for;

/// What the kernel measures stalls of.
const RESOURCES: [&str; 3] = ["cpu", "memory", "io"];
/// How often processor time is written down; agents take samples once a second.
const EVERY: Duration = Duration::from_millis(200);
/// A tick of `/proc/stat`, in microseconds.
const TICK_US: u64 = 10_000;

/// A processor that guests of one host can fill while another host is calm.
///
/// # Errors
/// Where hosts of a lab on this machine have no account of their own, or it has one processor only.
pub fn processor_to_fill() -> anyhow::Result<usize> {
    let top = top().context("no cgroup2 is mounted: all hosts of a lab see the load of the machine")?;
    let group = top.join(format!("dalgu-try-{}", std::process::id()));
    let possible = fs::create_dir(&group).is_ok() && tells(&group);
    let _ = fs::remove_dir(&group);
    ensure!(
        possible,
        "no group that measures stalls can be made in {}: all hosts of a lab see the load of the machine",
        top.display()
    );
    let allowed = sched_getaffinity(Pid::from_raw(0)).context("ask for this process's processors")?;
    let is_allowed = |cpu: &usize| allowed.is_set(*cpu).unwrap_or(false);
    let mut cpus = (0..CpuSet::count()).rev().filter(is_allowed);
    let last = cpus.next();
    ensure!(cpus.next().is_some(), "there is one processor only");
    last.context("there is no processor")
}

/// Makes the host's group, where that is possible.
pub(super) fn make(host: &Host) {
    let Some(group) = group(host) else { return };
    // Refused where it is read-only; then there is none.
    let _ = fs::create_dir(&group);
    if !tells(&group) {
        let _ = fs::remove_dir(group);
    }
}

/// The words before a command that make it, and all that it starts, belong to the host's group.
pub(super) fn enter(host: &Host) -> Vec<String> {
    let Some(entrance) = group(host)
        .map(|group| group.join("cgroup.procs"))
        .filter(|entrance| entrance.exists())
    else {
        return Vec::new();
    };
    let entrance = entrance.to_string_lossy();
    ["sh", "-c", "echo 0 >\"$0\" && exec \"$@\"", &entrance]
        .map(str::to_owned)
        .to_vec()
}

/// Removes the host's group, whose processes have been ended.
///
/// # Errors
/// If some process is left in it.
pub(super) async fn remove(host: &Host) -> anyhow::Result<()> {
    let Some(group) = group(host) else { return Ok(()) };
    wait_for(
        &format!("end of the control group {}", group.display()),
        Duration::from_secs(10),
        async || !group.exists() || fs::remove_dir(&group).is_ok(),
    )
    .await
}

fn group(host: &Host) -> Option<PathBuf> {
    top().map(|top| top.join(&host.namespace))
}

/// Where cgroup2 is mounted.
fn top() -> Option<PathBuf> {
    mounted(&fs::read_to_string("/proc/self/mounts").ok()?)
}

fn mounted(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let place = words.next()?;
        (words.next()? == "cgroup2").then(|| place.into())
    })
}

/// Whether a group has all that an account needs. A kernel that was told not to measure stalls has the files, and refuses to read them.
fn tells(group: &Path) -> bool {
    let read = |file: String| fs::read_to_string(group.join(file));
    let stalls = RESOURCES.map(|resource| read(format!("{resource}.pressure")));
    let used = read("cpu.stat".to_owned());
    stalls.iter().all(Result::is_ok) && used.is_ok_and(|used| Used::read(&used).is_some())
}

/// The account of the host that this process belongs to.
#[derive(Debug)]
pub(super) struct Account {
    used: fs::File,
    stat: fs::File,
    cpus: u64,
    /// What else is in the machine's file.
    rest: String,
}

impl Account {
    /// Mounts the account over the machine's; `None` where the host has none. Called in the host's own mount namespace.
    ///
    /// # Errors
    /// If something cannot be mounted or read.
    pub(super) fn show(host: &Host) -> anyhow::Result<Option<Self>> {
        let own =
            fs::read_to_string("/proc/self/cgroup").context("read the control groups of this process")?;
        let Some(group) = own
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .filter(|group| group.ends_with(&host.namespace))
        else {
            return Ok(None);
        };
        // `ip netns exec` gives a new /sys, in which the groups are not mounted.
        let top = host.dir.join("cgroup");
        fs::create_dir_all(&top).with_context(|| format!("make {}", top.display()))?;
        mount(
            Some("none"),
            &top,
            Some("cgroup2"),
            MsFlags::empty(),
            None::<&str>,
        )
        .context("mount the control groups")?;
        let group = top.join(group);
        for resource in RESOURCES {
            let place = Path::new("/proc/pressure").join(resource);
            bind(&group.join(format!("{resource}.pressure")), &place)?;
        }
        let machine = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
        let (cpus, rest): (Vec<_>, Vec<_>) = machine.lines().partition(|line| line.starts_with("cpu"));
        ensure!(cpus.len() > 1, "/proc/stat names no processor");
        let path = host.outside("/proc/stat");
        let account = Self {
            used: fs::File::open(group.join("cpu.stat")).context("open the processor time of the host")?,
            stat: fs::File::create(&path).with_context(|| format!("make {}", path.display()))?,
            cpus: cpus.len() as u64 - 1,
            rest: rest.join("\n"),
        };
        account.write()?;
        bind(&path, Path::new("/proc/stat"))?;
        // What is open and what was mounted from there stays.
        umount2(&top, MntFlags::MNT_DETACH).context("unmount the control groups")?;
        Ok(Some(account))
    }

    /// Goes on with it for ever.
    ///
    /// # Errors
    /// If it cannot be read or written.
    pub(super) async fn keep(self) -> anyhow::Result<()> {
        loop {
            tokio::time::sleep(EVERY).await;
            self.write()?;
        }
    }

    /// In place, as this very file is mounted.
    fn write(&self) -> anyhow::Result<()> {
        let mut text = [0; 4096];
        let length = self
            .used
            .read_at(&mut text, 0)
            .context("read the processor time of the host")?;
        let used =
            Used::read(&String::from_utf8_lossy(&text[..length])).context("no processor time is told")?;
        let now = Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME).context("read the clock")?);
        let text = stat(self.cpus, now, used, &self.rest);
        self.stat
            .write_all_at(text.as_bytes(), 0)
            .and_then(|()| self.stat.set_len(text.len() as u64))
            .context("write /proc/stat of the host")
    }
}

/// Processor time that a group has used, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Used {
    user: u64,
    system: u64,
}

impl Used {
    /// From `cpu.stat`.
    fn read(text: &str) -> Option<Self> {
        let number = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
        };
        Some(Self {
            user: number("user_usec")?,
            system: number("system_usec")?,
        })
    }
}

/// A `/proc/stat` of so many processors, which have used this in so long. How it was spread over them is not known.
fn stat(cpus: u64, up: Duration, used: Used, rest: &str) -> String {
    let up = u64::try_from(up.as_micros()).unwrap_or(u64::MAX);
    let line = |name: &str, shares: u64, up: u64| {
        let (user, system) = (used.user / shares, used.system / shares);
        let idle = up.saturating_sub(user + system);
        let [user, system, idle] = [user, system, idle].map(|time| time / TICK_US);
        format!("{name} {user} 0 {system} {idle} 0 0 0 0 0 0\n")
    };
    let all = line("cpu ", 1, up.saturating_mul(cpus));
    let each = (0..cpus).map(|cpu| line(&format!("cpu{cpu}"), cpus, up));
    format!("{all}{}{rest}\n", each.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_groups_are_found_beside_older_ones_and_where_they_are_alone() {
        let mixed = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                     cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(mounted(mixed), Some("/sys/fs/cgroup/unified".into()));
        let alone = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n";
        assert_eq!(mounted(alone), Some("/sys/fs/cgroup".into()));
        assert_eq!(mounted("cgroup2 /cgroup2 tmpfs rw 0 0\n"), None);
    }

    #[test]
    fn processor_time_of_a_group_becomes_that_of_a_host() {
        let used =
            Used::read("usage_usec 3000000\nuser_usec 2000000\nsystem_usec 1000000\nnice_usec 0\n").unwrap();
        let text = stat(2, Duration::from_secs(10), used, "ctxt 5\nbtime 1");
        assert_eq!(
            text,
            "cpu  200 0 100 1700 0 0 0 0 0 0\ncpu0 100 0 50 850 0 0 0 0 0 0\ncpu1 100 0 50 850 0 0 0 0 0 0\nctxt 5\nbtime 1\n"
        );
        assert_eq!(Used::read("nr_periods 0\n"), None);
    }
}
