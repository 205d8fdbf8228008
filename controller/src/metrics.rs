//! What the controller counts and shows on its metrics page.
//!
//! Counters are kept here; everything else is read from the durable snapshot when a scraper asks, so that a scrape calls
//! nobody and a VM that is gone leaves no series. Called by the runner, the store's hooks and the /metrics handler.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
    time::Duration,
};

use dalgu_proto::{ids::VmId, metrics};
use jiff::Timestamp;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{
        counter::{ConstCounter, Counter},
        gauge::ConstGauge,
        histogram::{Histogram, exponential_buckets},
        info::Info,
    },
    registry::{Registry, Unit},
};

use crate::{
    backups::plan,
    hosts,
    model::{
        BackupState, HostPower, HostState, ImageState, MigrationRecord, OperationKind, OperationState,
        PowerPhase, ScheduleRecord,
    },
    placement::{HostView, PoolView, Spare},
    reconcile::queue::Queue,
    state::{Db, State},
    status::{self, VmState},
    volumes::{self, VolumeState},
};

/// Counters of the controller.
#[derive(Debug)]
pub struct Metrics {
    passes: Counter,
    failures: Counter,
    pass_seconds: Histogram,
    commit_seconds: Histogram,
    upload_bytes: Counter,
    downtime_seconds: Histogram,
    blackout_seconds: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            passes: Counter::default(),
            failures: Counter::default(),
            pass_seconds: Histogram::new(exponential_buckets(0.001, 4.0, 8)),
            commit_seconds: Histogram::new(exponential_buckets(0.0005, 2.0, 12)),
            upload_bytes: Counter::default(),
            downtime_seconds: Histogram::new(exponential_buckets(0.005, 2.0, 12)),
            blackout_seconds: Histogram::new(exponential_buckets(0.005, 2.0, 12)),
        }
    }
}

impl Metrics {
    /// A reconcile pass has ended.
    pub fn pass(&self, time: Duration, ok: bool) {
        self.passes.inc();
        if !ok {
            self.failures.inc();
        }
        self.pass_seconds.observe(time.as_secs_f64());
    }

    /// The store has committed.
    pub fn committed(&self, time: Duration) {
        self.commit_seconds.observe(time.as_secs_f64());
    }

    /// Bytes of an image have come.
    pub fn uploaded(&self, bytes: usize) {
        self.upload_bytes.inc_by(u64::try_from(bytes).unwrap_or(u64::MAX));
    }

    /// A VM has moved.
    pub fn moved(&self, migration: &MigrationRecord) {
        let seconds = |ms| Duration::from_millis(ms).as_secs_f64();
        if let Some(progress) = migration.progress {
            self.downtime_seconds.observe(seconds(progress.downtime_ms));
        }
        if let Some(ms) = migration.unreachable_ms() {
            self.blackout_seconds.observe(seconds(ms));
        }
    }

    /// The page of a controller.
    pub fn page(self: &Arc<Self>, db: Db, queue: Arc<Queue<VmId>>) -> Page {
        let mut registry = Registry::with_prefix("dalgu_controller");
        registry.register("reconcile_passes", "Reconcile passes", self.passes.clone());
        registry.register(
            "reconcile_failures",
            "Reconcile passes that come again later",
            self.failures.clone(),
        );
        registry.register_with_unit(
            "image_upload",
            "Bytes of images that operators have sent",
            Unit::Bytes,
            self.upload_bytes.clone(),
        );
        let seconds = |registry: &mut Registry, name, help, histogram: &Histogram| {
            registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
        };
        seconds(
            &mut registry,
            "reconcile_pass_duration",
            "Time of a reconcile pass",
            &self.pass_seconds,
        );
        seconds(
            &mut registry,
            "store_commit_duration",
            "Time to put changes on the disk",
            &self.commit_seconds,
        );
        seconds(
            &mut registry,
            "migration_downtime",
            "Time that a VM stood still at the end of its migration",
            &self.downtime_seconds,
        );
        seconds(
            &mut registry,
            "migration_network_blackout",
            "Time that a VM could not be reached over its networks at the end of its migration",
            &self.blackout_seconds,
        );
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "About this program", build);
        registry.register_collector(Box::new(Snapshot { db, queue }));
        Page {
            registry: Arc::new(registry),
        }
    }
}

/// The metrics page.
#[derive(Clone)]
pub struct Page {
    registry: Arc<Registry>,
}

impl Page {
    /// Content type and text for a scraper that sent this `Accept` header.
    pub fn respond(&self, accept: Option<&str>) -> Result<(&'static str, String), fmt::Error> {
        metrics::respond(accept, &self.registry)
    }
}

