//! Each kind of rule on real hosts, in both families: what it says passes, nothing beside it does, and what is taken away ends there while the
//! guest runs. What passes is what the kernel hands to the guest or takes from it, at its tap and beside the hosts.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::at_rest;
use dalgu_tests::e2e::network::ask::{Ask, What};
use dalgu_tests::e2e::network::beside::Machine;
use dalgu_tests::e2e::network::heard::Heard;
use dalgu_tests::e2e::network::probe::Probe;
use dalgu_tests::e2e::network::site::{self, Site};
use dalgu_tests::e2e::words::dalgu;
use dalgu_tests::e2e::{self, BOOT_LIMIT, REST_LIMIT};
use dalgu_tests::lab::{Lab, wait_for, with_lab};

/// The last address of a subnet that rules name, the first behind it, and one that a rule names by itself; of both families.
const LAST_INSIDE: [&str; 2] = ["10.20.0.207", "fd20::cf"];
const FIRST_OUTSIDE: [&str; 2] = ["10.20.0.208", "fd20::d0"];
const NAMED: [&str; 2] = ["10.20.0.216", "fd20::d8"];
const GUEST: [&str; 2] = ["10.20.0.11", "fd20::b"];

fn addresses<const N: usize>(texts: [[&str; 2]; N]) -> Vec<IpAddr> {
    let texts = texts.as_flattened().iter();
    texts.map(|text| text.parse().unwrap()).collect()
}

/// What is asked for from beside the hosts: each port that begins or ends a rule, and its neighbours.
const ASKED: [What; 11] = [
    What::Udp(4999),
    What::Udp(5000),
    What::Udp(5010),
    What::Udp(5011),
    What::Udp(65535),
    What::Tcp(5000),
    What::Tcp(6000),
    What::Tcp(6001),
    What::Tcp(6002),
    What::Tcp(65535),
    What::Echo,
];

/// As the guest calls: tests/lab/guest/init.
const CALLED: [What; 5] = [
    What::Tcp(7000),
    What::Tcp(7001),
    What::Tcp(7002),
    What::Tcp(7100),
    What::Echo,
];

/// A rule, and whether it lets an ask by this other end pass.
type Rule = (&'static str, fn(&str, What) -> bool);

/// Rules for IPv4, for IPv6, and those that are never taken away.
const RULES: [&[Rule]; 3] = [
    &[
        ("ingress,udp,5000-5010,from=10.20.0.200/29", |from, what| {
            from == LAST_INSIDE[0] && matches!(what, What::Udp(5000..=5010))
        }),
        ("ingress,tcp,6000,from=0.0.0.0/0", |from, what| {
            from.contains('.') && what == What::Tcp(6000)
        }),
        ("ingress,icmp,timestamp-request", |_, _| false),
        ("ingress,icmp,echo-request,from=10.20.0.207", |from, what| {
            from == LAST_INSIDE[0] && what == What::Echo
        }),
        ("ingress,any,from=10.20.0.216", |from, _| from == NAMED[0]),
        ("egress,tcp,7000-7001,to=10.20.0.200/29", |to, what| {
            to == LAST_INSIDE[0] && matches!(what, What::Tcp(7000 | 7001))
        }),
        ("egress,icmp,to=0.0.0.0/0", |to, what| {
            to.contains('.') && what == What::Echo
        }),
    ],
    &[
        ("ingress,udp,5000-5010,from=fd20::c8/125", |from, what| {
            from == LAST_INSIDE[1] && matches!(what, What::Udp(5000..=5010))
        }),
        ("ingress,tcp,6001,from=::/0", |from, what| {
            from.contains(':') && what == What::Tcp(6001)
        }),
        ("ingress,icmp,128,from=fd20::cf", |from, what| {
            from == LAST_INSIDE[1] && what == What::Echo
        }),
        ("ingress,any,from=fd20::d8", |from, _| from == NAMED[1]),
        ("egress,tcp,7000-7001,to=fd20::c8/125", |to, what| {
            to == LAST_INSIDE[1] && matches!(what, What::Tcp(7000 | 7001))
        }),
        ("egress,icmp,echo-request,to=::/0", |to, what| {
            to.contains(':') && what == What::Echo
        }),
    ],
    &[
        ("ingress,tcp,65535", |_, what| what == What::Tcp(65535)),
        ("egress,tcp,7100", |_, what| what == What::Tcp(7100)),
    ],
];

/// Those of `all` that some rule of this direction lets pass; `end` is the other end.
fn allowed(rules: &[&[Rule]], direction: &str, all: &[Ask], end: fn(&Ask) -> IpAddr) -> BTreeSet<Ask> {
    let rules = || rules.iter().copied().flatten();
    let rules = || rules().filter(|(rule, _)| rule.starts_with(direction));
    let passes = |ask: &&Ask| rules().any(|(_, lets)| lets(&end(ask).to_string(), ask.what));
    all.iter().filter(passes).copied().collect()
}

/// Waits until all of `wanted` was heard so often, beside what else there is.
async fn comes(heard: &Heard, wanted: &BTreeSet<Ask>, times: usize) -> anyhow::Result<()> {
    let mut last = BTreeMap::new();
    let waited = wait_for("what may pass", BOOT_LIMIT, async || {
        last = heard.asked();
        let count = |ask: &Ask| last.get(ask).copied().unwrap_or_default();
        wanted.iter().all(|ask| count(ask) >= times)
    });
    let waited = waited.await;
    last.retain(|ask, _| wanted.contains(ask));
    waited.with_context(|| format!("of {} came {times} times or less: {last:?}", wanted.len()))
}

/// Of what is asked, what was heard must be what may pass.
fn only(heard: &Heard, all: &[Ask], wanted: &BTreeSet<Ask>) -> anyhow::Result<()> {
    let mut seen: BTreeSet<_> = heard.asked().into_keys().collect();
    seen.retain(|ask| all.contains(ask));
    let surplus: Vec<_> = seen.difference(wanted).collect();
    let missing: Vec<_> = wanted.difference(&seen).collect();
    ensure!(
        seen == *wanted,
        "passed against the rules: {surplus:?}; did not pass: {missing:?}"
    );
    Ok(())
}

/// The guest's host, and the machine beside it.
struct Ends<'a> {
    lab: &'a Lab,
    tap: String,
    machine: Machine,
}

