//! Requests and what they led to.

use std::collections::BTreeMap;

use super::{Finding, Invariant, Look, Severity, View};

/// I8: of all operations that are kept, no two are of one request.
pub(super) fn one_effect(view: &View<'_>) -> Look {
    let asked = view.state.operations.values();
    let asked = asked.filter(|operation| !operation.request_id.is_empty());
    let mut look = Look::at("operations", 0);
    look.limits = "operations and requests are kept for a limited time";
    let mut first = BTreeMap::new();
    for operation in asked {
        look.checked += 1;
        let key = (&operation.principal, &operation.request_id);
        let known = *first.entry(key).or_insert(operation.id);
        if known != operation.id {
            look.findings.push(Finding {
                invariant: Invariant::I8,
                severity: Severity::Critical,
                kind: "REQUEST_DONE_TWICE",
                subject: format!("operation {}", operation.id),
                seen: format!(
                    "request {} of {} has led to operation {known} too",
                    operation.request_id, operation.principal
                ),
                next_step:
                    "this is a defect of Dalgu: look what both did with `dalgu op show ID`, and report it"
                        .to_owned(),
            });
        }
    }
    look
}
