//! What files declare, compared with what is there.

use dalgu_proto::v1;

use super::*;

const FILE: &str = "\
backupSchedules:
- {name: nightly, labelSelector: {tier: gold}, pool: vault, every: 86400s, incrementals: 6, keepLast: 14}
---
vms: [{name: web, labels: {tier: gold}}]
";

fn schedule() -> v1::BackupSchedule {
    v1::BackupSchedule {
        name: "nightly".into(),
        label_selector: [("tier".into(), "gold".into())].into(),
        pool: "vault".into(),
        every: Some(prost_types::Duration {
            seconds: 86_400,
            nanos: 0,
        }),
        incrementals: 6,
        keep_last: 14,
        vms: 3,
        failures: 1,
        etag: "e1".into(),
        ..Default::default()
    }
}

fn first(text: &str) -> Object {
    read(text).unwrap().remove(0)
}

/// What of a schedule that is there is to change by the file, the call's mask, and what it is to be then.
fn compared(there: v1::BackupSchedule, text: &str) -> (Vec<String>, Vec<String>, Declared) {
    compared_with(Declared::BackupSchedule(Box::new(there)), text)
}

fn compared_with(there: Declared, text: &str) -> (Vec<String>, Vec<String>, Declared) {
    let object = first(text);
    let current = there.value().unwrap();
    let wanted = object.wanted(Some(&there)).unwrap();
    let differences = diff::differences(&current, &wanted);
    let (mask, fixed) = object.declared.kind().mask(&differences);
    assert_eq!(fixed, [""; 0]);
    let paths = differences.into_iter().map(|difference| difference.path);
    let merged = Declared::from_value(object.declared.kind(), diff::merged(&current, &wanted)).unwrap();
    (paths.collect(), mask, merged)
}

#[test]
fn a_schedule_is_made_before_the_vms_that_it_is_for_and_twice_is_refused() {
    let objects = in_order(read(FILE).unwrap()).unwrap();
    let titles: Vec<_> = objects.iter().map(|object| object.declared.title()).collect();
    assert_eq!(titles, ["backup schedule nightly", "VM web"]);
    let twice = [read(FILE).unwrap(), read(FILE).unwrap()].into_iter().flatten();
    let error = in_order(twice.collect()).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("backup schedule nightly is declared twice"),
        "{error}"
    );
}

#[test]
fn a_schedule_as_declared_is_left_alone_whatever_the_controller_says_of_it_besides() {
    let (paths, mask, _) = compared(schedule(), FILE);
    assert_eq!((paths, mask), (vec![], vec![]));
}

#[test]
fn a_schedule_is_changed_to_what_is_declared_and_all_its_labels_are_meant() {
    let there = v1::BackupSchedule {
        label_selector: [("tier".into(), "gold".into()), ("site".into(), "north".into())].into(),
        every: Some(prost_types::Duration {
            seconds: 3600,
            nanos: 0,
        }),
        keep_days: 30,
        paused: true,
        ..schedule()
    };
    let (mut paths, mut mask, merged) = compared(there, FILE);
    paths.sort();
    mask.sort();
    assert_eq!(paths, ["every", "labelSelector"]);
    assert_eq!(mask, ["every", "label_selector"]);
    let Declared::BackupSchedule(merged) = merged else {
        panic!("{merged:?}");
    };
    assert_eq!(merged.label_selector, schedule().label_selector);
    assert_eq!(merged.every, schedule().every);
    // What is not said stays.
    assert!(merged.paused && merged.keep_days == 30 && merged.etag == "e1");
}

#[test]
fn a_paused_schedule_goes_on_and_keeps_no_days_where_the_file_says_so() {
    let there = v1::BackupSchedule {
        keep_days: 30,
        paused: true,
        ..schedule()
    };
    let text = "backupSchedules: [{name: nightly, paused: false, keepDays: 0}]";
    let (mut paths, mut mask, merged) = compared(there, text);
    paths.sort();
    mask.sort();
    assert_eq!(paths, ["keepDays", "paused"]);
    assert_eq!(mask, ["keep_days", "paused"]);
    let Declared::BackupSchedule(merged) = merged else {
        panic!("{merged:?}");
    };
    assert!(!merged.paused && merged.keep_days == 0 && merged.keep_last == 14);
    assert_eq!(
        compared(*merged, text),
        (vec![], vec![], compared(schedule(), text).2)
    );
}

