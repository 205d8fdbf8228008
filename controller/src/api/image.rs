//! `dalgu.v1.ImageService`, but for the bytes of uploads: these are [`upload`]'s.

mod upload;

use std::ops::Bound;

use dalgu_proto::{
    ids::{HostName, ImageName},
    image::{self, DEFAULT_VERSION, Digest, Format, MAX_FILE_BYTES, Reference},
    reason,
    tls::{Peer, Role},
    v1::{self, image_service_server::ImageService},
    vm::Firmware,
};
use futures::stream::BoxStream;
use tonic::{Request, Response, Status, Streaming};

use super::{Services, page::Page, peer, request, wire};
use crate::{
    images::resolve,
    model::{ImageRecord, Outcome, Replicas, Visibility},
    verbs::{
        self, Caller, Error,
        image::{Create, Update},
    },
};

const MAX_DESCRIPTION: usize = 1024;
const MAX_OS: usize = 63;
const MAX_OWNER: usize = 255;
const MAX_REPLICAS: i32 = 10_000;
const DEFAULT_REPLICAS: u32 = 2;
const MUTABLE: [&str; 7] = [
    "os",
    "firmware",
    "labels",
    "description",
    "visibility",
    "replicas",
    "owner",
];
const MUTABLE_TEXT: &str = "os, firmware, labels, description, visibility, replicas, owner";

fn image_name(field: &str, value: &str) -> Result<ImageName, Status> {
    value
        .parse()
        .map_err(|error: dalgu_proto::ids::Error| reason::invalid(field, error.to_string()))
}

fn version(field: &str, value: &str) -> Result<String, Status> {
    image::check_version(value).map_err(|error| reason::invalid(field, error.to_string()))?;
    Ok(value.to_owned())
}

fn or_default(version: &str) -> &str {
    if version.is_empty() {
        DEFAULT_VERSION
    } else {
        version
    }
}

fn visibility(value: i32) -> Result<Visibility, Status> {
    match v1::ImageVisibility::try_from(value) {
        Ok(v1::ImageVisibility::Unspecified | v1::ImageVisibility::Public) => Ok(Visibility::Public),
        Ok(v1::ImageVisibility::Private) => Ok(Visibility::Private),
        Err(_) => {
            let message = "is not a value of ImageVisibility";
            Err(reason::invalid("image.visibility", message))
        }
    }
}

/// Which certificates there are is known to nobody: it need only be what one can say.
fn owner(value: &str) -> Result<String, Status> {
    let written = value.len() <= MAX_OWNER && value.bytes().all(|byte| byte.is_ascii_graphic());
    let peer = Peer::parse(value).filter(|peer| written && peer.role == Role::Operator);
    let message = "must be operator/NAME, with the name in the operator's certificate";
    let peer = peer.ok_or_else(|| reason::invalid("image.owner", message))?;
    Ok(peer.to_string())
}

fn replicas(value: i32) -> Result<Replicas, Status> {
    match value {
        -1 => Ok(Replicas::All),
        0 => Ok(Replicas::Count(DEFAULT_REPLICAS)),
        1..=MAX_REPLICAS => Ok(Replicas::Count(value.unsigned_abs())),
        _ => {
            let message =
                format!("must be 1 to {MAX_REPLICAS}, -1 for every host, or 0 for {DEFAULT_REPLICAS}");
            Err(reason::invalid("image.replicas", message))
        }
    }
}

fn source(file: Option<&v1::ImageFile>) -> Result<Option<(HostName, String)>, Status> {
    let Some(file) = file else { return Ok(None) };
    let refused = |field, error: dalgu_proto::ids::Error| reason::invalid(field, error.to_string());
    let host = file.host.parse().map_err(|error| refused("source.host", error))?;
    dalgu_proto::ids::check_file_name(&file.file).map_err(|error| refused("source.file", error))?;
    Ok(Some((host, file.file.clone())))
}

