//! The API by the real `grpcurl`, which knows it by reflection only: a VM's life, the event stream, and bad input of
//! every kind, which is refused with a code and a reason and changes nothing. Run by `make test`; needs root and the
//! set-up step.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::at_rest;
use dalgu_tests::e2e::grpcurl::{Caller, call, refusal, run, try_call};
use dalgu_tests::e2e::story::Story;
use dalgu_tests::e2e::words::{self, attempt, dalgu, number_at};
use dalgu_tests::e2e::{self, REST_LIMIT};
use dalgu_tests::lab::{Lab, guest, wait_for, with_lab};
use serde_json::{Value, json};
use tokio::process::Command;

const SERVICES: [&str; 7] = [
    "dalgu.v1.EventService",
    "dalgu.v1.HostService",
    "dalgu.v1.OperationService",
    "dalgu.v1.PlacementService",
    "dalgu.v1.VmService",
    "dalgu.agent.v1.RegistrarService",
    "grpc.health.v1.Health",
];

/// Codes of google.rpc.Code.
const INVALID_ARGUMENT: u8 = 3;
const NOT_FOUND: u8 = 5;
const ALREADY_EXISTS: u8 = 6;
const RESOURCE_EXHAUSTED: u8 = 8;
const FAILED_PRECONDITION: u8 = 9;
const ABORTED: u8 = 10;
const OUT_OF_RANGE: u8 = 11;

/// The lab's guest as the API takes it.
fn spec() -> Value {
    json!({
        "vcpus": 1, "memory_mib": 96, "disks": [{"name": "root", "size_mib": 8}],
        "nics": [{"name": "eth0", "bridge": "br0"}],
        "kernel_boot": {"kernel": guest::KERNEL, "initrd": guest::INITRD, "cmdline": guest::CMDLINE},
    })
}

/// A request to create a VM, with one value of it replaced.
fn create(name: &str, pointer: &str, value: Value) -> String {
    let mut body = json!({"vm": {"name": name, "spec": spec(), "labels": {}, "description": ""}, "host": "", "request_id": ""});
    if !pointer.is_empty()
        && let Some(place) = body.pointer_mut(pointer)
    {
        *place = value;
    }
    body.to_string()
}

/// An agent's port is for the controller, but tells what it speaks, and whether it is well, to whoever belongs to the site.
async fn agents_describe_themselves(lab: &Lab) -> anyhow::Result<()> {
    let (operator, agent) = (lab.layout().operator(), lab.layout().host(1).agent_address());
    let grpcurl = lab.layout().tools_dir().join("bin/grpcurl");
    let mut command = Command::new(grpcurl);
    command.arg("-cacert").arg(operator.join("ca.pem"));
    command.arg("-cert").arg(operator.join("admin.pem"));
    command.arg("-key").arg(operator.join("admin.key"));
    let described = attempt(command.args([&agent, "describe", "dalgu.agent.v1.AgentService"])).await?;
    ensure!(
        described.code == 0 && described.stdout.contains("rpc "),
        "an agent: {described:?}"
    );
    Ok(())
}

async fn every_service_describes_itself(lab: &Lab) -> anyhow::Result<()> {
    let listed = run(lab, Caller::Operator, &[], &["list"]).await?;
    for service in SERVICES {
        ensure!(
            listed.stdout.lines().any(|line| line == service),
            "{service} is not listed: {listed:?}"
        );
        let described = run(lab, Caller::Operator, &[], &["describe", service]).await?;
        ensure!(
            described.code == 0 && described.stdout.contains("rpc "),
            "{service}: {described:?}"
        );
    }
    for message in ["dalgu.v1.Vm", "dalgu.v1.CreateVmRequest", "google.rpc.ErrorInfo"] {
        let described = run(lab, Caller::Operator, &[], &["describe", message]).await?;
        ensure!(
            described.code == 0 && described.stdout.contains("message "),
            "{message}: {described:?}"
        );
    }
    ensure!(
        !listed.stdout.contains("AgentService"),
        "a service of the agents is listed by the controller: {listed:?}"
    );
    agents_describe_themselves(lab).await?;
    let health = run(
        lab,
        Caller::Operator,
        &["-d", "{}"],
        &["grpc.health.v1.Health/Check"],
    )
    .await?;
    ensure!(health.stdout.contains("SERVING"), "{health:?}");
    Ok(())
}

