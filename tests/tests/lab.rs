//! The lab itself, without Dalgu: real libvirt, real guests. Run by `make test`; needs root and the set-up step.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_tests::lab::{Daemon, Lab, Options, guest, run, wait_for, with_lab};
use nix::sys::signal::Signal;
use tokio::io::copy_bidirectional;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

const BOOT_LIMIT: Duration = Duration::from_secs(60);

fn libvirt_only(hosts: u8) -> Options {
    Options {
        hosts,
        dalgu: false,
        ..Options::default()
    }
}

/// Starts the lab's guest on a host, its disk and its serial log in the shared folder.
async fn start_guest(lab: &Lab, host: u8, name: &str) -> anyhow::Result<()> {
    let disk = format!("/var/lib/dalgu/shared/{name}.qcow2");
    if !lab.layout().shared().join(format!("{name}.qcow2")).exists() {
        lab.exec(host, &["qemu-img", "create", "-q", "-f", "qcow2", &disk, "8M"])
            .await?;
    }
    let xml = format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>96</memory>\
         <os><type arch='x86_64'>hvm</type><kernel>/var/lib/dalgu/images/dalgu-guest.kernel</kernel>\
         <initrd>/var/lib/dalgu/images/dalgu-guest.initrd</initrd><cmdline>console=ttyS0 quiet no_timer_check</cmdline></os>\
         <features><acpi/></features><devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
         <source file='{disk}'/><target dev='vda' bus='virtio'/></disk>\
         <interface type='bridge'><source bridge='br0'/><model type='virtio'/></interface>\
         <serial type='file'><source path='/var/lib/dalgu/shared/{name}.log' append='on'/></serial></devices></domain>"
    );
    let file = lab.layout().shared().join(format!("{name}.xml"));
    fs::write(&file, xml)?;
    lab.virsh(host, &["create", &format!("/var/lib/dalgu/shared/{name}.xml")])
        .await?;
    Ok(())
}

/// What the guest said so far, one entry a line.
fn said(lab: &Lab, name: &str) -> Vec<String> {
    let log = fs::read(lab.layout().shared().join(format!("{name}.log"))).unwrap_or_default();
    String::from_utf8_lossy(&log)
        .lines()
        .map(|line| line.trim().to_owned())
        .collect()
}

fn ticks(lab: &Lab, name: &str) -> Vec<u64> {
    guest::ticks(&fs::read(lab.layout().shared().join(format!("{name}.log"))).unwrap_or_default())
}

async fn wait_for_ticks(lab: &Lab, name: &str, more: usize) -> anyhow::Result<()> {
    let before = ticks(lab, name).len();
    wait_for("more ticks of the guest", BOOT_LIMIT, async || {
        ticks(lab, name).len() >= before + more
    })
    .await
}

