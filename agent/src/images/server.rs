//! The store's gRPC services: commands for the controller, and reading for other hosts of the site. Who may call, what the wire
//! means, and nothing else.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use dalgu_proto::{
    agent::v1::{
        self as wire, agent_image_service_server::AgentImageService, peer_service_server::PeerService,
    },
    ids::ImageId,
    image::{Digest, Format},
    reason,
    tls::{Peer, Role},
    v1,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use super::{Error, Images, Need, Order, Origin, Source, files::copy_name, upload::Upload};
use crate::{gate::Gate, server::pass};

/// Bytes of an image in one message.
const PIECE: usize = 1 << 20;
/// Messages that wait to be taken.
const WAITING: usize = 4;
/// Longest wait for the other side of a stream.
const SILENCE: Duration = Duration::from_secs(30);

/// See the module's documentation. Cheap to clone.
#[derive(Clone)]
pub struct Service {
    /// Judges commands.
    pub gate: Arc<Gate>,
    /// The store.
    pub images: Images,
    /// The last command about images that was obeyed.
    pub latest: Arc<Mutex<Latest>>,
}

/// Number of a command, and the run of the controller that counts so. One process of an agent has one session at most with each, and
/// the [`Gate`] stops what is for an earlier session.
#[derive(Debug, Default)]
pub struct Latest {
    run: String,
    order: u64,
}

impl Latest {
    /// Whether a command is later than all that came, which it then is the last of.
    fn advance(&mut self, context: &wire::CommandContext) -> bool {
        if context.order == 0 {
            return true;
        }
        if self.run != context.controller_run_id {
            self.run.clone_from(&context.controller_run_id);
            self.order = 0;
        }
        let later = context.order > self.order;
        self.order = self.order.max(context.order);
        later
    }
}

impl Service {
    /// Obeys a command unless a later one has come: a removal that was under way for long would take the copy that has been made
    /// since.
    async fn pass(&self, context: Option<wire::CommandContext>) -> Result<(), Status> {
        pass(&self.gate, context.clone()).await?;
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if context.is_none_or(|context| latest.advance(&context)) {
            return Ok(());
        }
        let message = "a later command about images has come before this one; ask again with a new number";
        Err(reason::status(Code::Aborted, "OVERTAKEN", message))
    }
}

/// Lets only agents in.
#[allow(
    clippy::result_large_err,
    reason = "tonic's error is what an interceptor returns"
)]
pub fn only_agents(request: Request<()>) -> Result<Request<()>, Status> {
    match request.extensions().get::<Peer>() {
        Some(Peer {
            role: Role::Agent(_), ..
        }) => Ok(request),
        Some(peer) => {
            let message = format!("{peer} may not read from another host; this is for the site's agents");
            Err(reason::status(Code::PermissionDenied, "NOT_AGENT", message))
        }
        None => Err(reason::status(
            Code::Unauthenticated,
            "NO_IDENTITY",
            "the connection has no identity",
        )),
    }
}

fn status(error: &Error) -> Status {
    let (code, why) = match error {
        Error::Uploading => (Code::Aborted, "UPLOAD_IN_PROGRESS"),
        Error::Offset { .. } | Error::TooMuch { .. } => (Code::InvalidArgument, "OFFSET"),
        Error::OtherSize { .. } => (Code::InvalidArgument, "SIZE_MISMATCH"),
        Error::NotAwaited => (Code::FailedPrecondition, "IMAGE_NOT_AWAITING_UPLOAD"),
        Error::NoRoom { .. } => (Code::ResourceExhausted, "STORAGE"),
        Error::Incomplete => (Code::FailedPrecondition, "UPLOAD_INCOMPLETE"),
        Error::InUse(_) => (Code::FailedPrecondition, "IMAGE_IN_USE"),
        Error::Busy => (Code::Unavailable, "BUSY"),
        Error::NotHere(_) => (Code::NotFound, "IMAGE_NOT_FOUND"),
        Error::TooManyReaders => (Code::ResourceExhausted, "TOO_MANY_READERS"),
        Error::Io(error) if error.kind() == std::io::ErrorKind::StorageFull => {
            (Code::ResourceExhausted, "STORAGE")
        }
        Error::Io(_) => (Code::Unavailable, "STORAGE"),
    };
    reason::status(code, why, error.to_string())
}

