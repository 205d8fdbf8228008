//! Hears when the guest behind a tap first speaks. With that ends the time in which a VM that has moved could not be reached.
//!
//! The kernel's time of the frame counts, so that a busy agent makes no figure larger. What QEMU sends in the guest's name to say where it
//! is (RARP) does not count: it begins while the guest still stands, and answers nobody.

use std::{
    io::{self, IoSliceMut},
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use nix::{
    cmsg_space,
    errno::Errno,
    ifaddrs::getifaddrs,
    sys::{
        socket::{
            self, AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType,
            sockopt,
        },
        time::{TimeSpec, TimeVal, TimeValLike as _},
    },
    time::{ClockId, clock_gettime},
};
use tokio::{sync::oneshot, time::Instant};

/// An Ethernet header: two addresses, and the type of what follows.
const HEADER_BYTES: usize = 14;
/// Type of a frame with which QEMU tells where a VM is.
const RARP: [u8; 2] = [0x80, 0x35];
/// Of a frame's direction: it goes to the guest. PACKET_OUTGOING, packet(7).
const TO_GUEST: u8 = 4;

/// Whether anybody still waits is looked at so often.
const LOOK_MS: i64 = 200;

/// Begins to listen at a tap, on a thread that ends with what is returned: when the guest first speaks, or an error where the tap
/// goes before that.
///
/// # Errors
/// If there is no such tap, or the kernel refuses.
pub(super) fn listen(tap: &str) -> io::Result<oneshot::Receiver<Instant>> {
    let mut addresses = getifaddrs()?.filter(|address| address.interface_name == tap);
    let link = addresses.find_map(|found| found.address?.as_link_addr().copied());
    let link = link.ok_or(io::ErrorKind::NotFound)?;
    let (family, kind) = (AddressFamily::Packet, SockType::Raw);
    let socket = socket::socket(family, kind, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
    socket::setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
    socket::setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(LOOK_MS))?;
    socket::bind(socket.as_raw_fd(), &link)?;
    let (tell, first) = oneshot::channel();
    std::thread::Builder::new()
        .name("ear".to_owned())
        .spawn(move || hear_first(&socket, link.ifindex(), tell))?;
    Ok(first)
}

fn hear_first(socket: &OwnedFd, index: usize, tell: oneshot::Sender<Instant>) {
    while !tell.is_closed() {
        match hear(socket, index) {
            Ok(Some(age)) => {
                let now = Instant::now();
                // Whoever asked may have gone.
                let _ = tell.send(now.checked_sub(age).unwrap_or(now));
                return;
            }
            Ok(None) | Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(_) => return,
        }
    }
}

/// Takes the next frame; how long ago it came, if it is the guest's own.
fn hear(socket: &OwnedFd, index: usize) -> nix::Result<Option<Duration>> {
    let mut header = [0; HEADER_BYTES];
    let mut space = cmsg_space!(TimeSpec);
    let mut parts = [IoSliceMut::new(&mut header)];
    let frame = socket::recvmsg::<LinkAddr>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::empty(),
    )?;
    // Before it was bound, it heard all devices.
    let from_guest = frame
        .address
        .is_some_and(|from| from.ifindex() == index && from.pkttype() != TO_GUEST);
    let came = frame.cmsgs()?.find_map(|told| match told {
        ControlMessageOwned::ScmTimestampns(came) => Some(came),
        _ => None,
    });
    let own = from_guest && header[12..] != RARP;
    Ok(own.then_some(age(came)?))
}

/// How long ago that was, by the clock that the kernel marks frames with.
fn age(came: Option<TimeSpec>) -> nix::Result<Duration> {
    let Some(came) = came else {
        return Ok(Duration::ZERO);
    };
    let age = clock_gettime(ClockId::CLOCK_REALTIME)? - came;
    // That clock may have been set meanwhile.
    Ok(Duration::from_nanos(
        u64::try_from(age.num_nanoseconds()).unwrap_or(0),
    ))
}
