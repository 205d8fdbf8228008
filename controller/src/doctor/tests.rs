//! Every finding, made by what it tells of; and a site in order, of which nothing is told.

mod files;

use std::sync::Arc;

use dalgu_proto::{
    ids::{Epoch, Generation, VmId},
    vm::{PowerReason, PowerState},
};

use super::*;
use crate::{
    agent_wire::Reported,
    backups::tests as backups,
    fixtures::{self, host_name},
    model::{
        BackupRecord, BackupState, Code, Fault, HostLive, MigrationLive, Observation, OperationKind, Phase,
        Refusal, ScheduleRecord, Unmanaged, VmFault, VmPhase,
    },
    space::Space,
    state::{Db, Hooks, Observing, Tx},
    store::memory::Disk,
};

fn observed(vm: &VmRecord, now: Timestamp) -> Observation {
    Observation {
        observe_time: Some(now),
        ..fixtures::observation(vm)
    }
}

fn said(vm: &VmRecord, host: &str, power: PowerState) -> Reported {
    let mut observation = fixtures::observation(vm);
    observation.host = host_name(host);
    observation.power = Some(power);
    fixtures::reported(vm, observation)
}

fn domain(id: VmId, marked: bool, running: bool) -> Unmanaged {
    Unmanaged {
        uuid: id.to_string(),
        name: "left".to_owned(),
        running,
        vcpus: 1,
        memory_mib: 128,
        marked,
    }
}

fn with_live(tx: &mut Tx, host: &str, change: impl FnOnce(&mut HostLive)) {
    let mut live = fixtures::live(tx.now());
    change(&mut live);
    tx.set_live(host_name(host), live);
}

fn see(tx: &mut Tx, vm: &VmRecord, change: impl FnOnce(&mut Observation)) {
    let mut seen = observed(vm, tx.now());
    change(&mut seen);
    tx.observe(vm.id, Some(seen));
}

fn changed(tx: &mut Tx, vm: &VmRecord, change: impl FnOnce(&mut VmRecord)) {
    let mut vm = vm.clone();
    change(&mut vm);
    tx.put_vm(vm);
}

/// Hosts h1 and h2, heard from, and a VM that runs on h1 as it was asked to; then what the test does to them.
async fn site(change: impl FnOnce(&mut Tx, &VmRecord)) -> (Arc<State>, Timestamp) {
    let db = Db::open(Disk::default().open(), fixtures::cluster_id(), Hooks::default()).unwrap();
    let vm = fixtures::vm("web", "h1");
    db.change(|tx| {
        for name in ["h1", "h2"] {
            tx.put_host(fixtures::host(name));
            with_live(tx, name, |_| {});
        }
        tx.put_vm(vm.clone());
        see(tx, &vm, |_| {});
        change(tx, &vm);
    })
    .await;
    (db.snapshot(), db.now())
}

fn look(state: &State, now: Timestamp, damage: Option<Vec<String>>) -> Diagnosis {
    examine(&View {
        state,
        now,
        silence: crate::hosts::silence(state),
        damage,
        files: Files::new(),
    })
}

async fn diagnosis(change: impl FnOnce(&mut Tx, &VmRecord)) -> Diagnosis {
    let (state, now) = site(change).await;
    look(&state, now, None)
}

/// What is found, and how bad it is.
async fn found(change: impl FnOnce(&mut Tx, &VmRecord)) -> Vec<(Invariant, Severity, &'static str)> {
    let findings = diagnosis(change).await.findings;
    for finding in &findings {
        assert!(
            !finding.seen.is_empty() && !finding.next_step.is_empty(),
            "{finding:?}"
        );
    }
    findings
        .iter()
        .map(|f| (f.invariant, f.severity, f.kind))
        .collect()
}

use Invariant::*;
use Severity::*;

