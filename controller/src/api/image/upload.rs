//! The bytes of an upload, on their way from the caller to the host that imports the image.
//!
//! ```text
//!   caller ──pieces──> (a few) ──> import host
//!          <──answers── (a few) <──
//! ```
//!
//! Nothing is kept here but a few pieces: the host takes one after the other, and so does the caller's stream. What has come
//! is kept by the host; a call that breaks off is taken up by another at the offset that the host names. The store is
//! written when a call begins, and when the host has all.

use std::{sync::Arc, time::Duration};

use dalgu_proto::{agent::v1 as agent, ids::ImageId, image::MAX_PIECE_BYTES, reason, v1};
use futures::{StreamExt, stream::BoxStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::{Services, image_name, or_default, version};
use crate::{
    api::vm::from_agent, images::runner::received, metrics::Metrics, model::ImageRecord, state::Db, verbs,
};

/// Pieces, and answers, on their way: with the largest pieces 4 MiB.
const ON_THE_WAY: usize = 4;
/// Longest wait for the caller to name the image.
const FIRST: Duration = Duration::from_secs(10);
/// Longest time in which nothing gets on: then the call ends, and may be taken up again.
const STALL: Duration = Duration::from_secs(60);

fn stalled(who: &str) -> Status {
    let message = format!(
        "{who} for {} s: call again, it goes on where it stands",
        STALL.as_secs()
    );
    reason::status(Code::DeadlineExceeded, "UPLOAD_STALLED", message)
}

/// A connection to the host that broke amid its answers says nothing that a caller could go by.
fn broken(status: Status) -> Status {
    match status.code() {
        Code::Unknown | Code::Cancelled | Code::Internal => {
            let message = "the connection to the host broke: call again, it goes on where it stands";
            reason::status(Code::Unavailable, "HOST_UNREACHABLE", message)
        }
        _ => status,
    }
}

/// Where the pieces of one call go, and what is done when the last has come.
struct Upload {
    db: Db,
    metrics: Arc<Metrics>,
    image: ImageId,
    size_bytes: u64,
}

/// Begins to pass an upload on. Gives the answers for the caller.
pub(super) async fn begin(
    services: &Services,
    principal: String,
    mut pieces: Streaming<v1::UploadImageRequest>,
) -> Result<BoxStream<'static, Result<v1::UploadImageResponse, Status>>, Status> {
    let first = tokio::time::timeout(FIRST, pieces.message())
        .await
        .map_err(|_| reason::invalid("name", "must come in the first request, at once"))??
        .ok_or_else(|| reason::invalid("name", "must be given"))?;
    let name = image_name("name", &first.name)?;
    let version = version("version", or_default(&first.version))?;
    let state = services.db.snapshot();
    let (image, host) = verbs::image::uploadable(&state, &principal, &name, &version)?;
    let (sender, on_the_way) = mpsc::channel(ON_THE_WAY);
    let first = first_piece(&image, first)?;
    let answers = services
        .agents
        .upload_image(&state, &host, first, ReceiverStream::new(on_the_way))
        .await
        .map_err(from_agent)?;
    services
        .db
        .change(|tx| verbs::image::uploading(tx, image.id))
        .await;
    let upload = Upload {
        db: services.db.clone(),
        metrics: services.metrics.clone(),
        image: image.id,
        size_bytes: image.size_bytes,
    };
    let (out, told) = mpsc::channel(ON_THE_WAY);
    let stop = services.stop.clone();
    tokio::spawn(async move {
        // Cancel safe: what was not passed on is sent again by the next call, from where the host says.
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = out.closed() => {}
            ended = upload.pass_on(pieces, sender, answers, &out) => {
                if let Err(status) = ended {
                    // A caller who takes nothing any more has gone.
                    let _ = out.send_timeout(Err(status), STALL).await;
                }
            }
        }
    });
    Ok(ReceiverStream::new(told).boxed())
}

fn checked(data: &[u8]) -> Result<(), Status> {
    if data.len() <= MAX_PIECE_BYTES {
        return Ok(());
    }
    let message = format!("must be at most {MAX_PIECE_BYTES} bytes, got {}", data.len());
    Err(reason::invalid("data", message))
}

fn first_piece(
    image: &ImageRecord,
    first: v1::UploadImageRequest,
) -> Result<agent::UploadImageRequest, Status> {
    checked(&first.data)?;
    Ok(agent::UploadImageRequest {
        context: None,
        image_uid: image.id.to_string(),
        size_bytes: image.size_bytes,
        offset: first.offset,
        data: first.data,
    })
}

type Told = mpsc::Sender<Result<v1::UploadImageResponse, Status>>;

impl Upload {
    /// Until the host has all and has said so, or either side has ended.
    async fn pass_on(
        &self,
        pieces: Streaming<v1::UploadImageRequest>,
        sender: mpsc::Sender<agent::UploadImageRequest>,
        answers: Streaming<agent::UploadImageResponse>,
        out: &Told,
    ) -> Result<(), Status> {
        let forth = async {
            self.forth(pieces, sender).await?;
            // All that the caller had is on its way: the host answers, or does not.
            tokio::time::sleep(STALL).await;
            Err(stalled("the host has not said that it has all"))
        };
        // Cancel safe: see `begin`.
        tokio::select! {
            biased;
            ended = self.back(answers, out) => ended,
            ended = forth => ended,
        }
    }

    async fn forth(
        &self,
        mut pieces: Streaming<v1::UploadImageRequest>,
        sender: mpsc::Sender<agent::UploadImageRequest>,
    ) -> Result<(), Status> {
        loop {
            let piece = tokio::time::timeout(STALL, pieces.message())
                .await
                .map_err(|_| stalled("the caller has sent nothing"))??;
            let Some(piece) = piece else { return Ok(()) };
            if !piece.name.is_empty() || !piece.version.is_empty() {
                let message = "comes in the first request of a call only";
                return Err(reason::invalid("name", message));
            }
            checked(&piece.data)?;
            self.metrics.uploaded(piece.data.len());
            let piece = agent::UploadImageRequest {
                offset: piece.offset,
                data: piece.data,
                ..agent::UploadImageRequest::default()
            };
            match sender.send_timeout(piece, STALL).await {
                Ok(()) => {}
                Err(mpsc::error::SendTimeoutError::Timeout(_)) => {
                    return Err(stalled("the host has taken nothing"));
                }
                // The host has ended the call; its answer says why.
                Err(mpsc::error::SendTimeoutError::Closed(_)) => return Ok(()),
            }
        }
    }

    async fn back(
        &self,
        mut answers: Streaming<agent::UploadImageResponse>,
        out: &Told,
    ) -> Result<(), Status> {
        while let Some(answer) = answers.message().await.map_err(broken)? {
            let received_bytes = answer.received_bytes;
            let all = received_bytes >= self.size_bytes;
            if all {
                // Stored before the caller is told.
                self.db.change(|tx| received(tx, self.image)).await;
            }
            let answer = v1::UploadImageResponse { received_bytes };
            if out.send_timeout(Ok(answer), STALL).await.is_err() || all {
                return Ok(());
            }
        }
        Ok(())
    }
}
