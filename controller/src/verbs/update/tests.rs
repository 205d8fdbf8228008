//! What may be changed of a VM, what is kept for it meanwhile, and when that is given back.

use dalgu_proto::{
    ids::Generation,
    vm::{DiskFormat, VolumeRef},
};

use super::*;
use crate::{
    agent_wire::Reported,
    fixtures::{self, disk, host_name},
    model::{HostLive, HostState, Pending, VolumeRecord},
    placement::Constraint,
    reconcile::apply::{self, Extent},
    state::{Db, Hooks, Reserved},
    store::memory::Disk as StoreDisk,
};

fn nic(name: &str) -> Nic {
    Nic {
        name: name.into(),
        plug: Plug::Bridge { bridge: "br0".into() },
        mac: String::new(),
        reserved_mbit: None,
    }
}

/// Two hosts that can change VMs, and a VM with two disks on the first.
async fn site() -> (Db, VmRecord) {
    let db = Db::open(
        StoreDisk::default().open(),
        fixtures::cluster_id(),
        Hooks::default(),
    )
    .unwrap();
    let mut vm = fixtures::vm("web", "h1");
    vm.disks_made = true;
    vm.spec.kernel_boot = None;
    vm.spec.disks = vec![disk("root", 1024), disk("data", 1024)];
    vm.spec.nics = vec![nic("eth0")];
    vm.spec.fill_in(vm.id);
    db.change(|tx| {
        for name in ["h1", "h2"] {
            let mut host = fixtures::host(name);
            let able = [GuestFeature::HotChange, GuestFeature::DiskChange];
            host.inventory.guest_features.extend(able);
            let fast = dalgu_proto::host::Pool {
                name: "fast".into(),
                shared: false,
                ..host.inventory.pools[0].clone()
            };
            let san = dalgu_proto::host::Pool {
                name: "san".into(),
                shared: true,
                ..fast.clone()
            };
            host.inventory.pools.extend([fast, san]);
            tx.put_host(host);
            let live = HostLive {
                state: HostState::Ready,
                ..HostLive::silent(tokio::time::Instant::now())
            };
            tx.set_live(host_name(name), live);
        }
        tx.put_vm(vm.clone());
    })
    .await;
    (db, vm)
}

async fn change(db: &Db, update: Update) -> Result<VmRecord, Error> {
    let caller = fixtures::caller();
    db.transact(|tx| super::update(tx, &caller, "web", "", update))
        .await?;
    Ok((**db.snapshot().vm_by_name(&"web".parse().unwrap()).unwrap()).clone())
}

fn disks(disks: &[Disk]) -> Update {
    Update {
        disks: Some(disks.to_vec()),
        ..Update::default()
    }
}

fn held(db: &Db) -> Reserved {
    db.snapshot().reserved[&host_name("h1")].clone()
}

/// The host says that it has carried out the present generation, but for this.
async fn carried_out(db: &Db, pending: &[&str]) {
    let state = db.snapshot();
    let vm = state.vm_by_name(&"web".parse().unwrap()).unwrap();
    let told = |field: &&str| Pending {
        field: (*field).to_owned(),
        current: String::new(),
        wanted: String::new(),
        message: String::new(),
    };
    let mut observation = fixtures::observation(vm);
    observation.status_generation = vm.intent.generation.0 * 10 + 10 - pending.len() as u64;
    observation.pending = pending.iter().map(told).collect();
    let report: Reported = fixtures::reported(vm, observation);
    db.change(|tx| apply::apply(tx, &host_name("h1"), vec![report], Extent::Partial))
        .await;
}

