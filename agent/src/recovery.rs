//! What is true on this host, found out at start: from the ledger and from the hypervisor, before anything is reported
//! or obeyed.
//!
//! A VM in the ledger gets its task back. One whose entry cannot be read (a newer version wrote it, or the disk is bad) is
//! held: it is reported, and nothing is done to it. A domain that bears the site's mark and is not in the ledger (the
//! state directory was lost) is adopted as it is: it is reported, and nothing is done to it until the controller has
//! said what it should be. Every other domain is somebody else's.

use std::{collections::BTreeMap, time::Duration};

use dalgu_proto::ids::VmId;

use crate::{
    hypervisor::{Connection, Domain},
    ledger::{Contents, Disposition},
    vm::{Known, Vms},
};

/// The hypervisor is asked again after this time while it does not answer.
const RETRY: Duration = Duration::from_secs(1);

/// Starts a task for each VM of this host. Returns when the hypervisor has been asked with success.
pub async fn recover(vms: &Vms, contents: Contents) {
    let domains = ask(vms).await;
    for damaged in &contents.damaged {
        let error = &damaged.error as &dyn std::error::Error;
        match damaged.vm {
            Some(vm) => {
                tracing::error!(%vm, error, "a ledger entry cannot be read; nothing is done to its VM");
                vms.hold(vm, &damaged.error);
            }
            None => tracing::error!(
                error,
                "a ledger entry cannot be read, and nobody knows of which VM it is"
            ),
        }
    }
    let mut known = sort(contents, domains);
    // Those that are held have their tasks.
    known.retain(|id, _| vms.get(*id).is_none());
    let (owned, adopted) = (
        known.values().filter(|k| k.vm.is_some()).count(),
        known.values().filter(|k| k.adopted.is_some()).count(),
    );
    for (id, known) in known {
        if known.adopted.is_some() {
            tracing::warn!(vm = %id, "a domain with Dalgu's mark is not in the ledger; adopted as it is");
        }
        vms.start(id, known);
    }
    tracing::info!(owned, adopted, "recovered");
}

async fn ask(vms: &Vms) -> Vec<Domain> {
    let mut connection = vms.hypervisor().connection();
    loop {
        // It fails only when the hypervisor's own task has ended; then asking says so.
        let _ = connection
            .wait_for(|connection| *connection == Connection::Up)
            .await;
        match vms.hypervisor().list().await {
            Ok(domains) => return domains,
            Err(error) => {
                tracing::warn!(%error, "the hypervisor cannot be asked yet");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

fn sort(contents: Contents, domains: Vec<Domain>) -> BTreeMap<VmId, Known> {
    let mut known: BTreeMap<VmId, Known> = BTreeMap::new();
    for vm in contents.vms {
        let id = vm.id;
        known.entry(id).or_default().vm = Some(vm);
    }
    for migration in contents.migrations {
        let id = migration.vm;
        known.entry(id).or_default().migrations.push(migration);
    }
    for domain in domains {
        let entry = known.entry(domain.id).or_default();
        let here = entry
            .vm
            .as_ref()
            .is_some_and(|vm| !matches!(vm.disposition, Disposition::Gone { .. }));
        if domain.mark.is_some() && !here {
            entry.adopted = Some(domain);
        }
    }
    known.retain(|_, known| known.vm.is_some() || known.adopted.is_some() || !known.migrations.is_empty());
    known
}

#[cfg(test)]
mod tests {
    use dalgu_proto::{
        ids::{ClusterId, Epoch, Generation},
        vm::PowerReason,
    };

    use super::*;
    use crate::{
        hypervisor::{DomainState, Mark},
        ledger::{self, Done, Host},
    };

    fn cluster(id: u128) -> ClusterId {
        ClusterId::from_uuid(uuid::Uuid::from_u128(id))
    }

    fn id(id: u128) -> VmId {
        VmId::from_uuid(uuid::Uuid::from_u128(id))
    }

    fn domain(vm: u128, ours: bool) -> Domain {
        let mark = ours.then(|| Mark {
            cluster: cluster(1),
            epoch: Epoch(3),
            generation: Generation(2),
        });
        let name = format!("vm{vm}");
        Domain {
            id: id(vm),
            name,
            mark,
            state: DomainState::Running,
            reason: PowerReason::Unknown,
            persistent: true,
            vcpus: 1,
            memory_mib: 64,
            resets: 0,
        }
    }

    fn entry(vm: u128, disposition: Disposition) -> ledger::Vm {
        ledger::Vm {
            id: id(vm),
            name: format!("vm{vm}").parse().unwrap(),
            intent: None,
            epoch: Epoch(1),
            generation: Generation(1),
            disposition,
            done: Done::default(),
            last_seen: None,
            boot_id: String::new(),
            images: Vec::new(),
            documents: Default::default(),
            changes: Default::default(),
            snapshots: Default::default(),
        }
    }

    #[test]
    fn only_domains_of_this_site_that_are_not_in_the_ledger_are_adopted() {
        let contents = Contents {
            host: Host {
                cluster: Some(cluster(1)),
                ..Host::default()
            },
            vms: vec![
                entry(1, Disposition::Owned),
                entry(
                    5,
                    Disposition::Gone {
                        since: jiff::Timestamp::UNIX_EPOCH,
                    },
                ),
            ],
            ..Contents::default()
        };
        let domains = vec![
            domain(1, true),
            domain(2, true),
            domain(4, false),
            domain(5, true),
        ];
        let known = sort(contents, domains);
        assert!(known[&id(1)].vm.is_some() && known[&id(1)].adopted.is_none());
        assert!(known[&id(2)].adopted.is_some());
        assert!(!known.contains_key(&id(4)), "nobody's VM");
        assert!(
            known[&id(5)].vm.is_some(),
            "what is gone is remembered, with what was found in spite of it"
        );
    }
}
