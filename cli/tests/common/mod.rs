//! A controller that answers from a script, and a terminal that remembers what it was shown. Used by the tests of
//! the commands; holds no expectations of its own.

use std::{
    collections::VecDeque,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
};

use clap::Parser as _;
use dalgu::{args::Cli, exit, output::Term};
use dalgu_proto::v1;
use jiff::Timestamp;
use tokio::{
    net::UnixListener,
    runtime::{Builder, Runtime},
};
use tokio_stream::{
    Stream, StreamExt as _,
    wrappers::{ReceiverStream, UnixListenerStream},
};
use tonic::{Request, Response, Status, transport::Server};
use v1::{
    event_service_server::{EventService, EventServiceServer},
    host_service_server::{HostService, HostServiceServer},
    image_service_server::{ImageService, ImageServiceServer},
    network_service_server::{NetworkService, NetworkServiceServer},
    operation_service_server::{OperationService, OperationServiceServer},
    placement_service_server::{PlacementService, PlacementServiceServer},
    plan_service_server::{PlanService, PlanServiceServer},
    site_service_server::{SiteService, SiteServiceServer},
    vm_service_server::{VmService, VmServiceServer},
    volume_service_server::{VolumeService, VolumeServiceServer},
};

type Answers<T> = VecDeque<Result<T, Status>>;

/// What the controller answers, call by call, and what it was asked.
#[derive(Default)]
pub struct Script {
    /// To changes of VMs.
    pub changes: Answers<v1::Operation>,
    /// To WaitOperation; the last one is repeated.
    pub waits: Answers<v1::Operation>,
    /// To CancelOperation.
    pub cancels: Answers<v1::Operation>,
    /// To GetVm.
    pub vms: Answers<v1::Vm>,
    /// To UpdateVm.
    pub updates: Answers<v1::Vm>,
    /// VMs as UpdateVm was given them.
    pub updated: Vec<v1::Vm>,
    /// To ListVms.
    pub lists: Answers<v1::ListVmsResponse>,
    /// To ListHosts.
    pub host_lists: Answers<v1::ListHostsResponse>,
    /// To ListOperations.
    pub operation_lists: Answers<v1::ListOperationsResponse>,
    /// To WatchEvents: the messages of each stream.
    pub streams: Answers<Vec<Result<v1::Event, Status>>>,
    /// To ListEvents.
    pub events: Answers<v1::ListEventsResponse>,
    /// To calls of the host service that answer with a host.
    pub hosts: Answers<v1::Host>,
    /// To PlanMaintenance.
    pub maintenance: Answers<v1::MaintenancePlan>,
    /// To calls of the placement service.
    pub placements: Answers<v1::Placement>,
    /// To calls of the placement service that answer with a group.
    pub placement_groups: Answers<v1::PlacementGroup>,
    /// To ListPlacementGroups.
    pub placement_group_lists: Answers<v1::ListPlacementGroupsResponse>,
    /// To EstimateCapacity.
    pub capacities: Answers<v1::Capacity>,
    /// To GetDiagnosis.
    pub diagnoses: Answers<v1::Diagnosis>,
    /// To calls of the image service that answer with an image; the last one to GetImage is repeated.
    pub images: Answers<v1::Image>,
    /// To ListImages.
    pub image_lists: Answers<v1::ListImagesResponse>,
    /// For each call of UploadImage, how much the host has at its begin, and after how much more it breaks off.
    pub uploads: VecDeque<(u64, Option<u64>)>,
    /// Bytes that were uploaded, in the order of their coming.
    pub uploaded: Vec<u8>,
    /// To calls of the network service that answer with a network.
    pub networks: Answers<v1::Network>,
    /// To ListNetworks.
    pub network_lists: Answers<v1::ListNetworksResponse>,
    /// To ListNetworkInterfaces.
    pub interfaces: Answers<v1::ListNetworkInterfacesResponse>,
    /// To calls of the network service that answer with a security group.
    pub groups: Answers<v1::SecurityGroup>,
    /// To ListSecurityGroups.
    pub group_lists: Answers<v1::ListSecurityGroupsResponse>,
    /// To calls of the volume service that answer with a volume.
    pub volumes: Answers<v1::Volume>,
    /// To DeleteNetwork and DeleteSecurityGroup.
    pub network_deletions: Answers<()>,
    /// To ReadConsole.
    pub console: Vec<&'static [u8]>,
    /// Whether WaitOperation holds the question back for ever.
    pub hang: bool,
    /// Calls in their order, with what matters of each.
    pub seen: Vec<String>,
}

