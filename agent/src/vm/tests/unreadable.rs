//! A VM whose ledger entry this version cannot read.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_vm_whose_entry_a_newer_version_wrote_is_told_of_and_never_touched() {
    let mut host = one_host().await;
    let id = vm(1);
    host.create(id, intent(1, PowerState::Running)).await;
    host.until_settled(id, 1).await;
    let file = host.dir.path().join(format!("ledger/vms/{id}.json"));
    let known = std::fs::read_to_string(&file).unwrap();
    let newer = known.replace(r#"{"is":"owned"}"#, r#"{"is":"parked","until":"noon"}"#);
    assert_ne!(newer, known);
    std::fs::write(&file, &newer).unwrap();
    host.restart_agent("boot-1").await;
    let seen = |status: &Status| status.power == Some(PowerState::Running);
    let status = host.until(id, "seen", seen).await;
    assert_eq!((status.phase, status.epoch), (Phase::Failed, Epoch(1)));
    let failure = status.failure.unwrap();
    assert_eq!(failure.reason, UNREADABLE);
    assert!(failure.message.contains("parked"), "{}", failure.message);
    let handle = host.vms.get_or_start(id);
    let refused = [
        handle.ensure(told(id, intent(2, PowerState::Stopped))).await,
        handle.delete(Generation(2), Epoch(9)).await,
        handle.settle(MIGRATION).await,
        handle.finish(MIGRATION, false, Epoch(9)).await,
    ];
    for outcome in refused {
        assert!(matches!(outcome, Err(Error::Unreadable { .. })), "{outcome:?}");
    }
    // Longer than anything is remembered, and than any look is apart.
    sleep(Duration::from_hours(48)).await;
    assert_eq!(host.sim.domains().len(), 1);
    assert_eq!(host.vms.statuses().len(), 1, "taken for lost");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), newer);
    // The newer version, or whoever mended the file, goes on with it.
    std::fs::write(&file, &known).unwrap();
    host.restart_agent("boot-1").await;
    host.create(id, intent(2, PowerState::Stopped)).await;
    host.until_settled(id, 2).await;
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_is_off_and_whose_entry_is_unreadable_is_not_made_anew() {
    let mut host = one_host().await;
    let id = vm(1);
    host.create(id, intent(1, PowerState::Stopped)).await;
    host.until_settled(id, 1).await;
    let file = host.dir.path().join(format!("ledger/vms/{id}.json"));
    std::fs::write(&file, "torn").unwrap();
    host.sim.undefine(id).await.unwrap();
    host.restart_agent("boot-1").await;
    let refused = host
        .vms
        .get_or_start(id)
        .ensure(told(id, intent(2, PowerState::Running)))
        .await;
    assert!(matches!(refused, Err(Error::Unreadable { .. })), "{refused:?}");
    sleep(Duration::from_mins(5)).await;
    assert_eq!(
        host.sim.domains().len(),
        0,
        "it was made with what may be the wrong disks"
    );
    assert_eq!(host.vms.statuses().len(), 1);
}
