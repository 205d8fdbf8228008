//! The lab's network: one bridge for the hosts, one for their guests, and for each host a network namespace with a
//! cable to both: `eth0` bears the host's address, `eth1` is a port of the host's own bridge `br0`, for guests.
//! Called when a lab goes up or down. It touches only interfaces and namespaces named after the lab.

use std::path::Path;

use anyhow::bail;

use super::layout::{Host, Layout};
use super::run::run;

/// The folder where `ip` keeps network namespaces.
pub const NAMESPACES: &str = "/run/netns";

/// A host's bridge for its guests.
const GUEST_BRIDGE: &str = "br0";

/// Makes both bridges and gives the hosts' one the controller's address.
///
/// # Errors
/// If the network is in use on this machine, or a command fails.
pub async fn make_bridges(layout: &Layout) -> anyhow::Result<()> {
    let network = layout.network();
    let subnet = format!("{network}.0/24");
    let taken = run("ip", ["-4", "route", "show", subnet.as_str()]).await?;
    if !taken.trim().is_empty() {
        bail!(
            "the network {subnet} is in use on this machine ({}): choose another lab with --id",
            taken.trim()
        );
    }
    let bridge = layout.bridge();
    ip(&format!("link add {bridge} type bridge")).await?;
    ip(&format!("address add {network}.1/24 dev {bridge}")).await?;
    ip(&format!("link set {bridge} up")).await?;
    let guests = layout.guest_bridge();
    ip(&format!("link add {guests} type bridge")).await?;
    ip(&format!("link set {guests} up")).await
}

/// Makes a host's namespace and its cables.
///
/// # Errors
/// If a command fails.
pub async fn connect(layout: &Layout, host: &Host) -> anyhow::Result<()> {
    let namespace = &host.namespace;
    ip(&format!("netns add {namespace}")).await?;
    let cables = [
        (&host.veth, "eth0", layout.bridge()),
        (&host.guest_veth, "eth1", layout.guest_bridge()),
    ];
    for (outer, inner, bridge) in cables {
        ip(&format!(
            "link add {outer} type veth peer name {inner} netns {namespace}"
        ))
        .await?;
        ip(&format!("link set {outer} master {bridge} up")).await?;
    }
    let inside = async |words: &str| ip(&format!("-n {namespace} {words}")).await;
    inside("link set lo up").await?;
    inside(&format!("address add {}/24 dev eth0", host.ip)).await?;
    inside("link set eth0 up").await?;
    inside(&format!("link add {GUEST_BRIDGE} type bridge")).await?;
    inside(&format!("link set eth1 master {GUEST_BRIDGE} up")).await?;
    inside(&format!("link set {GUEST_BRIDGE} up")).await
}

/// Removes the namespaces and the bridges, those that are there. All processes in them must be gone.
///
/// # Errors
/// If a command fails.
pub async fn remove(layout: &Layout, hosts: &[Host]) -> anyhow::Result<()> {
    for host in hosts {
        // The cables first: a namespace takes its ends with it only some time after it is deleted.
        remove_interface(&host.veth).await?;
        remove_interface(&host.guest_veth).await?;
        if has_namespace(host) {
            ip(&format!("netns delete {}", host.namespace)).await?;
        }
    }
    remove_interface(&layout.guest_bridge()).await?;
    remove_interface(&layout.bridge()).await
}

async fn remove_interface(name: &str) -> anyhow::Result<()> {
    if !has_interface(name) {
        return Ok(());
    }
    match ip(&format!("link delete {name}")).await {
        Err(error) if has_interface(name) => Err(error),
        _ => Ok(()),
    }
}

/// Whether anything of the host's network exists.
#[must_use]
pub fn is_there(host: &Host) -> bool {
    has_namespace(host) || has_interface(&host.veth) || has_interface(&host.guest_veth)
}

fn has_namespace(host: &Host) -> bool {
    Path::new(NAMESPACES).join(&host.namespace).exists()
}

fn has_interface(name: &str) -> bool {
    Path::new("/sys/class/net").join(name).exists()
}

async fn ip(words: &str) -> anyhow::Result<()> {
    run("ip", words.split(' ')).await.map(drop)
}
