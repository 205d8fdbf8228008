//! Network interfaces of the host.
//!
//! Counters come from /proc/net/dev: one read for all interfaces, always of the agent's own network namespace.
//! What an interface is, its speed and its link come from /sys/class/net. Asking for the speed makes some drivers talk to
//! their device, so kind, MAC and speed are kept and asked for again only when the link changes, when a counter went
//! back (another device of the same name) or after a minute.

use std::{collections::HashMap, time::Duration};

use dalgu_proto::host::{Nic, NicCounters, NicKind, Uplink};
use procfs::net::{DeviceStatus, InterfaceDeviceStatus};

use super::{
    Error, Root,
    rates::{Reading, per_second},
};

/// Most interfaces of a sample; beyond it the less telling kinds are left out, see [`rank`].
pub(super) const MOST: usize = 128;
/// How long kind, MAC and speed are believed.
const DETAILS_FOR: Duration = Duration::from_secs(60);

/// The interfaces' last readings and details.
#[derive(Debug, Default)]
pub(super) struct Nics {
    known: HashMap<String, Known>,
}

#[derive(Debug)]
struct Known {
    at: Duration,
    received: u64,
    sent: u64,
    details: Details,
}

#[derive(Debug, Clone)]
struct Details {
    read_at: Duration,
    up: bool,
    kind: NicKind,
    mac: String,
    speed_bits_per_second: u64,
}

impl Nics {
    /// A sample of every interface but loopback at `now` (since boot), in the order of their names. An interface
    /// seen for the first time has no rates; one that is gone is forgotten.
    pub(super) fn sample(&mut self, root: &Root, now: Duration) -> Result<Vec<Nic>, Error> {
        let devices: InterfaceDeviceStatus = root.parse("proc/net/dev")?;
        let mut before = std::mem::take(&mut self.known);
        let mut nics = Vec::with_capacity(devices.0.len());
        for (name, status) in devices.0.into_iter().filter(|(name, _)| name != "lo") {
            let (nic, known) = measure(root, now, &name, &status, before.remove(&name));
            self.known.insert(name, known);
            nics.push(nic);
        }
        nics.sort_by(|a, b| rank(a.kind).cmp(&rank(b.kind)).then_with(|| a.name.cmp(&b.name)));
        nics.truncate(MOST);
        nics.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(nics)
    }
}

/// Which kinds say most of a host; the ends of VMs come last, as each VM reports its own.
fn rank(kind: NicKind) -> u8 {
    match kind {
        NicKind::Physical => 0,
        NicKind::Bond => 1,
        NicKind::Bridge => 2,
        NicKind::Vlan => 3,
        NicKind::Virtual => 4,
        NicKind::Tap => 5,
    }
}

fn measure(
    root: &Root,
    now: Duration,
    name: &str,
    status: &DeviceStatus,
    before: Option<Known>,
) -> (Nic, Known) {
    let (receive, transmit) = counters(status);
    let rate = |was: fn(&Known) -> u64, is: u64| {
        let before = before.as_ref()?;
        per_second(
            Reading {
                at: before.at,
                value: was(before),
            },
            Reading { at: now, value: is },
        )
    };
    let rates = rate(|known| known.received, receive.bytes).zip(rate(|known| known.sent, transmit.bytes));
    let up = is_up(root, name);
    let details = match before {
        Some(Known { details, .. })
            if rates.is_some() && details.up == up && now.saturating_sub(details.read_at) < DETAILS_FOR =>
        {
            details
        }
        _ => Details::read(root, now, name, up),
    };
    let (receive_bytes_per_second, transmit_bytes_per_second) = rates.unwrap_or_default();
    let nic = Nic {
        name: name.to_owned(),
        kind: details.kind,
        mac: details.mac.clone(),
        up,
        speed_bits_per_second: details.speed_bits_per_second,
        receive,
        transmit,
        receive_bytes_per_second,
        transmit_bytes_per_second,
        rates_valid: rates.is_some(),
    };
    (
        nic,
        Known {
            at: now,
            received: receive.bytes,
            sent: transmit.bytes,
            details,
        },
    )
}

