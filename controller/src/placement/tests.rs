//! Tables: one host, one lack at a time; the order of scores.

use std::{borrow::Cow, collections::BTreeMap};

use dalgu_proto::{
    host as facts,
    vm::{CloneMode, Disk, DiskFormat, Nic, Plug, RestartPolicy, Spec},
};

use super::*;

/// A VM of 2 vCPUs and 4096 MiB (4194 with QEMU's overhead) with a disk of 10 GiB and an interface.
pub(super) fn spec() -> Spec {
    Spec {
        vcpus: 2,
        memory_mib: 4096,
        disks: vec![disk("root", "local", 10_240)],
        nics: vec![Nic {
            name: "eth0".into(),
            plug: Plug::Bridge { bridge: "br0".into() },
            mac: String::new(),
            reserved_mbit: None,
        }],
        kernel_boot: None,
        restart_policy: RestartPolicy::OnFailure,
        host_selector: BTreeMap::new(),
        first_boot: None,
        firmware: Default::default(),
        tpm: false,
        max_vcpus: None,
        max_memory_mib: None,
        fitting: Default::default(),
        devices: Default::default(),
    }
}

pub(super) fn disk(name: &str, pool: &str, size_mib: u64) -> Disk {
    Disk {
        name: name.into(),
        size_mib,
        pool: pool.into(),
        image: None,
        format: DiskFormat::Qcow2,
        digest: None,
        clone_mode: CloneMode::Any,
        volume: None,
        limits: Default::default(),
        backup: None,
    }
}

/// A host of 8 processors and 16 GiB that fits.
pub(super) fn host(name: &str) -> HostView<'static> {
    HostView {
        name: name.parse().unwrap(),
        ready: true,
        state: "ready".into(),
        cordoned: false,
        cordon_reason: "".into(),
        pressed: false,
        labels: Cow::default(),
        taints: Cow::default(),
        cpus: 8,
        cpu_overcommit_ratio: 4.0,
        own_cpu_overcommit_ratio: 4.0,
        adapted: false,
        memory_mib: 16_384,
        reserved_memory_mib: 1024,
        vcpus_reserved: 0,
        memory_mib_reserved: 0,
        vms: 0,
        vm_sizes: Vec::new(),
        pools: vec![pool("local", false)],
        bridges: vec!["br0".to_owned()].into(),
        accelerator: "kvm".into(),
        guest_features: Cow::default(),
        usage: Some(idle()),
        unmanaged_vcpus: 0,
        unmanaged_memory_mib: 0,
        vms_most: None,
        parts: Default::default(),
    }
}

