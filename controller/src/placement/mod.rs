//! Where a VM goes: pure decisions, each with its reasons.
//!
//! [`decide`] is called by the API when a VM is created, migrated or asked about, inside the transaction that writes
//! the owner, so that what it found free is still free. First every host is tested ([`Constraint`]), then those that
//! passed are scored; every host gets a [`Verdict`], and a refusal comes with the smallest change that would help
//! ([`Hint`]). [`Engine`] gives the same answers without a look at every host.
//!
//! Pure: no runtime, store, clock, randomness or log. Only `wire` knows the generated types.

mod capacity;
mod devices;
mod engine;
mod filter;
mod hint;
mod numa;
mod policy;
mod remedy;
mod repair;
mod rules;
mod score;
pub mod spare;
mod view;
mod wire;
mod worth;

#[cfg(test)]
mod explanations;
#[cfg(test)]
pub(crate) mod properties;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use dalgu_proto::ids::HostName;
use serde::{Deserialize, Serialize};

pub use self::{
    capacity::{Capacity, DomainCapacity, protected},
    devices::{choose, of_class},
    engine::Engine,
    filter::{Constraint, Shortfall},
    hint::Hint,
    numa::{Parts, Taken, charged, fit},
    policy::{Fit, Named, Order, Policy, Term},
    remedy::Change,
    rules::{Held, Members, Rules, broken, conflict, domain},
    score::{Part, Rule, Size, Strain, processors},
    spare::{Protect, Spare},
    view::{
        Bound, HostView, Lately, Needs, PoolPolicy, PoolView, Request, StallView, UsageView,
        default_reserved_memory_mib, used_percent,
    },
    wire::to_wire,
    worth::Worth,
};
use self::{
    score::Score,
    spare::{Kept, Short},
};

/// What was found for one host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// The host.
    pub host: HostName,
    /// Whether it can take the VM.
    pub fits: bool,
    /// All tests it failed; empty when it fits.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shortfalls: Vec<Shortfall>,
    /// Its score, parts in the order in which they are compared; empty when it does not fit.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub score: Vec<Part>,
    /// 1 for the best host, 2 for the next; 0 when it does not fit.
    pub rank: u32,
}

/// Shows each host of a site, one after the other.
type Each<'a> = &'a dyn Fn(&mut dyn FnMut(&HostView<'_>));

impl Verdict {
    fn refused(host: &HostView<'_>, lacks: &[filter::Lack<'_>]) -> Self {
        Self {
            host: host.name.clone(),
            fits: false,
            shortfalls: lacks.iter().map(filter::Lack::shortfall).collect(),
            score: Vec::new(),
            rank: 0,
        }
    }
}

/// A decision; kept with the VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// The chosen host; `None` when none can take the VM.
    pub host: Option<HostName>,
    /// A verdict for each host, best first, then those that do not fit in the order of their names.
    pub verdicts: Vec<Verdict>,
    /// What would make it fit; `None` when it fits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<Hint>,
    /// One sentence that sums it up.
    pub summary: String,
    /// Hosts without a verdict: [`decide_keeping`] left them out.
    #[serde(default)]
    pub omitted: u32,
    /// It was asked for although room is kept for protected domains.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ignored_protection: bool,
}

impl Decision {
    /// Keeps the first verdicts only, and counts the others.
    pub fn shorten(&mut self, kept: usize) {
        let left_out = self.verdicts.len().saturating_sub(kept);
        self.verdicts.truncate(kept);
        self.omitted = self
            .omitted
            .saturating_add(u32::try_from(left_out).unwrap_or(u32::MAX));
    }
}

/// Decides where a VM goes. The names of `hosts` are unique; their order does not matter.
pub fn decide<'a>(request: &Request, hosts: &[HostView], rule: impl Into<Rule<'a>>) -> Decision {
    decide_keeping(request, hosts, rule, usize::MAX)
}

