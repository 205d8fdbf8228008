//! The wire between two programs of a [`super::site`], with somebody on it who sees each message and may change it.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use dalgu_proto::tls::client::Caller;
use http_body_util::BodyExt;
use prost::bytes::{BufMut, Bytes, BytesMut};
use tonic::{Status, body::Body};
use tower::ServiceExt;

/// Bytes before a message in a gRPC body: whether it is compressed, and its length.
const HEADER: usize = 5;

/// Calls so far in this process.
static CALLS: AtomicU64 = AtomicU64::new(1);

/// Which way a message goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// To the server.
    Request,
    /// From it.
    Answer,
}

/// Who sits on the wire.
pub trait Tap: Send + Sync {
    /// Whether the server has this call, "/SERVICE/METHOD"; one that it does not have is answered with UNIMPLEMENTED.
    fn has(&self, _path: &str) -> bool {
        true
    }

    /// A message comes by; what is returned goes on. `call` is another number for each call.
    fn message(&self, call: u64, path: &str, side: Side, message: Bytes) -> Bytes;
}

/// A way to a server past a tap.
pub fn tapped(tap: Arc<dyn Tap>, server: Caller) -> Caller {
    Caller::new(tower::service_fn(move |request: http::Request<Body>| {
        let (tap, server) = (tap.clone(), server.clone());
        async move {
            let path: Arc<str> = request.uri().path().into();
            if !tap.has(&path) {
                return Ok(Status::unimplemented("this version does not know the call").into_http());
            }
            let call = CALLS.fetch_add(1, Ordering::Relaxed);
            let see = |side| {
                let (tap, path) = (tap.clone(), path.clone());
                move |message| tap.message(call, &path, side, message)
            };
            let request = request.map(|body| through(body, see(Side::Request)));
            let answer = server.oneshot(request).await?;
            Ok(answer.map(|body| through(body, see(Side::Answer))))
        }
    }))
}

/// A body whose messages pass through `see`. In one process no frame holds a part of a message.
fn through(body: Body, see: impl Fn(Bytes) -> Bytes + Send + 'static) -> Body {
    Body::new(body.map_frame(move |frame| match frame.into_data() {
        Ok(data) => http_body::Frame::data(each(data, &see)),
        Err(trailers) => trailers,
    }))
}

fn each(mut data: Bytes, see: &impl Fn(Bytes) -> Bytes) -> Bytes {
    let mut out = BytesMut::new();
    while data.len() >= HEADER {
        let header = data.split_to(HEADER);
        let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]);
        let message = see(data.split_to(usize::try_from(length).expect("it is in memory")));
        out.put_u8(header[0]);
        out.put_u32(u32::try_from(message.len()).expect("messages have a limit"));
        out.put(message);
    }
    assert!(data.is_empty(), "a frame ends in the middle of a message");
    out.freeze()
}
