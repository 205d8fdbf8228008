//! One backup after the other, and what becomes of one that is given up or broken off.

use dalgu_proto::{
    ids::{BackupId, ClusterId, Epoch, Generation, VmId},
    vm::{Disk, DiskFormat, RestartPolicy, Spec},
};
use tempfile::TempDir;
use uuid::Uuid;

use super::*;
use crate::hypervisor::{
    Definition, Mark,
    backup::{Kind, Wanted},
    sim::{Call, Fault, Sim, SimConfig},
};

const LIMIT: Duration = Duration::from_secs(300);

struct Host {
    dir: TempDir,
    sim: Sim,
    backups: Backups,
    stop: CancellationToken,
}

fn cluster() -> ClusterId {
    ClusterId::from_uuid(Uuid::from_u128(1))
}

fn vm() -> VmId {
    VmId::from_uuid(Uuid::from_u128(7))
}

fn spec() -> Spec {
    let disk = Disk {
        name: "root".into(),
        size_mib: 64,
        pool: "local".into(),
        image: None,
        format: DiskFormat::Qcow2,
        digest: None,
        clone_mode: Default::default(),
        volume: None,
        limits: Default::default(),
        backup: None,
    };
    Spec {
        vcpus: 1,
        memory_mib: 64,
        disks: vec![disk],
        nics: Vec::new(),
        kernel_boot: None,
        restart_policy: RestartPolicy::OnFailure,
        host_selector: BTreeMap::new(),
        first_boot: None,
        firmware: Default::default(),
        tpm: false,
        max_vcpus: None,
        max_memory_mib: None,
        fitting: Default::default(),
        devices: Default::default(),
    }
}

fn order(number: u128, parent: Option<BackupId>) -> Order {
    Order {
        id: BackupId::from_uuid(Uuid::from_u128(number)),
        vm: vm(),
        name: "web".parse().unwrap(),
        spec: spec(),
        pool: "local".into(),
        wanted: Wanted::Auto,
        parent,
    }
}

async fn begun(dir: &TempDir, sim: &Sim) -> (Backups, CancellationToken) {
    let ledger = Ledger::open(dir.path()).unwrap();
    let contents = ledger.load().await.unwrap();
    let backups = Backups::new(
        Arc::new(sim.clone()),
        ledger,
        Clock::system(),
        contents.backups,
        contents.removed_backups,
    );
    let stop = CancellationToken::new();
    let (own, token) = (backups.clone(), stop.clone());
    tokio::spawn(async move { own.run(token).await });
    (backups, stop)
}

impl Host {
    async fn new() -> Self {
        let sim = Sim::new(SimConfig::new(cluster())).unwrap();
        let definition = Definition {
            id: vm(),
            name: "web".parse().unwrap(),
            mark: Mark {
                cluster: cluster(),
                epoch: Epoch(1),
                generation: Generation(1),
            },
            spec: spec(),
            documents: Default::default(),
            networks: Vec::new(),
            layers: Default::default(),
            places: Vec::new(),
            devices: Vec::new(),
        };
        sim.create_volumes(&definition, false).await.unwrap();
        sim.define(&definition).await.unwrap();
        sim.start(vm()).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (backups, stop) = begun(&dir, &sim).await;
        Self {
            dir,
            sim,
            backups,
            stop,
        }
    }

    async fn restart(&mut self) {
        self.stop.cancel();
        (self.backups, self.stop) = begun(&self.dir, &self.sim).await;
    }

