//! Waiting, of every command that starts an operation: what is repeated, what ends it.

use std::time::Duration;

use dalgu_proto::{reason, v1};
use tonic::{Code, Status};

use super::{ID, Kind, State, common::Controller, operation};

#[tokio::test]
async fn a_request_is_repeated_with_its_id_while_the_controller_is_away() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        script.changes = [
            Err(Status::unavailable("starting")),
            Err(Status::unavailable("starting")),
            Ok(operation(Kind::StartVm, State::Pending)),
        ]
        .into();
    }
    let outcome = controller.run(&["vm", "start", "web", "--no-wait"]).await;
    assert_eq!((outcome.code, outcome.out), (0, format!("{ID}\n")));
    let seen = &controller.fake.script().seen;
    assert_eq!(seen.len(), 3);
    assert!(seen.iter().all(|call| *call == seen[0]), "{seen:?}");
    assert_eq!(
        seen[0].split(' ').nth(2).unwrap().len(),
        36,
        "no request id in {seen:?}"
    );
}

#[tokio::test]
async fn an_error_that_is_no_lost_connection_is_not_repeated() {
    let controller = Controller::start();
    controller
        .fake
        .script()
        .changes
        .push_back(Err(reason::status(Code::Internal, "STORE", "disk full")));
    let outcome = controller.run(&["vm", "start", "web"]).await;
    assert_eq!(
        (outcome.code, outcome.err.as_str()),
        (1, "error: disk full (STORE)\n")
    );
    assert_eq!(controller.fake.script().seen.len(), 1);
}

#[tokio::test]
async fn waiting_outlives_a_controller_that_is_killed_and_comes_back() {
    let mut controller = Controller::start();
    {
        let mut script = controller.fake.script();
        script
            .changes
            .push_back(Ok(operation(Kind::StopVm, State::Pending)));
        script.hang = true;
    }
    let fake = controller.fake.clone();
    let command = controller.command(&["vm", "stop", "web"]);
    let restart = async {
        let asked = || fake.script().seen.iter().any(|call| call == "wait_operation");
        while !asked() {
            tokio::task::yield_now().await;
        }
        controller.kill();
        tokio::time::sleep(Duration::from_millis(100)).await;
        let mut script = fake.script();
        script.hang = false;
        script
            .waits
            .push_back(Ok(operation(Kind::StopVm, State::Succeeded)));
        drop(script);
        controller.serve();
    };
    let (outcome, ()) = tokio::join!(command, restart);
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    insta::assert_snapshot!(outcome.err, @r"
    stopping web: accepted
    the connection to the controller was lost; trying again
    connected again
    stopped web in 2.0 s
    ");
}

#[tokio::test]
async fn giving_up_waiting_says_how_to_go_on() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        script
            .changes
            .push_back(Ok(operation(Kind::StopVm, State::Running)));
        script
            .waits
            .push_back(Ok(operation(Kind::StopVm, State::Running)));
    }
    let outcome = controller.run(&["vm", "stop", "web", "--timeout", "200ms"]).await;
    assert_eq!(outcome.code, 7);
    insta::assert_snapshot!(outcome.err, @r"
    stopping web
    error: operation 6f2c3c5e-0000-4000-8000-000000000001 has not ended within 200 ms; it goes on
    hint: wait for it with `dalgu op wait 6f2c3c5e-0000-4000-8000-000000000001`, or give it up with `dalgu op cancel 6f2c3c5e-0000-4000-8000-000000000001`
    ");
}

#[tokio::test]
async fn an_interruption_leaves_the_operation_alone_and_says_so() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        script
            .changes
            .push_back(Ok(operation(Kind::MigrateVm, State::Running)));
        script
            .waits
            .push_back(Ok(operation(Kind::MigrateVm, State::Running)));
    }
    let interrupt = |term: &mut dalgu::output::Term| {
        term.interrupt = || Box::pin(tokio::time::sleep(Duration::from_millis(100)));
    };
    let outcome = controller.run_on(&["vm", "migrate", "web"], interrupt).await;
    assert_eq!(outcome.code, 130);
    assert!(
        outcome.err.contains(&format!(
            "error: interrupted; operation {ID} goes on\nhint: wait for it with `dalgu op wait {ID}`"
        )),
        "{}",
        outcome.err
    );
}

#[tokio::test]
async fn an_operation_that_fails_fails_the_command() {
    let controller = Controller::start();
    let mut failed = operation(Kind::StartVm, State::Failed);
    let error = v1::OperationError {
        code: 13,
        reason: "START_FAILED".into(),
        message: "no such bridge br7".into(),
    };
    failed.error = Some(error);
    controller.fake.script().changes.push_back(Ok(failed));
    let outcome = controller.run(&["vm", "start", "web", "-o", "json"]).await;
    assert_eq!(outcome.code, 8);
    assert!(
        outcome.out.contains("\"OPERATION_STATE_FAILED\""),
        "{}",
        outcome.out
    );
    insta::assert_snapshot!(outcome.err, @r"
    error: starting web failed: no such bridge br7 (START_FAILED)
    hint: `dalgu vm events web` shows what happened
    ");
}
