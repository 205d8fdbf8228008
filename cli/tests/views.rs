//! What each kind of object looks like: the files beside this one are the pages that a user sees.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

#[allow(dead_code, reason = "each test program uses a part of it")]
mod common;

use std::collections::HashMap;

use common::{ago, now};
use dalgu::{
    output::{Resource as _, doctor, explain, operation, table},
    progress,
};
use dalgu_proto::v1;

fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

fn running() -> v1::Vm {
    let disk = v1::Disk {
        name: "root".into(),
        size_mib: 2048,
        pool: "local".into(),
        image: "base.img".into(),
        format: 2,
        ..Default::default()
    };
    let nic = v1::Nic {
        name: "eth0".into(),
        bridge: "br0".into(),
        mac: "52:54:00:12:34:56".into(),
        ..Default::default()
    };
    let boot = v1::KernelBoot {
        kernel: "vmlinuz".into(),
        initrd: "initrd".into(),
        cmdline: "console=ttyS0".into(),
    };
    let block = v1::VmBlockUsage {
        name: "root".into(),
        read_bytes_total: 5 << 20,
        write_bytes_total: 900,
        allocation_bytes: 3 << 20,
        ..Default::default()
    };
    let used = v1::VmNicUsage {
        name: "eth0".into(),
        receive_bytes_total: 2048,
        transmit_bytes_total: 10,
        ..Default::default()
    };
    let usage = v1::VmUsage {
        cpu_seconds_total: 12.34,
        cpu_wait_seconds_total: 0.5,
        cpus_busy: 0.37,
        rates_valid: true,
        memory_resident_bytes: 210 << 20,
        memory_balloon_bytes: 256 << 20,
        blocks: vec![block],
        nics: vec![used],
        ..Default::default()
    };
    v1::Vm {
        name: "web".into(),
        uid: "11111111-2222-4333-8444-555555555555".into(),
        spec: Some(v1::VmSpec {
            vcpus: 2,
            memory_mib: 256,
            disks: vec![disk],
            nics: vec![nic],
            kernel_boot: Some(boot),
            host_selector: map(&[("rack", "a")]),
            ..Default::default()
        }),
        desired_power_state: v1::PowerState::Running.into(),
        labels: map(&[("system", "tax"), ("env", "prod")]),
        description: "세무 시스템".into(),
        status: Some(v1::VmStatus {
            state: v1::VmState::Running.into(),
            power_state: v1::PowerState::Running.into(),
            power_reason: v1::PowerReason::Migrated.into(),
            observe_time: ago(4),
            host: "h1".into(),
            epoch: 3,
            observed_generation: 4,
            usage: Some(usage),
            ..Default::default()
        }),
        generation: 5,
        etag: "e5".into(),
        create_time: ago(7500),
        ..Default::default()
    }
}

fn failed() -> v1::Vm {
    let error = v1::VmError {
        reason: "IMAGE_NOT_FOUND".into(),
        message: "there is no image x.img".into(),
        retrying: true,
        time: ago(9),
    };
    let status = v1::VmStatus {
        state: v1::VmState::Failed.into(),
        host: "h2".into(),
        error: Some(error),
        ..Default::default()
    };
    v1::Vm {
        name: "db".into(),
        spec: Some(v1::VmSpec {
            vcpus: 4,
            memory_mib: 8192,
            first_boot: Some(v1::FirstBoot {
                hostname: "db-1.city".into(),
                pool: "fast".into(),
                ssh_authorized_keys: vec!["ssh-ed25519 AAAA kim@city".into()],
                user_data_digest: Some(v1::DocumentDigest {
                    sha256: "ab".repeat(32),
                    size_bytes: 321,
                }),
                ..Default::default()
            }),
            firmware: v1::Firmware::UefiSecureBoot.into(),
            cpu_policy: v1::CpuPolicy::Dedicated.into(),
            huge_page_kib: 1_048_576,
            numa_policy: v1::NumaPolicy::Spread.into(),
            numa_nodes: 2,
            devices: vec![v1::DeviceRequest {
                class: "gpu".into(),
                count: 2,
            }],
            tpm: true,
            ..Default::default()
        }),
        status: Some(status),
        ..Default::default()
    }
}

