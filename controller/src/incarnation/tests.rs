//! What a restored store makes of what hosts show.

use dalgu_proto::vm::{PowerState, RestartPolicy};

use super::*;
use crate::{
    agent_wire::Told,
    fixtures::{self, host_name},
    model::HostLive,
    reconcile::apply::{self, Extent},
    state::{Db, Hooks, Observing},
    store::{Store, memory::Disk},
};

#[tokio::test]
async fn an_etag_from_before_a_restore_matches_nothing_after_it() {
    let disk = Disk::default();
    let open = |disk: &Disk| Db::open(disk.open(), fixtures::cluster_id(), Hooks::default()).unwrap();
    let db = open(&disk);
    db.change(|tx| {
        tx.put_host(fixtures::host("h1"));
        tx.put_vm(fixtures::vm("web", "h1"));
    })
    .await;
    let image = disk.open().load().unwrap();
    let before = Past {
        revision: 3 * JUMP,
        ..Past::default()
    };
    let (restored, _) = renew(image, before, jiff::Timestamp::UNIX_EPOCH).unwrap();
    let state = open(&Disk::of(restored)).snapshot();
    let vm = state.vms.values().next().unwrap();
    assert!(vm.revision > before.revision, "{}", vm.revision);
    assert!(state.hosts[&host_name("h1")].revision > before.revision);
}

#[tokio::test]
async fn a_plan_that_ran_when_the_backup_was_taken_is_given_up() {
    let disk = Disk::default();
    let open = |disk: &Disk| Db::open(disk.open(), fixtures::cluster_id(), Hooks::default()).unwrap();
    let db = open(&disk);
    db.change(|tx| {
        let vm = fixtures::vm("web", "h1");
        tx.put_plan(fixtures::plan(&vm, "h2"));
    })
    .await;
    let image = disk.open().load().unwrap();
    let (restored, _) = renew(image, Past::default(), jiff::Timestamp::UNIX_EPOCH).unwrap();
    let state = open(&Disk::of(restored)).snapshot();
    let plan = state.plans.values().next().unwrap();
    assert_eq!(plan.state, crate::model::PlanState::Cancelled, "{}", plan.message);
    assert!(plan.end_time.is_some());
}

/// A restored site of hosts h1 to h3 with the VM web, which the store has on h1.
async fn restored() -> (Db, VmRecord) {
    let open = |disk: &Disk| Db::open(disk.open(), fixtures::cluster_id(), Hooks::default()).unwrap();
    let disk = Disk::default();
    drop(open(&disk));
    let image = disk.open().load().unwrap();
    let (image, _) = renew(image, Past::default(), jiff::Timestamp::UNIX_EPOCH).unwrap();
    let db = open(&Disk::of(image));
    let mut vm = fixtures::vm("web", "h1");
    vm.unconfirmed = true;
    vm.epoch = Epoch(JUMP);
    vm.intent.generation = Generation(JUMP);
    let stored = vm.clone();
    db.change(|tx| {
        for name in ["h1", "h2", "h3"] {
            tx.put_host(fixtures::host(name));
            tx.set_live(host_name(name), HostLive::silent(tokio::time::Instant::now()));
        }
        tx.put_vm(stored);
        tx.set_observing(Some(Observing {
            since: jiff::Timestamp::UNIX_EPOCH,
            waived: Default::default(),
        }));
    })
    .await;
    (db, vm)
}

fn shown(vm: &VmRecord, host: &str, phase: VmPhase) -> Reported {
    let mut observation = fixtures::observation(vm);
    observation.host = host_name(host);
    observation.epoch = Epoch(7);
    observation.accepted = Generation(9);
    observation.phase = phase;
    Reported {
        power_sequence: Some(5),
        restart_sequence: Some(3),
        ..fixtures::reported(vm, observation)
    }
}

