//! Frames that come to a host as if one of its VMs had sent them: they enter by the VM's tap, as what QEMU writes into it does. What no
//! guest's kernel would send can be sent so.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::Context as _;
use etherparse::{IpFragOffset, Ipv4Header, PacketBuilder, ip_number};
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, sendto, socket};

use super::probe::inside;
use crate::lab::run;

/// The end that frames are sent into.
const DOOR: &str = "forge0";
/// The other end, from which they go to the tap.
const BEHIND: &str = "forge1";
/// All nodes, by Ethernet and by IPv6.
const ALL_NODES: ([u8; 6], Ipv6Addr) = (
    [0x33, 0x33, 0, 0, 0, 1],
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1),
);
/// Each packet that is sent in pieces has a number.
static PACKETS: AtomicU16 = AtomicU16::new(1);
/// Length of the heads of Ethernet and of IPv6.
const HEADS: usize = 14 + 40;

/// See the module.
pub struct Forge {
    socket: OwnedFd,
    door: LinkAddr,
}

/// One end of what is sent.
#[derive(Debug, Clone, Copy)]
pub struct End {
    /// MAC address.
    pub mac: [u8; 6],
    /// IPv4 address.
    pub ipv4: Ipv4Addr,
    /// IPv6 address.
    pub ipv6: Ipv6Addr,
}

impl Forge {
    /// Makes a way to the tap of a VM on a host.
    ///
    /// # Errors
    /// If there is no such tap.
    pub async fn new(namespace: &str, tap: &str) -> anyhow::Result<Self> {
        let lines = [
            format!("ip link add {DOOR} mtu 9000 type veth peer name {BEHIND} mtu 9000"),
            format!("ip link set {DOOR} up"),
            format!("ip link set {BEHIND} up"),
            format!("tc qdisc add dev {BEHIND} ingress"),
            format!(
                "tc filter add dev {BEHIND} parent ffff: protocol all u32 match u32 0 0 action mirred ingress redirect dev {tap}"
            ),
        ];
        for line in lines {
            let words = format!("netns exec {namespace} {line}");
            run("ip", words.split(' ')).await?;
        }
        let (socket, door) = inside(namespace, || {
            let socket = socket(
                AddressFamily::Packet,
                SockType::Raw,
                SockFlag::empty(),
                None::<SockProtocol>,
            )?;
            let door = getifaddrs()?
                .filter(|address| address.interface_name == DOOR)
                .find_map(|address| address.address?.as_link_addr().copied());
            Ok((socket, door.context("no door")?))
        })
        .await?;
        Ok(Self { socket, door })
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// If the way is gone.
    pub fn send(&self, frame: &[u8]) -> anyhow::Result<()> {
        sendto(self.socket.as_raw_fd(), frame, &self.door, MsgFlags::empty()).context("send a frame")?;
        Ok(())
    }
}

/// A datagram over IPv4.
#[must_use]
pub fn udp(from: End, to: End, ports: (u16, u16), content: &[u8]) -> Vec<u8> {
    let heads = PacketBuilder::ethernet2(from.mac, to.mac).ipv4(from.ipv4.octets(), to.ipv4.octets(), 64);
    written(|frame| heads.udp(ports.0, ports.1).write(frame, content))
}

/// The same over IPv6.
#[must_use]
pub fn udp6(from: End, to: End, ports: (u16, u16), content: &[u8]) -> Vec<u8> {
    let heads = PacketBuilder::ethernet2(from.mac, to.mac).ipv6(from.ipv6.octets(), to.ipv6.octets(), 64);
    written(|frame| heads.udp(ports.0, ports.1).write(frame, content))
}

/// ICMPv6 to all nodes of the link, of this type, with what is behind its checksum.
#[must_use]
pub fn to_all(from: End, kind: u8, head: [u8; 4], content: &[u8]) -> Vec<u8> {
    let (mac, ipv6) = ALL_NODES;
    let heads = PacketBuilder::ethernet2(from.mac, mac).ipv6(from.ipv6.octets(), ipv6.octets(), 255);
    written(|frame| heads.icmpv6_raw(kind, 0, head).write(frame, content))
}

/// The same in two pieces, of which the first has no more than 8 bytes of what it is of: ports, or the type of ICMP. Over IPv6 there are
/// options before them.
#[must_use]
pub fn in_pieces(frame: &[u8]) -> [Vec<u8>; 2] {
    match frame[12..14] {
        [0x08, 0x00] => in_pieces_of_ipv4(frame),
        _ => in_pieces_of_ipv6(frame),
    }
}

fn in_pieces_of_ipv4(frame: &[u8]) -> [Vec<u8>; 2] {
    let (ethernet, rest) = frame.split_at(14);
    let (head, content) = Ipv4Header::from_slice(rest).expect("a packet");
    let (first, rest) = content.split_at(8);
    let packet = PACKETS.fetch_add(1, Ordering::Relaxed);
    [(first, 0, true), (rest, 1, false)].map(|(content, offset, more)| {
        let mut head = head.clone();
        head.identification = packet;
        head.more_fragments = more;
        head.fragment_offset = IpFragOffset::try_new(offset).expect("a small one");
        head.set_payload_len(content.len()).expect("a short one");
        head.header_checksum = head.calc_header_checksum();
        [ethernet, &head.to_bytes(), content].concat()
    })
}

fn in_pieces_of_ipv6(frame: &[u8]) -> [Vec<u8>; 2] {
    let (heads, content) = frame.split_at(HEADS);
    let kind = heads[20];
    // 8 bytes: what comes next, that there is no more of it, and padding over 4 (RFC 8200, 4.2).
    let whole = [&[kind, 0, 1, 4, 0, 0, 0, 0], content].concat();
    // Of a first piece that does not say what it is of, the kernel takes none (RFC 8200, 4.5).
    let (first, rest) = whole.split_at(16);
    let packet = PACKETS.fetch_add(1, Ordering::Relaxed);
    [(first, 0_u16, 1), (rest, 2, 0)].map(|(content, offset, more)| {
        let mut piece = heads.to_vec();
        let length = u16::try_from(content.len() + 8).expect("a short one");
        piece[18..20].copy_from_slice(&length.to_be_bytes());
        piece[20] = ip_number::IPV6_FRAGMENTATION_HEADER.0;
        piece.extend([ip_number::IPV6_DESTINATION_OPTIONS.0, 0]);
        piece.extend((offset << 3 | more).to_be_bytes());
        piece.extend(u32::from(packet).to_be_bytes());
        piece.extend(content);
        piece
    })
}

fn written<E: std::fmt::Debug>(write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Vec<u8> {
    let mut frame = Vec::new();
    write(&mut frame).expect("a short packet");
    frame
}
