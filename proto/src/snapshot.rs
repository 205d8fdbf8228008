//! The snapshots that a VM is to have, as a controller tells a host: the validated form of `dalgu.agent.v1.SnapshotSet`.
//!
//! Kept in the agent's ledger and told back in its reports. A layer's number is all that a host goes by.

use serde::{Deserialize, Serialize};

use crate::{
    agent::v1 as wire,
    ids::{SnapshotId, SnapshotName},
    vm::Invalid,
};

/// Most snapshots of one VM.
pub const MAX_SNAPSHOTS: usize = 16;

/// The snapshots of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Set {
    /// Oldest first; their numbers rise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<Layer>,
    /// Highest number given so far.
    #[serde(default)]
    pub last: u32,
    /// How the newest layer begins, where that is not on what the disks hold now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revert: Option<Revert>,
}

/// A snapshot and its layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Number of the layer, in the names of its files.
    pub number: u32,
    /// The snapshot.
    pub id: SnapshotId,
    /// Its name.
    pub name: SnapshotName,
}

/// A layer that goes back to a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revert {
    /// The new layer.
    pub number: u32,
    /// The layer whose place it takes: it begins on what is below that.
    pub replaces: u32,
}

impl Set {
    /// Numbers of the layers, rising.
    pub fn numbers(&self) -> impl Iterator<Item = u32> {
        self.layers.iter().map(|layer| layer.number)
    }

    /// Whether a layer is to be there.
    pub fn has(&self, number: u32) -> bool {
        self.numbers().any(|other| other == number)
    }
}

impl TryFrom<wire::SnapshotSet> for Set {
    type Error = Invalid;

    fn try_from(wire: wire::SnapshotSet) -> Result<Self, Invalid> {
        let invalid = |field: &str, message: String| Invalid {
            field: format!("snapshots.{field}"),
            message,
        };
        if wire.layers.len() > MAX_SNAPSHOTS {
            let message = format!("at most {MAX_SNAPSHOTS} are allowed, got {}", wire.layers.len());
            return Err(invalid("layers", message));
        }
        let mut layers: Vec<Layer> = Vec::with_capacity(wire.layers.len());
        for layer in wire.layers {
            let before = layers.last().map_or(0, |layer| layer.number);
            if layer.number <= before || layer.number > wire.last_number {
                let message = format!("{} is not between {before} and `last_number`", layer.number);
                return Err(invalid("layers.number", message));
            }
            layers.push(Layer {
                number: layer.number,
                id: layer
                    .uid
                    .parse()
                    .map_err(|error: crate::ids::Error| invalid("layers.uid", error.to_string()))?,
                name: layer
                    .name
                    .parse()
                    .map_err(|error: crate::ids::Error| invalid("layers.name", error.to_string()))?,
            });
        }
        let revert = wire.revert.map(|revert| Revert {
            number: revert.number,
            replaces: revert.replaces,
        });
        if let Some(revert) = revert
            && !(1..revert.number).contains(&revert.replaces)
        {
            let message = format!("must be 1 to {}, got {}", revert.number, revert.replaces);
            return Err(invalid("revert.replaces", message));
        }
        Ok(Self {
            layers,
            last: wire.last_number,
            revert,
        })
    }
}

impl From<Set> for wire::SnapshotSet {
    fn from(own: Set) -> Self {
        let layers = own.layers.into_iter().map(|layer| wire::SnapshotLayer {
            number: layer.number,
            uid: layer.id.to_string(),
            name: layer.name.to_string(),
        });
        Self {
            layers: layers.collect(),
            last_number: own.last,
            revert: own.revert.map(|revert| wire::SnapshotRevert {
                number: revert.number,
                replaces: revert.replaces,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(numbers: &[u32], last_number: u32, revert: Option<(u32, u32)>) -> wire::SnapshotSet {
        let layer = |number: &u32| wire::SnapshotLayer {
            number: *number,
            uid: uuid::Uuid::from_u128((*number).into()).to_string(),
            name: format!("s{number}"),
        };
        wire::SnapshotSet {
            layers: numbers.iter().map(layer).collect(),
            last_number,
            revert: revert.map(|(number, replaces)| wire::SnapshotRevert { number, replaces }),
        }
    }

    #[test]
    fn a_set_comes_back_from_the_wire_as_it_was() {
        for told in [wire(&[], 0, None), wire(&[1, 4], 7, Some((4, 2)))] {
            let set = Set::try_from(told.clone()).unwrap();
            assert_eq!(wire::SnapshotSet::from(set), told);
        }
    }

    #[test]
    fn numbers_that_do_not_rise_are_refused() {
        let many: Vec<_> = (1..=17).collect();
        for (numbers, last, revert, field) in [
            (&[0_u32][..], 1, None, "snapshots.layers.number"),
            (&[2, 2], 3, None, "snapshots.layers.number"),
            (&[3, 2], 3, None, "snapshots.layers.number"),
            (&[4], 3, None, "snapshots.layers.number"),
            (&many, 17, None, "snapshots.layers"),
            (&[3], 3, Some((3, 3)), "snapshots.revert.replaces"),
            (&[3], 3, Some((3, 0)), "snapshots.revert.replaces"),
        ] {
            let refused = Set::try_from(wire(numbers, last, revert)).unwrap_err();
            assert_eq!(refused.field, field, "{numbers:?} {revert:?}");
        }
    }
}
