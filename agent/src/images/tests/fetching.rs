//! Bringing copies from other hosts, of which some fail in each way that they can; and over real TLS.

use std::sync::atomic::{AtomicUsize, Ordering};

use dalgu_proto::{
    agent::v1::{
        ReadImageRequest, ReadImageResponse,
        peer_service_server::{PeerService, PeerServiceServer},
    },
    tls::{
        self, Peer, Role,
        client::{Caller, caller_in_process, caller_in_process_as},
        server::Acceptor,
    },
};
use futures::stream::{self, BoxStream, StreamExt as _};
use tokio::net::TcpListener;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, service::interceptor::InterceptedService};

use super::{server::Service, *};
use crate::{gate::Gate, ledger, vm::tests::Authority};

pub(super) fn need(digest: &Digest, size_bytes: u64, hosts: &[&str]) -> Need {
    let source = |host: &&str| Source {
        host: host.parse().unwrap(),
        address: format!("{host}:7444"),
    };
    Need {
        digest: digest.clone(),
        size_bytes,
        sources: hosts.iter().map(source).collect(),
    }
}

fn service(images: &Images) -> Service {
    let dir = tempfile::tempdir().unwrap();
    let ledger = ledger::Ledger::open(dir.path()).unwrap();
    let site = "6f1c6c5e-5d8b-4c39-9f0e-0a4a7a6c1c55".parse().unwrap();
    let gate = Gate::new(site, "h2".parse().unwrap(), None, ledger, ledger::Host::default());
    Service {
        latest: Arc::default(),
        gate: Arc::new(gate),
        images: images.clone(),
    }
}

/// What leads to a store.
pub(super) fn serving(images: &Images) -> Caller {
    caller_in_process(PeerServiceServer::new(service(images)))
}

pub(super) async fn store_with(content: &[u8]) -> (Images, Digest) {
    let memory = Memory::new(1 << 40);
    let digest = digest_of(content);
    memory
        .write(&copy_name(&digest), 0, content.to_vec().into())
        .await
        .unwrap();
    (open(Arc::new(memory)).await, digest)
}

/// How a host fails.
#[derive(Clone)]
enum Bad {
    /// It does not answer.
    Silent,
    /// It gives so many bytes, and then an error.
    Breaks(Vec<u8>),
    /// It gives other bytes.
    Gives(Vec<u8>),
    /// Others read already.
    Refuses,
}

struct BadHost(Bad, Arc<AtomicUsize>);

#[tonic::async_trait]
impl PeerService for BadHost {
    type ReadImageStream = BoxStream<'static, Result<ReadImageResponse, Status>>;

    async fn read_image(
        &self,
        request: Request<ReadImageRequest>,
    ) -> Result<Response<Self::ReadImageStream>, Status> {
        self.1.fetch_add(1, Ordering::Relaxed);
        let offset = usize::try_from(request.into_inner().offset).unwrap();
        let piece = |bytes: &Vec<u8>| {
            Ok(ReadImageResponse {
                data: bytes[offset.min(bytes.len())..].to_vec().into(),
            })
        };
        let pieces = match &self.0 {
            Bad::Silent => stream::pending().boxed(),
            Bad::Breaks(bytes) => stream::iter([piece(bytes), Err(Status::unavailable("gone"))]).boxed(),
            Bad::Gives(bytes) => stream::iter([piece(bytes)]).boxed(),
            Bad::Refuses => return Err(Status::resource_exhausted("others read")),
        };
        Ok(Response::new(pieces))
    }
}

