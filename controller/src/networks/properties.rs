//! Histories of VMs that come, move and go, and of groups that change: no address is given twice, what hosts must know is what
//! follows from the records, and no change of it escapes the versions.

use std::collections::{BTreeMap, BTreeSet};

use dalgu_proto::{agent::v1::HostNetworks, ids::GroupName};
use proptest::{collection::vec, prelude::*};

use super::{
    plan::{document, version},
    resolve,
};
use crate::{
    agent_wire,
    fixtures::{self, host_name},
    model::{MigrationRecord, Phase, VmRecord},
    state::{Db, Hooks, State, from_image},
    store::{Store as _, memory::Disk},
};

const HOSTS: usize = 4;
const VMS: usize = 16;
const NETWORKS: [&str; 3] = ["field", "office", "small"];
const GROUPS: [&str; 3] = ["a", "b", "c"];

#[derive(Debug, Clone)]
enum Event {
    /// A VM is made on a host, with interfaces in these networks and these groups.
    Create(usize, usize, Vec<usize>, Vec<usize>),
    /// It goes.
    Delete(usize),
    /// It begins to move to a host.
    Migrate(usize, usize),
    /// It has arrived there, or has not; then its migration ends.
    End(usize, bool),
    /// The rules of a group name these.
    Rules(usize, Vec<usize>),
    /// Something is changed of it that is nothing to hosts.
    Describe(usize),
}

fn event() -> impl Strategy<Value = Event> {
    let vm = || 0..VMS;
    let host = || 0..HOSTS;
    let groups = || vec(0..GROUPS.len(), 0..3);
    prop_oneof![
        6 => (vm(), host(), vec(0..NETWORKS.len(), 0..3), groups())
            .prop_map(|(vm, host, networks, groups)| Event::Create(vm, host, networks, groups)),
        2 => vm().prop_map(Event::Delete),
        4 => (vm(), host()).prop_map(|(vm, host)| Event::Migrate(vm, host)),
        4 => (vm(), any::<bool>()).prop_map(|(vm, arrived)| Event::End(vm, arrived)),
        2 => (0..GROUPS.len(), groups()).prop_map(|(group, named)| Event::Rules(group, named)),
        1 => vm().prop_map(Event::Describe),
    ]
}

fn name(index: usize) -> String {
    format!("h{index}")
}