#[test]
fn a_schedule_gets_a_time_of_day_and_loses_it_where_the_file_says_it_is_empty() {
    let there = v1::BackupSchedule {
        at: "02:00".into(),
        ..schedule()
    };
    let paths = |there: v1::BackupSchedule, at: &str| {
        let text = format!("backupSchedules: [{{name: nightly, at: {at}}}]");
        let (paths, mask, merged) = compared(there, &text);
        assert_eq!(paths, mask);
        let Declared::BackupSchedule(merged) = merged else {
            panic!("{merged:?}");
        };
        (paths, merged.at)
    };
    let changed = |at: &str| (vec!["at".to_owned()], at.to_owned());
    assert_eq!(paths(schedule(), "02:00+09:00"), changed("02:00+09:00"));
    assert_eq!(paths(there.clone(), "''"), changed(""));
    assert_eq!(
        paths(there.clone(), "12:30"),
        changed("12:30"),
        "no number of base 60"
    );
    assert_eq!(paths(there, "02:00"), (vec![], "02:00".to_owned()));
}

#[test]
fn what_cannot_be_empty_is_refused_by_its_name() {
    for (field, name) in [
        ("labelSelector: {}", "labelSelector"),
        ("keep_last: 0", "keepLast"),
        ("pool: ''", "pool"),
    ] {
        let object = first(&format!("backupSchedules: [{{name: nightly, {field}}}]"));
        let error = object.wanted(None).unwrap_err().to_string();
        let wanted = format!("backup schedule nightly: {name} cannot be empty or 0: ");
        assert!(error.starts_with(&wanted), "{error}");
    }
}

/// What a file's first object is to be.
fn wanted(text: &str) -> Value {
    first(text).wanted(None).unwrap()
}

#[test]
fn an_empty_field_is_its_default_or_left_to_the_controller_as_the_api_has_it() {
    let network = wanted("networks: [{name: field, overlay: {vni: 0}, domain: '', dnsServers: [], mtu: 0}]");
    assert_eq!(
        network,
        serde_json::json!({"name": "field", "overlay": {}, "domain": "field.internal", "dnsServers": [], "mtu": 1450})
    );
    let volume = wanted(
        "volumes: [{name: v, sizeMib: 0, image: debian, pool: '', cloneMode: CLONE_MODE_UNSPECIFIED}]",
    );
    assert_eq!(
        volume,
        serde_json::json!({"name": "v", "image": "debian", "pool": "local"})
    );
    let vm = wanted(
        "
vms:
- name: web
  drainMode: DRAIN_MODE_UNSPECIFIED
  placementGroups: []
  spec:
    vcpus: 1
    memoryMib: 64
    maxVcpus: 0
    firmware: FIRMWARE_BIOS
    restartPolicy: RESTART_POLICY_UNSPECIFIED
    disks:
    - {name: root, sizeMib: 8, pool: '', limits: {readMibPerSecond: 0}}
    - {name: data, volume: v, sizeMib: 0, pool: '', image: '', format: DISK_FORMAT_UNSPECIFIED}
    nics: [{name: eth0, network: field, mac: '', ipv4Address: '', securityGroups: [], sendLimitMbitPerSecond: 0}]
",
    );
    let disks = serde_json::json!([
        {"name": "root", "sizeMib": "8", "limits": {"readMibPerSecond": 0}},
        {"name": "data", "volume": "v"},
    ]);
    assert_eq!(
        vm,
        serde_json::json!({"name": "web", "drainMode": "DRAIN_MODE_LIVE_MIGRATE", "placementGroups": [], "spec": {
            "vcpus": 1, "memoryMib": "64", "maxVcpus": 0, "firmware": "FIRMWARE_BIOS", "restartPolicy": "RESTART_POLICY_ON_FAILURE",
            "disks": disks,
            "nics": [{"name": "eth0", "network": "field", "securityGroups": [], "sendLimitMbitPerSecond": 0}],
        }})
    );
}

#[test]
fn what_is_shown_of_an_object_can_be_given_back() {
    let shown = "vms: [{name: web, uid: u, etag: e, generation: 3, status: {state: VM_STATE_RUNNING}, createTime: '2026-11-23T12:00:00Z'}]";
    assert_eq!(wanted(shown), serde_json::json!({"name": "web"}));
}

