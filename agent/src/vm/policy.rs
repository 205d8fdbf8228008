//! Whether a command about one VM is obeyed. Pure: called by the VM's task before anything is written or done.
//!
//! The rules are those of ownership: a lower epoch never speaks for a VM again, a lower generation is out of date, and
//! the same generation must mean the same thing.

use dalgu_proto::{
    ids::{Epoch, Generation, MigrationId, VmId},
    mutant::{self, Mutant},
    vm::PciAddress,
};

use crate::ledger::{Disposition, Intent, Vm};

/// Why a command is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// This host was told of a newer owner.
    #[error("epoch {given} is older than {known}, which this host knows")]
    StaleEpoch {
        /// In the command.
        given: Epoch,
        /// In the ledger.
        known: Epoch,
    },
    /// A newer intent was accepted before.
    #[error("generation {given} is older than {known}, which was accepted before")]
    StaleGeneration {
        /// In the command.
        given: Generation,
        /// In the ledger.
        known: Generation,
    },
    /// The same generation came with other content.
    #[error("generation {0} was accepted before with other content")]
    GenerationConflict(Generation),
    /// The VM takes part in a migration.
    #[error("migration {0} is under way; wait for its end")]
    Migrating(MigrationId),
    /// The VM is being deleted.
    #[error("the VM is being deleted")]
    Deleting,
    /// This host does not have the VM.
    #[error("this host does not have VM {0}")]
    NotHere(VmId),
    /// Another migration has the VM, or this one was settled before.
    #[error("migration {0} may not begin here any more")]
    MigrationOver(MigrationId),
    /// A migration needs a running VM.
    #[error("the VM does not run here")]
    NotRunning,
    /// Something else is being done to the VM at this moment.
    #[error("the VM is being worked on; try again")]
    Busy,
    /// A processor that is to be the VM's own is another's.
    #[error(
        "processor {cpu} of this host is the own one of VM {vm}, which has not gone: delete or migrate that VM first"
    )]
    CpuTaken {
        /// The processor.
        cpu: u32,
        /// Whose it is.
        vm: VmId,
    },
    /// A PCI device that is to be the VM's own is another's.
    #[error("PCI device {device} of this host is VM {vm}'s, which has not gone: delete that VM first")]
    DeviceTaken {
        /// The device.
        device: PciAddress,
        /// Whose it is.
        vm: VmId,
    },
    /// A PCI device that is to be the VM's own is none for VMs.
    #[error(
        "PCI device {0} of this host cannot be given to a VM: name it in its agent's configuration, see also `dalgu host show`"
    )]
    DeviceNotNamed(PciAddress),
    /// The two hosts' agents use different directories for sockets, or something else in the request makes no sense.
    #[error("{0}")]
    Unusable(String),
}

impl Denied {
    /// Stable reason for programs.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::StaleEpoch { .. } => "STALE_EPOCH",
            Self::StaleGeneration { .. } => "STALE_GENERATION",
            Self::GenerationConflict(_) => "GENERATION_CONFLICT",
            Self::Migrating(_) => "MIGRATION_IN_PROGRESS",
            Self::Deleting => "VM_DELETING",
            Self::NotHere(_) => "VM_NOT_FOUND",
            Self::MigrationOver(_) => "MIGRATION_OVER",
            Self::NotRunning => "VM_NOT_RUNNING",
            Self::Busy => "VM_BUSY",
            Self::CpuTaken { .. } => "CPU_TAKEN",
            Self::DeviceTaken { .. } => "DEVICE_TAKEN",
            Self::DeviceNotNamed(_) => "DEVICE_NOT_NAMED",
            Self::Unusable(_) => "UNUSABLE",
        }
    }
}

/// What to do with an accepted intent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accepted {
    /// It is what is known already.
    Known,
    /// Write it down and carry it out.
    New,
}

/// Judges an intent against what is known.
pub fn ensure(known: Option<&Vm>, given: &Intent) -> Result<Accepted, Denied> {
    let Some(known) = known else {
        return Ok(Accepted::New);
    };
    if given.epoch < known.epoch && !mutant::on(Mutant::EpochNotCompared) {
        return Err(Denied::StaleEpoch {
            given: given.epoch,
            known: known.epoch,
        });
    }
    match known.disposition {
        Disposition::Deleting => return Err(Denied::Deleting),
        Disposition::Incoming { migration } | Disposition::Outgoing { migration } => {
            return Err(Denied::Migrating(migration));
        }
        // The same epoch may not come back to life: this host gave it up.
        Disposition::Gone { .. } if given.epoch == known.epoch => {
            return Err(Denied::StaleEpoch {
                given: given.epoch,
                known: known.epoch.next(),
            });
        }
        Disposition::Gone { .. } | Disposition::Owned => {}
    }
    if given.generation < known.generation && !mutant::on(Mutant::GenerationNotCompared) {
        return Err(Denied::StaleGeneration {
            given: given.generation,
            known: known.generation,
        });
    }
    match &known.intent {
        Some(intent) if intent == given => Ok(Accepted::Known),
        Some(intent) if intent.generation == given.generation && intent.epoch == given.epoch => {
            Err(Denied::GenerationConflict(given.generation))
        }
        _ => Ok(Accepted::New),
    }
}

