//! A new VM.

use std::collections::{BTreeMap, BTreeSet};

use dalgu_proto::{
    ids::{Epoch, Generation, HostName, PlacementGroupName, VmId, VmName},
    placement::Toleration,
    vm::{Disk, PowerState, RestartMode, Spec, first_boot::Documents},
};
use uuid::Uuid;

use super::{Caller, Error, MacHolder, accept, new_operation, placement_group, room};
use crate::{
    hosts, images,
    model::{DrainMode, EventKind, HostState, Intent, OperationKind, Outcome, VmRecord},
    networks,
    placement::{self, Decision, Needs, Policy, Request, Rule},
    placement_groups,
    power::look,
    state::{State, Tx},
    volumes,
};

/// Verdicts kept with each VM: why this host and not the next ones. Each is 0.4 kB in the store, is read at each start of the
/// controller and written with each change of the VM.
pub const VERDICTS_KEPT: usize = 8;
/// Ids that are tried for a VM whose MAC addresses are left to Dalgu: even with a million addresses taken, one in sixteen
/// of all, so many in a row are unheard of.
const IDS_TRIED: u32 = 32;
/// A host fetches at least so many bytes of an image in a second, 8 MiB, where all is well: a creation has that much more time.
const FETCHED_PER_SECOND: u64 = 8 << 20;
/// Time a guest has to shut down where nobody says.
pub const DEFAULT_GRACE_SECONDS: u32 = 60;

/// A new VM.
#[derive(Debug, Clone)]
pub struct Create {
    /// Name.
    pub name: VmName,
    /// What it is made of.
    pub spec: Spec,
    /// The specification says what firmware it has; else its image does.
    pub firmware_given: bool,
    /// Documents of its first boot.
    pub documents: Documents,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Description.
    pub description: String,
    /// What becomes of it when its host is drained.
    pub drain_mode: DrainMode,
    /// Placement groups that it is in.
    pub placement_groups: BTreeSet<PlacementGroupName>,
    /// Taints of hosts that it puts up with.
    pub tolerations: BTreeSet<Toleration>,
    /// Leave it powered off.
    pub stopped: bool,
    /// Only this host.
    pub host: Option<HostName>,
    /// It may take the room that is kept for protected domains.
    pub ignore_protection: bool,
    /// Which host is best.
    pub policy: Policy,
}

/// Finds a host for a VM on the state as it is; nothing else is decided meanwhile in a transaction. `decide` is [`scan`] or
/// [`Tx::decide`].
pub fn place(
    state: &State,
    request: &Request,
    decide: impl FnOnce(&Request) -> Decision,
) -> Result<(HostName, Decision), Error> {
    if let Some(host) = request
        .host
        .as_ref()
        .filter(|host| !state.hosts.contains_key(*host))
    {
        return Err(Error::HostNotFound(host.to_string()));
    }
    let decision = decide(request);
    match decision.host.clone() {
        Some(host) => Ok((host, decision)),
        // Soon it is known whether there is room: silent hosts report, or count as unreachable.
        None if state
            .live
            .values()
            .any(|live| live.state == HostState::Initializing) =>
        {
            Err(Error::Initializing)
        }
        None => {
            let hosts = hosts::views(state);
            Err(match placement::conflict(request, &hosts) {
                Some(conflict) => Error::PlacementConflict(conflict),
                None => Error::NoCapacity {
                    sleeper: look::sleeper(state, request),
                    in_pieces: placement::is_in_pieces(request, &hosts),
                    decision: Box::new(decision),
                },
            })
        }
    }
}

/// Decides on a state that is only looked at.
pub fn scan(state: &State, policy: Policy) -> impl FnOnce(&Request) -> Decision {
    move |request| {
        placement::decide_keeping(request, &hosts::views(state), rule(state, policy), VERDICTS_KEPT)
    }
}

/// How it is decided on a state.
pub fn rule(state: &State, policy: Policy) -> Rule<'_> {
    Rule {
        protect: Some(&state.protect),
        ..Rule::from(&policy)
    }
}

