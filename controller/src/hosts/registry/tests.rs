//! Registration and reports against a state in memory.

mod machines;

use super::*;
use crate::{
    fixtures,
    model::{Observation, VmRecord},
    placement::Lately,
    state::{Db, Hooks},
    store::{Store, memory::Disk},
};

fn db() -> Db {
    Db::open(Disk::default().open(), fixtures::cluster_id(), Hooks::default()).unwrap()
}

fn registration(vms: Vec<Reported>) -> Registration {
    Registration {
        host: fixtures::host_name("h1"),
        address: "10.0.0.1:7444".into(),
        boot_id: "boot".into(),
        run_id: "run".into(),
        agent_version: "1".into(),
        inventory: fixtures::inventory(),
        usage: None,
        vms,
        complete: true,
        unmanaged: vec![],
        hypervisor_error: None,
        session: Session(0),
        cluster_id: None,
        machine_id: String::new(),
        state_machine_id: String::new(),
        controller: (Term(0), None),
        sequence: None,
        images: None,
    }
}

fn report(sequence: u64, vms: Vec<Reported>, complete: bool) -> Report {
    Report {
        host: fixtures::host_name("h1"),
        session: Session(1),
        boot_id: "boot".into(),
        run_id: "run".into(),
        sequence,
        usage: None,
        vms,
        complete,
        unmanaged: vec![],
        hypervisor_error: None,
        inventory: None,
        images: None,
    }
}

fn reported(vm: &VmRecord, change: impl FnOnce(&mut Observation)) -> Reported {
    let mut observation = fixtures::observation(vm);
    change(&mut observation);
    fixtures::reported(vm, observation)
}

async fn with_vm() -> (Db, VmRecord) {
    let db = db();
    let vm = fixtures::vm("web", "h1");
    let stored = vm.clone();
    db.transact(|tx| register(tx, registration(vec![])))
        .await
        .unwrap();
    db.change(|tx| tx.put_vm(stored)).await;
    (db, vm)
}

fn reasons(db: &Db) -> Vec<String> {
    db.snapshot()
        .events
        .values()
        .map(|event| event.reason.clone())
        .collect()
}

#[tokio::test]
async fn a_host_enters_once_and_a_repeated_registration_writes_nothing() {
    let db = db();
    assert_eq!(
        db.transact(|tx| register(tx, registration(vec![]))).await,
        Ok(Session(1))
    );
    let before = db.snapshot().meta.revision;
    db.transact(|tx| register(tx, registration(vec![])))
        .await
        .unwrap();
    assert_eq!(db.snapshot().meta.revision, before);
    assert_eq!(reasons(&db), ["HostRegistered", "HostReady"]);
}

#[tokio::test]
async fn an_agent_of_another_site_is_turned_away() {
    let db = db();
    let other = Registration {
        cluster_id: Some("3f2b5e0c-0000-4000-8000-000000000000".parse().unwrap()),
        ..registration(vec![])
    };
    let refused = db.transact(|tx| register(tx, other)).await;
    assert!(matches!(refused, Err(Error::OtherSite { .. })));
    assert!(db.snapshot().hosts.is_empty());
}

#[tokio::test]
async fn a_session_never_falls_back() {
    let db = db();
    let later = Registration {
        session: Session(9),
        ..registration(vec![])
    };
    assert_eq!(db.transact(|tx| register(tx, later)).await, Ok(Session(9)));
    assert_eq!(
        db.transact(|tx| register(tx, registration(vec![]))).await,
        Ok(Session(9))
    );
    let host = fixtures::host_name("h1");
    assert_eq!(db.change(|tx| raise_session(tx, &host)).await, Some(Session(10)));
    let stale = db.change(|tx| super::report(tx, report(1, vec![], true))).await;
    assert_eq!(stale, Receipt::Unknown, "it must register again before it obeys");
}

