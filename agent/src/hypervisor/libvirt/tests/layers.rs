//! Layers of disks against the real qemu-img.

use std::{collections::BTreeSet, path::Path};

use dalgu_proto::{
    ids::VolumeId,
    vm::{CloneMode, Disk, DiskFormat, VolumeRef},
};

use super::{
    definition, disk,
    storage::{Place, info, of_image, place, qemu_img, soon, stored},
};
use crate::hypervisor::{Definition, Error};

/// A disk that is a volume of the site.
fn volume(name: &str, number: u128, format: DiskFormat) -> Disk {
    Disk {
        volume: Some(VolumeRef {
            name: name.parse().unwrap(),
            id: Some(VolumeId::from_uuid(uuid::Uuid::from_u128(number))),
            format: None,
        }),
        ..disk(name, "local", None, format)
    }
}

/// What a guest would read of a disk whose top is this file.
fn content(place: &Place, path: &Path, format: DiskFormat) -> Vec<u8> {
    let out = place.dir.path().join("out");
    let (path, raw) = (path.to_str().unwrap(), out.to_str().unwrap());
    qemu_img(&["convert", "-f", format.as_str(), "-O", "raw", path, raw]);
    std::fs::read(out).unwrap()
}

/// A guest writes a cluster and a piece of one, zeros, and gives space back.
fn write(path: &Path, format: DiskFormat, value: u8) {
    let at = u32::from(value) * 64;
    let commands = [
        format!("write -P {value} {at}k 64k"),
        format!("write -P {value} {}k 4k", at + 700),
        format!("write -P {} 5M 4k", value + 100),
        format!("write -z {}k 128k", at + 64),
        format!("write -z -u {}k 64k", 2048 + at),
        format!("discard {}k 64k", 3072 + at),
    ];
    let mut words = vec!["-d", "unmap", "-f", format.as_str()];
    for command in &commands {
        words.extend(["-c", command]);
    }
    let status = std::process::Command::new("qemu-io")
        .args(words)
        .arg(path)
        .output()
        .unwrap();
    assert!(status.status.success(), "{status:?}");
}

async fn add(place: &Place, vm: &Definition, disk: &Disk, top: &Path, number: u32) -> std::path::PathBuf {
    let chain = place.storage.chain(vm.id, disk, top).unwrap();
    let below = chain.last().unwrap();
    let layer = place.storage.make_layer(vm.id, disk, number, below, soon());
    layer.await.unwrap()
}

async fn merge(place: &Place, vm: &Definition, disk: &Disk, top: &Path, number: u32) {
    let chain = place.storage.chain(vm.id, disk, top).unwrap();
    for _ in 0..2 {
        let merged = place.storage.merge_layer(disk, &chain, number, soon());
        merged.await.unwrap();
    }
}

#[tokio::test]
async fn whatever_layer_is_merged_a_guest_reads_what_it_wrote() {
    let place = place();
    let (digest, _) = stored(&place);
    let vm = definition(vec![
        of_image("over", &digest, CloneMode::Overlay, DiskFormat::Qcow2),
        of_image("raw", &digest, CloneMode::Full, DiskFormat::Raw),
        of_image("copy", &digest, CloneMode::Full, DiskFormat::Qcow2),
        disk("blank", "shared", None, DiskFormat::Qcow2),
        volume("data", 1, DiskFormat::Qcow2),
        volume("raw2", 2, DiskFormat::Raw),
    ]);
    place.storage.create(&vm, false, soon()).await.unwrap();
    for disk in &vm.spec.disks {
        let base = place.storage.path(vm.id, disk).unwrap();
        write(&base, disk.format, 1);
        let (mut files, mut held) = (vec![base.clone()], vec![content(&place, &base, disk.format)]);
        for (number, value) in [(1, 2), (2, 3), (7, 4)] {
            let top = add(&place, &vm, disk, files.last().unwrap(), number).await;
            assert_eq!(add(&place, &vm, disk, files.last().unwrap(), number).await, top);
            assert_eq!(content(&place, &top, DiskFormat::Qcow2), *held.last().unwrap());
            write(&top, DiskFormat::Qcow2, value);
            held.push(content(&place, &top, DiskFormat::Qcow2));
            files.push(top);
        }
        let top = &files[3];
        assert_eq!(
            place.storage.layer_files(vm.id, disk).unwrap(),
            BTreeSet::from([1, 2, 7])
        );
        // In the middle: the next goes on without it.
        merge(&place, &vm, disk, top, 2).await;
        let chain = place.storage.chain(vm.id, disk, top).unwrap();
        let numbers: Vec<_> = chain.iter().map(|link| link.layer).collect();
        assert_eq!(numbers, [None, Some(1), Some(7)], "{}", disk.name);
        assert!(
            content(&place, top, DiskFormat::Qcow2) == held[3],
            "{}: the newest",
            disk.name
        );
        assert!(
            content(&place, &files[1], DiskFormat::Qcow2) == held[2],
            "{}: below",
            disk.name
        );
        assert!(
            content(&place, &base, disk.format) == held[0],
            "{}: the base",
            disk.name
        );
        place.storage.remove_layer(vm.id, disk, 2).unwrap();
        // The newest, then the last.
        merge(&place, &vm, disk, top, 7).await;
        assert!(
            content(&place, &files[1], DiskFormat::Qcow2) == held[3],
            "{}",
            disk.name
        );
        place.storage.remove_layer(vm.id, disk, 7).unwrap();
        merge(&place, &vm, disk, &files[1], 1).await;
        assert!(content(&place, &base, disk.format) == held[3], "{}", disk.name);
        place.storage.remove_layer(vm.id, disk, 1).unwrap();
        assert_eq!(place.storage.layer_files(vm.id, disk).unwrap(), BTreeSet::new());
    }
}

