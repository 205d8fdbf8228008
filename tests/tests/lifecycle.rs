//! The life of VMs on real libvirt hosts: created many at once, stopped, started, paused, restarted, moved and
//! deleted, and after each step `virsh`, the process table and the file systems agree with `dalgu`. Run by
//! `make test`; needs root and the set-up step.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::{self, FOREIGN_UUID, at_rest, pids_of};
use dalgu_tests::e2e::story::{self, Story};
use dalgu_tests::e2e::words::{
    self, LOCAL, SHARED, begin, create, create_with, dalgu, end_of, state_of, try_dalgu,
};
use dalgu_tests::e2e::{self, BOOT_LIMIT, REST_LIMIT, grpcurl};
use dalgu_tests::lab::{Lab, wait_for, with_lab};
use futures::future::{join_all, try_join_all};
use serde_json::Value;
use tokio::time::Instant;

/// Virtual processors that each host of the first test may reserve, whatever the machine has.
const ROOM: u64 = 7;

async fn limit_hosts(lab: &Lab) -> anyhow::Result<()> {
    for host in lab.hosts() {
        let name = &host.name;
        let shown = words::json(lab, &["host", "show", name]).await?;
        let cpus = words::number_at(&shown, "/inventory/cpus");
        #[expect(clippy::cast_precision_loss, reason = "no machine has 2^53 processors")]
        let ratio = ROOM as f64 / cpus as f64 + 0.001;
        let body = format!(
            r#"{{"host":{{"name":"{name}","cpu_overcommit_ratio":{ratio}}},"update_mask":{{"paths":["cpu_overcommit_ratio"]}}}}"#
        );
        let host = grpcurl::call(lab, "HostService/UpdateHost", &body).await?;
        ensure!(
            words::number_at(&host, "/allocation/vcpusCapacity") == ROOM,
            "{host}"
        );
    }
    Ok(())
}

/// What is reserved never passes what there is, by Dalgu's own word and by the domains' definitions.
async fn nothing_is_over_committed(lab: &Lab) -> anyhow::Result<()> {
    let hosts = words::json(lab, &["host", "list"]).await?;
    for (host, number) in hosts.as_array().context("a list of hosts")?.iter().zip(1..) {
        let (_, vcpus, mib) = census::reserved(host);
        ensure!(vcpus <= ROOM, "{host}");
        ensure!(
            mib <= words::number_at(host, "/allocation/memoryMibCapacity"),
            "{host}"
        );
        let mut defined = (0, 0);
        for domain in census::domains(lab)
            .await?
            .iter()
            .filter(|domain| domain.host == number)
        {
            let info = lab.virsh(number, &["dominfo", &domain.name]).await?;
            defined.0 += figure(&info, "CPU(s):")?;
            defined.1 += figure(&info, "Max memory:")? / 1024;
        }
        ensure!(
            defined.0 == vcpus,
            "virsh counts {} processors, Dalgu reserves {vcpus}",
            defined.0
        );
        ensure!(
            defined.1 <= mib,
            "virsh counts {} MiB, Dalgu reserves {mib}",
            defined.1
        );
    }
    Ok(())
}

fn figure(info: &str, label: &str) -> anyhow::Result<u64> {
    let line = info.lines().find_map(|line| line.strip_prefix(label));
    let word = line
        .and_then(|line| line.split_whitespace().next())
        .with_context(|| format!("no {label} in {info}"))?;
    word.parse().with_context(|| format!("{label} {word}"))
}

async fn all_tick(lab: &Lab, names: &[String]) -> anyhow::Result<()> {
    let stories = names.iter().map(async |name| {
        let mut story = Story::default();
        story.more(lab, &words::vm(lab, name).await?, 3).await?;
        story.is_whole().with_context(|| name.clone())
    });
    try_join_all(stories).await.map(drop)
}

/// Twenty at once, then two where there is room for one.
async fn many_at_once(lab: &Lab) -> anyhow::Result<()> {
    limit_hosts(lab).await?;
    let names: Vec<_> = (1..=20).map(|number| format!("vm{number:02}")).collect();
    let made = join_all(
        names
            .iter()
            .map(async |name| dalgu(lab, &create(name, LOCAL, &[])).await),
    )
    .await;
    for outcome in made {
        outcome?;
    }
    nothing_is_over_committed(lab).await?;
    at_rest(lab, &[], REST_LIMIT).await?;
    ensure!(words::vms(lab).await?.values().all(|vm| vm.state == "RUNNING"));
    all_tick(lab, &names).await?;

    let both = ["late1", "late2"].map(async |name| try_dalgu(lab, &create(name, LOCAL, &[])).await);
    let mut codes = Vec::new();
    for ended in join_all(both).await {
        let ended = ended?;
        ensure!(
            ended.code == 0 || ended.stderr.contains("vCPU"),
            "no reason is given: {}",
            ended.stderr
        );
        codes.push(ended.code);
    }
    codes.sort_unstable();
    ensure!(codes == [0, 5], "one has room and one is refused: {codes:?}");
    nothing_is_over_committed(lab).await?;
    at_rest(lab, &[], REST_LIMIT).await?;

    // The later steps need the machine's two processors for themselves.
    let gone = words::vms(lab)
        .await?
        .into_keys()
        .filter(|name| !["vm01", "vm02", "vm03"].contains(&name.as_str()));
    try_join_all(gone.map(async |name| dalgu(lab, &["vm", "delete", &name, "--force"]).await)).await?;
    at_rest(lab, &[], REST_LIMIT).await
}

