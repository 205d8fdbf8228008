//! The whole site in one process: real controller, real agents, simulated hypervisors.
//!
//! The heart is [`every_request_survives_a_crash_at_every_commit`]: each request is made while the controller dies before,
//! and after, each write to its store that the request leads to; after its restart everything must come to rest in a
//! state that one of the two outcomes explains, with nothing lost, doubled or left over.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use dalgu_agent::hypervisor::{DomainState, Hypervisor};
use dalgu_controller::store::{Store as _, memory::Crash};
use dalgu_proto::{ids::VmId, reason, v1};
use dalgu_tests::cluster::{Cluster, until, vm};
use futures::{StreamExt, TryStreamExt, future::try_join_all, stream};

/// What an operator asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ask {
    Create,
    Stop,
    Start,
    Pause,
    Migrate,
    Delete,
}

/// Makes a request until it is answered: a lost answer is asked for again, with the same id.
async fn ask(cluster: &Cluster, what: Ask, name: &str, request_id: &str) -> Result<v1::Operation> {
    let mut vms = cluster.vms().await?;
    let (name, request_id) = (name.to_owned(), request_id.to_owned());
    let operation = match what {
        Ask::Create => {
            let request = v1::CreateVmRequest {
                vm: Some(vm(&name)),
                request_id,
                ..Default::default()
            };
            vms.create_vm(request).await?
        }
        Ask::Stop => {
            vms.stop_vm(v1::StopVmRequest {
                name,
                request_id,
                ..Default::default()
            })
            .await?
        }
        Ask::Start => {
            vms.start_vm(v1::StartVmRequest {
                name,
                request_id,
                ..Default::default()
            })
            .await?
        }
        Ask::Pause => {
            vms.pause_vm(v1::PauseVmRequest {
                name,
                request_id,
                ..Default::default()
            })
            .await?
        }
        Ask::Migrate => {
            vms.migrate_vm(v1::MigrateVmRequest {
                name,
                request_id,
                ..Default::default()
            })
            .await?
        }
        Ask::Delete => {
            vms.delete_vm(v1::DeleteVmRequest {
                name,
                request_id,
                force: true,
                ..Default::default()
            })
            .await?
        }
    };
    Ok(operation.into_inner())
}

async fn done(cluster: &Cluster, what: Ask, name: &str) -> Result<v1::Operation> {
    let id = uuid::Uuid::new_v4().to_string();
    let operation = ask(cluster, what, name, &id)
        .await
        .with_context(|| format!("{what:?}"))?;
    cluster.until_at_rest().await?;
    let operations = cluster.list_operations().await?;
    let ended = operations
        .into_iter()
        .find(|ended| ended.id == operation.id)
        .context("the operation is gone")?;
    ensure!(
        ended.state() == v1::OperationState::Succeeded,
        "{what:?}: {ended:?}"
    );
    Ok(ended)
}

#[tokio::test]
async fn a_vm_lives_its_whole_life() -> Result<()> {
    let cluster = Cluster::start(2).await?;
    for what in [
        Ask::Create,
        Ask::Migrate,
        Ask::Pause,
        Ask::Start,
        Ask::Stop,
        Ask::Start,
        Ask::Migrate,
    ] {
        done(&cluster, what, "web").await?;
        cluster.check().await?;
    }
    done(&cluster, Ask::Delete, "web").await?;
    ensure!(cluster.list_vms().await?.is_empty());
    cluster.check().await
}

/// What a VM is made of is to be this.
async fn change(cluster: &Cluster, edit: impl FnOnce(&mut v1::VmSpec), request_id: &str) -> Result<v1::Vm> {
    let mut vms = cluster.vms().await?;
    let name = "web".to_owned();
    let mut vm = vms.get_vm(v1::GetVmRequest { name }).await?.into_inner();
    edit(vm.spec.get_or_insert_default());
    let paths = ["vcpus", "max_vcpus", "memory_mib", "max_memory_mib", "disks"];
    let paths = paths.map(|field| format!("spec.{field}")).to_vec();
    let request = v1::UpdateVmRequest {
        vm: Some(v1::Vm {
            etag: String::new(),
            ..vm
        }),
        update_mask: Some(prost_types::FieldMask { paths }),
        ignore_protection: false,
        request_id: request_id.to_owned(),
    };
    Ok(vms.update_vm(request).await?.into_inner())
}

fn grow(spec: &mut v1::VmSpec) {
    (spec.vcpus, spec.memory_mib) = (2, 128);
    let second = v1::Disk {
        name: "data".into(),
        ..spec.disks[0].clone()
    };
    spec.disks.push(second);
    spec.disks[0].size_mib *= 2;
}

