//! Where on their hosts VMs are that ask for it: given once, kept with the VM, given back with it, and chosen anew where it goes.

use dalgu_proto::{
    host::{GuestFeature, HugePages, NumaNode},
    ids::HostName,
    vm::{CpuPolicy, Fitting, NumaPlace, NumaPolicy, PageSize, Spec},
};

use super::{Error, create, migrate, plan, update};
use crate::{
    fixtures::{self, host_name},
    model::{MigrationRecord, Outcome, Phase, VmRecord},
    placement::Policy,
    plans::usage::Usage,
    state::{Db, Hooks},
    store::memory::Disk,
};

/// A host of two nodes with four processors and 8 GiB each, of which 2 GiB are in huge pages.
fn host(name: &str) -> crate::model::HostRecord {
    let mut host = fixtures::host(name);
    let node = |id: u32| NumaNode {
        id,
        cpus: (id * 4..id * 4 + 4).collect(),
        memory_bytes: 8 << 30,
        huge_pages: vec![HugePages {
            page_size_bytes: 2 << 20,
            total: 1024,
            free: 1024,
        }],
        ..NumaNode::default()
    };
    host.inventory.cpus = 8;
    host.inventory.memory_bytes = 16 << 30;
    host.inventory.numa_nodes = vec![node(0), node(1)];
    host.inventory.huge_pages = vec![HugePages {
        page_size_bytes: 2 << 20,
        total: 2048,
        free: 2048,
    }];
    host.inventory.guest_features.push(GuestFeature::Numa);
    host
}

async fn site(disk: &Disk) -> Db {
    let db = open(disk);
    db.change(|tx| {
        for name in ["h1", "h2"] {
            tx.put_host(host(name));
            tx.set_live(host_name(name), fixtures::live(tx.now()));
        }
    })
    .await;
    db
}

fn open(disk: &Disk) -> Db {
    Db::open(disk.open(), fixtures::cluster_id(), Hooks::default()).unwrap()
}

const DEDICATED: Fitting = Fitting {
    cpus: CpuPolicy::Dedicated,
    pages: Some(PageSize::Mib2),
    numa: NumaPolicy::None,
};

async fn make(db: &Db, name: &str, vcpus: u32, fitting: Fitting, on: &str) -> Result<VmRecord, Error> {
    let new = create::Create {
        ignore_protection: false,
        name: name.parse().unwrap(),
        spec: Spec {
            vcpus,
            memory_mib: 512,
            fitting,
            ..fixtures::spec()
        },
        firmware_given: true,
        documents: Default::default(),
        labels: Default::default(),
        description: String::new(),
        drain_mode: Default::default(),
        placement_groups: Default::default(),
        tolerations: Default::default(),
        stopped: false,
        host: Some(host_name(on)),
        policy: Policy::SPREAD,
    };
    db.transact(|tx| create::create(tx, &fixtures::caller(), new))
        .await?;
    Ok(vm(db, name))
}

fn vm(db: &Db, name: &str) -> VmRecord {
    (**db.snapshot().vm_by_name(&name.parse().unwrap()).unwrap()).clone()
}

fn at(node: u32, cpus: &[u32]) -> Vec<NumaPlace> {
    vec![NumaPlace {
        node,
        cpus: cpus.to_vec(),
    }]
}

fn taken(db: &Db, host: &str) -> (Vec<u32>, u64) {
    let state = db.snapshot();
    let held = state.reserved.get(&host_name(host)).cloned().unwrap_or_default();
    let pages = [0, 1].map(|node| held.taken.pages_mib(node, PageSize::Mib2));
    (held.taken.cpus().collect(), pages.iter().sum())
}

