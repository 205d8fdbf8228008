//! Tests of the page: its series, its formats, its bounds.

use std::{
    collections::BTreeSet,
    io::Write as _,
    process::{Command, Stdio},
};

use dalgu_proto::{
    host::{
        CpuTimes, FileSystem, HugePages, Memory, Nic, NicCounters, NicKind, Pool, Pressure, Stall, VmBlock,
        VmNic,
    },
    metrics::render,
};
use uuid::Uuid;

use super::*;

fn now() -> Duration {
    Duration::from_millis(12_500)
}

fn vm(number: u128, running: bool) -> Vm {
    let usage = VmUsage {
        cpu_seconds_total: 3.5,
        cpu_wait_seconds_total: 0.25,
        cpus_busy: 0.5,
        rates_valid: true,
        memory_resident_bytes: 4096,
        memory_balloon_bytes: 8192,
        memory_unused_bytes: 17,
        blocks: vec![VmBlock {
            name: "root".into(),
            read_bytes_total: 1,
            ..Default::default()
        }],
        nics: vec![VmNic {
            name: "eth0".into(),
            receive_bytes_total: 2,
            ..Default::default()
        }],
        ..Default::default()
    };
    Vm {
        id: VmId::from_uuid(Uuid::from_u128(number)),
        name: format!("vm{number}").parse().unwrap(),
        power: Some(if running {
            PowerState::Running
        } else {
            PowerState::Stopped
        }),
        usage: running.then_some(usage),
    }
}

fn nic(name: &str, kind: NicKind) -> Nic {
    let counters = NicCounters {
        bytes: u64::MAX,
        packets: 2,
        errors: 3,
        drops: 4,
    };
    let speed_bits_per_second = if kind == NicKind::Physical {
        1_000_000_000
    } else {
        0
    };
    Nic {
        name: name.into(),
        kind,
        receive: counters,
        transmit: counters,
        speed_bits_per_second,
        ..Default::default()
    }
}

fn usage() -> Usage {
    let stall = Some(Stall {
        stalled_seconds_total: 1.5,
        ..Default::default()
    });
    Usage {
        cpu: CpuTimes {
            user: 10.25,
            guest: 2.0,
            ..Default::default()
        },
        cpus_busy: 1.5,
        rates_valid: true,
        load: [0.1, 0.2, 0.3],
        pressure: Pressure {
            cpu_some: stall,
            io_full: stall,
            ..Default::default()
        },
        memory: Memory {
            total_bytes: 100,
            free_bytes: 40,
            cached_bytes: 20,
            buffers_bytes: 10,
            huge_pages: vec![HugePages {
                page_size_bytes: 2 << 20,
                total: 5,
                free: 2,
            }],
            ..Default::default()
        },
        nics: vec![
            nic("br0", NicKind::Bridge),
            nic("eno1", NicKind::Physical),
            nic("vnet0", NicKind::Tap),
        ],
        file_systems: vec![FileSystem {
            mount_point: "/a \"b\"\\".into(),
            kind: "ext4".into(),
            ..Default::default()
        }],
        pools: vec![
            Pool {
                name: "local".into(),
                capacity_bytes: 9,
                available_bytes: 5,
                ..Default::default()
            },
            Pool {
                name: "dead".into(),
                error: Some("did not answer".into()),
                ..Default::default()
            },
        ],
        uptime_seconds: 99.0,
        ..Default::default()
    }
}

fn snapshot() -> Snapshot {
    Snapshot {
        inventory: Arc::new(Inventory {
            cpus: 8,
            cores: 4,
            sockets: 1,
            ..Default::default()
        }),
        usage: Some((Duration::from_secs(10), Arc::new(usage()))),
        vms_at: Some(Duration::from_secs(12)),
        vms: vec![vm(1, true), vm(2, false)],
    }
}

fn page(snapshot: Snapshot, format: Format) -> String {
    let (_sender, receiver) = watch::channel(Arc::new(snapshot));
    render(&registry("1.2.3", receiver, now), format).unwrap()
}

#[track_caller]
fn assert_line(page: &str, line: &str) {
    assert!(
        page.lines().any(|has| has == line),
        "no line {line:?} in:\n{page}"
    );
}

