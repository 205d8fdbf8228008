//! What pools hold, made by what it tells of.

use dalgu_proto::{
    ids::{BackupId, VolumeId},
    vm::Disk as VmDisk,
};
use uuid::Uuid;

use super::*;
use crate::{
    backups::tests as backups,
    model::{BackupFile, BackupRecord, BackupState, Change, FileOf, PoolFile, SnapshotRecord, Snapshots},
};

fn root() -> VmDisk {
    backups::gold("any").spec.disks.remove(0)
}

fn file(path: &str, of: FileOf) -> PoolFile {
    PoolFile {
        path: path.to_owned(),
        of,
        partial: false,
        size_bytes: 1 << 20,
        allocated_bytes: 1 << 20,
    }
}

fn of_vm(vm: VmId, disk: &str, layer: u32) -> PoolFile {
    let of = FileOf::Disk {
        vm,
        disk: disk.to_owned(),
        layer,
    };
    let number = if layer == 0 {
        String::new()
    } else {
        format!(".{layer}")
    };
    file(&format!("{vm}/{disk}{number}.qcow2"), of)
}

fn of_volume(volume: VolumeId) -> PoolFile {
    layer_of_volume(volume, 0)
}

fn layer_of_volume(id: VolumeId, layer: u32) -> PoolFile {
    let number = if layer > 0 {
        format!(".{layer}")
    } else {
        String::new()
    };
    file(
        &format!("volumes/{id}{number}.qcow2"),
        FileOf::Volume { id, layer },
    )
}

/// Gives a VM the volume "ledger".
fn with_volume(tx: &mut Tx, vm: &VmRecord) {
    let volume = fixtures::volume("ledger", Some("h1"));
    let data = volume.as_disk(&VmDisk {
        name: "data".to_owned(),
        ..root()
    });
    tx.put_volume(volume);
    changed(tx, vm, |vm| vm.spec.disks.push(data));
}

fn of_backup(backup: BackupId, name: &str) -> PoolFile {
    file(&format!("backups/{backup}/{name}"), FileOf::Backup(backup))
}

/// A VM with a disk and a snapshot, on h1.
fn with_disk(vm: &VmRecord) -> VmRecord {
    let snapshot = SnapshotRecord {
        id: Uuid::from_u128(1).to_string().parse().unwrap(),
        name: "one".parse().unwrap(),
        layer: 3,
        labels: Default::default(),
        description: String::new(),
        create_time: Timestamp::UNIX_EPOCH,
        generation: vm.intent.generation,
        taken: true,
        quiesced: false,
        deleting: false,
    };
    let mut vm = vm.clone();
    vm.spec.disks = vec![root()];
    vm.snapshots = Snapshots {
        all: vec![snapshot],
        last: 4,
        ..Snapshots::default()
    };
    vm
}

fn whole(vm: &VmRecord, number: u128) -> BackupRecord {
    let mut backup = backups::backup(vm, number, 1, BackupState::Available, None);
    backup.files.push(BackupFile {
        disk: "root".into(),
        file: "root.qcow2".into(),
        size_bytes: 1 << 20,
        stored_bytes: 1 << 20,
        virtual_size_bytes: 64 << 20,
        sha256: fixtures::digest(1),
    });
    backup
}

/// What is found of the files that h1's pool holds, with the VM and what else the test makes: kinds and subjects.
async fn found(
    change: impl FnOnce(&mut Tx, &VmRecord),
    files: impl FnOnce(&State, VmId) -> Vec<PoolFile>,
) -> Vec<String> {
    let (state, now) = site(|tx, vm| {
        changed(tx, vm, |vm| *vm = with_disk(vm));
        let vm = (*tx.vms[&vm.id]).clone();
        see(tx, &vm, |_| {});
        change(tx, &vm);
    })
    .await;
    let vm = *state.vms.keys().next().unwrap();
    let files = files(&state, vm);
    let place = |host: &str| (host_name(host), "local".to_owned());
    let diagnosis = examine(&View {
        state: &state,
        now,
        silence: crate::hosts::silence(&state),
        damage: None,
        files: [(place("h1"), Ok(files)), (place("h2"), Ok(Vec::new()))].into(),
    });
    let of = |finding: &Finding| format!("{} {}", finding.kind, finding.subject);
    diagnosis.findings.iter().map(of).collect()
}

fn none() -> Vec<String> {
    Vec::new()
}

