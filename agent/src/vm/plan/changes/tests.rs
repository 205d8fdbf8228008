//! Every difference between a domain and its intent, and the step or the word that follows; and that steps lead to an end.

use dalgu_proto::vm::{CloneMode, DiskFormat, Nic, Plug, PowerReason, PowerState};
use proptest::prelude::*;

use super::*;
use crate::{
    hypervisor::{DiskCopy, SPARE_PORTS},
    vm::plan::{self, tests},
};

fn disk(name: &str, size_mib: u64) -> Disk {
    Disk {
        name: name.into(),
        size_mib,
        pool: "local".into(),
        image: None,
        format: DiskFormat::Qcow2,
        digest: None,
        clone_mode: CloneMode::Any,
        volume: None,
        limits: Default::default(),
        backup: None,
    }
}

fn nic(name: &str) -> Nic {
    Nic {
        name: name.into(),
        plug: Plug::Bridge { bridge: "br0".into() },
        mac: "52:54:00:00:00:01".into(),
        reserved_mbit: None,
    }
}

/// A VM with 2 of 4 processors, 256 of 512 MiB, a disk and an interface, which runs so.
fn settled() -> (Vm, Hardware) {
    let mut vm = tests::vm(PowerState::Running);
    vm.done.power = 3;
    vm.done.volumes = true;
    vm.changes.under_way = true;
    let spec = &mut vm.intent.as_mut().unwrap().spec;
    (spec.vcpus, spec.max_vcpus) = (2, Some(4));
    (spec.memory_mib, spec.max_memory_mib) = (256, Some(512));
    spec.disks = vec![disk("root", 8)];
    spec.nics = vec![nic("eth0")];
    let hardware = Hardware::of(spec);
    (vm, hardware)
}

fn running() -> Domain {
    tests::domain(DomainState::Running, PowerReason::Unknown)
}

fn memory(hardware: &Hardware) -> Memory {
    Memory {
        hardware: Some(hardware.clone()),
        ..tests::READY
    }
}

fn step(vm: &Vm, hardware: &Hardware) -> Step {
    plan::next(vm, Some(&running()), &memory(hardware))
}

type Edit = fn(&mut Vm);

fn spec(vm: &mut Vm) -> &mut Spec {
    &mut vm.intent.as_mut().unwrap().spec
}

#[test]
fn each_difference_leads_to_its_change_or_waits_for_the_next_start() {
    let attach = |name: &str| Some(Step::Change(Change::AttachDisk(name.into())));
    let cases: [(&str, Edit, Option<Step>, &[&str]); 14] = [
        ("nothing", |_| {}, Some(Step::ChangesDone), &[]),
        (
            "more processors",
            |vm| spec(vm).vcpus = 4,
            Some(Step::Change(Change::Vcpus(4))),
            &["vcpus"],
        ),
        (
            "fewer processors",
            |vm| spec(vm).vcpus = 1,
            Some(Step::Change(Change::Vcpus(1))),
            &["vcpus"],
        ),
        (
            "more processors than it can have",
            |vm| {
                spec(vm).vcpus = 6;
                spec(vm).max_vcpus = None;
            },
            None,
            &["vcpus"],
        ),
        (
            "a greater maximum",
            |vm| spec(vm).max_vcpus = Some(8),
            None,
            &["max_vcpus"],
        ),
        (
            "more memory",
            |vm| spec(vm).memory_mib = 384,
            Some(Step::Change(Change::MemoryMib(384))),
            &["memory_mib"],
        ),
        (
            "less memory than it was started with",
            |vm| spec(vm).memory_mib = 128,
            None,
            &["memory_mib"],
        ),
        (
            "a memory that differs by less than a piece",
            |vm| spec(vm).memory_mib = 257,
            Some(Step::ChangesDone),
            &[],
        ),
        (
            "another disk",
            |vm| spec(vm).disks.push(disk("data", 8)),
            attach("data"),
            &["disks[data]"],
        ),
        (
            "a larger disk",
            |vm| spec(vm).disks[0].size_mib = 16,
            Some(Step::Change(Change::GrowDisk("root".into()))),
            &["disks[root].size_mib"],
        ),
        (
            "a limit of a disk",
            |vm| spec(vm).disks[0].limits.read_iops = Some(500),
            Some(Step::Change(Change::LimitDisk("root".into()))),
            &["disks[root].limits"],
        ),
        (
            "a disk that is to be in another pool",
            |vm| spec(vm).disks[0].pool = "fast".into(),
            Some(Step::Change(Change::MoveDisk("root".into()))),
            &["disks[root].pool"],
        ),
        (
            "another interface",
            |vm| spec(vm).nics.push(nic("eth1")),
            Some(Step::Change(Change::AttachNic("eth1".into()))),
            &["nics[eth1]"],
        ),
        (
            "one interface less",
            |vm| spec(vm).nics.clear(),
            Some(Step::Change(Change::DetachNic("eth0".into()))),
            &["nics[eth0]"],
        ),
    ];
    for (what, edit, expected, fields) in cases {
        let (mut vm, hardware) = settled();
        edit(&mut vm);
        assert_eq!(step(&vm, &hardware), expected.unwrap_or(Step::Settled), "{what}");
        let pending = pending(&vm, &hardware, &running(), &BTreeMap::new());
        let told: Vec<_> = pending.iter().map(|pending| pending.field.as_str()).collect();
        assert_eq!(told, fields, "{what}");
    }
}

