//! An agent's ledger under a power cut at every write: what it promised to keep is there, and nothing is there in part.
//!
//! Needs `strace`, which `tests/lab/setup.sh` installs; without it these tests fail.

use std::{path::Path, process::Command};

use anyhow::{Result, ensure};
use dalgu_tests::store::{
    cut::{Moment, cut, moments, record, scratch},
    ledger,
    trace::Call,
};

const WRITER: &str = env!("CARGO_BIN_EXE_store-writer");

/// The calls of a program that makes a ledger in a directory which is not there yet, and writes to it.
fn calls(dir: &Path) -> Result<Vec<Call>> {
    let mut program = Command::new(WRITER);
    program
        .arg("ledger")
        .arg(dir.join("host/dalgu/ledger"))
        .args(["--to", "60"]);
    record(dir, &program)
}

fn judge(moments: &[Moment], torn: u64) -> Result<usize> {
    cut(moments, torn, |dir, acknowledged| {
        ledger::judge(&dir.join("dalgu/ledger"), acknowledged)
    })
}

#[test]
fn a_power_cut_at_any_write_of_a_ledger_loses_nothing_it_promised_to_keep() -> Result<()> {
    let dir = scratch()?;
    let host = dir.path().join("host");
    std::fs::create_dir(&host)?;
    let moments = moments(&host, &calls(dir.path())?);
    ensure!(
        moments.len() > 200,
        "only {} moments were recorded",
        moments.len()
    );
    let cuts = judge(&moments, 3)?;
    println!("{} moments, {cuts} power cuts", moments.len());
    Ok(())
}

#[test]
fn a_ledger_that_does_not_sync_a_file_or_a_directory_is_found_out() -> Result<()> {
    let dir = scratch()?;
    let host = dir.path().join("host");
    std::fs::create_dir(&host)?;
    let calls = calls(dir.path())?;
    // The same program, had it not synced the files, the folders of the entries, or what the folders themselves are in.
    let without = |left_out: &dyn Fn(&Path) -> bool| {
        let mut open = std::collections::HashMap::new();
        let mut kept = Vec::new();
        for call in &calls {
            if let Call::Open { fd, path, .. } = call {
                open.insert(*fd, path.clone());
            }
            let synced = match call {
                Call::Sync { fd } => open.get(fd),
                _ => None,
            };
            if !synced.is_some_and(|path| left_out(path)) {
                kept.push(call.clone());
            }
        }
        kept
    };
    let is_file = |path: &Path| path.extension().is_some();
    let is_folder = |path: &Path| path.ends_with("vms");
    let is_above = |path: &Path| path.ends_with("ledger");
    for left_out in [&is_file as &dyn Fn(&Path) -> bool, &is_folder, &is_above] {
        let outcome = judge(&moments(&host, &without(left_out)), 3);
        ensure!(outcome.is_err(), "lost writes were not noticed");
    }
    Ok(())
}

#[test]
fn what_a_killed_agent_renamed_and_did_not_sync_is_synced_before_the_next_one_trusts_it() -> Result<()> {
    let dir = scratch()?;
    let host = dir.path().join("host");
    std::fs::create_dir(&host)?;
    let mut history = calls(dir.path())?;
    // It is killed before its last sync of a folder is done, and has told nobody of that step.
    let told = history.pop();
    ensure!(matches!(told, Some(Call::Write { fd: 1, .. })), "{told:?}");
    let sync = history.pop();
    ensure!(matches!(sync, Some(Call::Sync { .. })), "{sync:?}");
    let mut next = Command::new(WRITER);
    next.arg("read-ledger")
        .arg(host.join("dalgu/ledger"))
        .args(["--tell", "60"]);
    history.extend(record(dir.path(), &next)?);
    judge(&moments(&host, &history), 3)?;
    Ok(())
}