fn next<T>(answers: &mut Answers<T>, call: &str) -> Result<Response<T>, Status> {
    let unscripted = || Err(Status::internal(format!("the script has no answer to {call}")));
    answers.pop_front().unwrap_or_else(unscripted).map(Response::new)
}

/// A handle of the fake controller.
#[derive(Clone, Default)]
pub struct Fake(Arc<Mutex<Script>>);

impl Fake {
    /// The script.
    pub fn script(&self) -> MutexGuard<'_, Script> {
        self.0.lock().unwrap()
    }

    fn change(&self, call: &str, name: &str, request_id: &str) -> Result<Response<v1::Operation>, Status> {
        let mut script = self.script();
        script.seen.push(format!("{call} {name} {request_id}"));
        next(&mut script.changes, call)
    }
}

/// The verbs that differ in nothing but their request.
macro_rules! verbs {
    ($($name:ident: $request:ident),*) => {
        #[tonic::async_trait]
        impl VmService for Fake {
            $(async fn $name(&self, request: Request<v1::$request>) -> Result<Response<v1::Operation>, Status> {
                let request = request.into_inner();
                self.change(stringify!($name), &request.name, &request.request_id)
            })*

            async fn create_vm(&self, request: Request<v1::CreateVmRequest>) -> Result<Response<v1::Operation>, Status> {
                let request = request.into_inner();
                self.change("create_vm", &request.vm.unwrap_or_default().name, &request.request_id)
            }

            async fn batch_create_vms(&self, request: Request<v1::BatchCreateVmsRequest>) -> Result<Response<v1::BatchCreateVmsResponse>, Status> {
                let request = request.into_inner();
                let one = |one: v1::CreateVmRequest| match self.change("batch_create_vms", &one.vm.unwrap_or_default().name, "") {
                    Ok(operation) => v1::CreateVmResult { operation: Some(operation.into_inner()), error: None },
                    Err(status) => v1::CreateVmResult {
                        operation: None,
                        error: Some(v1::OperationError { code: status.code() as i32, message: status.message().to_owned(), ..Default::default() }),
                    },
                };
                Ok(Response::new(v1::BatchCreateVmsResponse { results: request.requests.into_iter().map(one).collect() }))
            }

            async fn get_vm(&self, _: Request<v1::GetVmRequest>) -> Result<Response<v1::Vm>, Status> {
                next(&mut self.script().vms, "get_vm")
            }

            async fn list_vms(&self, request: Request<v1::ListVmsRequest>) -> Result<Response<v1::ListVmsResponse>, Status> {
                let mut script = self.script();
                let request = request.into_inner();
                let host = match request.host.as_str() { "" => String::new(), host => format!(" of {host}") };
                script.seen.push(format!("list_vms {:?}{host}", request.page_token));
                next(&mut script.lists, "list_vms")
            }

            async fn update_vm(&self, request: Request<v1::UpdateVmRequest>) -> Result<Response<v1::Vm>, Status> {
                let request = request.into_inner();
                let (mask, vm) = (request.update_mask.unwrap_or_default(), request.vm.unwrap_or_default());
                self.script().updated.push(vm.clone());
                let mut labels: Vec<_> = vm.labels.into_iter().map(|(key, value)| format!("{key}={value}")).collect();
                labels.sort();
                let mut script = self.script();
                script.seen.push(format!("update_vm {} {:?} {labels:?}", vm.etag, mask.paths));
                next(&mut script.updates, "update_vm")
            }

            type ReadConsoleStream = std::pin::Pin<Box<dyn Stream<Item = Result<v1::ReadConsoleResponse, Status>> + Send>>;

            async fn read_console(&self, request: Request<v1::ReadConsoleRequest>) -> Result<Response<Self::ReadConsoleStream>, Status> {
                let request = request.into_inner();
                let mut script = self.script();
                script.seen.push(format!("read_console {} {} {}", request.name, request.tail_bytes, request.follow));
                let pieces: Vec<_> = script.console.iter().map(|data| Ok(v1::ReadConsoleResponse { data: (*data).into() })).collect();
                Ok(Response::new(Box::pin(tokio_stream::iter(pieces))))
            }
        }
    };
}

