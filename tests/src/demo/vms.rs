//! The demonstration's steps about VMs: create, console, stop and start, live migration, a refusal, delete.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_proto::v1;

use super::Scene;
use super::checks::{agreement, by_libvirt, number_of};
use crate::lab::{guest, wait_for};
use crate::operator::small_vm;
use crate::serial::Log;

/// What both VMs are made of: the lab's own kernel and a disk on the host that is chosen.
const GUEST: &str = "--memory 96MiB --disk root=8MiB --nic eth0=br0 \\\n    --kernel dalgu-guest.kernel --initrd dalgu-guest.initrd --cmdline 'console=ttyS0 quiet no_timer_check'";
/// Exit code of `dalgu` for a refused request.
const REFUSED: i32 = 5;

/// Creates two VMs and shows why each is where it is.
///
/// # Errors
/// If one does not run, or is not where the explanation says.
pub async fn create(scene: &mut Scene<'_>) -> anyhow::Result<()> {
    scene
        .stage
        .heading("Two VMs: a real kernel that prints a running count, and a small disk");
    for name in ["web", "db"] {
        scene
            .stage
            .show_ok(&format!("dalgu vm create {name} {GUEST}"))
            .await?;
    }
    scene.stage.show_ok("dalgu vm list").await?;
    scene.stage.show_ok("dalgu explain web").await?;
    let mut at = Vec::new();
    for name in ["web", "db"] {
        let host = scene.operator.host_of(name).await?;
        let request = v1::GetPlacementRequest { vm: name.to_owned() };
        let placement = scene
            .operator
            .placement()
            .get_placement(request)
            .await?
            .into_inner();
        ensure!(
            placement.host == host,
            "{name} is on {host}, its explanation says {}",
            placement.host
        );
        ensure!(
            placement.verdicts.len() == scene.lab.hosts().len(),
            "not every host has a verdict for {name}"
        );
        ensure!(!placement.summary.is_empty(), "no reason is given for {name}");
        at.push(format!("{name} on {host}"));
    }
    agreement(scene).await?;
    scene.stage.proved(format!(
        "2 VMs were created and placed with a reason, a verdict for every host: {}",
        at.join(", ")
    ));
    Ok(())
}

/// Opens the serial line of a VM where it is now, and waits for so many counts.
async fn listen(scene: &Scene<'_>, name: &str, counts: usize) -> anyhow::Result<Log> {
    let vm = scene.operator.vm(name).await?;
    let host = number_of(scene, &vm.status.unwrap_or_default().host)?;
    let mut log = Log::of(scene.lab, host, &vm.uid).await?;
    log.wait_for_ticks(counts).await?;
    Ok(log)
}

/// Follows a console for two seconds.
///
/// # Errors
/// If the guest does not count, or counts wrongly.
pub async fn console(scene: &mut Scene<'_>) -> anyhow::Result<()> {
    scene
        .stage
        .heading("The serial console, followed for two seconds");
    let mut log = listen(scene, "web", 10).await?;
    // 124 is how `timeout` says that it was time.
    let code = scene
        .stage
        .show("timeout --signal INT 2 dalgu vm console web --follow")
        .await?;
    ensure!(
        code == 124,
        "following the console ended by itself, with exit code {code}"
    );
    let text = scene.stage.output("dalgu vm console web").await?;
    let (shown, said) = (guest::ticks(text.as_bytes()), guest::ticks(&log.read()?));
    ensure!(
        shown.first() == Some(&1),
        "the console begins with count {:?}",
        shown.first()
    );
    ensure!(
        guest::first_break(&shown).is_none(),
        "the console has a gap: {:?}",
        guest::first_break(&shown)
    );
    ensure!(said.starts_with(&shown), "the console is not what the guest said");
    scene.stage.proved(format!(
        "the console shows every count of the guest, 1 to {}",
        shown.len()
    ));
    Ok(())
}

