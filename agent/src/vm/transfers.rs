//! The migrations of one VM that its task remembers, and the transfer under way, if there is one.

use std::collections::BTreeMap;

use dalgu_proto::{
    ids::MigrationId,
    mutant::{self, Mutant},
    vm::PowerReason,
};
use futures::future::BoxFuture;
use jiff::Timestamp;
use tokio::{sync::watch, time::Instant};

use super::{
    driver::REMEMBER,
    status::{self, Arrival, Presence},
};
use crate::{
    hypervisor::{self, Domain, DomainState, Progress},
    ledger::{self, Disposition, Ledger},
    migration::transport::Word,
};

/// How a transfer ended.
pub(super) struct Ended {
    pub(super) migration: MigrationId,
    pub(super) outcome: Result<Progress, hypervisor::Error>,
}

/// The migrations of one VM.
pub(super) struct Transfers {
    pub(super) entries: BTreeMap<MigrationId, ledger::Migration>,
    pub(super) latest: Option<MigrationId>,
    pub(super) running: Option<BoxFuture<'static, Ended>>,
    pub(super) progress: watch::Sender<Progress>,
    pub(super) handed_over: Option<Word>,
    /// When the VM that comes first speaks here, once its interfaces are there.
    pub(super) first_word: Option<BoxFuture<'static, Instant>>,
    pub(super) settled_at: Option<Instant>,
    pub(super) arrival: Option<(MigrationId, Arrival)>,
}

impl Transfers {
    pub(super) fn new(entries: Vec<ledger::Migration>) -> Self {
        let latest = entries
            .iter()
            .find(|entry| entry.finished.is_none())
            .or_else(|| entries.first())
            .map(|entry| entry.id);
        Self {
            entries: entries.into_iter().map(|entry| (entry.id, entry)).collect(),
            latest,
            running: None,
            progress: watch::Sender::new(Progress::default()),
            handed_over: None,
            first_word: None,
            settled_at: None,
            arrival: None,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns when the transfer under way has ended; never when there is none. Cancel safe: the transfer stays.
    pub(super) async fn ended(&mut self) -> Ended {
        match &mut self.running {
            Some(running) => {
                let ended = running.await;
                self.running = None;
                ended
            }
            None => std::future::pending().await,
        }
    }

    /// Returns when the source has said that the VM is gone from it; never when no such word is awaited. Cancel safe.
    pub(super) fn handed_over(&self) -> impl Future<Output = ()> + use<> {
        let word = self.handed_over.clone();
        async move {
            match word {
                Some(word) => word.heard().await,
                None => std::future::pending().await,
            }
        }
    }

    /// How far the transfer under way is.
    pub(super) fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// The migration that the VM takes part in, or the latest one, for others.
    pub(super) fn describe(
        &self,
        vm: Option<&ledger::Vm>,
        domain: Option<&Domain>,
        seen: bool,
    ) -> Option<status::Migration> {
        let present = vm.and_then(|vm| vm.disposition.migration());
        // An earlier one may be unfinished for ever: a restored controller does not know of it.
        let entry = self.entries.get(&present.or(self.latest)?)?;
        let presence = match domain {
            _ if !seen => Presence::Unknown,
            Some(domain) if handed_over(entry, domain) => Presence::Is(DomainState::HandedOver),
            Some(domain) => Presence::Is(domain.state),
            None => Presence::Absent,
        };
        let owner = vm.is_some_and(|vm| vm.disposition == Disposition::Owned && vm.intent.is_some());
        Some(status::Migration {
            id: entry.id,
            role: entry.role,
            transfer: entry.transfer.clone(),
            settled: entry.settled && self.running.is_none(),
            finished: entry.finished.is_some(),
            owner,
            presence,
            progress: *self.progress.borrow(),
            arrival: self
                .arrival
                .and_then(|(id, arrival)| (id == entry.id).then_some(arrival)),
        })
    }

    /// Forgets migrations that were finished long ago.
    pub(super) async fn forget_old(&mut self, ledger: &Ledger, now: Timestamp) {
        let old: Vec<_> = self
            .entries
            .values()
            .filter(|entry| {
                let old = |at| now.duration_since(at) > REMEMBER || mutant::on(Mutant::GoneForgotten);
                entry.finished.is_some_and(old)
            })
            .map(|entry| entry.id)
            .collect();
        for id in old {
            if ledger.remove_migration(id).await.is_ok() {
                self.entries.remove(&id);
            }
        }
    }

    /// Writes down how a transfer ended. It has ended also where that cannot be written, and whoever asks must hear it, or
    /// would wait for ever. On disk it is Active then, which is read as failed after a restart; both hosts are looked at
    /// anyway.
    pub(super) async fn write_if_possible(&mut self, ledger: &Ledger, entry: ledger::Migration) {
        if let Err(error) = self.write(ledger, entry.clone()).await {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "the ledger cannot be written"
            );
            self.latest = Some(entry.id);
            self.entries.insert(entry.id, entry);
        }
    }

    pub(super) async fn write(
        &mut self,
        ledger: &Ledger,
        entry: ledger::Migration,
    ) -> Result<(), ledger::Error> {
        ledger.save_migration(&entry).await?;
        self.latest = Some(entry.id);
        self.entries.insert(entry.id, entry);
        Ok(())
    }
}

/// Whether a domain is off because it has handed over to the destination: one that went on, for want of the destination's answer, and ended
/// later has newer disks than what arrived.
fn handed_over(entry: &ledger::Migration, domain: &Domain) -> bool {
    domain.state == DomainState::Stopped
        && entry.role == Some(ledger::Role::Source)
        && (domain.reason == PowerReason::Migrated || entry.transfer == ledger::Transfer::Completed)
}
