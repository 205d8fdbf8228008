//! Where placement groups, and taints of hosts, let a VM go. Used by `filter`, `score` and the engine for each host that they look at.
//!
//! Filled in by [`crate::placement_groups`] from the state that is decided on, so that a member whose place is only reserved counts as one
//! that is there.

use std::collections::{BTreeMap, BTreeSet};

use dalgu_proto::{
    ids::{HostName, PlacementGroupName, VmName},
    placement::{Group, Rule, Taint, Toleration},
};

use super::{filter::Lack, view::HostView, view::Request};
use crate::model::matches;

/// Labels of a host.
type Labels = BTreeMap<String, String>;

/// What else says where a VM may go.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rules {
    /// The groups that it is in.
    pub groups: Vec<Members>,
    /// Taints that it puts up with.
    pub tolerations: BTreeSet<Toleration>,
}

/// A group of the VM, and where its other members are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Members {
    /// The group.
    pub group: Group,
    /// Domains that have some of them. One that moves is in both domains where they are kept apart, and where they are kept together in
    /// one only if it moves within it.
    pub domains: BTreeMap<String, Held>,
    /// All others.
    pub others: u32,
    /// One of them.
    pub first: Option<VmName>,
}

/// Members in a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// How many.
    pub vms: u32,
    /// One of them.
    pub first: VmName,
}

impl Members {
    /// The domain of a host; `None` where it has no such label.
    pub fn domain<'h>(&self, host: &'h HostName, labels: &'h Labels) -> Option<&'h str> {
        domain(&self.group, host, labels)
    }

    /// Whether the group refuses hosts.
    pub(super) fn is_required(&self) -> bool {
        !self.group.preferred
    }

    /// Whether the rule holds with the VM on a host.
    pub(super) fn holds(&self, host: &HostName, labels: &Labels) -> bool {
        let Some(domain) = self.domain(host, labels) else {
            return false;
        };
        let there = self.domains.contains_key(domain);
        match self.group.rule {
            Rule::Affinity => there || self.others == 0,
            Rule::AntiAffinity => !there,
        }
    }

    /// With how many members the rule would not hold on a host; all of them where its domain is not known.
    fn against(&self, host: &HostName, labels: &Labels) -> u32 {
        self.domain(host, labels)
            .map_or(self.others, |domain| self.against_in(domain))
    }

    /// The same in a domain.
    pub(super) fn against_in(&self, domain: &str) -> u32 {
        let there = self.domains.get(domain).map_or(0, |held| held.vms);
        match self.group.rule {
            Rule::Affinity => self.others.saturating_sub(there),
            Rule::AntiAffinity => there,
        }
    }

    /// A domain in words: "rack r1", "host h1".
    fn named(&self, domain: &str) -> String {
        format!("{} {domain}", self.kind())
    }

    /// What a domain is.
    fn kind(&self) -> &str {
        self.group.topology_key.as_deref().unwrap_or("host")
    }

    /// Why the rule does not hold on a host.
    fn lack<'a>(&'a self, host: &'a HostName, labels: &'a Labels) -> Lack<'a> {
        let group = self.group.name.as_str();
        let key = self.group.topology_key.as_deref();
        match (self.domain(host, labels), self.group.rule) {
            (None, _) => Lack::GroupDomain {
                group,
                key: key.unwrap_or_default(),
            },
            (Some(domain), Rule::AntiAffinity) => Lack::GroupApart {
                group,
                vm: self.domains.get(domain).map_or("", |held| held.first.as_str()),
                key,
                domain,
            },
            (Some(_), Rule::Affinity) => Lack::GroupTogether {
                group,
                vm: self.first.as_ref().map_or("", VmName::as_str),
                key,
                domain: self.domains.keys().next().map(String::as_str),
            },
        }
    }
}

/// The domain of a host as a group sees it; `None` where the host has no such label.
pub fn domain<'h>(group: &Group, host: &'h HostName, labels: &'h Labels) -> Option<&'h str> {
    match &group.topology_key {
        None => Some(host.as_str()),
        Some(key) => labels.get(key).map(String::as_str),
    }
}

impl Rules {
    /// Whether nothing is asked for.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty() && self.tolerations.is_empty()
    }

    /// Groups that refuse hosts.
    pub(super) fn required(&self) -> impl Iterator<Item = &Members> {
        self.groups.iter().filter(|members| members.is_required())
    }

    /// Groups that only make hosts better or worse.
    pub(super) fn preferred(&self) -> impl Iterator<Item = &Members> {
        self.groups.iter().filter(|members| !members.is_required())
    }

    fn tolerates(&self, taint: &Taint) -> bool {
        self.tolerations.iter().any(|toleration| toleration.covers(taint))
    }

    /// Taints of one kind that the VM does not put up with.
    pub(super) fn repelled<'t>(
        &self,
        taints: &'t BTreeSet<Taint>,
        soft: bool,
    ) -> impl Iterator<Item = &'t Taint> {
        let of_kind = taints.iter().filter(move |taint| taint.soft == soft);
        of_kind.filter(|taint| !self.tolerates(taint))
    }

    /// What refuses a host.
    pub(super) fn lacks<'a>(&'a self, host: &'a HostView<'_>) -> impl Iterator<Item = Lack<'a>> {
        let taints = self.repelled(&host.taints, false).map(|taint| Lack::Taint {
            key: &taint.key,
            value: &taint.value,
        });
        let broken = self
            .required()
            .filter(|members| !members.holds(&host.name, &host.labels));
        taints.chain(broken.map(|members| members.lack(&host.name, &host.labels)))
    }

    /// How much a host goes against what is only preferred: VMs of groups with which the rule would not hold, and soft taints.
    pub(super) fn against(&self, host: &HostName, labels: &Labels, taints: &BTreeSet<Taint>) -> u32 {
        let groups = self.preferred().map(|members| members.against(host, labels));
        let taints = u32::try_from(self.repelled(taints, true).count()).unwrap_or(u32::MAX);
        groups.fold(taints, u32::saturating_add)
    }
}

