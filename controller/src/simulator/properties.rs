//! What holds for every trace.

use proptest::{collection::vec, option, prelude::*, sample::select};

use super::{
    field::Shape,
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
    fn the_engine_packs_as_best_fit_does_where_nothing_is_measured(trace in traces(), settings in settings()) {
        let trace = without_usage(&trace);
        let pack = replay(&trace, &settings, Contender::Pack);
        let best_fit = replay(&trace, &settings, Contender::BestFit);
        prop_assert_eq!(Outcome { policy: "pack", ..best_fit }, pack);
    }
}