fn counters(status: &DeviceStatus) -> (NicCounters, NicCounters) {
    (
        NicCounters {
            bytes: status.recv_bytes,
            packets: status.recv_packets,
            errors: status.recv_errs,
            drops: status.recv_drop,
        },
        NicCounters {
            bytes: status.sent_bytes,
            packets: status.sent_packets,
            errors: status.sent_errs,
            drops: status.sent_drop,
        },
    )
}

/// The operational state; drivers that keep none (tun among them) say "unknown", and then the carrier tells. Reading
/// the carrier of an interface that is switched off is an error, which means no.
fn is_up(root: &Root, name: &str) -> bool {
    match root.word(format!("sys/class/net/{name}/operstate")).as_deref() {
        Some("up") => true,
        Some("unknown") => root.number(format!("sys/class/net/{name}/carrier")) == Some(1_u8),
        _ => false,
    }
}

impl Details {
    fn read(root: &Root, now: Duration, name: &str, up: bool) -> Self {
        let directory = format!("sys/class/net/{name}");
        // -1, an error or nothing: the device does not say. The file is in Mbit/s.
        let megabits: i64 = root.number(format!("{directory}/speed")).unwrap_or(0);
        Self {
            read_at: now,
            up,
            kind: kind(root, &directory),
            mac: root.word(format!("{directory}/address")).unwrap_or_default(),
            speed_bits_per_second: u64::try_from(megabits).unwrap_or(0).saturating_mul(1_000_000),
        }
    }
}

fn kind(root: &Root, directory: &str) -> NicKind {
    /// IFF_TAP of linux/if_tun.h.
    const TAP: u32 = 0x2;
    let uevent = root.word(format!("{directory}/uevent")).unwrap_or_default();
    match uevent.lines().find_map(|line| line.strip_prefix("DEVTYPE=")) {
        Some("bridge") => NicKind::Bridge,
        Some("bond") => NicKind::Bond,
        Some("vlan") => NicKind::Vlan,
        Some("macvtap" | "ipvtap") => NicKind::Tap,
        _ if root.has(format!("{directory}/bridge")) => NicKind::Bridge,
        _ if root.has(format!("{directory}/bonding")) => NicKind::Bond,
        _ if is_tap(root.word(format!("{directory}/tun_flags")), TAP) => NicKind::Tap,
        _ if root.has(format!("{directory}/device")) => NicKind::Physical,
        _ => NicKind::Virtual,
    }
}

fn is_tap(flags: Option<String>, tap: u32) -> bool {
    let flags = flags.and_then(|text| u32::from_str_radix(text.trim_start_matches("0x"), 16).ok());
    flags.is_some_and(|flags| flags & tap != 0)
}

/// Names of the bridges, sorted.
pub(super) fn bridges(root: &Root) -> Vec<String> {
    let mut names = root.names("sys/class/net");
    names.retain(|name| root.has(format!("sys/class/net/{name}/bridge")));
    names
}

