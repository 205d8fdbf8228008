//! The state as the planner's rows, and its plans in names.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use dalgu_proto::{
    ids::{HostName, PlacementGroupName, VmId},
    placement::{self, Group},
};
use jiff::{SignedDuration, Timestamp};

use super::{predict::Past, usage::Usage};
use crate::{
    blocking::beside,
    hosts,
    model::{DrainMode, PlanFigures, PlanStep, StepState, VmRecord},
    placement::{HostView, Request, charged, domain, is_pressed, may_fit, may_have, spare::Row},
    placement_groups::of_group,
    planner::{Figures, GroupRule, Host, Move, Plan, Rule, Site, Slot, Vm},
    state::{Db, State},
    verbs::migrate::{self, DEFAULT_DOWNTIME_MS},
};

/// A host to which a plan has moved VMs is not emptied by another for so long: else two plans could send VMs back and forth.
const REST: SignedDuration = SignedDuration::from_mins(15);
const MIB: u64 = 1 << 20;

/// How the site is now.
pub async fn measure(db: &Db, usage: &Usage) -> PlanFigures {
    let (state, usage, now) = (db.snapshot(), usage.clone(), db.now());
    beside(move || Look::of(&state, &usage, now).figures()).await
}

/// The site in rows, and whose they are.
pub struct Look {
    /// The rows.
    pub site: Site,
    hosts: Vec<HostName>,
    vms: Vec<VmId>,
}

