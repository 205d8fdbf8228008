//! What can be wrong with any command: its usage, the configuration, the connection, a refusal.

use dalgu_proto::reason;
use tonic::Code;

use super::common::{self, Controller};

#[tokio::test]
async fn every_kind_of_refusal_has_its_exit_code_and_a_next_step() {
    let cases = [
        (Code::NotFound, "VM_NOT_FOUND", 3, "dalgu vm list"),
        (Code::AlreadyExists, "VM_ALREADY_EXISTS", 4, "another name"),
        (Code::NotFound, "IMAGE_NOT_FOUND", 3, "dalgu image list"),
        (Code::FailedPrecondition, "IMAGE_IN_USE", 5, "dalgu image get"),
        (Code::AlreadyExists, "IMAGE_ALREADY_EXISTS", 4, "another version"),
        (Code::AlreadyExists, "REQUEST_ID_REUSED", 4, "--request-id"),
        (Code::AlreadyExists, "MAC_IN_USE", 4, "leave `mac` out"),
        (Code::FailedPrecondition, "MAC_IN_USE", 5, "leave `mac` out"),
        (Code::Aborted, "ETAG_MISMATCH", 4, "dalgu vm show"),
        (Code::FailedPrecondition, "VM_RUNNING", 5, "--force"),
        (Code::FailedPrecondition, "VM_NOT_RUNNING", 5, "dalgu vm resume"),
        (Code::FailedPrecondition, "SAME_HOST", 5, "--to"),
        (
            Code::FailedPrecondition,
            "MIGRATION_IN_PROGRESS",
            5,
            "dalgu op list --active",
        ),
        (Code::ResourceExhausted, "BUSY", 5, "try again"),
        (Code::PermissionDenied, "NOT_ALLOWED", 6, "dalgu context show"),
        (Code::Unauthenticated, "NO_CERTIFICATE", 6, "dalgu context show"),
    ];
    let controller = Controller::start();
    for (code, why, exit, step) in cases {
        controller
            .fake
            .script()
            .changes
            .push_back(Err(reason::status(code, why, "no")));
        let outcome = controller.run(&["vm", "delete", "web"]).await;
        assert_eq!(outcome.code, exit, "{why}: {}", outcome.err);
        let hint = outcome.err.lines().nth(1).unwrap_or_default();
        assert!(
            hint.starts_with("hint: ") && hint.contains(step),
            "{why}: {}",
            outcome.err
        );
    }
    controller
        .fake
        .script()
        .changes
        .push_back(Err(reason::invalid("vm.spec.vcpus", "must be 1 to 254, got 0")));
    let outcome = controller.run(&["vm", "create", "web", "--vcpus", "0"]).await;
    assert_eq!(
        (outcome.code, outcome.err.as_str()),
        (
            2,
            "error: vm.spec.vcpus: must be 1 to 254, got 0 (INVALID_FIELD)\n"
        )
    );
}

#[tokio::test]
async fn a_controller_that_is_not_there_is_named_with_a_next_step() {
    let mut controller = Controller::start();
    controller.kill();
    let outcome = controller.run(&["vm", "list"]).await;
    assert_eq!(outcome.code, 6);
    assert!(
        outcome
            .err
            .starts_with("error: cannot reach the controller at unix:/"),
        "{}",
        outcome.err
    );
    assert!(
        outcome.err.contains("hint: there is no such socket") && outcome.err.contains("dalgu context show"),
        "{}",
        outcome.err
    );
}

#[tokio::test]
async fn a_missing_configuration_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.toml");
    let outcome = common::run(&config, &["--context", "lab"], &["vm", "list"], |_| {}).await;
    assert_eq!(outcome.code, 2);
    let shown = outcome.err.replace(dir.path().to_str().unwrap(), "DIR");
    insta::assert_snapshot!(shown, @r"
    error: no configuration: DIR/config.toml does not exist
    hint: write DIR/config.toml (`dalgu context --help` shows an example), or name a controller with --endpoint
    ");
}

#[tokio::test]
async fn wrong_usage_is_told_before_anything_is_asked() {
    let controller = Controller::start();
    for args in [
        &["vm", "create", "web", "--memory", "256"][..],
        &["vm", "create", "web", "--disk", "root"],
        &["vm", "create"],
        &["vm", "create", "web", "--initrd", "i"],
        &["vm", "create", "-f", "x.yaml", "--vcpus", "2"],
        &["vm", "stop", "web", "--force", "--grace", "5s"],
        &["vm", "stop", "web", "--grace", "0s"],
        &["vm", "migrate", "web", "--max-downtime", "0ms"],
        &["vm", "start", "web", "--request-id", "x"],
        &["vm", "update", "web"],
        &["explain", "web", "--vcpus", "2"],
        &["host", "label", "h1"],
        &["explain"],
        &["explain", "--memory", "8GiB"],
        &["vm", "create", "web", "--memory", "-5"],
    ] {
        assert_eq!(controller.run(args).await.code, 2, "{args:?}");
    }
    assert!(controller.fake.script().seen.is_empty());
}
