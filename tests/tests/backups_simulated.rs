//! Backups on a whole simulated site: what a disk held at the moment of a backup is what a VM made of it begins with, and
//! neither a controller nor an agent that dies loses or doubles one.

use std::collections::HashMap;

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

async fn shown(cluster: &Cluster, name: &str) -> Result<v1::Vm> {
    let vms = cluster.list_vms().await?;
    vms.into_iter().find(|vm| vm.name == name).context("no such VM")
}

async fn placement_group(cluster: &Cluster, name: &str) -> Result<()> {
    let group = v1::PlacementGroup {
        name: name.into(),
        rule: v1::PlacementRule::AntiAffinity.into(),
        ..Default::default()
    };
    let request = v1::CreatePlacementGroupRequest {
        placement_group: Some(group),
        ..Default::default()
    };
    cluster.placement().await?.create_placement_group(request).await?;
    Ok(())
}

/// A VM with all that a department says of one besides what it is made of.
async fn furnished(cluster: &Cluster) -> Result<v1::Vm> {
    placement_group(cluster, "apart").await?;
    placement_group(cluster, "gone").await?;
    let group = v1::SecurityGroup {
        name: "ssh".into(),
        ..Default::default()
    };
    let mut networks = cluster.networks().await?;
    networks
        .create_security_group(v1::CreateSecurityGroupRequest {
            security_group: Some(group),
            ..Default::default()
        })
        .await?;
    let network = v1::Network {
        name: "field".into(),
        kind: Some(v1::network::Kind::Overlay(v1::OverlayNetwork::default())),
        ipv4: Some(v1::Subnet {
            cidr: "10.20.0.0/24".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    networks
        .create_network(v1::CreateNetworkRequest {
            network: Some(network),
            ..Default::default()
        })
        .await?;
    let mut web = vm("web");
    web.labels = [("tier", "gold"), ("system", "tax")]
        .map(|(key, value)| (key.into(), value.into()))
        .into();
    web.set_drain_mode(v1::DrainMode::Stop);
    web.placement_groups = vec!["apart".into(), "gone".into()];
    web.tolerations = vec![v1::Toleration {
        key: "dmz".into(),
        value: String::new(),
    }];
    let spec = web.spec.as_mut().context("no spec")?;
    spec.nics = vec![v1::Nic {
        name: "eth0".into(),
        network: "field".into(),
        security_groups: vec!["ssh".into()],
        ..Default::default()
    }];
    spec.first_boot = Some(v1::FirstBoot {
        user_data: "#cloud-config\n{}\n".into(),
        network_config: "version: 2\n".into(),
        hostname: "shop".into(),
        ..Default::default()
    });
    let request = v1::CreateVmRequest {
        vm: Some(web),
        host: "h1".into(),
        ..Default::default()
    };
    cluster.vms().await?.create_vm(request).await?;
    for operation in cluster.until_at_rest().await? {
        ensure!(
            operation.state() == v1::OperationState::Succeeded,
            "{operation:?}"
        );
    }
    shown(cluster, "web").await
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
async fn a_vm_that_is_restored_is_what_it_was_and_says_what_it_has_to_do_without() -> Result<()> {
    let cluster = Cluster::start(2).await?;
    let web = furnished(&cluster).await?;
    let backup = whole(&cluster, "web", v1::BackupKind::Auto).await?;
    ensure!(
        (
            &backup.vm_labels,
            backup.vm_drain_mode(),
            &backup.vm_placement_groups
        ) == (&web.labels, v1::DrainMode::Stop, &web.placement_groups),
        "{backup:?}"
    );
    // Beside the VM that it was taken of, what keeps both apart holds on no host that has the files.
    let beside = v1::RestoreBackupRequest {
        uid: backup.uid.clone(),
        name: "look".into(),
        ..Default::default()
    };
    let mut backups = cluster.backups().await?;
    refused(backups.restore_backup(beside.clone()).await, "NO_CAPACITY")?;
    let anew = v1::RestoreBackupRequest {
        without_placement_groups: true,
        labels: [("tier".into(), "none".into()), ("look".into(), "1".into())].into(),
        ..beside
    };
    backups.restore_backup(anew).await?;
    cluster.until_at_rest().await?;
    let look = shown(&cluster, "look").await?;
    let labels = [("tier", "none"), ("look", "1"), ("system", "tax")];
    let labels = labels
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
    ensure!(
        look.labels == labels && look.placement_groups.is_empty(),
        "{look:?}"
    );
    ensure!(
        look.drain_mode() == v1::DrainMode::Stop && look.tolerations == web.tolerations,
        "{look:?}"
    );
    let (spec, old) = (look.spec.context("no spec")?, web.spec.context("no spec")?);
    let (nic, old_nic) = (&spec.nics[0], &old.nics[0]);
    ensure!(
        nic.mac != old_nic.mac && nic.ipv4_address != old_nic.ipv4_address,
        "{nic:?}"
    );
    ensure!(nic.security_groups == ["ssh"], "{nic:?}");
    let told = spec
        .first_boot
        .context("it is told nothing of its new addresses")?;
    ensure!(
        told.hostname == "shop" && told.user_data_digest.is_none(),
        "{told:?}"
    );
    ensure!(told.network_config_digest.is_none(), "{told:?}");
    for word in [
        "from backup",
        "user data (not kept)",
        "network configuration (not kept",
    ] {
        ensure!(look.description.contains(word), "{}", look.description);
    }

    when_all_is_gone(&cluster, &backup, &web.labels, &old).await?;
    cluster.check().await
}

/// It comes back when it is gone, and some of what it named is gone too.
async fn when_all_is_gone(
    cluster: &Cluster,
    backup: &v1::Backup,
    labels: &HashMap<String, String>,
    old: &v1::VmSpec,
) -> Result<()> {
    for name in ["web", "look"] {
        let request = v1::DeleteVmRequest {
            name: name.into(),
            force: true,
            ..Default::default()
        };
        cluster.vms().await?.delete_vm(request).await?;
    }
    cluster.until_at_rest().await?;
    let group = v1::DeletePlacementGroupRequest {
        name: "gone".into(),
        ..Default::default()
    };
    cluster.placement().await?.delete_placement_group(group).await?;
    let group = v1::DeleteSecurityGroupRequest {
        name: "ssh".into(),
        ..Default::default()
    };
    cluster.networks().await?.delete_security_group(group).await?;
    let again = v1::RestoreBackupRequest {
        uid: backup.uid.clone(),
        name: "web".into(),
        keep_addresses: true,
        ..Default::default()
    };
    cluster.backups().await?.restore_backup(again).await?;
    for operation in cluster.until_at_rest().await? {
        ensure!(
            operation.state() == v1::OperationState::Succeeded,
            "{operation:?}"
        );
    }
    let back = shown(cluster, "web").await?;
    ensure!(
        back.labels == *labels && back.placement_groups == ["apart"],
        "{back:?}"
    );
    ensure!(
        back.description
            .ends_with("; left out: security group ssh of eth0 (gone), placement group gone (gone)"),
        "{}",
        back.description
    );
    let spec = back.spec.context("no spec")?;
    ensure!(
        spec.nics[0].mac == old.nics[0].mac && spec.nics[0].security_groups.is_empty(),
        "{spec:?}"
    );
    ensure!(
        spec.first_boot.is_none(),
        "its guest finds its network as it left it: {spec:?}"
    );
    Ok(())
}

#[tokio::test]
async fn a_vm_is_restored_into_other_pools_and_networks_where_its_own_are_gone() -> Result<()> {
    let cluster = Cluster::start(1).await?;
    let mut networks = cluster.networks().await?;
    for (name, cidr) in [("field", "10.20.0.0/24"), ("lab", "10.30.0.0/24")] {
        let network = v1::Network {
            name: name.into(),
            kind: Some(v1::network::Kind::Overlay(v1::OverlayNetwork::default())),
            ipv4: Some(v1::Subnet {
                cidr: cidr.into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let request = v1::CreateNetworkRequest {
            network: Some(network),
            ..Default::default()
        };
        networks.create_network(request).await?;
    }
    let mut web = vm("web");
    let spec = web.spec.as_mut().context("no spec")?;
    spec.nics = ["eth0", "eth1"]
        .map(|name| v1::Nic {
            name: name.into(),
            network: "field".into(),
            ..Default::default()
        })
        .into();
    let request = v1::CreateVmRequest {
        vm: Some(web),
        ..Default::default()
    };
    cluster.vms().await?.create_vm(request).await?;
    cluster.until_at_rest().await?;
    let backup = whole(&cluster, "web", v1::BackupKind::Full).await?;

    let mut backups = cluster.backups().await?;
    let request = |pools: &[(&str, &str)], networks: &[(&str, &str)]| {
        let owned = |pairs: &[(&str, &str)]| {
            let pairs = pairs.iter();
            pairs
                .map(|(name, place)| ((*name).to_owned(), (*place).to_owned()))
                .collect()
        };
        v1::RestoreBackupRequest {
            uid: backup.uid.clone(),
            name: "there".into(),
            pools: owned(pools),
            networks: owned(networks),
            ..Default::default()
        }
    };
    for (pools, networks, reason) in [
        (&[("swap", "local")][..], &[][..], "INVALID_FIELD"),
        (&[("root", "../x")], &[], "INVALID_FIELD"),
        (&[("root", "nowhere")], &[], "NO_CAPACITY"),
        (&[], &[("eth7", "lab")], "INVALID_FIELD"),
        (&[], &[("eth0", "nowhere")], "NETWORK_NOT_FOUND"),
    ] {
        refused(backups.restore_backup(request(pools, networks)).await, reason)?;
    }
    let elsewhere = request(&[("root", "local")], &[("eth0", "lab"), ("eth1", "")]);
    backups.restore_backup(elsewhere).await?;
    for operation in cluster.until_at_rest().await? {
        ensure!(
            operation.state() == v1::OperationState::Succeeded,
            "{operation:?}"
        );
    }
    let spec = shown(&cluster, "there").await?.spec.context("no spec")?;
    let [nic] = spec.nics.as_slice() else {
        anyhow::bail!("one was to be left out: {:?}", spec.nics);
    };
    ensure!(
        (nic.name.as_str(), nic.network.as_str(), nic.bridge.as_str()) == ("eth0", "lab", "")
            && nic.ipv4_address.starts_with("10.30.0."),
        "{nic:?}"
    );
    cluster.check().await
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
