//! All that the controller knows at one moment, as one value that is cheap to copy.
//!
//! Maps are persistent, so a snapshot costs nothing and readers need no lock. Only a [`Tx`] changes a state, and only
//! [`Db`] makes one; everybody else reads the snapshot that is already on disk. Reservations are not stored: they
//! follow from owners and migrations, and are kept up to date with every change of either. Every map is ordered: whoever
//! goes over one finds the same order in every run, so that the same history can be had again.

mod db;
mod fleet;
mod load;
mod refused;
mod tx;

#[cfg(test)]
mod sample;
#[cfg(test)]
mod tests;

use std::{collections::BTreeSet, sync::Arc};

use dalgu_proto::{
    ids::{
        BackupId, ClusterId, GroupName, HostName, ImageId, ImageName, MigrationId, NetworkName, OperationId,
        PlacementGroupName, PlanId, ScheduleName, Session, Term, VmId, VmName, VolumeId, VolumeName,
    },
    image::Digest,
};
use imbl::{OrdMap, OrdSet};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub(crate) use self::load::META_KEY;
pub use self::{
    db::{BeforeCommit, Db, Hooks, Writing},
    load::{Error, state as from_image},
    tx::{REFUSED_KEPT, Tx},
};
use crate::model::{
    BackupRecord, Bounds, EventRecord, GroupRecord, GroupUse, HostLive, HostPlace, HostRecord, ImageRecord,
    Members, MigrationLive, MigrationRecord, NetworkRecord, Observation, OperationRecord,
    PlacementGroupRecord, PlanRecord, Refusal, RefusedPlacement, RequestRecord, ScheduleRecord, UsageRecord,
    VmRecord, VolumeRecord,
};
use crate::{
    agent_wire::Reported,
    hosts::pools::Level,
    placement::{PoolPolicy, Protect, Size, Taken},
    space::Space,
};

/// Numbers of the site as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// The site.
    pub cluster_id: ClusterId,
    /// This run of the controller.
    pub term: Term,
    /// Rises when the store is restored from a backup.
    pub incarnation: u64,
    /// Last revision given out.
    pub revision: u64,
    /// Events up to this revision are no longer kept.
    #[serde(default)]
    pub forgotten: u64,
    /// Highest session of a host that was forgotten: one that comes anew begins after it.
    #[serde(default)]
    pub forgotten_session: Session,
    /// Present from the restore of a backup until an operator has looked at what hosts have: nobody is commanded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observing: Option<Observing>,
}

impl Meta {
    /// How often the store was restored from a backup.
    pub const fn restores(&self) -> u64 {
        self.incarnation.saturating_sub(1)
    }
}

/// A store that was restored, and not yet looked through.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observing {
    /// When it was restored.
    pub since: Timestamp,
    /// Hosts that are not waited for.
    #[serde(default)]
    pub waived: BTreeSet<HostName>,
}

/// What VMs, and volumes that no VM has, hold on a host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reserved {
    /// Virtual processors; those that have logical ones of their own are in `taken`.
    pub vcpus: u64,
    /// Memory with QEMU's overhead.
    pub memory_mib: u64,
    /// VMs, incoming ones too.
    pub vms: u32,
    /// How many of them have each size.
    pub sizes: OrdMap<Size, u32>,
    /// Disk space by pool.
    pub disks_mib: OrdMap<String, u64>,
    /// Processors, NUMA nodes, huge pages, bandwidth and PCI devices.
    pub taken: Arc<Taken>,
}

