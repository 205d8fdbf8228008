//! The files of backups, and disks that are made from them, against the real qemu-img.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use dalgu_proto::{
    ids::BackupId,
    vm::{BackupRef, Disk},
};
use tokio::time::Instant;
use uuid::Uuid;

use super::{super::storage::Pool, files::Target, *};
use crate::hypervisor::{
    Definition,
    libvirt::{
        storage::Storage,
        tests::{definition, disk},
    },
};

struct Place {
    dir: tempfile::TempDir,
    storage: Storage,
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let pool = |name: &str| Pool {
        name: name.into(),
        path: dir.path().join(name),
        shared: false,
        mounted: false,
    };
    let (images, store) = (dir.path().join("images"), dir.path().join("store"));
    let mut storage = Storage::new(vec![pool("local"), pool("vault")], images, store, None);
    storage.nvram = dir.path().join("nvram");
    for part in ["local", "vault", "images", "store", "nvram"] {
        fs::create_dir(dir.path().join(part)).unwrap();
    }
    Place { dir, storage }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn qemu_io(path: &Path, write: &str) {
    let output = Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", write])
        .arg(path)
        .output();
    assert!(output.unwrap().status.success(), "{write}");
}

fn order(vm: &Definition, number: u128) -> Order {
    Order {
        id: BackupId::from_uuid(Uuid::from_u128(number)),
        vm: vm.id,
        name: vm.name.clone(),
        spec: vm.spec.clone(),
        pool: "vault".into(),
        wanted: Wanted::Auto,
        parent: None,
    }
}

impl Place {
    fn whole(&self, number: u128) -> PathBuf {
        let id = Uuid::from_u128(number);
        self.dir.path().join("vault/backups").join(id.to_string())
    }

    fn sources(&self, vm: &Definition) -> Vec<Source> {
        let source = |disk: &Disk| Source {
            name: disk.name.clone(),
            target: "vda".into(),
            file: self.storage.path(vm.id, disk).unwrap(),
            format: disk.format,
            size: disk.size_mib << 20,
        };
        vm.spec.disks.iter().map(source).collect()
    }

    fn publish(&self, order: &Order, kind: Kind, targets: &[Target]) -> Manifest {
        let manifest = Manifest {
            version: MANIFEST_VERSION,
            backup: order.id,
            vm: order.vm,
            name: order.name.clone(),
            spec: order.spec.clone(),
            kind,
            full_reason: None,
            quiesced: true,
            checkpoint: false,
            point_time: Timestamp::UNIX_EPOCH,
            files: Vec::new(),
        };
        self.storage.publish("vault", manifest, targets).unwrap()
    }

    /// What a disk that is made from a backup holds.
    async fn restored(&self, number: u128, format: DiskFormat) -> Result<Vec<u8>, Error> {
        let vm = definition(vec![Disk {
            backup: Some(BackupRef {
                id: BackupId::from_uuid(Uuid::from_u128(number)),
                pool: "vault".into(),
                disk: "root".into(),
            }),
            ..disk("root", "local", None, format)
        }]);
        let made = self.storage.create(&vm, false, soon()).await;
        let path = self.storage.path(vm.id, &vm.spec.disks[0]).unwrap();
        let left = fs::read_dir(path.parent().unwrap()).into_iter().flatten();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), usize::from(made.is_ok()), "{left:?}");
        made?;
        let plain = self.dir.path().join("plain");
        let converted = Command::new("qemu-img")
            .args(["convert", "-O", "raw"])
            .args([&path, &plain])
            .status();
        assert!(converted.unwrap().success());
        self.storage.delete(vm.id, false).unwrap();
        Ok(fs::read(plain).unwrap())
    }
}

/// A full backup 1 and 2 over that, as QEMU would have made them; and 3 of the same disk, off.
async fn chain(place: &Place) -> (Vec<u8>, Vec<u8>) {
    let vm = definition(vec![disk("root", "local", None, DiskFormat::Qcow2)]);
    place.storage.create(&vm, false, soon()).await.unwrap();
    let file = place.storage.path(vm.id, &vm.spec.disks[0]).unwrap();
    qemu_io(&file, "write -P 1 0 1M");
    let (first, sources) = (order(&vm, 1), place.sources(&vm));
    let targets = place.storage.targets(&first, &sources, None, soon());
    let targets = targets.await.unwrap();
    qemu_io(&targets[0].path, "write -P 1 0 1M");
    let full = place.publish(&first, Kind::Full, &targets);
    let second = order(&vm, 2);
    let targets = place.storage.targets(&second, &sources, Some(&full), soon());
    let targets = targets.await.unwrap();
    qemu_io(&targets[0].path, "write -P 2 64k 64k");
    place.publish(&second, Kind::Incremental { parent: first.id }, &targets);
    let third = order(&vm, 3);
    let targets = place.storage.copy_disks(&third, &sources).unwrap();
    place.publish(&third, Kind::Full, &targets);
    let mut old = vec![0; 16 << 20];
    old[..1 << 20].fill(1);
    let mut new = old.clone();
    new[64 << 10..128 << 10].fill(2);
    (old, new)
}

