//! What the program `store-writer` writes into an agent's ledger, and what must be there after each step.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result, ensure};
use dalgu_agent::ledger::{Directory, Disposition, Done, Files, Host, Ledger, Migration, Transfer, Vm};
use dalgu_proto::ids::{Epoch, Generation, MigrationId, Session, Term, VmId};
use uuid::Uuid;

/// VMs whose entries are replaced again and again.
const VMS: u64 = 3;

/// What a step does.
enum Step {
    Host,
    Save(u64),
    Remove(u64),
    Migration,
}

fn step(number: u64) -> Step {
    match number % 7 {
        0 => Step::Host,
        1 => Step::Migration,
        6 => Step::Remove(number % VMS),
        _ => Step::Save(number % VMS),
    }
}

fn vm(slot: u64, number: u64) -> Vm {
    Vm {
        id: VmId::from_uuid(Uuid::from_u64_pair(1, slot)),
        // More than a sector, so that a write can be torn.
        boot_id: "b".repeat(700),
        images: Vec::new(),
        documents: Default::default(),
        changes: Default::default(),
        snapshots: Default::default(),
        name: "web".parse().expect("a name"),
        intent: None,
        epoch: Epoch(number),
        generation: Generation(number),
        disposition: Disposition::Owned,
        done: Done::default(),
        last_seen: None,
    }
}

/// Writes the steps up to this number; tells of each when the ledger says that it is kept.
pub async fn write(dir: &Path, to: u64, mut kept: impl FnMut(u64) -> Result<()>) -> Result<()> {
    let ledger = Ledger::open(dir)?;
    for number in 1..=to {
        match step(number) {
            Step::Host => {
                let host = Host {
                    session: Session(number),
                    term: Term(number),
                    ..Host::default()
                };
                ledger.save_host(&host).await?;
            }
            Step::Save(slot) => ledger.save_vm(&vm(slot, number)).await?,
            Step::Remove(slot) => ledger.remove_vm(vm(slot, number).id).await?,
            Step::Migration => {
                let migration = Migration {
                    id: MigrationId::from_uuid(Uuid::from_u64_pair(2, 1)),
                    vm: vm(0, number).id,
                    role: None,
                    peer: None,
                    transfer: Transfer::Failed {
                        reason: "TEST".to_owned(),
                        message: number.to_string(),
                    },
                    settled: true,
                    finished: None,
                };
                ledger.save_migration(&migration).await?;
            }
        }
        kept(number)?;
    }
    Ok(())
}

/// The number that each entry bears after so many steps.
fn after(steps: u64) -> BTreeMap<String, u64> {
    let mut entries = BTreeMap::new();
    for number in 1..=steps {
        let name = |slot| format!("vm {}", vm(slot, number).id);
        match step(number) {
            Step::Host => entries.insert("host".to_owned(), number),
            Step::Save(slot) => entries.insert(name(slot), number),
            Step::Remove(slot) => entries.remove(&name(slot)),
            Step::Migration => entries.insert("migration".to_owned(), number),
        };
    }
    entries
}

/// Reads a ledger that a power cut left, as an agent does that starts: every step that was kept is there, at most one more,
/// and nothing in part.
pub fn judge(dir: &Path, kept: u64) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let contents = runtime.block_on(async {
        let ledger = Ledger::open(dir)?;
        ledger.load().await
    })?;
    ensure!(contents.damaged.is_empty(), "in part: {:?}", contents.damaged);
    let mut found: BTreeMap<String, u64> = BTreeMap::new();
    found.extend(
        contents
            .vms
            .iter()
            .map(|vm| (format!("vm {}", vm.id), vm.epoch.0)),
    );
    if contents.host != Host::default() {
        found.insert("host".to_owned(), contents.host.term.0);
    }
    for migration in contents.migrations {
        let Transfer::Failed { message, .. } = migration.transfer else {
            anyhow::bail!("another migration");
        };
        found.insert("migration".to_owned(), message.parse().context("not a number")?);
    }
    ensure!(
        found == after(kept) || found == after(kept + 1),
        "after {kept} steps there is {found:?}"
    );
    Ok(())
}

/// Opens a ledger as an agent does that starts and acts upon what it reads.
pub async fn read(dir: &Path) -> Result<usize> {
    Ok(Directory::open(dir)?.load().await?.len())
}
