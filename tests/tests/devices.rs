//! PCI devices of hosts in a whole site in one process: real controller, real agents, simulated hypervisors with two devices each. No device is ever two
//! VMs', whoever starts again and whatever store is restored.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use dalgu_controller::store::Store as _;
use dalgu_proto::{reason, v1};
use dalgu_tests::cluster::{Cluster, restored, until, vm};

fn request(name: &str, gpus: u32) -> v1::CreateVmRequest {
    let mut vm = vm(name);
    if let Some(spec) = &mut vm.spec {
        spec.devices = vec![v1::DeviceRequest {
            class: "gpu".into(),
            count: gpus,
        }];
    }
    v1::CreateVmRequest {
        vm: Some(vm),
        ..Default::default()
    }
}

async fn create(cluster: &Cluster, name: &str) -> Result<()> {
    cluster.vms().await?.create_vm(request(name, 1)).await?;
    cluster.until_at_rest().await?;
    Ok(())
}

/// Refused, with PCI devices as what every host lacks.
async fn refused(cluster: &Cluster, name: &str) -> Result<()> {
    let refused = cluster.vms().await?.create_vm(request(name, 1)).await;
    let status = refused.err().ok_or_else(|| anyhow::anyhow!("{name} was taken"))?;
    ensure!(
        reason::of(&status).as_deref() == Some("NO_CAPACITY") && status.message().contains("PCI_DEVICE 2"),
        "{status:?}"
    );
    Ok(())
}

/// Every VM runs and has a device, each one of its own.
async fn each_has_its_own(cluster: &Cluster, names: &[&str]) -> Result<()> {
    until("each runs with a device of its own", async || {
        let vms = cluster.list_vms().await?;
        let mut given = BTreeSet::new();
        for name in names {
            let vm = vms.iter().find(|vm| vm.name == **name);
            let status = vm.and_then(|vm| vm.status.clone()).unwrap_or_default();
            ensure!(status.state() == v1::VmState::Running, "{name}: {status:?}");
            ensure!(status.devices.len() == 1, "{name}: {status:?}");
            let device = (status.host, status.devices[0].address.clone());
            ensure!(
                given.insert(device.clone()),
                "{device:?} is {name}'s and another's"
            );
        }
        Ok(())
    })
    .await
}

async fn resume(cluster: &Cluster) -> Result<()> {
    let site = async || -> Result<v1::Site> {
        let answer = cluster.site().await?.get_site(v1::GetSiteRequest {}).await?;
        Ok(answer.into_inner())
    };
    until("every host has shown what it has", async || {
        let site = site().await?;
        ensure!(
            site.waiting_hosts.is_empty(),
            "waits for {:?}",
            site.waiting_hosts
        );
        Ok(())
    })
    .await?;
    let request = v1::ResumeSiteRequest {
        accept_differences: true,
        etag: site().await?.etag,
        ..Default::default()
    };
    cluster.site().await?.resume_site(request).await?;
    Ok(())
}

#[tokio::test]
async fn no_device_is_given_twice_whoever_starts_again_and_whatever_store_is_restored() -> Result<()> {
    let mut cluster = Cluster::start(2).await?;
    create(&cluster, "a").await?;
    create(&cluster, "b").await?;
    let image = cluster.disk.open().load()?;
    create(&cluster, "c").await?;
    each_has_its_own(&cluster, &["a", "b", "c"]).await?;

    // Both ends start again; then the last device goes.
    cluster.kill_controller().await;
    for host in ["h1", "h2"] {
        cluster.kill_agent(host).await;
        cluster.start_agent(host).await?;
    }
    cluster.start_controller().await?;
    cluster.until_ready().await?;
    create(&cluster, "d").await?;
    each_has_its_own(&cluster, &["a", "b", "c", "d"]).await?;
    refused(&cluster, "e").await?;
    let off = v1::StopVmRequest {
        name: "d".into(),
        force: true,
        ..Default::default()
    };
    cluster.vms().await?.stop_vm(off).await?;
    cluster.until_at_rest().await?;

    // The backup knows two of the four; the hosts know all of them, also the one that is off.
    cluster.kill_controller().await;
    cluster.disk = restored(image)?;
    cluster.start_controller().await?;
    resume(&cluster).await?;
    each_has_its_own(&cluster, &["a", "b"]).await?;
    until("what the store does not know keeps its devices", async || {
        let hosts = cluster.list_hosts().await?;
        let room = hosts.into_iter().filter_map(|host| host.allocation);
        let reserved: u32 = room
            .flat_map(|room| room.devices)
            .map(|class| class.reserved)
            .sum();
        ensure!(reserved == 4, "{reserved} of 4 reserved");
        Ok(())
    })
    .await?;
    refused(&cluster, "e").await?;

    // What has gone gives its device to the next.
    let gone = v1::DeleteVmRequest {
        name: "a".into(),
        force: true,
        ..Default::default()
    };
    cluster.vms().await?.delete_vm(gone).await?;
    cluster.until_at_rest().await?;
    create(&cluster, "e").await?;
    each_has_its_own(&cluster, &["b", "e"]).await
}
