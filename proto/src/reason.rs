//! Errors on the wire: a gRPC code, a stable reason for programs, a sentence for people.
//!
//! Servers build a [`tonic::Status`] with [`status`] or [`invalid`]; clients read it back with [`of`]. The reason
//! travels as `google.rpc.ErrorInfo` in the domain `dalgu`, field errors as `google.rpc.BadRequest`.

use std::{collections::HashMap, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// The domain of every reason Dalgu gives.
pub const DOMAIN: &str = "dalgu";

/// Builds an error with a stable reason.
pub fn status(code: Code, reason: &str, message: impl Into<String>) -> Status {
    status_with(code, reason, message, HashMap::new())
}

/// Builds an error with a stable reason and further facts for programs.
pub fn status_with(
    code: Code,
    reason: &str,
    message: impl Into<String>,
    metadata: HashMap<String, String>,
) -> Status {
    let details = ErrorDetails::with_error_info(reason, DOMAIN, metadata);
    Status::with_error_details(code, message, details)
}

/// Builds an error that passes by itself, with the time after which to repeat the call.
pub fn status_retry(code: Code, reason: &str, message: impl Into<String>, after: Duration) -> Status {
    let mut details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
    details.set_retry_info(Some(after));
    Status::with_error_details(code, message, details)
}

/// Builds the error for a field that does not hold an allowed value.
pub fn invalid(field: &str, message: impl Into<String>) -> Status {
    let message = message.into();
    let mut details = ErrorDetails::with_bad_request_violation(field, &message);
    details.set_error_info(
        "INVALID_FIELD",
        DOMAIN,
        HashMap::from([("field".to_owned(), field.to_owned())]),
    );
    Status::with_error_details(Code::InvalidArgument, format!("{field}: {message}"), details)
}

/// The stable reason of an error that Dalgu made; `None` for errors of other origin, such as a broken connection.
pub fn of(status: &Status) -> Option<String> {
    let info = status.get_details_error_info()?;
    (info.domain == DOMAIN).then_some(info.reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_survives_the_wire() {
        let sent = status(Code::NotFound, "VM_NOT_FOUND", "no VM named web");
        assert_eq!(of(&sent).as_deref(), Some("VM_NOT_FOUND"));
        assert_eq!(of(&Status::unavailable("gone")), None);
    }

    #[test]
    fn a_field_error_names_its_field() {
        let sent = invalid("vm.spec.vcpus", "must be 1 to 254");
        let bad = sent.get_details_bad_request().expect("has details");
        assert_eq!(bad.field_violations[0].field, "vm.spec.vcpus");
        assert_eq!(of(&sent).as_deref(), Some("INVALID_FIELD"));
    }
}
