//! The state as what is decided on: which hosts could go and which could come, what holds one, and who would have room for a VM.

use std::{collections::BTreeMap, fmt, time::Duration};

use dalgu_proto::{
    ids::{BackupId, HostName, VmName, VolumeName},
    vm::PowerState,
};
use jiff::{SignedDuration, Timestamp};

use super::{
    PRINCIPAL,
    policy::{self, Fleet, Row},
};
use crate::{
    hosts, images,
    model::{BackupState, HostRecord, HostState, ImageState, PlanState, PowerPhase, VmRecord},
    placement::{self, Policy, Request},
    plans::{look::Look, usage::Usage},
    state::State,
    volumes,
};

/// What counts as the last hour.
pub const HOUR: SignedDuration = SignedDuration::from_hours(1);

/// Why the site needs a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Need {
    /// Something runs there that is not Dalgu's.
    Foreign,
    /// A VM that is off is there.
    Vm(VmName),
    /// The only copy of a volume is there.
    Volume(VolumeName),
    /// A backup is there, which no other host sees.
    Backup(BackupId),
    /// No other host that is on has a copy of an image.
    Image,
    /// Were another host to fail, its VMs might find no room.
    Spare,
    /// Were its host to fail, this VM could only come here.
    Only(VmName),
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign => f.write_str("domains run there that are not Dalgu's"),
            Self::Vm(name) => write!(f, "VM {name} is there, and can be started nowhere else"),
            Self::Volume(name) => write!(f, "volume {name} is nowhere else"),
            Self::Backup(id) => write!(f, "backup {id} is nowhere else"),
            Self::Image => f.write_str("no other host that is on has a copy of one of its images"),
            Self::Spare => f.write_str("were another host to fail, its VMs might find no room"),
            Self::Only(name) => write!(f, "were the host of VM {name} to fail, it could only come here"),
        }
    }
}

/// VMs that run on a host or are to, and those that move from it or to it.
pub fn running<'a>(state: &'a State, host: &HostName) -> impl Iterator<Item = &'a VmRecord> {
    let there = state.host_vms.get(host).into_iter().flatten();
    let there = there.filter_map(|vm| state.vms.get(vm)).map(AsRef::as_ref);
    let host = host.clone();
    there.filter(move |vm| {
        let off = state.observation(vm).is_some_and(|seen| seen.is_off());
        let busy = state
            .active_operations
            .get(&vm.id)
            .is_some_and(|active| !active.is_empty());
        vm.owner != host || busy || vm.intent.power != PowerState::Stopped || !off
    })
}

/// What is on a host and nowhere else.
pub fn kept(state: &State, host: &HostName) -> Option<Need> {
    if hosts::foreign(state, host) != (0, 0) || state.sighted.contains_key(host) {
        return Some(Need::Foreign);
    }
    let vms = state.host_vms.get(host).into_iter().flatten();
    if let Some(vm) = vms.filter_map(|vm| state.vms.get(vm)).next() {
        return Some(Need::Vm(vm.name.clone()));
    }
    let mut volumes = state.volumes.values();
    if let Some(volume) = volumes.find(|volume| volumes::pinned_to(state, volume) == Some(host)) {
        return Some(Need::Volume(volume.name.clone()));
    }
    let there = |state| {
        matches!(
            state,
            BackupState::Pending | BackupState::Running | BackupState::Available
        )
    };
    let mut backups = state.backups.values();
    let own = backups.find(|backup| backup.host == *host && !backup.shared && there(backup.state));
    if let Some(backup) = own {
        return Some(Need::Backup(backup.id));
    }
    let on = |other: &HostName| {
        other != host
            && hosts::state_of(state, other) == HostState::Ready
            && state.hosts.get(other).is_some_and(|other| !other.is_asleep())
    };
    let mut images = state.images.values();
    let single = images.find(|image| {
        let comes = matches!(image.state, ImageState::AwaitingUpload | ImageState::Importing);
        if comes && image.import_host.as_ref() == Some(host) {
            return true;
        }
        image.content.as_ref().is_some_and(|content| {
            let mut holders = images::holders(state, &content.digest);
            holders.any(|holder| holder == host) && !images::holders(state, &content.digest).any(on)
        })
    });
    // Whose image it is need not be told.
    single.map(|_| Need::Image)
}

/// What the site needs a host for that has no running VM.
pub fn needed(state: &State, host: &HostName, now: Timestamp) -> Option<Need> {
    if let Some(need) = kept(state, host) {
        return Some(need);
    }
    let mut look = Look::of(state, &Usage::default(), now);
    let slot = *look.slots(std::slice::from_ref(host)).ok()?.first()?;
    // One that takes no VMs is not counted on as it is.
    let open = look.site.hosts()[slot].open;
    let short = look.site.short();
    look.site.set_open(slot, false);
    if open && look.site.short() > short {
        return Some(Need::Spare);
    }
    let vm = policy::only(&look.site, slot)?;
    let vm = state.vms.get(&look.vm(vm))?;
    Some(Need::Only(vm.name.clone()))
}

