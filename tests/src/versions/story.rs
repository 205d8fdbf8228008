//! A site's life that makes every call of the API at least once, between operators and controller and between controller and
//! agents. What it says is recorded for each version, so it is told again by every later one.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use dalgu_agent::hypervisor::Hypervisor as _;
use dalgu_controller::{
    incarnation::{self, Past},
    store::{Batch, Image, Store as _, Write},
};
use dalgu_proto::{
    agent::v1::{self as agent, agent_service_client::AgentServiceClient},
    ids::HostName,
    tls::client::Caller,
    v1::{
        self, event_service_client::EventServiceClient, host_service_client::HostServiceClient,
        operation_service_client::OperationServiceClient, placement_service_client::PlacementServiceClient,
        site_service_client::SiteServiceClient, vm_service_client::VmServiceClient,
    },
};
use jiff::Timestamp;
use prost_types::FieldMask;
use tokio::time::{Instant, sleep};
use tokio_stream::StreamExt as _;

use super::{
    site::{CLUSTER, Site},
    wire::Tap,
};

/// The hosts of the story; the last one leaves.
pub const HOSTS: [&str; 3] = ["h1", "h2", "h3"];
/// Everything asked for is done after this time.
const LIMIT: Duration = Duration::from_secs(600);

/// Who tells it: an operator, past a tap.
pub struct Operator(Caller);

/// A host of the story by its name.
///
/// # Errors
/// If it is no name.
pub fn host(name: &str) -> Result<HostName> {
    Ok(name.parse()?)
}

fn mask(paths: &[&str]) -> Option<FieldMask> {
    Some(FieldMask {
        paths: paths.iter().map(|path| (*path).to_owned()).collect(),
    })
}

/// A VM with something in each field that is its maker's.
pub fn vm(name: &str) -> v1::Vm {
    let disk = |name: &str, image: &str, format: v1::DiskFormat| v1::Disk {
        name: name.into(),
        size_mib: 8,
        pool: "local".into(),
        image: image.into(),
        format: format.into(),
        ..Default::default()
    };
    let spec = v1::VmSpec {
        vcpus: 1,
        memory_mib: 64,
        disks: vec![
            disk("root", "base.img", v1::DiskFormat::Qcow2),
            disk("data", "", v1::DiskFormat::Raw),
        ],
        nics: vec![v1::Nic {
            name: "eth0".into(),
            bridge: "br0".into(),
            ..Default::default()
        }],
        kernel_boot: Some(v1::KernelBoot {
            kernel: "vmlinuz".into(),
            initrd: "initrd".into(),
            cmdline: "console=ttyS0".into(),
        }),
        restart_policy: v1::RestartPolicy::Always.into(),
        ha_tier: v1::HaTier::Local.into(),
        host_selector: [("rack".to_owned(), "1".to_owned())].into(),
        ..Default::default()
    };
    v1::Vm {
        name: name.into(),
        spec: Some(spec),
        labels: [("system".to_owned(), "tax".to_owned())].into(),
        description: "from the story".into(),
        ..Default::default()
    }
}

impl Operator {
    /// Speaks to the site's controller past a tap.
    ///
    /// # Errors
    /// If no controller runs.
    pub fn new(site: &Site, tap: Arc<dyn Tap>) -> Result<Self> {
        Ok(Self(site.operator(tap)?))
    }

    /// VMs.
    pub fn vms(&self) -> VmServiceClient<Caller> {
        VmServiceClient::new(self.0.clone())
    }

    /// Hosts.
    pub fn hosts(&self) -> HostServiceClient<Caller> {
        HostServiceClient::new(self.0.clone())
    }

    /// Operations.
    pub fn operations(&self) -> OperationServiceClient<Caller> {
        OperationServiceClient::new(self.0.clone())
    }

    /// Waits for an operation to end.
    ///
    /// # Errors
    /// If it does not, or otherwise than asked for.
    pub async fn done(&self, operation: v1::Operation) -> Result<v1::Operation> {
        let ended = self.ended(operation).await?;
        ensure!(ended.state() == v1::OperationState::Succeeded, "{ended:?}");
        Ok(ended)
    }

    /// Waits for an operation to end, however it does.
    ///
    /// # Errors
    /// If it does not.
    pub async fn ended(&self, mut operation: v1::Operation) -> Result<v1::Operation> {
        let begun = Instant::now();
        while matches!(
            operation.state(),
            v1::OperationState::Pending | v1::OperationState::Running
        ) {
            ensure!(begun.elapsed() < LIMIT, "not ended: {operation:?}");
            let request = v1::WaitOperationRequest {
                id: operation.id,
                timeout: Some(prost_types::Duration { seconds: 5, nanos: 0 }),
            };
            operation = self.operations().wait_operation(request).await?.into_inner();
        }
        Ok(operation)
    }

