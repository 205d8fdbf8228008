//! `dalgu placement-group`, `dalgu capacity`, and what VMs and hosts have of them.

use dalgu_proto::v1;

use super::common::Controller;

fn group() -> v1::PlacementGroup {
    v1::PlacementGroup {
        name: "apart".into(),
        rule: v1::PlacementRule::AntiAffinity.into(),
        topology_key: "rack".into(),
        vms: vec!["web1".into(), "web2".into()],
        ..Default::default()
    }
}

#[tokio::test]
async fn a_group_is_made_shown_listed_and_deleted() {
    let controller = Controller::start();
    controller.fake.script().placement_groups = (0..2).map(|_| Ok(group())).collect();
    let page = |token: &str| {
        Ok(v1::ListPlacementGroupsResponse {
            placement_groups: vec![group()],
            next_page_token: token.into(),
            ..Default::default()
        })
    };
    controller.fake.script().placement_group_lists = [page("more"), page("")].into();
    let create = [
        "placement-group",
        "create",
        "apart",
        "--rule",
        "anti-affinity",
        "--by",
        "rack",
    ];
    let outcome = controller.run(&create).await;
    assert_eq!((outcome.code, outcome.err.as_str()), (0, "created apart\n"));
    let outcome = controller.run(&["placement-group", "get", "apart"]).await;
    assert!(outcome.out.contains("Anti affinity, required"), "{}", outcome.out);
    assert!(
        outcome.out.contains("label rack") && outcome.out.contains("web1, web2"),
        "{}",
        outcome.out
    );
    let outcome = controller.run(&["placement-group", "ls", "-o", "name"]).await;
    assert_eq!(outcome.out.lines().count(), 2, "{}", outcome.out);
    let outcome = controller.run(&["placement-group", "rm", "apart"]).await;
    assert_eq!(outcome.err, "apart is deleted\n");
    let wanted = [
        r#"create_placement_group apart PLACEMENT_RULE_ANTI_AFFINITY false "rack""#,
        "get_placement_group apart",
        r#"list_placement_groups """#,
        r#"list_placement_groups "more""#,
        "delete_placement_group apart",
    ];
    assert_eq!(controller.fake.script().seen, wanted);
}

#[tokio::test]
async fn capacity_says_how_many_fit_and_how_many_so_that_some_may_fail() {
    let controller = Controller::start();
    let domain = |domain: &str, vms| v1::DomainCapacity {
        domain: domain.into(),
        hosts: 2,
        vms,
        held_vms: 3,
    };
    controller.fake.script().capacities = [Ok(v1::Capacity {
        vms: 30,
        vms_keeping: 7,
        domains: vec![domain("a", 10), domain("b", 20)],
        protects: "each host".into(),
        vms_protected: 9,
        short_domains: vec![v1::ShortDomain {
            domain: "host h1".into(),
            vcpus: 4,
            memory_mib: 8192,
        }],
    })]
    .into();
    let ask = [
        "capacity", "--vcpus", "4", "--memory", "16GiB", "--domain", "rack",
    ];
    let outcome = controller.run(&ask).await;
    for line in [
        "Fit now",
        "30",
        "7 with room for any 1 rack",
        "DOMAIN",
        "20",
        "9 with room for each host",
        "host h1 lacks 4 vCPUs, 8 GiB",
    ] {
        assert!(outcome.out.contains(line), "{line}: {}", outcome.out);
    }
    assert_eq!(
        controller.fake.script().seen,
        [r#"estimate_capacity 4 16384 "rack" 1"#]
    );
}

#[tokio::test]
async fn taints_are_put_on_a_host_and_taken_off_among_those_that_are_there() {
    let controller = Controller::start();
    let host = || {
        Ok(v1::Host {
            name: "h1".into(),
            taints: vec![v1::Taint {
                key: "old".into(),
                ..Default::default()
            }],
            etag: "e1".into(),
            ..Default::default()
        })
    };
    controller.fake.script().hosts = (0..4).map(|_| host()).collect();
    let id = "6f2c3c5e-0000-4000-8000-00000000000a";
    let taint = [
        "host",
        "taint",
        "h1",
        "use=db",
        "slow=:prefer",
        "--request-id",
        id,
    ];
    let outcome = controller.run(&taint).await;
    assert_eq!(outcome.err, "h1 is tainted old=; its VMs run on\n");
    let outcome = controller
        .run(&["host", "untaint", "h1", "old", "--request-id", id])
        .await;
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    let wanted = [
        "get_host h1".to_owned(),
        format!(r#"update_host h1 e1 ["taints"] {{}} old= false use=db false slow= true {id}"#),
        "get_host h1".to_owned(),
        format!(r#"update_host h1 e1 ["taints"] {{}} {id}"#),
    ];
    assert_eq!(controller.fake.script().seen, wanted);
    for wrong in ["use", "use=db:hard", "=db"] {
        assert_eq!(
            controller.run(&["host", "taint", "h1", wrong]).await.code,
            2,
            "{wrong}"
        );
    }
}

#[tokio::test]
async fn a_controller_that_knows_no_groups_makes_no_vm_without_one() {
    let controller = Controller::start();
    let unknown = Err(tonic::Status::unimplemented("no such method"));
    controller.fake.script().placement_groups = [unknown].into();
    let create = [
        "vm",
        "create",
        "web",
        "--kernel",
        "k",
        "--placement-group",
        "apart",
    ];
    let outcome = controller.run(&create).await;
    assert_ne!(outcome.code, 0);
    assert_eq!(controller.fake.script().seen, ["get_placement_group apart"]);
}

#[tokio::test]
async fn a_vm_joins_and_leaves_groups_and_one_that_it_is_not_in_is_named_before_anything_is_asked() {
    let controller = Controller::start();
    let vm = || {
        Ok(v1::Vm {
            name: "web".into(),
            placement_groups: vec!["old".into()],
            etag: "r7".into(),
            ..Default::default()
        })
    };
    controller.fake.script().vms = (0..2).map(|_| vm()).collect();
    controller.fake.script().updates = [vm()].into();
    let change = [
        "vm",
        "update",
        "web",
        "--leave-group",
        "old",
        "--join-group",
        "new",
    ];
    let outcome = controller
        .run(&[&change[..], &["--tolerate", "use=db"]].concat())
        .await;
    assert_eq!(outcome.err, "changed web\n");
    let outcome = controller
        .run(&["vm", "update", "web", "--leave-group", "none"])
        .await;
    assert_eq!(outcome.code, 2, "{}", outcome.err);
    assert!(
        outcome.err.contains("web has no placement group none"),
        "{}",
        outcome.err
    );
    assert_eq!(
        controller.fake.script().seen,
        [r#"update_vm r7 ["placement_groups", "tolerations"] []"#]
    );
}