/// Why one of these groups does not let the VM be on a host; `None` where all of them do.
pub fn broken(request: &Request, host: &HostView<'_>, of: &BTreeSet<PlacementGroupName>) -> Option<String> {
    let mut groups = request
        .rules
        .required()
        .filter(|members| of.contains(&members.group.name));
    let broken = groups.find(|members| !members.holds(&host.name, &host.labels))?;
    Some(broken.lack(&host.name, &host.labels).shortfall().message)
}

/// Says which rules leave no host at all, whatever room there is; `None` where some host would do but for other reasons.
pub fn conflict(request: &Request, hosts: &[HostView<'_>]) -> Option<String> {
    let hosts: Vec<_> = hosts
        .iter()
        .filter(|host| request.exclude.as_ref() != Some(&host.name))
        .collect();
    let mut terms: Vec<_> = request.rules.required().map(Term::Group).collect();
    if terms.is_empty() || hosts.is_empty() {
        return None;
    }
    if !request.spec.host_selector.is_empty() {
        terms.push(Term::Selector(&request.spec.host_selector));
    }
    let left = |terms: &[&Term<'_>]| {
        let all = |host: &&&HostView<'_>| terms.iter().all(|term| term.allows(host));
        hosts.iter().any(|host| all(&host))
    };
    if left(&terms.iter().collect::<Vec<_>>()) {
        return None;
    }
    let mut alone = terms.iter().filter(|term| !left(&[*term]));
    if let Some(term) = alone.next() {
        return term.leaves_none(&hosts);
    }
    let pairs = terms
        .iter()
        .enumerate()
        .flat_map(|(index, one)| terms[index + 1..].iter().map(move |other| [one, other]));
    let told: Vec<_> = match pairs.into_iter().find(|pair| !left(pair)) {
        Some(pair) => pair.iter().map(|term| term.words()).collect(),
        None => terms.iter().map(Term::words).collect(),
    };
    Some(format!("no host is left by {} together", told.join(" and ")))
}

/// One of the things that a conflict may be between.
enum Term<'a> {
    Group(&'a Members),
    Selector(&'a Labels),
}

impl Term<'_> {
    fn allows(&self, host: &HostView<'_>) -> bool {
        match self {
            Self::Group(members) => members.holds(&host.name, &host.labels),
            Self::Selector(labels) => matches(&host.labels, labels),
        }
    }

    fn words(&self) -> String {
        match self {
            Self::Selector(labels) => {
                let labels: Vec<_> = labels
                    .iter()
                    .map(|(key, value)| format!("{key}={value}"))
                    .collect();
                format!("host selector {}", labels.join(","))
            }
            Self::Group(members) => {
                let kind = members.kind();
                let rule = match members.group.rule {
                    Rule::Affinity => "together on one",
                    Rule::AntiAffinity => "apart by",
                };
                let mut text = format!("group {} ({rule} {kind}", members.group.name);
                match (members.group.rule, members.domains.iter().next()) {
                    (_, None) => {}
                    (Rule::Affinity, Some((domain, held))) => {
                        text.push_str(&format!("; VM {} is on {}", held.first, members.named(domain)));
                    }
                    (Rule::AntiAffinity, Some((domain, held))) => {
                        let more = members.domains.len() - 1;
                        text.push_str(&format!("; VM {} is on {}", held.first, members.named(domain)));
                        if more > 0 {
                            text.push_str(&format!(", others on {more} more"));
                        }
                    }
                }
                text + ")"
            }
        }
    }

    /// Why it allows no host, on its own; `None` for a selector, of which every verdict says that.
    fn leaves_none(&self, hosts: &[&HostView<'_>]) -> Option<String> {
        let Self::Group(members) = self else { return None };
        let (name, kind) = (&members.group.name, members.kind());
        let domains: BTreeSet<_> = hosts
            .iter()
            .filter_map(|host| members.domain(&host.name, &host.labels))
            .collect();
        let first = members.first.as_ref().map_or("", VmName::as_str);
        Some(match members.group.rule {
            _ if domains.is_empty() => {
                format!(
                    "no host has a label {kind}, by which group {name} goes: give hosts one (`dalgu host label`)"
                )
            }
            Rule::AntiAffinity => format!(
                "group {name} has more members than there are domains: it keeps them apart by {kind}, and a member is on each of the {} \
                 that a host could be taken of",
                domains.len()
            ),
            Rule::Affinity if members.domains.is_empty() => format!(
                "group {name} keeps it together with VM {first}, which is moving: repeat when that has arrived"
            ),
            Rule::Affinity => {
                let there: Vec<_> = members
                    .domains
                    .keys()
                    .map(|domain| members.named(domain))
                    .collect();
                format!(
                    "group {name} keeps it together with VM {first}, and no other host is of {}: a drain of the host moves all its members",
                    there.join(" or ")
                )
            }
        })
    }
}

#[cfg(test)]
mod tests;
