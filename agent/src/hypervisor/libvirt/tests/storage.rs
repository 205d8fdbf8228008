//! Disks against the real qemu-img.

use std::{os::unix::fs::MetadataExt as _, path::Path, process::Command, time::Duration};

use dalgu_proto::{
    ids::VolumeId,
    image::Digest,
    v1,
    vm::{CloneMode, Disk, DiskFormat, Spec, VolumeRef, first_boot::Documents},
};
use tokio::time::Instant;

use super::{
    super::storage::{Pool, Storage},
    definition, disk,
};
use crate::{
    hypervisor::Error,
    image::{Format, Refusal},
    images,
};

pub(super) struct Place {
    pub(super) dir: tempfile::TempDir,
    pub(super) storage: Storage,
}

pub(super) fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let pool = |name: &str, shared| Pool {
        name: name.into(),
        path: dir.path().join(name),
        shared,
        mounted: false,
    };
    let mut storage = Storage::new(
        vec![pool("local", false), pool("shared", true)],
        dir.path().join("images"),
        dir.path().join("store"),
        None,
    );
    storage.nvram = dir.path().join("nvram");
    for part in ["local", "shared", "images", "store", "nvram"] {
        std::fs::create_dir(dir.path().join(part)).unwrap();
    }
    Place { dir, storage }
}

pub(super) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

pub(super) fn info(path: &Path) -> serde_json::Value {
    let output = Command::new("qemu-img")
        .args(["info", "--output=json"])
        .arg(path)
        .output()
        .unwrap();
    serde_json::from_slice(&output.stdout).unwrap()
}

