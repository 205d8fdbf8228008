//! PCI devices of hosts that VMs have for themselves: given once, kept with the VM, given back with it; who has some stays where it is.

use dalgu_proto::{
    host::{GuestFeature, PciDevice},
    vm::{Device, Spec},
};

use super::{Error, create, migrate};
use crate::{
    fixtures::{self, host_name},
    model::VmRecord,
    placement::Policy,
    state::{Db, Hooks},
    store::memory::Disk,
};

/// A host with two devices of class gpu.
fn host(name: &str) -> crate::model::HostRecord {
    let mut host = fixtures::host(name);
    let device = |bus: u8| PciDevice {
        class: "gpu".into(),
        address: format!("0000:{bus:02x}:00.0").parse().unwrap(),
        model: "10de:20b0".into(),
        numa_node: None,
        iommu_group: Some(bus.into()),
        problem: None,
    };
    host.inventory.pci_devices = vec![device(0x3b), device(0x5e)];
    host.inventory.guest_features.push(GuestFeature::PciDevice);
    host
}

fn open(disk: &Disk) -> Db {
    Db::open(disk.open(), fixtures::cluster_id(), Hooks::default()).unwrap()
}

async fn site(disk: &Disk) -> Db {
    let db = open(disk);
    db.change(|tx| {
        for name in ["h1", "h2"] {
            tx.put_host(host(name));
        }
    })
    .await;
    heard(&db).await;
    db
}

async fn heard(db: &Db) {
    db.change(|tx| {
        for name in ["h1", "h2"] {
            tx.set_live(host_name(name), fixtures::live(tx.now()));
        }
    })
    .await;
}

async fn make(db: &Db, name: &str, gpus: u32, on: Option<&str>) -> Result<VmRecord, Error> {
    let new = create::Create {
        ignore_protection: false,
        name: name.parse().unwrap(),
        spec: Spec {
            devices: [("gpu".to_owned(), gpus)].into(),
            ..fixtures::spec()
        },
        firmware_given: true,
        documents: Default::default(),
        labels: Default::default(),
        description: String::new(),
        drain_mode: Default::default(),
        placement_groups: Default::default(),
        tolerations: Default::default(),
        stopped: false,
        host: on.map(host_name),
        policy: Policy::SPREAD,
    };
    db.transact(|tx| create::create(tx, &fixtures::caller(), new))
        .await?;
    Ok((**db.snapshot().vm_by_name(&name.parse().unwrap()).unwrap()).clone())
}

fn gpus(buses: &[u8]) -> Vec<Device> {
    let device = |bus: &u8| Device {
        class: "gpu".into(),
        address: format!("0000:{bus:02x}:00.0").parse().unwrap(),
    };
    buses.iter().map(device).collect()
}

#[tokio::test]
async fn devices_are_given_once_and_remembered_over_a_restart() {
    let disk = Disk::default();
    let db = site(&disk).await;
    let h1 = host_name("h1");
    let first = make(&db, "a", 1, Some("h1")).await.unwrap();
    assert_eq!(first.devices(&h1), gpus(&[0x3b]));
    // Its host is told, and nobody else.
    let told = |host: &str| {
        let intent = crate::agent_wire::intent(&first, &first.intent, first.epoch, &host_name(host));
        intent.devices.len()
    };
    assert_eq!((told("h1"), told("h2")), (1, 0));
    drop(db);

    let db = open(&disk);
    heard(&db).await;
    let second = make(&db, "b", 1, Some("h1")).await.unwrap();
    assert_eq!(second.devices(&h1), gpus(&[0x5e]));
    let refused = make(&db, "c", 1, Some("h1")).await;
    let Err(Error::NoCapacity { decision, .. }) = refused else {
        panic!("{refused:?}")
    };
    let why = "needs 1 PCI devices of class gpu, has 0 free of 2";
    assert!(decision.summary.contains(why), "{}", decision.summary);
    // The other host has some yet.
    let third = make(&db, "c", 2, None).await.unwrap();
    assert_eq!(third.devices(&host_name("h2")), gpus(&[0x3b, 0x5e]));
    // What has gone gives its device back.
    db.change(|tx| tx.delete_vm(first.id)).await;
    let again = make(&db, "d", 1, None).await.unwrap();
    assert_eq!(again.devices(&h1), gpus(&[0x3b]));
}

#[tokio::test]
async fn one_that_has_a_device_does_not_migrate() {
    let db = site(&Disk::default()).await;
    let vm = make(&db, "web", 1, Some("h1")).await.unwrap();
    db.change(|tx| tx.observe(vm.id, Some(fixtures::observation(&vm))))
        .await;
    let ask = migrate::Migrate {
        ignore_protection: false,
        destination: None,
        max_downtime_ms: 100,
        bandwidth_mib_per_second: 0,
        policy: Policy::SPREAD,
    };
    let refused = db
        .transact(|tx| migrate::migrate(tx, &fixtures::caller(), "web", "", ask))
        .await;
    assert!(matches!(refused, Err(Error::DevicesStay(_))), "{refused:?}");
    let text = refused.unwrap_err().to_string();
    assert!(text.contains("cannot migrate: stop it"), "{text}");
}
