//! `dalgu site`.

use dalgu_proto::v1;

use super::{Session, request_id};
use crate::{args::site::SiteCommand, client::CALL_TIMEOUT, exit::Error, output};

/// Does a command.
pub async fn run(command: SiteCommand, session: &mut Session<'_>) -> Result<(), Error> {
    let site = match command {
        SiteCommand::Show => get(session).await?,
        SiteCommand::Waive { host, request } => {
            let request = v1::WaiveHostRequest {
                host,
                request_id: request_id(request.request_id.as_ref()),
            };
            session
                .change(CALL_TIMEOUT, async |client| {
                    client.site().waive_host(request.clone()).await
                })
                .await?
        }
        SiteCommand::Resume {
            accept_differences,
            etag,
            request,
        } => {
            let etag = match etag {
                // What is accepted unseen is at least what is there now.
                etag if etag.is_empty() && accept_differences => get(session).await?.etag,
                etag => etag,
            };
            let request = v1::ResumeSiteRequest {
                accept_differences,
                etag,
                request_id: request_id(request.request_id.as_ref()),
            };
            session
                .change(CALL_TIMEOUT, async |client| {
                    client.site().resume_site(request.clone()).await
                })
                .await?
        }
    };
    output::one(session.term, session.format, &site)
}

async fn get(session: &Session<'_>) -> Result<v1::Site, Error> {
    session
        .read(async |client| client.site().get_site(v1::GetSiteRequest {}).await)
        .await
}
