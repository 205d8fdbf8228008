//! Cables that drop packets: all, or only those of one direction. Used by the faults and by the tests of incidents.
//!
//! Packets are dropped by `nft` inside the network namespace of a host of the lab, never in the machine's own.

use crate::lab::{self, Lab};

/// Which packets are dropped, seen from the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// All.
    Both,
    /// Those that come.
    In,
    /// Those that go.
    Out,
}

/// Drops packets between a host and another one, or the controller where there is no peer.
///
/// # Errors
/// If `nft` fails.
pub async fn cut(lab: &Lab, host: u8, peer: Option<u8>, way: Way) -> anyhow::Result<()> {
    let layout = lab.layout();
    let controller = layout.controller_address();
    let address = match peer {
        Some(peer) => layout.host(peer).ip,
        None => controller.split(':').next().unwrap_or_default().to_owned(),
    };
    let incoming = format!("chain i {{ type filter hook input priority 0; ip saddr {address} drop; }};");
    let outgoing = format!("chain o {{ type filter hook output priority 0; ip daddr {address} drop; }};");
    let chains = match way {
        Way::Both => format!("{incoming} {outgoing}"),
        Way::In => incoming,
        Way::Out => outgoing,
    };
    nft(lab, host, format!("table ip {} {{ {chains} }}", table(peer))).await
}

/// Lets them pass again.
///
/// # Errors
/// If `nft` fails.
pub async fn mend(lab: &Lab, host: u8, peer: Option<u8>) -> anyhow::Result<()> {
    nft(lab, host, format!("delete table ip {}", table(peer))).await
}

fn table(peer: Option<u8>) -> String {
    format!("chaos_{}", peer.unwrap_or(0))
}

async fn nft(lab: &Lab, host: u8, words: String) -> anyhow::Result<()> {
    let namespace = lab.layout().host(host).namespace;
    let into = ["netns", "exec", &namespace, "nft", &words];
    lab::run("ip", into).await.map(drop)
}
