//! Histories of VMs and volumes that are made, attached, moved, detached and deleted: what is counted as reserved is what follows from
//! the records, a volume is one VM's at most, and one that was made is where the record says.

use std::collections::{BTreeMap, BTreeSet};

use dalgu_proto::{
    host::GuestFeature,
    ids::{Generation, HostName, VolumeId, VolumeName},
    vm::{Disk, DiskFormat, VolumeRef},
};
use proptest::{collection::vec, prelude::*};

use super::holder;
use crate::{
    fixtures::{self, host_name},
    model::{MigrationRecord, Phase, VmRecord, VolumeRecord},
    state::{Db, Hooks, State, from_image},
    store::{Store as _, memory::Disk as Store},
    verbs::{self, update},
};

const HOSTS: usize = 3;
const VMS: usize = 4;
const VOLUMES: usize = 4;

#[derive(Debug, Clone)]
enum Event {
    /// A volume is made.
    Make(usize),
    /// It is to be larger by so much.
    Grow(usize, u64),
    /// It is deleted, or that is taken back.
    Delete(usize, bool),
    /// It is gone for good.
    Purge(usize),
    /// A VM is made on a host, with these volumes.
    Create(usize, usize, BTreeSet<usize>),
    /// A VM is told to have these volumes from now on.
    Attach(usize, BTreeSet<usize>),
    /// One of its volumes is to be in another pool, or back in its own.
    Move(usize, usize, bool),
    /// Its host has carried out what it was told; or, if not, a guest keeps what was left out.
    Settle(usize, bool),
    /// It is gone.
    Remove(usize),
    /// It moves to a host, and has arrived there, or not.
    Migrate(usize, usize, bool),
    /// Its migration has ended.
    End(usize),
}

fn some() -> impl Strategy<Value = BTreeSet<usize>> {
    vec(0..VOLUMES, 0..3).prop_map(|some| some.into_iter().collect())
}

fn event() -> impl Strategy<Value = Event> {
    let (vm, host, volume) = (|| 0..VMS, || 0..HOSTS, || 0..VOLUMES);
    prop_oneof![
        4 => volume().prop_map(Event::Make),
        2 => (volume(), 1..64_u64).prop_map(|(volume, more)| Event::Grow(volume, more)),
        2 => (volume(), any::<bool>()).prop_map(|(volume, back)| Event::Delete(volume, back)),
        1 => volume().prop_map(Event::Purge),
        4 => (vm(), host(), some()).prop_map(|(vm, host, volumes)| Event::Create(vm, host, volumes)),
        4 => (vm(), some()).prop_map(|(vm, volumes)| Event::Attach(vm, volumes)),
        4 => (vm(), volume(), any::<bool>()).prop_map(|(vm, volume, fast)| Event::Move(vm, volume, fast)),
        4 => (vm(), any::<bool>()).prop_map(|(vm, done)| Event::Settle(vm, done)),
        2 => vm().prop_map(Event::Remove),
        2 => (vm(), host(), any::<bool>()).prop_map(|(vm, host, there)| Event::Migrate(vm, host, there)),
        2 => vm().prop_map(Event::End),
    ]
}

fn volume_of(state: &State, volume: usize) -> Option<VolumeRecord> {
    let name: VolumeName = format!("v{volume}").parse().unwrap();
    state.volumes.get(&name).map(|known| (**known).clone())
}

fn vm_of(state: &State, vm: usize) -> Option<VmRecord> {
    let name = format!("vm{vm}").parse().unwrap();
    state.vm_by_name(&name).map(|vm| (**vm).clone())
}

fn disk(volume: usize) -> Disk {
    Disk {
        name: format!("d{volume}"),
        size_mib: 0,
        pool: String::new(),
        image: None,
        format: DiskFormat::Qcow2,
        digest: None,
        clone_mode: Default::default(),
        volume: Some(VolumeRef {
            name: format!("v{volume}").parse().unwrap(),
            id: None,
            format: None,
        }),
        limits: Default::default(),
        backup: None,
    }
}

fn make(tx: &mut crate::state::Tx, volume: usize) {
    let new = verbs::volume::Create {
        name: format!("v{volume}").parse().unwrap(),
        disk: Disk {
            size_mib: 100,
            pool: "local".to_owned(),
            volume: None,
            ..disk(volume)
        },
        labels: BTreeMap::new(),
        description: String::new(),
    };
    // Its name may be taken.
    let _ = verbs::volume::create(tx, &fixtures::caller(), new);
}

