//! What no VM may say, whatever runs in it: no router, no DHCP server, nothing in the name of another; and not in pieces either.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_agent::network::names;
use dalgu_tests::e2e::network::forged::{self, End, Forge};
use dalgu_tests::e2e::network::heard::Heard;
use dalgu_tests::e2e::network::site::{self, NETWORK, Site};
use dalgu_tests::e2e::{self, REST_LIMIT};
use dalgu_tests::lab::{wait_for, with_lab};

const PROBE: End = end(200);
const DESK: End = end(10);
/// Another VM, whose name is used.
const WEB: End = end(11);
/// A client without an address, and everybody.
const NOBODY: End = End {
    ipv4: Ipv4Addr::UNSPECIFIED,
    ..DESK
};
const EVERYBODY: End = End {
    mac: [0xff; 6],
    ipv4: Ipv4Addr::BROADCAST,
    ipv6: Ipv6Addr::UNSPECIFIED,
};

const fn end(last: u8) -> End {
    End {
        mac: [0x52, 0x54, 0, 0, 0x20, last],
        ipv4: Ipv4Addr::new(10, 20, 0, last),
        ipv6: Ipv6Addr::new(0xfd20, 0, 0, 0, 0, 0, 0, last as u16),
    }
}

/// Types of ICMPv6: RFC 4861.
const ROUTER: u8 = 134;
const NEIGHBOUR: u8 = 136;
const REDIRECT: u8 = 137;

/// What is said, in one frame or in pieces, and by what it is known wherever it is heard.
struct Said {
    what: &'static str,
    frames: Vec<Vec<u8>>,
    mark: [u8; 8],
}

/// A list of what is said, each with a mark of its own.
#[derive(Default)]
struct Says {
    list: Vec<Said>,
    kind: u8,
}

impl Says {
    fn new(kind: u8) -> Self {
        Self {
            list: Vec::new(),
            kind,
        }
    }

    /// As a whole, and in pieces.
    fn say(&mut self, what: &'static str, frame: impl Fn(&[u8]) -> Vec<u8>) {
        for pieces in [false, true] {
            let number = u8::try_from(self.list.len()).unwrap_or(u8::MAX);
            let mark = [b'f', b'o', b'r', b'g', b'e', b'd', self.kind, number];
            let frame = frame(&mark);
            let frames = match pieces {
                true => forged::in_pieces(&frame).into(),
                false => vec![frame],
            };
            self.list.push(Said { what, frames, mark });
        }
    }
}

/// About an address: ICMPv6's content from byte 8 on, with an option that nobody knows (253, RFC 4727) for the mark.
fn about(address: Ipv6Addr, more: &[u8], mark: &[u8]) -> Vec<u8> {
    let option = [&[253, 2, 0, 0, 0, 0, 0, 0][..], mark].concat();
    [&address.octets(), more, &option].concat()
}

/// What a DHCP client asks, by its hardware address: RFC 2131, section 2. The mark is in the server's name.
fn asks(client: End, mark: &[u8]) -> Vec<u8> {
    let mut asks = vec![1, 1, 6, 0];
    asks.resize(28, 0);
    asks.extend(client.mac);
    asks.resize(44, 0);
    asks.extend(mark);
    asks.resize(240, 0);
    asks
}

fn allowed() -> Vec<Said> {
    let mut says = Says::new(b'+');
    says.say("a datagram", |mark| forged::udp(DESK, PROBE, (5000, 7), mark));
    says.say("a datagram over IPv6", |mark| {
        forged::udp6(DESK, PROBE, (5000, 7), mark)
    });
    says.say("where it is itself", |mark| {
        forged::to_all(DESK, NEIGHBOUR, [0x20, 0, 0, 0], &about(DESK.ipv6, &[], mark))
    });
    says.list
}

fn refused() -> Vec<Said> {
    let mut says = Says::new(b'-');
    for (from, to) in [(67, 68), (547, 68), (5000, 68), (67, 7)] {
        says.say("a DHCP server", |mark| forged::udp(DESK, PROBE, (from, to), mark));
    }
    for (from, to) in [(547, 546), (67, 546), (5000, 546), (547, 7)] {
        says.say("a DHCPv6 server", |mark| {
            forged::udp6(DESK, PROBE, (from, to), mark)
        });
    }
    // A router for half an hour; its times are the first half of what stands where others have an address.
    says.say("a router", |mark| {
        let times = about(Ipv6Addr::UNSPECIFIED, &[], mark);
        forged::to_all(DESK, ROUTER, [64, 0, 7, 8], &times[8..])
    });
    says.say("a better way", |mark| {
        let about = about(DESK.ipv6, &PROBE.ipv6.octets(), mark);
        forged::to_all(DESK, REDIRECT, [0; 4], &about)
    });
    says.say("where another is", |mark| {
        forged::to_all(DESK, NEIGHBOUR, [0x20, 0, 0, 0], &about(WEB.ipv6, &[], mark))
    });
    says.list
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn no_vm_is_a_router_or_a_dhcp_server_or_speaks_for_another_not_even_in_pieces() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        let site = Site::new(lab).await?;
        site.create("desk", 10, "h1", &[], "").await?;
        site.join(1).await?;
        let namespace = &lab.layout().host(1).namespace;
        let tap = site.tap("desk").await?;
        let host = Heard::new(namespace).await?;
        let service = names::device(names::SERVICE, &NETWORK.parse()?);
        let (sent, served) = (host.at(&tap).await?, host.at(&service).await?);
        let heard = site.listen().await?;
        let forge = Forge::new(namespace, &tap).await?;

        let mut refused = refused();
        let mut allowed = allowed();
        let asks =
            |client: End| move |mark: &[u8]| forged::udp(NOBODY, EVERYBODY, (68, 67), &asks(client, mark));
        let mut questions = [Says::new(b'n'), Says::new(b'o')];
        questions[0].say("a question of its own", asks(DESK));
        questions[1].say("a question for another's address", asks(WEB));
        let [mut own, others] = questions.map(|questions| questions.list);
        // Whoever has no address yet asks in one piece.
        own.retain(|said| said.frames.len() == 1);
        // Where it comes out: at the machine beside, or where the host serves.
        let missing = || {
            let here = allowed.iter().filter(|said| heard.holding(&said.mark) == 0);
            let missing = here.chain(own.iter().filter(|said| served.holding(&said.mark) == 0));
            missing
                .map(|said| (said.what, said.frames.len()))
                .collect::<Vec<_>>()
        };
        wait_for("what it may say, after what it may not", REST_LIMIT, async || {
            for said in [&refused, &others, &allowed, &own].into_iter().flatten() {
                for frame in &said.frames {
                    forge.send(frame).expect("its way to the tap");
                }
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
            missing().is_empty()
        })
        .await
        .with_context(|| format!("it does not come, in so many frames: {:?}", missing()))?;
        let came = |said: &&Said| heard.holding(&said.mark) + served.holding(&said.mark) > 0;
        refused.extend(others);
        let got_out: Vec<_> = refused
            .iter()
            .filter(came)
            .map(|said| (said.what, said.frames.len()))
            .collect();
        ensure!(got_out.is_empty(), "it got out, in so many frames: {got_out:?}");
        // Each of them was at the tap.
        allowed.extend(own);
        for said in refused.iter().chain(&allowed) {
            ensure!(sent.holding(&said.mark) > 0, "it was not tried: {}", said.what);
        }
        ensure!(
            site::mac(10) == "52:54:00:00:20:0a",
            "the frames bear the VM's own address"
        );
        Ok(())
    })
    .await
}