/// By what bridges lead out of the host, of those that do and whose speed is known, in the order of their names.
pub(super) fn uplinks(root: &Root) -> Vec<Uplink> {
    let out = |name: &String| {
        let kind = kind(root, &format!("sys/class/net/{name}"));
        matches!(kind, NicKind::Physical | NicKind::Bond | NicKind::Vlan)
    };
    let uplink = |bridge: String| {
        let ports = root.names(format!("sys/class/net/{bridge}/brif"));
        let ports = ports.iter().filter(|name| out(name));
        let speed = |name: &String| root.number::<i64>(format!("sys/class/net/{name}/speed"));
        let speeds = ports
            .filter_map(speed)
            .filter_map(|megabits| u64::try_from(megabits).ok());
        let mbit_per_second = speeds.filter(|megabits| *megabits > 0).min()?;
        Some(Uplink {
            bridge,
            mbit_per_second,
        })
    };
    bridges(root).into_iter().filter_map(uplink).collect()
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::{super::root::fake::Tree, *};

    fn dev(tree: &Tree, lines: &[(&str, u64, u64)]) {
        let mut text = String::from("Inter-|   Receive  |  Transmit\n face |bytes ...\n");
        for (name, received, sent) in lines {
            writeln!(text, "{name:>6}: {received} 12 3 4 0 0 0 0 {sent} 15 6 7 0 0 0 0").unwrap();
        }
        tree.write("proc/net/dev", &text);
    }

    #[test]
    fn a_bridge_leads_out_by_the_slowest_of_its_ports_that_do() {
        let tree = Tree::new();
        let net = "sys/class/net";
        for (bridge, ports) in [
            ("br0", ["eno1", "eno2", "vnet3"].as_slice()),
            ("br1", ["vnet4"].as_slice()),
            ("br2", ["eno3"].as_slice()),
        ] {
            tree.write(&format!("{net}/{bridge}/bridge/x"), "");
            for port in ports {
                tree.write(&format!("{net}/{bridge}/brif/{port}/x"), "");
            }
        }
        for (port, speed, device) in [
            ("eno1", "25000", true),
            ("eno2", "10000", true),
            ("eno3", "-1", true),
            ("vnet3", "10", false),
            ("vnet4", "10", false),
        ] {
            tree.write(&format!("{net}/{port}/speed"), &format!("{speed}\n"));
            if device {
                tree.write(&format!("{net}/{port}/device/x"), "");
            }
        }
        let expected = Uplink {
            bridge: "br0".into(),
            mbit_per_second: 10_000,
        };
        assert_eq!(uplinks(&tree.root()), [expected]);
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn rates(nics: &[Nic]) -> Vec<(&str, Option<(f64, f64)>)> {
        let rate = |nic: &Nic| (nic.receive_bytes_per_second, nic.transmit_bytes_per_second);
        nics.iter()
            .map(|nic| (nic.name.as_str(), nic.rates_valid.then(|| rate(nic))))
            .collect()
    }

    #[test]
    fn loopback_is_left_out_and_the_rest_comes_by_name() {
        let tree = Tree::new();
        dev(&tree, &[("lo", 1, 1), ("eth1", 1, 1), ("br0", 1, 1)]);
        let nics = Nics::default().sample(&tree.root(), at(1)).unwrap();
        assert_eq!(rates(&nics), [("br0", None), ("eth1", None)]);
        assert_eq!(
            nics[1].receive,
            NicCounters {
                bytes: 1,
                packets: 12,
                errors: 3,
                drops: 4
            }
        );
        assert_eq!(
            nics[1].transmit,
            NicCounters {
                bytes: 1,
                packets: 15,
                errors: 6,
                drops: 7
            }
        );
    }

    #[test]
    fn rates_begin_with_the_second_sample_of_each_interface() {
        let (tree, mut nics) = (Tree::new(), Nics::default());
        dev(&tree, &[("eth0", 1_000, 500)]);
        nics.sample(&tree.root(), at(10)).unwrap();
        // hot-plugged
        dev(&tree, &[("eth0", 3_000, 500), ("eth1", 70_000, 1)]);
        let second = nics.sample(&tree.root(), at(12)).unwrap();
        assert_eq!(rates(&second), [("eth0", Some((1_000.0, 0.0))), ("eth1", None)]);
        // reset of one direction makes both unknown, once
        dev(&tree, &[("eth0", 4_000, 1), ("eth1", 70_000, 3)]);
        let third = nics.sample(&tree.root(), at(14)).unwrap();
        assert_eq!(rates(&third), [("eth0", None), ("eth1", Some((0.0, 1.0)))]);
        dev(&tree, &[("eth0", 4_000, 21)]);
        assert_eq!(
            rates(&nics.sample(&tree.root(), at(16)).unwrap()),
            [("eth0", Some((0.0, 10.0)))]
        );
        // eth1 was gone, so it begins anew
        dev(&tree, &[("eth0", 4_000, 21), ("eth1", 90_000, 9)]);
        let back = nics.sample(&tree.root(), at(18)).unwrap();
        assert_eq!(rates(&back), [("eth0", Some((0.0, 0.0))), ("eth1", None)]);
    }

    #[test]
    fn each_kind_is_told_apart() {
        let tree = Tree::new();
        for (name, file, text) in [
            ("eno1", "device/vendor", "0x8086"),
            ("br0", "bridge/bridge_id", "8000.0"),
            ("br1", "uevent", "DEVTYPE=bridge\nINTERFACE=br1\n"),
            ("bond0", "bonding/mode", "802.3ad 4"),
            ("eno1.7", "uevent", "DEVTYPE=vlan\nINTERFACE=eno1.7\n"),
            ("vnet0", "tun_flags", "0x5002\n"),
            ("tun0", "tun_flags", "0x1001\n"),
            ("veth0", "uevent", "INTERFACE=veth0\n"),
        ] {
            tree.write(&format!("sys/class/net/{name}/{file}"), text);
        }
        let kind = |name: &str| kind(&tree.root(), &format!("sys/class/net/{name}"));
        assert_eq!(kind("eno1"), NicKind::Physical);
        assert_eq!((kind("br0"), kind("br1")), (NicKind::Bridge, NicKind::Bridge));
        assert_eq!(kind("bond0"), NicKind::Bond);
        assert_eq!(kind("eno1.7"), NicKind::Vlan);
        assert_eq!(kind("vnet0"), NicKind::Tap);
        assert_eq!(
            (kind("tun0"), kind("veth0")),
            (NicKind::Virtual, NicKind::Virtual)
        );
        assert_eq!(kind("not-there"), NicKind::Virtual);
        assert_eq!(bridges(&tree.root()), ["br0"]);
    }

    #[test]
    fn a_speed_the_device_does_not_say_is_zero() {
        for (speed, expected) in [
            (Some("-1\n"), 0),
            (Some(""), 0),
            (None, 0),
            (Some("25000\n"), 25_000_000_000),
        ] {
            let tree = Tree::new();
            dev(&tree, &[("eth0", 1, 1)]);
            if let Some(speed) = speed {
                tree.write("sys/class/net/eth0/speed", speed);
            }
            let nics = Nics::default().sample(&tree.root(), at(1)).unwrap();
            assert_eq!(nics[0].speed_bits_per_second, expected, "{speed:?}");
        }
    }

    #[test]
    fn an_unknown_state_is_told_by_the_carrier() {
        for (state, carrier, up) in [
            ("up", "1", true),
            ("down", "0", false),
            ("unknown", "1", true),
            ("unknown", "0", false),
            ("unknown", "", false),
        ] {
            let tree = Tree::new();
            tree.write("sys/class/net/x/operstate", &format!("{state}\n"))
                .write("sys/class/net/x/carrier", carrier);
            assert_eq!(is_up(&tree.root(), "x"), up, "{state} {carrier:?}");
        }
    }

    #[test]
    fn the_speed_is_read_again_when_the_link_changes_and_once_a_minute() {
        let (tree, mut nics) = (Tree::new(), Nics::default());
        dev(&tree, &[("eth0", 1, 1)]);
        let set = |speed: &str, state: &str| {
            tree.write("sys/class/net/eth0/speed", speed)
                .write("sys/class/net/eth0/operstate", state);
        };
        let mut speed =
            |seconds| nics.sample(&tree.root(), at(seconds)).unwrap()[0].speed_bits_per_second / 1_000_000;
        set("1000", "up");
        assert_eq!((speed(1), speed(2)), (1_000, 1_000));
        set("10000", "up");
        assert_eq!((speed(3), speed(60), speed(61)), (1_000, 1_000, 10_000));
        set("100", "down");
        assert_eq!(speed(62), 100);
    }

    #[test]
    fn with_too_many_interfaces_those_of_vms_are_left_out_first() {
        let tree = Tree::new();
        let names: Vec<_> = (0..MOST + 10)
            .map(|number| format!("a{number}"))
            .chain(["zz0".to_owned()])
            .collect();
        for name in &names {
            tree.write(&format!("sys/class/net/{name}/tun_flags"), "0x5002");
        }
        tree.remove("sys/class/net/zz0/tun_flags")
            .write("sys/class/net/zz0/device/vendor", "x");
        dev(
            &tree,
            &names.iter().map(|name| (name.as_str(), 1, 1)).collect::<Vec<_>>(),
        );
        let mut nics = Nics::default();
        let sample = nics.sample(&tree.root(), at(1)).unwrap();
        assert_eq!(sample.len(), MOST);
        assert_eq!(sample.last().unwrap().name, "zz0");
    }
}
