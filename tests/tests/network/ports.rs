//! Interfaces whose rules, groups and networks change while their guests run, and networks that are bridges of the hosts.

use anyhow::{Context as _, ensure};
use dalgu_agent::network::names;
use dalgu_tests::e2e::census::{at_rest, disagreements};
use dalgu_tests::e2e::network::beside::Machine;
use dalgu_tests::e2e::network::heard::Heard;
use dalgu_tests::e2e::network::probe::Probe;
use dalgu_tests::e2e::network::site::{self, NETWORK, Site};
use dalgu_tests::e2e::words::{self, LOCAL, create, create_with, dalgu, json, try_dalgu};
use dalgu_tests::e2e::{self, BOOT_LIMIT, REST_LIMIT};
use dalgu_tests::lab::{Daemon, Lab, guest, wait_for, with_lab};
use nix::sys::signal::Signal;

/// What the guest says when the other has answered it.
const HEARD: &str = "heard web.app.internal";

/// That the guest goes on asking and is not answered. It asks five times a second at most, and counts ten times.
async fn hears_nothing(site: &Site<'_>, why: &str) -> anyhow::Result<()> {
    // An answer may have been under way.
    counts_on(site, 15).await?;
    let before = site.said("desk").await?.matches(HEARD).count();
    counts_on(site, 40).await?;
    let after = site.said("desk").await?.matches(HEARD).count();
    ensure!(
        before == after,
        "{why}, and it was answered {} times",
        after - before
    );
    Ok(())
}

async fn counts_on(site: &Site<'_>, more: usize) -> anyhow::Result<()> {
    let count = async || {
        let said = site.said("desk").await.unwrap_or_default();
        guest::ticks(said.as_bytes()).len()
    };
    let before = count().await;
    wait_for("the guest to count on", BOOT_LIMIT, async || {
        count().await >= before + more
    })
    .await
}