#[tokio::test]
async fn reports_out_of_order_are_dropped_and_those_of_another_run_must_register() {
    let (db, vm) = with_vm().await;
    let take = |new: Report| db.change(|tx| super::report(tx, new));
    assert_eq!(
        take(report(2, vec![reported(&vm, |_| {})], true)).await,
        Receipt::Taken
    );
    assert_eq!(take(report(1, vec![], true)).await, Receipt::Old);
    assert!(
        db.snapshot().observation(&vm).is_some(),
        "an old report has no effect"
    );
    assert_eq!(
        take(Report {
            run_id: "other".into(),
            ..report(3, vec![], true)
        })
        .await,
        Receipt::Unknown
    );
    assert_eq!(
        take(Report {
            boot_id: "other".into(),
            ..report(3, vec![], true)
        })
        .await,
        Receipt::Unknown
    );
    assert_eq!(
        take(Report {
            session: Session(2),
            ..report(3, vec![], true)
        })
        .await,
        Receipt::Unknown
    );
    assert_eq!(take(report(3, vec![], true)).await, Receipt::Taken);
}

#[tokio::test]
async fn what_was_held_up_since_before_a_registration_changes_nothing_after_it() {
    let db = db();
    let registers = async |sequence: u64, address: &str| {
        let new = Registration {
            sequence: Some(sequence),
            address: address.into(),
            ..registration(vec![])
        };
        db.transact(|tx| register(tx, new)).await.unwrap();
    };
    let reports = async |sequence: u64| {
        let new = report(sequence, vec![], true);
        let receipt = std::sync::Mutex::new(None);
        db.change(|tx| *receipt.lock().unwrap() = Some(super::report(tx, new)))
            .await;
        receipt.into_inner().unwrap().unwrap()
    };
    registers(1, "old:1").await;
    assert_eq!(reports(2).await, Receipt::Taken);
    registers(4, "new:1").await;
    assert_eq!(reports(3).await, Receipt::Old, "sent before the registration");
    assert_eq!(reports(5).await, Receipt::Taken);
    registers(1, "old:1").await;
    let host = db.snapshot().hosts[&fixtures::host_name("h1")].clone();
    assert_eq!(host.address, "new:1", "the first registration came once more");
    assert_eq!(reports(6).await, Receipt::Taken, "its run goes on");
}

#[tokio::test]
async fn a_host_that_was_forgotten_comes_back_ahead_of_what_it_was_told_before() {
    let db = db();
    let comes = async || {
        db.transact(|tx| register(tx, registration(vec![])))
            .await
            .unwrap()
    };
    assert_eq!(comes().await, Session(1));
    let host = fixtures::host_name("h1");
    db.change(|tx| raise_session(tx, &host)).await;
    db.transact(|tx| crate::verbs::host::delete(tx, "h1"))
        .await
        .unwrap();
    assert_eq!(comes().await, Session(3), "2 was given, and may be on its way");
}

#[tokio::test]
async fn only_a_complete_list_says_that_a_vm_is_not_there() {
    let (db, vm) = with_vm().await;
    let take = |new: Report| db.change(|tx| super::report(tx, new));
    take(report(1, vec![reported(&vm, |_| {})], true)).await;
    take(report(2, vec![], false)).await;
    assert!(db.snapshot().observation(&vm).is_some());
    take(report(3, vec![], true)).await;
    assert!(db.snapshot().observation(&vm).is_none());
}

#[tokio::test]
async fn only_the_owner_speaks_for_a_vm_and_only_under_its_present_number() {
    let (db, vm) = with_vm().await;
    let take = |new: Report| db.change(|tx| super::report(tx, new));
    take(report(1, vec![reported(&vm, |o| o.epoch = o.epoch.next())], true)).await;
    assert!(db.snapshot().observation(&vm).is_none(), "another number");
    let elsewhere = fixtures::vm("db", "h2");
    let stored = elsewhere.clone();
    db.change(|tx| tx.put_vm(stored)).await;
    let theirs = || {
        vec![
            reported(&elsewhere, |_| {}),
            reported(&fixtures::vm("x", "h1"), |_| {}),
        ]
    };
    let stray = theirs();
    take(report(2, stray.clone(), true)).await;
    assert!(
        !reasons(&db).contains(&"StrayVm".to_owned()),
        "it may have been on its way out"
    );
    for sequence in 3..6 {
        take(report(sequence, stray.clone(), true)).await;
    }
    assert_eq!(
        reasons(&db).iter().filter(|reason| *reason == "StrayVm").count(),
        2,
        "each is told of once"
    );
    assert!(db.snapshot().observation(&elsewhere).is_none());
    take(report(6, vec![], true)).await;
    assert!(
        db.snapshot().strays.is_empty(),
        "what has gone is remembered for ever"
    );
}