/// Stops one VM and starts it again; its disk has kept the count.
///
/// # Errors
/// If libvirt does not say the same, or the guest does not find its disk.
pub async fn stop_and_start(scene: &mut Scene<'_>) -> anyhow::Result<()> {
    scene
        .stage
        .heading("One VM stopped (the guest shuts itself down) and started");
    // The guest saves its count every 20 counts.
    let mut log = listen(scene, "db", 25).await?;
    let vm = scene.operator.vm("db").await?;
    scene.stage.show_ok("dalgu vm stop db").await?;
    scene.stage.show_ok("dalgu vm list").await?;
    let places = agreement(scene).await?;
    ensure!(
        places.get(&vm.uid).is_some_and(|(_, runs)| !runs),
        "db still runs"
    );
    let counted = guest::ticks(&log.read()?).len();
    scene.stage.show_ok("dalgu vm start db").await?;
    let mut heard = || log.read().map(|said| String::from_utf8_lossy(&said).into_owned());
    wait_for("the second boot of db", Duration::from_mins(1), async || {
        heard().is_ok_and(|said| said.matches(guest::READY).count() == 2)
    })
    .await?;
    let said = heard()?;
    let held = said
        .lines()
        .find_map(|line| line.trim().strip_prefix("disk holds ")?.parse::<usize>().ok());
    let held = held.context("the guest found no count on its disk")?;
    ensure!(
        held > 0 && held <= counted,
        "the disk holds {held}, the guest counted to {counted}"
    );
    ensure!(
        agreement(scene)
            .await?
            .get(&vm.uid)
            .is_some_and(|(_, runs)| *runs),
        "db does not run"
    );
    scene.stage.proved(format!(
        "db was stopped and started; it counted to {counted} and found {held} saved on its disk"
    ));
    Ok(())
}

/// Moves a running VM to another host, its disk too, and counts what it said on both.
///
/// # Errors
/// If one count is lost or said twice, or the hosts disagree on where the VM is.
pub async fn migrate(scene: &mut Scene<'_>) -> anyhow::Result<()> {
    scene.stage.heading("One VM live-migrated, with its local disk");
    let vm = scene.operator.vm("web").await?;
    let source = vm.status.unwrap_or_default().host;
    let mut before = listen(scene, "web", 20).await?;
    scene.stage.say("(The limit of 24 MiB/s makes it last long enough to watch; without it a VM this small is gone in a blink.)");
    scene
        .stage
        .show_ok("dalgu vm migrate web --bandwidth 24MiB")
        .await?;
    scene.stage.show_ok("dalgu vm list").await?;
    let destination = scene.operator.host_of("web").await?;
    ensure!(source != destination, "web is still on {source}");
    let mut after = listen(scene, "web", 20).await?;
    // A line may begin on one host and end on the other.
    let left = before.read()?;
    let arrived = after.read()?;
    let counts = guest::ticks(&[left.as_slice(), arrived.as_slice()].concat());
    ensure!(
        counts.first() == Some(&1),
        "the first count is {:?}",
        counts.first()
    );
    ensure!(
        guest::first_break(&counts).is_none(),
        "a count was lost: {:?}",
        guest::first_break(&counts)
    );
    let (left, last) = (guest::ticks(&left).len(), counts.len());

    let places = agreement(scene).await?;
    ensure!(
        places.get(&vm.uid) == Some(&(destination.clone(), true)),
        "libvirt says {:?}",
        places.get(&vm.uid)
    );
    for host in [&source, &destination] {
        scene.stage.show_ok(&format!("virsh-{host} list --all")).await?;
    }
    let downtime = last_downtime(scene, "web").await?;
    scene.stage.proved(format!(
        "web moved from {source} to {destination} while it ran: counts 1 to {left} there, {} to {last} here, none lost, none twice; \
         QEMU stopped it for {downtime} ms",
        left + 1
    ));
    scene
        .stage
        .proved("`virsh` on every host agrees with `dalgu vm list`");
    Ok(())
}

async fn last_downtime(scene: &Scene<'_>, vm: &str) -> anyhow::Result<u64> {
    let request = v1::ListOperationsRequest {
        vm: vm.to_owned(),
        ..v1::ListOperationsRequest::default()
    };
    let page = scene
        .operator
        .operations()
        .list_operations(request)
        .await?
        .into_inner();
    let migration = page
        .operations
        .into_iter()
        .find_map(|operation| operation.migration);
    Ok(migration
        .context("no migration among the operations")?
        .downtime_ms)
}

