//! Changes of VMs that were made, against the simulated hypervisor: while they run and while they are off, with guests that do not
//! go along, and with agents that die on the way.

use dalgu_proto::vm::Disk;
use fastrand::Rng;

use super::{super::plan::changes::GRAIN_MIB, *};
use crate::hypervisor::{Attached, Hardware};

/// A VM that runs, with room for changes.
fn first() -> Intent {
    let mut first = intent(1, PowerState::Running);
    first.spec.max_vcpus = Some(8);
    first.spec.max_memory_mib = Some(1024);
    first
}

fn disk(name: &str, size_mib: u64) -> Disk {
    Disk {
        name: name.into(),
        size_mib,
        ..first().spec.disks[0].clone()
    }
}

/// The same power request, and the next generation.
fn next(before: &Intent, change: impl FnOnce(&mut Spec)) -> Intent {
    let mut after = before.clone();
    after.generation = before.generation.next();
    change(&mut after.spec);
    after
}

async fn hardware(host: &Host, id: VmId) -> Hardware {
    host.sim.hardware(id).await.unwrap().unwrap()
}

async fn made(host: &Host) -> (VmId, Intent) {
    let id = vm(1);
    host.create(id, first()).await;
    host.until_settled(id, 1).await;
    (id, first())
}

#[tokio::test(start_paused = true)]
async fn a_running_vm_is_changed_without_a_restart() {
    let host = one_host().await;
    let (id, before) = made(&host).await;
    let grown = next(&before, |spec| {
        spec.vcpus = 4;
        spec.memory_mib = 512;
        spec.disks[0].size_mib = 16;
        spec.disks.push(disk("data", 32));
    });
    host.create(id, grown.clone()).await;
    let status = host.until_settled(id, 2).await;
    assert_eq!(status.pending, []);
    let has = hardware(&host, id).await;
    assert_eq!((has.vcpus, has.memory_mib), (4, 512));
    assert_eq!((has.disks["root"].size_mib, has.disks["data"].size_mib), (16, 32));
    assert_eq!((host.sim.local_volumes(), host.sim.run(id)), (2, Some(1)));
    let back = next(&grown, |spec| {
        spec.vcpus = 1;
        spec.memory_mib = 64;
        spec.disks.truncate(1);
    });
    host.create(id, back).await;
    assert_eq!(host.until_settled(id, 3).await.pending, []);
    let has = hardware(&host, id).await;
    assert_eq!((has.vcpus, has.memory_mib, has.disks.len()), (1, 64, 1));
    assert_eq!((host.sim.local_volumes(), host.sim.run(id)), (1, Some(1)));
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_had_without_a_restart_is_told_and_comes_with_the_next_start() {
    let host = one_host().await;
    let (id, before) = made(&host).await;
    let larger = next(&before, |spec| {
        spec.vcpus = 16;
        spec.max_vcpus = None;
        spec.max_memory_mib = Some(2048);
    });
    host.create(id, larger.clone()).await;
    let status = host.until_settled(id, 2).await;
    let told: Vec<_> = status
        .pending
        .iter()
        .map(|pending| pending.field.as_str())
        .collect();
    assert_eq!(told, ["vcpus", "max_memory_mib"]);
    assert_eq!(hardware(&host, id).await.vcpus, 1);
    let mut off = next(&larger, |_| {});
    (off.power, off.power_sequence) = (PowerState::Stopped, 2);
    host.create(id, off.clone()).await;
    assert_eq!(host.until_settled(id, 3).await.pending, []);
    let mut on = next(&off, |_| {});
    (on.power, on.power_sequence) = (PowerState::Running, 3);
    host.create(id, on).await;
    assert_eq!(host.until_settled(id, 4).await.pending, []);
    let has = hardware(&host, id).await;
    assert_eq!((has.vcpus, has.max_memory_mib), (16, 2048));
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_the_guest_holds_stays_whole_and_goes_when_it_lets_go() {
    let host = one_host().await;
    let (id, before) = made(&host).await;
    let more = next(&before, |spec| spec.disks.push(disk("data", 32)));
    host.create(id, more.clone()).await;
    host.until_settled(id, 2).await;
    host.sim.set_behaviour(id, Behaviour::Ignores);
    let less = next(&more, |spec| spec.disks.truncate(1));
    host.create(id, less).await;
    let held = host.until_settled(id, 3).await;
    assert!(
        held.pending[0].message.starts_with("DISK_IN_USE_BY_GUEST"),
        "{:?}",
        held.pending
    );
    assert_eq!(host.sim.local_volumes(), 2);
    host.sim.set_behaviour(id, Behaviour::default());
    host.until(id, "let go", |status| status.pending.is_empty()).await;
    host.until_settled(id, 3).await;
    assert_eq!(host.sim.local_volumes(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_lost_disk_is_never_replaced_by_a_blank_one_when_another_is_added() {
    let host = one_host().await;
    let (id, before) = made(&host).await;
    let mut off = next(&before, |_| {});
    (off.power, off.power_sequence) = (PowerState::Stopped, 2);
    host.create(id, off.clone()).await;
    host.until_settled(id, 2).await;
    host.sim.lose_volumes(id);
    let more = next(&off, |spec| spec.disks.push(disk("data", 32)));
    host.create(id, more).await;
    host.until_settled(id, 3).await;
    assert_eq!(host.sim.local_volumes(), 1, "the added one alone");
}

/// What the model of a random history knows.
struct Model {
    intent: Intent,
    /// Names that were given, so that none is given twice.
    named: u32,
}

impl Model {
    fn change(&mut self, rng: &mut Rng) {
        let named = &mut self.named;
        self.intent = next(&self.intent, |spec| match rng.u8(..9) {
            // One that has not come yet does not move: the controller sees to that.
            6 | 7 => {
                spec.disks[0].pool = ["local", "fast", "slow"][rng.usize(..3)].to_owned();
            }
            8 => spec.disks[0].limits.write_iops = Some(rng.u64(1..100)).filter(|most| *most > 30),
            0 => spec.vcpus = rng.u32(1..=8),
            1 => spec.memory_mib = rng.u64(32..=512) * 2,
            2 | 3 if spec.disks.len() < 6 => {
                *named += 1;
                spec.disks.push(disk(&format!("d{named}"), rng.u64(1..64)));
            }
            4 if spec.disks.len() > 1 => {
                let place = rng.usize(1..spec.disks.len());
                spec.disks.remove(place);
            }
            _ => {
                let place = rng.usize(..spec.disks.len());
                spec.disks[place].size_mib += rng.u64(1..16);
            }
        });
    }

    fn power(&mut self, power: PowerState) {
        self.intent = next(&self.intent, |_| {});
        self.intent.power = power;
        self.intent.power_sequence += 1;
    }
}

/// Faults that a call may suffer.
fn fault(rng: &mut Rng) -> (Call, Fault) {
    let calls = [
        Call::Change,
        Call::CreateVolumes,
        Call::DeleteVolume,
        Call::Define,
        Call::Hardware,
        Call::Start,
    ];
    let error = HypervisorError::Unavailable {
        detail: "ordered by the test".into(),
    };
    let fault = match rng.bool() {
        true => Fault::Error(error),
        false => Fault::TakesEffect(error),
    };
    (calls[rng.usize(..calls.len())], fault)
}

async fn history(seed: u64) {
    let mut rng = Rng::with_seed(seed);
    let mut host = one_host().await;
    let (id, intent) = made(&host).await;
    let mut model = Model { intent, named: 0 };
    for _ in 0..rng.usize(4..16) {
        match rng.u8(..8) {
            0..4 => model.change(&mut rng),
            4 => model.power(PowerState::Stopped),
            5 => model.power(PowerState::Running),
            6 => {
                let (call, fault) = fault(&mut rng);
                host.sim.fail_next(call, fault);
                continue;
            }
            _ => {
                host.restart_agent("boot-1").await;
                continue;
            }
        }
        host.create(id, model.intent.clone()).await;
        if rng.bool() {
            tokio::time::sleep(Duration::from_millis(rng.u64(..3000))).await;
        }
    }
    host.sim.forget_faults();
    host.restart_agent("boot-1").await;
    let wanted = &model.intent;
    host.until_settled(id, wanted.generation.0).await;
    let mut has = hardware(&host, id).await;
    let disks = wanted.spec.disks.iter();
    let names: Vec<_> = disks
        .map(|disk| (disk.name.clone(), Attached::of(disk)))
        .collect();
    let there = |has: &Hardware| {
        let wanted = |name: &&String| names.iter().any(|(other, _)| other == *name);
        let disks = has.disks.iter().filter(|(name, _)| wanted(name));
        disks
            .map(|(name, disk)| (name.clone(), disk.clone()))
            .collect::<Vec<_>>()
    };
    let mut sorted = names.clone();
    sorted.sort_by_key(|(name, _)| name.clone());
    // The VM is settled while a disk moves, and one that has moved grows after that.
    let memory = |has: &Hardware| {
        let told = host.vms.get(id).unwrap().status().pending;
        let pending = told.iter().any(|pending| pending.field == "memory_mib");
        // A little less or more is as good.
        pending || has.memory_mib.abs_diff(wanted.spec.memory_mib) < GRAIN_MIB
    };
    for _ in 0..600 {
        if there(&has) == sorted && has.vcpus == wanted.spec.vcpus && memory(&has) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        has = hardware(&host, id).await;
    }
    assert_eq!(
        there(&has),
        sorted,
        "seed {seed}: each disk is in its pool, as large as asked for and limited so"
    );
    assert_eq!(has.vcpus, wanted.spec.vcpus, "seed {seed}");
    assert!(memory(&has), "seed {seed}: {has:?}");
    host.until_settled(id, wanted.generation.0).await;
    // No disk is left over.
    until_volumes(&host, names.len()).await;
}

#[tokio::test(start_paused = true)]
async fn random_changes_starts_stops_and_crashes_end_where_the_last_request_says() {
    for seed in 0..100 {
        history(seed).await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_dies_after_a_disk_was_plugged_in_does_not_make_it_twice() {
    let mut host = one_host().await;
    let (id, before) = made(&host).await;
    let error = HypervisorError::Timeout {
        call: "change_hardware",
        after: Duration::ZERO,
    };
    host.sim.fail_next(Call::Change, Fault::TakesEffect(error));
    let more = next(&before, |spec| spec.disks.push(disk("data", 32)));
    host.create(id, more).await;
    host.restart_agent("boot-1").await;
    host.until_settled(id, 2).await;
    assert_eq!(host.sim.local_volumes(), 2);
    assert_eq!(hardware(&host, id).await.disks.len(), 2);
}

/// What is left over goes right after the word that nothing is pending.
async fn until_volumes(host: &Host, wanted: usize) {
    let reached = async {
        while host.sim.local_volumes() != wanted {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(60), reached).await;
    assert!(
        waited.is_ok(),
        "{} volumes, not {wanted}",
        host.sim.local_volumes()
    );
}

/// The same VM with its disk in another pool.
fn elsewhere(before: &Intent, pool: &str) -> Intent {
    next(before, |spec| spec.disks[0].pool = pool.to_owned())
}

fn pool(has: &Hardware) -> Option<&str> {
    has.disks["root"].pool.as_deref()
}

#[tokio::test(start_paused = true)]
async fn a_disk_moves_while_the_vm_is_settled_and_other_work_gets_through() {
    let host = one_host().await;
    let (id, before) = made(&host).await;
    let moved = elsewhere(&before, "fast");
    host.create(id, moved.clone()).await;
    let status = host.until_settled(id, 2).await;
    assert_eq!(status.pending[0].field, "disks[root].pool");
    assert_eq!(pool(&hardware(&host, id).await), Some("local"));
    // A power-off and a start come between, and the copy is begun again each time.
    for (generation, power) in [(3, PowerState::Stopped), (4, PowerState::Running)] {
        let mut after = elsewhere(&before, "fast");
        after.generation = Generation(generation);
        (after.power, after.power_sequence) = (power, generation);
        host.create(id, after).await;
        let status = host.until_settled(id, generation).await;
        assert!(!status.pending.is_empty(), "{power:?}");
    }
    host.until(id, "moved", |status| status.pending.is_empty()).await;
    assert_eq!(pool(&hardware(&host, id).await), Some("fast"));
    until_volumes(&host, 1).await;
    assert_eq!(host.sim.run(id), Some(2));
    let defined = host.sim.definition(id).unwrap();
    assert_eq!(defined.spec.disks[0].pool, "fast");
}

#[tokio::test(start_paused = true)]
async fn a_move_that_fails_leaves_the_vm_settled_in_the_old_pool_and_says_why() {
    let host = one_host().await;
    let (id, before) = made(&host).await;
    let full = HypervisorError::Storage {
        pool: "fast".into(),
        detail: "3 MiB are free".into(),
    };
    host.sim.fail_next(Call::Change, Fault::Error(full));
    host.create(id, elsewhere(&before, "fast")).await;
    let status = host.until_settled(id, 2).await;
    let told = &status.pending[0];
    assert!(told.message.contains("3 MiB are free"), "{told:?}");
    assert_eq!(pool(&hardware(&host, id).await), Some("local"));
    tokio::time::sleep(plan::changes::MOVE_AGAIN).await;
    host.until(id, "moved later", |status| status.pending.is_empty())
        .await;
    until_volumes(&host, 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_is_called_back_leaves_nothing_in_the_other_pool() {
    let mut host = one_host().await;
    let (id, before) = made(&host).await;
    let moved = elsewhere(&before, "fast");
    host.create(id, moved.clone()).await;
    host.until_settled(id, 2).await;
    host.restart_agent("boot-1").await;
    host.create(id, elsewhere(&moved, "local")).await;
    host.until(id, "called back", |status| status.pending.is_empty())
        .await;
    until_volumes(&host, 1).await;
    assert_eq!(pool(&hardware(&host, id).await), Some("local"));
}
