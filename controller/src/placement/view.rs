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
    ids::HostName,
    vm::{Disk, Spec},
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
    /// What the networks of its interfaces ask of a host.
    pub needs: Needs,
}

/// What a host must have for the networks of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Needs {
    /// Parts of the kernel.
    pub features: BTreeSet<GuestFeature>,
    /// Bridges.
    pub bridges: BTreeSet<String>,
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
        }
    }

    /// The same request for one host only.
    #[must_use]
    pub fn on(self, host: Option<HostName>) -> Self {
        Self { host, ..self }
    }

    /// The same request for a VM whose networks need this.
    #[must_use]
    pub fn with_needs(self, needs: Needs) -> Self {
        Self { needs, ..self }
    }

    /// Whether the VM exists and moves.
    pub fn is_migration(&self) -> bool {
        self.exclude.is_some()
    }

    /// The pools that disks are on, in the order of the disks, each with the sum of their sizes in MiB.
    pub fn pools(&self) -> impl Iterator<Item = (&str, u64)> {
        let volumes = self.spec.volumes();
        let before = volumes.clone();
        let first = move |(index, disk): &(usize, &Disk)| {
            !before.clone().take(*index).any(|other| other.pool == disk.pool)
        };
        let sum = |disk: &Disk| {
            let there = self.spec.volumes().filter(|other| other.pool == disk.pool);
            there.fold(0_u64, |sum, other| sum.saturating_add(other.size_mib))
        };
        volumes
            .enumerate()
            .filter(first)
            .map(move |(_, disk)| (disk.pool.as_str(), sum(disk)))
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
    /// Sum of the sizes of the disks that Dalgu keeps there, in MiB; of a shared pool, those of all hosts.
    pub reserved_mib: u64,
}

impl<'a> PoolView<'a> {
    /// A pool as its host reports it, with what the controller has promised there.
    pub fn of(pool: &'a host::Pool, reserved_mib: u64) -> Self {
        Self {
            name: Cow::Borrowed(&pool.name),
            shared: pool.shared,
            error: pool.error.as_deref().map(Cow::Borrowed),
            capacity_mib: pool.capacity_bytes / MIB,
            available_mib: pool.available_bytes / MIB,
            reserved_mib,
        }
    }

    /// Room for a new disk in MiB. Disks are thin, but each is promised in full: what is promised never exceeds the
    /// capacity, and what is free now bounds it too, as others may write to the same file system.
    pub fn free_mib(&self) -> u64 {
        self.capacity_mib
            .saturating_sub(self.reserved_mib)
            .min(self.available_mib)
    }
}

/// How a host is used, as its last report says.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct UsageView {
    /// Processors busy; `None` where it is not known yet.
    pub cpus_busy: Option<f64>,
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
    /// Labels.
    pub labels: Cow<'a, BTreeMap<String, String>>,
    /// Logical processors.
    pub cpus: u32,
    /// Virtual processors that may be reserved per logical processor.
    pub cpu_overcommit_ratio: f64,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Memory kept for the host itself, in MiB.
    pub reserved_memory_mib: u64,
    /// Virtual processors reserved by VMs, incoming migrations too.
    pub vcpus_reserved: u32,
    /// Memory reserved by VMs in MiB: the sum of [`Spec::reserved_memory_mib`].
    pub memory_mib_reserved: u64,
    /// VMs that hold a reservation.
    pub vms: u32,
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
}

impl<'a> HostView<'a> {
    /// Virtual processors that VMs may reserve: the logical processors times the over-commit ratio, rounded down, less
    /// those of running domains that are not Dalgu's.
    pub fn vcpus_capacity(&self) -> u32 {
        // 100 * 0.29 is 28.999…96 in binary; a ratio is meant in decimals.
        let granted = (f64::from(self.cpus) * self.cpu_overcommit_ratio + 1e-9).floor();
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
