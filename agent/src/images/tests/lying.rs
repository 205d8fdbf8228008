//! A call on the directory takes effect and is told to have failed, as one on a file server may be: what follows from it comes
//! to its end all the same.

use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use tonic::codegen::Bytes;

use super::{
    fetching::{need, serving},
    *,
};
use crate::image::{Inspected, Refusal};

/// A directory that lies once about what is done to names that end so.
struct Lying {
    memory: Memory,
    ends: &'static str,
    lied: AtomicBool,
}

impl Lying {
    fn new(memory: &Memory, ends: &'static str) -> Arc<Self> {
        Arc::new(Self {
            memory: memory.clone(),
            ends,
            lied: AtomicBool::new(false),
        })
    }

    fn told(&self, name: &str, outcome: io::Result<()>) -> io::Result<()> {
        outcome?;
        if name.ends_with(self.ends) && !self.lied.swap(true, Ordering::Relaxed) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(())
    }
}

#[async_trait]
impl Files for Lying {
    async fn list(&self) -> io::Result<Vec<files::Entry>> {
        self.memory.list().await
    }
    async fn read(&self, name: &str, offset: u64, most: usize) -> io::Result<Bytes> {
        self.memory.read(name, offset, most).await
    }
    async fn write(&self, name: &str, offset: u64, bytes: Bytes) -> io::Result<()> {
        let outcome = self.memory.write(name, offset, bytes).await;
        self.told(name, outcome)
    }
    async fn sync(&self, name: &str) -> io::Result<()> {
        self.memory.sync(name).await
    }
    async fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let outcome = self.memory.rename(from, to).await;
        self.told(to, outcome)
    }
    async fn remove(&self, name: &str) -> io::Result<()> {
        self.memory.remove(name).await
    }
    async fn mark(&self, name: &str, time: Timestamp) -> io::Result<()> {
        self.memory.mark(name, time).await
    }
    async fn available_bytes(&self) -> io::Result<u64> {
        self.memory.available_bytes().await
    }
    async fn digest(&self, name: &str) -> io::Result<(Digest, u64)> {
        self.memory.digest(name).await
    }
    async fn inspect(&self, name: &str) -> Result<Inspected, Refusal> {
        self.memory.inspect(name).await
    }
    async fn import(&self, order: &Order, progress: &Progress) -> Result<Made, Failed> {
        self.memory.import(order, progress).await
    }
    async fn backs_a_disk(&self, digest: &Digest) -> io::Result<bool> {
        self.memory.backs_a_disk(digest).await
    }
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_has_its_name_though_the_naming_failed_is_not_waited_for_for_ever() {
    let content = content(4096, 5);
    let (source, digest) = super::fetching::store_with(&content).await;
    let memory = Memory::new(1 << 40);
    let peers = move |_: &Source| Ok(serving(&source));
    let images = open_with(Lying::new(&memory, ".qcow2"), Arc::new(peers)).await;
    let wanted = need(&digest, content.len() as u64, &["h2"]);
    for _ in 0..20 {
        if images.wait(&wanted, Duration::from_secs(5)).await.is_ok() {
            assert_eq!(whole(&memory).await, [(digest.to_string(), content)]);
            assert_eq!(memory.list().await.unwrap().len(), 1);
            return;
        }
    }
    panic!("never here: {:?}", images.inventory());
}

#[tokio::test(start_paused = true)]
async fn a_record_that_was_written_though_the_writing_failed_is_not_left() {
    let memory = Memory::new(1 << 40);
    let images = open(Lying::new(&memory, ".json.new")).await;
    assert!(images.upload(id(1), 4096).await.is_err());
    assert_eq!(memory.list().await.unwrap(), []);
    images.upload(id(1), 4096).await.map(drop).unwrap();
    images.forget(id(1), false).await.unwrap();
    assert_eq!(memory.list().await.unwrap(), []);
}
