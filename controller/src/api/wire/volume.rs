//! From volumes to the messages of the operator API.

use dalgu_proto::{time, v1, vm::Disk};

use crate::{
    model::VolumeRecord,
    state::State,
    verbs::etag,
    volumes::{self, VolumeState},
};

/// A volume.
pub fn volume(state: &State, record: &VolumeRecord) -> v1::Volume {
    let vm = volumes::holder(state, record.id);
    let is_it = |disk: &&Disk| disk.volume_id() == Some(record.id);
    let disk = vm.and_then(|vm| vm.spec.disks.iter().find(is_it).cloned());
    let like = record.as_disk(&Disk {
        name: String::new(),
        size_mib: 0,
        pool: String::new(),
        image: None,
        format: record.format,
        digest: None,
        clone_mode: record.clone_mode,
        volume: None,
        limits: Default::default(),
        backup: None,
    });
    let wire = v1::Disk::from(like);
    v1::Volume {
        name: record.name.to_string(),
        uid: record.id.to_string(),
        size_mib: wire.size_mib,
        pool: wire.pool,
        format: wire.format,
        image: wire.image,
        image_digest: wire.image_digest,
        clone_mode: wire.clone_mode,
        labels: record.labels.clone().into_iter().collect(),
        description: record.description.clone(),
        status: Some(v1::VolumeStatus {
            state: state_to_wire(volumes::state_of(state, record)).into(),
            host: record.host.as_ref().map(ToString::to_string).unwrap_or_default(),
            vm: vm.map(|vm| vm.name.to_string()).unwrap_or_default(),
            disk: disk.map(|disk| disk.name).unwrap_or_default(),
        }),
        etag: etag(record.revision),
        create_time: Some(time::to_wire(record.create_time)),
        delete_time: record.delete_time.map(time::to_wire),
        purge_time: record.purge_time.map(time::to_wire),
        firmware: v1::Firmware::from(record.firmware).into(),
    }
}

const fn state_to_wire(state: VolumeState) -> v1::VolumeState {
    match state {
        VolumeState::New => v1::VolumeState::New,
        VolumeState::Available => v1::VolumeState::Available,
        VolumeState::InUse => v1::VolumeState::InUse,
        VolumeState::Deleted => v1::VolumeState::Deleted,
        VolumeState::Purging => v1::VolumeState::Purging,
        VolumeState::HostGone => v1::VolumeState::HostGone,
    }
}
