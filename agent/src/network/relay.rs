//! Carries questions of a network's DNS to the servers that the site named for it. The network's DNS is in a namespace without a way
//! out; its questions come to a socket there, and go on from the host's own network.
//!
//! Started by [`super::process`] with a network's service, and ended with it. It looks at no question.

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsFd as _,
    sync::Arc,
    time::Duration,
};

use nix::sched::{CloneFlags, setns};
use tokio::{
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{Semaphore, oneshot},
    task::JoinSet,
    time::timeout,
};

use super::service::RELAY_PORT;

/// Port of DNS.
const DNS: u16 = 53;
/// Longest wait for a server.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// Longest time of a connection.
const CONNECTION_TIME: Duration = Duration::from_secs(30);
/// Questions that wait for answers at once, of one network; more are dropped, and asked again.
const MAX_QUESTIONS: usize = 256;
/// Largest datagram of DNS that is carried, with EDNS.
const MAX_BYTES: usize = 4096;

/// Carries questions to these servers until it is dropped. `namespace` is the file of the network's.
///
/// # Errors
/// If the sockets cannot be made there.
pub async fn start(namespace: File, servers: &[IpAddr]) -> io::Result<JoinSet<()>> {
    let ports = (RELAY_PORT..).take(servers.len()).collect();
    let sockets = sockets(namespace, ports).await?;
    let mut tasks = JoinSet::new();
    for ((datagrams, connections), server) in sockets.into_iter().zip(servers) {
        let server = SocketAddr::new(*server, DNS);
        let datagrams = Arc::new(UdpSocket::from_std(datagrams)?);
        let connections = TcpListener::from_std(connections)?;
        let places = Arc::new(Semaphore::new(MAX_QUESTIONS));
        tasks.spawn(carry_datagrams(datagrams, server, places.clone()));
        tasks.spawn(carry_connections(connections, server, places));
    }
    Ok(tasks)
}

type Sockets = Vec<(std::net::UdpSocket, std::net::TcpListener)>;

/// Sockets stay in the namespace that they were made in; so it takes a thread that enters it, and ends.
async fn sockets(namespace: File, ports: Vec<u16>) -> io::Result<Sockets> {
    let (send, receive) = oneshot::channel();
    std::thread::Builder::new()
        .name("dns-sockets".to_owned())
        .spawn(move || {
            // Whoever asked may have gone.
            let _ = send.send(make_sockets(&namespace, &ports));
        })?;
    receive.await.map_err(io::Error::other)?
}

fn make_sockets(namespace: &File, ports: &[u16]) -> io::Result<Sockets> {
    setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?;
    let make = |port: &u16| {
        let at = SocketAddr::from((Ipv4Addr::LOCALHOST, *port));
        let datagrams = std::net::UdpSocket::bind(at)?;
        let connections = std::net::TcpListener::bind(at)?;
        datagrams.set_nonblocking(true)?;
        connections.set_nonblocking(true)?;
        Ok((datagrams, connections))
    };
    ports.iter().map(make).collect()
}

async fn carry_datagrams(datagrams: Arc<UdpSocket>, server: SocketAddr, places: Arc<Semaphore>) {
    let mut questions = JoinSet::new();
    let mut bytes = vec![0; MAX_BYTES];
    loop {
        // What ended is let go of; nothing is waited for.
        while questions.try_join_next().is_some() {}
        let Ok((length, asker)) = datagrams.recv_from(&mut bytes).await else {
            // The namespace has gone, or an earlier answer found nobody.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            continue;
        };
        let (question, datagrams) = (bytes[..length].to_vec(), datagrams.clone());
        questions.spawn(async move {
            let _place = place;
            let answer = timeout(ANSWER_TIME, ask(server, &question)).await;
            if let Ok(Ok(answer)) = answer {
                // It asks again when this is lost.
                let _ = datagrams.send_to(&answer, asker).await;
            }
        });
    }
}

/// Asks from a port of its own each time, so that no answer can be guessed for another question.
async fn ask(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let any = match server.is_ipv4() {
        true => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        false => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut answer = vec![0; MAX_BYTES];
    let length = socket.recv(&mut answer).await?;
    answer.truncate(length);
    Ok(answer)
}

async fn carry_connections(connections: TcpListener, server: SocketAddr, places: Arc<Semaphore>) {
    let mut open = JoinSet::new();
    loop {
        while open.try_join_next().is_some() {}
        let Ok((mut near, _)) = connections.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            continue;
        };
        open.spawn(async move {
            let _place = place;
            let carried = async {
                let mut far = timeout(ANSWER_TIME, TcpStream::connect(server)).await??;
                tokio::io::copy_bidirectional(&mut near, &mut far).await
            };
            // Either side may end it.
            let _ = timeout(CONNECTION_TIME, carried).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn questions_reach_the_server_and_answers_their_asker() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let near = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let at = near.local_addr().unwrap();
        let places = Arc::new(Semaphore::new(MAX_QUESTIONS));
        let _carrying = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(carry_datagrams(
            near,
            server.local_addr().unwrap(),
            places,
        )));
        let askers = [(); 3].map(|()| UdpSocket::bind("127.0.0.1:0"));
        let askers = futures::future::try_join_all(askers).await.unwrap();
        for (number, asker) in askers.iter().enumerate() {
            asker
                .send_to(format!("question {number}").as_bytes(), at)
                .await
                .unwrap();
        }
        let mut from = Vec::new();
        for _ in &askers {
            let mut bytes = [0; 64];
            let (length, asker) = server.recv_from(&mut bytes).await.unwrap();
            from.push(asker);
            let answer = String::from_utf8_lossy(&bytes[..length]).replace("question", "answer");
            server.send_to(answer.as_bytes(), asker).await.unwrap();
        }
        for (number, asker) in askers.iter().enumerate() {
            let mut bytes = [0; 64];
            let length = asker.recv(&mut bytes).await.unwrap();
            assert_eq!(&bytes[..length], format!("answer {number}").as_bytes());
        }
        from.sort();
        from.dedup();
        assert_eq!(
            from.len(),
            askers.len(),
            "each question comes from a port of its own"
        );
    }

    #[tokio::test]
    async fn a_connection_is_carried_both_ways() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = near.local_addr().unwrap();
        let places = Arc::new(Semaphore::new(1));
        let carrying = carry_connections(near, server.local_addr().unwrap(), places);
        let _carrying = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(carrying));
        let mut asker = TcpStream::connect(at).await.unwrap();
        asker.write_all(b"question").await.unwrap();
        let (mut there, _) = server.accept().await.unwrap();
        let mut bytes = [0; 8];
        there.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"question");
        there.write_all(b"answer").await.unwrap();
        let mut bytes = [0; 6];
        asker.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"answer");
    }
}