async fn stop_and_start(lab: &Lab) -> anyhow::Result<()> {
    let before = words::vm(lab, "vm01").await?;
    dalgu(lab, &["vm", "stop", "vm01"]).await?;
    at_rest(lab, &[], REST_LIMIT).await?;
    let vm = words::vm(lab, "vm01").await?;
    ensure!(
        vm.state == "STOPPED" && pids_of(lab, &vm.uid)?.is_empty(),
        "{}",
        vm.all
    );
    ensure!((&vm.uid, &vm.host) == (&before.uid, &before.host));
    // Nothing to freeze, nothing to restart.
    for verb in ["pause", "restart", "migrate"] {
        let ended = try_dalgu(lab, &["vm", verb, "vm01"]).await?;
        ensure!(ended.code == 5, "{verb} of a stopped VM: {ended:?}");
    }
    dalgu(lab, &["vm", "start", "vm01"]).await?;
    at_rest(lab, &[], REST_LIMIT).await?;
    let mut story = Story::default();
    wait_for("the second boot", BOOT_LIMIT, async || {
        story.read_on(lab, &vm).is_ok() && story.boots() == 2
    })
    .await?;
    story.more(lab, &vm, 3).await
}

async fn pause_and_resume(lab: &Lab) -> anyhow::Result<()> {
    let vm = words::vm(lab, "vm02").await?;
    dalgu(lab, &["vm", "pause", "vm02"]).await?;
    at_rest(lab, &[], REST_LIMIT).await?;
    let mut story = Story::default();
    story.read_on(lab, &vm)?;
    let frozen = story.ticks().len();
    let window = Instant::now();
    wait_for("a second to pass", BOOT_LIMIT, async || {
        window.elapsed() > Duration::from_secs(1)
    })
    .await?;
    story.read_on(lab, &vm)?;
    ensure!(story.ticks().len() == frozen, "a paused guest counts on");
    dalgu(lab, &["vm", "resume", "vm02"]).await?;
    at_rest(lab, &[], REST_LIMIT).await?;
    story.more(lab, &vm, 5).await?;
    story.is_whole()
}

async fn restart(lab: &Lab) -> anyhow::Result<()> {
    let vm = words::vm(lab, "vm03").await?;
    for (boots, words) in [
        (2, vec!["vm", "reboot", "vm03"]),
        (3, vec!["vm", "restart", "vm03", "--reset"]),
    ] {
        dalgu(lab, &words).await?;
        let mut story = Story::default();
        let again = async || story.read_on(lab, &vm).is_ok() && story.boots() == boots;
        wait_for(&format!("boot {boots} after {words:?}"), BOOT_LIMIT, again).await?;
        story.more(lab, &vm, 3).await?;
        at_rest(lab, &[], REST_LIMIT).await?;
        ensure!(pids_of(lab, &vm.uid)?.len() == 1);
    }
    Ok(())
}

/// A guest that does not listen to the power button has its grace, and no more.
async fn stubborn_guest(lab: &Lab) -> anyhow::Result<()> {
    dalgu(
        lab,
        &create_with("deaf", LOCAL, "console=ttyS0 quiet no_timer_check acpi=off", &[]),
    )
    .await?;
    let vm = words::vm(lab, "deaf").await?;
    Story::default().more(lab, &vm, 5).await?;
    let began = Instant::now();
    let id = begin(lab, &["vm", "stop", "deaf", "--grace", "4s"]).await?;
    wait_for("end of its QEMU", BOOT_LIMIT, async || {
        pids_of(lab, &vm.uid).is_ok_and(|pids| pids.is_empty())
    })
    .await?;
    let took = began.elapsed();
    ensure!(
        (Duration::from_secs(4)..Duration::from_secs(10)).contains(&took),
        "it was powered off after {took:?}"
    );
    ensure!(state_of(&end_of(lab, &id, BOOT_LIMIT).await?) == "SUCCEEDED");
    at_rest(lab, &[], REST_LIMIT).await
}

