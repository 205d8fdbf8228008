//! `dalgu.v1.SnapshotService`.

use dalgu_proto::{
    ids::{SnapshotName, VmName},
    reason,
    v1::{self, snapshot_service_server::SnapshotService},
};
use tonic::{Request, Response, Status};

use super::{Services, request, vm::vm_name, wire};
use crate::{
    model::VmRecord,
    state::State,
    verbs::{Error, snapshot},
};

const MAX_DESCRIPTION: usize = 1024;

type Answer = Result<Response<v1::Operation>, Status>;

fn snapshot_name(field: &str, value: &str) -> Result<SnapshotName, Status> {
    value
        .parse()
        .map_err(|error: dalgu_proto::ids::Error| reason::invalid(field, error.to_string()))
}

fn find<'a>(state: &'a State, name: &VmName) -> Result<&'a VmRecord, Error> {
    let vm = state.vm_by_name(name);
    Ok(vm.ok_or_else(|| Error::VmNotFound(name.to_string()))?)
}

/// Checks a snapshot to be made.
fn create(services: &Services, snapshot: &v1::Snapshot) -> Result<snapshot::Create, Status> {
    let output_only = [
        ("snapshot.uid", !snapshot.uid.is_empty()),
        ("snapshot.state", snapshot.state != 0),
        ("snapshot.quiesced", snapshot.quiesced),
        ("snapshot.written_bytes", snapshot.written_bytes != 0),
        ("snapshot.create_time", snapshot.create_time.is_some()),
        ("snapshot.etag", !snapshot.etag.is_empty()),
        ("snapshot.layer", snapshot.layer != 0),
    ];
    if let Some((field, _)) = output_only.iter().find(|(_, set)| *set) {
        return Err(reason::invalid(field, "is set by the controller: leave it empty"));
    }
    let description = snapshot.description.clone();
    Ok(snapshot::Create {
        name: snapshot_name("snapshot.name", &snapshot.name)?,
        labels: request::labels("snapshot.labels", &snapshot.labels)?,
        description: request::text("snapshot.description", description, MAX_DESCRIPTION)?,
        policy: services.config.placement.policy(),
    })
}

#[tonic::async_trait]
impl SnapshotService for Services {
    async fn get_snapshot(
        &self,
        request: Request<v1::GetSnapshotRequest>,
    ) -> Result<Response<v1::Snapshot>, Status> {
        let m = request.into_inner();
        let (vm, name) = (vm_name("vm", &m.vm)?, snapshot_name("name", &m.name)?);
        let state = self.db.snapshot();
        let vm = find(&state, &vm)?;
        // Also one that is being deleted, as long as nobody has taken its place.
        let known = vm.snapshots.all.iter().rev().find(|one| one.name == name);
        let known = known.ok_or_else(|| Error::SnapshotNotFound {
            vm: vm.name.clone(),
            name,
        })?;
        Ok(Response::new(wire::snapshot(&state, vm, known)))
    }

    async fn list_snapshots(
        &self,
        request: Request<v1::ListSnapshotsRequest>,
    ) -> Result<Response<v1::ListSnapshotsResponse>, Status> {
        let name = vm_name("vm", &request.get_ref().vm)?;
        let state = self.db.snapshot();
        let vm = find(&state, &name)?;
        let all = vm.snapshots.all.iter();
        Ok(Response::new(v1::ListSnapshotsResponse {
            snapshots: all.map(|one| wire::snapshot(&state, vm, one)).collect(),
        }))
    }

    async fn create_snapshot(&self, request: Request<v1::CreateSnapshotRequest>) -> Answer {
        let message = request.get_ref();
        let given = message
            .snapshot
            .as_ref()
            .ok_or_else(|| reason::invalid("snapshot", "must be given"))?;
        let new = create(self, given)?;
        let vm = vm_name("snapshot.vm", &given.vm)?;
        let content = format!(
            "CreateSnapshot {vm} {} {:?} {:?}",
            new.name, new.labels, new.description
        );
        let caller = request::caller(&request, &message.request_id, &content)?;
        self.operation(caller, |tx, caller| {
            snapshot::create(tx, caller, vm.as_str(), new)
        })
        .await
    }

    async fn delete_snapshot(&self, request: Request<v1::DeleteSnapshotRequest>) -> Answer {
        let m = request.get_ref();
        let (vm, name) = (vm_name("vm", &m.vm)?, snapshot_name("name", &m.name)?);
        let content = format!("DeleteSnapshot {vm} {name} {:?}", m.etag);
        let caller = request::caller(&request, &m.request_id, &content)?;
        let etag = m.etag.clone();
        self.operation(caller, |tx, caller| {
            snapshot::delete(tx, caller, vm.as_str(), &name, &etag)
        })
        .await
    }

    async fn revert_snapshot(&self, request: Request<v1::RevertSnapshotRequest>) -> Answer {
        let m = request.get_ref();
        let (vm, name) = (vm_name("vm", &m.vm)?, snapshot_name("name", &m.name)?);
        let content = format!("RevertSnapshot {vm} {name} {:?} {}", m.etag, m.discard_later);
        let caller = request::caller(&request, &m.request_id, &content)?;
        let (etag, discard) = (m.etag.clone(), m.discard_later);
        self.operation(caller, |tx, caller| {
            snapshot::revert(tx, caller, vm.as_str(), &name, &etag, discard)
        })
        .await
    }
}