/// As [`decide`], but on a site of more than `kept` hosts (2 at least) a decision for one of them has the verdicts of the best few
/// alone, and the others are counted: what is stored with each VM of a large site. A refusal always has all.
pub fn decide_keeping<'a>(
    request: &Request,
    hosts: &[HostView],
    rule: impl Into<Rule<'a>>,
    kept: usize,
) -> Decision {
    let rule = rule.into();
    let mut scores = Vec::new();
    let each = |look: &mut dyn FnMut(&HostView<'_>)| hosts.iter().for_each(look);
    let kept_room = Kept::of(request, &each, rule.protect);
    // All lacks in one place: there are one or more for each host that refuses.
    let (mut lacks, mut lacking) = (Vec::new(), Vec::new());
    for host in hosts {
        let before = lacks.len();
        find(request, host, kept_room.as_ref(), &mut lacks);
        if lacks.len() == before {
            scores.push(Score::of(request, host, rule));
        } else {
            lacking.push((host, before..lacks.len()));
        }
    }
    scores.sort_unstable();
    lacking.sort_unstable_by(|(a, _), (b, _)| a.name.cmp(&b.name));

    if scores.is_empty() {
        let each = |look: &mut dyn FnMut(&HostView<'_>)| lacking.iter().for_each(|(host, _)| look(host));
        let one = |name: &HostName| {
            let found = lacking.binary_search_by(|(host, _)| host.name.cmp(name)).ok()?;
            Some(lacking[found].0.clone())
        };
        return refusal(request, &each, &one, rule.protect);
    }
    let kept = kept.max(2);
    if hosts.len() > kept {
        scores.truncate(kept);
        return chosen(request, &scores, rule.policy, None, hosts.len());
    }
    let mut decision = chosen(request, &scores, rule.policy, Some(scores.len()), hosts.len());
    let refused = lacking.into_iter();
    let refused = refused.map(|(host, of)| Verdict::refused(host, &lacks[of]));
    decision.verdicts.extend(refused);
    decision.omitted = 0;
    decision
}

/// All tests that a host fails, added to what was found on others.
fn find<'a>(
    request: &'a Request,
    host: &'a HostView<'_>,
    kept_room: Option<&'a Kept>,
    lacks: &mut Vec<filter::Lack<'a>>,
) {
    let before = lacks.len();
    filter::find(request, host, lacks);
    if lacks.len() == before
        && let Some(Err(Short { domain, lacking, .. })) = kept_room.map(|kept| kept.check(&host.name))
    {
        lacks.push(filter::Lack::Protection { domain, lacking });
    }
}

/// The refusal of what no host can take. `each` shows them in the order of their names, `one` gives one of them.
fn refusal<'v>(
    request: &Request,
    each: Each<'_>,
    one: &dyn Fn(&HostName) -> Option<HostView<'v>>,
    protect: Option<&Protect>,
) -> Decision {
    let kept_room = Kept::of(request, each, protect);
    let (mut verdicts, mut search) = (Vec::new(), hint::Search::new(request));
    each(&mut |host| {
        let mut lacks = Vec::new();
        find(request, host, kept_room.as_ref(), &mut lacks);
        debug_assert!(!lacks.is_empty(), "{} can take it", host.name);
        verdicts.push(Verdict::refused(host, &lacks));
        search.look(host, &lacks);
    });
    let hint = search.find(&hint::Hosts {
        verdicts: &verdicts,
        each,
        one,
        protect,
    });
    Decision {
        host: None,
        hint: Some(hint),
        summary: not_placed(request, &verdicts),
        verdicts,
        omitted: 0,
        ignored_protection: request.ignore_protection,
    }
}

/// The refusal of a VM that would become larger where it is: so much of a protected domain would find no room then.
pub fn unprotected(host: &HostName, domain: &str, lacking: Size) -> Decision {
    let lack = filter::Lack::Protection { domain, lacking }.shortfall();
    Decision {
        host: None,
        summary: lack.message.clone(),
        verdicts: vec![Verdict {
            host: host.clone(),
            fits: false,
            shortfalls: vec![lack],
            score: Vec::new(),
            rank: 0,
        }],
        hint: Some(Hint {
            text: Change::IgnoreProtection.to_string(),
            changes: vec![Change::IgnoreProtection],
            alternative: Vec::new(),
        }),
        omitted: 0,
        ignored_protection: false,
    }
}

