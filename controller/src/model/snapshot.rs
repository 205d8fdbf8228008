//! The snapshots of a VM, as they are stored with it.

use std::collections::BTreeMap;

use dalgu_proto::{
    ids::{Generation, SnapshotId, SnapshotName},
    snapshot::{Layer, Revert, Set},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Observation;

/// The snapshots of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Snapshots {
    /// Oldest first, those that are being deleted too.
    pub all: Vec<SnapshotRecord>,
    /// Highest number of a layer given so far; 0 for a VM that never had one.
    pub last: u32,
    /// How the newest layer begins, where that is not on what the disks held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revert: Option<Revert>,
    /// Generation of the last change of them.
    #[serde(default)]
    pub generation: Generation,
}

/// One snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// Its id.
    pub id: SnapshotId,
    /// Its name, unique within the VM.
    pub name: SnapshotName,
    /// Number of its layer: what was written since. Another one since the VM went back to it.
    pub layer: u32,
    /// Free labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Free text.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// When it was asked for.
    pub create_time: Timestamp,
    /// Generation in which it was changed last.
    pub generation: Generation,
    /// A host has said that it is there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub taken: bool,
    /// The guest's file systems were frozen for it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub quiesced: bool,
    /// Its deletion was asked for; its layer may still be there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deleting: bool,
}

/// How far a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotState {
    /// Not made yet.
    Creating,
    /// There.
    Ready,
    /// Its layers are being merged.
    Deleting,
    /// Its host says that it is not there.
    Lost,
}

impl SnapshotState {
    /// Name in messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "being made",
            Self::Ready => "ready",
            Self::Deleting => "being deleted",
            Self::Lost => "lost",
        }
    }
}

impl SnapshotRecord {
    /// How far it is, by what its host said last.
    pub fn state(&self, seen: Option<&Observation>) -> SnapshotState {
        let settled = seen.is_some_and(|seen| seen.observed >= self.generation);
        let there = seen.is_some_and(|seen| seen.snapshot(self.layer).is_some());
        match (self.deleting, self.taken, settled) {
            (true, ..) => SnapshotState::Deleting,
            (_, _, true) if !there => SnapshotState::Lost,
            (_, true, _) => SnapshotState::Ready,
            (_, false, _) => SnapshotState::Creating,
        }
    }
}

impl Snapshots {
    /// Whether the VM never had one.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Those that are to be there.
    pub fn wanted(&self) -> impl Iterator<Item = &SnapshotRecord> {
        self.all.iter().filter(|snapshot| !snapshot.deleting)
    }

    /// The place of one that is to be there.
    pub fn place(&self, name: &SnapshotName) -> Option<usize> {
        let wanted = |one: &SnapshotRecord| !one.deleting && one.name == *name;
        self.all.iter().position(wanted)
    }

    /// What a host is told; `None` of a VM that never had any.
    pub fn set(&self) -> Option<Set> {
        let layer = |snapshot: &SnapshotRecord| Layer {
            number: snapshot.layer,
            id: snapshot.id,
            name: snapshot.name.clone(),
        };
        (self.last > 0).then(|| Set {
            layers: self.wanted().map(layer).collect(),
            last: self.last,
            revert: self.revert,
        })
    }

    /// What there is after a word of the VM's host. Room is given back only here.
    pub fn settle(&self, seen: &Observation) -> Self {
        let mut now = self.clone();
        if seen.observed >= self.generation {
            now.all.retain(|snapshot| !snapshot.deleting);
        }
        for snapshot in &mut now.all {
            if let Some(there) = seen.snapshot(snapshot.layer) {
                snapshot.taken = true;
                snapshot.quiesced |= there.quiesced;
            }
        }
        now
    }

    /// What there is by the word of a host that knows better than a restored store.
    pub fn told(&self, set: &Set, now: Timestamp) -> Self {
        let known = |layer: &Layer| {
            let known = self.all.iter().find(|snapshot| snapshot.id == layer.id);
            let known = known.cloned().unwrap_or_else(|| SnapshotRecord {
                id: layer.id,
                name: layer.name.clone(),
                layer: layer.number,
                labels: BTreeMap::new(),
                description: String::new(),
                create_time: now,
                generation: self.generation,
                taken: false,
                quiesced: false,
                deleting: false,
            });
            SnapshotRecord {
                layer: layer.number,
                deleting: false,
                ..known
            }
        };
        Self {
            all: set.layers.iter().map(known).collect(),
            last: self.last.max(set.last),
            revert: set.revert,
            generation: self.generation,
        }
    }
}
