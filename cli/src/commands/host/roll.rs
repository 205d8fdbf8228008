//! `dalgu host roll`: hosts maintained group by group. The groups are the controller's answer, asked for anew before each of them; drains and restorations
//! are the controller's too. Only what is done with an empty host is done from here.

use std::{cell::RefCell, collections::HashMap, io, process::Stdio};

use dalgu_proto::v1;
use futures::future;
use tokio::{
    process::Command,
    time::{Instant, sleep},
};
use tonic::Response;

use super::{
    Session, change,
    drain::{LOOK, ended, look, seconds, to_end},
    list, request_id,
};
use crate::{
    args::host::RollArgs,
    commands::{map, vm},
    exit::Error,
    output::{self, human},
};

/// Why a host of a group is closed before its VMs leave.
const REASON: &str = "maintained with others";

/// Maintains hosts. Ctrl-C counts at any time: what is the controller's goes on.
pub async fn roll(args: RollArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let asked = hosts(&args, session).await?;
    if args.dry_run {
        let plan = groups(&asked, 0, &args, session).await?;
        return output::one(session.term, session.format, &plan);
    }
    let count = asked.len();
    let (left, group) = (RefCell::new(asked), RefCell::new(Vec::new()));
    let interrupt = (session.term.interrupt)();
    let ended = tokio::select! {
        biased;
        () = interrupt => Err(Error::RollInterrupted(human::clean(&group.borrow().join(", ")))),
        ended = all(&left, &group, &args, session) => ended,
    };
    let (left, group) = (left.into_inner(), group.into_inner());
    let begun = !group.is_empty() || left.len() < count;
    ended.map_err(|error| match error {
        // Nothing was done: what is wrong counts, and what to do about it.
        error if !begun && !matches!(error, Error::RollEnded(_)) => error,
        Error::RollInterrupted(_) => error,
        error => stopped(&error, &group, &left),
    })
}

async fn hosts(args: &RollArgs, session: &Session<'_>) -> Result<Vec<String>, Error> {
    if args.selector.is_empty() {
        return Ok(args.hosts.clone());
    }
    let (hosts, _) = list(&session.client, &map(args.selector.clone())).await?;
    match hosts.is_empty() {
        true => Err(Error::Usage("no host has these labels".to_owned())),
        false => Ok(hosts.into_iter().map(|host| host.name).collect()),
    }
}

/// All of them; `left` are those that are not maintained yet, `group` are those that may be closed.
async fn all(
    left: &RefCell<Vec<String>>,
    group: &RefCell<Vec<String>>,
    args: &RollArgs,
    session: &mut Session<'_>,
) -> Result<(), Error> {
    while !left.borrow().is_empty() {
        let asked = left.borrow().clone();
        let plan = groups(&asked, 1, args, session).await?;
        let Some(first) = plan.groups.first() else {
            output::one(session.term, session.format, &plan)?;
            let message = "none of the hosts that are left can be emptied now";
            return Err(Error::RollEnded(message.to_owned()));
        };
        let names = &first.hosts;
        session.term.say(&human::clean(&format!(
            "{}: {} VMs move away first, likely within {:.0} s",
            names.join(", "),
            first.moves,
            first.predicted_seconds
        )))?;
        group.replace(names.clone());
        maintain(names, args, session).await?;
        left.borrow_mut().retain(|host| !names.contains(host));
        bring_back(names, args, session).await?;
        group.replace(Vec::new());
    }
    Ok(session.term.say("all hosts are maintained")?)
}

/// Empties one group, and does with it what is to be done.
async fn maintain(names: &[String], args: &RollArgs, session: &mut Session<'_>) -> Result<(), Error> {
    // All are closed before the first VM leaves: none of these hosts is where it goes.
    for name in names {
        let request = v1::CordonHostRequest {
            name: name.clone(),
            reason: REASON.to_owned(),
            request_id: request_id(None),
        };
        change(session, async |client| {
            client.hosts().cordon_host(request.clone()).await
        })
        .await?;
    }
    let drained = each(names, Way::Out, args, session).await?;
    let mut hosts = Vec::new();
    let mut blocked = false;
    for before in &drained {
        // The first may have waited long for the last.
        let host = look(&before.name, session).await?;
        if let Err(why) = is_empty(before, &host, session).await {
            session.term.say(&why.to_string())?;
            blocked = true;
        }
        hosts.push(host);
    }
    if blocked {
        bring_back(names, args, session).await?;
        let message = "not all of these hosts could be emptied; their VMs are back";
        return Err(Error::RollEnded(message.to_owned()));
    }
    execute(&hosts, args, session).await?;
    report_again(&hosts, args, session).await
}

/// Whether a host is as its drain left it: closed, and without a VM that runs and was not to stay.
async fn is_empty(before: &v1::Host, host: &v1::Host, session: &mut Session<'_>) -> Result<(), Error> {
    ended(before)?;
    let begun = |host: &v1::Host| host.drain.as_ref().and_then(|drain| drain.begin_time);
    let drain = host.drain.clone().unwrap_or_default();
    let same = begun(before) == begun(host) && !drain.restoring && drain.state() == v1::DrainState::Done;
    let name = human::clean(&host.name);
    if !(host.cordoned && same) {
        return Err(Error::RollEnded(format!(
            "{name} was opened or drained anew by somebody else meanwhile"
        )));
    }
    let (vms, _) = change(session, async |client| {
        let list = vm::list(client, &host.name, &HashMap::new()).await;
        list.map(Response::new)
    })
    .await?;
    let stays = |vm: &v1::Vm| drain.vms.iter().any(|left| left.vm == vm.name && is_left(left));
    let running = vms.iter().filter(|vm| !is_off(vm) && !stays(vm));
    let running: Vec<_> = running.map(|vm| human::clean(&vm.name)).collect();
    match running.is_empty() {
        true => Ok(()),
        // A cordon keeps no owner from starting a VM that is there.
        false => Err(Error::RollEnded(format!(
            "VMs run on {name} that were not to stay there: {}",
            running.join(", ")
        ))),
    }
}

