//! The largest request that is taken, refused with a reason of our own.
//!
//! Both servers wrap themselves in [`Limit`]. It reads the length that stands before each gRPC message as the bytes pass,
//! and ends a body whose message is too large before that is in memory. Must not buffer anything. The codec's own limit
//! stays as the second line: it answers OUT_OF_RANGE, which programs take for the end of a list.

use std::{
    collections::HashMap,
    pin::Pin,
    task::{Context, Poll},
};

use http_body::{Frame, SizeHint};
use tonic::{
    Code, Status,
    body::Body,
    codegen::{Bytes, Service, http::Request},
};
use tower::Layer;

use crate::reason;

/// Largest request, in bytes, of operators and agents alike: gRPC's customary limit. A report of 1,000 VMs has 160 kB.
pub const MAX_REQUEST_BYTES: usize = 4 << 20;
/// One byte that says whether the message is compressed, four that say how long it is.
const PREFIX: usize = 5;

/// Wraps a server so that it refuses requests above [`MAX_REQUEST_BYTES`] with RESOURCE_EXHAUSTED (REQUEST_TOO_LARGE).
#[derive(Debug, Clone, Copy, Default)]
pub struct Limit;

/// What [`Limit`] makes of a server.
#[derive(Debug, Clone)]
pub struct Limited<S>(S);

impl<S> Layer<S> for Limit {
    type Service = Limited<S>;

    fn layer(&self, inner: S) -> Limited<S> {
        Limited(inner)
    }
}

impl<S: Service<Request<Body>>> Service<Request<Body>> for Limited<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> S::Future {
        self.0.call(request.map(measured))
    }
}

/// As [`Limit`], for a server that wraps its requests itself.
pub fn measured(body: Body) -> Body {
    Body::new(Measured::new(body))
}

/// A body of gRPC messages, each measured by the length it announces.
struct Measured {
    body: Body,
    prefix: [u8; PREFIX],
    /// Bytes of the prefix that have come.
    have: usize,
    /// Bytes of the message still to come.
    left: usize,
}

impl Measured {
    fn new(body: Body) -> Self {
        Self {
            body,
            prefix: [0; PREFIX],
            have: 0,
            left: 0,
        }
    }

    /// Follows the bytes to the next prefix, and judges what it announces.
    fn read(&mut self, mut bytes: &[u8]) -> Result<(), usize> {
        while !bytes.is_empty() {
            if self.left > 0 {
                let skipped = self.left.min(bytes.len());
                self.left -= skipped;
                bytes = &bytes[skipped..];
                continue;
            }
            let taken = (PREFIX - self.have).min(bytes.len());
            self.prefix[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            self.have += taken;
            bytes = &bytes[taken..];
            if self.have == PREFIX {
                let [_, length @ ..] = self.prefix;
                let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
                if length > MAX_REQUEST_BYTES {
                    return Err(length);
                }
                (self.have, self.left) = (0, length);
            }
        }
        Ok(())
    }
}

impl http_body::Body for Measured {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
            && let Err(length) = self.read(data)
        {
            return Poll::Ready(Some(Err(too_large(length))));
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn too_large(bytes: usize) -> Status {
    let limit = MAX_REQUEST_BYTES >> 20;
    let message = format!(
        "the request has {bytes} bytes and the limit is {limit} MiB: shorten its texts and labels, or split it into \
         several requests"
    );
    let facts = [("limit_bytes", MAX_REQUEST_BYTES), ("request_bytes", bytes)];
    let facts: HashMap<_, _> = facts
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_string()))
        .collect();
    reason::status_with(Code::ResourceExhausted, "REQUEST_TOO_LARGE", message, facts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(length: usize) -> Vec<u8> {
        let mut bytes = vec![0];
        bytes.extend(u32::try_from(length).unwrap().to_be_bytes());
        bytes.resize(PREFIX + length, b'x');
        bytes
    }

    #[test]
    fn messages_are_measured_however_their_bytes_are_cut() {
        let mut stream = message(3);
        stream.extend(message(0));
        stream.extend(message(70_000));
        for piece in [1, 2, 4, 5, 6, 7, 1_000, stream.len()] {
            let mut measured = Measured::new(Body::empty());
            for bytes in stream.chunks(piece) {
                assert_eq!(measured.read(bytes), Ok(()), "in pieces of {piece}");
            }
            assert_eq!((measured.have, measured.left), (0, 0), "in pieces of {piece}");
        }
    }

    #[test]
    fn the_second_message_of_a_stream_is_judged_as_well() {
        for (length, expected) in [
            (MAX_REQUEST_BYTES, Ok(())),
            (MAX_REQUEST_BYTES + 1, Err(MAX_REQUEST_BYTES + 1)),
        ] {
            let mut stream = message(9);
            stream.extend(&message(length)[..PREFIX]);
            let mut measured = Measured::new(Body::empty());
            assert_eq!(measured.read(&stream), expected);
        }
    }

    struct Once(Option<Bytes>);

    impl http_body::Body for Once {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            Poll::Ready(self.0.take().map(|bytes| Ok(Frame::data(bytes))))
        }
    }

    #[tokio::test]
    async fn a_server_behind_the_layer_sees_what_is_small_enough_and_the_refusal_else() {
        use http_body::Body as _;
        let mut server = Limit.layer(tower::service_fn(async |request: Request<Body>| {
            let mut body = request.into_body();
            std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx))
                .await
                .unwrap()
        }));
        let small = Bytes::from(message(3));
        let seen = server
            .call(Request::new(Body::new(Once(Some(small.clone())))))
            .await;
        assert_eq!(seen.unwrap().into_data().unwrap(), small);
        let large = Bytes::from(message(MAX_REQUEST_BYTES + 1));
        let refused = server.call(Request::new(Body::new(Once(Some(large))))).await;
        assert_eq!(
            reason::of(&refused.unwrap_err()).as_deref(),
            Some("REQUEST_TOO_LARGE")
        );
    }

    #[test]
    fn the_refusal_says_the_limit_to_people_and_to_programs() {
        use tonic_types::StatusExt;
        let status = too_large(10 << 20);
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.message().contains("4 MiB"), "{}", status.message());
        let info = status.get_details_error_info().unwrap();
        assert_eq!(info.reason, "REQUEST_TOO_LARGE");
        assert_eq!(info.metadata["limit_bytes"], "4194304");
    }
}