#[test]
fn the_page_says_what_the_samples_say() {
    let page = page(snapshot(), Format::OpenMetrics);
    for line in [
        "dalgu_agent_build_info{version=\"1.2.3\"} 1",
        "dalgu_sample_age_seconds{sample=\"host\"} 2.5",
        "dalgu_sample_age_seconds{sample=\"vms\"} 0.5",
        "# UNIT dalgu_host_cpu_seconds seconds",
        "dalgu_host_cpu_seconds_total{mode=\"user\"} 10.25",
        "dalgu_host_cpu_guest_seconds_total 2.0",
        "dalgu_host_cpus 8",
        "dalgu_host_cpus_busy 1.5",
        "dalgu_host_load15 0.3",
        "dalgu_host_memory_bytes{state=\"used\"} 30",
        "dalgu_host_huge_pages{page_size=\"2097152\",state=\"used\"} 3",
        "dalgu_host_pressure_stalled_seconds_total{resource=\"io\",kind=\"full\"} 1.5",
        "dalgu_host_nic_receive_bytes_total{device=\"eno1\"} 18446744073709551615",
        "dalgu_host_nic_speed_bytes_per_second{device=\"eno1\"} 125000000",
        "# UNIT dalgu_host_nic_speed_bytes_per_second bytes_per_second",
        "dalgu_host_filesystem_size_bytes{mount_point=\"/a \\\"b\\\"\\\\\",fstype=\"ext4\"} 0",
        "dalgu_host_pool_available_bytes{pool=\"local\"} 5",
        "dalgu_host_pool_up{pool=\"dead\"} 0",
        "dalgu_host_nic_info{device=\"br0\",kind=\"bridge\",mac=\"\"} 1",
        "dalgu_vm_power_state{vm=\"vm2\",uid=\"00000000-0000-0000-0000-000000000002\",state=\"stopped\"} 1",
        "dalgu_vm_cpu_seconds_total{vm=\"vm1\",uid=\"00000000-0000-0000-0000-000000000001\"} 3.5",
        "dalgu_vm_block_read_bytes_total{vm=\"vm1\",uid=\"00000000-0000-0000-0000-000000000001\",disk=\"root\"} 1",
        "dalgu_vm_nic_receive_bytes_total{vm=\"vm1\",uid=\"00000000-0000-0000-0000-000000000001\",nic=\"eth0\"} 2",
    ] {
        assert_line(&page, line);
    }
}

#[test]
fn what_is_not_known_has_no_series() {
    let mut snapshot = snapshot();
    let mut usage = usage();
    usage.rates_valid = false;
    snapshot.usage = Some((now(), Arc::new(usage)));
    snapshot.vms[0].power = None;
    let page = page(snapshot, Format::OpenMetrics);
    for absent in [
        "dalgu_host_cpus_busy",
        "resource=\"memory\"",
        "dalgu_host_nic_speed_bytes_per_second{device=\"br0\"}",
        "dalgu_host_pool_capacity_bytes{pool=\"dead\"}",
        "dalgu_vm_cpu_seconds_total{vm=\"vm2\"",
    ] {
        assert!(!page.contains(absent), "{absent} in:\n{page}");
    }
    assert!(
        !page
            .lines()
            .any(|line| line.starts_with("dalgu_vm_power_state{vm=\"vm1\"") && line.ends_with('1'))
    );
}

#[test]
fn before_the_first_sample_there_is_only_the_build() {
    let page = page(Snapshot::default(), Format::Text);
    let series: Vec<_> = page.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(series, ["dalgu_agent_build_info{version=\"1.2.3\"} 1"]);
}

#[test]
fn the_ends_of_vms_are_no_interfaces_of_the_host_and_the_rest_is_bounded() {
    let mut usage = usage();
    usage
        .nics
        .extend((0..200).map(|number| nic(&format!("veth{number}"), NicKind::Virtual)));
    let page = page(
        Snapshot {
            usage: Some((now(), Arc::new(usage))),
            ..snapshot()
        },
        Format::Text,
    );
    assert!(!page.contains("vnet0"), "{page}");
    let listed = page
        .lines()
        .filter(|line| line.starts_with("dalgu_host_nic_up{"))
        .count();
    assert_eq!(listed, MOST_NICS);
}

#[test]
fn the_series_of_a_vm_go_with_the_vm() {
    let (sender, receiver) = watch::channel(Arc::new(snapshot()));
    let registry = registry("1", receiver, now);
    assert!(render(&registry, Format::Text).unwrap().contains("vm1"));
    sender
        .send(Arc::new(Snapshot {
            vms: vec![vm(2, true)],
            ..snapshot()
        }))
        .unwrap();
    let page = render(&registry, Format::Text).unwrap();
    assert!(!page.contains("vm1") && page.contains("vm2"), "{page}");
}

#[test]
fn no_series_comes_twice_and_every_family_has_help() {
    for format in [Format::Text, Format::OpenMetrics] {
        let page = page(snapshot(), format);
        let (mut seen, mut helped) = (BTreeSet::new(), BTreeSet::new());
        for line in page.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').unwrap();
                assert!(!help.is_empty() && helped.insert(name.to_owned()), "{line}");
            } else if !line.starts_with('#') {
                let (series, _) = line.rsplit_once(' ').unwrap();
                assert!(seen.insert(series.to_owned()), "{line}");
                let name = series.split('{').next().unwrap();
                let family = match format {
                    Format::Text => name,
                    Format::OpenMetrics => name.trim_end_matches("_total").trim_end_matches("_info"),
                };
                assert!(helped.contains(family), "{line}");
            }
        }
    }
}

#[test]
#[ignore = "needs promtool (Debian package prometheus); run with --run-ignored"]
fn promtool_finds_nothing_to_say() {
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool is installed");
    promtool
        .stdin
        .take()
        .unwrap()
        .write_all(page(snapshot(), Format::Text).as_bytes())
        .unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && said.is_empty(), "{said}");
}