fn pool(name: &'static str, shared: bool) -> PoolView<'static> {
    PoolView {
        name: name.into(),
        shared,
        error: None,
        capacity_mib: 102_400,
        available_mib: 81_920,
        used_mib: 20_480,
        reserved_mib: 0,
        policy: PoolPolicy::default(),
    }
}

fn idle() -> UsageView {
    UsageView {
        cpus_busy: Some(0.1),
        memory_available_bytes: 15 << 30,
        ..UsageView::default()
    }
}

pub(super) fn with(change: impl FnOnce(&mut HostView<'static>)) -> HostView<'static> {
    let mut host = host("h1");
    change(&mut host);
    host
}

pub(super) fn name(value: &str) -> HostName {
    value.parse().unwrap()
}

fn chosen(decision: &Decision) -> Option<&str> {
    decision.host.as_ref().map(HostName::as_str)
}

fn constraints(request: &Request, host: HostView) -> Vec<&'static str> {
    let decision = decide(request, &[host], &Policy::SPREAD);
    decision.verdicts[0]
        .shortfalls
        .iter()
        .map(|shortfall| shortfall.constraint.as_str())
        .collect()
}

#[test]
fn each_test_refuses_what_it_should_and_nothing_else() {
    let request = Request::new(spec());
    let none: [&str; 0] = [];
    assert_eq!(constraints(&request, host("h1")), none);
    assert_eq!(constraints(&request, with(|h| h.ready = false)), ["STATE"]);
    assert_eq!(constraints(&request, with(|h| h.cordoned = true)), ["CORDON"]);
    assert_eq!(constraints(&request, with(|h| h.pressed = true)), ["PRESSURE"]);
    assert_eq!(constraints(&request, with(|h| h.cpus = 1)), ["CPU"]);
    assert_eq!(constraints(&request, with(|h| h.vcpus_reserved = 30)), none);
    assert_eq!(constraints(&request, with(|h| h.vcpus_reserved = 31)), ["CPU"]);
    assert_eq!(
        constraints(&request, with(|h| h.memory_mib_reserved = 15_360 - 4194)),
        none
    );
    assert_eq!(
        constraints(&request, with(|h| h.memory_mib_reserved = 15_360 - 4193)),
        ["MEMORY"]
    );
    assert_eq!(constraints(&request, with(|h| h.pools.clear())), ["POOL"]);
    assert_eq!(
        constraints(&request, with(|h| h.pools[0].error = Some("stale handle".into()))),
        ["POOL"]
    );
    assert_eq!(
        constraints(&request, with(|h| h.pools[0].reserved_mib = 92_160)),
        none
    );
    assert_eq!(
        constraints(&request, with(|h| h.pools[0].reserved_mib = 92_161)),
        ["STORAGE"]
    );
    assert_eq!(
        constraints(&request, with(|h| h.pools[0].available_mib = 10_239)),
        ["STORAGE"]
    );
    assert_eq!(
        constraints(&request, with(|h| h.bridges = Default::default())),
        ["BRIDGE"]
    );
    assert_eq!(
        constraints(&request.clone().on(Some(name("h2"))), host("h1")),
        ["REQUESTED_HOST"]
    );
    let mut picky = spec();
    picky.host_selector.insert("rack".into(), "a".into());
    assert_eq!(
        constraints(&Request::new(picky.clone()), host("h1")),
        ["SELECTOR"]
    );
    let rack = |value: &str| with(|h| drop(h.labels.to_mut().insert("rack".into(), value.into())));
    assert_eq!(constraints(&Request::new(picky.clone()), rack("b")), ["SELECTOR"]);
    assert_eq!(constraints(&Request::new(picky), rack("a")), none);
}

#[test]
fn a_migration_leaves_its_host_keeps_its_accelerator_and_needs_no_room_on_a_shared_pool() {
    let none: [&str; 0] = [];
    let request = Request::migration(spec(), name("h1"), "kvm");
    assert_eq!(constraints(&request, host("h1")), ["SAME_HOST"]);
    assert_eq!(constraints(&request, host("h2")), none);
    let software = HostView {
        accelerator: "tcg".into(),
        ..host("h2")
    };
    assert_eq!(constraints(&request, software), ["ACCELERATOR"]);
    let full = |shared| {
        let pools = vec![PoolView {
            available_mib: 0,
            used_mib: 102_400,
            ..pool("local", shared)
        }];
        HostView { pools, ..host("h2") }
    };
    assert_eq!(constraints(&request, full(true)), none);
    assert_eq!(constraints(&request, full(false)), ["STORAGE"]);
    assert_eq!(constraints(&Request::new(spec()), full(true)), ["STORAGE"]);
}

#[test]
fn a_pool_that_is_nearly_full_takes_no_new_disk_and_one_that_is_overcommitted_promises_more_than_it_has() {
    let room = |available_mib, reserved_mib, full_percent, overcommit_percent| {
        PoolView {
            capacity_mib: 1000,
            available_mib,
            used_mib: 1000 - available_mib,
            reserved_mib,
            policy: PoolPolicy {
                full_percent,
                overcommit_percent,
                ..PoolPolicy::default()
            },
            ..pool("local", false)
        }
        .free_mib()
    };
    for (available, reserved, full, overcommit, free) in [
        (1000, 0, 95, 100, 1000),
        (51, 0, 95, 100, 51),
        (50, 0, 95, 100, 0),
        (50, 0, 100, 100, 50),
        (600, 900, 95, 100, 100),
        (600, 900, 95, 150, 600),
        (600, 1500, 95, 150, 0),
        (50, 0, 95, 150, 0),
    ] {
        let found = room(available, reserved, full, overcommit);
        assert_eq!(found, free, "{available} {reserved} {full} {overcommit}");
    }
    let mut request = Request::new(spec());
    request.spec.disks = vec![disk("data", "local", 10)];
    let full = PoolView {
        available_mib: 5120,
        used_mib: 97_280,
        ..pool("local", false)
    };
    let decision = decide(
        &request,
        &[with(|h| h.pools = vec![full.clone()])],
        &Policy::SPREAD,
    );
    let told = &decision.verdicts[0].shortfalls[0];
    assert_eq!(told.constraint, Constraint::Storage);
    assert_eq!(
        told.message,
        "needs 10 MiB in pool local, which is 95 % full and takes no new disks"
    );
    assert!(decision.hint.is_some());
}

#[test]
fn all_failed_tests_of_a_host_are_told() {
    let mut spec = spec();
    spec.vcpus = 40;
    spec.disks.push(disk("data", "fast", 10));
    spec.disks.push(disk("logs", "local", 102_400));
    let bad = with(|h| {
        h.ready = false;
        h.cordoned = true;
        h.memory_mib = 2048;
        h.bridges = Default::default();
    });
    let request = Request::new(spec).on(Some(name("h9")));
    let all = [
        "REQUESTED_HOST",
        "STATE",
        "CORDON",
        "CPU",
        "CPU",
        "MEMORY",
        "POOL",
        "STORAGE",
        "BRIDGE",
    ];
    assert_eq!(constraints(&request, bad), all);
}

#[test]
fn domains_that_are_not_dalgus_take_room() {
    let host = with(|h| {
        h.unmanaged_vcpus = 4;
        h.unmanaged_memory_mib = 8192;
        h.vcpus_reserved = 3;
        h.memory_mib_reserved = 1000;
    });
    assert_eq!((host.vcpus_capacity(), host.vcpus_free()), (28, 25));
    assert_eq!((host.memory_mib_capacity(), host.memory_mib_free()), (7168, 6168));
    let crowded = with(|h| h.unmanaged_memory_mib = 1 << 40);
    assert_eq!(crowded.memory_mib_free(), 0);
}

#[test]
fn an_overcommit_ratio_is_meant_in_decimals() {
    let capacity = |cpus, cpu_overcommit_ratio| {
        HostView {
            cpus,
            cpu_overcommit_ratio,
            ..host("h1")
        }
        .vcpus_capacity()
    };
    assert_eq!(capacity(100, 0.29), 29);
    assert_eq!(capacity(3, 0.5), 1);
    assert_eq!(capacity(8, 64.0), 512);
    for nonsense in [f64::NAN, -1.0] {
        assert_eq!(capacity(8, nonsense), 0);
    }
}

#[test]
fn a_small_host_keeps_a_tenth_and_a_large_one_a_gibibyte() {
    assert_eq!(default_reserved_memory_mib(4000), 400);
    assert_eq!(default_reserved_memory_mib(10_240), 1024);
    assert_eq!(default_reserved_memory_mib(1 << 20), 1024);
}

#[test]
fn a_host_under_load_is_avoided_even_when_it_is_the_emptiest() {
    type Load = (&'static str, fn(&mut UsageView));
    let loads: [Load; 11] = [
        ("processors busy", |u| u.cpus_busy = Some(6.5)),
        ("idle now, and busy at some hour of the week", |u| {
            u.cpus_expected = Some(6.5)
        }),
        ("idle now, and busy within the hour", |u| {
            u.lately = Some(Lately {
                cpus_busy: 6.5,
                cpus_stolen: 0.0,
            });
        }),
        ("guests waited for processors", |u| {
            u.lately = Some(Lately {
                cpus_busy: 0.1,
                cpus_stolen: 0.5,
            });
        }),
        ("waiting for processors", |u| u.cpu_stall.avg10_percent = 30.0),
        ("waited for processors a moment ago", |u| {
            u.cpu_stall.avg60_percent = 30.0
        }),
        ("waiting for memory", |u| u.memory_stall.avg10_percent = 2.0),
        ("waiting for disks", |u| u.io_stall.avg10_percent = 12.0),
        ("memory used up", |u| u.memory_available_bytes = 1 << 30),
        ("network busy", |u| u.network_utilisation = 0.5),
        ("no rate yet, but a high load average", |u| {
            (u.cpus_busy, u.load1) = (None, 20.0)
        }),
    ];
    for policy in [Policy::SPREAD, Policy::PACK] {
        for (what, load) in loads {
            let (mut loaded, mut other) = (host("h1"), host("h2"));
            // The loaded one is what the policy would take otherwise.
            let fuller = if policy == Policy::SPREAD {
                &mut other
            } else {
                &mut loaded
            };
            (fuller.vcpus_reserved, fuller.memory_mib_reserved, fuller.vms) = (16, 8192, 4);
            let hosts = [loaded.clone(), other.clone()];
            assert_eq!(
                chosen(&decide(&Request::new(spec()), &hosts, &policy)),
                Some("h1"),
                "{policy:?} before"
            );
            load(loaded.usage.as_mut().unwrap());
            let decision = decide(&Request::new(spec()), &[loaded, other], &policy);
            assert_eq!(chosen(&decision), Some("h2"), "{policy:?}: {what}");
        }
    }
}

#[test]
fn small_differences_of_load_do_not_decide() {
    let (mut noisy, mut fuller) = (host("h1"), host("h2"));
    noisy.usage = Some(UsageView {
        cpus_busy: Some(3.0),
        cpu_stall: StallView {
            avg10_percent: 8.0,
            avg60_percent: 4.0,
        },
        network_utilisation: 0.15,
        ..idle()
    });
    fuller.memory_mib_reserved = 4000;
    assert_eq!(
        chosen(&decide(&Request::new(spec()), &[noisy, fuller], &Policy::SPREAD)),
        Some("h1")
    );
}

#[test]
fn busy_processors_of_the_last_seconds_do_not_decide_where_an_hour_is_known() {
    let (mut bursting, mut fuller) = (host("h1"), host("h2"));
    bursting.usage = Some(UsageView {
        cpus_busy: Some(8.0),
        lately: Some(Lately {
            cpus_busy: 0.3,
            cpus_stolen: 0.0,
        }),
        ..idle()
    });
    fuller.memory_mib_reserved = 4000;
    let hosts = [bursting, fuller];
    let decision = decide(&Request::new(spec()), &hosts, &Policy::SPREAD);
    assert_eq!(chosen(&decision), Some("h1"));
    let busy = |part: &&Part| part.name == "cpu_busy_percent";
    assert_eq!(decision.verdicts[0].score.iter().find(busy).unwrap().value, 0.0);
    assert!(is_pressed(&hosts[0]), "what closes a host is measured now");
}

#[test]
fn a_host_is_contended_by_stalls_and_by_what_its_vms_wait_for_as_by_busy_processors() {
    let waits = |percent: f64| StallView {
        avg10_percent: percent,
        avg60_percent: 0.0,
    };
    let stolen = |cpus_stolen| {
        Some(Lately {
            cpus_busy: 0.0,
            cpus_stolen,
        })
    };
    // Of eight processors. Each from the second step on, and not below it.
    for (what, below, from) in [
        (
            "busy",
            UsageView {
                cpus_busy: Some(5.9),
                ..idle()
            },
            UsageView {
                cpus_busy: Some(6.0),
                ..idle()
            },
        ),
        (
            "steal",
            UsageView {
                lately: stolen(0.79),
                ..idle()
            },
            UsageView {
                lately: stolen(0.8),
                ..idle()
            },
        ),
        (
            "processors",
            UsageView {
                cpu_stall: waits(24.0),
                ..idle()
            },
            UsageView {
                cpu_stall: waits(25.0),
                ..idle()
            },
        ),
        (
            "I/O",
            UsageView {
                io_stall: waits(24.0),
                ..idle()
            },
            UsageView {
                io_stall: waits(25.0),
                ..idle()
            },
        ),
        (
            "memory",
            UsageView {
                memory_stall: waits(4.9),
                ..idle()
            },
            UsageView {
                memory_stall: waits(5.0),
                ..idle()
            },
        ),
    ] {
        let pressed = |usage| {
            is_pressed(&HostView {
                usage: Some(usage),
                ..host("h1")
            })
        };
        assert!(!pressed(below), "{what}");
        assert!(pressed(from), "{what}");
    }
}

#[test]
fn a_host_of_unknown_load_comes_last() {
    let silent = HostView {
        usage: None,
        ..host("h1")
    };
    let mut loaded = host("h2");
    loaded.usage.as_mut().unwrap().cpus_busy = Some(8.0);
    let decision = decide(&Request::new(spec()), &[silent.clone(), loaded], &Policy::SPREAD);
    assert_eq!(chosen(&decision), Some("h2"));
    assert_eq!(
        chosen(&decide(&Request::new(spec()), &[silent], &Policy::SPREAD)),
        Some("h1")
    );
}

#[test]
fn spread_takes_the_emptier_host_and_pack_the_fuller_one() {
    let fuller = with(|h| h.memory_mib_reserved = 8192);
    let hosts = [fuller, host("h2")];
    assert_eq!(
        chosen(&decide(&Request::new(spec()), &hosts, &Policy::SPREAD)),
        Some("h2")
    );
    assert_eq!(
        chosen(&decide(&Request::new(spec()), &hosts, &Policy::PACK)),
        Some("h1")
    );
}

#[test]
fn balanced_fills_hosts_to_four_fifths_and_then_begins_another() {
    let reserved = |name, vcpus_reserved| HostView {
        vcpus_reserved,
        ..host(name)
    };
    // Of 32 that may be reserved.
    let hosts = [host("h1"), reserved("h2", 25), reserved("h3", 26)];
    let decision = decide(&Request::new(spec()), &hosts, &Policy::BALANCED);
    let order: Vec<_> = decision
        .verdicts
        .iter()
        .map(|verdict| verdict.host.as_str())
        .collect();
    assert_eq!(order, ["h2", "h1", "h3"]);
    assert_eq!(
        chosen(&decide(&Request::new(spec()), &hosts, &Policy::PACK)),
        Some("h3")
    );
    assert_eq!(
        chosen(&decide(&Request::new(spec()), &hosts[2..], &Policy::BALANCED)),
        Some("h3"),
        "where there is no other"
    );
}

#[test]
fn a_site_says_itself_what_counts_and_in_which_order() {
    let mut pressed = host("h1");
    pressed.usage.as_mut().unwrap().cpu_stall.avg10_percent = 30.0;
    let fuller = HostView {
        vcpus_reserved: 8,
        ..host("h2")
    };
    let hosts = [pressed, fuller];
    let by = |terms: &[Term]| {
        let policy = Policy {
            order: Order::try_from(terms.to_vec()).unwrap(),
            ..Policy::SPREAD
        };
        let decision = decide(&Request::new(spec()), &hosts, &policy);
        let score = &decision.verdicts[0].score;
        let parts: Vec<_> = score.iter().map(|part| part.name.to_string()).collect();
        (chosen(&decision).unwrap().to_owned(), parts)
    };
    let reserved = ["reserved_percent", "reserved_of_other_percent"];
    let (host, parts) = by(&[Term::Pressure, Term::Reserved]);
    assert_eq!((host.as_str(), parts.len()), ("h2", 3));
    assert_eq!(by(&[Term::Reserved, Term::Pressure]).0, "h1");
    assert_eq!(
        by(&[Term::Reserved]),
        ("h1".to_owned(), reserved.map(str::to_owned).to_vec())
    );
}

#[test]
fn equal_hosts_are_taken_by_name() {
    let decision = decide(&Request::new(spec()), &[host("h2"), host("h1")], &Policy::SPREAD);
    assert_eq!(chosen(&decision), Some("h1"));
    assert_eq!(
        decision.summary,
        "h1 is the best of 2 that can take it, of 2 hosts: equal to h2, first by name"
    );
}

#[test]
fn twenty_vms_at_once_spread_over_equal_hosts() {
    let mut hosts = [host("h1"), host("h2"), host("h3"), host("h4")];
    let small = Spec {
        vcpus: 1,
        memory_mib: 256,
        ..spec()
    };
    for _ in 0..20 {
        let decision = decide(&Request::new(small.clone()), &hosts, &Policy::SPREAD);
        let host = hosts
            .iter_mut()
            .find(|host| Some(&host.name) == decision.host.as_ref())
            .unwrap();
        host.vcpus_reserved += small.vcpus;
        host.memory_mib_reserved += small.reserved_memory_mib();
        host.vms += 1;
    }
    assert_eq!(hosts.map(|host| host.vms), [5; 4]);
}

#[test]
fn the_wire_says_the_same_as_the_decision() {
    let mut third = host("h3");
    third.cordoned = true;
    let hosts = [with(|h| h.cordoned = true), host("h2"), third];
    let request = Request::new(spec());
    let decision = decide(&request, &hosts, &Policy::SPREAD);
    let when = jiff::Timestamp::from_second(1_700_000_000).unwrap();
    let shortened = decide_keeping(&request, &hosts, &Policy::SPREAD, 2);
    assert_eq!(shortened.verdicts, decision.verdicts[..1]);
    let wire = to_wire(&shortened, Some(when));
    assert_eq!(
        (wire.host.as_str(), wire.hint.as_str(), wire.verdicts.len()),
        ("h2", "", 1)
    );
    assert_eq!(
        wire.summary,
        "h2 is the only one of 3 hosts that can take it (2 verdicts not listed)"
    );
    assert_eq!(wire.decide_time.unwrap().seconds, 1_700_000_000);
    let wire = to_wire(&decision, None);
    assert_eq!((wire.verdicts[0].rank, wire.verdicts[0].score.len()), (1, 9));
    assert_eq!(
        (
            wire.verdicts[1].rank,
            wire.verdicts[1].shortfalls[0].constraint.as_str()
        ),
        (0, "CORDON")
    );
    assert_eq!(wire.verdicts[1].shortfalls[0].message, "cordoned");
}

#[test]
fn the_network_is_judged_by_its_busiest_physical_link() {
    let nic = |kind, speed_bits_per_second, receive_bytes_per_second| facts::Nic {
        kind,
        speed_bits_per_second,
        receive_bytes_per_second,
        rates_valid: true,
        ..facts::Nic::default()
    };
    let use_of = |nics| {
        UsageView::of(&facts::Usage {
            nics,
            ..facts::Usage::default()
        })
        .network_utilisation
    };
    let (wire, veth, tap) = (
        facts::NicKind::Physical,
        facts::NicKind::Virtual,
        facts::NicKind::Tap,
    );
    let (half, gigabit) = (62_500_000.0, 1_000_000_000);
    assert_eq!(
        use_of(vec![nic(wire, gigabit, half), nic(wire, 10 * gigabit, half)]),
        0.5
    );
    assert_eq!(
        use_of(vec![nic(wire, 0, half)]),
        0.5,
        "a link of unknown speed counts as one gigabit"
    );
    assert_eq!(
        use_of(vec![nic(wire, gigabit, 0.0), nic(veth, gigabit, half)]),
        0.0
    );
    assert_eq!(
        use_of(vec![nic(veth, gigabit, half), nic(tap, gigabit, 9e9)]),
        0.5
    );
    assert_eq!(
        use_of(vec![facts::Nic {
            rates_valid: false,
            ..nic(wire, gigabit, half)
        }]),
        0.0
    );
    assert_eq!(use_of(vec![nic(wire, gigabit, 1e12)]), 1.0);
}

#[test]
fn a_host_that_lacks_what_a_guest_needs_says_what_to_install() {
    use dalgu_proto::host::GuestFeature::{Tpm, UefiSecureBoot};
    let mut spec = spec();
    spec.firmware = dalgu_proto::vm::Firmware::UefiSecureBoot;
    spec.tpm = true;
    let request = Request::new(spec);
    let bare = host("h1");
    let decision = decide(&request, std::slice::from_ref(&bare), &Policy::SPREAD);
    let told: Vec<_> = decision.verdicts[0]
        .shortfalls
        .iter()
        .map(|lack| (lack.constraint, lack.message.as_str()))
        .collect();
    let expected = [
        "does not offer UEFI firmware with secure boot: install the package ovmf",
        "does not offer a TPM for guests: install the packages swtpm and swtpm-tools",
    ];
    assert_eq!(told, expected.map(|message| (Constraint::Feature, message)));
    let hint = decision.hint.unwrap().text;
    assert_eq!(
        hint,
        "give h1 UEFI firmware with secure boot (install the package ovmf) and give h1 a TPM for guests (install the packages \
         swtpm and swtpm-tools)"
    );
    let fitted = HostView {
        guest_features: vec![UefiSecureBoot, Tpm].into(),
        ..host("h2")
    };
    let decision = decide(&request, &[bare, fitted], &Policy::SPREAD);
    assert_eq!(decision.host.unwrap().as_str(), "h2");
}

#[test]
fn the_volume_of_a_first_boot_takes_room_in_its_pool_and_an_agent_that_knows_it() {
    let mut wire = dalgu_proto::v1::VmSpec::from(spec());
    wire.first_boot = Some(dalgu_proto::v1::FirstBoot {
        pool: "shared".into(),
        ..Default::default()
    });
    let request = Request::new(Spec::try_from(wire).unwrap());
    assert_eq!(
        request.pools().collect::<Vec<_>>(),
        [("local", 10_240), ("shared", 1)]
    );
    let decision = decide(&request, &[host("h1")], &Policy::SPREAD);
    let told: Vec<_> = decision.verdicts[0]
        .shortfalls
        .iter()
        .map(|lack| lack.constraint)
        .collect();
    assert_eq!(told, [Constraint::Pool, Constraint::Feature]);
}

#[test]
fn by_the_default_measured_pressure_of_each_kind_outweighs_room_and_what_is_left_in_pieces_counts_for_nothing()
 {
    let lately = |cpus_busy, cpus_stolen| {
        Some(Lately {
            cpus_busy,
            cpus_stolen,
        })
    };
    let stalled = StallView {
        avg10_percent: 10.0,
        avg60_percent: 0.0,
    };
    for (what, usage) in [
        (
            "p95",
            UsageView {
                lately: lately(4.0, 0.0),
                ..idle()
            },
        ),
        (
            "steal",
            UsageView {
                lately: lately(0.0, 0.4),
                ..idle()
            },
        ),
        (
            "PSI",
            UsageView {
                cpu_stall: stalled,
                ..idle()
            },
        ),
    ] {
        let (mut pressed, mut fuller) = (host("h1"), host("h2"));
        pressed.usage = Some(usage);
        fuller.memory_mib_reserved = 9000;
        let decision = decide(&Request::new(spec()), &[pressed, fuller], &Policy::default());
        assert_eq!(chosen(&decision), Some("h2"), "{what}");
    }
    // A hole that just holds the VM stays open: that is what pack is for.
    let mut hole = host("h1");
    hole.memory_mib_reserved = hole.memory_mib_capacity() - 4194;
    let hosts = [hole, host("h2")];
    let by = |policy| decide(&Request::new(spec()), &hosts, &policy).host.unwrap();
    assert_eq!(
        (by(Policy::default()).as_str(), by(Policy::PACK).as_str()),
        ("h2", "h1")
    );
}

#[test]
fn of_hosts_that_are_as_good_otherwise_the_one_that_has_the_image_gets_the_vm() {
    let at = |hosts: &[&str]| -> imbl::OrdSet<HostName> {
        let hosts = hosts.iter().map(|host| host.parse::<HostName>().unwrap());
        hosts.collect()
    };
    let asked = |images| {
        Request::new(spec()).with_needs(Needs {
            images,
            ..Needs::default()
        })
    };
    let hosts = [host("h1"), host("h2"), host("h3")];
    let one = asked(vec![at(&["h3"])]);
    for policy in [Policy::SPREAD, Policy::PACK, Policy::BALANCED] {
        let decision = decide(&one, &hosts, &policy);
        assert_eq!(chosen(&decision), Some("h3"));
        assert_eq!(
            decision.summary,
            "h3 is the best of 3 that can take it, of 3 hosts: images_missing 0 against 1 on h1"
        );
        assert_eq!(decision.verdicts[0].score.last().unwrap().name, "images_missing");
    }
    let two = asked(vec![at(&["h2"]), at(&["h2", "h3"])]);
    assert_eq!(chosen(&decide(&two, &hosts, &Policy::SPREAD)), Some("h2"));
    // Only of hosts that are as good otherwise.
    let mut fuller = hosts.clone();
    fuller[2].memory_mib_reserved = 1;
    assert_eq!(chosen(&decide(&one, &fuller, &Policy::SPREAD)), Some("h1"));
    let order = Order::try_from(vec![Term::Reserved]).unwrap();
    let policy = Policy {
        order,
        ..Policy::SPREAD
    };
    assert_eq!(
        chosen(&decide(&one, &hosts, &policy)),
        Some("h1"),
        "it does not count"
    );
}

#[test]
fn a_vm_goes_where_its_volume_is_which_takes_its_room_once() {
    use dalgu_proto::{host::GuestFeature, ids::VolumeId, vm::VolumeRef};
    let id = VolumeId::from_uuid(uuid::Uuid::from_u128(1));
    let mut spec = spec();
    spec.disks.push(Disk {
        volume: Some(VolumeRef {
            name: "ledger".parse().unwrap(),
            id: Some(id),
            format: None,
        }),
        // More than any host has left.
        ..disk("data", "local", 1 << 40)
    });
    let bound = |host: Option<&str>| Needs {
        volumes: BTreeMap::from([(
            id,
            Bound {
                volume: "ledger".parse().unwrap(),
                host: host.map(|host| host.parse().unwrap()),
            },
        )]),
        ..Needs::default()
    };
    let able = |name: &str| HostView {
        guest_features: vec![GuestFeature::Volume].into(),
        ..host(name)
    };
    let hosts = [able("h1"), able("h2")];
    let request = Request::new(spec.clone()).with_needs(bound(Some("h2")));
    let decision = decide(&request, &hosts, &Policy::SPREAD);
    assert_eq!(decision.host.unwrap().as_str(), "h2");
    let lack = &decision.verdicts[1].shortfalls[0];
    assert_eq!(lack.constraint, Constraint::Volume);
    assert_eq!(lack.message, "does not have volume ledger, which is on h2");
    let shared = Request::new(spec.clone()).with_needs(bound(None));
    assert!(decide(&shared, &hosts, &Policy::SPREAD).host.is_some());
    let gone = Request::new(spec).with_needs(bound(Some("h3")));
    let refused = decide(&gone, &hosts, &Policy::SPREAD);
    assert_eq!(
        refused.hint.unwrap().text,
        "leave out volume ledger, which is on h3 (h1 can take it then)"
    );
}
