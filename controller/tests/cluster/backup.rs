//! Backups through the API: by a schedule as time goes by, and their removal.

use std::time::Duration;

use dalgu_proto::v1::{self, BackupState};
use jiff::Timestamp;

use super::{
    site::{Clients, Site, create, eventually, reason},
    storage::SHARED,
};

/// Time between two backups: the least that there may be.
const EVERY: Duration = Duration::from_mins(15);

/// A schedule that keeps one backup of each VM with the label `tier=gold`.
pub fn schedule(pool: &str) -> v1::CreateBackupScheduleRequest {
    let schedule = v1::BackupSchedule {
        name: "often".into(),
        label_selector: [("tier".to_owned(), "gold".to_owned())].into(),
        pool: pool.into(),
        every: Some(prost_types::Duration {
            seconds: i64::try_from(EVERY.as_secs()).unwrap(),
            nanos: 0,
        }),
        keep_last: 1,
        ..Default::default()
    };
    v1::CreateBackupScheduleRequest {
        backup_schedule: Some(schedule),
        ..Default::default()
    }
}

async fn backups(clients: &Clients) -> Vec<v1::Backup> {
    let request = v1::ListBackupsRequest::default();
    let list = clients.backups.clone().list_backups(request).await;
    list.unwrap().into_inner().backups
}

/// Waits until there is another whole backup than this one, and no other.
async fn next(clients: &Clients, before: &str) -> String {
    let one = || async {
        let all = backups(clients).await;
        all.len() == 1 && all[0].uid != before && all[0].state() == BackupState::Available
    };
    eventually("the next backup, and none before it", one).await;
    backups(clients).await[0].uid.clone()
}

async fn golden(clients: &mut Clients) {
    let mut request = create("web");
    let vm = request.vm.as_mut().unwrap();
    vm.labels = [("tier".to_owned(), "gold".to_owned())].into();
    request.host = "h1".into();
    let made = clients.vms.create_vm(request).await.unwrap();
    clients.succeeded(made.into_inner()).await;
}

#[tokio::test]
async fn a_schedule_takes_backups_as_time_goes_by_and_lets_go_of_the_oldest() {
    let mut site = Site::new(1).await;
    site.share_storage();
    let mut clients = site.start().await;
    golden(&mut clients).await;
    clients
        .backups
        .create_backup_schedule(schedule(SHARED))
        .await
        .unwrap();
    assert_eq!(
        reason(clients.backups.create_backup_schedule(schedule(SHARED)).await),
        "BACKUP_SCHEDULE_ALREADY_EXISTS"
    );
    site.pass(EVERY);
    let first = next(&clients, "").await;
    site.pass(EVERY);
    let second = next(&clients, &first).await;
    {
        let world = site.fabric.lock();
        let there = &world.hosts["h1"].storage.backups;
        assert!(there.contains(&second) && !there.contains(&first), "{there:?}");
    }
    let taken = backups(&clients).await.remove(0);
    assert_eq!((taken.schedule.as_str(), taken.vm.as_str()), ("often", "web"));

    let name = || "often".to_owned();
    let request = v1::GetBackupScheduleRequest { name: name() };
    let shown = clients
        .backups
        .get_backup_schedule(request.clone())
        .await
        .unwrap();
    assert_eq!((shown.get_ref().vms, shown.get_ref().failures), (1, 0));
    let request_to_delete = v1::DeleteBackupScheduleRequest {
        name: name(),
        ..Default::default()
    };
    clients
        .backups
        .delete_backup_schedule(request_to_delete)
        .await
        .unwrap();
    let gone = clients.backups.get_backup_schedule(request).await;
    assert_eq!(reason(gone), "BACKUP_SCHEDULE_NOT_FOUND");
    assert_eq!(backups(&clients).await[0].uid, second, "what it took stays");
}

fn update(at: &str) -> v1::UpdateBackupScheduleRequest {
    v1::UpdateBackupScheduleRequest {
        backup_schedule: Some(v1::BackupSchedule {
            name: "often".into(),
            at: at.into(),
            ..Default::default()
        }),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["at".into()],
        }),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_schedule_with_a_time_of_day_keeps_to_it_and_is_known_by_it() {
    let mut site = Site::new(1).await;
    site.share_storage();
    let mut clients = site.start().await;
    golden(&mut clients).await;
    let now = Timestamp::now().as_second();
    // Ten hours on, to the minute.
    let first = (now + 10 * 3600) / 60 * 60;
    let minute = first % 86_400 / 60;
    let time = format!("{:02}:{:02}", minute / 60, minute % 60);
    let mut daily = schedule(SHARED);
    let asked = daily.backup_schedule.as_mut().unwrap();
    asked.every = Some(Duration::from_hours(24).try_into().unwrap());
    asked.at = "2 o'clock".into();
    let refused = clients
        .backups
        .create_backup_schedule(daily.clone())
        .await
        .unwrap_err();
    assert!(refused.message().starts_with("backup_schedule.at: "), "{refused}");
    assert_eq!(reason::<()>(Err(refused)), "INVALID_FIELD");
    daily.backup_schedule.as_mut().unwrap().at.clone_from(&time);
    let made = clients
        .backups
        .create_backup_schedule(daily)
        .await
        .unwrap()
        .into_inner();
    let next_time = |schedule: &v1::BackupSchedule| schedule.next_time.map(|time| time.seconds);
    assert_eq!((made.at.as_str(), next_time(&made)), (time.as_str(), Some(first)));

    // Half an hour late, as after a controller that was off.
    site.pass(Duration::from_mins(10 * 60 + 30));
    next(&clients, "").await;
    let request = v1::GetBackupScheduleRequest { name: "often".into() };
    let shown = clients.backups.get_backup_schedule(request).await.unwrap();
    assert_eq!(next_time(shown.get_ref()), Some(first + 86_400));

    let taken = shown.get_ref().last_time.unwrap().seconds;
    let without = clients
        .backups
        .update_backup_schedule(update(""))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (without.at.as_str(), next_time(&without)),
        ("", Some(taken + 86_400))
    );
    assert_eq!(
        reason(clients.backups.update_backup_schedule(update("24:00")).await),
        "INVALID_FIELD"
    );
    let again = clients
        .backups
        .update_backup_schedule(update("02:00+09:00"))
        .await
        .unwrap();
    assert_eq!(again.get_ref().at, "02:00+09:00");
}

#[tokio::test]
async fn a_backup_in_a_shared_pool_is_removed_by_another_host_while_its_own_is_away() {
    let mut site = Site::new(2).await;
    site.share_storage();
    let mut clients = site.start().await;
    golden(&mut clients).await;
    let request = v1::CreateBackupRequest {
        vm: "web".into(),
        pool: SHARED.into(),
        ..Default::default()
    };
    clients.backups.create_backup(request).await.unwrap();
    let uid = next(&clients, "").await;
    site.fabric.lock().hosts.get_mut("h1").unwrap().cut_off = true;
    let away = || async {
        let request = v1::GetHostRequest { name: "h1".into() };
        let host = clients.hosts.clone().get_host(request).await.unwrap();
        host.get_ref().state() == v1::HostState::Unreachable
    };
    eventually("its host is away", away).await;
    let request = v1::DeleteBackupRequest {
        uid,
        ..Default::default()
    };
    clients.backups.clone().delete_backup(request).await.unwrap();
    eventually("it is gone", || async { backups(&clients).await.is_empty() }).await;
    let world = site.fabric.lock();
    assert_eq!(world.hosts["h2"].commands.get("RemoveBackup"), Some(&1));
    assert_eq!(world.hosts["h1"].commands.get("RemoveBackup"), None);
}