fn shrink(spec: &mut v1::VmSpec) {
    (spec.vcpus, spec.memory_mib) = (1, 64);
    spec.disks.truncate(1);
}

/// A VM that can grow while it runs; it has its maximum from its next start on.
async fn roomy(cluster: &Cluster) -> Result<()> {
    done(cluster, Ask::Create, "web").await?;
    let room = |spec: &mut v1::VmSpec| (spec.max_vcpus, spec.max_memory_mib) = (4, 256);
    change(cluster, room, "").await?;
    done(cluster, Ask::Stop, "web").await?;
    done(cluster, Ask::Start, "web").await?;
    cluster.check().await
}

#[tokio::test]
async fn a_vm_grows_moves_and_shrinks_while_it_runs() -> Result<()> {
    let cluster = Cluster::start(2).await?;
    roomy(&cluster).await?;
    for edit in [grow, shrink] {
        change(&cluster, edit, "").await?;
        cluster.check().await?;
        done(&cluster, Ask::Migrate, "web").await?;
        cluster.check().await?;
    }
    done(&cluster, Ask::Delete, "web").await?;
    cluster.check().await
}

async fn volume(cluster: &Cluster, name: &str) -> Result<v1::Volume> {
    let request = v1::CreateVolumeRequest {
        volume: Some(v1::Volume {
            name: name.into(),
            size_mib: 16,
            ..Default::default()
        }),
        ..Default::default()
    };
    Ok(cluster
        .volumes()
        .await?
        .create_volume(request)
        .await?
        .into_inner())
}

fn attach(spec: &mut v1::VmSpec) {
    spec.disks.push(v1::Disk {
        name: "data".into(),
        volume: "ledger".into(),
        ..Default::default()
    });
}

async fn shown(cluster: &Cluster) -> Result<v1::VolumeStatus> {
    let request = v1::GetVolumeRequest {
        name: "ledger".into(),
    };
    let volume = cluster.volumes().await?.get_volume(request).await?.into_inner();
    volume.status.context("no status")
}

async fn enlarge(cluster: &Cluster, size_mib: u64) -> Result<v1::Volume, tonic::Status> {
    let request = v1::UpdateVolumeRequest {
        volume: Some(v1::Volume {
            name: "ledger".into(),
            size_mib,
            ..Default::default()
        }),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["size_mib".into()],
        }),
        ..Default::default()
    };
    let mut volumes = cluster.volumes().await.expect("the controller is there");
    Ok(volumes.update_volume(request).await?.into_inner())
}

async fn remove(cluster: &Cluster) -> Result<v1::Volume, tonic::Status> {
    let request = v1::DeleteVolumeRequest {
        name: "ledger".into(),
        ..Default::default()
    };
    let mut volumes = cluster.volumes().await.expect("the controller is there");
    Ok(volumes.delete_volume(request).await?.into_inner())
}

fn why<T: std::fmt::Debug>(outcome: Result<T, tonic::Status>) -> String {
    reason::of(&outcome.expect_err("it was not refused")).expect("it has a reason")
}

#[tokio::test]
async fn a_volume_is_attached_grows_moves_is_detached_goes_to_another_vm_and_is_purged() -> Result<()> {
    let cluster = Cluster::start(2).await?;
    let made = volume(&cluster, "ledger").await?;
    ensure!(
        made.status.as_ref().is_some_and(|status| status.host.is_empty()),
        "{made:?}"
    );
    done(&cluster, Ask::Create, "web").await?;
    change(&cluster, attach, "").await?;
    cluster.check().await?;
    let web = cluster.list_vms().await?.remove(0);
    let disk = web.spec.unwrap_or_default().disks.pop().context("no disk")?;
    ensure!(
        (disk.volume_uid == made.uid, disk.size_mib) == (true, 16),
        "{disk:?}"
    );
    ensure!(why(remove(&cluster).await) == "VOLUME_IN_USE");
    enlarge(&cluster, 32).await?;
    cluster.check().await?;
    ensure!(why(enlarge(&cluster, 16).await) == "VOLUME_SHRINKS");
    let before = shown(&cluster).await?;
    done(&cluster, Ask::Migrate, "web").await?;
    cluster.check().await?;
    let after = shown(&cluster).await?;
    ensure!(
        before.host != after.host && after.vm == "web",
        "{before:?} {after:?}"
    );
    change(&cluster, |spec| spec.disks.truncate(1), "").await?;
    cluster.check().await?;
    ensure!(shown(&cluster).await?.state() == v1::VolumeState::Available);
    // It grows where nobody has it; the next VM goes where it is, and sees that.
    enlarge(&cluster, 48).await?;
    let mut next = self::vm("next");
    attach(next.spec.get_or_insert_default());
    let elsewhere = cluster.hosts.keys().find(|host| **host != after.host);
    let request = v1::CreateVmRequest {
        vm: Some(next),
        host: elsewhere.context("no other host")?.clone(),
        ..Default::default()
    };
    let mut vms = cluster.vms().await?;
    ensure!(why(vms.create_vm(request.clone()).await) == "NO_CAPACITY");
    let request = v1::CreateVmRequest {
        host: String::new(),
        ..request
    };
    vms.create_vm(request).await?;
    cluster.until_at_rest().await?;
    cluster.check().await?;
    ensure!(shown(&cluster).await?.vm == "next");
    done(&cluster, Ask::Delete, "next").await?;
    cluster.check().await?;
    remove(&cluster).await?;
    until("the volume's file to go", async || {
        ensure!(cluster.list_volumes().await?.is_empty());
        Ok(())
    })
    .await?;
    cluster.check().await?;
    done(&cluster, Ask::Delete, "web").await?;
    cluster.check().await
}