/// As [`shown`] by a host that was told this last.
fn told(reported: Reported, power: PowerState) -> Reported {
    let told = Told {
        intent: Intent {
            generation: reported.observation.accepted,
            power,
            power_sequence: 5,
            restart_sequence: 3,
            ..fixtures::vm("web", "h1").intent
        },
        restart_policy: RestartPolicy::Never,
        spec: None,
        snapshots: None,
        places: Vec::new(),
        devices: Vec::new(),
    };
    Reported {
        told: Some(told),
        ..reported
    }
}

async fn lists(db: &Db, host: &str, vms: Vec<Reported>) {
    db.change(|tx| apply::apply(tx, &host_name(host), vms, Extent::NewRun))
        .await;
}

/// Every host lists what it has.
async fn all_list(db: &Db, vms: [Vec<Reported>; 3]) {
    for (host, vms) in ["h1", "h2", "h3"].into_iter().zip(vms) {
        lists(db, host, vms).await;
    }
}

async fn resumes(db: &Db) -> Result<(), Error> {
    let seen = etag(&differences(&db.snapshot()));
    db.transact(|tx| resume(tx, true, &seen, "operator/test")).await
}

/// The VM is to be deleted, whatever state it is in.
async fn deletes(db: &Db) -> Result<(), crate::verbs::Error> {
    let caller = fixtures::caller();
    db.transact(|tx| crate::verbs::power::delete(tx, &caller, "web", "", true))
        .await
        .map(drop)
}

fn kinds(db: &Db) -> Vec<Kind> {
    differences(&db.snapshot())
        .iter()
        .map(|found| found.kind)
        .collect()
}

#[tokio::test]
async fn nothing_is_resumed_before_every_host_has_shown_all_or_is_waived() {
    let (db, vm) = restored().await;
    lists(&db, "h1", vec![shown(&vm, "h1", VmPhase::Settled)]).await;
    let refused = resumes(&db).await.unwrap_err();
    assert_eq!(refused, Error::Waiting(vec![host_name("h2"), host_name("h3")]));
    lists(&db, "h2", vec![]).await;
    db.transact(|tx| waive(tx, &host_name("h3"), "operator/test"))
        .await
        .unwrap();
    assert!(kinds(&db).is_empty(), "it is where it should be");
    db.transact(|tx| resume(tx, false, "", "operator/test"))
        .await
        .unwrap();
    let state = db.snapshot();
    assert!(state.meta.observing.is_none());
    let vm = &state.vms[&vm.id];
    assert!(!vm.unconfirmed);
    assert_eq!(
        (vm.epoch, vm.intent.generation),
        (Epoch(JUMP), Generation(JUMP + 1))
    );
    // Not those of the backup: the host neither reboots the guest nor misses the next reboot.
    assert_eq!((vm.intent.power_sequence, vm.intent.restart_sequence), (5, 3));
}

#[tokio::test]
async fn a_vm_is_taken_over_where_it_is_and_as_it_is_once_that_was_accepted() {
    let (db, vm) = restored().await;
    let mut there = shown(&vm, "h2", VmPhase::Settled);
    there.observation.power = Some(PowerState::Stopped);
    // Ahead even of the jump, as after a second restore whose past was lost.
    there.observation.epoch = Epoch(3 * JUMP);
    all_list(&db, [vec![], vec![there], vec![]]).await;
    assert_eq!(kinds(&db), [Kind::OtherOwner, Kind::PowerState]);
    let unseen = db.transact(|tx| resume(tx, false, "", "operator/test")).await;
    assert_eq!(unseen, Err(Error::Differences(2)));
    let others = db
        .transact(|tx| resume(tx, true, "another", "operator/test"))
        .await;
    assert_eq!(others, Err(Error::Changed));
    resumes(&db).await.unwrap();
    let state = db.snapshot();
    let vm = &state.vms[&vm.id];
    assert_eq!(vm.owner, host_name("h2"));
    assert_eq!(vm.intent.power, PowerState::Stopped);
    assert_eq!(
        vm.intent.generation,
        Generation(JUMP + 1),
        "what it should be has changed, and with it the number of that"
    );
    assert_eq!(vm.epoch, Epoch(3 * JUMP + 1));
    assert!(differences(&state).is_empty());
}