#[tokio::test]
async fn an_older_status_of_the_same_run_does_not_undo_a_newer_one() {
    let (db, vm) = with_vm().await;
    let take = |new: Report| db.change(|tx| super::report(tx, new));
    take(report(1, vec![reported(&vm, |o| o.status_generation = 5)], true)).await;
    let old = |o: &mut Observation| {
        o.status_generation = 4;
        o.power = None;
    };
    take(report(2, vec![reported(&vm, old)], true)).await;
    assert_eq!(db.snapshot().observation(&vm).unwrap().status_generation, 5);
    db.transact(|tx| register(tx, registration(vec![reported(&vm, old)])))
        .await
        .unwrap();
    assert_eq!(
        db.snapshot().observation(&vm).unwrap().status_generation,
        4,
        "a new run counts anew"
    );
}

#[tokio::test(start_paused = true)]
async fn silence_makes_a_host_unreachable_and_changes_nothing_else() {
    let (db, vm) = with_vm().await;
    db.change(|tx| super::report(tx, report(1, vec![reported(&vm, |_| {})], true)))
        .await;
    let hosts = [fixtures::host_name("h1")];
    let limit = std::time::Duration::from_secs(9);
    db.change(|tx| mark_silent(tx, &hosts, limit)).await;
    assert_eq!(db.snapshot().live[&hosts[0]].state, HostState::Ready);
    tokio::time::advance(limit).await;
    db.change(|tx| mark_silent(tx, &hosts, limit)).await;
    let state = db.snapshot();
    assert_eq!(state.live[&hosts[0]].state, HostState::Unreachable);
    assert!(state.observation(&vm).is_some());
    assert_eq!(state.vms[&vm.id].owner, hosts[0]);
    db.change(|tx| super::report(tx, report(2, vec![], false))).await;
    assert_eq!(db.snapshot().live[&hosts[0]].state, HostState::Ready);
    assert_eq!(reasons(&db).iter().filter(|r| *r == "HostReady").count(), 2);
}

#[tokio::test]
async fn free_room_alone_is_not_worth_a_write() {
    let (db, _) = with_vm().await;
    let before = db.snapshot().meta.revision;
    let mut inventory = fixtures::inventory();
    inventory.pools[0].available_bytes /= 2;
    let same = Report {
        inventory: Some(inventory.clone()),
        ..report(1, vec![], true)
    };
    db.change(|tx| super::report(tx, same)).await;
    assert_eq!(db.snapshot().meta.revision, before);
    inventory.bridges.push("br1".into());
    let new = Report {
        inventory: Some(inventory),
        ..report(2, vec![], true)
    };
    db.change(|tx| super::report(tx, new)).await;
    assert_eq!(
        db.snapshot().hosts[&fixtures::host_name("h1")]
            .inventory
            .bridges
            .len(),
        2
    );
}

#[tokio::test]
async fn the_end_of_a_transfer_is_acted_on_at_once() {
    let touched = std::sync::Arc::new(std::sync::Mutex::new(0));
    let count = touched.clone();
    let hooks = Hooks {
        touched: Box::new(move |vms| *count.lock().unwrap() += vms.len()),
        ..Hooks::default()
    };
    let db = Db::open(Disk::default().open(), fixtures::cluster_id(), hooks).unwrap();
    let vm = fixtures::vm("web", "h1");
    let migration = crate::model::MigrationRecord {
        phase: crate::model::Phase::Transferring,
        ..fixtures::migration(&vm, "h2")
    };
    db.transact(|tx| register(tx, registration(vec![])))
        .await
        .unwrap();
    let (stored, id) = (vm.clone(), migration.id);
    db.change(|tx| {
        tx.put_vm(stored);
        tx.put_migration(migration);
    })
    .await;
    let told = |sequence, over| {
        let seen = Reported {
            transfer_over: over,
            ..reported(&vm, |_| {})
        };
        db.change(move |tx| super::report(tx, report(sequence, vec![seen], true)))
    };
    told(1, None).await;
    let before = *touched.lock().unwrap();
    told(2, None).await;
    assert_eq!(*touched.lock().unwrap(), before, "nothing is new");
    told(3, Some(id)).await;
    assert_eq!(*touched.lock().unwrap(), before + 1);
}

