//! What is heard in a network namespace: every frame at every device, with its time. It reads of frames who sent them, and what they say,
//! ask ([`super::ask`]) or claim. Used by the probe, and by tests that compare what a guest sends with what comes of it elsewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::io::IoSliceMut;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use nix::cmsg_space;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvmsg,
    setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeSpec, TimeVal, TimeValLike as _};

use super::ask::Ask;
use super::probe::inside;

/// Whether anybody still listens is looked at so often.
const LOOK_MS: i64 = 200;

/// A busy machine may not take frames up for a while; none may be lost.
const KEPT_BYTES: usize = 16 << 20;

/// A frame that came or went.
struct Frame {
    /// By the kernel's clock.
    when: Duration,
    /// Index of the device.
    device: usize,
    bytes: Vec<u8>,
}

/// A way in which a frame says that an address is its sender's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Claim {
    /// The source of an IP packet.
    Source,
    /// The sender of an ARP packet.
    Arp,
    /// An ARP probe, which asks whether another has the address: RFC 5227, 2.1.1.
    Probe,
    /// A neighbour advertisement.
    Advertisement,
    /// Duplicate address detection, which asks whether another has the address: RFC 4862, 5.4.2.
    Detection,
}

/// Frames that are heard from some moment on.
pub struct Heard {
    namespace: String,
    frames: Arc<Mutex<Vec<Frame>>>,
    /// At these devices only, or at all but these.
    devices: Vec<usize>,
    only: bool,
}

impl Heard {
    /// Begins to listen in a namespace.
    ///
    /// # Errors
    /// If there is none of that name.
    pub async fn new(namespace: &str) -> anyhow::Result<Self> {
        let socket = inside(namespace, || {
            let kind = (AddressFamily::Packet, SockType::Raw);
            let socket = socket(kind.0, kind.1, SockFlag::empty(), SockProtocol::EthAll)?;
            setsockopt(&socket, sockopt::RcvBufForce, &KEPT_BYTES)?;
            setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
            setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(LOOK_MS))?;
            Ok(socket)
        })
        .await?;
        let frames: Arc<Mutex<Vec<Frame>>> = Arc::default();
        let kept = Arc::downgrade(&frames);
        std::thread::spawn(move || {
            loop {
                let frame = receive(&socket);
                let Some(kept) = kept.upgrade() else { return };
                match frame {
                    Ok(frame) => kept.lock().unwrap_or_else(PoisonError::into_inner).push(frame),
                    Err(Errno::EAGAIN | Errno::EINTR) => {}
                    Err(_) => return,
                }
            }
        });
        Ok(Self {
            namespace: namespace.to_owned(),
            frames,
            devices: Vec::new(),
            only: false,
        })
    }

    /// What of it is heard at a device, both ways: before any rule for what comes there, and after all for what goes out.
    ///
    /// # Errors
    /// If there is no such device now.
    pub async fn at(&self, device: &str) -> anyhow::Result<Self> {
        self.part(&[device], true).await
    }

    /// What of it is heard at other devices than these.
    ///
    /// # Errors
    /// If one of them is not there now.
    pub async fn elsewhere(&self, devices: &[&str]) -> anyhow::Result<Self> {
        self.part(devices, false).await
    }

    async fn part(&self, devices: &[&str], only: bool) -> anyhow::Result<Self> {
        let names: Vec<_> = devices.iter().map(|&device| device.to_owned()).collect();
        let devices = inside(&self.namespace, move || {
            let index = |name: &String| if_nametoindex(name.as_str()).with_context(|| name.clone());
            let indices = names.iter().map(|name| Ok(usize::try_from(index(name)?)?));
            indices.collect()
        })
        .await?;
        Ok(Self {
            namespace: self.namespace.clone(),
            frames: self.frames.clone(),
            devices,
            only,
        })
    }

    /// When a guest said that nobody listens at this port of its.
    #[must_use]
    pub fn answers(&self, guest: Ipv4Addr, port: u16) -> Vec<Duration> {
        self.each(|frame| is_answer(&frame.bytes, guest, port).then_some(frame.when))
    }

    /// What was asked, and how often.
    #[must_use]
    pub fn asked(&self) -> BTreeMap<Ask, usize> {
        let mut asked = BTreeMap::new();
        for ask in self.each(|frame| Ask::read(&frame.bytes)) {
            *asked.entry(ask).or_default() += 1;
        }
        asked
    }

    /// In which ways frames of this sender claim an address.
    #[must_use]
    pub fn claims(&self, mac: &str, address: IpAddr) -> BTreeSet<Claim> {
        let own = |frame: &Frame| sender(&frame.bytes) == octets(mac);
        let claims = self.each(|frame| claim(&frame.bytes, address).filter(|_| own(frame)));
        claims.into_iter().flatten().collect()
    }

    /// How many frames bear this sender.
    #[must_use]
    pub fn from(&self, mac: &str) -> usize {
        self.count(|frame| sender(frame) == octets(mac))
    }

    /// How many frames hold this address anywhere.
    #[must_use]
    pub fn holding(&self, address: &[u8]) -> usize {
        self.count(|frame| holds(frame, address))
    }

    /// How many frames bear this sender and hold this address.
    #[must_use]
    pub fn holding_of(&self, mac: &str, address: &[u8]) -> usize {
        self.count(|frame| sender(frame) == octets(mac) && holds(frame, address))
    }

    /// How many frames say to everybody where this sender is: RARP, ARP about itself, and neighbour advertisements.
    #[must_use]
    pub fn announcing(&self, mac: &str) -> usize {
        self.count(|frame| sender(frame) == octets(mac) && announces(frame))
    }

    /// How many frames of this sender ask for an address by DHCP.
    #[must_use]
    pub fn asking(&self, mac: &str) -> usize {
        self.count(|frame| {
            let is_dhcp = frame.get(23) == Some(&17) && frame.get(36..38) == Some(&67_u16.to_be_bytes());
            sender(frame) == octets(mac) && is_dhcp
        })
    }

    fn count(&self, wanted: impl Fn(&[u8]) -> bool) -> usize {
        self.each(|frame| wanted(&frame.bytes).then_some(())).len()
    }

    /// What is found in each frame.
    fn each<T>(&self, find: impl Fn(&Frame) -> Option<T>) -> Vec<T> {
        let frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        let frames = frames
            .iter()
            .filter(|frame| self.devices.contains(&frame.device) == self.only);
        frames.filter_map(find).collect()
    }
}

