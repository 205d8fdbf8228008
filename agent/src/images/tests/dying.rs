//! The agent dies at any operation on the directory, before or after it took effect: nothing half-made is taken for whole, and
//! the next run comes to the same end.

use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;
use tonic::codegen::Bytes;

use super::*;
use crate::image::{Format, Inspected, Refusal};

/// Where the program dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Point {
    Before,
    After,
    /// Half of what is written is there.
    Half,
}

/// A directory in which the program dies at an operation.
struct Mortal {
    memory: Memory,
    left: AtomicU32,
    point: Point,
    died: CancellationToken,
}

impl Mortal {
    fn new(memory: Memory, operations: u32, point: Point) -> Arc<Self> {
        Arc::new(Self {
            memory,
            left: AtomicU32::new(operations),
            point,
            died: CancellationToken::new(),
        })
    }

    async fn at<T>(&self, operation: impl Future<Output = T>) -> T {
        let left = self.left.load(Ordering::Relaxed);
        if left == 0 {
            if self.point == Point::After && !self.died.is_cancelled() {
                operation.await;
            }
            self.died.cancel();
            return std::future::pending().await;
        }
        self.left.store(left - 1, Ordering::Relaxed);
        operation.await
    }
}

#[async_trait]
impl Files for Mortal {
    async fn list(&self) -> io::Result<Vec<files::Entry>> {
        self.at(self.memory.list()).await
    }
    async fn read(&self, name: &str, offset: u64, most: usize) -> io::Result<Bytes> {
        self.at(self.memory.read(name, offset, most)).await
    }
    async fn write(&self, name: &str, offset: u64, bytes: Bytes) -> io::Result<()> {
        if self.point == Point::Half && self.left.load(Ordering::Relaxed) == 0 && !self.died.is_cancelled() {
            let half = bytes.slice(..bytes.len() / 2);
            self.memory.write(name, offset, half).await?;
        }
        self.at(self.memory.write(name, offset, bytes)).await
    }
    async fn sync(&self, name: &str) -> io::Result<()> {
        self.at(self.memory.sync(name)).await
    }
    async fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.at(self.memory.rename(from, to)).await
    }
    async fn remove(&self, name: &str) -> io::Result<()> {
        self.at(self.memory.remove(name)).await
    }
    async fn mark(&self, name: &str, time: Timestamp) -> io::Result<()> {
        self.at(self.memory.mark(name, time)).await
    }
    async fn available_bytes(&self) -> io::Result<u64> {
        self.at(self.memory.available_bytes()).await
    }
    async fn digest(&self, name: &str) -> io::Result<(Digest, u64)> {
        self.at(self.memory.digest(name)).await
    }
    async fn inspect(&self, name: &str) -> Result<Inspected, Refusal> {
        self.at(self.memory.inspect(name)).await
    }
    async fn import(&self, order: &Order, progress: &Progress) -> Result<Made, Failed> {
        self.at(self.memory.import(order, progress)).await
    }
    async fn backs_a_disk(&self, digest: &Digest) -> io::Result<bool> {
        self.at(self.memory.backs_a_disk(digest)).await
    }
}

/// Opens a store; never returns where it dies in that.
async fn live(files: Arc<dyn Files>, peers: Arc<dyn Peers>, stop: &CancellationToken) -> Images {
    let own = "h1".parse().unwrap();
    let opened = Images::open(own, files, peers, Clock::system(), stop.clone());
    opened.await.unwrap()
}

/// What is whole is what its name says.
async fn check_whole(memory: &Memory, point: &str) {
    for (name, bytes) in whole(memory).await {
        assert_eq!(name, digest_of(&bytes).to_string(), "{point}");
    }
}

/// A copy that an import made is one that its record leads to: else nobody would remove it with its image.
async fn check_led_to(memory: &Memory, point: &str) {
    let names = memory.list().await.unwrap().into_iter().map(|entry| entry.name);
    let (records, copies): (Vec<_>, Vec<_>) = names
        .filter(|name| name.ends_with(".json") || name.ends_with(".qcow2"))
        .partition(|name| name.ends_with(".json"));
    for record in &records {
        let record = memory.read(record, 0, 1 << 16).await.unwrap();
        let record = String::from_utf8_lossy(&record);
        let led_to = |copy: &String| record.contains(copy.trim_end_matches(".qcow2"));
        assert!(copies.iter().all(led_to), "{point}: {copies:?}, {record}");
    }
}