#[tokio::test]
async fn each_part_that_cannot_change_is_refused_and_nothing_is_stored() {
    let (db, vm) = site().await;
    let [root, data] = [disk("root", 1024), disk("data", 1024)];
    let with = |edit: fn(&mut Disk)| {
        let mut changed = data.clone();
        edit(&mut changed);
        disks(&[root.clone(), changed])
    };
    let path = |error: Error| match error {
        Error::PartNotMutable { path } => path,
        Error::BootDisk { disk, .. } => format!("boots from {disk}"),
        Error::DiskShrinks { disk, .. } => format!("{disk} shrinks"),
        other => other.to_string(),
    };
    let cases = [
        (
            with(|disk| disk.format = dalgu_proto::vm::DiskFormat::Raw),
            "spec.disks[data].format",
        ),
        (
            with(|disk| disk.image = Some("a.raw".into())),
            "spec.disks[data].image",
        ),
        (
            with(|disk| disk.clone_mode = CloneMode::Full),
            "spec.disks[data].clone_mode",
        ),
        (with(|disk| disk.size_mib = 1), "data shrinks"),
        (disks(&[data.clone(), root.clone()]), "boots from root"),
        (disks(&[]), "boots from root"),
    ];
    for (update, expected) in cases {
        let refused = change(&db, update).await.expect_err(expected);
        assert_eq!(path(refused), expected);
    }
    for (edit, expected) in [
        ("bridge", "spec.nics[eth0].bridge"),
        ("mac", "spec.nics[eth0].mac"),
    ] {
        let mut nic = nic("eth0");
        match edit {
            "mac" => nic.mac = "52:54:00:00:00:01".into(),
            _ => nic.plug = Plug::Bridge { bridge: "br1".into() },
        }
        let update = Update {
            nics: Some(vec![nic]),
            ..Update::default()
        };
        assert_eq!(path(change(&db, update).await.expect_err(expected)), expected);
    }
    let now = db.snapshot().vm_by_name(&vm.name).unwrap().clone();
    assert_eq!(
        (&now.spec, now.intent.generation),
        (&vm.spec, vm.intent.generation)
    );
}

#[tokio::test]
async fn room_is_taken_at_once_and_given_back_when_the_host_has_carried_it_out() {
    let (db, _) = site().await;
    let size = |vcpus, memory_mib| Update {
        vcpus: Some(vcpus),
        memory_mib: Some(memory_mib),
        ..Update::default()
    };
    let grown = change(&db, size(4, 1024)).await.unwrap();
    assert_eq!(grown.intent.generation, Generation(4));
    assert_eq!(held(&db).vcpus, 4);
    let large = held(&db).memory_mib;
    carried_out(&db, &[]).await;
    change(&db, size(1, 128)).await.unwrap();
    assert_eq!(
        (held(&db).vcpus, held(&db).memory_mib),
        (4, large),
        "it may still have it"
    );
    carried_out(&db, &["vcpus"]).await;
    assert_eq!(held(&db).vcpus, 4, "its guest has not gone along");
    assert!(held(&db).memory_mib < large);
    carried_out(&db, &[]).await;
    assert_eq!(held(&db).vcpus, 1);
    assert_eq!(
        db.snapshot().vm_by_name(&"web".parse().unwrap()).unwrap().change,
        None
    );
}

#[tokio::test]
async fn a_disk_is_counted_and_named_as_new_until_it_is_made_and_as_there_until_it_is_gone() {
    let (db, vm) = site().await;
    let mut three = vm.spec.disks.clone();
    three.push(disk("more", 2048));
    let added = change(&db, disks(&three)).await.unwrap();
    assert_eq!(
        added.unmade().map(|disk| &*disk.name).collect::<Vec<_>>(),
        ["more"]
    );
    assert_eq!(held(&db).disks_mib["local"], 4096);
    carried_out(&db, &[]).await;
    let two = [disk("root", 1024), disk("more", 2048)];
    change(&db, disks(&two)).await.unwrap();
    carried_out(&db, &["disks[data]"]).await;
    assert_eq!(held(&db).disks_mib["local"], 4096, "the guest holds it");
    let again = change(
        &db,
        disks(&[disk("root", 1024), disk("more", 2048), disk("data", 8)]),
    )
    .await;
    assert!(matches!(again, Err(Error::DiskLeaving { .. })), "{again:?}");
    let caller = fixtures::caller();
    let ask = migrate::Migrate {
        destination: None,
        max_downtime_ms: 100,
        bandwidth_mib_per_second: 0,
        ignore_protection: false,
        policy: Policy::default(),
    };
    let moved = db
        .transact(|tx| migrate::migrate(tx, &caller, "web", "", ask))
        .await;
    assert!(matches!(moved, Err(Error::ChangeInProgress { .. })), "{moved:?}");
    carried_out(&db, &[]).await;
    assert_eq!(held(&db).disks_mib["local"], 3072);
}

