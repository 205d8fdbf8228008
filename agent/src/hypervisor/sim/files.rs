//! The files that a real host would have. Pure; called with the lock held.

use std::collections::BTreeMap;

use dalgu_proto::ids::VmId;
use uuid::Uuid;

use super::{
    SimConfig,
    backup::Kept,
    layers::Chain,
    state::{File, State, Volume},
};
use crate::hypervisor::files::{PoolFile, of};

/// What a simulated file takes.
const ALLOCATED_BYTES: u64 = 1 << 20;

fn file(folder: &str, name: &str, part: &str, size_bytes: u64) -> Option<PoolFile> {
    let (of, partial) = of(folder, name)?;
    Some(PoolFile {
        path: format!("{folder}/{name}{part}"),
        of,
        partial,
        size_bytes,
        allocated_bytes: size_bytes.min(ALLOCATED_BYTES),
    })
}

fn of_volume((vm, _, name): &Volume, size_mib: u64, chain: Option<&Chain>) -> Vec<PoolFile> {
    let size = size_mib << 20;
    let folder = match *vm == VmId::from_uuid(Uuid::nil()) {
        true => "volumes".to_owned(),
        false => vm.to_string(),
    };
    let base = file(&folder, &format!("{name}.qcow2"), "", size);
    let numbers = chain.into_iter().flat_map(Chain::every_number);
    let layers = numbers.filter_map(|number| file(&folder, &format!("{name}.{number}.qcow2"), "", size));
    base.into_iter().chain(layers).collect()
}

fn of_backups(pool: &str, kept: &Kept) -> Vec<PoolFile> {
    let here = kept.iter().filter(|((at, _), _)| at == pool);
    let files = here.flat_map(|((_, id), manifest)| {
        let id = id.to_string();
        let files = manifest
            .files
            .iter()
            .map(|one| (one.file.as_str(), one.size_bytes));
        let files = [("manifest.json", 1)].into_iter().chain(files);
        files
            .filter_map(|(name, size)| file("backups", &id, &format!("/{name}"), size))
            .collect::<Vec<_>>()
    });
    files.collect()
}

impl State {
    /// What a pool holds.
    pub(super) fn files(&self, pool: &str, config: &SimConfig) -> Vec<PoolFile> {
        let shared = config.shared_storage.with_chains(|chains| chains.clone());
        // As in `with_chain`: a VM's are together, here or there.
        let chain = |vm: &VmId| self.chains.get(vm).or_else(|| shared.get(vm));
        let disks = |all: &BTreeMap<Volume, File>| -> Vec<_> {
            let here = all.iter().filter(|(volume, _)| volume.1 == pool);
            here.flat_map(|(volume, file)| of_volume(volume, file.size_mib, chain(&volume.0)))
                .collect()
        };
        let (mut found, backups) = match config.shared_pools.contains(pool) {
            true => (
                config.shared_storage.with(|all| disks(all)),
                config.shared_storage.backups(|kept| of_backups(pool, kept)),
            ),
            false => (disks(&self.volumes), of_backups(pool, &self.backups)),
        };
        found.extend(backups);
        found.sort_by(|one, other| one.path.cmp(&other.path));
        found
    }
}
