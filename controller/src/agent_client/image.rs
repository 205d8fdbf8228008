//! Commands about images. Called by `images::runner`, and by the API for uploads.

use dalgu_proto::{
    agent::v1::{self as agent, agent_image_service_client::AgentImageServiceClient},
    ids::{HostName, ImageId},
    image::Digest,
    tls::client::Caller,
    v1,
};
use tokio_stream::{Stream, StreamExt};
use tonic::Streaming;

use super::{Agents, Error, call};
use crate::{
    agent_wire,
    model::{HeldImage, ImageRecord, ImageState},
    state::State,
};

type Client = AgentImageServiceClient<Caller>;

impl Agents {
    fn images(
        &self,
        state: &State,
        host: &HostName,
    ) -> Result<(Client, Option<agent::CommandContext>), Error> {
        let (caller, context) = self.reach(state, host)?;
        Ok((Client::new(caller), context))
    }

    /// Tells an image's host to verify and convert it.
    pub async fn import_image(
        &self,
        state: &State,
        host: &HostName,
        image: &ImageRecord,
    ) -> Result<HeldImage, Error> {
        const COMMAND: &str = "ImportImage";
        let (mut client, context) = self.images(state, host)?;
        let request = agent::ImportImageRequest {
            context,
            image_uid: image.id.to_string(),
            format: v1::ImageFormat::from(image.format).into(),
            size_bytes: image.size_bytes,
            sha256: image.sha256.clone().map(String::from).unwrap_or_default(),
            file: image.file.clone().unwrap_or_default(),
        };
        held(
            host,
            COMMAND,
            call(host, COMMAND, client.import_image(request)).await?,
        )
    }

    /// Tells a host to fetch a copy from others.
    pub async fn fetch_image(
        &self,
        state: &State,
        host: &HostName,
        digest: &Digest,
    ) -> Result<HeldImage, Error> {
        const COMMAND: &str = "FetchImage";
        let (mut client, context) = self.images(state, host)?;
        let request = agent::FetchImageRequest {
            context,
            image: Some(agent_wire::image::need(state, digest, host)),
        };
        held(
            host,
            COMMAND,
            call(host, COMMAND, client.fetch_image(request)).await?,
        )
    }

    /// Tells a host to remove a copy, an import, or both. Answers with an import that was left, as it has led to a copy that the
    /// catalogue does not know.
    pub async fn remove_image(
        &self,
        state: &State,
        host: &HostName,
        digest: Option<&Digest>,
        image: Option<ImageId>,
    ) -> Result<Option<HeldImage>, Error> {
        let (mut client, context) = self.images(state, host)?;
        let deleting = image
            .and_then(|id| state.images.get(&id))
            .filter(|image| image.state == ImageState::Deleting);
        let request = agent::RemoveImageRequest {
            context,
            digest: digest.map(ToString::to_string).unwrap_or_default(),
            image_uid: image.map(|image| image.to_string()).unwrap_or_default(),
            // Its copy goes too, and is not known yet.
            unless_ready: deleting.is_some_and(|image| image.content.is_none()),
        };
        let answer = call(host, "RemoveImage", client.remove_image(request)).await?;
        answer
            .left
            .map(|left| held(host, "RemoveImage", left))
            .transpose()
    }

    /// Brings the bytes of an image to its host. `first` gets the context; what comes after is passed on as it is.
    pub async fn upload_image(
        &self,
        state: &State,
        host: &HostName,
        first: agent::UploadImageRequest,
        pieces: impl Stream<Item = agent::UploadImageRequest> + Send + 'static,
    ) -> Result<Streaming<agent::UploadImageResponse>, Error> {
        let (mut client, context) = self.images(state, host)?;
        let first = agent::UploadImageRequest { context, ..first };
        let pieces = tokio_stream::once(first).chain(pieces);
        call(host, "UploadImage", client.upload_image(pieces)).await
    }
}

fn held(host: &HostName, command: &'static str, report: agent::ImageReport) -> Result<HeldImage, Error> {
    agent_wire::image::held(report).ok_or_else(|| Error::Malformed {
        host: host.clone(),
        command,
    })
}
