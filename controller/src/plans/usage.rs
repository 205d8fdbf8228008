//! What VMs and hosts have used of the processors, for the planner and for placement. A few numbers for each, in memory; what is known of a VM is stored once an
//! hour, a twelfth of the VMs at each look, and goes on from there after a start. A VM of which nothing is known counts as fully busy.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use dalgu_proto::{
    host::VmUsage,
    ids::{HostName, VmId},
};
use jiff::Timestamp;

use crate::{
    model::{HostLive, UsageRecord},
    placement::Lately,
    planner::{
        Samples,
        peak::{HOURS, Peaks, Week, add},
    },
    state::State,
};

/// Time between two samples.
pub const SAMPLE: Duration = Duration::from_secs(300);
/// Samples of an hour.
const HOUR: usize = 12;
/// Looks after which every VM has been stored once.
const LOOKS: u32 = 12;

/// The samples of one VM, and what the next is measured from.
#[derive(Debug, Clone, Default)]
struct Known {
    samples: Samples,
    peaks: Peaks,
    /// Processor time, time for which it waited for a processor, and when they were read, by its host.
    last: Option<(f64, f64, Timestamp)>,
}

impl Known {
    /// As it was stored.
    fn restored(record: &UsageRecord) -> Self {
        let processors = |hundredths: u16| f32::from(hundredths) / 100.0;
        let mut samples = Samples::default();
        for used in record.samples.iter().rev() {
            samples.push(processors(*used));
        }
        let hours = record.hours.iter().map(|used| used.map(processors));
        Self {
            samples,
            peaks: Peaks::restored(record.hour, hours),
            last: None,
        }
    }

    /// As it is stored; `None` where nothing was seen.
    fn stored(&self, vm: VmId) -> Option<UsageRecord> {
        let (hour, hours) = self.peaks.known()?;
        Some(UsageRecord {
            vm,
            hour,
            hours: hours
                .map(|used| used.map(|used| hundredths(used.into())))
                .collect(),
            samples: self.samples.newest().map(hundredths).collect(),
        })
    }

    /// Whether anything was seen of it.
    fn is_seen(&self) -> bool {
        self.peaks.known().is_some()
    }

    /// Takes a sample. Gives how many processors it used since the last, and how many it waited for, as far as that can be said.
    fn push(&mut self, usage: &VmUsage) -> (f64, f64) {
        let now = (
            usage.cpu_seconds_total,
            usage.cpu_wait_seconds_total,
            usage.sample_time,
        );
        let (used, waited) = match self.last.replace(now) {
            // The counters begin anew on another host, and after a restart.
            Some((used, waited, at)) if now.0 >= used && now.1 >= waited && now.2 > at => {
                let passed = now.2.duration_since(at).as_secs_f64();
                (Some((now.0 - used) / passed), (now.1 - waited) / passed)
            }
            // Nothing new: the host is silent.
            Some((_, _, at)) if at == now.2 => (None, 0.0),
            _ => (usage.rates_valid.then_some(usage.cpus_busy), 0.0),
        };
        if let Some(used) = used {
            #[expect(clippy::cast_possible_truncation, reason = "a few processors")]
            let used = used.clamp(0.0, 4096.0) as f32;
            self.samples.push(used);
            self.peaks.push(hour(now.2), used);
        }
        (used.unwrap_or(0.0), waited)
    }
}

/// What was measured of one host, and what the next is measured from.
#[derive(Debug, Clone, Default)]
struct Measured {
    /// Processors busy besides those that its VMs used, the last one first.
    besides: VecDeque<f64>,
    /// Processors that its VMs waited for.
    stolen: f64,
    /// Processor time and when it was read.
    last: Option<(f64, Timestamp)>,
}

impl Measured {
    /// Takes a sample, where there is a newer one and it can be measured from the last; what its VMs used and waited for meanwhile.
    fn push(&mut self, live: &HostLive, (used, waited): (f64, f64)) {
        let Some(usage) = &live.usage else {
            return;
        };
        let now = (usage.cpu.busy(), usage.sample_time);
        let Some((before, at)) = self.last.replace(now) else {
            return;
        };
        let passed = now.1.duration_since(at).as_secs_f64();
        // The counter begins anew when the host does.
        if passed > 0.0 && now.0 >= before {
            self.besides
                .push_front(((now.0 - before) / passed - used).max(0.0));
            self.besides.truncate(HOUR);
            self.stolen = waited;
        }
    }
}

/// Of a processor; more than 655 of them are as many.
fn hundredths(processors: f64) -> u16 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to the range of u16"
    )]
    let hundredths = (processors * 100.0).round().clamp(0.0, f64::from(u16::MAX)) as u16;
    hundredths
}

