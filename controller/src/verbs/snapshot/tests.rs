//! When a VM goes back to a snapshot, and what a host can make of what it is told then.

use super::*;
use crate::{
    agent_wire::Reported,
    fixtures::{self, host_name},
    model::{OperationRecord, OperationState, SnapshotSeen},
    reconcile::apply::{self, Extent},
    state::{Db, Hooks},
    store::memory::Disk,
    verbs::power::{Power, power},
};

fn name() -> SnapshotName {
    "one".parse().unwrap()
}

async fn vm(db: &Db) -> VmRecord {
    (**db.snapshot().vm_by_name(&"web".parse().unwrap()).unwrap()).clone()
}

/// The host has carried out the present generation: the VM is as asked, and has these layers.
async fn carried_out(db: &Db, layers: &[u32]) {
    let vm = vm(db).await;
    let seen = |layer: &u32| SnapshotSeen {
        layer: *layer,
        quiesced: false,
        written_bytes: 0,
    };
    let mut observation = fixtures::observation(&vm);
    observation.status_generation = vm.intent.generation.0;
    observation.snapshots = layers.iter().map(seen).collect();
    let report: Reported = fixtures::reported(&vm, observation);
    db.change(|tx| apply::apply(tx, &host_name("h1"), vec![report], Extent::Partial))
        .await;
}

/// A host that makes snapshots, and a VM there that is off and has one.
async fn site() -> Db {
    let db = Db::open(Disk::default().open(), fixtures::cluster_id(), Hooks::default()).unwrap();
    let mut vm = fixtures::vm("web", "h1");
    vm.intent.power = PowerState::Stopped;
    vm.snapshots.last = 1;
    vm.snapshots.all = vec![SnapshotRecord {
        id: SnapshotId::from_uuid(uuid::Uuid::from_u128(1)),
        name: name(),
        layer: 1,
        labels: BTreeMap::new(),
        description: String::new(),
        create_time: jiff::Timestamp::UNIX_EPOCH,
        generation: vm.intent.generation,
        taken: true,
        quiesced: false,
        deleting: false,
    }];
    db.change(|tx| {
        let mut host = fixtures::host("h1");
        host.inventory.guest_features.push(GuestFeature::Snapshot);
        tx.put_host(host);
        tx.put_vm(vm);
    })
    .await;
    db
}

async fn back(db: &Db) -> Result<OperationRecord, Error> {
    let caller = fixtures::caller();
    let outcome = db.transact(|tx| revert(tx, &caller, "web", &name(), "", false));
    Ok(operation(db, &outcome.await?))
}

fn operation(db: &Db, outcome: &Outcome) -> OperationRecord {
    let Outcome::Operation(id) = outcome else {
        panic!("{outcome:?}")
    };
    (*db.snapshot().operations[id]).clone()
}

async fn ask(db: &Db, what: Power) {
    let caller = fixtures::caller();
    let asked = db.transact(|tx| power(tx, &caller, "web", "", what));
    asked.await.unwrap();
}

const STOP: Power = Power::Stop {
    grace_period_seconds: 0,
};

#[tokio::test]
async fn a_vm_that_a_request_on_its_way_would_start_does_not_go_back() {
    let db = site().await;
    carried_out(&db, &[1]).await;
    ask(&db, Power::Start).await;
    // Its host has not heard of it, and says that the VM is off.
    assert!(matches!(back(&db).await, Err(Error::RunsAtRevert(_))));
    // The same where it was to be stopped since: under which of the two it is now, only the host knows.
    ask(&db, STOP).await;
    assert!(matches!(back(&db).await, Err(Error::ChangeInProgress { .. })));
    carried_out(&db, &[1]).await;
    back(&db).await.unwrap();
}

#[tokio::test]
async fn a_vm_whose_guest_shut_itself_down_is_stopped_before_it_goes_back() {
    let db = site().await;
    ask(&db, Power::Start).await;
    carried_out(&db, &[1]).await;
    let mut off = fixtures::observation(&vm(&db).await);
    off.power = Some(PowerState::Stopped);
    off.snapshots = vec![SnapshotSeen {
        layer: 1,
        quiesced: false,
        written_bytes: 0,
    }];
    off.status_generation = 100;
    let report = fixtures::reported(&vm(&db).await, off);
    db.change(|tx| apply::apply(tx, &host_name("h1"), vec![report], Extent::Partial))
        .await;
    // By its restart policy its host may start it at any moment.
    assert!(matches!(back(&db).await, Err(Error::RunsAtRevert(_))));
}

#[tokio::test]
async fn a_vm_of_which_its_host_has_said_nothing_does_not_go_back() {
    let db = site().await;
    assert!(matches!(back(&db).await, Err(Error::ChangeInProgress { .. })));
}