#[tokio::test]
async fn of_a_site_in_order_nothing_is_told_and_everything_was_looked_at() {
    let diagnosis = diagnosis(|_, _| {}).await;
    assert_eq!((&diagnosis.findings[..], &diagnosis.gaps[..]), (&[][..], &[][..]));
    let numbers: Vec<_> = diagnosis
        .checks
        .iter()
        .map(|check| check.invariant.as_str())
        .collect();
    let all = "I1 I2 I3 I4 I5 I6 I7 I8 I9 I10 I11 I12 I13 I14 STORE";
    assert_eq!(numbers.join(" "), all);
    for check in &diagnosis.checks {
        let looked = check.checked > 0 && !check.subjects.is_empty();
        let none_to_look_at = check.invariant == I8;
        assert!(looked || none_to_look_at || !check.limits.is_empty(), "{check:?}");
    }
}

#[tokio::test]
async fn a_vm_that_two_hosts_show_running_is_found_whoever_shows_it() {
    let stray = found(|tx, vm| {
        for _ in 0..2 {
            tx.note_stray(host_name("h2"), said(vm, "h2", PowerState::Running));
        }
    });
    assert_eq!(
        stray.await,
        [(I1, Critical, "TWO_COPIES"), (I4, Warning, "STRAY_VM")]
    );
    for marked in [false, true] {
        let by_hand = found(|tx, vm| {
            with_live(tx, "h2", |live| {
                live.unmanaged = vec![domain(vm.id, marked, true)]
            })
        });
        assert_eq!(
            by_hand.await,
            [(I1, Critical, "TWO_COPIES"), (I4, Warning, "LEFTOVER_DOMAIN")]
        );
    }
    let unknown = found(|tx, _| {
        let new = fixtures::vm("new", "h1");
        for host in ["h1", "h2"] {
            tx.sight(host_name(host), said(&new, host, PowerState::Running));
        }
    });
    assert_eq!(unknown.await, [(I1, Critical, "TWO_COPIES")]);
}

#[tokio::test]
async fn what_a_host_has_that_is_not_its_own_is_found_when_it_is_seen_again() {
    let once = found(|tx, vm| {
        tx.note_stray(host_name("h2"), said(vm, "h2", PowerState::Stopped));
    });
    assert_eq!(once.await, [], "it may have been on its way out");
    let twice = found(|tx, vm| {
        for _ in 0..2 {
            tx.note_stray(host_name("h2"), said(vm, "h2", PowerState::Stopped));
        }
    });
    assert_eq!(twice.await, [(I4, Warning, "STRAY_VM")]);
    let left = found(|tx, _| {
        let id = fixtures::vm("old", "h1").id;
        with_live(tx, "h2", |live| live.unmanaged = vec![domain(id, true, false)]);
    });
    assert_eq!(left.await, [(I4, Warning, "LEFTOVER_DOMAIN")]);
    let foreign = found(|tx, _| {
        let id = fixtures::vm("theirs", "h1").id;
        with_live(tx, "h2", |live| live.unmanaged = vec![domain(id, false, true)]);
    });
    assert_eq!(foreign.await, [], "somebody else's domain is nobody's business");
    let restored = found(|tx, _| {
        let new = fixtures::vm("new", "h1");
        tx.sight(host_name("h2"), said(&new, "h2", PowerState::Running));
        observe(tx);
    });
    assert_eq!(
        restored.await,
        [(I4, Warning, "STRAY_VM"), (Store, Warning, "SITE_OBSERVING")]
    );
}

fn observe(tx: &mut Tx) {
    let since = tx.now();
    tx.set_observing(Some(Observing {
        since,
        waived: Default::default(),
    }));
}

#[tokio::test]
async fn a_vm_that_its_owner_does_not_show_is_found_unless_something_is_under_way() {
    assert_eq!(
        found(|tx, vm| tx.observe(vm.id, None)).await,
        [(I2, Warning, "NOT_SHOWN")]
    );
    let begun = found(|tx, vm| {
        tx.observe(vm.id, None);
        let mut operation = fixtures::operation(vm, OperationKind::Create, None);
        operation.create_time = tx.now();
        tx.put_operation(operation);
    });
    assert_eq!(begun.await, []);
    let unconfirmed = found(|tx, vm| {
        changed(tx, vm, |vm| vm.unconfirmed = true);
        tx.observe(vm.id, None);
    });
    assert_eq!(unconfirmed.await, [(I2, Warning, "UNCONFIRMED")]);
}

