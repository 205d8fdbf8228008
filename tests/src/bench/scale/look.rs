//! What an operator reads of a large site, and whether it is right: every VM once, with the owner it had, and no word on it
//! that is older than the controller.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail, ensure};
use dalgu_proto::v1;
use jiff::Timestamp;

use crate::operator::Operator;

/// Largest page there is.
const PAGE: i32 = 1000;

/// Every VM by its id, read page by page.
///
/// # Errors
/// If the controller does not answer, or a VM is listed twice.
pub async fn all_vms(operator: &Operator) -> anyhow::Result<BTreeMap<String, v1::Vm>> {
    let mut found = BTreeMap::new();
    let mut request = v1::ListVmsRequest {
        page_size: PAGE,
        ..v1::ListVmsRequest::default()
    };
    loop {
        let page = operator.vms().list_vms(request.clone()).await;
        let page = page.context("list VMs")?.into_inner();
        for vm in page.vms {
            if let Some(twice) = found.insert(vm.uid.clone(), vm) {
                bail!("{} is listed twice", twice.name);
            }
        }
        if page.next_page_token.is_empty() {
            return Ok(found);
        }
        request.page_token = page.next_page_token;
    }
}

/// Every host by its name, read page by page.
///
/// # Errors
/// If the controller does not answer.
pub async fn all_hosts(operator: &Operator) -> anyhow::Result<BTreeMap<String, v1::Host>> {
    let mut found = BTreeMap::new();
    let mut request = v1::ListHostsRequest {
        page_size: PAGE,
        ..v1::ListHostsRequest::default()
    };
    loop {
        let page = operator.hosts().list_hosts(request.clone()).await;
        let page = page.context("list hosts")?.into_inner();
        found.extend(page.hosts.into_iter().map(|host| (host.name.clone(), host)));
        if page.next_page_token.is_empty() {
            return Ok(found);
        }
        request.page_token = page.next_page_token;
    }
}

fn owner(vm: &v1::Vm) -> &str {
    vm.status.as_ref().map_or("", |status| &status.host)
}

/// Checks that every VM of `expected` is there with its owner, and none that is not.
///
/// # Errors
/// If one is missing, has another owner, or is one too many.
pub fn same(expected: &BTreeMap<String, v1::Vm>, found: &BTreeMap<String, v1::Vm>) -> anyhow::Result<()> {
    for (uid, vm) in expected {
        let now = found
            .get(uid)
            .with_context(|| format!("{} is not listed any more", vm.name))?;
        ensure!(
            owner(now) == owner(vm),
            "{} was on {} and is said to be on {}",
            vm.name,
            owner(vm),
            owner(now)
        );
    }
    let more = found.iter().find(|(uid, _)| !expected.contains_key(*uid));
    ensure!(more.is_none(), "nobody made {more:?}");
    Ok(())
}

/// Checks that of each VM only that is said which its host has told since `start`; of the others, that nothing is known.
/// Hosts are to be read after the VMs.
///
/// # Errors
/// If a state is shown that nobody can have told.
pub fn fresh(
    vms: &BTreeMap<String, v1::Vm>,
    hosts: &BTreeMap<String, v1::Host>,
    start: Timestamp,
) -> anyhow::Result<usize> {
    let mut known = 0;
    for vm in vms.values() {
        let status = vm.status.as_ref().context("a VM has a status")?;
        if status.power_state() == v1::PowerState::Unspecified {
            let honest = matches!(status.state(), v1::VmState::Unreachable | v1::VmState::Pending);
            ensure!(
                honest,
                "{} is shown as {:?} and nobody said so",
                vm.name,
                status.state()
            );
            continue;
        }
        let host = hosts.get(&status.host).context("the owner is a host")?;
        let told = host
            .report_time
            .as_ref()
            .is_some_and(|time| (time.seconds, time.nanos) >= (start.as_second(), start.subsec_nanosecond()));
        ensure!(
            told,
            "{} is shown as {:?} before {} has reported",
            vm.name,
            status.state(),
            host.name
        );
        known += 1;
    }
    Ok(known)
}
