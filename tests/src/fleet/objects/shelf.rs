//! A host's store of images as one life of its agent reaches it: it stays when an agent dies, wherever that was.

use std::{io, sync::Arc};

use async_trait::async_trait;
use dalgu_agent::{
    image::{Inspected, Refusal},
    images::{Entry, Failed, Files, Made, Memory, Order, Progress},
};
use dalgu_proto::image::Digest;
use jiff::Timestamp;
use tonic::codegen::Bytes;

use crate::fleet::{
    fate::{Fate, Kind},
    life::Life,
    plan::Node,
    site::Site,
};

/// See the module's documentation.
pub struct Shelf {
    /// The site.
    pub site: Arc<Site>,
    /// Which host's.
    pub host: usize,
    /// The agent.
    pub life: Life,
    /// What is kept.
    pub memory: Memory,
}

impl Shelf {
    /// The agent dies here; one that has not begun to run is started anew.
    async fn die<T>(&self) -> io::Result<T> {
        let node = Node::Host(self.host);
        if self.site.life(node).is_none() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        self.site.kill(node);
        self.life.stop_here().await
    }

    /// A call that changes something, with what goes wrong there.
    async fn change<T>(
        &self,
        name: &'static str,
        work: impl Future<Output = io::Result<T>>,
    ) -> io::Result<T> {
        self.life.pass().await;
        let node = Node::Host(self.host);
        let fate = self.site.at(Kind::Change, name, node, node);
        match fate {
            Fate::Delay(time) => tokio::time::sleep(time).await,
            Fate::Fail => return Err(io::ErrorKind::StorageFull.into()),
            Fate::CrashBefore => return self.die().await,
            _ => {}
        }
        self.life.pass().await;
        let result = work.await;
        match fate {
            Fate::CrashAfter => self.die().await,
            Fate::Lie => result.and(Err(io::ErrorKind::TimedOut.into())),
            _ => result,
        }
    }
}

#[async_trait]
impl Files for Shelf {
    async fn list(&self) -> io::Result<Vec<Entry>> {
        self.life.pass().await;
        self.memory.list().await
    }

    async fn read(&self, name: &str, offset: u64, most: usize) -> io::Result<Bytes> {
        self.life.pass().await;
        self.memory.read(name, offset, most).await
    }

    async fn write(&self, name: &str, offset: u64, bytes: Bytes) -> io::Result<()> {
        let work = self.memory.write(name, offset, bytes);
        self.change("write an image", work).await
    }

    async fn sync(&self, name: &str) -> io::Result<()> {
        self.life.pass().await;
        self.memory.sync(name).await
    }

    async fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.change("name an image", self.memory.rename(from, to)).await
    }

    async fn remove(&self, name: &str) -> io::Result<()> {
        self.change("remove an image", self.memory.remove(name)).await
    }

    async fn mark(&self, name: &str, time: Timestamp) -> io::Result<()> {
        self.life.pass().await;
        self.memory.mark(name, time).await
    }

    async fn available_bytes(&self) -> io::Result<u64> {
        self.life.pass().await;
        self.memory.available_bytes().await
    }

    async fn digest(&self, name: &str) -> io::Result<(Digest, u64)> {
        self.life.pass().await;
        self.memory.digest(name).await
    }

    async fn inspect(&self, name: &str) -> Result<Inspected, Refusal> {
        self.life.pass().await;
        self.memory.inspect(name).await
    }

    async fn import(&self, order: &Order, progress: &Progress) -> Result<Made, Failed> {
        self.life.pass().await;
        let node = Node::Host(self.host);
        if let Fate::CrashBefore | Fate::CrashAfter = self.site.at(Kind::Change, "import", node, node) {
            self.die::<()>().await?;
        }
        self.memory.import(order, progress).await
    }

    async fn backs_a_disk(&self, digest: &Digest) -> io::Result<bool> {
        self.life.pass().await;
        Ok(self.site.bases(self.host).contains(digest))
    }
}