/// Waits for an operation through the API, as long as it takes.
async fn wait(lab: &Lab, operation: &Value) -> anyhow::Result<Value> {
    let id = operation["id"].as_str().context("an operation's id")?;
    let done = call(
        lab,
        "OperationService/WaitOperation",
        &json!({"id": id, "timeout": "120s"}).to_string(),
    )
    .await?;
    ensure!(done["state"] == "OPERATION_STATE_SUCCEEDED", "{done}");
    Ok(done)
}

/// A stream of events in a file, as grpcurl writes it.
struct Watch {
    child: tokio::process::Child,
    file: PathBuf,
}

impl Watch {
    fn start(lab: &Lab, name: &str, body: &Value) -> anyhow::Result<Self> {
        let file = lab.layout().dir().join(name);
        let operator = lab.layout().operator();
        let child = Command::new(lab.layout().tools_dir().join("bin/grpcurl"))
            .arg("-cacert")
            .arg(operator.join("ca.pem"))
            .arg("-cert")
            .arg(operator.join("admin.pem"))
            .arg("-key")
            .arg(operator.join("admin.key"))
            .args([
                "-d",
                &body.to_string(),
                &lab.layout().controller_address(),
                "dalgu.v1.EventService/WatchEvents",
            ])
            .stdout(fs::File::create(&file)?)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .context("start grpcurl")?;
        Ok(Self { child, file })
    }

    /// The events that have come; one that is not whole yet is left for the next look.
    fn events(&self) -> Vec<Value> {
        let text = fs::read_to_string(&self.file).unwrap_or_default();
        serde_json::Deserializer::from_str(&text)
            .into_iter::<Value>()
            .map_while(Result::ok)
            .collect()
    }

    async fn until(&self, reason: &str) -> anyhow::Result<Vec<Value>> {
        let there = async || self.events().iter().any(|event| event["reason"] == reason);
        wait_for(&format!("the event {reason}"), REST_LIMIT, there)
            .await
            .with_context(|| format!("there are {:?}", reasons(&self.events())))?;
        Ok(self.events())
    }

    async fn end(mut self) -> anyhow::Result<()> {
        self.child.kill().await.context("end grpcurl")
    }
}

fn reasons(events: &[Value]) -> Vec<&str> {
    events
        .iter()
        .filter_map(|event| event["reason"].as_str())
        .collect()
}

fn versions(events: &[Value]) -> Vec<u64> {
    events
        .iter()
        .map(|event| number_at(event, "/resourceVersion"))
        .collect()
}

