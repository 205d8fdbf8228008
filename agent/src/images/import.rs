//! Making a copy of what was uploaded, or of a file of the images directory; in the background, one at a time.

use super::{
    Error, Images, Import,
    files::{Failed, Made, Order, Origin, Progress, making_name, upload_name},
    record::{self, Record},
};

impl Images {
    /// Begins an import; one that has begun, ended or was refused is left as it is. One that failed by bad luck begins again.
    ///
    /// # Errors
    /// If its bytes have not all come, or it is being removed.
    pub fn import(&self, order: Order) -> Result<(), Error> {
        let id = order.id;
        let begun = {
            let mut state = self.state();
            if order.origin != Origin::Upload {
                state
                    .imports
                    .entry(id)
                    .or_insert_with(|| Import::new(Record::Named));
            }
            let import = state.imports.get_mut(&id).ok_or(Error::Incomplete)?;
            if import.leaving {
                return Err(Error::Busy);
            }
            let ended = matches!(import.record, Record::Ready { .. } | Record::Refused { .. });
            if ended || import.running.is_some() {
                None
            } else if import.uploading || import.record.missing_bytes() > 0 {
                return Err(Error::Incomplete);
            } else {
                let progress = Progress::default();
                import.running = Some(progress.clone());
                import.trouble = None;
                Some((progress, import.cut.clone()))
            }
        };
        if let Some((progress, cut)) = begun {
            let images = self.clone();
            self.spawn(async move {
                // Cut off, it leaves what whoever cut it off removes.
                cut.run_until_cancelled(images.carry_out(order, progress)).await;
                if let Some(import) = images.state().imports.get_mut(&id) {
                    import.running = None;
                }
                images.changed();
            });
            self.changed();
        }
        Ok(())
    }

    async fn carry_out(&self, order: Order, progress: Progress) {
        // It is closed by nobody.
        let Ok(_turn) = self.0.importing.acquire().await else {
            return;
        };
        tracing::info!(image = %order.id, origin = ?order.origin, "importing an image");
        let outcome = match self.0.files.import(&order, &progress).await {
            Ok(made) => self.keep(&order, made).await,
            Err(failed) => Err(failed),
        };
        let Err(failed) = outcome else { return };
        let _ = self.0.files.remove(&making_name(order.id)).await;
        if let Err(error) = self.note(&order, &failed).await {
            tracing::error!(image = %order.id, %error, "the end of an import cannot be written down");
        }
    }

    async fn keep(&self, order: &Order, made: Made) -> Result<(), Failed> {
        let passing = making_name(order.id);
        let record = Record::Ready {
            digest: made.digest.clone(),
            source_sha256: made.source_sha256,
            source_bytes: made.source_bytes,
            bytes: made.bytes,
            virtual_size_bytes: made.virtual_size_bytes,
        };
        // Written down first, so that there is no copy that nothing leads to; told when the copy is there.
        record::save(&*self.0.files, order.id, &record).await?;
        self.publish(&passing, &made.digest, made.bytes, made.virtual_size_bytes)
            .await?;
        if let Some(import) = self.state().imports.get_mut(&order.id) {
            import.record = record;
        }
        self.0.files.remove(&upload_name(order.id)).await?;
        Ok(())
    }

    async fn note(&self, order: &Order, failed: &Failed) -> std::io::Result<()> {
        let (reason, retrying) = (failed.reason(), failed.is_retryable());
        let trouble = self.trouble(reason, failed.to_string(), retrying);
        if retrying {
            tracing::warn!(image = %order.id, error = %failed, "an image could not be imported");
            if let Some(import) = self.state().imports.get_mut(&order.id) {
                import.trouble = Some(trouble);
            }
            return Ok(());
        }
        tracing::info!(image = %order.id, error = %failed, "an image was refused");
        let record = Record::Refused {
            reason: trouble.reason,
            message: trouble.message,
            since: trouble.since,
        };
        self.record(order.id, record).await?;
        self.0.files.remove(&upload_name(order.id)).await
    }
}
