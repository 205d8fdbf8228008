//! Networks of the site on real hosts: an overlay between them, its filters, addresses and names, and VMs that move in it.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod counts;
mod deaths;
mod forged;
mod ports;
mod rules;

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::at_rest;
use dalgu_tests::e2e::moments::{Moments, death};
use dalgu_tests::e2e::network::heard::{Claim, Heard};
use dalgu_tests::e2e::network::site::{self, Site};
use dalgu_tests::e2e::words::{LOCAL, begin, create, dalgu, end_of, json, state_of, vm};
use dalgu_tests::e2e::{self, BOOT_LIMIT, REST_LIMIT};
use dalgu_tests::lab::{Daemon, run, wait_for, with_lab};
use nix::sys::signal::Signal;

/// By the last part of its address.
fn guest(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 20, 0, last)
}

/// The last answer may be on its way for so long. On an idle machine it is within 20 ms, which `make bench-lifecycle` measures; on one that runs
/// other tests beside, the guest and its probe wait for a processor.
const WITHIN: Duration = Duration::from_millis(100);

/// How long a migration says that its VM could not be reached.
fn reported(migration: &serde_json::Value) -> anyhow::Result<Duration> {
    let text = migration["networkBlackout"].as_str();
    let text = text.with_context(|| format!("no blackout is reported: {migration}"))?;
    let seconds: f64 = text.trim_end_matches('s').parse()?;
    Ok(Duration::from_secs_f64(seconds))
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn vms_on_two_hosts_talk_by_name_and_one_moves_with_its_connections() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(3), async |lab| {
        let site = Site::new(lab).await?;
        site.create("desk", 10, "h3", &[], "dalgu.ping=web.app.internal")
            .await?;
        site.create("web", 11, "h2", &["web"], "").await?;
        for (vm, address) in [("desk", "10.20.0.10"), ("web", "10.20.0.11")] {
            site.says(
                vm,
                &format!(
                    "address is {address} mtu 1450 router 10.20.0.1 dns 10.20.0.254 domain app.internal"
                ),
            )
            .await?;
        }
        site.says("desk", "heard web.app.internal").await?;

        site.join(3).await?;
        let probe = site.probe();
        probe.hears("10.20.0.11:0").await?;
        let mut conversation = probe.converse("10.20.0.11:7").await?;
        conversation.says("before").await?;
        let heard = site.listen().await?;
        let watch = probe.watch(guest(11)).await?;
        dalgu(lab, &["vm", "migrate", "web", "--host", "h1"]).await?;
        let seen = watch.end(100).await.context("after it moved")?;
        ensure!(
            seen.got_through == 0,
            "a refused packet reached the guest {} times",
            seen.got_through
        );
        conversation.says("after").await?;
        wait_for("word of where it is now", REST_LIMIT, async || {
            heard.announcing(&site::mac(11)) > 0
        })
        .await?;
        eprintln!("announced itself {} times", heard.announcing(&site::mac(11)));
        let operations = json(lab, &["op", "list", "--vm", "web"]).await?;
        let migration = operations.as_array().context("no list")?.iter();
        let migration = migration
            .map(|operation| &operation["migration"])
            .find(|part| part.is_object());
        let migration = migration.context("no migration")?;
        let reported = reported(migration)?;
        eprintln!(
            "longest time without an answer: {:?}; reported: {reported:?}; QEMU's stop: {} ms",
            seen.blackout, migration["downtimeMs"]
        );
        // It begins when the guest has stopped, and ends with the first that it says: its last answer was before that, and its next is
        // no earlier. How much later they are is the load's: `make bench-lifecycle` measures it.
        ensure!(
            reported > Duration::ZERO && reported <= seen.blackout + WITHIN,
            "{reported:?} are reported, {:?} were seen",
            seen.blackout
        );
        ensure!(
            site.heard_again("desk", "heard web.app.internal").await?,
            "the other VM does not hear it"
        );

        dalgu(lab, &["vm", "delete", "desk", "--force"]).await?;
        dalgu(lab, &["vm", "delete", "web", "--force"]).await?;
        site.is_gone_from(1..=3).await?;
        dalgu(lab, &["network", "delete", site::NETWORK]).await?;
        dalgu(lab, &["security-group", "delete", "web"]).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

/// Whose it is that the guests pretend to be: nobody's.
const OTHER_IPV4: Ipv4Addr = Ipv4Addr::new(10, 20, 0, 99);
const OTHER_IPV6: Ipv6Addr = Ipv6Addr::new(0xfd20, 0, 0, 0, 0, 0, 0, 0x63);
const OTHER_MAC: &str = "02:00:00:00:be:ef";

/// Waits until both guests have handed over everything that they may not send.
async fn all_is_tried(desk: &Heard, twin: &Heard) -> anyhow::Result<()> {
    let mut last = String::new();
    let tried = wait_for("what the guests pretend", BOOT_LIMIT, async || {
        let ipv4 = desk.claims(&site::mac(10), OTHER_IPV4.into());
        let ipv6 = twin.claims(&site::mac(12), OTHER_IPV6.into());
        let mac = desk.claims(OTHER_MAC, guest(10).into());
        last = format!("{ipv4:?}, {ipv6:?}, with another MAC address {mac:?}");
        ipv4 == [Claim::Source, Claim::Arp, Claim::Probe].into()
            && ipv6 == [Claim::Source, Claim::Advertisement, Claim::Detection].into()
            && mac == [Claim::Source, Claim::Arp].into()
    });
    tried.await.with_context(|| last.clone())?;
    eprintln!("{last} reached the taps");
    Ok(())
}

/// And that their own addresses are there.
fn nothing_of_it_is_in(heard: &Heard) -> anyhow::Result<()> {
    let own = Ipv6Addr::new(0xfd20, 0, 0, 0, 0, 0, 0, 12);
    let claims = heard.claims(&site::mac(12), own.into());
    ensure!(
        claims.contains(&Claim::Detection),
        "of its own IPv6 address {claims:?} were heard"
    );
    let claims = heard.claims(&site::mac(10), guest(10).into());
    ensure!(
        claims.is_superset(&[Claim::Source, Claim::Arp].into()),
        "of its own IPv4 address {claims:?} were heard"
    );
    let claims = [
        heard.claims(&site::mac(10), OTHER_IPV4.into()),
        heard.claims(&site::mac(12), OTHER_IPV6.into()),
    ];
    ensure!(
        claims.iter().all(BTreeSet::is_empty),
        "another's address left: {claims:?}"
    );
    ensure!(
        heard.holding_of(&site::mac(12), &OTHER_IPV6.octets()) == 0,
        "a packet about another's IPv6 address left"
    );
    ensure!(
        heard.from(OTHER_MAC) == 0,
        "a frame with another MAC address left"
    );
    Ok(())
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_first_boot_tells_the_address_in_a_network_without_dhcp() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        let subnet = "10.40.0.0/24,gateway=10.40.0.1,no-dhcp";
        let network = [
            "network",
            "create",
            "office",
            "--bridge",
            "br0",
            "--ipv4",
            subnet,
            "--dns",
            "192.0.2.53",
        ];
        dalgu(lab, &network).await?;
        let more = ["--stopped", "--hostname", "desk", "--nic", "eth1,network=office"];
        dalgu(lab, &create("desk", LOCAL, &more)).await?;
        let vm = vm(lab, "desk").await?;
        let pool = lab.layout().host(1).outside("/var/lib/dalgu/local");
        let volume = pool.join(&vm.uid).join("first_boot.raw");
        let told = run("mtype", ["-i", &*volume.to_string_lossy(), "::/network-config"]).await?;
        let told: serde_json::Value = serde_json::from_str(&told)?;
        let given = vm.all["spec"]["nics"][1]["ipv4Address"].as_str();
        let (bridge, office) = (&told["ethernets"]["eth0"], &told["ethernets"]["eth1"]);
        ensure!(bridge["dhcp4"] == true && bridge["addresses"].is_null(), "{told}");
        let address = format!("{}/24", given.context("no address")?);
        ensure!(
            office["dhcp4"] == false
                && office["addresses"][0] == address
                && office["gateway4"] == "10.40.0.1"
                && office["nameservers"]["addresses"][0] == "192.0.2.53",
            "{address}: {told}"
        );
        dalgu(lab, &["vm", "delete", "desk", "--force"]).await?;
        dalgu(lab, &["network", "delete", "office"]).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn what_a_guest_pretends_to_be_never_leaves_its_port() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let site = Site::new(lab).await?;
        site.create("web", 11, "h2", &["web"], "dalgu.address=fd20::b/64")
            .await?;
        site.join(2).await?;
        site.hears_over_ipv6(11).await?;
        let heard = site.listen().await?;
        let host = Heard::new(&lab.layout().host(1).namespace).await?;
        site.create("desk", 10, "h1", &[], "dalgu.spoof=10.20.0.99")
            .await?;
        site.create(
            "twin",
            12,
            "h1",
            &[],
            "dalgu.spoof=fd20::63 dalgu.address=fd20::c/64",
        )
        .await?;
        for name in ["desk", "twin"] {
            site.says(name, "spoofing").await?;
        }
        let (desk, twin) = (site.tap("desk").await?, site.tap("twin").await?);
        // Whoever asks where it is would hear of it.
        let questions = site.ask_over_ipv6(0x63)?;
        all_is_tried(&host.at(&desk).await?, &host.at(&twin).await?).await?;
        // What it may send comes after it, and it would have come as well.
        let counts = || [10, 12].map(|last| heard.from(&site::mac(last)));
        let before = counts();
        wait_for("pings of their own addresses", BOOT_LIMIT, async || {
            counts()
                .iter()
                .zip(before)
                .all(|(count, before)| *count > before + 10)
        })
        .await?;
        drop(questions);
        nothing_of_it_is_in(&host.elsewhere(&[&desk, &twin]).await?).context("on their own host")?;
        nothing_of_it_is_in(&heard).context("on another host")?;
        ensure!(
            heard.holding(&OTHER_IPV4.octets()) == 0,
            "a packet or ARP of another address left"
        );
        ensure!(
            heard.holding_of(&site::mac(10), &[10, 20, 0, 254]) == 0,
            "what is about the hosts' own address crossed"
        );
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn changed_rules_end_what_they_refuse_and_a_dead_agent_ends_nothing() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        let site = Site::new(lab).await?;
        site.create("web", 11, "h1", &["web"], "").await?;
        site.says("web", "address is 10.20.0.11").await?;
        site.join(1).await?;
        site.tcp_is_let_in(1, true).await?;
        let probe = site.probe();
        probe.hears("10.20.0.11:0").await?;
        let mut conversation = probe.converse("10.20.0.11:7").await?;
        conversation.says("allowed").await?;

        lab.signal(Daemon::Agent(1), Signal::SIGKILL).await?;
        conversation.says("without an agent").await?;
        lab.start(Daemon::Agent(1)).await?;
        conversation.says("with the next").await?;

        let change = ["security-group", "update", "web"];
        let rule = "ingress,tcp,7";
        dalgu(lab, &[&change[..], &["--remove-rule", rule]].concat()).await?;
        site.tcp_is_let_in(1, false).await?;
        ensure!(
            conversation.says("refused").await.is_err(),
            "a connection goes on that is refused now"
        );
        dalgu(lab, &[&change[..], &["--add-rule", rule]].concat()).await?;
        site.tcp_is_let_in(1, true).await?;
        conversation.hears("refused").await.context("allowed again")?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_limit_of_an_interface_holds_and_is_lifted_while_the_guest_runs() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        let site = Site::new(lab).await?;
        site.create("web", 11, "h1", &["web"], "").await?;
        site.says("web", "address is 10.20.0.11").await?;
        site.join(1).await?;
        let probe = site.probe();
        probe.hears("10.20.0.11:0").await?;
        // 256 KiB at once, and a Mbit each second; a packet counts 1020 bytes, without its Ethernet header.
        let most = |time: Duration| (262_144.0 + 125_000.0 * time.as_secs_f64()) / 1020.0 + 1.0;
        for (limit, chain) in [
            ("eth0,receive=1Mbit", "to-"),
            ("eth0,receive=none,send=1Mbit", "sent-"),
        ] {
            dalgu(lab, &["vm", "update", "web", "--limit-nic", limit]).await?;
            site.limits(1, &[chain]).await?;
            let (came, time) = probe.pour("10.20.0.11:0", 4000).await?;
            eprintln!(
                "{limit}: {came} of 4000 came back in {time:?}, at most {:.0}",
                most(time)
            );
            #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
            let came_share = came as f64 / most(time);
            // What may pass passes, on a busy machine too: most of it is what passes at once.
            ensure!((0.25..=1.0).contains(&came_share), "{limit}: {came} in {time:?}");
        }
        dalgu(lab, &["vm", "update", "web", "--limit-nic", "eth0,none"]).await?;
        site.limits(1, &[]).await?;
        let mut last = String::new();
        let freed = wait_for("more than a limit lets through", BOOT_LIMIT, async || {
            let Ok((came, time)) = probe.pour("10.20.0.11:0", 4000).await else {
                return false;
            };
            last = format!("{came} of 4000 came back in {time:?}");
            #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
            let came = came as f64;
            came > most(time)
        });
        freed.await.with_context(|| last.clone())?;
        eprintln!("without: {last}");
        dalgu(lab, &["vm", "delete", "web", "--force"]).await?;
        Ok(())
    })
    .await
}