struct Snapshot {
    db: Db,
    queue: Arc<Queue<VmId>>,
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot").finish_non_exhaustive()
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of objects and MiB stay far below 2^53"
)]
fn number(value: u64) -> ConstGauge<f64> {
    ConstGauge::new(value as f64)
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let state = self.db.snapshot();
        vms(&state, &mut encoder)?;
        hosts_by_state(&state, &mut encoder)?;
        operations(&state, &mut encoder)?;
        images(&state, &mut encoder)?;
        volumes(&state, &mut encoder)?;
        backups(&state, self.db.now(), &mut encoder)?;
        room(&state, &mut encoder)?;
        protection(&state, &mut encoder)?;
        pools(&state, &mut encoder)?;
        let one = |encoder: &mut DescriptorEncoder<'_>, name, help, value: u64| {
            let gauge = number(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
        };
        let waiting = u64::try_from(self.queue.len()).unwrap_or(u64::MAX);
        one(
            &mut encoder,
            "reconcile_queue_vms",
            "VMs that wait for a pass or have one",
            waiting,
        )?;
        one(
            &mut encoder,
            "term",
            "Number of this run of the controller",
            state.meta.term.0,
        )?;
        one(
            &mut encoder,
            "observing",
            "1 after the restore of a backup until an operator has said to resume",
            state.meta.observing.is_some().into(),
        )?;
        one(
            &mut encoder,
            "replaced",
            "1 when agents obey another controller with this site's credentials",
            state.replaced_by.is_some().into(),
        )?;
        if let Some(space) = state.space {
            one(
                &mut encoder,
                "store_free_bytes",
                "Room on the file system of the store",
                space.free_bytes,
            )?;
            let help = "1 while there is so little room for the store that nothing new is made";
            one(&mut encoder, "store_low_space", help, space.low.into())?;
        }
        let revision = ConstCounter::new(state.meta.revision);
        revision.encode(encoder.encode_descriptor(
            "store_revisions",
            "Changes stored",
            None,
            revision.metric_type(),
        )?)
    }
}

fn vms(state: &State, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
    let mut counts: BTreeMap<_, u64> = VmState::ALL.iter().map(|state| (*state, 0)).collect();
    for vm in state.vms.values() {
        *counts.entry(status::of(state, vm)).or_default() += 1;
    }
    let gauge = number(0);
    let mut family = encoder.encode_descriptor("vms", "VMs by state", None, gauge.metric_type())?;
    for (state, count) in counts {
        number(count).encode(family.encode_family(&[("state", state.as_str())])?)?;
    }
    Ok(())
}

fn hosts_by_state(state: &State, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
    let gauge = number(0);
    let mut family = encoder.encode_descriptor("hosts", "Hosts by state", None, gauge.metric_type())?;
    let heard = [HostState::Initializing, HostState::Ready, HostState::Unreachable].map(HostState::as_str);
    for wanted in heard
        .into_iter()
        .chain(PowerPhase::ASLEEP.map(PowerPhase::as_str))
    {
        let hosts = state.hosts.values();
        let count = hosts.filter(|host| hosts::word(state, host) == wanted).count();
        number(count as u64).encode(family.encode_family(&[("state", wanted)])?)?;
    }
    type Is = fn(&HostPower) -> bool;
    let counts: [(&str, &str, Is); 2] = [
        (
            "hosts_power_overdue",
            "Hosts that were switched on and have not reported in time",
            |power| power.overdue,
        ),
        (
            "hosts_power_faults",
            "Hosts of which the last that was asked of their power failed",
            |power| !power.fault.is_empty(),
        ),
    ];
    for (name, help, is) in counts {
        let powers = state.hosts.values().filter_map(|host| host.power.as_ref());
        let gauge = number(powers.filter(|power| is(power)).count() as u64);
        gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
    }
    Ok(())
}