#[tokio::test]
async fn an_attachment_survives_a_crash_of_the_controller_and_of_the_agent() -> Result<()> {
    let mut cluster = Cluster::start(1).await?;
    volume(&cluster, "ledger").await?;
    done(&cluster, Ask::Create, "web").await?;
    change(&cluster, attach, "").await?;
    cluster.kill_controller().await;
    cluster.kill_agent("h1").await;
    cluster.start_agent("h1").await?;
    cluster.start_controller().await?;
    cluster.until_ready().await?;
    cluster.check().await?;
    ensure!(shown(&cluster).await?.state() == v1::VolumeState::InUse);
    done(&cluster, Ask::Delete, "web").await?;
    cluster.kill_controller().await;
    cluster.start_controller().await?;
    cluster.until_ready().await?;
    cluster.check().await?;
    ensure!(shown(&cluster).await?.state() == v1::VolumeState::Available);
    // A host that is away is told when it is back.
    cluster.kill_agent("h1").await;
    remove(&cluster).await?;
    cluster.start_agent("h1").await?;
    until("the volume's file to go", async || {
        ensure!(cluster.list_volumes().await?.is_empty());
        Ok(())
    })
    .await?;
    cluster.check().await
}

/// What is asked of a VM's snapshots.
#[derive(Debug, Clone, Copy)]
enum Shot {
    Create,
    Delete,
    Revert,
}

/// Asks for a snapshot, its deletion, or to go back to it; an agent or the controller may die at once afterwards.
async fn shot(cluster: &Cluster, what: Shot, name: &str) -> Result<v1::Operation, tonic::Status> {
    let unknown = |error: anyhow::Error| tonic::Status::unknown(error.to_string());
    let mut snapshots = cluster.snapshots().await.map_err(unknown)?;
    let (vm, name) = ("web".to_owned(), name.to_owned());
    let answer = match what {
        Shot::Create => {
            let snapshot = v1::Snapshot {
                vm,
                name,
                ..Default::default()
            };
            let request = v1::CreateSnapshotRequest {
                snapshot: Some(snapshot),
                ..Default::default()
            };
            snapshots.create_snapshot(request).await
        }
        Shot::Delete => {
            let request = v1::DeleteSnapshotRequest {
                vm,
                name,
                ..Default::default()
            };
            snapshots.delete_snapshot(request).await
        }
        Shot::Revert => {
            let request = v1::RevertSnapshotRequest {
                vm,
                name,
                discard_later: true,
                ..Default::default()
            };
            snapshots.revert_snapshot(request).await
        }
    };
    Ok(answer?.into_inner())
}

/// The snapshots that are ready.
async fn ready(cluster: &Cluster) -> Result<Vec<String>> {
    let request = v1::ListSnapshotsRequest { vm: "web".to_owned() };
    let list = cluster
        .snapshots()
        .await?
        .list_snapshots(request)
        .await?
        .into_inner();
    for one in &list.snapshots {
        ensure!(one.state() == v1::SnapshotState::Ready, "{one:?}");
    }
    Ok(list.snapshots.into_iter().map(|one| one.name).collect())
}

