//! The body of an answer on its way to its caller. It holds the call's place until it has gone out, or until the caller has
//! taken nothing of it for too long.
//!
//! A body is asked for its next part only when the caller has room for it, so one that nobody reads would never come to know
//! that its time is over. [`Answers`] therefore keeps those of a connection in view, and takes from one that waits too long
//! what it is made from and its place; what is left of it is the reason, for a caller who reads on after all.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll},
    time::Duration,
};

use axum::http::HeaderMap;
use dalgu_proto::reason;
use futures::future::BoxFuture;
use http_body::{Body, Frame, SizeHint};
use tokio::time::Instant;
use tonic::{Code, Status, codegen::Bytes};

use super::places::Place;

/// What an answer is made from.
struct Content {
    body: axum::body::Body,
    /// Why it ends before its own end.
    end: Option<BoxFuture<'static, Status>>,
    place: Option<Place>,
    /// Since when the caller has a part to take, and has not taken it.
    waits: Option<Instant>,
    /// How it ended before its own end, until the caller is told.
    cut: Option<Status>,
    over: bool,
}

impl Content {
    /// Lets go of all that the answer holds.
    fn close(&mut self) {
        self.body = axum::body::Body::empty();
        (self.end, self.place, self.waits, self.over) = (None, None, None, true);
    }
}

/// See the module.
pub(super) struct Answer(Arc<Mutex<Content>>);

impl Answer {
    /// An answer that holds nothing.
    pub(super) fn free(body: axum::body::Body) -> Self {
        Self(Arc::new(Mutex::new(Content {
            body,
            end: None,
            place: None,
            waits: None,
            cut: None,
            over: false,
        })))
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        lock(&self.0)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn told(status: &Status) -> Frame<Bytes> {
    let mut trailers = HeaderMap::new();
    // A status of ours has nothing that a header could not hold.
    let _ = status.add_header(&mut trailers);
    Frame::trailers(trailers)
}

impl Body for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let content = &mut *self.content();
        if let Some(status) = content.cut.take() {
            return Poll::Ready(Some(Ok(told(&status))));
        }
        if content.over {
            return Poll::Ready(None);
        }
        // What it waits for from here on is ours.
        content.waits = None;
        if let Some(end) = &mut content.end
            && let Poll::Ready(status) = end.as_mut().poll(cx)
        {
            // What it was made from is let go now, not when the caller has read this.
            content.close();
            return Poll::Ready(Some(Ok(told(&status))));
        }
        let frame = std::task::ready!(Pin::new(&mut content.body).poll_frame(cx));
        if frame.is_none() {
            content.close();
        } else {
            content.waits = Some(Instant::now());
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        let content = self.content();
        content.cut.is_none() && (content.over || content.body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.content().body.size_hint()
    }
}

/// The answers of one connection that are under way.
#[derive(Default)]
pub(super) struct Answers(Mutex<Vec<Weak<Mutex<Content>>>>);

impl Answers {
    /// An answer that holds a place, and ends with `end` if that comes before its own end.
    pub(super) fn answer(
        &self,
        body: axum::body::Body,
        end: Option<BoxFuture<'static, Status>>,
        place: Place,
    ) -> Answer {
        let answer = Answer(Arc::new(Mutex::new(Content {
            body,
            end,
            place: Some(place),
            waits: Some(Instant::now()),
            cut: None,
            over: false,
        })));
        let mut all = lock(&self.0);
        if all.len() == all.capacity() {
            all.retain(|answer| answer.strong_count() > 0);
        }
        all.push(Arc::downgrade(&answer.0));
        answer
    }

    /// Ends those that their caller does not take. Never returns; cancel safe.
    pub(super) async fn watch(&self, patience: Duration) {
        loop {
            tokio::time::sleep(patience / 2).await;
            self.cut(patience);
        }
    }

    fn cut(&self, patience: Duration) {
        let all: Vec<_> = lock(&self.0).iter().filter_map(Weak::upgrade).collect();
        for answer in all {
            let mut content = lock(&answer);
            if content.waits.is_some_and(|since| since.elapsed() >= patience) {
                content.close();
                content.cut = Some(too_slow(patience));
            }
        }
    }
}

fn too_slow(patience: Duration) -> Status {
    let message = format!(
        "the reader took nothing for {} s and more: call again, for events with the last resource_version",
        patience.as_secs()
    );
    reason::status(Code::Unavailable, "READER_TOO_SLOW", message)
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use dalgu_proto::tls::{Peer, Role};
    use futures::{FutureExt, stream};

    use super::{
        super::{
            limits::{Class, Limits},
            places::Places,
        },
        *,
    };

    async fn next(answer: &mut Answer) -> Option<Frame<Bytes>> {
        poll_fn(|cx| Pin::new(&mut *answer).poll_frame(cx))
            .await
            .map(Result::unwrap)
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_nobody_takes_loses_its_place_and_one_that_has_nothing_to_say_does_not() {
        let patience = Duration::from_secs(30);
        let places = Places::new(&Limits {
            calls: 2,
            kept_for_one: 0,
            ..Limits::default()
        });
        let guest = places.guest(&Peer {
            role: Role::Operator,
            name: "a".to_owned(),
        });
        let answers = Arc::new(Answers::default());
        let parts = || stream::repeat_with(|| Ok::<_, axum::Error>(Bytes::from_static(b"x")));
        let place = async || guest.take(Class::Call).await;
        let mut unread = answers.answer(
            axum::body::Body::from_stream(parts()),
            None,
            place().await.unwrap(),
        );
        let quiet = axum::body::Body::from_stream(stream::pending::<Result<Bytes, axum::Error>>());
        let mut quiet = answers.answer(quiet, None, place().await.unwrap());
        assert!(next(&mut unread).await.unwrap().is_data(), "it is read at first");
        assert!(
            next(&mut quiet).now_or_never().is_none(),
            "its reader waits for it"
        );
        let watching = tokio::spawn({
            let answers = answers.clone();
            async move { answers.watch(patience).await }
        });
        tokio::time::sleep(patience - Duration::from_secs(1)).await;
        assert!(place().await.is_none(), "both have their places");
        tokio::time::sleep(patience).await;
        assert!(place().await.is_some(), "one has lost it");
        assert!(next(&mut quiet).now_or_never().is_none(), "the other goes on");
        let end = next(&mut unread).await.unwrap().into_trailers().unwrap();
        assert_eq!(end["grpc-status"], "14");
        assert!(next(&mut unread).await.is_none());
        watching.abort();
    }
}