/// Asks for more memory than any host has.
///
/// # Errors
/// If it is not refused with a verdict for every host, or leaves something behind.
pub async fn refuse(scene: &mut Scene<'_>) -> anyhow::Result<()> {
    scene
        .stage
        .heading("A request that no host can take is refused, with the reason");
    let capacity = |host: &v1::Host| {
        host.allocation
            .as_ref()
            .map_or(0, |room| room.memory_mib_capacity)
    };
    let largest = scene
        .operator
        .all_hosts()
        .await?
        .values()
        .map(capacity)
        .max()
        .unwrap_or(0);
    let gib = largest / 1024 * 2 + 1;
    let before = traces(scene).await?;
    let boot = "--kernel dalgu-guest.kernel";
    let code = scene
        .stage
        .show(&format!("dalgu vm create census --memory {gib}GiB {boot}"))
        .await?;
    scene.stage.say(&format!("(exit code {code})"));
    ensure!(code == REFUSED, "exit code {code}, should be {REFUSED}");
    scene
        .stage
        .show_ok(&format!("dalgu explain --memory {gib}GiB {boot}"))
        .await?;
    let mut spec = small_vm("census", "local").spec.unwrap_or_default();
    spec.memory_mib = gib * 1024;
    let request = v1::ExplainPlacementRequest {
        subject: Some(v1::explain_placement_request::Subject::Spec(spec)),
        ..v1::ExplainPlacementRequest::default()
    };
    let answer = scene
        .operator
        .placement()
        .explain_placement(request)
        .await?
        .into_inner();
    let refused = |verdict: &v1::HostVerdict| {
        !verdict.fits
            && verdict
                .shortfalls
                .iter()
                .any(|shortfall| shortfall.constraint == "MEMORY")
    };
    ensure!(
        answer.host.is_empty() && !answer.hint.is_empty(),
        "it would be placed on {}",
        answer.host
    );
    ensure!(
        answer.verdicts.len() == scene.lab.hosts().len() && answer.verdicts.iter().all(refused),
        "not every host says that memory is missing"
    );
    ensure!(
        traces(scene).await? == before,
        "the refused request left something behind"
    );
    scene.stage.proved(format!(
        "{gib} GiB were refused with exit code {code} and a reason for every host; nothing was stored"
    ));
    Ok(())
}

/// What a refused request must not change: VMs, how many operations, and reservations.
async fn traces(scene: &Scene<'_>) -> anyhow::Result<(Vec<String>, usize, BTreeMap<String, u64>)> {
    let vms = scene.operator.all_vms().await?.into_keys().collect();
    let request = v1::ListOperationsRequest {
        page_size: 1000,
        ..v1::ListOperationsRequest::default()
    };
    let operations = scene
        .operator
        .operations()
        .list_operations(request)
        .await?
        .into_inner()
        .operations
        .len();
    let reserved = |host: v1::Host| host.allocation.map_or(0, |room| room.memory_mib_reserved);
    let hosts = scene.operator.all_hosts().await?;
    Ok((
        vms,
        operations,
        hosts
            .into_iter()
            .map(|(name, host)| (name, reserved(host)))
            .collect(),
    ))
}

/// Deletes both VMs.
///
/// # Errors
/// If a domain or a disk stays behind.
pub async fn delete(scene: &mut Scene<'_>) -> anyhow::Result<()> {
    scene.stage.heading("Deleting leaves nothing");
    for name in ["web", "db"] {
        scene
            .stage
            .show_ok(&format!("dalgu vm delete {name} --force"))
            .await?;
    }
    let left = scene.operator.all_vms().await?;
    ensure!(left.is_empty(), "VMs are left: {:?}", left.keys());
    let domains = by_libvirt(scene).await?;
    ensure!(domains.is_empty(), "domains are left: {domains:?}");
    for host in scene.lab.hosts() {
        let pool = host.outside("/var/lib/dalgu/local");
        let files = scene
            .stage
            .output(&format!("find '{}' -type f", pool.display()))
            .await?;
        ensure!(files.is_empty(), "files are left on {}: {files}", host.name);
    }
    scene
        .stage
        .proved("both VMs were deleted: no domain and no disk is left on any host");
    Ok(())
}