/// The number of a look by the clock.
pub fn look_at(now: Timestamp) -> u32 {
    let number = u64::try_from(now.as_second()).unwrap_or(0) / SAMPLE.as_secs();
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Whether a VM's turn to be stored is at this look: once an hour.
fn is_due(vm: VmId, look: u32) -> bool {
    let sum: u32 = vm.uuid().as_bytes().iter().map(|byte| u32::from(*byte)).sum();
    sum % LOOKS == look % LOOKS
}

/// The 95th percentile, between the two nearest values in proportion (as Hyndman and Fan's definition 7, which Prometheus and NumPy have too).
fn percentile_95(mut values: Vec<f64>) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    let last = u32::try_from(values.len().checked_sub(1)?).ok()?;
    let rank = f64::from(last) * 0.95;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "from 0 to the last"
    )]
    let below = rank as usize;
    let above = values.get(below + 1).unwrap_or(&values[below]);
    Some(values[below] + (above - values[below]) * rank.fract())
}

/// What is known of everything.
#[derive(Debug, Default)]
struct All {
    vms: BTreeMap<VmId, Known>,
    hosts: BTreeMap<HostName, Measured>,
}

/// A handle to what is known of all VMs and hosts.
#[derive(Debug, Clone, Default)]
pub struct Usage(Arc<Mutex<All>>);

impl Usage {
    /// Takes a sample of every VM and host; those that are gone are forgotten. Between two samples on the same host it is the mean over the time between
    /// them, else what the host says of the last seconds of a VM.
    pub fn sample(&self, state: &State) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let All { vms, hosts } = &mut *all;
        vms.retain(|vm, _| state.vms.contains_key(vm));
        hosts.retain(|host, _| state.live.contains_key(host));
        let mut sums = BTreeMap::<&HostName, (f64, f64)>::new();
        for (vm, record) in &state.usage {
            if state.vms.contains_key(vm) {
                vms.entry(*vm).or_insert_with(|| Known::restored(record));
            }
        }
        for vm in state.vms.values() {
            if let Some(usage) = state.observation(vm).and_then(|seen| seen.usage.as_ref()) {
                let (used, waited) = vms.entry(vm.id).or_default().push(usage);
                let sum = sums.entry(&vm.owner).or_default();
                *sum = (sum.0 + used, sum.1 + waited);
            }
        }
        for (host, live) in &state.live {
            let sum = sums.get(host).copied().unwrap_or_default();
            hosts.entry(host.clone()).or_default().push(live, sum);
        }
    }

    /// What the last hour says of each host with the VMs that it has now; hosts of which nothing was seen are left out.
    pub fn lately(&self, state: &State) -> BTreeMap<HostName, Lately> {
        let All { vms, hosts } = &*self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = hosts.iter().filter(|(_, known)| !known.besides.is_empty());
        let mut busy: BTreeMap<_, Vec<f64>> = seen
            .map(|(host, known)| (host, known.besides.iter().copied().collect()))
            .collect();
        for vm in state.vms.values() {
            if let (Some(known), Some(busy)) = (vms.get(&vm.id), busy.get_mut(&vm.owner)) {
                for (busy, used) in busy.iter_mut().zip(known.samples.newest()) {
                    *busy += used;
                }
            }
        }
        let lately = busy.into_iter().filter_map(|(host, busy)| {
            let lately = Lately {
                cpus_busy: percentile_95(busy)?,
                cpus_stolen: hosts[host].stolen,
            };
            Some((host.clone(), lately))
        });
        lately.collect()
    }

    /// Processors that the VMs of each host are expected to use together in their fullest hour of a week, by what was seen of them.
    pub fn expected(&self, state: &State) -> BTreeMap<HostName, f64> {
        let all = &self.0.lock().unwrap_or_else(PoisonError::into_inner).vms;
        let mut hosts = BTreeMap::<&HostName, Week>::new();
        for vm in state.vms.values() {
            if let Some(known) = all.get(&vm.id).filter(|known| known.is_seen()) {
                let week = hosts.entry(&vm.owner).or_insert([0.0; HOURS]);
                add(week, &known.peaks.seen(), 1.0);
            }
        }
        let fullest = |week: Week| week.into_iter().fold(0.0, f64::max);
        hosts
            .into_iter()
            .map(|(host, week)| (host.clone(), fullest(week)))
            .collect()
    }

    /// Processors that a VM is expected to use at most in this hour of the week and in the next, by what was seen of it.
    pub fn next_hours(&self, vm: VmId, now: Timestamp) -> [f64; 2] {
        let all = &self.0.lock().unwrap_or_else(PoisonError::into_inner).vms;
        let Some(known) = all.get(&vm).filter(|known| known.is_seen()) else {
            return [0.0; 2];
        };
        let week = known.peaks.seen();
        [0, 1].map(|next| {
            let hour = (hour(now) + next) % HOURS as u64;
            usize::try_from(hour).map_or(0.0, |hour| week[hour])
        })
    }

    /// What is to be stored at a look, of the VMs whose turn it is.
    pub fn due(&self, look: u32) -> Vec<UsageRecord> {
        let all = &self.0.lock().unwrap_or_else(PoisonError::into_inner).vms;
        let due = all.iter().filter(|(vm, _)| is_due(**vm, look));
        due.filter_map(|(vm, known)| known.stored(*vm)).collect()
    }

    /// The samples of a VM; none where nothing is known.
    pub fn samples(&self, vm: VmId) -> Samples {
        let all = &self.0.lock().unwrap_or_else(PoisonError::into_inner).vms;
        all.get(&vm).map(|known| known.samples).unwrap_or_default()
    }
}