#[tokio::test]
async fn what_no_host_has_is_not_made_again_and_what_the_store_does_not_know_is_left_alone() {
    let (db, vm) = restored().await;
    let stranger = fixtures::vm("new", "h2");
    all_list(
        &db,
        [vec![], vec![shown(&stranger, "h2", VmPhase::Settled)], vec![]],
    )
    .await;
    assert_eq!(kinds(&db), [Kind::MissingVm, Kind::UnknownVm]);
    resumes(&db).await.unwrap();
    assert!(db.snapshot().vms[&vm.id].unconfirmed);
    assert!(!db.snapshot().vms.contains_key(&stranger.id));
    assert_eq!(kinds(&db), [Kind::MissingVm, Kind::UnknownVm], "still told of");
}

#[tokio::test]
async fn a_vm_on_two_hosts_is_left_alone_until_it_is_on_one() {
    let (db, vm) = restored().await;
    for host in ["h1", "h2"] {
        lists(&db, host, vec![shown(&vm, host, VmPhase::Settled)]).await;
    }
    lists(&db, "h3", vec![]).await;
    assert_eq!(kinds(&db), [Kind::SeveralHosts]);
    resumes(&db).await.unwrap();
    assert!(db.snapshot().vms[&vm.id].unconfirmed);
    lists(&db, "h1", vec![]).await;
    assert_eq!(kinds(&db), [Kind::OtherOwner]);
    resumes(&db).await.unwrap();
    assert_eq!(db.snapshot().vms[&vm.id].owner, host_name("h2"));
}

#[tokio::test]
async fn a_migration_that_the_backup_does_not_know_is_settled_with_both_hosts() {
    let (db, vm) = restored().await;
    let id = MigrationId::from_uuid(uuid::Uuid::from_u128(5));
    let part = |host, phase| Reported {
        migration: Some(id),
        ..shown(&vm, host, phase)
    };
    all_list(
        &db,
        [
            vec![part("h1", VmPhase::Outgoing)],
            vec![part("h2", VmPhase::Incoming)],
            vec![],
        ],
    )
    .await;
    assert_eq!(kinds(&db), [Kind::Migrating]);
    resumes(&db).await.unwrap();
    let state = db.snapshot();
    let migration = state.active_migration(vm.id).unwrap();
    assert_eq!(migration.phase, Phase::CuttingOver);
    assert_eq!(
        (&migration.source, &migration.destination),
        (&host_name("h1"), &host_name("h2"))
    );
    assert_eq!(state.active_operations(vm.id).len(), 1);
}

#[tokio::test]
async fn a_host_that_is_ready_for_a_vm_which_nobody_sends_does_not_have_it() {
    let (db, vm) = restored().await;
    let mut ready = shown(&vm, "h2", VmPhase::Incoming);
    ready.migration = Some(MigrationId::from_uuid(uuid::Uuid::from_u128(5)));
    ready.observation.power = None;
    let mut sent = ready.clone();
    sent.observation.phase = VmPhase::Outgoing;
    all_list(&db, [vec![], vec![sent], vec![]]).await;
    assert_eq!(kinds(&db), [Kind::MissingVm], "nor has one that it has left");
    lists(&db, "h2", vec![ready]).await;
    assert_eq!(kinds(&db), [Kind::MissingVm]);
    resumes(&db).await.unwrap();
    deletes(&db).await.unwrap();
}

