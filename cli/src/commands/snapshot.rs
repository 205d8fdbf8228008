//! `dalgu snapshot`.

use std::time::Duration;

use dalgu_proto::v1;

use super::{Session, map, request_id};
use crate::{
    args::snapshot::{CreateArgs, SnapshotCommand, WhichArgs},
    exit::Error,
    output::{self, Format},
};

/// A merge of what was written since takes its time.
const DELETE_LIMIT: Duration = Duration::from_secs(3600);

/// Does a command.
pub async fn run(command: SnapshotCommand, session: &mut Session<'_>) -> Result<(), Error> {
    match command {
        SnapshotCommand::Create(args) => create(*args, session).await,
        SnapshotCommand::List { vm } => {
            let snapshots = list(&vm, session).await?;
            output::list(session.term, session.format, &snapshots)
        }
        SnapshotCommand::Get { vm, name } => {
            let request = v1::GetSnapshotRequest { vm, name };
            let read = session.read(async |client| client.snapshots().get_snapshot(request.clone()).await);
            let snapshot = read.await?;
            output::one(session.term, session.format, &snapshot)
        }
        SnapshotCommand::Delete(args) => delete(args, session).await,
        SnapshotCommand::Revert { which, discard_later } => revert(which, discard_later, session).await,
    }
}

async fn list(vm: &str, session: &Session<'_>) -> Result<Vec<v1::Snapshot>, Error> {
    let request = v1::ListSnapshotsRequest { vm: vm.to_owned() };
    let page = session.read(async |client| client.snapshots().list_snapshots(request.clone()).await);
    Ok(page.await?.snapshots)
}

/// The snapshots of a VM below all else about it, for people. An older controller has none.
pub async fn below(vm: &str, session: &mut Session<'_>) -> Result<(), Error> {
    if !matches!(session.format, Format::Table | Format::Wide) {
        return Ok(());
    }
    match list(vm, session).await {
        Ok(snapshots) if !snapshots.is_empty() => {
            session.term.print("\nSnapshots\n")?;
            output::list(session.term, session.format, &snapshots)
        }
        _ => Ok(()),
    }
}

async fn create(args: CreateArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let request = v1::CreateSnapshotRequest {
        snapshot: Some(v1::Snapshot {
            vm: args.vm,
            name: args.name,
            description: args.description,
            labels: map(args.labels),
            ..Default::default()
        }),
        request_id: request_id(args.wait.request_id.as_ref()),
    };
    let call =
        async |client: &crate::client::Client| client.snapshots().create_snapshot(request.clone()).await;
    session.operate(&args.wait, args.wait.limit(), call).await
}

async fn delete(args: WhichArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let request = v1::DeleteSnapshotRequest {
        vm: args.vm,
        name: args.name,
        etag: args.etag,
        request_id: request_id(args.wait.request_id.as_ref()),
    };
    let limit = args.wait.timeout.unwrap_or(DELETE_LIMIT);
    let call =
        async |client: &crate::client::Client| client.snapshots().delete_snapshot(request.clone()).await;
    session.operate(&args.wait, limit, call).await
}

async fn revert(args: WhichArgs, discard_later: bool, session: &mut Session<'_>) -> Result<(), Error> {
    let request = v1::RevertSnapshotRequest {
        vm: args.vm,
        name: args.name,
        discard_later,
        etag: args.etag,
        request_id: request_id(args.wait.request_id.as_ref()),
    };
    let call =
        async |client: &crate::client::Client| client.snapshots().revert_snapshot(request.clone()).await;
    session.operate(&args.wait, args.wait.limit(), call).await
}
