//! Changes of a VM by the operator's words, and what the lab's guest says that it has written to its disk "data" meanwhile.

use std::collections::BTreeSet;
use std::fs;

use anyhow::ensure;

use super::story;
use super::words::{self, Vm, dalgu};
use crate::lab::Lab;

/// What the guest has said on its serial line on the host that it is on.
///
/// # Errors
/// If there is no such log.
pub fn said(lab: &Lab, vm: &Vm) -> anyhow::Result<String> {
    let bytes = fs::read(story::file(lab, vm.host_number()?, &vm.uid))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Changes a VM and waits until its host has done what it can.
///
/// # Errors
/// If it cannot be changed.
pub async fn update(lab: &Lab, name: &str, words: &[&str]) -> anyhow::Result<Vm> {
    let all: Vec<_> = ["vm", "update", name, "--wait"]
        .iter()
        .chain(words)
        .copied()
        .collect();
    dalgu(lab, &all).await?;
    words::vm(lab, name).await
}

/// Fields of a VM that it does not have yet as they are to be.
#[must_use]
pub fn pending(vm: &Vm) -> Vec<String> {
    let all = vm.all["status"]["pendingChanges"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    all.iter()
        .filter_map(|pending| Some(pending["field"].as_str()?.to_owned()))
        .collect()
}

/// The lines that the guest was told to be on stable storage.
#[must_use]
pub fn acknowledged(text: &str) -> BTreeSet<u64> {
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let written = whole
        .lines()
        .filter_map(|line| line.trim().strip_prefix("written "));
    written.filter_map(|count| count.parse().ok()).collect()
}

/// That every line that was acknowledged is in its sector of the disk.
///
/// # Errors
/// If one is not.
pub fn all_written(disk: &[u8], acknowledged: &BTreeSet<u64>) -> anyhow::Result<()> {
    for count in acknowledged {
        let at = usize::try_from(*count)? * 512;
        let wanted = format!("dalgu-write {count}");
        let found = String::from_utf8_lossy(&disk[at..at + 64]).trim_end().to_owned();
        ensure!(found == wanted, "sector {count} holds {found:?}");
    }
    Ok(())
}