impl Look {
    /// The site as it is now, with what is known of the VMs' use.
    pub fn of(state: &State, usage: &Usage, now: Timestamp) -> Self {
        let views = hosts::views(state);
        let slots: BTreeMap<_, _> = views
            .iter()
            .enumerate()
            .map(|(slot, view)| (&view.name, slot))
            .collect();
        let pools = pool_places(&views);
        // What a host that is off may have, it may have once it is woken.
        let mut awake = views.clone();
        for (view, host) in awake.iter_mut().zip(state.hosts.values()) {
            view.ready |= host.is_asleep();
        }
        let mut rules = Rules::new(&awake);
        let mut groups = Groups::new(state, &views);
        let uplinks = Uplinks::of(state);
        // What is given by number counts as the same everywhere.
        let mut ratios = views.iter().map(|view| view.cpu_overcommit_ratio);
        let first = ratios.next();
        let alike = ratios.all(|ratio| Some(ratio) == first);
        let resting = resting(state, now);
        // Each host by itself, whatever else the site protects.
        let protect = state.protect.and_hosts();
        let row = |view: &HostView<'_>| {
            let Row { field, domains, .. } = Row::of(view, &protect);
            Host {
                resting: resting.contains(&view.name),
                uplinks_mbit: uplinks.free(view),
                field,
                domains,
                ..host(view, &pools)
            }
        };
        let mut rows: Vec<_> = views.iter().map(row).collect();
        let (mut vms, mut ids) = (Vec::new(), Vec::new());
        for vm in state.vms.values() {
            let Some(slot) = slots.get(&vm.owner).copied() else {
                continue;
            };
            let mut request = migrate::request(state, vm, None);
            // Where the members of its groups are changes with each move.
            request.rules.groups.clear();
            let (vcpus, least) = charge(&request, views[slot].cpu_overcommit_ratio);
            let memory_mib = request.spec.reserved_memory_mib();
            // What is free, and what these VMs hold: everything else that holds room there is not the planner's.
            rows[slot].vcpus = rows[slot].vcpus.saturating_add(least);
            rows[slot].memory_mib = rows[slot].memory_mib.saturating_add(memory_mib);
            let disks = own_disks(&request, &views[slot], &pools);
            let copied = disks
                .iter()
                .fold(vm.spec.memory_mib, |sum, (_, mib)| sum.saturating_add(*mib));
            vms.push(Vm {
                host: slot,
                vcpus,
                memory_mib,
                load: usage.samples(vm.id).load(vm.spec.vcpus.into()),
                transfer_mib: copied,
                rule: rules.of(&request),
                fitted: rules.fitted(&request),
                groups: groups.of(vm),
                uplinks: uplinks.reserved(&request),
                pinned: pinned(state, vm, alike),
                disks,
            });
            ids.push(vm.id);
        }
        let mut here = vec![0_usize; rows.len()];
        vms.iter().for_each(|vm: &Vm| here[vm.host] += 1);
        for ((row, view), here) in rows.iter_mut().zip(&views).zip(here) {
            // What is promised beyond what there is comes off again first.
            let (vcpus, memory_mib) = view.overbooked();
            row.vcpus = row.vcpus.saturating_sub(vcpus);
            row.memory_mib = row.memory_mib.saturating_sub(memory_mib);
            let more = view.vms_most.map(|most| most.saturating_sub(view.vms));
            row.vms_most = more.map(|more| here.saturating_add(usize::try_from(more).unwrap_or(usize::MAX)));
        }
        let hosts = views.iter().map(|view| view.name.clone()).collect();
        Self {
            site: Site::new(rows, vms, rules.rows).with_groups(groups.rows),
            hosts,
            vms: ids,
        }
    }

    /// How the site is.
    pub fn figures(&self) -> PlanFigures {
        figures(&Plan::new(&self.site).figures())
    }

    /// The rows of these hosts; the first that there is none of.
    pub fn slots(&self, names: &[HostName]) -> Result<Vec<Slot>, HostName> {
        let slot = |name: &HostName| self.hosts.binary_search(name).map_err(|_| name.clone());
        names.iter().map(slot).collect()
    }

    /// Whose row this is.
    pub fn host(&self, slot: Slot) -> &HostName {
        &self.hosts[slot]
    }

    /// Whose row this is.
    pub fn vm(&self, slot: Slot) -> VmId {
        self.vms[slot]
    }

    /// Moves by name, and how long all of them are likely to take: hosts copy at the same time, each one VM after the other.
    pub fn steps(&self, state: &State, moves: &[Move]) -> (Vec<PlanStep>, f64) {
        let past = Past::of(state);
        let mut busy = vec![0.0_f64; self.hosts.len()];
        let mut steps = Vec::new();
        for step in moves {
            let Some(vm) = state.vms.get(&self.vms[step.vm]) else {
                continue;
            };
            let row = &self.site.vms()[step.vm];
            let disks = row
                .disks
                .iter()
                .fold(0_u64, |sum, (_, mib)| sum.saturating_add(*mib));
            let predicted = past.predict(vm, &self.hosts[step.to], disks.saturating_mul(MIB));
            let predicted_seconds = predicted.seconds;
            busy[step.from] += predicted_seconds;
            busy[step.to] += predicted_seconds;
            steps.push(PlanStep {
                vm: vm.id,
                name: vm.name.clone(),
                source: self.hosts[step.from].clone(),
                destination: self.hosts[step.to].clone(),
                generation: vm.intent.generation,
                copied_bytes: row.transfer_mib.saturating_mul(MIB),
                predicted_seconds,
                predicted_downtime_ms: predicted.downtime_ms,
                max_downtime_ms: DEFAULT_DOWNTIME_MS,
                state: StepState::Waiting,
                operation: None,
                fault: None,
            });
        }
        (steps, busy.into_iter().fold(0.0, f64::max))
    }
}

/// Numbers as they are stored.
pub fn figures(figures: &Figures) -> PlanFigures {
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    PlanFigures {
        hosts_on: count(figures.on),
        hosts_contended: count(figures.contended),
        unevenness_percent: figures.score * 100.0,
        spare_host: figures.spare,
    }
}

/// Hosts to which a plan has moved VMs lately.
fn resting(state: &State, now: Timestamp) -> BTreeSet<&HostName> {
    let plans = state.plans.values().rev();
    let lately = plans.filter(|plan| plan.end_time.is_some_and(|end| now.duration_since(end) < REST));
    let steps = lately.flat_map(|plan| &plan.steps);
    let moved = steps.filter(|step| step.state == StepState::Moved);
    moved.map(|step| &step.destination).collect()
}

fn host(view: &HostView<'_>, pools: &BTreeMap<String, Slot>) -> Host {
    let mut pools_mib = vec![0; pools.len()];
    for pool in view
        .pools
        .iter()
        .filter(|pool| !pool.shared && pool.error.is_none())
    {
        pools_mib[pools[&*pool.name]] = pool.free_mib();
    }
    Host {
        vcpus: view.vcpus_free(),
        memory_mib: view.memory_mib_free(),
        cpus: view.cpus.max(1).into(),
        core: 1.0,
        cost: 1.0,
        open: view.ready && !view.cordoned && !view.pressed && !view.is_full(),
        pressed: view.ready && !view.cordoned && view.pressed,
        contended: is_pressed(view),
        resting: false,
        pools_mib,
        ..Host::default()
    }
}

