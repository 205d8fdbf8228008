//! Which backups are due by the schedules, and which need not be kept any more. Pure.
//!
//! Nothing is remembered of a schedule but what its backups say: when the last one of a VM was begun, and how it ended. So a
//! backup that was missed, by a controller that was off or a host that was away, is taken once and not once for each time.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use dalgu_proto::{
    ids::{BackupId, HostName, ScheduleName, VmId},
    time::next_of,
};
use jiff::Timestamp;

use super::{chain, of_vm, under_way};
use crate::{
    model::{BackupKind, BackupRecord, BackupState, ScheduleRecord, VmRecord},
    state::State,
};

/// The first backups of a schedule's VMs are spread over so much time at most, so that they do not all come at once later either;
/// not where it says at what time of day: hosts are given few at a time.
const SPREAD: Duration = Duration::from_secs(600);
/// A backup that was not taken is tried again after so long at most.
const RETRY: Duration = Duration::from_secs(3600);
/// Backups that a host is told to take and has not ended.
const OF_HOST: usize = 2;
/// Backups begun at one look.
const AT_ONCE: usize = 32;
/// Of each VM so many are remembered that were not taken.
const FAILED_KEPT: usize = 3;
/// What stands in the way of a backup for a moment, such as a migration, is waited for so long.
const PATIENCE: Duration = Duration::from_secs(900);

/// A backup that is due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Due {
    /// By which schedule.
    pub schedule: ScheduleName,
    /// The VM.
    pub vm: VmId,
    /// What it is to hold.
    pub kind: BackupKind,
    /// Since when.
    pub time: Timestamp,
}

impl Due {
    /// Whether what stands in its way for a moment has done so for too long.
    pub fn is_late(&self, now: Timestamp) -> bool {
        after(self.time, PATIENCE) < now
    }
}

/// Backups of a VM that a schedule may have at the same time: those that it keeps, what they need, what failed, and one that is taken.
pub fn most(schedule: &ScheduleRecord) -> u64 {
    let young = (u64::from(schedule.keep_days) * 86_400).div_ceil(schedule.every_seconds.max(1));
    let kept = young.max(schedule.keep_last.into());
    kept + u64::from(schedule.incrementals) + FAILED_KEPT as u64 + 1
}

fn after(time: Timestamp, wait: Duration) -> Timestamp {
    time.saturating_add(wait).unwrap_or(Timestamp::MAX)
}

/// A time that differs from VM to VM, and stays the same.
fn spread(vm: VmId, over: Duration) -> Duration {
    let seconds = u128::from(over.as_secs().max(1));
    let share = u64::try_from(vm.uuid().as_u128() % seconds).unwrap_or(0);
    Duration::from_secs(share)
}

fn by_schedule<'a>(
    state: &'a State,
    schedule: &'a ScheduleRecord,
    vm: VmId,
) -> impl DoubleEndedIterator<Item = &'a BackupRecord> {
    let all = of_vm(state, vm).map(AsRef::as_ref);
    all.filter(|backup| backup.schedule.as_ref() == Some(&schedule.name))
}

/// When the next backup of a VM is due.
pub fn next_time(state: &State, schedule: &ScheduleRecord, vm: &VmRecord) -> Timestamp {
    let every = schedule.every();
    let last = by_schedule(state, schedule, vm.id).next_back();
    if let Some(failed) = last.filter(|last| last.state == BackupState::Failed) {
        return after(failed.create_time, (every / 4).min(RETRY));
    }
    let began = schedule.create_time.max(vm.create_time);
    match (schedule.at, last) {
        (Some(at), last) => {
            let anchor = at.after(schedule.create_time);
            next_of(anchor, every, last.map_or(began, |last| last.create_time))
        }
        (None, Some(last)) => after(last.create_time, every),
        (None, None) => after(began, spread(vm.id, every.min(SPREAD))),
    }
}

/// VMs that a schedule is for.
pub fn selected<'a>(
    state: &'a State,
    schedule: &'a ScheduleRecord,
) -> impl Iterator<Item = &'a VmRecord> + 'a {
    let vms = state.vms.values().map(AsRef::as_ref);
    vms.filter(|vm: &&VmRecord| schedule.selects(&vm.labels) && vm.delete_time.is_none())
}

fn kind(state: &State, schedule: &ScheduleRecord, vm: VmId) -> BackupKind {
    let good = by_schedule(state, schedule, vm).rev();
    let good = good.filter(|backup| backup.state == BackupState::Available);
    let since_full = good
        .take_while(|backup| backup.kind == BackupKind::Incremental)
        .count();
    let most = usize::try_from(schedule.incrementals).unwrap_or(usize::MAX);
    if since_full >= most {
        BackupKind::Full
    } else {
        BackupKind::Auto
    }
}

/// Backups that are to be begun now, the longest due first; never two of a VM, and few of a host.
pub fn due(state: &State, now: Timestamp) -> Vec<Due> {
    let mut wanted = BTreeMap::<(Timestamp, VmId), (&ScheduleRecord, &VmRecord)>::new();
    for schedule in state.schedules.values().filter(|schedule| !schedule.paused) {
        for vm in selected(state, schedule) {
            let time = next_time(state, schedule, vm);
            if time <= now && may_be_taken(vm) && under_way(state, vm.id).is_none() {
                wanted.entry((time, vm.id)).or_insert((schedule, vm));
            }
        }
    }
    let mut busy = BTreeMap::<&HostName, usize>::new();
    for backup in state.open_backups.iter().filter_map(|id| state.backups.get(id)) {
        if backup.is_under_way() {
            *busy.entry(&backup.host).or_default() += 1;
        }
    }
    let (mut found, mut seen) = (Vec::new(), BTreeSet::new());
    for ((time, _), (schedule, vm)) in wanted {
        let place = busy.entry(&vm.owner).or_default();
        if *place < OF_HOST && found.len() < AT_ONCE && seen.insert(vm.id) {
            *place += 1;
            found.push(Due {
                schedule: schedule.name.clone(),
                vm: vm.id,
                kind: kind(state, schedule, vm.id),
                time,
            });
        }
    }
    found
}

