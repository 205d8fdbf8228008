//! Calls that take effect long after their caller has given them up.

use super::{super::steps::POWER_OFF_PATIENCE, *};

/// A call's late effect comes so long after its deadline.
const LATE: Duration = Duration::from_mins(1);

fn waits(status: &Status) -> bool {
    let failure = status.failure.as_ref();
    failure.is_some_and(|failure| failure.reason == "HYPERVISOR_TIMEOUT" && failure.retrying)
}

async fn stays(host: &Host, id: VmId, state: Option<DomainState>) {
    for _ in 0..60 {
        let now = host.sim.get(id).await.unwrap().map(|domain| domain.state);
        assert_eq!(now, state);
        sleep(Duration::from_secs(5)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_start_that_takes_effect_after_a_stop_was_asked_does_not_outlive_the_stop() {
    let host = one_host().await;
    let id = vm(1);
    host.sim.fail_next(Call::Start, Fault::Late(LATE));
    host.create(id, intent(1, PowerState::Running)).await;
    host.until(id, "waiting", waits).await;
    host.create(id, intent(2, PowerState::Stopped)).await;
    sleep(LATE / 2).await;
    let status = host.vms.get(id).unwrap().status();
    assert_ne!(status.phase, Phase::Settled, "it may still start");
    assert!(waits(&status), "it does not say what it waits for: {status:?}");
    let status = host.until_settled(id, 2).await;
    assert_eq!(status.power, Some(PowerState::Stopped));
    stays(&host, id, Some(DomainState::Stopped)).await;
}

#[tokio::test(start_paused = true)]
async fn a_power_off_that_takes_effect_after_a_start_was_asked_does_not_outlive_the_start() {
    let host = one_host().await;
    let id = vm(1);
    host.create(id, intent(1, PowerState::Running)).await;
    host.until_settled(id, 1).await;
    let at_once = Intent {
        grace_period_seconds: 0,
        ..intent(2, PowerState::Stopped)
    };
    host.sim.fail_next(Call::Destroy, Fault::Late(LATE));
    host.create(id, at_once).await;
    sleep(Duration::from_secs(1)).await;
    host.create(id, intent(3, PowerState::Running)).await;
    assert_eq!(host.until_settled(id, 3).await.power, Some(PowerState::Running));
    stays(&host, id, Some(DomainState::Running)).await;
}

#[tokio::test(start_paused = true)]
async fn a_definition_that_takes_effect_after_the_deletion_was_asked_is_deleted_too() {
    let host = one_host().await;
    let id = vm(1);
    host.sim.fail_next(Call::Define, Fault::Late(LATE));
    host.create(id, intent(1, PowerState::Running)).await;
    host.until(id, "waiting", waits).await;
    let handle = host.vms.get(id).unwrap();
    handle.delete(Generation(2), Epoch(1)).await.unwrap();
    sleep(LATE / 2).await;
    assert_eq!(
        handle.status().phase,
        Phase::Deleting,
        "something may still appear"
    );
    host.until(id, "gone", |status| status.phase == Phase::Gone).await;
    stays(&host, id, None).await;
    assert_eq!(host.sim.local_volumes(), 0);
}

/// libvirtd dies while it starts the guest: QEMU is left frozen, and nothing lets it go on.
async fn half_started(host: &Host, id: VmId) {
    for _ in 0..20 {
        host.sim.fail_next(Call::Resume, Fault::Hang);
    }
    host.sim.start(id).await.unwrap();
    host.sim.pause(id).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_guest_whose_start_was_cut_short_and_that_does_not_go_on_is_started_anew() {
    let host = one_host().await;
    let id = vm(1);
    host.sim.fail_next(Call::Start, Fault::Hang);
    host.create(id, intent(1, PowerState::Running)).await;
    sleep(Duration::from_secs(1)).await;
    half_started(&host, id).await;
    let status = host.until_settled(id, 1).await;
    assert_eq!(status.power, Some(PowerState::Running));
    stays(&host, id, Some(DomainState::Running)).await;
}

#[tokio::test(start_paused = true)]
async fn a_restart_after_a_crash_that_was_cut_short_is_made_anew() {
    let host = one_host().await;
    let id = vm(1);
    host.create(id, intent(1, PowerState::Running)).await;
    host.until_settled(id, 1).await;
    host.sim.fail_next(Call::Start, Fault::Hang);
    host.sim.crash_guest(id);
    sleep(Duration::from_secs(3)).await;
    half_started(&host, id).await;
    host.until(id, "running", |status| status.power == Some(PowerState::Running))
        .await;
    stays(&host, id, Some(DomainState::Running)).await;
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_has_run_is_never_powered_off_because_it_cannot_be_let_go_on() {
    let host = one_host().await;
    let id = vm(1);
    host.create(id, intent(1, PowerState::Running)).await;
    host.until_settled(id, 1).await;
    host.sim.pause(id).await.unwrap();
    for _ in 0..3 {
        host.sim.fail_next(Call::Resume, Fault::Hang);
    }
    let resume = Intent {
        power_sequence: 2,
        ..intent(2, PowerState::Running)
    };
    host.create(id, resume).await;
    host.until(id, "waiting", waits).await;
    for _ in 0..100 {
        let now = host.sim.get(id).await.unwrap().map(|domain| domain.state);
        assert_ne!(now, Some(DomainState::Stopped));
        sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(host.until_settled(id, 2).await.power, Some(PowerState::Running));
}

#[tokio::test(start_paused = true)]
async fn a_forced_stop_and_a_deletion_do_not_wait_for_a_call_that_hangs() {
    for (call, power) in [
        (Call::Pause, PowerState::Paused),
        (Call::Start, PowerState::Running),
    ] {
        for delete in [false, true] {
            let host = one_host().await;
            let id = vm(1);
            if call == Call::Pause {
                host.create(id, intent(1, PowerState::Running)).await;
                host.until_settled(id, 1).await;
            }
            host.sim.fail_next(call, Fault::Late(LATE));
            host.create(id, intent(2, power)).await;
            sleep(POWER_OFF_PATIENCE).await;
            let asked = Instant::now();
            if delete {
                let handle = host.vms.get(id).unwrap();
                handle.delete(Generation(3), Epoch(1)).await.unwrap();
            } else {
                let off = Intent {
                    grace_period_seconds: 0,
                    ..intent(3, PowerState::Stopped)
                };
                host.create(id, off).await;
            }
            if call == Call::Pause {
                let running = || {
                    host.sim
                        .domains()
                        .iter()
                        .any(|seen| seen.1 == DomainState::Running)
                };
                while running() {
                    sleep(Duration::from_millis(10)).await;
                }
                assert!(
                    asked.elapsed() < POWER_OFF_PATIENCE,
                    "it took {:?}",
                    asked.elapsed()
                );
            }
            // What was given up may still take effect, and nothing counts as done before.
            sleep(LATE / 2).await;
            assert_ne!(host.vms.get(id).unwrap().status().phase, Phase::Settled);
            if delete {
                host.until(id, "gone", |status| status.phase == Phase::Gone).await;
                stays(&host, id, None).await;
            } else {
                host.until_settled(id, 3).await;
                stays(&host, id, Some(DomainState::Stopped)).await;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_stop_that_gives_the_guest_its_time_waits_for_the_call_under_way() {
    let host = one_host().await;
    let id = vm(1);
    host.create(id, intent(1, PowerState::Running)).await;
    host.until_settled(id, 1).await;
    host.sim.fail_next(Call::Pause, Fault::Hang);
    host.create(id, intent(2, PowerState::Paused)).await;
    host.create(id, intent(3, PowerState::Stopped)).await;
    sleep(POWER_OFF_PATIENCE * 2).await;
    assert!(
        host.sim
            .domains()
            .iter()
            .any(|seen| seen.1 == DomainState::Running),
        "its guest is not cut short"
    );
    assert_eq!(host.until_settled(id, 3).await.power, Some(PowerState::Stopped));
}