fn receive(socket: &OwnedFd) -> nix::Result<Frame> {
    let mut bytes = [0; 2048];
    let mut space = cmsg_space!(TimeSpec);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let frame = recvmsg::<LinkAddr>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::empty(),
    )?;
    let when = frame.cmsgs()?.find_map(|told| match told {
        ControlMessageOwned::ScmTimestampns(when) => Some(Duration::from(when)),
        _ => None,
    });
    let (length, device) = (frame.bytes, frame.address.map(|from| from.ifindex()));
    Ok(Frame {
        when: when.unwrap_or_default(),
        device: device.unwrap_or_default(),
        bytes: bytes[..length].to_vec(),
    })
}

/// The ways in which a frame claims an address.
fn claim(frame: &[u8], address: IpAddr) -> Option<Vec<Claim>> {
    let at = |from: usize, address: &[u8]| frame.get(from..from + address.len()) == Some(address);
    let mut ways = Vec::new();
    let mut way = |claim, holds| {
        if holds {
            ways.push(claim)
        }
    };
    match (frame.get(12..14)?, address) {
        ([0x08, 0x00], IpAddr::V4(address)) => way(Claim::Source, at(26, &address.octets())),
        ([0x08, 0x06], IpAddr::V4(address)) => {
            way(Claim::Arp, at(28, &address.octets()));
            way(Claim::Probe, at(28, &[0; 4]) && at(38, &address.octets()));
        }
        ([0x86, 0xdd], IpAddr::V6(address)) => {
            way(Claim::Source, at(22, &address.octets()));
            // ICMPv6 right behind the header, and the address that it is about.
            let about = |kind| at(20, &[58]) && at(54, &[kind]) && at(62, &address.octets());
            way(Claim::Advertisement, about(136));
            way(Claim::Detection, about(135) && at(22, &[0; 16]));
        }
        _ => {}
    }
    Some(ways)
}

/// Whether a frame holds ICMP from this guest that says that nobody listens at a port (RFC 792: type 3, code 3, and the head of the
/// datagram that it is about, which is of UDP).
fn is_answer(frame: &[u8], guest: Ipv4Addr, port: u16) -> bool {
    frame.get(12..14) == Some(&[8, 0])
        && frame.get(23) == Some(&1)
        && frame.get(26..30) == Some(&guest.octets())
        && frame.get(34..36) == Some(&[3, 3])
        && frame.get(51) == Some(&17)
        && frame.get(64..66) == Some(&port.to_be_bytes())
}

/// None of an address that is none, which no frame bears.
fn octets(mac: &str) -> Vec<u8> {
    let octets = mac.split(':');
    octets
        .filter_map(|octet| u8::from_str_radix(octet, 16).ok())
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

fn holds(frame: &[u8], address: &[u8]) -> bool {
    frame.windows(address.len()).any(|part| part == address)
}