/// Checks an image to be entered.
fn create(request: &v1::CreateImageRequest) -> Result<Create, Status> {
    let image = request
        .image
        .clone()
        .ok_or_else(|| reason::invalid("image", "must be given"))?;
    let output_only = [
        ("image.uid", !image.uid.is_empty()),
        ("image.owner", !image.owner.is_empty()),
        ("image.status", image.status.is_some()),
        ("image.source", image.source.is_some()),
        ("image.etag", !image.etag.is_empty()),
        ("image.create_time", image.create_time.is_some()),
        ("image.delete_time", image.delete_time.is_some()),
    ];
    if let Some((field, _)) = output_only.iter().find(|(_, set)| *set) {
        return Err(reason::invalid(field, "is set by the controller: leave it empty"));
    }
    let source = source(request.source.as_ref())?;
    let least = u64::from(source.is_none());
    if !(least..=MAX_FILE_BYTES).contains(&image.size_bytes) {
        let message = format!("must be 1 to {MAX_FILE_BYTES} (16 TiB), got {}", image.size_bytes);
        return Err(reason::invalid("image.size_bytes", message));
    }
    let format = v1::ImageFormat::try_from(image.format)
        .map_err(|_| "is not a value of ImageFormat")
        .and_then(Format::try_from)
        .map_err(|message| reason::invalid("image.format", message))?;
    let sha256: Option<Digest> = match image.sha256.as_str() {
        "" => None,
        digits => Some(
            digits
                .parse()
                .map_err(|e: dalgu_proto::ids::Error| reason::invalid("image.sha256", e.to_string()))?,
        ),
    };
    Ok(Create {
        name: image_name("image.name", &image.name)?,
        version: version("image.version", or_default(&image.version))?,
        format,
        size_bytes: image.size_bytes,
        sha256,
        os: os(image.os)?,
        firmware: firmware(image.firmware)?,
        labels: request::labels("image.labels", &image.labels)?,
        description: request::text("image.description", image.description, MAX_DESCRIPTION)?,
        visibility: visibility(image.visibility)?,
        replicas: replicas(image.replicas)?,
        source,
    })
}

fn os(value: String) -> Result<String, Status> {
    let value = request::text("image.os", value, MAX_OS)?;
    if value.chars().any(char::is_control) {
        return Err(reason::invalid("image.os", "must not hold control characters"));
    }
    Ok(value)
}

fn firmware(value: i32) -> Result<Firmware, Status> {
    let firmware = v1::Firmware::try_from(value);
    let firmware = firmware.map_err(|_| reason::invalid("image.firmware", "is not a value of Firmware"))?;
    Ok(firmware.into())
}

/// Checks a change of an image.
fn update(image: &v1::Image, paths: &[String]) -> Result<Update, Status> {
    let mut update = Update::default();
    for path in paths {
        match path.as_str() {
            "os" => update.os = Some(os(image.os.clone())?),
            "firmware" => update.firmware = Some(firmware(image.firmware)?),
            "labels" => update.labels = Some(request::labels("image.labels", &image.labels)?),
            "description" => {
                let text = image.description.clone();
                update.description = Some(request::text("image.description", text, MAX_DESCRIPTION)?);
            }
            "visibility" => update.visibility = Some(visibility(image.visibility)?),
            "owner" => update.owner = Some(owner(&image.owner)?),
            _ => update.replicas = Some(replicas(image.replicas)?),
        }
    }
    Ok(update)
}

impl Services {
    /// Does a verb once, and answers with its image.
    async fn image(
        &self,
        caller: Caller,
        change: impl FnOnce(&mut crate::state::Tx, &Caller) -> Result<Outcome, Error>,
    ) -> Result<Response<v1::Image>, Status> {
        let outcome = self
            .db
            .transact(|tx| verbs::once(tx, &caller, |tx| change(tx, &caller)))
            .await?;
        let Outcome::Image(id) = outcome else {
            return Err(Error::RequestReused(caller.request_id).into());
        };
        let state = self.db.snapshot();
        // A repeated request may find it gone.
        let image = state.images.get(&id);
        let image = image.ok_or_else(|| Error::ImageNotFound(id.to_string()))?;
        Ok(Response::new(wire::image(&state, image)))
    }
}

#[tonic::async_trait]
impl ImageService for Services {
    async fn get_image(&self, request: Request<v1::GetImageRequest>) -> Result<Response<v1::Image>, Status> {
        let principal = peer(&request)?.to_string();
        let m = request.get_ref();
        let reference = Reference {
            name: image_name("name", &m.name)?,
            version: match m.version.as_str() {
                "" => None,
                given => Some(version("version", given)?),
            },
        };
        let state = self.db.snapshot();
        let image = resolve::newest(&state, &reference, |image| image.is_visible_to(&principal));
        let image = image.map_err(Error::from)?;
        Ok(Response::new(wire::image(&state, image)))
    }

