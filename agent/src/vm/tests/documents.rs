//! Documents of a first boot: how long the ledger has them, and what their volume waits for.

use dalgu_proto::{
    v1,
    vm::{Nic, Plug, first_boot::Documents},
};

use super::*;
use crate::network::compile::tests::{plugged as ports_of, told as told_of_networks};

fn with_documents(id: VmId) -> Told {
    let wire = v1::FirstBoot {
        user_data: "#!marker".into(),
        ..Default::default()
    };
    let mut intent = intent(1, PowerState::Running);
    let mut spec = v1::VmSpec::from(intent.spec);
    spec.first_boot = Some(wire.clone());
    intent.spec = Spec::try_from(spec).unwrap();
    Told {
        documents: Documents::from(&wire),
        ..told(id, intent)
    }
}

fn written(host: &Host, id: VmId) -> String {
    std::fs::read_to_string(host.dir.path().join(format!("ledger/vms/{id}.json"))).unwrap()
}

#[tokio::test(start_paused = true)]
async fn documents_are_forgotten_as_soon_as_the_disks_are_made_and_the_intent_is_the_same_without() {
    let host = one_host().await;
    let id = vm(1);
    let told = with_documents(id);
    host.vms.get_or_start(id).ensure(told.clone()).await.unwrap();
    assert!(
        written(&host, id).contains("marker"),
        "an agent that dies now makes the disks when it is back"
    );
    host.until_settled(id, 1).await;
    assert_eq!(host.sim.local_volumes(), 2);
    assert!(!written(&host, id).contains("marker"), "{}", written(&host, id));
    for documents in [told.documents.clone(), Documents::default()] {
        let again = Told {
            documents,
            ..told.clone()
        };
        host.vms.get_or_start(id).ensure(again).await.unwrap();
        assert!(!written(&host, id).contains("marker"));
    }
    // A controller that was restored says them once more, under another generation.
    let mut late = told;
    late.intent.generation = Generation(2);
    host.vms.get_or_start(id).ensure(late).await.unwrap();
    host.until_settled(id, 2).await;
    assert!(!written(&host, id).contains("marker"));
}

#[tokio::test(start_paused = true)]
async fn documents_of_a_vm_that_cannot_be_made_are_kept_until_it_is_deleted() {
    let host = one_host().await;
    let id = vm(1);
    let mut told = with_documents(id);
    for _ in 0..2 {
        let full = HypervisorError::Invalid {
            detail: "not here".into(),
        };
        host.sim.fail_next(Call::CreateVolumes, Fault::Error(full));
    }
    host.vms.get_or_start(id).ensure(told.clone()).await.unwrap();
    host.until(id, "failing", |status| status.failure.is_some()).await;
    // What changes meanwhile may come without them.
    told.intent.generation = Generation(2);
    told.documents = Documents::default();
    host.vms.get_or_start(id).ensure(told).await.unwrap();
    host.until(id, "failing again", |status| status.failure.is_some())
        .await;
    assert!(written(&host, id).contains("marker"));
    host.vms
        .get_or_start(id)
        .delete(Generation(3), Epoch(1))
        .await
        .unwrap();
    assert!(!written(&host, id).contains("marker"));
}

#[tokio::test(start_paused = true)]
async fn the_volume_of_a_first_boot_is_made_when_the_networks_are_known_that_it_tells_of() {
    let host = one_host().await;
    let networks = host.vms.networks().clone();
    let making = networks.clone();
    tokio::spawn(async move { making.run(CancellationToken::new()).await });
    let id = vm(1);
    let mut document = told_of_networks();
    document
        .networks
        .retain(|told| told.network.name.as_str() == "site");
    let mut told = with_documents(id);
    let ports = ports_of(&document, "web-1").into_iter();
    let nics = ports.map(|port| Nic {
        name: format!("to-{}", port.port.network),
        plug: Plug::Network(port.port),
        mac: port.mac,
        reserved_mbit: None,
    });
    told.intent.spec.nics = nics.collect();
    host.vms.get_or_start(id).ensure(told).await.unwrap();
    let waiting = host.until(id, "waiting", |status| status.failure.is_some()).await;
    assert_eq!(waiting.failure.unwrap().reason, "NETWORK_NOT_READY");
    assert_eq!(host.sim.local_volumes(), 0);
    networks.tell(document).await.unwrap();
    host.until_settled(id, 1).await;
    assert_eq!(host.sim.local_volumes(), 2);
}
