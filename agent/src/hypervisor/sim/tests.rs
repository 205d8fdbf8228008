//! The simulated hypervisor keeps the contract, and breaks it exactly where it is told to.

use std::{collections::BTreeSet, path::Path, sync::Arc, time::Duration};

use dalgu_proto::{
    ids::{ClusterId, VmId},
    vm::{CloneMode, Disk, DiskFormat, Nic, Plug, PowerReason, RestartPolicy, Spec},
};
use uuid::Uuid;

use super::*;
use crate::hypervisor::{DomainState, contract};

fn spec() -> Spec {
    let disk = |name: &str, pool: &str| Disk {
        name: name.into(),
        size_mib: 64,
        pool: pool.into(),
        image: None,
        format: DiskFormat::Qcow2,
        digest: None,
        clone_mode: CloneMode::Any,
        volume: None,
        limits: Default::default(),
        backup: None,
    };
    Spec {
        vcpus: 2,
        memory_mib: 512,
        disks: vec![disk("root", "local"), disk("data", "shared")],
        nics: vec![Nic {
            name: "net0".into(),
            plug: Plug::Bridge { bridge: "br0".into() },
            mac: String::new(),
            reserved_mbit: None,
        }],
        kernel_boot: None,
        restart_policy: RestartPolicy::OnFailure,
        host_selector: Default::default(),
        first_boot: None,
        firmware: Default::default(),
        tpm: false,
        max_vcpus: None,
        max_memory_mib: None,
        fitting: Default::default(),
        devices: Default::default(),
    }
}

fn fixture(cluster: ClusterId) -> contract::Fixture {
    contract::Fixture {
        cluster,
        spec: spec(),
        documents: Default::default(),
        guests_obey: true,
        has_volumes: true,
        image: Some("ab".repeat(32).parse().unwrap()),
        other_pool: Some("fast".into()),
        moves_running: true,
        has_usage: true,
        booted_line: None,
        patience: Duration::from_secs(60),
    }
}

fn cluster() -> ClusterId {
    ClusterId::from_uuid(Uuid::new_v4())
}

fn alone() -> (Sim, contract::Fixture) {
    let cluster = cluster();
    (Sim::new(SimConfig::new(cluster)).unwrap(), fixture(cluster))
}

fn two(dir: &Path) -> (Sim, Sim, contract::Fixture) {
    two_over(Arc::new(UnixLines), dir)
}

fn two_in_memory() -> (Sim, Sim, contract::Fixture) {
    two_over(Arc::new(MemoryLines::default()), Path::new("/memory"))
}

fn two_over(lines: Arc<dyn Lines>, dir: &Path) -> (Sim, Sim, contract::Fixture) {
    let cluster = cluster();
    let mut config = SimConfig::new(cluster);
    config.lines = lines;
    config.shared_pools = BTreeSet::from(["shared".to_owned()]);
    config.rate_bytes_per_second = 1 << 30;
    let mut other = config.clone();
    config.control_socket = Some(dir.join("a"));
    other.control_socket = Some(dir.join("b"));
    (
        Sim::new(config).unwrap(),
        Sim::new(other).unwrap(),
        fixture(cluster),
    )
}

fn pair<'a>(source: &'a Sim, destination: &'a Sim, fixture: &'a contract::Fixture) -> contract::Pair<'a> {
    contract::Pair {
        source,
        destination,
        control: destination.control_socket().to_owned(),
        memory: "unused".into(),
        disks: "unused".into(),
        fixture,
        slow_mib_per_second: 10,
    }
}

async fn running(sim: &Sim, fixture: &contract::Fixture) -> Definition {
    let vm = fixture.new_vm();
    sim.create_volumes(&vm, false).await.unwrap();
    sim.define(&vm).await.unwrap();
    sim.start(vm.id).await.unwrap();
    vm
}

async fn state(sim: &Sim, id: VmId) -> Option<DomainState> {
    sim.get(id).await.unwrap().map(|domain| domain.state)
}

#[tokio::test(start_paused = true)]
async fn keeps_the_contract() {
    let (sim, fixture) = alone();
    assert_eq!(fixture.check(&sim).await, []);
    assert_eq!(sim.list().await.unwrap(), []);
    assert_eq!(sim.local_volumes(), 0);
}

