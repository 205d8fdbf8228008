//! Removing a copy, or forgetting an import. What a VM of this host needs stays.

use std::time::Duration;

use dalgu_proto::{ids::ImageId, image::Digest};
use tokio::time::timeout;

use super::{
    Error, Images, Import, State,
    files::{copy_name, fetch_name},
    record::{self, Record},
};

/// What is under way ends within this time when it is cut off.
const CUT_WAIT: Duration = Duration::from_secs(5);

impl Images {
    /// Removes a copy, or what has come of one; done when there is nothing. `of` is the import that goes with it.
    ///
    /// # Errors
    /// If a disk here was made from it, another import has led to it, or it cannot be removed.
    pub async fn remove(&self, digest: &Digest, of: Option<ImageId>) -> Result<(), Error> {
        {
            let mut state = self.state();
            if let Some(import) = of.and_then(|id| state.imports.get_mut(&id)) {
                import.leaving = true;
            }
            // From here on it is fetched by nobody, and a VM that comes waits.
            if state.is_held(digest) || state.led_to(digest) {
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

    /// Forgets an import with what was uploaded for it; a copy that it led to stays. Done when there is nothing. One that has led to a
    /// copy stays where it is to be forgotten `unless_ready`: who does not know of the copy would leave it behind. Whether it went.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub async fn forget(&self, id: ImageId, unless_ready: bool) -> Result<bool, Error> {
        if let Some(import) = self.state().imports.get_mut(&id) {
            import.leaving = true;
            import.cut.cancel();
        }
        self.until(|state| state.imports.get(&id).is_none_or(|import| !import.is_at_work()))
            .await?;
        let ready = |import: &Import| matches!(import.record, Record::Ready { .. });
        if unless_ready && self.state().imports.get(&id).is_some_and(ready) {
            return Ok(false);
        }
        record::forget(&*self.0.files, id).await?;
        self.state().imports.remove(&id);
        self.changed();
        tracing::info!(image = %id, "an import was forgotten");
        Ok(true)
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
