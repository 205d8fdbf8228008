//! How `qemu-img` is confined, shown with stand-ins that tell what they are and may.

use std::{
    fs::{self, File, OpenOptions},
    io::ErrorKind,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    time::Duration,
};

use dalgu_proto::vm::DiskFormat;
use nix::unistd::{User, geteuid, getuid};
use tokio::time::{Instant, sleep, timeout};

use super::{Failure, QemuImg};
use crate::image::{self, Format};

const DISK_BYTES: u64 = 1 << 20;

fn disk(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .unwrap()
}

fn confined(disk: &File) -> QemuImg<'_> {
    QemuImg::new(disk, DISK_BYTES, Instant::now() + Duration::from_secs(60)).unwrap()
}

/// What a stand-in says, and whether it succeeded.
async fn says(program: &str, words: &[&str]) -> (String, bool) {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("disk");
    let file = disk(&path);
    let output = confined(&file).output(program, words, None).await.unwrap();
    (fs::read_to_string(path).unwrap(), output.status.success())
}

#[tokio::test]
async fn it_has_no_capabilities_no_groups_and_cannot_gain_any() {
    let (status, _) = says("cat", &["/proc/self/status"]).await;
    let values = |name: &str| -> Vec<String> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_ascii_whitespace().map(str::to_owned).collect()
    };
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(values(set), ["0000000000000000"], "{set}");
    }
    assert_eq!(values("NoNewPrivs:"), ["1"]);
    let uid = match geteuid().is_root() {
        true => {
            let user = ["dalgu-image", "nobody"]
                .into_iter()
                .find_map(|name| User::from_name(name).unwrap());
            assert_eq!(values("Groups:"), [""; 0]);
            user.unwrap().uid
        }
        false => getuid(),
    };
    assert_eq!(
        values("Uid:"),
        [uid.to_string(), uid.to_string(), uid.to_string(), uid.to_string()]
    );
}

#[tokio::test]
async fn it_cannot_read_what_only_root_may_and_not_by_a_name_below_a_closed_directory() {
    let (shadow, read) = says("cat", &["/etc/shadow"]).await;
    assert!(!read && shadow.is_empty());
    if geteuid().is_root() {
        let closed = tempfile::tempdir().unwrap();
        fs::set_permissions(closed.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let path = closed.path().join("readable");
        fs::write(&path, "secret").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let (text, read) = says("cat", &[path.to_str().unwrap()]).await;
        assert!(!read && text.is_empty());
    }
}

#[tokio::test]
async fn it_has_no_network() {
    if !geteuid().is_root() {
        return;
    }
    let (devices, _) = says("cat", &["/proc/self/net/dev"]).await;
    let named = devices.lines().filter_map(|line| line.split_once(':'));
    let named: Vec<_> = named.map(|(name, _)| name.trim()).collect();
    assert_eq!(named, ["lo"]);
}

#[tokio::test]
async fn it_has_limits_and_yields() {
    let (limits, _) = says("cat", &["/proc/self/limits"]).await;
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_ascii_whitespace()
            .take(2)
            .map(|word| word.parse().unwrap())
            .collect::<Vec<u64>>()
    };
    assert_eq!(limit("Max address space"), [2 << 30; 2]);
    assert_eq!(limit("Max core file size"), [0; 2]);
    assert_eq!(limit("Max open files"), [64; 2]);
    assert_eq!(limit("Max file size"), [(1 << 20) + 1024 + (64 << 20); 2]);
    assert!((1..=61).contains(&limit("Max cpu time")[0]), "{limits}");
    let (before, _) = says("nice", &[]).await;
    let own = fs::read_to_string("/proc/self/stat").unwrap();
    let own: i32 = own
        .rsplit_once(')')
        .unwrap()
        .1
        .split_ascii_whitespace()
        .nth(16)
        .unwrap()
        .parse()
        .unwrap();
    assert_eq!(before.trim(), (own + 10).min(19).to_string());
}

