//! The demonstration's steps about hosts: live figures, and the ways in besides `dalgu` (metrics, gRPC).

use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_proto::v1::{Host, HostState};

use super::Scene;
use crate::lab::wait_for;

/// curl with the operator's certificate, as `lab-env` lets one write it.
const CURL: &str = "curl -sS --cacert $DALGU_LAB_DIR/operator/ca.pem --cert $DALGU_LAB_DIR/operator/admin.pem \\\n    --key $DALGU_LAB_DIR/operator/admin.key";

/// Shows the hosts' processors, memory and network interfaces, and checks that the figures live.
///
/// # Errors
/// If a host is not ready, or its figures stand still.
pub async fn figures(scene: &mut Scene<'_>) -> anyhow::Result<()> {
    let hosts = scene.lab.hosts();
    let ready = async || match scene.operator.all_hosts().await {
        Ok(found) => found.len() == hosts.len() && found.values().all(has_figures),
        Err(_) => false,
    };
    wait_for("figures of every host", Duration::from_secs(20), ready).await?;
    scene.stage.show_ok("dalgu host list").await?;
    let first = hosts.first().context("a lab has hosts")?.name.clone();
    scene.stage.show_ok(&format!("dalgu host show {first}")).await?;

    let before = scene.operator.all_hosts().await?;
    let moved = async || match scene.operator.all_hosts().await {
        Ok(now) => now
            .iter()
            .all(|(name, host)| before.get(name).is_some_and(|old| has_moved(old, host))),
        Err(_) => false,
    };
    wait_for("new figures of every host", Duration::from_secs(20), moved).await?;
    scene.stage.proved(format!(
        "{} hosts are ready and report live figures: CPU, memory, and bytes through each network interface",
        hosts.len()
    ));
    Ok(())
}

fn has_figures(host: &Host) -> bool {
    let Some(usage) = &host.usage else { return false };
    host.state() == HostState::Ready
        && usage.rates_valid
        && usage
            .memory
            .as_ref()
            .is_some_and(|memory| memory.total_bytes > 0 && memory.available_bytes > 0)
        && usage.nics.iter().any(|nic| nic.name == "eth0" && nic.rates_valid)
}

/// Whether processor time and network bytes were counted between two samples.
fn has_moved(old: &Host, new: &Host) -> bool {
    let bytes = |host: &Host| {
        let usage = host.usage.as_ref()?;
        usage
            .nics
            .iter()
            .find(|nic| nic.name == "eth0")
            .map(|nic| nic.transmit_bytes_total)
    };
    let cpu = |host: &Host| {
        let cpu = host.usage.as_ref()?.cpu.as_ref()?;
        Some(cpu.user_seconds_total + cpu.system_seconds_total + cpu.idle_seconds_total)
    };
    bytes(new) > bytes(old) && cpu(new) > cpu(old)
}

/// Shows the metrics pages of the controller and of an agent, and the gRPC API without `dalgu`.
///
/// # Errors
/// If a page or the API does not answer, or lacks what it should have.
pub async fn interfaces(scene: &mut Scene<'_>) -> anyhow::Result<()> {
    scene.stage.heading("Metrics for Prometheus, over mutual TLS");
    let host = scene.operator.host_of("web").await?;
    let agent = {
        let hosts = scene.lab.hosts();
        let host = hosts
            .iter()
            .find(|found| found.name == host)
            .context("the VM's host is in the lab")?;
        format!("{CURL} https://{}/metrics", host.agent_address())
    };
    let controller = format!("{CURL} https://$DALGU_LAB_ENDPOINT/metrics");
    scene
        .stage
        .show_ok(&format!("{controller} | grep -v '^#' | sed -n '1,8p'"))
        .await?;
    wait_for(
        "a sample of web after its move",
        Duration::from_secs(20),
        async || {
            let page = scene.stage.output(&agent).await;
            page.is_ok_and(|page| page.contains("dalgu_vm_cpu_seconds_total{vm=\"web\""))
        },
    )
    .await?;
    scene
        .stage
        .show_ok(&format!("{agent} |\n    grep -E '^dalgu_(host_cpu_seconds_total.*(user|idle)|host_memory|host_nic_receive_bytes_total|vm_(cpu|memory_res))'"))
        .await?;
    for (whose, page) in [("controller", &controller), ("agent", &agent)] {
        scene
            .stage
            .output(&format!("{page} | promtool check metrics >&2"))
            .await
            .with_context(|| format!("the {whose}'s page"))?;
    }
    let page = scene.stage.output(&agent).await?;
    for family in [
        "dalgu_host_cpu_seconds_total{",
        "dalgu_host_nic_receive_bytes_total{",
        "dalgu_vm_cpu_seconds_total{vm=\"web\"",
        "dalgu_vm_memory_resident_bytes{vm=\"web\"",
    ] {
        ensure!(page.contains(family), "the agent's page has no {family}");
    }
    scene
        .stage
        .proved("both metrics pages are in order for `promtool check metrics`, and show the VM's processor time and memory");

    scene
        .stage
        .heading("The same API by hand: grpcurl and reflection");
    scene.stage.show_ok("grpcurl $DALGU_LAB_ENDPOINT list").await?;
    let get = "grpcurl -d '{\"name\": \"web\"}' $DALGU_LAB_ENDPOINT dalgu.v1.VmService/GetVm |\n    jq -c '{name, state: .status.state, host: .status.host, epoch: .status.epoch}'";
    scene.stage.show_ok(get).await?;
    let answer = scene.stage.output(get).await?;
    ensure!(
        answer.contains(&format!("\"host\":\"{host}\"")),
        "grpcurl says {answer}, the VM is on {host}"
    );
    scene
        .stage
        .proved("grpcurl finds the services by reflection and reads the same VM");
    Ok(())
}