#[tokio::test]
async fn a_host_whose_hypervisor_does_not_answer_registers_and_nothing_follows_from_what_it_does_not_list() {
    let (db, vm) = with_vm().await;
    let running = |o: &mut Observation| o.status_generation = 7;
    let before = report(1, vec![reported(&vm, running)], true);
    assert_eq!(db.change(|tx| super::report(tx, before)).await, Receipt::Taken);
    let known = db.snapshot().observation(&vm).cloned().unwrap();

    let mut silent = fixtures::inventory();
    silent.hypervisor.clear();
    let new_run = Registration {
        run_id: "second".into(),
        inventory: silent,
        complete: false,
        hypervisor_error: Some("libvirt cannot be reached".into()),
        ..registration(vec![])
    };
    db.transact(|tx| register(tx, new_run)).await.unwrap();
    let state = db.snapshot();
    let host = fixtures::host_name("h1");
    assert_eq!(
        state.live[&host].hypervisor_error.as_deref(),
        Some("libvirt cannot be reached")
    );
    assert_eq!(
        state.hosts[&host].inventory,
        fixtures::inventory(),
        "what the hypervisor said of itself is kept"
    );
    let kept = state.observation(&vm).cloned();
    assert_eq!(
        kept.map(|observation| (observation.power, observation.phase)),
        Some((known.power, known.phase)),
        "its VM is not taken for gone"
    );

    // The hypervisor answers again; the new run counts from one.
    let recovered = Report {
        run_id: "second".into(),
        ..report(1, vec![reported(&vm, |o| o.observed = o.accepted.next())], true)
    };
    let told = recovered.vms[0].observation.clone();
    assert_eq!(db.change(|tx| super::report(tx, recovered)).await, Receipt::Taken);
    let state = db.snapshot();
    assert_eq!(
        state.observation(&vm).map(|observation| (**observation).clone()),
        Some(told)
    );
    assert_eq!(state.live[&host].hypervisor_error, None);
    let gone = Report {
        run_id: "second".into(),
        ..report(2, vec![], true)
    };
    assert_eq!(db.change(|tx| super::report(tx, gone)).await, Receipt::Taken);
    assert!(
        db.snapshot().observation(&vm).is_none(),
        "a complete list says so"
    );
}

