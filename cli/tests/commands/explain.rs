//! `dalgu explain`.

use dalgu_proto::v1;

use super::common::Controller;

#[tokio::test]
async fn explain_asks_about_the_past_the_present_and_the_imagined() {
    let controller = Controller::start();
    let decision = || {
        Ok(v1::Placement {
            host: "h1".into(),
            summary: "only host".into(),
            ..Default::default()
        })
    };
    controller.fake.script().placements = (0..4).map(|_| decision()).collect();
    let outcome = controller.run(&["explain", "web"]).await;
    assert!(
        outcome.out.starts_with("web is on h1: only host\n"),
        "{}",
        outcome.out
    );
    let outcome = controller.run(&["explain", "web", "--host", "h1"]).await;
    assert!(
        outcome.out.starts_with("web would migrate to h1"),
        "{}",
        outcome.out
    );
    assert_eq!(
        controller
            .run(&["explain", "web", "--move", "-o", "name"])
            .await
            .out,
        "h1\n"
    );
    let outcome = controller
        .run(&[
            "explain",
            "--spec",
            "--vcpus",
            "4",
            "--memory",
            "8GiB",
            "--disk",
            "root=1GiB",
            "--host",
            "h2",
        ])
        .await;
    assert!(
        outcome.out.starts_with("a new VM would go to h1"),
        "{}",
        outcome.out
    );
    let wanted = [
        "get_placement web",
        "explain_placement vm web h1",
        "explain_placement vm web ",
        "explain_placement spec 4 8192 h2",
    ];
    assert_eq!(controller.fake.script().seen, wanted);
}
