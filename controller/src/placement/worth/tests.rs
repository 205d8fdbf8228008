//! Prices of mixes that can be reckoned by hand, and what holds for all.

use proptest::{collection::vec, prelude::*};

use super::*;
use crate::placement::properties::cases;

const HOST: (u32, u64) = (64, 163_840);
const GIB: u64 = 1024;

/// Learns from one of each.
fn learn(
    vms: impl IntoIterator<Item = (u32, u64)>,
    hosts: impl IntoIterator<Item = (u32, u64)>,
) -> Option<Worth> {
    let one = |size| (size, 1);
    Worth::learn(vms.into_iter().map(one), hosts.into_iter().map(one))
}

fn size((vcpus, memory_mib): (u32, u64)) -> Size {
    Size { vcpus, memory_mib }
}

/// What is lost when a VM takes of so much that is free.
fn lost(worth: &Worth, vm: (u32, u64), free: (u32, u64)) -> u32 {
    let left = size((free.0 - vm.0, free.1 - vm.1));
    worth.lost(size(vm), size(free), left, size(HOST))
}

#[test]
fn of_one_size_of_vm_a_room_is_worth_as_many_as_fit() {
    let vm = (4, 16 * GIB);
    let worth = learn([vm; 5], [HOST]).unwrap();
    let table = &worth.tables[&size(HOST)];
    // Ten fit by memory; each has a sixteenth of the processors and a tenth of the memory.
    assert_eq!(table.value(size(vm)), 81_250);
    assert_eq!(table.value(size((64, 31 * GIB))), 81_250);
    assert_eq!(table.value(size((3, 160 * GIB))), 0);
    assert_eq!(table.value(size(HOST)), 812_500);
    assert!((worth.hosts() - 0.5).abs() < 1e-3, "{}", worth.hosts());
    assert_eq!(lost(&worth, vm, HOST), 0);
    assert_eq!(
        lost(&worth, (4, GIB), (4, 16 * GIB)),
        81_250,
        "the last room for one"
    );
}

#[test]
fn a_room_that_still_holds_what_the_site_has_is_worth_more() {
    // Half of a host is 32 processors and 80 GiB; slim and fat ones fill a host together.
    let (slim, fat) = ((32, 20 * GIB), (32, 140 * GIB));
    let worth = learn([slim, fat], [HOST]).unwrap();
    let beside_fat = lost(&worth, slim, (32, 20 * GIB));
    let on_empty = lost(&worth, slim, HOST);
    assert_eq!((beside_fat, on_empty), (0, 0));
    // A fat one cannot come to a host with two slim ones.
    assert!(lost(&worth, slim, (32, 140 * GIB)) > 0);
}

#[test]
fn a_size_of_which_there_is_little_makes_no_hole_worth_anything() {
    let (large, small) = ((8, 56 * GIB), (1, GIB));
    let value = |small_ones: u64, room| {
        let worth = Worth::learn([(large, 100), (small, small_ones)], [(HOST, 1)]).unwrap();
        worth.tables[&size(HOST)].value(size(room))
    };
    assert_eq!(value(1, (7, 50 * GIB)), 0);
    assert!(value(1000, (7, 50 * GIB)) > 0);
}

#[test]
fn nothing_is_learnt_from_nothing() {
    assert_eq!(learn([], [HOST]), None);
    assert_eq!(learn([(4, GIB)], []), None);
    assert_eq!(learn([(65, GIB)], [HOST]), None, "it fits on no host");
    assert_eq!(learn([(4, GIB)], [(0, 0)]), None);
    let worth = learn([(4, GIB)], [HOST]).unwrap();
    let unknown = size((8, GIB));
    assert_eq!(worth.lost(size((1, 1)), unknown, Size::default(), unknown), 0);
}

#[test]
fn a_linear_program_is_solved() {
    // 3x + 5y where x ≤ 4/4, 2y ≤ 12/12 and 3x + 2y ≤ 18/18, scaled: the vertex is in the interior of no axis.
    let best = program::maximise(
        &[3.0, 5.0],
        &[
            vec![0.25, 0.0],
            vec![0.0, 1.0 / 6.0],
            vec![3.0 / 18.0, 2.0 / 18.0],
        ],
    );
    assert!(
        (best[0] - 2.0).abs() < 1e-9 && (best[1] - 6.0).abs() < 1e-9,
        "{best:?}"
    );
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn no_room_is_worth_more_than_a_host_and_none_less_for_being_larger(
        vms in vec((1..17_u32, 1..80_u64), 1..8), room in (0..64_u32, 0..160_u64), more in (0..9_u32, 0..40_u64),
    ) {
        let vms: Vec<_> = vms.into_iter().map(|(vcpus, gib)| (vcpus, gib * GIB)).collect();
        let worth = learn(vms.clone(), [HOST]).unwrap();
        let table = &worth.tables[&size(HOST)];
        let value = |(vcpus, gib): (u32, u64)| table.value(size((vcpus, gib * GIB)));
        prop_assert!(value(room) <= value((room.0 + more.0, room.1 + more.1)));
        prop_assert!(value(room) <= 1_000_000 + CLOSE);
        prop_assert!(value(room) + value(more) <= value((room.0 + more.0, room.1 + more.1)) || room.0 + more.0 > 64 || room.1 + more.1 > 160);
        // The bound is at least that by either resource alone, and one host more a VM is always enough.
        let (vcpus, mib) = vms.iter().fold((0, 0), |(vcpus, mib), vm| (vcpus + vm.0, mib + vm.1));
        let alone = (f64::from(vcpus) / 64.0).max(f64::from(u32::try_from(mib / GIB).unwrap()) / 160.0);
        prop_assert!(worth.hosts() >= alone - 1e-3 && worth.hosts() <= vms.len() as f64 + 1e-3, "{} {alone}", worth.hosts());
    }
}