/// What a host says of a VM that is not its own.
#[derive(Debug, Clone)]
pub struct Stray {
    /// How often it was said: once may be a report that was under way while the VM left.
    pub times: u32,
    /// The last of it.
    pub reported: Arc<Reported>,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct State {
    /// Numbers of the site.
    pub meta: Meta,
    /// VMs by id.
    pub vms: OrdMap<VmId, Arc<VmRecord>>,
    /// Ids of VMs by name.
    pub vm_names: OrdMap<VmName, VmId>,
    /// MAC addresses of interfaces, each with the VM that has it.
    pub macs: OrdSet<(String, VmId)>,
    /// VMs that hold a reservation on a host.
    pub host_vms: OrdMap<HostName, OrdSet<VmId>>,
    /// Hosts by name.
    pub hosts: OrdMap<HostName, Arc<HostRecord>>,
    /// Operations by id, and so by age.
    pub operations: OrdMap<OperationId, Arc<OperationRecord>>,
    /// Operations that have not ended, by VM.
    pub active_operations: OrdMap<VmId, OrdSet<OperationId>>,
    /// Remembered requests.
    pub requests: OrdMap<String, Arc<RequestRecord>>,
    /// Migrations by id.
    pub migrations: OrdMap<MigrationId, Arc<MigrationRecord>>,
    /// The migration of a VM that has not ended.
    pub active_migrations: OrdMap<VmId, MigrationId>,
    /// What VMs hold, by host.
    pub reserved: OrdMap<HostName, Reserved>,
    /// Disk space by pool over all VMs, and volumes that no VM has, each counted once.
    pub pools_mib: OrdMap<String, u64>,
    /// Images by id, and so by age.
    pub images: OrdMap<ImageId, Arc<ImageRecord>>,
    /// Ids of images by name and version.
    pub image_names: OrdMap<(ImageName, String), ImageId>,
    /// Images by the digest of what hosts keep; several may have the same.
    pub image_digests: OrdMap<Digest, OrdSet<ImageId>>,
    /// VMs with a disk that was made from an image, by its digest.
    pub image_vms: OrdMap<Digest, OrdSet<VmId>>,
    /// Hosts that say that they have a copy, or are about to, by digest. Not stored.
    pub image_hosts: OrdMap<Digest, OrdSet<HostName>>,
    /// Hosts that have answered that nothing is left there of an image that is being deleted. Not stored.
    pub image_gone: OrdMap<ImageId, OrdSet<HostName>>,
    /// Rises with each change that may call for a step with an image. Not stored.
    pub image_changes: u64,
    /// Networks by name.
    pub networks: OrdMap<NetworkName, Arc<NetworkRecord>>,
    /// Security groups by name.
    pub groups: OrdMap<GroupName, Arc<GroupRecord>>,
    /// Interfaces in each network, and the hosts that they are on.
    pub members: OrdMap<NetworkName, Members>,
    /// Who has or names each security group.
    pub group_uses: OrdMap<GroupName, GroupUse>,
    /// Networks that each host has, or had since the controller's start.
    pub places: OrdMap<HostName, HostPlace>,
    /// Revision that the controller began with: what hosts knew of networks before is older.
    pub networks_since: u64,
    /// Rises with each change that may call for a host to be told of its networks. Not stored.
    pub network_changes: u64,
    /// Volumes by name.
    pub volumes: OrdMap<VolumeName, Arc<VolumeRecord>>,
    /// VMs that have a volume, or have not let go of it yet: one at most, unless a restored store is behind.
    pub volume_vms: OrdMap<VolumeId, OrdSet<VmId>>,
    /// Volumes that are deleted and not purged.
    pub deleted_volumes: OrdSet<VolumeName>,
    /// Volumes that start from an image, by its digest.
    pub image_volumes: OrdMap<Digest, OrdSet<VolumeName>>,
    /// Backups by id, and so by age.
    pub backups: OrdMap<BackupId, Arc<BackupRecord>>,
    /// Backups of each VM, also of one that is gone.
    pub vm_backups: OrdMap<VmId, OrdSet<BackupId>>,
    /// Backups that a host has something to do for.
    pub open_backups: OrdSet<BackupId>,
    /// Bytes copied, and all of them, of backups that are taken. Not stored.
    pub backup_progress: OrdMap<BackupId, (u64, u64)>,
    /// Schedules of backups by name.
    pub schedules: OrdMap<ScheduleName, Arc<ScheduleRecord>>,
    /// Placement groups by name.
    pub placement_groups: OrdMap<PlacementGroupName, Arc<PlacementGroupRecord>>,
    /// VMs in each placement group that has some.
    pub placement_members: OrdMap<PlacementGroupName, OrdSet<VmId>>,
    /// Plans of moves by id, and so by age.
    pub plans: OrdMap<PlanId, Arc<PlanRecord>>,
    /// Placements that were refused last, by the VM's name.
    pub refused_placements: OrdMap<VmName, Arc<RefusedPlacement>>,
    /// What VMs have used, as it was stored last.
    pub usage: OrdMap<VmId, Arc<UsageRecord>>,
    /// Kept events by revision.
    pub events: OrdMap<u64, Arc<EventRecord>>,
    /// What owners last said of their VMs. Not stored.
    pub observations: OrdMap<VmId, Arc<Observation>>,
    /// Intents that an agent refused. Not stored.
    pub refusals: OrdMap<VmId, Arc<Refusal>>,
    /// What is known of hosts. Not stored.
    pub live: OrdMap<HostName, Arc<HostLive>>,
    /// What is known of migrations. Not stored.
    pub migration_live: OrdMap<MigrationId, Arc<MigrationLive>>,
    /// What hosts say of VMs that does not count: not their own, or under a later number than the store has. Not stored.
    pub strays: OrdMap<(HostName, VmId), Stray>,
    /// Room for the store, once it has been looked at. Not stored.
    pub space: Option<Space>,
    /// How far pools are filled. Not stored.
    pub pool_policy: PoolPolicy,
    /// Between which ratios the over-commit of a host's processors follows its load. Not stored.
    pub cpu_bounds: Bounds,
    /// Hosts are closed for new VMs by their load. Not stored.
    pub close_pressed: bool,
    /// Hosts that are off are woken for what finds no room. Not stored.
    pub wakes_hosts: bool,
    /// Domains that room is kept for. Not stored.
    pub protect: Arc<Protect>,
    /// Most VMs that a host takes of which nothing else is said; `None` for as many as have room. Not stored.
    pub vms_most: Option<u32>,
    /// Pools that are nearly full or full: shared ones by name, others with their host. Not stored.
    pub pool_levels: OrdMap<(Option<HostName>, String), Level>,
    /// What hosts said of VMs whose place is not sure since a restore, and of VMs that nobody knows. Not stored.
    pub sightings: OrdMap<VmId, OrdMap<HostName, Arc<Reported>>>,
    /// The same by host: which VMs each said something of. Not stored.
    pub sighted: OrdMap<HostName, OrdSet<VmId>>,
    /// Hosts that have told all they have since the controller's start. Not stored.
    pub listed: OrdSet<HostName>,
    /// This run of the controller. Not stored.
    pub run_id: Uuid,
    /// Agents obey another controller: this one gives no more commands. Says which. Not stored.
    pub replaced_by: Option<String>,
}

impl State {
    /// A state without records.
    pub fn empty(meta: Meta) -> Self {
        Self {
            meta,
            vms: OrdMap::new(),
            vm_names: OrdMap::new(),
            macs: OrdSet::new(),
            host_vms: OrdMap::new(),
            hosts: OrdMap::new(),
            operations: OrdMap::new(),
            active_operations: OrdMap::new(),
            requests: OrdMap::new(),
            migrations: OrdMap::new(),
            active_migrations: OrdMap::new(),
            reserved: OrdMap::new(),
            pools_mib: OrdMap::new(),
            images: OrdMap::new(),
            image_names: OrdMap::new(),
            image_digests: OrdMap::new(),
            image_vms: OrdMap::new(),
            image_hosts: OrdMap::new(),
            image_gone: OrdMap::new(),
            image_changes: 0,
            networks: OrdMap::new(),
            groups: OrdMap::new(),
            members: OrdMap::new(),
            group_uses: OrdMap::new(),
            places: OrdMap::new(),
            networks_since: 0,
            network_changes: 0,
            volumes: OrdMap::new(),
            volume_vms: OrdMap::new(),
            deleted_volumes: OrdSet::new(),
            image_volumes: OrdMap::new(),
            backups: OrdMap::new(),
            vm_backups: OrdMap::new(),
            open_backups: OrdSet::new(),
            backup_progress: OrdMap::new(),
            schedules: OrdMap::new(),
            placement_groups: OrdMap::new(),
            placement_members: OrdMap::new(),
            plans: OrdMap::new(),
            refused_placements: OrdMap::new(),
            usage: OrdMap::new(),
            events: OrdMap::new(),
            observations: OrdMap::new(),
            refusals: OrdMap::new(),
            live: OrdMap::new(),
            migration_live: OrdMap::new(),
            strays: OrdMap::new(),
            space: None,
            pool_policy: PoolPolicy::default(),
            cpu_bounds: Bounds::default(),
            close_pressed: true,
            wakes_hosts: false,
            protect: Arc::default(),
            vms_most: None,
            pool_levels: OrdMap::new(),
            sightings: OrdMap::new(),
            sighted: OrdMap::new(),
            listed: OrdSet::new(),
            run_id: Uuid::nil(),
            replaced_by: None,
        }
    }

