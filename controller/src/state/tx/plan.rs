//! Changes of plans.

use std::sync::Arc;

use dalgu_proto::ids::PlanId;

use super::{Table, Tx, json};
use crate::model::PlanRecord;

impl Tx {
    pub(in crate::state) fn index_plan(&mut self, plan: Arc<PlanRecord>) {
        self.state.plans.insert(plan.id, plan);
    }

    /// Puts a plan.
    pub fn put_plan(&mut self, plan: PlanRecord) {
        self.write(Table::Plans, plan.id, Some(json(&plan)));
        self.index_plan(Arc::new(plan));
    }

    /// Forgets a plan.
    pub fn delete_plan(&mut self, id: PlanId) {
        self.state.plans.remove(&id);
        self.write(Table::Plans, id, None);
    }
}
