//! What begins a conversation, in one packet: sent from beside the hosts, and known again where it is heard.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd as _;

use anyhow::Context as _;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect, sendto, socket,
};

/// By which protocol, and at which port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    /// A datagram.
    Udp(u16),
    /// A connection.
    Tcp(u16),
    /// An echo by ICMP, over IPv6 by `ICMPv6`.
    Echo,
}

/// Who asks whom for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ask {
    /// Source.
    pub from: IpAddr,
    /// Destination, of the same family.
    pub to: IpAddr,
    /// What for.
    pub what: What,
}

impl Ask {
    /// Each of these asks one for all of this.
    #[must_use]
    pub fn each(from: &[IpAddr], to: &[IpAddr], what: &[What]) -> Vec<Self> {
        let pairs = from.iter().flat_map(|&from| to.iter().map(move |&to| (from, to)));
        let pairs = pairs.filter(|(from, to)| from.is_ipv4() == to.is_ipv4());
        let all = pairs.flat_map(|(from, to)| what.iter().map(move |&what| Self { from, to, what }));
        all.collect()
    }

    /// Sends it from a port of its own each time, in the namespace that the thread is in. Nobody waits for an answer.
    pub(super) fn send(self) -> anyhow::Result<()> {
        let family = match self.from {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        let (kind, protocol, port) = match (self.what, self.from.is_ipv4()) {
            (What::Udp(port), _) => (SockType::Datagram, SockProtocol::Udp, port),
            (What::Tcp(port), _) => (SockType::Stream, SockProtocol::Tcp, port),
            (What::Echo, true) => (SockType::Datagram, SockProtocol::Icmp, 0),
            (What::Echo, false) => (SockType::Datagram, SockProtocol::IcmpV6, 0),
        };
        let address = |ip, port| SockaddrStorage::from(SocketAddr::new(ip, port));
        let socket = socket(family, kind, SockFlag::SOCK_NONBLOCK, protocol)?;
        bind(socket.as_raw_fd(), &address(self.from, 0))
            .with_context(|| format!("ask from {}", self.from))?;
        let to = address(self.to, port);
        let sent = match self.what {
            What::Tcp(_) => connect(socket.as_raw_fd(), &to),
            What::Udp(_) => sendto(socket.as_raw_fd(), b"ask", &to, MsgFlags::empty()).map(drop),
            What::Echo => {
                // The kernel fills in the rest.
                let kind = if self.from.is_ipv4() { 8 } else { 128 };
                let echo = [kind, 0, 0, 0, 0, 0, 0, 1];
                sendto(socket.as_raw_fd(), &echo, &to, MsgFlags::empty()).map(drop)
            }
        };
        match sent {
            Ok(()) | Err(Errno::EINPROGRESS) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("{self:?}")),
        }
    }

    /// What a frame asks, if anything.
    pub(super) fn read(frame: &[u8]) -> Option<Self> {
        let (protocol, from, to, begin) = match frame.get(12..14)? {
            [0x08, 0x00] => (23, ipv4(frame, 26)?, ipv4(frame, 30)?, 34),
            [0x86, 0xdd] => (20, ipv6(frame, 22)?, ipv6(frame, 38)?, 54),
            _ => return None,
        };
        let byte = |at: usize| frame.get(at).copied();
        let port = || Some(u16::from_be_bytes([byte(begin + 2)?, byte(begin + 3)?]));
        // SYN without ACK.
        let begins = |flags: u8| flags & 0b1_0010 == 0b10;
        let what = match byte(protocol)? {
            17 => What::Udp(port()?),
            6 if begins(byte(begin + 13)?) => What::Tcp(port()?),
            1 if byte(begin)? == 8 => What::Echo,
            58 if byte(begin)? == 128 => What::Echo,
            _ => return None,
        };
        Some(Self { from, to, what })
    }
}

fn ipv4(frame: &[u8], at: usize) -> Option<IpAddr> {
    let octets: [u8; 4] = frame.get(at..at + 4)?.try_into().ok()?;
    Some(IpAddr::from(octets))
}

fn ipv6(frame: &[u8], at: usize) -> Option<IpAddr> {
    let octets: [u8; 16] = frame.get(at..at + 16)?.try_into().ok()?;
    Some(IpAddr::from(octets))
}