async fn wait_for_end(lab: &Lab, host: u8, name: &str) -> anyhow::Result<()> {
    wait_for("end of the guest", BOOT_LIMIT, async || {
        lab.virsh(host, &["list", "--name"])
            .await
            .is_ok_and(|list| !list.contains(name))
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn the_guest_keeps_its_count_on_disk_and_obeys_the_power_button() -> anyhow::Result<()> {
    with_lab(&libvirt_only(1), async |lab| {
        start_guest(lab, 1, "g1").await?;
        wait_for_ticks(lab, "g1", 45).await?;
        lab.virsh(1, &["shutdown", "g1"]).await?;
        wait_for_end(lab, 1, "g1").await?;
        let first_run = said(lab, "g1");
        ensure!(
            first_run.iter().any(|line| line == guest::READY),
            "never ready: {first_run:?}"
        );
        let counted = ticks(lab, "g1");
        ensure!(
            counted.first() == Some(&1) && guest::first_break(&counted).is_none(),
            "not in order: {counted:?}"
        );

        start_guest(lab, 1, "g1").await?;
        wait_for("the count of the first run", BOOT_LIMIT, async || {
            said(lab, "g1").iter().any(|line| line.starts_with("disk holds "))
        })
        .await
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_guest_outlives_its_libvirtd() -> anyhow::Result<()> {
    with_lab(&libvirt_only(1), async |lab| {
        start_guest(lab, 1, "g1").await?;
        wait_for_ticks(lab, "g1", 5).await?;
        lab.signal(Daemon::Libvirtd(1), Signal::SIGKILL).await?;
        ensure!(!lab.is_running(Daemon::Libvirtd(1))?);
        wait_for_ticks(lab, "g1", 5).await?;
        lab.start(Daemon::Libvirtd(1)).await?;
        ensure!(lab.virsh(1, &["domstate", "g1"]).await?.contains("running"));
        ensure!(lab.status().hosts[0].guests == 1);
        Ok(())
    })
    .await
}

/// Carries each connection made to one Unix socket to another.
fn carry(from: PathBuf, to: PathBuf) -> anyhow::Result<JoinHandle<()>> {
    let listener = UnixListener::bind(&from).with_context(|| format!("listen on {}", from.display()))?;
    Ok(tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let Ok(mut far) = UnixStream::connect(&to).await else {
                continue;
            };
            tokio::spawn(async move { copy_bidirectional(&mut near, &mut far).await });
        }
    }))
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_guest_migrates_live_between_hosts_that_listen_on_no_network() -> anyhow::Result<()> {
    with_lab(&libvirt_only(2), async |lab| {
        let listening = lab.exec(1, &["ss", "-Hltn"]).await?;
        ensure!(
            listening.trim().is_empty(),
            "something listens on a network: {listening}"
        );
        start_guest(lab, 1, "g1").await?;
        wait_for_ticks(lab, "g1", 5).await?;

        let (source, destination) = (lab.layout().host(1), lab.layout().host(2));
        let control = carry(
            source.outside("/run/dalgu/control"),
            destination.outside("/run/libvirt/libvirt-sock"),
        )?;
        let memory = carry(
            source.outside("/run/dalgu/memory"),
            destination.outside("/run/dalgu/memory"),
        )?;
        let to = "qemu+unix:///system?socket=/run/dalgu/control";
        let how = [
            "migrate",
            "--live",
            "--p2p",
            "--unsafe",
            "--migrateuri",
            "unix:///run/dalgu/memory",
            "g1",
            to,
        ];
        lab.virsh(1, &how).await?;
        control.abort();
        memory.abort();

        ensure!(
            lab.virsh(1, &["list", "--all", "--name"])
                .await?
                .trim()
                .is_empty()
        );
        ensure!(lab.virsh(2, &["domstate", "g1"]).await?.contains("running"));
        wait_for_ticks(lab, "g1", 10).await?;
        let counted = ticks(lab, "g1");
        ensure!(
            counted.first() == Some(&1) && guest::first_break(&counted).is_none(),
            "not every count once: {counted:?}"
        );
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_host_returns_from_a_power_cut_without_guests_and_with_a_new_boot_id() -> anyhow::Result<()> {
    with_lab(&libvirt_only(2), async |lab| {
        let boot_id = async || lab.exec(1, &["cat", "/proc/sys/kernel/random/boot_id"]).await;
        let (before, other) = (
            boot_id().await?,
            lab.exec(2, &["cat", "/proc/sys/kernel/random/boot_id"]).await?,
        );
        ensure!(before != other, "two hosts with one boot id");
        start_guest(lab, 1, "g1").await?;
        lab.power_off(1).await?;
        ensure!(lab.exec(1, &["true"]).await.is_err());
        ensure!(lab.status().hosts[0].guests == 0);
        ensure!(lab.status().hosts[1].libvirtd, "the other host must not notice");
        lab.power_on(1).await?;
        ensure!(boot_id().await? != before);
        ensure!(lab.exec(1, &["hostname"]).await?.trim() == "h1");
        ensure!(
            lab.virsh(1, &["list", "--all", "--name"])
                .await?
                .trim()
                .is_empty()
        );
        Ok(())
    })
    .await
}

/// What a lab could leave behind on the machine.
async fn traces() -> anyhow::Result<String> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let links = run("ip", ["-o", "-br", "link"]).await?;
    let namespaces = run("ip", ["netns", "list"]).await?;
    let places = [
        "/run/dalgu-labs",
        "/run/dalgu",
        "/run/libvirt",
        "/run/netns",
        "/etc/dalgu",
        "/var/lib/dalgu",
    ];
    let places: Vec<_> = places
        .iter()
        .filter(|place| PathBuf::from(place).exists())
        .collect();
    let names: Vec<_> = links
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    let tops = mounts
        .lines()
        .filter_map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
            [_, place, "cgroup2", ..] => Some(place),
            _ => None,
        });
    let groups: BTreeSet<_> = tops
        .filter_map(|top| fs::read_dir(top).ok())
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    Ok(format!(
        "{mounts}\n{names:?}\n{namespaces}\n{places:?}\n{groups:?}"
    ))
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_lab_with_running_guests_goes_without_a_trace() -> anyhow::Result<()> {
    let before = traces().await?;
    let mut layout = None;
    with_lab(&libvirt_only(2), async |lab| {
        layout = Some(lab.layout().clone());
        start_guest(lab, 2, "g1").await?;
        ensure!(
            traces().await? != before,
            "the traces looked for are not the lab's"
        );
        Ok(())
    })
    .await?;
    let layout = layout.context("the test never ran")?;
    ensure!(!layout.dir().exists());
    let after = traces().await?;
    ensure!(after == before, "before: {before}\nafter: {after}");
    ensure!(Lab::current(layout).is_err());
    Ok(())
}
