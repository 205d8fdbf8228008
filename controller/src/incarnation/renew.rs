//! What a backup becomes when it is restored: the same records with numbers that nobody has heard yet. Pure.
//!
//! Agents refuse a lower term, another session, a lower epoch and a lower generation than they remember. The backup is
//! older than what they remember, so each jumps ahead; a second restore of the same backup jumps twice as far.

use dalgu_proto::{
    ids::{Epoch, Generation, Session, Term},
    mutant::{self, Mutant},
};
use jiff::Timestamp;
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    model::{
        BackupRecord, Code, Fault, GroupRecord, HostRecord, ImageRecord, MigrationRecord, NetworkRecord,
        OperationRecord, OperationState, Phase, PlacementGroupRecord, PlanRecord, PlanState, PowerPhase,
        ScheduleRecord, VmRecord, VolumeRecord,
    },
    state::{Meta, Observing},
    store::{Image, Table},
};

/// How far every number jumps in each incarnation: more than any of them rises in the life of a store.
pub const JUMP: u64 = 1_000_000;

/// What the stores of this site have come to so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Past {
    /// Highest incarnation.
    pub incarnation: u64,
    /// Highest term.
    pub term: u64,
    /// Highest revision.
    pub revision: u64,
}

/// Why a backup cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It has no numbers of the site.
    #[error("the site's own record is missing")]
    NoMeta,
    /// A record is not what it should be.
    #[error("the record {key} of table {table} cannot be read")]
    Record {
        /// Its table.
        table: &'static str,
        /// Its key.
        key: String,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
}

/// The site's own record in an image.
pub fn past(image: &Image) -> Result<Meta, Error> {
    let mut records = image.records.iter();
    let (table, key, value) = records
        .find(|(table, key, _)| *table == Table::Meta && key == crate::state::META_KEY)
        .ok_or(Error::NoMeta)?;
    read(*table, key, value)
}

/// A host that was to be switched off may have VMs again since.
fn stays_on(host: &mut HostRecord, now: Timestamp) {
    if let Some(power) = host.power.take_if(|power| power.phase == PowerPhase::PoweringOff) {
        let principal = power.principal.clone();
        host.power = Some(power.at(PowerPhase::On, principal, now));
    }
}

fn read<T: DeserializeOwned>(table: Table, key: &str, value: &str) -> Result<T, Error> {
    serde_json::from_str(value).map_err(|source| Error::Record {
        table: table.as_str(),
        key: key.to_owned(),
        source,
    })
}

fn write(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("records have text keys and finite numbers")
}

/// A record of something that VMs use, under the revision of the restore.
fn object((table, key, value): (Table, &str, &str), revision: u64, now: Timestamp) -> Result<String, Error> {
    Ok(match table {
        Table::Images => {
            let mut image: ImageRecord = read(table, key, value)?;
            image.revision = revision;
            write(&image)
        }
        Table::Networks => {
            let mut network: NetworkRecord = read(table, key, value)?;
            network.revision = revision;
            write(&network)
        }
        Table::Groups => {
            let mut group: GroupRecord = read(table, key, value)?;
            group.revision = revision;
            write(&group)
        }
        Table::Volumes => {
            let mut volume: VolumeRecord = read(table, key, value)?;
            volume.revision = revision;
            // As of the VMs' above.
            volume.made = true;
            // It may have been taken back since, and be full of data: its time begins anew.
            if let (Some(deleted), Some(purged)) = (volume.delete_time, volume.purge_time) {
                volume.purge_time = now.checked_add(purged.duration_since(deleted)).ok();
            }
            write(&volume)
        }
        // What a host was to do with one it does: it was asked for.
        Table::Backups => {
            let mut backup: BackupRecord = read(table, key, value)?;
            backup.revision = revision;
            write(&backup)
        }
        Table::BackupSchedules => {
            let mut schedule: ScheduleRecord = read(table, key, value)?;
            schedule.revision = revision;
            write(&schedule)
        }
        Table::PlacementGroups => {
            let mut group: PlacementGroupRecord = read(table, key, value)?;
            group.revision = revision;
            write(&group)
        }
        _ => value.to_owned(),
    })
}

