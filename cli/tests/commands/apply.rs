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
            r#"update_security_group  ["rules"] [0, 0]"#
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
