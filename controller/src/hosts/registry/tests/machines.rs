//! Two machines, or two boots, with one identity of a host.

use super::*;
use crate::hosts::registry;

fn machine(id: &str, boot: &str) -> Registration {
    Registration {
        machine_id: id.into(),
        boot_id: boot.into(),
        address: format!("{id}:7444"),
        run_id: format!("run of {id}, {boot}"),
        ..registration(vec![])
    }
}

fn copies_told(db: &Db) -> usize {
    let reasons = reasons(db);
    reasons
        .iter()
        .filter(|reason| *reason == "HostIdentityCopied")
        .count()
}

#[tokio::test]
async fn incident_50_a_second_machine_with_a_hosts_identity_is_refused_and_its_vms_stay_where_they_are() {
    let (db, vm) = with_vm().await;
    let enter = |new: Registration| db.change(|tx| register(tx, new));
    let mut first = machine("m1", "boot");
    first.vms = vec![reported(&vm, |_| {})];
    enter(first).await.unwrap();
    let before = db.snapshot();
    for _ in 0..3 {
        let refused = enter(machine("m2", "other")).await;
        assert!(matches!(refused, Err(Error::OtherMachine { .. })), "{refused:?}");
    }
    // A copied data directory is refused also where it says nothing against what is known.
    let copied = Registration {
        host: fixtures::host_name("h2"),
        state_machine_id: "m1".into(),
        ..machine("m2", "other")
    };
    assert!(matches!(enter(copied).await, Err(Error::OtherMachine { .. })));
    let state = db.snapshot();
    let host = fixtures::host_name("h1");
    assert_eq!(state.hosts[&host], before.hosts[&host]);
    assert_eq!(state.hosts.len(), 1);
    assert!(
        state.observation(&vm).is_some(),
        "an empty list of a stranger says nothing"
    );
    assert_eq!(copies_told(&db), 2, "each is told of once");
    let known = Report {
        run_id: "run of m1, boot".into(),
        ..report(1, vec![reported(&vm, |_| {})], true)
    };
    assert_eq!(
        db.change(|tx| registry::report(tx, known)).await,
        Receipt::Taken,
        "the first goes on"
    );
    assert_eq!(copies_told(&db), 2);
}

#[tokio::test]
async fn incident_50_of_two_boots_of_one_machine_id_the_first_is_believed_while_it_is_heard() {
    let (db, vm) = (db(), fixtures::vm("web", "h1"));
    let enter = |new: Registration| db.change(|tx| register(tx, new));
    let hosts = [fixtures::host_name("h1")];
    enter(machine("m1", "first")).await.unwrap();
    let stored = vm.clone();
    db.change(|tx| tx.put_vm(stored)).await;
    for _ in 0..2 {
        let refused = enter(machine("m1", "second")).await;
        assert!(matches!(refused, Err(Error::OtherBoot { .. })), "{refused:?}");
    }
    assert_eq!(copies_told(&db), 0, "it may have been rebooted");
    for sequence in 1..3 {
        let again = Report {
            run_id: "run of m1, first".into(),
            boot_id: "first".into(),
            ..report(sequence, vec![reported(&vm, |_| {})], true)
        };
        assert_eq!(db.change(|tx| registry::report(tx, again)).await, Receipt::Taken);
        let refused = enter(machine("m1", "second")).await;
        assert!(matches!(refused, Err(Error::OtherBoot { .. })), "{refused:?}");
    }
    assert_eq!(copies_told(&db), 1, "both speak");
    db.change(|tx| mark_silent(tx, &hosts, std::time::Duration::ZERO))
        .await;
    enter(machine("m1", "second")).await.unwrap();
    assert_eq!(db.snapshot().hosts[&hosts[0]].boot_id, "second");
}
