//! Every difference between the layers that are there and those that are wanted, and the step that follows; and that steps lead to
//! the wanted ones from wherever an agent died.

use dalgu_proto::{
    ids::{SnapshotId, VolumeId},
    snapshot::{Layer, Revert},
    vm::{Disk, PowerReason, PowerState, VolumeRef},
};
use proptest::prelude::*;

use super::*;
use crate::{
    hypervisor::{Domain, DomainState, LayerSeen},
    vm::plan::{self, tests},
};

fn set(numbers: &[u32], revert: Option<(u32, u32)>) -> Set {
    let layer = |number: &u32| Layer {
        number: *number,
        id: SnapshotId::from_uuid(uuid::Uuid::from_u128((*number).into())),
        name: format!("s{number}").parse().unwrap(),
    };
    Set {
        layers: numbers.iter().map(layer).collect(),
        last: numbers.last().copied().unwrap_or(0),
        revert: revert.map(|(number, replaces)| Revert { number, replaces }),
    }
}

/// A disk that is a volume of the site.
fn volume() -> Disk {
    Disk {
        name: "data".into(),
        size_mib: 64,
        pool: "local".into(),
        image: None,
        format: Default::default(),
        digest: None,
        clone_mode: Default::default(),
        volume: Some(VolumeRef {
            name: "ledger".parse().unwrap(),
            id: Some(VolumeId::from_uuid(uuid::Uuid::from_u128(9))),
            format: None,
        }),
        limits: Default::default(),
        backup: None,
    }
}

fn layers(there: &[u32], spare: &[u32]) -> Layers {
    let seen = |number: &u32| {
        let layer = LayerSeen {
            whole: true,
            written_bytes: 0,
        };
        (*number, layer)
    };
    Layers {
        there: there.iter().map(seen).collect(),
        spare: spare.iter().copied().collect(),
        ..Layers::default()
    }
}

fn vm(power: PowerState, set: Set) -> Vm {
    let mut vm = tests::vm(power);
    vm.done.power = 3;
    vm.done.volumes = true;
    vm.snapshots.under_way = true;
    vm.snapshots.seen = Some(10);
    vm.intent.as_mut().unwrap().snapshots = Some(set);
    vm
}

fn domain(state: DomainState) -> Domain {
    tests::domain(state, PowerReason::Unknown)
}

fn memory(layers: &Layers) -> Memory {
    Memory {
        layers: Some(layers.clone()),
        ..tests::READY
    }
}

fn step(vm: &Vm, state: DomainState, layers: &Layers) -> Step {
    plan::next(vm, Some(&domain(state)), &memory(layers))
}

#[test]
fn each_difference_leads_to_one_step() {
    use LayerChange::{Add, Merge, Remove};
    let revert = |number, replaces| LayerChange::Revert { number, replaces };
    let cases = [
        ("nothing", &[1, 2][..], None, layers(&[1, 2], &[]), None),
        ("one is wanted", &[1], None, layers(&[], &[]), Some(Add(1))),
        ("its files are there", &[1], None, layers(&[], &[1]), Some(Add(1))),
        ("the older first", &[3, 4], None, layers(&[], &[]), Some(Add(3))),
        ("before another goes", &[3], None, layers(&[2], &[]), Some(Add(3))),
        (
            "one is not wanted",
            &[1, 3],
            None,
            layers(&[1, 2, 3], &[]),
            Some(Merge(2)),
        ),
        (
            "files that no disk has",
            &[1],
            None,
            layers(&[1], &[2]),
            Some(Remove(2)),
        ),
        (
            "files go before others are merged",
            &[],
            None,
            layers(&[1], &[2]),
            Some(Remove(2)),
        ),
        (
            "one that was lost is not made later",
            &[1, 3],
            None,
            layers(&[3], &[]),
            None,
        ),
        (
            "back",
            &[1, 5],
            Some((5, 2)),
            layers(&[1, 2, 4], &[]),
            Some(revert(5, 2)),
        ),
        (
            "what was before going back",
            &[1, 5],
            Some((5, 2)),
            layers(&[1, 5], &[2, 4]),
            Some(Remove(2)),
        ),
        ("gone back", &[1, 5], Some((5, 2)), layers(&[1, 5], &[]), None),
        (
            "a layer that nobody has seen used may be",
            &[],
            None,
            layers(&[4], &[11]),
            Some(Add(11)),
        ),
    ];
    for (what, wanted, back, there, expected) in cases {
        let vm = vm(PowerState::Stopped, set(wanted, back));
        let expected = expected.map_or(Step::LayersDone, Step::Layer);
        assert_eq!(step(&vm, DomainState::Stopped, &there), expected, "{what}");
    }
}

