//! Placement groups as they are stored. Who is in them follows from the VMs.

use dalgu_proto::placement::Group;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// A placement group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacementGroupRecord {
    /// What it does.
    pub group: Group,
    /// Free text.
    #[serde(default)]
    pub description: String,
    /// When it was created.
    pub create_time: Timestamp,
    /// Store revision of its creation.
    #[serde(default)]
    pub revision: u64,
}