#[test]
fn a_disk_goes_from_the_guest_first_and_then_from_its_pool() {
    let (mut vm, mut hardware) = settled();
    hardware
        .disks
        .insert("data".into(), Attached::of(&disk("data", 8)));
    vm.changes.removed.push(disk("data", 8));
    let asked = Change::DetachDisk("data".into());
    assert_eq!(step(&vm, &hardware), Step::Change(asked.clone()));
    let mut patient = memory(&hardware);
    patient.tried = vec![(asked.clone(), Duration::from_secs(1))];
    assert_eq!(
        plan::next(&vm, Some(&running()), &patient),
        Step::Settled,
        "the guest holds it"
    );
    let told = pending(&vm, &hardware, &running(), &BTreeMap::new());
    assert!(told[0].message.starts_with("DISK_IN_USE_BY_GUEST"), "{told:?}");
    assert!(disks_differ(&vm, &hardware));
    patient.tried = vec![(asked, AGAIN)];
    assert_eq!(
        plan::next(&vm, Some(&running()), &patient),
        Step::Change(Change::DetachDisk("data".into())),
        "it is asked again"
    );
    hardware.disks.remove("data");
    assert_eq!(
        step(&vm, &hardware),
        Step::DeleteVolume(Box::new(disk("data", 8)))
    );
    vm.changes.removed.clear();
    assert_eq!(step(&vm, &hardware), Step::ChangesDone);
}

#[test]
fn without_a_free_port_a_device_waits_for_the_next_start() {
    let (mut vm, mut hardware) = settled();
    hardware.free_ports = 0;
    spec(&mut vm).disks.push(disk("data", 8));
    assert_eq!(step(&vm, &hardware), Step::Settled);
    assert!(
        pending(&vm, &hardware, &running(), &BTreeMap::new())[0]
            .message
            .contains("next start")
    );
}

#[test]
fn the_volume_comes_first_then_the_definition_and_then_the_guest() {
    let (mut vm, hardware) = settled();
    spec(&mut vm).disks.push(disk("data", 8));
    vm.done.defined = None;
    let unmade = Memory {
        volumes_ready: false,
        ..memory(&hardware)
    };
    assert_eq!(plan::next(&vm, Some(&running()), &unmade), Step::CreateVolumes);
    assert_eq!(step(&vm, &hardware), Step::Define);
    let unseen = Memory {
        hardware: None,
        ..tests::READY
    };
    assert_eq!(plan::next(&vm, Some(&running()), &unseen), Step::Look);
}

