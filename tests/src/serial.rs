//! What a guest says on its serial line, read from the file itself, past Dalgu: libvirt says where it is. An open
//! log stays readable after its host has removed it, so that nothing said before a migration is missed.

use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;

use crate::lab::{Lab, guest, wait_for};

/// Longest time a guest takes to boot on a loaded machine.
const BOOT_LIMIT: Duration = Duration::from_mins(2);

/// The serial log of one domain on one host.
#[derive(Debug)]
pub struct Log {
    file: File,
}

impl Log {
    /// Opens the log of a domain, named as `virsh` takes it.
    ///
    /// # Errors
    /// If the domain is not on that host, or has no log.
    pub async fn of(lab: &Lab, host: u8, domain: &str) -> anyhow::Result<Self> {
        let xml = lab.virsh(host, &["dumpxml", domain]).await?;
        let path = path_in(&xml).with_context(|| format!("{domain} on h{host} has no serial log"))?;
        Self::open(&lab.layout().host(host).outside(path))
    }

    /// Opens a log, seen from outside its host.
    ///
    /// # Errors
    /// If it is not there.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let file = File::open(path).with_context(|| format!("open the serial log {}", path.display()))?;
        Ok(Self { file })
    }

    /// All that was said.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn read(&mut self) -> anyhow::Result<Vec<u8>> {
        let mut said = Vec::new();
        self.file.rewind().context("read a serial log")?;
        self.file.read_to_end(&mut said).context("read a serial log")?;
        Ok(said)
    }

    /// Waits until the guest has said so many counts.
    ///
    /// # Errors
    /// If it does not in time.
    pub async fn wait_for_ticks(&mut self, count: usize) -> anyhow::Result<()> {
        wait_for(&format!("{count} counts of the guest"), BOOT_LIMIT, async || {
            self.read().is_ok_and(|said| guest::ticks(&said).len() >= count)
        })
        .await
    }
}

/// Where the serial log is, by the XML of a domain.
#[must_use]
pub fn path_in(xml: &str) -> Option<&str> {
    quoted(xml.split_once("<serial type='file'")?.1.split_once("path=")?.1)
}

/// Where the first disk is, by the XML of a domain.
#[must_use]
pub fn disk_in(xml: &str) -> Option<&str> {
    quoted(xml.split_once("<disk ")?.1.split_once("<source file=")?.1)
}

fn quoted(text: &str) -> Option<&str> {
    let end = text.chars().next()?;
    text.get(1..)?.split(end).next()
}

/// Waits until a file bears the guest's greeting once more than `before` times.
///
/// # Errors
/// If it does not in time.
pub async fn wait_until_ready(log: &Path, before: usize) -> anyhow::Result<()> {
    wait_for("the guest's greeting", BOOT_LIMIT, async || {
        greetings(log) > before
    })
    .await
}

/// How often a guest has come up, by its log; 0 where there is none.
#[must_use]
pub fn greetings(log: &Path) -> usize {
    std::fs::read(log).map_or(0, |said| {
        String::from_utf8_lossy(&said).matches(guest::READY).count()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_paths_of_a_domains_disk_and_serial_log_are_found_in_its_xml() {
        let xml = "<domain><devices><disk type='file' device='disk'><driver name='qemu'/><source file='/a/b.qcow2'/></disk>\
                   <serial type='file'>\n<source path='/var/log/x.log' append='on'/></serial></devices></domain>";
        assert_eq!(path_in(xml), Some("/var/log/x.log"));
        assert_eq!(disk_in(xml), Some("/a/b.qcow2"));
        assert_eq!(path_in("<domain/>"), None);
    }
}
