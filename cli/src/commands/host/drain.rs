//! `dalgu host drain` and `dalgu host restore`: asked for, then followed to their end.

use std::{collections::BTreeMap, time::Duration};

use dalgu_proto::v1;
use tokio::time::sleep;

use super::{Session, change, id};
use crate::{
    args::host::{DrainArgs, DrainTime, RequestArgs},
    exit::Error,
    output::{self, Format, host::drain_table, human},
};

/// Time between two looks.
pub const LOOK: Duration = Duration::from_millis(500);

/// Empties a host.
pub async fn drain(args: DrainArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let request = v1::DrainHostRequest {
        name: args.name,
        deadline_seconds: seconds(args.time.deadline)?,
        mode: args.mode.map_or(v1::DrainMode::Unspecified, Into::into).into(),
        validate_only: args.dry_run,
        request_id: id(&args.request),
    };
    let host = change(session, async |client| {
        client.hosts().drain_host(request.clone()).await
    })
    .await?;
    if !args.dry_run {
        return follow(host, &args.time, session).await;
    }
    if !matches!(session.format, Format::Table | Format::Wide) {
        return output::one(session.term, session.format, &host);
    }
    let drain = host.drain.unwrap_or_default();
    session.term.print(&drain_table(&drain))?;
    let name = human::clean(&host.name);
    Ok(session.term.say(&format!(
        "nothing was changed; {name} would have {}",
        drain.summary
    ))?)
}

/// Brings its VMs back.
pub async fn restore(
    name: String,
    time: &DrainTime,
    request: &RequestArgs,
    session: &mut Session<'_>,
) -> Result<(), Error> {
    let request = v1::RestoreHostRequest {
        name,
        deadline_seconds: seconds(time.deadline)?,
        request_id: id(request),
    };
    let host = change(session, async |client| {
        client.hosts().restore_host(request.clone()).await
    })
    .await?;
    follow(host, time, session).await
}

/// A deadline in seconds; 0 where none was given.
pub fn seconds(deadline: Option<Duration>) -> Result<u32, Error> {
    let Some(deadline) = deadline else {
        return Ok(0);
    };
    match u32::try_from(deadline.as_millis().div_ceil(1000)) {
        Ok(0) => Err(Error::Usage("--deadline must be more than 0".to_owned())),
        Ok(seconds) => Ok(seconds),
        Err(_) => Err(Error::Usage("--deadline is too large".to_owned())),
    }
}

/// Tells what becomes of each VM until the drain has ended.
async fn follow(mut host: v1::Host, time: &DrainTime, session: &mut Session<'_>) -> Result<(), Error> {
    if !time.no_wait {
        host = to_end(host, "", session).await?;
    }
    if !matches!(session.format, Format::Table | Format::Wide) {
        output::one(session.term, session.format, &host)?;
    }
    session.term.say(&ended(&host)?).map_err(Error::from)
}

/// The host when its drain has ended. What becomes of each VM is told people, each time after `before`.
pub async fn to_end(mut host: v1::Host, before: &str, session: &mut Session<'_>) -> Result<v1::Host, Error> {
    let people = matches!(session.format, Format::Table | Format::Wide);
    let begun = host.drain.as_ref().and_then(|drain| drain.begin_time);
    let mut told = BTreeMap::new();
    loop {
        let drain = host.drain.clone().unwrap_or_default();
        for vm in drain.vms.iter().filter(|_| people) {
            let text = format!("{before}{}", line(vm));
            if told.get(&vm.vm) != Some(&text) {
                session.term.say(&text)?;
                told.insert(vm.vm.clone(), text);
            }
        }
        // Another drain has been begun since: this one has ended.
        if drain.begin_time != begun || drain.state() != v1::DrainState::Active {
            return Ok(host);
        }
        // Cancel safe: the drain is the controller's.
        tokio::select! {
            () = sleep(LOOK) => {}
            () = (session.term.interrupt)() => return Err(Error::DrainInterrupted(human::clean(&host.name))),
        }
        host = look(&host.name, session).await?;
    }
}

/// A host as it is now; asked again while the controller is away.
pub async fn look(name: &str, session: &mut Session<'_>) -> Result<v1::Host, Error> {
    let request = v1::GetHostRequest {
        name: name.to_owned(),
    };
    change(session, async |client| {
        client.hosts().get_host(request.clone()).await
    })
    .await
}

fn line(vm: &v1::DrainedVm) -> String {
    let state = human::value::<v1::DrainedVmState>(vm.state).to_lowercase();
    let to = if vm.host.is_empty() {
        String::new()
    } else {
        format!(" to {}", vm.host)
    };
    let why = vm
        .error
        .as_ref()
        .map(|error| format!(": {} ({})", error.message, error.reason));
    let again = if vm.tried_again { "; it is tried again" } else { "" };
    let text = format!("{}: {state}{to}{}{again}", vm.vm, why.unwrap_or_default());
    human::clean(&text)
}

/// How a drain stands, in a sentence; an error where it has not done what it should.
pub fn ended(host: &v1::Host) -> Result<String, Error> {
    let name = human::clean(&host.name);
    let drain = host.drain.clone().unwrap_or_default();
    let did = if drain.restoring { "restored" } else { "drained" };
    let summary = human::clean(&drain.summary);
    match drain.state() {
        v1::DrainState::Active => Ok(format!(
            "{name} is being {did}; `dalgu host show {name}` shows how far it is"
        )),
        v1::DrainState::Done => Ok(format!("{name} is {did}; {summary}")),
        v1::DrainState::Cancelled => Err(Error::DrainEnded(format!(
            "that {name} is {did} was given up; {summary}"
        ))),
        _ => {
            let mut text = format!("{name} is not {did}; {summary}");
            for vm in drain.vms.iter().filter(|vm| !vm.options.is_empty()) {
                text += &format!("\n  {}: {}", vm.vm, vm.options.join(", or "));
            }
            Err(Error::DrainEnded(text))
        }
    }
}
