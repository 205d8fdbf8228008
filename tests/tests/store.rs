//! The store under every way to die: killed at every moment, cut from its power at every write, on a disk that fails or is
//! full. What was acknowledged is there afterwards, nothing is there in part, and it opens.
//!
//! Needs `strace`, which `tests/lab/setup.sh` installs; without it these tests fail.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use dalgu_controller::{
    pki,
    store::{Image, Store, Table, memory, sqlite::Sqlite},
};
use dalgu_proto::{ids::VmId, reason, v1};
use dalgu_tests::cluster::{Cluster, restored, until, vm};
use dalgu_tests::store::{
    Random,
    cut::{cut, moments, record, scratch},
    model,
    trace::Call,
};

const WRITER: &str = env!("CARGO_BIN_EXE_store-writer");
/// What the controller exits with when its store has failed.
const EXIT_STORE: i32 = 70;

fn writer(database: &Path, from: u64, to: u64) -> Command {
    let mut command = Command::new(WRITER);
    command.arg("batches").arg(database);
    command.args(["--from", &from.to_string(), "--to", &to.to_string()]);
    command
}

/// The last number on the lines that a program wrote.
fn last(stdout: &[u8]) -> Result<u64> {
    let text = std::str::from_utf8(stdout)?;
    text.lines().last().map_or(Ok(0), |line| Ok(line.parse()?))
}

#[test]
fn a_writer_killed_at_any_moment_loses_nothing_it_acknowledged_and_leaves_nothing_in_part() -> Result<()> {
    const KILLS: u64 = 200;
    let dir = scratch()?;
    let database = dir.path().join("dalgu.db");
    let mut random = Random::new(1);
    let mut there = 0;
    let mut cut_short = 0;
    for kill in 0..KILLS {
        let mut child = writer(&database, there + 1, u64::MAX / 64)
            .stdout(Stdio::piped())
            .spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
        let mut acknowledged = there;
        for _ in 0..random.below(12) {
            acknowledged = lines.next().context("it ended by itself")??.parse()?;
        }
        // Some way into the next commit.
        for _ in 0..random.below(20_000) {
            std::hint::spin_loop();
        }
        child.kill()?;
        ensure!(child.wait()?.signal() == Some(9), "it was not killed");
        for line in lines {
            acknowledged = line?.parse()?;
        }
        let found = model::judge(&database, acknowledged).with_context(|| format!("after kill {kill}"))?;
        cut_short += u64::from(found > acknowledged);
        there = found;
    }
    ensure!(there > KILLS, "only {there} batches were written");
    println!("{KILLS} kills, {there} batches, {cut_short} committed and not yet acknowledged");
    Ok(())
}

#[test]
fn a_power_cut_at_any_write_loses_nothing_that_was_acknowledged_and_leaves_nothing_in_part() -> Result<()> {
    let dir = scratch()?;
    let site = dir.path().join("site");
    fs::create_dir(&site)?;
    let calls = record(dir.path(), &writer(&site.join("dalgu.db"), 1, 60))?;
    let moments = moments(&site, &calls);
    ensure!(
        moments.len() > 200,
        "only {} moments were recorded",
        moments.len()
    );
    let cuts = cut(&moments, 3, |dir, acknowledged| {
        model::judge(&dir.join("dalgu.db"), acknowledged).map(|_| ())
    })?;
    println!("{} moments, {cuts} power cuts", moments.len());
    Ok(())
}

#[test]
fn the_forgetful_disk_finds_a_program_that_does_not_sync() -> Result<()> {
    let dir = scratch()?;
    let site = dir.path().join("site");
    fs::create_dir(&site)?;
    let calls = record(dir.path(), &writer(&site.join("dalgu.db"), 1, 20))?;
    // The same program, had it not synced its log.
    let unsynced: Vec<_> = calls
        .into_iter()
        .filter(|call| !matches!(call, Call::Sync { .. }))
        .collect();
    let outcome = cut(&moments(&site, &unsynced), 0, |dir, acknowledged| {
        model::judge(&dir.join("dalgu.db"), acknowledged).map(|_| ())
    });
    ensure!(outcome.is_err(), "lost writes were not noticed");
    Ok(())
}

/// Runs a program while one system call on files of `database` fails; its exit code and the last number acknowledged.
fn with_fault(database: &Path, program: &Command, fault: &str, when: &str) -> Result<(i32, u64)> {
    let name = |suffix: &str| PathBuf::from(format!("{}{suffix}", database.display()));
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o", "/dev/null"]);
    for suffix in ["", "-wal", "-journal"] {
        command.arg("-P").arg(name(suffix));
    }
    let output = command
        .args(["-e", &format!("inject={fault}:when={when}")])
        .arg(program.get_program())
        .args(program.get_args())
        .output()
        .context("strace cannot be run; tests/lab/setup.sh installs it")?;
    let code = output.status.code().context("it was killed")?;
    Ok((code, last(&output.stdout)?))
}

