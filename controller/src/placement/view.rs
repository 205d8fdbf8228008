//! What a decision is made from: the request, and each host as placement sees it.
//!
//! Filled in by the API and by the migration code from the state they decide on; read by [`super::decide`]. Holds
//! numbers only: nothing here looks at a clock, so the caller leaves out `usage` that is too old to be believed.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
};

use dalgu_proto::{
    host::{self, GuestFeature},
    ids::{HostName, VolumeId, VolumeName},
    placement::Taint,
    vm::{Disk, NumaPlace, Spec},
};
use imbl::OrdSet;

use super::{
    devices,
    numa::{Parts, charged},
    rules::Rules,
    score::Size,
};

/// Bytes in a MiB.
const MIB: u64 = 1 << 20;
/// Speed taken for a network interface that does not say its own, in bits per second.
const ASSUMED_LINK_SPEED: u64 = 1_000_000_000;

/// What is to be placed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The VM.
    pub spec: Spec,
    /// Only this host, when given.
    pub host: Option<HostName>,
    /// For a migration: the host the VM is on. It is not considered, disks on shared pools need no new room, and
    /// the specification counts as fixed.
    pub exclude: Option<HostName>,
    /// For a migration: the accelerator the guest runs on, which the destination must have too.
    pub accelerator: Option<String>,
    /// What its networks and volumes, and the backup that it is made from, ask of a host.
    pub needs: Needs,
    /// What its placement groups and the taints of hosts say.
    pub rules: Rules,
    /// It may take the room that is kept for protected domains.
    pub ignore_protection: bool,
}

/// What a host must have for a VM besides what its specification says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Needs {
    /// Parts of the kernel.
    pub features: BTreeSet<GuestFeature>,
    /// Bridges.
    pub bridges: BTreeSet<String>,
    /// Of a VM that is to be made, volumes whose files are there: their room is taken already.
    pub volumes: BTreeMap<VolumeId, Bound>,
    /// Pools that its disks are made from.
    pub pools: BTreeSet<String>,
    /// Of each image that its disks are made from, the hosts that have a copy or are about to.
    pub images: Vec<OrdSet<HostName>>,
}

/// A volume whose file is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bound {
    /// Its name.
    pub volume: VolumeName,
    /// The only host that has it; `None` on a shared pool.
    pub host: Option<HostName>,
}

impl Request {
    /// A new VM, for any host.
    pub fn new(spec: Spec) -> Self {
        Self {
            spec,
            host: None,
            exclude: None,
            accelerator: None,
            needs: Needs::default(),
            rules: Rules::default(),
            ignore_protection: false,
        }
    }

    /// A running VM that leaves `source`, whose guests run on `accelerator`.
    pub fn migration(spec: Spec, source: HostName, accelerator: &str) -> Self {
        Self {
            spec,
            host: None,
            exclude: Some(source),
            accelerator: Some(accelerator.to_owned()),
            needs: Needs::default(),
            rules: Rules::default(),
            ignore_protection: false,
        }
    }

    /// The same request for one host only.
    #[must_use]
    pub fn on(self, host: Option<HostName>) -> Self {
        Self { host, ..self }
    }

    /// The same request for a VM that needs this besides.
    #[must_use]
    pub fn with_needs(self, needs: Needs) -> Self {
        Self { needs, ..self }
    }

    /// The same request for a VM of which groups and tolerations say this.
    #[must_use]
    pub fn with_rules(self, rules: Rules) -> Self {
        Self { rules, ..self }
    }

    /// The same request, which may take the room that is kept for protected domains.
    #[must_use]
    pub fn ignoring_protection(self, ignore_protection: bool) -> Self {
        Self {
            ignore_protection,
            ..self
        }
    }

    /// Whether a disk is a volume that has its room.
    fn is_there(&self, disk: &Disk) -> bool {
        disk.volume_id()
            .is_some_and(|volume| self.needs.volumes.contains_key(&volume))
    }

