//! What holds for every trace.

use proptest::{collection::vec, option, prelude::*, sample::select};

use super::{
    field::{Field, Shape},
    trace::{Size, Trace, Usage, Vm},
    *,
};

/// VMs that come and go, of sizes that a guest's memory and QEMU's overhead come to exactly; with or without what they use.
fn traces() -> impl Strategy<Value = Trace> {
    let vm = |used: bool| {
        let usage = vec(0.0..1.0_f32, if used { 1..4 } else { 0..1 });
        let life = option::weighted(0.8, 1..9000_u64);
        let parts = (1..9_u32, 64..12_000_u64, 0..9000_u64, life, usage);
        parts.prop_map(|(vcpus, guest_mib, arrive_s, life, cpu)| Vm {
            size: Size {
                vcpus,
                memory_mib: guest_mib + 64 + u64::from(vcpus) + guest_mib.div_ceil(128),
            },
            arrive_s,
            leave_s: life.map(|life| arrive_s + life),
            system: None,
            usage: Usage {
                cpu,
                memory: Vec::new(),
            },
        })
    };
    any::<bool>().prop_flat_map(move |used| vec(vm(used), 1..60).prop_map(Trace::of))
}

fn settings() -> impl Strategy<Value = Settings> {
    (1..7_usize, select(vec![1.0, 2.0])).prop_map(|(hosts, cpu_overcommit)| Settings {
        hosts,
        shape: Shape {
            cpus: 16,
            memory_mib: 32_768,
            cpu_overcommit,
        },
        contended_from: 0.9,
        round_s: 900,
        moves: 5,
    })
}

/// The same trace with nothing known of what is used.
fn without_usage(trace: &Trace) -> Trace {
    let vms = trace.vms.iter().map(|vm| Vm {
        usage: Usage::default(),
        ..vm.clone()
    });
    Trace {
        vms: vms.collect(),
        ..*trace
    }
}

proptest! {
    #[test]
    fn whatever_places_and_moves_every_vm_that_came_is_accepted_or_refused_and_again_the_same_way(
        trace in traces(),
        settings in settings(),
        contender in select(Contender::ALL.to_vec()),
    ) {
        // A host that held more than it can would panic in what is left of it.
        let outcome = replay(&trace, &settings, contender);
        prop_assert_eq!(outcome.accepted + outcome.refused, trace.vms.len() as u64);
        prop_assert!(outcome.peak_hosts <= settings.hosts);
        for value in [outcome.cpu_percent, outcome.memory_percent, outcome.fragmentation_percent] {
            prop_assert!((0.0..=100.0 + 1e-9).contains(&value), "{}", value);
        }
        prop_assert_eq!(outcome.contended_percent.is_some(), trace.has_usage());
        prop_assert_eq!(replay(&trace, &settings, contender), outcome);
    }

    #[test]
    fn the_engine_packs_where_the_least_is_left_memory_sixteen_times(trace in traces(), settings in settings()) {
        const WHOLE: u64 = 1_000_000;
        let shape = &settings.shape;
        let (capacity, largest) = (shape.capacity(), shape.largest());
        let mut field = Field::new(settings.hosts, shape, Contender::Pack.chooser());
        for vm in &trace.vms {
            let size = vm.size;
            let left = |host: &usize| {
                let held = &field.hosts()[*host];
                let vcpus = u64::from(capacity.vcpus - held.vcpus - size.vcpus) * WHOLE / u64::from(capacity.vcpus);
                let memory = (capacity.memory_mib - held.memory_mib - size.memory_mib) * WHOLE / capacity.memory_mib;
                (vcpus + 16 * memory, *host)
            };
            let fits = |host: &usize| size.vcpus <= largest.vcpus && field.hosts()[*host].has_room(size, capacity);
            let expected = (0..settings.hosts).filter(fits).min_by_key(left);
            prop_assert_eq!(field.choose(size), expected);
            expected.into_iter().for_each(|host| field.put(host, size));
        }
    }

    #[test]
    fn making_room_moves_no_more_than_it_may(trace in traces(), settings in settings()) {
        let trace = without_usage(&trace);
        let outcome = replay(&trace, &settings, Contender::MakeRoom);
        let rounds = trace.end_s.saturating_sub(trace.start_s) / settings.round_s + 1;
        prop_assert!(outcome.moves <= rounds * settings.moves as u64, "{} moves", outcome.moves);
    }
}
