//! `dalgu vm`.

mod update;

pub use update::{carried_out, pending, say_pending};

use std::{collections::HashMap, time::Duration};

use dalgu_proto::v1;
use tonic::Status;

use super::{PAGE, Session, events, map, matches, placement, request_id, show::show, snapshot, spec};
use crate::{
    args::vm::{CreateArgs, VerbArgs, VmCommand},
    client::Client,
    exit::Error,
    output::{self, Format, human},
    progress,
    watch::{Page, Snapshot, pages},
};

/// A migration of a large VM takes its time.
const MIGRATE_LIMIT: Duration = Duration::from_secs(3600);

/// Gives a request's fields that every verb has, and makes the call.
macro_rules! verb {
    ($session:ident, $args:expr, $limit:expr, $call:ident, $request:ident { $($rest:tt)* }) => {{
        let args = &$args;
        let request = v1::$request {
            name: args.name.clone(),
            etag: args.etag.clone(),
            request_id: request_id(args.wait.request_id.as_ref()),
            $($rest)*
        };
        $session.operate(&args.wait, $limit, async |client| client.vms().$call(request.clone()).await).await
    }};
}

/// Does a command.
pub async fn run(command: VmCommand, session: &mut Session<'_>) -> Result<(), Error> {
    match command {
        VmCommand::Create(args) => create(*args, session).await,
        VmCommand::List {
            host,
            selector,
            watch,
        } => show_all(host.unwrap_or_default(), map(selector), watch, session).await,
        VmCommand::Show { name, watch } => {
            show::<v1::Vm>(&name, watch, session).await?;
            snapshot::below(&name, session).await
        }
        VmCommand::Start(args) => verb!(session, args, args.wait.limit(), start_vm, StartVmRequest {}),
        VmCommand::Stop { verb, grace, force } => {
            let seconds = grace.map_or(Ok(0), |grace| whole(grace.as_millis().div_ceil(1000), "--grace"))?;
            let limit = verb
                .wait
                .timeout
                .unwrap_or_else(|| verb.wait.limit() + grace.unwrap_or_default());
            verb!(
                session,
                verb,
                limit,
                stop_vm,
                StopVmRequest {
                    grace_period_seconds: seconds,
                    force
                }
            )
        }
        VmCommand::Restart { verb, reset } => {
            let mode = if reset {
                v1::RestartMode::Reset
            } else {
                v1::RestartMode::Reboot
            };
            verb!(
                session,
                verb,
                verb.wait.limit(),
                restart_vm,
                RestartVmRequest { mode: mode.into() }
            )
        }
        VmCommand::Pause(args) => verb!(session, args, args.wait.limit(), pause_vm, PauseVmRequest {}),
        VmCommand::Resume(args) => verb!(session, args, args.wait.limit(), resume_vm, ResumeVmRequest {}),
        VmCommand::Migrate {
            verb,
            host,
            max_downtime,
            bandwidth,
            ignore_protection,
        } => migrate(verb, host, (max_downtime, bandwidth), ignore_protection, session).await,
        VmCommand::Delete { verb, force } => {
            verb!(
                session,
                verb,
                verb.wait.limit(),
                delete_vm,
                DeleteVmRequest { force }
            )
        }
        VmCommand::Update(args) => update::update(*args, session).await,
        VmCommand::Events { name, events } => events::run(&name, &events, session).await,
        VmCommand::Console { name, follow, tail } => console(name, follow, tail, session).await,
    }
}

/// A time that was given, in a unit of the API, where 0 would mean the default.
fn whole(value: u128, flag: &str) -> Result<u32, Error> {
    match u32::try_from(value) {
        Ok(0) => Err(Error::Usage(format!("{flag} must be more than 0"))),
        Ok(value) => Ok(value),
        Err(_) => Err(Error::Usage(format!("{flag} is too large"))),
    }
}

async fn create(args: CreateArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let (vm, note) = spec::vm(&args)?;
    if let Some(note) = note {
        session.term.say(&note)?;
    }
    placement::are_there(&vm.placement_groups, session).await?;
    let request = v1::CreateVmRequest {
        vm: Some(vm),
        stopped: args.stopped,
        host: args.host.clone().unwrap_or_default(),
        request_id: request_id(args.wait.request_id.as_ref()),
        validate_only: args.validate_only,
        ignore_protection: args.ignore_protection,
    };
    let limit = args.wait.limit();
    if let Some(count) = args.count {
        return create_many(count, &args, request, session).await;
    }
    if !args.validate_only {
        return session
            .operate(&args.wait, limit, async |client| {
                client.vms().create_vm(request.clone()).await
            })
            .await;
    }
    let operation = session
        .change(limit, async |client| {
            client.vms().create_vm(request.clone()).await
        })
        .await?;
    match session.format {
        Format::Table | Format::Wide => {
            let name = request.vm.map(|vm| vm.name).unwrap_or_default();
            let note = human::clean(&operation.status_message);
            let note = if note.is_empty() {
                note
            } else {
                format!(": {note}")
            };
            Ok(session
                .term
                .say(&format!("{name} could be created{note}; nothing was done"))?)
        }
        format => output::one(session.term, format, &operation),
    }
}