const FAULTS: [&str; 4] = [
    "fdatasync,fsync:error=EIO",
    "write,pwrite64:error=EIO",
    "write,pwrite64:error=ENOSPC",
    "ftruncate:error=EIO",
];

#[test]
fn a_disk_that_fails_or_is_full_ends_the_writer_and_costs_nothing_that_was_acknowledged() -> Result<()> {
    let mut ended = 0;
    for fault in FAULTS {
        // Once and then well again, or for ever; at every third call, so that all kinds are met.
        for when in (1..90).step_by(3) {
            for when in [format!("{when}"), format!("{when}+")] {
                let dir = scratch()?;
                let database = dir.path().join("dalgu.db");
                let (code, acknowledged) = with_fault(&database, &writer(&database, 1, 40), fault, &when)?;
                let context =
                    || format!("{fault} at call {when}, exit code {code}, acknowledged {acknowledged}");
                match code {
                    EXIT_STORE => ended += 1,
                    // Before the first commit, or after the last.
                    1 => ensure!(acknowledged == 0, "{}", context()),
                    0 => ensure!(acknowledged >= 40, "{}", context()),
                    _ => anyhow::bail!("{}", context()),
                }
                model::judge(&database, acknowledged).with_context(context)?;
            }
        }
    }
    ensure!(ended > 50, "only {ended} faults ended a commit");
    Ok(())
}

#[test]
fn a_controller_whose_disk_fails_ends_with_code_70_and_forgets_nothing() -> Result<()> {
    for (fault, when) in [
        ("fdatasync,fsync:error=EIO", "12"),
        ("write,pwrite64:error=ENOSPC", "50+"),
        ("write,pwrite64:error=EIO", "65"),
    ] {
        let dir = scratch()?;
        let data = dir.path().join("controller");
        pki::init(&data, "test", &["127.0.0.1".to_owned()])?;
        pki::issue_agent(
            &data,
            &"h1".parse()?,
            &["127.0.0.1".to_owned()],
            &dir.path().join("agent"),
        )?;
        let mut program = Command::new(WRITER);
        program.arg("controller").arg(dir.path()).args(["--count", "200"]);
        let database = data.join("dalgu.db");
        let (code, acknowledged) = with_fault(&database, &program, fault, when)?;
        ensure!(
            code == EXIT_STORE,
            "{fault} at {when}: exit code {code} after {acknowledged}"
        );
        ensure!(
            acknowledged > 0,
            "{fault} at {when} came before anything was acknowledged"
        );
        let image = Sqlite::open(&database)?.load()?;
        let host = image.records.iter().find(|(table, ..)| *table == Table::Hosts);
        let record: serde_json::Value = serde_json::from_str(&host.context("the host is lost")?.2)?;
        let address = record["address"].as_str().context("no address")?;
        let found: u64 = address.trim_start_matches("127.0.0.1:").parse()?;
        ensure!(
            found == acknowledged || found == acknowledged + 1,
            "registration {acknowledged} was acknowledged, {found} is there"
        );
    }
    Ok(())
}

/// What a store holds, as a backup of it would.
fn backup(disk: &memory::Disk) -> Result<Image> {
    Ok(disk.open().load()?)
}

async fn create(cluster: &Cluster, name: &str) -> Result<VmId> {
    let request = v1::CreateVmRequest {
        vm: Some(vm(name)),
        ..Default::default()
    };
    cluster.vms().await?.create_vm(request).await?;
    cluster.until_at_rest().await?;
    let request = v1::GetVmRequest {
        name: name.to_owned(),
    };
    Ok(cluster
        .vms()
        .await?
        .get_vm(request)
        .await?
        .into_inner()
        .uid
        .parse()?)
}

async fn site(cluster: &Cluster) -> Result<v1::Site> {
    let answer = cluster.site().await?.get_site(v1::GetSiteRequest {}).await?;
    Ok(answer.into_inner())
}

/// Each guest's run on each host, and how often it was reset: a guest that was restarted has others.
fn guests(cluster: &Cluster, ids: &[VmId]) -> Vec<(Option<u64>, Option<u64>)> {
    let of = |id: &VmId| {
        cluster
            .hosts
            .values()
            .map(|host| (host.sim.run(*id), host.sim.resets(*id)))
            .collect::<Vec<_>>()
    };
    ids.iter().flat_map(of).collect()
}

