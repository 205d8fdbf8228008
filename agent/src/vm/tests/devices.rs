//! PCI devices of a VM's own: kept over restarts of the agent, given back, never another's, and only those that are named.

use dalgu_proto::vm::Device;

use super::*;

fn devices(addresses: &[&str]) -> Vec<Device> {
    let device = |address: &&str| Device {
        class: "gpu".into(),
        address: address.parse().unwrap(),
    };
    addresses.iter().map(device).collect()
}

fn with_devices(addresses: &[&str]) -> Intent {
    Intent {
        devices: devices(addresses),
        ..intent(1, PowerState::Running)
    }
}

async fn refused(host: &Host, id: VmId, addresses: &[&str]) -> policy::Denied {
    let asked = host.vms.get_or_start(id);
    match asked.ensure(told(id, with_devices(addresses))).await {
        Err(Error::Denied(denied)) => denied,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_device_is_one_vms_own_until_that_has_gone_also_after_a_restart_of_the_agent() {
    let mut host = one_host().await;
    host.create(vm(1), with_devices(&["3b:00.0"])).await;
    host.until_settled(vm(1), 1).await;
    let taken = policy::Denied::DeviceTaken {
        device: "3b:00.0".parse().unwrap(),
        vm: vm(1),
    };
    for _ in 0..2 {
        assert_eq!(refused(&host, vm(2), &["5e:00.0", "3b:00.0"]).await, taken);
        host.restart_agent("boot-1").await;
    }
    host.until_settled(vm(1), 1).await;
    // What was refused is free for others.
    host.create(vm(3), with_devices(&["5e:00.0"])).await;
    host.until_settled(vm(3), 1).await;
    let gone = host.vms.get(vm(1)).unwrap();
    gone.delete(Generation(2), Epoch(1)).await.unwrap();
    host.until(vm(1), "gone", |status| status.phase == Phase::Gone)
        .await;
    host.create(vm(2), with_devices(&["3b:00.0"])).await;
    host.until_settled(vm(2), 1).await;
    // What it was told is what a restored controller is told.
    let status = host.vms.get(vm(2)).unwrap().status();
    assert_eq!(status.devices, devices(&["3b:00.0"]));
}

#[tokio::test(start_paused = true)]
async fn no_controller_gives_away_what_the_host_has_not_named_for_vms() {
    let host = one_host().await;
    for address in ["86:00.0", "00:1f.0"] {
        let address = address.parse().unwrap();
        let denied = refused(&host, vm(1), &[&String::from(address)]).await;
        assert_eq!(denied, policy::Denied::DeviceNotNamed(address));
    }
}

#[tokio::test(start_paused = true)]
async fn a_vm_does_not_start_with_what_has_come_to_the_address_of_its_device() {
    let mut host = one_host().await;
    let off = Intent {
        power: PowerState::Stopped,
        ..with_devices(&["3b:00.0"])
    };
    host.create(vm(1), off).await;
    host.until_settled(vm(1), 1).await;
    host.restart_agent(MOVED).await;
    let on = Intent {
        generation: Generation(2),
        power_sequence: 2,
        ..with_devices(&["3b:00.0"])
    };
    host.create(vm(1), on).await;
    let failed = host
        .until(vm(1), "failed", |status| status.failure.is_some())
        .await;
    let failure = failed.failure.unwrap();
    assert!(failure.message.contains("0000:3b:00.0"), "{failure:?}");
    assert_eq!(
        host.vms.get(vm(1)).unwrap().status().power,
        Some(PowerState::Stopped)
    );
    host.restart_agent("boot-1").await;
    host.until_settled(vm(1), 2).await;
}
