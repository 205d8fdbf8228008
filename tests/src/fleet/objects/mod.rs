//! What clients ask about the objects of the site beside its VMs, in seeds that are about these
//! ([`Nature::objects`](super::nature::Nature)): volumes, networks,
//! security groups, images, snapshots, backups; and drains of its hosts. In others ([`Nature::plans`](super::nature::Nature)) they ask for plans.
//!
//! Each request is one of [`Thing`]; what is sent for it follows from it, from a number and from the request's id alone.

mod messages;
pub mod shelf;
pub mod wires;

use std::{collections::BTreeMap, time::Duration};

use dalgu_controller::model::OperationKind;
use dalgu_proto::{host::GuestFeature, v1};
use fastrand::Rng;

pub use self::messages::Message;
use super::plan::{self, Request, Size, Verb};

/// Names of volumes that clients use.
const VOLUMES: usize = 3;
/// The second pool of each host's own.
pub const FAST: &str = "fast";
/// Networks, and as many security groups. So many, and less than what the VMs in one may be.
const NETWORKS: usize = 2;
/// The VMs of these numbers, and of greater ones, have an interface in a network.
pub const CONNECTED: usize = 6;
/// Of so many VMs clients ask for volumes and copies, so that what is asked for is often there.
const WITH_VOLUMES: usize = 4;
/// So many VMs have one.
const CONNECTED_VMS: usize = 4;

/// A request about something else than a VM, or about what a VM has of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "each is the API's method")]
pub enum Thing {
    CreateVolume,
    GrowVolume,
    DeleteVolume,
    UndeleteVolume,
    /// A VM is created that has a volume.
    CreateWithVolume,
    /// A VM gets a volume, and no other.
    Attach,
    /// A VM has no volume any more.
    Detach,
    /// The volume of a VM is to be in the second pool.
    MoveVolume,
    /// It is to be in the first one again.
    ReturnVolume,
    CreateNetwork,
    DeleteNetwork,
    CreateGroup,
    UpdateGroup,
    DeleteGroup,
    CreateImage,
    DeleteImage,
    /// A volume is created that is made from an image.
    CreateFromImage,
    CreateSnapshot,
    DeleteSnapshot,
    RevertSnapshot,
    CreateBackup,
    DeleteBackup,
    /// A VM is created from a backup.
    RestoreBackup,
    /// A host is emptied.
    DrainHost,
    CancelDrain,
    /// What that moved or stopped is brought back.
    RestoreHost,
    /// A plan is made and approved: to put the VMs on fewer hosts, to empty one, or to make room for a great VM.
    CarryOutPlan,
    /// The plan of this number from the newest on is given up.
    CancelPlan,
}

impl Thing {
    /// Whether it is about a VM.
    pub const fn is_of_vm(self) -> bool {
        matches!(
            self,
            Self::CreateWithVolume
                | Self::Attach
                | Self::Detach
                | Self::MoveVolume
                | Self::ReturnVolume
                | Self::CreateSnapshot
                | Self::DeleteSnapshot
                | Self::RevertSnapshot
                | Self::CreateBackup
                | Self::DeleteBackup
                | Self::RestoreBackup
        )
    }

    /// The kind of operation it leads to.
    pub const fn kind(self) -> Option<OperationKind> {
        match self {
            Self::CreateWithVolume | Self::RestoreBackup => Some(OperationKind::Create),
            Self::CreateSnapshot => Some(OperationKind::CreateSnapshot),
            Self::DeleteSnapshot => Some(OperationKind::DeleteSnapshot),
            Self::RevertSnapshot => Some(OperationKind::RevertSnapshot),
            _ => None,
        }
    }

    /// The API's method.
    pub const fn method(self) -> &'static str {
        match self {
            Self::CreateVolume | Self::CreateFromImage => "CreateVolume",
            Self::GrowVolume => "UpdateVolume",
            Self::DeleteVolume => "DeleteVolume",
            Self::UndeleteVolume => "UndeleteVolume",
            Self::CreateWithVolume => "CreateVm",
            Self::Attach | Self::Detach | Self::MoveVolume | Self::ReturnVolume => "UpdateVm",
            Self::CreateNetwork => "CreateNetwork",
            Self::DeleteNetwork => "DeleteNetwork",
            Self::CreateGroup => "CreateSecurityGroup",
            Self::UpdateGroup => "UpdateSecurityGroup",
            Self::DeleteGroup => "DeleteSecurityGroup",
            Self::CreateImage => "CreateImage",
            Self::DeleteImage => "DeleteImage",
            Self::CreateSnapshot => "CreateSnapshot",
            Self::DeleteSnapshot => "DeleteSnapshot",
            Self::RevertSnapshot => "RevertSnapshot",
            Self::CreateBackup => "CreateBackup",
            Self::DeleteBackup => "DeleteBackup",
            Self::RestoreBackup => "RestoreBackup",
            Self::DrainHost => "DrainHost",
            Self::CancelDrain => "CancelHostDrain",
            Self::RestoreHost => "RestoreHost",
            Self::CarryOutPlan => "CreatePlan, ApprovePlan",
            Self::CancelPlan => "CancelPlan",
        }
    }
}