/// A VM from creation to deletion, watched; a second watch that resumes in the middle sees the very same rest.
async fn a_whole_life(lab: &Lab) -> anyhow::Result<()> {
    let list = call(lab, "VmService/ListVms", "{}").await?;
    let start = number_at(&list, "/resourceVersion");
    let watch = Watch::start(
        lab,
        "events",
        &json!({"after_resource_version": start, "subject": "web"}),
    )?;

    let created = call(lab, "VmService/CreateVm", &create("web", "", Value::Null)).await?;
    wait(lab, &created).await?;
    let vm = words::vm(lab, "web").await?;
    let mut story = Story::default();
    story.more(lab, &vm, 3).await?;
    let to = if vm.host == "h1" { "h2" } else { "h1" };
    let migrating = call(
        lab,
        "VmService/MigrateVm",
        &json!({"name": "web", "destination_host": to}).to_string(),
    )
    .await?;
    let migrated = wait(lab, &migrating).await?;
    ensure!(
        migrated["migration"]["phase"] == "MIGRATION_PHASE_DONE",
        "{migrated}"
    );
    let vm = words::vm(lab, "web").await?;
    ensure!(vm.host == to, "{}", vm.all);
    story.more(lab, &vm, 3).await?;
    story.is_whole()?;
    wait(
        lab,
        &call(lab, "VmService/DeleteVm", r#"{"name":"web","force":true}"#).await?,
    )
    .await?;

    let events = watch.until("VmDeleted").await?;
    watch.end().await?;
    let said = reasons(&events);
    for wanted in ["VmCreated", "VmRunning", "VmMigrated", "VmDeleted"] {
        ensure!(said.contains(&wanted), "no {wanted} among {said:?}");
    }
    let seen = versions(&events);
    ensure!(
        seen.windows(2).all(|pair| pair[0] < pair[1]),
        "not in order: {seen:?}"
    );
    ensure!(
        seen.first().is_some_and(|first| *first > start),
        "an event of before: {seen:?}"
    );

    let middle = seen[seen.len() / 2];
    let resumed = Watch::start(
        lab,
        "resumed",
        &json!({"after_resource_version": middle, "subject": "web"}),
    )?;
    let rest = resumed.until("VmDeleted").await?;
    resumed.end().await?;
    let wanted: Vec<_> = seen.iter().copied().filter(|version| *version > middle).collect();
    ensure!(
        versions(&rest) == wanted,
        "resumed at {middle}: {:?}, not {wanted:?}",
        versions(&rest)
    );
    at_rest(lab, &[], REST_LIMIT).await
}

/// Everything the API holds, but for what moves by itself.
async fn everything(lab: &Lab) -> anyhow::Result<Value> {
    let mut vms = call(lab, "VmService/ListVms", "{}").await?;
    for vm in vms["vms"].as_array_mut().into_iter().flatten() {
        if let Some(status) = vm["status"].as_object_mut() {
            status.remove("usage");
            status.remove("observeTime");
        }
    }
    let operations = call(lab, "OperationService/ListOperations", "{}").await?;
    let hosts = call(lab, "HostService/ListHosts", "{}").await?;
    let held = hosts["hosts"].as_array().into_iter().flatten().map(|host| {
        json!([
            host["name"],
            host["allocation"],
            host["cordoned"],
            host["labels"],
            host["etag"]
        ])
    });
    Ok(json!([
        vms["vms"],
        operations["operations"],
        held.collect::<Vec<_>>()
    ]))
}

/// A method, a body, and the code and the reason with which it is refused.
type Refused = (&'static str, String, u8, &'static str);

const CREATE: &str = "VmService/CreateVm";

/// Requests that are wrong as things are, or ask for what is not there.
fn bad_requests() -> Vec<Refused> {
    vec![
        ("VmService/GetVm", json!({"name": "nobody"}).to_string(), NOT_FOUND, "VM_NOT_FOUND"),
        ("VmService/StopVm", json!({"name": "nobody"}).to_string(), NOT_FOUND, "VM_NOT_FOUND"),
        ("VmService/DeleteVm", json!({"name": "nobody"}).to_string(), NOT_FOUND, "VM_NOT_FOUND"),
        ("VmService/ReadConsole", json!({"name": "nobody"}).to_string(), NOT_FOUND, "VM_NOT_FOUND"),
        ("HostService/CordonHost", json!({"name": "nobody"}).to_string(), NOT_FOUND, "HOST_NOT_FOUND"),
        ("OperationService/GetOperation", json!({"id": "nobody"}).to_string(), INVALID_ARGUMENT, "INVALID_FIELD"),
        (
            "OperationService/CancelOperation",
            json!({"id": "00000000-0000-4000-8000-000000000000"}).to_string(),
            NOT_FOUND,
            "OPERATION_NOT_FOUND",
        ),
        ("VmService/ListVms", json!({"page_size": -1}).to_string(), INVALID_ARGUMENT, "INVALID_FIELD"),
        ("VmService/ListVms", json!({"page_token": "//"}).to_string(), INVALID_ARGUMENT, "INVALID_FIELD"),
        ("VmService/UpdateVm", json!({"vm": {"name": "kept"}}).to_string(), INVALID_ARGUMENT, "INVALID_FIELD"),
        ("VmService/UpdateVm", update(&["spec.tpm"]), INVALID_ARGUMENT, "FIELD_NOT_MUTABLE"),
        ("VmService/UpdateVm", update(&["no.such.field"]), INVALID_ARGUMENT, "FIELD_NOT_MUTABLE"),
        (
            "VmService/UpdateVm",
            json!({"vm": {"name": "kept", "description": "x", "etag": "r1"}, "update_mask": {"paths": ["description"]}})
                .to_string(),
            ABORTED,
            "ETAG_MISMATCH",
        ),
        ("VmService/StopVm", json!({"name": "kept", "etag": "r1"}).to_string(), ABORTED, "ETAG_MISMATCH"),
        ("VmService/DeleteVm", json!({"name": "kept"}).to_string(), FAILED_PRECONDITION, "VM_RUNNING"),
        (
            "VmService/MigrateVm",
            json!({"name": "kept", "destination_host": "h9"}).to_string(),
            NOT_FOUND,
            "HOST_NOT_FOUND",
        ),
        (
            "VmService/MigrateVm",
            json!({"name": "kept", "destination_host": "h1"}).to_string(),
            FAILED_PRECONDITION,
            "SAME_HOST",
        ),
        (
            "VmService/StopVm",
            json!({"name": "kept", "grace_period_seconds": 99999}).to_string(),
            INVALID_ARGUMENT,
            "INVALID_FIELD",
        ),
        (
            "VmService/StopVm",
            json!({"name": "kept", "request_id": "no uuid"}).to_string(),
            INVALID_ARGUMENT,
            "INVALID_FIELD",
        ),
        (CREATE, "{}".to_owned(), INVALID_ARGUMENT, "INVALID_FIELD"),
        (CREATE, create("kept", "", Value::Null), ALREADY_EXISTS, "VM_ALREADY_EXISTS"),
        (CREATE, create("big", "/vm/spec/memory_mib", json!(1 << 23)), RESOURCE_EXHAUSTED, "NO_CAPACITY"),
        (CREATE, create("far", "/host", json!("h9")), NOT_FOUND, "HOST_NOT_FOUND"),
    ]
}

/// New VMs with a value that is never allowed.
fn bad_vms() -> Vec<Refused> {
    let mut table = Vec::new();
    for name in [
        "a<b",
        "a>b",
        "a&b",
        "a\"b",
        "a/b",
        "../etc",
        "",
        "-a",
        "a-",
        "A",
        "a b",
        "a\n",
        "달구",
        &"a".repeat(64),
    ] {
        table.push((
            CREATE,
            create(name, "", Value::Null),
            INVALID_ARGUMENT,
            "INVALID_FIELD",
        ));
    }
    for (pointer, value) in [
        ("/vm/spec", Value::Null),
        ("/vm/spec/vcpus", json!(0)),
        ("/vm/spec/vcpus", json!(255)),
        ("/vm/spec/memory_mib", json!(0)),
        ("/vm/spec/memory_mib", json!("18446744073709551615")),
        ("/vm/spec/disks", json!([{"name": "root", "size_mib": 0}])),
        (
            "/vm/spec/disks",
            json!([{"name": "root", "size_mib": 1}, {"name": "root", "size_mib": 1}]),
        ),
        ("/vm/spec/disks", json!([{"name": "../root", "size_mib": 1}])),
        ("/vm/spec/disks/0/size_mib", json!("18446744073709551615")),
        ("/vm/spec/nics/0/bridge", json!("br0'/><evil/>")),
        (
            "/vm/spec/nics",
            json!([{"name": "eth0", "bridge": "br0", "mac": "ff:ff:ff:ff:ff:ff"}]),
        ),
        ("/vm/spec/kernel_boot/kernel", json!("../../../etc/shadow")),
        ("/vm/spec/kernel_boot/cmdline", json!("a\u{1}b")),
        ("/vm/spec/kernel_boot/cmdline", json!("x".repeat(3000))),
        ("/vm/labels", json!({"a b": "c"})),
        ("/vm/description", json!("x".repeat(1025))),
        ("/request_id", json!("no uuid")),
        ("/host", json!("h1/../h2")),
    ] {
        table.push((
            CREATE,
            create("bad", pointer, value),
            INVALID_ARGUMENT,
            "INVALID_FIELD",
        ));
    }
    table
}

fn update(paths: &[&str]) -> String {
    json!({"vm": {"name": "kept", "spec": spec()}, "update_mask": {"paths": paths}}).to_string()
}

async fn bad_input_changes_nothing(lab: &Lab) -> anyhow::Result<()> {
    wait(
        lab,
        &call(lab, "VmService/CreateVm", &create("kept", "/host", json!("h1"))).await?,
    )
    .await?;
    at_rest(lab, &[], REST_LIMIT).await?;
    let before = everything(lab).await?;
    let mut wrong = Vec::new();
    for (method, body, code, reason) in bad_requests().into_iter().chain(bad_vms()) {
        let ended = try_call(lab, method, &body).await?;
        let found = refusal(&ended);
        if found.as_deref() != Some(&format!("{code} {reason}")) {
            let body: String = body.chars().take(200).collect();
            wrong.push(format!(
                "{method} {body}: not {code} {reason} but {found:?} {}{}",
                ended.stdout, ended.stderr
            ));
        }
    }
    // What grpcurl itself cannot put into the message.
    for body in [
        create("bad", "/vm/spec/memory_mib", json!(-96)),
        create("bad", "/vm/spec/vcpus", json!("many")),
        create("bad", "/vm/spec", json!({"no_such_field": 1})),
    ] {
        let ended = try_call(lab, "VmService/CreateVm", &body).await?;
        if ended.code == 0 {
            wrong.push(format!("{body} was accepted"));
        }
    }
    ensure!(
        wrong.is_empty(),
        "{} wrong answers:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    let ended = try_call(
        lab,
        "EventService/WatchEvents",
        r#"{"after_resource_version":"18446744073709551615"}"#,
    )
    .await?;
    ensure!(
        refusal(&ended).is_some_and(|found| found == format!("{OUT_OF_RANGE} RESOURCE_VERSION_EXPIRED")),
        "{ended:?}"
    );
    let after = everything(lab).await?;
    ensure!(
        after == before,
        "bad input has changed something:\n{before}\n{after}"
    );
    Ok(())
}

async fn ten_megabytes_are_refused(lab: &Lab) -> anyhow::Result<()> {
    let before = everything(lab).await?;
    let file = lab.layout().dir().join("large.json");
    fs::write(
        &file,
        create("large", "/vm/description", json!("x".repeat(10 << 20))),
    )?;
    let operator = lab.layout().operator();
    let mut command = Command::new("bash");
    command
        .args(["-c", r#"exec "$1" -cacert "$2/ca.pem" -cert "$2/admin.pem" -key "$2/admin.key" -format-error -d @ "$3" "$4" <"$5""#])
        .arg("bash")
        .arg(lab.layout().tools_dir().join("bin/grpcurl"))
        .arg(&operator)
        .arg(lab.layout().controller_address())
        .arg("dalgu.v1.VmService/CreateVm")
        .arg(&file);
    let ended = attempt(&mut command).await?;
    let found = refusal(&ended).with_context(|| format!("{ended:?}"))?;
    ensure!(
        found == format!("{RESOURCE_EXHAUSTED} REQUEST_TOO_LARGE")
            && ended.stderr.contains("4 MiB")
            && ended.stderr.contains("limit_bytes"),
        "a request of 10 MiB: {found} {}",
        ended.stderr
    );
    ensure!(everything(lab).await? == before);
    Ok(())
}

/// The same request twice is one; the same id with another request is refused; also after the controller's death.
async fn a_request_is_carried_out_once(lab: &Lab) -> anyhow::Result<()> {
    let id = "11111111-2222-4333-8444-555555555555";
    let body = create("once", "/request_id", json!(id));
    let first = call(lab, "VmService/CreateVm", &body).await?;
    let second = call(lab, "VmService/CreateVm", &body).await?;
    ensure!(first["id"] == second["id"], "{first}\n{second}");
    wait(lab, &first).await?;
    at_rest(lab, &[], REST_LIMIT).await?;
    let before = everything(lab).await?;
    let other = create("other", "/request_id", json!(id));
    let reused = async || -> anyhow::Result<()> {
        let ended = try_call(lab, "VmService/CreateVm", &other).await?;
        ensure!(
            refusal(&ended).is_some_and(|found| found == format!("{ALREADY_EXISTS} REQUEST_ID_REUSED")),
            "{ended:?}"
        );
        let third = call(lab, "VmService/CreateVm", &body).await?;
        ensure!(third["id"] == first["id"], "{first}\n{third}");
        Ok(())
    };
    reused().await?;
    ensure!(everything(lab).await? == before);
    lab.signal(
        dalgu_tests::lab::Daemon::Controller,
        nix::sys::signal::Signal::SIGKILL,
    )
    .await?;
    lab.start(dalgu_tests::lab::Daemon::Controller).await?;
    reused().await.context("after the controller's death")?;
    at_rest(lab, &[], REST_LIMIT).await
}

/// Whoever cannot say who he is, or is not an operator, gets nothing.
async fn strangers_are_turned_away(lab: &Lab) -> anyhow::Result<()> {
    let before = everything(lab).await?;
    let layout = lab.layout();
    let stranger = layout.dir().join("stranger");
    let controller = layout.bin_dir().join("dalgu-controller");
    let made = attempt(
        Command::new(&controller)
            .args(["init", "--name", "other", "--data-dir"])
            .arg(&stranger),
    )
    .await?;
    ensure!(made.code == 0, "{made:?}");
    let agent = layout.host(1).outside("/etc/dalgu/tls");
    let body = create("stolen", "", Value::Null);
    let words = ["dalgu.v1.VmService/CreateVm"];
    for (who, caller) in [
        ("nobody", Caller::Nobody),
        ("another site's", Caller::Identity(&stranger, "admin")),
    ] {
        let ended = run(
            lab,
            caller,
            &["-max-time", "10", "-connect-timeout", "5", "-d", &body],
            &words,
        )
        .await?;
        ensure!(ended.code != 0, "{who} certificate was let in: {ended:?}");
        ensure!(!ended.stdout.contains("id"), "{who} was answered: {ended:?}");
    }
    // An agent is somebody, but no operator: it gets a typed refusal.
    let ended = run(
        lab,
        Caller::Identity(&agent, "agent"),
        &["-format-error", "-d", &body],
        &words,
    )
    .await?;
    ensure!(
        refusal(&ended).is_some_and(|found| found.starts_with("7 ") && found != "7 -"),
        "{ended:?}"
    );
    no_plain_text(&layout.controller_address(), Path::new("/")).await?;
    ensure!(everything(lab).await? == before);
    // An operator may not speak for a host.
    let speech = json!({"host": "h1"}).to_string();
    let ended = run(
        lab,
        Caller::Operator,
        &["-format-error", "-d", &speech],
        &["dalgu.agent.v1.RegistrarService/Report"],
    )
    .await?;
    ensure!(
        refusal(&ended).is_some_and(|found| found.starts_with("7 ")),
        "{ended:?}"
    );
    Ok(())
}

/// The port does not speak without TLS.
async fn no_plain_text(address: &str, path: &Path) -> anyhow::Result<()> {
    let url = format!("http://{address}{}", path.display());
    let ended = attempt(Command::new("curl").args(["-sS", "--max-time", "5", &url])).await?;
    ensure!(ended.code != 0, "{url} was answered: {ended:?}");
    Ok(())
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn grpcurl_alone_can_do_it_all_and_bad_input_does_nothing() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        every_service_describes_itself(lab).await.context("reflection")?;
        a_whole_life(lab).await.context("a VM's life")?;
        bad_input_changes_nothing(lab).await.context("bad input")?;
        ten_megabytes_are_refused(lab).await.context("10 MB")?;
        a_request_is_carried_out_once(lab).await.context("request ids")?;
        strangers_are_turned_away(lab).await.context("strangers")?;
        let names: Vec<_> = words::vms(lab).await?.into_keys().collect();
        for name in names {
            dalgu(lab, &["vm", "delete", &name, "--force"]).await?;
        }
        at_rest(lab, &[], Duration::from_mins(1)).await
    })
    .await
}