/// TCP is let in no more, and again.
const CHANGES: [(&str, bool); 4] = [
    ("--remove-rule", false),
    ("--add-rule", true),
    ("--remove-rule", false),
    ("--add-rule", true),
];
/// A host has heard of a change, and carried it out, within this time; and has made or removed a VM within that.
const HEARD_OF: Duration = Duration::from_millis(200);
const DONE: Duration = Duration::from_millis(500);

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn whoever_dies_amid_a_change_of_networks_it_is_carried_out_and_nothing_is_left() -> anyhow::Result<()>
{
    with_lab(&e2e::hosts(1), async |lab| {
        let site = Site::new(lab).await?;
        site.create("web", 11, "h1", &["web"], "").await?;
        let daemons = [Daemon::Agent(1), Daemon::Libvirtd(1), Daemon::Controller];
        let mut moments = Moments::new()?;
        for (number, daemon) in daemons.into_iter().enumerate() {
            for (round, (change, let_in)) in CHANGES.into_iter().enumerate() {
                let words = ["security-group", "update", "web", change, "ingress,tcp,7"];
                dalgu(lab, &words).await?;
                death(lab, daemon, moments.next(HEARD_OF)).await?;
                site.tcp_is_let_in(1, let_in).await?;
                let domain = format!("r{round}-{number}.internal");
                dalgu(lab, &["network", "update", site::NETWORK, "--domain", &domain]).await?;
                death(lab, daemon, moments.next(HEARD_OF)).await?;
                let name = format!("web.{domain}");
                wait_for("names in the new domain", BOOT_LIMIT, async || {
                    let names = ["grep", "-rqs", &name, "/run/dalgu/network"];
                    lab.exec(1, &names).await.is_ok()
                })
                .await?;
            }
            // A network comes to the host with its first VM, and goes with its last.
            dalgu(
                lab,
                &["network", "create", "late", "--overlay", "--ipv4", "10.30.0.0/24"],
            )
            .await?;
            let words = create("late", LOCAL, &["--nic", "eth1,network=late"]);
            let there_and_gone = [words, vec!["vm", "delete", "late", "--force"]];
            for words in there_and_gone.iter().cycle().take(4) {
                // Without its libvirtd, which has just died, a host takes nothing.
                wait_for("h1 to be ready", REST_LIMIT, async || {
                    let host = json(lab, &["host", "show", "h1"]).await;
                    host.is_ok_and(|host| host["state"] == "HOST_STATE_READY")
                })
                .await?;
                let operation = begin(lab, words).await?;
                death(lab, daemon, moments.next(DONE)).await?;
                let ended = end_of(lab, &operation, BOOT_LIMIT).await?;
                ensure!(
                    state_of(&ended) == "SUCCEEDED",
                    "{daemon:?} died amid {words:?}: {ended}"
                );
            }
            dalgu(lab, &["network", "delete", "late"]).await?;
            death(lab, daemon, moments.next(HEARD_OF)).await?;
            site.has_only(1)
                .await
                .with_context(|| format!("{daemon:?} died"))?;
        }
        dalgu(lab, &["vm", "delete", "web", "--force"]).await?;
        site.is_gone_from(1..=1).await?;
        dalgu(lab, &["network", "delete", site::NETWORK]).await?;
        dalgu(lab, &["security-group", "delete", "web"]).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}
