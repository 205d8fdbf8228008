//! What hosts have promised, summed anew from what VMs are made of or may still have, against what they have.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use dalgu_proto::{ids::HostName, vm::Disk};

use super::{Finding, Invariant, Look, Severity, View};
use crate::{
    hosts,
    model::{HostRecord, MigrationRecord, PlacementGroupRecord, VmRecord},
    placement::{self, Spare, spare::Short},
    placement_groups,
    state::State,
};

/// A host's promises and room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// The host.
    pub host: HostName,
    /// Virtual processors of the VMs that hold a place there; logical ones of their own as many as the host's over-commit ratio says.
    pub vcpus: u64,
    /// Their memory with QEMU's overhead.
    pub memory_mib: u64,
    /// Size of their disks, and of the volumes there that no VM has, by pool.
    pub disks_mib: BTreeMap<String, u64>,
    /// Virtual processors and memory that the controller counts as reserved.
    pub counted: (u64, u64),
    /// What it counts of disks.
    pub counted_disks_mib: BTreeMap<String, u64>,
    /// Most virtual processors.
    pub most_vcpus: u64,
    /// Most memory.
    pub most_memory_mib: u64,
}

/// Where a VM holds a place: at its owner, and on both sides of its migration.
fn holders<'a>(vm: &'a VmRecord, migration: Option<&'a MigrationRecord>) -> BTreeSet<&'a HostName> {
    let sides = migration
        .into_iter()
        .flat_map(|migration| [&migration.source, &migration.destination]);
    sides.chain([&vm.owner]).collect()
}

/// What a host grants, whoever else takes of it.
fn most(state: &State, host: &HostRecord) -> (u64, u64) {
    let ratio = state.cpu_bounds.most(host.cpu_overcommit_ratio);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a cast from a float saturates"
    )]
    // 100 * 0.29 is 28.999…96 in binary; a ratio is meant in decimals.
    let vcpus = (f64::from(host.inventory.cpus) * ratio + 1e-9) as u64;
    let memory_mib = (host.inventory.ordinary_memory_bytes() >> 20).saturating_sub(host.reserved_memory_mib);
    (vcpus, memory_mib)
}

/// Room for disks on hosts, by pool: of VMs, and of volumes that none has.
fn disks(state: &State) -> BTreeMap<&HostName, BTreeMap<String, u64>> {
    let mut sums = BTreeMap::<&HostName, BTreeMap<String, u64>>::new();
    let mut attached = BTreeSet::new();
    let mut add = |host, pool: &String, mib: u64| {
        let sum = sums.entry(host).or_default().entry(pool.clone()).or_insert(0_u64);
        *sum = sum.saturating_add(mib);
    };
    for vm in state.vms.values() {
        let held = vm.held();
        for host in holders(vm, state.active_migration(vm.id).map(AsRef::as_ref)) {
            held.volumes()
                .for_each(|disk| add(host, &disk.pool, disk.size_mib));
        }
        attached.extend(held.disks.iter().filter_map(Disk::volume_id));
    }
    for volume in state.volumes.values() {
        if let Some(host) = volume.host.as_ref().filter(|_| !attached.contains(&volume.id)) {
            add(host, &volume.pool, volume.size_mib);
        }
    }
    sums
}