/// A VM goes back and forth while `disturb` kills what it likes after each request was accepted.
async fn back_and_forth(disturb: impl AsyncFn(&mut Cluster) -> Result<()>) -> Result<()> {
    let mut cluster = Cluster::start(1).await?;
    done(&cluster, Ask::Create, "web").await?;
    let uid = cluster.list_vms().await?[0].uid.clone();
    let id: VmId = uid.parse()?;
    let sim = cluster.hosts["h1"].sim.clone();
    let asked = async |what: Shot, name: &str, disturbed: &mut Cluster| -> Result<()> {
        let operation = shot(disturbed, what, name).await?;
        disturb(disturbed).await?;
        let ended = disturbed.until_at_rest().await?;
        let ended = ended.iter().find(|ended| ended.id == operation.id);
        let ended = ended.context("the operation is gone")?;
        ensure!(
            ended.state() == v1::OperationState::Succeeded,
            "{what:?} {name}: {ended:?}"
        );
        disturbed.check().await
    };
    for (content, name) in [(1, "one"), (2, "two"), (3, "three")] {
        sim.write(id, content);
        asked(Shot::Create, name, &mut cluster).await?;
    }
    sim.write(id, 4);
    ensure!(ready(&cluster).await? == ["one", "two", "three"]);
    let running = shot(&cluster, Shot::Revert, "one")
        .await
        .err()
        .context("it went back while it runs")?;
    ensure!(
        reason::of(&running).as_deref() == Some("VM_RUNNING"),
        "{running:?}"
    );
    let grown = change(&cluster, |spec| spec.disks[0].size_mib *= 2, "").await;
    let grown = grown.err().context("a disk grew")?.downcast::<tonic::Status>()?;
    ensure!(
        reason::of(&grown).as_deref() == Some("SNAPSHOTS_PRESENT"),
        "{grown:?}"
    );
    asked(Shot::Delete, "two", &mut cluster).await?;
    ensure!(
        sim.content(id) == Some(4),
        "a deletion changed what the disks hold"
    );
    done(&cluster, Ask::Stop, "web").await?;
    asked(Shot::Revert, "three", &mut cluster).await?;
    ensure!(sim.content(id) == Some(3), "{:?}", sim.content(id));
    sim.write(id, 5);
    asked(Shot::Revert, "three", &mut cluster).await?;
    ensure!(sim.content(id) == Some(3), "{:?}", sim.content(id));
    asked(Shot::Revert, "one", &mut cluster).await?;
    ensure!(sim.content(id) == Some(1), "{:?}", sim.content(id));
    ensure!(ready(&cluster).await? == ["one"]);
    done(&cluster, Ask::Start, "web").await?;
    sim.write(id, 6);
    asked(Shot::Delete, "one", &mut cluster).await?;
    ensure!(ready(&cluster).await?.is_empty());
    ensure!(sim.content(id) == Some(6), "{:?}", sim.content(id));
    done(&cluster, Ask::Delete, "web").await?;
    cluster.check().await
}

#[tokio::test]
async fn a_vm_goes_back_to_what_its_disks_held() -> Result<()> {
    back_and_forth(async |_| Ok(())).await
}

#[tokio::test]
async fn a_vm_goes_back_although_its_agent_dies_after_each_request() -> Result<()> {
    back_and_forth(async |cluster: &mut Cluster| {
        cluster.kill_agent("h1").await;
        cluster.start_agent("h1").await
    })
    .await
}

#[tokio::test]
async fn a_vm_goes_back_although_the_controller_dies_after_each_request() -> Result<()> {
    back_and_forth(async |cluster: &mut Cluster| {
        cluster.kill_controller().await;
        cluster.start_controller().await?;
        cluster.until_ready().await
    })
    .await
}

/// A VM grows while the controller dies at a commit; whether that came is returned.
async fn grown_with_crash(crash: impl Fn(u64) -> Crash) -> Result<bool> {
    let mut cluster = Cluster::start(2).await?;
    roomy(&cluster).await?;
    cluster.crash_at(crash(cluster.disk.commits()));
    let id = uuid::Uuid::new_v4().to_string();
    // A controller that died of its store answers nobody.
    tokio::select! {
        _ = change(&cluster, grow, &id) => {}
        () = cluster.crashed() => {}
    }
    tokio::select! {
        () = cluster.crashed() => {}
        agreed = cluster.check() => agreed?,
    }
    let crashed = cluster.is_crashed();
    cluster.kill_controller().await;
    cluster.start_controller().await?;
    cluster.until_ready().await?;
    // Asked for again with the VM as it is now.
    let unless_done = |spec: &mut v1::VmSpec| {
        if spec.disks.len() == 1 {
            grow(spec);
        }
    };
    change(&cluster, unless_done, "").await?;
    cluster.check().await?;
    Ok(crashed)
}