#[test]
fn a_vm_that_is_off_has_its_changes_with_its_definition() {
    let (mut vm, mut hardware) = settled();
    spec(&mut vm).vcpus = 3;
    spec(&mut vm).disks[0].size_mib = 16;
    vm.changes.removed.push(disk("data", 8));
    vm.intent.as_mut().unwrap().power = PowerState::Stopped;
    let off = tests::domain(DomainState::Stopped, PowerReason::Requested);
    let next = |vm: &Vm, hardware: &Hardware| plan::next(vm, Some(&off), &memory(hardware));
    assert_eq!(
        next(&vm, &hardware),
        Step::Change(Change::GrowDisk("root".into()))
    );
    hardware
        .disks
        .insert("root".into(), Attached::of(&disk("root", 16)));
    assert_eq!(
        next(&vm, &hardware),
        Step::DeleteVolume(Box::new(disk("data", 8)))
    );
    vm.changes.removed.clear();
    assert_eq!(next(&vm, &hardware), Step::ChangesDone);
    assert!(pending(&vm, &hardware, &off, &BTreeMap::new()).is_empty());
}

/// A disk that is to go from one pool to another, copied as far as this.
fn moving(copy: Option<(&str, u8)>) -> (Vm, Hardware) {
    let (mut vm, mut hardware) = settled();
    let old = spec(&mut vm).disks[0].clone();
    spec(&mut vm).disks[0].pool = "fast".into();
    vm.changes.removed.push(old);
    hardware.disks.get_mut("root").unwrap().copy = copy.map(|(pool, percent)| DiskCopy {
        pool: Some(pool.into()),
        percent,
        ready: percent == 100,
    });
    (vm, hardware)
}

fn told_of_move(vm: &Vm, hardware: &Hardware, memory: &Memory) -> String {
    let told = pending(vm, hardware, &running(), &memory.failed_moves);
    assert_eq!(told[0].field, "disks[root].pool");
    told[0].message.clone()
}

#[test]
fn a_move_is_gone_on_with_when_there_is_something_to_do_and_the_vm_is_settled_meanwhile() {
    let go_on = Step::Change(Change::MoveDisk("root".into()));
    for (copy, expected, words) in [
        (None, go_on.clone(), "about to be copied"),
        (Some(("fast", 37)), Step::Settled, "37 % copied"),
        (Some(("fast", 100)), go_on.clone(), "100 % copied"),
        (Some(("slow", 37)), go_on.clone(), "given up"),
    ] {
        let (vm, hardware) = moving(copy);
        assert_eq!(step(&vm, &hardware), expected, "{copy:?}");
        let told = told_of_move(&vm, &hardware, &memory(&hardware));
        assert!(told.contains(words), "{copy:?}: {told}");
        assert!(disks_differ(&vm, &hardware));
        assert_eq!(
            go_on.freezes(Some(&hardware)),
            copy.is_some_and(|(_, percent)| percent == 100)
        );
    }
}

#[test]
fn a_move_that_failed_is_told_and_tried_again_later() {
    let (vm, hardware) = moving(None);
    let mut failed = memory(&hardware);
    let mut after = |times, ago| {
        let message = "pool fast: 3 MiB are free".to_owned();
        let one = FailedMove { message, ago, times };
        failed.failed_moves = [("root".to_owned(), one)].into();
        (
            plan::next(&vm, Some(&running()), &failed),
            told_of_move(&vm, &hardware, &failed),
        )
    };
    let (step, told) = after(1, Duration::from_secs(3));
    assert_eq!(step, Step::Settled);
    assert!(told.starts_with("pool fast: 3 MiB are free"), "{told}");
    let again = Step::Change(Change::MoveDisk("root".into()));
    assert_eq!(after(1, AGAIN).0, again);
    assert_eq!(after(2, AGAIN).0, Step::Settled);
    assert_eq!(after(2, MOVE_AGAIN).0, again);
}

#[test]
fn a_file_is_deleted_only_when_the_disk_and_its_copy_are_elsewhere() {
    let (mut vm, mut hardware) = moving(None);
    let old = vm.changes.removed[0].clone();
    hardware.disks.get_mut("root").unwrap().pool = Some("fast".into());
    assert_eq!(step(&vm, &hardware), Step::DeleteVolume(Box::new(old)));
    // It comes back before it was moved.
    (vm, hardware) = moving(None);
    spec(&mut vm).disks[0].pool = "local".into();
    vm.changes.removed[0].pool = "fast".into();
    let abandoned = vm.changes.removed[0].clone();
    assert_eq!(step(&vm, &hardware), Step::DeleteVolume(Box::new(abandoned)));
    let copy = DiskCopy {
        pool: Some("fast".into()),
        percent: 5,
        ready: false,
    };
    hardware.disks.get_mut("root").unwrap().copy = Some(copy);
    assert_eq!(
        step(&vm, &hardware),
        Step::Change(Change::MoveDisk("root".into()))
    );
    // A domain that does not have the disk says nothing about where it is.
    (vm, hardware) = moving(None);
    hardware.disks.remove("root");
    hardware.free_ports = 0;
    assert_eq!(step(&vm, &hardware), Step::Settled);
    // Where a file is in none of the pools, nothing is known of it, and nothing is deleted.
    (vm, hardware) = moving(None);
    hardware.disks.get_mut("root").unwrap().pool = None;
    assert_eq!(step(&vm, &hardware), Step::Settled);
}

