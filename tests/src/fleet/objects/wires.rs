//! What a host's kernel has of networks, and how one life of its agent makes it: the rules stay when an agent dies, and go with
//! the host's power.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use async_trait::async_trait;
use dalgu_agent::network::{Plugged, Problems, System, Wanted};
use dalgu_proto::host::GuestFeature;
use futures::future::BoxFuture;
use tokio::time::Instant;

use crate::fleet::{
    fate::{Fate, Kind},
    life::Life,
    plan::Node,
    site::Site,
};

/// What has been made on a host.
#[derive(Debug, Clone, Default)]
pub struct Kernel {
    /// The filters.
    pub rules: String,
    /// Bridges of networks.
    pub bridges: BTreeSet<String>,
    /// Taps that the filters know.
    pub taps: BTreeSet<String>,
    /// First TCP ports that are let in, by tap.
    pub open: BTreeMap<String, BTreeSet<u16>>,
    /// What is served by DHCP: a line of each interface, its MAC address first.
    pub leases: BTreeSet<String>,
}

impl Kernel {
    fn of(wanted: &Wanted) -> Self {
        let chains = wanted
            .rules
            .lines()
            .filter_map(|line| line.trim().strip_prefix("chain to-"));
        let taps = chains.filter_map(|line| line.split_whitespace().next());
        Self {
            taps: taps.map(str::to_owned).collect(),
            bridges: wanted
                .segments
                .iter()
                .map(|segment| segment.bridge.clone())
                .collect(),
            open: open(&wanted.rules),
            leases: leases(wanted),
            rules: wanted.rules.clone(),
        }
    }
}

/// What the chains of taps let in.
fn open(rules: &str) -> BTreeMap<String, BTreeSet<u16>> {
    let mut open: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    let mut tap = None;
    for line in rules.lines().map(str::trim) {
        if let Some(chain) = line.strip_prefix("chain ") {
            tap = chain
                .strip_prefix("in-")
                .and_then(|name| name.split_whitespace().next());
        }
        let port = line.strip_prefix("meta l4proto tcp ct original proto-dst ");
        let port = port.and_then(|rest| rest.split([' ', '-']).next()?.parse().ok());
        if let (Some(tap), Some(port)) = (tap, port) {
            open.entry(tap.to_owned()).or_default().insert(port);
        }
    }
    open
}

fn leases(wanted: &Wanted) -> BTreeSet<String> {
    let served = wanted
        .segments
        .iter()
        .filter_map(|segment| segment.service.as_ref());
    let lines = served.flat_map(|service| service.leases.lines());
    lines.map(str::to_owned).collect()
}

/// Where other hosts' overlays reach a host.
pub fn overlay_address(host: usize) -> IpAddr {
    let last = u8::try_from(host + 1).unwrap_or(u8::MAX);
    Ipv4Addr::new(192, 0, 2, last).into()
}

/// What a host can do of networks.
pub fn features() -> Vec<GuestFeature> {
    vec![
        GuestFeature::Network,
        GuestFeature::Overlay,
        GuestFeature::IcmpType,
    ]
}

/// What acts for one life of an agent.
pub struct Wires {
    /// The site.
    pub site: Arc<Site>,
    /// Which host's.
    pub host: usize,
    /// The agent.
    pub life: Life,
}

#[async_trait]
impl System for Wires {
    async fn features(&self) -> Vec<GuestFeature> {
        features()
    }

    fn overlay_address(&self) -> Option<IpAddr> {
        Some(overlay_address(self.host))
    }

    async fn make(&self, wanted: &Wanted) -> Problems {
        self.life.pass().await;
        let node = Node::Host(self.host);
        let fate = self.site.at(Kind::Change, "networks", node, node);
        let busy = || Problems {
            all: Some("the kernel is busy".to_owned()),
            ..Problems::default()
        };
        match fate {
            Fate::Delay(time) => tokio::time::sleep(time).await,
            Fate::Fail => return busy(),
            Fate::CrashBefore => {
                self.site.kill(node);
                return self.life.stop_here().await;
            }
            _ => {}
        }
        self.life.pass().await;
        self.site.put_kernel(self.host, Kernel::of(wanted));
        match fate {
            Fate::CrashAfter => {
                self.site.kill(node);
                self.life.stop_here().await
            }
            Fate::Lie => busy(),
            _ => Problems::default(),
        }
    }

    async fn broken(&self) {
        std::future::pending().await
    }

    async fn arrived(&self, _plugged: &Plugged) {}

    async fn first_word(&self, _tap: &str) -> Option<BoxFuture<'static, Instant>> {
        None
    }

    async fn stop(&self) {}
}
