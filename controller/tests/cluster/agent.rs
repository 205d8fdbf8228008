//! An agent of the pretended world: answers the controller by the contract, registers and reports.

use std::time::Duration;

use dalgu_proto::{
    agent::v1::{
        self as agent, DomainPresence, TransferState, agent_service_server::AgentService,
        registrar_service_client::RegistrarServiceClient,
    },
    reason,
    tls::{self, Identity},
    v1,
};
use futures::stream::BoxStream;
use tokio::sync::watch;
use tonic::{Code, Request, Response, Status};

use super::fabric::{Fabric, Host, Transfer, Vm};

#[derive(Clone)]
pub struct Agent {
    pub name: String,
    pub fabric: Fabric,
}

pub fn refuse(reason: &str) -> Status {
    reason::status(Code::FailedPrecondition, reason, reason.to_lowercase())
}

impl Agent {
    /// Runs a change on this host after the checks that every command passes.
    pub fn command<T>(
        &self,
        name: &'static str,
        context: Option<agent::CommandContext>,
        change: impl FnOnce(&mut Host) -> Result<T, Status>,
    ) -> Result<Response<T>, Status> {
        let mut world = self.fabric.lock();
        let host = world.hosts.get_mut(&self.name).unwrap();
        let context = context.ok_or_else(|| Status::invalid_argument("no context"))?;
        if host.cut_off {
            return Err(Status::unavailable("cut off"));
        }
        assert_eq!(context.host, self.name);
        if context.cluster_id != host.cluster_id {
            return Err(refuse("WRONG_CLUSTER"));
        }
        if context.session != host.session {
            return Err(refuse("WRONG_SESSION"));
        }
        if context.term < host.term {
            return Err(refuse("STALE_TERM"));
        }
        host.term = context.term;
        *host.commands.entry(name).or_default() += 1;
        change(host).map(Response::new)
    }
}

fn migration(host: &Host, id: &str) -> agent::MigrationReport {
    let Some(transfer) = host.transfers.get(id) else {
        return agent::MigrationReport {
            migration_id: id.into(),
            network_delay: host.networks.delay(id, false),
            ..Default::default()
        };
    };
    let vm = host.vms.get(&transfer.vm);
    let incoming = transfer.incoming.is_some() && vm.is_none() && !transfer.settled;
    let presence = if incoming {
        DomainPresence::Incoming
    } else {
        vm.map_or(DomainPresence::Absent, Vm::presence)
    };
    let role = if transfer.source {
        agent::MigrationRole::Source
    } else {
        agent::MigrationRole::Destination
    };
    agent::MigrationReport {
        migration_id: id.into(),
        role: role.into(),
        transfer: transfer.state.into(),
        settled: transfer.settled,
        // Told once it was settled so; a pretended host keeps no ledger to tell it by.
        owner: false,
        presence: presence.into(),
        error: None,
        network_delay: host
            .networks
            .delay(id, !transfer.source && presence == DomainPresence::Running),
        network_blackout: None,
        progress: transfer.source.then(|| {
            match host.progress_lost && transfer.state != TransferState::Active {
                true => v1::MigrationProgress::default(),
                false => v1::MigrationProgress {
                    memory_total_bytes: 100,
                    memory_processed_bytes: transfer.steps.into(),
                    downtime_ms: 7,
                    ..Default::default()
                },
            }
        }),
    }
}