#[tokio::test]
async fn a_host_without_room_refuses_with_what_it_lacks_and_where_there_is_room() {
    let (db, vm) = site().await;
    db.change(|tx| {
        let mut other = fixtures::vm("db", "h1");
        other.spec.vcpus = 13;
        tx.put_vm(other);
    })
    .await;
    let refused = change(
        &db,
        Update {
            vcpus: Some(4),
            ..Update::default()
        },
    )
    .await;
    let Err(Error::NoCapacity { decision, .. }) = refused else {
        panic!("{refused:?}");
    };
    let [verdict] = &decision.verdicts[..] else {
        panic!("{decision:?}");
    };
    assert_eq!(verdict.shortfalls[0].constraint, Constraint::Cpu);
    let hint = &decision.hint.as_ref().unwrap().text;
    assert!(hint.contains("dalgu vm migrate web --host h2"), "{hint}");
    // What it has it keeps, and what does not need what is short is not refused for it.
    let mut three = vm.spec.disks.clone();
    three.push(disk("more", 8));
    change(&db, disks(&three)).await.unwrap();
    let mut wide = vm.spec.disks.clone();
    wide.push(disk("wide", 200 << 10));
    let refused = change(&db, disks(&wide)).await;
    assert!(matches!(refused, Err(Error::NoCapacity { .. })), "{refused:?}");
}

#[tokio::test]
async fn a_vm_that_moves_and_one_on_an_old_host_are_not_changed() {
    let (db, vm) = site().await;
    db.change(|tx| tx.put_migration(fixtures::migration(&vm, "h2")))
        .await;
    let more = || Update {
        vcpus: Some(2),
        ..Update::default()
    };
    let refused = change(&db, more()).await;
    assert!(
        matches!(refused, Err(Error::MigrationInProgress(_))),
        "{refused:?}"
    );
    let described = Update {
        description: Some("shop".into()),
        ..Update::default()
    };
    change(&db, described)
        .await
        .expect("words are no part of a migration");
    let (db, _) = site().await;
    db.change(|tx| tx.put_host(fixtures::host("h1"))).await;
    let refused = change(&db, more()).await;
    assert!(matches!(refused, Err(Error::HostTooOld(_))), "{refused:?}");
}

#[tokio::test]
async fn an_added_interface_gets_an_address_that_nobody_has() {
    let (db, vm) = site().await;
    let given = |nics: Vec<Nic>| Update {
        nics: Some(nics),
        ..Update::default()
    };
    let added = change(&db, given(vec![nic("eth0"), nic("eth1")])).await.unwrap();
    assert_eq!(added.spec.nics[0], vm.spec.nics[0]);
    assert!(!added.spec.nics[1].mac.is_empty());
    let mut twin = nic("eth2");
    twin.mac.clone_from(&vm.spec.nics[0].mac);
    let refused = change(&db, given(vec![nic("eth0"), twin])).await;
    assert!(matches!(refused, Err(Error::MacInUse { .. })), "{refused:?}");
}

#[tokio::test]
async fn an_added_interface_whose_address_others_have_gets_the_next_that_is_free() {
    let of_attempt = |vm: &VmRecord, attempt| {
        let mut spec = vm.spec.clone();
        spec.nics = vec![nic("eth1")];
        spec.fill_in_again(vm.id, attempt);
        spec.nics.remove(0)
    };
    for taken in [0, 1, 3] {
        let (db, vm) = site().await;
        let mut others = fixtures::vm("others", "h2");
        others.spec.nics = (0..taken).map(|attempt| of_attempt(&vm, attempt)).collect();
        db.change(|tx| tx.put_vm(others)).await;
        let wanted = vec![vm.spec.nics[0].clone(), nic("eth1")];
        let added = Update {
            nics: Some(wanted),
            ..Update::default()
        };
        let added = change(&db, added).await.unwrap();
        assert_eq!(added.spec.nics[1], of_attempt(&vm, taken));
    }
}

