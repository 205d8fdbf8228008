//! Guests that are asked to shut down or to reboot, and take their time, or miss the request.

use super::*;

fn restart(generation: u64) -> Intent {
    Intent {
        restart_sequence: 1,
        power_sequence: 1,
        ..intent(generation, PowerState::Running)
    }
}

async fn running_guest() -> (Host, VmId) {
    let host = one_host().await;
    let id = vm(1);
    host.create(id, intent(1, PowerState::Running)).await;
    host.until_settled(id, 1).await;
    (host, id)
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_missed_the_first_request_shuts_down_at_the_second() {
    let (host, id) = running_guest().await;
    host.sim.set_behaviour(id, Behaviour::Ignores);
    let stop = Intent {
        grace_period_seconds: 8,
        ..intent(2, PowerState::Stopped)
    };
    let began = Instant::now();
    host.create(id, stop).await;
    sleep(Duration::from_secs(1)).await;
    host.sim.set_behaviour(id, Behaviour::Obeys(Duration::ZERO));
    let status = host.until_settled(id, 2).await;
    assert_eq!(status.power, Some(PowerState::Stopped));
    assert!(
        began.elapsed() < Duration::from_secs(6),
        "it was powered off: {:?}",
        began.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_missed_the_first_request_reboots_at_the_second_and_only_once() {
    let (host, id) = running_guest().await;
    host.sim.set_behaviour(id, Behaviour::Ignores);
    host.create(id, restart(2)).await;
    sleep(Duration::from_secs(5)).await;
    let status = host.vms.get(id).unwrap().status();
    assert_ne!(
        status.phase,
        Phase::Settled,
        "it counts as done, and the guest has done nothing"
    );
    host.sim
        .set_behaviour(id, Behaviour::Obeys(Duration::from_secs(3)));
    host.until_settled(id, 2).await;
    assert_eq!(host.sim.resets(id), Some(1));
    sleep(plan::REBOOT_WAIT * 2).await;
    assert_eq!(
        host.sim.resets(id),
        Some(1),
        "it was asked again after it had rebooted"
    );
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_never_reboots_is_not_forced_to() {
    let (host, id) = running_guest().await;
    host.sim.set_behaviour(id, Behaviour::Ignores);
    let began = Instant::now();
    host.create(id, restart(2)).await;
    let status = host.until_settled(id, 2).await;
    assert_eq!(status.power, Some(PowerState::Running));
    assert!(began.elapsed() >= plan::REBOOT_WAIT, "{:?}", began.elapsed());
    assert_eq!(host.sim.resets(id), Some(0));
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_shuts_down_late_when_asked_to_reboot_comes_up_again() {
    for late in [Duration::from_secs(30), plan::REBOOT_LATE / 2] {
        let (host, id) = running_guest().await;
        host.sim.set_behaviour(id, Behaviour::Ignores);
        host.create(id, restart(2)).await;
        sleep(late).await;
        // As when a migration fails meanwhile: the same again, in a later epoch.
        let again = Intent {
            epoch: Epoch(9),
            ..restart(2)
        };
        host.create(id, again).await;
        host.sim.power_off_guest(id);
        sleep(Duration::from_secs(10)).await;
        let status = host.until_settled(id, 2).await;
        assert_eq!(status.power, Some(PowerState::Running), "off after {late:?}");
        assert_eq!(host.sim.run(id), Some(2), "once");
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_shuts_down_long_after_it_was_asked_to_reboot_stays_off() {
    let (host, id) = running_guest().await;
    host.sim.set_behaviour(id, Behaviour::Ignores);
    host.create(id, restart(2)).await;
    sleep(plan::REBOOT_WAIT + plan::REBOOT_LATE).await;
    host.sim.power_off_guest(id);
    sleep(Duration::from_secs(10)).await;
    let status = host.until_settled(id, 2).await;
    assert_eq!(status.power, Some(PowerState::Stopped));
}

#[tokio::test(start_paused = true)]
async fn a_start_asked_while_the_guest_shuts_down_is_done_when_it_runs_again() {
    let (host, id) = running_guest().await;
    host.sim
        .set_behaviour(id, Behaviour::Obeys(Duration::from_secs(20)));
    let stop = Intent {
        grace_period_seconds: 60,
        ..intent(2, PowerState::Stopped)
    };
    host.create(id, stop).await;
    sleep(Duration::from_secs(5)).await;
    host.create(id, intent(3, PowerState::Running)).await;
    sleep(Duration::from_secs(1)).await;
    let early = host.vms.get(id).unwrap().status();
    assert_ne!(early.phase, Phase::Settled, "the guest is about to stop");
    host.until(id, "off", |status| status.power == Some(PowerState::Stopped))
        .await;
    assert_eq!(host.until_settled(id, 3).await.power, Some(PowerState::Running));
    sleep(Duration::from_mins(5)).await;
    let later = host.vms.get(id).unwrap().status();
    assert_eq!(
        (later.phase, later.power),
        (Phase::Settled, Some(PowerState::Running))
    );
}

#[tokio::test(start_paused = true)]
async fn a_start_asked_of_a_guest_that_did_not_hear_the_stop_leaves_it_running() {
    let (host, id) = running_guest().await;
    host.sim.set_behaviour(id, Behaviour::Ignores);
    let stop = Intent {
        grace_period_seconds: 30,
        ..intent(2, PowerState::Stopped)
    };
    host.create(id, stop).await;
    sleep(Duration::from_secs(5)).await;
    let began = Instant::now();
    host.create(id, intent(3, PowerState::Running)).await;
    host.until_settled(id, 3).await;
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    assert_eq!(host.sim.run(id), Some(1), "it was started again");
}
