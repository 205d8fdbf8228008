//! Whole commands against a controller that answers from a script: what they ask, what they show, how they end. One
//! module a noun; here is what they answer with.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

#[allow(dead_code, reason = "each test program uses a part of it")]
#[path = "../common/mod.rs"]
mod common;

mod apply;
mod doctor;
mod errors;
mod events;
mod explain;
mod host;
mod image;
mod network;
mod op;
mod placement;
mod vm;
mod volume;
mod wait;
mod watch;

use common::ago;
use dalgu_proto::v1;
use tonic::Status;
use v1::{OperationKind as Kind, OperationState as State};

pub const ID: &str = "6f2c3c5e-0000-4000-8000-000000000001";

pub fn operation(kind: Kind, state: State) -> v1::Operation {
    let ended = matches!(state, State::Succeeded | State::Failed | State::Cancelled);
    v1::Operation {
        id: ID.into(),
        kind: kind.into(),
        state: state.into(),
        vm: "web".into(),
        create_time: ago(10),
        end_time: if ended { ago(8) } else { None },
        ..Default::default()
    }
}

pub fn vm(name: &str, host: &str) -> v1::Vm {
    let status = v1::VmStatus {
        state: v1::VmState::Running.into(),
        host: host.into(),
        ..Default::default()
    };
    let spec = v1::VmSpec {
        vcpus: 1,
        memory_mib: 256,
        ..Default::default()
    };
    v1::Vm {
        name: name.into(),
        spec: Some(spec),
        status: Some(status),
        create_time: ago(200),
        ..Default::default()
    }
}

pub fn page(vms: Vec<v1::Vm>, resource_version: u64) -> Result<v1::ListVmsResponse, Status> {
    Ok(v1::ListVmsResponse {
        vms,
        next_page_token: String::new(),
        resource_version,
    })
}

pub fn event(resource_version: u64, subject: &str, vm: Option<v1::Vm>) -> Result<v1::Event, Status> {
    Ok(v1::Event {
        resource_version,
        time: ago(1),
        kind: v1::EventKind::Vm.into(),
        reason: "VmChanged".into(),
        subject: subject.into(),
        object: vm.map(v1::event::Object::Vm),
        ..Default::default()
    })
}