#[tokio::test(start_paused = true)]
async fn keeps_the_contract_with_lifelike_delays() {
    let cluster = cluster();
    let config = SimConfig {
        delays: Delays::LIFELIKE,
        ..SimConfig::new(cluster)
    };
    let sim = Sim::new(config).unwrap();
    assert_eq!(fixture(cluster).check(&sim).await, []);
}

#[tokio::test]
async fn keeps_the_contract_of_migration() {
    let dir = tempfile::tempdir().unwrap();
    let (source, destination, fixture) = two(dir.path());
    keep_the_contract_of_migration(source, destination, fixture).await;
}

#[tokio::test(start_paused = true)]
async fn keeps_the_contract_of_migration_in_memory() {
    let (source, destination, fixture) = two_in_memory();
    keep_the_contract_of_migration(source, destination, fixture).await;
}

async fn keep_the_contract_of_migration(source: Sim, destination: Sim, fixture: contract::Fixture) {
    assert_eq!(pair(&source, &destination, &fixture).check().await, []);
    assert_eq!(source.list().await.unwrap(), []);
    assert_eq!(destination.list().await.unwrap(), []);
    assert_eq!((source.local_volumes(), destination.local_volumes()), (0, 0));
    assert_eq!(source.0.config.shared_storage.count(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_foreign_domain_is_not_touched() {
    let (sim, fixture) = alone();
    let id = VmId::from_uuid(Uuid::new_v4());
    sim.add_foreign(id, "the mayor's own");
    assert_eq!(
        contract::a_foreign_domain_is_not_touched(&sim, &fixture, id).await,
        Ok(())
    );
}

#[tokio::test(start_paused = true)]
async fn faults_strike_once_and_in_order() {
    let (sim, fixture) = alone();
    let vm = running(&sim, &fixture).await;
    let error = Error::Failed {
        call: "pause",
        code: 1,
        detail: "ordered".into(),
    };
    sim.fail_next(Call::Pause, Fault::Error(error.clone()));
    sim.fail_next(Call::Pause, Fault::Hang);
    assert_eq!(sim.pause(vm.id).await, Err(error));
    assert_eq!(state(&sim, vm.id).await, Some(DomainState::Running));
    let after = Duration::from_secs(30);
    assert_eq!(
        sim.pause(vm.id).await,
        Err(Error::Timeout { call: "pause", after })
    );
    assert_eq!(sim.pause(vm.id).await, Ok(()));
}

#[tokio::test(start_paused = true)]
async fn a_call_of_unknown_outcome_takes_effect() {
    let (sim, fixture) = alone();
    let vm = fixture.new_vm();
    sim.create_volumes(&vm, false).await.unwrap();
    sim.define(&vm).await.unwrap();
    let error = Error::Timeout {
        call: "start",
        after: Duration::from_secs(120),
    };
    sim.fail_next(Call::Start, Fault::TakesEffect(error.clone()));
    assert_eq!(sim.start(vm.id).await, Err(error));
    assert_eq!(state(&sim, vm.id).await, Some(DomainState::Running));
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_ignores_requests_runs_until_it_is_destroyed() {
    let (sim, fixture) = alone();
    let vm = running(&sim, &fixture).await;
    sim.set_behaviour(vm.id, Behaviour::Ignores);
    sim.shutdown(vm.id).await.unwrap();
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(state(&sim, vm.id).await, Some(DomainState::Running));
    sim.destroy(vm.id).await.unwrap();
    assert_eq!(state(&sim, vm.id).await, Some(DomainState::Stopped));
}

#[tokio::test(start_paused = true)]
async fn a_crash_of_an_earlier_run_does_not_end_a_later_one() {
    let (sim, fixture) = alone();
    let vm = fixture.new_vm();
    sim.create_volumes(&vm, false).await.unwrap();
    sim.define(&vm).await.unwrap();
    sim.set_behaviour(vm.id, Behaviour::Crashes(Duration::from_secs(10)));
    sim.start(vm.id).await.unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    sim.destroy(vm.id).await.unwrap();
    sim.start(vm.id).await.unwrap();
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(state(&sim, vm.id).await, Some(DomainState::Running));
    tokio::time::sleep(Duration::from_secs(5)).await;
    let domain = sim.get(vm.id).await.unwrap().unwrap();
    assert_eq!(
        (domain.state, domain.reason),
        (DomainState::Stopped, PowerReason::Crashed)
    );
}

#[tokio::test(start_paused = true)]
async fn a_power_cut_leaves_a_domain_with_what_its_next_start_brings() {
    let (sim, fixture) = alone();
    let mut vm = running(&sim, &fixture).await;
    vm.spec.disks.retain(|disk| disk.name != "data");
    sim.define(&vm).await.unwrap();
    let disks = async || {
        let hardware = sim.hardware(vm.id).await.unwrap().unwrap();
        hardware.disks.into_keys().collect::<Vec<_>>()
    };
    assert_eq!(disks().await, ["data", "root"], "it runs with what it has");
    sim.reboot_host();
    assert_eq!(disks().await, ["root"]);
}

#[tokio::test(start_paused = true)]
async fn a_restart_fails_calls_under_way_and_leaves_guests_alone() {
    let cluster = cluster();
    let config = SimConfig {
        stepping: Stepping::ByHand,
        ..SimConfig::new(cluster)
    };
    let sim = Sim::new(config).unwrap();
    let vm = fixture(cluster).new_vm();
    let mut hints = sim.hints();
    let define = tokio::spawn({
        let (sim, vm) = (sim.clone(), vm.clone());
        async move { sim.define(&vm).await }
    });
    tokio::task::yield_now().await;
    sim.restart();
    assert!(define.await.unwrap().unwrap_err().outcome_unknown());
    assert_eq!(hints.recv().await, Ok(Hint::All));
    assert_eq!(
        sim.get(vm.id).await,
        Ok(None),
        "a call that waits for its step has no effect yet"
    );
    sim.step(1);
    assert_eq!(sim.define(&vm).await, Ok(()));
}

#[tokio::test(start_paused = true)]
async fn nothing_answers_while_it_is_gone() {
    let (sim, fixture) = alone();
    let vm = running(&sim, &fixture).await;
    sim.disconnect("gone fishing");
    assert!(matches!(sim.list().await, Err(Error::Unavailable { .. })));
    assert_eq!(
        *sim.connection().borrow(),
        Connection::Down("gone fishing".into())
    );
    sim.reconnect();
    assert_eq!(state(&sim, vm.id).await, Some(DomainState::Running));
}

#[tokio::test(start_paused = true)]
async fn a_broken_migration_leaves_one_owner_or_says_that_it_cannot_tell() {
    use DomainState::{HandedOver, Paused, Running};
    let table = [
        (Phase::Prepare, Some(Running), None),
        (Phase::Transfer, Some(Running), None),
        (Phase::Handover, Some(Running), None),
        (Phase::Locked, Some(Paused), None),
        (Phase::Finish, Some(HandedOver), Some(Running)),
        (Phase::Confirm, None, Some(Running)),
    ];
    for (phase, here, there) in table {
        let (source, destination, fixture) = two_in_memory();
        let pair = pair(&source, &destination, &fixture);
        let vm = pair.make().await.unwrap();
        source.break_migration_at(phase);
        source.migrate(&pair.order(&vm)).await.unwrap_err();
        contract::eventually(
            &format!("both sides settled after {phase:?}"),
            Duration::from_secs(5),
            async || Ok((state(&source, vm.id).await, state(&destination, vm.id).await) == (here, there)),
        )
        .await
        .unwrap();
        assert_eq!(source.progress(vm.id).await, Ok(None));
    }
}

#[tokio::test(start_paused = true)]
async fn a_handed_over_domain_neither_resumes_nor_starts() {
    let (source, destination, fixture) = two_in_memory();
    let pair = pair(&source, &destination, &fixture);
    let vm = pair.make().await.unwrap();
    source.break_migration_at(Phase::Finish);
    source.migrate(&pair.order(&vm)).await.unwrap_err();
    assert!(matches!(
        source.resume(vm.id).await,
        Err(Error::WrongState { .. })
    ));
    assert!(matches!(source.start(vm.id).await, Err(Error::WrongState { .. })));
    source.destroy(vm.id).await.unwrap();
    source.undefine(vm.id).await.unwrap();
    source.delete_volumes(vm.id, true).await.unwrap();
    contract::eventually("running at the destination", Duration::from_secs(5), async || {
        Ok(state(&destination, vm.id).await == Some(DomainState::Running))
    })
    .await
    .unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_restart_of_either_hypervisor_leaves_the_vm_with_the_source() {
    for destination_restarts in [false, true] {
        let (source, destination, fixture) = two_in_memory();
        let pair = pair(&source, &destination, &fixture);
        let vm = pair.make().await.unwrap();
        let mut order = pair.order(&vm);
        order.bandwidth_mib_per_second = 10;
        let restart = async {
            contract::eventually("a transfer", Duration::from_secs(5), async || {
                Ok(source
                    .progress(vm.id)
                    .await
                    .unwrap()
                    .is_some_and(|progress| progress.elapsed_ms > 0))
            })
            .await
            .unwrap();
            if destination_restarts {
                destination.restart()
            } else {
                source.restart()
            }
        };
        let (result, ()) = tokio::join!(source.migrate(&order), restart);
        assert!(result.is_err());
        assert_eq!(state(&source, vm.id).await, Some(DomainState::Running));
        contract::eventually("nothing at the destination", Duration::from_secs(5), async || {
            Ok(state(&destination, vm.id).await.is_none())
        })
        .await
        .unwrap();
    }
}

#[tokio::test]
async fn a_guests_count_goes_on_at_the_destination() {
    let dir = tempfile::tempdir().unwrap();
    let (source, destination) = (dir.path().join("a"), dir.path().join("b"));
    let cluster = cluster();
    let make = |place: &Path| {
        std::fs::create_dir(place).unwrap();
        let config = SimConfig {
            control_socket: Some(place.join("control")),
            console_dir: Some(place.to_owned()),
            console_interval: Duration::from_millis(10),
            shared_pools: BTreeSet::from(["shared".to_owned()]),
            ..SimConfig::new(cluster)
        };
        Sim::new(config).unwrap()
    };
    let (source, destination) = (make(&source), make(&destination));
    let fixture = contract::Fixture {
        booted_line: Some("tick 5\n".into()),
        ..fixture(cluster)
    };
    let pair = pair(&source, &destination, &fixture);
    let vm = pair.make().await.unwrap();
    source.migrate(&pair.order(&vm)).await.unwrap();
    let there = contract::Fixture {
        booted_line: Some("tick ".into()),
        ..fixture.clone()
    };
    contract::booted(&destination, &there, vm.id).await.unwrap();
    destination.pause(vm.id).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let read = |sim: &Sim| std::fs::read_to_string(sim.console_log(vm.id).unwrap()).unwrap();
    let text = read(&source) + &read(&destination);
    let counts: Vec<u64> = text
        .lines()
        .filter_map(|line| line.strip_prefix("tick ")?.parse().ok())
        .collect();
    let expected: Vec<u64> = (1..=counts.len() as u64).collect();
    assert_eq!(counts, expected, "every count once, in order");
}

#[tokio::test(start_paused = true)]
async fn a_thousand_guests_use_their_host_plausibly() {
    let (sim, fixture) = alone();
    for _ in 0..1000 {
        running(&sim, &fixture).await;
    }
    tokio::time::sleep(Duration::from_secs(60)).await;
    let first = sim.usage().await.unwrap();
    assert_eq!(first.len(), 1000);
    tokio::time::sleep(Duration::from_secs(60)).await;
    for ((_, first), (_, second)) in first.iter().zip(&sim.usage().await.unwrap()) {
        let busy = (second.cpu_seconds_total - first.cpu_seconds_total) / 60.0;
        assert!((0.0..=2.0).contains(&busy), "{busy} processors of 2");
        assert!(second.memory_resident_bytes <= second.memory_balloon_bytes);
    }
}
