//! Usage of Dalgu's running domains, from libvirt's bulk statistics. Called by [`super::Libvirt::usage`] on a worker.
//!
//! One call serves all domains. It is told not to wait for domains that are busy; one whose QEMU hangs costs the call
//! that first meets it its deadline, and is left out from then on.

use std::collections::HashMap;

use dalgu_proto::{
    host::{VmBlock, VmNic, VmUsage},
    ids::{ClusterId, VmId},
};
use jiff::Timestamp;
use virt::connect::Connect;
use virt_sys as sys;

use super::{
    domain::Ours,
    error::general,
    ffi::{self, Params, Stats},
    read::Names,
};
use crate::hypervisor::Error;

const KINDS: u32 = sys::VIR_DOMAIN_STATS_STATE
    | sys::VIR_DOMAIN_STATS_CPU_TOTAL
    | sys::VIR_DOMAIN_STATS_BALLOON
    | sys::VIR_DOMAIN_STATS_VCPU
    | sys::VIR_DOMAIN_STATS_INTERFACE
    | sys::VIR_DOMAIN_STATS_BLOCK;
const FLAGS: u32 =
    sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_RUNNING | sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT;
const NANOSECONDS: f64 = 1e9;

/// Names of devices by domain and run; `None` for domains that are not Dalgu's. Where there are other devices than these, they are
/// looked for anew.
pub(super) type Known = HashMap<(VmId, u32), Option<Names>>;

/// Usage of all that runs, and what is now known of their names.
pub(super) fn collect(
    connect: &Connect,
    cluster: ClusterId,
    known: &Known,
) -> Result<(Vec<(VmId, VmUsage)>, Known), Error> {
    let all = ffi::all_stats(connect, KINDS, FLAGS).map_err(|error| general("usage", &error))?;
    let now = Timestamp::now();
    let (mut usage, mut renewed) = (Vec::new(), Known::new());
    for stats in all {
        let key = (VmId::from_uuid(stats.id), stats.run);
        let names = match known
            .get(&key)
            .filter(|names| covers(names.as_ref(), &stats.params))
        {
            Some(names) => names.clone(),
            None => match names_of(connect, key.0, cluster) {
                Err(Error::NotFound { .. }) => continue,
                names => names?,
            },
        };
        if let Some(names) = &names
            && answered(&stats)
        {
            usage.push((key.0, of_one(&stats.params, names, now)));
        }
        renewed.insert(key, names);
    }
    Ok((usage, renewed))
}

/// Whether there are names for just so many devices.
fn covers(names: Option<&Names>, params: &Params) -> bool {
    let count = |name: &str| params.count(name).and_then(|count| usize::try_from(count).ok());
    names.is_none_or(|names| {
        let disks = count("block.count").is_none_or(|count| count == names.disks.len());
        disks && count("net.count").is_none_or(|count| count == names.nics.len())
    })
}

/// Statistics of a domain that was busy lack what is told only to the holder of its job.
fn answered(stats: &Stats) -> bool {
    stats.params.count("cpu.time").is_some() && stats.params.count("balloon.rss").is_some()
}

fn names_of(connect: &Connect, id: VmId, cluster: ClusterId) -> Result<Option<Names>, Error> {
    match Ours::find("usage", connect, id, cluster) {
        Err(Error::Foreign { .. }) => Ok(None),
        ours => Ok(ours?.names()?),
    }
}

#[allow(
    clippy::cast_precision_loss,
    reason = "nanoseconds of processor time: 2^53 are 104 days to the nanosecond"
)]
fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / NANOSECONDS
}

/// One domain's usage. Names of parameters: virConnectGetAllDomainStats.
fn of_one(params: &Params, names: &Names, now: Timestamp) -> VmUsage {
    let kib = |name: &str| params.count(name).unwrap_or(0).saturating_mul(1024);
    VmUsage {
        sample_time: now,
        cpu_seconds_total: seconds(params.count("cpu.time").unwrap_or(0)),
        cpu_wait_seconds_total: seconds(each(params, "vcpu", "maximum", "delay").sum()),
        cpus_busy: 0.0,
        rates_valid: false,
        memory_resident_bytes: kib("balloon.rss"),
        memory_balloon_bytes: kib("balloon.current"),
        memory_unused_bytes: kib("balloon.unused"),
        blocks: names
            .disks
            .iter()
            .filter_map(|(target, name)| block(params, target, name))
            .collect(),
        nics: names
            .nics
            .iter()
            .filter_map(|(target, name)| nic(params, target, name))
            .collect(),
    }
}

fn each<'a>(
    params: &'a Params,
    group: &'a str,
    count: &str,
    field: &'a str,
) -> impl Iterator<Item = u64> + 'a {
    let count = params.count(&format!("{group}.{count}")).unwrap_or(0);
    (0..count).filter_map(move |index| params.count(&format!("{group}.{index}.{field}")))
}

/// Number of the device with this name in a group.
fn find(params: &Params, group: &str, target: &str) -> Option<u64> {
    let count = params.count(&format!("{group}.count"))?;
    (0..count).find(|index| params.text(&format!("{group}.{index}.name")) == Some(target))
}

fn block(params: &Params, target: &str, name: &str) -> Option<VmBlock> {
    let index = find(params, "block", target)?;
    let count = |field: &str| params.count(&format!("block.{index}.{field}")).unwrap_or(0);
    Some(VmBlock {
        name: name.to_owned(),
        read_bytes_total: count("rd.bytes"),
        write_bytes_total: count("wr.bytes"),
        read_requests_total: count("rd.reqs"),
        write_requests_total: count("wr.reqs"),
        allocation_bytes: count("physical"),
        capacity_bytes: count("capacity"),
    })
}

/// libvirt swaps a tap device's directions, so they are the guest's.
fn nic(params: &Params, target: &str, name: &str) -> Option<VmNic> {
    let index = find(params, "net", target)?;
    let count = |field: &str| params.count(&format!("net.{index}.{field}")).unwrap_or(0);
    Some(VmNic {
        name: name.to_owned(),
        receive_bytes_total: count("rx.bytes"),
        transmit_bytes_total: count("tx.bytes"),
        receive_packets_total: count("rx.pkts"),
        transmit_packets_total: count("tx.pkts"),
        errors_total: count("rx.errs") + count("tx.errs"),
        drops_total: count("rx.drop") + count("tx.drop"),
    })
}