#[tokio::test]
async fn a_vm_goes_back_again_only_when_it_has_gone_back() {
    let db = site().await;
    carried_out(&db, &[1]).await;
    back(&db).await.unwrap();
    let first = Some(Revert {
        number: 2,
        replaces: 1,
    });
    assert_eq!(vm(&db).await.snapshots.revert, first);
    // A host that has not heard of it would be told to replace layer 2, which is not there, and never told of layer 1.
    assert!(matches!(back(&db).await, Err(Error::ChangeInProgress { .. })));
    assert_eq!(vm(&db).await.snapshots.revert, first);
    carried_out(&db, &[2]).await;
    back(&db).await.unwrap();
    let second = Some(Revert {
        number: 3,
        replaces: 2,
    });
    assert_eq!(vm(&db).await.snapshots.revert, second);
}

#[tokio::test]
async fn going_back_does_not_count_as_done_when_the_snapshot_was_deleted_before() {
    for done in [false, true] {
        let db = site().await;
        carried_out(&db, &[1]).await;
        let going_back = back(&db).await.unwrap();
        if done {
            carried_out(&db, &[2]).await;
        }
        let caller = fixtures::caller();
        let deleted = db.transact(|tx| delete(tx, &caller, "web", &name(), "")).await;
        assert_eq!(vm(&db).await.snapshots.revert, None);
        let now = db.snapshot().operations[&going_back.id].clone();
        let reason = now.error.as_ref().map(|error| error.reason.clone());
        match done {
            // The host has said so: it ends as any other.
            true => assert_eq!((now.state, reason), (OperationState::Active, None)),
            false => {
                let superseded = Some("SUPERSEDED".to_owned());
                assert_eq!((now.state, reason), (OperationState::Cancelled, superseded));
            }
        }
        let deleting = operation(&db, &deleted.unwrap());
        assert_eq!(deleting.state, OperationState::Active);
    }
}

/// A VM that runs with a volume that was made, on a host that knows of layers of volumes.
async fn with_volume(features: &[GuestFeature], change: impl FnOnce(&mut VmRecord)) -> Db {
    let db = Db::open(Disk::default().open(), fixtures::cluster_id(), Hooks::default()).unwrap();
    let mut vm = fixtures::vm("web", "h1");
    let volume = fixtures::volume("ledger", Some("h1"));
    vm.spec.disks = vec![volume.as_disk(&fixtures::disk("data", 0))];
    change(&mut vm);
    db.change(|tx| {
        let mut host = fixtures::host("h1");
        host.inventory.guest_features.extend(features);
        tx.put_host(host);
        tx.put_volume(volume);
        tx.put_vm(vm);
    })
    .await;
    db
}

async fn make(db: &Db) -> Result<Outcome, Error> {
    let new = Create {
        name: name(),
        labels: BTreeMap::new(),
        description: String::new(),
        policy: Policy::default(),
    };
    let caller = fixtures::caller();
    db.transact(|tx| create(tx, &caller, "web", new)).await
}

const KNOWS: [GuestFeature; 3] = [
    GuestFeature::Snapshot,
    GuestFeature::Volume,
    GuestFeature::VolumeSnapshot,
];

#[tokio::test]
async fn a_vm_whose_volumes_have_layers_goes_to_hosts_whose_agents_know_of_that() {
    let db = with_volume(&KNOWS, |_| {}).await;
    carried_out(&db, &[]).await;
    let needs = |vm: &VmRecord| {
        crate::verbs::migrate::request(&db.snapshot(), vm, None)
            .needs
            .features
    };
    assert!(!needs(&vm(&db).await).contains(&GuestFeature::VolumeSnapshot));
    make(&db).await.unwrap();
    assert!(needs(&vm(&db).await).contains(&GuestFeature::VolumeSnapshot));
}

#[tokio::test]
async fn no_snapshot_is_made_while_a_disk_waits_for_the_next_start() {
    let db = with_volume(&KNOWS, |_| {}).await;
    carried_out(&db, &[]).await;
    db.change(|tx| {
        let vm = tx.vms.values().next().unwrap().clone();
        let mut seen = (**tx.observation(&vm).unwrap()).clone();
        seen.pending = vec![crate::model::Pending {
            field: "disks[data]".to_owned(),
            current: "none".to_owned(),
            wanted: "attached".to_owned(),
            message: "no port for another device is free".to_owned(),
        }];
        tx.observe(vm.id, Some(seen));
    })
    .await;
    let early = make(&db).await;
    assert!(matches!(early, Err(Error::ChangeInProgress { .. })), "{early:?}");
}

#[tokio::test]
async fn volumes_have_layers_only_where_they_are_there_and_the_agent_knows_of_that() {
    let db = with_volume(&KNOWS[..2], |_| {}).await;
    carried_out(&db, &[]).await;
    let refused = make(&db).await;
    assert!(matches!(refused, Err(Error::NoSnapshotsThere(_))), "{refused:?}");

    let db = with_volume(&KNOWS, |_| {}).await;
    let early = make(&db).await;
    assert!(matches!(early, Err(Error::ChangeInProgress { .. })), "{early:?}");
    let new = |vm: &mut VmRecord| _ = vm.new_volumes.insert("data".to_owned());
    let db = with_volume(&KNOWS, new).await;
    let early = make(&db).await;
    assert!(matches!(early, Err(Error::ChangeInProgress { .. })), "{early:?}");
    carried_out(&db, &[]).await;
    make(&db).await.unwrap();
}
