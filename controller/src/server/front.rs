//! What every call passes before its service and after: a place among those under way, a deadline, who calls.
//!
//! One [`Front`] a connection, made by `connections`. A call without a place is refused at once with a delay after which
//! to come again; the place is given back when the whole answer has gone out, or the caller has gone or does not take it.

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use dalgu_proto::{reason, size, tls::Peer};
use futures::future::BoxFuture;
use http_body::Body;
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Status,
    codegen::{Bytes, Service},
};
use tracing::Instrument;

use super::{
    answer::{Answer, Answers},
    jittered,
    limits::{Class, Limits},
    places::Guest,
};

/// After so long, or up to half as long again, a call that found no place is to be repeated.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// So long a call that is refused may still send its request.
const DRAIN: Duration = Duration::from_secs(1);

/// The way in for the calls of one connection.
#[derive(Clone)]
pub(super) struct Front {
    /// The services.
    pub routes: axum::Router,
    /// The caller's places.
    pub guest: Arc<Guest>,
    /// The answers that are under way.
    pub answers: Arc<Answers>,
    /// The times.
    pub limits: Limits,
    /// Who is at the other end.
    pub peer: Peer,
    /// The connection is to go.
    pub aged: CancellationToken,
}

impl<B> Service<Request<B>> for Front
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<axum::BoxError>,
{
    type Response = Response<Answer>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let front = self.clone();
        let span = tracing::info_span!("rpc", path = request.uri().path());
        let mut request = request.map(|body| size::measured(tonic::body::Body::new(body)));
        request.extensions_mut().insert(self.peer.clone());
        Box::pin(front.answer(request).instrument(span))
    }
}

impl Front {
    async fn answer(mut self, request: Request<tonic::body::Body>) -> Result<Response<Answer>, Infallible> {
        let class = Class::of(&self.peer, request.uri().path());
        let grpc = is_grpc(request.headers());
        let own = self.limits.time(class);
        let time = asked_for(request.headers()).map_or(own, |asked| asked.min(own));
        let deadline = tokio::time::Instant::now() + time;
        let Ok(place) = tokio::time::timeout_at(deadline, self.guest.take(class)).await else {
            return Ok(refusal(too_late(time), grpc));
        };
        let Some(place) = place else {
            tracing::debug!(?class, peer = %self.peer, "a call was shed: too many are under way");
            // Cancel safe: what is not read yet is dropped with the request.
            let _ = tokio::time::timeout(DRAIN, drain(request.into_body())).await;
            return Ok(refusal(overloaded(), grpc));
        };
        let Ok(answered) = tokio::time::timeout_at(deadline, self.routes.call(request)).await else {
            return Ok(refusal(too_late(time), grpc));
        };
        let end: Option<BoxFuture<'static, Status>> = match class {
            _ if !grpc => None,
            Class::Stream => {
                let aged = self.aged.cancelled_owned();
                Some(Box::pin(async move {
                    aged.await;
                    stream_ended()
                }))
            }
            _ => Some(Box::pin(async move {
                tokio::time::sleep_until(deadline).await;
                too_late(time)
            })),
        };
        Ok(answered?.map(|body| self.answers.answer(body, end, place)))
    }
}

/// Takes a request to its end. One that is refused before that is reset, and what it still sends counts as an error of its
/// connection: after some hundred of them HTTP/2 would end the connection, with all other calls on it.
async fn drain(body: tonic::body::Body) {
    let mut body = std::pin::pin!(body);
    while let Some(Ok(_)) = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await {}
}

fn is_grpc(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}

/// The caller's own deadline: at most eight digits and a unit, by the gRPC specification.
fn asked_for(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

fn overloaded() -> Status {
    let message = "more calls come, or are under way, than the controller takes: repeat in a second or two";
    let after = jittered(RETRY_AFTER, 2) + RETRY_AFTER / 2;
    reason::status_retry(Code::ResourceExhausted, "OVERLOADED", message, after)
}

fn too_late(time: Duration) -> Status {
    let message = format!(
        "the call took longer than {time:?} and was given up; what it began may go on: read before repeating"
    );
    reason::status(Code::DeadlineExceeded, "CALL_TIMEOUT", message)
}

fn stream_ended() -> Status {
    let message = "the stream has come to its longest time, or the controller stops: call again, for events with the last \
                   resource_version";
    reason::status(Code::Unavailable, "STREAM_ENDED", message)
}

fn refusal(status: Status, grpc: bool) -> Response<Answer> {
    let mut response = if grpc {
        status.into_http::<axum::body::Body>()
    } else {
        let mut response = Response::new(axum::body::Body::from(status.message().to_owned()));
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        response
            .headers_mut()
            .insert(header::RETRY_AFTER, HeaderValue::from_static("2"));
        response
    };
    response.extensions_mut().clear();
    response.map(Answer::free)
}

#[cfg(test)]
mod tests {
    use super::{super::places::Places, *};

    #[test]
    fn a_callers_deadline_is_read_as_the_specification_says() {
        for (text, expected) in [
            ("3S", Some(Duration::from_secs(3))),
            ("99999999H", Some(Duration::from_secs(99_999_999 * 3600))),
            ("250m", Some(Duration::from_millis(250))),
            ("7u", Some(Duration::from_micros(7))),
            ("7n", Some(Duration::from_nanos(7))),
            ("2M", Some(Duration::from_secs(120))),
            ("", None),
            ("S", None),
            ("3", None),
            ("3s", None),
            ("-3S", None),
            ("123456789S", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", HeaderValue::from_str(text).unwrap());
            assert_eq!(asked_for(&headers), expected, "{text:?}");
        }
    }

    #[test]
    fn a_call_that_is_shed_is_told_when_to_come_again() {
        use tonic_types::StatusExt;
        for _ in 0..100 {
            let status = overloaded();
            assert_eq!(reason::of(&status).as_deref(), Some("OVERLOADED"));
            let delay = status.get_details_retry_info().unwrap().retry_delay.unwrap();
            assert!(
                (Duration::from_secs(1)..=Duration::from_secs(2)).contains(&delay),
                "{delay:?}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_callers_own_deadline_counts_when_it_is_the_shorter_one() {
        let limits = Limits::default();
        let peer = Peer {
            role: dalgu_proto::tls::Role::Operator,
            name: "x".to_owned(),
        };
        let mut front = Front {
            routes: axum::Router::new().fallback(std::future::pending::<()>),
            guest: Places::new(&limits).guest(&peer),
            answers: Arc::default(),
            limits,
            peer,
            aged: CancellationToken::new(),
        };
        for (asked, expected) in [("2S", 2), ("1H", limits.call_time.as_secs())] {
            let request = Request::post("/dalgu.v1.VmService/GetVm")
                .header(header::CONTENT_TYPE, "application/grpc")
                .header("grpc-timeout", asked)
                .body(tonic::body::Body::empty())
                .unwrap();
            let began = tokio::time::Instant::now();
            let answer = front.call(request).await.unwrap();
            assert_eq!(began.elapsed().as_secs(), expected, "{asked}");
            let status = Status::from_header_map(answer.headers()).unwrap();
            assert_eq!(reason::of(&status).as_deref(), Some("CALL_TIMEOUT"));
        }
        let probe = Request::get("/metrics").body(tonic::body::Body::empty()).unwrap();
        let answer = front.call(probe).await.unwrap();
        assert_eq!(
            answer.status(),
            StatusCode::SERVICE_UNAVAILABLE,
            "what is no gRPC is told by HTTP"
        );
    }
}