    async fn list_images(
        &self,
        request: Request<v1::ListImagesRequest>,
    ) -> Result<Response<v1::ListImagesResponse>, Status> {
        let principal = peer(&request)?.to_string();
        let m = request.into_inner();
        let selector = request::labels("label_selector", &m.label_selector)?;
        let name = match m.name.as_str() {
            "" => None,
            name => Some(image_name("name", name)?),
        };
        let list = format!("images {name:?} {selector:?}");
        let page = Page::of(m.page_size, &m.page_token, &list)?;
        let from = match &page.after {
            None => Bound::Unbounded,
            Some(key) => {
                let (name, version) = key.split_once(':').unwrap_or((key, ""));
                Bound::Excluded((image_name("page_token", name)?, version.to_owned()))
            }
        };
        let state = self.db.snapshot();
        let wanted = |image: &&ImageRecord| {
            image.is_visible_to(&principal)
                && name.as_ref().is_none_or(|name| image.name == *name)
                && crate::model::matches(&image.labels, &selector)
        };
        let found = state.image_names.range((from, Bound::Unbounded));
        let found = found.filter_map(|(_, id)| state.images.get(id).map(AsRef::as_ref));
        let (images, next_page_token) = page.take(found.filter(wanted), |image| image.reference());
        Ok(Response::new(v1::ListImagesResponse {
            images: images
                .into_iter()
                .map(|image| wire::image(&state, image))
                .collect(),
            next_page_token,
            resource_version: state.meta.revision,
        }))
    }

    async fn create_image(
        &self,
        request: Request<v1::CreateImageRequest>,
    ) -> Result<Response<v1::Image>, Status> {
        let message = request.get_ref();
        let new = create(message)?;
        let caller = request::caller(&request, &message.request_id, &format!("CreateImage {new:?}"))?;
        self.image(caller, |tx, caller| verbs::image::create(tx, caller, new))
            .await
    }

    type UploadImageStream = BoxStream<'static, Result<v1::UploadImageResponse, Status>>;

    async fn upload_image(
        &self,
        request: Request<Streaming<v1::UploadImageRequest>>,
    ) -> Result<Response<Self::UploadImageStream>, Status> {
        let principal = peer(&request)?.to_string();
        let answers = upload::begin(self, principal, request.into_inner()).await?;
        Ok(Response::new(answers))
    }

    async fn update_image(
        &self,
        request: Request<v1::UpdateImageRequest>,
    ) -> Result<Response<v1::Image>, Status> {
        let message = request.get_ref();
        let image = message
            .image
            .as_ref()
            .ok_or_else(|| reason::invalid("image", "must be given"))?;
        let paths = request::mask(message.update_mask.clone(), &MUTABLE, MUTABLE_TEXT)?;
        let change = update(image, &paths)?;
        let name = image_name("image.name", &image.name)?;
        let version = version("image.version", or_default(&image.version))?;
        let etag = image.etag.clone();
        let content = format!("UpdateImage {name} {version} {etag:?} {change:?}");
        let caller = request::caller(&request, &message.request_id, &content)?;
        self.image(caller, |tx, caller| {
            verbs::image::update(tx, caller, &name, &version, &etag, change)
        })
        .await
    }

    async fn delete_image(
        &self,
        request: Request<v1::DeleteImageRequest>,
    ) -> Result<Response<v1::DeleteImageResponse>, Status> {
        let m = request.get_ref();
        let name = image_name("name", &m.name)?;
        let version = version("version", &m.version)?;
        let content = format!("DeleteImage {name} {version} {:?}", m.etag);
        let caller = request::caller(&request, &m.request_id, &content)?;
        self.db
            .transact(|tx| {
                verbs::once(tx, &caller, |tx| {
                    verbs::image::delete(tx, &caller, &name, &version, &m.etag)
                })
            })
            .await?;
        Ok(Response::new(v1::DeleteImageResponse {}))
    }
}