fn pool_places(views: &[HostView<'_>]) -> BTreeMap<String, Slot> {
    let names: BTreeSet<_> = views
        .iter()
        .flat_map(|view| &view.pools)
        .map(|pool| pool.name.to_string())
        .collect();
    names.into_iter().zip(0..).collect()
}

/// What a move copies of its disks, by pool: what other hosts do not see where it is.
fn own_disks(request: &Request, source: &HostView<'_>, pools: &BTreeMap<String, Slot>) -> Vec<(Slot, u64)> {
    let own = request
        .pools()
        .filter(|(name, _)| source.pool(name).is_none_or(|pool| !pool.shared));
    own.filter_map(|(name, mib)| Some((*pools.get(name)?, mib)))
        .collect()
}

/// Virtual processors that a VM takes of a host, and that it gives back at least when it leaves: dedicated ones count with the over-commit that each stands for, and what is
/// rounded is rounded against the plan.
fn charge(request: &Request, ratio: f64) -> (u32, u32) {
    let vcpus = request.spec.vcpus;
    if !request.spec.fitting.is_dedicated() {
        return (vcpus, vcpus);
    }
    let charged = charged(vcpus, ratio);
    let whole = ratio.fract() == 0.0;
    let least = charged.saturating_sub(u32::from(!whole)).max(vcpus);
    (charged, least)
}

/// Why a VM is left where it is. `alike`: processors are over-committed by the same ratio everywhere.
fn pinned(state: &State, vm: &VmRecord, alike: bool) -> &'static str {
    match vm.drain_mode {
        DrainMode::LiveMigrate if !vm.spec.devices.is_empty() => "it has PCI devices of its host",
        DrainMode::LiveMigrate if vm.spec.fitting.is_dedicated() && !alike => {
            "its processors count for more on some hosts than on others: migrate it by name, or drain its host"
        }
        DrainMode::LiveMigrate => match migrate::possible(state, vm) {
            Ok(()) => "",
            Err(_) => "it cannot migrate now",
        },
        _ => "its drain mode says that it is not moved",
    }
}

/// Uplinks on which VMs reserve bandwidth, by the name of their bridges.
struct Uplinks(BTreeMap<String, Slot>);

impl Uplinks {
    fn of(state: &State) -> Self {
        let names: BTreeSet<_> = state
            .vms
            .values()
            .flat_map(|vm| {
                let held = vm.held();
                held.bandwidth()
                    .map(|(bridge, _)| bridge.to_owned())
                    .collect::<Vec<_>>()
            })
            .collect();
        Self(names.into_iter().zip(0..).collect())
    }

    /// What a host has free on each.
    fn free(&self, view: &HostView<'_>) -> Vec<u64> {
        self.0.keys().map(|bridge| view.mbit_free(bridge).0).collect()
    }

    /// What a VM reserves.
    fn reserved(&self, request: &Request) -> Vec<(Slot, u64)> {
        let reserved = request.bandwidth().into_iter();
        reserved
            .filter_map(|(bridge, mbit)| Some((*self.0.get(bridge)?, mbit)))
            .collect()
    }
}

/// The placement groups that refuse hosts.
struct Groups<'a> {
    state: &'a State,
    views: &'a [HostView<'a>],
    known: BTreeMap<&'a PlacementGroupName, Slot>,
    /// The domain of each host, by the label that is one.
    domains: BTreeMap<Option<&'a str>, Arc<[Option<Slot>]>>,
    rows: Vec<GroupRule>,
}