async fn delete(lab: &Lab) -> anyhow::Result<()> {
    let vm = words::vm(lab, "vm02").await?;
    let refused = try_dalgu(lab, &["vm", "delete", "vm02"]).await?;
    ensure!(
        refused.code == 5 && refused.stderr.contains("force"),
        "a running VM was deleted: {refused:?}"
    );
    ensure!(pids_of(lab, &vm.uid)?.len() == 1);
    dalgu(lab, &["vm", "delete", "vm02", "--force"]).await?;
    dalgu(lab, &["vm", "delete", "deaf"]).await?;
    ensure!(try_dalgu(lab, &["vm", "show", "vm02"]).await?.code == 3);
    at_rest(lab, &[], REST_LIMIT).await
}

/// A domain made by hand is seen, told of, and left alone, even where a VM of the same name is asked for.
async fn foreign_domain(lab: &Lab) -> anyhow::Result<()> {
    let xml = format!(
        "<domain type='qemu'><name>legacy</name><uuid>{FOREIGN_UUID}0000-4000-8000-000000000001</uuid>\
         <memory unit='MiB'>96</memory><os><type arch='x86_64'>hvm</type>\
         <kernel>/var/lib/dalgu/images/dalgu-guest.kernel</kernel>\
         <initrd>/var/lib/dalgu/images/dalgu-guest.initrd</initrd><cmdline>console=ttyS0 quiet no_timer_check</cmdline></os></domain>"
    );
    fs::write(lab.layout().host(2).outside("/etc/dalgu/legacy.xml"), xml)?;
    lab.virsh(2, &["define", "/etc/dalgu/legacy.xml"]).await?;
    lab.virsh(2, &["start", "legacy"]).await?;
    let before = lab.virsh(2, &["dumpxml", "legacy"]).await?;
    wait_for("the foreign domain in Dalgu's words", REST_LIMIT, async || {
        words::json(lab, &["host", "show", "h2"]).await.is_ok_and(|host| {
            host["unmanagedDomains"]
                .as_array()
                .is_some_and(|all| all.iter().any(|domain| is_running(domain, "legacy")))
        })
    })
    .await?;

    let id = begin(lab, &create("legacy", LOCAL, &["--host", "h2"])).await?;
    let refused = end_of(lab, &id, REST_LIMIT).await?;
    ensure!(
        state_of(&refused) == "FAILED",
        "two domains cannot have one name: {refused}"
    );
    ensure!(
        refused["error"]["message"]
            .as_str()
            .is_some_and(|text| text.contains("legacy")),
        "{refused}"
    );
    dalgu(lab, &["vm", "delete", "legacy", "--force"]).await?;
    at_rest(lab, &["legacy"], REST_LIMIT).await?;
    ensure!(
        lab.virsh(2, &["dumpxml", "legacy"]).await? == before,
        "the foreign domain was touched"
    );
    lab.virsh(2, &["destroy", "legacy"]).await?;
    lab.virsh(2, &["undefine", "legacy"]).await?;
    Ok(())
}