#[tokio::test]
async fn disks_are_made_of_a_chain_in_either_format() {
    let place = place();
    let (old, new) = chain(&place).await;
    for format in [DiskFormat::Qcow2, DiskFormat::Raw] {
        assert!(place.restored(1, format).await.unwrap() == old);
        assert!(place.restored(3, format).await.unwrap() == old);
        assert!(place.restored(2, format).await.unwrap() == new);
    }
    // By hand, as the runbook says.
    let plain = place.dir.path().join("by-hand");
    let by_hand = Command::new("qemu-img")
        .args(["convert", "-O", "raw"])
        .args([place.whole(2).join("root.qcow2"), plain.clone()])
        .status();
    assert!(by_hand.unwrap().success());
    assert!(fs::read(plain).unwrap() == new);
    let mode = fs::metadata(place.whole(2)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[tokio::test]
async fn a_damaged_file_is_told_of_and_no_disk_is_made_from_it() {
    let place = place();
    chain(&place).await;
    let file = place.whole(1).join("root.qcow2");
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&file, bytes).unwrap();
    for number in [1, 2] {
        let error = place.restored(number, DiskFormat::Qcow2).await.unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
    }
    fs::remove_file(file).unwrap();
    place.restored(2, DiskFormat::Qcow2).await.unwrap_err();
}

#[tokio::test]
async fn a_backup_that_is_needed_stays_and_what_is_half_made_is_none() {
    let place = place();
    chain(&place).await;
    let id = |number| BackupId::from_uuid(Uuid::from_u128(number));
    let error = place.storage.discard("vault", id(1)).unwrap_err();
    assert!(error.to_string().contains("is needed by"), "{error}");
    assert!(place.storage.manifest("vault", id(1)).unwrap().is_some());
    for number in [3, 2, 2, 1, 1] {
        place.storage.discard("vault", id(number)).unwrap();
        assert_eq!(place.storage.manifest("vault", id(number)).unwrap(), None);
    }
    let home = place.dir.path().join("vault/backups");
    assert_eq!(fs::read_dir(&home).unwrap().count(), 0);
    fs::create_dir(home.join(format!("{}.partial", id(4)))).unwrap();
    assert_eq!(place.storage.manifest("vault", id(4)).unwrap(), None);
    place.storage.discard("vault", id(4)).unwrap();
    assert_eq!(fs::read_dir(&home).unwrap().count(), 0);
    // A pool that is not there does not say that a backup is gone.
    fs::remove_dir_all(place.dir.path().join("vault")).unwrap();
    place.storage.manifest("vault", id(1)).unwrap_err();
}

#[test]
fn the_xml_names_the_disks_and_what_it_begins_from() {
    let id = BackupId::from_uuid(Uuid::from_u128(5));
    let source = Source {
        name: "root".into(),
        target: "vda".into(),
        file: "/x".into(),
        format: DiskFormat::Qcow2,
        size: 1,
    };
    let sources = [source];
    let xml = backup_xml(&sources, &[Target::of_test("root", "/p/root.qcow2")], Some(id));
    assert_eq!(
        xml.to_xml().unwrap(),
        "<domainbackup mode=\"push\"><incremental>00000000-0000-0000-0000-000000000005</incremental><disks><disk \
         name=\"vda\" backup=\"yes\" type=\"file\"><driver type=\"qcow2\"/><target file=\"/p/root.qcow2\"/></disk></disks>\
         </domainbackup>"
    );
    assert_eq!(
        checkpoint_xml(id, &sources).to_xml().unwrap(),
        "<domaincheckpoint><name>00000000-0000-0000-0000-000000000005</name><disks><disk name=\"vda\" \
         checkpoint=\"bitmap\"/></disks></domaincheckpoint>"
    );
}