#[tokio::test]
async fn operations_past_their_deadline_or_without_what_they_work_on_are_found() {
    let late = found(|tx, vm| tx.put_operation(fixtures::operation(vm, OperationKind::Start, None)));
    assert_eq!(late.await, [(I3, Warning, "OPERATION_OVERDUE")]);
    let orphan = found(|tx, _| {
        let gone = fixtures::vm("gone", "h1");
        tx.put_operation(fixtures::operation(&gone, OperationKind::Start, None));
    });
    assert_eq!(orphan.await, [(I3, Critical, "OPERATION_WITHOUT_SUBJECT")]);
    let nowhere = found(|tx, vm| tx.put_operation(fixtures::operation(vm, OperationKind::Migrate, None)));
    assert_eq!(nowhere.await, [(I3, Critical, "OPERATION_WITHOUT_SUBJECT")]);
}

#[tokio::test]
async fn a_vm_at_rest_that_is_not_as_it_was_asked_to_be_is_found_with_its_reason() {
    for (reason, expected) in [
        (PowerReason::Crashed, (I3, Warning, "NOT_AS_ASKED")),
        (PowerReason::Unknown, (I3, Warning, "NOT_AS_ASKED")),
        (PowerReason::GuestShutdown, (I3, Notice, "NOT_AS_ASKED")),
        (PowerReason::External, (I7, Warning, "CHANGED_OUTSIDE")),
    ] {
        let found = found(|tx, vm| {
            see(tx, vm, |seen| {
                seen.power = Some(PowerState::Stopped);
                seen.power_reason = reason;
            });
        });
        assert_eq!(found.await, [expected], "{reason:?}");
    }
    let untold = found(|tx, vm| see(tx, vm, |seen| seen.accepted = Generation(1)));
    assert_eq!(untold.await, [(I3, Warning, "NOT_TOLD")]);
    let behind = found(|tx, vm| {
        see(tx, vm, |seen| {
            seen.power = Some(PowerState::Stopped);
            seen.phase = VmPhase::Applying;
        });
    });
    assert_eq!(behind.await, [], "its host works on it");
}

#[tokio::test]
async fn what_a_host_refuses_or_has_given_up_is_found() {
    let refused = found(|tx, vm| {
        let fault = Fault::new(Code::FailedPrecondition, "NO_KVM", "no KVM");
        let generation = vm.intent.generation;
        tx.refuse(vm.id, Some(Refusal { generation, fault }));
    });
    assert_eq!(refused.await, [(I3, Warning, "REFUSED")]);
    let fault = |retrying, time| {
        Some(VmFault {
            reason: "FILE_NOT_FOUND".into(),
            message: "no image".into(),
            retrying,
            time,
        })
    };
    let failed = found(|tx, vm| {
        see(tx, vm, |seen| {
            seen.phase = VmPhase::Failed;
            seen.fault = fault(false, None);
        });
    });
    assert_eq!(failed.await, [(I3, Warning, "FAILED")]);
    let long_ago = Some(Timestamp::UNIX_EPOCH);
    let trying = found(|tx, vm| {
        see(tx, vm, |seen| {
            seen.phase = VmPhase::Applying;
            seen.fault = fault(true, long_ago);
        });
    });
    assert_eq!(trying.await, [(I14, Warning, "TRIES_FOR_LONG")]);
}

#[tokio::test]
async fn a_deletion_that_is_still_to_be_done_is_found() {
    let pending = found(|tx, vm| changed(tx, vm, |vm| vm.delete_time = Some(Timestamp::UNIX_EPOCH)));
    assert_eq!(pending.await, [(I3, Warning, "DELETION_PENDING")]);
}