/// Runs a life to its end, dying at each operation in turn; then another that does not die.
async fn die_everywhere<F: Future<Output = ()>>(
    life: impl Fn(Memory, Arc<dyn Files>, CancellationToken) -> F,
) -> u32 {
    let mut deaths = 0;
    for point in [Point::Before, Point::After, Point::Half] {
        for operations in 0.. {
            let memory = Memory::new(1 << 40);
            let mortal = Mortal::new(memory.clone(), operations, point);
            let (died, stop) = (mortal.died.clone(), CancellationToken::new());
            let survived = died
                .run_until_cancelled(life(memory.clone(), mortal, stop.clone()))
                .await
                .is_some();
            stop.cancel();
            // What was spawned ends too.
            tokio::task::yield_now().await;
            let name = format!("{point:?} operation {operations}");
            check_whole(&memory, &name).await;
            check_led_to(&memory, &name).await;
            if survived {
                break;
            }
            deaths += 1;
            let second = Arc::new(memory.clone());
            let stop = CancellationToken::new();
            timeout(
                Duration::from_secs(60),
                life(memory.clone(), second, stop.clone()),
            )
            .await
            .unwrap_or_else(|_| panic!("{name}: the next life does not end"));
            stop.cancel();
            check_whole(&memory, &name).await;
            let left: Vec<_> = memory
                .list()
                .await
                .unwrap()
                .into_iter()
                .map(|entry| entry.name)
                .collect();
            let passing = |name: &String| !name.ends_with(".qcow2") && !name.ends_with(".json");
            assert!(!left.iter().any(passing), "{name}: {left:?}");
        }
    }
    deaths
}

#[tokio::test(start_paused = true)]
async fn an_upload_and_its_import_come_to_the_same_end_wherever_the_agent_dies() {
    let content = content((5 << 20) + 512, 4);
    let life = |_: Memory, files: Arc<dyn Files>, stop: CancellationToken| {
        let content = content.clone();
        async move {
            let images = live(files, Arc::new(alone), &stop).await;
            let known = images.inventory().images;
            if !known
                .iter()
                .any(|report| report.phase() == ImagePhase::Ready && !report.image_uid.is_empty())
            {
                upload_all(&images, id(1), &content).await;
                images.import(order(id(1), Origin::Upload, Format::Raw)).unwrap();
            }
            let report = ended(&images, id(1)).await;
            assert_eq!(report.digest, digest_of(&content).to_string());
        }
    };
    let deaths = die_everywhere(life).await;
    assert!(deaths > 40, "{deaths}");
}

#[tokio::test(start_paused = true)]
async fn a_fetch_comes_to_the_same_end_wherever_the_agent_dies() {
    let content = content((3 << 20) + 512, 4);
    let source = Memory::new(1 << 40);
    let digest = digest_of(&content);
    source
        .write(&copy_name(&digest), 0, content.clone().into())
        .await
        .unwrap();
    let there = fetching::serving(&open(Arc::new(source)).await);
    let life = |_: Memory, files: Arc<dyn Files>, stop: CancellationToken| {
        let (there, digest) = (there.clone(), digest.clone());
        async move {
            let peers = move |_: &Source| Ok(there.clone());
            let images = live(files, Arc::new(peers), &stop).await;
            let need = fetching::need(&digest, (3 << 20) + 512, &["h2"]);
            while images.wait(&need, Duration::from_secs(5)).await.is_err() {}
        }
    };
    let deaths = die_everywhere(life).await;
    assert!(deaths > 25, "{deaths}");
}

#[tokio::test]
async fn what_a_dead_run_left_half_made_is_removed_at_start_and_what_can_go_on_stays() {
    let memory = Memory::new(1 << 40);
    let content = content(1 << 20, 1);
    let (digest, other) = (digest_of(&content), digest_of(b"another"));
    let put = async |name: &str, bytes: &[u8]| {
        memory.write(name, 0, bytes.to_vec().into()).await.unwrap();
    };
    put(&copy_name(&digest), &content).await;
    let half = [
        format!("{}.making", id(1)),
        format!("{}.json.new", id(1)),
        format!("{}.upload", id(2)),
        format!("{digest}.fetch"),
    ];
    for name in &half {
        put(name, b"half").await;
    }
    put(&format!("{}.json", id(3)), b"{").await;
    put(&format!("{}.upload", id(3)), b"of a record that cannot be read").await;
    let receiving = br#"{"is":"receiving","size_bytes":9,"received_bytes":7}"#;
    let stays = [
        (format!("{}.json", id(4)), receiving.as_slice()),
        (format!("{}.upload", id(4)), b"12345"),
        (format!("{other}.fetch"), b"some of it"),
        ("somebody's".to_owned(), b"x"),
    ];
    for (name, bytes) in &stays {
        put(name, bytes).await;
    }
    let images = open(Arc::new(memory.clone())).await;
    let left: Vec<_> = memory
        .list()
        .await
        .unwrap()
        .into_iter()
        .map(|entry| entry.name)
        .collect();
    let mut expected: Vec<_> = stays.iter().map(|(name, _)| name.clone()).collect();
    expected.push(copy_name(&digest));
    expected.sort();
    assert_eq!(left, expected);
    let told = images.inventory().images;
    let phases: Vec<_> = told
        .iter()
        .map(|image| (image.phase(), image.bytes_done))
        .collect();
    assert_eq!(
        phases,
        [
            (ImagePhase::Receiving, 5),
            (ImagePhase::Ready, 1 << 20),
            (ImagePhase::Failed, 10)
        ]
    );
}
