//! `dalgu host roll`: hosts maintained group by group. The groups are the controller's answer, asked for anew before each of them; drains and restorations
//! are the controller's too. Only what is done with an empty host is done from here.

use std::{io, process::Stdio};

use dalgu_proto::v1;
use futures::future;
use tokio::{
    process::Command,
    time::{Instant, sleep},
};

use super::{
    Session, change,
    drain::{LOOK, ended, seconds, to_end},
    list, request_id,
};
use crate::{
    args::host::RollArgs,
    commands::{map, show::get},
    exit::Error,
    output::{self, human},
};

/// Maintains hosts.
pub async fn roll(args: RollArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let mut left = match args.selector.is_empty() {
        true => args.hosts.clone(),
        false => {
            let hosts = list(&session.client, &map(args.selector.clone())).await?.0;
            hosts.into_iter().map(|host| host.name).collect()
        }
    };
    if left.is_empty() {
        return Err(Error::Usage("no host has these labels".to_owned()));
    }
    if args.dry_run {
        let plan = groups(&left, &args, session).await?;
        return output::one(session.term, session.format, &plan);
    }
    while !left.is_empty() {
        let plan = groups(&left, &args, session).await?;
        let Some(group) = plan.groups.first() else {
            output::one(session.term, session.format, &plan)?;
            let message = "none of the hosts that are left can be emptied now".to_owned();
            return Err(stopped(Error::RollEnded(message), &left));
        };
        let (names, moves) = (group.hosts.join(", "), group.moves);
        let seconds = group.predicted_seconds;
        session.term.say(&human::clean(&format!(
            "{names}: {moves} VMs move away first, likely within {seconds:.0} s"
        )))?;
        maintain(&group.hosts, &args, session)
            .await
            .map_err(|error| stopped(error, &left))?;
        left.retain(|host| !group.hosts.contains(host));
    }
    Ok(session.term.say("all hosts are maintained")?)
}

/// One group, there and back.
async fn maintain(names: &[String], args: &RollArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let emptied = each(names, Way::Out, args, session).await?;
    let blocked: Vec<_> = emptied.iter().filter_map(|host| ended(host).err()).collect();
    if !blocked.is_empty() {
        for error in blocked {
            session.term.say(&error.to_string())?;
        }
        each(names, Way::Back, args, session).await?;
        let message = "not all of these hosts could be emptied; what was moved is brought back";
        return Err(Error::RollEnded(message.to_owned()));
    }
    execute(&emptied, args, session).await?;
    back(&emptied, args, session).await?;
    for host in each(names, Way::Back, args, session).await? {
        session.term.say(&ended(&host)?)?;
    }
    Ok(())
}

/// Which hosts can be empty at once.
async fn groups(
    hosts: &[String],
    args: &RollArgs,
    session: &Session<'_>,
) -> Result<v1::MaintenancePlan, Error> {
    let request = v1::PlanMaintenanceRequest {
        hosts: hosts.to_vec(),
        max_hosts: args.max_hosts,
        without_spare_host: args.without_spare_host,
    };
    session
        .read(async |client| client.plans().plan_maintenance(request.clone()).await)
        .await
}

#[derive(Clone, Copy)]
enum Way {
    Out,
    Back,
}

/// Empties hosts, or brings their VMs back: all begun at once, each told of to its end.
async fn each(
    names: &[String],
    way: Way,
    args: &RollArgs,
    session: &mut Session<'_>,
) -> Result<Vec<v1::Host>, Error> {
    let deadline_seconds = seconds(args.deadline)?;
    let mut hosts = Vec::new();
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
        hosts.push(host?);
    }
    let mut over = Vec::new();
    for host in hosts {
        let before = format!("{}: ", host.name);
        over.push(to_end(host, &before, session).await?);
    }
    Ok(over)
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
            .kill_on_drop(true)
            .status()
            .await;
        (host.name.clone(), status)
    };
    let all = future::join_all(hosts.iter().map(run));
    let ends = tokio::select! {
        ends = all => ends,
        () = (session.term.interrupt)() => return Err(Error::RollInterrupted(names(hosts))),
    };
    let failed = ends.into_iter().filter_map(|(host, status)| match status {
        Ok(status) if status.success() => None,
        Ok(status) => Some(format!("{host}: the command ended with {status}")),
        Err(error) => Some(format!("{host}: the command cannot be run: {error}")),
    });
    let failed: Vec<_> = failed.collect();
    if failed.is_empty() {
        return Ok(());
    }
    Err(Error::RollEnded(format!(
        "{}; {} stay empty and cordoned: `dalgu host restore` brings their VMs back",
        failed.join("; "),
        names(hosts)
    )))
}

/// Waits until the hosts report.
async fn back(hosts: &[v1::Host], args: &RollArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let limit = Instant::now() + args.back_within;
    for before in hosts {
        loop {
            let host: v1::Host = get(&session.client, &before.name).await?;
            let another = !args.reboots || host.boot_id != before.boot_id;
            if host.state() == v1::HostState::Ready && another {
                break;
            }
            if Instant::now() >= limit {
                let name = &before.name;
                return Err(Error::RollEnded(format!(
                    "{name} does not report again; {} stay empty and cordoned: `dalgu host restore` brings their VMs back",
                    names(hosts)
                )));
            }
            tokio::select! {
                () = sleep(LOOK) => {}
                () = (session.term.interrupt)() => return Err(Error::RollInterrupted(names(hosts))),
            }
        }
    }
    Ok(())
}

fn names(hosts: &[v1::Host]) -> String {
    let names: Vec<_> = hosts.iter().map(|host| host.name.as_str()).collect();
    human::clean(&names.join(", "))
}

/// Says with what went wrong which hosts are left.
fn stopped(error: Error, left: &[String]) -> Error {
    match error {
        Error::RollEnded(why) | Error::DrainEnded(why) => Error::RollEnded(format!(
            "{why}\nnot maintained: {}",
            human::clean(&left.join(" "))
        )),
        other => other,
    }
}
