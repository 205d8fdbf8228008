//! Processors of a VM's own: told to the hypervisor, kept over restarts of the agent, given back, and never another's.

use dalgu_proto::vm::NumaPlace;

use super::*;

fn with_cpus(cpus: &[u32]) -> Intent {
    Intent {
        places: vec![NumaPlace {
            node: 0,
            cpus: cpus.to_vec(),
        }],
        ..intent(1, PowerState::Running)
    }
}

/// What the hypervisor was told, once it was.
async fn known(host: &Host, vms: &[(VmId, &[u32])]) {
    let expected = vms
        .iter()
        .map(|(id, cpus)| (*id, with_cpus(cpus).places))
        .collect();
    let told = async {
        while host.sim.places() != expected {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let told = tokio::time::timeout(Duration::from_secs(100), told).await;
    assert!(told.is_ok(), "{:?} and not {expected:?}", host.sim.places());
}

#[tokio::test(start_paused = true)]
async fn a_processor_is_one_vms_own_until_that_has_gone_also_after_a_restart_of_the_agent() {
    let mut host = one_host().await;
    host.create(vm(1), with_cpus(&[0, 1])).await;
    host.until_settled(vm(1), 1).await;
    known(&host, &[(vm(1), &[0, 1])]).await;
    for _ in 0..2 {
        let refused = host
            .vms
            .get_or_start(vm(2))
            .ensure(told(vm(2), with_cpus(&[1, 2])))
            .await;
        let taken = policy::Denied::CpuTaken { cpu: 1, vm: vm(1) };
        assert!(
            matches!(&refused, Err(Error::Denied(denied)) if *denied == taken),
            "{refused:?}"
        );
        host.restart_agent("boot-1").await;
    }
    host.create(vm(3), with_cpus(&[2])).await;
    host.until_settled(vm(3), 1).await;
    known(&host, &[(vm(1), &[0, 1]), (vm(3), &[2])]).await;
    let gone = host.vms.get(vm(1)).unwrap();
    gone.delete(Generation(2), Epoch(1)).await.unwrap();
    host.until(vm(1), "gone", |status| status.phase == Phase::Gone)
        .await;
    host.create(vm(2), with_cpus(&[1])).await;
    host.until_settled(vm(2), 1).await;
    known(&host, &[(vm(2), &[1]), (vm(3), &[2])]).await;
    // What it was told is what a restored controller is told.
    let status = host.vms.get(vm(2)).unwrap().status();
    assert_eq!(status.places, with_cpus(&[1]).places);
}