    /// The VM of that name.
    pub fn vm_by_name(&self, name: &VmName) -> Option<&Arc<VmRecord>> {
        self.vms.get(self.vm_names.get(name)?)
    }

    /// The image of that name and version.
    pub fn image_by_name(&self, name: &ImageName, version: &str) -> Option<&Arc<ImageRecord>> {
        let id = self.image_names.get(&(name.clone(), version.to_owned()))?;
        self.images.get(id)
    }

    /// VMs with a disk that was made from an image.
    pub fn vms_of_image<'a>(&'a self, image: &ImageRecord) -> impl Iterator<Item = &'a Arc<VmRecord>> {
        let reference = image.reference();
        let vms = image.digest().and_then(|digest| self.image_vms.get(digest));
        let vms = vms.into_iter().flatten().filter_map(|id| self.vms.get(id));
        vms.filter(move |vm| {
            let mut disks = vm.spec.disks.iter();
            disks.any(|disk| disk.image.as_deref() == Some(&*reference))
        })
    }

    /// Volumes that start from an image.
    pub fn volumes_of_image<'a>(
        &'a self,
        image: &ImageRecord,
    ) -> impl Iterator<Item = &'a Arc<VolumeRecord>> {
        let reference = image.reference();
        let volumes = image.digest().and_then(|digest| self.image_volumes.get(digest));
        let volumes = volumes
            .into_iter()
            .flatten()
            .filter_map(|name| self.volumes.get(name));
        volumes.filter(move |volume| volume.image.as_deref() == Some(&*reference))
    }

    /// What the owner last said of a VM, if it counts: from that host, under that ownership number.
    pub fn observation(&self, vm: &VmRecord) -> Option<&Arc<Observation>> {
        self.observations
            .get(&vm.id)
            .filter(|o| o.host == vm.owner && o.epoch == vm.epoch)
    }

    /// The migration of a VM that has not ended.
    pub fn active_migration(&self, vm: VmId) -> Option<&Arc<MigrationRecord>> {
        self.migrations.get(self.active_migrations.get(&vm)?)
    }

    /// What is known of a migration.
    pub fn migration_live(&self, id: MigrationId) -> MigrationLive {
        self.migration_live
            .get(&id)
            .map(|live| (**live).clone())
            .unwrap_or_default()
    }

    /// Operations of a VM that have not ended, oldest first.
    pub fn active_operations(&self, vm: VmId) -> Vec<Arc<OperationRecord>> {
        let ids = self.active_operations.get(&vm).into_iter().flatten();
        ids.filter_map(|id| self.operations.get(id).cloned()).collect()
    }

    /// Transfers that a host sends and receives now.
    pub fn transfers(&self, host: &HostName) -> (usize, usize) {
        let running = self
            .active_migrations
            .values()
            .filter_map(|id| self.migrations.get(id));
        running
            .filter(|m| m.phase.is_transfer())
            .fold((0, 0), |(out, into), m| {
                (
                    out + usize::from(m.source == *host),
                    into + usize::from(m.destination == *host),
                )
            })
    }

    /// The oldest revision whose event is kept; one more than the current when there is none.
    pub fn oldest_event(&self) -> u64 {
        self.events
            .get_min()
            .map_or(self.meta.revision + 1, |(revision, _)| *revision)
    }
}