/// What a creation would do now.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The host.
    pub owner: HostName,
    /// Why that one.
    pub decision: Decision,
    /// What the VM is made of, with the images that its disks are made from and the addresses of its interfaces.
    pub spec: Spec,
    /// Size of these images, and of the disks that are made from a backup.
    pub image_bytes: u64,
}

/// Checks the name and the MAC addresses, finds what the VM names, and then a host.
pub fn check(
    state: &State,
    principal: &str,
    new: &Create,
    decide: impl FnOnce(&Request) -> Decision,
) -> Result<Plan, Error> {
    if state.vm_names.contains_key(&new.name) {
        return Err(Error::VmExists(new.name.clone()));
    }
    free_macs(state, &new.spec, None)?;
    let found = resolve(state, principal, new.spec.clone(), new.firmware_given)?;
    placement_group::are_there(state, &new.placement_groups)?;
    let rules = placement_groups::of_new(state, &new.placement_groups, &new.tolerations);
    let mut spec = found.spec;
    let request = Request::new(spec.clone())
        .with_needs(found.needs)
        .with_rules(rules)
        .ignoring_protection(new.ignore_protection)
        .on(new.host.clone());
    let (owner, decision) = place(state, &request, decide)?;
    if let Some(host) = state.hosts.get(&owner) {
        images::resolve::clone_modes(&mut spec, host)?;
    }
    Ok(Plan {
        owner,
        decision,
        spec,
        image_bytes: found.image_bytes,
    })
}

/// What a new VM is made of, with all that it names filled in.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// With its volumes, the images that its disks are made from, its firmware and addresses.
    pub spec: Spec,
    /// What its host must have for these.
    pub needs: Needs,
    /// Size of the images, and of the disks that are made from a backup.
    pub image_bytes: u64,
}

/// Finds volumes and images, and gives addresses.
pub fn resolve(
    state: &State,
    principal: &str,
    mut spec: Spec,
    firmware_given: bool,
) -> Result<Resolved, Error> {
    volumes::resolve::volumes(state, &mut spec.disks, &[])?;
    let mut image_bytes = images::resolve::images(state, &mut spec, principal)?;
    if !firmware_given {
        spec.firmware = images::resolve::firmware(state, &spec, principal).unwrap_or_default();
    }
    networks::resolve::ports(state, &mut spec, None)?;
    let mut needs = Needs {
        volumes: volumes::resolve::bound(state, &spec),
        ..networks::resolve::needs(state, &spec)
    };
    let digests = unmade(&spec, &needs).filter_map(|disk| disk.digest.as_ref());
    needs.images = images::at(state, digests.collect::<BTreeSet<_>>());
    for disk in &spec.disks {
        if let Some(backup) = &disk.backup {
            needs.pools.insert(backup.pool.clone());
            image_bytes = image_bytes.saturating_add(disk.size_mib << 20);
        }
    }
    Ok(Resolved {
        spec,
        needs,
        image_bytes,
    })
}

/// Disks that are to be made.
fn unmade<'a>(spec: &'a Spec, needs: &'a Needs) -> impl Iterator<Item = &'a Disk> {
    let there = |disk: &&Disk| {
        disk.volume_id()
            .is_some_and(|volume| needs.volumes.contains_key(&volume))
    };
    spec.disks.iter().filter(move |disk| !there(disk))
}

