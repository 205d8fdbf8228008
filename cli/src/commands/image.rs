//! `dalgu image`.

mod import;

use std::{collections::HashMap, time::Duration};

use dalgu_proto::v1;
use prost_types::FieldMask;
use tonic::Status;

use super::{
    PAGE, Session, host, map, matches, request_id,
    show::{get, show},
};
use crate::{
    args::image::{ImageCommand, UpdateArgs},
    client::{CALL_TIMEOUT, Client},
    exit::Error,
    output::{self, Format, human},
    watch::{Page, Snapshot, pages},
};

/// How often a change is tried again that somebody else's came before.
const ATTEMPTS: u32 = 4;

/// Does a command.
pub async fn run(command: ImageCommand, session: &mut Session<'_>) -> Result<(), Error> {
    match command {
        ImageCommand::List {
            name,
            selector,
            watch,
        } => show_all(name.unwrap_or_default(), map(selector), watch, session).await,
        ImageCommand::Get { image, watch } => show::<v1::Image>(&image.to_string(), watch, session).await,
        ImageCommand::Import(args) => import::import(*args, session).await,
        ImageCommand::Update(args) => update(args, session).await,
        ImageCommand::Delete { image, etag, request } => {
            let request = v1::DeleteImageRequest {
                name: image.name.to_string(),
                version: image.version.clone().unwrap_or_default(),
                etag,
                request_id: request_id(request.request_id.as_ref()),
            };
            session
                .change(CALL_TIMEOUT, async |client| {
                    client.images().delete_image(request.clone()).await
                })
                .await?;
            Ok(session.term.say(&format!(
                "{} is deleted; its copies go as hosts can be reached",
                image
            ))?)
        }
    }
}

async fn list(
    client: &Client,
    name: &str,
    selector: &HashMap<String, String>,
) -> Result<Snapshot<v1::Image>, Status> {
    let read = async |page_token| {
        let request = v1::ListImagesRequest {
            page_size: PAGE,
            page_token,
            name: name.to_owned(),
            label_selector: selector.clone(),
        };
        let page = client
            .call(async |client| client.images().list_images(request.clone()).await)
            .await?;
        Ok(Page {
            items: page.images,
            next: page.next_page_token,
            version: page.resource_version,
        })
    };
    pages(usize::MAX, read).await
}

async fn show_all(
    name: String,
    selector: HashMap<String, String>,
    watch: bool,
    session: &mut Session<'_>,
) -> Result<(), Error> {
    let wanted =
        |image: &v1::Image| matches(&image.labels, &selector) && (name.is_empty() || image.name == name);
    session
        .show_all(watch, &wanted, async |client| {
            list(client, &name, &selector).await
        })
        .await
}

async fn update(args: UpdateArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let name = args.image.to_string();
    let mut attempt = 1;
    let image = loop {
        let old: v1::Image = get(&session.client, &name).await?;
        let request = changed(&args, &old);
        let answer = session
            .change(CALL_TIMEOUT, async |client| {
                client.images().update_image(request.clone()).await
            })
            .await;
        // An etag or a request_id of the user's own is not replaced behind his back.
        let again = args.etag.is_none() && args.request.request_id.is_none() && attempt < ATTEMPTS;
        match answer {
            Err(error) if again && host::overtaken(&error) => attempt += 1,
            outcome => break outcome?,
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    match session.format {
        Format::Table | Format::Wide => Ok(session.term.say(&format!("changed {}", human::clean(&name)))?),
        format => output::one(session.term, format, &image),
    }
}

fn changed(args: &UpdateArgs, old: &v1::Image) -> v1::UpdateImageRequest {
    let mut new = v1::Image {
        name: old.name.clone(),
        version: old.version.clone(),
        etag: args.etag.clone().unwrap_or_else(|| old.etag.clone()),
        ..Default::default()
    };
    let mut paths = Vec::new();
    if !args.labels.is_empty() {
        new.labels = host::changed(&old.labels, &args.labels);
        paths.push("labels".to_owned());
    }
    if let Some(description) = &args.description {
        new.description.clone_from(description);
        paths.push("description".to_owned());
    }
    if let Some(os) = &args.os {
        new.os.clone_from(os);
        paths.push("os".to_owned());
    }
    if let Some(firmware) = args.firmware {
        new.firmware = v1::Firmware::from(firmware).into();
        paths.push("firmware".to_owned());
    }
    if let Some(visibility) = args.visibility {
        new.visibility = v1::ImageVisibility::from(visibility).into();
        paths.push("visibility".to_owned());
    }
    if let Some(owner) = &args.owner {
        new.owner.clone_from(owner);
        paths.push("owner".to_owned());
    }
    if let Some(replicas) = args.replicas {
        new.replicas = replicas;
        paths.push("replicas".to_owned());
    }
    v1::UpdateImageRequest {
        image: Some(new),
        update_mask: Some(FieldMask { paths }),
        request_id: request_id(args.request.request_id.as_ref()),
    }
}