fn chosen(names: &[&'static str], indices: &[usize]) -> Vec<&'static str> {
    indices.iter().map(|index| names[*index]).collect()
}

fn find(state: &State, vm: usize) -> Option<VmRecord> {
    let name = format!("vm{vm}").parse().unwrap();
    state.vm_by_name(&name).map(|vm| (**vm).clone())
}

async fn site(disk: &Disk) -> Db {
    let db = Db::open(disk.open(), fixtures::cluster_id(), Hooks::default()).unwrap();
    db.change(|tx| {
        for host in 0..HOSTS {
            fixtures::networked(tx, &name(host), &format!("192.0.2.{}", host + 1), "run");
        }
        tx.put_network(fixtures::overlay("field", 7));
        // Its 12 addresses of IPv4 are soon all given.
        tx.put_network(fixtures::overlay("small", 8));
        tx.put_network(fixtures::bridged("office", "br0", 0));
        for group in GROUPS {
            tx.put_group(fixtures::group(group, &[]));
        }
    })
    .await;
    db
}

async fn happen(db: &Db, event: Event) {
    db.change(|tx| match event {
        Event::Create(vm, host, networks, groups) => {
            if find(tx, vm).is_some() {
                return;
            }
            let mut record = fixtures::vm(&format!("vm{vm}"), &name(host));
            let nics = chosen(&NETWORKS, &networks).into_iter().zip(0..);
            let groups = chosen(&GROUPS, &groups);
            record.spec.nics = nics
                .map(|(network, n)| fixtures::nic(&format!("eth{n}"), network, &groups))
                .collect();
            record.spec.fill_in(record.id);
            match resolve::ports(tx, &mut record.spec, None) {
                Ok(()) => tx.put_vm(record),
                Err(resolve::Error::NoAddress { .. }) => {}
                Err(other) => panic!("{other}"),
            }
        }
        Event::Delete(vm) => {
            if let Some(record) = find(tx, vm).filter(|vm| tx.active_migration(vm.id).is_none()) {
                tx.delete_vm(record.id);
            }
        }
        Event::Migrate(vm, host) => {
            let moving =
                |vm: &VmRecord| tx.active_migration(vm.id).is_none() && vm.owner != host_name(&name(host));
            if let Some(record) = find(tx, vm).filter(moving) {
                tx.put_migration(fixtures::migration(&record, &name(host)));
            }
        }
        Event::End(vm, arrived) => {
            let Some(record) = find(tx, vm) else { return };
            let Some(migration) = tx.active_migration(record.id).cloned() else {
                return;
            };
            let phase = if arrived { Phase::Done } else { Phase::Failed };
            if arrived {
                tx.put_vm(VmRecord {
                    owner: migration.destination.clone(),
                    ..record
                });
            }
            tx.put_migration(MigrationRecord {
                phase,
                ..(*migration).clone()
            });
        }
        Event::Rules(group, named) => {
            let mut record = (*tx.groups[&GROUPS[group].parse::<GroupName>().unwrap()]).clone();
            record.group = fixtures::group(GROUPS[group], &chosen(&GROUPS, &named)).group;
            tx.put_group(record);
        }
        Event::Describe(vm) => {
            if let Some(record) = find(tx, vm) {
                tx.put_vm(VmRecord {
                    description: format!("{}.", record.description),
                    ..record
                });
            }
        }
    })
    .await;
}

/// Addresses that VMs have, straight from their records: each once in a network, and none that is the network's own.
fn check_addresses(state: &State) {
    let mut seen = BTreeSet::new();
    let mut given = BTreeMap::<_, BTreeSet<_>>::new();
    for vm in state.vms.values() {
        for port in vm.spec.nics.iter().filter_map(|nic| nic.port()) {
            for address in port.addresses() {
                assert!(
                    seen.insert((port.network.clone(), address)),
                    "{address} is given twice in {}",
                    port.network
                );
                let network = &state.networks[&port.network].network;
                assert!(network.subnets().any(|subnet| subnet.offers(address)));
                given.entry(port.network.clone()).or_default().insert(address);
            }
        }
    }
    for (network, members) in &state.members {
        let indexed: BTreeSet<_> = members.addresses.keys().copied().collect();
        assert_eq!(Some(&indexed), given.get(network), "{network}");
    }
}

/// What a host is told but for its version.
fn content(state: &State, host: usize) -> HostNetworks {
    HostNetworks {
        version: 0,
        ..agent_wire::network::document(document(state, &host_name(&name(host))))
    }
}

/// The indices without the revisions in them.
fn indices(state: &State) -> impl PartialEq + std::fmt::Debug {
    let members = state.members.iter().map(|(network, members)| {
        let hosts = members
            .hosts
            .iter()
            .map(|(host, place)| (host.clone(), place.interfaces));
        let interfaces = (members.interfaces.clone(), members.addresses.clone());
        (network.clone(), interfaces, hosts.collect::<Vec<_>>())
    });
    let places = state
        .places
        .iter()
        .filter(|(_, place)| !place.networks.is_empty());
    let places = places.map(|(host, place)| (host.clone(), place.networks.clone()));
    (
        members.collect::<Vec<_>>(),
        places.collect::<Vec<_>>(),
        state.group_uses.clone(),
    )
}

async fn history(events: Vec<Event>) {
    let disk = Disk::default();
    let db = site(&disk).await;
    let mut before: Vec<_> = (0..HOSTS)
        .map(|host| (0, content(&db.snapshot(), host)))
        .collect();
    for event in events {
        happen(&db, event.clone()).await;
        let state = db.snapshot();
        check_addresses(&state);
        let read = from_image(&disk.open().load().unwrap(), fixtures::cluster_id()).unwrap();
        assert_eq!(indices(&state), indices(&read), "after {event:?}");
        for (host, (old, told)) in before.iter_mut().enumerate() {
            let (new, now) = (version(&state, &host_name(&name(host))), content(&state, host));
            assert!(new >= *old, "a version fell after {event:?}");
            assert!(
                new > *old || now == *told,
                "{event:?} changed what h{host} must know, and not its version"
            );
            assert_eq!(now, content(&read, host), "it follows from the records alone");
            (*old, *told) = (new, now);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_address_is_given_twice_and_no_change_escapes_the_versions(events in vec(event(), 0..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(history(events));
    }
}