#[tokio::test]
async fn a_placement_rule_that_does_not_hold_is_found_while_nothing_moves() {
    use dalgu_proto::placement::Rule::AntiAffinity;
    let beside = |moving: bool| {
        move |tx: &mut Tx, vm: &VmRecord| {
            tx.put_placement_group(fixtures::placement_group("apart", AntiAffinity, None));
            let mut other = fixtures::vm("other", "h1");
            other.placement_groups.insert("apart".parse().unwrap());
            changed(tx, vm, |vm| {
                vm.placement_groups.insert("apart".parse().unwrap());
            });
            tx.put_vm(other.clone());
            see(tx, &other, |_| {});
            if moving {
                tx.put_migration(fixtures::migration(&other, "h2"));
            }
        }
    };
    let broken = (I5, Warning, "PLACEMENT_RULE_BROKEN");
    assert_eq!(found(beside(false)).await, [broken]);
    assert!(!found(beside(true)).await.contains(&broken));
}

#[tokio::test]
async fn promises_beyond_what_a_host_has_are_found_with_who_takes_the_rest() {
    let shrunk = |change: fn(&mut crate::model::HostRecord)| {
        move |tx: &mut Tx, _: &VmRecord| {
            let mut host = fixtures::host("h1");
            change(&mut host);
            tx.put_host(host);
        }
    };
    let memory = found(shrunk(|host| host.inventory.memory_bytes = 600 << 20));
    assert_eq!(memory.await, [(I5, Warning, "OVER_COMMITTED")]);
    let processors = found(shrunk(|host| host.cpu_overcommit_ratio = 0.1));
    assert_eq!(processors.await, [(I5, Warning, "OVER_COMMITTED")]);
    let crowded = found(|tx, _| {
        with_live(tx, "h1", |live| {
            let mut theirs = domain(fixtures::vm("theirs", "h1").id, false, true);
            theirs.memory_mib = 8 << 10;
            live.unmanaged = vec![theirs];
        });
    });
    assert_eq!(crowded.await, [(I5, Warning, "CROWDED")]);
    let pool = found(|tx, vm| {
        let disk = dalgu_proto::vm::Disk {
            name: "root".into(),
            size_mib: 200 << 10,
            pool: "local".into(),
            image: None,
            format: dalgu_proto::vm::DiskFormat::Qcow2,
            digest: None,
            clone_mode: dalgu_proto::vm::CloneMode::Any,
            volume: None,
            limits: Default::default(),
            backup: None,
        };
        changed(tx, vm, |vm| vm.spec.disks.push(disk));
    });
    assert_eq!(pool.await, [(I5, Warning, "POOL_OVER_COMMITTED")]);
    let (state, now) = site(|_, _| {}).await;
    let mut miscounted = (*state).clone();
    miscounted.reserved.remove(&host_name("h1"));
    let kinds: Vec<_> = look(&miscounted, now, None)
        .findings
        .iter()
        .map(|f| f.kind)
        .collect();
    assert_eq!(kinds, ["PROMISES_MISCOUNTED"]);
}

#[tokio::test]
async fn a_host_that_knows_higher_numbers_than_the_store_is_found() {
    let epoch = found(|tx, vm| {
        let mut ahead = said(vm, "h1", PowerState::Running);
        ahead.observation.epoch = Epoch(9);
        tx.note_stray(host_name("h1"), ahead);
    });
    assert_eq!(epoch.await, [(I6, Critical, "AHEAD_OF_STORE")]);
    let generation = found(|tx, vm| see(tx, vm, |seen| seen.accepted = Generation(99)));
    assert_eq!(generation.await, [(I6, Critical, "AHEAD_OF_STORE")]);
}

#[tokio::test]
async fn a_request_that_led_to_two_operations_is_found() {
    let twice = found(|tx, vm| {
        for _ in 0..2 {
            let mut operation = fixtures::operation(vm, OperationKind::Start, None);
            operation.request_id = "r".into();
            operation.state = crate::model::OperationState::Succeeded;
            tx.put_operation(operation);
        }
    });
    assert_eq!(twice.await, [(I8, Critical, "REQUEST_DONE_TWICE")]);
}

#[tokio::test]
async fn another_controller_is_found() {
    let found = found(|tx, _| tx.set_replaced("run 7".to_owned()));
    assert_eq!(found.await, [(I12, Critical, "OTHER_CONTROLLER")]);
}

