//! What a VM's task says of the VM: the [`Status`] made from its ledger entry, what was seen and what is under way.
//!
//! Called by the task after everything it does. Changes nothing but the status, and looks at nothing anew.

use dalgu_proto::ids::Generation;

use super::{
    driver::Driver,
    plan::{self, Step},
    status::{Asked, Phase, SnapshotSeen, Status},
};
use crate::ledger::{self, Disposition};

impl Driver {
    /// Publishes what is known, if it has changed.
    pub(super) fn publish(&mut self) {
        let next = self.describe();
        let changed = self.status.send_if_modified(|status| {
            let changed = !status.same_content(&next);
            let generation = status.status_generation + u64::from(changed);
            *status = Status {
                status_generation: generation,
                ..next
            };
            changed
        });
        if changed {
            self.shared.changes.send_modify(|count| *count += 1);
        }
    }

    fn describe(&mut self) -> Status {
        let memory = self.memory();
        let mut status = Status::unknown(self.id);
        let (vm, domain) = (self.vm.as_ref(), self.domain.as_ref());
        status.migration = self.transfers.describe(vm, domain, self.seen.is_some());
        let Some(vm) = &self.vm else { return status };
        status.name = vm.name.to_string();
        status.accepted_generation = vm
            .intent
            .as_ref()
            .map_or(Generation(0), |intent| intent.generation);
        status.epoch = vm.epoch;
        status.asked = vm.intent.as_ref().map(Asked::from);
        let spec = vm.intent.as_ref().map(|intent| &intent.spec);
        status.changed_spec = spec.filter(|_| vm.changes.ever).cloned();
        status.places = vm.places().to_vec();
        status.devices = vm.devices().to_vec();
        let told = vm.intent.as_ref().and_then(|intent| intent.snapshots.clone());
        status.snapshots_told = told;
        status.snapshots = self.snapshots_seen(vm);
        status.adopted = self.adopted;
        if let Some(domain) = &self.domain {
            status.size = (domain.vcpus, domain.memory_mib);
        }
        status.observed_at = self.seen;
        status.failure = self.stuck.as_ref().map(|stuck| stuck.failure.clone());
        if let (Some(domain), Some(hardware)) = (&self.domain, &self.hardware) {
            status.pending = plan::changes::pending(vm, hardware, domain, &memory.failed_moves);
        }
        let settled = self.seen.is_some()
            && self.stuck.is_none()
            && self.work.is_none()
            && plan::next(vm, self.domain.as_ref(), &memory) == Step::Settled;
        status.phase = match vm.disposition {
            Disposition::Gone { .. } => Phase::Gone,
            // Adopted, and nobody has said what it should be: when its domain has been removed by hand, nothing is here.
            Disposition::Owned if vm.intent.is_none() && self.seen.is_some() && self.domain.is_none() => {
                Phase::Gone
            }
            Disposition::Deleting => Phase::Deleting,
            Disposition::Incoming { .. } => Phase::Incoming,
            Disposition::Outgoing { .. } => Phase::Outgoing,
            Disposition::Owned if settled => Phase::Settled,
            Disposition::Owned if self.stuck.as_ref().is_some_and(|stuck| !stuck.failure.retrying) => {
                Phase::Failed
            }
            // A mere look does not make a VM busy again.
            Disposition::Owned
                if self.status.borrow().phase == Phase::Settled
                    && self.status.borrow().accepted_generation == status.accepted_generation
                    && self.only_looking() =>
            {
                Phase::Settled
            }
            Disposition::Owned => Phase::Applying,
        };
        if status.phase == Phase::Settled {
            status.observed_generation = status.accepted_generation;
        } else {
            status.observed_generation = self
                .status
                .borrow()
                .observed_generation
                .min(status.accepted_generation);
        }
        // Before the first look it is as it was left: whoever is told of no power state takes it for off.
        let as_left = !self.looked && vm.boot_id == self.shared.boot_id;
        // While a migration has it there is none here: it has been handed over, or has not come.
        let here = self
            .domain
            .as_ref()
            .map_or(as_left, |domain| domain.state.power().is_some());
        if here && let Some((power, reason)) = vm.last_seen {
            status.power = Some(power);
            status.reason = reason;
        }
        status
    }

    fn snapshots_seen(&self, vm: &ledger::Vm) -> Vec<SnapshotSeen> {
        let size = |number: u32| {
            let layer = self.layers.as_ref().and_then(|layers| layers.there.get(&number));
            layer.map_or(0, |layer| layer.written_bytes)
        };
        let there = vm.snapshots.there.iter();
        there
            .map(|taken| SnapshotSeen {
                number: taken.number,
                quiesced: taken.quiesced,
                written_bytes: size(taken.number),
            })
            .collect()
    }

    fn only_looking(&self) -> bool {
        self.stuck.is_none() && self.work.is_some()
    }

    /// Whether a step, or even a look, is under way.
    pub(super) fn busy(&self) -> bool {
        self.stuck.is_some() || !matches!(self.status.borrow().phase, Phase::Settled)
    }
}
