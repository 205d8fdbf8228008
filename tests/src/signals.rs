//! How the lab's programs are asked to end before their time: Ctrl-C, and the signals that end a terminal or a service.

use tokio::signal::unix::{SignalKind, signal};

/// Waits for such a signal and answers it as an error. From the first call on, these signals no longer end the
/// program by themselves, so that it can tidy up.
pub async fn stop() -> anyhow::Error {
    let kinds = [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
    ];
    let mut watches = Vec::new();
    for kind in kinds {
        match signal(kind) {
            Ok(watch) => watches.push(watch),
            Err(error) => return anyhow::Error::new(error).context("watch for signals"),
        }
    }
    let waits = watches.iter_mut().map(|watch| Box::pin(watch.recv()));
    futures::future::select_all(waits).await;
    anyhow::anyhow!("interrupted")
}
