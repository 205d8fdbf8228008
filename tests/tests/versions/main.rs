//! Versions work together: what earlier ones said and stored is read as it was meant, and what later ones may say does no
//! harm.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod cli;
mod commands;
mod recorded;
mod reports;
mod skew;
mod stores;

use std::sync::Arc;

use dalgu_proto::tls::client::Caller;
use dalgu_tests::versions::wire::{Side, Tap};
use http_body_util::BodyExt;
use prost::bytes::Bytes;
use tonic::{Code, body::Body};
use tower::ServiceExt;

/// Nobody on the wire.
struct Nobody;

impl Tap for Nobody {
    fn message(&self, _: u64, _: &str, _: Side, message: Bytes) -> Bytes {
        message
    }
}

fn nobody() -> Arc<dyn Tap> {
    Arc::new(Nobody)
}

/// Makes a call with a message as it is; how it was answered, and what was said.
async fn call(server: Caller, path: &str, message: &[u8]) -> (Code, String) {
    let mut body = vec![0];
    body.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    body.extend(message);
    let request = http::Request::post(format!("http://site{path}"))
        .header("content-type", "application/grpc")
        .body(Body::new(http_body_util::Full::new(Bytes::from(body))))
        .unwrap();
    let answer = server.oneshot(request).await.unwrap();
    let (parts, body) = answer.into_parts();
    let mut headers = parts.headers;
    let status = |headers: &http::HeaderMap| tonic::Status::from_header_map(headers);
    if status(&headers).is_none() {
        // A stream that is followed ends when its first messages have come.
        let end = tokio::time::timeout(std::time::Duration::from_secs(60), body.collect()).await;
        if let Ok(Ok(end)) = end
            && let Some(trailers) = end.trailers()
        {
            headers.extend(trailers.clone());
        }
    }
    status(&headers).map_or((Code::Ok, String::new()), |status| {
        let fields = dalgu_proto::reason::of(&status).unwrap_or_default();
        (status.code(), format!("{fields} {}", status.message()))
    })
}
