//! `dalgu.v1.VmService`.

mod batch;

use std::{fmt::Write as _, ops::Bound};

use dalgu_proto::{
    ids::{HostName, VmName},
    placement, reason,
    v1::{self, vm_service_server::VmService},
    vm::{Invalid, MEMORY_MIB, RestartMode, Spec, first_boot::Documents},
};
use futures::{StreamExt, stream::BoxStream};
use prost::Message;
use tonic::{Code, Request, Response, Status};

use super::{Services, page::Page, request, wire};
use crate::{
    agent_client,
    model::{OperationKind, Outcome},
    verbs::{
        self, Caller, Error,
        create::{self, Create, DEFAULT_GRACE_SECONDS},
        migrate::{DEFAULT_DOWNTIME_MS, Migrate},
        power::Power,
        refused,
        update::{self, Update},
    },
};

const MAX_DESCRIPTION: usize = 1024;
const MAX_GRACE_SECONDS: u32 = 3600;
const MAX_DOWNTIME_MS: u32 = 10_000;
const MUTABLE: [&str; 12] = [
    "labels",
    "description",
    "drain_mode",
    "placement_groups",
    "tolerations",
    "spec.restart_policy",
    "spec.vcpus",
    "spec.memory_mib",
    "spec.max_vcpus",
    "spec.max_memory_mib",
    "spec.disks",
    "spec.nics",
];
const MUTABLE_TEXT: &str = "labels, description, drain_mode, placement_groups, tolerations, spec.restart_policy, spec.vcpus, spec.memory_mib, spec.max_vcpus, \
    spec.max_memory_mib, spec.disks, spec.nics";

type Answer = Result<Response<v1::Operation>, Status>;

impl Services {
    /// Does a verb once, and answers with its operation.
    pub(super) async fn operation(
        &self,
        caller: Caller,
        change: impl FnOnce(&mut crate::state::Tx, &Caller) -> Result<Outcome, Error>,
    ) -> Answer {
        self.placed(caller, None, change).await
    }

    /// The same for what needs a host; why there was none is kept.
    async fn placed(
        &self,
        caller: Caller,
        of: Option<(&VmName, OperationKind)>,
        change: impl FnOnce(&mut crate::state::Tx, &Caller) -> Result<Outcome, Error>,
    ) -> Answer {
        let outcome = self
            .db
            .transact(|tx| verbs::once(tx, &caller, |tx| change(tx, &caller)))
            .await;
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => {
                self.wake(&error).await;
                if let Some((vm, kind)) = of {
                    refused::keep(&self.db, vm, kind, &error).await;
                }
                return Err(error.into());
            }
        };
        let Outcome::Operation(id) = outcome else {
            return Err(Error::RequestReused(caller.request_id).into());
        };
        let state = self.db.snapshot();
        let operation = wire::operation_by_id(&state, id, self.db.now());
        Ok(Response::new(operation.ok_or_else(|| {
            Status::from(Error::OperationNotFound(id.to_string()))
        })?))
    }

    async fn power(&self, caller: Caller, name: &str, etag: &str, ask: Power) -> Answer {
        self.operation(caller, |tx, caller| {
            verbs::power::power(tx, caller, name, etag, ask)
        })
        .await
    }
}

/// A request without maps, in a form that is always the same.
fn body(method: &str, message: &impl Message) -> String {
    let mut text = format!("{method} ");
    for byte in message.encode_to_vec() {
        write!(text, "{byte:02x}").expect("a string takes everything");
    }
    text
}

fn host_name(field: &str, value: &str) -> Result<Option<HostName>, Status> {
    if value.is_empty() {
        return Ok(None);
    }
    value
        .parse()
        .map(Some)
        .map_err(|error: dalgu_proto::ids::Error| reason::invalid(field, error.to_string()))
}

pub(super) fn vm_name(field: &str, value: &str) -> Result<VmName, Status> {
    value
        .parse()
        .map_err(|error: dalgu_proto::ids::Error| reason::invalid(field, error.to_string()))
}