#[tonic::async_trait]
impl AgentService for Agent {
    async fn ensure_vm(
        &self,
        request: Request<agent::EnsureVmRequest>,
    ) -> Result<Response<agent::EnsureVmResponse>, Status> {
        let request = request.into_inner();
        self.command("EnsureVm", request.context, |host| {
            let new = request.vm.unwrap();
            if host
                .refused
                .get(&new.uid)
                .is_some_and(|epoch| new.epoch <= *epoch)
            {
                return Err(refuse("STALE_EPOCH"));
            }
            if let Some(old) = host.vms.get_mut(&new.uid) {
                if new.epoch < old.intent.epoch {
                    return Err(refuse("STALE_EPOCH"));
                }
                if new.generation < old.intent.generation {
                    return Err(refuse("STALE_GENERATION"));
                }
                // What no generation counts.
                let same = agent::VmIntent {
                    epoch: new.epoch,
                    disks_made: new.disks_made,
                    images: new.images.clone(),
                    ..old.intent.clone()
                };
                if new.generation == old.intent.generation && new != same {
                    return Err(refuse("GENERATION_CONFLICT"));
                }
                if old.intent != new {
                    old.intent = new.clone();
                    old.status += 1;
                }
            }
            let broken = host.broken;
            host.images.fetch_all(&new.images);
            let vm = host.vms.entry(new.uid.clone()).or_insert_with(|| Vm::new(new));
            Ok(agent::EnsureVmResponse {
                vm: Some(vm.report(broken)),
            })
        })
    }

    async fn delete_vm(
        &self,
        request: Request<agent::DeleteVmRequest>,
    ) -> Result<Response<agent::DeleteVmResponse>, Status> {
        let request = request.into_inner();
        self.command("DeleteVm", request.context, |host| {
            let part = |transfer: &Transfer| transfer.vm == request.uid && !transfer.settled;
            if host.transfers.values().any(part) {
                return Err(refuse("MIGRATION_IN_PROGRESS"));
            }
            host.vms.remove(&request.uid);
            Ok(agent::DeleteVmResponse { gone: true, vm: None })
        })
    }

    async fn prepare_migration(
        &self,
        request: Request<agent::PrepareMigrationRequest>,
    ) -> Result<Response<agent::PrepareMigrationResponse>, Status> {
        let request = request.into_inner();
        self.command("PrepareMigration", request.context, |host| {
            if host.broken {
                return Err(refuse("NO_ROOM"));
            }
            let vm = request.vm.unwrap();
            if host
                .transfers
                .get(&request.migration_id)
                .is_some_and(|t| t.settled)
            {
                return Err(refuse("MIGRATION_OVER"));
            }
            if !host.images.fetch_all(&vm.images) {
                let message = "the images of its disks are fetched";
                return Err(reason::status(Code::Unavailable, "IMAGE_FETCHING", message));
            }
            if !host.networks.has_all(&vm) {
                host.networks.refused += 1;
                let message = "its networks are not here yet";
                return Err(reason::status(Code::Unavailable, "NETWORK_NOT_READY", message));
            }
            host.transfers
                .entry(request.migration_id)
                .or_insert_with(|| Transfer {
                    vm: vm.uid.clone(),
                    source: false,
                    peer: request.source_host,
                    state: TransferState::Ready,
                    settled: false,
                    steps: 0,
                    incoming: Some(vm),
                });
            Ok(agent::PrepareMigrationResponse {})
        })
    }

    async fn start_migration(
        &self,
        request: Request<agent::StartMigrationRequest>,
    ) -> Result<Response<agent::StartMigrationResponse>, Status> {
        let request = request.into_inner();
        self.command("StartMigration", request.context, |host| {
            if host
                .transfers
                .get(&request.migration_id)
                .is_some_and(|t| t.settled)
            {
                return Err(refuse("MIGRATION_OVER"));
            }
            assert!(!request.destination_address.is_empty());
            host.transfers
                .entry(request.migration_id)
                .or_insert_with(|| Transfer {
                    vm: request.vm_uid,
                    source: true,
                    peer: request.destination_host,
                    state: TransferState::Active,
                    settled: false,
                    steps: 0,
                    incoming: None,
                });
            Ok(agent::StartMigrationResponse {})
        })
    }

    async fn get_migration(
        &self,
        request: Request<agent::GetMigrationRequest>,
    ) -> Result<Response<agent::MigrationReport>, Status> {
        let request = request.into_inner();
        self.command("GetMigration", request.context, |host| {
            Ok(migration(host, &request.migration_id))
        })
    }

