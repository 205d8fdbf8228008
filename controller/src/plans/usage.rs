//! What VMs have used of the processors, for the planner. In memory only, a few numbers for each VM: after a start it is learnt anew, and until
//! then a VM counts as fully busy.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use dalgu_proto::ids::{HostName, VmId};
use jiff::Timestamp;

use crate::{
    planner::{
        Samples,
        peak::{HOURS, Peaks, Week, add},
    },
    state::State,
};

/// Time between two samples.
pub const SAMPLE: Duration = Duration::from_secs(300);

/// The samples of one VM, and what the next is measured from.
#[derive(Debug, Clone, Default)]
struct Known {
    samples: Samples,
    peaks: Peaks,
    /// Processor time and when it was read, by its host.
    last: Option<(f64, Timestamp)>,
}

/// A handle to what is known of all VMs.
#[derive(Debug, Clone, Default)]
pub struct Usage(Arc<Mutex<BTreeMap<VmId, Known>>>);

impl Usage {
    /// Takes a sample of every VM; those that are gone are forgotten. Between two samples on the same host it is the mean over the time between them,
    /// else what the host says of the last seconds.
    pub fn sample(&self, state: &State) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|vm, _| state.vms.contains_key(vm));
        for vm in state.vms.values() {
            let Some(usage) = state.observation(vm).and_then(|seen| seen.usage.as_ref()) else {
                continue;
            };
            let known = all.entry(vm.id).or_default();
            let now = (usage.cpu_seconds_total, usage.sample_time);
            let used = match known.last {
                // The counter begins anew on another host, and after a restart.
                Some((before, at)) if now.0 >= before && now.1 > at => {
                    Some((now.0 - before) / now.1.duration_since(at).as_secs_f64())
                }
                // Nothing new: the host is silent.
                Some((_, at)) if at == now.1 => None,
                _ => usage.rates_valid.then_some(usage.cpus_busy),
            };
            known.last = Some(now);
            if let Some(used) = used {
                #[expect(clippy::cast_possible_truncation, reason = "a few processors")]
                let used = used.clamp(0.0, 4096.0) as f32;
                known.samples.push(used);
                known.peaks.push(hour(now.1), used);
            }
        }
    }

    /// Processors that the VMs of each host are expected to use together in their fullest hour of a week, by what was seen of them.
    pub fn expected(&self, state: &State) -> BTreeMap<HostName, f64> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut hosts = BTreeMap::<&HostName, Week>::new();
        for vm in state.vms.values() {
            if let Some(known) = all.get(&vm.id).filter(|known| !known.samples.is_empty()) {
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

    /// Processors that all VMs are expected to use together at most in this hour of the week or in the next, by what was seen of them.
    pub fn within_the_hour(&self, state: &State, now: Timestamp) -> f64 {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sum = [0.0; 2];
        for known in state
            .vms
            .keys()
            .filter_map(|vm| all.get(vm))
            .filter(|known| !known.samples.is_empty())
        {
            let week = known.peaks.seen();
            for (sum, hour) in sum.iter_mut().zip(hour(now)..) {
                *sum += usize::try_from(hour % HOURS as u64).map_or(0.0, |hour| week[hour]);
            }
        }
        sum[0].max(sum[1])
    }

    /// The samples of a VM; none where nothing is known.
    pub fn samples(&self, vm: VmId) -> Samples {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(&vm).map(|known| known.samples).unwrap_or_default()
    }
}

/// The number of an hour since 1970.
fn hour(at: Timestamp) -> u64 {
    u64::try_from(at.as_second() / 3600).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use dalgu_proto::host::VmUsage;

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
}
