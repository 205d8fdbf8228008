//! A decision as the API shows it. The only file of placement that knows the generated types; called by the API.

use dalgu_proto::{time, v1};
use jiff::Timestamp;

use super::{Decision, Verdict, plural};

/// A decision for the wire. `decided` is when it was made, `None` where it is an answer to a question of now that the
/// caller stamps itself.
pub fn to_wire(decision: &Decision, decided: Option<Timestamp>) -> v1::Placement {
    let mut summary = decision.summary.clone();
    if decision.omitted > 0 {
        let count = usize::try_from(decision.omitted).unwrap_or(usize::MAX);
        summary.push_str(&format!(" ({} not listed)", plural(count, "verdict")));
    }
    v1::Placement {
        host: decision
            .host
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        verdicts: decision.verdicts.iter().map(verdict).collect(),
        hint: decision
            .hint
            .as_ref()
            .map(|hint| hint.text.clone())
            .unwrap_or_default(),
        summary,
        decide_time: decided.map(time::to_wire),
        ignored_protection: decision.ignored_protection,
        refused: None,
    }
}

fn verdict(verdict: &Verdict) -> v1::HostVerdict {
    let shortfall = |shortfall: &super::Shortfall| v1::Shortfall {
        constraint: shortfall.constraint.as_str().to_owned(),
        message: shortfall.message.clone(),
        needed: shortfall.needed,
        available: shortfall.available,
    };
    let part = |part: &super::Part| v1::ScorePart {
        name: part.name.to_string(),
        value: part.value,
    };
    v1::HostVerdict {
        host: verdict.host.to_string(),
        fits: verdict.fits,
        shortfalls: verdict.shortfalls.iter().map(shortfall).collect(),
        score: verdict.score.iter().map(part).collect(),
        rank: verdict.rank,
    }
}