fn since(now: Timestamp, then: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(then)).unwrap_or_default()
}

/// Whether a host has said all that it has, by a hypervisor that answers.
pub fn is_known(state: &State, host: &HostName) -> bool {
    let live = state.live.get(host);
    live.is_some_and(|live| live.complete && live.hypervisor_error.is_none())
}

/// Hosts of which nothing is needed: empty, on, heard from, open.
pub fn idle(state: &State) -> impl Iterator<Item = &HostName> {
    let can = |host: &&HostRecord| {
        host.power.is_some()
            && !host.is_asleep()
            && host.cordon.is_none()
            && host.drain.as_ref().is_none_or(|drain| !drain.is_active())
            && hosts::state_of(state, &host.name) == HostState::Ready
            && is_known(state, &host.name)
    };
    let hosts = state.hosts.values().map(AsRef::as_ref).filter(can);
    hosts
        .map(|host| &host.name)
        .filter(|host| kept(state, host).is_none())
}

/// The site for [`policy::decide`]; `idle` says since when hosts have nothing.
pub fn fleet(
    state: &State,
    usage: &Usage,
    idle: &BTreeMap<HostName, Timestamp>,
    now: Timestamp,
) -> (Fleet, Look) {
    let look = Look::of(state, usage, now);
    // What moves where is not certain before its end.
    let moving = state.plans.values().any(|plan| plan.state == PlanState::Running);
    let row = |name: &HostName| {
        let host = state.hosts.get(name)?;
        let power = host.power.as_ref()?;
        let own = power.principal == PRINCIPAL && host.cordon.is_none();
        Some(match power.phase {
            PowerPhase::On => Row::On {
                idle: idle.get(name).filter(|_| !moving).map(|then| since(now, *then)),
                on: since(now, power.since),
            },
            PowerPhase::Off if own => Row::Off {
                off: since(now, power.since),
            },
            PowerPhase::PoweringOn if !power.overdue && host.cordon.is_none() => Row::Waking,
            _ => Row::Fixed,
        })
    };
    let rows = (0..look.site.hosts().len()).map(|slot| row(look.host(slot)).unwrap_or(Row::Fixed));
    let switched = state
        .hosts
        .values()
        .filter_map(|host| host.power.as_ref())
        .flat_map(|power| &power.switched);
    let fleet = Fleet {
        site: look.site.clone(),
        rows: rows.collect(),
        expected: (0..look.site.vms().len())
            .map(|slot| usage.next_hours(look.vm(slot), now))
            .collect(),
        switches: switched.filter(|then| now.duration_since(**then) < HOUR).count(),
    };
    (fleet, look)
}

/// A host that is not on and has room for what no other could take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sleeper {
    /// The host.
    pub host: HostName,
    /// What comes of that.
    pub is: Asleep,
}

/// What comes of a host that is not on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asleep {
    /// It is being switched on.
    Comes,
    /// Whoever creates a VM wakes it.
    Wakes,
    /// An operator must switch it on.
    Stays,
}

impl fmt::Display for Sleeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = &self.host;
        match self.is {
            Asleep::Comes => write!(
                f,
                "Host {host} has room and is being switched on: repeat in a few minutes"
            ),
            Asleep::Wakes => write!(
                f,
                "Host {host} has room and is off: a creation wakes it, or `dalgu host power on {host}`; repeat in a few minutes"
            ),
            Asleep::Stays => write!(
                f,
                "Host {host} has room and is off: `dalgu host power on {host}`, then repeat in a few minutes"
            ),
        }
    }
}

/// The host that would take it if it were on: one that comes anyhow before one that can be woken, and that before the rest.
pub fn sleeper(state: &State, request: &Request) -> Option<Sleeper> {
    let kind = |host: &HostRecord| match host.power.as_ref() {
        Some(power) if power.phase == PowerPhase::PoweringOn && !power.overdue => Some(Asleep::Comes),
        Some(power)
            if power.phase == PowerPhase::Off && power.principal == PRINCIPAL && state.wakes_hosts =>
        {
            Some(Asleep::Wakes)
        }
        Some(power) if power.phase == PowerPhase::Off => Some(Asleep::Stays),
        _ => None,
    };
    [Asleep::Comes, Asleep::Wakes, Asleep::Stays]
        .into_iter()
        .find_map(|is| {
            let hosts = state.hosts.values().filter(|host| kind(host) == Some(is));
            let views: Vec<_> = hosts.map(|host| hosts::view_awake(state, host)).collect();
            let decision = placement::decide_keeping(request, &views, &Policy::default(), 1);
            decision.host.map(|host| Sleeper { host, is })
        })
}
