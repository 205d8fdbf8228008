//! Backups on a whole simulated site: what a disk held at the moment of a backup is what a VM made of it begins with, and
//! neither a controller nor an agent that dies loses or doubles one.

use anyhow::{Context, Result, ensure};
use dalgu_agent::hypervisor::sim::{Call, Fault};
use dalgu_proto::{ids::VmId, reason, v1};
use dalgu_tests::cluster::{Cluster, until, vm};

async fn created(cluster: &Cluster, name: &str, host: &str) -> Result<VmId> {
    let request = v1::CreateVmRequest {
        vm: Some(vm(name)),
        host: host.into(),
        ..Default::default()
    };
    cluster.vms().await?.create_vm(request).await?;
    cluster.until_at_rest().await?;
    id_of(cluster, name).await
}

async fn id_of(cluster: &Cluster, name: &str) -> Result<VmId> {
    let vms = cluster.list_vms().await?;
    let vm = vms.into_iter().find(|vm| vm.name == name).context("no such VM")?;
    Ok(vm.uid.parse()?)
}

async fn begun(cluster: &Cluster, vm: &str, kind: v1::BackupKind) -> Result<v1::Backup> {
    let request = v1::CreateBackupRequest {
        vm: vm.into(),
        pool: "local".into(),
        kind: kind.into(),
        ..Default::default()
    };
    Ok(cluster
        .backups()
        .await?
        .create_backup(request)
        .await?
        .into_inner())
}

async fn get(cluster: &Cluster, uid: &str) -> Result<v1::Backup> {
    let request = v1::GetBackupRequest { uid: uid.into() };
    Ok(cluster.backups().await?.get_backup(request).await?.into_inner())
}

async fn ended(cluster: &Cluster, backup: &v1::Backup) -> Result<v1::Backup> {
    until("the backup's end", async || {
        let now = get(cluster, &backup.uid).await?;
        let over = matches!(now.state(), v1::BackupState::Available | v1::BackupState::Failed);
        ensure!(over, "{now:?}");
        Ok(())
    })
    .await?;
    get(cluster, &backup.uid).await
}

async fn whole(cluster: &Cluster, vm: &str, kind: v1::BackupKind) -> Result<v1::Backup> {
    let backup = ended(cluster, &begun(cluster, vm, kind).await?).await?;
    ensure!(backup.state() == v1::BackupState::Available, "{backup:?}");
    Ok(backup)
}

async fn restored(cluster: &Cluster, backup: &v1::Backup, name: &str) -> Result<VmId> {
    let request = v1::RestoreBackupRequest {
        uid: backup.uid.clone(),
        name: name.into(),
        ..Default::default()
    };
    cluster.backups().await?.restore_backup(request).await?;
    for operation in cluster.until_at_rest().await? {
        ensure!(
            operation.state() == v1::OperationState::Succeeded,
            "{operation:?}"
        );
    }
    id_of(cluster, name).await
}

async fn delete(cluster: &Cluster, backup: &v1::Backup, with_children: bool) -> Result<(), tonic::Status> {
    let request = v1::DeleteBackupRequest {
        uid: backup.uid.clone(),
        with_children,
        ..Default::default()
    };
    let mut backups = cluster
        .backups()
        .await
        .map_err(|error| tonic::Status::internal(error.to_string()))?;
    backups.delete_backup(request).await.map(drop)
}

fn refused<T: std::fmt::Debug>(outcome: Result<T, tonic::Status>, wanted: &str) -> Result<()> {
    match outcome {
        Err(status) if reason::of(&status).as_deref() == Some(wanted) => Ok(()),
        other => anyhow::bail!("not refused with {wanted}: {other:?}"),
    }
}