fn allocation() -> v1::HostAllocation {
    v1::HostAllocation {
        vcpus_capacity: 32,
        vcpus_reserved: 6,
        memory_mib_capacity: 15360,
        memory_mib_reserved: 2048,
        vms: 3,
        pools: vec![v1::PoolAllocation {
            name: "local".into(),
            capacity_mib: 102_400,
            promised_mib: 61_440,
        }],
        dedicated_cpus: vec![0, 1],
        max_vms: 40,
        nodes: vec![v1::NodeAllocation {
            id: 0,
            cpus_dedicated: 2,
            vcpus_reserved: 1,
            memory_mib_reserved: 512,
            huge_pages: vec![v1::HugePageAllocation {
                page_size_kib: 2048,
                capacity_mib: 4096,
                reserved_mib: 1024,
            }],
        }],
        uplinks: vec![v1::UplinkAllocation {
            bridge: "br0".into(),
            mbit_per_second: 10_000,
            reserved_mbit_per_second: 2500,
        }],
        devices: vec![v1::DeviceAllocation {
            class: "gpu".into(),
            count: 1,
            reserved: 1,
        }],
    }
}

/// One that can be given, and one that cannot.
fn pci_devices() -> Vec<v1::PciDevice> {
    vec![
        v1::PciDevice {
            class: "gpu".into(),
            address: "0000:3b:00.0".into(),
            model: "10de:20b0".into(),
            numa_node: Some(0),
            iommu_group: Some(14),
            ..Default::default()
        },
        v1::PciDevice {
            class: "gpu".into(),
            address: "0000:5e:00.0".into(),
            problem: "is not there: look for it with `lspci -D`".into(),
            ..Default::default()
        },
    ]
}

fn host() -> v1::Host {
    let stall = |percent| {
        Some(v1::PressureStall {
            avg10_percent: percent,
            ..Default::default()
        })
    };
    let nic = |name: &str, kind: &str, rate: f64| v1::NicUsage {
        name: name.into(),
        kind: kind.into(),
        up: true,
        speed_bits_per_second: 10_000_000_000,
        receive_bytes_per_second: rate,
        transmit_bytes_per_second: rate / 4.0,
        rates_valid: true,
        ..Default::default()
    };
    let pool = v1::StoragePool {
        name: "local".into(),
        path: "/var/lib/dalgu".into(),
        capacity_bytes: 100 << 30,
        available_bytes: 60 << 30,
        ..Default::default()
    };
    v1::Host {
        name: "h1".into(),
        state: v1::HostState::Ready.into(),
        labels: map(&[("rack", "a")]),
        cpu_overcommit_ratio: 4.0,
        reserved_memory_mib: 1024,
        inventory: Some(v1::HostInventory {
            cpu_model: "EPYC".into(),
            cpus: 8,
            cores: 4,
            sockets: 1,
            memory_bytes: 16 << 30,
            numa_nodes: vec![v1::NumaNode::default()],
            bridges: vec!["br0".into(), "br1".into()],
            pci_devices: pci_devices(),
            kernel: "6.1.0".into(),
            hypervisor: "QEMU 10.0.2, libvirt 11.3.0".into(),
            accelerator: "tcg".into(),
            accelerator_reason: "KVM runs no guest here".into(),
            architecture: "x86_64".into(),
            ..Default::default()
        }),
        usage: Some(v1::HostUsage {
            sample_time: ago(2),
            cpus_busy: 2.0,
            rates_valid: true,
            load1: 1.5,
            load5: 1.0,
            load15: 0.25,
            pressure: Some(v1::Pressure {
                cpu_some: stall(12.4),
                io_some: stall(0.0),
                ..Default::default()
            }),
            memory: Some(v1::MemoryUsage {
                total_bytes: 16 << 30,
                available_bytes: 12 << 30,
                ..Default::default()
            }),
            nics: vec![
                nic("br0", "bridge", 9e9),
                nic("eno1", "physical", 4.0 * 1_048_576.0),
                nic("tap0", "tap", 5e9),
            ],
            pools: vec![pool],
            ..Default::default()
        }),
        allocation: Some(allocation()),
        address: "10.77.0.11:7444".into(),
        boot_id: "b-1".into(),
        session: 2,
        agent_version: "0.1.0".into(),
        report_time: ago(3),
        unmanaged_domains: vec![v1::UnmanagedDomain {
            uuid: "u-1".into(),
            name: "legacy".into(),
            running: true,
            vcpus: 2,
            memory_mib: 1024,
            marked: false,
        }],
        create_time: ago(864_000),
        etag: "e1".into(),
        cpus_expected: Some(5.5),
        cpus_busy_p95: Some(4.25),
        cpus_stolen: Some(0.5),
        ..Default::default()
    }
}