/// The image as the first one of a new incarnation, which is greater than any before.
pub fn renew(image: Image, before: Past, now: Timestamp) -> Result<(Image, Meta), Error> {
    let old = past(&image)?;
    let incarnation = old.incarnation.max(before.incarnation).saturating_add(1);
    let jump = match (incarnation - old.incarnation).saturating_mul(JUMP) {
        _ if mutant::on(Mutant::RestoreKeepsNumbers) => 0,
        jump => jump,
    };
    let observes = !mutant::on(Mutant::RestoreDoesNotObserve);
    let revision = old
        .revision
        .saturating_add(jump)
        .max(before.revision.saturating_add(JUMP));
    let meta = Meta {
        term: Term(
            old.term
                .0
                .saturating_add(jump)
                .max(before.term.saturating_add(JUMP)),
        ),
        incarnation,
        revision,
        forgotten_session: Session(old.forgotten_session.0.saturating_add(jump)),
        // Who watched may have seen what the backup has not: it must list again.
        forgotten: revision,
        observing: observes.then(|| Observing {
            since: now,
            waived: Default::default(),
        }),
        ..old
    };
    let message = "a backup was restored; what became of this is not known";
    let fault = Fault::new(Code::Cancelled, "STORE_RESTORED", message);
    let Image { records, events } = image;
    let change = |(table, key, value): (Table, String, String)| {
        let value = match table {
            Table::Meta if key == crate::state::META_KEY => write(&meta),
            Table::Meta | Table::Requests => value,
            Table::Hosts => {
                let mut host: HostRecord = read(table, &key, &value)?;
                host.session = Session(host.session.0.saturating_add(jump));
                stays_on(&mut host, now);
                host.revision = revision;
                write(&host)
            }
            Table::Vms => {
                let mut vm: VmRecord = read(table, &key, &value)?;
                // Of the first of several backups that were restored before a host has shown it.
                vm.backup_generation.get_or_insert(vm.intent.generation);
                vm.epoch = Epoch(vm.epoch.0.saturating_add(jump));
                vm.intent.generation = Generation(vm.intent.generation.0.saturating_add(jump));
                vm.unconfirmed = observes;
                // They may have been made since: one that is missing is better looked for than made anew.
                vm.new_volumes.clear();
                // An etag from before may name a record that the backup has not.
                vm.revision = revision;
                write(&vm)
            }
            Table::Images
            | Table::Networks
            | Table::Groups
            | Table::Volumes
            | Table::Backups
            | Table::BackupSchedules
            | Table::PlacementGroups => object((table, &key, &value), revision, now)?,
            Table::RefusedPlacements | Table::Usage => value,
            Table::Plans => {
                let mut plan: PlanRecord = read(table, &key, &value)?;
                if !plan.state.is_over() {
                    plan.state = PlanState::Cancelled;
                    plan.end_time = Some(now);
                    plan.message = message.to_owned();
                }
                write(&plan)
            }
            Table::Operations => {
                let mut operation: OperationRecord = read(table, &key, &value)?;
                if operation.is_active() {
                    operation.state = OperationState::Cancelled;
                    operation.error = Some(fault.clone());
                    operation.message = message.to_owned();
                    operation.end_time = Some(now);
                }
                write(&operation)
            }
            Table::Migrations => {
                let mut migration: MigrationRecord = read(table, &key, &value)?;
                migration.source_epoch = Epoch(migration.source_epoch.0.saturating_add(jump));
                migration.destination_epoch = Epoch(migration.destination_epoch.0.saturating_add(jump));
                if !migration.phase.is_terminal() {
                    migration.phase = Phase::Failed;
                    migration.error = Some(fault.clone());
                }
                write(&migration)
            }
        };
        Ok((table, key, value))
    };
    let records = records.into_iter().map(change).collect::<Result<_, Error>>()?;
    Ok((Image { records, events }, meta))
}