/// Every host's room. Owes nothing to how the controller counts: it is what that is checked by.
pub fn rooms(state: &State) -> Vec<Room> {
    let mut sums: BTreeMap<&HostName, (u64, u64)> = BTreeMap::new();
    let mut own: BTreeMap<&HostName, BTreeSet<u32>> = BTreeMap::new();
    for vm in state.vms.values() {
        for host in holders(vm, state.active_migration(vm.id).map(AsRef::as_ref)) {
            let sum = sums.entry(host).or_default();
            let spec = vm.held();
            let mut cpus = vm.places(host).iter().flat_map(|place| &place.cpus).peekable();
            if cpus.peek().is_none() {
                sum.0 = sum.0.saturating_add(spec.vcpus.into());
            }
            own.entry(host).or_default().extend(cpus);
            sum.1 = sum.1.saturating_add(spec.reserved_memory_mib());
        }
    }
    let mut disks = disks(state);
    let mut room = |host: &HostRecord| {
        let (vcpus, memory_mib) = sums.get(&host.name).copied().unwrap_or_default();
        let counted = state.reserved.get(&host.name);
        let charge = |own: usize| {
            let own = u32::try_from(own).unwrap_or(u32::MAX);
            u64::from(placement::charged(own, host.cpu_overcommit_ratio))
        };
        let own = own.get(&host.name).map_or(0, BTreeSet::len);
        let (most_vcpus, most_memory_mib) = most(state, host);
        Room {
            host: host.name.clone(),
            vcpus: vcpus.saturating_add(charge(own)),
            memory_mib,
            disks_mib: disks.remove(&host.name).unwrap_or_default(),
            counted: counted.map_or((0, 0), |held| {
                let own = charge(held.taken.cpus().count());
                (held.vcpus.saturating_add(own), held.memory_mib)
            }),
            counted_disks_mib: counted.map_or_else(BTreeMap::new, |held| {
                let pools = held.disks_mib.iter().filter(|(_, mib)| **mib > 0);
                pools.map(|(pool, mib)| (pool.clone(), *mib)).collect()
            }),
            most_vcpus,
            most_memory_mib,
        }
    };
    state.hosts.values().map(|host| room(host)).collect()
}

impl Room {
    /// Whether the controller counts what is held there.
    pub fn is_counted(&self) -> bool {
        self.counted == (self.vcpus, self.memory_mib) && self.counted_disks_mib == self.disks_mib
    }

    /// Whether no more is promised than `taken` by others leaves.
    pub fn suffices(&self, taken: (u64, u64)) -> bool {
        self.vcpus <= self.most_vcpus.saturating_sub(taken.0)
            && self.memory_mib <= self.most_memory_mib.saturating_sub(taken.1)
    }
}

/// I5: promises are the sum of specifications, and no more than there is.
pub(super) fn not_over_committed(view: &View<'_>) -> Look {
    let rooms = rooms(view.state);
    let mut look = Look::at("hosts", rooms.len());
    look.limits = "what a host is made of is what it last reported";
    let mut find = |severity, kind, host: &HostName, seen: String, next_step: &str| {
        look.findings.push(Finding {
            invariant: Invariant::I5,
            severity,
            kind,
            subject: format!("host {host}"),
            seen,
            next_step: next_step.to_owned(),
        });
    };
    for room in rooms {
        let host = &room.host;
        let promised = format!(
            "VMs hold {} of {} vCPUs and {} of {} MiB",
            room.vcpus, room.most_vcpus, room.memory_mib, room.most_memory_mib
        );
        if !room.is_counted() {
            let (vcpus, mib) = room.counted;
            let mut seen = format!("{promised}; {vcpus} vCPUs and {mib} MiB are counted");
            if room.counted_disks_mib != room.disks_mib {
                let (held, counted) = (&room.disks_mib, &room.counted_disks_mib);
                let _ = write!(seen, "; disks hold {held:?} MiB, and {counted:?} are counted");
            }
            let next = "this is a defect of Dalgu: report it; a restart of the controller counts anew";
            find(Severity::Critical, "PROMISES_MISCOUNTED", host, seen, next);
        }
        let (vcpus, mib) = hosts::foreign(view.state, host);
        if !room.suffices((0, 0)) {
            let next = "move VMs away (`dalgu vm migrate`), or give the host its memory or its over-commit ratio back";
            find(Severity::Warning, "OVER_COMMITTED", host, promised, next);
        } else if !room.suffices((vcpus.into(), mib)) {
            let seen = format!(
                "{promised}, and domains that are not Dalgu's there run with {vcpus} vCPUs and {mib} MiB"
            );
            let next = "move VMs away, or stop those domains: together they may need more than there is";
            find(Severity::Warning, "CROWDED", host, seen, next);
        }
    }
    pools(view.state, &mut find);
    look.findings.extend(rules(view.state));
    look.findings.extend(unprotected(view.state));
    look
}