fn pressed_host() -> v1::Host {
    v1::Host {
        pressed_time: ago(90),
        ..host()
    }
}

fn lost_host() -> v1::Host {
    v1::Host {
        name: "h2".into(),
        state: v1::HostState::Unreachable.into(),
        cordoned: true,
        cordon_reason: "disk".into(),
        report_time: ago(600),
        ..Default::default()
    }
}

fn migration() -> v1::Operation {
    v1::Operation {
        id: "op-1".into(),
        kind: v1::OperationKind::MigrateVm.into(),
        state: v1::OperationState::Running.into(),
        vm: "web".into(),
        generation: 5,
        create_time: ago(3),
        principal: "operator/kim".into(),
        migration: Some(v1::MigrationProgress {
            migration_id: "m-1".into(),
            phase: v1::MigrationPhase::Transferring.into(),
            source_host: "h1".into(),
            destination_host: "h2".into(),
            memory_total_bytes: 256 << 20,
            memory_processed_bytes: 220 << 20,
            memory_remaining_bytes: 64 << 20,
            disk_total_bytes: 1 << 30,
            disk_processed_bytes: 1 << 30,
            rate_bytes_per_second: 112 << 20,
            dirty_rate_bytes_per_second: 3 << 20,
            expected_downtime_ms: 84,
            iteration: 2,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn decision() -> v1::Placement {
    let part = |name: &str, value: f64| v1::ScorePart {
        name: name.into(),
        value,
    };
    let fits = |host: &str, rank: u32, pressure: f64| v1::HostVerdict {
        host: host.into(),
        fits: true,
        score: vec![part("memory_pressure", pressure), part("vms", 3.0)],
        rank,
        ..Default::default()
    };
    let lacks = |constraint: &str, message: &str| v1::Shortfall {
        constraint: constraint.into(),
        message: message.into(),
        ..Default::default()
    };
    let refused = v1::HostVerdict {
        host: "h3".into(),
        shortfalls: vec![
            lacks("MEMORY", "needs 4096 MiB, has 1024 MiB free of 8192 MiB"),
            lacks("CORDON", "closed for VMs: disk"),
        ],
        ..Default::default()
    };
    v1::Placement {
        host: "h1".into(),
        verdicts: vec![fits("h1", 1, 0.125), fits("h2", 2, 0.3), refused],
        summary: "least memory pressure of the 2 hosts that fit".into(),
        decide_time: ago(60),
        ..Default::default()
    }
}

#[test]
fn vms_in_a_table() {
    insta::assert_snapshot!("vm_list", table::of(&[running(), failed()], false, now(), false));
    insta::assert_snapshot!(
        "vm_list_wide",
        table::of(&[running(), failed()], true, now(), false)
    );
}

#[test]
fn a_vm_on_its_page() {
    insta::assert_snapshot!("vm_show", running().describe(now()).render(false));
    insta::assert_snapshot!("vm_show_failed", failed().describe(now()).render(false));
}

#[test]
fn hosts_in_a_table() {
    insta::assert_snapshot!(
        "host_list",
        table::of(&[host(), lost_host()], false, now(), false)
    );
    insta::assert_snapshot!(
        "host_list_wide",
        table::of(&[host(), lost_host()], true, now(), false)
    );
}

#[test]
fn a_host_on_its_page() {
    insta::assert_snapshot!("host_show", host().describe(now()).render(false));
    insta::assert_snapshot!("host_show_pressed", pressed_host().describe(now()).render(false));
    insta::assert_snapshot!("host_show_lost", lost_host().describe(now()).render(false));
}

#[test]
fn operations_in_a_table_and_on_a_page() {
    let error = v1::OperationError {
        code: 13,
        reason: "START_FAILED".into(),
        message: "no such bridge br7".into(),
    };
    let start = v1::Operation {
        id: "op-2".into(),
        kind: 2,
        state: 4,
        vm: "db".into(),
        create_time: ago(90),
        end_time: ago(88),
        error: Some(error),
        ..Default::default()
    };
    insta::assert_snapshot!(
        "op_list",
        table::of(&[migration(), start.clone()], false, now(), false)
    );
    insta::assert_snapshot!("op_show", migration().describe(now()).render(false));
    insta::assert_snapshot!("op_show_failed", start.describe(now()).render(false));
}

#[test]
fn a_migration_under_way_in_words() {
    let operation = migration();
    let migration = operation.migration.clone().unwrap();
    insta::assert_snapshot!(operation::migration_line(&migration), @"transferring, h1 -> h2, memory 75% of 256 MiB, disk 100% of 1 GiB, 112 MiB/s, guest writes 3 MiB/s, expected stop 84 ms");
    insta::assert_snapshot!(progress::plain_line(&operation), @"migrating web: transferring, h1 -> h2");
    assert_eq!(operation::migration_percent(&migration), 95);
    let unknown = v1::MigrationProgress {
        memory_total_bytes: 0,
        disk_total_bytes: 0,
        ..migration
    };
    assert_eq!(operation::migration_percent(&unknown), 0);
}

#[test]
fn why_a_vm_is_where_it_is() {
    insta::assert_snapshot!("explain", explain::render(&decision(), "web", "is on", false));
}

#[test]
fn why_a_vm_is_refused() {
    let mut decision = decision();
    decision.verdicts.drain(..2);
    let refusal = v1::Placement {
        host: String::new(),
        hint: "free 3072 MiB on h3 and uncordon it".into(),
        summary: String::new(),
        decide_time: None,
        ..decision
    };
    insta::assert_snapshot!(
        "explain_refused",
        explain::render(&refusal, "a new VM", "would go to", false)
    );
}

#[test]
fn why_a_vm_was_not_made_or_moved() {
    let mut decision = decision();
    let refused = v1::RefusedPlacement {
        kind: v1::OperationKind::CreateVm.into(),
        refuse_time: ago(60),
        summary: "none of 1 host can take it".into(),
        verdicts: decision.verdicts.split_off(2),
        hint: "uncordon h3".into(),
    };
    let missing = v1::Placement {
        refused: Some(refused.clone()),
        ..Default::default()
    };
    let text = explain::render(&missing, "web", "is on", false);
    assert!(
        text.starts_with("web: does not exist\n\nIts last creation was refused "),
        "{text}"
    );
    assert!(text.contains(": none of 1 host can take it\n"), "{text}");
    assert!(
        text.contains("MEMORY") && text.ends_with("What would have made it fit: uncordon h3\n"),
        "{text}"
    );
    let there = v1::Placement {
        refused: Some(v1::RefusedPlacement {
            kind: v1::OperationKind::MigrateVm.into(),
            ..refused
        }),
        ..decision
    };
    let text = explain::render(&there, "web", "is on", false);
    assert!(
        text.starts_with("web is on h1: ") && text.contains("Its last migration was refused "),
        "{text}"
    );
}

/// A site of two hosts: one is silent, and on the other somebody was at work.
fn examined() -> v1::Diagnosis {
    let finding =
        |severity: v1::FindingSeverity, invariant: &str, kind: &str, about: [&str; 3]| v1::Finding {
            invariant: invariant.into(),
            severity: severity.into(),
            kind: kind.into(),
            subject: about[0].into(),
            seen: about[1].into(),
            next_step: about[2].into(),
        };
    let check =
        |invariant: &str, title: &str, checked, subjects: &str, unchecked, limits: &str| v1::DiagnosisCheck {
            invariant: invariant.into(),
            title: title.into(),
            checked,
            subjects: subjects.into(),
            unchecked,
            limits: limits.into(),
        };
    use v1::FindingSeverity::{Critical, Notice, Warning};
    v1::Diagnosis {
        time: ago(0),
        resource_version: 70,
        findings: vec![
            finding(
                Critical,
                "I1",
                "TWO_COPIES",
                [
                    "vm web",
                    "runs on h1 and on h2; h1 owns it",
                    "stop the copy that has not the newest data",
                ],
            ),
            finding(
                Warning,
                "I13",
                "HOST_SILENT",
                ["host h2", "silent for 40 s; it owns 4 VMs", "look at the host"],
            ),
            finding(
                Notice,
                "I3",
                "NOT_AS_ASKED",
                [
                    "vm db",
                    "stopped on h1, asked to be running",
                    "`dalgu vm show db`",
                ],
            ),
        ],
        checks: vec![
            check(
                "I1",
                "no VM runs on two hosts",
                7,
                "running VMs",
                4,
                "what hosts report",
            ),
            check(
                "I9",
                "reads are never stale",
                0,
                "",
                0,
                "a single look cannot show it",
            ),
            check("I13", "what is shown was seen lately", 9, "hosts and VMs", 4, ""),
        ],
        gaps: vec![v1::DiagnosisGap {
            host: "h2".into(),
            reason: "silent for 40 s".into(),
            vms: 4,
        }],
    }
}

#[test]
fn an_examination_says_what_is_wrong_what_was_looked_at_and_what_was_not_seen() {
    insta::assert_snapshot!("doctor", doctor::render(&examined(), false, false));
    insta::assert_snapshot!("doctor_wide", doctor::render(&examined(), true, false));
    let well = v1::Diagnosis {
        findings: vec![],
        gaps: vec![],
        ..examined()
    };
    insta::assert_snapshot!("doctor_well", doctor::render(&well, false, false));
}

#[test]
fn events_in_a_table() {
    let event = |kind: v1::EventKind, reason: &str, message: &str| v1::Event {
        resource_version: 7,
        time: ago(5),
        kind: kind.into(),
        reason: reason.into(),
        message: message.into(),
        subject: "web".into(),
        ..Default::default()
    };
    let events = [
        event(v1::EventKind::Vm, "VmRunning", "runs on h1"),
        event(v1::EventKind::Operation, "OperationFailed", "no such bridge"),
    ];
    insta::assert_snapshot!("events", table::of(&events, false, now(), false));
}

#[test]
fn every_screen_is_painted_without_moving_anything() {
    for (plain, painted) in [
        (
            running().describe(now()).render(false),
            running().describe(now()).render(true),
        ),
        (
            table::of(&[host(), lost_host()], true, now(), false),
            table::of(&[host(), lost_host()], true, now(), true),
        ),
        (
            explain::render(&decision(), "web", "is on", false),
            explain::render(&decision(), "web", "is on", true),
        ),
        (
            doctor::render(&examined(), true, false),
            doctor::render(&examined(), true, true),
        ),
    ] {
        assert_eq!(anstream::adapter::strip_str(&painted).to_string(), plain);
        assert_ne!(painted, plain);
    }
}

fn image(state: v1::ImageState) -> v1::Image {
    let copy = |host: &str, ready| v1::ImageCopy {
        host: host.into(),
        ready,
        bytes_done: 300 << 20,
        last_use_time: ago(7200),
    };
    let status = v1::ImageStatus {
        state: state.into(),
        bytes_done: 120 << 20,
        bytes_total: 600 << 20,
        import_host: "h1".into(),
        digest: "ab".repeat(32),
        stored_bytes: 600 << 20,
        virtual_size_bytes: 2 << 30,
        copies: vec![copy("h1", true), copy("h2", false)],
        vms: 3,
        error: None,
    };
    v1::Image {
        source: None,
        name: "debian".into(),
        version: "12".into(),
        uid: "6f2c3c5e-0000-4000-8000-000000000001".into(),
        format: v1::ImageFormat::Vmdk.into(),
        size_bytes: 600 << 20,
        sha256: "cd".repeat(32),
        os: "debian-12".into(),
        firmware: v1::Firmware::Uefi.into(),
        labels: map(&[("tier", "base")]),
        description: "for all".into(),
        owner: "operator/admin".into(),
        visibility: v1::ImageVisibility::Public.into(),
        replicas: 2,
        status: Some(status),
        etag: "r7".into(),
        create_time: ago(3600),
        delete_time: None,
    }
}

fn refused_image() -> v1::Image {
    let mut image = image(v1::ImageState::Failed);
    image.version = "13".into();
    image.replicas = -1;
    image.status = Some(v1::ImageStatus {
        state: v1::ImageState::Failed.into(),
        error: Some(v1::VmError {
            reason: "IMAGE_REFUSED".into(),
            message: "it refers to a backing file\u{1b}".into(),
            ..Default::default()
        }),
        ..Default::default()
    });
    image
}

#[test]
fn images() {
    let all = [
        image(v1::ImageState::Available),
        image(v1::ImageState::Importing),
        refused_image(),
    ];
    insta::assert_snapshot!("image_list", table::of(&all, false, now(), false));
    insta::assert_snapshot!("image_list_wide", table::of(&all, true, now(), false));
    insta::assert_snapshot!("image_get", all[0].describe(now()).render(false));
    insta::assert_snapshot!("image_get_refused", all[2].describe(now()).render(false));
}

fn schedule(name: &str, at: &str, paused: bool) -> v1::BackupSchedule {
    v1::BackupSchedule {
        name: name.into(),
        label_selector: map(&[("tier", "gold")]),
        pool: "vault".into(),
        every: Some(prost_types::Duration {
            seconds: 86_400,
            nanos: 0,
        }),
        incrementals: 6,
        keep_last: 14,
        keep_days: 30,
        paused,
        description: "for the auditors".into(),
        last_time: ago(7200),
        next_time: ago(-79_200).filter(|_| !paused),
        vms: 3,
        failures: u32::from(paused),
        etag: "r9".into(),
        create_time: ago(86_400),
        at: at.into(),
    }
}

#[test]
fn backup_schedules() {
    let all = [
        schedule("nightly", "02:00+09:00", false),
        schedule("often", "", true),
    ];
    insta::assert_snapshot!("backup_schedule_list", table::of(&all, false, now(), false));
    insta::assert_snapshot!("backup_schedule_list_wide", table::of(&all, true, now(), false));
    insta::assert_snapshot!("backup_schedule_show", all[0].describe(now()).render(false));
}

fn network() -> v1::Network {
    v1::Network {
        name: "field".into(),
        uid: "6f2c3c5e-0000-4000-8000-000000000002".into(),
        kind: Some(v1::network::Kind::Overlay(v1::OverlayNetwork { vni: 7 })),
        mtu: 1450,
        ipv4: Some(v1::Subnet {
            cidr: "10.20.0.0/16".into(),
            gateway: "10.20.0.1".into(),
            first: "10.20.0.1".into(),
            last: "10.20.255.254".into(),
            service_address: "10.20.255.254".into(),
            no_dhcp: false,
        }),
        domain: "field.internal".into(),
        dns_servers: vec!["192.0.2.53".into()],
        labels: map(&[("tier", "base")]),
        description: "for all".into(),
        interfaces: 3,
        etag: "r7".into(),
        create_time: ago(3600),
        ..Default::default()
    }
}

fn office() -> v1::Network {
    let kind = v1::BridgeNetwork {
        bridge: "br0".into(),
        vlan: 12,
    };
    let ipv6 = v1::Subnet {
        cidr: "2001:db8::/64".into(),
        first: "2001:db8::1".into(),
        last: "2001:db8::ff".into(),
        no_dhcp: true,
        ..Default::default()
    };
    v1::Network {
        name: "office\u{1b}".into(),
        kind: Some(v1::network::Kind::Bridge(kind)),
        mtu: 1500,
        ipv6: Some(ipv6),
        ..Default::default()
    }
}

fn security_group() -> v1::SecurityGroup {
    let rules = [
        "ingress,tcp,22,from=10.0.0.0/8",
        "ingress,any,from-group=web",
        "egress,udp,5000-5010",
        "egress,tcp",
        "ingress,icmp",
        "ingress,icmp,8",
    ];
    let read = dalgu::args::values::network::rule;
    let mut rules: Vec<_> = rules.iter().map(|rule| read(rule).unwrap()).collect();
    rules[0].description = "from the office".into();
    v1::SecurityGroup {
        name: "ssh".into(),
        uid: "6f2c3c5e-0000-4000-8000-000000000003".into(),
        rules,
        interfaces: 2,
        etag: "r8".into(),
        create_time: ago(60),
        ..Default::default()
    }
}

#[test]
fn networks_and_security_groups() {
    let all = [network(), office()];
    insta::assert_snapshot!("network_list", table::of(&all, false, now(), false));
    insta::assert_snapshot!("network_list_wide", table::of(&all, true, now(), false));
    insta::assert_snapshot!("network_get", all[0].describe(now()).render(false));
    insta::assert_snapshot!("network_get_bridge", all[1].describe(now()).render(false));
    let groups = [security_group()];
    insta::assert_snapshot!("security_group_list", table::of(&groups, true, now(), false));
    insta::assert_snapshot!("security_group_get", groups[0].describe(now()).render(false));
    let interface = v1::NetworkInterface {
        vm: "web".into(),
        nic: "eth0".into(),
        mac: "52:54:00:12:34:56".into(),
        ipv4_address: "10.20.0.7".into(),
        security_groups: vec!["ssh".into(), "web".into()],
        host: "h1".into(),
        ..Default::default()
    };
    insta::assert_snapshot!("network_interfaces", table::of(&[interface], false, now(), false));
}

#[test]
fn a_vm_in_a_network() {
    let mut vm = running();
    let nic = "eth0,network=field,ip=10.20.0.7,ip=fd00::7,group=ssh,group=web,receive=100Mbit,mac=52:54:00:12:34:56";
    vm.spec.as_mut().unwrap().nics = vec![dalgu::args::values::network::nic(nic).unwrap()];
    let page = vm.describe(now()).render(false);
    let (_, interfaces) = page.split_once("Network interfaces").unwrap();
    insta::assert_snapshot!("vm_in_a_network", interfaces);
}
