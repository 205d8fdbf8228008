//! Lets the file systems of a guest go on that was frozen for a moment, or was to be.
//!
//! An agent in a guest that has not answered in time may freeze it after that: then nobody would let it go on.

use std::time::Duration;

use dalgu_proto::ids::VmId;
use tokio::{runtime::Handle, task::spawn_blocking, time::sleep};
use virt::domain::Domain;

use super::{error::is_absent, ffi};

/// Between two tries to let a guest go on; each waits for its agent's answer besides.
const PAUSE: Duration = Duration::from_secs(5);
/// So often it is tried: for a quarter of an hour, where the agent hangs.
const TRIES: usize = 60;

/// Lets the file systems of a guest that was frozen go on.
pub(super) fn thaw(domain: &Domain, vm: VmId, runtime: &Handle) {
    if ffi::thaw(domain).is_err() {
        thaw_later(domain, vm, runtime);
    }
}

/// As [`thaw`], where the guest's agent does not answer: it is asked again and again, after this returns.
pub(super) fn thaw_later(domain: &Domain, vm: VmId, runtime: &Handle) {
    let domain = domain.clone();
    runtime.spawn(async move {
        for _ in 0..TRIES {
            sleep(PAUSE).await;
            let domain = domain.clone();
            let over = spawn_blocking(move || {
                // One that is off, or gone, has nothing frozen here.
                match ffi::thaw(&domain) {
                    Ok(()) => true,
                    Err(error) => is_absent(&error) || !domain.is_active().unwrap_or(true),
                }
            });
            if over.await.unwrap_or(true) {
                return;
            }
        }
        tracing::error!(%vm, "the guest's agent does not answer: its file systems may still be frozen (virsh domfsthaw)");
    });
}
