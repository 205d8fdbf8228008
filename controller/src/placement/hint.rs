//! The smallest change that would make a refused VM fit. Used by [`super::refusal`], which tells it of all hosts.
//!
//! Looked for in four places: on one host alone, in the request alone, in both, and at last another host. The
//! cheapest on a host and the cheapest in the request are both told, the cheaper first. Each is proved before it is
//! told: its changes are applied, and the tests run again.
//!
//! Of a host that only room kept for others holds back ([`filter::Constraint::Protection`]) no smaller VM is looked for: to take that room is told
//! instead.

use std::{cmp::Reverse, collections::BinaryHeap};

use dalgu_proto::ids::HostName;
use serde::{Deserialize, Serialize};

use super::{
    Each, Protect, Verdict,
    filter::{self, Lack},
    remedy::{self, Change},
    repair,
    spare::Kept,
    view::{HostView, Request},
};

/// Times a plan may be mended when a change uncovers another lack (a repaired pool may turn out to be full).
const ROUNDS: usize = 4;

/// What would make a VM fit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hint {
    /// Changes that, made together, let it fit.
    pub changes: Vec<Change>,
    /// Other changes that, made together instead, let it fit as well; empty where there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alternative: Vec<Change>,
    /// The same for people.
    pub text: String,
}

/// Where changes may be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Host,
    Request,
    Both,
}

struct Plan {
    cost: Cost,
    host: HostName,
    changes: Vec<Change>,
}

/// How great changes are together, see [`Change::cost`].
type Cost = (u32, u64);

/// The hosts that all refuse a request. A large site has too much of them to be kept: they are looked at one after the other.
pub(super) struct Hosts<'a, 'v> {
    /// What was found for each, in the order of their names.
    pub(super) verdicts: &'a [Verdict],
    /// All of them in that order.
    pub(super) each: Each<'a>,
    /// One of them.
    pub(super) one: &'a dyn Fn(&HostName) -> Option<HostView<'v>>,
    pub(super) protect: Option<&'a Protect>,
}

/// The search. It is told of the hosts in the order of their names; only what a plan would cost is kept of them, as few are ever looked at again.
pub(super) struct Search<'r> {
    request: &'r Request,
    hosts: usize,
    on_host: Vec<Reverse<(Cost, usize)>>,
    in_request: Vec<Reverse<(Cost, usize)>>,
    changes: Vec<Change>,
}

impl<'r> Search<'r> {
    pub(super) fn new(request: &'r Request) -> Self {
        Self {
            request,
            hosts: 0,
            on_host: Vec::new(),
            in_request: Vec::new(),
            changes: Vec::new(),
        }
    }

    /// Takes in the next host, with all tests that it fails.
    pub(super) fn look(&mut self, host: &HostView<'_>, lacks: &[Lack<'_>]) {
        let (request, changes) = (self.request, &mut self.changes);
        for (side, plans) in [
            (Side::Host, &mut self.on_host),
            (Side::Request, &mut self.in_request),
        ] {
            let cost = cost_of(lacks, host, request, side, changes);
            plans.extend(cost.map(|cost| Reverse((cost, self.hosts))));
        }
        self.hosts += 1;
    }

    /// Finds the hint, now that it has been told of all hosts.
    pub(super) fn find(self, hosts: &Hosts<'_, '_>) -> Hint {
        let request = self.request;
        let on_host = cheapest(request, hosts, Side::Host, self.on_host);
        let in_request = cheapest(request, hosts, Side::Request, self.in_request);
        match (on_host, in_request) {
            (Some(one), Some(other)) if other.cost < one.cost => told(&other, Some(&one), request),
            (Some(one), other) => told(&one, other.as_ref(), request),
            (None, Some(one)) => told(&one, None, request),
            (None, None) => match cheapest(request, hosts, Side::Both, both(request, hosts)) {
                Some(plan) => told(&plan, None, request),
                None => another_host(request, hosts),
            },
        }
    }
}

/// What plans cost that change hosts as well as the request.
fn both(request: &Request, hosts: &Hosts<'_, '_>) -> Vec<Reverse<(Cost, usize)>> {
    let (mut plans, mut changes, mut index) = (Vec::new(), Vec::new(), 0);
    (hosts.each)(&mut |host| {
        // What is kept for protected domains is no lack here: where that is all, the request alone has a plan.
        let cost = cost_of(
            &filter::lacks(request, host),
            host,
            request,
            Side::Both,
            &mut changes,
        );
        plans.extend(cost.map(|cost| Reverse((cost, index))));
        index += 1;
    });
    plans
}

/// The cheapest plan that is proved; of equally cheap ones the first by the host's name.
fn cheapest(
    request: &Request,
    hosts: &Hosts<'_, '_>,
    side: Side,
    plans: Vec<Reverse<(Cost, usize)>>,
) -> Option<Plan> {
    let mut plans = BinaryHeap::from(plans);
    std::iter::from_fn(|| plans.pop()).find_map(|Reverse((cost, index))| {
        let host = (hosts.one)(&hosts.verdicts[index].host)?;
        let mut changes = Vec::new();
        let lacks = filter::lacks(request, &host);
        if lacks.is_empty() {
            // All that is against it is what is kept.
            changes.push(Change::IgnoreProtection);
        }
        remedies(&lacks, &host, request, side, &mut changes)?;
        let plan = Plan {
            cost,
            host: host.name.clone(),
            changes,
        };
        let keeps = |changed: &Request, host: &HostView<'_>| {
            let each = |look: &mut dyn FnMut(&HostView<'_>)| {
                (hosts.each)(&mut |other| look(if other.name == host.name { host } else { other }));
            };
            Kept::of(changed, &each, hosts.protect).is_none_or(|kept| kept.check(&host.name).is_ok())
        };
        proved(plan, &host, request, side, keeps)
    })
}