fn left(path: &str) -> Vec<String> {
    vec![format!("LEFTOVER_FILE file /pool/{path} on host h1")]
}

fn volume_of(state: &State) -> VolumeId {
    state.volumes.values().next().unwrap().id
}

#[tokio::test]
async fn of_pools_that_hold_what_they_should_nothing_is_told() {
    let all = found(
        |tx, vm| {
            tx.put_volume(fixtures::volume("ledger", Some("h1")));
            tx.put_volume(fixtures::volume("new", None));
            tx.put_backup(whole(vm, 1));
            tx.put_backup(backups::backup(vm, 2, 2, BackupState::Running, None));
        },
        |state, vm| {
            let made = state.volumes.values().find(|volume| volume.made).unwrap().id;
            let running = BackupId::from_uuid(Uuid::from_u128(2));
            let half = PoolFile {
                partial: true,
                ..of_backup(running, "root.qcow2")
            };
            let first = BackupId::from_uuid(Uuid::from_u128(1));
            vec![
                of_vm(vm, "root", 0),
                of_vm(vm, "root", 3),
                of_volume(made),
                of_backup(first, "root.qcow2"),
                of_backup(first, "manifest.json"),
                half,
            ]
        },
    );
    assert_eq!(all.await, none());
}

#[tokio::test]
async fn a_layer_of_a_volume_is_its_vms_and_one_that_no_snapshot_has_is_left() {
    let with = |number| {
        move |state: &State, _| {
            let volume = volume_of(state);
            vec![of_volume(volume), layer_of_volume(volume, number)]
        }
    };
    assert_eq!(found(with_volume, with(3)).await, none());
    let told = found(with_volume, with(2)).await;
    assert!(told[0].ends_with(".2.qcow2 on host h1"), "{told:?}");
    let nobodys = |tx: &mut Tx, _: &VmRecord| tx.put_volume(fixtures::volume("ledger", Some("h1")));
    let told = found(nobodys, with(3)).await;
    assert!(told[0].ends_with(".3.qcow2 on host h1"), "{told:?}");
    // The newest alone is not the volume.
    let top = |state: &State, _| vec![layer_of_volume(volume_of(state), 3)];
    assert_eq!(
        found(with_volume, top).await,
        ["VOLUME_FILE_MISSING volume ledger"]
    );
}

#[tokio::test]
async fn files_that_nobody_knows_are_told_each_with_its_place() {
    let stranger = VmId::from_uuid(Uuid::from_u128(77));
    let lost = VolumeId::from_uuid(Uuid::from_u128(78));
    let old = BackupId::from_uuid(Uuid::from_u128(79));
    let nothing = |_: &mut Tx, _: &VmRecord| {};
    assert_eq!(
        found(nothing, |_, _| vec![of_volume(lost)]).await,
        left(&format!("volumes/{lost}.qcow2"))
    );
    assert_eq!(
        found(nothing, |_, _| vec![of_vm(stranger, "root", 0)]).await,
        left(&format!("{stranger}/root.qcow2"))
    );
    // A domain that is there is told of; its files are in use.
    let domain = |tx: &mut Tx, _: &VmRecord| {
        with_live(tx, "h1", |live| live.unmanaged.push(domain(stranger, true, true)));
    };
    let told = found(domain, |_, _| vec![of_vm(stranger, "root", 0)]).await;
    assert_eq!(told, [format!("LEFTOVER_DOMAIN domain {stranger}")]);
    // A backup is one thing, whatever it consists of.
    let two = |_: &State, _| vec![of_backup(old, "manifest.json"), of_backup(old, "root.qcow2")];
    assert_eq!(found(nothing, two).await, left(&format!("backups/{old}")));
    let odd = |_: &State, _| vec![file("backups/mine", FileOf::Unknown)];
    assert_eq!(found(nothing, odd).await, left("backups/mine"));
}