/// The number of an hour since 1970.
fn hour(at: Timestamp) -> u64 {
    u64::try_from(at.as_second() / 3600).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use dalgu_proto::host::{self, CpuTimes, VmUsage};

    use super::*;
    use crate::{
        fixtures,
        model::VmRecord,
        state::{Db, Hooks},
        store::memory::Disk,
    };

    #[tokio::test]
    async fn a_host_is_expected_to_use_what_its_vms_use_in_the_same_hour_and_what_moves_takes_it_along() {
        let db = Db::open(Disk::default().open(), fixtures::cluster_id(), Hooks::default()).unwrap();
        let usage = Usage::default();
        let (day, night) = (fixtures::vm("day", "h1"), fixtures::vm("night", "h1"));
        for vm in [&day, &night] {
            db.change(|tx| tx.put_vm(vm.clone())).await;
        }
        let expected = async |host: &str| {
            let all = usage.expected(&db.snapshot());
            all.get(&fixtures::host_name(host)).copied()
        };
        assert_eq!(expected("h1").await, None, "nothing was seen");
        // What its host counts is read at the end of each hour.
        let mut counted = [0.0; 2];
        for hour in 0..=24_i64 {
            for (vm, counted) in [&day, &night].into_iter().zip(&mut counted) {
                let is_busy = (9..17).contains(&hour) == (vm.id == day.id);
                *counted += if is_busy { 2.0 } else { 0.25 } * 3600.0;
                let mut seen = fixtures::observation(vm);
                seen.usage = Some(VmUsage {
                    cpu_seconds_total: *counted,
                    sample_time: Timestamp::from_second(hour * 3600 + 3599).unwrap(),
                    ..VmUsage::default()
                });
                db.change(|tx| tx.observe(vm.id, Some(seen))).await;
            }
            usage.sample(&db.snapshot());
        }
        assert_eq!(expected("h1").await, Some(2.25), "never busy at the same time");
        let moved = VmRecord {
            owner: fixtures::host_name("h2"),
            ..night
        };
        db.change(|tx| tx.put_vm(moved)).await;
        assert_eq!(
            (expected("h1").await, expected("h2").await),
            (Some(2.0), Some(2.0))
        );
    }

    #[tokio::test]
    async fn what_vms_have_used_is_known_again_after_a_restart_and_takes_less_than_a_kilobyte_each() {
        let disk = Disk::default();
        let open = || Db::open(disk.open(), fixtures::cluster_id(), Hooks::default()).unwrap();
        let (db, usage) = (open(), Usage::default());
        let vm = fixtures::vm("shop", "h1");
        db.change(|tx| tx.put_vm(vm.clone())).await;
        let mut counted = 0.0;
        // Every five minutes of eight days: 1.5 processors, and 12.25 in one hour of each day.
        for look in 0..8 * 24 * 12_u32 {
            counted += if look / 12 % 24 == 3 { 12.25 } else { 1.5 } * 300.0;
            let mut seen = fixtures::observation(&vm);
            seen.usage = Some(VmUsage {
                cpu_seconds_total: counted,
                sample_time: Timestamp::from_second(i64::from(look) * 300 + 299).unwrap(),
                ..VmUsage::default()
            });
            db.change(|tx| tx.observe(vm.id, Some(seen))).await;
            usage.sample(&db.snapshot());
        }
        let (mut writes, expected) = (0, usage.expected(&db.snapshot()));
        for look in 0..LOOKS {
            let due = usage.due(look);
            writes += due.len();
            db.change(|tx| due.into_iter().for_each(|record| tx.put_usage(record)))
                .await;
        }
        assert_eq!(writes, 1, "once an hour");
        let hour = (0..3600)
            .step_by(300)
            .map(|second| look_at(Timestamp::from_second(second).unwrap()));
        assert!(hour.eq(0..LOOKS), "a look each");
        let state = db.snapshot();
        let size = serde_json::to_string(&*state.usage[&vm.id]).unwrap().len();
        assert!((700..1000).contains(&size), "{size} bytes");
        let revision = state.meta.revision;
        let again = usage.due((0..LOOKS).find(|look| is_due(vm.id, *look)).unwrap());
        db.change(|tx| again.into_iter().for_each(|record| tx.put_usage(record)))
            .await;
        assert_eq!(
            db.snapshot().meta.revision,
            revision,
            "nothing new, nothing written"
        );
        drop(db);
        let (db, known) = (open(), Usage::default());
        known.sample(&db.snapshot());
        assert_eq!(known.expected(&db.snapshot()), expected);
        assert_eq!(known.samples(vm.id).len(), usage.samples(vm.id).len());
        assert_eq!(
            known.samples(vm.id).newest().next(),
            usage.samples(vm.id).newest().next()
        );
        db.change(|tx| tx.delete_vm(vm.id)).await;
        known.sample(&db.snapshot());
        assert!(db.snapshot().usage.is_empty() && known.expected(&db.snapshot()).is_empty());
    }

    #[test]
    fn a_percentile_lies_between_the_two_nearest_values() {
        assert_eq!(percentile_95(Vec::new()), None);
        assert_eq!(percentile_95(vec![3.0]), Some(3.0));
        assert_eq!(percentile_95(vec![2.0, 0.0]), Some(1.9));
        let twelve: Vec<f64> = (0..12).rev().map(f64::from).collect();
        assert!((percentile_95(twelve).unwrap() - 10.45).abs() < 1e-9);
    }

    #[tokio::test]
    async fn the_last_hour_of_a_host_is_that_of_the_vms_it_has_now_and_of_what_else_runs_there() {
        let db = Db::open(Disk::default().open(), fixtures::cluster_id(), Hooks::default()).unwrap();
        let usage = Usage::default();
        let (vm, host) = (fixtures::vm("shop", "h1"), fixtures::host_name("h1"));
        db.change(|tx| tx.put_vm(vm.clone())).await;
        // What the counters of the host and of the VM say at a time, in minutes.
        let look = async |minute: i64, (busy, used, waited): (f64, f64, f64)| {
            let sample_time = Timestamp::from_second(minute * 60).unwrap();
            let mut seen = fixtures::observation(&vm);
            seen.usage = Some(VmUsage {
                cpu_seconds_total: used,
                cpu_wait_seconds_total: waited,
                sample_time,
                ..VmUsage::default()
            });
            let mut live = fixtures::live(sample_time);
            live.usage = Some(host::Usage {
                sample_time,
                cpu: CpuTimes {
                    user: busy,
                    ..CpuTimes::default()
                },
                ..host::Usage::default()
            });
            db.change(|tx| {
                tx.observe(vm.id, Some(seen));
                tx.set_live(host.clone(), live);
            })
            .await;
            usage.sample(&db.snapshot());
        };
        let lately = || {
            let lately = usage.lately(&db.snapshot()).get(&host).copied()?;
            let hundredths = |cpus: f64| (cpus * 100.0).round() / 100.0;
            Some((hundredths(lately.cpus_busy), hundredths(lately.cpus_stolen)))
        };
        look(0, (7000.0, 0.0, 50.0)).await;
        assert_eq!(lately(), None, "nothing to measure from");
        // Two processors are busy, one and a half of them with the VM, which waits for half of one.
        for _ in 0..2 {
            look(5, (7600.0, 450.0, 200.0)).await;
            assert_eq!(lately(), Some((2.0, 0.5)), "the second time the host is silent");
        }
        for number in 2..=11_u32 {
            let counted = f64::from(number);
            let counters = (7000.0 + 600.0 * counted, 450.0 * counted, 50.0 + 150.0 * counted);
            look(i64::from(number) * 5, counters).await;
        }
        // Of twelve one is no hour: four more are busy with the VM, which waits for none.
        look(60, (15_400.0, 6600.0, 1700.0)).await;
        assert_eq!(lately(), Some((3.8, 0.0)));
        look(65, (100.0, 10.0, 0.0)).await;
        assert_eq!(
            lately(),
            Some((3.8, 0.0)),
            "host and VM began anew, and say nothing"
        );
        let moved = VmRecord {
            owner: fixtures::host_name("h2"),
            ..vm.clone()
        };
        db.change(|tx| tx.put_vm(moved)).await;
        assert_eq!(lately(), Some((0.5, 0.0)), "the VM took its hour along");
    }
}
