//! Whether the last run of a domain ended because it had migrated, by the log that libvirt keeps of each domain. libvirt itself forgets why a
//! domain is off when its daemon ends, and says that one crashed whose end it did not see; the line in the log is written before QEMU is
//! ended, and stays. Called when a source's QEMU has ended, and when libvirt does not know better.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    path::Path,
};

/// Where libvirt's system daemon keeps the logs.
const LOGS: &str = "/var/log/libvirt/qemu";
/// So much of its end is read: a run begins with the command line of QEMU, which has some thousand bytes.
const END: u64 = 64 << 10;

/// See the module's documentation. Reads a file.
pub(super) fn migrated(name: &str) -> bool {
    let end = end_of(&Path::new(LOGS).join(format!("{name}.log")));
    end.is_ok_and(|end| says_migrated(&end))
}

fn end_of(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(END)))?;
    let mut end = Vec::new();
    file.take(END).read_to_end(&mut end)?;
    Ok(String::from_utf8_lossy(&end).into_owned())
}

/// Of the last run only the first reason counts: a daemon that comes back to a QEMU that is gone writes another one.
fn says_migrated(log: &str) -> bool {
    let mut migrated = None;
    for line in log.lines() {
        // libvirt's own lines begin with the time, what QEMU says has no such form.
        let said = line.split_once("+0000: ").map_or("", |(_, said)| said);
        if said.starts_with("starting up libvirt") {
            migrated = None;
        } else if let Some(reason) = said.strip_prefix("shutting down, reason=") {
            migrated = migrated.or_else(|| Some(reason == "migrated"));
        }
    }
    migrated == Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STARTS: &str = "2026-11-30 07:10:51.546+0000: starting up libvirt version: 11.3.0, qemu version: 10.0.2, hostname: h1\n\
        /usr/bin/qemu-system-x86_64 \\\n-name guest=web \\\n2026-11-30 07:10:51.546+0000: Domain id=31 is tainted: high-privileges\n";
    const MIGRATED: &str = "2026-11-30 07:11:29.972+0000: initiating migration\n\
        2026-11-30 07:11:32.601+0000: shutting down, reason=migrated\n\
        2026-11-30T07:11:32.603868Z qemu-system-x86_64: terminating on signal 15 from pid 30839 (libvirtd)\n";
    const CRASHED: &str = "2026-11-30 07:11:47.100+0000: shutting down, reason=crashed\n";

    #[test]
    fn only_a_run_that_ended_by_its_migration_has_migrated() {
        let says = |parts: &[&str]| says_migrated(&parts.concat());
        assert!(says(&[STARTS, MIGRATED]));
        assert!(says(&[STARTS, CRASHED, STARTS, MIGRATED]));
        assert!(
            says(&[STARTS, MIGRATED, CRASHED]),
            "the daemon did not see the end"
        );
        assert!(says(&[MIGRATED]), "the beginning is not read any more");
        assert!(!says(&[STARTS, CRASHED]));
        assert!(!says(&[STARTS, CRASHED, MIGRATED]), "of no run");
        assert!(!says(&[STARTS, MIGRATED, STARTS]), "it has come back");
        assert!(!says(&[STARTS]));
        assert!(!says(&["shutting down, reason=migrated\n"]), "said by QEMU");
    }
}