fn create(tx: &mut crate::state::Tx, vm: usize, host: usize, volumes: &BTreeSet<usize>) {
    if vm_of(tx, vm).is_some() {
        return;
    }
    let mut record = fixtures::vm(&format!("vm{vm}"), &format!("h{host}"));
    record.intent.generation = Generation(1);
    record.spec.disks = volumes.iter().map(|volume| disk(*volume)).collect();
    let mut disks = std::mem::take(&mut record.spec.disks);
    if super::resolve::volumes(tx, &mut disks, &[]).is_err() {
        return;
    }
    if disks
        .iter()
        .any(|disk| super::resolve::reachable(tx, &record, disk).is_err())
    {
        return;
    }
    record.new_volumes = super::resolve::unmade(tx, &disks);
    record.spec.disks = disks;
    tx.put_vm(record);
}

fn attach(tx: &mut crate::state::Tx, vm: usize, volumes: &BTreeSet<usize>) {
    let change = update::Update {
        disks: Some(volumes.iter().map(|volume| disk(*volume)).collect()),
        ..Default::default()
    };
    // What is refused changes nothing.
    let _ = update::update(tx, &fixtures::caller(), &format!("vm{vm}"), "", change);
}

fn move_it(tx: &mut crate::state::Tx, vm: usize, volume: usize, fast: bool) {
    let Some(record) = vm_of(tx, vm) else { return };
    let mut disks = record.spec.disks.clone();
    let name = disk(volume).name;
    for disk in disks.iter_mut().filter(|disk| disk.name == name) {
        disk.pool = if fast { "fast" } else { "local" }.to_owned();
    }
    let change = update::Update {
        disks: Some(disks),
        ..Default::default()
    };
    // What is refused changes nothing.
    let _ = update::update(tx, &fixtures::caller(), &format!("vm{vm}"), "", change);
}

fn settle(tx: &mut crate::state::Tx, vm: usize, done: bool) {
    let Some(record) = vm_of(tx, vm) else { return };
    let mut seen = fixtures::observation(&record);
    if !done {
        let left_out = record.change.iter().flat_map(|change| &change.left_out);
        let stays = |name: &str| record.spec.disks.iter().any(|disk| disk.name == name);
        let path = |name: &str| if stays(name) { ".pool" } else { "" };
        seen.pending = left_out
            .map(|disk| crate::model::Pending {
                field: format!("disks[{}]{}", disk.name, path(&disk.name)),
                current: String::new(),
                wanted: String::new(),
                message: String::new(),
            })
            .collect();
    }
    let reported = fixtures::reported(&record, seen);
    let owner = record.owner.clone();
    crate::reconcile::apply::apply(
        tx,
        &owner,
        vec![reported],
        crate::reconcile::apply::Extent::Partial,
    );
}

fn migrate(tx: &mut crate::state::Tx, vm: usize, host: usize, there: bool) {
    let host = host_name(&format!("h{host}"));
    let Some(mut record) = vm_of(tx, vm) else { return };
    if tx.active_migration(record.id).is_some() || record.owner == host || record.change.is_some() {
        return;
    }
    tx.put_migration(fixtures::migration(&record, host.as_str()));
    if there {
        record.owner = host;
        record.epoch = record.epoch.next();
        record.new_volumes.clear();
        tx.put_vm(record);
    }
}

async fn happen(db: &Db, event: Event) {
    let caller = fixtures::caller();
    db.change(|tx| match event {
        Event::Make(volume) => make(tx, volume),
        Event::Grow(volume, more) => {
            let Some(known) = volume_of(tx, volume) else {
                return;
            };
            let update = verbs::volume::Update {
                size_mib: Some(known.size_mib + more),
                ..Default::default()
            };
            let _ = verbs::volume::update(tx, &caller, &known.name, "", update);
        }
        Event::Delete(volume, back) => {
            let Some(known) = volume_of(tx, volume) else {
                return;
            };
            let _ = match back {
                true => verbs::volume::undelete(tx, &caller, &known.name, ""),
                false => verbs::volume::delete(tx, &caller, &known.name, "", Default::default()),
            };
        }
        Event::Purge(volume) => {
            if let Some(known) = volume_of(tx, volume).filter(|known| known.delete_time.is_some()) {
                tx.delete_volume(&known.name);
            }
        }
        Event::Create(vm, host, volumes) => create(tx, vm, host, &volumes),
        Event::Attach(vm, volumes) => attach(tx, vm, &volumes),
        Event::Move(vm, volume, fast) => move_it(tx, vm, volume, fast),
        Event::Settle(vm, done) => settle(tx, vm, done),
        Event::Remove(vm) => {
            if let Some(record) = vm_of(tx, vm).filter(|vm| tx.active_migration(vm.id).is_none()) {
                tx.delete_vm(record.id);
            }
        }
        Event::Migrate(vm, host, there) => migrate(tx, vm, host, there),
        Event::End(vm) => {
            let Some(record) = vm_of(tx, vm) else { return };
            if let Some(migration) = tx.active_migration(record.id).cloned() {
                tx.put_migration(MigrationRecord {
                    phase: Phase::Done,
                    ..(*migration).clone()
                });
            }
        }
    })
    .await;
}

