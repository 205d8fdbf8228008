//! Many migrations while agents are replaced, watched by the chaos run's independent eye.

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::rc::Rc;

use anyhow::{Context as _, ensure};
use dalgu_tests::chaos::books::{Books, Subject, Want};
use dalgu_tests::chaos::eye::Eye;
use dalgu_tests::e2e::census::at_rest;
use dalgu_tests::e2e::words::{
    self, LOCAL, SHARED, begin, create, create_with, dalgu, end_of, number_at, operation, state_of,
};
use dalgu_tests::e2e::{self, REST_LIMIT};
use dalgu_tests::lab::{Daemon, Lab, guest, run, wait_for, with_lab};
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::task::LocalSet;
use tokio::time::Instant;

/// When in a round an agent is replaced, by the first of the round's two migrations.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// So many bytes of the memory have gone.
    Sent(u64),
    /// Fewer than so many bytes of the memory are left.
    Left(u64),
    /// Its transfer is over, as the controller sees it.
    Over,
    /// It has ended.
    Ended,
}

/// A round for each: both VMs are moved, and one agent is replaced. `make chaos` does it for longer.
const MOMENTS: [Moment; 6] = [
    Moment::Sent(0),
    Moment::Sent(16 << 20),
    Moment::Left(8 << 20),
    Moment::Over,
    Moment::Left(8 << 20),
    Moment::Ended,
];

impl Moment {
    fn has_come(self, operation: &Value) -> bool {
        let phase = operation["migration"]["phase"].as_str().unwrap_or_default();
        let before = ["RESERVING", "PREPARING_DESTINATION", "TRANSFERRING"];
        let ended = matches!(state_of(operation), "SUCCEEDED" | "FAILED");
        ended
            || match self {
                Self::Sent(bytes) => number_at(operation, "/migration/memoryProcessedBytes") >= bytes,
                Self::Left(bytes) => {
                    let left = operation.pointer("/migration/memoryRemainingBytes");
                    left.is_some() && number_at(operation, "/migration/memoryRemainingBytes") < bytes
                }
                Self::Over => !phase.is_empty() && !before.iter().any(|phases| phase.ends_with(phases)),
                Self::Ended => false,
            }
    }
}

/// Looks after which the eye has seen enough; each is of both VMs.
const LOOKS: u64 = 40;

/// What the eye needs to know of a VM that runs and is to run on.
fn subject(name: &str) -> Subject {
    Subject {
        name: name.to_owned(),
        want: Want::Running,
        settled: Some(Instant::now()),
        acknowledged: true,
        restarts: true,
        victim: None,
        boots_due: 1,
        deaths: Vec::new(),
    }
}

/// An upgrade: the agent is killed, and another file than before is started in its place.
async fn upgrade(lab: &Lab, books: &RefCell<Books>, host: u8, round: usize) -> anyhow::Result<()> {
    let program = lab.layout().bin_dir().join("dalgu-agent");
    let new = format!("/var/lib/dalgu/dalgu-agent-{round}");
    let outside = lab.layout().host(host).outside(&new);
    let (place, copy) = (program.to_string_lossy(), outside.to_string_lossy());
    run("strip", ["-o", &*copy, &*place]).await?;
    // In the host's own view of the machine only.
    lab.exec(host, &["mount", "--bind", &new, &place]).await?;
    books.borrow_mut().carriers_killed.insert(host, Instant::now());
    lab.signal(Daemon::Agent(host), Signal::SIGKILL).await?;
    lab.start(Daemon::Agent(host)).await?;
    let seen = lab.exec(host, &["stat", "-c", "%i", &place]).await?;
    ensure!(
        seen.trim() == fs::metadata(&outside)?.ino().to_string(),
        "the new agent is not in the place of the old"
    );
    Ok(())
}

/// Begins to move it to where it is not.
async fn away(lab: &Lab, name: &str) -> anyhow::Result<String> {
    let vm = words::vm(lab, name).await?;
    let to = if vm.host == "h1" { "h2" } else { "h1" };
    begin(
        lab,
        &["vm", "migrate", name, "--host", to, "--bandwidth", "24MiB"],
    )
    .await
}

/// What came of the rounds.
#[derive(Debug, Default)]
struct Moved {
    succeeded: u32,
    /// Migrations that had not ended when an agent was replaced.
    amid: u32,
}

async fn rounds(lab: &Lab, books: &Rc<RefCell<Books>>) -> anyhow::Result<Moved> {
    let mut moved = Moved::default();
    for (round, moment) in MOMENTS.into_iter().enumerate() {
        let ids = [away(lab, "busy").await?, away(lab, "copied").await?];
        wait_for("the moment of the upgrade", REST_LIMIT, async || {
            let now = operation(lab, &ids[0]).await;
            now.is_ok_and(|now| moment.has_come(&now))
        })
        .await?;
        let host = if round % 2 == 0 { 1 } else { 2 };
        let tell = |line: String| books.borrow_mut().tell(&line);
        tell(format!("{moment:?}: the agent of h{host} is replaced"));
        for id in &ids {
            moved.amid += u32::from(state_of(&operation(lab, id).await?) == "RUNNING");
        }
        upgrade(lab, books, host, round).await?;
        for id in &ids {
            let ended = end_of(lab, id, REST_LIMIT).await?;
            moved.succeeded += u32::from(state_of(&ended) == "SUCCEEDED");
            tell(ended.to_string());
        }
        at_rest(lab, &[], REST_LIMIT).await?;
    }
    Ok(moved)
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn incident_05_migrations_under_churn_with_agents_replaced_never_make_two_copies() -> anyhow::Result<()>
{
    with_lab(&e2e::hosts(2), async |lab| {
        let busy = format!("{} dalgu.dirty=2", guest::CMDLINE);
        dalgu(lab, &create_with("busy", SHARED, &busy, &["--host", "h1"])).await?;
        dalgu(lab, &create("copied", LOCAL, &["--host", "h2"])).await?;
        let books = Rc::new(RefCell::new(Books::default()));
        for vm in words::vms(lab).await?.into_values() {
            books.borrow_mut().subjects.insert(vm.uid, subject(&vm.name));
        }
        let looks = || {
            let books = books.borrow();
            books.checks.get("copies of a VM by its processes").copied()
        };
        let local = LocalSet::new();
        let moved = local
            .run_until(async {
                let eye = tokio::task::spawn_local(Eye::new(lab, books.clone()).watch());
                let moved = rounds(lab, &books).await;
                // What came last is looked at too.
                let before = looks();
                wait_for("the last looks", REST_LIMIT, async || {
                    looks() >= before.map(|n| n + 8)
                })
                .await?;
                eye.abort();
                moved
            })
            .await
            .with_context(|| books.borrow().timeline().to_owned())?;
        let violations = &books.borrow().violations;
        let timeline = books.borrow().timeline().to_owned();
        ensure!(violations.is_empty(), "{violations:#?}\n{timeline}");
        println!("{moved:?}, copies counted {:?} times", looks());
        ensure!(
            moved.succeeded > 0 && moved.amid > 0 && looks() > Some(LOOKS),
            "too little happened: {moved:?}, {:?} looks\n{timeline}",
            looks()
        );
        Ok(())
    })
    .await
}
