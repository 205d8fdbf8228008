//! `dalgu volume`: what is said of a deletion.

use dalgu_proto::v1::{self, VolumeState};

use super::{ago, common::Controller};

/// A volume that was deleted a moment ago, and is purged so many seconds after that.
fn deleted(grace: i64, state: VolumeState) -> v1::Volume {
    let delete_time = ago(1);
    let purge_time = delete_time.map(|time| prost_types::Timestamp {
        seconds: time.seconds + grace,
        ..time
    });
    v1::Volume {
        name: "ledger".into(),
        status: Some(v1::VolumeStatus {
            state: state.into(),
            ..Default::default()
        }),
        delete_time,
        purge_time,
        ..Default::default()
    }
}

#[tokio::test]
async fn a_deletion_is_said_to_have_a_way_back_only_where_it_has_one() {
    for (grace, state, back) in [
        (3600, VolumeState::Deleted, true),
        (0, VolumeState::Deleted, false),
        (3600, VolumeState::Purging, false),
    ] {
        let controller = Controller::start();
        controller
            .fake
            .script()
            .volumes
            .push_back(Ok(deleted(grace, state)));
        let outcome = controller.run(&["volume", "delete", "ledger"]).await;
        assert_eq!(outcome.code, 0, "{}", outcome.err);
        let said = (
            outcome
                .err
                .contains("`dalgu volume undelete ledger` takes that back"),
            outcome.err.contains("there is no way back"),
        );
        assert_eq!(said, (back, !back), "{grace} {state:?}: {}", outcome.err);
    }
}
