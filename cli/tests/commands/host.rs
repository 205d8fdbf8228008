//! `dalgu host`.

use std::collections::HashMap;

use dalgu_proto::v1;

use super::common::Controller;

#[tokio::test]
async fn a_host_is_cordoned_with_a_reason_and_a_request_id() {
    let controller = Controller::start();
    let host = || {
        Ok(v1::Host {
            name: "h1".into(),
            cordoned: true,
            labels: HashMap::from([("rack".into(), "a".into())]),
            etag: "e1".into(),
            ..Default::default()
        })
    };
    controller.fake.script().hosts = (0..4).map(|_| host()).collect();
    let id = "6f2c3c5e-0000-4000-8000-00000000000a";
    let outcome = controller
        .run(&[
            "host",
            "cordon",
            "h1",
            "--reason",
            "new disks",
            "--request-id",
            id,
        ])
        .await;
    assert_eq!((outcome.code, outcome.out.as_str()), (0, ""));
    assert_eq!(
        outcome.err,
        "h1 is cordoned; its VMs run on, and it takes no new ones\n"
    );
    let outcome = controller
        .run(&["host", "uncordon", "h1", "-o", "json", "--request-id", id])
        .await;
    assert!(outcome.out.contains("\"cordoned\": true"), "{}", outcome.out);
    let outcome = controller
        .run(&["host", "label", "h1", "rack-", "zone=b", "--request-id", id])
        .await;
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    let wanted = [
        format!("cordon_host h1 new disks {id}"),
        format!("uncordon_host h1 {id}"),
        "get_host h1".to_owned(),
        format!(r#"update_host h1 e1 ["labels"] {{"zone": "b"}} {id}"#),
    ];
    assert_eq!(controller.fake.script().seen, wanted);
}
