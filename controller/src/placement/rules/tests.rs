//! Tables of groups and taints on three racks, and how refusals read.

use std::borrow::Cow;

use dalgu_proto::vm::Spec;

use super::*;
use crate::placement::{
    Decision, Policy, decide,
    tests::{host, name, spec},
};

/// Hosts h1 and h2 in rack a, h3 in rack b, h4 in none.
fn site() -> Vec<HostView<'static>> {
    let racks = [
        ("h1", Some("a")),
        ("h2", Some("a")),
        ("h3", Some("b")),
        ("h4", None),
    ];
    let labelled = racks.map(|(name, rack)| {
        let rack = rack.map(|rack| ("rack".to_owned(), rack.to_owned()));
        HostView {
            labels: Cow::Owned(rack.into_iter().collect()),
            ..host(name)
        }
    });
    labelled.into()
}

/// A group with a member in each of these domains.
fn group(name: &str, rule: Rule, key: Option<&str>, domains: &[(&str, &str)]) -> Members {
    let held = |(domain, vm): &(&str, &str)| {
        let held = Held {
            vms: 1,
            first: vm.parse().unwrap(),
        };
        ((*domain).to_owned(), held)
    };
    Members {
        group: Group {
            name: name.parse().unwrap(),
            rule,
            preferred: false,
            topology_key: key.map(str::to_owned),
        },
        domains: domains.iter().map(held).collect(),
        others: u32::try_from(domains.len()).unwrap(),
        first: domains.first().map(|(_, vm)| vm.parse().unwrap()),
    }
}

fn preferred(members: Members) -> Members {
    Members {
        group: Group {
            preferred: true,
            ..members.group
        },
        ..members
    }
}

fn ask(groups: Vec<Members>) -> Request {
    Request::new(spec()).with_rules(Rules {
        groups,
        ..Rules::default()
    })
}

fn fitting(decision: &Decision) -> Vec<&str> {
    let fitting = decision.verdicts.iter().filter(|verdict| verdict.fits);
    fitting.map(|verdict| verdict.host.as_str()).collect()
}

fn decided(groups: Vec<Members>) -> Decision {
    decide(&ask(groups), &site(), &Policy::SPREAD)
}

/// A rule, the label that it goes by, domains with members, and the hosts that are left.
type Case = (
    Rule,
    Option<&'static str>,
    &'static [(&'static str, &'static str)],
    &'static [&'static str],
);

#[test]
fn members_are_kept_apart_by_host_or_by_rack_and_together_in_the_same_way() {
    use Rule::{Affinity, AntiAffinity};
    let rack = Some("rack");
    let table: [Case; 7] = [
        (AntiAffinity, None, &[("h1", "web1")], &["h2", "h3", "h4"]),
        (AntiAffinity, rack, &[("a", "web1")], &["h3"]),
        (AntiAffinity, rack, &[], &["h1", "h2", "h3"]),
        (Affinity, None, &[("h2", "web1")], &["h2"]),
        (Affinity, rack, &[("a", "web1")], &["h1", "h2"]),
        (Affinity, rack, &[], &["h1", "h2", "h3"]),
        (Affinity, None, &[], &["h1", "h2", "h3", "h4"]),
    ];
    for (rule, key, domains, expected) in table {
        let decision = decided(vec![group("g", rule, key, domains)]);
        assert_eq!(fitting(&decision), expected, "{rule:?} {key:?} {domains:?}");
    }
}

#[test]
fn a_shortfall_names_the_member_and_where_it_is() {
    let told = |members: Members, host: &str| {
        let decision = decided(vec![members]);
        let verdict = decision
            .verdicts
            .iter()
            .find(|verdict| verdict.host == name(host));
        let lacks = &verdict.unwrap().shortfalls;
        assert_eq!((lacks.len(), lacks[0].constraint.as_str()), (1, "GROUP"));
        lacks[0].message.clone()
    };
    let rack = Some("rack");
    let apart = || group("g", Rule::AntiAffinity, rack, &[("a", "web2")]);
    assert_eq!(told(apart(), "h1"), "VM web2 of group g is on rack a");
    assert_eq!(told(apart(), "h4"), "has no label rack, by which group g goes");
    let hosts = group("g", Rule::AntiAffinity, None, &[("h1", "web2")]);
    assert_eq!(told(hosts, "h1"), "VM web2 of group g is on this host");
    let together = group("g", Rule::Affinity, rack, &[("a", "web2")]);
    assert_eq!(
        told(together, "h3"),
        "VM web2 of group g is on rack a, and they stay together"
    );
    let moving = Members {
        domains: BTreeMap::new(),
        ..group("g", Rule::Affinity, None, &[("h1", "web2")])
    };
    let text = "VM web2 of group g, with which it stays together, is moving";
    assert_eq!(told(moving, "h1"), text);
}

