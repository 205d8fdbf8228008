//! The lab's network: one bridge, and for each host a network namespace with a cable to it.
//! Called when a lab goes up or down. It touches only interfaces and namespaces named after the lab.

use std::fs;
use std::path::Path;

use anyhow::bail;

use super::layout::{Host, Layout};
use super::run::run;

const NAMESPACES: &str = "/run/netns";

/// Makes the bridge and gives it the controller's address.
///
/// # Errors
/// If the network is in use on this machine, or a command fails.
pub async fn make_bridge(layout: &Layout) -> anyhow::Result<()> {
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
    ip(&format!("link set {bridge} up")).await
}

/// Makes a host's namespace and its cable.
///
/// # Errors
/// If a command fails.
pub async fn connect(layout: &Layout, host: &Host) -> anyhow::Result<()> {
    let (namespace, veth) = (&host.namespace, &host.veth);
    ip(&format!("netns add {namespace}")).await?;
    ip(&format!(
        "link add {veth} type veth peer name eth0 netns {namespace}"
    ))
    .await?;
    ip(&format!("link set {veth} master {} up", layout.bridge())).await?;
    ip(&format!("-n {namespace} link set lo up")).await?;
    ip(&format!("-n {namespace} address add {}/24 dev eth0", host.ip)).await?;
    ip(&format!("-n {namespace} link set eth0 up")).await
}

/// Removes the namespaces and the bridge, those that are there. All processes in them must be gone.
///
/// # Errors
/// If a command fails.
pub async fn remove(layout: &Layout, hosts: &[Host]) -> anyhow::Result<()> {
    for host in hosts {
        // The cable first: a namespace takes its end with it only some time after it is deleted.
        remove_interface(&host.veth).await?;
        if has_namespace(host) {
            ip(&format!("netns delete {}", host.namespace)).await?;
        }
    }
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
    has_namespace(host) || has_interface(&host.veth)
}

fn has_namespace(host: &Host) -> bool {
    Path::new(NAMESPACES).join(&host.namespace).exists()
}

/// Whether the folder that `ip netns` keeps is on this machine already.
#[must_use]
pub fn namespaces_folder_exists() -> bool {
    Path::new(NAMESPACES).exists()
}

/// Removes the folder that `ip netns` keeps, if it is empty. Only for a lab that was its first user.
pub async fn remove_namespaces_folder() {
    let is_empty = fs::read_dir(NAMESPACES).is_ok_and(|mut entries| entries.next().is_none());
    if is_empty {
        // It is a mount on itself; where it is not, unmounting fails and removing still works.
        let _ = run("umount", [NAMESPACES]).await;
        let _ = fs::remove_dir(NAMESPACES);
    }
}

fn has_interface(name: &str) -> bool {
    Path::new("/sys/class/net").join(name).exists()
}

async fn ip(words: &str) -> anyhow::Result<()> {
    run("ip", words.split(' ')).await.map(drop)
}