#[tokio::test]
async fn a_controller_hears_from_a_host_that_registers_that_it_obeys_another() {
    let (own, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
    // Term of the controller that the host obeys, above this one's, and its run; whether it is another.
    let cases = [
        (-1, Some(other), false),
        (0, None, false),
        (0, Some(own), false),
        (0, Some(other), true),
        (1, None, true),
        (1, Some(other), true),
    ];
    for (above, run, is_another) in cases {
        let db = db();
        let state = db.snapshot();
        let run = run.map(|run| if run == own { state.run_id } else { run });
        let new = Registration {
            controller: (Term(state.meta.term.0.saturating_add_signed(above)), run),
            ..registration(vec![])
        };
        for _ in 0..2 {
            db.change(|tx| register(tx, new.clone())).await.unwrap();
        }
        assert_eq!(
            db.snapshot().replaced_by.is_some(),
            is_another,
            "{above}, {run:?}"
        );
        let told = reasons(&db)
            .into_iter()
            .filter(|reason| reason == "ControllerReplaced");
        assert_eq!(told.count(), usize::from(is_another), "the operator is told once");
    }
}

#[tokio::test]
async fn a_host_that_a_restored_store_does_not_know_gets_a_session_that_nobody_had_before() {
    let image = Disk::default();
    Db::open(image.open(), fixtures::cluster_id(), Hooks::default()).unwrap();
    let image = image.open().load().unwrap();
    let (restored, _) =
        incarnation::renew(image, incarnation::Past::default(), jiff::Timestamp::UNIX_EPOCH).unwrap();
    let db = Db::open(
        Disk::of(restored).open(),
        fixtures::cluster_id(),
        Hooks::default(),
    )
    .unwrap();
    let session = db
        .transact(|tx| register(tx, registration(vec![])))
        .await
        .unwrap();
    assert!(session > Session(incarnation::JUMP));
}

#[tokio::test]
async fn a_list_that_was_under_way_since_before_a_restore_says_nothing_of_what_is_there_now() {
    let disk = Disk::default();
    let before = Db::open(disk.open(), fixtures::cluster_id(), Hooks::default()).unwrap();
    let vm = fixtures::vm("web", "h1");
    let stored = vm.clone();
    before
        .transact(|tx| register(tx, registration(vec![])))
        .await
        .unwrap();
    before.change(|tx| tx.put_vm(stored)).await;
    let (restored, _) = incarnation::renew(
        disk.open().load().unwrap(),
        incarnation::Past::default(),
        jiff::Timestamp::UNIX_EPOCH,
    )
    .unwrap();
    let db = Db::open(
        Disk::of(restored).open(),
        fixtures::cluster_id(),
        Hooks::default(),
    )
    .unwrap();
    let of_before = Registration {
        session: Session(1),
        ..registration(vec![reported(&vm, |_| ())])
    };
    let session = db.transact(|tx| register(tx, of_before)).await.unwrap();
    assert!(
        session > Session(incarnation::JUMP),
        "ahead of all that it was given before"
    );
    let state = db.snapshot();
    assert!(state.sightings.is_empty() && state.listed.is_empty());
    let now = Report {
        session,
        ..report(1, vec![], true)
    };
    let taken = db.change(|tx| super::report(tx, now)).await;
    assert_eq!(taken, Receipt::Taken);
    assert!(db.snapshot().listed.contains(&fixtures::host_name("h1")));
}

/// A sample of a host of four processors, so many of them busy.
fn busy(cpus_busy: f64) -> Option<Usage> {
    Some(Usage {
        rates_valid: true,
        cpus_busy,
        ..Usage::default()
    })
}

#[tokio::test(start_paused = true)]
async fn a_host_whose_vms_are_short_for_a_minute_takes_no_new_ones_until_they_have_been_well_for_five() {
    let db = db();
    db.transact(|tx| register(tx, registration(vec![])))
        .await
        .unwrap();
    let mut sequence = 0;
    let mut sampled = async |usage: Option<Usage>, seconds: u64| {
        for _ in 0..seconds / 10 {
            sequence += 1;
            let new = Report {
                usage: usage.clone(),
                ..report(sequence, vec![], true)
            };
            db.change(|tx| super::report(tx, new)).await;
            tokio::time::advance(std::time::Duration::from_secs(10)).await;
        }
        let state = db.snapshot();
        let view = crate::hosts::view(&state, &state.hosts[&fixtures::host_name("h1")]);
        view.pressed
    };
    assert!(!sampled(busy(3.9), 60).await, "not for a minute yet");
    assert!(sampled(busy(3.9), 10).await);
    assert!(sampled(None, 600).await, "reports without a sample say nothing");
    assert!(sampled(busy(0.1), 300).await);
    assert!(!sampled(busy(0.1), 10).await);
    let pressed: Vec<_> = reasons(&db)
        .into_iter()
        .filter(|reason| reason != "HostRegistered" && reason != "HostReady")
        .collect();
    assert_eq!(pressed, ["HostPressed", "HostRelieved"]);
    // What VMs wait for closes it as busy processors do.
    let stolen = |cpus_stolen| {
        let lately = Lately {
            cpus_busy: 0.0,
            cpus_stolen,
        };
        db.change(move |tx| tx.set_expected(&fixtures::host_name("h1"), None, Some(lately)))
    };
    stolen(0.8).await;
    assert!(sampled(busy(0.1), 70).await);
    stolen(0.0).await;
    assert!(!sampled(busy(0.1), 310).await);
    // And where the operator does not want it.
    assert!(sampled(busy(3.9), 70).await);
    db.change(|tx| tx.set_close_pressed(false)).await;
    assert!(!sampled(busy(3.9), 70).await);
}