/// What hosts say that their VMs can have.
pub fn features() -> Vec<GuestFeature> {
    let mut all = wires::features();
    all.extend([
        GuestFeature::HotChange,
        GuestFeature::Volume,
        GuestFeature::DiskChange,
        GuestFeature::Snapshot,
        GuestFeature::Backup,
        GuestFeature::VolumeMove,
        GuestFeature::VolumeSnapshot,
    ]);
    all
}

/// Images that clients know of: files in the images directory of each host.
const IMAGES: usize = 2;
/// Hosts from which they import some.
const HOSTS_WITH_IMAGES: usize = 2;
/// The VMs of these numbers, and of greater ones, have a disk that is made from one.
pub const FROM_IMAGES: usize = CONNECTED + 2;

fn image_name(number: usize) -> String {
    format!("img-{}", number % IMAGES)
}

fn snapshot_name(number: usize) -> String {
    format!("snap-{}", number % 2)
}

/// What hosts have in their images directories.
pub fn images() -> BTreeMap<String, Vec<u8>> {
    let image = |number: usize| {
        (
            image_name(number),
            vec![b'a' + u8::try_from(number).unwrap_or(0); 4096],
        )
    };
    (0..IMAGES).map(image).collect()
}

/// What the first disk of the VM of this number is made from.
pub fn image(number: usize) -> String {
    match number >= FROM_IMAGES {
        true => image_name(number),
        false => String::new(),
    }
}

fn network_name(number: usize) -> String {
    format!("net-{}", number % NETWORKS)
}

fn group_name(number: usize) -> String {
    format!("grp-{}", number % NETWORKS)
}

/// What the VM of this number is connected to.
pub fn nics(number: usize) -> Vec<v1::Nic> {
    if number < CONNECTED {
        return Vec::new();
    }
    vec![v1::Nic {
        name: "eth0".to_owned(),
        network: network_name(number),
        security_groups: vec![group_name(number)],
        ..Default::default()
    }]
}

/// The name that clients give the volume of this number.
pub fn volume_name(number: usize) -> String {
    format!("vol-{number}")
}

/// What is asked for before all else, in a run that begins.
pub fn first(begin: Duration) -> Vec<Request> {
    let each = [Thing::CreateNetwork, Thing::CreateGroup, Thing::CreateImage].map(|thing| {
        let of = move |object| Request {
            verb: Verb::Thing(thing),
            object,
            other: None,
            retries: 3,
            again: false,
        };
        (0..NETWORKS).map(of)
    });
    let each = each.into_iter().flatten();
    each.filter(|_| begin.is_zero()).collect()
}

/// A plan of the site's hosts, or that one is given up.
pub fn plan(rng: &mut Rng, size: Size) -> Request {
    let thing = match rng.u8(..6) {
        0 => Thing::CancelPlan,
        _ => Thing::CarryOutPlan,
    };
    Request {
        verb: Verb::Thing(thing),
        object: rng.usize(..size.hosts),
        other: None,
        retries: rng.u8(..4),
        again: rng.u8(..8) == 0,
    }
}

/// A request, as likely as a site sees it.
pub fn request(rng: &mut Rng, size: Size) -> Request {
    const THINGS: &[(Thing, u32)] = &[
        (Thing::CreateVolume, 8),
        (Thing::GrowVolume, 2),
        (Thing::DeleteVolume, 3),
        (Thing::UndeleteVolume, 2),
        (Thing::CreateWithVolume, 8),
        (Thing::Attach, 12),
        (Thing::Detach, 6),
        (Thing::MoveVolume, 8),
        (Thing::ReturnVolume, 4),
        (Thing::CreateNetwork, 3),
        (Thing::DeleteNetwork, 1),
        (Thing::CreateGroup, 3),
        (Thing::UpdateGroup, 4),
        (Thing::DeleteGroup, 1),
        (Thing::CreateImage, 4),
        (Thing::DeleteImage, 2),
        (Thing::CreateFromImage, 4),
        (Thing::CreateSnapshot, 8),
        (Thing::DeleteSnapshot, 3),
        (Thing::RevertSnapshot, 6),
        (Thing::CreateBackup, 6),
        (Thing::DeleteBackup, 2),
        (Thing::RestoreBackup, 2),
        (Thing::DrainHost, 4),
        (Thing::CancelDrain, 1),
        (Thing::RestoreHost, 4),
    ];
    let all = Size {
        vms: CONNECTED + CONNECTED_VMS,
        ..size
    };
    if rng.bool() {
        let request = plan::request(rng, all);
        let object = match request.verb.is_of_host() {
            true => request.object,
            false => CONNECTED + request.object % CONNECTED_VMS,
        };
        return Request { object, ..request };
    }
    let total: u32 = THINGS.iter().map(|(_, weight)| weight).sum();
    let mut drawn = rng.u32(..total);
    let mut thing = Thing::Attach;
    for (candidate, weight) in THINGS {
        if drawn < *weight {
            thing = *candidate;
            break;
        }
        drawn -= weight;
    }
    let object = rng.usize(..if thing.is_of_vm() { WITH_VOLUMES } else { VOLUMES });
    // A VM's own volume more often than another: what it has is there to be moved.
    let own = rng.u8(..4) > 0;
    Request {
        verb: Verb::Thing(thing),
        object,
        other: Some(if own {
            object % VOLUMES
        } else {
            rng.usize(..VOLUMES)
        }),
        retries: rng.u8(..4),
        again: rng.u8(..8) == 0,
    }
}
