//! What VMs have used.

use std::sync::Arc;

use super::{Table, Tx, json};
use crate::model::UsageRecord;

impl Tx {
    pub(in crate::state) fn index_usage(&mut self, usage: Arc<UsageRecord>) {
        self.state.usage.insert(usage.vm, usage);
    }

    /// Keeps what a VM has used; of one that is gone, nothing.
    pub fn put_usage(&mut self, usage: UsageRecord) {
        let known = self.state.usage.get(&usage.vm);
        if self.state.vms.contains_key(&usage.vm) && known.is_none_or(|known| **known != usage) {
            self.write(Table::Usage, usage.vm, Some(json(&usage)));
            self.index_usage(Arc::new(usage));
        }
    }
}
