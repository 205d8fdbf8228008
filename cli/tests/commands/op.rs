//! `dalgu op`: operations that are waited for and given up.

use dalgu_proto::reason;
use tonic::{Code, Status};

use super::{ID, Kind, State, common::Controller, operation};

#[tokio::test]
async fn an_operation_that_has_ended_is_told_and_not_waited_for() {
    let controller = Controller::start();
    controller.fake.script().waits = [
        Ok(operation(Kind::StopVm, State::Succeeded)),
        Ok(operation(Kind::StopVm, State::Failed)),
    ]
    .into();
    let on_a_screen = |term: &mut dalgu::output::Term| {
        term.err_screen = true;
        // Asked for where waiting begins, together with the bar.
        term.interrupt = || panic!("it waits");
    };
    let done = controller.run_on(&["op", "wait", ID], on_a_screen).await;
    assert_eq!((done.code, done.err.as_str()), (0, "stopped web in 2.0 s\n"));
    let failed = controller.run_on(&["op", "wait", ID], on_a_screen).await;
    assert_eq!(failed.code, 8, "{}", failed.err);
    assert!(
        failed.err.starts_with("error: stopping web failed"),
        "{}",
        failed.err
    );
    assert!(controller.fake.script().seen.is_empty());
}

#[tokio::test]
async fn cancelling_succeeds_when_the_operation_ends_cancelled() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        let ended = || Ok(operation(Kind::MigrateVm, State::Succeeded));
        script.cancels = [Ok(operation(Kind::MigrateVm, State::Cancelled)), ended()].into();
    }
    assert_eq!(controller.run(&["op", "cancel", ID]).await.code, 0);
    let late = controller.run(&["op", "cancel", ID]).await;
    assert_eq!(late.code, 5, "{}", late.err);
}

#[tokio::test]
async fn cancelling_what_has_ended_is_an_error_unless_it_ended_cancelled() {
    let refused = |why: &str| Err(reason::status(Code::FailedPrecondition, "NOT_CANCELLABLE", why));
    let controller = Controller::start();
    let states = [
        State::Cancelled,
        State::Cancelled,
        State::Succeeded,
        State::Failed,
    ];
    {
        let mut script = controller.fake.script();
        script.cancels = states.map(|_| refused("operation has ended already")).into();
        script.waits = states.map(|state| Ok(operation(Kind::MigrateVm, state))).into();
    }
    let cancel = ["op", "cancel", ID];
    let again = controller.run(&cancel).await;
    assert_eq!(
        (again.code, again.out.as_str(), again.err),
        (0, "", format!("{ID} was already cancelled\n"))
    );
    let again = controller
        .run(&["op", "cancel", ID, "--no-wait", "-o", "json"])
        .await;
    assert_eq!(again.code, 0, "{}", again.err);
    assert!(
        again.out.contains("\"OPERATION_STATE_CANCELLED\""),
        "{}",
        again.out
    );
    for end in ["succeeded", "failed"] {
        let late = controller.run(&cancel).await;
        let wanted = format!("error: operation {ID} had {end} before it could be cancelled\n");
        assert_eq!((late.code, late.err), (5, wanted));
    }
}

#[tokio::test]
async fn an_operation_that_goes_on_and_cannot_be_cancelled_is_refused_with_the_reason() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        let why = "the migration has cut over and cannot be cancelled";
        let refused = || Err(reason::status(Code::FailedPrecondition, "NOT_CANCELLABLE", why));
        script.cancels = [refused(), refused()].into();
        script
            .waits
            .push_back(Ok(operation(Kind::MigrateVm, State::Running)));
        script.waits.push_back(Err(Status::internal("unreadable")));
    }
    for _ in 0..2 {
        let outcome = controller.run(&["op", "cancel", ID]).await;
        assert_eq!(outcome.code, 5);
        assert!(
            outcome.err.starts_with(
                "error: the migration has cut over and cannot be cancelled (NOT_CANCELLABLE)\nhint: "
            ),
            "{}",
            outcome.err
        );
    }
}
