//! What VMs have used of the processors, for the planner. In memory only, a few numbers for each VM: after a start it is learnt anew, and until
//! then a VM counts as fully busy.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use dalgu_proto::ids::VmId;
use jiff::Timestamp;

use crate::{planner::Samples, state::State};

/// Time between two samples.
pub const SAMPLE: Duration = Duration::from_secs(300);

/// The samples of one VM, and what the next is measured from.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    samples: Samples,
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
                known.samples.push(used.clamp(0.0, 4096.0) as f32);
            }
        }
    }

    /// The samples of a VM; none where nothing is known.
    pub fn samples(&self, vm: VmId) -> Samples {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(&vm).map(|known| known.samples).unwrap_or_default()
    }
}