    async fn until(&self, order: &Order, is: impl Fn(&Standing) -> bool) -> Standing {
        let wait = async {
            loop {
                let standing = self.backups.standing(order.id, &order.pool).await.unwrap();
                if is(&standing) {
                    return standing;
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(LIMIT, wait).await.expect("it comes to that")
    }

    async fn ready(&self, order: &Order) -> Manifest {
        match self.until(order, |now| matches!(now, Standing::Ready(_))).await {
            Standing::Ready(manifest) => *manifest,
            other => panic!("{other:?}"),
        }
    }

    async fn failed(&self, order: &Order) -> String {
        match self.until(order, |now| matches!(now, Standing::Failed(_))).await {
            Standing::Failed(failure) => failure.reason,
            other => panic!("{other:?}"),
        }
    }

    async fn remembered(&self) -> usize {
        Ledger::open(self.dir.path())
            .unwrap()
            .load()
            .await
            .unwrap()
            .backups
            .len()
    }
}

fn removal(order: &Order) -> Removal {
    Removal {
        id: order.id,
        vm: order.vm,
        pool: order.pool.clone(),
    }
}

#[tokio::test(start_paused = true)]
async fn backups_are_taken_in_order_and_asking_twice_takes_none_twice() {
    let host = Host::new().await;
    let first = order(1, None);
    host.backups.start(first.clone()).await.unwrap();
    host.backups.start(first.clone()).await.unwrap();
    assert_eq!(host.ready(&first).await.kind, Kind::Full);
    let second = order(2, Some(first.id));
    host.backups.start(second.clone()).await.unwrap();
    assert_eq!(
        host.ready(&second).await.kind,
        Kind::Incremental { parent: first.id }
    );
    // What is whole is in the pool alone.
    assert_eq!(host.remembered().await, 0);
    let again = host.backups.start(first.clone()).await.unwrap();
    assert!(matches!(again, Standing::Ready(_)), "{again:?}");
    assert_eq!(host.sim.backups(), 2);
}

#[tokio::test(start_paused = true)]
async fn one_that_is_given_up_leaves_nothing_and_lets_the_next_go_on() {
    let host = Host::new().await;
    let (stuck, waiting, next) = (order(1, None), order(2, None), order(3, None));
    host.sim.fail_next(Call::BackUp, Fault::Hang);
    for order in [&stuck, &waiting, &next] {
        host.backups.start(order.clone()).await.unwrap();
    }
    host.until(&stuck, |now| matches!(now, Standing::Running(..)))
        .await;
    let busy = host.backups.remove(&removal(&stuck)).await;
    assert!(matches!(busy, Err(Error::Busy)), "{busy:?}");
    host.backups.cancel(waiting.id).await.unwrap();
    assert_eq!(host.failed(&waiting).await, "CANCELLED");
    assert_eq!(host.failed(&stuck).await, "CANCELLED");
    host.ready(&next).await;
    for order in [&stuck, &waiting] {
        host.backups.remove(&removal(order)).await.unwrap();
    }
    assert_eq!((host.sim.backups(), host.remembered().await), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn one_that_was_under_way_when_the_agent_died_is_undone_and_one_that_was_whole_is_whole() {
    let mut host = Host::new().await;
    let lost = order(1, None);
    host.sim.fail_next(Call::BackUp, Fault::Hang);
    host.backups.start(lost.clone()).await.unwrap();
    host.until(&lost, |now| matches!(now, Standing::Running(..)))
        .await;
    host.restart().await;
    assert_eq!(host.failed(&lost).await, "AGENT_RESTARTED");
    assert_eq!(host.sim.backups(), 0);
    // It died after the last of it, and before it had written that down.
    let whole = order(2, None);
    host.stop.cancel();
    host.sim.back_up(&whole).await.unwrap();
    let entry = Entry {
        order: whole.clone(),
        phase: Phase::Running,
    };
    let ledger = Ledger::open(host.dir.path()).unwrap();
    ledger.save_backup(&entry).await.unwrap();
    host.restart().await;
    host.ready(&whole).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_left_is_removed_again_and_again_until_nothing_is() {
    let host = Host::new().await;
    let order = order(1, None);
    let unavailable = || crate::hypervisor::Error::Unavailable {
        detail: "restarting".into(),
    };
    host.sim.fail_next(Call::BackUp, Fault::Error(unavailable()));
    host.sim
        .fail_next(Call::RemoveBackup, Fault::Error(unavailable()));
    host.backups.start(order.clone()).await.unwrap();
    assert_eq!(host.failed(&order).await, "HYPERVISOR_UNAVAILABLE");
    assert_eq!(host.sim.backups(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_order_to_take_a_backup_that_comes_after_its_removal_takes_nothing() {
    let mut host = Host::new().await;
    let (taken, never) = (order(1, None), order(2, None));
    host.backups.start(taken.clone()).await.unwrap();
    host.ready(&taken).await;
    // The order for the other one is still on its way.
    for order in [&taken, &never] {
        host.backups.remove(&removal(order)).await.unwrap();
    }
    for restarts in 0..2 {
        for order in [&taken, &never] {
            let told = host.backups.start(order.clone()).await.unwrap();
            let refused = matches!(&told, Standing::Failed(why) if why.reason == "BACKUP_REMOVED");
            assert!(refused, "after {restarts} restarts: {told:?}");
        }
        sleep(LIMIT).await;
        assert_eq!((host.sim.backups(), host.remembered().await), (0, 0));
        host.restart().await;
    }
    let another = order(3, None);
    host.backups.start(another.clone()).await.unwrap();
    host.ready(&another).await;
}

/// Ledger files that are slow to be written, as long as somebody says so.
struct Slow(crate::ledger::Directory, std::sync::atomic::AtomicBool);

#[async_trait::async_trait]
impl crate::ledger::Files for Slow {
    async fn load(&self) -> std::io::Result<Vec<(String, Vec<u8>)>> {
        self.0.load().await
    }
    async fn replace(&self, name: &str, bytes: Vec<u8>) -> std::io::Result<()> {
        // The first that comes is the last that is done.
        if self.1.swap(false, std::sync::atomic::Ordering::Relaxed) {
            sleep(Duration::from_secs(2)).await;
        }
        self.0.replace(name, bytes).await
    }
    async fn remove(&self, name: &str) -> std::io::Result<()> {
        self.0.remove(name).await
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_is_removed_while_it_is_written_down_as_begun_leaves_no_files() {
    let host = Host::new().await;
    host.stop.cancel();
    let files = Arc::new(Slow(
        crate::ledger::Directory::open(host.dir.path()).unwrap(),
        false.into(),
    ));
    let backups = Backups::new(
        Arc::new(host.sim.clone()),
        Ledger::on(files.clone()),
        Clock::system(),
        Vec::new(),
        Removed::new(),
    );
    let order = order(1, None);
    backups.start(order.clone()).await.unwrap();
    files.1.store(true, std::sync::atomic::Ordering::Relaxed);
    let own = backups.clone();
    tokio::spawn(async move { own.run(CancellationToken::new()).await });
    sleep(Duration::from_secs(1)).await;
    while let Err(error) = backups.remove(&removal(&order)).await {
        assert!(matches!(error, Error::Busy), "{error}");
        sleep(Duration::from_secs(1)).await;
    }
    sleep(LIMIT).await;
    assert_eq!((host.sim.backups(), host.remembered().await), (0, 0));
}