#[test]
fn a_start_waits_for_a_snapshot_and_not_for_a_merge() {
    let mut starting = vm(PowerState::Running, set(&[1, 3], None));
    starting.done.power = 2;
    let start = |layers: &Layers| step(&starting, DomainState::Stopped, layers);
    assert_eq!(start(&layers(&[1], &[])), Step::Layer(LayerChange::Add(3)));
    assert_eq!(start(&layers(&[1, 3], &[2])), Step::Layer(LayerChange::Remove(2)));
    assert_eq!(start(&layers(&[1, 2, 3], &[])), Step::Start);
    let off = vm(PowerState::Stopped, set(&[1, 3], None));
    let merge = Step::Layer(LayerChange::Merge(2));
    assert_eq!(step(&off, DomainState::Stopped, &layers(&[1, 2, 3], &[])), merge);
    assert_eq!(step(&off, DomainState::Running, &layers(&[1, 2, 3], &[])), merge);
}

#[test]
fn a_power_off_and_a_look_come_before_everything_else() {
    let mut stopping = vm(PowerState::Stopped, set(&[1], None));
    stopping.done.power = 2;
    assert_eq!(
        step(&stopping, DomainState::Running, &layers(&[], &[])),
        Step::Shutdown
    );
    let off = vm(PowerState::Stopped, set(&[1], None));
    let unseen = plan::next(&off, Some(&domain(DomainState::Stopped)), &tests::READY);
    assert_eq!(unseen, Step::Look);
}

#[test]
fn a_merge_under_way_is_waited_for_and_a_definition_that_is_behind_is_renewed() {
    let vm = vm(PowerState::Running, set(&[], None));
    let merging = Layers {
        merging: true,
        ..layers(&[1], &[])
    };
    assert_eq!(step(&vm, DomainState::Running, &merging), Step::Wait(MERGE_LOOK));
    let ready = Layers {
        ready: true,
        ..layers(&[1], &[])
    };
    let wanted = self::vm(PowerState::Running, set(&[2], None));
    assert_eq!(
        step(&wanted, DomainState::Running, &ready),
        Step::Layer(LayerChange::Merge(1))
    );
    let outdated = Layers {
        outdated: true,
        ..layers(&[1], &[])
    };
    assert_eq!(step(&vm, DomainState::Running, &outdated), Step::Define);
}

#[test]
fn who_is_told_nothing_of_snapshots_leaves_them_as_they_are() {
    let mut vm = vm(PowerState::Running, set(&[], None));
    vm.intent.as_mut().unwrap().snapshots = None;
    assert_eq!(step(&vm, DomainState::Running, &layers(&[1], &[])), Step::Settled);
}

/// Disks as [`crate::hypervisor::Hypervisor::change_layers`] promises to change them, each layer with what its snapshot holds.
#[derive(Debug, Clone, Default)]
struct Disks {
    there: Vec<(u32, u64)>,
    spare: Vec<u32>,
    now: u64,
}

impl Disks {
    fn seen(&self) -> Layers {
        let there: Vec<_> = self.there.iter().map(|(number, _)| *number).collect();
        layers(&there, &self.spare)
    }