/// A field that does not hold an allowed value.
pub(super) fn bad(invalid: Invalid) -> Status {
    reason::invalid(&invalid.field, invalid.message)
}

/// Checks a VM to be made.
fn create(services: &Services, request: &v1::CreateVmRequest) -> Result<Create, Status> {
    let vm = request
        .vm
        .clone()
        .ok_or_else(|| reason::invalid("vm", "must be given"))?;
    let output_only = [
        ("vm.uid", !vm.uid.is_empty()),
        ("vm.status", vm.status.is_some()),
        ("vm.generation", vm.generation != 0),
        ("vm.etag", !vm.etag.is_empty()),
        ("vm.desired_power_state", vm.desired_power_state != 0),
        ("vm.create_time", vm.create_time.is_some()),
        ("vm.delete_time", vm.delete_time.is_some()),
    ];
    if let Some((field, _)) = output_only.iter().find(|(_, set)| *set) {
        return Err(reason::invalid(field, "is set by the controller: leave it empty"));
    }
    let name = vm_name("vm.name", &vm.name)?;
    let spec = vm
        .spec
        .ok_or_else(|| reason::invalid("vm.spec", "must be given"))?;
    let documents = spec.first_boot.as_ref().map(Documents::from).unwrap_or_default();
    let invalid = |invalid: Invalid| reason::invalid(&format!("vm.spec.{}", invalid.field), invalid.message);
    let firmware_given = spec.firmware != i32::from(v1::Firmware::Unspecified);
    let spec = Spec::try_from(spec).map_err(invalid)?;
    if let Some(index) = spec.disks.iter().position(|disk| disk.backup.is_some()) {
        let field = format!("vm.spec.disks[{index}].backup");
        return Err(reason::invalid(&field, "is set by RestoreBackup: leave it empty"));
    }
    if let Some(first_boot) = &spec.first_boot {
        first_boot.check(&documents).map_err(invalid)?;
    }
    Ok(Create {
        name,
        spec,
        firmware_given,
        documents,
        labels: request::labels("vm.labels", &vm.labels)?,
        drain_mode: wire::drain_mode("vm.drain_mode", vm.drain_mode)?.unwrap_or_default(),
        placement_groups: placement::groups("vm.placement_groups", &vm.placement_groups).map_err(bad)?,
        tolerations: placement::tolerations("vm.tolerations", &vm.tolerations).map_err(bad)?,
        description: request::text("vm.description", vm.description, MAX_DESCRIPTION)?,
        stopped: request.stopped,
        host: host_name("host", &request.host)?,
        ignore_protection: request.ignore_protection,
        policy: services.config.placement.policy(),
    })
}

/// All that a creation asks for, in a form that is always the same.
fn content(new: &Create) -> String {
    let content = (
        &new.name,
        &new.spec,
        &new.labels,
        &new.description,
        new.drain_mode,
        new.stopped,
        &new.host,
    );
    let ignoring = if new.ignore_protection {
        " ignoring protection"
    } else {
        ""
    };
    // Only where there are some: what was asked for before these were looked at is known by the same words.
    let rules = match (new.placement_groups.is_empty(), new.tolerations.is_empty()) {
        (true, true) => String::new(),
        _ => format!(" {:?} {:?}", new.placement_groups, new.tolerations),
    };
    format!("CreateVm {content:?}{ignoring}{rules}")
}