/// The decision for the first of the best hosts. `fitting` is how many fit, where that is known; `all`, how many there are.
fn chosen(
    request: &Request,
    best: &[Score<'_>],
    policy: Policy,
    fitting: Option<usize>,
    all: usize,
) -> Decision {
    let verdicts: Vec<_> = best
        .iter()
        .zip(1..)
        .map(|(score, rank)| Verdict {
            host: score.host.clone(),
            fits: true,
            shortfalls: Vec::new(),
            score: score.parts(policy),
            rank,
        })
        .collect();
    Decision {
        host: best.first().map(|score| score.host.clone()),
        hint: None,
        summary: placed(&verdicts, fitting, all),
        omitted: u32::try_from(all - verdicts.len()).unwrap_or(u32::MAX),
        verdicts,
        ignored_protection: request.ignore_protection,
    }
}

fn placed(verdicts: &[Verdict], fitting: Option<usize>, all: usize) -> String {
    let of = plural(all, "host");
    match verdicts {
        [] => String::new(),
        [only] => format!("{} is the only one of {of} that can take it", only.host),
        [best, second, ..] => {
            let mut parts = best.score.iter().zip(&second.score);
            let why = match parts.find(|(first, second)| first.value != second.value) {
                Some((first, other)) => format!(
                    "{} {} against {} on {}",
                    first.name, first.value, other.value, second.host
                ),
                None => format!("equal to {}, first by name", second.host),
            };
            let among = fitting.map_or_else(
                || format!("of {of}"),
                |fitting| format!("of {fitting} that can take it, of {of}"),
            );
            format!("{} is the best {among}: {why}", best.host)
        }
    }
}

fn not_placed(request: &Request, verdicts: &[Verdict]) -> String {
    if verdicts.is_empty() {
        return "no host has registered yet".to_owned();
    }
    if let Some(wanted) = &request.host {
        let shortfalls = verdicts
            .iter()
            .find(|verdict| verdict.host == *wanted)
            .map(|verdict| &verdict.shortfalls);
        return match shortfalls {
            None => format!("host {wanted}, the only one asked for, is not registered"),
            Some(shortfalls) => {
                let messages: Vec<_> = shortfalls
                    .iter()
                    .map(|shortfall| shortfall.message.as_str())
                    .collect();
                format!(
                    "host {wanted}, the only one asked for, cannot take it: {}",
                    messages.join("; ")
                )
            }
        };
    }
    let mut counts = BTreeMap::<Constraint, usize>::new();
    let mut seen = Vec::new();
    for verdict in verdicts {
        seen.clear();
        for shortfall in &verdict.shortfalls {
            if !seen.contains(&shortfall.constraint) {
                seen.push(shortfall.constraint);
                *counts.entry(shortfall.constraint).or_default() += 1;
            }
        }
    }
    let mut all = verdicts.iter().flat_map(|verdict| &verdict.shortfalls);
    let unprotected = all.find(|one| one.constraint == Constraint::Protection);
    let unprotected = unprotected.map_or_else(String::new, |shortfall| format!("; {}", shortfall.message));
    let counts: Vec<_> = counts
        .into_iter()
        .map(|(constraint, hosts)| format!("{} {hosts}", constraint.as_str()))
        .collect();
    format!(
        "none of {} can take it; hosts that fail each test: {}{unprotected}",
        plural(verdicts.len(), "host"),
        counts.join(", ")
    )
}

/// Whether a host could have a VM if it had the room: what no move of another VM changes.
pub fn may_have(request: &Request, host: &HostView<'_>) -> bool {
    filter::lacks(request, host).iter().all(filter::Lack::is_room)
}

/// Whether a host could have a VM if it had the room, and has the processors, nodes and huge pages that are to be its own as they are given now.
pub fn may_fit(request: &Request, host: &HostView<'_>) -> bool {
    let lacks = filter::lacks(request, host);
    lacks.iter().all(|lack| lack.is_room() && !lack.is_fitting())
}

/// Whether a host could have a VM if some that are there left it: it lacks processors or memory alone.
pub fn lacks_size_alone(request: &Request, host: &HostView<'_>) -> bool {
    filter::lacks(request, host).iter().all(filter::Lack::is_size)
}

/// Whether hosts that lack nothing but processors or memory have enough of them together, though none has by itself.
pub fn is_in_pieces(request: &Request, hosts: &[HostView<'_>]) -> bool {
    let size = Size::of(request);
    let could = |host: &&HostView<'_>| {
        let lacks = filter::lacks(request, host);
        // One that lacks nothing is refused for what is kept on others, which moves do not change.
        let short = !lacks.is_empty() && lacks.iter().all(filter::Lack::is_size);
        short && Size::capacity(host).checked_less(size).is_some()
    };
    let free = hosts.iter().filter(could).map(Size::free);
    let together = free.fold(Size::default(), |sum, free| Size {
        vcpus: sum.vcpus.saturating_add(free.vcpus),
        memory_mib: sum.memory_mib.saturating_add(free.memory_mib),
    });
    together.checked_less(size).is_some()
}

/// Whether guests on a host are likely to notice its load: time stalled for processors, memory or I/O, processors that are busy or that VMs wait for
/// (steal), or used memory, of the second step.
pub fn is_pressed(host: &HostView<'_>) -> bool {
    let usage = host.usage.as_ref();
    usage.is_some_and(|usage| Strain::of(usage, host.cpus, host.memory_mib) > Strain::Well)
}

fn plural(count: usize, noun: &str) -> String {
    if count == 1 {
        format!("1 {noun}")
    } else {
        format!("{count} {noun}s")
    }
}
