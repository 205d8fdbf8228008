//! `dalgu apply`: what it shows, and which calls it makes.

use dalgu_proto::{reason, v1};
use tonic::{Code, Status};

use super::{
    Kind, State,
    common::{Controller, Outcome},
    operation, vm,
};

const FILE: &str = "\
vms:
- name: web
  labels: {tier: front}
  spec:
    vcpus: 2
    memoryMib: 256
    disks: [{name: root, image: debian, sizeMib: 1024}, {name: data, sizeMib: 2048}]
";

fn missing() -> Status {
    reason::status(Code::NotFound, "VM_NOT_FOUND", "there is no VM web")
}

/// The VM as the controller shows it after the file was applied.
fn applied() -> v1::Vm {
    let disk = |name: &str, image: &str, size_mib| v1::Disk {
        name: name.into(),
        image: image.into(),
        size_mib,
        pool: "local".into(),
        format: v1::DiskFormat::Qcow2.into(),
        ..Default::default()
    };
    let mut vm = vm("web", "h2");
    vm.etag = "e1".into();
    vm.labels.insert("tier".into(), "front".into());
    let spec = vm.spec.as_mut().unwrap();
    spec.vcpus = 2;
    spec.disks = vec![disk("root", "debian:12", 1024), disk("data", "", 2048)];
    vm
}

async fn apply(controller: &Controller, text: &str, flags: &[&str]) -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("site.yaml");
    std::fs::write(&path, text).unwrap();
    let file = path.to_str().unwrap();
    let args: Vec<_> = ["apply", "-f", file].iter().chain(flags).copied().collect();
    controller.run(&args).await
}

#[tokio::test]
async fn what_is_missing_is_made_and_waited_for() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        script.vms = [Err(missing()), Ok(applied())].into();
        script
            .changes
            .push_back(Ok(operation(Kind::CreateVm, State::Pending)));
        script
            .waits
            .push_back(Ok(operation(Kind::CreateVm, State::Succeeded)));
    }
    let outcome = apply(&controller, FILE, &["--yes"]).await;
    assert_eq!(
        (outcome.code, outcome.out.as_str()),
        (0, "+ VM web\n"),
        "{}",
        outcome.err
    );
    insta::assert_snapshot!(outcome.err, @r"
    1 to make, 0 to change, 0 as declared
    creating web: accepted
    created web on h2 in 2.0 s
    ");
    let seen = controller.fake.script().seen.clone();
    assert!(seen[0].starts_with("create_vm web "), "{seen:?}");
}

#[tokio::test]
async fn the_same_file_again_changes_nothing() {
    let controller = Controller::start();
    controller.fake.script().vms.push_back(Ok(applied()));
    let outcome = apply(&controller, FILE, &[]).await;
    assert_eq!((outcome.code, outcome.out.as_str()), (0, ""), "{}", outcome.err);
    assert_eq!(outcome.err, "0 to make, 0 to change, 1 as declared\n");
    assert_eq!(controller.fake.script().seen, [] as [String; 0]);
}

