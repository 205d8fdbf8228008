//! Serves connections whose callers are known, each in a task of its own, until they are of age or the controller stops.

use std::sync::Arc;

use dalgu_proto::tls::server::Connection;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use super::{front::Front, jittered, limits::Limits, places::Places};

/// Serves what comes until `stop`, and then until the calls under way have ended. Whoever drops this cuts them off.
pub(super) async fn serve(
    routes: axum::Router,
    limits: Limits,
    mut incoming: mpsc::Receiver<std::io::Result<Connection>>,
    stop: CancellationToken,
) {
    let builder = builder(&limits);
    let places = Places::new(&limits);
    let mut tasks = JoinSet::new();
    loop {
        // Cancel safe: a connection that was not received stays in the channel, and a task that has ended in its set.
        let connection = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(_) = tasks.join_next(), if !tasks.is_empty() => continue,
            received = incoming.recv() => match received {
                Some(Ok(connection)) => connection,
                Some(Err(_)) => continue,
                None => break,
            },
        };
        let peer = connection.connect_info();
        let front = Front {
            routes: routes.clone(),
            guest: places.guest(&peer),
            answers: Arc::default(),
            limits,
            peer,
            aged: stop.child_token(),
        };
        tasks.spawn(one(builder.clone(), connection, front));
    }
    // Closes the listener's end at once; the rest are connections that were accepted.
    drop(incoming);
    while tasks.join_next().await.is_some() {}
}

fn builder(limits: &Limits) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams_per_connection)
        .max_header_list_size(limits.header_bytes)
        .max_pending_accept_reset_streams(limits.pending_resets)
        .max_local_error_reset_streams(limits.local_resets)
        .keep_alive_interval(limits.keepalive)
        .keep_alive_timeout(limits.keepalive);
    // With a timer hyper gives the headers of HTTP/1 its 30 s.
    builder.http1().timer(TokioTimer::new());
    builder
}

async fn one(builder: Builder<TokioExecutor>, connection: Connection, front: Front) {
    let (limits, aged, answers) = (front.limits, front.aged.clone(), front.answers.clone());
    let mut watching = std::pin::pin!(answers.watch(limits.slow_reader));
    let served = builder.serve_connection(TokioIo::new(connection), TowerToHyperService::new(front));
    let mut served = std::pin::pin!(served);
    // Cancel safe: the connection is served on below.
    tokio::select! {
        biased;
        () = aged.cancelled() => {}
        ended = served.as_mut() => return log(ended),
        () = tokio::time::sleep(jittered(limits.connection_age, 10)) => {}
        () = watching.as_mut() => {}
    }
    aged.cancel();
    served.as_mut().graceful_shutdown();
    // Cancel safe: what has not ended is cut off.
    tokio::select! {
        biased;
        ended = served => log(ended),
        () = tokio::time::sleep(limits.connection_grace) => tracing::debug!("a connection of age was cut off"),
        () = watching => {}
    }
}

fn log(ended: Result<(), Box<dyn std::error::Error + Send + Sync>>) {
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended badly");
    }
}