    /// Whether it asks for what is tested on the host itself, host by host: processors, nodes, huge pages or devices of its own, or bandwidth.
    pub fn is_particular(&self) -> bool {
        let spec = &self.spec;
        !spec.fitting.is_none() || !spec.devices.is_empty() || spec.bandwidth().next().is_some()
    }

    /// Bandwidth that it reserves, by bridge, in Mbit per second.
    pub fn bandwidth(&self) -> BTreeMap<&str, u64> {
        let mut sums = BTreeMap::new();
        for (bridge, mbit) in self.spec.bandwidth() {
            *sums.entry(bridge).or_insert(0) += mbit;
        }
        sums
    }

    /// How many of its images a host would have to fetch, as far as a score tells them apart.
    pub(super) fn images_missing(&self, host: &HostName) -> u8 {
        let missing = self.needs.images.iter().filter(|at| !at.contains(host));
        images_told_apart(missing.count())
    }

    /// Whether the VM exists and moves.
    pub fn is_migration(&self) -> bool {
        self.exclude.is_some()
    }

    /// The pools that disks are on, in the order of the disks, each with the sum of the sizes, in MiB, of those that need room.
    pub fn pools(&self) -> impl Iterator<Item = (&str, u64)> {
        let volumes = self.spec.volumes();
        let before = volumes.clone();
        let first = move |(index, disk): &(usize, &Disk)| {
            !before.clone().take(*index).any(|other| other.pool == disk.pool)
        };
        let sum = |disk: &Disk| {
            let there = self.spec.volumes().filter(|other| other.pool == disk.pool);
            let needing = there.filter(|other| !self.is_there(other));
            needing.fold(0_u64, |sum, other| sum.saturating_add(other.size_mib))
        };
        volumes
            .enumerate()
            .filter(first)
            .map(move |(_, disk)| (disk.pool.as_str(), sum(disk)))
    }
}

/// Three bits of a score: more are as many.
pub(super) fn images_told_apart(missing: usize) -> u8 {
    u8::try_from(missing.min(7)).unwrap_or(7)
}

/// How far pools are filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolPolicy {
    /// From so much of its room in use on, in percent, it is told that a pool is nearly full.
    pub warn_percent: u64,
    /// From so much on no new disk is placed there.
    pub full_percent: u64,
    /// So much of its room is promised to disks, in percent: above 100 they may together be larger than the pool.
    pub overcommit_percent: u64,
}

impl Default for PoolPolicy {
    fn default() -> Self {
        Self {
            warn_percent: 80,
            full_percent: 95,
            overcommit_percent: 100,
        }
    }
}

/// A storage pool of a host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PoolView<'a> {
    /// Name.
    pub name: Cow<'a, str>,
    /// Whether every host sees the same files there.
    pub shared: bool,
    /// Why it cannot be used now, where it cannot.
    pub error: Option<Cow<'a, str>>,
    /// Size in MiB.
    pub capacity_mib: u64,
    /// Free now, in MiB.
    pub available_mib: u64,
    /// In use now, in MiB; 0 where that is not known.
    pub used_mib: u64,
    /// Sum of the sizes of the disks that Dalgu keeps there, in MiB; of a shared pool, those of all hosts.
    pub reserved_mib: u64,
    /// How far it is filled.
    pub policy: PoolPolicy,
}

impl<'a> PoolView<'a> {
    /// A pool as its host reports it, with what the controller has promised there.
    pub fn of(pool: &'a host::Pool, reserved_mib: u64, policy: PoolPolicy) -> Self {
        Self {
            name: Cow::Borrowed(&pool.name),
            shared: pool.shared,
            error: pool.error.as_deref().map(Cow::Borrowed),
            capacity_mib: pool.capacity_bytes / MIB,
            available_mib: pool.available_bytes / MIB,
            used_mib: pool.used_bytes / MIB,
            reserved_mib,
            policy,
        }
    }

