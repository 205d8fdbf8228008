//! This version's programs beside ones that speak an earlier version: what those do not have is dropped from every message,
//! and their lack of a call is answered with UNIMPLEMENTED.

use std::sync::Arc;

use dalgu_agent::hypervisor::DomainState;
use dalgu_proto::{ids::HostName, v1};
use dalgu_tests::versions::{
    samples,
    site::Site,
    story::{self, Operator},
    wire::Tap,
};

use crate::nobody;

/// Which programs are of the earlier version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Old {
    /// The agent of `h1`.
    OneAgent,
    /// All agents, or the controller: on the wire that is the same.
    Agents,
    /// The operator's command line.
    Operator,
    /// Whatever the operator asks, and all agents.
    All,
}

async fn life(old: Old, lens: &Arc<dyn Tap>) {
    let agents = |host: &HostName| {
        let is_old = match old {
            Old::OneAgent => host.as_str() == "h1",
            Old::Agents | Old::All => true,
            Old::Operator => false,
        };
        if is_old { lens.clone() } else { nobody() }
    };
    let mut site = Site::new(&["h1", "h2"], None).unwrap();
    let store = site.disk.open();
    site.start_controller_on(store, &agents).await.unwrap();
    for host in ["h1", "h2"].map(|host| story::host(host).unwrap()) {
        site.start_agent(&host, agents(&host)).await.unwrap();
    }
    let operator = match old {
        Old::Operator | Old::All => lens.clone(),
        Old::OneAgent | Old::Agents => nobody(),
    };
    let operator = Operator::new(&site, operator).unwrap();
    operator.until_ready(2).await.unwrap();
    story::label_hosts(&operator, &["h1", "h2"]).await.unwrap();
    operator.create("web", "h1", false).await.unwrap();
    operator.create("db", "h1", true).await.unwrap();
    asked(&operator).await;
    for to in ["h2", "h1", "h2"] {
        let moved = operator.migrate("web", to).await.unwrap();
        operator.done(moved).await.unwrap();
    }
    let given_up = operator.migrate("web", "h1").await.unwrap();
    operator.copying(&given_up).await.unwrap();
    let cancel = v1::CancelOperationRequest {
        id: given_up.id.clone(),
    };
    operator.operations().cancel_operation(cancel).await.unwrap();
    let ended = operator.ended(given_up).await.unwrap();
    assert_eq!(ended.state(), v1::OperationState::Cancelled, "{old:?}");
    let on = |host: &str| -> Vec<DomainState> {
        let domains = site.servers[&story::host(host).unwrap()].sim.domains();
        domains.into_iter().map(|(_, state, _)| state).collect()
    };
    assert_eq!(on("h1"), [DomainState::Stopped], "{old:?}");
    assert_eq!(on("h2"), [DomainState::Running], "{old:?}");
    for name in ["web", "db"] {
        let delete = v1::DeleteVmRequest {
            name: name.into(),
            force: true,
            ..Default::default()
        };
        let delete = operator.vms().delete_vm(delete).await.unwrap().into_inner();
        operator.done(delete).await.unwrap();
    }
    for (host, server) in &site.servers {
        let left = (server.sim.domains().len(), server.sim.local_volumes());
        assert_eq!(left, (0, 0), "{old:?}: something is left on {host}");
    }
}

/// Power states and a restart.
async fn asked(operator: &Operator) {
    let (mut vms, name) = (operator.vms(), || "web".to_owned());
    let pause = v1::PauseVmRequest {
        name: name(),
        ..Default::default()
    };
    let paused = vms.pause_vm(pause).await.unwrap().into_inner();
    operator.done(paused).await.unwrap();
    let resume = v1::ResumeVmRequest {
        name: name(),
        ..Default::default()
    };
    let resumed = vms.resume_vm(resume).await.unwrap().into_inner();
    operator.done(resumed).await.unwrap();
    let restart = v1::RestartVmRequest {
        name: name(),
        mode: v1::RestartMode::Reset.into(),
        ..Default::default()
    };
    let restarted = vms.restart_vm(restart).await.unwrap().into_inner();
    operator.done(restarted).await.unwrap();
    let stop = v1::StopVmRequest {
        name: name(),
        ..Default::default()
    };
    let stopped = vms.stop_vm(stop).await.unwrap().into_inner();
    operator.done(stopped).await.unwrap();
    let start = v1::StartVmRequest {
        name: name(),
        ..Default::default()
    };
    let started = vms.start_vm(start).await.unwrap().into_inner();
    operator.done(started).await.unwrap();
}

async fn beside(old: Old) {
    for sample in samples::all().unwrap() {
        let lens: Arc<dyn Tap> = Arc::new(sample.lens);
        life(old, &lens).await;
    }
}

#[tokio::test(start_paused = true)]
async fn one_host_of_an_earlier_version_takes_part_in_everything() {
    beside(Old::OneAgent).await;
}

#[tokio::test(start_paused = true)]
async fn controller_and_agents_of_two_versions_work_together() {
    beside(Old::Agents).await;
}

#[tokio::test(start_paused = true)]
async fn an_operators_earlier_command_line_is_served() {
    beside(Old::Operator).await;
}

#[tokio::test(start_paused = true)]
async fn a_controller_of_this_version_among_earlier_programs_does_its_work() {
    beside(Old::All).await;
}
