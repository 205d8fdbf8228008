//! Backups of simulated disks. What a disk holds is a number here, which each write makes larger; a backup keeps it, and a disk
//! that is made from it begins with it. Pure; called with the lock held.

use std::collections::BTreeMap;

use dalgu_proto::{
    ids::{BackupId, VmId},
    image::Digest,
    vm::{BackupRef, DiskFormat},
};

use super::{
    SimConfig,
    state::{State, key},
};
use crate::hypervisor::{
    DomainState, Error,
    backup::{BackupFile, Kind, MANIFEST_VERSION, Manifest, Order, Wanted},
};

/// Backups by their pools.
pub(super) type Kept = BTreeMap<(String, BackupId), Manifest>;

/// A content as a digest, so that it can be read out of one.
fn digest(content: u64) -> Digest {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&content.to_be_bytes());
    Digest::from_bytes(&bytes)
}

fn content(digest: &Digest) -> u64 {
    let first = digest.as_str().get(..16);
    first
        .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        .unwrap_or(0)
}

impl State {
    fn kept<T>(&mut self, pool: &str, config: &SimConfig, look: impl FnOnce(&mut Kept) -> T) -> T {
        match config.shared_pools.contains(pool) {
            true => config.shared_storage.backups(look),
            false => look(&mut self.backups),
        }
    }

    pub(super) fn backup(&mut self, pool: &str, id: BackupId, config: &SimConfig) -> Option<Manifest> {
        let key = (pool.to_owned(), id);
        self.kept(pool, config, |kept| kept.get(&key).cloned())
    }

    /// The backup that an incremental one can begin from, or why there is none.
    fn parent(&mut self, order: &Order, config: &SimConfig) -> Result<BackupId, &'static str> {
        let parent = order.parent.ok_or("there is no earlier backup of it")?;
        let guest = self.domains.get(&order.vm);
        let checkpoint = guest.and_then(|guest| guest.checkpoint);
        if guest.is_some_and(|guest| guest.state == DomainState::Stopped) {
            return Err("it is off");
        }
        if order.spec.disks.iter().any(|disk| disk.format == DiskFormat::Raw) {
            return Err("a disk is raw");
        }
        let there = checkpoint == Some(parent) && self.backup(&order.pool, parent, config).is_some();
        there
            .then_some(parent)
            .ok_or("it has no checkpoint of that backup")
    }

    pub(super) fn back_up(&mut self, order: &Order, config: &SimConfig) -> Result<Manifest, Error> {
        let guest = self.ours(order.vm, config)?;
        let running = match guest.state {
            DomainState::Running | DomainState::Paused => true,
            DomainState::Stopped => false,
            DomainState::Incoming | DomainState::HandedOver => {
                return Err(guest.wrong_state("and cannot be backed up"));
            }
        };
        let parent = self.parent(order, config);
        let (kind, full_reason) = match (order.wanted, parent) {
            (Wanted::Full, _) => (Kind::Full, None),
            (_, Ok(parent)) => (Kind::Incremental { parent }, None),
            (Wanted::Auto, Err(why)) => (Kind::Full, Some(why.to_owned())),
            (Wanted::Incremental, Err(why)) => {
                let detail = why.to_owned();
                return Err(Error::NoCheckpoint { id: order.vm, detail });
            }
        };
        let files = order.spec.disks.iter().map(|disk| BackupFile {
            disk: disk.name.clone(),
            file: format!("{}.qcow2", disk.name),
            size_bytes: 1 << 20,
            stored_bytes: 1 << 20,
            virtual_size_bytes: disk.size_mib << 20,
            sha256: digest(
                self.file(&key(order.vm, disk), config)
                    .map_or(0, |file| file.content),
            ),
        });
        let manifest = Manifest {
            version: MANIFEST_VERSION,
            backup: order.id,
            vm: order.vm,
            name: order.name.clone(),
            spec: order.spec.clone(),
            kind,
            full_reason,
            // Its guests have no agent.
            quiesced: false,
            checkpoint: running
                && order
                    .spec
                    .disks
                    .iter()
                    .all(|disk| disk.format == DiskFormat::Qcow2),
            point_time: config.clock.now(),
            files: files.collect(),
        };
        let key = (order.pool.clone(), order.id);
        let kept = manifest.clone();
        self.kept(&order.pool, config, |all| all.insert(key, kept));
        let checkpoint = manifest.checkpoint.then_some(order.id);
        if running && let Some(guest) = self.domains.get_mut(&order.vm) {
            guest.checkpoint = checkpoint;
        }
        Ok(manifest)
    }

    pub(super) fn remove_backup(&mut self, vm: VmId, pool: &str, id: BackupId, config: &SimConfig) {
        let key = (pool.to_owned(), id);
        self.kept(pool, config, |kept| kept.remove(&key));
        if let Some(guest) = self.domains.get_mut(&vm)
            && guest.checkpoint == Some(id)
        {
            guest.checkpoint = None;
        }
    }

    /// What a backup has of a disk, which needs the backups before it.
    pub(super) fn restore(&mut self, from: &BackupRef, config: &SimConfig) -> Result<u64, Error> {
        let mut next = Some(from.id);
        let mut held = None;
        while let Some(backup) = next {
            let manifest = self
                .backup(&from.pool, backup, config)
                .ok_or_else(|| Error::Missing {
                    what: "backup",
                    path: format!("{}/backups/{backup}", from.pool).into(),
                })?;
            held = held.or_else(|| manifest.file(&from.disk).map(|file| content(&file.sha256)));
            next = manifest.parent();
        }
        Ok(held.unwrap_or(0))
    }
}