    async fn settle_migration(
        &self,
        request: Request<agent::SettleMigrationRequest>,
    ) -> Result<Response<agent::MigrationReport>, Status> {
        let request = request.into_inner();
        self.command("SettleMigration", request.context, |host| {
            let transfer = host
                .transfers
                .entry(request.migration_id.clone())
                .or_insert_with(|| Transfer {
                    vm: request.vm_uid,
                    source: false,
                    peer: String::new(),
                    state: TransferState::Unspecified,
                    settled: true,
                    steps: 0,
                    incoming: None,
                });
            transfer.settled = true;
            if transfer.state == TransferState::Active {
                transfer.state = TransferState::Failed;
            }
            Ok(migration(host, &request.migration_id))
        })
    }

    async fn finish_migration(
        &self,
        request: Request<agent::FinishMigrationRequest>,
    ) -> Result<Response<agent::FinishMigrationResponse>, Status> {
        let request = request.into_inner();
        self.command("FinishMigration", request.context, |host| {
            if request.owner && host.gave_up {
                return Err(refuse("MIGRATION_OVER"));
            }
            let left = host.transfers.remove(&request.migration_id);
            if request.owner && left.is_some_and(|transfer| !transfer.source) {
                host.networks.arrived.insert(request.migration_id);
            }
            if request.owner {
                if let Some(vm) = host.vms.get_mut(&request.vm_uid) {
                    assert!(
                        !vm.handed_over,
                        "a memory that was handed over must not live again"
                    );
                    vm.intent.epoch = request.epoch;
                    vm.status += 1;
                }
            } else {
                host.vms.remove(&request.vm_uid);
                host.refused.insert(request.vm_uid, request.epoch);
            }
            Ok(agent::FinishMigrationResponse { done: true })
        })
    }

    async fn list_vms(
        &self,
        _: Request<agent::ListVmsRequest>,
    ) -> Result<Response<agent::ListVmsResponse>, Status> {
        Err(Status::unimplemented("not used by the controller"))
    }

    async fn list_files(
        &self,
        _: Request<agent::ListFilesRequest>,
    ) -> Result<Response<agent::ListFilesResponse>, Status> {
        Err(Status::unimplemented("it has none"))
    }

    async fn get_host(
        &self,
        _: Request<agent::GetHostRequest>,
    ) -> Result<Response<agent::GetHostResponse>, Status> {
        Err(Status::unimplemented("not used by the controller"))
    }

    type ReadConsoleStream = BoxStream<'static, Result<agent::ReadConsoleResponse, Status>>;

    async fn read_console(
        &self,
        request: Request<agent::ReadConsoleRequest>,
    ) -> Result<Response<Self::ReadConsoleStream>, Status> {
        let text = format!("console of {}\n", request.get_ref().uid);
        let piece = Ok(agent::ReadConsoleResponse { data: text.into() });
        Ok(Response::new(Box::pin(futures::stream::iter([piece]))))
    }
}

fn inventory(offers_volumes: bool) -> v1::HostInventory {
    const GIB: u64 = 1 << 30;
    let mut guest_features = vec![
        v1::GuestFeature::FirstBoot.into(),
        v1::GuestFeature::PciDevice.into(),
    ];
    if offers_volumes {
        guest_features.push(v1::GuestFeature::Volume.into());
    }
    v1::HostInventory {
        cpus: 4,
        memory_bytes: 8 * GIB,
        accelerator: "tcg".into(),
        bridges: vec!["br0".into()],
        guest_features,
        pci_devices: vec![v1::PciDevice {
            class: "gpu".into(),
            address: "0000:3b:00.0".into(),
            ..Default::default()
        }],
        pools: vec![v1::StoragePool {
            name: "local".into(),
            path: "/pool".into(),
            capacity_bytes: 100 * GIB,
            available_bytes: 100 * GIB,
            ..Default::default()
        }],
        ..Default::default()
    }
}