    fn change(&mut self, change: &LayerChange) {
        match *change {
            LayerChange::Add(number) => {
                self.spare.retain(|spare| *spare != number);
                self.there.push((number, self.now));
            }
            LayerChange::Revert { number, replaces } => {
                let place = self
                    .there
                    .iter()
                    .position(|(other, _)| *other == replaces)
                    .unwrap();
                let left = self.there.split_off(place);
                self.now = left[0].1;
                self.spare.extend(left.iter().map(|(other, _)| *other));
                self.there.push((number, self.now));
            }
            LayerChange::Merge(number) => {
                self.there.retain(|(other, _)| *other != number);
                self.spare.push(number);
            }
            LayerChange::Remove(number) => {
                assert!(
                    !self.there.iter().any(|(other, _)| *other == number),
                    "a layer in use was removed"
                );
                self.spare.retain(|spare| *spare != number);
            }
        }
    }
}

proptest! {
    /// Whatever is asked for, in whichever order, and however often the agent begins anew: each snapshot holds what the disks held
    /// when it was made, going back brings that, and nothing is left of what was deleted.
    #[test]
    fn snapshots_hold_their_moment_and_nothing_else_is_left(
        asked in prop::collection::vec((0..3_u8, any::<prop::sample::Index>()), 1..30),
    ) {
        let mut disks = Disks::default();
        let mut wanted: Vec<(u32, u64)> = Vec::new();
        let (mut last, mut seen) = (0, 0);
        for (index, (what, which)) in asked.into_iter().enumerate() {
            disks.now = index as u64 + 1;
            let mut held = disks.now;
            let mut back = None;
            match what {
                0 => {
                    last += 1;
                    wanted.push((last, disks.now));
                }
                _ if wanted.is_empty() => continue,
                1 => {
                    wanted.remove(which.index(wanted.len()));
                }
                _ => {
                    wanted.truncate(which.index(wanted.len()) + 1);
                    last += 1;
                    let newest = wanted.last_mut().unwrap();
                    back = Some((last, newest.0));
                    (newest.0, held) = (last, newest.1);
                }
            }
            let numbers: Vec<_> = wanted.iter().map(|(number, _)| *number).collect();
            let mut vm = vm(PowerState::Stopped, set(&numbers, back));
            for round in 0.. {
                prop_assert!(round < 100, "no end: {disks:?}");
                // Each step is chosen from what is there alone: it might be another run of the agent.
                seen = seen.max(disks.seen().top());
                vm.snapshots.seen = Some(seen);
                match step(&vm, DomainState::Stopped, &disks.seen()) {
                    Step::Layer(change) => disks.change(&change),
                    Step::LayersDone => break,
                    other => prop_assert!(false, "{other:?}"),
                }
            }
            prop_assert_eq!(&disks.there, &wanted);
            prop_assert_eq!(disks.now, held);
            prop_assert!(disks.spare.is_empty());
        }
    }
}

#[test]
fn a_vm_is_deleted_when_its_volumes_have_no_layers_any_more() {
    let mut vm = vm(PowerState::Running, set(&[1, 4], None));
    vm.disposition = Disposition::Deleting;
    let none = Memory {
        layers: None,
        ..memory(&layers(&[], &[]))
    };
    let stopped = domain(DomainState::Stopped);
    // Its own disks go with it.
    assert_eq!(plan::next(&vm, Some(&stopped), &none), Step::Undefine);
    let spec = &mut vm.intent.as_mut().unwrap().spec;
    spec.disks.push(volume());
    let after = |state, seen: &[u32], spare: &[u32]| step(&vm, state, &layers(seen, spare));
    assert_eq!(after(DomainState::Running, &[1, 4], &[]), Step::Destroy);
    assert_eq!(plan::next(&vm, Some(&stopped), &none), Step::Look);
    let merge = |number| Step::Layer(LayerChange::Merge(number));
    assert_eq!(after(DomainState::Stopped, &[1, 4], &[3]), merge(1));
    assert_eq!(after(DomainState::Stopped, &[4], &[1]), merge(4));
    let remove = Step::Layer(LayerChange::Remove(1));
    assert_eq!(after(DomainState::Stopped, &[], &[1, 4]), remove);
    assert_eq!(after(DomainState::Stopped, &[], &[]), Step::Undefine);
}
