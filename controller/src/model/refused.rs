//! Placements that were refused, as they are stored: the last one of each VM's name, until one succeeds.

use dalgu_proto::ids::VmName;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::OperationKind;
use crate::placement::Decision;

/// A placement that was refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RefusedPlacement {
    /// The VM; of a creation, one that there is not.
    pub vm: VmName,
    /// What was asked for: a creation or a migration.
    pub kind: OperationKind,
    /// Why, host by host, and what would help.
    pub decision: Decision,
    /// When it was refused.
    pub time: Timestamp,
}