/// Backups that no schedule keeps, and that none needs which is kept. Those that somebody asked for by hand are kept, and so are
/// those of a schedule that is paused or gone.
pub fn expired(state: &State, now: Timestamp) -> BTreeSet<BackupId> {
    let mut groups = BTreeMap::<(VmId, &ScheduleName), Vec<&BackupRecord>>::new();
    for backup in state.backups.values() {
        if let Some(schedule) = &backup.schedule {
            groups.entry((backup.vm, schedule)).or_default().push(backup);
        }
    }
    let mut candidates = BTreeSet::new();
    for ((_, name), backups) in groups {
        let Some(schedule) = state.schedules.get(name).filter(|schedule| !schedule.paused) else {
            continue;
        };
        candidates.extend(not_kept(schedule, &backups, now));
    }
    // What is kept keeps what it needs.
    let kept = state.backups.values().filter(|backup| {
        let stays = !matches!(backup.state, BackupState::Deleting | BackupState::Failed);
        stays && !candidates.contains(&backup.id)
    });
    let needed: BTreeSet<_> = kept.flat_map(|backup| chain(state, backup.id)).collect();
    candidates.difference(&needed).copied().collect()
}

/// Of one VM's backups by one schedule, oldest first, those that it does not ask to keep.
fn not_kept(schedule: &ScheduleRecord, backups: &[&BackupRecord], now: Timestamp) -> BTreeSet<BackupId> {
    let age = Duration::from_secs(u64::from(schedule.keep_days) * 86_400);
    let young = now.saturating_sub(age).unwrap_or(Timestamp::MIN);
    let last = usize::try_from(schedule.keep_last.max(1)).unwrap_or(usize::MAX);
    let of = |state: BackupState| backups.iter().rev().filter(move |backup| backup.state == state);
    let good = of(BackupState::Available).skip(last);
    let old = good.filter(|backup| backup.point_time.unwrap_or(backup.create_time) < young);
    let failed = of(BackupState::Failed).skip(FAILED_KEPT);
    old.chain(failed).map(|backup| backup.id).collect()
}

/// The moment of the last good backup of a VM by a schedule.
fn last_good_of(state: &State, schedule: &ScheduleRecord, vm: VmId) -> Option<Timestamp> {
    let mut newest_first = by_schedule(state, schedule, vm).rev();
    let good = newest_first.find(|backup| backup.state == BackupState::Available)?;
    Some(good.point_time.unwrap_or(good.create_time))
}

/// The moment of the last good backup of a schedule's VM whose last good one is the oldest; `None` where one has none.
pub fn last_good(state: &State, schedule: &ScheduleRecord) -> Option<Timestamp> {
    let all: Option<Vec<_>> = selected(state, schedule)
        .map(|vm| last_good_of(state, schedule, vm.id))
        .collect();
    all?.into_iter().min()
}

/// A VM that has gone without a good backup of a schedule for too long.
#[derive(Debug, Clone)]
pub struct Overdue<'a> {
    /// The VM.
    pub vm: &'a VmRecord,
    /// The moment of its last good backup by the schedule.
    pub last_good: Option<Timestamp>,
    /// The newest that has failed since.
    pub failed: Option<&'a BackupRecord>,
    /// From when on the VM and the schedule were both there.
    began: Timestamp,
}

impl Overdue<'_> {
    /// Since when it goes without one.
    pub fn since(&self) -> Timestamp {
        self.last_good.unwrap_or(self.began)
    }
}

/// VMs of a schedule whose last good backup by it, or where there is none their own beginning or that of the schedule, is longer ago
/// than twice the time between two. Of a schedule that is paused none; and none of which no backup can be taken for a reason that is told
/// otherwise: it is not made yet, or nobody knows since a restore where it is.
pub fn overdue<'a>(
    state: &'a State,
    schedule: &'a ScheduleRecord,
    now: Timestamp,
) -> impl Iterator<Item = Overdue<'a>> {
    let of_vm = move |vm: &'a VmRecord| {
        let mut ended = by_schedule(state, schedule, vm.id).rev();
        let ended = ended.find(|backup| !backup.state.is_open());
        Overdue {
            vm,
            last_good: last_good_of(state, schedule, vm.id),
            failed: ended.filter(|backup| backup.state == BackupState::Failed),
            began: schedule.create_time.max(vm.create_time),
        }
    };
    let vms = selected(state, schedule).filter(move |vm| !schedule.paused && may_be_taken(vm));
    vms.map(of_vm)
        .filter(move |overdue| after(overdue.since(), schedule.every() * 2) < now)
}

/// Whether there is something of a VM to be backed up, as far as is known.
fn may_be_taken(vm: &VmRecord) -> bool {
    vm.disks_made && !vm.unconfirmed && !vm.spec.disks.is_empty()
}

/// Backups of a schedule that have failed since each VM's last good one.
pub fn failures(state: &State, schedule: &ScheduleRecord) -> usize {
    let of_vm = |vm: &VmRecord| {
        let ended = by_schedule(state, schedule, vm.id).rev();
        let ended = ended.filter(|backup| !backup.state.is_open());
        ended
            .take_while(|backup| backup.state == BackupState::Failed)
            .count()
    };
    selected(state, schedule).map(of_vm).sum()
}