/// What a change for every lack costs; `None` where one has no remedy.
fn cost_of(
    lacks: &[Lack<'_>],
    host: &HostView<'_>,
    request: &Request,
    side: Side,
    changes: &mut Vec<Change>,
) -> Option<Cost> {
    changes.clear();
    remedies(lacks, host, request, side, changes)?;
    Some(cost(changes, request))
}

/// A change for every lack; `None` where one has no remedy.
fn remedies(
    lacks: &[Lack<'_>],
    host: &HostView,
    request: &Request,
    side: Side,
    changes: &mut Vec<Change>,
) -> Option<()> {
    for lack in lacks {
        let change = match side {
            Side::Host => repair::on_host(lack, host, request),
            Side::Request => repair::in_request(lack, request),
            Side::Both => repair::on_host(lack, host, request).or_else(|| repair::in_request(lack, request)),
        }?;
        // A VM with too many processors lacks both logical and free ones: the stricter limit is told, once.
        match (
            &change,
            changes
                .iter_mut()
                .find(|other| matches!(other, Change::AskVcpus { .. })),
        ) {
            (Change::AskVcpus { at_most }, Some(Change::AskVcpus { at_most: told })) => {
                *told = (*told).min(*at_most)
            }
            _ => changes.push(change),
        }
    }
    Some(())
}

fn cost(changes: &[Change], request: &Request) -> Cost {
    changes
        .iter()
        .map(|change| change.cost(request))
        .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1.saturating_add(one.1)))
}

/// Applies a plan, mends it where a change uncovered another lack, and gives it back once all tests pass.
fn proved(
    mut plan: Plan,
    host: &HostView<'_>,
    request: &Request,
    side: Side,
    keeps: impl Fn(&Request, &HostView<'_>) -> bool,
) -> Option<Plan> {
    let (mut changed, mut hosts) = (request.clone(), vec![host.clone()]);
    let mut fresh = plan.changes.clone();
    for _ in 0..ROUNDS {
        for change in &fresh {
            change.apply(&mut changed, &mut hosts);
        }
        let host = &hosts[0];
        let lacks = filter::lacks(&changed, host);
        if lacks.is_empty() {
            if !keeps(&changed, host) {
                plan.changes.push(Change::IgnoreProtection);
            }
            plan.cost = cost(&plan.changes, request);
            return Some(plan);
        }
        fresh.clear();
        remedies(&lacks, host, &changed, side, &mut fresh)?;
        plan.changes.extend_from_slice(&fresh);
    }
    None
}

fn told(first: &Plan, second: Option<&Plan>, request: &Request) -> Hint {
    let mut text = sentence(first, request);
    if let Some(second) = second {
        text.push_str(", or ");
        text.push_str(&sentence(second, request));
    }
    let alternative = second.map(|plan| plan.changes.clone()).unwrap_or_default();
    Hint {
        changes: first.changes.clone(),
        alternative,
        text,
    }
}

fn sentence(plan: &Plan, request: &Request) -> String {
    let mut text = listed(&plan.changes);
    // Changes to a host name it; for those to the request, the host that could take the VM then is worth knowing,
    // unless the caller named it.
    let names_host = plan.changes.iter().any(|change| {
        !matches!(
            change,
            Change::AnyHost
                | Change::IgnoreProtection
                | Change::DropSelector { .. }
                | Change::LeaveVolume { .. }
                | Change::Tolerate { .. }
                | Change::LeaveGroup { .. }
                | Change::AskVcpus { .. }
                | Change::AskMemory { .. }
                | Change::AskStorage { .. }
                | Change::AskNoNode
                | Change::AskBandwidth { .. }
                | Change::AskDevices { .. }
        )
    });
    if !names_host && request.host.as_ref() != Some(&plan.host) {
        text.push_str(&format!(" ({} can take it then)", plan.host));
    }
    text
}

fn listed(changes: &[Change]) -> String {
    let texts: Vec<_> = changes.iter().map(ToString::to_string).collect();
    match texts.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} and {last}", rest.join(", ")),
        _ => texts.concat(),
    }
}

/// The last resort: nothing that could be done with the hosts there are would help.
fn another_host(request: &Request, hosts: &Hosts<'_, '_>) -> Hint {
    let (cpus, memory_mib) = (remedy::cpus_for(request), remedy::memory_for(request));
    let missing = request.host.as_ref().filter(|wanted| {
        request.exclude.as_ref() != Some(*wanted)
            && !hosts.verdicts.iter().any(|verdict| verdict.host == **wanted)
    });
    let mut changes = Vec::new();
    if request.host.is_some() && missing.is_none() {
        changes.push(Change::AnyHost);
    }
    // A host that was never there is in no domain of a member.
    let used = |name: &HostName| hosts.verdicts.iter().any(|verdict| verdict.host == *name);
    let name = missing
        .cloned()
        .unwrap_or_else(|| remedy::unused_name(request, used));
    let new = remedy::host_for(request, name);
    let broken = request.rules.lacks(&new);
    changes.extend(broken.filter_map(|lack| repair::in_request(&lack, request)));
    // One that is alone in its field has none that stands in for it.
    let each = |look: &mut dyn FnMut(&HostView<'_>)| {
        (hosts.each)(look);
        look(&new);
    };
    if Kept::of(request, &each, hosts.protect).is_some_and(|kept| kept.check(&new.name).is_err()) {
        changes.push(Change::IgnoreProtection);
    }
    let add = Change::AddHost {
        name: missing.cloned(),
        cpus,
        memory_mib,
    };
    changes.push(add);
    let text = listed(&changes);
    Hint {
        changes,
        alternative: Vec::new(),
        text,
    }
}