/// Whether a drain left a VM as it was, as its mode says.
fn is_left(drained: &v1::DrainedVm) -> bool {
    drained.mode() == v1::DrainMode::Leave && drained.state() == v1::DrainedVmState::Left
}

/// Whether a VM is off, and is to be. Of one that its host could not define no state is seen.
fn is_off(vm: &v1::Vm) -> bool {
    let seen = vm.status.as_ref().map(v1::VmStatus::power_state);
    let runs = matches!(seen, Some(v1::PowerState::Running | v1::PowerState::Paused));
    vm.desired_power_state() == v1::PowerState::Stopped && !runs
}

/// Which hosts can be empty at once: so many groups, or 0 for all.
async fn groups(
    hosts: &[String],
    max_groups: u32,
    args: &RollArgs,
    session: &mut Session<'_>,
) -> Result<v1::MaintenancePlan, Error> {
    let request = v1::PlanMaintenanceRequest {
        hosts: hosts.to_vec(),
        max_hosts: args.max_hosts,
        without_spare_host: args.without_spare_host,
        max_groups,
    };
    change(session, async |client| {
        client.plans().plan_maintenance(request.clone()).await
    })
    .await
}

#[derive(Clone, Copy)]
enum Way {
    Out,
    Back,
}

/// Empties hosts, or brings their VMs back: all begun at once, each told of to its end. One that is refused keeps none of the others from it.
async fn each(
    names: &[String],
    way: Way,
    args: &RollArgs,
    session: &mut Session<'_>,
) -> Result<Vec<v1::Host>, Error> {
    let deadline_seconds = seconds(args.deadline)?;
    let (mut begun, mut refused) = (Vec::new(), Ok(()));
    for name in names {
        let (name, request_id) = (name.clone(), request_id(None));
        let host = match way {
            Way::Out => {
                let request = v1::DrainHostRequest {
                    name,
                    deadline_seconds,
                    request_id,
                    ..Default::default()
                };
                change(session, async |client| {
                    client.hosts().drain_host(request.clone()).await
                })
                .await
            }
            Way::Back => {
                let request = v1::RestoreHostRequest {
                    name,
                    deadline_seconds,
                    request_id,
                };
                change(session, async |client| {
                    client.hosts().restore_host(request.clone()).await
                })
                .await
            }
        };
        match host {
            Ok(host) => begun.push(host),
            Err(error) => refused = refused.and(Err(error)),
        }
    }
    let mut over = Vec::new();
    for host in begun {
        let before = format!("{}: ", host.name);
        over.push(to_end(host, &before, session).await?);
    }
    refused.map(|()| over)
}

/// Opens hosts, and brings their VMs back; says of each how that ended.
async fn bring_back(names: &[String], args: &RollArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let mut all = Ok(());
    for host in each(names, Way::Back, args, session).await? {
        match ended(&host) {
            Ok(said) => session.term.say(&said)?,
            Err(error) => {
                session.term.say(&error.to_string())?;
                let message = "not every VM of these hosts is back".to_owned();
                all = Err(Error::RollEnded(message));
            }
        }
    }
    all
}

/// Runs the command for each host, all at once; its output goes where messages go.
async fn execute(hosts: &[v1::Host], args: &RollArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let command = args.exec.as_deref().unwrap_or_default();
    let run = async |host: &v1::Host| {
        let status = Command::new("sh")
            .args(["-c", command])
            .env("DALGU_HOST", &host.name)
            .stdin(Stdio::null())
            .stdout(io::stderr())
            .status()
            .await;
        (host.name.clone(), status)
    };
    let mut failed = Ok(());
    for (host, status) in future::join_all(hosts.iter().map(run)).await {
        let why = match status {
            Ok(status) if status.success() => continue,
            Ok(status) => format!("{host}: the command ended with {status}"),
            Err(error) => format!("{host}: the command cannot be run: {error}"),
        };
        session.term.say(&human::clean(&why))?;
        failed = Err(Error::RollEnded("the command failed".to_owned()));
    }
    failed
}

/// Waits until the hosts report.
async fn report_again(hosts: &[v1::Host], args: &RollArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let limit = Instant::now().checked_add(args.back_within);
    for before in hosts {
        loop {
            let host = look(&before.name, session).await?;
            let another = !args.reboots || host.boot_id != before.boot_id;
            if host.state() == v1::HostState::Ready && another {
                break;
            }
            if limit.is_some_and(|limit| Instant::now() >= limit) {
                let name = human::clean(&before.name);
                return Err(Error::RollEnded(format!("{name} does not report again")));
            }
            sleep(LOOK).await;
        }
    }
    Ok(())
}

/// Says with what went wrong which hosts may be closed, and which are left.
fn stopped(error: &Error, group: &[String], left: &[String]) -> Error {
    let mut text = error.to_string();
    if !group.is_empty() {
        let hosts = group.join(" ");
        text += &format!(
            "\nlook at these hosts; `dalgu host restore` opens one and brings its VMs back: {hosts}"
        );
    }
    if !left.is_empty() {
        text += &format!("\nnot maintained: {}", left.join(" "));
    }
    Error::RollEnded(text)
}