#[tokio::test]
async fn what_a_vm_has_no_more_is_told_when_nothing_is_under_way() {
    let nothing = |_: &mut Tx, _: &VmRecord| {};
    let layer = |_: &State, vm| vec![of_vm(vm, "root", 0), of_vm(vm, "root", 2)];
    let layers = found(nothing, layer).await;
    assert!(
        layers.len() == 1 && layers[0].ends_with("/root.2.qcow2 on host h1"),
        "{layers:?}"
    );
    let other = found(nothing, |_, vm| vec![of_vm(vm, "data", 0)]).await;
    assert!(other[0].ends_with("/data.qcow2 on host h1"), "{other:?}");
    let half = |_: &State, vm| {
        vec![PoolFile {
            partial: true,
            ..of_vm(vm, "root", 0)
        }]
    };
    assert_eq!(found(nothing, half).await.len(), 1);
    // Its host has not carried out the last change.
    let busy = |tx: &mut Tx, vm: &VmRecord| see(tx, vm, |seen| seen.observed = Generation(1));
    assert_eq!(found(busy, layer).await, none());
    assert_eq!(found(busy, half).await, none());
    // It has gone to another host.
    let moved = |tx: &mut Tx, vm: &VmRecord| {
        changed(tx, vm, |vm| vm.owner = host_name("h2"));
        let vm = (*tx.vms[&vm.id]).clone();
        see(tx, &vm, |seen| seen.host = host_name("h2"));
    };
    assert_eq!(found(moved, |_, vm| vec![of_vm(vm, "root", 0)]).await.len(), 1);
}

#[tokio::test]
async fn volumes_and_backups_whose_files_are_gone_or_elsewhere_are_told() {
    let volume = |host: &'static str| {
        move |tx: &mut Tx, _: &VmRecord| tx.put_volume(fixtures::volume("ledger", Some(host)))
    };
    let gone = "VOLUME_FILE_MISSING volume ledger";
    assert_eq!(found(volume("h1"), |_, _| Vec::new()).await, [gone]);
    let half = |state: &State, _| {
        vec![PoolFile {
            partial: true,
            ..of_volume(volume_of(state))
        }]
    };
    assert_eq!(found(volume("h1"), half).await[0], gone);
    // On the wrong host it is both.
    let both = found(volume("h2"), |state, _| vec![of_volume(volume_of(state))]).await;
    assert!(
        both.len() == 2 && both[0] == gone && both[1].starts_with("LEFTOVER_FILE"),
        "{both:?}"
    );
    // On its way to another pool it may be in either.
    let moving = |tx: &mut Tx, vm: &VmRecord| {
        let ledger = fixtures::volume("ledger", Some("h1"));
        let old = ledger.as_disk(&root());
        tx.put_volume(ledger);
        changed(tx, vm, |vm| {
            vm.snapshots = Snapshots::default();
            vm.spec.disks = vec![VmDisk {
                pool: "fast".to_owned(),
                ..old.clone()
            }];
            vm.change = Some(Change {
                generation: vm.intent.generation,
                vcpus: vm.spec.vcpus,
                memory_mib: vm.spec.memory_mib,
                left_out: vec![old],
                added: Default::default(),
            });
        });
    };
    assert_eq!(found(moving, |_, _| Vec::new()).await, none());
    let here = |state: &State, _| vec![of_volume(volume_of(state))];
    assert_eq!(found(moving, here).await, none());

    let id = BackupId::from_uuid(Uuid::from_u128(1));
    let kept = |tx: &mut Tx, vm: &VmRecord| tx.put_backup(whole(vm, 1));
    let lost = [format!("BACKUP_FILE_MISSING backup {id}")];
    let only = |_: &State, _| vec![of_backup(id, "manifest.json")];
    assert_eq!(found(kept, only).await, lost);
    let shorter = |_: &State, _| {
        vec![PoolFile {
            size_bytes: 7,
            ..of_backup(id, "root.qcow2")
        }]
    };
    assert_eq!(found(kept, shorter).await, lost);
    let failed = |tx: &mut Tx, vm: &VmRecord| {
        tx.put_backup(backups::backup(vm, 1, 1, BackupState::Failed, None));
    };
    assert_eq!(found(failed, only).await, left(&format!("backups/{id}")));
}

#[tokio::test]
async fn a_pool_that_does_not_tell_is_named_and_judges_nothing() {
    let (state, now) = site(|tx, _| tx.put_volume(fixtures::volume("ledger", Some("h1")))).await;
    let place = (host_name("h1"), "local".to_owned());
    let diagnosis = examine(&View {
        state: &state,
        now,
        silence: crate::hosts::silence(&state),
        damage: None,
        files: [(place.clone(), Err("it hangs".to_owned()))].into(),
    });
    let [finding] = &diagnosis.findings[..] else {
        panic!("{diagnosis:?}");
    };
    assert_eq!((finding.kind, finding.severity), ("FILES_NOT_SEEN", Notice));
    assert_eq!(to_ask(&state), [place, (host_name("h2"), "local".to_owned())]);
}