#[tokio::test]
async fn a_waived_host_that_comes_back_gets_its_vms_again() {
    let (db, vm) = restored().await;
    db.transact(|tx| waive(tx, &host_name("h1"), "operator/test"))
        .await
        .unwrap();
    lists(&db, "h2", vec![]).await;
    lists(&db, "h3", vec![]).await;
    resumes(&db).await.unwrap();
    assert!(db.snapshot().vms[&vm.id].unconfirmed, "nobody has shown it");
    // What is asked for now would be lost with the host's own word on it.
    let caller = fixtures::caller();
    let stop = crate::verbs::power::Power::Stop {
        grace_period_seconds: 0,
    };
    let stopped = db
        .transact(|tx| crate::verbs::power::power(tx, &caller, "web", "", stop))
        .await;
    assert!(
        matches!(stopped, Err(crate::verbs::Error::Unconfirmed(_))),
        "{stopped:?}"
    );
    lists(&db, "h1", vec![shown(&vm, "h1", VmPhase::Settled)]).await;
    assert!(!db.snapshot().vms[&vm.id].unconfirmed);
}

#[tokio::test]
async fn a_vm_that_another_host_has_too_is_not_deleted_before_it_is_on_one() {
    let (db, vm) = restored().await;
    for host in ["h1", "h2"] {
        lists(&db, host, vec![shown(&vm, host, VmPhase::Settled)]).await;
    }
    lists(&db, "h3", vec![]).await;
    resumes(&db).await.unwrap();
    let refused = deletes(&db).await;
    let Err(crate::verbs::Error::SeveralHosts { owner, hosts, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!((owner, hosts), (host_name("h1"), vec![host_name("h2")]));
    assert!(db.snapshot().vms[&vm.id].delete_time.is_none());
    lists(&db, "h2", vec![]).await;
    deletes(&db).await.unwrap();
}

#[tokio::test]
async fn a_guest_that_lost_its_power_was_not_stopped_by_its_owner() {
    let (db, vm) = restored().await;
    let mut there = told(shown(&vm, "h1", VmPhase::Applying), PowerState::Running);
    there.observation.power = Some(PowerState::Stopped);
    all_list(&db, [vec![there], vec![], vec![]]).await;
    assert!(kinds(&db).is_empty(), "it is to run, as its host was told");
    resumes(&db).await.unwrap();
    let vm = db.snapshot().vms[&vm.id].clone();
    assert_eq!(vm.intent.power, PowerState::Running);
    assert_eq!(vm.intent.power_sequence, 5);
    assert_eq!(
        vm.spec.restart_policy,
        RestartPolicy::Never,
        "changed after the backup"
    );
}

#[tokio::test]
async fn a_disk_that_was_added_after_the_backup_is_taken_over_and_not_removed() {
    let (db, vm) = restored().await;
    let mut there = told(shown(&vm, "h1", VmPhase::Settled), PowerState::Running);
    let mut spec = vm.spec.clone();
    spec.vcpus = 3;
    spec.disks = fixtures::vm_of(&fixtures::image("12", 1), "web", "h1").spec.disks;
    there.told.as_mut().unwrap().spec = Some(spec.clone());
    all_list(&db, [vec![there], vec![], vec![]]).await;
    resumes(&db).await.unwrap();
    let vm = db.snapshot().vms[&vm.id].clone();
    assert!(vm.spec.same_hardware(&spec), "{:?}", vm.spec);
    assert_eq!(vm.change, None);
}

#[tokio::test]
async fn a_disk_that_moves_since_the_backup_has_room_in_both_pools() {
    let (db, vm) = restored().await;
    let mut there = told(shown(&vm, "h1", VmPhase::Settled), PowerState::Running);
    let mut spec = vm.spec.clone();
    spec.disks = fixtures::vm_of(&fixtures::image("12", 1), "web", "h1").spec.disks;
    let (disk, old) = (spec.disks[0].name.clone(), spec.disks[0].pool.clone());
    spec.disks[0].pool = "fast".to_owned();
    there.told.as_mut().unwrap().spec = Some(spec.clone());
    there.observation.pending = vec![crate::model::Pending {
        field: format!("disks[{disk}].pool"),
        current: old.clone(),
        wanted: "fast".to_owned(),
        message: String::new(),
    }];
    all_list(&db, [vec![there], vec![], vec![]]).await;
    resumes(&db).await.unwrap();
    let vm = db.snapshot().vms[&vm.id].clone();
    let change = vm.change.as_ref().unwrap();
    assert_eq!((change.left_out.len(), &change.left_out[0].pool), (1, &old));
    let held = vm.held().disks.len();
    assert_eq!(held, spec.disks.len() + 1);
}

#[tokio::test]
async fn what_its_owner_asked_for_before_the_backup_and_its_host_had_not_heard_stands() {
    let (db, vm) = restored().await;
    let mut vm = vm;
    // Generation 9 is what its host was told last.
    vm.backup_generation = Some(Generation(10));
    vm.intent.power_sequence = 6;
    let stored = vm.clone();
    db.change(|tx| tx.put_vm(stored)).await;
    let mut there = told(shown(&vm, "h1", VmPhase::Settled), PowerState::Stopped);
    there.observation.power = Some(PowerState::Stopped);
    all_list(&db, [vec![there], vec![], vec![]]).await;
    assert!(kinds(&db).is_empty(), "the start is still to come");
    resumes(&db).await.unwrap();
    let vm = db.snapshot().vms[&vm.id].clone();
    assert_eq!(
        (vm.intent.power, vm.intent.power_sequence),
        (PowerState::Running, 6)
    );
    assert_eq!(vm.backup_generation, None);
}

#[tokio::test]
async fn a_migration_that_a_loss_of_power_cut_short_turns_no_vm_off() {
    let (db, vm) = restored().await;
    let id = MigrationId::from_uuid(uuid::Uuid::from_u128(5));
    let part = |host, phase, power| {
        let mut shown = shown(&vm, host, phase);
        shown.observation.power = power;
        shown.migration = Some(id);
        told(shown, PowerState::Running)
    };
    let source = part("h1", VmPhase::Outgoing, Some(PowerState::Stopped));
    all_list(
        &db,
        [vec![source], vec![part("h2", VmPhase::Incoming, None)], vec![]],
    )
    .await;
    resumes(&db).await.unwrap();
    assert_eq!(db.snapshot().vms[&vm.id].intent.power, PowerState::Running);
}

/// h1 has sent the VM to h2, which has it for good, and has not tidied up.
fn sent(vm: &VmRecord) -> (Reported, Reported) {
    let mut source = told(shown(vm, "h1", VmPhase::Outgoing), PowerState::Running);
    source.migration = Some(MigrationId::from_uuid(uuid::Uuid::from_u128(5)));
    source.observation.power = Some(PowerState::Stopped);
    let mut there = told(shown(vm, "h2", VmPhase::Settled), PowerState::Stopped);
    there.observation.power = Some(PowerState::Stopped);
    there.observation.accepted = Generation(11);
    (source, there)
}

fn is_asked_for(state: &State, vm: &VmRecord) {
    let vm = &state.vms[&vm.id];
    let migration = state.active_migration(vm.id).unwrap();
    assert_eq!(
        (migration.phase, &migration.source, &migration.destination),
        (Phase::CuttingOver, &host_name("h1"), &host_name("h2"))
    );
    assert!(migration.destination_epoch > vm.epoch && state.sightings.is_empty());
    assert_eq!(state.active_operations(vm.id).len(), 1);
    assert_eq!(
        vm.intent.power,
        PowerState::Stopped,
        "told to the one that has it"
    );
}

#[tokio::test]
async fn what_was_asked_of_the_one_that_has_a_vm_counts_and_not_what_its_source_remembers() {
    let (db, vm) = restored().await;
    let (source, there) = sent(&vm);
    all_list(&db, [vec![source], vec![there], vec![]]).await;
    assert_eq!(kinds(&db), [Kind::Migrating]);
    resumes(&db).await.unwrap();
    is_asked_for(&db.snapshot(), &vm);
}

#[tokio::test]
async fn what_a_waived_host_had_not_tidied_up_after_a_migration_does_not_stay_for_ever() {
    let (db, vm) = restored().await;
    let (source, there) = sent(&vm);
    db.transact(|tx| waive(tx, &host_name("h1"), "operator/test"))
        .await
        .unwrap();
    lists(&db, "h2", vec![there]).await;
    lists(&db, "h3", vec![]).await;
    resumes(&db).await.unwrap();
    assert_eq!(db.snapshot().vms[&vm.id].owner, host_name("h2"));
    lists(&db, "h1", vec![source.clone()]).await;
    assert!(db.snapshot().active_migration(vm.id).is_none(), "said once");
    lists(&db, "h1", vec![source]).await;
    is_asked_for(&db.snapshot(), &vm);
}

/// A host's part in a migration, of which nothing of the VM is left there, or is.
fn part(vm: &VmRecord, host: &str, phase: VmPhase, migration: u128, power: Option<PowerState>) -> Reported {
    let mut part = shown(vm, host, phase);
    part.migration = Some(MigrationId::from_uuid(uuid::Uuid::from_u128(migration)));
    part.observation.power = power;
    part.observation.epoch = Epoch(if phase == VmPhase::Incoming { 8 } else { 7 });
    part
}

#[tokio::test]
async fn what_is_left_of_an_older_migration_does_not_hide_where_a_vm_is() {
    let (db, vm) = restored().await;
    let source = part(&vm, "h1", VmPhase::Outgoing, 5, None);
    let destination = part(&vm, "h2", VmPhase::Incoming, 5, Some(PowerState::Stopped));
    let mut older = part(&vm, "h3", VmPhase::Outgoing, 4, None);
    older.observation.epoch = Epoch(6);
    let other = source.clone();
    all_list(
        &db,
        [vec![source], vec![destination.clone()], vec![older.clone()]],
    )
    .await;
    assert_eq!(kinds(&db), [Kind::Migrating]);
    // It is no older one when ownership has not been settled since.
    older.observation.epoch = Epoch(7);
    lists(&db, "h3", vec![older]).await;
    assert_eq!(kinds(&db), [Kind::SeveralHosts]);
    // Nor is it empty where there is a domain.
    let mut older = part(&vm, "h3", VmPhase::Outgoing, 4, Some(PowerState::Stopped));
    older.observation.epoch = Epoch(6);
    all_list(&db, [vec![other], vec![destination], vec![older]]).await;
    assert_eq!(kinds(&db), [Kind::SeveralHosts]);
}

#[tokio::test]
async fn the_only_host_that_takes_part_in_a_vms_migration_is_asked_once_all_hosts_have_told_what_they_have() {
    for (phase, source, destination) in [(VmPhase::Outgoing, "h3", "h1"), (VmPhase::Incoming, "h1", "h3")] {
        let (db, vm) = restored().await;
        let only = part(&vm, "h3", phase, 5, Some(PowerState::Stopped));
        lists(&db, "h1", vec![]).await;
        lists(&db, "h3", vec![only]).await;
        assert_eq!(kinds(&db), [Kind::SeveralHosts], "h2 may have it");
        lists(&db, "h2", vec![]).await;
        assert_eq!(kinds(&db), [Kind::Migrating]);
        resumes(&db).await.unwrap();
        let state = db.snapshot();
        let migration = state.active_migration(vm.id).unwrap();
        assert_eq!(
            (&migration.source, &migration.destination),
            (&host_name(source), &host_name(destination))
        );
    }
}

#[tokio::test]
async fn what_the_one_that_has_a_vm_remembers_of_older_migrations_says_nothing_of_where_it_is() {
    let (db, vm) = restored().await;
    let source = part(&vm, "h1", VmPhase::Outgoing, 5, None);
    let there = part(&vm, "h2", VmPhase::Settled, 4, Some(PowerState::Stopped));
    all_list(&db, [vec![source], vec![there], vec![]]).await;
    assert_eq!(kinds(&db), [Kind::Migrating]);
    resumes(&db).await.unwrap();
    let id = MigrationId::from_uuid(uuid::Uuid::from_u128(5));
    assert_eq!(db.snapshot().active_migration(vm.id).unwrap().id, id);
}
