//! The smallest change that would make a refused VM fit. Called by [`super::decide`] when no host passed.
//!
//! Looked for in four places: on one host alone, in the request alone, in both, and at last another host. The
//! cheapest on a host and the cheapest in the request are both told, the cheaper first. Each is proved before it is
//! told: its changes are applied, and the tests run again.

use std::{cmp::Reverse, collections::BinaryHeap};

use serde::{Deserialize, Serialize};

use super::{
    Protect,
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

struct Plan<'a> {
    cost: (u32, u64),
    host: &'a HostView<'a>,
    changes: Vec<Change>,
}

/// A host, and all tests that it fails.
pub(super) type Refused<'a> = (&'a HostView<'a>, &'a [Lack<'a>]);

/// Finds the hint for a request that none of the hosts can take; these come in the order of their names.
pub(super) fn find(request: &Request, hosts: &[Refused<'_>], protect: Option<&Protect>) -> Hint {
    let of = |side| cheapest(request, hosts, side, protect);
    let on_host = of(Side::Host);
    let in_request = of(Side::Request);
    match (on_host, in_request) {
        (Some(one), Some(other)) if other.cost < one.cost => told(&other, Some(&one), request),
        (Some(one), other) => told(&one, other.as_ref(), request),
        (None, Some(one)) => told(&one, None, request),
        (None, None) => match of(Side::Both) {
            Some(plan) => told(&plan, None, request),
            None => another_host(request, hosts, protect),
        },
    }
}

/// The cheapest plan that is proved; of equally cheap ones the first by the host's name. Only the costs are kept of the others: few are
/// ever looked at again.
fn cheapest<'a>(
    request: &Request,
    hosts: &[Refused<'a>],
    side: Side,
    protect: Option<&Protect>,
) -> Option<Plan<'a>> {
    let mut changes = Vec::new();
    let costs = hosts.iter().zip(0_usize..).filter_map(|((host, lacks), index)| {
        changes.clear();
        remedies(lacks, host, request, side, &mut changes)?;
        Some(Reverse((cost(&changes, request), index)))
    });
    let mut plans: BinaryHeap<_> = costs.collect();
    std::iter::from_fn(|| plans.pop()).find_map(|Reverse((cost, index))| {
        let (host, lacks) = hosts[index];
        let mut changes = Vec::new();
        remedies(lacks, host, request, side, &mut changes)?;
        let plan = Plan { cost, host, changes };
        let keeps = |changed: &Request, host: &HostView<'_>| {
            let views = hosts
                .iter()
                .map(|(other, _)| if other.name == host.name { host } else { *other });
            Kept::of(changed, views, protect).is_none_or(|kept| kept.check(&host.name).is_ok())
        };
        proved(plan, request, side, keeps)
    })
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

fn cost(changes: &[Change], request: &Request) -> (u32, u64) {
    changes
        .iter()
        .map(|change| change.cost(request))
        .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1.saturating_add(one.1)))
}

/// Applies a plan, mends it where a change uncovered another lack, and gives it back once all tests pass.
fn proved<'a>(
    mut plan: Plan<'a>,
    request: &Request,
    side: Side,
    keeps: impl Fn(&Request, &HostView<'_>) -> bool,
) -> Option<Plan<'a>> {
    let (mut changed, mut hosts) = (request.clone(), vec![plan.host.clone()]);
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

fn told(first: &Plan<'_>, second: Option<&Plan<'_>>, request: &Request) -> Hint {
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

fn sentence(plan: &Plan<'_>, request: &Request) -> String {
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
    if !names_host && request.host.as_ref() != Some(&plan.host.name) {
        text.push_str(&format!(" ({} can take it then)", plan.host.name));
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
fn another_host(request: &Request, hosts: &[Refused<'_>], protect: Option<&Protect>) -> Hint {
    let (cpus, memory_mib) = (remedy::cpus_for(request), remedy::memory_for(request));
    let missing = request.host.as_ref().filter(|wanted| {
        request.exclude.as_ref() != Some(*wanted) && !hosts.iter().any(|(host, _)| host.name == **wanted)
    });
    let mut changes = Vec::new();
    if request.host.is_some() && missing.is_none() {
        changes.push(Change::AnyHost);
    }
    // A host that was never there is in no domain of a member.
    let mut fitting = vec![];
    let add = Change::AddHost {
        name: missing.cloned(),
        cpus,
        memory_mib,
    };
    add.apply(&mut request.clone(), &mut fitting);
    let broken = fitting.iter().flat_map(|host| request.rules.lacks(host));
    changes.extend(broken.filter_map(|lack| repair::in_request(&lack, request)));
    if protect.is_some() {
        // A host that is alone in its field has none that stands in for it.
        let mut all: Vec<_> = hosts.iter().map(|(host, _)| (*host).clone()).collect();
        add.apply(&mut request.clone(), &mut all);
        let kept = Kept::of(request, &all, protect);
        let new = all.last().map(|host| &host.name);
        if kept.zip(new).is_some_and(|(kept, new)| kept.check(new).is_err()) {
            changes.push(Change::IgnoreProtection);
        }
    }
    changes.push(add);
    let text = listed(&changes);
    Hint {
        changes,
        alternative: Vec::new(),
        text,
    }
}