#[tokio::test]
async fn a_change_survives_a_crash_of_the_controller_at_its_commits() -> Result<()> {
    for number in 0..2 {
        ensure!(
            grown_with_crash(|next| Crash::Before(next + number)).await?,
            "no crash"
        );
        ensure!(
            grown_with_crash(|next| Crash::After(next + number)).await?,
            "no crash"
        );
    }
    Ok(())
}

/// Brings a VM to where a request makes sense, makes it with a crash planned, and returns whether the crash came.
async fn with_crash(what: Ask, crash: impl Fn(u64) -> Crash) -> Result<bool> {
    let mut cluster = Cluster::start(2).await?;
    if what != Ask::Create {
        done(&cluster, Ask::Create, "web").await?;
    }
    if what == Ask::Start {
        done(&cluster, Ask::Stop, "web").await?;
    }
    cluster.crash_at(crash(cluster.disk.commits()));
    let id = uuid::Uuid::new_v4().to_string();
    // A controller that died of its store answers nobody.
    let asked = tokio::select! {
        asked = ask(&cluster, what, "web", &id) => asked,
        () = cluster.crashed() => Err(anyhow::anyhow!("no answer")),
    };
    if asked.is_ok() && !cluster.is_crashed() {
        // The request has been accepted; it may still crash on the way.
        let ended = async || {
            ensure!(
                cluster.is_crashed()
                    || cluster
                        .list_operations()
                        .await?
                        .iter()
                        .all(|operation| operation.end_time.is_some()),
                "under way"
            );
            Ok(())
        };
        until("crashed or ended", ended).await?;
    }
    let crashed = cluster.is_crashed();
    cluster.kill_controller().await;
    cluster.ensure_nothing_runs_twice().await?;
    cluster.start_controller().await?;
    cluster.until_ready().await?;
    // The caller heard nothing, or heard it and forgot: it asks again.
    let again = ask(&cluster, what, "web", &id).await.context("asked again")?;
    if let Ok(first) = asked {
        ensure!(first.id == again.id, "the same request became two operations");
    }
    let operations = cluster.until_at_rest().await?;
    let operation = operations
        .iter()
        .find(|operation| operation.id == again.id)
        .context("the operation is lost")?;
    ensure!(
        operation.state() == v1::OperationState::Succeeded,
        "{operation:?}"
    );
    cluster.ensure_nothing_runs_twice().await?;
    cluster.check().await?;
    Ok(crashed)
}