fn invalid(field: &str) -> impl Fn(dalgu_proto::ids::Error) -> Status {
    move |error| reason::invalid(field, error.to_string())
}

#[allow(clippy::result_large_err, reason = "tonic's error is what a service returns")]
fn order(request: wire::ImportImageRequest) -> Result<Order, Status> {
    let id = request.image_uid.parse().map_err(invalid("image_uid"))?;
    let format = v1::ImageFormat::try_from(request.format)
        .map_err(|_| reason::invalid("format", "is not a value of ImageFormat"))?;
    let format = Format::try_from(format).map_err(|error| reason::invalid("format", error))?;
    let sha256 = Some(request.sha256).filter(|digits| !digits.is_empty());
    let origin = match request.file.as_str() {
        "" => Origin::Upload,
        file => {
            dalgu_proto::ids::check_file_name(file).map_err(invalid("file"))?;
            Origin::File(file.to_owned())
        }
    };
    Ok(Order {
        id,
        origin,
        format,
        size_bytes: Some(request.size_bytes).filter(|bytes| *bytes > 0),
        sha256: sha256
            .map(|digits| digits.parse())
            .transpose()
            .map_err(invalid("sha256"))?,
    })
}

/// Reads who has an image.
#[allow(clippy::result_large_err, reason = "tonic's error is what a service returns")]
pub fn need(wire: wire::ImageNeed) -> Result<Need, Status> {
    let source = |source: wire::ImageSource| {
        Ok(Source {
            host: source.host.parse().map_err(invalid("image.sources.host"))?,
            address: source.address,
        })
    };
    Ok(Need {
        digest: wire.digest.parse().map_err(invalid("image.digest"))?,
        size_bytes: wire.size_bytes,
        sources: wire
            .sources
            .into_iter()
            .map(source)
            .collect::<Result<_, Status>>()?,
    })
}

type Answers = mpsc::Sender<Result<wire::UploadImageResponse, Status>>;

/// Takes an upload's pieces until it is whole, or its caller ends.
async fn receive(
    mut upload: Upload,
    first: wire::UploadImageRequest,
    mut pieces: Streaming<wire::UploadImageRequest>,
    answers: Answers,
) {
    let told = |upload: &Upload| {
        Ok(wire::UploadImageResponse {
            received_bytes: upload.received(),
        })
    };
    // Where nobody listens any more the pieces end too.
    let _ = answers.send_timeout(told(&upload), SILENCE).await;
    let mut next = Some(first).filter(|first| !first.data.is_empty());
    while !upload.is_whole() {
        let piece = match next.take() {
            Some(piece) => piece,
            None => {
                let cut = upload.cut().clone();
                let next = cut.run_until_cancelled(timeout(SILENCE, pieces.message()));
                match next.await {
                    Some(Ok(Ok(Some(piece)))) => piece,
                    _ => break,
                }
            }
        };
        match upload.take(piece.offset, piece.data).await {
            Ok(true) => {
                if answers.send_timeout(told(&upload), SILENCE).await.is_err() {
                    break;
                }
            }
            Ok(false) => {}
            Err(error) => {
                // What came before is good.
                let _ = upload.keep().await;
                let _ = answers.send_timeout(Err(status(&error)), SILENCE).await;
                return;
            }
        }
    }
    match upload.keep().await {
        Ok(true) => drop(answers.send_timeout(told(&upload), SILENCE).await),
        Ok(false) => {}
        Err(error) => drop(answers.send_timeout(Err(status(&error)), SILENCE).await),
    }
}

#[tonic::async_trait]
impl AgentImageService for Service {
    type UploadImageStream = ReceiverStream<Result<wire::UploadImageResponse, Status>>;

