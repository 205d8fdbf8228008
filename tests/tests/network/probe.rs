//! A machine beside the hosts with a part in the overlay: it asks guests by ICMP and TCP, and listens to everything. ICMP because a
//! guest's kernel answers it, every time and at once.

use std::fs::File;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::BOOT_LIMIT;
use dalgu_tests::lab::wait_for;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, socket};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, interval, timeout};
use tokio_util::task::AbortOnDropHandle;

/// The question: type 8; the kernel fills in the rest.
const ECHO: [u8; 12] = [8, 0, 0, 0, 0, 0, 0, 1, b'w', b'h', b'e', b'n'];
/// A question every so often.
const PERIOD: Duration = Duration::from_millis(5);
/// An answer takes longer only where there is none; an emulated guest that arrives takes its time.
const ANSWER: Duration = Duration::from_secs(10);

/// Does something on a thread that is in a namespace.
async fn inside<T: Send + 'static>(
    namespace: &str,
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let file = File::open(Path::new("/run/netns").join(namespace))?;
    let (send, receive) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let done = setns(file.as_fd(), CloneFlags::CLONE_NEWNET)
            .context("enter")
            .and_then(|()| work());
        // The test may have ended.
        let _ = send.send(done);
    });
    receive.await?
}

/// See the module's documentation.
pub struct Probe {
    namespace: String,
}

/// What was seen of a guest that moved.
#[derive(Debug)]
pub struct Seen {
    /// Longest time between two answers.
    pub blackout: Duration,
    /// Refused questions that reached the guest: it said that nobody listens.
    pub got_through: usize,
    /// Answers since the longest time without.
    pub answers_after: usize,
}

/// A guest is being watched.
pub struct Watch {
    answers: Arc<Mutex<Vec<Instant>>>,
    refused: Arc<Mutex<usize>>,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

impl Probe {
    pub async fn new(namespace: &str) -> anyhow::Result<Self> {
        Ok(Self {
            namespace: namespace.to_owned(),
        })
    }

    async fn socket(&self, to: &str, protocol: SockProtocol) -> anyhow::Result<Arc<tokio::net::UdpSocket>> {
        let to: SocketAddr = to.parse()?;
        let socket = inside(&self.namespace, move || {
            let kind = (AddressFamily::Inet, SockType::Datagram);
            let socket = UdpSocket::from(socket(kind.0, kind.1, SockFlag::empty(), protocol)?);
            socket.connect(to)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        })
        .await?;
        Ok(Arc::new(tokio::net::UdpSocket::from_std(socket)?))
    }

    /// Waits until a guest answers.
    pub async fn hears(&mut self, from: &str) -> anyhow::Result<()> {
        let socket = self.socket(from, SockProtocol::Icmp).await?;
        wait_for("an answer by ICMP", BOOT_LIMIT, async || {
            let _ = socket.send(&ECHO).await;
            let mut bytes = [0; 16];
            matches!(
                timeout(Duration::from_millis(200), socket.recv(&mut bytes)).await,
                Ok(Ok(_))
            )
        })
        .await
    }

    /// Asks a guest all the time, and a port of its that is refused.
    pub async fn watch(&self, open: &str, closed: &str) -> anyhow::Result<Watch> {
        let open = self.socket(open, SockProtocol::Icmp).await?;
        let closed = self.socket(closed, SockProtocol::Udp).await?;
        let answers: Arc<Mutex<Vec<Instant>>> = Arc::default();
        let refused: Arc<Mutex<usize>> = Arc::default();
        let (to, told) = (open.clone(), refused.clone());
        let asking = tokio::spawn(async move {
            let mut tick = interval(PERIOD);
            loop {
                tick.tick().await;
                let _ = to.send(&ECHO).await;
                // Both the question and the answer to an earlier one can say that it was turned away.
                let mut bytes = [0; 16];
                let sent = closed.send(b"refused").await.is_err();
                if sent
                    || matches!(closed.try_recv(&mut bytes), Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused)
                {
                    *told.lock().unwrap() += 1;
                }
            }
        });
        let heard = answers.clone();
        let hearing = tokio::spawn(async move {
            let mut bytes = [0; 16];
            loop {
                if open.recv(&mut bytes).await.is_ok() {
                    heard.lock().unwrap().push(Instant::now());
                }
            }
        });
        let tasks = vec![AbortOnDropHandle::new(asking), AbortOnDropHandle::new(hearing)];
        let watch = Watch {
            answers,
            refused,
            _tasks: tasks,
        };
        wait_for("answers", BOOT_LIMIT, async || {
            watch.answers.lock().unwrap().len() > 50
        })
        .await?;
        Ok(watch)
    }