/// The same disks, with the second in this pool.
fn data_in(vm: &VmRecord, pool: &str) -> Vec<Disk> {
    let mut disks = vm.spec.disks.clone();
    disks[1].pool = pool.to_owned();
    disks
}

#[tokio::test]
async fn a_disk_that_moves_has_room_in_both_pools_until_it_has_arrived() {
    let (db, vm) = site().await;
    let promised = |pool: &str| held(&db).disks_mib.get(pool).copied().unwrap_or(0);
    change(&db, disks(&data_in(&vm, "fast"))).await.unwrap();
    assert_eq!((promised("local"), promised("fast")), (2048, 1024));
    carried_out(&db, &["disks[data].pool"]).await;
    assert_eq!(
        (promised("local"), promised("fast")),
        (2048, 1024),
        "it is copied"
    );
    // It is called back; and what it has in the other pool may still be there.
    change(&db, disks(&data_in(&vm, "local"))).await.unwrap();
    assert_eq!((promised("local"), promised("fast")), (2048, 1024));
    carried_out(&db, &[]).await;
    assert_eq!((promised("local"), promised("fast")), (2048, 0));
    change(&db, disks(&data_in(&vm, "fast"))).await.unwrap();
    carried_out(&db, &[]).await;
    assert_eq!((promised("local"), promised("fast")), (1024, 1024));
}

#[tokio::test]
async fn a_disk_moves_only_where_it_can_be() {
    let (db, vm) = site().await;
    let refused = change(&db, disks(&data_in(&vm, "nowhere"))).await;
    assert!(matches!(refused, Err(Error::NoCapacity { .. })), "{refused:?}");
    let overlay = |tx: &mut Tx| {
        let mut vm = (**tx.vm_by_name(&"web".parse().unwrap()).unwrap()).clone();
        vm.spec.disks[1].digest = Some("ab".repeat(32).parse().unwrap());
        vm.spec.disks[1].clone_mode = CloneMode::Overlay;
        tx.put_vm(vm);
    };
    db.change(overlay).await;
    let refused = change(&db, disks(&data_in(&vm, "san"))).await;
    assert!(matches!(refused, Err(Error::OverlayStays { .. })), "{refused:?}");
    // One that is given without a pool stays where it is.
    change(&db, disks(&data_in(&vm, "fast"))).await.unwrap();
    let poolless = Update {
        poolless: ["data".to_owned()].into(),
        ..disks(&vm.spec.disks)
    };
    let same = change(&db, poolless).await.unwrap();
    assert_eq!(same.spec.disks[1].pool, "fast");
}

#[tokio::test]
async fn limits_change_and_need_an_agent_that_knows_them() {
    let (db, vm) = site().await;
    let mut limited = vm.spec.disks.clone();
    limited[1].limits.read_iops = Some(500);
    let changed = change(&db, disks(&limited)).await.unwrap();
    assert_eq!(changed.spec.disks[1].limits.read_iops, Some(500));
    let lifted = change(&db, disks(&vm.spec.disks)).await.unwrap();
    assert_eq!(lifted.spec.disks, vm.spec.disks);
    let (db, vm) = site().await;
    db.change(|tx| {
        let mut host = fixtures::host("h1");
        host.inventory.guest_features.push(GuestFeature::HotChange);
        tx.put_host(host);
    })
    .await;
    for wanted in [limited, data_in(&vm, "local2")] {
        let refused = change(&db, disks(&wanted)).await;
        assert!(matches!(refused, Err(Error::HostTooOld(_))), "{refused:?}");
    }
}

#[tokio::test]
async fn a_group_with_types_of_icmp_needs_an_agent_that_knows_them() {
    let (db, mut vm) = site().await;
    vm.spec.nics = vec![fixtures::nic("eth0", "field", &["web"])];
    vm.spec.fill_in(vm.id);
    db.change(|tx| {
        tx.put_network(fixtures::overlay("field", 7));
        tx.put_group(fixtures::group("web", &[]));
        tx.put_group(fixtures::pinged("ping"));
        tx.put_vm(vm.clone());
    })
    .await;
    let update = || Update {
        nics: Some(vec![fixtures::nic("eth0", "field", &["web", "ping"])]),
        ..Update::default()
    };
    let refused = change(&db, update()).await;
    assert!(matches!(refused, Err(Error::NoIcmpTypes { .. })), "{refused:?}");
    db.change(|tx| {
        let mut host = (**tx.hosts.get(&host_name("h1")).unwrap()).clone();
        host.inventory.guest_features.push(GuestFeature::IcmpType);
        tx.put_host(host);
    })
    .await;
    change(&db, update()).await.unwrap();
}

