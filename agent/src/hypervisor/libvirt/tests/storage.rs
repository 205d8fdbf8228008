//! Disks against the real qemu-img.

use std::{os::unix::fs::MetadataExt as _, path::Path, process::Command, time::Duration};

use dalgu_proto::vm::{Disk, DiskFormat};
use tokio::time::Instant;

use super::{
    super::storage::{Pool, Storage},
    definition, disk,
};
use crate::hypervisor::Error;

struct Place {
    _dir: tempfile::TempDir,
    storage: Storage,
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let pool = |name: &str, shared| Pool {
        name: name.into(),
        path: dir.path().join(name),
        shared,
    };
    let storage = Storage::new(
        vec![pool("local", false), pool("shared", true)],
        dir.path().join("images"),
        None,
    );
    for part in ["local", "shared", "images"] {
        std::fs::create_dir(dir.path().join(part)).unwrap();
    }
    Place { _dir: dir, storage }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn info(path: &Path) -> serde_json::Value {
    let output = Command::new("qemu-img")
        .args(["info", "--output=json"])
        .arg(path)
        .output()
        .unwrap();
    serde_json::from_slice(&output.stdout).unwrap()
}

fn qemu_img(words: &[&str]) {
    assert!(Command::new("qemu-img").args(words).status().unwrap().success());
}

#[tokio::test]
async fn disks_are_made_of_their_size_and_format_and_left_alone_after() {
    let place = place();
    let vm = definition(vec![
        disk("root", "local", None, DiskFormat::Qcow2),
        disk("data", "shared", None, DiskFormat::Raw),
    ]);
    place.storage.create(&vm, false, soon()).await.unwrap();
    let paths: Vec<_> = vm
        .spec
        .disks
        .iter()
        .map(|disk| place.storage.path(vm.id, disk).unwrap())
        .collect();
    assert_eq!(
        (
            info(&paths[0])["format"].clone(),
            info(&paths[1])["format"].clone()
        ),
        ("qcow2".into(), "raw".into())
    );
    for path in &paths {
        assert_eq!(info(path)["virtual-size"], 16 << 20);
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
    }
    std::fs::write(&paths[1], "in use").unwrap();
    place.storage.create(&vm, false, soon()).await.unwrap();
    assert_eq!(std::fs::read(&paths[1]).unwrap(), b"in use");
    place.storage.delete(vm.id, true).unwrap();
    assert_eq!(
        paths.iter().map(|path| path.exists()).collect::<Vec<_>>(),
        [false, true],
        "the shared one is kept"
    );
    place.storage.delete(vm.id, false).unwrap();
    assert!(!paths[1].parent().unwrap().exists());
}

#[tokio::test]
async fn a_half_made_disk_is_made_anew() {
    let place = place();
    let vm = definition(vec![disk("root", "local", None, DiskFormat::Qcow2)]);
    let path = place.storage.path(vm.id, &vm.spec.disks[0]).unwrap();
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path.with_extension("qcow2.partial"), "half of it").unwrap();
    place.storage.create(&vm, false, soon()).await.unwrap();
    assert_eq!(info(&path)["virtual-size"], 16 << 20);
    let names: Vec<_> = std::fs::read_dir(path.parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["root.qcow2"]);
}

#[tokio::test]
async fn an_image_is_copied_and_grown() {
    let place = place();
    let image = place.storage.images.join("small.img");
    std::fs::write(&image, [7_u8; 65_536]).unwrap();
    let vm = definition(vec![
        disk("root", "local", Some("small.img"), DiskFormat::Raw),
        disk("copy", "local", Some("small.img"), DiskFormat::Qcow2),
    ]);
    place.storage.create(&vm, false, soon()).await.unwrap();
    let raw = std::fs::read(place.storage.path(vm.id, &vm.spec.disks[0]).unwrap()).unwrap();
    assert_eq!((raw.len(), raw[65_535], raw[65_536]), (16 << 20, 7, 0));
    let copy = info(&place.storage.path(vm.id, &vm.spec.disks[1]).unwrap());
    assert_eq!(
        (&copy["format"], &copy["virtual-size"]),
        (&"qcow2".into(), &(16 << 20).into())
    );
}

#[tokio::test]
async fn an_incoming_vm_gets_blank_local_disks_only() {
    let place = place();
    let vm = definition(vec![
        disk("root", "local", Some("not-here.qcow2"), DiskFormat::Qcow2),
        disk("data", "shared", None, DiskFormat::Raw),
    ]);
    place.storage.create(&vm, true, soon()).await.unwrap();
    let exists = |disk: &Disk| place.storage.path(vm.id, disk).unwrap().exists();
    assert_eq!(
        vm.spec.disks.iter().map(exists).collect::<Vec<_>>(),
        [true, false]
    );
}

#[tokio::test]
async fn incident_11_a_file_in_the_way_of_the_disks_is_refused_left_alone_and_not_taken_for_a_disk_to_delete()
{
    let place = place();
    let vm = definition(vec![disk("root", "local", None, DiskFormat::Qcow2)]);
    let path = place.storage.path(vm.id, &vm.spec.disks[0]).unwrap();
    let folder = path.parent().unwrap();
    std::fs::write(folder, "somebody's").unwrap();
    let refused = place.storage.create(&vm, true, soon()).await;
    assert!(matches!(refused, Err(Error::Storage { .. })), "{refused:?}");
    // Else a migration that could not be prepared could not be ended either.
    place.storage.delete(vm.id, true).unwrap();
    assert_eq!(std::fs::read_to_string(folder).unwrap(), "somebody's");
}

#[tokio::test]
async fn images_that_cannot_be_used_are_refused_and_leave_nothing() {
    let place = place();
    let image = |name: &str| place.storage.images.join(name).to_str().unwrap().to_owned();
    qemu_img(&["create", "-q", "-f", "qcow2", &image("big.qcow2"), "17M"]);
    qemu_img(&["create", "-q", "-f", "qcow2", &image("base.qcow2"), "1M"]);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "qcow2",
        "-b",
        &image("base.qcow2"),
        &image("overlay.qcow2"),
    ]);
    let data_file = format!("data_file={},data_file_raw=on", image("secret"));
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        &data_file,
        &image("data.qcow2"),
        "1M",
    ]);
    std::fs::write(image("disk.vmdk"), "x").unwrap();
    std::fs::write(image("lies.qcow2"), "not a qcow2 file").unwrap();
    for name in [
        "big.qcow2",
        "overlay.qcow2",
        "data.qcow2",
        "disk.vmdk",
        "lies.qcow2",
        "missing.qcow2",
    ] {
        let vm = definition(vec![disk("root", "local", Some(name), DiskFormat::Qcow2)]);
        let error = place.storage.create(&vm, false, soon()).await.unwrap_err();
        let expected = match name {
            "missing.qcow2" => matches!(error, Error::Missing { what: "image", .. }),
            "lies.qcow2" => matches!(error, Error::Storage { .. }),
            _ => matches!(error, Error::Invalid { .. }),
        };
        assert!(expected, "{name}: {error:?}");
        let dir = place.storage.pools[0].path.join(vm.id.to_string());
        assert_eq!(
            std::fs::read_dir(dir).unwrap().count(),
            0,
            "{name} left something"
        );
    }
}

#[tokio::test]
async fn a_pool_that_is_not_there_is_named() {
    let place = place();
    let vm = definition(vec![disk("root", "elsewhere", None, DiskFormat::Raw)]);
    let error = place.storage.create(&vm, false, soon()).await.unwrap_err();
    assert!(
        matches!(&error, Error::Storage { pool, .. } if pool == "elsewhere"),
        "{error:?}"
    );
}
