//! What the checker reads of messages on their way between controller and agents: by whose authority a command is given,
//! and whether it was obeyed. Knows only these few fields; the programs have the whole messages.

use dalgu_proto::{
    agent::v1::CommandContext,
    ids::{Session, Term},
};
use http::Response;
use prost::Message;
use tonic::body::Body;

/// Bytes before a message in a gRPC body: whether it is compressed, and its length.
const FRAME: usize = 5;

/// Every command begins so.
#[derive(Clone, PartialEq, Message)]
struct Command {
    #[prost(message, optional, tag = "1")]
    context: Option<CommandContext>,
}

/// What is looked at in a list of what a host has.
#[derive(Clone, PartialEq, Message)]
struct ReportedList {
    #[prost(bool, tag = "8")]
    complete: bool,
}

/// As [`ReportedList`], of a registration.
#[derive(Clone, PartialEq, Message)]
struct RegisteredList {
    #[prost(bool, tag = "12")]
    complete: bool,
}

/// What is looked at in a report.
#[derive(Clone, PartialEq, Message)]
struct Report {
    #[prost(uint64, tag = "2")]
    session: u64,
}

/// Session and term under which a command is given.
pub fn command(body: &[u8]) -> Option<(Session, Term)> {
    let context = Command::decode(body.get(FRAME..)?).ok()?.context?;
    Some((Session(context.session), Term(context.term)))
}

/// The run of the controller that gives a command.
pub fn run(body: &[u8]) -> Option<String> {
    Some(
        Command::decode(body.get(FRAME..)?)
            .ok()?
            .context?
            .controller_run_id,
    )
}

/// Session that a reporting agent works in.
pub fn reported_session(body: &[u8]) -> Option<Session> {
    let report = Report::decode(body.get(FRAME..)?).ok()?;
    Some(Session(report.session))
}

/// Whether a report tells all that the host has.
pub fn is_complete_report(body: &[u8]) -> bool {
    let list = body.get(FRAME..).and_then(|body| ReportedList::decode(body).ok());
    list.is_some_and(|list| list.complete)
}

/// As [`is_complete_report`], of a registration.
pub fn is_complete_registration(body: &[u8]) -> bool {
    let list = body
        .get(FRAME..)
        .and_then(|body| RegisteredList::decode(body).ok());
    list.is_some_and(|list| list.complete)
}

/// Whether an answer is none of refusal: an error comes with the headers.
pub fn is_ok(answer: &Response<Body>) -> bool {
    let status = answer.headers().get("grpc-status");
    status.is_none_or(|status| status == "0")
}
