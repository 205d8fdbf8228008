//! A machine beside the hosts with a part in the overlay: it asks guests by UDP, ICMP and TCP. A guest's kernel
//! answers ICMP by itself, and UDP to a port on which nobody listens, every time and at once.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use nix::time::{ClockId, clock_gettime};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, interval, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::ask::Ask;
use super::heard::Heard;
use crate::e2e::BOOT_LIMIT;
use crate::lab::wait_for;

/// The question: type 8; the kernel fills in the rest.
const ECHO: [u8; 12] = [8, 0, 0, 0, 0, 0, 0, 1, b'w', b'h', b'e', b'n'];
/// A question every so often.
const PERIOD: Duration = Duration::from_millis(5);
/// UDP to it is let in; nobody listens there.
const OPEN: u16 = 7;
/// UDP to it is not let in.
const CLOSED: u16 = 9;
/// An answer takes longer only where there is none; an emulated guest that arrives takes its time.
const ANSWER: Duration = Duration::from_secs(10);

/// Does something on a thread that is in a namespace.
pub(super) async fn inside<T: Send + 'static>(
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
    /// Longest time between two answers, by the kernel's times of their frames: a busy machine does not lengthen it.
    pub blackout: Duration,
    /// Refused questions that reached the guest: it said that nobody listens.
    pub got_through: usize,
}

/// A guest is being watched.
pub struct Watch {
    guest: Ipv4Addr,
    heard: Heard,
    _asking: AbortOnDropHandle<()>,
}

impl Probe {
    /// In this network namespace.
    #[must_use]
    pub fn new(namespace: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
        }
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

    /// Asks all of this once, in order.
    ///
    /// # Errors
    /// If the machine has not all the addresses that are to ask.
    pub async fn asks(&self, all: impl IntoIterator<Item = Ask>) -> anyhow::Result<()> {
        let all: Vec<_> = all.into_iter().collect();
        inside(&self.namespace, move || all.into_iter().try_for_each(Ask::send)).await
    }

    /// Waits until a guest answers.
    ///
    /// # Errors
    /// If it does not.
    pub async fn hears(&self, from: &str) -> anyhow::Result<()> {
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

    /// Asks a guest by UDP all the time, at a port that it may be asked at and at one where that is refused.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn watch(&self, guest: Ipv4Addr) -> anyhow::Result<Watch> {
        // Not connected: it is not told what is refused, which would take a question's place.
        let socket = inside(&self.namespace, || {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        })
        .await?;
        let socket = tokio::net::UdpSocket::from_std(socket)?;
        let heard = Heard::new(&self.namespace).await?;
        let asking = tokio::spawn(async move {
            let mut tick = interval(PERIOD);
            loop {
                tick.tick().await;
                for port in [OPEN, CLOSED] {
                    // What finds no way is asked again.
                    let _ = socket.send_to(b"when", (guest, port)).await;
                }
            }
        });
        let watch = Watch {
            guest,
            heard,
            _asking: AbortOnDropHandle::new(asking),
        };
        wait_for("answers", BOOT_LIMIT, async || {
            watch.heard.answers(guest, OPEN).len() > 50
        })
        .await?;
        Ok(watch)
    }

    /// Asks a guest so often by ICMP, with 1000 bytes each time; how many answers came, and in which time the last one had come.
    ///
    /// # Errors
    /// If there is no such namespace.
    pub async fn pour(&self, to: &str, questions: usize) -> anyhow::Result<(usize, Duration)> {
        let socket = self.socket(to, SockProtocol::Icmp).await?;
        let begun = Instant::now();
        let mut question = ECHO.to_vec();
        question.resize(1000, 7);
        let mut bytes = [0; 1000];
        let mut came = 0;
        let mut last = Duration::ZERO;
        for sent in 0..questions {
            // What the sender's own queue has no room for is not sent.
            let _ = socket.send(&question).await;
            if sent % 8 == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            while socket.try_recv(&mut bytes).is_ok() {
                came += 1;
                last = begun.elapsed();
            }
        }
        while let Ok(Ok(_)) = timeout(Duration::from_secs(1), socket.recv(&mut bytes)).await {
            came += 1;
            last = begun.elapsed();
        }
        Ok((came, last))
    }

    /// Opens a connection.
    ///
    /// # Errors
    /// If nobody answers.
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
    /// Waits until so many more questions were answered, and says what was seen.
    ///
    /// # Errors
    /// If they are not.
    pub async fn end(self, more: usize) -> anyhow::Result<Seen> {
        // By the clock of the frames: what came before may not have been taken up yet.
        let now = Duration::from(clock_gettime(ClockId::CLOCK_REALTIME)?);
        let mut answers = Vec::new();
        wait_for("more answers", BOOT_LIMIT, async || {
            answers = self.heard.answers(self.guest, OPEN);
            answers.iter().filter(|came| **came > now).count() >= more
        })
        .await?;
        let gaps = answers.windows(2).map(|pair| pair[1].saturating_sub(pair[0]));
        Ok(Seen {
            blackout: gaps.max().context("no answers")?,
            got_through: self.heard.answers(self.guest, CLOSED).len(),
        })
    }
}

/// A connection to a guest that returns what it is sent.
pub struct Conversation(tokio::net::TcpStream);

impl Conversation {
    /// Says something, and hears it said back.
    ///
    /// # Errors
    /// If it is not.
    pub async fn says(&mut self, what: &str) -> anyhow::Result<()> {
        self.0.write_all(what.as_bytes()).await?;
        self.hears(what).await
    }

    /// Hears something.
    ///
    /// # Errors
    /// If nothing or something else comes.
    pub async fn hears(&mut self, what: &str) -> anyhow::Result<()> {
        let mut bytes = vec![0; what.len()];
        timeout(ANSWER, self.0.read_exact(&mut bytes))
            .await
            .context("no answer")??;
        ensure!(bytes == what.as_bytes(), "another answer");
        Ok(())
    }
}