pub(super) fn qemu_img(words: &[&str]) {
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

/// Puts a copy of an image of 8 MiB into the store.
pub(super) fn stored(place: &Place) -> (Digest, Vec<u8>) {
    let plain = place.dir.path().join("plain");
    let made = place.dir.path().join("made.qcow2");
    let mut bytes = content();
    bytes.resize(8 << 20, 9);
    std::fs::write(&plain, &bytes).unwrap();
    let (from, to) = (plain.to_str().unwrap(), made.to_str().unwrap());
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", from, to]);
    let digest = Digest::from_bytes(&[7; 32]);
    std::fs::rename(made, place.storage.store.join(images::copy_name(&digest))).unwrap();
    (digest, bytes)
}

pub(super) fn of_image(name: &str, digest: &Digest, clone_mode: CloneMode, format: DiskFormat) -> Disk {
    Disk {
        digest: Some(digest.clone()),
        clone_mode,
        volume: None,
        limits: Default::default(),
        backup: None,
        ..disk(name, "local", Some("base:1"), format)
    }
}

#[tokio::test]
async fn disks_of_the_catalogues_images_are_overlays_on_them_or_copies_of_them() {
    let place = place();
    let (digest, bytes) = stored(&place);
    let vm = definition(vec![
        of_image("over", &digest, CloneMode::Overlay, DiskFormat::Qcow2),
        of_image("raw", &digest, CloneMode::Full, DiskFormat::Raw),
        of_image("copy", &digest, CloneMode::Full, DiskFormat::Qcow2),
    ]);
    for _ in 0..2 {
        place.storage.create(&vm, false, soon()).await.unwrap();
    }
    let path = |index: usize| place.storage.path(vm.id, &vm.spec.disks[index]).unwrap();
    let copy = place.storage.store.join(images::copy_name(&digest));
    let over = info(&path(0));
    assert_eq!(over["backing-filename"], copy.to_str().unwrap());
    assert_eq!(over["backing-filename-format"], "qcow2");
    assert_eq!(place.storage.behind(&vm.spec.disks[0]), Some(copy));
    for index in 0..3 {
        let (path, out) = (path(index), place.dir.path().join("out"));
        let format = vm.spec.disks[index].format.as_str();
        qemu_img(&[
            "convert",
            "-f",
            format,
            "-O",
            "raw",
            path.to_str().unwrap(),
            out.to_str().unwrap(),
        ]);
        let made = std::fs::read(out).unwrap();
        assert_eq!(made.len(), 16 << 20);
        assert!(
            made.starts_with(&bytes) && made[bytes.len()..].iter().all(|byte| *byte == 0),
            "{index}"
        );
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
    }
    assert!(
        path(0).metadata().unwrap().len() < 1 << 20,
        "an overlay holds nothing of the image"
    );
    assert!(info(&path(2)).get("backing-filename").is_none());
    // A VM that comes brings its difference, and whatever else it has.
    let mut coming = vm.clone();
    coming.id = dalgu_proto::ids::VmId::from_uuid(uuid::Uuid::new_v4());
    place.storage.create(&coming, true, soon()).await.unwrap();
    let path = |index: usize| place.storage.path(coming.id, &coming.spec.disks[index]).unwrap();
    assert!(info(&path(0)).get("backing-filename").is_some());
    assert!(std::fs::read(path(1)).unwrap().iter().all(|byte| *byte == 0));
}

#[tokio::test]
async fn a_disk_whose_image_is_not_here_or_larger_is_not_made() {
    let place = place();
    let (digest, _) = stored(&place);
    for mode in [CloneMode::Overlay, CloneMode::Full] {
        let missing = of_image("root", &Digest::from_bytes(&[8; 32]), mode, DiskFormat::Qcow2);
        let error = place
            .storage
            .create(&definition(vec![missing]), false, soon())
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Missing { what: "image", .. }), "{error:?}");
        let mut small = of_image("root", &digest, mode, DiskFormat::Qcow2);
        small.size_mib = 7;
        let vm = definition(vec![small]);
        let error = place.storage.create(&vm, false, soon()).await.unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
        assert!(!place.storage.path(vm.id, &vm.spec.disks[0]).unwrap().exists());
    }
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
    let create = |words: &[&str]| qemu_img(&[&["create", "-q"], words].concat());
    create(&["-f", "qcow2", &image("big.qcow2"), "17M"]);
    create(&["-f", "qcow2", &image("base.qcow2"), "1M"]);
    let base = image("base.qcow2");
    create(&["-f", "qcow2", "-F", "qcow2", "-b", &base, &image("overlay.qcow2")]);
    create(&["-f", "vmdk", &image("base.vmdk"), "1M"]);
    let base = image("base.vmdk");
    create(&["-f", "vmdk", "-F", "vmdk", "-b", &base, &image("overlay.vmdk")]);
    let data_file = format!("data_file={},data_file_raw=on", image("secret"));
    create(&["-f", "qcow2", "-o", &data_file, &image("data.qcow2"), "1M"]);
    create(&[
        "-f",
        "vmdk",
        "-o",
        "subformat=monolithicFlat",
        &image("flat.vmdk"),
        "1M",
    ]);
    create(&["-f", "qcow2", &image("snapshots.qcow2"), "1M"]);
    qemu_img(&["snapshot", "-c", "before", &image("snapshots.qcow2")]);
    create(&["-f", "qcow2", &image("bitmaps.qcow2"), "1M"]);
    qemu_img(&["bitmap", "--add", &image("bitmaps.qcow2"), "backup"]);
    let key = [
        "--object",
        "secret,id=key,data=1234",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10",
    ];
    create(&[&key[..], &["-f", "qcow2", &image("encrypted.qcow2"), "1M"]].concat());
    std::fs::copy(image("base.qcow2"), image("disguised.raw")).unwrap();
    std::fs::write(image("lies.qcow2"), "not a qcow2 file").unwrap();
    std::fs::write(image("nothing.iso"), "x").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", image("link.raw")).unwrap();
    let missing = fails(&place, "missing.qcow2").await;
    assert!(
        matches!(missing, Error::Missing { what: "image", .. }),
        "{missing:?}"
    );
    let too_big = fails(&place, "big.qcow2").await;
    assert!(matches!(too_big, Error::Invalid { .. }), "{too_big:?}");
    let parent = |field| Refusal::Parent { field };
    let disguised = |said, found| Refusal::Disguised { said, found };
    let data_file = Refusal::DataFile { field: "feature bit" };
    let said = Format::Qcow2;
    let refused = [
        ("overlay.qcow2", parent("backing file")),
        ("overlay.vmdk", parent("parentFileNameHint")),
        ("data.qcow2", data_file),
        ("flat.vmdk", disguised(Format::Vmdk, "a vmdk descriptor")),
        ("disguised.raw", disguised(Format::Raw, "qcow2")),
        ("lies.qcow2", Refusal::NotSo { said }),
        ("snapshots.qcow2", Refusal::Snapshots { count: 1 }),
        ("bitmaps.qcow2", Refusal::Bitmaps { count: 1 }),
        ("encrypted.qcow2", Refusal::Encrypted),
        ("nothing.iso", Refusal::Name),
        ("link.raw", Refusal::Outside),
    ];
    for (name, expected) in refused {
        let error = fails(&place, name).await;
        assert_eq!(refusal(&error), Some(&expected), "{name}: {error:?}");
    }
}

fn refusal(error: &Error) -> Option<&Refusal> {
    match error {
        Error::ImageRefused { refusal, .. } => Some(refusal),
        _ => None,
    }
}

