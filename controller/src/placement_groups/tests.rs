//! What groups say on states with members that are there, come, leave and go along.

use dalgu_proto::placement::Rule::{Affinity, AntiAffinity};
use jiff::Timestamp;

use super::*;
use crate::{
    fixtures,
    model::{DrainState, DrainedVm, MigrationRecord},
    state::{Db, Hooks},
    store::memory::Disk,
};

/// A state with hosts h1 and h2 in rack a and h3 in rack b, a group, and VMs of it on hosts; then changed.
async fn state(
    rule: Rule,
    key: Option<&str>,
    vms: &[VmRecord],
    migration: Option<MigrationRecord>,
    drain: Option<(&str, Drain)>,
) -> State {
    let disk = Disk::default();
    let db = Db::open(disk.open(), fixtures::cluster_id(), Hooks::default()).unwrap();
    db.change(|tx| {
        for (name, rack) in [("h1", "a"), ("h2", "a"), ("h3", "b")] {
            let mut host = fixtures::host(name);
            host.labels.insert("rack".into(), rack.into());
            host.drain = drain
                .clone()
                .filter(|(drained, _)| *drained == name)
                .map(|(_, drain)| drain);
            tx.put_host(host);
        }
        tx.put_placement_group(fixtures::placement_group("g", rule, key));
        vms.iter().for_each(|vm| tx.put_vm(vm.clone()));
        migration
            .into_iter()
            .for_each(|migration| tx.put_migration(migration));
    })
    .await;
    (*db.snapshot()).clone()
}

fn vm(name: &str, owner: &str) -> VmRecord {
    let mut vm = fixtures::vm(name, owner);
    vm.placement_groups.insert("g".parse().unwrap());
    vm
}

fn domains(rules: &Rules) -> Vec<(&str, u32)> {
    let domains = rules.groups[0].domains.iter();
    domains
        .map(|(domain, held)| (domain.as_str(), held.vms))
        .collect()
}

fn of_any(state: &State) -> Rules {
    let names = state.placement_groups.keys().cloned().collect();
    of_new(state, &names, &BTreeSet::new())
}

#[tokio::test]
async fn a_member_counts_where_it_is_and_where_it_may_come() {
    let moving = vm("a", "h1");
    let migration = fixtures::migration(&moving, "h3");
    let vms = [moving, vm("b", "h2")];
    let apart = state(AntiAffinity, Some("rack"), &vms, Some(migration.clone()), None).await;
    assert_eq!(domains(&of_any(&apart)), [("a", 2), ("b", 1)]);
    let own = of_vm(&apart, &vms[1], None);
    assert_eq!(
        (domains(&own), own.groups[0].others),
        (vec![("a", 1), ("b", 1)], 1)
    );
    // Nobody can know where to join one that moves between domains.
    let together = state(Affinity, Some("rack"), &vms[..1], Some(migration), None).await;
    let rules = of_any(&together);
    assert_eq!((domains(&rules), rules.groups[0].others), (vec![], 1));
    let within = fixtures::migration(&vms[0], "h2");
    let together = state(Affinity, Some("rack"), &vms[..1], Some(within), None).await;
    assert_eq!(domains(&of_any(&together)), [("a", 1)]);
}

#[tokio::test]
async fn members_that_leave_a_drained_host_too_do_not_hold_each_other() {
    let drain = Drain {
        direction: Direction::Out,
        mode: None,
        principal: "operator/test".into(),
        begin_time: Timestamp::UNIX_EPOCH,
        deadline: Timestamp::UNIX_EPOCH,
        end_time: None,
        state: DrainState::Active,
        vms: BTreeMap::new(),
    };
    let mut vms = [vm("a", "h1"), vm("b", "h1"), vm("c", "h1")];
    vms[2].drain_mode = DrainMode::Leave;
    let drained = state(Affinity, None, &vms[..2], None, Some(("h1", drain.clone()))).await;
    assert_eq!(of_vm(&drained, &vms[0], None).groups[0].others, 0);
    // One that stays holds them.
    let drained = state(Affinity, None, &vms, None, Some(("h1", drain.clone()))).await;
    assert_eq!(domains(&of_vm(&drained, &vms[0], None)), [("h1", 1)]);
    // Those that have gone are followed.
    let migration = fixtures::migration(&vms[1], "h2");
    let drained = state(
        Affinity,
        None,
        &vms[..2],
        Some(migration),
        Some(("h1", drain.clone())),
    )
    .await;
    assert_eq!(domains(&of_vm(&drained, &vms[0], None)), [("h2", 1)]);
    // Back again in the same way.
    let mut back = drain;
    back.direction = Direction::Back;
    let away = [vm("a", "h2"), vm("b", "h2")];
    let known = DrainedVm::new(away[1].id, DrainMode::LiveMigrate);
    back.vms.insert("b".parse().unwrap(), known);
    let restored = state(Affinity, None, &away, None, Some(("h1", back))).await;
    let home = fixtures::host_name("h1");
    assert_eq!(of_vm(&restored, &away[0], Some(&home)).groups[0].others, 0);
    let elsewhere = fixtures::host_name("h3");
    assert_eq!(
        domains(&of_vm(&restored, &away[0], Some(&elsewhere))),
        [("h2", 1)]
    );
}

#[tokio::test]
async fn a_rule_that_does_not_hold_is_told_with_its_vms() {
    let told = async |rule, key, vms: &[VmRecord]| {
        let state = state(rule, key, vms, None, None).await;
        broken(&state, &state.placement_groups.values().next().unwrap().clone())
    };
    let near = [vm("a", "h1"), vm("b", "h2")];
    let far = [vm("a", "h1"), vm("b", "h3")];
    let rack = Some("rack");
    assert_eq!(told(AntiAffinity, rack, &far).await, None);
    assert_eq!(told(AntiAffinity, None, &near).await, None);
    assert_eq!(told(Affinity, rack, &near).await, None);
    assert_eq!(
        told(AntiAffinity, rack, &near).await.unwrap(),
        "VMs a and b are both on rack a"
    );
    assert!(told(Affinity, rack, &far).await.unwrap().contains("on rack b"));
    assert!(
        told(Affinity, Some("room"), &near[..1])
            .await
            .unwrap()
            .contains("host h1, where VM a is, has no label room")
    );
}