#[tokio::test]
async fn a_volume_is_named_with_its_own_format_or_with_none() {
    let (db, vm) = site().await;
    db.change(|tx| {
        let mut host = fixtures::host("h1");
        let features = [GuestFeature::HotChange, GuestFeature::Volume];
        host.inventory.guest_features.extend(features);
        tx.put_host(host);
        tx.put_volume(VolumeRecord {
            format: DiskFormat::Raw,
            ..fixtures::volume("ledger", Some("h1"))
        });
    })
    .await;
    let with = |said: Option<DiskFormat>| {
        let ledger = Disk {
            size_mib: 0,
            pool: String::new(),
            format: said.unwrap_or_default(),
            volume: Some(VolumeRef {
                name: "ledger".parse().unwrap(),
                id: None,
                format: said,
            }),
            ..disk("data2", 0)
        };
        let mut all = vm.spec.disks.clone();
        all.push(ledger);
        disks(&all)
    };
    let refused = change(&db, with(Some(DiskFormat::Qcow2))).await;
    let Err(Error::Invalid { field, .. }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(field, "vm.spec.disks[2].format");
    for said in [Some(DiskFormat::Raw), None] {
        let now = change(&db, with(said)).await.unwrap();
        assert_eq!(now.spec.disks[2].format, DiskFormat::Raw);
    }
    // Neither is it to become another.
    let refused = change(&db, with(Some(DiskFormat::Qcow2))).await;
    assert!(
        matches!(refused, Err(Error::PartNotMutable { .. })),
        "{refused:?}"
    );
}

/// The site, and the VM with its volume on the first host in addition, which its host has settled.
async fn with_volume() -> (Db, VmRecord) {
    let (db, vm) = site().await;
    db.change(|tx| {
        let mut host = (*tx.hosts[&host_name("h1")]).clone();
        let features = [GuestFeature::Volume, GuestFeature::VolumeMove];
        host.inventory.guest_features.extend(features);
        tx.put_host(host);
        tx.put_volume(fixtures::volume("ledger", Some("h1")));
    })
    .await;
    let ledger = Disk {
        size_mib: 0,
        pool: String::new(),
        volume: Some(VolumeRef {
            name: "ledger".parse().unwrap(),
            id: None,
            format: None,
        }),
        ..disk("ledger", 0)
    };
    let all = [vm.spec.disks.clone(), vec![ledger]].concat();
    let vm = change(&db, disks(&all)).await.unwrap();
    (db, vm)
}

fn ledger_in(vm: &VmRecord, pool: &str) -> Update {
    let mut all = vm.spec.disks.clone();
    all[2].pool = pool.to_owned();
    disks(&all)
}

fn pool_of_ledger(db: &Db) -> String {
    let name: dalgu_proto::ids::VolumeName = "ledger".parse().unwrap();
    db.snapshot().volumes[&name].pool.clone()
}

#[tokio::test]
async fn a_volume_is_in_its_old_pool_until_its_host_says_that_it_has_moved() {
    let (db, vm) = with_volume().await;
    let promised = |pool: &str| held(&db).disks_mib.get(pool).copied().unwrap_or(0);
    let early = change(&db, ledger_in(&vm, "fast")).await;
    assert!(matches!(early, Err(Error::ChangeInProgress { .. })), "{early:?}");
    carried_out(&db, &[]).await;
    change(&db, ledger_in(&vm, "fast")).await.unwrap();
    assert_eq!((promised("local"), promised("fast")), (3072, 1024));
    assert_eq!(pool_of_ledger(&db), "local");
    carried_out(&db, &["disks[ledger].pool"]).await;
    assert_eq!(pool_of_ledger(&db), "local", "it is copied");
    // To a third pool on the way, and grown.
    change(&db, ledger_in(&vm, "san")).await.unwrap();
    let mut larger = db.snapshot().vm_by_name(&vm.name).unwrap().spec.disks.clone();
    larger[2].size_mib = 2048;
    change(&db, disks(&larger)).await.unwrap();
    assert_eq!((promised("fast"), promised("san")), (1024, 2048));
    carried_out(&db, &["disks[ledger].pool"]).await;
    assert_eq!(pool_of_ledger(&db), "local");
    carried_out(&db, &[]).await;
    assert_eq!(pool_of_ledger(&db), "san");
    assert_eq!(
        (promised("local"), promised("fast"), promised("san")),
        (2048, 0, 2048)
    );
    // It stays there when it is taken away.
    change(&db, disks(&vm.spec.disks[..2])).await.unwrap();
    carried_out(&db, &[]).await;
    assert_eq!((pool_of_ledger(&db).as_str(), promised("san")), ("san", 2048));
}

#[tokio::test]
async fn a_volume_that_moves_is_neither_taken_away_nor_left_by_its_vm() {
    let (db, vm) = with_volume().await;
    carried_out(&db, &[]).await;
    change(&db, ledger_in(&vm, "fast")).await.unwrap();
    let delete = async || {
        let caller = fixtures::caller();
        let deletes = |tx: &mut Tx| crate::verbs::power::delete(tx, &caller, "web", "", true);
        db.transact(deletes).await
    };
    for said in [None, Some("disks[ledger].pool")] {
        if let Some(pending) = said {
            carried_out(&db, &[pending]).await;
        }
        let refused = change(&db, disks(&vm.spec.disks[..2])).await;
        assert!(
            matches!(refused, Err(Error::ChangeInProgress { .. })),
            "{refused:?}"
        );
        let refused = delete().await;
        assert!(
            matches!(refused, Err(Error::ChangeInProgress { .. })),
            "{refused:?}"
        );
    }
    // Called back, whatever its host has said last; which of the two has it, is not known before it says so.
    change(&db, ledger_in(&vm, "local")).await.unwrap();
    let refused = change(&db, disks(&vm.spec.disks[..2])).await;
    assert!(
        matches!(refused, Err(Error::ChangeInProgress { .. })),
        "{refused:?}"
    );
    assert_eq!(pool_of_ledger(&db), "local");
    carried_out(&db, &[]).await;
    assert_eq!(held(&db).disks_mib.get("fast").copied().unwrap_or(0), 0);
    delete().await.unwrap();
}

#[tokio::test]
async fn a_volume_moves_only_where_it_can_be() {
    let (db, vm) = with_volume().await;
    carried_out(&db, &[]).await;
    let refused = change(&db, ledger_in(&vm, "nowhere")).await;
    assert!(matches!(refused, Err(Error::NoCapacity { .. })), "{refused:?}");
    // All of it needs room there, though it has some where it is.
    db.change(|tx| {
        let mut host = (*tx.hosts[&host_name("h1")]).clone();
        let pools = host.inventory.pools.iter_mut();
        let small = pools.filter(|pool| pool.name == "fast");
        small.for_each(|pool| pool.capacity_bytes = 1000 << 20);
        tx.put_host(host);
    })
    .await;
    let refused = change(&db, ledger_in(&vm, "fast")).await;
    assert!(matches!(refused, Err(Error::NoCapacity { .. })), "{refused:?}");
    // An agent that would leave the old file behind.
    db.change(|tx| {
        let mut host = (*tx.hosts[&host_name("h1")]).clone();
        let features = &mut host.inventory.guest_features;
        features.retain(|feature| *feature != GuestFeature::VolumeMove);
        tx.put_host(host);
    })
    .await;
    let refused = change(&db, ledger_in(&vm, "san")).await;
    assert!(matches!(refused, Err(Error::HostTooOld(_))), "{refused:?}");
    // The others are as they were.
    assert_eq!(
        (
            change(&db, ledger_in(&vm, "")).await.unwrap().spec.disks,
            pool_of_ledger(&db)
        ),
        (vm.spec.disks, "local".to_owned())
    );
}