/// Judges a request to delete. `Ok(true)`: nothing is here, there is nothing to do.
pub fn delete(known: Option<&Vm>, generation: Generation, epoch: Epoch) -> Result<bool, Denied> {
    let Some(known) = known else { return Ok(true) };
    if epoch < known.epoch && !mutant::on(Mutant::EpochNotCompared) {
        return Err(Denied::StaleEpoch {
            given: epoch,
            known: known.epoch,
        });
    }
    match known.disposition {
        Disposition::Gone { .. } => Ok(true),
        Disposition::Incoming { migration } | Disposition::Outgoing { migration } => {
            Err(Denied::Migrating(migration))
        }
        Disposition::Owned | Disposition::Deleting
            if generation < known.generation && !mutant::on(Mutant::GenerationNotCompared) =>
        {
            Err(Denied::StaleGeneration {
                given: generation,
                known: known.generation,
            })
        }
        Disposition::Owned | Disposition::Deleting => Ok(false),
    }
}

/// Judges a request to make room for a VM. `Ok(true)`: this migration has been prepared before.
pub fn prepare(known: Option<&Vm>, migration: MigrationId, given: &Intent) -> Result<bool, Denied> {
    let Some(known) = known else { return Ok(false) };
    match known.disposition {
        Disposition::Incoming { migration: prepared } if prepared == migration => Ok(true),
        Disposition::Incoming { migration } | Disposition::Outgoing { migration } => {
            Err(Denied::Migrating(migration))
        }
        Disposition::Deleting => Err(Denied::Deleting),
        Disposition::Owned => Err(Denied::Unusable("this host has the VM already".to_owned())),
        Disposition::Gone { .. } if given.epoch <= known.epoch && !mutant::on(Mutant::EpochNotCompared) => {
            Err(Denied::StaleEpoch {
                given: given.epoch,
                known: known.epoch,
            })
        }
        Disposition::Gone { .. } => Ok(false),
    }
}

/// Judges a request to send a VM. `Ok(true)`: this migration has begun before.
pub fn send(known: Option<&Vm>, id: VmId, migration: MigrationId, epoch: Epoch) -> Result<bool, Denied> {
    let known = known.ok_or(Denied::NotHere(id))?;
    if epoch != known.epoch && !mutant::on(Mutant::EpochNotCompared) {
        return Err(Denied::StaleEpoch {
            given: epoch,
            known: known.epoch,
        });
    }
    match known.disposition {
        Disposition::Outgoing { migration: begun } if begun == migration => Ok(true),
        Disposition::Incoming { migration } | Disposition::Outgoing { migration } => {
            Err(Denied::Migrating(migration))
        }
        Disposition::Deleting => Err(Denied::Deleting),
        Disposition::Gone { .. } => Err(Denied::NotHere(id)),
        Disposition::Owned => Ok(false),
    }
}

