//! Room and VMs as numbers that can be added up: shares of the largest host, by classes of VM.

use super::Size;

/// The largest host.
const WHOLE: u64 = 1 << 20;
/// Classes of VM.
pub(super) const CLASSES: usize = 16;
/// No VM of a class has a greater share than this; each class is 0.7 of the one before. The last has all that are smaller.
const AT_MOST: [i64; CLASSES] = [
    1_048_576, 741_455, 524_288, 370_727, 262_144, 185_363, 131_072, 92_681, 65_536, 46_340, 32_768, 23_170,
    16_384, 11_585, 8_192, 5_792,
];
/// A share that no room is enough for: that of a VM which is larger than the largest host.
const TOO_LARGE: i64 = 1 << 40;

/// A number for each class.
pub(super) type Shares = [i64; CLASSES];

/// The VMs of a class all have more than this.
pub(super) fn more_than(class: usize) -> i64 {
    AT_MOST.get(class + 1).copied().unwrap_or(0)
}

/// The greater of a VM's shares in processors and memory, and its class.
pub(super) fn of_vm(vm: Size, whole: Size) -> (i64, usize) {
    let share = |part: u64, whole: u64| {
        let share = u128::from(part) * u128::from(WHOLE);
        i64::try_from(share.div_ceil(u128::from(whole.max(1)))).unwrap_or(TOO_LARGE)
    };
    let share = share(vm.vcpus.into(), whole.vcpus.into()).max(share(vm.memory_mib, whole.memory_mib));
    match AT_MOST.iter().rposition(|most| share <= *most) {
        Some(class) => (share, class),
        None => (TOO_LARGE, 0),
    }
}

/// What must have come to a host with so much room before it has none for a VM of each class, where larger ones come first.
pub(super) fn of_room(free: Size, whole: Size) -> Shares {
    let share = |part: u64, whole: u64| {
        let share = u128::from(part) * u128::from(WHOLE) / u128::from(whole.max(1));
        i64::try_from(share).unwrap_or(TOO_LARGE)
    };
    let share = share(free.vcpus.into(), whole.vcpus.into()).min(share(free.memory_mib, whole.memory_mib));
    let mut shares = [0; CLASSES];
    for (class, most) in AT_MOST.into_iter().enumerate() {
        if share >= most {
            shares[class] = (share - most).max(more_than(class));
        }
    }
    shares
}

/// So much of the largest host as a size, rounded up.
pub(super) fn as_size(share: i64, whole: Size) -> Size {
    let share = u128::try_from(share.min(TOO_LARGE)).unwrap_or(0);
    let part = |whole: u64| (share * u128::from(whole)).div_ceil(u128::from(WHOLE));
    Size {
        vcpus: u32::try_from(part(whole.vcpus.into())).unwrap_or(u32::MAX),
        memory_mib: u64::try_from(part(whole.memory_mib)).unwrap_or(u64::MAX),
    }
}