    /// Room for a new disk in MiB. Disks are thin, but each is promised in full: what is promised never exceeds the
    /// capacity, and what is free now bounds it too, as others may write to the same file system. Where the operator has more promised
    /// than there is, what is free now counts only when it comes to an end.
    pub fn free_mib(&self) -> u64 {
        let promise = self.promisable_mib().saturating_sub(self.reserved_mib);
        match (self.is_full(), self.is_overcommitted()) {
            (true, _) => 0,
            (false, true) => promise,
            (false, false) => promise.min(self.available_mib),
        }
    }

    /// What may be promised to disks, in MiB.
    pub fn promisable_mib(&self) -> u64 {
        let mib = u128::from(self.capacity_mib) * u128::from(self.policy.overcommit_percent) / 100;
        u64::try_from(mib).unwrap_or(u64::MAX)
    }

    /// Whether more may be promised than there is.
    pub const fn is_overcommitted(&self) -> bool {
        self.policy.overcommit_percent > 100
    }

    /// What is kept free of new disks, in MiB, of what can be used at all.
    pub const fn kept_mib(&self) -> u64 {
        let usable = match self.used_mib {
            0 => self.capacity_mib,
            used => used.saturating_add(self.available_mib),
        };
        let percent = 100_u64.saturating_sub(self.policy.full_percent);
        usable / 100 * percent + usable % 100 * percent / 100
    }

    /// Whether so little is free that it takes no new disk.
    pub const fn is_full(&self) -> bool {
        self.available_mib <= self.kept_mib()
    }

    /// How much of it is in use, in percent.
    pub fn used_percent(&self) -> u64 {
        used_percent(self.capacity_mib, self.available_mib, self.used_mib)
    }
}

/// How much of a pool is in use, in percent of what can be used at all; 0 for one of no size. `used` is 0 where it is not known.
pub fn used_percent(capacity: u64, available: u64, used: u64) -> u64 {
    let used = match used {
        0 => capacity.saturating_sub(available),
        used => used,
    };
    let all = u128::from(used) + u128::from(available);
    u64::try_from(u128::from(used) * 100 / all.max(1)).unwrap_or(100)
}

/// How a host is used, as its last report says.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct UsageView {
    /// Processors busy; `None` where it is not known yet.
    pub cpus_busy: Option<f64>,
    /// Processors that its VMs together are expected to use at most; `None` where it is not known yet.
    pub cpus_expected: Option<f64>,
    /// How busy it has been; `None` where it is not known yet.
    pub lately: Option<Lately>,
    /// Load average over 1 minute.
    pub load1: f64,
    /// What a new process could get without swapping.
    pub memory_available_bytes: u64,
    /// Time in which some task waited for a processor.
    pub cpu_stall: StallView,
    /// Time in which some task waited for memory.
    pub memory_stall: StallView,
    /// Time in which some task waited for I/O.
    pub io_stall: StallView,
    /// Use of the busiest network interface in its busier direction, 0 to 1.
    pub network_utilisation: f64,
}

/// How busy a host has been, by means over five minutes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lately {
    /// Processors busy: the 95th percentile of the last hour, by the VMs that it has now and what else runs there.
    pub cpus_busy: f64,
    /// Processors that its VMs were ready to use and waited for, their steal: the last of these means.
    pub cpus_stolen: f64,
}

/// Pressure of one kind; zero where the kernel does not offer it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StallView {
    /// Percent over the last 10 s.
    pub avg10_percent: f64,
    /// Percent over the last 60 s.
    pub avg60_percent: f64,
}

impl From<Option<host::Stall>> for StallView {
    fn from(stall: Option<host::Stall>) -> Self {
        stall.map_or_else(Self::default, |stall| Self {
            avg10_percent: stall.avg10_percent,
            avg60_percent: stall.avg60_percent,
        })
    }
}

impl UsageView {
    /// What placement needs of a sample.
    pub fn of(usage: &host::Usage) -> Self {
        Self {
            cpus_busy: usage.rates_valid.then_some(usage.cpus_busy),
            cpus_expected: None,
            lately: None,
            load1: usage.load[0],
            memory_available_bytes: usage.memory.available_bytes,
            cpu_stall: usage.pressure.cpu_some.into(),
            memory_stall: usage.pressure.memory_some.into(),
            io_stall: usage.pressure.io_some.into(),
            network_utilisation: network_utilisation(&usage.nics),
        }
    }
}

