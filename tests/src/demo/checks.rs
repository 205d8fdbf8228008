//! Comparisons of what Dalgu says with what libvirt says. Used by the demonstration's steps.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_proto::v1::PowerState;

use super::Scene;
use crate::lab::wait_for;

/// Where each VM is, by its UUID: host, and whether it runs.
type Places = BTreeMap<String, (String, bool)>;

/// What libvirt on all hosts says.
///
/// # Errors
/// If a libvirtd does not answer, or two hosts have the same domain.
pub async fn by_libvirt(scene: &Scene<'_>) -> anyhow::Result<Places> {
    let mut places = Places::new();
    for host in scene.lab.hosts() {
        let running = uuids(&scene.lab.virsh(host.number, &["list", "--uuid"]).await?);
        for uuid in uuids(&scene.lab.virsh(host.number, &["list", "--uuid", "--all"]).await?) {
            let runs = running.contains(&uuid);
            let other = places.insert(uuid.clone(), (host.name.clone(), runs));
            ensure!(other.is_none(), "domain {uuid} is on two hosts");
        }
    }
    Ok(places)
}

fn uuids(list: &str) -> Vec<String> {
    list.split_whitespace().map(str::to_owned).collect()
}

/// What Dalgu says.
///
/// # Errors
/// If the controller does not answer.
pub async fn by_dalgu(scene: &Scene<'_>) -> anyhow::Result<Places> {
    let vms = scene.operator.all_vms().await?;
    Ok(vms
        .into_values()
        .map(|vm| {
            let status = vm.status.unwrap_or_default();
            let runs = status.power_state() == PowerState::Running;
            (vm.uid, (status.host, runs))
        })
        .collect())
}

/// Waits until both say the same.
///
/// # Errors
/// If they do not within some reports; the error tells both.
pub async fn agreement(scene: &Scene<'_>) -> anyhow::Result<Places> {
    let same = async || match (by_dalgu(scene).await, by_libvirt(scene).await) {
        (Ok(dalgu), Ok(libvirt)) => dalgu == libvirt,
        _ => false,
    };
    let outcome = wait_for("agreement of Dalgu and libvirt", Duration::from_secs(10), same).await;
    let (dalgu, libvirt) = (by_dalgu(scene).await?, by_libvirt(scene).await?);
    outcome.with_context(|| format!("Dalgu says {dalgu:?}, libvirt says {libvirt:?}"))?;
    Ok(dalgu)
}

/// The number of a host of the lab, by its name.
///
/// # Errors
/// If there is no such host.
pub fn number_of(scene: &Scene<'_>, name: &str) -> anyhow::Result<u8> {
    let hosts = scene.lab.hosts();
    let host = hosts.iter().find(|host| host.name == name);
    Ok(host.with_context(|| format!("no host {name}"))?.number)
}
