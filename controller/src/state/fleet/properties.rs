//! Histories of hosts, VMs, migrations and strays, with changes that are given up: what the engine knows is always what it would
//! know if it were made anew, and a decision within a change is the scan's.

use dalgu_proto::vm::{CpuPolicy, NumaPlace, Spec};
use proptest::{collection::vec, prelude::*};
use tokio::time::Instant;

use super::*;
use crate::{
    fixtures,
    model::{HostLive, HostState, Phase, Unmanaged, VmRecord},
    placement::{PoolPolicy, decide_keeping, properties::cases},
    state::{Db, Hooks, Tx},
    store::memory::Disk,
};

const HOSTS: u32 = 4;

/// What happens, to whom, with which number; and whether the change is given up in the end.
type Event = (u32, u32, u32, bool);

fn host_of(number: u32) -> HostName {
    fixtures::host_name(&format!("h{}", number % HOSTS))
}

fn vm_of(tx: &Tx, number: u32) -> Option<VmRecord> {
    let name = format!("v{}", number % 6).parse().unwrap();
    tx.vm_by_name(&name).map(|vm| (**vm).clone())
}

fn live(number: u32) -> HostLive {
    HostLive {
        state: [HostState::Ready, HostState::Ready, HostState::Unreachable][number as usize % 3],
        usage: (!number.is_multiple_of(2)).then(Default::default),
        unmanaged: vec![Unmanaged {
            uuid: String::new(),
            name: "other".into(),
            running: number.is_multiple_of(5),
            vcpus: number,
            memory_mib: u64::from(number) * 10,
            marked: false,
        }],
        ..HostLive::silent(Instant::now())
    }
}

fn happen(tx: &mut Tx, (what, whom, number, _): Event) {
    let host = host_of(whom);
    match what {
        0 => {
            let mut record = fixtures::host(host.as_str());
            record.cordon = number.is_multiple_of(4).then(String::new);
            record.inventory.cpus = 4 + number;
            record.vms_most = number.is_multiple_of(5).then_some(number);
            record.labels.insert("rack".into(), format!("r{}", number % 3));
            tx.put_host(record);
        }
        1 => tx.delete_host(&host),
        2 => tx.set_live(host, live(number)),
        3 => match vm_of(tx, whom) {
            None => {
                let mut vm = fixtures::vm(&format!("v{}", whom % 6), host_of(number).as_str());
                vm.spec.vcpus = 1 + number % 4;
                if number.is_multiple_of(3) {
                    vm.spec.fitting.cpus = CpuPolicy::Dedicated;
                    let cpus = (number..number + vm.spec.vcpus).collect();
                    let place = NumaPlace { node: 0, cpus };
                    vm.places.insert(vm.owner.clone(), vec![place]);
                }
                tx.put_vm(vm);
            }
            Some(mut vm) => {
                vm.spec.memory_mib = 128 + u64::from(number);
                vm.owner = host_of(number);
                tx.put_vm(vm);
            }
        },
        4 => {
            if let Some(vm) = vm_of(tx, whom).filter(|vm| tx.active_migration(vm.id).is_none()) {
                tx.delete_vm(vm.id);
            }
        }
        5 => {
            let Some(vm) = vm_of(tx, whom) else { return };
            match tx.active_migration(vm.id).cloned() {
                None => tx.put_migration(fixtures::migration(&vm, host_of(number).as_str())),
                Some(migration) => tx.put_migration(crate::model::MigrationRecord {
                    phase: Phase::Done,
                    ..(*migration).clone()
                }),
            }
        }
        6 => {
            let mut vm = fixtures::vm("stray", host.as_str());
            vm.spec.vcpus = number;
            let observation = fixtures::observation(&vm);
            tx.note_stray(host, fixtures::reported(&vm, observation));
        }
        7 => tx.forget_strays(&host, &Default::default()),
        _ => tx.set_pool_policy(PoolPolicy {
            overcommit_percent: 100 + u64::from(number),
            ..PoolPolicy::default()
        }),
    }
}

/// The answer within a change is the scan's.
fn decides(tx: &Tx, vcpus: u32) {
    let request = Request::new(Spec {
        vcpus,
        ..fixtures::spec()
    });
    for (policy, kept) in [(Policy::SPREAD, 2), (Policy::SPREAD, 100)] {
        let expected = decide_keeping(&request, &hosts::views(tx), &policy, kept);
        assert_eq!(tx.decide(&request, policy, kept), expected);
    }
}

proptest! {
    #![proptest_config(cases(64))]

    #[test]
    fn the_engine_knows_what_it_would_know_if_it_were_made_anew(
        events in vec((0..9_u32, 0..12_u32, 0..12_u32, prop::bool::weighted(0.2)), 1..60),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let disk = Disk::default();
            let db = Db::open(disk.open(), fixtures::cluster_id(), Hooks::default()).unwrap();
            db.change(|tx| decides(tx, 1)).await;
            for event in events {
                let outcome = db.transact(|tx| {
                    happen(tx, event);
                    decides(tx, 1 + event.2 % 4);
                    if event.3 { Err(()) } else { Ok(()) }
                });
                assert_eq!(outcome.await.is_err(), event.3);
                db.change(|tx| assert!(tx.fleet_is_current(), "after {event:?}")).await;
            }
        });
    }
}