/// Use of the busiest physical interface. Where there is none at all (a host that is itself a VM or a namespace may
/// show only virtual devices), the interfaces of unknown kind count; bridges, VLANs, bonds and taps never do, as
/// their traffic is counted below them.
fn network_utilisation(nics: &[host::Nic]) -> f64 {
    let physical = nics.iter().any(|nic| nic.kind == host::NicKind::Physical);
    let counted = if physical {
        host::NicKind::Physical
    } else {
        host::NicKind::Virtual
    };
    nics.iter()
        .filter(|nic| nic.kind == counted && nic.rates_valid)
        .map(utilisation)
        .fold(0.0, f64::max)
}

#[expect(clippy::cast_precision_loss, reason = "a link speed is far below 2^53")]
fn utilisation(nic: &host::Nic) -> f64 {
    let speed = if nic.speed_bits_per_second == 0 {
        ASSUMED_LINK_SPEED
    } else {
        nic.speed_bits_per_second
    };
    let rate = nic.receive_bytes_per_second.max(nic.transmit_bytes_per_second) * 8.0;
    (rate / speed as f64).clamp(0.0, 1.0)
}

/// A host as placement sees it. Borrows what it can: a large site makes thousands of these for each decision.
#[derive(Debug, Clone, PartialEq)]
pub struct HostView<'a> {
    /// Name, unique among the hosts of a decision.
    pub name: HostName,
    /// Whether it reports in time.
    pub ready: bool,
    /// Its state in words, for example "unreachable for 40 s"; shown when it is not ready.
    pub state: Cow<'a, str>,
    /// Closed for new VMs.
    pub cordoned: bool,
    /// Why it was cordoned; may be empty.
    pub cordon_reason: Cow<'a, str>,
    /// Closed for new VMs by its load.
    pub pressed: bool,
    /// Labels.
    pub labels: Cow<'a, BTreeMap<String, String>>,
    /// What keeps VMs away that do not tolerate it.
    pub taints: Cow<'a, BTreeSet<Taint>>,
    /// Logical processors.
    pub cpus: u32,
    /// Virtual processors that may be reserved per logical processor.
    pub cpu_overcommit_ratio: f64,
    /// What the operator said of it.
    pub own_cpu_overcommit_ratio: f64,
    /// The one that counts is what its load has made of it, and not what the operator said.
    pub adapted: bool,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Memory kept for the host itself, in MiB.
    pub reserved_memory_mib: u64,
    /// Virtual processors reserved by VMs, incoming migrations too; dedicated ones as [`charged`](super::charged) says.
    pub vcpus_reserved: u32,
    /// Memory reserved by VMs in MiB: the sum of [`Spec::reserved_memory_mib`].
    pub memory_mib_reserved: u64,
    /// VMs that hold a reservation.
    pub vms: u32,
    /// Sizes of these VMs, and how many have each; left out where nothing is protected.
    pub vm_sizes: Vec<(Size, u32)>,
    /// Storage pools.
    pub pools: Vec<PoolView<'a>>,
    /// Linux bridges.
    pub bridges: Cow<'a, [String]>,
    /// How guests run here: "kvm" or "tcg".
    pub accelerator: Cow<'a, str>,
    /// What guests can have here.
    pub guest_features: Cow<'a, [GuestFeature]>,
    /// Last sample, unless it is too old to be believed.
    pub usage: Option<UsageView>,
    /// Virtual processors of running domains that are not Dalgu's.
    pub unmanaged_vcpus: u32,
    /// Memory of the same, in MiB.
    pub unmanaged_memory_mib: u64,
    /// Most VMs that it takes; `None` for as many as have room.
    pub vms_most: Option<u32>,
    /// What it has by name.
    pub parts: Parts<'a>,
}