    async fn upload_image(
        &self,
        request: Request<Streaming<wire::UploadImageRequest>>,
    ) -> Result<Response<Self::UploadImageStream>, Status> {
        let mut pieces = request.into_inner();
        let first = timeout(SILENCE, pieces.message())
            .await
            .map_err(|_| reason::status(Code::DeadlineExceeded, "READER_TOO_SLOW", "nothing came"))??
            .ok_or_else(|| reason::invalid("image_uid", "must be given in a first request"))?;
        pass(&self.gate, first.context.clone()).await?;
        let id: ImageId = first.image_uid.parse().map_err(invalid("image_uid"))?;
        if first.size_bytes == 0 || first.size_bytes > dalgu_proto::image::MAX_FILE_BYTES {
            return Err(reason::invalid("size_bytes", "must be 1 byte to 16 TiB"));
        }
        let upload = self.images.upload(id, first.size_bytes).await;
        let upload = upload.map_err(|error| status(&error))?;
        let (answers, stream) = mpsc::channel(WAITING);
        self.images.spawn(receive(upload, first, pieces, answers));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn import_image(
        &self,
        request: Request<wire::ImportImageRequest>,
    ) -> Result<Response<wire::ImageReport>, Status> {
        let request = request.into_inner();
        self.pass(request.context.clone()).await?;
        let order = order(request)?;
        let id = order.id;
        self.images.import(order).map_err(|error| status(&error))?;
        Ok(Response::new(self.images.import_report(id)))
    }

    async fn fetch_image(
        &self,
        request: Request<wire::FetchImageRequest>,
    ) -> Result<Response<wire::ImageReport>, Status> {
        let request = request.into_inner();
        self.pass(request.context).await?;
        let image = request
            .image
            .ok_or_else(|| reason::invalid("image", "must be given"))?;
        let need = need(image)?;
        // Whether it is here the report says.
        let _ = self.images.need(&need);
        Ok(Response::new(self.images.copy_report(&need.digest)))
    }

    async fn remove_image(
        &self,
        request: Request<wire::RemoveImageRequest>,
    ) -> Result<Response<wire::RemoveImageResponse>, Status> {
        let request = request.into_inner();
        self.pass(request.context).await?;
        let given = |text: String| Some(text).filter(|text| !text.is_empty());
        let digest: Option<Digest> = given(request.digest)
            .map(|digits| digits.parse())
            .transpose()
            .map_err(invalid("digest"))?;
        let id: Option<ImageId> = given(request.image_uid)
            .map(|id| id.parse())
            .transpose()
            .map_err(invalid("image_uid"))?;
        if let Some(digest) = digest {
            self.images
                .remove(&digest, id)
                .await
                .map_err(|error| status(&error))?;
        }
        let mut left = None;
        if let Some(id) = id {
            let forgotten = self.images.forget(id, request.unless_ready).await;
            if !forgotten.map_err(|error| status(&error))? {
                left = Some(self.images.import_report(id));
            }
        }
        Ok(Response::new(wire::RemoveImageResponse { left }))
    }
}

#[tonic::async_trait]
impl PeerService for Service {
    type ReadImageStream = ReceiverStream<Result<wire::ReadImageResponse, Status>>;

    async fn read_image(
        &self,
        request: Request<wire::ReadImageRequest>,
    ) -> Result<Response<Self::ReadImageStream>, Status> {
        let request = request.into_inner();
        let digest: Digest = request.digest.parse().map_err(invalid("digest"))?;
        let failed = |error: &Error| Err(status(error));
        if !self.images.is_whole(&digest) {
            return failed(&Error::NotHere(digest));
        }
        let Ok(place) = self.images.0.readers.clone().try_acquire_owned() else {
            return failed(&Error::TooManyReaders);
        };
        let (pieces, stream) = mpsc::channel(WAITING);
        let images = self.images.clone();
        self.images.spawn(async move {
            let _place = place;
            images.send(&digest, request.offset, pieces).await;
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

impl Images {
    fn is_whole(&self, digest: &Digest) -> bool {
        let state = self.state();
        state.copies.contains_key(digest) && !state.removing.contains(digest)
    }

    /// Sends a copy from a place on, to its end or as long as it is taken.
    async fn send(
        &self,
        digest: &Digest,
        mut offset: u64,
        pieces: mpsc::Sender<Result<wire::ReadImageResponse, Status>>,
    ) {
        let name = copy_name(digest);
        loop {
            let piece = match self.0.files.read(&name, offset, PIECE).await {
                Ok(data) if data.is_empty() => return,
                Ok(data) => {
                    offset += data.len() as u64;
                    Ok(wire::ReadImageResponse { data })
                }
                Err(error) => Err(status(&error.into())),
            };
            let ends = piece.is_err();
            // A reader that takes nothing gives its place up.
            let taken = timeout(SILENCE, pieces.send(piece)).await;
            if ends || !matches!(taken, Ok(Ok(()))) {
                return;
            }
        }
    }
}
