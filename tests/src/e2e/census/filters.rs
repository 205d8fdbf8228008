//! What the chains of an interface hold, and what they should by its groups and addresses, in the same words: a text for each chain. Not which
//! packets are sent there: that the tests of networks try.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use dalgu_agent::network::names;
use serde_json::Value;

use super::networks::Port;
use super::{number_at, text};

/// What should be in the chains of an interface.
pub(super) fn wanted(port: &Port<'_>, groups: &BTreeMap<String, &Value>) -> anyhow::Result<Vec<String>> {
    let tap = port.tap()?;
    let mut wanted = Vec::new();
    let rules = groups.iter().filter(|(name, _)| port.has(name));
    let rules = rules.flat_map(|(_, group)| group["rules"].as_array().into_iter().flatten());
    let rules: Vec<_> = rules.collect();
    for (way, direction, end) in [
        ("in", "DIRECTION_INGRESS", "saddr"),
        ("out", "DIRECTION_EGRESS", "daddr"),
    ] {
        let rules = rules.iter().filter(|rule| rule["direction"] == direction);
        let rules: Vec<_> = rules.collect();
        // What connections are judged by that were begun, as conntrack sees them, by the other end.
        for (chain, packet) in [(way.to_owned(), "original"), (format!("turned-{way}"), "reply")] {
            let returned = rules.iter().flat_map(|rule| lines(rule, port, packet, end));
            let ends = way == "in" || !rules.is_empty();
            let ends = if ends { &["drop".to_owned()][..] } else { &[] };
            wanted.push(told(&format!("{chain}-{tap}"), &returned.collect(), ends));
        }
    }
    let mac = text(port.nic, "/mac");
    let own = |ipv4: bool| {
        let own = port.addresses().filter(move |own| own.is_ipv4() == ipv4);
        own.map(|own| own.to_string())
    };
    wanted.extend([
        senders(&format!("from-{tap}"), [mac.clone()].into()),
        senders(&format!("arp-{tap}"), own(true).chain([mac]).collect()),
        senders(&format!("ip-{tap}"), own(true).collect()),
        senders(&format!("ip6-{tap}"), own(false).collect()),
    ]);
    Ok(wanted)
}

/// A rule of a group as it should be.
fn lines(rule: &Value, port: &Port<'_>, packet: &str, end: &str) -> Vec<String> {
    let first = number_at(rule, "/firstPort");
    let ports = match (first, number_at(rule, "/lastPort").max(first)) {
        (0, _) => String::new(),
        (_, last) if first == last => format!("{packet} proto-dst {first} "),
        (_, last) => format!("{packet} proto-dst {first}-{last} "),
    };
    let both = |text: String| [Some(text.clone()), Some(text)];
    // Of ICMP, conntrack has type and code where others have a port.
    let icmp = |protocol: u8, kind: u32| {
        let first = kind << 8;
        Some(format!(
            "l4proto {protocol} {packet} proto-dst {first}-{} ",
            first | 0xff
        ))
    };
    let whats = match text(rule, "/protocol").as_str() {
        "PROTOCOL_TCP" => both(format!("l4proto 6 {ports}")),
        "PROTOCOL_UDP" => both(format!("l4proto 17 {ports}")),
        "PROTOCOL_ICMP" => both("l4proto 1,58 ".to_owned()),
        "PROTOCOL_ICMP_ECHO_REQUEST" => [icmp(1, 8), icmp(58, 128)],
        "PROTOCOL_ICMP_TIMESTAMP_REQUEST" => [icmp(1, 13), None],
        "PROTOCOL_ICMP_INFORMATION_REQUEST" => [icmp(1, 15), None],
        "PROTOCOL_ICMP_ADDRESS_MASK_REQUEST" => [icmp(1, 17), None],
        "PROTOCOL_ICMP_NODE_INFORMATION_QUERY" => [None, icmp(58, 139)],
        _ => both(String::new()),
    };
    let of = |family: &str, whom: &str| Some(format!("{packet} {family} {end} {whom} "));
    let remotes = match (rule["cidr"].as_str(), rule["group"].as_str()) {
        (Some(cidr), _) if cidr.contains(':') => [None, of("ip6", cidr.trim_end_matches("/128"))],
        (Some(cidr), _) => [of("ip", cidr.trim_end_matches("/32")), None],
        (_, Some(group)) => [(4, "ip"), (6, "ip6")]
            .map(|(number, family)| of(family, &format!("@g{number}/{}/{group}", port.network))),
        _ => both(String::new()),
    };
    let lines = whats.into_iter().zip(remotes);
    // Of everybody, one line may be for both families.
    let lines: BTreeSet<_> = lines
        .filter_map(|(what, remote)| Some(format!("{}{}return", what?, remote?)))
        .collect();
    lines.into_iter().collect()
}

fn told(chain: &str, returned: &BTreeSet<String>, ends: &[String]) -> String {
    let lines: Vec<_> = returned.iter().chain(ends).map(String::as_str).collect();
    format!("rules of {chain}: {}", lines.join("; "))
}

