//! Removing a copy, or forgetting an import. What a VM of this host needs stays.

use std::time::Duration;

use dalgu_proto::{ids::ImageId, image::Digest};
use tokio::time::timeout;

use super::{
    Error, Images, State,
    files::{copy_name, fetch_name},
    record,
};

/// What is under way ends within this time when it is cut off.
const CUT_WAIT: Duration = Duration::from_secs(5);

impl Images {
    /// Removes a copy, or what has come of one; done when there is nothing.
    ///
    /// # Errors
    /// If a disk here was made from it, or it cannot be removed.
    pub async fn remove(&self, digest: &Digest) -> Result<(), Error> {
        {
            let mut state = self.state();
            // From here on it is fetched by nobody, and a VM that comes waits.
            if state.is_held(digest) {
                return Err(Error::InUse(digest.clone()));
            }
            if !state.removing.insert(digest.clone()) {
                return Err(Error::Busy);
            }
            if let Some(fetch) = state.fetches.get(digest) {
                fetch.cut.cancel();
            }
        }
        // Also where this is given up by its caller: else nobody could fetch it any more.
        let _removing = Removing(self, digest);
        self.until(|state| state.fetches.get(digest).is_none_or(|fetch| !fetch.running))
            .await?;
        let _moving = self.0.moving.lock().await;
        if self.0.files.backs_a_disk(digest).await? {
            return Err(Error::InUse(digest.clone()));
        }
        let was_here = self.state().copies.remove(digest).is_some();
        self.0.files.remove(&copy_name(digest)).await?;
        self.0.files.remove(&fetch_name(digest)).await?;
        self.state().fetches.remove(digest);
        if was_here {
            tracing::info!(%digest, "a copy of an image was removed");
        }
        Ok(())
    }

    /// Forgets an import with what was uploaded for it; a copy that it led to stays. Done when there is nothing.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub async fn forget(&self, id: ImageId) -> Result<(), Error> {
        if let Some(import) = self.state().imports.get_mut(&id) {
            import.leaving = true;
            import.cut.cancel();
        }
        self.until(|state| state.imports.get(&id).is_none_or(|import| !import.is_at_work()))
            .await?;
        record::forget(&*self.0.files, id).await?;
        self.state().imports.remove(&id);
        self.changed();
        tracing::info!(image = %id, "an import was forgotten");
        Ok(())
    }

    /// Waits for what was cut off to end.
    async fn until(&self, is: impl Fn(&State) -> bool) -> Result<(), Error> {
        let mut changes = self.changes();
        let ended = async {
            while !is(&self.state()) {
                // It fails only when the store is gone, and this holds it.
                let _ = changes.changed().await;
            }
        };
        timeout(CUT_WAIT, ended).await.map_err(|_| Error::Busy)
    }
}

/// A copy that is being removed.
struct Removing<'a>(&'a Images, &'a Digest);

impl Drop for Removing<'_> {
    fn drop(&mut self) {
        self.0.state().removing.remove(self.1);
        self.0.changed();
    }
}