fn is_running(domain: &Value, name: &str) -> bool {
    domain["name"] == name && domain["running"] == true
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn twenty_vms_at_once_and_each_verb_leave_the_hosts_as_dalgu_says() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(3), async |lab| {
        many_at_once(lab).await.context("twenty at once")?;
        stop_and_start(lab).await.context("stop and start")?;
        pause_and_resume(lab).await.context("pause and resume")?;
        restart(lab).await.context("reboot and reset")?;
        stubborn_guest(lab)
            .await
            .context("a guest deaf to the power button")?;
        delete(lab).await.context("delete")?;
        foreign_domain(lab).await.context("a foreign domain")?;
        let left = words::vms(lab).await?;
        try_join_all(
            left.keys()
                .map(async |name| dalgu(lab, &["vm", "delete", name, "--force"]).await),
        )
        .await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

/// Moves a VM, sees both hosts agree, and reads on in its story.
async fn there(lab: &Lab, name: &str, host: &str, story: &mut Story) -> anyhow::Result<()> {
    story.read_on(lab, &words::vm(lab, name).await?)?;
    dalgu(lab, &["vm", "migrate", name, "--host", host]).await?;
    let vm = words::vm(lab, name).await?;
    ensure!(vm.host == host, "{name} is on {}, not on {host}", vm.host);
    story.read_on(lab, &vm)?;
    story.more(lab, &vm, 2).await
}

/// Each guest moves there and back ten times, one with its disk shared, one with it copied along, both at once.
async fn ten_times_there_and_back(lab: &Lab) -> anyhow::Result<()> {
    dalgu(lab, &create("shared", SHARED, &["--host", "h1"])).await?;
    dalgu(lab, &create("copied", LOCAL, &["--host", "h2"])).await?;
    let (mut shared, mut copied) = (Story::default(), Story::default());
    shared.more(lab, &words::vm(lab, "shared").await?, 5).await?;
    copied.more(lab, &words::vm(lab, "copied").await?, 5).await?;
    for round in 1..=20 {
        let (one, other) = if round % 2 == 1 {
            ("h2", "h1")
        } else {
            ("h1", "h2")
        };
        let (first, second) = tokio::join!(
            there(lab, "shared", one, &mut shared),
            there(lab, "copied", other, &mut copied)
        );
        first.with_context(|| format!("round {round}, shared disk"))?;
        second.with_context(|| format!("round {round}, local disk"))?;
        at_rest(lab, &[], REST_LIMIT)
            .await
            .with_context(|| format!("round {round}"))?;
        shared
            .is_whole()
            .with_context(|| format!("round {round}, shared disk"))?;
        copied
            .is_whole()
            .with_context(|| format!("round {round}, local disk"))?;
    }
    Ok(())
}

/// The words that create a VM which takes a while to move at [`SLOW`].
fn busy(name: &str) -> Vec<&str> {
    create_with(
        name,
        LOCAL,
        "console=ttyS0 quiet no_timer_check dalgu.dirty=64",
        &["--memory", "256MiB", "--host", "h1"],
    )
}

const SLOW: &str = "4MiB";

/// A transfer that is cancelled leaves the guest where it was. Meanwhile only the agents' port is in use.
async fn cancelled(lab: &Lab) -> anyhow::Result<()> {
    dalgu(lab, &busy("busy")).await?;
    let vm = words::vm(lab, "busy").await?;
    let mut story = Story::default();
    story.more(lab, &vm, 5).await?;
    let id = begin(
        lab,
        &["vm", "migrate", "busy", "--host", "h2", "--bandwidth", SLOW],
    )
    .await?;
    wait_for("the transfer to be under way", REST_LIMIT, async || {
        words::operation(lab, &id).await.is_ok_and(|operation| {
            operation["migration"]["phase"] == "MIGRATION_PHASE_TRANSFERRING"
                && words::number_at(&operation, "/migration/memoryProcessedBytes") > 4 << 20
        })
    })
    .await?;
    only_dalgus_ports_are_used(lab).await?;
    try_dalgu(lab, &["op", "cancel", &id]).await?;
    let ended = end_of(lab, &id, REST_LIMIT).await?;
    ensure!(
        state_of(&ended) == "CANCELLED" && ended["migration"]["phase"] == "MIGRATION_PHASE_ABORTED",
        "{ended}"
    );
    at_rest(lab, &[], REST_LIMIT).await?;
    ensure!(words::vm(lab, "busy").await?.host == "h1");
    story.more(lab, &vm, 5).await?;
    story.is_whole()
}

async fn only_dalgus_ports_are_used(lab: &Lab) -> anyhow::Result<()> {
    for host in lab.hosts() {
        let listening = lab.exec(host.number, &["ss", "-Hltn"]).await?;
        let ports: Vec<_> = listening.lines().filter_map(|line| port(line, 3)).collect();
        ensure!(
            ports == ["7444"],
            "{} listens on other ports than its agent's: {listening}",
            host.name
        );
        let connected = lab
            .exec(host.number, &["ss", "-Htn", "state", "established"])
            .await?;
        for line in connected.lines() {
            let known = |at| port(line, at).is_some_and(|port| ["7443", "7444"].contains(&port));
            ensure!(
                known(2) || known(3),
                "a connection past the agents on {}: {line}",
                host.name
            );
        }
    }
    let connected = lab.exec(1, &["ss", "-Htn", "state", "established"]).await?;
    let peer = format!("{}:7444", lab.layout().host(2).ip);
    ensure!(
        connected.contains(&peer),
        "nothing goes from h1 to {peer}: {connected}"
    );
    Ok(())
}

/// The port of the address in a column of what `ss` prints.
fn port(line: &str, column: usize) -> Option<&str> {
    Some(line.split_whitespace().nth(column)?.rsplit_once(':')?.1)
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn guests_move_there_and_back_ten_times_and_no_count_is_lost() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        ten_times_there_and_back(lab).await?;
        cancelled(lab).await.context("cancelled in mid-flight")?;
        for name in ["shared", "copied", "busy"] {
            let vm = words::vm(lab, name).await?;
            dalgu(lab, &["vm", "delete", name, "--force"]).await?;
            ensure!(
                !story::file(lab, vm.host_number()?, &vm.uid).exists(),
                "the console of {name} is left"
            );
        }
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}