async fn is_answered(site: &Site<'_>, why: &str) -> anyhow::Result<()> {
    ensure!(
        site.heard_again("desk", HEARD).await?,
        "{why}, and it is not answered"
    );
    Ok(())
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn members_of_groups_come_and_go_while_their_guests_talk_and_both_ends_are_asked() -> anyhow::Result<()>
{
    with_lab(&e2e::hosts(2), async |lab| {
        let site = Site::new(lab).await?;
        for (group, rules) in [
            ("friends", &[][..]),
            ("door", &["--rule", "ingress,icmp,from-group=friends"]),
            ("narrow", &["--rule", "egress,tcp,7"]),
        ] {
            dalgu(lab, &[&["security-group", "create", group], rules].concat()).await?;
        }
        site.create("web", 11, "h2", &["door"], "").await?;
        site.create("desk", 10, "h1", &[], "dalgu.ping=web.app.internal")
            .await?;
        site.says("desk", "address is 10.20.0.10").await?;
        hears_nothing(&site, "it is no friend").await?;

        let change = ["vm", "update", "desk"];
        let update = async |words: &[&str]| dalgu(lab, &[&change[..], words].concat()).await;
        update(&["--add-nic-group", "eth0=friends"]).await?;
        is_answered(&site, "it is a friend").await?;
        update(&["--remove-nic-group", "eth0=friends"]).await?;
        site.connections_know(2, "elements = { 10.20.0.10 }", false)
            .await?;
        hears_nothing(&site, "it is no friend any more").await?;
        update(&["--add-nic-group", "eth0=friends"]).await?;
        is_answered(&site, "it is a friend again").await?;

        update(&["--add-nic-group", "eth0=narrow"]).await?;
        let tap = site.tap("desk").await?;
        let narrowed = format!("chain out-{tap} {{\n\t\tmeta l4proto tcp");
        site.connections_know(1, &narrowed, true).await?;
        hears_nothing(&site, "it may use TCP only").await?;
        let rule = ["--add-rule", "egress,icmp,to-group=door"];
        dalgu(
            lab,
            &[&["security-group", "update", "narrow"], &rule[..]].concat(),
        )
        .await?;
        is_answered(&site, "it may ask those behind the door").await?;

        by_hand(lab, &tap).await?;
        for vm in ["desk", "web"] {
            dalgu(lab, &["vm", "delete", vm, "--force"]).await?;
        }
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

/// What somebody has done on a host by hand is seen, each piece of it, and mended without anybody's word.
async fn by_hand(lab: &Lab, tap: &str) -> anyhow::Result<()> {
    at_rest(lab, &[], REST_LIMIT).await?;
    let overlay = names::device(names::VXLAN, &site::NETWORK.parse()?);
    let peer = lab.layout().host(2).ip;
    let done = format!(
        "bridge fdb del 00:00:00:00:00:00 dev {overlay} dst {peer} &&
         bridge fdb append 52:54:00:00:00:99 dev {overlay} dst 192.0.2.99 &&
         ip link add dev dgn0123456789 type bridge &&
         nft add chain bridge dalgu from-dgt0123456789a &&
         nft insert rule inet dalgu in-{tap} tcp dport 22 return &&
         {{ setsid busybox nc -l -p 49152 >/dev/null 2>&1 & echo $!; }}"
    );
    // It must not mend it before it is seen.
    lab.signal(Daemon::Agent(1), Signal::SIGSTOP).await?;
    let listens = lab.exec(1, &["sh", "-c", &done]).await?;
    let seen = disagreements(lab, &[]).await?.join("\n");
    lab.signal(Daemon::Agent(1), Signal::SIGCONT).await?;
    lab.exec(1, &["kill", listens.trim()]).await?;
    let pieces = [
        "floods to",
        "192.0.2.99",
        "dgn0123456789",
        "dgt0123456789a",
        "dport",
        ":49152",
    ];
    for piece in pieces {
        ensure!(seen.contains(piece), "{piece} is not seen: {seen}");
    }
    at_rest(lab, &[], REST_LIMIT).await
}

/// A network of the site's own bridge, which has a machine in it that is no VM.
const OFFICE: [&str; 7] = [
    "network",
    "create",
    "office",
    "--bridge",
    "br0",
    "--ipv4",
    "10.40.0.0/24,gateway=10.40.0.1",
];

/// What filters what a tap sends, by the time at which the kernel first shows the tap.
async fn first_filters(lab: &Lab, tap: &str) -> anyhow::Result<String> {
    // Ends by itself, also where nobody waits for it any more.
    let look = format!(
        "for i in $(seq 200); do grep -q {tap} /proc/net/dev && exec nft list chain bridge dalgu from-{tap}; \
         sleep 0.02; done"
    );
    let mut seen = Ok(String::new());
    wait_for("a tap", BOOT_LIMIT, async || {
        seen = lab.exec(1, &["sh", "-c", &look]).await;
        !matches!(&seen, Ok(nothing) if nothing.is_empty())
    })
    .await?;
    seen.context("a tap was there before its filters")
}

/// Plugs an interface into it while the guest runs. The filters must be there before the tap.
async fn plug_in(lab: &Lab, site: &Site<'_>) -> anyhow::Result<String> {
    let tap = names::tap(words::vm(lab, "web").await?.uid.parse()?, "eth1");
    let nic = "eth1,network=office,ip=10.40.0.11,group=web";
    let change = ["vm", "update", "web", "--wait", "--add-nic", nic];
    let (rules, _) = tokio::try_join!(first_filters(lab, &tap), dalgu(lab, &change))?;
    let vm = words::vm(lab, "web").await?;
    let nics = vm.all["spec"]["nics"].as_array().context("no interfaces")?;
    let nic = nics.iter().find(|nic| nic["name"] == "eth1");
    let mac = nic
        .and_then(|nic| nic["mac"].as_str())
        .context("no such interface")?;
    ensure!(rules.contains(mac), "{rules}");
    site.says("web", "address is 10.40.0.11 mtu 1500 router 10.40.0.1")
        .await?;
    Ok(mac.to_owned())
}

/// A VLAN on the bridge, where the hosts' kernel has any; else the VM is refused, with what is missing.
async fn tagged(lab: &Lab) -> anyhow::Result<()> {
    let network = ["network", "create", "tagged", "--bridge", "br0", "--vlan", "12"];
    dalgu(lab, &network).await?;
    let host = json(lab, &["host", "show", "h1"]).await?;
    let offers = host.to_string().contains("GUEST_FEATURE_VLAN");
    let vm = create("late", LOCAL, &["--nic", "eth1,network=tagged"]);
    let made = try_dalgu(lab, &vm).await?;
    if offers {
        ensure!(made.code == 0, "{made:?}");
        dalgu(lab, &["vm", "delete", "late", "--force"]).await?;
    } else {
        ensure!(
            made.code != 0 && made.stderr.contains("VLAN") && made.stderr.contains("8021q"),
            "{made:?}"
        );
    }
    println!("VLANs of the hosts' kernel: {offers}");
    dalgu(lab, &["network", "delete", "tagged"]).await?;
    Ok(())
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn an_interface_in_a_network_of_the_sites_bridge_comes_and_goes_while_the_guest_runs()
-> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        let site = Site::new(lab).await?;
        dalgu(lab, &OFFICE).await?;
        site.create("web", 11, "h1", &["web"], "").await?;
        site.says("web", "address is 10.20.0.11").await?;
        let machine = Machine::new(lab);
        machine
            .join_site(lab, &site::mac(201), &["10.40.0.201/24"])
            .await?;
        let heard = Heard::new(machine.namespace()).await?;
        let mac = plug_in(lab, &site).await?;
        let probe = Probe::new(machine.namespace());
        probe.hears("10.40.0.11:0").await?;
        let mut conversation = probe.converse("10.40.0.11:7").await?;
        conversation.says("from the site's own network").await?;
        let watch = probe.watch([10, 40, 0, 11].into()).await?;
        let seen = watch.end(100).await?;
        ensure!(
            seen.got_through == 0,
            "a refused packet reached the guest: {seen:?}"
        );
        ensure!(heard.from(&mac) > 0, "nothing was heard of {mac}");
        ensure!(
            heard.asking(&mac) == 0,
            "the guest asked the site's own network for an address"
        );
        at_rest(lab, &[], REST_LIMIT).await?;
        dalgu(lab, &["vm", "update", "web", "--wait", "--remove-nic", "eth1"]).await?;
        at_rest(lab, &[], REST_LIMIT)
            .await
            .context("after the interface was taken out")?;
        tagged(lab).await?;
        dalgu(lab, &["vm", "delete", "web", "--force"]).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

/// `dnsmasq` gives an address of a lease to nobody else, and does not know when a VM has gone.
#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn an_address_that_is_free_again_is_given_to_the_next_vm() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        let site = Site::new(lab).await?;
        // It keeps the network's service running meanwhile.
        site.create("desk", 99, "h1", &[], "").await?;
        let cmdline = format!("{} dalgu.net", guest::CMDLINE);
        let nic = format!("eth1,network={NETWORK}");
        let mut given = Vec::new();
        for name in ["first", "second"] {
            let words = create_with(name, LOCAL, &cmdline, &["--nic", &nic]);
            dalgu(lab, &words).await?;
            let vm = json(lab, &["vm", "show", name]).await?;
            let nic = &vm["spec"]["nics"][1];
            let address = nic["ipv4Address"].as_str().context("no address")?.to_owned();
            site.says(name, &format!("address is {address} ")).await?;
            given.push((address, nic["mac"].clone()));
            dalgu(lab, &["vm", "delete", name, "--force"]).await?;
        }
        ensure!(
            given[0].0 == given[1].0 && given[0].1 != given[1].1,
            "another address, or the same interface: {given:?}"
        );
        site.create("third", 98, "h1", &[], "").await?;
        site.says("third", "address is 10.20.0.98").await
    })
    .await
}
