//! Whose files may go.

use dalgu_proto::{
    agent::v1::{self as wire, agent_volume_service_server::AgentVolumeService},
    ids::{ClusterId, Session, Term},
    reason,
};
use tonic::{Request, Status};
use uuid::Uuid;

use super::*;
use crate::{
    gate::Gate,
    hypervisor::sim::{Sim, SimConfig},
    ledger::{Host, Ledger},
};

#[tokio::test(start_paused = true)]
async fn the_file_of_a_volume_that_a_vm_here_has_stays_whoever_asks() {
    let site = ClusterId::from_uuid(Uuid::from_u128(7));
    let (vm, volume) = (
        VmId::from_uuid(Uuid::from_u128(1)),
        VolumeId::from_uuid(Uuid::from_u128(2)),
    );
    let dir = tempfile::tempdir().unwrap();
    let known = Host {
        cluster: Some(site),
        session: Session(1),
        term: Term(1),
        ..Host::default()
    };
    let gate = Gate::new(
        site,
        "h1".parse().unwrap(),
        None,
        Ledger::open(dir.path()).unwrap(),
        known,
    );
    gate.open();
    let service = server::Service {
        gate: Arc::new(gate),
        volumes: Volumes::default(),
        hypervisor: Arc::new(Sim::new(SimConfig::new(site)).unwrap()),
    };
    let delete = async || -> Result<(), Status> {
        let request = wire::DeleteVolumeRequest {
            context: Some(wire::CommandContext {
                cluster_id: site.to_string(),
                term: 1,
                session: 1,
                host: "h1".into(),
                ..Default::default()
            }),
            volume_uid: volume.to_string(),
            pool: "local".into(),
        };
        service.delete_volume(Request::new(request)).await.map(drop)
    };
    service.volumes.hold(vm, [volume], false);
    let refused = delete().await.expect_err("the VM has it");
    assert_eq!(reason::of(&refused).as_deref(), Some("VOLUME_IN_USE"));
    service.volumes.hold(vm, [], true);
    delete().await.expect("nobody has it");
}
