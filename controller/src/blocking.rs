//! Work that takes long, done beside the tasks that serve.

use std::panic::resume_unwind;

use tokio::task::spawn_blocking;

/// Does it on a thread of its own. A panic there is the caller's.
pub async fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            // The runtime ends, and with it whoever waits.
            Err(_) => std::future::pending().await,
        },
    }
}
