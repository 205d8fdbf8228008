//! What a VM has used of the processors, as it is stored: so much of it as a forecast needs.

use dalgu_proto::ids::VmId;
use serde::{Deserialize, Serialize};

/// What a VM has used, in hundredths of a processor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageRecord {
    /// The VM.
    pub vm: VmId,
    /// The last hour in which it was seen: its number since 1970.
    pub hour: u64,
    /// The most in each hour of the week before, by its number modulo 168; `None` where it was not seen.
    pub hours: Vec<Option<u16>>,
    /// The last samples, five minutes apart, the newest first.
    pub samples: Vec<u16>,
}
