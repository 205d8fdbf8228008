//! `dalgu backup schedule`.

use std::time::Duration;

use dalgu_proto::{time::duration_to_wire, v1};
use prost_types::FieldMask;

use crate::{
    args::backup::{CreateScheduleArgs, ScheduleCommand, UpdateScheduleArgs},
    client::{CALL_TIMEOUT, Client},
    commands::{PAGE, Session, map, request_id},
    exit::Error,
    output::{self, Format, human},
    watch::{Page, pages},
};

/// Does a command.
pub async fn run(command: ScheduleCommand, session: &mut Session<'_>) -> Result<(), Error> {
    match command {
        ScheduleCommand::Create(args) => create(args, session).await,
        ScheduleCommand::List => list(session).await,
        ScheduleCommand::Show { name } => {
            let request = v1::GetBackupScheduleRequest { name };
            let read = async |client: &Client| client.backups().get_backup_schedule(request.clone()).await;
            let schedule = session.read(read).await?;
            output::one(session.term, session.format, &schedule)
        }
        ScheduleCommand::Update(args) => update(args, session).await,
        ScheduleCommand::Delete { name, etag, request } => {
            let request = v1::DeleteBackupScheduleRequest {
                name,
                etag,
                request_id: request_id(request.request_id.as_ref()),
            };
            let delete =
                async |client: &Client| client.backups().delete_backup_schedule(request.clone()).await;
            session.change(CALL_TIMEOUT, delete).await?;
            let name = human::clean(&request.name);
            Ok(session
                .term
                .say(&format!("{name} is deleted; backups that were taken by it stay"))?)
        }
    }
}

fn done(what: &str, schedule: &v1::BackupSchedule, session: &mut Session<'_>) -> Result<(), Error> {
    if !matches!(session.format, Format::Table | Format::Wide) {
        return output::one(session.term, session.format, schedule);
    }
    let text = format!(
        "{} is {what}, for {} VMs",
        human::clean(&schedule.name),
        schedule.vms
    );
    Ok(session.term.say(&text)?)
}

async fn create(args: CreateScheduleArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let schedule = v1::BackupSchedule {
        name: args.name,
        label_selector: map(args.selector),
        pool: args.pool,
        every: Some(duration_to_wire(args.every)),
        at: args.at,
        incrementals: args.incrementals,
        keep_last: args.keep_last,
        keep_days: args.keep_days,
        paused: args.paused,
        description: args.description,
        ..Default::default()
    };
    let request = v1::CreateBackupScheduleRequest {
        backup_schedule: Some(schedule),
        request_id: request_id(args.request.request_id.as_ref()),
    };
    let create = async |client: &Client| client.backups().create_backup_schedule(request.clone()).await;
    let schedule = session.change(CALL_TIMEOUT, create).await?;
    done("entered", &schedule, session)
}

async fn list(session: &mut Session<'_>) -> Result<(), Error> {
    let client = &session.client;
    let read = async |page_token| {
        let request = v1::ListBackupSchedulesRequest {
            page_size: PAGE,
            page_token,
        };
        let page = client
            .call(async |client| client.backups().list_backup_schedules(request.clone()).await)
            .await?;
        Ok::<_, tonic::Status>(Page {
            items: page.backup_schedules,
            next: page.next_page_token,
            version: page.resource_version,
        })
    };
    let (schedules, _) = pages(usize::MAX, read).await?;
    output::list(session.term, session.format, &schedules)
}

/// The fields that are to change, and their names.
fn change(args: UpdateScheduleArgs) -> v1::UpdateBackupScheduleRequest {
    let every: Option<Duration> = args.every;
    let paths = [
        ("label_selector", !args.selector.is_empty()),
        ("pool", args.pool.is_some()),
        ("every", every.is_some()),
        ("at", args.at.is_some()),
        ("incrementals", args.incrementals.is_some()),
        ("keep_last", args.keep_last.is_some()),
        ("keep_days", args.keep_days.is_some()),
        ("paused", args.pause || args.resume),
        ("description", args.description.is_some()),
    ];
    let named = paths.into_iter().filter(|(_, named)| *named);
    let schedule = v1::BackupSchedule {
        name: args.name,
        label_selector: map(args.selector),
        pool: args.pool.unwrap_or_default(),
        every: every.map(duration_to_wire),
        at: args.at.unwrap_or_default(),
        incrementals: args.incrementals.unwrap_or_default(),
        keep_last: args.keep_last.unwrap_or_default(),
        keep_days: args.keep_days.unwrap_or_default(),
        paused: args.pause,
        description: args.description.unwrap_or_default(),
        etag: args.etag,
        ..Default::default()
    };
    v1::UpdateBackupScheduleRequest {
        backup_schedule: Some(schedule),
        update_mask: Some(FieldMask {
            paths: named.map(|(path, _)| path.to_owned()).collect(),
        }),
        request_id: request_id(args.request.request_id.as_ref()),
    }
}

async fn update(args: UpdateScheduleArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let request = change(args);
    let update = async |client: &Client| client.backups().update_backup_schedule(request.clone()).await;
    let schedule = session.change(CALL_TIMEOUT, update).await?;
    done("changed", &schedule, session)
}