impl Ends<'_> {
    /// What comes to the guest.
    async fn inwards(&self, rules: &[&[Rule]]) -> anyhow::Result<()> {
        let from = addresses([LAST_INSIDE, FIRST_OUTSIDE, NAMED]);
        let all = Ask::each(&from, &addresses([GUEST]), &ASKED);
        let wanted = allowed(rules, "ingress", &all, |ask| ask.from);
        let host = Heard::new(&self.lab.layout().host(1).namespace).await?;
        let came = host.at(&self.tap).await?;
        let probe = Probe::new(self.machine.namespace());
        // One round after the other: what passes against the rules is there before the next has come.
        for round in 1..=3 {
            probe.asks(all.iter().copied()).await?;
            comes(&came, &wanted, round).await?;
        }
        only(&came, &all, &wanted).context("to the guest")
    }

    /// What the guest sends, which it does without end.
    async fn outwards(&self, rules: &[&[Rule]]) -> anyhow::Result<()> {
        let to = addresses([LAST_INSIDE, FIRST_OUTSIDE]);
        let all = Ask::each(&addresses([GUEST]), &to, &CALLED);
        let wanted = allowed(rules, "egress", &all, |ask| ask.to);
        let host = Heard::new(&self.lab.layout().host(1).namespace).await?;
        let sent = host.at(&self.tap).await?;
        let came = Heard::new(self.machine.namespace()).await?;
        comes(&sent, &all.iter().copied().collect(), 2)
            .await
            .context("at its tap")?;
        comes(&came, &wanted, 2).await?;
        only(&came, &all, &wanted).context("from the guest")
    }
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn each_kind_of_rule_lets_pass_what_it_says_in_both_families_until_it_is_taken_away()
-> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        let site = Site::new(lab).await?;
        let mut words = vec!["security-group", "create", "each"];
        words.extend(
            RULES
                .iter()
                .copied()
                .flatten()
                .flat_map(|(rule, _)| ["--rule", rule]),
        );
        dalgu(lab, &words).await?;
        let calls = [LAST_INSIDE, FIRST_OUTSIDE];
        let calls = calls
            .as_flattened()
            .iter()
            .map(|address| format!("dalgu.call={address}"));
        let more = [vec!["dalgu.address=fd20::b/64".to_owned()], calls.collect()].concat();
        site.create("web", 11, "h1", &["each"], &more.join(" ")).await?;
        let machine = Machine::new(lab);
        let own = [LAST_INSIDE, FIRST_OUTSIDE, NAMED];
        let own = own.as_flattened().iter();
        let own: Vec<_> = own
            .map(|address| format!("{address}/{}", if address.contains(':') { 64 } else { 24 }))
            .collect();
        let own: Vec<_> = own.iter().map(String::as_str).collect();
        machine.join(lab, site::NETWORK, 1, &site::mac(200), &own).await?;
        site.says("web", "address is 10.20.0.11").await?;
        let probe = Probe::new(machine.namespace());
        probe.hears("10.20.0.11:0").await?;
        let ping = [
            "busybox",
            "ping6",
            "-c",
            "1",
            "-W",
            "1",
            "-I",
            LAST_INSIDE[1],
            GUEST[1],
        ];
        wait_for("an answer over IPv6", BOOT_LIMIT, async || {
            machine.run(&ping).await.is_ok()
        })
        .await?;
        at_rest(lab, &[], REST_LIMIT).await?;
        let tap = site.tap("web").await?;
        let ends = Ends { lab, tap, machine };
        for (kept, gone) in [(0, None), (1, Some("10.20.0.200/29")), (2, Some("fd20::c8/125"))] {
            if let Some(text) = gone {
                let mut words = vec!["security-group", "update", "each"];
                words.extend(
                    RULES[kept - 1]
                        .iter()
                        .flat_map(|(rule, _)| ["--remove-rule", rule]),
                );
                dalgu(lab, &words).await?;
                site.connections_know(1, text, false).await?;
            }
            let rules = &RULES[kept..];
            ends.inwards(rules)
                .await
                .with_context(|| format!("without {gone:?}"))?;
            ends.outwards(rules)
                .await
                .with_context(|| format!("without {gone:?}"))?;
        }
        dalgu(lab, &["vm", "delete", "web", "--force"]).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}
