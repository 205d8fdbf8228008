//! Images of the catalogue: where their copies are and should be, and what VMs are made from.
//!
//! ```text
//!   AwaitingUpload ──all bytes came──> Importing ──its host says so──> Available ──asked for──> Deleting ──> gone
//!         └──── its host is gone ───────> Failed <── refused ───┘
//! ```
//!
//! [`plan`] reads from a state what has come to be and what is to be done (pure), [`runner`] does it, [`resolve`] finds the
//! image that a new VM asks for (pure). Hosts are asked for nothing that the catalogue does not know: an image that a
//! restored store has forgotten stays where it is.

pub mod plan;
pub mod resolve;
pub mod runner;

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;

use dalgu_proto::{
    ids::HostName,
    image::Digest,
    vm::{CloneMode, Disk},
};
use imbl::OrdSet;

use crate::{
    hosts,
    model::{HostState, ImagePhase, VmRecord},
    state::State,
};

/// Sources that a host is told of at most.
const SOURCES: usize = 8;

/// Hosts that have a copy, for a host that is to fetch it: those that are heard from first, and of these for each
/// destination another one first, so that not all read from the same.
pub fn sources(state: &State, digest: &Digest, destination: &HostName) -> Vec<(HostName, String)> {
    let holders = holders(state, digest).filter(|host| *host != destination);
    let (mut heard, silent): (Vec<_>, Vec<_>) =
        holders.partition(|host| hosts::state_of(state, host) == HostState::Ready);
    if !heard.is_empty() {
        let turn = heard.len();
        heard.rotate_left(spread(destination) % turn);
    }
    let all = heard.into_iter().chain(silent);
    let reached = all.filter_map(|host| Some((host.clone(), state.hosts.get(host)?.address.clone())));
    reached.take(SOURCES).collect()
}

/// Hosts that have a whole copy.
pub fn holders<'a>(state: &'a State, digest: &'a Digest) -> impl Iterator<Item = &'a HostName> {
    let hosts = state.image_hosts.get(digest).into_iter().flatten();
    hosts.filter(move |host| {
        let stock = state.live.get(*host).and_then(|live| live.images.as_ref());
        stock.is_some_and(|stock| stock.has(digest))
    })
}

/// A number that differs from host to host, and stays the same.
fn spread(host: &HostName) -> usize {
    host.as_str().bytes().fold(0, |sum, byte| {
        sum.wrapping_mul(31).wrapping_add(usize::from(byte))
    })
}

/// Size of a copy, by the catalogue or else by the word of a host that has one.
pub fn stored_bytes(state: &State, digest: &Digest) -> u64 {
    let images = state.image_digests.get(digest).into_iter().flatten();
    let mut listed = images.filter_map(|id| state.images.get(id)?.content.as_ref());
    if let Some(content) = listed.next() {
        return content.stored_bytes;
    }
    let told =
        holders(state, digest).filter_map(|host| state.live.get(host)?.images.as_ref()?.copies.get(digest));
    told.map(|held| held.bytes_total).max().unwrap_or(0)
}

/// Digests of the images that a host needs for a VM's disks, each once: to make them, or, where it has been made, for an
/// overlay, which is nothing without its image.
pub fn needed(vm: &VmRecord) -> Vec<&Digest> {
    let overlays = |disk: &&Disk| disk.clone_mode == CloneMode::Overlay;
    let disks = vm.spec.disks.iter().filter(overlays).chain(vm.unmade());
    let mut digests: Vec<_> = disks.filter_map(|disk| disk.digest.as_ref()).collect();
    digests.sort_unstable();
    digests.dedup();
    digests
}

/// Hosts that have a copy of each of these images, or are about to.
pub fn at<'a>(state: &State, digests: impl IntoIterator<Item = &'a Digest>) -> Vec<OrdSet<HostName>> {
    let hosts = |digest: &Digest| state.image_hosts.get(digest).cloned().unwrap_or_default();
    digests.into_iter().map(hosts).collect()
}

/// Bytes that a host has of the images that it needs for a VM.
pub fn bytes_there(state: &State, vm: &VmRecord, host: &HostName) -> u64 {
    let stock = state.live.get(host).and_then(|live| live.images.clone());
    let stock = stock.unwrap_or_default();
    let held = needed(vm)
        .into_iter()
        .filter_map(|digest| stock.copies.get(digest));
    held.map(|held| match held.phase {
        ImagePhase::Ready => held.bytes_total,
        _ => held.bytes_done,
    })
    .fold(0, u64::saturating_add)
}