#[tokio::test]
async fn processors_are_given_once_and_remembered_over_a_restart() {
    let disk = Disk::default();
    let db = site(&disk).await;
    let first = make(&db, "a", 2, DEDICATED, "h1").await.unwrap();
    let second = make(&db, "b", 2, DEDICATED, "h1").await.unwrap();
    let h1: HostName = host_name("h1");
    assert_eq!(first.places(&h1), at(0, &[0, 1]));
    assert_eq!(second.places(&h1), at(0, &[2, 3]));
    assert_eq!(taken(&db, "h1"), (vec![0, 1, 2, 3], 1024));
    drop(db);

    let db = open(&disk);
    db.change(|tx| {
        for name in ["h1", "h2"] {
            tx.set_live(host_name(name), fixtures::live(tx.now()));
        }
    })
    .await;
    assert_eq!(taken(&db, "h1"), (vec![0, 1, 2, 3], 1024));
    let third = make(&db, "c", 3, DEDICATED, "h1").await.unwrap();
    assert_eq!(third.places(&h1), at(1, &[4, 5, 6]));
    // One processor stays with the host.
    let refused = make(&db, "d", 1, DEDICATED, "h1").await;
    let Err(Error::NoCapacity { decision, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert!(
        decision.summary.contains("processors of its own"),
        "{}",
        decision.summary
    );
    // What has gone gives its processors back.
    db.change(|tx| tx.delete_vm(second.id)).await;
    assert_eq!(taken(&db, "h1"), (vec![0, 1, 4, 5, 6], 1024));
    assert_eq!(
        make(&db, "d", 2, DEDICATED, "h1").await.unwrap().places(&h1),
        at(0, &[2, 3])
    );
}

#[tokio::test]
async fn where_a_vm_goes_it_has_others_and_keeps_its_own_until_it_has_gone() {
    let db = site(&Disk::default()).await;
    let (h1, h2) = (host_name("h1"), host_name("h2"));
    make(&db, "there", 3, DEDICATED, "h2").await.unwrap();
    let moving = make(&db, "moves", 2, DEDICATED, "h1").await.unwrap();
    db.change(|tx| tx.observe(moving.id, Some(fixtures::observation(&moving))))
        .await;
    let ask = migrate::Migrate {
        ignore_protection: false,
        destination: Some(h2.clone()),
        max_downtime_ms: 100,
        bandwidth_mib_per_second: 0,
        policy: Policy::SPREAD,
    };
    db.transact(|tx| migrate::migrate(tx, &fixtures::caller(), "moves", "", ask))
        .await
        .unwrap();
    let now = vm(&db, "moves");
    // Its old host's, and of the new one those that are free: three of a node are another's.
    assert_eq!(
        (now.places(&h1), now.places(&h2)),
        (&*at(0, &[0, 1]), &*at(1, &[4, 5]))
    );
    assert_eq!(taken(&db, "h1").0, [0, 1]);
    assert_eq!(taken(&db, "h2"), (vec![0, 1, 2, 4, 5], 1024));
    // Each side is told its own.
    let told = |host: &HostName| crate::agent_wire::places(&now, host)[0].cpus.clone();
    assert_eq!((told(&h1), told(&h2)), (vec![0, 1], vec![4, 5]));
    db.change(|tx| {
        let migration = (**tx.active_migration(now.id).unwrap()).clone();
        tx.put_vm(VmRecord {
            owner: host_name("h2"),
            ..now.clone()
        });
        tx.put_migration(MigrationRecord {
            phase: Phase::Done,
            ..migration
        });
    })
    .await;
    assert_eq!(
        (taken(&db, "h1"), taken(&db, "h2").0),
        ((vec![], 0), vec![0, 1, 2, 4, 5])
    );
}

#[tokio::test]
async fn one_that_was_fitted_cannot_change_its_size() {
    let db = site(&Disk::default()).await;
    make(&db, "web", 2, DEDICATED, "h1").await.unwrap();
    let wider = update::Update {
        vcpus: Some(3),
        ..update::Update::default()
    };
    let caller = fixtures::caller();
    let refused = db
        .transact(|tx| update::update(tx, &caller, "web", "", wider))
        .await;
    assert!(matches!(refused, Err(Error::SizeFixed(_))), "{refused:?}");
}

#[tokio::test]
async fn memory_that_is_set_aside_for_huge_pages_is_no_ordinary_memory() {
    let db = site(&Disk::default()).await;
    let state = db.snapshot();
    let view = crate::hosts::view(&state, &state.hosts[&host_name("h1")]);
    assert_eq!(view.memory_mib_capacity(), 16_384 - 4096 - 512);
    let old = GuestFeature::Numa;
    // An agent of before is not given such VMs.
    db.change(|tx| {
        let mut host = host("h1");
        host.inventory.guest_features.retain(|feature| *feature != old);
        tx.put_host(host);
    })
    .await;
    let refused = make(&db, "web", 1, DEDICATED, "h1").await;
    let Err(Error::NoCapacity { decision, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert!(
        decision.summary.contains("update its agent"),
        "{}",
        decision.summary
    );
}

#[tokio::test]
async fn a_plan_moves_what_has_processors_of_its_own_to_hosts_that_have_them_one_to_each() {
    let evacuated = async |hosts: &[&str]| {
        let db = site(&Disk::default()).await;
        db.change(|tx| {
            for name in hosts {
                tx.put_host(host(name));
                tx.set_live(host_name(name), fixtures::live(tx.now()));
            }
        })
        .await;
        // Of the processors of h2 one is left beside that which is the host's own.
        make(&db, "there", 3, DEDICATED, "h2").await.unwrap();
        make(&db, "too", 3, DEDICATED, "h2").await.unwrap();
        for name in ["a", "b"] {
            let vm = make(&db, name, 2, DEDICATED, "h1").await.unwrap();
            db.change(|tx| tx.observe(vm.id, Some(fixtures::observation(&vm))))
                .await;
        }
        let ask = plan::Create {
            aim: plan::Aim::Evacuate(vec![host_name("h1")]),
            moves: 10,
            copied_mib: u64::MAX,
        };
        let state = db.snapshot();
        let draft = plan::Draft::of(&state, &Usage::default(), db.now(), &ask).unwrap();
        let made = db.transact(|tx| plan::create(tx, &fixtures::caller(), &ask, draft));
        let Outcome::Plan(id) = made.await.unwrap() else {
            panic!("no plan")
        };
        let steps = plan::find(&db.snapshot(), id).unwrap().steps;
        let to = steps
            .iter()
            .map(|step| (step.name.to_string(), step.destination.to_string()));
        to.collect::<std::collections::BTreeMap<_, _>>()
    };
    assert!(evacuated(&[]).await.is_empty(), "h2 has none left");
    let one = evacuated(&["h3"]).await;
    assert_eq!(one.len(), 1, "{one:?}");
    let two = evacuated(&["h3", "h4"]).await;
    let mut hosts: Vec<_> = two.into_values().collect();
    hosts.sort_unstable();
    assert_eq!(hosts, ["h3", "h4"]);
}