/// Checks a change of a VM.
fn update(
    services: &Services,
    vm: &v1::Vm,
    paths: &[String],
    ignore_protection: bool,
) -> Result<Update, Status> {
    let mut update = Update {
        ignore_protection,
        policy: services.config.placement.policy(),
        ..Update::default()
    };
    let given = specification(vm.spec.as_ref(), paths)?;
    for path in paths {
        match path.as_str() {
            "labels" => update.labels = Some(request::labels("vm.labels", &vm.labels)?),
            "description" => {
                let text = request::text("vm.description", vm.description.clone(), MAX_DESCRIPTION)?;
                update.description = Some(text);
            }
            "drain_mode" => {
                let mode = wire::drain_mode("vm.drain_mode", vm.drain_mode)?;
                update.drain_mode = Some(mode.unwrap_or_default());
            }
            "placement_groups" => {
                let groups = placement::groups("vm.placement_groups", &vm.placement_groups);
                update.placement.groups = Some(groups.map_err(bad)?);
            }
            "tolerations" => {
                let tolerations = placement::tolerations("vm.tolerations", &vm.tolerations);
                update.placement.tolerations = Some(tolerations.map_err(bad)?);
            }
            "spec.vcpus" => update.vcpus = Some(given.vcpus),
            "spec.memory_mib" => update.memory_mib = Some(given.memory_mib),
            "spec.max_vcpus" => update.max_vcpus = Some(given.max_vcpus),
            "spec.max_memory_mib" => update.max_memory_mib = Some(given.max_memory_mib),
            "spec.disks" => {
                update.disks = Some(given.disks.clone());
                let disks = vm.spec.iter().flat_map(|spec| &spec.disks);
                let poolless = disks.filter(|disk| disk.pool.is_empty());
                update.poolless = poolless.map(|disk| disk.name.clone()).collect();
            }
            "spec.nics" => update.nics = Some(given.nics.clone()),
            _ => update.restart_policy = Some(given.restart_policy),
        }
    }
    Ok(update)
}

/// What was given of a specification, checked as that of a new VM would be; what is not to be changed is any that passes.
fn specification(given: Option<&v1::VmSpec>, paths: &[String]) -> Result<Spec, Status> {
    let given = given.cloned().unwrap_or_default();
    let named = |path: &str| paths.iter().any(|other| other == path);
    let mut wire = v1::VmSpec {
        vcpus: 1,
        memory_mib: *MEMORY_MIB.start(),
        kernel_boot: Some(v1::KernelBoot {
            kernel: "any".to_owned(),
            ..Default::default()
        }),
        ..Default::default()
    };
    if named("spec.restart_policy") {
        wire.restart_policy = given.restart_policy;
    }
    if named("spec.vcpus") {
        wire.vcpus = given.vcpus;
    }
    if named("spec.memory_mib") {
        wire.memory_mib = given.memory_mib;
    }
    if named("spec.max_vcpus") {
        wire.max_vcpus = given.max_vcpus;
    }
    if named("spec.max_memory_mib") {
        wire.max_memory_mib = given.max_memory_mib;
    }
    if named("spec.disks") {
        wire.disks = given.disks;
    }
    if named("spec.nics") {
        wire.nics = given.nics;
    }
    Spec::try_from(wire)
        .map_err(|invalid| reason::invalid(&format!("vm.spec.{}", invalid.field), invalid.message))
}

#[tonic::async_trait]
impl VmService for Services {
    async fn get_vm(&self, request: Request<v1::GetVmRequest>) -> Result<Response<v1::Vm>, Status> {
        let name = vm_name("name", &request.get_ref().name)?;
        let state = self.db.snapshot();
        let vm = state
            .vm_by_name(&name)
            .ok_or_else(|| Error::VmNotFound(name.to_string()))?;
        Ok(Response::new(wire::vm(&state, vm)))
    }

    async fn list_vms(
        &self,
        request: Request<v1::ListVmsRequest>,
    ) -> Result<Response<v1::ListVmsResponse>, Status> {
        let request = request.into_inner();
        let host = host_name("host", &request.host)?;
        let selector = request::labels("label_selector", &request.label_selector)?;
        let page = Page::of(
            request.page_size,
            &request.page_token,
            &format!("vms {host:?} {selector:?}"),
        )?;
        let from = match &page.after {
            Some(name) => Bound::Excluded(vm_name("page_token", name)?),
            None => Bound::Unbounded,
        };
        let state = self.db.snapshot();
        let found = state
            .vm_names
            .range((from, Bound::Unbounded))
            .filter_map(|(_, id)| state.vms.get(id))
            .filter(|vm| {
                host.as_ref().is_none_or(|host| vm.owner == *host)
                    && crate::model::matches(&vm.labels, &selector)
            });
        let (vms, next_page_token) = page.take(found, |vm| vm.name.to_string());
        let vms = vms.into_iter().map(|vm| wire::vm(&state, vm)).collect();
        Ok(Response::new(v1::ListVmsResponse {
            vms,
            next_page_token,
            resource_version: state.meta.revision,
        }))
    }

