//! The owner of a host's networks: what it takes over, what it makes, and whom it lets wait.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::network::compile::tests::{plugged as ports_of, told};

/// A host whose programs fail as often as they are told to.
#[derive(Default)]
struct Failing {
    left: AtomicUsize,
    made: Mutex<Vec<Wanted>>,
}

#[async_trait]
impl System for Failing {
    async fn features(&self) -> Vec<GuestFeature> {
        Vec::new()
    }
    fn overlay_address(&self) -> Option<IpAddr> {
        Some([10, 0, 0, 1].into())
    }
    async fn make(&self, wanted: &Wanted) -> Problems {
        self.made.lock().unwrap().push(wanted.clone());
        let left = self.left.load(Ordering::Relaxed);
        self.left.store(left.saturating_sub(1), Ordering::Relaxed);
        Problems {
            all: (left > 0).then(|| "nft: no".to_owned()),
            ..Problems::default()
        }
    }
    async fn broken(&self) {
        std::future::pending().await
    }
    async fn arrived(&self, _plugged: &Plugged) {}
    async fn first_word(&self, _tap: &str) -> Option<BoxFuture<'static, Instant>> {
        None
    }
    async fn stop(&self) {}
}

struct Host {
    system: Arc<Failing>,
    dir: tempfile::TempDir,
    networks: Networks,
    stop: CancellationToken,
}

async fn host(failures: usize) -> Host {
    let system = Arc::new(Failing {
        left: AtomicUsize::new(failures),
        ..Failing::default()
    });
    let dir = tempfile::tempdir().unwrap();
    let networks = open(&system, &dir).await;
    let stop = CancellationToken::new();
    tokio::spawn(networks.clone().owner(stop.clone()));
    Host {
        system,
        dir,
        networks,
        stop,
    }
}

async fn open(system: &Arc<Failing>, dir: &tempfile::TempDir) -> Networks {
    let ledger = Ledger::open(dir.path()).unwrap();
    let kept = ledger.load().await.unwrap().networks;
    Networks::new(system.clone(), ledger, kept)
}

impl Networks {
    async fn owner(self, stop: CancellationToken) {
        self.run(stop).await;
    }
}

fn vm() -> VmId {
    VmId::from_uuid(uuid::Uuid::from_u128(5))
}

#[tokio::test(start_paused = true)]
async fn what_was_told_is_kept_and_made_again_by_the_next_agent_without_a_controller() {
    let host = host(0).await;
    let ports = ports_of(&told(), "web-1");
    host.networks.hold(vm(), ports.clone(), true);
    host.networks.tell(told()).await.unwrap();
    assert_eq!(host.networks.ready(&ports).await, Ok(()));
    let made = host.system.made.lock().unwrap().last().cloned().unwrap();
    assert_eq!(made.segments.len(), 2);
    host.stop.cancel();

    let next = open(&host.system, &host.dir).await;
    assert_eq!(next.state().kept.told, told());
    next.hold(vm(), ports.clone(), true);
    tokio::spawn(next.clone().owner(CancellationToken::new()));
    assert_eq!(next.ready(&ports).await, Ok(()));
    assert_eq!(host.system.made.lock().unwrap().last(), Some(&made));
}

#[tokio::test(start_paused = true)]
async fn an_older_version_is_refused_and_so_is_the_same_with_other_content() {
    let host = host(0).await;
    host.networks.tell(told()).await.unwrap();
    host.networks.tell(told()).await.unwrap();
    let older = Document { version: 2, ..told() };
    assert!(matches!(
        host.networks.tell(older).await,
        Err(Error::Stale { given: 2, known: 3 })
    ));
    let mut other = told();
    other.networks.pop();
    assert!(matches!(host.networks.tell(other).await, Err(Error::Conflict(3))));
    assert_eq!(host.networks.state().kept.told, told());
}

#[tokio::test(start_paused = true)]
async fn an_interface_waits_for_its_network_and_for_its_filters() {
    let host = host(2).await;
    let ports = ports_of(&told(), "web-1");
    host.networks.hold(vm(), ports.clone(), true);
    let waiting = host.networks.ready(&ports).await.unwrap_err();
    assert_eq!(waiting.reason(), "NETWORK_NOT_READY");
    // The filters cannot be loaded, twice.
    let error = host.networks.tell(told()).await.unwrap_err();
    assert_eq!(error.to_string(), "nft: no");
    let failed = host.networks.ready(&ports).await.unwrap_err();
    assert_eq!(
        (failed.reason(), failed),
        ("NETWORK", NotReady::Failed("nft: no".into()))
    );
    tokio::time::sleep(FIRST_RETRY * 8).await;
    assert_eq!(host.networks.ready(&ports).await, Ok(()));
}

#[tokio::test(start_paused = true)]
async fn without_a_document_nothing_is_touched() {
    let host = host(0).await;
    host.networks.hold(vm(), ports_of(&told(), "web-1"), true);
    tokio::time::sleep(RESYNC * 3).await;
    assert!(host.system.made.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_an_interface_that_has_gone_had_is_taken_away_and_a_waiting_entry_is_not() {
    let host = host(0).await;
    let ports = ports_of(&told(), "web-1");
    host.networks.hold(vm(), ports.clone(), true);
    host.networks.tell(told()).await.unwrap();
    // Before a new entry is written both count.
    host.networks.hold(vm(), [], false);
    host.networks.tell(told()).await.unwrap();
    let last = || host.system.made.lock().unwrap().last().cloned().unwrap().rules;
    assert!(last().contains(&ports[0].tap));
    host.networks.hold(vm(), [], true);
    host.networks.tell(told()).await.unwrap();
    assert!(!last().contains(&ports[0].tap));
}

#[tokio::test(start_paused = true)]
async fn a_network_that_was_left_out_goes_with_the_last_interface_in_it_and_nobody_tells_again() {
    let host = host(0).await;
    let ports = ports_of(&told(), "web-1");
    host.networks.hold(vm(), ports.clone(), true);
    host.networks.tell(told()).await.unwrap();
    let none = Document {
        version: 4,
        ..Document::default()
    };
    host.networks.tell(none).await.unwrap();
    assert_eq!(host.networks.ready(&ports).await, Ok(()));
    host.networks.hold(vm(), [], true);
    assert_eq!(host.networks.made(PATIENCE).await, Some(Problems::default()));
    let last = host.system.made.lock().unwrap().last().cloned().unwrap();
    assert_eq!(last.segments, Vec::new());
}