#[tokio::test]
async fn a_host_that_was_not_heard_lately_or_not_in_full_is_found_and_named_as_not_seen() {
    type Change = fn(&mut HostLive);
    let cases: [(&str, Change); 4] = [
        ("HOST_SILENT", |live| live.state = HostState::Unreachable),
        ("HOST_SILENT", |live| live.state = HostState::Initializing),
        ("HYPERVISOR_DOWN", |live| {
            live.hypervisor_error = Some("no socket".into())
        }),
        ("INCOMPLETE_INVENTORY", |live| live.complete = false),
    ];
    for (kind, change) in cases {
        let diagnosis = diagnosis(|tx, vm| {
            with_live(tx, "h1", change);
            // What it said last is not what is: nothing follows from it.
            see(tx, vm, |seen| seen.power = Some(PowerState::Stopped));
        })
        .await;
        let kinds: Vec<_> = diagnosis.findings.iter().map(|f| (f.invariant, f.kind)).collect();
        assert_eq!(kinds, [(I13, kind)]);
        assert_eq!(diagnosis.gaps.len(), 1);
        assert_eq!(
            (diagnosis.gaps[0].host.as_str(), diagnosis.gaps[0].vms),
            ("h1", 1)
        );
        assert_eq!(diagnosis.checks[0].unchecked, 1, "{kind}");
    }
}

#[tokio::test]
async fn clocks_apart_and_vms_that_their_host_cannot_look_at_are_found() {
    let shift = |seconds: i64| {
        move |tx: &mut Tx, vm: &VmRecord| {
            let theirs = tx
                .now()
                .saturating_add(jiff::SignedDuration::from_secs(seconds))
                .unwrap();
            with_live(tx, "h1", |live| live.usage.as_mut().unwrap().sample_time = theirs);
            // By the same clock.
            see(tx, vm, |seen| seen.observe_time = Some(theirs));
        }
    };
    assert_eq!(found(shift(300)).await, [(I13, Warning, "CLOCK_SKEW")]);
    assert_eq!(found(shift(-300)).await, [(I13, Warning, "CLOCK_SKEW")]);
    assert_eq!(found(shift(30)).await, []);
    let old = found(|tx, vm| see(tx, vm, |seen| seen.observe_time = Some(Timestamp::UNIX_EPOCH)));
    assert_eq!(old.await, [(I13, Warning, "STATUS_OLD")]);
    let blind = found(|tx, vm| see(tx, vm, |seen| seen.observe_time = None));
    assert_eq!(blind.await, [(I13, Warning, "STATUS_OLD")]);
}

#[tokio::test]
async fn a_migration_that_stands_still_is_found_and_one_in_doubt_at_once() {
    let moving = |phase, doubt: Option<&'static str>, long_ago: bool| {
        move |tx: &mut Tx, vm: &VmRecord| {
            let mut migration = fixtures::migration(vm, "h2");
            migration.phase = phase;
            if !long_ago {
                migration.phase_time = tx.now();
            }
            let mut operation = fixtures::operation(vm, OperationKind::Migrate, None);
            operation.migration = Some(migration.id);
            migration.operation = operation.id;
            let live = MigrationLive {
                doubt: doubt.map(Into::into),
                ..MigrationLive::default()
            };
            tx.set_migration_live(migration.id, live);
            tx.put_operation(operation);
            tx.put_migration(migration);
        }
    };
    assert_eq!(found(moving(Phase::Transferring, None, false)).await, []);
    let still = found(moving(Phase::Transferring, None, true));
    assert_eq!(still.await, [(I14, Warning, "MIGRATION_STANDS")]);
    let doubt = found(moving(Phase::CuttingOver, Some("h2 cannot be asked"), false));
    assert_eq!(doubt.await, [(I14, Warning, "RESOLVING")]);
    let orphan = found(|tx, vm| tx.put_migration(fixtures::migration(vm, "h2")));
    assert_eq!(orphan.await, [(I14, Critical, "MIGRATION_WITHOUT_SUBJECT")]);
}