fn senders(chain: &str, own: BTreeSet<String>) -> String {
    let own = Vec::from_iter(own);
    format!("senders in {chain}: {}", own.join(", "))
}

/// What is in the chains of interfaces, by what `nft -jn list ruleset` says.
pub(super) fn seen(ruleset: &Value) -> Vec<String> {
    let mut chains: BTreeMap<(String, String), Vec<&Value>> = BTreeMap::new();
    for item in ruleset.as_array().into_iter().flatten() {
        let (chain, rule) = (&item["chain"], &item["rule"]);
        if chain["table"] == "dalgu" {
            chains
                .entry((text(chain, "/family"), text(chain, "/name")))
                .or_default();
        }
        if rule["table"] == "dalgu" {
            let rules = chains.entry((text(rule, "/family"), text(rule, "/chain")));
            rules.or_default().push(&rule["expr"]);
        }
    }
    chains.retain(|(_, chain), _| chain.contains(&format!("-{}", names::TAP)));
    let parts = |rules: &[&Value]| {
        let lines: Vec<_> = rules.iter().map(|rule| words(rule)).collect();
        let returns = lines.iter().take_while(|line| line.ends_with("return")).count();
        let (returned, ends) = lines.split_at(returns);
        (BTreeSet::from_iter(returned.to_owned()), ends.to_owned())
    };
    let mut seen = Vec::new();
    for ((family, chain), rules) in &chains {
        if family == "bridge" {
            let what = ["from-", "arp-", "ip-", "ip6-"];
            if what.iter().any(|what| chain.starts_with(what)) {
                seen.push(senders(chain, sources(rules)));
            }
            continue;
        }
        let (returned, ends) = parts(rules);
        // For a while after an arrival, who has begun a connection is guessed: by the same rules, and nothing is dropped.
        if let Some(judged) = chain.strip_prefix("guess-") {
            let judged = chains.get(&(family.clone(), judged.to_owned()));
            let judged = judged.map(|rules| parts(rules));
            if judged.is_some_and(|(same, all)| (same, all.len()) == (returned.clone(), ends.len())) {
                continue;
            }
        }
        seen.push(told(chain, &returned, &ends));
    }
    seen
}

/// The addresses that a chain of a sender names as its own. That which follows from a MAC address, and none yet, are left out.
fn sources(rules: &[&Value]) -> BTreeSet<String> {
    let parts = rules
        .iter()
        .flat_map(|rule| rule.as_array().into_iter().flatten());
    let matches = parts.map(|part| &part["match"]);
    let matches = matches.filter(|one| text(one, "/left/payload/field").starts_with("saddr"));
    let own = matches.flat_map(|one| match one["right"]["set"].as_array() {
        Some(all) => all.clone(),
        None => vec![one["right"].clone()],
    });
    let own = own.filter_map(|own| own.as_str().map(str::to_owned));
    own.filter(|own| {
        let address = own.parse::<IpAddr>();
        let not_own = |address: IpAddr| match address {
            IpAddr::V4(address) => address.is_unspecified(),
            IpAddr::V6(address) => address.is_unspecified() || address.is_unicast_link_local(),
        };
        !address.is_ok_and(not_own)
    })
    .collect()
}

/// A rule in few words.
fn words(rule: &Value) -> String {
    let parts = rule.as_array().into_iter().flatten().map(|part| {
        let (left, op, right) = (
            &part["match"]["left"],
            text(part, "/match/op"),
            value(&part["match"]["right"]),
        );
        match part
            .as_object()
            .and_then(|part| part.keys().next())
            .map(String::as_str)
        {
            Some("match") if op == "==" || op == "in" => format!("{} {right}", value(left)),
            Some("match") => format!("{} {op} {right}", value(left)),
            Some(verdict @ ("return" | "drop" | "accept")) => verdict.to_owned(),
            _ => part.to_string(),
        }
    });
    parts.collect::<Vec<_>>().join(" ")
}

fn value(value: &Value) -> String {
    let all = |all: &Value, between: &str| {
        let all = all.as_array().into_iter().flatten().map(self::value);
        all.collect::<Vec<_>>().join(between)
    };
    match value {
        Value::String(text) => text.clone(),
        Value::Object(what) if what.contains_key("set") => all(&what["set"], ","),
        Value::Object(what) if what.contains_key("range") => all(&what["range"], "-"),
        Value::Object(what) if what.contains_key("prefix") => {
            let prefix = &what["prefix"];
            format!("{}/{}", text(prefix, "/addr"), prefix["len"])
        }
        Value::Object(what) if what.contains_key("ct") => {
            format!("{} {}", text(&what["ct"], "/dir"), text(&what["ct"], "/key"))
        }
        Value::Object(what) if what.contains_key("meta") => text(&what["meta"], "/key"),
        other => other.to_string(),
    }
}
