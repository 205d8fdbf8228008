//! Requests to Dalgu, and how an operator of a chaos run gets an answer: by asking again, with the same request id,
//! while there is none.

use std::time::Duration;

use anyhow::bail;
use dalgu_proto::v1::{self, OperationState};
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Status};

use crate::operator::Operator;

/// A call that has no answer by then is made again.
const CALL_LIMIT: Duration = Duration::from_secs(6);
/// The controller must have answered by then: no fault lasts so long.
const ANSWER_LIMIT: Duration = Duration::from_mins(2);

/// A request with its id.
#[derive(Clone)]
#[expect(clippy::large_enum_variant, reason = "one lives at a time")]
pub enum Request {
    Create(v1::CreateVmRequest),
    Start(v1::StartVmRequest),
    Stop(v1::StopVmRequest),
    Pause(v1::PauseVmRequest),
    Resume(v1::ResumeVmRequest),
    Restart(v1::RestartVmRequest),
    Migrate(v1::MigrateVmRequest),
    Delete(v1::DeleteVmRequest),
}

/// Calls until there is an answer, or a refusal that stays.
///
/// # Errors
/// If there is none.
pub async fn answer<T, F>(mut call: F) -> anyhow::Result<Result<T, Status>>
where
    F: AsyncFnMut() -> Result<tonic::Response<T>, Status>,
{
    let began = Instant::now();
    loop {
        let last = match timeout(CALL_LIMIT, call()).await {
            Ok(Ok(answer)) => return Ok(Ok(answer.into_inner())),
            Ok(Err(status)) if !may_pass(&status) => return Ok(Err(status)),
            Ok(Err(status)) => status.to_string(),
            Err(_) => "no answer".to_owned(),
        };
        if began.elapsed() > ANSWER_LIMIT {
            bail!("the controller gives no answer: {last}");
        }
        sleep(Duration::from_millis(300)).await;
    }
}

/// Whether the same call may have another answer a moment later.
fn may_pass(status: &Status) -> bool {
    let transport = [
        Code::Unavailable,
        Code::DeadlineExceeded,
        Code::Cancelled,
        Code::Unknown,
    ];
    transport.contains(&status.code())
}

pub fn has_ended(operation: &v1::Operation) -> bool {
    matches!(
        operation.state(),
        OperationState::Succeeded | OperationState::Failed | OperationState::Cancelled
    )
}

/// The reason of a refusal.
pub fn reason(status: &Status) -> String {
    // The details are an encoded google.rpc.Status; its reason is the one word in capitals with an underscore.
    let details = String::from_utf8_lossy(status.details()).into_owned();
    let is_part = |letter: char| letter.is_ascii_uppercase() || letter == '_';
    let mut words = details.split(|letter| !is_part(letter));
    let found = words.find(|word| word.len() > 4).map(str::to_owned);
    found.unwrap_or_else(|| format!("{:?}", status.code()))
}

impl Request {
    /// Asks until there is an answer, with the same request id.
    pub async fn send(&self, operator: &Operator) -> anyhow::Result<Result<v1::Operation, Status>> {
        let mut vms = operator.vms();
        let mut call = async || match self.clone() {
            Request::Create(request) => vms.create_vm(request).await,
            Request::Start(request) => vms.start_vm(request).await,
            Request::Stop(request) => vms.stop_vm(request).await,
            Request::Pause(request) => vms.pause_vm(request).await,
            Request::Resume(request) => vms.resume_vm(request).await,
            Request::Restart(request) => vms.restart_vm(request).await,
            Request::Migrate(request) => vms.migrate_vm(request).await,
            Request::Delete(request) => vms.delete_vm(request).await,
        };
        answer(&mut call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_of_a_refusal_is_found_in_its_details() {
        let details = b"\x08\x09\x12\x10not running\x1a\x38\x12\x0eVM_NOT_RUNNING\x12\x05dalgu";
        let status = Status::with_details(Code::FailedPrecondition, "no", details.to_vec().into());
        assert_eq!(reason(&status), "VM_NOT_RUNNING");
        assert_eq!(reason(&Status::internal("no")), "Internal");
    }
}