#[tokio::test]
async fn a_store_that_is_damaged_full_or_restored_is_found() {
    let low = found(|tx, _| {
        tx.set_space(Space {
            free_bytes: 1,
            reserve_bytes: 2,
            low: true,
        });
    });
    assert_eq!(low.await, [(Store, Warning, "STORE_LOW_SPACE")]);
    assert_eq!(
        found(|tx, _| observe(tx)).await,
        [(Store, Warning, "SITE_OBSERVING")]
    );
    let (state, now) = site(|_, _| {}).await;
    let shallow = look(&state, now, None).checks.pop().unwrap();
    assert_eq!(
        shallow.checked, shallow.unchecked,
        "it has not looked at the file"
    );
    let deep = look(&state, now, Some(vec!["page 7 is never used".into()]));
    assert_eq!(deep.findings[0].kind, "STORE_DAMAGED");
    assert_eq!(deep.findings[0].severity, Critical);
    assert_eq!(look(&state, now, Some(vec![])).findings, []);
}

#[tokio::test]
async fn the_worst_comes_first_and_what_has_passed_by_the_second_look_is_dropped() {
    let (state, now) = site(|tx, vm| {
        tx.set_replaced("run 7".to_owned());
        tx.observe(vm.id, None);
    })
    .await;
    let first = look(&state, now, None);
    let kinds = |diagnosis: &Diagnosis| diagnosis.findings.iter().map(|f| f.kind).collect::<Vec<_>>();
    assert_eq!(kinds(&first), ["OTHER_CONTROLLER", "NOT_SHOWN"]);
    let (state, now) = site(|tx, _| tx.set_replaced("run 8".to_owned())).await;
    let second = look(&state, now, None);
    assert_eq!(kinds(&second.clone().lasting(&first)), ["OTHER_CONTROLLER"]);
    assert_eq!(kinds(&first.lasting(&Diagnosis::default())), Vec::<&str>::new());
}

#[test]
fn of_many_hosts_some_are_named_and_the_others_counted() {
    let names: Vec<_> = (1..=10).map(|number| format!("h{number}")).collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    assert_eq!(some(&names), "h1, h2, h3, h4, h5, h6, h7, h8 and 2 more");
    assert_eq!(some(&names[..8]), "h1, h2, h3, h4, h5, h6, h7, h8");
    assert_eq!(some(&names[..2]), "h1, h2");
}

#[test]
fn whoever_is_in_two_places_is_found_among_many() {
    assert_eq!(twice([(1, 'a'), (2, 'b'), (3, 'a')]), None);
    assert_eq!(
        twice([(3, 'b'), (1, 'a'), (2, 'b'), (3, 'a')]),
        Some((3, 'a', 'b'))
    );
}

#[tokio::test]
async fn an_image_that_nobody_who_is_heard_has_is_told_by_its_name_unless_that_is_private() {
    use crate::model::{HeldImage, HostState, ImagePhase, Visibility};
    let with_copy = |tx: &mut Tx, host: &str| {
        let copy = HeldImage::Copy(fixtures::digest(1), fixtures::held(ImagePhase::Ready));
        tx.note_held(&host_name(host), copy);
    };
    let none = found(|tx, _| {
        tx.put_image(fixtures::image("12", 1));
        with_copy(tx, "h1");
    });
    assert_eq!(none.await, []);
    let nobody = found(|tx, _| tx.put_image(fixtures::image("12", 1)));
    assert_eq!(nobody.await, [(I2, Warning, "IMAGE_WITHOUT_COPY")]);
    let silent = diagnosis(|tx, _| {
        let mut image = fixtures::image("12", 1);
        image.visibility = Visibility::Private;
        tx.put_image(image);
        with_copy(tx, "h2");
        let mut live = (*tx.live[&host_name("h2")]).clone();
        live.state = HostState::Unreachable;
        tx.set_live(host_name("h2"), live);
    })
    .await;
    let told = silent
        .findings
        .iter()
        .find(|finding| finding.kind == "IMAGE_WITHOUT_COPY")
        .unwrap();
    assert!(told.next_step.contains("h2"), "{told:?}");
    assert!(!told.subject.contains("debian"), "{told:?}");
}