/// Hosts by their names.
fn hosts(known: Vec<(&'static str, Caller)>) -> Arc<dyn Peers> {
    let known: BTreeMap<_, _> = known.into_iter().collect();
    Arc::new(move |source: &Source| {
        let caller = known.get(source.host.as_str()).cloned();
        caller.ok_or_else(|| Status::unavailable("nobody is there"))
    })
}

fn bad(how: Bad) -> (Caller, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let host = BadHost(how, asked.clone());
    (caller_in_process(PeerServiceServer::new(host)), asked)
}

async fn brought(images: &Images, need: &Need) {
    for _ in 0..100 {
        if images.wait(need, Duration::from_secs(5)).await.is_ok() {
            return;
        }
    }
    panic!("never here: {:?}", images.inventory());
}

#[tokio::test(start_paused = true)]
async fn a_host_that_fails_in_any_way_is_followed_by_the_next_and_the_copy_is_what_its_digest_says() {
    let content = content((2 << 20) + 99, 6);
    let (source, digest) = store_with(&content).await;
    let mut other = content.clone();
    other[100] ^= 1;
    let ways = [
        Bad::Silent,
        Bad::Breaks(content[..1_000_000].to_vec()),
        Bad::Breaks(other[..1_000_000].to_vec()),
        Bad::Gives(content[..1_000_000].to_vec()),
        Bad::Gives(other),
        Bad::Gives([content.clone(), vec![0]].concat()),
        Bad::Refuses,
    ];
    for (number, way) in ways.into_iter().enumerate() {
        let (first, asked) = bad(way);
        let peers = hosts(vec![("bad", first), ("good", serving(&source))]);
        let memory = Memory::new(1 << 40);
        let images = open_with(Arc::new(memory.clone()), peers).await;
        let need = need(&digest, content.len() as u64, &["nobody", "bad", "good"]);
        brought(&images, &need).await;
        assert!(
            asked.load(Ordering::Relaxed) >= 1,
            "way {number}: it was not asked"
        );
        assert_eq!(
            whole(&memory).await,
            [(digest.to_string(), content.clone())],
            "way {number}"
        );
        assert_eq!(
            memory.list().await.unwrap().len(),
            1,
            "way {number}: something is left"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn what_has_come_is_not_brought_again_also_not_after_a_restart() {
    let content = content(2 << 20, 2);
    let (source, digest) = store_with(&content).await;
    let memory = Memory::new(1 << 40);
    let (breaks, _) = bad(Bad::Breaks(content[..1 << 20].to_vec()));
    let images = open_with(Arc::new(memory.clone()), hosts(vec![("h2", breaks)])).await;
    let wanted = need(&digest, content.len() as u64, &["h2"]);
    assert!(images.need(&wanted).is_err());
    let failed = |reports: &[ImageReport]| reports.iter().any(|report| report.phase() == ImagePhase::Failed);
    let reports = until(&images, "given up", failed).await;
    assert_eq!(reports[0].bytes_done, 1 << 20);
    assert!(reports[0].error.as_ref().unwrap().retrying);
    let (rest, asked) = bad(Bad::Gives(content.clone()));
    let again = open_with(
        Arc::new(memory.clone()),
        hosts(vec![("h2", rest), ("h3", serving(&source))]),
    )
    .await;
    let told = again.inventory().images;
    assert_eq!(
        (told[0].phase(), told[0].bytes_done),
        (ImagePhase::Failed, 1 << 20)
    );
    brought(&again, &wanted).await;
    assert_eq!(asked.load(Ordering::Relaxed), 1, "one read brought the rest");
    assert_eq!(whole(&memory).await, [(digest.to_string(), content)]);
}

#[tokio::test(start_paused = true)]
async fn two_that_need_an_image_share_one_fetch() {
    let content = content(1 << 20, 2);
    let (counted, asked) = bad(Bad::Gives(content.clone()));
    let images = open_with(Arc::new(Memory::new(1 << 40)), hosts(vec![("h2", counted)])).await;
    let need = need(&digest_of(&content), content.len() as u64, &["h2"]);
    let (first, second) = tokio::join!(
        images.wait(&need, Duration::from_secs(60)),
        images.wait(&need, Duration::from_secs(60))
    );
    assert_eq!((first, second), (Ok(()), Ok(())));
    assert_eq!(asked.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn an_image_that_nobody_has_is_told_to_be_awaited_and_why() {
    let images = open(Arc::new(Memory::new(1 << 40))).await;
    let digest = digest_of(b"x");
    let awaited = images.need(&need(&digest, 5, &[])).unwrap_err();
    assert!(
        awaited.to_string().contains("no other host is known"),
        "{awaited}"
    );
    let awaited = images.need(&need(&digest, 5, &["h1"])).unwrap_err();
    assert!(awaited.trouble.is_some(), "its own copy is none: {awaited}");
    assert!(images.need(&need(&digest, 5, &["h2"])).is_err());
    until(&images, "given up", |reports| {
        reports[0].phase() == ImagePhase::Failed
    })
    .await;
    let awaited = images.need(&need(&digest, 5, &[])).unwrap_err();
    assert!(awaited.to_string().contains("nobody is there"), "{awaited}");
}

async fn read(caller: Caller, digest: &Digest) -> Result<tonic::Streaming<ReadImageResponse>, Status> {
    let mut client = dalgu_proto::agent::v1::peer_service_client::PeerServiceClient::new(caller);
    let request = ReadImageRequest {
        digest: digest.to_string(),
        offset: 0,
    };
    client.read_image(request).await.map(Response::into_inner)
}

#[tokio::test]
async fn a_host_serves_a_few_readers_at_once_and_agents_only() {
    let content = content(16 << 20, 3);
    let (source, digest) = store_with(&content).await;
    let mut readers = Vec::new();
    for _ in 0..MAX_READERS {
        readers.push(read(serving(&source), &digest).await.unwrap());
    }
    let refused = read(serving(&source), &digest).await.unwrap_err();
    assert_eq!(
        (refused.code(), dalgu_proto::reason::of(&refused).as_deref()),
        (Code::ResourceExhausted, Some("TOO_MANY_READERS"))
    );
    drop(readers);
    let place = timeout(Duration::from_secs(20), source.0.readers.acquire());
    drop(place.await.expect("those who went gave their places up"));
    let missing = read(serving(&source), &digest_of(b"")).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
    for role in [Role::Controller, Role::Operator] {
        let peer = Peer {
            role,
            name: "x".to_owned(),
        };
        let guarded = InterceptedService::new(PeerServiceServer::new(service(&source)), server::only_agents);
        let guarded = tonic::service::Routes::new(guarded);
        let refused = read(caller_in_process_as(peer, guarded), &digest)
            .await
            .unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied);
    }
}

/// Serves a store by mutual TLS, as the program does.
async fn serve_by_tls(authority: &Authority, host: &str, images: &Images) -> String {
    let identity = authority.agent(host);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let config = identity.server_config(&[tls::ALPN_H2]).unwrap();
    let (acceptor, connections) = Acceptor::new(identity.site().unwrap(), None);
    let guarded = InterceptedService::new(PeerServiceServer::new(service(images)), server::only_agents);
    let routes = tonic::service::Routes::new(guarded);
    tokio::spawn(async move { acceptor.run(listener, config, |_| ()).await });
    let server = tonic::transport::Server::builder().add_routes(routes);
    tokio::spawn(server.serve_with_incoming(ReceiverStream::new(connections)));
    address
}

#[tokio::test]
async fn two_agents_bring_images_from_each_other_by_mutual_tls() {
    let authority = Authority::new();
    let mut stores = Vec::new();
    for (host, seed) in [("h1", 1), ("h2", 2)] {
        let dir = tempfile::tempdir().unwrap();
        let files = Directory::open(&dir.path().join("store"), dir.path(), Vec::new(), false).unwrap();
        let content = content((5 << 20) + 7, seed);
        let digest = digest_of(&content);
        std::fs::write(dir.path().join("store").join(copy_name(&digest)), &content).unwrap();
        let images = Images::open(
            host.parse().unwrap(),
            Arc::new(files),
            Arc::new(TlsPeers::new(authority.agent(host))),
            Clock::system(),
            CancellationToken::new(),
        );
        let images = images.await.unwrap();
        let address = serve_by_tls(&authority, host, &images).await;
        stores.push((host, dir, digest, content, images, address));
    }
    for (here, there) in [(0, 1), (1, 0)] {
        let (_, dir, _, _, images, _) = &stores[here];
        let (host, _, digest, content, _, address) = &stores[there];
        let need = Need {
            sources: vec![Source {
                host: host.parse().unwrap(),
                address: address.clone(),
            }],
            ..need(digest, content.len() as u64, &[])
        };
        brought(images, &need).await;
        let copy = std::fs::read(dir.path().join("store").join(copy_name(digest))).unwrap();
        assert!(copy == *content);
    }
    // Another host at that address is not believed.
    let (_, _, digest, content, ..) = &stores[0];
    let stranger = open_with(
        Arc::new(Memory::new(1 << 40)),
        Arc::new(TlsPeers::new(authority.agent("h3"))),
    )
    .await;
    let need = Need {
        sources: vec![Source {
            host: "h9".parse().unwrap(),
            address: stores[0].5.clone(),
        }],
        ..need(digest, content.len() as u64, &[])
    };
    stranger.need(&need).unwrap_err();
    until(&stranger, "refused", |reports| reports[0].error.is_some()).await;
    assert_eq!(stranger.copy_report(digest).bytes_done, 0);
}