impl<'a> Groups<'a> {
    const fn new(state: &'a State, views: &'a [HostView<'a>]) -> Self {
        Self {
            state,
            views,
            known: BTreeMap::new(),
            domains: BTreeMap::new(),
            rows: Vec::new(),
        }
    }

    /// Those of a VM.
    fn of(&mut self, vm: &VmRecord) -> Vec<Slot> {
        let state = self.state;
        let records = vm
            .placement_groups
            .iter()
            .filter_map(|name| state.placement_groups.get(name));
        let required = records
            .map(|record| &record.group)
            .filter(|group| !group.preferred);
        required.map(|group| self.row(group)).collect()
    }

    fn row(&mut self, group: &'a Group) -> Slot {
        if let Some(known) = self.known.get(&group.name) {
            return *known;
        }
        let views = self.views;
        let of_label = || {
            let mut places = BTreeMap::new();
            let mut place = |view: &'a HostView<'a>| {
                let name = domain(group, &view.name, &view.labels)?;
                let next = places.len();
                Some(*places.entry(name).or_insert(next))
            };
            views.iter().map(&mut place).collect()
        };
        let key = group.topology_key.as_deref();
        let domains = self.domains.entry(key).or_insert_with(of_label).clone();
        let members = of_group(self.state, group);
        let moving = members.filter_map(|member| self.state.active_migration(member.id));
        let ends = moving.flat_map(|migration| [&migration.source, &migration.destination]);
        let also = ends.filter_map(|end| {
            let mut hosts = views.iter().zip(domains.iter());
            hosts
                .find(|(view, _)| view.name == *end)
                .and_then(|(_, domain)| *domain)
        });
        let row = GroupRule {
            apart: group.rule == placement::Rule::AntiAffinity,
            also: also.collect(),
            domains,
        };
        self.rows.push(row);
        self.known.insert(&group.name, self.rows.len() - 1);
        self.rows.len() - 1
    }
}

/// Which hosts may have which VMs, one row for all VMs that ask for the same.
struct Rules<'a> {
    views: &'a [HostView<'a>],
    known: BTreeMap<String, Slot>,
    rows: Vec<Rule>,
}

impl<'a> Rules<'a> {
    fn new(views: &'a [HostView<'a>]) -> Self {
        Self {
            views,
            known: BTreeMap::new(),
            rows: Vec::new(),
        }
    }

    fn of(&mut self, request: &Request) -> Slot {
        self.row(request, "", may_have)
    }

    /// The hosts that have what is to be a VM's own, if it asks for that.
    fn fitted(&mut self, request: &Request) -> Option<Slot> {
        let asks = !request.spec.fitting.is_none();
        asks.then(|| self.row(request, "fitted", may_fit))
    }

    fn row(&mut self, request: &Request, what: &str, may: impl Fn(&Request, &HostView<'_>) -> bool) -> Slot {
        let spec = &request.spec;
        let pools: Vec<_> = request.pools().map(|(name, _)| name).collect();
        let bridges: Vec<_> = spec
            .nics
            .iter()
            .filter_map(dalgu_proto::vm::Nic::bridge)
            .collect();
        let features: Vec<_> = spec.features().collect();
        let asked = (
            spec.vcpus,
            &spec.host_selector,
            bridges,
            features,
            pools,
            (&spec.fitting, &spec.devices),
            &request.accelerator,
            &request.needs,
            &request.rules,
        );
        // How much of it matters only for what is the VM's own.
        let sized = (!what.is_empty()).then_some(spec.memory_mib);
        let key = format!("{what} {sized:?} {asked:?}");
        if let Some(known) = self.known.get(&key) {
            return *known;
        }
        let row = Rule::new(self.views.len(), |host| may(request, &self.views[host]));
        self.rows.push(row);
        self.known.insert(key, self.rows.len() - 1);
        self.rows.len() - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{fixtures, state::Db, state::Hooks, store::memory::Disk};

    #[tokio::test]
    async fn a_host_that_a_plan_has_filled_rests_for_a_quarter_of_an_hour() {
        let now = Timestamp::UNIX_EPOCH + REST;
        for (step, ended, expected) in [
            (StepState::Moved, Some(now), vec!["h2"]),
            (StepState::Failed, Some(now), vec![]),
            (StepState::Moved, Some(now - REST), vec![]),
            (StepState::Moved, None, vec![]),
        ] {
            let db = Db::open(Disk::default().open(), fixtures::cluster_id(), Hooks::default()).unwrap();
            db.change(|tx| {
                let mut plan = fixtures::plan(&fixtures::vm("web", "h1"), "h2");
                plan.end_time = ended;
                for known in &mut plan.steps {
                    known.state = step;
                }
                tx.put_plan(plan);
            })
            .await;
            let state = db.snapshot();
            let found: Vec<_> = resting(&state, now).into_iter().map(HostName::as_str).collect();
            assert_eq!(found, expected, "{step:?} {ended:?}");
        }
    }
}