/// Creates several VMs of one description, in one request, and waits for all.
async fn create_many(
    count: u16,
    args: &CreateArgs,
    of: v1::CreateVmRequest,
    session: &mut Session<'_>,
) -> Result<(), Error> {
    let one = |number: u16| {
        let mut one = of.clone();
        if let Some(vm) = &mut one.vm {
            vm.name = format!("{}-{number}", vm.name);
        }
        one.request_id.clear();
        one
    };
    let request = v1::BatchCreateVmsRequest {
        requests: (1..=count).map(one).collect(),
        all_or_nothing: args.all_or_nothing,
        request_id: of.request_id.clone(),
    };
    let limit = args.wait.limit();
    let answer = session
        .change(limit, async |client| {
            client.vms().batch_create_vms(request.clone()).await
        })
        .await?;
    let mut refused = Vec::new();
    for (result, asked) in answer.results.into_iter().zip(request.requests) {
        let name = asked.vm.map(|vm| vm.name).unwrap_or_default();
        match (result.operation, result.error) {
            (Some(operation), _) if args.wait.no_wait => session.accepted(&operation)?,
            (Some(operation), _) => {
                let ended = progress::wait(&session.client, operation, limit, session.term).await?;
                if let Err(error) = session.ended(ended).await {
                    refused.push(format!("{name}: {error}"));
                }
            }
            (None, error) => {
                let why = error
                    .map(|error| human::clean(&error.message))
                    .unwrap_or_default();
                refused.push(format!("{name}: {why}"));
            }
        }
    }
    match refused.len() {
        0 => Ok(()),
        lost => {
            for line in &refused {
                session.term.say(line)?;
            }
            Err(Error::NotNow(format!("{lost} of {count} VMs were not created")))
        }
    }
}

async fn migrate(
    verb: VerbArgs,
    host: Option<String>,
    (max_downtime, bandwidth): (Option<Duration>, Option<u64>),
    ignore_protection: bool,
    session: &mut Session<'_>,
) -> Result<(), Error> {
    let downtime = max_downtime.map_or(Ok(0), |time| whole(time.as_millis(), "--max-downtime"))?;
    let bandwidth = bandwidth.map_or(Ok(0), |rate| whole(rate.into(), "--bandwidth"))?;
    let limit = verb.wait.timeout.unwrap_or(MIGRATE_LIMIT);
    verb!(
        session,
        verb,
        limit,
        migrate_vm,
        MigrateVmRequest {
            destination_host: host.clone().unwrap_or_default(),
            max_downtime_ms: downtime,
            bandwidth_mib_per_second: bandwidth,
            ignore_protection
        }
    )
}

/// All VMs that bear these labels; only those of a host, where one is given.
pub async fn list(
    client: &Client,
    host: &str,
    selector: &HashMap<String, String>,
) -> Result<Snapshot<v1::Vm>, Status> {
    let read = async |page_token| {
        let request = v1::ListVmsRequest {
            page_size: PAGE,
            page_token,
            host: host.to_owned(),
            label_selector: selector.clone(),
        };
        let page = client
            .call(async |client| client.vms().list_vms(request.clone()).await)
            .await?;
        Ok(Page {
            items: page.vms,
            next: page.next_page_token,
            version: page.resource_version,
        })
    };
    pages(usize::MAX, read).await
}

async fn show_all(
    host: String,
    selector: HashMap<String, String>,
    watch: bool,
    session: &mut Session<'_>,
) -> Result<(), Error> {
    let on = |vm: &v1::Vm| vm.status.as_ref().is_some_and(|status| status.host == host);
    let wanted = |vm: &v1::Vm| matches(&vm.labels, &selector) && (host.is_empty() || on(vm));
    session
        .show_all(watch, &wanted, async |client| {
            list(client, &host, &selector).await
        })
        .await
}

/// Copies the log as it is: it is the guest's own screen, and the operator asked for it.
async fn console(
    name: String,
    follow: bool,
    tail: Option<u64>,
    session: &mut Session<'_>,
) -> Result<(), Error> {
    let request = v1::ReadConsoleRequest {
        name,
        tail_bytes: tail.unwrap_or(0),
        follow,
    };
    let mut stream = session.client.vms().read_console(request).await?.into_inner();
    while let Some(piece) = stream.message().await? {
        session.term.out.write_all(&piece.data)?;
        session.term.out.flush()?;
    }
    if follow {
        session.term.say("the console has ended")?;
    }
    Ok(())
}