#[tokio::test]
async fn a_deletion_of_an_image_that_does_not_end_names_who_is_waited_for() {
    use crate::model::{HostState, ImageState};
    let deleting = |ago: u64| {
        move |tx: &mut Tx, _: &VmRecord| {
            let mut image = fixtures::image("12", 1);
            image.state = ImageState::Deleting;
            let asked = tx.now().checked_sub(Duration::from_secs(ago)).unwrap();
            image.delete_time = Some(asked);
            tx.put_image(image);
            let mut live = (*tx.live[&host_name("h2")]).clone();
            live.state = HostState::Unreachable;
            tx.set_live(host_name("h2"), live);
        }
    };
    let pending = |diagnosis: Diagnosis| {
        let mut findings = diagnosis.findings.into_iter();
        findings.find(|finding| finding.kind == "IMAGE_DELETION_PENDING")
    };
    assert_eq!(pending(diagnosis(deleting(60)).await), None);
    let told = pending(diagnosis(deleting(3600)).await).unwrap();
    assert_eq!(told.next_step, "bring back h2, or delete those hosts");
}

#[tokio::test]
async fn a_vm_that_its_schedule_has_not_backed_up_for_twice_its_interval_is_told() {
    let diagnosis = diagnosis(|tx, vm| {
        let mut gold = VmRecord {
            name: vm.name.clone(),
            id: vm.id,
            ..backups::gold("web")
        };
        let day = Duration::from_hours(24);
        // The first looks back far enough, and the second does not.
        for (name, created) in [("nightly", tx.now() - 3 * day), ("weekly", tx.now() - day)] {
            tx.put_schedule(ScheduleRecord {
                create_time: created,
                every_seconds: day.as_secs(),
                ..backups::schedule(name)
            });
        }
        gold.create_time = tx.now() - 3 * day;
        tx.put_vm(gold.clone());
        see(tx, &gold, |_| {});
        let error = Fault {
            code: 9,
            reason: "STORAGE".into(),
            message: "no space left".into(),
        };
        tx.put_backup(BackupRecord {
            error: Some(error),
            ..backups::backup(&gold, 1, 0, BackupState::Failed, None)
        });
    })
    .await;
    let told: Vec<_> = diagnosis
        .findings
        .iter()
        .map(|f| (f.invariant, f.severity, f.kind))
        .collect();
    assert_eq!(told, [(I3, Warning, "BACKUP_OVERDUE")]);
    let finding = &diagnosis.findings[0];
    assert_eq!(finding.subject, "vm web");
    assert_eq!(
        finding.seen,
        "it has been there for 72 h 0 min and has no good backup by schedule nightly, which takes one every 24 h 0 min; the last \
         attempt failed: no space left (STORAGE)"
    );
    assert!(
        finding
            .next_step
            .contains("`dalgu backup create web --pool local`"),
        "{finding:?}"
    );
}

#[tokio::test]
async fn a_host_that_does_not_take_up_its_networks_is_told() {
    let take = |tx: &mut Tx, taken: bool| {
        tx.put_network(fixtures::overlay("field", 7));
        let vm = fixtures::vm_in("field", &[], "db", "h2");
        tx.put_vm(vm.clone());
        see(tx, &vm, |_| {});
        let version = u64::from(taken) * u64::MAX;
        tx.networks_taken(&host_name("h2"), "", version);
    };
    assert_eq!(found(|tx, _| take(tx, true)).await, []);
    let told = found(|tx, _| take(tx, false)).await;
    assert_eq!(told, [(I3, Warning, "NETWORKS_NOT_TAKEN")]);
}

#[tokio::test]
async fn interfaces_that_nobody_could_have_got_from_dalgu_are_told() {
    let told = found(|tx, _| {
        for name in ["one", "two"] {
            let mut vm = fixtures::vm_in("gone", &["gone"], name, "h2");
            if let dalgu_proto::vm::Plug::Network(port) = &mut vm.spec.nics[0].plug {
                port.ipv4 = Some([10, 20, 0, 7].into());
            }
            tx.put_vm(vm.clone());
            see(tx, &vm, |_| {});
        }
        tx.networks_taken(&host_name("h2"), "", u64::MAX);
    });
    let expected = ["NETWORK_MISSING", "ADDRESS_GIVEN_TWICE", "SECURITY_GROUP_MISSING"];
    assert_eq!(told.await, expected.map(|kind| (Store, Critical, kind)));
}