/// Fails to make a disk from an image; nothing is left of it.
async fn fails(place: &Place, image: &str) -> Error {
    let vm = definition(vec![disk("root", "local", Some(image), DiskFormat::Qcow2)]);
    let error = place.storage.create(&vm, false, soon()).await.unwrap_err();
    let dir = place.storage.pools[0].path.join(vm.id.to_string());
    assert_eq!(
        std::fs::read_dir(dir).unwrap().count(),
        0,
        "{image} left something"
    );
    error
}

/// Bytes that no format takes for its own, and that do not repeat.
fn content() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..250_000_u32)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    bytes.resize(5 << 20, 0);
    bytes
}

#[tokio::test]
async fn images_of_every_format_give_disks_with_the_bytes_they_hold() {
    let place = place();
    let content = content();
    let plain = place.dir.path().join("plain");
    std::fs::write(&plain, &content).unwrap();
    let kinds = [
        ("raw", "plain.raw", ""),
        ("raw", "plain.img", ""),
        ("qcow2", "new.qcow2", "compat=1.1"),
        ("qcow2", "old.qcow2", "compat=0.10"),
        ("qcow2", "fine.qcow2", "cluster_size=512"),
        ("qcow2", "subclusters.qcow2", "extended_l2=on"),
        ("qcow2", "zstd.qcow2", "compression_type=zstd"),
        ("vmdk", "sparse.vmdk", "subformat=monolithicSparse"),
        ("vmdk", "stream.vmdk", "subformat=streamOptimized"),
        ("vdi", "dynamic.vdi", ""),
        ("vdi", "fixed.vdi", "static=on"),
        ("vhdx", "dynamic.vhdx", "subformat=dynamic"),
        ("vhdx", "fixed.vhdx", "subformat=fixed"),
    ];
    for (format, name, options) in kinds {
        let image = place.storage.images.join(name);
        let mut words = vec!["convert", "-f", "raw", "-O", format];
        if !options.is_empty() {
            words.extend(["-o", options]);
        }
        if format == "qcow2" && options.contains("compat") {
            words.push("-c");
        }
        words.extend([plain.to_str().unwrap(), image.to_str().unwrap()]);
        qemu_img(&words);
        let mut vm = definition(vec![
            disk("raw", "local", Some(name), DiskFormat::Raw),
            disk("qcow2", "local", Some(name), DiskFormat::Qcow2),
        ]);
        vm.id = dalgu_proto::ids::VmId::from_uuid(uuid::Uuid::new_v4());
        place.storage.create(&vm, false, soon()).await.unwrap();
        let raw = place.storage.path(vm.id, &vm.spec.disks[0]).unwrap();
        let qcow2 = place.storage.path(vm.id, &vm.spec.disks[1]).unwrap();
        let bytes = std::fs::read(&raw).unwrap();
        assert_eq!(bytes.len(), 16 << 20, "{name}");
        assert!(bytes.starts_with(&content), "{name}");
        assert!(
            bytes[content.len()..] == vec![0; bytes.len() - content.len()],
            "{name}"
        );
        let (raw, qcow2) = (raw.to_str().unwrap(), qcow2.to_str().unwrap());
        qemu_img(&["compare", "-q", "-f", "raw", "-F", "qcow2", raw, qcow2]);
        qemu_img(&["check", "-q", "-f", "qcow2", qcow2]);
    }
}

#[tokio::test]
async fn of_an_image_that_is_written_to_meanwhile_no_disk_is_made_and_it_is_tried_again() {
    let place = place();
    let path = place.storage.images.join("growing.img");
    std::fs::write(&path, [7; 4096]).unwrap();
    let mut image = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
    let writing = async {
        loop {
            std::io::Write::write_all(&mut image, b"more").unwrap();
            tokio::task::yield_now().await;
        }
    };
    // In this order: what is written first is written while qemu-img is waited for.
    let error = tokio::select! {
        biased;
        error = fails(&place, "growing.img") => error,
        () = writing => unreachable!(),
    };
    assert!(
        matches!(&error, Error::Storage { detail, .. } if detail.contains("written to")),
        "{error:?}"
    );
    assert!(error.is_retryable());
}