/// A VM as a controller shows it.
fn shop() -> v1::Vm {
    let disk = v1::Disk {
        name: "root".into(),
        image: "debian:12".into(),
        image_digest: "ab".repeat(32),
        size_mib: 1024,
        pool: "fast".into(),
        format: v1::DiskFormat::Qcow2.into(),
        ..Default::default()
    };
    let nic = v1::Nic {
        name: "eth0".into(),
        network: "field".into(),
        mac: "52:54:00:00:00:01".into(),
        ipv4_address: "10.20.0.7".into(),
        ..Default::default()
    };
    let told = v1::FirstBoot {
        pool: "fast".into(),
        user_data_digest: Some(v1::DocumentDigest {
            sha256: "cd".repeat(32),
            size_bytes: 9,
        }),
        ..Default::default()
    };
    v1::Vm {
        name: "shop".into(),
        spec: Some(v1::VmSpec {
            vcpus: 2,
            memory_mib: 512,
            disks: vec![disk],
            nics: vec![nic],
            first_boot: Some(told),
            firmware: v1::Firmware::Uefi.into(),
            ..Default::default()
        }),
        etag: "e1".into(),
        ..Default::default()
    }
}

#[test]
fn of_a_vm_that_is_there_the_field_that_changes_is_enough() {
    let there = || Declared::Vm(Box::new(shop()));
    for (text, path, mask) in [
        ("spec: {memoryMib: 1024}", "spec.memoryMib", "spec.memory_mib"),
        (
            "spec: {disks: [{name: root, sizeMib: 2048}]}",
            "spec.disks[root].sizeMib",
            "spec.disks",
        ),
        (
            "spec: {nics: [{name: eth0, securityGroups: [web]}]}",
            "spec.nics[eth0].securityGroups",
            "spec.nics",
        ),
        ("labels: {a: b}", "labels", "labels"),
    ] {
        let file = format!("vms: [{{name: shop, {text}}}]");
        let (paths, masks, merged) = compared_with(there(), &file);
        assert_eq!(
            (paths, masks),
            (vec![path.to_owned()], vec![mask.to_owned()]),
            "{text}"
        );
        let Declared::Vm(merged) = merged else {
            panic!("{merged:?}");
        };
        let (merged, shop) = (merged.spec.unwrap(), shop().spec.unwrap());
        assert_eq!(
            (merged.vcpus, &merged.first_boot),
            (2, &shop.first_boot),
            "what is not said stays"
        );
        assert_eq!(merged.disks[0].image, "debian:12");
        assert_eq!(merged.nics[0].network, "field");
    }
    let same = "vms: [{name: shop, spec: {memoryMib: 512, disks: [{name: root, image: debian}]}}]";
    assert_eq!(compared_with(there(), same).0, [""; 0]);
    // A value that cannot be is refused for itself, and a new VM still has to be described.
    let alone = first("vms: [{name: shop, spec: {memoryMib: 8}}]");
    let error = |there: Option<&Declared>| alone.wanted(there).unwrap_err().to_string();
    assert!(
        error(Some(&there())).starts_with("VM shop: memory_mib: must be 32"),
        "{}",
        error(Some(&there()))
    );
    assert!(
        error(None).starts_with("VM shop: vcpus: must be 1"),
        "{}",
        error(None)
    );
}

#[test]
fn of_a_volume_that_is_there_the_field_that_changes_is_enough() {
    let volume = v1::Volume {
        name: "ledger".into(),
        size_mib: 64,
        pool: "local".into(),
        format: v1::DiskFormat::Raw.into(),
        ..Default::default()
    };
    let there = Declared::Volume(Box::new(volume));
    let (paths, mask, _) = compared_with(there, "volumes: [{name: ledger, description: books}]");
    assert_eq!(
        (paths, mask),
        (vec!["description".to_owned()], vec!["description".to_owned()])
    );
}

#[test]
fn firmware_is_said_in_words_or_left_to_what_the_image_says() {
    let firmware = |said: &str| {
        let text = format!("vms: [{{name: shop, spec: {{firmware: {said}}}}}]");
        compared_with(Declared::Vm(Box::new(shop())), &text)
    };
    assert_eq!(firmware("FIRMWARE_UEFI").0, [""; 0]);
    assert_eq!(firmware("FIRMWARE_UNSPECIFIED").0, [""; 0]);
    let object = first("vms: [{name: shop, spec: {firmware: FIRMWARE_BIOS}}]");
    let there = Declared::Vm(Box::new(shop()));
    let differences = diff::differences(&there.value().unwrap(), &object.wanted(Some(&there)).unwrap());
    let (_, fixed) = Kind::Vm.mask(&differences);
    assert_eq!(fixed, ["spec.firmware"]);
}