#[tokio::test]
async fn the_layers_of_volumes_are_told_apart_and_go_with_their_volume() {
    let place = place();
    let vm = definition(vec![
        volume("data", 1, DiskFormat::Qcow2),
        volume("more", 2, DiskFormat::Qcow2),
    ]);
    place.storage.create(&vm, false, soon()).await.unwrap();
    let [one, other] = &vm.spec.disks[..] else {
        panic!()
    };
    // Another VM may have called its disk the same.
    let same = Disk {
        name: "data".to_owned(),
        ..other.clone()
    };
    let base = place.storage.path(vm.id, one).unwrap();
    let top = add(&place, &vm, one, &base, 3).await;
    let layers = |disk: &Disk| place.storage.layer_files(vm.id, disk).unwrap();
    assert_eq!((layers(one), layers(&same)), ([3].into(), [].into()));
    let strange = place.storage.chain(vm.id, &same, &top);
    assert!(matches!(strange, Err(Error::Storage { .. })), "{strange:?}");
    // A VM that hears of it with no snapshots is not given what is below.
    let doubt = place.storage.likely_top(vm.id, one, &BTreeSet::new());
    assert!(matches!(doubt, Err(Error::Storage { .. })), "{doubt:?}");

    std::fs::write(top.with_extension("qcow2.partial"), "").unwrap();
    place
        .storage
        .purge("local", one.volume_id().unwrap(), false)
        .unwrap();
    let left = std::fs::read_dir(base.parent().unwrap()).unwrap();
    let left: Vec<_> = left.map(|file| file.unwrap().path()).collect();
    assert_eq!(left, [place.storage.path(vm.id, other).unwrap()]);
}

#[tokio::test]
async fn a_layer_made_for_something_else_is_made_anew_and_a_foreign_file_is_none() {
    let place = place();
    let vm = definition(vec![disk("root", "local", None, DiskFormat::Qcow2)]);
    let root = &vm.spec.disks[0];
    place.storage.create(&vm, false, soon()).await.unwrap();
    let base = place.storage.path(vm.id, root).unwrap();
    let one = add(&place, &vm, root, &base, 1).await;
    let wrong = add(&place, &vm, root, &base, 2).await;
    let right = add(&place, &vm, root, &one, 2).await;
    assert_eq!(wrong, right);
    assert_eq!(info(&right)["backing-filename"], one.to_str().unwrap());
    assert_eq!(
        place
            .storage
            .likely_top(vm.id, root, &BTreeSet::from([1, 2]))
            .unwrap(),
        right
    );
    // Nobody says whether it is the newest, or left of what was deleted.
    let doubt = place.storage.likely_top(vm.id, root, &BTreeSet::from([1]));
    assert!(matches!(doubt, Err(Error::Storage { .. })), "{doubt:?}");
    let foreign = base.with_file_name("root.snap");
    std::fs::copy(&right, &foreign).unwrap();
    let strange = place.storage.chain(vm.id, root, &foreign);
    assert!(matches!(strange, Err(Error::Storage { .. })), "{strange:?}");
}