fn operations(state: &State, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
    let mut counts = BTreeMap::<(OperationKind, OperationState), u64>::new();
    for operation in state.operations.values() {
        *counts.entry((operation.kind, operation.state)).or_default() += 1;
    }
    let gauge = number(0);
    let help = "Operations that are kept, by kind and state";
    let mut family = encoder.encode_descriptor("operations", help, None, gauge.metric_type())?;
    for ((kind, state), count) in counts {
        let labels = [("kind", kind.as_str()), ("state", state.as_str())];
        number(count).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn images(state: &State, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
    let gauge = number(0);
    let mut family = encoder.encode_descriptor("images", "Images by state", None, gauge.metric_type())?;
    for wanted in ImageState::ALL {
        let count = state
            .images
            .values()
            .filter(|image| image.state == wanted)
            .count();
        number(count as u64).encode(family.encode_family(&[("state", wanted.as_str())])?)?;
    }
    Ok(())
}

fn volumes(state: &State, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
    let mut counts: BTreeMap<_, u64> = VolumeState::ALL.iter().map(|state| (*state, 0)).collect();
    for volume in state.volumes.values() {
        *counts.entry(volumes::state_of(state, volume)).or_default() += 1;
    }
    let gauge = number(0);
    let mut family = encoder.encode_descriptor("volumes", "Volumes by state", None, gauge.metric_type())?;
    for (state, count) in counts {
        number(count).encode(family.encode_family(&[("state", state.as_str())])?)?;
    }
    Ok(())
}

fn backups(state: &State, now: Timestamp, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
    let gauge = number(0);
    let mut family = encoder.encode_descriptor("backups", "Backups by state", None, gauge.metric_type())?;
    for wanted in BackupState::ALL {
        let of_state = state.backups.values().filter(|backup| backup.state == wanted);
        number(of_state.count() as u64).encode(family.encode_family(&[("state", wanted.as_str())])?)?;
    }
    type Read = fn(&State, &ScheduleRecord, Timestamp) -> u64;
    let families: [(&str, &str, Option<Unit>, Read); 3] = [
        (
            "backup_schedule_failures",
            "Backups of a schedule that have failed since each VM's last good one",
            None,
            |state, schedule, _| plan::failures(state, schedule) as u64,
        ),
        (
            "backup_schedule_overdue",
            "VMs of a schedule that have had no good backup by it for twice the time between two",
            None,
            |state, schedule, now| plan::overdue(state, schedule, now).count() as u64,
        ),
        (
            "backup_schedule_oldest_success_timestamp",
            "Moment of the last good backup of the VM of a schedule whose last good one is the oldest; 0 where one has none",
            Some(Unit::Seconds),
            |state, schedule, _| {
                let last = plan::last_good(state, schedule);
                last.map_or(0, |time| u64::try_from(time.as_second()).unwrap_or(0))
            },
        ),
    ];
    for (name, help, unit, read) in families {
        let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), gauge.metric_type())?;
        for schedule in state.schedules.values() {
            let labels = [("schedule", schedule.name.as_str())];
            number(read(state, schedule, now)).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn room(state: &State, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
    let views = hosts::views(state);
    type Read = fn(&HostView) -> u64;
    let families: [(&str, &str, Option<Unit>, Read); 6] = [
        (
            "host_vcpus_capacity",
            "Virtual processors that may be reserved",
            None,
            |h| h.vcpus_capacity().into(),
        ),
        ("host_vcpus_reserved", "Virtual processors reserved", None, |h| {
            h.vcpus_reserved.into()
        }),
        (
            "host_memory_capacity",
            "Memory that may be reserved",
            Some(Unit::Bytes),
            |h| h.memory_mib_capacity() << 20,
        ),
        (
            "host_memory_reserved",
            "Memory reserved",
            Some(Unit::Bytes),
            |h| h.memory_mib_reserved << 20,
        ),
        ("host_vms_reserved", "VMs that hold a reservation", None, |h| {
            h.vms.into()
        }),
        (
            "host_pressed",
            "1 while the host's load has closed it for new VMs",
            None,
            |h| h.pressed.into(),
        ),
    ];
    for (name, help, unit, read) in families {
        let gauge = number(0);
        let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), gauge.metric_type())?;
        for view in &views {
            number(read(view)).encode(family.encode_family(&[("host", view.name.as_str())])?)?;
        }
    }
    Ok(())
}

fn protection(state: &State, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
    if state.protect.is_empty() {
        return Ok(());
    }
    let spare = Spare::of(&hosts::views(state), &state.protect);
    let short = spare.short_domains().count();
    for (name, help, value) in [
        (
            "protected_domains",
            "Failure domains that room is kept for",
            spare.domains(),
        ),
        (
            "protected_domains_short",
            "Of these, those whose VMs would not find room on other hosts now, or not for certain",
            short,
        ),
    ] {
        let gauge = number(u64::try_from(value).unwrap_or(u64::MAX));
        gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
    }
    Ok(())
}

fn pools(state: &State, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
    let views = hosts::views(state);
    type Read = fn(&PoolView) -> u64;
    let families: [(&str, &str, Option<Unit>, Read); 5] = [
        ("pool_capacity", "Size of a pool", Some(Unit::Bytes), |p| {
            p.capacity_mib << 20
        }),
        ("pool_available", "Free in a pool", Some(Unit::Bytes), |p| {
            p.available_mib << 20
        }),
        (
            "pool_promised",
            "Sizes of the disks in a pool, written or not",
            Some(Unit::Bytes),
            |p| p.reserved_mib << 20,
        ),
        ("pool_nearly_full", "1 from pool_warn_percent on", None, |p| {
            (p.used_percent() >= p.policy.warn_percent).into()
        }),
        (
            "pool_full",
            "1 from pool_full_percent on: it takes no new disks",
            None,
            |p| p.is_full().into(),
        ),
    ];
    for (name, help, unit, read) in families {
        let gauge = number(0);
        let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), gauge.metric_type())?;
        let mut shared = BTreeSet::new();
        for view in &views {
            let usable = view.pools.iter().filter(|pool| pool.error.is_none());
            for pool in usable.filter(|pool| !pool.shared || shared.insert(pool.name.clone())) {
                // A shared one is no host's.
                let host = if pool.shared { "" } else { view.name.as_str() };
                let labels = [("host", host), ("pool", &pool.name)];
                number(read(pool)).encode(family.encode_family(&labels)?)?;
            }
        }
    }
    Ok(())
}