impl<'a> HostView<'a> {
    /// Virtual processors that VMs may reserve: the logical processors times the over-commit ratio, rounded down, less
    /// those of running domains that are not Dalgu's.
    pub fn vcpus_capacity(&self) -> u32 {
        self.vcpus_capacity_by(self.cpu_overcommit_ratio)
    }

    /// The same, were this the over-commit ratio.
    pub(super) fn vcpus_capacity_by(&self, ratio: f64) -> u32 {
        // 100 * 0.29 is 28.999…96 in binary; a ratio is meant in decimals.
        let granted = (f64::from(self.cpus) * ratio + 1e-9).floor();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "clamped to the range of u32"
        )]
        let granted = granted.clamp(0.0, f64::from(u32::MAX)) as u32;
        granted.saturating_sub(self.unmanaged_vcpus)
    }

    /// Virtual processors that are not reserved.
    pub fn vcpus_free(&self) -> u32 {
        self.vcpus_capacity().saturating_sub(self.vcpus_reserved)
    }

    /// Memory that VMs may reserve, in MiB: all of it less what is kept for the host and what running domains that are
    /// not Dalgu's may use.
    pub fn memory_mib_capacity(&self) -> u64 {
        self.memory_mib
            .saturating_sub(self.reserved_memory_mib)
            .saturating_sub(self.unmanaged_memory_mib)
    }

    /// Memory that is not reserved, in MiB.
    pub fn memory_mib_free(&self) -> u64 {
        self.memory_mib_capacity()
            .saturating_sub(self.memory_mib_reserved)
    }

    /// Processors and memory, in MiB, that are reserved beyond what may be: the limits were lowered.
    pub fn overbooked(&self) -> (u32, u64) {
        (
            self.vcpus_reserved.saturating_sub(self.vcpus_capacity()),
            self.memory_mib_reserved
                .saturating_sub(self.memory_mib_capacity()),
        )
    }

    /// Whether it has as many VMs as it takes.
    pub fn is_full(&self) -> bool {
        self.vms_most.is_some_and(|most| self.vms >= most)
    }

    /// Counts a VM at these places, with the devices that it is given; its disks aside.
    pub fn reserve(&mut self, spec: &Spec, places: &[NumaPlace]) {
        let devices = devices::choose(spec, places, self);
        let taken = self.parts.taken.to_mut();
        taken.change_devices(&devices, true);
        let before = charged(taken.dedicated(), self.cpu_overcommit_ratio);
        taken.change(spec, places, true);
        let own = places.iter().any(|place| !place.cpus.is_empty());
        let vcpus = match own {
            true => charged(taken.dedicated(), self.cpu_overcommit_ratio).saturating_sub(before),
            false => spec.vcpus,
        };
        self.vcpus_reserved = self.vcpus_reserved.saturating_add(vcpus);
        self.memory_mib_reserved = self
            .memory_mib_reserved
            .saturating_add(spec.reserved_memory_mib());
        self.vms = self.vms.saturating_add(1);
    }

    /// Leaves room for a VM that is here as it is: only what is added to it is judged.
    pub fn keep(&mut self) {
        self.ready = true;
        self.cordoned = false;
        self.pressed = false;
        self.vms_most = None;
    }

    /// What the uplink of a bridge carries that is not reserved, and what it carries, in Mbit per second.
    pub fn mbit_free(&self, bridge: &str) -> (u64, u64) {
        let uplink = self.parts.uplinks.iter().find(|uplink| uplink.bridge == bridge);
        let carries = uplink.map_or(0, |uplink| uplink.mbit_per_second);
        (carries.saturating_sub(self.parts.taken.mbit(bridge)), carries)
    }

    /// The pool of that name.
    pub fn pool(&self, name: &str) -> Option<&PoolView<'a>> {
        self.pools.iter().find(|pool| pool.name == name)
    }
}

/// Memory to keep for a host that has `total_mib`, where the operator does not say: 1024 MiB, or a tenth of a host
/// that has less than 10 GiB.
pub fn default_reserved_memory_mib(total_mib: u64) -> u64 {
    (total_mib / 10).min(1024)
}