    /// Asks a guest so often by ICMP, with 1000 bytes each time; how many answers came, and in which time.
    pub async fn pour(&self, to: &str, questions: usize) -> anyhow::Result<(usize, Duration)> {
        let socket = self.socket(to, SockProtocol::Icmp).await?;
        let begun = Instant::now();
        let mut question = ECHO.to_vec();
        question.resize(1000, 7);
        let mut bytes = [0; 1000];
        let mut came = 0;
        for sent in 0..questions {
            // What the sender's own queue has no room for is not sent.
            let _ = socket.send(&question).await;
            if sent % 8 == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            while socket.try_recv(&mut bytes).is_ok() {
                came += 1;
            }
        }
        while let Ok(Ok(_)) = timeout(Duration::from_secs(1), socket.recv(&mut bytes)).await {
            came += 1;
        }
        Ok((came, begun.elapsed()))
    }

    /// Opens a connection.
    pub async fn converse(&self, with: &str) -> anyhow::Result<Conversation> {
        let with: SocketAddr = with.parse()?;
        let stream = inside(&self.namespace, move || {
            let stream = std::net::TcpStream::connect_timeout(&with, ANSWER)?;
            stream.set_nonblocking(true)?;
            Ok(stream)
        })
        .await
        .context("connect")?;
        Ok(Conversation(tokio::net::TcpStream::from_std(stream)?))
    }
}

impl Watch {
    /// Watches for a while longer, and says what was seen.
    pub async fn end(self, longer: Duration) -> anyhow::Result<Seen> {
        let until = Instant::now() + longer;
        wait_for("the time after", BOOT_LIMIT, async || Instant::now() > until).await?;
        let answers = self.answers.lock().unwrap().clone();
        let gaps = answers.windows(2).map(|pair| pair[1] - pair[0]).enumerate();
        let (place, blackout) = gaps.max_by_key(|(_, gap)| *gap).context("no answers")?;
        Ok(Seen {
            blackout,
            got_through: *self.refused.lock().unwrap(),
            answers_after: answers.len() - place - 1,
        })
    }
}

/// A connection to a guest that returns what it is sent.
pub struct Conversation(tokio::net::TcpStream);

impl Conversation {
    pub async fn says(&mut self, what: &str) -> anyhow::Result<()> {
        self.0.write_all(what.as_bytes()).await?;
        self.hears(what).await
    }

    pub async fn hears(&mut self, what: &str) -> anyhow::Result<()> {
        let mut bytes = vec![0; what.len()];
        timeout(ANSWER, self.0.read_exact(&mut bytes))
            .await
            .context("no answer")??;
        ensure!(bytes == what.as_bytes(), "another answer");
        Ok(())
    }
}

/// Every frame that came.
pub struct Heard {
    frames: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Heard {
    pub async fn new(namespace: &str) -> anyhow::Result<Self> {
        let socket = inside(namespace, || {
            let socket = socket(
                AddressFamily::Packet,
                SockType::Raw,
                SockFlag::empty(),
                SockProtocol::EthAll,
            )?;
            Ok(socket)
        })
        .await?;
        let frames: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
        let kept = Arc::downgrade(&frames);
        std::thread::spawn(move || {
            let mut bytes = [0; 2048];
            while let Ok(length) = recv(socket.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
                let Some(kept) = kept.upgrade() else { return };
                kept.lock().unwrap().push(bytes[..length].to_vec());
            }
        });
        Ok(Self { frames })
    }

    /// How many frames bear this sender.
    pub fn from(&self, mac: &str) -> usize {
        self.count(|frame| sender(frame) == octets(mac))
    }

    /// How many frames hold this address anywhere.
    pub fn holding(&self, address: [u8; 4]) -> usize {
        self.count(|frame| holds(frame, address))
    }

    /// How many frames bear this sender and hold this address.
    pub fn holding_of(&self, mac: &str, address: [u8; 4]) -> usize {
        self.count(|frame| sender(frame) == octets(mac) && holds(frame, address))
    }

    /// How many frames say to everybody where this sender is: RARP, ARP about itself, and neighbour advertisements.
    pub fn announcing(&self, mac: &str) -> usize {
        self.count(|frame| sender(frame) == octets(mac) && announces(frame))
    }

    fn count(&self, wanted: impl Fn(&[u8]) -> bool) -> usize {
        let frames = self.frames.lock().unwrap();
        frames.iter().filter(|frame| wanted(frame)).count()
    }
}

fn octets(mac: &str) -> Vec<u8> {
    let octets = mac.split(':');
    octets
        .map(|octet| u8::from_str_radix(octet, 16).unwrap())
        .collect()
}

fn sender(frame: &[u8]) -> &[u8] {
    frame.get(6..12).unwrap_or_default()
}

fn announces(frame: &[u8]) -> bool {
    match frame.get(12..14) {
        Some([0x80, 0x35]) => true,
        Some([0x08, 0x06]) => frame.get(28..32) == frame.get(38..42),
        // ICMPv6 right behind the header, type 136.
        Some([0x86, 0xdd]) => frame.get(20) == Some(&58) && frame.get(54) == Some(&136),
        _ => false,
    }
}

fn holds(frame: &[u8], address: [u8; 4]) -> bool {
    frame.windows(4).any(|four| four == address)
}
