//! A guest's whole story: what it said on its serial line, put together from the console files of all hosts it
//! was on. It reads the files themselves, by the host's documented place for them, never through Dalgu.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use anyhow::{Context as _, ensure};

use super::BOOT_LIMIT;
use super::words::Vm;
use crate::lab::{Lab, guest, wait_for};

/// Where hosts keep console logs.
pub const CONSOLE_DIR: &str = "/var/log/dalgu/console";

/// What a guest said so far. Files stay open, so that what was said before a host removed its file is not lost.
#[derive(Debug, Default)]
pub struct Story {
    chapters: Vec<Chapter>,
    said: Vec<u8>,
}

#[derive(Debug)]
struct Chapter {
    file: File,
    identity: (u64, u64),
    read: u64,
}

/// The console file of a VM on a host.
#[must_use]
pub fn file(lab: &Lab, host: u8, uid: &str) -> PathBuf {
    lab.layout()
        .host(host)
        .outside(CONSOLE_DIR)
        .join(format!("{uid}.log"))
}

impl Story {
    /// Reads on: first the rest of what is open already, then what the VM's present host has.
    ///
    /// # Errors
    /// If the present host has no file of it.
    pub fn read_on(&mut self, lab: &Lab, vm: &Vm) -> anyhow::Result<()> {
        for chapter in &mut self.chapters {
            chapter.read_on(&mut self.said)?;
        }
        let path = file(lab, vm.host_number()?, &vm.uid);
        let opened = File::open(&path).with_context(|| format!("open the console {}", path.display()))?;
        let meta = opened.metadata()?;
        let identity = (meta.dev(), meta.ino());
        if self.chapters.iter().all(|chapter| chapter.identity != identity) {
            let mut chapter = Chapter {
                file: opened,
                identity,
                read: 0,
            };
            chapter.read_on(&mut self.said)?;
            self.chapters.push(chapter);
        }
        Ok(())
    }

    /// The counts so far.
    #[must_use]
    pub fn ticks(&self) -> Vec<u64> {
        guest::ticks(&self.said)
    }

    /// How often the guest has come up.
    #[must_use]
    pub fn boots(&self) -> usize {
        String::from_utf8_lossy(&self.said).matches(guest::READY).count()
    }

    /// Reads on until the guest has said so many more counts.
    ///
    /// # Errors
    /// If it does not in time.
    pub async fn more(&mut self, lab: &Lab, vm: &Vm, ticks: usize) -> anyhow::Result<()> {
        let before = self.ticks().len();
        let heard = wait_for(
            &format!("{ticks} more counts of {}", vm.name),
            BOOT_LIMIT,
            async || self.read_on(lab, vm).is_ok() && self.ticks().len() >= before + ticks,
        )
        .await;
        heard.with_context(|| format!("the last it said: {:?}", self.end()))
    }

    /// The last it said, for a person who looks for the cause.
    fn end(&self) -> String {
        let from = self.said.len().saturating_sub(400);
        String::from_utf8_lossy(&self.said[from..]).into_owned()
    }

    /// That the guest came up once and said every count from 1 on once, in order.
    ///
    /// # Errors
    /// If not.
    pub fn is_whole(&self) -> anyhow::Result<()> {
        let ticks = self.ticks();
        ensure!(self.boots() == 1, "the guest came up {} times", self.boots());
        ensure!(
            ticks.first() == Some(&1),
            "the first count is missing: {:?}",
            ticks.first()
        );
        if let Some((before, after)) = guest::first_break(&ticks) {
            anyhow::bail!("{before} was followed by {after}, of {} counts", ticks.len());
        }
        Ok(())
    }
}

impl Chapter {
    fn read_on(&mut self, said: &mut Vec<u8>) -> anyhow::Result<()> {
        self.file
            .seek(SeekFrom::Start(self.read))
            .context("read a console")?;
        self.read += self.file.read_to_end(said).context("read a console")? as u64;
        Ok(())
    }
}