/// MiB by host and pool.
type Sums = BTreeMap<(String, String), u64>;

/// What the records promise.
fn promised(state: &State) -> Sums {
    let mut sums = Sums::new();
    let mut held = BTreeSet::<VolumeId>::new();
    let mut add = |host: &HostName, pool: &str, mib| {
        *sums.entry((host.to_string(), pool.to_owned())).or_default() += mib;
    };
    for vm in state.vms.values() {
        let migration = state.active_migration(vm.id);
        let sides = migration.map(|m| [m.source.clone(), m.destination.clone()]);
        let mut hosts: BTreeSet<_> = sides.into_iter().flatten().collect();
        hosts.insert(vm.owner.clone());
        let spec = vm.held();
        held.extend(spec.disks.iter().filter_map(Disk::volume_id));
        for host in hosts {
            spec.disks
                .iter()
                .for_each(|disk| add(&host, &disk.pool, disk.size_mib));
        }
    }
    for volume in state.volumes.values().filter(|volume| !held.contains(&volume.id)) {
        if let Some(host) = &volume.host {
            add(host, &volume.pool, volume.size_mib);
        }
    }
    sums.retain(|_, mib| *mib > 0);
    sums
}

fn counted(state: &State) -> Sums {
    let sums = state.reserved.iter().flat_map(|(host, held)| {
        let pools = held.disks_mib.iter();
        pools.map(move |(pool, mib)| ((host.to_string(), pool.clone()), *mib))
    });
    sums.filter(|(_, mib)| *mib > 0).collect()
}

fn holds(state: &State) {
    assert_eq!(counted(state), promised(state), "what is reserved");
    for vms in state.volume_vms.values() {
        assert_eq!(vms.len(), 1, "a volume is one VM's");
    }
    for vm in state.vms.values() {
        for disk in &vm.spec.disks {
            let volume = super::resolve::of_disk(state, disk).expect("it has a record");
            assert_eq!(volume.host.as_ref(), Some(&vm.owner));
            assert_eq!(volume.size_mib, disk.size_mib);
            let left_out = vm.change.iter().flat_map(|change| &change.left_out);
            let mut old = left_out.filter(|old| old.name == disk.name).map(|old| &old.pool);
            let known = volume.pool == disk.pool || old.any(|old| *old == volume.pool);
            assert!(known, "{volume:?} is in no pool that its VM has: {vm:?}");
            assert_eq!(volume.made, !vm.new_volumes.contains(&disk.name), "{volume:?}");
            assert!(volume.delete_time.is_none());
        }
    }
    for name in &state.deleted_volumes {
        let volume = &state.volumes[name];
        assert!(volume.delete_time.is_some() && holder(state, volume.id).is_none());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_reserved_follows_from_the_records_whatever_becomes_of_volumes(events in vec(event(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let disk = Store::default();
            let db = Db::open(disk.open(), fixtures::cluster_id(), Hooks::default()).unwrap();
            db.change(|tx| {
                for host in 0..HOSTS {
                    let mut record = fixtures::host(&format!("h{host}"));
                    use GuestFeature::{DiskChange, HotChange, Volume, VolumeMove};
                    record.inventory.guest_features = vec![HotChange, Volume, DiskChange, VolumeMove];
                    let fast = dalgu_proto::host::Pool {
                        name: "fast".to_owned(),
                        ..record.inventory.pools[0].clone()
                    };
                    record.inventory.pools.push(fast);
                    tx.put_host(record);
                }
            })
            .await;
            let any = crate::placement::Request::new(fixtures::spec());
            db.change(|tx| drop(tx.decide(&any, Default::default(), 2))).await;
            for event in events {
                happen(&db, event).await;
                holds(&db.snapshot());
                db.change(|tx| assert!(tx.fleet_is_current())).await;
            }
            let read = from_image(&disk.open().load().unwrap(), fixtures::cluster_id()).unwrap();
            assert_eq!(counted(&read), counted(&db.snapshot()), "after a start");
            assert_eq!(read.volume_vms, db.snapshot().volume_vms);
        });
    }
}