    async fn create_vm(&self, request: Request<v1::CreateVmRequest>) -> Answer {
        let message = request.get_ref();
        let new = create(self, message)?;
        let caller = request::caller(&request, &message.request_id, &content(&new))?;
        if message.validate_only {
            let state = self.db.snapshot();
            let scan = create::scan(&state, new.policy);
            let decision = create::check(&state, &caller.principal, &new, scan)?.decision;
            let now = self.db.now();
            let answer = wire::checked(OperationKind::Create, new.name.as_str(), decision.summary, now);
            return Ok(Response::new(answer));
        }
        let name = new.name.clone();
        self.placed(caller, Some((&name, OperationKind::Create)), |tx, caller| {
            create::create(tx, caller, new)
        })
        .await
    }

    async fn batch_create_vms(
        &self,
        request: Request<v1::BatchCreateVmsRequest>,
    ) -> Result<Response<v1::BatchCreateVmsResponse>, Status> {
        batch::create(self, &request).await
    }

    async fn update_vm(&self, request: Request<v1::UpdateVmRequest>) -> Result<Response<v1::Vm>, Status> {
        let message = request.get_ref();
        let vm = message
            .vm
            .as_ref()
            .ok_or_else(|| reason::invalid("vm", "must be given"))?;
        let paths = request::mask(message.update_mask.clone(), &MUTABLE, MUTABLE_TEXT)?;
        let change = update(self, vm, &paths, message.ignore_protection)?;
        let name = vm_name("vm.name", &vm.name)?;
        let content = format!("UpdateVm {name} {:?} {change:?}", vm.etag);
        let caller = request::caller(&request, &message.request_id, &content)?;
        let etag = vm.etag.clone();
        self.db
            .transact(|tx| {
                verbs::once(tx, &caller, |tx| {
                    update::update(tx, &caller, name.as_str(), &etag, change)
                })
            })
            .await?;
        let state = self.db.snapshot();
        let vm = state
            .vm_by_name(&name)
            .ok_or_else(|| Error::VmNotFound(name.to_string()))?;
        Ok(Response::new(wire::vm(&state, vm)))
    }

    async fn delete_vm(&self, request: Request<v1::DeleteVmRequest>) -> Answer {
        let caller = request::caller(
            &request,
            &request.get_ref().request_id,
            &body("DeleteVm", request.get_ref()),
        )?;
        let m = request.into_inner();
        self.operation(caller, |tx, caller| {
            verbs::power::delete(tx, caller, &m.name, &m.etag, m.force)
        })
        .await
    }

    async fn start_vm(&self, request: Request<v1::StartVmRequest>) -> Answer {
        let caller = request::caller(
            &request,
            &request.get_ref().request_id,
            &body("StartVm", request.get_ref()),
        )?;
        let m = request.into_inner();
        self.power(caller, &m.name, &m.etag, Power::Start).await
    }

    async fn stop_vm(&self, request: Request<v1::StopVmRequest>) -> Answer {
        let caller = request::caller(
            &request,
            &request.get_ref().request_id,
            &body("StopVm", request.get_ref()),
        )?;
        let m = request.into_inner();
        if m.grace_period_seconds > MAX_GRACE_SECONDS {
            let message = format!("must be 1 to {MAX_GRACE_SECONDS}, or 0 for {DEFAULT_GRACE_SECONDS}");
            return Err(reason::invalid("grace_period_seconds", message));
        }
        let grace_period_seconds = match (m.force, m.grace_period_seconds) {
            (true, _) => 0,
            (false, 0) => DEFAULT_GRACE_SECONDS,
            (false, seconds) => seconds,
        };
        self.power(caller, &m.name, &m.etag, Power::Stop { grace_period_seconds })
            .await
    }

