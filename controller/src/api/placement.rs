//! `dalgu.v1.PlacementService`. What is peculiar to placement groups is in [`group`].

mod group;

use dalgu_proto::{
    ids::{HostName, VmName},
    placement::{groups, tolerations},
    reason,
    v1::{self, explain_placement_request::Subject, placement_service_server::PlacementService},
    vm::Spec,
};
use tonic::{Request, Response, Status};

use super::{Services, peer, vm::bad, wire};
use crate::{
    blocking::beside,
    hosts,
    placement::{self, Capacity, Policy, Request as Question, Rules, Spare},
    placement_groups,
    state::State,
    verbs::{Error, create, migrate, placement_group},
};

/// Most domains for which room can be kept.
const MAX_KEEP: u32 = 1000;

fn vm_name(value: &str) -> Result<VmName, Status> {
    value
        .parse()
        .map_err(|error: dalgu_proto::ids::Error| reason::invalid("vm", error.to_string()))
}

/// A VM of the size that capacity is asked for, which boots anything.
fn question(m: &v1::EstimateCapacityRequest) -> Result<Question, Status> {
    let spec = v1::VmSpec {
        vcpus: m.vcpus,
        memory_mib: m.memory_mib,
        host_selector: m.host_selector.clone(),
        cpu_policy: m.cpu_policy,
        huge_page_kib: m.huge_page_kib,
        numa_policy: m.numa_policy,
        numa_nodes: m.numa_nodes,
        devices: m.devices.clone(),
        kernel_boot: Some(v1::KernelBoot {
            kernel: "any".to_owned(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let rules = Rules {
        tolerations: tolerations("tolerations", &m.tolerations).map_err(bad)?,
        ..Rules::default()
    };
    Ok(Question::new(Spec::try_from(spec).map_err(bad)?).with_rules(rules))
}

/// How many more VMs leave protected domains their room, and which of these have too little now.
fn protected(state: &State, question: &Question, policy: Policy) -> (u64, Vec<v1::ShortDomain>) {
    let views = hosts::views(state);
    let spare = Spare::of(&views, &state.protect);
    let short = spare.short_domains().map(|short| v1::ShortDomain {
        domain: short.domain.to_owned(),
        vcpus: short.lacking.vcpus,
        memory_mib: short.lacking.memory_mib,
    });
    (
        placement::protected(question, &views, policy, &state.protect),
        short.collect(),
    )
}

/// A VM that does not exist, and where it would be.
pub(super) struct NewVm<'a> {
    /// What it would be.
    pub(super) spec: v1::VmSpec,
    /// The only host to consider; any if empty.
    pub(super) host: &'a str,
    /// Its placement groups.
    pub(super) groups: &'a [String],
    /// What it would put up with.
    pub(super) tolerations: &'a [v1::Toleration],
}

impl NewVm<'_> {
    /// What its creation would ask of hosts.
    pub(super) fn question(self, state: &State, principal: &str) -> Result<Question, Status> {
        let host = requested_host(state, self.host)?;
        let firmware_given = self.spec.firmware() != v1::Firmware::Unspecified;
        let spec = Spec::try_from(self.spec)
            .map_err(|invalid| reason::invalid(&format!("spec.{}", invalid.field), invalid.message))?;
        let found = create::resolve(state, principal, spec, firmware_given).map_err(of_spec)?;
        let groups = groups("placement_groups", self.groups).map_err(bad)?;
        let tolerations = tolerations("tolerations", self.tolerations).map_err(bad)?;
        placement_group::are_there(state, &groups)?;
        let rules = placement_groups::of_new(state, &groups, &tolerations);
        Ok(Question::new(found.spec)
            .with_needs(found.needs)
            .with_rules(rules)
            .on(host))
    }
}

fn requested_host(state: &State, name: &str) -> Result<Option<HostName>, Status> {
    if name.is_empty() {
        return Ok(None);
    }
    let host: HostName = name
        .parse()
        .map_err(|e: dalgu_proto::ids::Error| reason::invalid("host", e.to_string()))?;
    match state.hosts.contains_key(&host) {
        true => Ok(Some(host)),
        false => Err(Error::HostNotFound(host.to_string()).into()),
    }
}

/// What is wrong with the specification of a VM that would be made: here it is no part of a VM.
fn of_spec(error: Error) -> Status {
    match error {
        Error::Invalid { field, message } => {
            reason::invalid(field.strip_prefix("vm.").unwrap_or(&field), message)
        }
        error => error.into(),
    }
}

#[tonic::async_trait]
impl PlacementService for Services {
    async fn get_placement(
        &self,
        request: Request<v1::GetPlacementRequest>,
    ) -> Result<Response<v1::Placement>, Status> {
        let name = vm_name(&request.get_ref().vm)?;
        let state = self.db.snapshot();
        let refused = state.refused_placements.get(&name);
        let placement = match (state.vm_by_name(&name), refused) {
            (Some(vm), _) => placement::to_wire(&vm.decision, Some(vm.decide_time)),
            (None, Some(_)) => v1::Placement::default(),
            (None, None) => return Err(Error::VmNotFound(name.to_string()).into()),
        };
        Ok(Response::new(v1::Placement {
            refused: refused.map(|refused| wire::refused(refused)),
            ..placement
        }))
    }

    async fn explain_placement(
        &self,
        request: Request<v1::ExplainPlacementRequest>,
    ) -> Result<Response<v1::Placement>, Status> {
        let principal = peer(&request)?.to_string();
        let request = request.into_inner();
        let state = self.db.snapshot();
        let ignore_protection = request.ignore_protection;
        let question = match request.subject {
            None => return Err(reason::invalid("subject", "give a spec, or the name of a VM")),
            Some(Subject::Spec(spec)) => {
                let new = NewVm {
                    spec,
                    host: &request.host,
                    groups: &request.placement_groups,
                    tolerations: &request.tolerations,
                };
                new.question(&state, &principal)?
            }
            Some(Subject::Vm(name)) => {
                let name = vm_name(&name)?;
                let vm = state
                    .vm_by_name(&name)
                    .ok_or_else(|| Error::VmNotFound(name.to_string()))?;
                migrate::request(&state, vm, requested_host(&state, &request.host)?)
            }
        };
        let question = question.ignoring_protection(ignore_protection);
        let rule = create::rule(&state, self.config.placement.policy());
        let decision = placement::decide(&question, &hosts::views(&state), rule);
        Ok(Response::new(placement::to_wire(&decision, Some(self.db.now()))))
    }

    async fn estimate_capacity(
        &self,
        request: Request<v1::EstimateCapacityRequest>,
    ) -> Result<Response<v1::Capacity>, Status> {
        let question = question(request.get_ref())?;
        let m = request.into_inner();
        if m.keep_domains > MAX_KEEP {
            return Err(reason::invalid(
                "keep_domains",
                format!("must be 0 to {MAX_KEEP}"),
            ));
        }
        let key = Some(m.topology_key.as_str()).filter(|key| !key.is_empty());
        let keep = usize::try_from(m.keep_domains).unwrap_or(usize::MAX);
        let state = self.db.snapshot();
        let capacity = Capacity::of(&question, &hosts::views(&state), key, keep);
        let domains = capacity.domains.into_iter();
        let policy = self.config.placement.policy();
        let (vms_protected, short_domains) = match state.protect.is_empty() {
            true => Default::default(),
            false => {
                beside({
                    let state = state.clone();
                    move || protected(&state, &question, policy)
                })
                .await
            }
        };
        Ok(Response::new(v1::Capacity {
            vms: capacity.vms,
            vms_keeping: capacity.keeping,
            domains: domains
                .map(|(domain, of)| v1::DomainCapacity {
                    domain,
                    hosts: of.hosts,
                    vms: of.vms,
                    held_vms: of.held,
                })
                .collect(),
            protects: state.protect.to_string(),
            vms_protected,
            short_domains,
        }))
    }

    async fn get_placement_group(
        &self,
        request: Request<v1::GetPlacementGroupRequest>,
    ) -> Result<Response<v1::PlacementGroup>, Status> {
        group::get(self, &request.get_ref().name)
    }

    async fn list_placement_groups(
        &self,
        request: Request<v1::ListPlacementGroupsRequest>,
    ) -> Result<Response<v1::ListPlacementGroupsResponse>, Status> {
        group::list(self, request.get_ref())
    }

    async fn create_placement_group(
        &self,
        request: Request<v1::CreatePlacementGroupRequest>,
    ) -> Result<Response<v1::PlacementGroup>, Status> {
        group::create(self, &request).await
    }

    async fn delete_placement_group(
        &self,
        request: Request<v1::DeletePlacementGroupRequest>,
    ) -> Result<Response<v1::DeletePlacementGroupResponse>, Status> {
        group::delete(self, &request).await
    }
}