/// Protected domains whose VMs would not find room elsewhere.
fn unprotected(state: &State) -> Vec<Finding> {
    if state.protect.is_empty() {
        return Vec::new();
    }
    let spare = Spare::of(&hosts::views(state), &state.protect);
    let finding = |short: Short<'_>| {
        Finding {
        invariant: Invariant::I5,
        severity: Severity::Warning,
        kind: "PROTECTION_SHORT",
        subject: short.domain.to_owned(),
        seen: format!(
            "were it to fail now, {} vCPUs and {} MiB of its VMs would find no room elsewhere",
            short.lacking.vcpus, short.lacking.memory_mib
        ),
        next_step: "bring hosts back (`dalgu host list`), add one, or delete or shrink VMs; until then new VMs are refused where they would take more of that room"
            .to_owned(),
    }
    };
    spare.short_domains().map(finding).collect()
}

/// Placement groups whose required rule does not hold, while none of their VMs moves.
fn rules(state: &State) -> impl Iterator<Item = Finding> {
    let groups = state.placement_groups.values();
    let at_rest = |record: &&std::sync::Arc<PlacementGroupRecord>| {
        let mut members = placement_groups::of_group(state, &record.group);
        !record.group.preferred && members.all(|vm| state.active_migration(vm.id).is_none())
    };
    groups.filter(at_rest).filter_map(|record| {
        Some(Finding {
            invariant: Invariant::I5,
            severity: Severity::Warning,
            kind: "PLACEMENT_RULE_BROKEN",
            subject: format!("placement group {}", record.group.name),
            seen: placement_groups::broken(state, record)?,
            next_step: "migrate one of them to where the rule holds (`dalgu explain VM --move` says where), or take it out of the group \
                        (`dalgu vm update VM --leave-group GROUP`)"
                .to_owned(),
        })
    })
}

/// Pools that are nearly full, or in which more is promised than may be; a shared one once.
fn pools(state: &State, find: &mut impl FnMut(Severity, &'static str, &HostName, String, &str)) {
    let views = hosts::views(state);
    let all = views.iter().flat_map(|host| {
        let usable = host
            .pools
            .iter()
            .filter(|pool| pool.error.is_none() && pool.capacity_mib > 0);
        usable.map(|pool| (&host.name, pool))
    });
    let mut seen = BTreeSet::new();
    for (host, pool) in all.filter(|(_, pool)| !pool.shared || seen.insert(pool.name.clone())) {
        let kind = if pool.shared { "shared pool" } else { "pool" };
        if pool.reserved_mib > pool.promisable_mib() {
            let text = format!(
                "disks of {} MiB are promised in {kind} {}, where {} MiB may be",
                pool.reserved_mib,
                pool.name,
                pool.promisable_mib()
            );
            let next = "the pool has shrunk: enlarge it, or move disks away (`dalgu vm update --move-disk`), before guests fill them";
            find(Severity::Warning, "POOL_OVER_COMMITTED", host, text, next);
        }
        let text = || format!("{kind} {} is {} % full", pool.name, pool.used_percent());
        if pool.is_full() {
            let next = "no new disk is placed there, and guests that write more may stop: enlarge it or move disks away now";
            find(Severity::Critical, "POOL_FULL", host, text(), next);
        } else if pool.used_percent() >= pool.policy.warn_percent {
            let next = "enlarge it, or move disks away (`dalgu vm update --move-disk`), before guests fill their disks";
            find(Severity::Warning, "POOL_NEARLY_FULL", host, text(), next);
        }
    }
}