#[tokio::test]
async fn what_is_otherwise_is_shown_and_changed_with_the_etag_of_what_was_compared() {
    let text = FILE
        .replace("vcpus: 2", "vcpus: 4")
        .replace("{name: data, sizeMib: 2048}", "{name: logs, sizeMib: 512}");
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        script.vms = [Ok(applied()), Ok(applied())].into();
        script.updates.push_back(Ok(applied()));
    }
    let dry = apply(&controller, &text, &["--dry-run"]).await;
    assert_eq!(dry.code, 0);
    insta::assert_snapshot!(dry.out, @r"
    ~ VM web
      + spec.disks[logs]: {name: logs, sizeMib: 512}
      - spec.disks[data]: {format: DISK_FORMAT_QCOW2, name: data, pool: local, sizeMib: 2048} (deleted with all that is on it)
        spec.vcpus: 2 -> 4
    ");
    assert_eq!(controller.fake.script().seen, [] as [String; 0]);
    let done = apply(&controller, &text, &["--yes"]).await;
    assert_eq!((done.code, &done.out), (0, &dry.out), "{}", done.err);
    insta::assert_snapshot!(done.err, @r"
    0 to make, 1 to change, 0 as declared
    changed VM web
    ");
    assert_eq!(
        controller.fake.script().seen,
        [r#"update_vm e1 ["spec.disks", "spec.vcpus"] ["tier=front"]"#]
    );
}

#[tokio::test]
async fn a_file_that_names_one_field_changes_that_and_leaves_the_rest() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        script.vms.push_back(Ok(applied()));
        script.updates.push_back(Ok(applied()));
    }
    let done = apply(&controller, "vms: [{name: web, spec: {vcpus: 4}}]", &["--yes"]).await;
    assert_eq!(
        (done.code, done.out.as_str()),
        (0, "~ VM web\n    spec.vcpus: 2 -> 4\n"),
        "{}",
        done.err
    );
    assert_eq!(
        controller.fake.script().seen,
        [r#"update_vm e1 ["spec.vcpus"] ["tier=front"]"#]
    );
}

#[tokio::test]
async fn bios_is_the_same_whether_a_controller_says_it_in_words_or_as_older_ones_did_not_at_all() {
    let text = FILE.replace("vcpus: 2", "firmware: FIRMWARE_BIOS\n    vcpus: 2");
    for said in [v1::Firmware::Unspecified, v1::Firmware::Bios] {
        let controller = Controller::start();
        let mut vm = applied();
        vm.spec.as_mut().unwrap().set_firmware(said);
        controller.fake.script().vms.push_back(Ok(vm));
        let outcome = apply(&controller, &text, &[]).await;
        assert_eq!((outcome.code, outcome.out.as_str()), (0, ""), "{}", outcome.err);
    }
}

#[tokio::test]
async fn what_cannot_be_changed_is_named_and_nothing_is_done() {
    let controller = Controller::start();
    controller.fake.script().vms.push_back(Ok(applied()));
    let text = FILE.replace("vcpus: 2", "firmware: FIRMWARE_UEFI\n    vcpus: 4");
    let outcome = apply(&controller, &text, &["--yes"]).await;
    assert_eq!((outcome.code, outcome.out.as_str()), (2, ""));
    insta::assert_snapshot!(
        outcome.err,
        @"error: VM web exists already and its spec.firmware cannot be changed: delete it first, or take that out of the file"
    );
    assert_eq!(controller.fake.script().seen, [] as [String; 0]);
}

#[tokio::test]
async fn nothing_is_changed_where_nobody_can_be_asked() {
    let controller = Controller::start();
    controller.fake.script().vms.push_back(Err(missing()));
    let outcome = apply(&controller, FILE, &[]).await;
    assert_eq!((outcome.code, outcome.out.as_str()), (2, "+ VM web\n"));
    assert!(outcome.err.contains("--yes"), "{}", outcome.err);
    assert_eq!(controller.fake.script().seen, [] as [String; 0]);
}

#[tokio::test]
async fn a_file_that_makes_no_sense_is_refused_with_the_place() {
    let cases = [
        (
            "vms: [{name: a, spec: {vcpus: 1, memoryMib: 64, disks: [{name: d, sizeMib: 1}]}}, {name: a}]",
            "VM a is declared twice",
        ),
        ("vm: [{name: a}]", "vm"),
        ("vms: [{name: a, spec: {vcpu: 1}}]", "vcpu"),
        (
            "vms: [{name: a, spec: {vcpus: 500, memoryMib: 64}}]",
            "vcpus: must be 1 to 254",
        ),
        ("- a", "site.yaml"),
    ];
    for (text, wanted) in cases {
        let controller = Controller::start();
        // What is said of a VM may be completed by one that is there: so that is asked first.
        controller.fake.script().vms.push_back(Err(missing()));
        let outcome = apply(&controller, text, &["--yes"]).await;
        assert_eq!(
            (outcome.code, outcome.out.as_str()),
            (2, ""),
            "{text}: {}",
            outcome.err
        );
        assert!(outcome.err.contains(wanted), "{text}: {}", outcome.err);
        assert_eq!(controller.fake.script().seen, [] as [String; 0]);
    }
}

const NETWORKS: &str = "\
networks:
- name: field
  overlay: {}
  ipv4: {cidr: 10.20.0.0/16}
---
securityGroups:
- name: db
  rules: [{direction: DIRECTION_INGRESS, protocol: PROTOCOL_TCP, firstPort: 5432, group: web}]
- name: web
  rules: [{direction: DIRECTION_INGRESS, cidr: 192.0.2.7}, {direction: DIRECTION_EGRESS, group: db}]
";

fn not_there(reason: &str) -> Status {
    reason::status(Code::NotFound, reason, "there is none of that name")
}

#[tokio::test]
async fn groups_that_name_each_other_are_made_first_and_get_those_rules_when_all_are_there() {
    let controller = Controller::start();
    let group = || Ok(v1::SecurityGroup::default());
    {
        let missing = || Err(not_there("SECURITY_GROUP_NOT_FOUND"));
        let mut script = controller.fake.script();
        script.groups = [missing(), missing(), group(), group(), group(), group()].into();
        script.networks = [Err(not_there("NETWORK_NOT_FOUND")), Ok(v1::Network::default())].into();
    }
    let outcome = apply(&controller, NETWORKS, &["--yes"]).await;
    assert_eq!(
        (outcome.code, outcome.out.as_str()),
        (0, "+ security group db\n+ security group web\n+ network field\n"),
        "{}",
        outcome.err
    );
    let seen = controller.fake.script().seen.clone();
    let calls: Vec<_> = seen.iter().filter(|call| !call.starts_with("get_")).collect();
    assert_eq!(
        calls[..2],
        ["create_security_group db 0", "create_security_group web 1"]
    );
    assert_eq!(
        calls[2..4],
        [
            r#"update_security_group  ["rules"] [5432]"#,
            r#"update_security_group  ["rules"] [0 192.0.2.7, 0]"#
        ]
    );
    assert!(
        calls[4].starts_with("create_network Network { name: \"field\""),
        "{seen:?}"
    );
}

#[tokio::test]
async fn an_address_means_the_same_with_and_without_its_prefix_and_what_a_network_chose_is_left() {
    let rule = |direction: v1::Direction, remote| v1::SecurityRule {
        direction: direction.into(),
        remote: Some(remote),
        ..Default::default()
    };
    use v1::{network::Kind as How, security_rule::Remote};
    let db = v1::SecurityGroup {
        name: "db".into(),
        rules: vec![v1::SecurityRule {
            protocol: v1::Protocol::Tcp.into(),
            first_port: 5432,
            last_port: 5432,
            ..rule(v1::Direction::Ingress, Remote::Group("web".into()))
        }],
        ..Default::default()
    };
    let web = v1::SecurityGroup {
        name: "web".into(),
        rules: vec![
            rule(v1::Direction::Ingress, Remote::Cidr("192.0.2.7/32".into())),
            rule(v1::Direction::Egress, Remote::Group("db".into())),
        ],
        ..Default::default()
    };
    let field = v1::Network {
        name: "field".into(),
        kind: Some(How::Overlay(v1::OverlayNetwork { vni: 4711 })),
        mtu: 1450,
        domain: "else.where".into(),
        ipv4: Some(v1::Subnet {
            cidr: "10.20.0.0/16".into(),
            first: "10.20.0.1".into(),
            last: "10.20.255.254".into(),
            service_address: "10.20.255.254".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let controller = Controller::start();
    let answers = |field: v1::Network| {
        let mut script = controller.fake.script();
        script.groups = [Ok(db.clone()), Ok(web.clone())].into();
        script.networks = [Ok(field)].into();
    };
    answers(field.clone());
    let same = apply(&controller, NETWORKS, &[]).await;
    assert_eq!(
        (same.code, same.err.as_str()),
        (0, "0 to make, 0 to change, 3 as declared\n"),
        "{}",
        same.out
    );
    let mut other = field;
    other.ipv4.as_mut().unwrap().cidr = "10.21.0.0/16".into();
    answers(other);
    let refused = apply(&controller, NETWORKS, &["--yes"]).await;
    assert_eq!(refused.code, 2);
    assert!(
        refused
            .err
            .contains("network field exists already and its ipv4.cidr cannot be changed"),
        "{}",
        refused.err
    );
}

fn group(name: &str, etag: &str, rules: &[(&str, u32)]) -> v1::SecurityGroup {
    let rule = |(group, port): &(&str, u32)| v1::SecurityRule {
        direction: v1::Direction::Ingress.into(),
        protocol: v1::Protocol::Tcp.into(),
        first_port: *port,
        last_port: *port,
        remote: Some(v1::security_rule::Remote::Group((*group).into())),
        ..Default::default()
    };
    v1::SecurityGroup {
        name: name.into(),
        etag: etag.into(),
        rules: rules.iter().map(rule).collect(),
        ..Default::default()
    }
}

/// The calls that change something.
fn changes(controller: &Controller) -> Vec<String> {
    let seen = controller.fake.script().seen.clone();
    let reads = ["get_", "wait_"];
    seen.into_iter()
        .filter(|call| !reads.iter().any(|read| call.starts_with(read)))
        .collect()
}

#[tokio::test]
async fn a_group_whose_rules_are_declared_to_be_none_is_emptied() {
    let controller = Controller::start();
    let there = group("web", "e1", &[("desk", 22)]);
    controller.fake.script().groups = [Ok(there), Ok(group("web", "e2", &[]))].into();
    let file = "securityGroups: [{name: web, rules: []}]";
    let outcome = apply(&controller, file, &["--yes"]).await;
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    insta::assert_snapshot!(outcome.out, @r"
    ~ security group web
        rules: [{direction: DIRECTION_INGRESS, firstPort: 22, group: desk, lastPort: 22, protocol: PROTOCOL_TCP}] -> []
    ");
    assert_eq!(changes(&controller), [r#"update_security_group e1 ["rules"] []"#]);
    controller
        .fake
        .script()
        .groups
        .push_back(Ok(group("web", "e2", &[])));
    let again = apply(&controller, file, &["--yes"]).await;
    assert_eq!((again.code, again.out.as_str()), (0, ""), "{}", again.err);
}

#[tokio::test]
async fn limits_groups_and_labels_that_are_declared_to_be_none_are_taken_away() {
    let mut there = applied();
    let spec = there.spec.as_mut().unwrap();
    spec.max_vcpus = 4;
    spec.disks[1].limits = Some(v1::DiskLimits {
        write_mib_per_second: 5,
        ..Default::default()
    });
    spec.nics = vec![v1::Nic {
        name: "eth0".into(),
        network: "field".into(),
        security_groups: vec!["web".into()],
        send_limit_mbit_per_second: 7,
        ..Default::default()
    }];
    let file = "\
vms:
- name: web
  labels: {}
  spec:
    vcpus: 2
    memoryMib: 256
    maxVcpus: 0
    disks: [{name: root, image: debian, sizeMib: 1024}, {name: data, sizeMib: 2048, limits: {writeMibPerSecond: 0}}]
    nics: [{name: eth0, network: field, securityGroups: [], sendLimitMbitPerSecond: 0}]
";
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        script.vms.push_back(Ok(there.clone()));
        script.updates.push_back(Ok(there));
    }
    let outcome = apply(&controller, file, &["--yes"]).await;
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    insta::assert_snapshot!(outcome.out, @r"
    ~ VM web
        labels: {tier: front} -> {}
        spec.disks[data].limits.writeMibPerSecond: 5 -> 0
        spec.maxVcpus: 4 -> 0
        spec.nics[eth0].securityGroups: [web] -> []
        spec.nics[eth0].sendLimitMbitPerSecond: 7 -> 0
    ");
    let mut wanted = controller.fake.script().updated.remove(0);
    let spec = wanted.spec.as_mut().unwrap();
    assert_eq!((spec.max_vcpus, spec.nics[0].send_limit_mbit_per_second), (0, 0));
    assert_eq!(spec.nics[0].security_groups, [""; 0]);
    assert_eq!(spec.disks[1].limits, Some(v1::DiskLimits::default()));
    assert!(wanted.labels.is_empty());
    // The controller says none where there are none.
    spec.disks[1].limits = None;
    controller.fake.script().vms.push_back(Ok(wanted));
    let again = apply(&controller, file, &[]).await;
    assert_eq!((again.code, again.out.as_str()), (0, ""), "{}", again.err);
}

#[tokio::test]
async fn a_field_without_a_value_is_refused_by_its_path() {
    let controller = Controller::start();
    let file = "securityGroups:\n- name: web\n  rules:\n#  - {direction: DIRECTION_INGRESS}\n";
    let outcome = apply(&controller, file, &["--yes"]).await;
    assert_eq!((outcome.code, outcome.out.as_str()), (2, ""));
    let wanted = "securityGroups[web].rules has no value: write []";
    assert!(outcome.err.contains(wanted), "{}", outcome.err);
}

#[tokio::test]
async fn a_group_that_is_there_gains_a_rule_for_one_that_is_made_further_down() {
    let file = "\
securityGroups:
- name: app
  rules: [{direction: DIRECTION_INGRESS, protocol: PROTOCOL_TCP, firstPort: 80, group: web}]
- name: db
  rules: [{direction: DIRECTION_INGRESS, protocol: PROTOCOL_TCP, firstPort: 5432, group: web}]
- name: web
  rules: []
";
    let controller = Controller::start();
    {
        let missing = || Err(not_there("SECURITY_GROUP_NOT_FOUND"));
        let mut script = controller.fake.script();
        // What is there of app, db and web; then the answers to the changes.
        script.groups = [missing(), Ok(group("db", "e1", &[])), missing()].into();
        script
            .groups
            .extend((0..4).map(|_| Ok(v1::SecurityGroup::default())));
    }
    let outcome = apply(&controller, file, &["--yes"]).await;
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert_eq!(
        changes(&controller),
        [
            "create_security_group app 0",
            "create_security_group web 0",
            r#"update_security_group  ["rules"] [80]"#,
            r#"update_security_group e1 ["rules"] [5432]"#,
        ]
    );
}

const VOLUME: &str = "volumes: [{name: ledger, sizeMib: 96}]";

/// The volume as the controller shows it.
fn ledger(size_mib: u64, etag: &str) -> v1::Volume {
    v1::Volume {
        name: "ledger".into(),
        size_mib,
        pool: "local".into(),
        format: v1::DiskFormat::Qcow2.into(),
        etag: etag.into(),
        ..Default::default()
    }
}

fn in_state(volume: v1::Volume, state: v1::VolumeState) -> v1::Volume {
    let status = v1::VolumeStatus {
        state: state.into(),
        ..Default::default()
    };
    v1::Volume {
        status: Some(status),
        delete_time: super::ago(60),
        purge_time: super::ago(-60),
        ..volume
    }
}

#[tokio::test]
async fn a_deleted_volume_that_is_declared_is_had_back_and_then_changed() {
    let controller = Controller::start();
    let deleted = || in_state(ledger(64, "e1"), v1::VolumeState::Deleted);
    controller.fake.script().volumes = [Ok(deleted()), Ok(ledger(64, "e2")), Ok(ledger(96, "e3"))].into();
    let outcome = apply(&controller, VOLUME, &["--yes"]).await;
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    insta::assert_snapshot!(outcome.out, @r"
    ~ volume ledger
      - deleteTime: 2026-11-23T11:59:00Z (its deletion is taken back)
        sizeMib: 64 -> 96
    ");
    insta::assert_snapshot!(outcome.err, @r"
    0 to make, 1 to change, 0 as declared
    took back the deletion of volume ledger
    changed volume ledger
    ");
    assert_eq!(
        changes(&controller),
        ["undelete_volume ledger e1", r#"update_volume e2 ["size_mib"] 96"#]
    );
    // Otherwise as declared: nothing but that.
    let file = "volumes: [{name: ledger, sizeMib: 64}]";
    controller.fake.script().seen.clear();
    controller.fake.script().volumes = [Ok(deleted()), Ok(ledger(64, "e2"))].into();
    let outcome = apply(&controller, file, &["--yes"]).await;
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert_eq!(changes(&controller), ["undelete_volume ledger e1"]);
}

#[tokio::test]
async fn what_is_being_removed_is_not_called_as_declared() {
    let controller = Controller::start();
    let purging = in_state(ledger(96, "e1"), v1::VolumeState::Purging);
    let mut deleting = applied();
    deleting.delete_time = super::ago(1);
    {
        let mut script = controller.fake.script();
        script.volumes.push_back(Ok(purging));
        script.vms.push_back(Ok(deleting));
    }
    let volume = apply(&controller, VOLUME, &["--yes"]).await;
    assert_eq!((volume.code, volume.out.as_str()), (5, ""));
    insta::assert_snapshot!(volume.err, @"error: volume ledger is being removed for good: wait until `dalgu volume show ledger` finds none, then apply the file again to have it made anew");
    let vm = apply(&controller, FILE, &["--yes"]).await;
    assert_eq!((vm.code, vm.out.as_str()), (5, ""));
    insta::assert_snapshot!(vm.err, @"error: VM web is being deleted: wait until `dalgu vm show web` finds none, then apply the file again to have it made anew");
    assert_eq!(changes(&controller), [""; 0]);
}

/// A VM that has the volume.
fn holder(vcpus: u32, size_mib: u64, etag: &str) -> v1::Vm {
    let mut vm = applied();
    vm.etag = etag.into();
    let spec = vm.spec.as_mut().unwrap();
    spec.vcpus = vcpus;
    spec.disks[1].volume = "ledger".into();
    spec.disks[1].size_mib = size_mib;
    vm
}

const GROWN: &str = "\
volumes: [{name: ledger, sizeMib: 96}]
vms:
- name: web
  description: larger
  spec:
    vcpus: 2
    memoryMib: 256
    disks: [{name: root, image: debian, sizeMib: 1024}, {name: data, volume: ledger, limits: {writeMibPerSecond: 5}}]
";

fn overtaken() -> Status {
    reason::status(Code::Aborted, "ETAG_MISMATCH", "web was changed by somebody else")
}

#[tokio::test]
async fn a_volume_that_is_grown_does_not_stand_in_the_way_of_a_change_of_its_vm() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        script.volumes = [Ok(ledger(64, "v1")), Ok(ledger(96, "v2"))].into();
        script.vms = [Ok(holder(2, 64, "e1")), Ok(holder(2, 96, "e2"))].into();
        script.updates = [Err(overtaken()), Ok(holder(2, 96, "e3"))].into();
    }
    let outcome = apply(&controller, GROWN, &["--yes"]).await;
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    let wanted = [
        r#"update_volume v1 ["size_mib"] 96"#,
        r#"update_vm e1 ["description", "spec.disks"] ["tier=front"]"#,
        r#"update_vm e2 ["description", "spec.disks"] ["tier=front"]"#,
    ];
    assert_eq!(changes(&controller), wanted);
    // What the volume has become is kept.
    let asked = controller.fake.script().updated.pop().unwrap();
    assert_eq!(asked.spec.unwrap().disks[1].size_mib, 96);
}

#[tokio::test]
async fn what_somebody_else_changed_of_what_was_shown_is_left_alone() {
    // The volume grew further, other processors, another label: each is another's change.
    let mut labelled = holder(2, 96, "e2");
    labelled.labels.insert("tier".into(), "back".into());
    for other in [holder(2, 128, "e2"), holder(3, 96, "e2"), labelled] {
        let controller = Controller::start();
        {
            let mut script = controller.fake.script();
            script.volumes = [Ok(ledger(64, "v1")), Ok(ledger(96, "v2"))].into();
            script.vms = [Ok(holder(2, 64, "e1")), Ok(other)].into();
            script.updates = [Err(overtaken()), Ok(holder(2, 96, "e3"))].into();
        }
        let outcome = apply(&controller, GROWN, &["--yes"]).await;
        assert_eq!(outcome.code, 4, "{}", outcome.err);
        assert!(outcome.err.contains("ETAG_MISMATCH"), "{}", outcome.err);
        assert_eq!(controller.fake.script().updates.len(), 1);
    }
}

/// A VM that has not all of its memory yet.
fn waiting(generation: u64, observed: u64) -> v1::Vm {
    let mut vm = applied();
    vm.generation = generation;
    let status = vm.status.as_mut().unwrap();
    status.observed_generation = observed;
    if observed == generation {
        status.pending_changes = vec![v1::PendingChange {
            field: "vcpus".into(),
            current: "1".into(),
            wanted: "2".into(),
            message: "at its next start".into(),
        }];
    }
    vm
}

#[tokio::test]
async fn what_a_vm_does_not_have_yet_is_said_of_one_that_was_changed_and_of_one_that_is_as_declared() {
    let controller = Controller::start();
    let old = {
        let mut vm = waiting(1, 0);
        vm.spec.as_mut().unwrap().vcpus = 1;
        vm
    };
    {
        let mut script = controller.fake.script();
        // Compared; changed; asked after until its host has seen it; compared again.
        script.vms = [
            Ok(old.clone()),
            Ok(waiting(2, 1)),
            Ok(waiting(2, 2)),
            Ok(waiting(2, 2)),
        ]
        .into();
        script.updates.push_back(Ok(waiting(2, 1)));
    }
    let changed = apply(&controller, FILE, &["--yes"]).await;
    assert_eq!(changed.code, 0, "{}", changed.err);
    insta::assert_snapshot!(changed.err, @r"
    0 to make, 1 to change, 0 as declared
    changed VM web
    VM web does not have all of it yet
    pending: vcpus is 1, to be 2: at its next start
    ");
    let same = apply(&controller, FILE, &[]).await;
    assert_eq!((same.code, same.out.as_str()), (0, ""), "{}", same.err);
    insta::assert_snapshot!(same.err, @r"
    VM web is as declared, but does not have all of it yet
    pending: vcpus is 1, to be 2: at its next start
    0 to make, 0 to change, 1 as declared
    ");
    // Not waited for, it is not asked after.
    controller.fake.script().vms.push_back(Ok(old));
    controller.fake.script().updates.push_back(Ok(waiting(2, 1)));
    let accepted = apply(&controller, FILE, &["--yes", "--no-wait"]).await;
    assert_eq!(accepted.code, 0, "{}", accepted.err);
    assert!(!accepted.err.contains("pending"), "{}", accepted.err);
}

const APART: &str = "\
placementGroups:
- {name: apart, rule: PLACEMENT_RULE_ANTI_AFFINITY, topologyKey: rack, preferred: false}
vms:
- name: web
  placementGroups: [apart]
  spec: {vcpus: 1, memoryMib: 256, disks: [{name: root, image: debian, sizeMib: 1024}]}
";

fn apart() -> v1::PlacementGroup {
    v1::PlacementGroup {
        name: "apart".into(),
        rule: v1::PlacementRule::AntiAffinity.into(),
        topology_key: "rack".into(),
        vms: vec!["web".into()],
        ..Default::default()
    }
}

#[tokio::test]
async fn a_placement_group_is_made_before_the_vm_that_is_in_it() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        let none = reason::status(Code::NotFound, "PLACEMENT_GROUP_NOT_FOUND", "there is none");
        script.placement_groups = [Err(none), Ok(apart()), Ok(apart())].into();
        script.vms = [Err(missing()), Ok(applied())].into();
        script
            .changes
            .push_back(Ok(operation(Kind::CreateVm, State::Pending)));
        script
            .waits
            .push_back(Ok(operation(Kind::CreateVm, State::Succeeded)));
    }
    let outcome = apply(&controller, APART, &["--yes"]).await;
    assert_eq!(
        (outcome.code, outcome.out.as_str()),
        (0, "+ placement group apart\n+ VM web\n"),
        "{}",
        outcome.err
    );
    let made = changes(&controller);
    assert_eq!(
        made[0],
        r#"create_placement_group apart PLACEMENT_RULE_ANTI_AFFINITY false "rack""#
    );
    assert!(made[1].starts_with("create_vm web "), "{made:?}");
}

#[tokio::test]
async fn a_placement_group_that_is_there_is_as_declared_or_the_file_is_refused() {
    let controller = Controller::start();
    for (there, text, expected) in [
        (
            apart(),
            "placementGroups: [{name: apart}]",
            Ok("0 to make, 0 to change, 1 as declared"),
        ),
        (
            apart(),
            "placementGroups: [{name: apart, rule: PLACEMENT_RULE_ANTI_AFFINITY, topologyKey: rack, preferred: false, vms: [db]}]",
            Ok("0 to make, 0 to change, 1 as declared"),
        ),
        (
            apart(),
            "placementGroups: [{name: apart, rule: PLACEMENT_RULE_AFFINITY, topologyKey: ''}]",
            Err("placement group apart exists already and its rule, topologyKey cannot be changed"),
        ),
        (
            v1::PlacementGroup {
                preferred: true,
                ..apart()
            },
            "placementGroups: [{name: apart, preferred: false}]",
            Err("placement group apart exists already and its preferred cannot be changed"),
        ),
    ] {
        controller.fake.script().placement_groups.push_back(Ok(there));
        let outcome = apply(&controller, text, &["--yes"]).await;
        let (code, said) = match expected {
            Ok(said) => (0, said),
            Err(said) => (2, said),
        };
        assert!(
            outcome.code == code && outcome.err.contains(said),
            "{text}: {}",
            outcome.err
        );
    }
    assert_eq!(changes(&controller), [""; 0]);
    let none = reason::status(Code::NotFound, "PLACEMENT_GROUP_NOT_FOUND", "there is none");
    controller.fake.script().placement_groups.push_back(Err(none));
    let refused = apply(&controller, "placementGroups: [{name: apart}]", &["--yes"]).await;
    assert!(
        refused.code == 2
            && refused
                .err
                .contains("placement group apart: rule: must be AFFINITY"),
        "{}",
        refused.err
    );
}
