//! `dalgu volume`.

use std::collections::HashMap;

use dalgu_proto::v1;
use prost_types::FieldMask;
use tonic::Status;

use super::{
    PAGE, Session, host, map, matches,
    network::{changed, done},
    request_id,
    show::show,
};
use crate::{
    args::{
        network::ListArgs,
        volume::{Clone, CreateArgs, DiskFormat, UpdateArgs, VolumeCommand},
    },
    client::{CALL_TIMEOUT, Client},
    exit::Error,
    output::{self, Format, human},
    watch::{Page, Snapshot, pages},
};

/// Does a command.
pub async fn run(command: VolumeCommand, session: &mut Session<'_>) -> Result<(), Error> {
    match command {
        VolumeCommand::Create(args) => create(*args, session).await,
        VolumeCommand::List(args) => show_all(args, session).await,
        VolumeCommand::Show { name, watch } => show::<v1::Volume>(&name, watch, session).await,
        VolumeCommand::Update(args) => update(args, session).await,
        VolumeCommand::Delete(args) => {
            let request = v1::DeleteVolumeRequest {
                name: args.name,
                etag: args.etag,
                request_id: request_id(args.request.request_id.as_ref()),
            };
            let delete = async |client: &Client| client.volumes().delete_volume(request.clone()).await;
            let volume = session.change(CALL_TIMEOUT, delete).await?;
            deleted(&volume, session)
        }
        VolumeCommand::Undelete(args) => {
            let request = v1::UndeleteVolumeRequest {
                name: args.name,
                etag: args.etag,
                request_id: request_id(args.request.request_id.as_ref()),
            };
            let undelete = async |client: &Client| client.volumes().undelete_volume(request.clone()).await;
            let volume = session.change(CALL_TIMEOUT, undelete).await?;
            done("took back the deletion of", &volume, session)
        }
    }
}

/// Says until when a deletion can be taken back; never, where the site gives no time for it.
fn deleted(volume: &v1::Volume, session: &mut Session<'_>) -> Result<(), Error> {
    if !matches!(session.format, Format::Table | Format::Wide) {
        return output::one(session.term, session.format, volume);
    }
    let name = human::clean(&volume.name);
    let seconds =
        |time: &Option<prost_types::Timestamp>| time.as_ref().map(|time| (time.seconds, time.nanos));
    let at_once = seconds(&volume.purge_time) <= seconds(&volume.delete_time);
    let status = volume.status.as_ref();
    let purging = status.is_some_and(|status| status.state() == v1::VolumeState::Purging);
    let text = if at_once || purging {
        format!("{name} is deleted, and its data are being removed: there is no way back")
    } else {
        let purge = human::clock(volume.purge_time.as_ref());
        format!("{name} is deleted; until {purge}, `dalgu volume undelete {name}` takes that back")
    };
    Ok(session.term.say(&text)?)
}

async fn create(args: CreateArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let format = args.format.map(|format| match format {
        DiskFormat::Qcow2 => v1::DiskFormat::Qcow2,
        DiskFormat::Raw => v1::DiskFormat::Raw,
    });
    let clone_mode = args.clone.map(|clone| match clone {
        Clone::Overlay => v1::CloneMode::Overlay,
        Clone::Full => v1::CloneMode::Full,
    });
    let volume = v1::Volume {
        name: args.name,
        size_mib: args.size.unwrap_or_default(),
        pool: args.pool.unwrap_or_default(),
        format: format.unwrap_or_default().into(),
        image: args.image.unwrap_or_default(),
        clone_mode: clone_mode.unwrap_or_default().into(),
        labels: map(args.labels),
        description: args.description,
        ..Default::default()
    };
    let request = v1::CreateVolumeRequest {
        volume: Some(volume),
        request_id: request_id(args.request.request_id.as_ref()),
    };
    let create = async |client: &Client| client.volumes().create_volume(request.clone()).await;
    let volume = session.change(CALL_TIMEOUT, create).await?;
    done("created", &volume, session)
}

async fn list(client: &Client, selector: &HashMap<String, String>) -> Result<Snapshot<v1::Volume>, Status> {
    let read = async |page_token| {
        let request = v1::ListVolumesRequest {
            page_size: PAGE,
            page_token,
            label_selector: selector.clone(),
        };
        let page = client
            .call(async |client| client.volumes().list_volumes(request.clone()).await)
            .await?;
        Ok(Page {
            items: page.volumes,
            next: page.next_page_token,
            version: page.resource_version,
        })
    };
    pages(usize::MAX, read).await
}

async fn show_all(args: ListArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let selector = map(args.selector);
    let wanted = |object: &v1::Volume| matches(&object.labels, &selector);
    session
        .show_all(args.watch, &wanted, async |client| list(client, &selector).await)
        .await
}

async fn update(args: UpdateArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let own = args.etag.is_some() || args.request.request_id.is_some();
    let volume = changed(
        session,
        &args.name,
        own,
        |old| Ok(change(&args, old)),
        async |client, request| client.volumes().update_volume(request.clone()).await,
    )
    .await?;
    done("changed", &volume, session)
}

fn change(args: &UpdateArgs, old: &v1::Volume) -> v1::UpdateVolumeRequest {
    let mut new = v1::Volume {
        name: old.name.clone(),
        etag: args.etag.clone().unwrap_or_else(|| old.etag.clone()),
        ..Default::default()
    };
    let mut paths = Vec::new();
    if let Some(size_mib) = args.size {
        new.size_mib = size_mib;
        paths.push("size_mib".to_owned());
    }
    if !args.labels.is_empty() {
        new.labels = host::changed(&old.labels, &args.labels);
        paths.push("labels".to_owned());
    }
    if let Some(description) = &args.description {
        new.description.clone_from(description);
        paths.push("description".to_owned());
    }
    v1::UpdateVolumeRequest {
        volume: Some(new),
        update_mask: Some(FieldMask { paths }),
        request_id: request_id(args.request.request_id.as_ref()),
    }
}