/// How many commits a request leads to when nothing crashes.
async fn commits_of(what: Ask) -> Result<u64> {
    let cluster = Cluster::start(2).await?;
    if what != Ask::Create {
        done(&cluster, Ask::Create, "web").await?;
    }
    if what == Ask::Start {
        done(&cluster, Ask::Stop, "web").await?;
    }
    let begun = cluster.disk.commits();
    done(&cluster, what, "web").await?;
    Ok(cluster.disk.commits() - begun)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_request_survives_a_crash_at_every_commit() -> Result<()> {
    /// Sites at once: they wait more than they work.
    const AT_ONCE: usize = 12;
    let all = [
        Ask::Create,
        Ask::Stop,
        Ask::Start,
        Ask::Pause,
        Ask::Migrate,
        Ask::Delete,
    ];
    let counts = try_join_all(all.map(commits_of)).await?;
    let mut cases = Vec::new();
    for (what, count) in all.into_iter().zip(counts) {
        ensure!(
            count > 1,
            "{what:?} led to {count} commits; two at least were expected"
        );
        // One more than were counted: heartbeats may add a commit of their own.
        cases.extend((0..=count).flat_map(|number| [(what, number, false), (what, number, true)]));
    }
    let total = cases.len();
    let outcomes = stream::iter(cases).map(async |(what, number, after)| {
        let crash = move |begun| {
            if after {
                Crash::After(begun + number)
            } else {
                Crash::Before(begun + number)
            }
        };
        let case = format!(
            "{what:?}, commit {number}, {}",
            if after { "after" } else { "before" }
        );
        // Boxed: many sites are large together.
        Box::pin(with_crash(what, crash)).await.with_context(|| case)
    });
    let crashed: Vec<bool> = outcomes.buffer_unordered(AT_ONCE).try_collect().await?;
    let count = crashed.iter().filter(|crashed| **crashed).count();
    println!("{count} crashes in {total} runs");
    ensure!(
        count * 2 > total,
        "{count} of {total} runs crashed; the test does not reach what it is for"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_killed_in_the_middle_of_everything_finish_it_when_they_return() -> Result<()> {
    let case = async |what: Ask, victim: &str, delay_ms: u64| -> Result<()> {
        let mut cluster = Cluster::start(2).await?;
        if what != Ask::Create {
            done(&cluster, Ask::Create, "web").await?;
        }
        let id = uuid::Uuid::new_v4().to_string();
        ask(&cluster, what, "web", &id).await?;
        // The moment is what is varied here; nothing is waited for.
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        cluster.kill_agent(victim).await;
        cluster.ensure_nothing_runs_twice().await?;
        cluster.start_agent(victim).await?;
        cluster.until_at_rest().await?;
        cluster.ensure_nothing_runs_twice().await?;
        cluster
            .check()
            .await
            .with_context(|| format!("{what:?}, {victim} killed after {delay_ms} ms"))
    };
    for what in [Ask::Create, Ask::Stop, Ask::Migrate, Ask::Delete] {
        let times = [0, 10, 40, 120, 250];
        try_join_all(
            times
                .into_iter()
                .flat_map(|ms| [case(what, "h1", ms), case(what, "h2", ms)]),
        )
        .await?;
    }
    Ok(())
}

#[tokio::test]
async fn many_vms_at_once_are_spread_and_no_host_promises_more_than_it_has() -> Result<()> {
    let cluster = Cluster::start(3).await?;
    let capacity: u32 = cluster
        .list_hosts()
        .await?
        .iter()
        .filter_map(|host| Some(host.allocation.as_ref()?.vcpus_capacity))
        .sum();
    let wanted = capacity + 6;
    let asked = (0..wanted).map(|number| {
        let cluster = &cluster;
        async move {
            ask(cluster, Ask::Create, &format!("vm-{number}"), "")
                .await
                .is_ok()
        }
    });
    let accepted = futures::future::join_all(asked)
        .await
        .into_iter()
        .filter(|accepted| *accepted)
        .count();
    ensure!(
        accepted == capacity as usize,
        "{accepted} of {wanted} were accepted, there is room for {capacity}"
    );
    cluster.until_at_rest().await?;
    for host in cluster.list_hosts().await? {
        let allocation = host.allocation.unwrap_or_default();
        ensure!(
            allocation.vcpus_reserved <= allocation.vcpus_capacity,
            "{}: {allocation:?}",
            host.name
        );
    }
    cluster.check().await
}

#[tokio::test]
async fn without_a_controller_guests_run_on_and_are_restarted_after_a_crash() -> Result<()> {
    let mut cluster = Cluster::start(1).await?;
    done(&cluster, Ask::Create, "web").await?;
    cluster.kill_controller().await;
    let host = &cluster.hosts["h1"];
    let [domain] = &host.sim.list().await?[..] else {
        anyhow::bail!("one domain")
    };
    host.sim.crash_guest(domain.id);
    let running = async || {
        let seen = host.sim.get(domain.id).await?;
        ensure!(seen.is_some_and(|seen| seen.state == DomainState::Running));
        Ok(())
    };
    until("restarted by its agent", running).await?;
    cluster.start_controller().await?;
    cluster.until_ready().await?;
    cluster.check().await
}

#[tokio::test]
async fn a_controller_that_lost_its_store_is_refused_and_goes_on_when_it_has_it_back() -> Result<()> {
    let mut cluster = Cluster::start(1).await?;
    done(&cluster, Ask::Create, "web").await?;
    let before = cluster.hosts["h1"].sim.list().await?;
    cluster.kill_controller().await;
    let store = std::mem::take(&mut cluster.disk);
    cluster.start_controller().await?;
    let refused = async || {
        let asked = ask(&cluster, Ask::Create, "second", "").await;
        let error = asked.err().context("it was accepted")?;
        let status = error.downcast_ref::<tonic::Status>().context("no status")?;
        let why = reason::of(status);
        ensure!(why.as_deref() == Some("OTHER_CONTROLLER"), "{error}");
        Ok(())
    };
    until("it knows that it is not the one", refused).await?;
    ensure!(cluster.list_vms().await?.is_empty(), "it has no store");
    ensure!(
        cluster.hosts["h1"].sim.list().await? == before,
        "a VM was touched"
    );

    cluster.kill_controller().await;
    cluster.disk = store;
    cluster.start_controller().await?;
    cluster.until_ready().await?;
    done(&cluster, Ask::Create, "second").await?;
    ensure!(cluster.list_vms().await?.len() == 2);
    cluster.check().await
}

/// What the doctor finds, looking at the store too, and which hosts it has not seen.
async fn examined(cluster: &Cluster) -> Result<(Vec<String>, Vec<String>)> {
    let request = v1::GetDiagnosisRequest { deep: true };
    let diagnosis = cluster.site().await?.get_diagnosis(request).await?.into_inner();
    let findings = diagnosis.findings.into_iter();
    let findings = findings.map(|found| format!("{} {} {}", found.invariant, found.kind, found.subject));
    let unseen = diagnosis.gaps.into_iter().map(|gap| gap.host);
    Ok((findings.collect(), unseen.collect()))
}

async fn until_examined(cluster: &Cluster, findings: &[String], unseen: &[&str]) -> Result<()> {
    until("the doctor finds it", async || {
        let found = examined(cluster).await?;
        ensure!(
            found.0 == findings && found.1 == unseen,
            "{found:?}, not {findings:?}"
        );
        Ok(())
    })
    .await
}

/// Waits until the doctor finds one file that was left behind, and nothing else.
async fn until_left(cluster: &Cluster, file: &str) -> Result<()> {
    until("the doctor finds a file", async || {
        let (found, unseen) = examined(cluster).await?;
        let [only] = &found[..] else {
            bail!("{found:?}");
        };
        let is_it = only.starts_with("I4 LEFTOVER_FILE file ") && only.ends_with(file);
        ensure!(is_it && unseen.is_empty(), "{found:?}, not {file}");
        Ok(())
    })
    .await
}

/// Memory that VMs may be given on a host.
async fn free(cluster: &Cluster, name: &str) -> Result<u64> {
    let hosts = cluster.list_hosts().await?;
    let host = hosts.into_iter().find(|host| host.name == name);
    let host = host.context("it is there")?;
    Ok(host.allocation.unwrap_or_default().memory_mib_capacity)
}

#[tokio::test]
async fn the_doctor_finds_nothing_after_work_and_what_somebody_does_behind_dalgus_back() -> Result<()> {
    let mut cluster = Cluster::start(2).await?;
    for what in [Ask::Create, Ask::Migrate, Ask::Stop, Ask::Start] {
        done(&cluster, what, "web").await?;
    }
    until_examined(&cluster, &[], &[]).await?;

    let vm = cluster.list_vms().await?.pop().context("it is there")?;
    let owner = vm.status.as_ref().context("it has a status")?.host.clone();
    let other = if owner == "h1" { "h2" } else { "h1" };
    let (here, there) = (
        cluster.hosts[&owner].sim.clone(),
        cluster.hosts[other].sim.clone(),
    );
    let id: VmId = vm.uid.parse()?;

    // A backup of libvirt is restored on the other host, and the copy started.
    let mut copy = here.definition(id).context("it is defined")?;
    there.create_volumes(&copy, false).await?;
    there.define(&copy).await?;
    there.start(id).await?;
    let left = format!("I4 LEFTOVER_DOMAIN domain {id}");
    until_examined(&cluster, &["I1 TWO_COPIES vm web".to_owned(), left.clone()], &[]).await?;
    let refused = ask(&cluster, Ask::Delete, "web", "")
        .await
        .err()
        .context("which copy?")?;
    let status = refused.downcast_ref::<tonic::Status>().context("it answers")?;
    ensure!(
        reason::of(status).as_deref() == Some("VM_ON_SEVERAL_HOSTS"),
        "{status:?}"
    );
    ensure!(
        there
            .get(id)
            .await?
            .is_some_and(|domain| domain.state == DomainState::Running)
    );
    there.destroy(id).await?;
    there.undefine(id).await?;
    // With the domain gone, what it leaves is seen.
    until_left(&cluster, &format!("{id}/root.qcow2 on host {other}")).await?;
    there.delete_volumes(id, false).await?;
    until_examined(&cluster, &[], &[]).await?;

    // One with Dalgu's mark that nobody knows takes room as long as it runs.
    let before = free(&cluster, other).await?;
    copy.id = VmId::from_uuid(uuid::Uuid::from_u128(7));
    copy.name = "theirs".parse()?;
    there.create_volumes(&copy, false).await?;
    there.define(&copy).await?;
    there.start(copy.id).await?;
    until_examined(&cluster, &[format!("I4 LEFTOVER_DOMAIN domain {}", copy.id)], &[]).await?;
    ensure!(
        free(&cluster, other).await? + 64 == before,
        "{} and {before} MiB",
        free(&cluster, other).await?
    );
    // An agent that is started anew adopts it: it is reported as a VM, and no more touched than before.
    cluster.kill_agent(other).await;
    cluster.start_agent(other).await?;
    until_examined(&cluster, &["I4 STRAY_VM vm theirs".to_owned()], &[]).await?;
    ensure!(
        free(&cluster, other).await? + 64 == before,
        "{} and {before} MiB",
        free(&cluster, other).await?
    );
    ensure!(
        there
            .get(copy.id)
            .await?
            .is_some_and(|domain| domain.state == DomainState::Running)
    );
    there.destroy(copy.id).await?;
    there.undefine(copy.id).await?;
    until_left(&cluster, &format!("{}/root.qcow2 on host {other}", copy.id)).await?;
    there.delete_volumes(copy.id, false).await?;
    until_examined(&cluster, &[], &[]).await?;

    here.destroy(id).await?;
    until_examined(&cluster, &["I7 CHANGED_OUTSIDE vm web".to_owned()], &[]).await?;
    done(&cluster, Ask::Start, "web").await?;

    cluster.kill_agent(&owner).await;
    until_examined(
        &cluster,
        &[format!("I13 HOST_SILENT host {owner}")],
        &[owner.as_str()],
    )
    .await
}

/// What is said by everybody in this process.
#[derive(Clone, Default)]
struct Said(Arc<Mutex<Vec<u8>>>);

impl Said {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }
}

impl std::io::Write for Said {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Files below a directory that hold a text.
fn holding(dir: &std::path::Path, marker: &str) -> Result<Vec<std::path::PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let (path, kind) = entry.map(|entry| (entry.path(), entry.file_type()))?;
        if kind?.is_dir() {
            found.extend(holding(&path, marker)?);
        } else if let Ok(bytes) = std::fs::read(&path)
            && bytes.windows(marker.len()).any(|part| part == marker.as_bytes())
        {
            found.push(path);
        }
    }
    Ok(found)
}

#[tokio::test]
async fn a_password_for_a_guest_is_in_no_log_answer_record_or_ledger_once_its_disks_are_made() -> Result<()> {
    const MARKER: &str = "correct-horse-battery-staple";
    let said = Said::default();
    let writer = said.clone();
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::TRACE)
        .with_writer(move || writer.clone())
        .init();
    let cluster = Cluster::start(2).await?;
    let mut told = vm("web");
    if let Some(spec) = &mut told.spec {
        spec.first_boot = Some(v1::FirstBoot {
            user_data: format!("#cloud-config\npassword: {MARKER}\n"),
            network_config: format!("version: 2 # {MARKER}\n"),
            ..Default::default()
        });
    }
    let request = v1::CreateVmRequest {
        vm: Some(told),
        request_id: uuid::Uuid::new_v4().to_string(),
        ..Default::default()
    };
    ensure!(
        !format!("{request:?}").contains(MARKER),
        "a request is printed with it"
    );
    let mut vms = cluster.vms().await?;
    vms.create_vm(request.clone()).await?;
    let mut broken = request;
    broken.request_id = uuid::Uuid::new_v4().to_string();
    if let Some(first_boot) = broken
        .vm
        .iter_mut()
        .filter_map(|vm| vm.spec.as_mut()?.first_boot.as_mut())
        .next()
    {
        first_boot.user_data = format!("#cloud-config\n\"{MARKER}\": [{MARKER}\n");
    }
    let refused = vms.create_vm(broken).await.expect_err("it is no YAML");
    cluster.until_at_rest().await?;
    for what in [Ask::Stop, Ask::Start, Ask::Migrate] {
        done(&cluster, what, "web").await?;
    }
    let found: usize = cluster.hosts.values().map(|host| host.sim.local_volumes()).sum();
    ensure!(found == 2, "a disk and the volume of the first boot, not {found}");
    let answers = format!(
        "{:?} {:?} {:?} {refused:?}",
        cluster.list_vms().await?,
        cluster.list_operations().await?,
        cluster.list_hosts().await?
    );
    ensure!(answers.contains("user_data_digest: Some"), "its digest is shown");
    let store = format!("{:?}", cluster.disk.open().load()?);
    ensure!(store.contains("VmCreated"), "events are in the store");
    let log = said.text();
    ensure!(
        log.contains("intent accepted") && log.len() > 100_000,
        "the log is not whole"
    );
    for (place, text) in [("an answer", answers), ("the store", store), ("a log", log)] {
        ensure!(!text.contains(MARKER), "{place} holds it");
    }
    let files = holding(cluster.path(), MARKER)?;
    ensure!(files.is_empty(), "{files:?} hold it");
    done(&cluster, Ask::Delete, "web").await?;
    cluster.check().await
}
