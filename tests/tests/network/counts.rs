//! One VM's connections leave room for those of others on its host, also after the filters have been replaced.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::network::ask::Ask;
use dalgu_tests::e2e::network::forged::{self, End, Forge};
use dalgu_tests::e2e::network::site::{self, Site};
use dalgu_tests::e2e::words::dalgu;
use dalgu_tests::e2e::{self, REST_LIMIT};
use dalgu_tests::lab::{Lab, wait_for, with_lab};

const PROBE: End = end(200);
const DESK: End = end(10);
/// A port that nobody listens to, and what is said to it.
const PORT: u16 = 9;
const MARK: &[u8] = b"one more";

const fn end(last: u8) -> End {
    End {
        mac: [0x52, 0x54, 0, 0, 0x20, last],
        ipv4: Ipv4Addr::new(10, 20, 0, last),
        ipv6: Ipv6Addr::new(0xfd20, 0, 0, 0, 0, 0, 0, last as u16),
    }
}

/// What one interface may have begun on the host.
async fn bound(lab: &Lab) -> anyhow::Result<usize> {
    let chain = ["nft", "list", "chain", "inet", "dalgu-counts", "forward"];
    let chain = lab.exec(1, &chain).await?;
    let bound = chain.split("ct count over ").nth(1);
    let bound = bound
        .and_then(|bound| bound.split(' ').next())
        .context("no bound")?;
    Ok(bound.parse()?)
}

/// Connections that the host knows of such a beginning.
async fn begun(lab: &Lab, from: Ipv4Addr) -> anyhow::Result<usize> {
    let all = lab.exec(1, &["cat", "/proc/net/nf_conntrack"]).await?;
    // The first source of a line is that of whoever began.
    let begins = format!("{from} ");
    let own = |line: &&str| {
        line.split_once("src=")
            .is_some_and(|(_, first)| first.starts_with(&begins))
    };
    Ok(all.lines().filter(own).count())
}

async fn is_refused(lab: &Lab) -> bool {
    let refused = ["nft", "list", "set", "inet", "dalgu-counts", "refused"];
    let refused = lab.exec(1, &refused).await;
    refused.is_ok_and(|refused| refused.contains(&site::mac(10)))
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_vm_that_begins_ever_more_connections_is_stopped_at_its_part_and_others_still_connect()
-> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        let site = Site::new(lab).await?;
        site.create("desk", 10, "h1", &[], "").await?;
        site.create("web", 11, "h1", &["web"], "dalgu.call=10.20.0.200")
            .await?;
        site.join(1).await?;
        let heard = site.listen().await?;
        let forge = Forge::new(&lab.layout().host(1).namespace, &site.tap("desk").await?).await?;
        let bound = bound(lab).await?;
        // Each from a port of its own; what was begun before is kept alive so.
        let last = u16::try_from(1024 + bound + 500).context("more than there are ports")?;
        let more = |port: u16| {
            for from in 1024..=last {
                let frame = forged::udp(DESK, PROBE, (from, port), MARK);
                forge.send(&frame).expect("its way to the tap");
            }
        };
        wait_for("its part to be used up", REST_LIMIT, async || {
            more(PORT);
            is_refused(lab).await
        })
        .await?;
        let (at_most, own) = (begun(lab, DESK.ipv4).await?, heard.holding(MARK));
        ensure!(at_most <= bound, "it has begun {at_most} of {bound}");
        ensure!(own > 0, "it has begun none");

        // A change replaces the filters, and what has been counted stays.
        dalgu(
            lab,
            &["security-group", "update", "web", "--add-rule", "ingress,tcp,99"],
        )
        .await?;
        site.connections_know(1, "proto-dst 99 ", true).await?;
        more(PORT + 1);
        let after = begun(lab, DESK.ipv4).await?;
        ensure!(after <= bound, "it has begun {after} of {bound} after a change");

        let called = || {
            let asked = heard.asked().into_iter();
            let web = |ask: &Ask| ask.from == Ipv4Addr::new(10, 20, 0, 11);
            asked
                .filter(|(ask, _)| web(ask))
                .map(|(_, times)| times)
                .sum::<usize>()
        };
        let before = called();
        wait_for("another VM to connect", REST_LIMIT, async || {
            more(PORT + 2);
            called() > before + 3
        })
        .await?;
        let at_last = begun(lab, DESK.ipv4).await?;
        ensure!(at_last <= bound, "it has begun {at_last} of {bound} at last");
        Ok(())
    })
    .await
}