#[test]
fn what_is_preferred_comes_before_the_load_and_refuses_nothing() {
    let mut hosts = site();
    // Otherwise the last one by its load.
    hosts[2].usage = None;
    let apart = preferred(group("g", Rule::AntiAffinity, Some("rack"), &[("a", "web1")]));
    let decision = decide(&ask(vec![apart]), &hosts, &Policy::SPREAD);
    assert_eq!(fitting(&decision), ["h3", "h1", "h2", "h4"]);
    let against: Vec<_> = decision
        .verdicts
        .iter()
        .map(|verdict| verdict.score[0].value)
        .collect();
    assert_eq!(against, [0.0, 1.0, 1.0, 1.0]);
    assert_eq!(decision.verdicts[0].score[0].name, "against_preferences");
    let together = preferred(group(
        "g",
        Rule::Affinity,
        None,
        &[("h2", "web1"), ("h4", "web2")],
    ));
    assert_eq!(fitting(&decided(vec![together])), ["h2", "h4", "h1", "h3"]);
}

#[test]
fn members_spread_evenly_over_more_members_than_racks() {
    let mut members = preferred(group(
        "g",
        Rule::AntiAffinity,
        Some("rack"),
        &[("a", "w1"), ("b", "w2")],
    ));
    members.domains.get_mut("a").unwrap().vms = 2;
    members.others = 3;
    let decision = decided(vec![members]);
    assert_eq!(decision.host, Some(name("h3")));
}

#[test]
fn a_hard_taint_refuses_a_soft_one_comes_last_and_a_toleration_lifts_either() {
    let taint = |soft| Taint {
        key: "use".into(),
        value: "db".into(),
        soft,
    };
    let tolerant = |value: Option<&str>| {
        Request::new(spec()).with_rules(Rules {
            groups: Vec::new(),
            tolerations: BTreeSet::from([Toleration {
                key: "use".into(),
                value: value.map(str::to_owned),
            }]),
        })
    };
    let first = |request: &Request, soft| {
        let mut hosts = vec![host("h1"), host("h2")];
        hosts[0].taints.to_mut().insert(taint(soft));
        hosts[1].cordoned = !soft;
        decide(request, &hosts, &Policy::SPREAD)
    };
    let refused = first(&ask(Vec::new()), false);
    let lack = &refused.verdicts[0].shortfalls[0];
    assert_eq!(lack.constraint.as_str(), "TAINT");
    assert_eq!(
        lack.message,
        "has the taint use=db, which the VM does not tolerate"
    );
    assert_eq!(
        refused.hint.unwrap().text,
        "uncordon h2, or have the VM tolerate the taint use=db (h1 can take it then)"
    );
    assert_eq!(first(&tolerant(None), false).host, Some(name("h1")));
    assert_eq!(first(&tolerant(Some("db")), false).host, Some(name("h1")));
    assert_eq!(first(&tolerant(Some("web")), false).host, None);
    assert_eq!(first(&ask(Vec::new()), true).host, Some(name("h2")));
    assert_eq!(first(&tolerant(None), true).host, Some(name("h1")));
}

#[test]
fn a_conflict_is_named_and_a_want_of_room_is_none() {
    use Rule::{Affinity, AntiAffinity};
    let told = |groups, selector: Option<&str>| {
        let mut request = ask(groups);
        let selector = selector.map(|rack| ("rack".to_owned(), rack.to_owned()));
        request.spec = Spec {
            host_selector: selector.into_iter().collect(),
            ..request.spec
        };
        conflict(&request, &site())
    };
    let rack = Some("rack");
    let together = || group("near", Affinity, rack, &[("a", "web2")]);
    assert_eq!(
        told(
            vec![together(), group("far", AntiAffinity, rack, &[("a", "web2")])],
            None
        )
        .unwrap(),
        "no host is left by group near (together on one rack; VM web2 is on rack a) and group far (apart by rack; VM web2 is on rack a) \
         together"
    );
    assert_eq!(
        told(vec![together()], Some("b")).unwrap(),
        "no host is left by group near (together on one rack; VM web2 is on rack a) and host selector rack=b together"
    );
    assert_eq!(
        told(
            vec![group("far", AntiAffinity, rack, &[("a", "web1"), ("b", "web2")])],
            None
        )
        .unwrap(),
        "group far has more members than there are domains: it keeps them apart by rack, and a member is on each of the 2 that a host \
         could be taken of"
    );
    assert_eq!(
        told(vec![group("far", AntiAffinity, Some("room"), &[])], None).unwrap(),
        "no host has a label room, by which group far goes: give hosts one (`dalgu host label`)"
    );
    // Together by rack and apart by host goes well.
    let hosts = group("far", AntiAffinity, None, &[("h1", "web2")]);
    assert_eq!(told(vec![together(), hosts], None), None);
    assert_eq!(told(vec![together()], Some("a")), None);
    let mut request = ask(vec![together()]);
    request.spec.memory_mib = 1 << 40;
    assert_eq!(conflict(&request, &site()), None);
    assert!(decide(&request, &site(), &Policy::SPREAD).host.is_none());
    // Who is alone with the other one on its host cannot leave it.
    let mut request = ask(vec![group("near", Affinity, None, &[("h1", "web2")])]);
    request.exclude = Some(name("h1"));
    assert_eq!(
        conflict(&request, &site()).unwrap(),
        "group near keeps it together with VM web2, and no other host is of host h1: a drain of the host moves all its members"
    );
}
