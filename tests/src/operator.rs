//! The lab's operator on the gRPC API itself: what the demonstration checks claims with, and what benchmarks time.
//! It goes past `dalgu`, so that neither its start nor its wording counts.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, bail};
use dalgu_proto::tls::{self, Identity};
use dalgu_proto::v1::host_service_client::HostServiceClient;
use dalgu_proto::v1::operation_service_client::OperationServiceClient;
use dalgu_proto::v1::placement_service_client::PlacementServiceClient;
use dalgu_proto::v1::vm_service_client::VmServiceClient;
use dalgu_proto::v1::{self, OperationState};
use tokio::time::timeout;
use tonic::transport::Channel;

use crate::lab::Lab;
use crate::lab::guest::{CMDLINE, INITRD, KERNEL};

/// No operation of a lab lasts longer.
const OPERATION_LIMIT: Duration = Duration::from_mins(5);

/// A connection with the operator's certificate. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Operator {
    channel: Channel,
}

/// A small VM of the lab's guest: one processor, 96 MiB, a disk of 8 MiB in a pool, named by the caller.
#[must_use]
pub fn small_vm(name: &str, pool: &str) -> v1::Vm {
    v1::Vm {
        name: name.to_owned(),
        spec: Some(v1::VmSpec {
            vcpus: 1,
            memory_mib: 96,
            disks: vec![v1::Disk {
                name: "root".to_owned(),
                size_mib: 8,
                pool: pool.to_owned(),
                ..v1::Disk::default()
            }],
            kernel_boot: Some(v1::KernelBoot {
                kernel: KERNEL.to_owned(),
                initrd: INITRD.to_owned(),
                cmdline: CMDLINE.to_owned(),
            }),
            ..v1::VmSpec::default()
        }),
        ..v1::Vm::default()
    }
}

impl Operator {
    /// Connects to the lab's controller.
    ///
    /// # Errors
    /// If the lab has none, or it does not answer.
    pub async fn connect(lab: &Lab) -> anyhow::Result<Self> {
        let identity =
            Identity::load_dir(&lab.layout().operator(), "admin").context("read the operator's identity")?;
        Self::dial(lab.layout().controller_address(), &identity).await
    }

    /// Connects to the controller at an address.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn dial(address: impl std::fmt::Display, identity: &Identity) -> anyhow::Result<Self> {
        let endpoint = format!("https://{address}");
        let channel = tls::client::connect(&endpoint, tls::CONTROLLER_NAME, identity).await?;
        Ok(Self { channel })
    }

    /// The connection itself.
    #[must_use]
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Calls on VMs.
    #[must_use]
    pub fn vms(&self) -> VmServiceClient<Channel> {
        VmServiceClient::new(self.channel.clone())
    }

    /// Calls on hosts.
    #[must_use]
    pub fn hosts(&self) -> HostServiceClient<Channel> {
        HostServiceClient::new(self.channel.clone())
    }

    /// Calls on operations.
    #[must_use]
    pub fn operations(&self) -> OperationServiceClient<Channel> {
        OperationServiceClient::new(self.channel.clone())
    }

    /// Calls on placement.
    #[must_use]
    pub fn placement(&self) -> PlacementServiceClient<Channel> {
        PlacementServiceClient::new(self.channel.clone())
    }

    /// One VM.
    ///
    /// # Errors
    /// If there is none of that name.
    pub async fn vm(&self, name: &str) -> anyhow::Result<v1::Vm> {
        let request = v1::GetVmRequest {
            name: name.to_owned(),
        };
        let answer = self.vms().get_vm(request).await;
        Ok(answer.with_context(|| format!("read VM {name}"))?.into_inner())
    }

    /// The host that owns a VM.
    ///
    /// # Errors
    /// If there is no such VM.
    pub async fn host_of(&self, vm: &str) -> anyhow::Result<String> {
        Ok(self.vm(vm).await?.status.unwrap_or_default().host)
    }

    /// All VMs by their names; for a lab's few.
    ///
    /// # Errors
    /// If the controller does not answer.
    pub async fn all_vms(&self) -> anyhow::Result<BTreeMap<String, v1::Vm>> {
        let request = v1::ListVmsRequest {
            page_size: 1000,
            ..v1::ListVmsRequest::default()
        };
        let page = self
            .vms()
            .list_vms(request)
            .await
            .context("list VMs")?
            .into_inner();
        Ok(page.vms.into_iter().map(|vm| (vm.name.clone(), vm)).collect())
    }

    /// All hosts by their names.
    ///
    /// # Errors
    /// If the controller does not answer.
    pub async fn all_hosts(&self) -> anyhow::Result<BTreeMap<String, v1::Host>> {
        let page = self.hosts().list_hosts(v1::ListHostsRequest::default()).await;
        let hosts = page.context("list hosts")?.into_inner().hosts;
        Ok(hosts.into_iter().map(|host| (host.name.clone(), host)).collect())
    }

    /// Waits until an operation has ended.
    ///
    /// # Errors
    /// If it did not succeed, or lasts too long.
    pub async fn finish(&self, operation: v1::Operation) -> anyhow::Result<v1::Operation> {
        let what = format!("{} of {}", operation.kind().as_str_name(), operation.vm);
        timeout(OPERATION_LIMIT, self.wait(operation))
            .await
            .with_context(|| format!("{what} does not end"))?
    }

    async fn wait(&self, mut operation: v1::Operation) -> anyhow::Result<v1::Operation> {
        loop {
            match operation.state() {
                OperationState::Succeeded => return Ok(operation),
                OperationState::Failed | OperationState::Cancelled => bail!(
                    "{} of {} did not succeed: {}",
                    operation.kind().as_str_name(),
                    operation.vm,
                    operation.error.map_or_else(String::new, |error| format!(
                        "{} ({})",
                        error.message, error.reason
                    )),
                ),
                _ => {}
            }
            let request = v1::WaitOperationRequest {
                id: operation.id.clone(),
                timeout: None,
            };
            let answer = self.operations().wait_operation(request).await;
            operation = answer.context("wait for an operation")?.into_inner();
        }
    }
}