/// The volume of the site that a disk is.
fn of_volume(disk: &mut Disk) {
    disk.volume = Some(dalgu_proto::vm::VolumeRef {
        name: "ledger".parse().unwrap(),
        id: Some(dalgu_proto::ids::VolumeId::from_uuid(uuid::Uuid::from_u128(5))),
        format: None,
    });
}

#[test]
fn the_old_file_of_a_volume_goes_when_the_domain_has_the_new_one_and_is_told_of_until_then() {
    let (mut vm, mut hardware) = moving(None);
    of_volume(&mut spec(&mut vm).disks[0]);
    of_volume(&mut vm.changes.removed[0]);
    let old = vm.changes.removed[0].clone();
    assert!(moves(spec(&mut vm), &old));
    hardware.disks.get_mut("root").unwrap().pool = Some("fast".into());
    assert_eq!(step(&vm, &hardware), Step::DeleteVolume(Box::new(old.clone())));
    let told = told_of_move(&vm, &hardware, &memory(&hardware));
    assert!(told.contains("about to be removed"), "{told}");
    vm.changes.removed.clear();
    assert_eq!(pending(&vm, &hardware, &running(), &BTreeMap::new()), []);
    // One that is taken away is no move.
    spec(&mut vm).disks.clear();
    assert!(!moves(spec(&mut vm), &old));
}

#[test]
fn a_guest_that_was_frozen_to_change_over_goes_on() {
    let (mut vm, hardware) = moving(Some(("fast", 100)));
    let frozen = tests::domain(DomainState::Paused, PowerReason::External);
    let next = |vm: &Vm| plan::next(vm, Some(&frozen), &memory(&hardware));
    assert_ne!(next(&vm), Step::Resume, "somebody else froze it");
    vm.changes.frozen = true;
    assert_eq!(next(&vm), Step::Resume);
    vm.intent.as_mut().unwrap().power = PowerState::Paused;
    assert_ne!(next(&vm), Step::Resume, "it is to be so");
}

/// What a step does where nothing fails; `holds` is a guest that lets go of nothing.
fn do_step(
    vm: &mut Vm,
    hardware: &mut Hardware,
    tried: &mut Vec<(Change, Duration)>,
    step: Step,
    holds: bool,
) {
    match step {
        Step::DeleteVolume(disk) => vm.changes.removed.retain(|other| *other != *disk),
        Step::ChangesDone => vm.changes.under_way = false,
        Step::Change(change) => {
            tried.push((change.clone(), Duration::ZERO));
            match change {
                Change::Vcpus(vcpus) if !holds || vcpus > hardware.vcpus => hardware.vcpus = vcpus,
                Change::MemoryMib(mib) if !holds || mib > hardware.memory_mib => hardware.memory_mib = mib,
                Change::GrowDisk(name) => {
                    let wanted = spec(vm).disks.iter().find(|disk| disk.name == name);
                    hardware.disks.insert(name.clone(), Attached::of(wanted.unwrap()));
                }
                Change::LimitDisk(name) => {
                    let wanted = spec(vm).disks.iter().find(|disk| disk.name == name).unwrap();
                    hardware.disks.get_mut(&name).unwrap().limits = wanted.limits;
                }
                Change::MoveDisk(name) => {
                    let wanted = spec(vm).disks.iter().find(|disk| disk.name == name).unwrap();
                    let there = hardware.disks.get_mut(&name).unwrap();
                    there.pool = Some(wanted.pool.clone());
                    there.copy = None;
                }
                Change::AttachDisk(name) => {
                    let wanted = spec(vm).disks.iter().find(|disk| disk.name == name);
                    hardware.disks.insert(name.clone(), Attached::of(wanted.unwrap()));
                    hardware.free_ports -= 1;
                }
                Change::AttachNic(name) => {
                    hardware.nics.insert(name);
                    hardware.free_ports -= 1;
                }
                Change::DetachDisk(name) if !holds => {
                    hardware.disks.remove(&name);
                    hardware.free_ports += 1;
                }
                Change::DetachNic(name) if !holds => {
                    hardware.nics.remove(&name);
                    hardware.free_ports += 1;
                }
                _ => {}
            }
        }
        other => panic!("{other:?} is no step of a change"),
    }
}

