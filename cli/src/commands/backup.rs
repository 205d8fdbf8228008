//! `dalgu backup`.

mod schedule;

use std::time::Duration;

use dalgu_proto::v1;
use tokio::time::{Instant, sleep};
use tonic::Status;

use super::{PAGE, Session, map, request_id};
use crate::{
    args::{
        WaitArgs,
        backup::{BackupCommand, CreateArgs, RestoreArgs},
    },
    client::{CALL_TIMEOUT, Client},
    exit::Error,
    output::{self, Format, human},
    progress::Progress,
    watch::{Page, Snapshot, pages},
};

/// Time between two looks at a backup that is waited for.
const LOOKS: Duration = Duration::from_millis(500);
/// Longest wait for a backup where none was given.
const LIMIT: Duration = Duration::from_secs(3600);

/// Does a command.
pub async fn run(command: BackupCommand, session: &mut Session<'_>) -> Result<(), Error> {
    match command {
        BackupCommand::Create(args) => create(args, session).await,
        BackupCommand::List {
            vm,
            schedule,
            selector,
        } => {
            let wanted = v1::ListBackupsRequest {
                page_size: PAGE,
                vm: vm.unwrap_or_default(),
                schedule: schedule.unwrap_or_default(),
                label_selector: map(selector),
                ..Default::default()
            };
            let (backups, _) = list(&session.client, &wanted).await?;
            output::list(session.term, session.format, &backups)
        }
        BackupCommand::Show { uid } => {
            let backup = get(session, &uid).await?;
            output::one(session.term, session.format, &backup)
        }
        BackupCommand::Delete {
            uid,
            with_children,
            etag,
            request,
        } => {
            let request = v1::DeleteBackupRequest {
                uid,
                with_children,
                etag,
                request_id: request_id(request.request_id.as_ref()),
            };
            session
                .change(CALL_TIMEOUT, async |client| {
                    client.backups().delete_backup(request.clone()).await
                })
                .await?;
            let text = format!(
                "{} is deleted; its files go when its host can be reached",
                request.uid
            );
            Ok(session.term.say(&text)?)
        }
        BackupCommand::Restore(args) => restore(args, session).await,
        BackupCommand::Schedule(command) => schedule::run(command, session).await,
    }
}

async fn list(client: &Client, wanted: &v1::ListBackupsRequest) -> Result<Snapshot<v1::Backup>, Status> {
    let read = async |page_token| {
        let request = v1::ListBackupsRequest {
            page_token,
            ..wanted.clone()
        };
        let page = client
            .call(async |client| client.backups().list_backups(request.clone()).await)
            .await?;
        Ok(Page {
            items: page.backups,
            next: page.next_page_token,
            version: page.resource_version,
        })
    };
    pages(usize::MAX, read).await
}

async fn get(session: &Session<'_>, uid: &str) -> Result<v1::Backup, Error> {
    let request = v1::GetBackupRequest { uid: uid.to_owned() };
    let read = async |client: &Client| client.backups().get_backup(request.clone()).await;
    session.read(read).await
}

async fn create(args: CreateArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let kind = match (args.full, args.incremental) {
        (true, _) => v1::BackupKind::Full,
        (_, true) => v1::BackupKind::Incremental,
        _ => v1::BackupKind::Auto,
    };
    let request = v1::CreateBackupRequest {
        vm: args.vm,
        pool: args.pool,
        kind: kind.into(),
        labels: map(args.labels),
        description: args.description,
        request_id: request_id(args.request.request_id.as_ref()),
    };
    let create = async |client: &Client| client.backups().create_backup(request.clone()).await;
    let mut backup = session.change(CALL_TIMEOUT, create).await?;
    if args.wait {
        backup = ended(backup, args.timeout.unwrap_or(LIMIT), session).await?;
    }
    if !matches!(session.format, Format::Table | Format::Wide) {
        return output::one(session.term, session.format, &backup);
    }
    session.term.print(&format!("{}\n", backup.uid))?;
    let text = match backup.state() {
        v1::BackupState::Available => format!("the backup of {} is whole", backup.vm),
        _ => format!("accepted; `dalgu backup show {}` tells how it stands", backup.uid),
    };
    Ok(session.term.say(&text)?)
}

/// Waits for the end of a backup.
async fn ended(
    mut backup: v1::Backup,
    limit: Duration,
    session: &mut Session<'_>,
) -> Result<v1::Backup, Error> {
    let deadline = Instant::now() + limit;
    let mut progress = Progress::new(session.term);
    loop {
        match backup.state() {
            v1::BackupState::Available => break,
            v1::BackupState::Pending | v1::BackupState::Running => {}
            _ => {
                progress.clear();
                return Err(Error::BackupFailed(Box::new(backup)));
            }
        }
        if Instant::now() >= deadline {
            progress.clear();
            return Err(Error::BackupGoesOn(Box::new(backup)));
        }
        let what = format!("backing up {}", backup.vm);
        progress.bytes(&what, backup.bytes_done, backup.bytes_total, session.term)?;
        sleep(LOOKS).await;
        backup = get(session, &backup.uid).await?;
    }
    progress.clear();
    Ok(backup)
}

async fn restore(args: RestoreArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let request = v1::RestoreBackupRequest {
        uid: args.uid,
        name: args.name,
        host: args.host.unwrap_or_default(),
        stopped: args.stopped,
        keep_addresses: args.keep_addresses,
        request_id: request_id(args.wait.request_id.as_ref()),
        labels: map(args.labels),
        without_placement_groups: args.no_placement_groups,
        pools: map(args.pools),
        networks: map(args.nics),
        ignore_protection: args.ignore_protection,
    };
    let wait: &WaitArgs = &args.wait;
    let limit = wait.timeout.unwrap_or(LIMIT);
    let restore = async |client: &Client| client.backups().restore_backup(request.clone()).await;
    session.operate(wait, limit, restore).await?;
    said(&request.name, session).await
}

/// Says what the controller says of a VM that was restored: what it was made from, and what it has to do without.
async fn said(name: &str, session: &mut Session<'_>) -> Result<(), Error> {
    if !matches!(session.format, Format::Table | Format::Wide) {
        return Ok(());
    }
    let request = v1::GetVmRequest {
        name: name.to_owned(),
    };
    let read = async |client: &Client| client.vms().get_vm(request.clone()).await;
    // The VM is there whether this can be said of it or not.
    let Ok(vm) = session.read(read).await else {
        return Ok(());
    };
    let (name, description) = (human::clean(&vm.name), human::clean(&vm.description));
    Ok(session.term.say(&format!("{name}: {description}"))?)
}
