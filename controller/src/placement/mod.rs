//! Where a VM goes: pure decisions, each with its reasons.
//!
//! [`decide`] is called by the API when a VM is created, migrated or asked about, inside the transaction that writes
//! the owner, so that what it found free is still free. First every host is tested ([`Constraint`]), then those that
//! passed are scored; every host gets a [`Verdict`], and a refusal comes with the smallest change that would help
//! ([`Hint`]).
//!
//! Pure: no runtime, store, clock, randomness or log. Only `wire` knows the generated types.

mod filter;
mod hint;
mod remedy;
mod repair;
mod score;
mod view;
mod wire;

#[cfg(test)]
mod explanations;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use dalgu_proto::ids::HostName;
use serde::{Deserialize, Serialize};

use self::score::Score;
pub use self::{
    filter::{Constraint, Shortfall},
    hint::Hint,
    remedy::Change,
    score::Part,
    view::{
        Bound, HostView, Needs, PoolPolicy, PoolView, Request, StallView, UsageView,
        default_reserved_memory_mib, used_percent,
    },
    wire::to_wire,
};

/// What makes a host better among those with the same load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// The least reserved host first: room to grow everywhere, and the least lost with one host.
    #[default]
    Spread,
    /// The most reserved host first: whole hosts stay empty. Load still comes first.
    Pack,
}

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
    /// Verdicts that [`decide_keeping`] left out.
    #[serde(default)]
    pub omitted: u32,
}

/// Decides where a VM goes. The names of `hosts` are unique; their order does not matter.
pub fn decide(request: &Request, hosts: &[HostView], policy: &Policy) -> Decision {
    decide_keeping(request, hosts, policy, usize::MAX)
}

/// As [`decide`], but where a host is found, only the first `kept` verdicts (2 at least) are put into words, and the rest
/// counted: what is stored with each VM of a large site. A refusal always has all.
pub fn decide_keeping(request: &Request, hosts: &[HostView], policy: &Policy, kept: usize) -> Decision {
    let mut scores = Vec::new();
    let mut refused = Vec::new();
    for host in hosts {
        let lacks = filter::lacks(request, host);
        if lacks.is_empty() {
            scores.push((Score::of(request, host, *policy), &host.name));
        } else {
            let shortfalls = lacks.iter().map(filter::Lack::shortfall).collect();
            refused.push(Verdict {
                host: host.name.clone(),
                fits: false,
                shortfalls,
                score: Vec::new(),
                rank: 0,
            });
        }
    }
    scores.sort_unstable_by_key(|(score, _)| *score);
    refused.sort_unstable_by(|a, b| a.host.cmp(&b.host));

    let kept = if scores.is_empty() {
        usize::MAX
    } else {
        kept.max(2)
    };
    let mut verdicts = Vec::with_capacity(hosts.len().min(kept));
    for ((score, host), rank) in scores.iter().zip(1..).take(kept) {
        let (host, score) = (HostName::clone(host), score.parts(*policy));
        verdicts.push(Verdict {
            host,
            fits: true,
            shortfalls: Vec::new(),
            score,
            rank,
        });
    }
    verdicts.extend(refused.into_iter().take(kept - verdicts.len()));

    let host = scores.first().map(|(_, host)| HostName::clone(host));
    let (summary, hint) = match &host {
        Some(host) => (placed(host, &verdicts, scores.len(), hosts.len()), None),
        None => (not_placed(request, &verdicts), Some(hint::find(request, hosts))),
    };
    Decision {
        host,
        hint,
        summary,
        omitted: u32::try_from(hosts.len() - verdicts.len()).unwrap_or(u32::MAX),
        verdicts,
    }
}

fn placed(host: &HostName, verdicts: &[Verdict], fitting: usize, all: usize) -> String {
    let of = plural(all, "host");
    match verdicts.get(1).filter(|_| fitting > 1) {
        None => format!("{host} is the only one of {of} that can take it"),
        Some(second) => {
            let decisive = verdicts[0]
                .score
                .iter()
                .zip(&second.score)
                .find(|(first, second)| first.value != second.value);
            let why = match decisive {
                Some((first, other)) => format!(
                    "{} {} against {} on {}",
                    first.name, first.value, other.value, second.host
                ),
                None => format!("equal to {}, first by name", second.host),
            };
            format!("{host} is the best of {fitting} that can take it, of {of}: {why}")
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
    for verdict in verdicts {
        let mut seen = Vec::with_capacity(verdict.shortfalls.len());
        for shortfall in &verdict.shortfalls {
            if !seen.contains(&shortfall.constraint) {
                seen.push(shortfall.constraint);
                *counts.entry(shortfall.constraint).or_default() += 1;
            }
        }
    }
    let counts: Vec<_> = counts
        .into_iter()
        .map(|(constraint, hosts)| format!("{} {hosts}", constraint.as_str()))
        .collect();
    format!(
        "none of {} can take it; hosts that fail each test: {}",
        plural(verdicts.len(), "host"),
        counts.join(", ")
    )
}

fn plural(count: usize, noun: &str) -> String {
    if count == 1 {
        format!("1 {noun}")
    } else {
        format!("{count} {noun}s")
    }
}