/// Refuses a MAC address that another interface of the site has: two guests with one address on a bridge lose each
/// other's packets. Addresses that are left to Dalgu are not there yet. `own` is the VM that it is for, if there is one.
pub fn free_macs(state: &State, spec: &Spec, own: Option<VmId>) -> Result<(), Error> {
    let mut wanted: BTreeMap<&str, &str> = BTreeMap::new();
    for nic in spec.nics.iter().filter(|nic| !nic.mac.is_empty()) {
        if let Some(other) = wanted.insert(&nic.mac, &nic.name) {
            return Err(Error::MacInUse {
                mac: nic.mac.clone(),
                holder: MacHolder::Nic(other.to_owned()),
            });
        }
    }
    let holder = wanted.keys().find_map(|mac| {
        let first = ((*mac).to_owned(), VmId::from_uuid(Uuid::nil()));
        let mut holders = state.macs.range(first..).take_while(|(held, _)| held == mac);
        holders.find(|(_, vm)| Some(*vm) != own)
    });
    match holder.and_then(|(mac, vm)| Some((mac, state.vms.get(vm)?))) {
        Some((mac, vm)) => Err(Error::MacInUse {
            mac: mac.clone(),
            holder: MacHolder::Vm(vm.name.clone()),
        }),
        None => Ok(()),
    }
}

/// A new id, and the specification with the MAC addresses that follow from it. They have three free bytes: among ten
/// thousand VMs some would be the same, so an id whose addresses are taken is not used.
fn identify(tx: &Tx, spec: &Spec) -> Result<(VmId, Spec), Error> {
    let mut tries = 0;
    loop {
        let id = VmId::from_uuid(tx.new_id());
        let mut filled = spec.clone();
        filled.fill_in(id);
        match free_macs(tx, &filled, None) {
            Ok(()) => return Ok((id, filled)),
            Err(error) if tries == IDS_TRIED => return Err(error),
            Err(_) => tries += 1,
        }
    }
}

/// Time in which a host is to have fetched so many bytes of images.
fn fetch_seconds(bytes: u64) -> u32 {
    u32::try_from(bytes / FETCHED_PER_SECOND).unwrap_or(u32::MAX)
}

/// Creates a VM.
pub fn create(tx: &mut Tx, caller: &Caller, new: Create) -> Result<Outcome, Error> {
    room(tx)?;
    let plan = check(tx, &caller.principal, &new, |request| {
        tx.decide(request, new.policy, VERDICTS_KEPT)
    })?;
    let (id, spec) = identify(tx, &plan.spec)?;
    let power = if new.stopped {
        PowerState::Stopped
    } else {
        PowerState::Running
    };
    let new_volumes = volumes::resolve::unmade(tx, &spec.disks);
    let at = &plan.owner;
    let places = hosts::fit(tx, &spec, at);
    let devices = hosts::devices(tx, &spec, places.as_deref().unwrap_or_default(), at);
    let devices = Some(devices).filter(|devices| !devices.is_empty());
    let places = places.map(|places| (at.clone(), places)).into_iter().collect();
    let devices = devices.map(|devices| (at.clone(), devices)).into_iter().collect();
    let vm = VmRecord {
        id,
        name: new.name,
        spec,
        labels: new.labels,
        description: new.description,
        drain_mode: new.drain_mode,
        placement_groups: new.placement_groups,
        tolerations: new.tolerations,
        intent: Intent {
            generation: Generation(1),
            power,
            power_sequence: 1,
            restart_sequence: 0,
            restart_mode: RestartMode::Reboot,
            grace_period_seconds: DEFAULT_GRACE_SECONDS,
        },
        owner: plan.owner,
        epoch: Epoch(1),
        decision: plan.decision,
        decide_time: tx.now(),
        create_time: tx.now(),
        delete_time: None,
        unconfirmed: false,
        backup_generation: None,
        disks_made: false,
        documents: new.documents,
        change: None,
        new_volumes,
        snapshots: Default::default(),
        places,
        devices,
        revision: 0,
    };
    let message = format!("created on {}: {}", vm.owner, vm.decision.summary);
    tx.event(EventKind::Vm, "VmCreated", &vm.name, message, None);
    let mut operation = new_operation(tx, caller, &vm, OperationKind::Create);
    operation.power = Some(power);
    operation.grace_period_seconds = fetch_seconds(plan.image_bytes);
    tx.put_vm(vm);
    Ok(accept(tx, operation))
}
