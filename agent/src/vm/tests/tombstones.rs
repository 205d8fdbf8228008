//! A VM that was deleted stays so, whatever commands come late.

use super::*;

async fn delete(host: &Host, id: VmId, epoch: u64) -> Status {
    let handle = host.vms.get_or_start(id);
    handle.delete(Generation(9), Epoch(epoch)).await.unwrap()
}

async fn late(host: &Host, id: VmId, epoch: u64) -> Result<Status, Error> {
    let intent = Intent {
        epoch: Epoch(epoch),
        ..intent(1, PowerState::Running)
    };
    host.vms.get_or_start(id).ensure(told(id, intent)).await
}

#[track_caller]
fn refused(found: &Result<Status, Error>) {
    assert!(
        matches!(found, Err(Error::Denied(policy::Denied::StaleEpoch { .. }))),
        "a late command made it: {found:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_command_to_make_a_vm_that_comes_after_its_deletion_is_refused() {
    let mut host = one_host().await;
    let id = vm(1);
    let status = delete(&host, id, 2).await;
    assert_eq!(status.phase, Phase::Gone);
    assert_eq!(host.vms.statuses(), [], "it is reported");
    // Longer than any command is under way, and longer than a task without a VM lives.
    sleep(Duration::from_secs(90)).await;
    refused(&late(&host, id, 2).await);
    refused(&late(&host, id, 1).await);
    host.restart_agent("boot-1").await;
    refused(&late(&host, id, 2).await);
    assert_eq!(host.sim.list().await.unwrap(), []);
    // A newer owner's word counts: the VM came back by way of another host.
    let back = Intent {
        epoch: Epoch(3),
        ..intent(10, PowerState::Running)
    };
    host.create(id, back).await;
    host.until_settled(id, 10).await;
}

#[tokio::test(start_paused = true)]
async fn a_deletion_under_a_newer_epoch_counts_for_a_vm_that_left() {
    let host = one_host().await;
    let id = vm(1);
    delete(&host, id, 1).await;
    delete(&host, id, 4).await;
    refused(&late(&host, id, 3).await);
    let older = host.vms.get(id).unwrap().delete(Generation(9), Epoch(2)).await;
    assert!(matches!(
        older,
        Err(Error::Denied(policy::Denied::StaleEpoch { .. }))
    ));
}

#[tokio::test(start_paused = true)]
async fn a_deletion_is_forgotten_after_a_day() {
    let mut host = one_host().await;
    let (old, recent) = (vm(1), vm(2));
    delete(&host, old, 1).await;
    delete(&host, recent, 1).await;
    let ledger = Ledger::open(&host.dir.path().join("ledger")).unwrap();
    let entries = async || ledger.load().await.unwrap().vms;
    let mut entry = entries().await.into_iter().find(|entry| entry.id == old).unwrap();
    entry.disposition = ledger::Disposition::Gone {
        since: jiff::Timestamp::now() - jiff::SignedDuration::from_hours(25),
    };
    ledger.save_vm(&entry).await.unwrap();
    host.restart_agent("boot-1").await;
    let forgotten = async {
        while host.vms.get(old).is_some() {
            sleep(Duration::from_secs(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_mins(2), forgotten)
        .await
        .expect("its task ends");
    let left: Vec<_> = entries().await.into_iter().map(|entry| entry.id).collect();
    assert_eq!(left, [recent]);
}

#[tokio::test(start_paused = true)]
async fn a_deletion_that_cannot_be_written_down_is_not_confirmed() {
    let host = one_host().await;
    let ledger = host.dir.path().join("ledger/vms");
    std::fs::remove_dir_all(&ledger).unwrap();
    let handle = host.vms.get_or_start(vm(1));
    let failed = handle.delete(Generation(9), Epoch(1)).await;
    assert!(matches!(failed, Err(Error::Ledger(_))), "{failed:?}");
    std::fs::create_dir(&ledger).unwrap();
    delete(&host, vm(1), 1).await;
    refused(&late(&host, vm(1), 1).await);
}