proptest! {
    /// From any hardware, steps come to an end; then the domain has what was asked for, or what it lacks is told.
    #[test]
    fn steps_come_to_an_end_and_nothing_is_ignored(
        vcpus in 1_u32..8, memory_mib in 1_u64..400, sizes in prop::collection::vec(1_u64..32, 0..5),
        had in prop::collection::vec(1_u64..32, 0..5), nics in 0_usize..3, had_nics in 0_usize..3,
        ports in 0..=SPARE_PORTS, holds: bool, elsewhere in prop::collection::vec(any::<bool>(), 5),
        limit in prop::option::of(1_u64..9),
    ) {
        let (mut vm, mut hardware) = settled();
        spec(&mut vm).vcpus = vcpus;
        spec(&mut vm).memory_mib = memory_mib * 2;
        for (number, size) in sizes.iter().enumerate() {
            let mut wanted = disk(&format!("d{number}"), *size);
            wanted.limits.write_iops = limit;
            if elsewhere[number] {
                vm.changes.removed.extend((number < had.len()).then(|| wanted.clone()));
                wanted.pool = "fast".into();
            }
            spec(&mut vm).disks.push(wanted);
        }
        spec(&mut vm).nics = (0..nics).map(|number| nic(&format!("n{number}"))).collect();
        hardware.nics = (0..had_nics).map(|number| format!("n{number}")).collect();
        hardware.free_ports = ports;
        for (number, size) in had.iter().enumerate() {
            let name = format!("d{number}");
            if number >= sizes.len() {
                vm.changes.removed.push(disk(&name, *size));
            }
            hardware.disks.insert(name.clone(), Attached::of(&disk(&name, *size)));
        }
        let mut tried = Vec::new();
        for _ in 0..64 {
            let memory = Memory { tried: tried.clone(), ..memory(&hardware) };
            match plan::next(&vm, Some(&running()), &memory) {
                Step::Settled => break,
                step => do_step(&mut vm, &mut hardware, &mut tried, step, holds),
            }
        }
        let memory = Memory { tried, ..memory(&hardware) };
        prop_assert_eq!(plan::next(&vm, Some(&running()), &memory), Step::Settled, "it has no end");
        let told = pending(&vm, &hardware, &running(), &BTreeMap::new());
        prop_assert_eq!(vm.changes.under_way, !told.is_empty() || !vm.changes.removed.is_empty());
        let says = |field: &str| told.iter().any(|pending| pending.field == field);
        let want = spec(&mut vm).clone();
        prop_assert!(hardware.vcpus == want.vcpus || says("vcpus"));
        prop_assert!(same_memory(hardware.memory_mib, want.memory_mib) || says("memory_mib"));
        for disk in &want.disks {
            let there = hardware.disks.get(&disk.name);
            let fine = there.is_some_and(|there| there.size_mib >= disk.size_mib);
            let words = [format!("disks[{}]", disk.name), format!("disks[{}].size_mib", disk.name)];
            prop_assert!(there.is_none_or(|there| there.pool.as_ref() == Some(&disk.pool)), "{} stays", disk.name);
            prop_assert!(there.is_none_or(|there| there.limits == disk.limits), "{} has no limit", disk.name);
            prop_assert!(fine || words.iter().any(|field| says(field)), "{} is ignored", disk.name);
        }
        for removed in &vm.changes.removed {
            let field = format!("disks[{}]", removed.name);
            prop_assert!(says(&field), "{} is ignored", removed.name);
        }
    }
}
