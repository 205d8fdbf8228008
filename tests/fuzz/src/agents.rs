//! Target `agents`: what agents and the controller say to each other, and the opening of a migration's stream.
//!
//! Promises: no message makes a panic; what is taken from the wire and put back onto it is the same; what the controller stores
//! of it comes back from the store.

use dalgu_agent::{migration::streams, wire};
use dalgu_controller::agent_wire;
use dalgu_proto::{
    agent::v1 as agent,
    host::{Inventory, Usage, VmUsage},
    ids::{HostName, MigrationId, VmId},
    v1,
};
use prost::Message;

use crate::{input::Input, rpc, site::wait};

const UID: &str = "018f0000-0000-7000-8000-000000000001";

/// Takes one input: the first byte says what the rest is.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.byte() % 9 {
        0 => opening(input.bytes(usize::MAX)),
        1 => {
            let vm = agent::VmIntent {
                uid: UID.into(),
                name: "a".into(),
                spec: rpc::vm("a").spec.map(with_mac),
                power_state: v1::PowerState::Running.into(),
                ..Default::default()
            };
            let _ = input.over(vm).map(intent);
        }
        2 => {
            let report = agent::VmReport {
                uid: UID.into(),
                name: "a".into(),
                migration: Some(part()),
                ..Default::default()
            };
            let _ = input.over(report).map(reported);
        }
        3 => {
            if let Some(part) = input.over(part()) {
                // A role that only a newer agent knows is one all the same.
                let known = part.role != 0;
                assert_eq!(agent_wire::part(part).known, known);
            }
        }
        4 => drop(same::<Inventory, v1::HostInventory>(&mut input).inspect(stored)),
        5 => drop(same::<Usage, v1::HostUsage>(&mut input)),
        6 => drop(same::<VmUsage, v1::VmUsage>(&mut input)),
        7 => {
            if let Some(domain) = input.over(v1::UnmanagedDomain::default()) {
                let own = agent_wire::unmanaged(domain.clone());
                assert_eq!((own.uuid, own.memory_mib), (domain.uuid, domain.memory_mib));
            }
        }
        _ => {
            let method = input.byte();
            commands(method, input.bytes(usize::MAX));
        }
    }
}

fn with_mac(mut spec: v1::VmSpec) -> v1::VmSpec {
    for nic in &mut spec.nics {
        nic.mac = "52:54:00:00:00:01".into();
    }
    spec
}

fn part() -> agent::MigrationReport {
    agent::MigrationReport {
        migration_id: UID.into(),
        role: agent::MigrationRole::Source.into(),
        transfer: agent::TransferState::Active.into(),
        ..Default::default()
    }
}

fn opening(mut bytes: &[u8]) {
    let all = bytes;
    if let Ok((migration, channel)) = wait(streams::read_opening(&mut bytes)) {
        assert_eq!(streams::opening(migration, channel), all[..17]);
        assert_eq!(bytes, &all[17..], "nothing behind the opening is taken");
    }
}

/// An intent that the agent takes is the same when it is sent again.
fn intent(message: agent::VmIntent) {
    let Ok((id, told)) = wire::intent(message.clone()) else {
        return;
    };
    let again = agent::VmIntent {
        uid: id.to_string(),
        name: told.name.to_string(),
        spec: Some(told.intent.spec.clone().into()),
        ..message
    };
    assert_eq!(wire::intent(again).ok(), Some((id, told)));
}

fn reported(message: agent::VmReport) {
    let host: HostName = "h1".parse().expect("it is a name");
    let uid = message.uid.clone();
    match agent_wire::reported(&host, message) {
        Some(report) => assert_eq!(uid.parse::<VmId>(), Ok(report.id)),
        None => assert!(uid.parse::<VmId>().is_err(), "a report with an id was left out"),
    }
}

/// From the wire, to the wire and back. Of these only the inventory is stored.
fn same<Own, Wire>(input: &mut Input<'_>) -> Option<Own>
where
    Own: From<Wire> + Clone + PartialEq + std::fmt::Debug,
    Wire: From<Own> + Message + Default,
{
    let own = Own::from(input.over(Wire::default())?);
    assert_eq!(Own::from(Wire::from(own.clone())), own);
    Some(own)
}

fn stored(inventory: &Inventory) {
    let text = serde_json::to_string(inventory).expect("it can be stored");
    let read: Inventory = serde_json::from_str(&text).expect("what was stored can be read");
    assert_eq!(&read, inventory);
}

/// Commands to an agent, as far as they are read before its gate is asked.
fn commands(method: u8, bytes: &[u8]) {
    let context = |context: Option<agent::CommandContext>| {
        if let Some(context) = context {
            let _ = context.cluster_id.parse::<dalgu_proto::ids::ClusterId>();
        }
    };
    let migration = |id: &str| {
        if let Ok(id) = id.parse::<MigrationId>() {
            assert_eq!(id.to_string().parse(), Ok(id));
        }
    };
    match method % 9 {
        0 => drop(agent::EnsureVmRequest::decode(bytes).map(|m| {
            context(m.context);
            m.vm.map(intent)
        })),
        1 => drop(agent::DeleteVmRequest::decode(bytes).map(|m| context(m.context))),
        2 => drop(agent::PrepareMigrationRequest::decode(bytes).map(|m| {
            migration(&m.migration_id);
            context(m.context);
            m.vm.map(intent)
        })),
        3 => drop(agent::StartMigrationRequest::decode(bytes).map(|m| migration(&m.migration_id))),
        4 => drop(agent::GetMigrationRequest::decode(bytes).map(|m| migration(&m.migration_id))),
        5 => drop(agent::SettleMigrationRequest::decode(bytes).map(|m| migration(&m.migration_id))),
        6 => drop(agent::FinishMigrationRequest::decode(bytes).map(|m| migration(&m.migration_id))),
        7 => drop(agent::ReadConsoleRequest::decode(bytes)),
        _ => drop(agent::RegisterResponse::decode(bytes)),
    }
}