    async fn restart_vm(&self, request: Request<v1::RestartVmRequest>) -> Answer {
        let caller = request::caller(
            &request,
            &request.get_ref().request_id,
            &body("RestartVm", request.get_ref()),
        )?;
        let m = request.into_inner();
        let mode = v1::RestartMode::try_from(m.mode)
            .map_err(|_| reason::invalid("mode", "is not a value of RestartMode"))?;
        self.power(caller, &m.name, &m.etag, Power::Restart(RestartMode::from(mode)))
            .await
    }

    async fn pause_vm(&self, request: Request<v1::PauseVmRequest>) -> Answer {
        let caller = request::caller(
            &request,
            &request.get_ref().request_id,
            &body("PauseVm", request.get_ref()),
        )?;
        let m = request.into_inner();
        self.power(caller, &m.name, &m.etag, Power::Pause).await
    }

    async fn resume_vm(&self, request: Request<v1::ResumeVmRequest>) -> Answer {
        let caller = request::caller(
            &request,
            &request.get_ref().request_id,
            &body("ResumeVm", request.get_ref()),
        )?;
        let m = request.into_inner();
        self.power(caller, &m.name, &m.etag, Power::Resume).await
    }

    async fn migrate_vm(&self, request: Request<v1::MigrateVmRequest>) -> Answer {
        let caller = request::caller(
            &request,
            &request.get_ref().request_id,
            &body("MigrateVm", request.get_ref()),
        )?;
        let m = request.into_inner();
        if m.max_downtime_ms > MAX_DOWNTIME_MS {
            let message = format!("must be 1 to {MAX_DOWNTIME_MS}, or 0 for {DEFAULT_DOWNTIME_MS}");
            return Err(reason::invalid("max_downtime_ms", message));
        }
        let ask = Migrate {
            destination: host_name("destination_host", &m.destination_host)?,
            max_downtime_ms: if m.max_downtime_ms == 0 {
                DEFAULT_DOWNTIME_MS
            } else {
                m.max_downtime_ms
            },
            bandwidth_mib_per_second: m.bandwidth_mib_per_second,
            ignore_protection: m.ignore_protection,
            policy: self.config.placement.policy(),
        };
        let name = vm_name("name", &m.name)?;
        self.placed(caller, Some((&name, OperationKind::Migrate)), |tx, caller| {
            verbs::migrate::migrate(tx, caller, &m.name, &m.etag, ask)
        })
        .await
    }

    type ReadConsoleStream = BoxStream<'static, Result<v1::ReadConsoleResponse, Status>>;

    async fn read_console(
        &self,
        request: Request<v1::ReadConsoleRequest>,
    ) -> Result<Response<Self::ReadConsoleStream>, Status> {
        let request = request.into_inner();
        let name = vm_name("name", &request.name)?;
        let state = self.db.snapshot();
        let vm = state
            .vm_by_name(&name)
            .ok_or_else(|| Error::VmNotFound(name.to_string()))?;
        let stream = self
            .agents
            .console(&state, vm, request.tail_bytes, request.follow)
            .await
            .map_err(from_agent)?;
        let pieces = stream.map(|piece| piece.map(|piece| v1::ReadConsoleResponse { data: piece.data }));
        Ok(Response::new(
            pieces.take_until(self.stop.clone().cancelled_owned()).boxed(),
        ))
    }
}

/// What an agent said, or that it said nothing.
pub(super) fn from_agent(error: agent_client::Error) -> Status {
    match error {
        agent_client::Error::Refused { ref status, .. } if !error.is_silence() => (**status).clone(),
        error => {
            let message = format!("{error}: see whether the host is up, then repeat");
            reason::status(Code::Unavailable, "HOST_UNREACHABLE", message)
        }
    }
}
