//! Snapshots on the wire.

use dalgu_proto::{time, v1};

use crate::{
    model::{SnapshotRecord, SnapshotState, VmRecord},
    state::State,
    verbs,
};

/// A snapshot of a VM.
pub fn snapshot(state: &State, vm: &VmRecord, snapshot: &SnapshotRecord) -> v1::Snapshot {
    let seen = state.observation(vm);
    let there = seen.and_then(|seen| seen.snapshot(snapshot.layer));
    let is = match snapshot.state(seen.map(AsRef::as_ref)) {
        SnapshotState::Creating => v1::SnapshotState::Creating,
        SnapshotState::Ready => v1::SnapshotState::Ready,
        SnapshotState::Deleting => v1::SnapshotState::Deleting,
        SnapshotState::Lost => v1::SnapshotState::Lost,
    };
    v1::Snapshot {
        name: snapshot.name.to_string(),
        vm: vm.name.to_string(),
        uid: snapshot.id.to_string(),
        state: is.into(),
        quiesced: snapshot.quiesced,
        written_bytes: there.map_or(0, |there| there.written_bytes),
        create_time: Some(time::to_wire(snapshot.create_time)),
        description: snapshot.description.clone(),
        labels: snapshot.labels.clone().into_iter().collect(),
        etag: verbs::snapshot::etag(snapshot),
        layer: snapshot.layer,
    }
}