    /// Makes a VM as the story's are.
    ///
    /// # Errors
    /// If it is not made.
    pub async fn create(&self, name: &str, on: &str, stopped: bool) -> Result<v1::Operation> {
        let request = v1::CreateVmRequest {
            vm: Some(vm(name)),
            host: on.into(),
            stopped,
            request_id: id(),
            ..Default::default()
        };
        let operation = self.vms().create_vm(request).await?.into_inner();
        self.done(operation).await
    }

    /// Begins to move a VM.
    ///
    /// # Errors
    /// If it is refused.
    pub async fn migrate(&self, name: &str, to: &str) -> Result<v1::Operation> {
        let request = v1::MigrateVmRequest {
            name: name.into(),
            destination_host: to.into(),
            max_downtime_ms: 300,
            bandwidth_mib_per_second: 1000,
            request_id: id(),
            ..Default::default()
        };
        Ok(self.vms().migrate_vm(request).await?.into_inner())
    }

    /// Waits until a migration copies.
    ///
    /// # Errors
    /// If it does not come to that.
    pub async fn copying(&self, operation: &v1::Operation) -> Result<()> {
        let begun = Instant::now();
        loop {
            let request = v1::GetOperationRequest {
                id: operation.id.clone(),
            };
            let now = self.operations().get_operation(request).await?.into_inner();
            let phase = now.migration.as_ref().map(v1::MigrationProgress::phase);
            if phase == Some(v1::MigrationPhase::Transferring) {
                return Ok(());
            }
            ensure!(begun.elapsed() < LIMIT, "it does not copy: {now:?}");
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until so many hosts report.
    ///
    /// # Errors
    /// If they do not.
    pub async fn until_ready(&self, hosts: usize) -> Result<()> {
        let begun = Instant::now();
        loop {
            let request = v1::ListHostsRequest::default();
            let found = self.hosts().list_hosts(request).await?.into_inner().hosts;
            let ready = found.iter().filter(|host| host.state() == v1::HostState::Ready);
            if ready.count() == hosts {
                return Ok(());
            }
            ensure!(begun.elapsed() < LIMIT, "not ready: {found:?}");
            sleep(Duration::from_millis(100)).await;
        }
    }
}

/// A new request id.
pub fn id() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// Tells the whole of it. `tap` is on every wire. At the end one VM runs, one is off, one is frozen and one is on its way.
///
/// # Errors
/// If something does not end as it should.
pub async fn tell(site: &mut Site, tap: Arc<dyn Tap>) -> Result<()> {
    site.start_controller(tap.clone()).await?;
    for name in HOSTS {
        site.start_agent(&host(name)?, tap.clone()).await?;
    }
    let operator = Operator::new(site, tap.clone())?;
    operator.until_ready(HOSTS.len()).await?;
    hosts(&operator).await?;
    vms(&operator, site).await?;
    moves(&operator).await?;
    reads(&operator).await?;
    as_controller(site, tap).await?;
    site.stop_agent(&host("h3")?);
    let request = v1::DeleteHostRequest {
        name: "h3".into(),
        request_id: id(),
    };
    operator.hosts().delete_host(request).await?;
    leave(&operator).await
}

async fn hosts(operator: &Operator) -> Result<()> {
    let mut hosts = operator.hosts();
    let request = v1::ListHostsRequest {
        page_size: 2,
        ..Default::default()
    };
    let first = hosts.list_hosts(request).await?.into_inner();
    let request = v1::ListHostsRequest {
        page_size: 2,
        page_token: first.next_page_token,
        ..Default::default()
    };
    hosts.list_hosts(request).await?;
    label_hosts(operator, &["h1", "h2"]).await?;
    let request = v1::CordonHostRequest {
        name: "h2".into(),
        reason: "a new disk".into(),
        request_id: id(),
    };
    hosts.cordon_host(request).await?;
    hosts.get_host(v1::GetHostRequest { name: "h2".into() }).await?;
    let request = v1::UncordonHostRequest {
        name: "h2".into(),
        request_id: id(),
    };
    hosts.uncordon_host(request).await?;
    Ok(())
}

/// Lets the story's VMs onto these hosts.
///
/// # Errors
/// If it is refused.
pub async fn label_hosts(operator: &Operator, hosts: &[&str]) -> Result<()> {
    for name in hosts {
        let changed = v1::Host {
            name: (*name).to_owned(),
            labels: [("rack".to_owned(), "1".to_owned())].into(),
            cpu_overcommit_ratio: 3.3,
            reserved_memory_mib: 512,
            ..Default::default()
        };
        let request = v1::UpdateHostRequest {
            host: Some(changed),
            update_mask: mask(&["labels", "cpu_overcommit_ratio", "reserved_memory_mib"]),
            request_id: id(),
        };
        operator.hosts().update_host(request).await?;
    }
    Ok(())
}

async fn vms(operator: &Operator, site: &Site) -> Result<()> {
    let mut vms = operator.vms();
    let only_checked = v1::CreateVmRequest {
        vm: Some(vm("never")),
        validate_only: true,
        ..Default::default()
    };
    vms.create_vm(only_checked).await?;
    for (name, stopped) in [("web", false), ("db", true), ("ice", false)] {
        operator.create(name, "h1", stopped).await?;
    }
    show_usage(site, "h1").await?;
    let name = || "web".to_owned();
    let changed = v1::Vm {
        description: "changed".into(),
        spec: Some(v1::VmSpec {
            restart_policy: v1::RestartPolicy::OnFailure.into(),
            ..Default::default()
        }),
        ..vm("web")
    };
    let request = v1::UpdateVmRequest {
        vm: Some(changed),
        update_mask: mask(&["labels", "description", "spec.restart_policy"]),
        ignore_protection: false,
        request_id: id(),
    };
    let etag = vms.update_vm(request).await?.into_inner().etag;
    let request = v1::PauseVmRequest {
        name: name(),
        etag,
        request_id: id(),
    };
    operator.done(vms.pause_vm(request).await?.into_inner()).await?;
    let request = v1::ResumeVmRequest {
        name: name(),
        request_id: id(),
        ..Default::default()
    };
    operator.done(vms.resume_vm(request).await?.into_inner()).await?;
    for mode in [v1::RestartMode::Reset, v1::RestartMode::Reboot] {
        let request = v1::RestartVmRequest {
            name: name(),
            mode: mode.into(),
            request_id: id(),
            ..Default::default()
        };
        operator.done(vms.restart_vm(request).await?.into_inner()).await?;
    }
    let request = v1::StopVmRequest {
        name: name(),
        grace_period_seconds: 30,
        request_id: id(),
        ..Default::default()
    };
    operator.done(vms.stop_vm(request).await?.into_inner()).await?;
    let request = v1::StartVmRequest {
        name: name(),
        request_id: id(),
        ..Default::default()
    };
    operator.done(vms.start_vm(request).await?.into_inner()).await?;
    Ok(())
}

/// The host's reports tell what its VMs use.
async fn show_usage(site: &Site, on: &str) -> Result<()> {
    let server = site.servers.get(&host(on)?).context("no such host")?;
    let usage: v1::VmUsage = super::full::sample("dalgu.v1.VmUsage");
    let vms = server
        .sim
        .list()
        .await?
        .into_iter()
        .map(|domain| dalgu_agent::metrics::Vm {
            id: domain.id,
            name: "web".parse().expect("it is a name"),
            power: None,
            usage: Some(usage.clone().into()),
        });
    let vms: Vec<_> = vms.collect();
    server
        .samples
        .send_modify(|snapshot| Arc::make_mut(snapshot).vms = vms);
    Ok(())
}

async fn moves(operator: &Operator) -> Result<()> {
    let moved = operator.migrate("web", "h2").await?;
    operator.done(moved).await?;
    let cancelled = operator.migrate("web", "h1").await?;
    operator.copying(&cancelled).await?;
    let request = v1::CancelOperationRequest {
        id: cancelled.id.clone(),
    };
    operator.operations().cancel_operation(request).await?;
    let cancelled = operator.ended(cancelled).await?;
    ensure!(
        cancelled.state() == v1::OperationState::Cancelled,
        "{cancelled:?}"
    );
    Ok(())
}

async fn reads(operator: &Operator) -> Result<()> {
    let mut vms = operator.vms();
    vms.get_vm(v1::GetVmRequest { name: "web".into() }).await?;
    let mut request = v1::ListVmsRequest {
        page_size: 2,
        label_selector: [("system".to_owned(), "tax".to_owned())].into(),
        ..Default::default()
    };
    request.page_token = vms.list_vms(request.clone()).await?.into_inner().next_page_token;
    vms.list_vms(request).await?;
    let request = v1::ReadConsoleRequest {
        name: "web".into(),
        tail_bytes: 100,
        follow: false,
    };
    let mut console = vms.read_console(request).await?.into_inner();
    while console.message().await?.is_some() {}
    let mut placements = PlacementServiceClient::new(operator.0.clone());
    placements
        .get_placement(v1::GetPlacementRequest { vm: "web".into() })
        .await?;
    let huge = v1::VmSpec {
        vcpus: 200,
        ..vm("x").spec.context("it has one")?
    };
    let request = v1::ExplainPlacementRequest {
        subject: Some(v1::explain_placement_request::Subject::Spec(huge)),
        ..Default::default()
    };
    placements.explain_placement(request).await?;
    let request = v1::ListOperationsRequest {
        page_size: 3,
        ..Default::default()
    };
    operator.operations().list_operations(request).await?;
    let mut events = EventServiceClient::new(operator.0.clone());
    let request = v1::ListEventsRequest {
        page_size: 5,
        ..Default::default()
    };
    events.list_events(request).await?;
    let request = v1::WatchEventsRequest {
        after_resource_version: 1,
        ..Default::default()
    };
    let stream = events.watch_events(request).await?.into_inner();
    let seen: Vec<_> = stream.take(30).collect().await;
    ensure!(seen.iter().all(Result::is_ok), "the stream broke: {seen:?}");
    let mut sites = SiteServiceClient::new(operator.0.clone());
    sites.get_site(v1::GetSiteRequest {}).await?;
    Ok(())
}

/// What the controller does not ask, and `grpcurl` may.
async fn as_controller(site: &Site, tap: Arc<dyn Tap>) -> Result<()> {
    let mut agent = AgentServiceClient::new(site.agent(&host("h2")?, tap)?);
    agent.list_vms(agent::ListVmsRequest {}).await?;
    agent.get_host(agent::GetHostRequest {}).await?;
    agent
        .list_files(agent::ListFilesRequest { pool: "local".into() })
        .await?;
    Ok(())
}

/// How the site is left: what a later version finds on disk.
async fn leave(operator: &Operator) -> Result<()> {
    let request = v1::DeleteVmRequest {
        name: "db".into(),
        request_id: id(),
        ..Default::default()
    };
    operator
        .done(operator.vms().delete_vm(request).await?.into_inner())
        .await?;
    operator.create("off", "h1", true).await?;
    let request = v1::PauseVmRequest {
        name: "ice".into(),
        request_id: id(),
        ..Default::default()
    };
    operator
        .done(operator.vms().pause_vm(request).await?.into_inner())
        .await?;
    operator.create("bird", "h1", false).await?;
    let flight = operator.migrate("bird", "h2").await?;
    operator.copying(&flight).await
}

/// A site whose store was restored is looked at and let go on.
///
/// # Errors
/// If it is not.
pub async fn resume(site: &mut Site, tap: Arc<dyn Tap>) -> Result<()> {
    let old = site.disk.open().load()?;
    let (image, _) = incarnation::renew(old.clone(), Past::default(), Timestamp::UNIX_EPOCH)?;
    replace(site, &old, image)?;
    site.start_controller(tap.clone()).await?;
    let mut sites = SiteServiceClient::new(site.operator(tap)?);
    for host in ["h1", "h2"] {
        let request = v1::WaiveHostRequest {
            host: host.into(),
            request_id: id(),
        };
        sites.waive_host(request).await?;
    }
    let etag = sites.get_site(v1::GetSiteRequest {}).await?.into_inner().etag;
    let request = v1::ResumeSiteRequest {
        accept_differences: true,
        etag,
        request_id: id(),
    };
    let resumed = sites.resume_site(request).await?.into_inner();
    ensure!(resumed.cluster_id == CLUSTER.to_string(), "{resumed:?}");
    Ok(())
}

fn replace(site: &Site, old: &Image, new: Image) -> Result<()> {
    let gone = old.records.iter().map(|(table, key, _)| Write {
        table: *table,
        key: key.clone(),
        value: None,
    });
    let put = new.records.into_iter().map(|(table, key, value)| Write {
        table,
        key,
        value: Some(value),
    });
    let batch = Batch {
        writes: gone.chain(put).collect(),
        ..Batch::default()
    };
    Ok(site.disk.open().commit(&[batch])?)
}