verbs!(
    delete_vm: DeleteVmRequest, start_vm: StartVmRequest, stop_vm: StopVmRequest, restart_vm: RestartVmRequest,
    pause_vm: PauseVmRequest, resume_vm: ResumeVmRequest, migrate_vm: MigrateVmRequest
);

#[tonic::async_trait]
impl OperationService for Fake {
    async fn get_operation(
        &self,
        _: Request<v1::GetOperationRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        next(&mut self.script().waits, "get_operation")
    }

    async fn list_operations(
        &self,
        _: Request<v1::ListOperationsRequest>,
    ) -> Result<Response<v1::ListOperationsResponse>, Status> {
        next(&mut self.script().operation_lists, "list_operations")
    }

    async fn wait_operation(
        &self,
        _: Request<v1::WaitOperationRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        self.script().seen.push("wait_operation".to_owned());
        if self.script().hang {
            std::future::pending::<()>().await;
        }
        let mut script = self.script();
        if script.waits.len() == 1 {
            let last = script.waits[0].clone();
            return last.map(Response::new);
        }
        next(&mut script.waits, "wait_operation")
    }

    async fn cancel_operation(
        &self,
        _: Request<v1::CancelOperationRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        next(&mut self.script().cancels, "cancel_operation")
    }
}

#[tonic::async_trait]
impl EventService for Fake {
    type WatchEventsStream = std::pin::Pin<Box<dyn Stream<Item = Result<v1::Event, Status>> + Send>>;

    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let request = request.into_inner();
        let mut script = self.script();
        script.seen.push(format!(
            "watch_events {} {:?}",
            request.after_resource_version, request.subject
        ));
        let messages = next(&mut script.streams, "watch_events")?.into_inner();
        // Not ended by itself: a stream lasts until something is wrong.
        let (open, forever) = tokio::sync::mpsc::channel(1);
        let stream = tokio_stream::iter(messages).chain(ReceiverStream::new(forever));
        tokio::spawn(async move {
            open.closed().await;
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn list_events(
        &self,
        _: Request<v1::ListEventsRequest>,
    ) -> Result<Response<v1::ListEventsResponse>, Status> {
        next(&mut self.script().events, "list_events")
    }
}

impl Fake {
    fn host(&self, seen: String) -> Result<Response<v1::Host>, Status> {
        let mut script = self.script();
        script.seen.push(seen);
        next(&mut script.hosts, "a host")
    }

    fn placement(&self, seen: String) -> Result<Response<v1::Placement>, Status> {
        let mut script = self.script();
        script.seen.push(seen);
        next(&mut script.placements, "a placement")
    }
}

fn taint(taint: &v1::Taint) -> String {
    format!(" {}={} {}", taint.key, taint.value, taint.soft)
}

#[tonic::async_trait]
impl HostService for Fake {
    async fn get_host(&self, request: Request<v1::GetHostRequest>) -> Result<Response<v1::Host>, Status> {
        self.host(format!("get_host {}", request.into_inner().name))
    }

    async fn list_hosts(
        &self,
        _: Request<v1::ListHostsRequest>,
    ) -> Result<Response<v1::ListHostsResponse>, Status> {
        next(&mut self.script().host_lists, "list_hosts")
    }

    async fn update_host(
        &self,
        request: Request<v1::UpdateHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        let request = request.into_inner();
        let (host, mask) = (
            request.host.unwrap_or_default(),
            request.update_mask.unwrap_or_default(),
        );
        self.host(format!(
            "update_host {} {} {:?} {:?}{} {}",
            host.name,
            host.etag,
            mask.paths,
            host.labels,
            host.taints.iter().map(taint).collect::<String>(),
            request.request_id
        ))
    }

    async fn cordon_host(
        &self,
        request: Request<v1::CordonHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        let request = request.into_inner();
        self.host(format!(
            "cordon_host {} {} {}",
            request.name, request.reason, request.request_id
        ))
    }

    async fn uncordon_host(
        &self,
        request: Request<v1::UncordonHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        let request = request.into_inner();
        self.host(format!("uncordon_host {} {}", request.name, request.request_id))
    }

    async fn set_host_power(
        &self,
        request: Request<v1::SetHostPowerRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        let request = request.into_inner();
        let said = request.redfish.map(|redfish| {
            let v1::RedfishService {
                url,
                system,
                fingerprint,
                credentials,
            } = redfish;
            format!("{url} [{system}] [{fingerprint}] {credentials}")
        });
        self.host(format!(
            "set_host_power {} {}",
            request.name,
            said.unwrap_or_default()
        ))
    }

    async fn read_host_power(
        &self,
        request: Request<v1::ReadHostPowerRequest>,
    ) -> Result<Response<v1::ReadHostPowerResponse>, Status> {
        self.script()
            .seen
            .push(format!("read_host_power {}", request.into_inner().name));
        Ok(Response::new(v1::ReadHostPowerResponse {
            power_state: "Off".into(),
            reset_types: vec!["On".into(), "ForceOff".into()],
        }))
    }

    async fn power_on_host(
        &self,
        request: Request<v1::PowerOnHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        self.host(format!("power_on_host {}", request.into_inner().name))
    }

    async fn power_off_host(
        &self,
        request: Request<v1::PowerOffHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        let request = request.into_inner();
        let how = (request.force, request.even_if_needed);
        self.host(format!("power_off_host {} {how:?}", request.name))
    }

    async fn drain_host(&self, request: Request<v1::DrainHostRequest>) -> Result<Response<v1::Host>, Status> {
        let request = request.into_inner();
        self.host(format!(
            "drain_host {} {} {} {}",
            request.name,
            request.deadline_seconds,
            request.mode().as_str_name(),
            request.validate_only
        ))
    }

    async fn cancel_host_drain(
        &self,
        request: Request<v1::CancelHostDrainRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        self.host(format!("cancel_host_drain {}", request.into_inner().name))
    }

    async fn restore_host(
        &self,
        request: Request<v1::RestoreHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        let request = request.into_inner();
        self.host(format!(
            "restore_host {} {}",
            request.name, request.deadline_seconds
        ))
    }

    async fn delete_host(
        &self,
        _: Request<v1::DeleteHostRequest>,
    ) -> Result<Response<v1::DeleteHostResponse>, Status> {
        Err(Status::unimplemented("not in the script"))
    }
}

#[tonic::async_trait]
impl PlanService for Fake {
    async fn create_plan(&self, _: Request<v1::CreatePlanRequest>) -> Result<Response<v1::Plan>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn get_plan(&self, _: Request<v1::GetPlanRequest>) -> Result<Response<v1::Plan>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn list_plans(
        &self,
        _: Request<v1::ListPlansRequest>,
    ) -> Result<Response<v1::ListPlansResponse>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn approve_plan(&self, _: Request<v1::ApprovePlanRequest>) -> Result<Response<v1::Plan>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn cancel_plan(&self, _: Request<v1::CancelPlanRequest>) -> Result<Response<v1::Plan>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn plan_maintenance(
        &self,
        request: Request<v1::PlanMaintenanceRequest>,
    ) -> Result<Response<v1::MaintenancePlan>, Status> {
        let request = request.into_inner();
        let mut script = self.script();
        script.seen.push(format!(
            "plan_maintenance {:?} {} {} {}",
            request.hosts, request.max_hosts, request.without_spare_host, request.max_groups
        ));
        next(&mut script.maintenance, "plan_maintenance")
    }
}

#[tonic::async_trait]
impl PlacementService for Fake {
    async fn get_placement(
        &self,
        request: Request<v1::GetPlacementRequest>,
    ) -> Result<Response<v1::Placement>, Status> {
        self.placement(format!("get_placement {}", request.into_inner().vm))
    }

    async fn explain_placement(
        &self,
        request: Request<v1::ExplainPlacementRequest>,
    ) -> Result<Response<v1::Placement>, Status> {
        use v1::explain_placement_request::Subject;
        let request = request.into_inner();
        let subject = match request.subject {
            Some(Subject::Vm(vm)) => format!("vm {vm}"),
            Some(Subject::Spec(spec)) => format!("spec {} {}", spec.vcpus, spec.memory_mib),
            None => "nothing".to_owned(),
        };
        self.placement(format!("explain_placement {subject} {}", request.host))
    }

    async fn estimate_capacity(
        &self,
        request: Request<v1::EstimateCapacityRequest>,
    ) -> Result<Response<v1::Capacity>, Status> {
        let request = request.into_inner();
        let mut script = self.script();
        script.seen.push(format!(
            "estimate_capacity {} {} {:?} {}",
            request.vcpus, request.memory_mib, request.topology_key, request.keep_domains
        ));
        next(&mut script.capacities, "estimate_capacity")
    }

    async fn get_placement_group(
        &self,
        request: Request<v1::GetPlacementGroupRequest>,
    ) -> Result<Response<v1::PlacementGroup>, Status> {
        let mut script = self.script();
        script
            .seen
            .push(format!("get_placement_group {}", request.into_inner().name));
        next(&mut script.placement_groups, "a placement group")
    }

    async fn list_placement_groups(
        &self,
        request: Request<v1::ListPlacementGroupsRequest>,
    ) -> Result<Response<v1::ListPlacementGroupsResponse>, Status> {
        let mut script = self.script();
        script.seen.push(format!(
            "list_placement_groups {:?}",
            request.into_inner().page_token
        ));
        next(&mut script.placement_group_lists, "list_placement_groups")
    }

    async fn create_placement_group(
        &self,
        request: Request<v1::CreatePlacementGroupRequest>,
    ) -> Result<Response<v1::PlacementGroup>, Status> {
        let group = request.into_inner().placement_group.unwrap_or_default();
        let mut script = self.script();
        script.seen.push(format!(
            "create_placement_group {} {} {} {:?}",
            group.name,
            group.rule().as_str_name(),
            group.preferred,
            group.topology_key
        ));
        next(&mut script.placement_groups, "a placement group")
    }

    async fn delete_placement_group(
        &self,
        request: Request<v1::DeletePlacementGroupRequest>,
    ) -> Result<Response<v1::DeletePlacementGroupResponse>, Status> {
        let mut script = self.script();
        script
            .seen
            .push(format!("delete_placement_group {}", request.into_inner().name));
        Ok(Response::new(v1::DeletePlacementGroupResponse {}))
    }
}

#[tonic::async_trait]
impl SiteService for Fake {
    async fn get_site(&self, _: Request<v1::GetSiteRequest>) -> Result<Response<v1::Site>, Status> {
        Err(Status::unimplemented("not in the script"))
    }

    async fn get_diagnosis(
        &self,
        request: Request<v1::GetDiagnosisRequest>,
    ) -> Result<Response<v1::Diagnosis>, Status> {
        let mut script = self.script();
        script
            .seen
            .push(format!("get_diagnosis {}", request.into_inner().deep));
        next(&mut script.diagnoses, "get_diagnosis")
    }

    async fn waive_host(&self, _: Request<v1::WaiveHostRequest>) -> Result<Response<v1::Site>, Status> {
        Err(Status::unimplemented("not in the script"))
    }

    async fn resume_site(&self, _: Request<v1::ResumeSiteRequest>) -> Result<Response<v1::Site>, Status> {
        Err(Status::unimplemented("not in the script"))
    }
}

impl Fake {
    fn image(&self, seen: String) -> Result<Response<v1::Image>, Status> {
        let mut script = self.script();
        script.seen.push(seen);
        next(&mut script.images, "an image")
    }
}

type Received = std::pin::Pin<Box<dyn Stream<Item = Result<v1::UploadImageResponse, Status>> + Send>>;

#[tonic::async_trait]
impl ImageService for Fake {
    async fn get_image(&self, request: Request<v1::GetImageRequest>) -> Result<Response<v1::Image>, Status> {
        let request = request.into_inner();
        let mut script = self.script();
        script
            .seen
            .push(format!("get_image {}:{}", request.name, request.version));
        if script.images.len() == 1 {
            return script.images[0].clone().map(Response::new);
        }
        next(&mut script.images, "get_image")
    }

    async fn list_images(
        &self,
        request: Request<v1::ListImagesRequest>,
    ) -> Result<Response<v1::ListImagesResponse>, Status> {
        let mut script = self.script();
        script
            .seen
            .push(format!("list_images {:?}", request.into_inner().name));
        next(&mut script.image_lists, "list_images")
    }

    async fn create_image(
        &self,
        request: Request<v1::CreateImageRequest>,
    ) -> Result<Response<v1::Image>, Status> {
        let request = request.into_inner();
        let (image, source) = (
            request.image.unwrap_or_default(),
            request.source.unwrap_or_default(),
        );
        self.image(format!(
            "create_image {}:{} {} {} {} {}:{}",
            image.name,
            image.version,
            image.format().as_str_name(),
            image.size_bytes,
            image.sha256,
            source.host,
            source.file
        ))
    }

    type UploadImageStream = Received;

    async fn upload_image(
        &self,
        request: Request<tonic::Streaming<v1::UploadImageRequest>>,
    ) -> Result<Response<Received>, Status> {
        let mut pieces = request.into_inner();
        let first = pieces.message().await?.unwrap_or_default();
        let (begin, breaks) = {
            let mut script = self.script();
            script
                .seen
                .push(format!("upload_image {}:{}", first.name, first.version));
            script
                .uploads
                .pop_front()
                .ok_or_else(|| Status::internal("the script has no answer to upload_image"))?
        };
        let (told, answers) = tokio::sync::mpsc::channel(1);
        let fake = self.clone();
        tokio::spawn(async move {
            let mut received_bytes = begin;
            loop {
                let answer = if breaks.is_some_and(|after| received_bytes - begin >= after) {
                    Err(Status::unavailable("the connection broke"))
                } else {
                    Ok(v1::UploadImageResponse { received_bytes })
                };
                if answer.is_err() || told.send(answer.clone()).await.is_err() {
                    let _ = told.send(answer).await;
                    return;
                }
                let Ok(Some(piece)) = pieces.message().await else {
                    return;
                };
                assert_eq!(piece.offset, received_bytes);
                received_bytes += piece.data.len() as u64;
                fake.script().uploaded.extend(&piece.data);
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn update_image(
        &self,
        request: Request<v1::UpdateImageRequest>,
    ) -> Result<Response<v1::Image>, Status> {
        let request = request.into_inner();
        let (mask, image) = (
            request.update_mask.unwrap_or_default(),
            request.image.unwrap_or_default(),
        );
        self.image(format!(
            "update_image {}:{} {} {:?} {} {} {}",
            image.name,
            image.version,
            image.etag,
            mask.paths,
            image.replicas,
            image.visibility().as_str_name(),
            image.owner
        ))
    }

    async fn delete_image(
        &self,
        request: Request<v1::DeleteImageRequest>,
    ) -> Result<Response<v1::DeleteImageResponse>, Status> {
        let request = request.into_inner();
        let mut script = self.script();
        script.seen.push(format!(
            "delete_image {}:{} {}",
            request.name, request.version, request.request_id
        ));
        Ok(Response::new(v1::DeleteImageResponse {}))
    }
}

/// A call of the network service: what is noted of it, and the answers that it takes from.
macro_rules! network_calls {
    ($($call:ident($request:ident) -> $answer:ident from $answers:ident: $seen:expr;)*) => {
        #[tonic::async_trait]
        impl NetworkService for Fake {
            $(async fn $call(&self, request: Request<v1::$request>) -> Result<Response<v1::$answer>, Status> {
                let seen: fn(v1::$request) -> String = $seen;
                let mut script = self.script();
                let seen = format!("{} {}", stringify!($call), seen(request.into_inner()));
                script.seen.push(seen.trim_end().to_owned());
                next(&mut script.$answers, stringify!($call))
            })*

            async fn delete_network(
                &self,
                request: Request<v1::DeleteNetworkRequest>,
            ) -> Result<Response<v1::DeleteNetworkResponse>, Status> {
                let request = request.into_inner();
                let mut script = self.script();
                script.seen.push(format!("delete_network {} {}", request.name, request.request_id));
                next(&mut script.network_deletions, "delete_network").map(|answer| answer.map(|()| v1::DeleteNetworkResponse {}))
            }

            async fn delete_security_group(
                &self,
                request: Request<v1::DeleteSecurityGroupRequest>,
            ) -> Result<Response<v1::DeleteSecurityGroupResponse>, Status> {
                let request = request.into_inner();
                let mut script = self.script();
                script.seen.push(format!("delete_security_group {} {}", request.name, request.etag));
                next(&mut script.network_deletions, "delete_security_group").map(|answer| answer.map(|()| v1::DeleteSecurityGroupResponse {}))
            }
        }
    };
}

network_calls! {
    get_network(GetNetworkRequest) -> Network from networks: |m| m.name;
    list_networks(ListNetworksRequest) -> ListNetworksResponse from network_lists: |m| m.page_token;
    create_network(CreateNetworkRequest) -> Network from networks: |m| format!("{:?}", m.network.unwrap_or_default());
    update_network(UpdateNetworkRequest) -> Network from networks: |m| {
        let network = m.network.unwrap_or_default();
        format!("{} {:?} {:?}", network.etag, m.update_mask.unwrap_or_default().paths, network.dns_servers)
    };
    list_network_interfaces(ListNetworkInterfacesRequest) -> ListNetworkInterfacesResponse from interfaces: |m| {
        format!("{} {}", m.network, m.page_token)
    };
    get_security_group(GetSecurityGroupRequest) -> SecurityGroup from groups: |m| m.name;
    list_security_groups(ListSecurityGroupsRequest) -> ListSecurityGroupsResponse from group_lists: |m| m.page_token;
    create_security_group(CreateSecurityGroupRequest) -> SecurityGroup from groups: |m| {
        let group = m.security_group.unwrap_or_default();
        format!("{} {}", group.name, group.rules.len())
    };
    update_security_group(UpdateSecurityGroupRequest) -> SecurityGroup from groups: |m| {
        let group = m.security_group.unwrap_or_default();
        let rule = |rule: &v1::SecurityRule| match &rule.remote {
            Some(v1::security_rule::Remote::Cidr(cidr)) => format!("{} {cidr}", rule.first_port),
            _ => format!("{} {}", rule.first_port, rule.description).trim_end().to_owned(),
        };
        let rules = group.rules.iter().map(rule).collect::<Vec<_>>().join(", ");
        format!("{} {:?} [{rules}]", group.etag, m.update_mask.unwrap_or_default().paths)
    };
}

impl Fake {
    fn volume(&self, seen: String) -> Result<Response<v1::Volume>, Status> {
        let mut script = self.script();
        script.seen.push(seen);
        next(&mut script.volumes, "a volume")
    }
}

#[tonic::async_trait]
impl VolumeService for Fake {
    async fn get_volume(
        &self,
        request: Request<v1::GetVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        self.volume(format!("get_volume {}", request.into_inner().name))
    }

    async fn list_volumes(
        &self,
        _: Request<v1::ListVolumesRequest>,
    ) -> Result<Response<v1::ListVolumesResponse>, Status> {
        Err(Status::unimplemented("not in the script"))
    }

    async fn create_volume(
        &self,
        request: Request<v1::CreateVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let volume = request.into_inner().volume.unwrap_or_default();
        self.volume(format!("create_volume {} {}", volume.name, volume.size_mib))
    }

    async fn update_volume(
        &self,
        request: Request<v1::UpdateVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let request = request.into_inner();
        let (mask, volume) = (
            request.update_mask.unwrap_or_default(),
            request.volume.unwrap_or_default(),
        );
        self.volume(format!(
            "update_volume {} {:?} {}",
            volume.etag, mask.paths, volume.size_mib
        ))
    }

    async fn delete_volume(
        &self,
        request: Request<v1::DeleteVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        self.volume(format!("delete_volume {}", request.into_inner().name))
    }

    async fn undelete_volume(
        &self,
        request: Request<v1::UndeleteVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let request = request.into_inner();
        self.volume(format!("undelete_volume {} {}", request.name, request.etag))
    }
}

/// The fake controller on a socket in a directory of its own, in a runtime of its own that can be torn down.
pub struct Controller {
    /// Its script.
    pub fake: Fake,
    dir: tempfile::TempDir,
    runtime: Option<Runtime>,
}

impl Drop for Controller {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Controller {
    /// Starts it.
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut controller = Self {
            fake: Fake::default(),
            dir,
            runtime: None,
        };
        controller.serve();
        controller
    }

    /// Serves, for the first time or again.
    pub fn serve(&mut self) {
        let listener = std::os::unix::net::UnixListener::bind(self.socket()).unwrap();
        listener.set_nonblocking(true).unwrap();
        let server = Server::builder()
            .add_service(VmServiceServer::new(self.fake.clone()))
            .add_service(OperationServiceServer::new(self.fake.clone()))
            .add_service(HostServiceServer::new(self.fake.clone()))
            .add_service(PlacementServiceServer::new(self.fake.clone()))
            .add_service(PlanServiceServer::new(self.fake.clone()))
            .add_service(SiteServiceServer::new(self.fake.clone()))
            .add_service(ImageServiceServer::new(self.fake.clone()))
            .add_service(NetworkServiceServer::new(self.fake.clone()))
            .add_service(VolumeServiceServer::new(self.fake.clone()))
            .add_service(EventServiceServer::new(self.fake.clone()));
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        runtime.spawn(async move {
            let incoming = UnixListenerStream::new(UnixListener::from_std(listener).unwrap());
            server.serve_with_incoming(incoming).await.unwrap();
        });
        self.runtime = Some(runtime);
    }

    /// Ends it as kill -9 does: connections break, the socket is gone.
    pub fn kill(&mut self) {
        self.runtime.take().expect("it runs").shutdown_background();
        std::fs::remove_file(self.socket()).unwrap();
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("controller.sock")
    }

    /// As [`Controller::run`], for a controller that is killed and started meanwhile.
    pub fn command<'a>(&self, args: &'a [&str]) -> impl Future<Output = Outcome> + use<'a> {
        let endpoint = format!("unix:{}", self.socket().display());
        let config = self.dir.path().join("none.toml");
        async move { run(&config, &["--endpoint", &endpoint], args, |_| {}).await }
    }

    /// Runs a command against it.
    pub async fn run(&self, args: &[&str]) -> Outcome {
        self.run_on(args, |_| {}).await
    }

    /// Runs a command on a terminal that is changed first.
    pub async fn run_on(&self, args: &[&str], change: impl FnOnce(&mut Term)) -> Outcome {
        let endpoint = format!("unix:{}", self.socket().display());
        let config = self.dir.path().join("none.toml");
        run(&config, &["--endpoint", &endpoint], args, change).await
    }
}

/// What a command showed, and its exit code.
#[derive(Debug)]
pub struct Outcome {
    /// Exit code.
    pub code: u8,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Write for Memory {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Memory {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

/// The time that all tests live in: 2026-11-23T12:00:00Z.
pub fn now() -> Timestamp {
    "2026-11-23T12:00:00Z".parse().unwrap()
}

/// So many seconds before [`now`], as the wire has it.
pub fn ago(seconds: i64) -> Option<prost_types::Timestamp> {
    Some(prost_types::Timestamp {
        seconds: now().as_second() - seconds,
        nanos: 0,
    })
}

/// Runs a command with a configuration.
pub async fn run(config: &Path, global: &[&str], args: &[&str], change: impl FnOnce(&mut Term)) -> Outcome {
    let config = config.to_str().unwrap();
    let all = ["dalgu", "--config", config]
        .into_iter()
        .chain(global.iter().copied())
        .chain(args.iter().copied());
    let cli = match Cli::try_parse_from(all) {
        Ok(cli) => cli,
        Err(error) => {
            return Outcome {
                code: 2,
                out: String::new(),
                err: error.to_string(),
            };
        }
    };
    let (out, err) = (Memory::default(), Memory::default());
    let mut term = Term {
        out: Box::new(out.clone()),
        err: Box::new(err.clone()),
        out_screen: false,
        err_screen: false,
        color: false,
        err_color: false,
        now,
        interrupt: || Box::pin(std::future::pending()),
    };
    change(&mut term);
    let code = match dalgu::run(cli, &mut term).await {
        Ok(()) => 0,
        Err(error) => {
            exit::report(&mut term, &error).unwrap();
            error.code() as u8
        }
    };
    Outcome {
        code,
        out: out.text(),
        err: err.text(),
    }
}