#[tokio::test]
async fn it_is_given_its_image_and_its_disk_and_nothing_else_that_is_open_here() {
    let place = tempfile::tempdir().unwrap();
    let open = |name: &str| disk(&place.path().join(name));
    let (image, file, _other) = (open("image"), open("disk"), open("other"));
    let output = confined(&file)
        .output("ls", &["-l", "/proc/self/fd"], Some(&image))
        .await
        .unwrap();
    assert!(output.status.success());
    let list = fs::read_to_string(place.path().join("disk")).unwrap();
    let path = |name: &str| format!(" -> {}", place.path().join(name).display());
    assert!(list.contains(&format!("0{}\n", path("image"))), "{list}");
    assert!(list.contains(&format!("1{}\n", path("disk"))), "{list}");
    assert_eq!(list.matches(&path("")).count(), 2, "{list}");
}

#[tokio::test]
async fn what_was_opened_is_converted_though_another_file_has_its_name_by_then() {
    let place = tempfile::tempdir().unwrap();
    let images = place.path();
    fs::write(images.join("a.raw"), [1; 4096]).unwrap();
    fs::write(images.join("b.raw"), [2; 4096]).unwrap();
    let opened = image::open(images, "a.raw").unwrap();
    fs::rename(images.join("b.raw"), images.join("a.raw")).unwrap();
    let path = images.join("disk");
    let file = disk(&path);
    confined(&file)
        .convert(&opened, Format::Raw, DiskFormat::Raw)
        .await
        .unwrap();
    assert_eq!(fs::read(path).unwrap(), [1; 4096]);
}

#[tokio::test]
async fn an_image_that_its_user_cannot_read_is_told_with_what_to_do() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("closed.raw");
    fs::write(&path, [1; 4096]).unwrap();
    let file = disk(&place.path().join("disk"));
    for (mode, readable) in [
        (0o600, !geteuid().is_root()),
        (0o640, !geteuid().is_root()),
        (0o644, true),
    ] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let opened = image::open(place.path(), "closed.raw").unwrap();
        let checked = confined(&file).check_readable(&opened, "closed.raw");
        assert_eq!(checked.is_ok(), readable, "{mode:o}: {checked:?}");
        let converted = confined(&file)
            .convert(&opened, Format::Raw, DiskFormat::Raw)
            .await;
        assert_eq!(converted.is_ok(), readable, "{mode:o}: {converted:?}");
    }
}

#[tokio::test]
async fn it_ends_when_nobody_waits_for_it_any_more() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("disk");
    let file = disk(&path);
    let qemu_img = confined(&file);
    let waiting = async {
        while !fs::read_to_string(&path).unwrap().ends_with('\n') {
            sleep(Duration::from_millis(10)).await;
        }
    };
    let words = ["-c", "echo $$; exec sleep 1000"];
    tokio::select! {
        output = qemu_img.output("sh", &words, None) => panic!("it ended: {output:?}"),
        () = waiting => {}
    }
    let process = format!("/proc/{}/cmdline", fs::read_to_string(&path).unwrap().trim());
    let gone = async {
        // What has ended and was not waited for yet has an empty one.
        while !matches!(fs::read(&process), Ok(line) if line.is_empty())
            && !matches!(fs::metadata(&process), Err(error) if error.kind() == ErrorKind::NotFound)
        {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(30), gone)
        .await
        .expect("it is killed");
}

#[tokio::test]
async fn the_deadline_ends_it_and_its_limits_are_the_images_fault() {
    let place = tempfile::tempdir().unwrap();
    let file = disk(&place.path().join("disk"));
    let late = QemuImg::new(&file, DISK_BYTES, Instant::now()).unwrap();
    let failure = late.output("sleep", &["1000"], None).await.unwrap_err();
    assert!(matches!(failure, Failure::Late(_)), "{failure:?}");
    // A raw disk of 1 GiB where 1 MiB was announced.
    fs::write(place.path().join("big.raw"), "").unwrap();
    let big = OpenOptions::new()
        .write(true)
        .open(place.path().join("big.raw"))
        .unwrap();
    big.set_len(1 << 30).unwrap();
    let opened = image::open(place.path(), "big.raw").unwrap();
    let failure = confined(&file)
        .convert(&opened, Format::Raw, DiskFormat::Raw)
        .await
        .unwrap_err();
    assert!(matches!(failure, Failure::Image(_)), "{failure:?}");
}