#[tokio::test]
#[allow(clippy::too_many_lines, reason = "one restore, told in its order")]
async fn a_restored_controller_looks_first_and_takes_every_guest_over_without_restarting_it() -> Result<()> {
    let mut cluster = Cluster::start(2).await?;
    let (web, db) = (create(&cluster, "web").await?, create(&cluster, "db").await?);
    let image = backup(&cluster.disk)?;

    // All this the backup does not know.
    let new = create(&cluster, "new").await?;
    let mut vms = cluster.vms().await?;
    vms.migrate_vm(v1::MigrateVmRequest {
        name: "web".to_owned(),
        ..Default::default()
    })
    .await?;
    vms.stop_vm(v1::StopVmRequest {
        name: "db".to_owned(),
        force: true,
        ..Default::default()
    })
    .await?;
    cluster.until_at_rest().await?;
    let before = guests(&cluster, &[web, db, new]);
    cluster.kill_controller().await;
    cluster.disk = restored(image)?;
    cluster.start_controller().await?;

    until("every host has shown what it has", async || {
        let site = site(&cluster).await?;
        ensure!(
            site.waiting_hosts.is_empty(),
            "waits for {:?}",
            site.waiting_hosts
        );
        Ok(())
    })
    .await?;
    let seen = site(&cluster).await?;
    ensure!(seen.observing && seen.incarnation == 2, "{seen:?}");
    let mut found: Vec<_> = seen
        .differences
        .iter()
        .map(|d| (d.vm.as_str(), d.kind()))
        .collect();
    found.sort_unstable();
    use v1::SiteDifferenceKind as Kind;
    ensure!(
        found
            == [
                ("db", Kind::PowerState),
                ("new", Kind::UnknownVm),
                ("web", Kind::OtherOwner)
            ],
        "{found:?}"
    );
    let mut vms = cluster.vms().await?;
    let refused = vms.start_vm(v1::StartVmRequest {
        name: "db".to_owned(),
        ..Default::default()
    });
    let status = refused.await.err().context("it only observes")?;
    ensure!(
        reason::of(&status).as_deref() == Some("SITE_OBSERVING"),
        "{status:?}"
    );
    ensure!(guests(&cluster, &[web, db, new]) == before, "it touched a guest");

    let request = v1::ResumeSiteRequest {
        accept_differences: true,
        etag: seen.etag,
        request_id: uuid::Uuid::new_v4().to_string(),
    };
    for answer in ["the first, which was lost", "the second"] {
        let site = cluster.site().await?.resume_site(request.clone()).await;
        let site = site.with_context(|| format!("{answer} answer"))?.into_inner();
        ensure!(!site.observing, "{answer} answer: {site:?}");
    }
    until("hosts and controller agree", async || {
        let vms = cluster.list_vms().await?;
        for (name, state) in [("web", v1::VmState::Running), ("db", v1::VmState::Stopped)] {
            let vm = vms.iter().find(|vm| vm.name == name).context("it is gone")?;
            let status = vm.status.as_ref().context("no status")?;
            ensure!(status.state() == state, "{name} is {:?}", status.state());
            ensure!(
                status.observed_generation == vm.generation,
                "{name} was not taken over"
            );
        }
        Ok(())
    })
    .await?;
    ensure!(
        guests(&cluster, &[web, db, new]) == before,
        "a guest was restarted or touched"
    );

    until("what the store does not know has its room", async || {
        let hosts = cluster.list_hosts().await?;
        let room = hosts
            .iter()
            .filter_map(|host| Some(host.allocation.as_ref()?.memory_mib_capacity));
        let (least, most) = (room.clone().min(), room.max());
        ensure!(
            least.map(|least| least + 64) == most,
            "{least:?} and {most:?} MiB"
        );
        Ok(())
    })
    .await?;

    in_charge(&cluster).await
}

/// What the controller says is obeyed.
async fn in_charge(cluster: &Cluster) -> Result<()> {
    let mut vms = cluster.vms().await?;
    for name in ["web", "db"] {
        vms.start_vm(v1::StartVmRequest {
            name: name.to_owned(),
            ..Default::default()
        })
        .await?;
        cluster.until_at_rest().await?;
        vms.restart_vm(v1::RestartVmRequest {
            name: name.to_owned(),
            ..Default::default()
        })
        .await?;
    }
    let operations = cluster.until_at_rest().await?;
    let failed = operations
        .iter()
        .find(|o| o.state() == v1::OperationState::Failed);
    ensure!(failed.is_none(), "{failed:?}");
    Ok(())
}