/// Judges a request to settle a migration. While the VM moves by another one, the request is late: what it would end and
/// look at is not its own.
pub fn settle(known: Option<&Vm>, migration: MigrationId) -> Result<(), Denied> {
    match known.map(|vm| vm.disposition) {
        Some(Disposition::Incoming { migration: other } | Disposition::Outgoing { migration: other })
            if other != migration =>
        {
            Err(Denied::Migrating(other))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use dalgu_proto::vm::{PowerState, RestartMode, Spec};
    use proptest::prelude::*;

    use super::*;
    use crate::ledger::Done;

    fn intent(generation: u64, epoch: u64) -> Intent {
        Intent {
            generation: Generation(generation),
            epoch: Epoch(epoch),
            spec: Spec {
                vcpus: 1,
                memory_mib: 64,
                disks: vec![],
                nics: vec![],
                kernel_boot: None,
                restart_policy: Default::default(),
                host_selector: Default::default(),
                first_boot: None,
                firmware: Default::default(),
                tpm: false,
                max_vcpus: None,
                max_memory_mib: None,
                fitting: Default::default(),
                devices: Default::default(),
            },
            power: PowerState::Running,
            power_sequence: generation,
            restart_sequence: 0,
            restart_mode: RestartMode::Reboot,
            grace_period_seconds: 60,
            snapshots: None,
            places: Vec::new(),
            devices: Vec::new(),
        }
    }

    fn known(generation: u64, epoch: u64, disposition: Disposition) -> Vm {
        Vm {
            id: VmId::from_uuid(uuid::Uuid::from_u128(1)),
            name: "web".parse().unwrap(),
            intent: Some(intent(generation, epoch)),
            epoch: Epoch(epoch),
            generation: Generation(generation),
            disposition,
            done: Done::default(),
            last_seen: None,
            boot_id: String::new(),
            images: Vec::new(),
            documents: Default::default(),
            changes: Default::default(),
            snapshots: Default::default(),
        }
    }

    fn migration(id: u128) -> MigrationId {
        MigrationId::from_uuid(uuid::Uuid::from_u128(id))
    }

    #[test]
    fn older_numbers_are_refused_and_equal_ones_are_done() {
        let vm = known(5, 2, Disposition::Owned);
        assert_eq!(ensure(Some(&vm), &intent(5, 2)), Ok(Accepted::Known));
        assert_eq!(ensure(Some(&vm), &intent(6, 2)), Ok(Accepted::New));
        assert_eq!(ensure(Some(&vm), &intent(5, 3)), Ok(Accepted::New));
        assert!(matches!(
            ensure(Some(&vm), &intent(4, 2)),
            Err(Denied::StaleGeneration { .. })
        ));
        assert!(matches!(
            ensure(Some(&vm), &intent(9, 1)),
            Err(Denied::StaleEpoch { .. })
        ));
        let mut other = intent(5, 2);
        other.grace_period_seconds = 1;
        assert!(matches!(
            ensure(Some(&vm), &other),
            Err(Denied::GenerationConflict(_))
        ));
    }

    #[test]
    fn a_late_command_does_not_bring_a_vm_back_that_left_or_was_deleted() {
        let gone = known(
            5,
            2,
            Disposition::Gone {
                since: jiff::Timestamp::UNIX_EPOCH,
            },
        );
        assert!(matches!(
            ensure(Some(&gone), &intent(9, 2)),
            Err(Denied::StaleEpoch { .. })
        ));
        assert_eq!(ensure(Some(&gone), &intent(9, 3)), Ok(Accepted::New));
        assert!(matches!(
            prepare(Some(&gone), migration(1), &intent(9, 2)),
            Err(Denied::StaleEpoch { .. })
        ));
        assert_eq!(delete(Some(&gone), Generation(6), Epoch(2)), Ok(true));
    }

    #[test]
    fn nothing_is_begun_on_a_vm_that_migrates() {
        for disposition in [
            Disposition::Incoming {
                migration: migration(1),
            },
            Disposition::Outgoing {
                migration: migration(1),
            },
        ] {
            let vm = known(5, 2, disposition);
            assert!(matches!(
                ensure(Some(&vm), &intent(6, 3)),
                Err(Denied::Migrating(_))
            ));
            assert!(matches!(
                delete(Some(&vm), Generation(6), Epoch(2)),
                Err(Denied::Migrating(_))
            ));
            assert!(matches!(
                prepare(Some(&vm), migration(2), &intent(6, 3)),
                Err(Denied::Migrating(_))
            ));
            assert!(matches!(
                send(Some(&vm), vm.id, migration(2), Epoch(2)),
                Err(Denied::Migrating(_))
            ));
        }
        let leaving = known(
            5,
            2,
            Disposition::Outgoing {
                migration: migration(1),
            },
        );
        assert_eq!(send(Some(&leaving), leaving.id, migration(1), Epoch(2)), Ok(true));
        let coming = known(
            5,
            2,
            Disposition::Incoming {
                migration: migration(1),
            },
        );
        assert_eq!(prepare(Some(&coming), migration(1), &intent(5, 2)), Ok(true));
    }

    proptest! {
        /// Whatever order intents arrive in, doubled or late, what is in force at the end is the newest that arrived.
        #[test]
        fn the_newest_intent_wins_in_any_order(order in prop::collection::vec((1u64..6, 1u64..4), 1..40)) {
            let mut vm: Option<Vm> = None;
            let mut newest = (0, 0);
            for (generation, epoch) in order {
                let given = intent(generation, epoch);
                if ensure(vm.as_ref(), &given) == Ok(Accepted::New) {
                    prop_assert!(epoch >= newest.0 && generation >= newest.1, "went back");
                    newest = (epoch, generation);
                    vm = Some(known(generation, epoch, Disposition::Owned));
                }
            }
        }
    }
}