#[tokio::test]
async fn an_image_that_only_seems_sound_is_refused_when_qemu_img_fails_with_it() {
    let place = place();
    let image = place.storage.images.join("torn.qcow2");
    let plain = place.dir.path().join("plain");
    std::fs::write(&plain, content()).unwrap();
    qemu_img(&[
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        plain.to_str().unwrap(),
        image.to_str().unwrap(),
    ]);
    let mut bytes = std::fs::read(&image).unwrap();
    let number = |at: usize| u64::from_be_bytes(*bytes[at..].first_chunk().unwrap());
    let l1 = usize::try_from(number(40)).unwrap();
    let l2 = usize::try_from(number(l1) << 8 >> 8).unwrap();
    bytes[l2..l2 + 8].copy_from_slice(&(1_u64 << 63 | 0x1200).to_be_bytes());
    std::fs::write(&image, bytes).unwrap();
    let error = fails(&place, "torn.qcow2").await;
    assert!(
        matches!(refusal(&error), Some(Refusal::Unconvertible { .. })),
        "{error:?}"
    );
    assert!(!error.is_retryable());
    assert_eq!(error.reason(), "IMAGE_REFUSED");
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

#[tokio::test]
async fn the_volume_of_a_first_boot_is_made_once_for_its_owner_only_and_goes_with_the_disks() {
    let place = place();
    let mut vm = definition(vec![disk("root", "local", None, DiskFormat::Raw)]);
    let wire = v1::FirstBoot {
        user_data: "#!marker".into(),
        ..Default::default()
    };
    let mut spec = v1::VmSpec::from(vm.spec.clone());
    spec.first_boot = Some(wire.clone());
    vm.spec = Spec::try_from(spec).unwrap();
    let path = place
        .storage
        .path(vm.id, &vm.spec.first_boot.as_ref().unwrap().medium)
        .unwrap();
    let refused = place.storage.create(&vm, false, soon()).await.unwrap_err();
    assert!(matches!(refused, Error::Invalid { .. }), "{refused}");
    assert!(!path.exists());

    vm.documents = Documents::from(&wire);
    place.storage.create(&vm, false, soon()).await.unwrap();
    assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
    let made = std::fs::read(&path).unwrap();
    assert!(made.windows(8).any(|part| part == b"#!marker") && made.len() == 1 << 20);

    std::fs::write(&path, "the guest's").unwrap();
    vm.documents = Documents::default();
    place.storage.create(&vm, false, soon()).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"the guest's");
    place.storage.delete(vm.id, false).unwrap();
    assert!(!path.exists());

    place.storage.create(&vm, true, soon()).await.unwrap();
    let blank = std::fs::read(&path).unwrap();
    assert!(blank.len() == 1 << 20 && blank.iter().all(|byte| *byte == 0));
}

#[test]
fn variables_of_firmware_that_a_migration_left_go_with_the_disks() {
    let place = place();
    let vm = definition(vec![]);
    std::fs::write(place.storage.nvram(vm.id), "of the VM").unwrap();
    let other = place.dir.path().join("nvram/other_VARS.fd");
    std::fs::write(&other, "of another").unwrap();
    for _ in 0..2 {
        place.storage.delete(vm.id, true).unwrap();
    }
    assert!(!place.storage.nvram(vm.id).exists() && other.exists());
}

#[tokio::test]
async fn a_volume_of_the_site_has_its_own_place_and_goes_only_when_it_is_asked_for() {
    let place = place();
    let volume = VolumeId::from_uuid(uuid::Uuid::from_u128(5));
    let of = |pool: &str| Disk {
        volume: Some(VolumeRef {
            name: "ledger".parse().unwrap(),
            id: Some(volume),
            format: None,
        }),
        ..disk("data", pool, None, DiskFormat::Qcow2)
    };
    let vm = definition(vec![disk("root", "local", None, DiskFormat::Qcow2), of("local")]);
    place.storage.create(&vm, false, soon()).await.unwrap();
    let path = place.storage.path(vm.id, &vm.spec.disks[1]).unwrap();
    assert_eq!(
        path,
        place.dir.path().join(format!("local/volumes/{volume}.qcow2"))
    );
    assert_eq!(info(&path)["virtual-size"], 16 << 20);
    place.storage.delete(vm.id, false).unwrap();
    assert!(path.exists(), "it outlives the VM");
    std::fs::write(path.with_extension("qcow2.partial"), "half of one").unwrap();
    for _ in 0..2 {
        place.storage.purge("local", volume, true).unwrap();
    }
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);

    let shared = definition(vec![of("shared")]);
    place.storage.create(&shared, false, soon()).await.unwrap();
    let path = place.storage.path(vm.id, &shared.spec.disks[0]).unwrap();
    place.storage.purge("shared", volume, true).unwrap();
    assert!(path.exists(), "another host goes on with it");
    place.storage.purge("shared", volume, false).unwrap();
    assert!(!path.exists());
    std::fs::remove_dir_all(place.dir.path().join("local")).unwrap();
    assert!(
        place.storage.purge("local", volume, false).is_err(),
        "not mounted is not gone"
    );
}