impl Agent {
    fn reports(&self) -> Vec<agent::VmReport> {
        let world = self.fabric.lock();
        let host = &world.hosts[&self.name];
        let vms = host.vms.values().filter(|vm| !vm.handed_over);
        let coming = host.transfers.iter().filter_map(|(id, transfer)| {
            let vm = transfer.incoming.as_ref()?;
            let absent = !host.vms.contains_key(&vm.uid);
            absent.then(|| agent::VmReport {
                phase: agent::VmPhase::Incoming.into(),
                power_state: v1::PowerState::Unspecified.into(),
                migration: Some(migration(host, id)),
                ..Vm::new(vm.clone()).report(false)
            })
        });
        vms.map(|vm| vm.report(host.broken)).chain(coming).collect()
    }

    fn cut_off(&self) -> bool {
        self.fabric.lock().hosts[&self.name].cut_off
    }

    /// Registers and reports to whatever controller there is, for ever.
    pub async fn report_for_ever(self, identity: Identity, controller: watch::Receiver<String>) {
        let run = uuid::Uuid::new_v4().to_string();
        let mut sequence = 0;
        loop {
            let endpoint = controller.borrow().clone();
            let channel = tls::client::connect_lazy(&endpoint, tls::CONTROLLER_NAME, &identity).unwrap();
            let mut client = RegistrarServiceClient::new(channel);
            while *controller.borrow() == endpoint {
                if self.cut_off() || !self.register(&mut client, &run).await {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                }
                while *controller.borrow() == endpoint && !self.cut_off() {
                    sequence += 1;
                    if !self.report(&mut client, &run, sequence).await {
                        break;
                    }
                    let _ = tokio::time::timeout(Duration::from_millis(150), self.fabric.changed.notified())
                        .await;
                }
            }
        }
    }

    async fn register(
        &self,
        client: &mut RegistrarServiceClient<tonic::transport::Channel>,
        run: &str,
    ) -> bool {
        let (address, session, cluster_id, offers_volumes) = {
            let world = self.fabric.lock();
            let host = &world.hosts[&self.name];
            let cluster_id = host.cluster_id.clone();
            (
                host.address.clone(),
                host.session,
                cluster_id,
                host.offers_volumes,
            )
        };
        let request = agent::RegisterRequest {
            host: self.name.clone(),
            address,
            boot_id: "boot-1".into(),
            agent_run_id: run.into(),
            agent_version: "test".into(),
            inventory: Some(self.stored(self.networked(inventory(offers_volumes)))),
            usage: None,
            vms: self.reports(),
            unmanaged_domains: vec![],
            session,
            cluster_id,
            inventory_complete: true,
            hypervisor_error: String::new(),
            machine_id: String::new(),
            state_machine_id: String::new(),
            controller_term: 0,
            controller_run_id: String::new(),
            // As agents of before, which number their reports anew.
            sequence: None,
            images: Some(self.inventory_of_images()),
        };
        let answer = tokio::time::timeout(Duration::from_secs(2), client.register(request)).await;
        let Ok(Ok(answer)) = answer else { return false };
        let answer = answer.into_inner();
        let mut world = self.fabric.lock();
        let host = world.hosts.get_mut(&self.name).unwrap();
        if answer.term < host.term {
            return false;
        }
        (host.session, host.term, host.cluster_id) = (answer.session, answer.term, answer.cluster_id);
        true
    }

    async fn report(
        &self,
        client: &mut RegistrarServiceClient<tonic::transport::Channel>,
        run: &str,
        sequence: u64,
    ) -> bool {
        // Taken first: the lock must be free again for the list of VMs.
        let session = self.fabric.lock().hosts[&self.name].session;
        let request = agent::ReportRequest {
            host: self.name.clone(),
            session,
            boot_id: "boot-1".into(),
            agent_run_id: run.into(),
            sequence,
            vms: self.reports(),
            inventory_complete: true,
            images: Some(self.inventory_of_images()),
            ..Default::default()
        };
        let answer = tokio::time::timeout(Duration::from_secs(2), client.report(request)).await;
        matches!(answer, Ok(Ok(answer)) if !answer.get_ref().register_again)
    }
}
