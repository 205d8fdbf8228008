//! Reads a VM's console log, from a point on, and follows it if asked, called by the server; and removes it with its
//! VM, called by the VM's task.

use std::{io::SeekFrom, os::unix::fs::MetadataExt, path::PathBuf, time::Duration};

use dalgu_proto::{agent::v1::ReadConsoleResponse, reason};
use futures::Stream;
use tokio::{
    fs::File,
    io::{AsyncReadExt, AsyncSeekExt},
};
use tonic::{Code, Status};

/// Most bytes in a piece.
const PIECE_BYTES: usize = 32 * 1024;
/// A followed log is looked at so often.
const POLL: Duration = Duration::from_millis(200);

/// Where a reader is.
struct Reader {
    path: PathBuf,
    file: Option<File>,
    tail_bytes: u64,
    follow: bool,
}

/// The log as a stream of pieces.
pub fn read(
    path: PathBuf,
    tail_bytes: u64,
    follow: bool,
) -> impl Stream<Item = Result<ReadConsoleResponse, Status>> {
    let reader = Reader {
        path,
        file: None,
        tail_bytes,
        follow,
    };
    futures::stream::try_unfold(reader, |mut reader| async move {
        let piece = reader.next().await.map_err(|error| {
            reason::status(
                Code::Unavailable,
                "CONSOLE_UNREADABLE",
                format!("the console log cannot be read: {error}"),
            )
        })?;
        Ok(piece.map(|data| (ReadConsoleResponse { data: data.into() }, reader)))
    })
}

impl Reader {
    async fn next(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        loop {
            if self.file.is_none() {
                self.open().await?;
            }
            if let Some(file) = &mut self.file {
                let mut piece = Vec::with_capacity(PIECE_BYTES);
                if file.take(PIECE_BYTES as u64).read_to_end(&mut piece).await? > 0 {
                    return Ok(Some(piece));
                }
                self.start_again_if_cut().await?;
            }
            if !self.follow || self.is_removed().await? {
                return Ok(None);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn open(&mut self) -> std::io::Result<()> {
        let mut file = match File::open(&self.path).await {
            Ok(file) => file,
            // A VM that never ran has no log yet.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        if self.tail_bytes > 0 {
            let length = file.metadata().await?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(self.tail_bytes)))
                .await?;
        }
        self.file = Some(file);
        Ok(())
    }

    /// The VM is gone from here, and nothing more will come.
    async fn is_removed(&self) -> std::io::Result<bool> {
        match &self.file {
            Some(file) => Ok(file.metadata().await?.nlink() == 0),
            None => Ok(false),
        }
    }

    /// A log that became shorter was begun anew.
    async fn start_again_if_cut(&mut self) -> std::io::Result<()> {
        if let Some(file) = &mut self.file {
            let (length, position) = (file.metadata().await?.len(), file.stream_position().await?);
            if length < position {
                self.tail_bytes = 0;
                self.file = None;
            }
        }
        Ok(())
    }
}

/// Removes a log whose VM is gone from this host. What cannot be removed is told of, and holds nothing else up.
pub async fn remove(path: Option<PathBuf>) {
    if let Some(path) = path
        && let Err(error) = tokio::fs::remove_file(&path).await
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(%error, path = %path.display(), "a console log is left behind");
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    #[tokio::test]
    async fn a_log_is_read_from_its_tail_and_followed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "one\ntwo\n").unwrap();
        let whole: Vec<_> = read(file.path().into(), 0, false)
            .map(|piece| piece.unwrap().data)
            .collect()
            .await;
        assert_eq!(whole.concat(), b"one\ntwo\n");
        let mut tail = Box::pin(read(file.path().into(), 4, true));
        assert_eq!(tail.next().await.unwrap().unwrap().data.as_ref(), b"two\n");
        std::fs::OpenOptions::new()
            .append(true)
            .open(file.path())
            .and_then(|mut f| std::io::Write::write_all(&mut f, b"three\n"))
            .unwrap();
        assert_eq!(tail.next().await.unwrap().unwrap().data.as_ref(), b"three\n");
    }

    #[tokio::test]
    async fn a_removed_log_ends_for_its_followers_and_removing_it_again_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.log");
        std::fs::write(&path, "one\n").unwrap();
        let mut followed = Box::pin(read(path.clone(), 0, true));
        assert_eq!(followed.next().await.unwrap().unwrap().data.as_ref(), b"one\n");
        remove(Some(path.clone())).await;
        assert!(!path.exists());
        assert!(followed.next().await.is_none());
        remove(Some(path.clone())).await;
    }

    #[tokio::test]
    async fn a_vm_that_never_ran_has_an_empty_log() {
        let pieces: Vec<_> = read("/nonexistent/log".into(), 0, false).collect().await;
        assert!(pieces.is_empty());
    }
}