#[tokio::test]
async fn each_backup_becomes_what_the_disk_held_at_its_moment() -> Result<()> {
    let cluster = Cluster::start(2).await?;
    let web = created(&cluster, "web", "h1").await?;
    let sim = &cluster.hosts["h1"].sim;
    sim.write_disk(web, "root");
    let full = whole(&cluster, "web", v1::BackupKind::Auto).await?;
    ensure!(
        full.kind() == v1::BackupKind::Full && full.parent.is_empty(),
        "{full:?}"
    );
    sim.write_disk(web, "root");
    sim.write_disk(web, "root");
    let next = whole(&cluster, "web", v1::BackupKind::Incremental).await?;
    ensure!(next.parent == full.uid, "{next:?}");
    sim.write_disk(web, "root");
    for (backup, name, content) in [(&full, "one", 1), (&next, "two", 3)] {
        let id = restored(&cluster, backup, name).await?;
        ensure!(
            sim.disk_content(id, "root") == content,
            "{name}: {}",
            sim.disk_content(id, "root")
        );
    }
    cluster.check().await?;

    refused(delete(&cluster, &full, false).await, "BACKUP_HAS_CHILDREN")?;
    let elsewhere = v1::RestoreBackupRequest {
        uid: full.uid.clone(),
        name: "three".into(),
        host: "h2".into(),
        ..Default::default()
    };
    refused(
        cluster.backups().await?.restore_backup(elsewhere).await,
        "BACKUP_NOT_THERE",
    )?;
    delete(&cluster, &full, true).await?;
    until("no backup", async || {
        let request = v1::ListBackupsRequest::default();
        let left = cluster.backups().await?.list_backups(request).await?.into_inner();
        ensure!(left.backups.is_empty() && sim.backups() == 0, "{left:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn nothing_that_would_spoil_a_backup_is_done_while_it_is_taken() -> Result<()> {
    let cluster = Cluster::start(2).await?;
    created(&cluster, "web", "h1").await?;
    let sim = &cluster.hosts["h1"].sim;
    sim.fail_next(Call::BackUp, Fault::Hang);
    let backup = begun(&cluster, "web", v1::BackupKind::Full).await?;
    let mut vms = cluster.vms().await?;
    let migrate = v1::MigrateVmRequest {
        name: "web".into(),
        ..Default::default()
    };
    refused(vms.migrate_vm(migrate.clone()).await, "BACKUP_IN_PROGRESS")?;
    let remove = v1::DeleteVmRequest {
        name: "web".into(),
        force: true,
        ..Default::default()
    };
    refused(vms.delete_vm(remove).await, "BACKUP_IN_PROGRESS")?;
    let second = v1::CreateBackupRequest {
        vm: "web".into(),
        pool: "local".into(),
        ..Default::default()
    };
    refused(
        cluster.backups().await?.create_backup(second.clone()).await,
        "BACKUP_IN_PROGRESS",
    )?;
    // It is given up by its deletion.
    delete(&cluster, &backup, false).await?;
    until("it is gone", async || {
        refused(
            get(&cluster, &backup.uid)
                .await
                .map_err(|error| error.downcast().unwrap()),
            "BACKUP_NOT_FOUND",
        )
    })
    .await?;
    vms.migrate_vm(migrate).await?;
    cluster.until_at_rest().await?;
    let nowhere = v1::CreateBackupRequest {
        pool: "nowhere".into(),
        ..second
    };
    refused(
        cluster.backups().await?.create_backup(nowhere).await,
        "POOL_NOT_FOUND",
    )?;
    // It has moved: everything is copied.
    let anew = whole(&cluster, "web", v1::BackupKind::Auto).await?;
    ensure!(
        anew.kind() == v1::BackupKind::Full && anew.host == "h2",
        "{anew:?}"
    );
    Ok(())
}

#[tokio::test]
async fn a_backup_ends_whoever_dies_meanwhile() -> Result<()> {
    let mut cluster = Cluster::start(1).await?;
    created(&cluster, "web", "h1").await?;
    cluster.hosts["h1"].sim.fail_next(Call::BackUp, Fault::Hang);
    let lost = begun(&cluster, "web", v1::BackupKind::Auto).await?;
    until("it is taken", async || {
        let now = get(&cluster, &lost.uid).await?;
        ensure!(now.state() == v1::BackupState::Running, "{now:?}");
        Ok(())
    })
    .await?;
    cluster.kill_controller().await;
    cluster.kill_agent("h1").await;
    cluster.start_agent("h1").await?;
    cluster.start_controller().await?;
    let lost = ended(&cluster, &lost).await?;
    let error = lost.error.clone().context("it has not failed")?;
    ensure!(error.reason == "AGENT_RESTARTED", "{lost:?}");
    ensure!(cluster.hosts["h1"].sim.backups() == 0);
    // Asked for by a controller that dies at once, it is taken by the next.
    let asked = begun(&cluster, "web", v1::BackupKind::Auto).await?;
    cluster.kill_controller().await;
    cluster.start_controller().await?;
    let asked = ended(&cluster, &asked).await?;
    ensure!(asked.state() == v1::BackupState::Available, "{asked:?}");
    ensure!(cluster.hosts["h1"].sim.backups() == 1);
    Ok(())
}
