//! `dalgu.v1.VolumeService`.

use std::ops::Bound;

use dalgu_proto::{
    ids::VolumeName,
    reason,
    v1::{self, volume_service_server::VolumeService},
    vm::{DISK_MIB, Disk},
};
use tonic::{Request, Response, Status};

use super::{Services, page::Page, request, wire};
use crate::{
    model::Outcome,
    state::Tx,
    verbs::{
        self, Caller, Error,
        volume::{self, Create, Update},
    },
};

const MAX_DESCRIPTION: usize = 1024;
const MUTABLE: [&str; 3] = ["labels", "description", "size_mib"];
const MUTABLE_TEXT: &str = "labels, description, size_mib";

fn volume_name(field: &str, value: &str) -> Result<VolumeName, Status> {
    value
        .parse()
        .map_err(|error: dalgu_proto::ids::Error| reason::invalid(field, error.to_string()))
}

/// Checks a volume to be made.
fn create(volume: &v1::Volume) -> Result<Create, Status> {
    let output_only = [
        ("volume.uid", !volume.uid.is_empty()),
        ("volume.image_digest", !volume.image_digest.is_empty()),
        ("volume.firmware", volume.firmware != 0),
        ("volume.status", volume.status.is_some()),
        ("volume.etag", !volume.etag.is_empty()),
        ("volume.create_time", volume.create_time.is_some()),
        ("volume.delete_time", volume.delete_time.is_some()),
        ("volume.purge_time", volume.purge_time.is_some()),
    ];
    if let Some((field, _)) = output_only.iter().find(|(_, set)| *set) {
        return Err(reason::invalid(field, "is set by the controller: leave it empty"));
    }
    let disk = Disk::try_from(volume)
        .map_err(|invalid| reason::invalid(&format!("volume.{}", invalid.field), invalid.message))?;
    Ok(Create {
        name: volume_name("volume.name", &volume.name)?,
        disk,
        labels: request::labels("volume.labels", &volume.labels)?,
        description: request::text("volume.description", volume.description.clone(), MAX_DESCRIPTION)?,
    })
}

/// Checks a change of a volume.
fn update(services: &Services, volume: &v1::Volume, paths: &[String]) -> Result<Update, Status> {
    let mut update = Update {
        policy: services.config.placement.policy(),
        ..Update::default()
    };
    for path in paths {
        match path.as_str() {
            "labels" => update.labels = Some(request::labels("volume.labels", &volume.labels)?),
            "description" => {
                let text = volume.description.clone();
                update.description = Some(request::text("volume.description", text, MAX_DESCRIPTION)?);
            }
            _ if !DISK_MIB.contains(&volume.size_mib) => {
                let (least, most) = (DISK_MIB.start(), DISK_MIB.end());
                let message = format!("must be {least} to {most} MiB, got {}", volume.size_mib);
                return Err(reason::invalid("volume.size_mib", message));
            }
            _ => update.size_mib = Some(volume.size_mib),
        }
    }
    Ok(update)
}

impl Services {
    /// Does a verb once, and answers with its volume.
    async fn volume(
        &self,
        caller: Caller,
        change: impl FnOnce(&mut Tx, &Caller) -> Result<Outcome, Error>,
    ) -> Result<Response<v1::Volume>, Status> {
        // As it was stored: without a grace period it may be gone a moment later.
        let record = self
            .db
            .transact(|tx| {
                let Outcome::Volume(name) = verbs::once(tx, &caller, |tx| change(tx, &caller))? else {
                    return Err(Error::RequestReused(caller.request_id.clone()));
                };
                volume::find(tx, &name)
            })
            .await?;
        Ok(Response::new(wire::volume(&self.db.snapshot(), &record)))
    }
}

#[tonic::async_trait]
impl VolumeService for Services {
    async fn get_volume(
        &self,
        request: Request<v1::GetVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let name = volume_name("name", &request.get_ref().name)?;
        let state = self.db.snapshot();
        let volume = volume::find(&state, &name)?;
        Ok(Response::new(wire::volume(&state, &volume)))
    }

    async fn list_volumes(
        &self,
        request: Request<v1::ListVolumesRequest>,
    ) -> Result<Response<v1::ListVolumesResponse>, Status> {
        let m = request.into_inner();
        let selector = request::labels("label_selector", &m.label_selector)?;
        let page = Page::of(m.page_size, &m.page_token, &format!("volumes {selector:?}"))?;
        let from = match &page.after {
            Some(name) => Bound::Excluded(volume_name("page_token", name)?),
            None => Bound::Unbounded,
        };
        let state = self.db.snapshot();
        let found = state.volumes.range((from, Bound::Unbounded)).map(|(_, one)| one);
        let found = found.filter(|one| crate::model::matches(&one.labels, &selector));
        let (volumes, next_page_token) = page.take(found, |one| one.name.to_string());
        let volumes = volumes.into_iter().map(|one| wire::volume(&state, one));
        Ok(Response::new(v1::ListVolumesResponse {
            volumes: volumes.collect(),
            next_page_token,
            resource_version: state.meta.revision,
        }))
    }

    async fn create_volume(
        &self,
        request: Request<v1::CreateVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let m = request.get_ref();
        let volume = m.volume.as_ref();
        let new = create(volume.ok_or_else(|| reason::invalid("volume", "must be given"))?)?;
        let caller = request::caller(&request, &m.request_id, &format!("CreateVolume {new:?}"))?;
        self.volume(caller, |tx, caller| volume::create(tx, caller, new))
            .await
    }

    async fn update_volume(
        &self,
        request: Request<v1::UpdateVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let m = request.get_ref();
        let new = m.volume.as_ref();
        let new = new.ok_or_else(|| reason::invalid("volume", "must be given"))?;
        let paths = request::mask(m.update_mask.clone(), &MUTABLE, MUTABLE_TEXT)?;
        let name = volume_name("volume.name", &new.name)?;
        let change = update(self, new, &paths)?;
        let content = format!("UpdateVolume {name} {:?} {change:?}", new.etag);
        let caller = request::caller(&request, &m.request_id, &content)?;
        let etag = new.etag.clone();
        self.volume(caller, |tx, caller| {
            volume::update(tx, caller, &name, &etag, change)
        })
        .await
    }

    async fn delete_volume(
        &self,
        request: Request<v1::DeleteVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let m = request.get_ref();
        let name = volume_name("name", &m.name)?;
        let content = format!("DeleteVolume {name} {:?}", m.etag);
        let caller = request::caller(&request, &m.request_id, &content)?;
        let (etag, grace) = (m.etag.clone(), self.config.volume_grace());
        self.volume(caller, |tx, caller| {
            volume::delete(tx, caller, &name, &etag, grace)
        })
        .await
    }

    async fn undelete_volume(
        &self,
        request: Request<v1::UndeleteVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let m = request.get_ref();
        let name = volume_name("name", &m.name)?;
        let content = format!("UndeleteVolume {name} {:?}", m.etag);
        let caller = request::caller(&request, &m.request_id, &content)?;
        let etag = m.etag.clone();
        self.volume(caller, |tx, caller| volume::undelete(tx, caller, &name, &etag))
            .await
    }
}
