//! How long a move is likely to take, and for how long its VM then stands still: by what earlier migrations have shown.
//!
//! *Time*: the memory that the VM's process holds on its host, and its disks on pools of the host's own, at the rate of earlier migrations: bytes over time of the last ones
//! that ended well, between the same two hosts if there are any, else on the whole site but no faster than the two hosts' links. Where none has been made,
//! what a link carries is taken: that of the slower host, or a gigabit where none says. Pages that the guest writes meanwhile are copied once more; that is not foreseen.
//!
//! *Stop*: half of the earlier ones were shorter: of the VM's own, else of those between the two hosts, else of all. Nothing is said where none was measured.
//!
//! Pure.

use dalgu_proto::{
    host::NicKind,
    ids::{HostName, VmId},
};

use crate::{
    model::{MigrationRecord, Phase, Progress, VmRecord},
    state::State,
};

/// Migrations that are looked back at, the last ones.
const RECENT: usize = 32;
/// Bytes that a stream carries, of those that a link of that many bits a second could: 110 MB/s of a gigabit, which is what one copies over it.
const CARRIED: f64 = 0.88;
/// Bits a second of a link that does not say.
const ASSUMED_LINK: f64 = 1e9;

/// What earlier migrations have shown.
pub struct Past<'a> {
    state: &'a State,
    /// Those that ended well, the last one first.
    done: Vec<(&'a MigrationRecord, Progress)>,
}

/// What is said of a move.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// How long it takes.
    pub seconds: f64,
    /// For how long the VM then stands still, where that is known.
    pub downtime_ms: Option<u64>,
}

impl<'a> Past<'a> {
    /// Of the site.
    pub fn of(state: &'a State) -> Self {
        let migrations = state.migrations.values().rev();
        let ended = migrations.filter(|migration| {
            // One that was held back says nothing of the others.
            migration.phase == Phase::Done && migration.bandwidth_mib_per_second == 0
        });
        let done = ended.filter_map(|migration| Some((&**migration, migration.progress?)));
        Self {
            state,
            done: done.take(RECENT).collect(),
        }
    }

    /// Of a move that copies so much of disks.
    pub fn predict(&self, vm: &VmRecord, to: &HostName, disks_bytes: u64) -> Prediction {
        let copied = memory_bytes(self.state, vm).saturating_add(disks_bytes);
        Prediction {
            seconds: float(copied) / self.rate(&vm.owner, to),
            downtime_ms: self.downtime_ms(vm.id, &vm.owner, to),
        }
    }

    fn between(&self, from: &HostName, to: &HostName) -> Vec<&(&'a MigrationRecord, Progress)> {
        let same = |migration: &MigrationRecord| {
            [(from, to), (to, from)].contains(&(&migration.source, &migration.destination))
        };
        self.done
            .iter()
            .filter(|(migration, _)| same(migration))
            .collect()
    }

    /// Bytes a second.
    fn rate(&self, from: &HostName, to: &HostName) -> f64 {
        let of = |done: &mut dyn Iterator<Item = &(&MigrationRecord, Progress)>| {
            let sum = done.fold((0_u64, 0_u64), |(bytes, ms), (_, progress)| {
                let copied = progress
                    .memory_processed_bytes
                    .saturating_add(progress.disk_processed_bytes);
                (
                    bytes.saturating_add(copied),
                    ms.saturating_add(progress.elapsed_ms),
                )
            });
            (sum.0 > 0 && sum.1 > 0).then(|| float(sum.0) / (float(sum.1) / 1000.0))
        };
        if let Some(known) = of(&mut self.between(from, to).into_iter()) {
            return known;
        }
        let links = [from, to].into_iter().filter_map(|host| link(self.state, host));
        let slower = links.reduce(f64::min);
        let all = of(&mut self.done.iter());
        let carried = |bits: f64| bits / 8.0 * CARRIED;
        match (all, slower) {
            (Some(all), Some(link)) => all.min(carried(link)),
            (Some(all), None) => all,
            (None, link) => carried(link.unwrap_or(ASSUMED_LINK)),
        }
    }

    fn downtime_ms(&self, vm: VmId, from: &HostName, to: &HostName) -> Option<u64> {
        let own = self.done.iter().filter(|(migration, _)| migration.vm == vm);
        let all: [Vec<_>; 3] = [own.collect(), self.between(from, to), self.done.iter().collect()];
        let measured = all.into_iter().map(|done| {
            let stops = done.into_iter().map(|(migration, progress)| {
                let measured = migration.unreachable_ms();
                measured.unwrap_or(progress.downtime_ms)
            });
            let mut stops: Vec<_> = stops.filter(|ms| *ms > 0).collect();
            stops.sort_unstable();
            stops
        });
        let mut measured = measured.filter(|stops| !stops.is_empty());
        measured.next().map(|stops| stops[stops.len() / 2])
    }
}

/// Memory of a VM that is copied: what its process holds, which huge pages are not counted in.
fn memory_bytes(state: &State, vm: &VmRecord) -> u64 {
    let all = vm.spec.memory_mib.saturating_mul(1 << 20);
    let seen = state.observation(vm).and_then(|seen| seen.usage.as_ref());
    let held = seen.map_or(0, |usage| usage.memory_resident_bytes);
    match held {
        0 => all,
        _ if !vm.spec.fitting.is_none() => all,
        held => held.min(all),
    }
}

/// Bits a second of the fastest link of a host.
fn link(state: &State, host: &HostName) -> Option<f64> {
    let usage = state.live.get(host)?.usage.as_ref()?;
    let links = usage.nics.iter().filter(|nic| {
        let outside = matches!(nic.kind, NicKind::Physical | NicKind::Bond);
        outside && nic.up && nic.speed_bits_per_second > 0
    });
    links.map(|nic| nic.speed_bits_per_second).max().map(float)
}

#[expect(clippy::cast_precision_loss, reason = "only an estimate follows")]
const fn float(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use dalgu_proto::host::{Nic, Usage, VmUsage};

    use super::*;
    use crate::{
        fixtures,
        state::{Db, Hooks},
        store::memory::Disk,
    };

    const MIB: u64 = 1 << 20;

    /// A migration that copied so much in so many ms, with a stop of so many.
    fn done(vm: &VmRecord, to: &str, mib: u64, ms: u64, stop: u64) -> MigrationRecord {
        MigrationRecord {
            phase: Phase::Done,
            progress: Some(Progress {
                memory_processed_bytes: mib * MIB,
                elapsed_ms: ms,
                downtime_ms: stop,
                ..Progress::default()
            }),
            ..fixtures::migration(vm, to)
        }
    }

    async fn predict(
        done: Vec<MigrationRecord>,
        vm: &VmRecord,
        gigabits: [u64; 2],
        resident_mib: u64,
    ) -> Prediction {
        let db = Db::open(Disk::default().open(), fixtures::cluster_id(), Hooks::default()).unwrap();
        db.change(|tx| {
            for (host, gigabits) in ["h1", "h2"].into_iter().zip(gigabits) {
                let nic = |kind, speed_bits_per_second| Nic {
                    kind,
                    up: true,
                    speed_bits_per_second,
                    ..Nic::default()
                };
                let mut live = fixtures::live(tx.now());
                live.usage = Some(Usage {
                    nics: vec![
                        nic(NicKind::Physical, gigabits * 1_000_000_000),
                        nic(NicKind::Tap, 10_000_000_000),
                    ],
                    ..Usage::default()
                });
                tx.set_live(fixtures::host_name(host), live);
            }
            let mut seen = fixtures::observation(vm);
            seen.usage = Some(VmUsage {
                memory_resident_bytes: resident_mib * MIB,
                ..VmUsage::default()
            });
            tx.observe(vm.id, Some(seen));
            tx.put_vm(vm.clone());
            done.into_iter().for_each(|migration| tx.put_migration(migration));
        })
        .await;
        Past::of(&db.snapshot()).predict(vm, &fixtures::host_name("h2"), 100 * MIB)
    }

    #[tokio::test]
    async fn a_move_takes_as_long_as_earlier_ones_between_its_hosts_or_as_their_links_allow() {
        let mut vm = fixtures::vm("web", "h1");
        vm.spec.memory_mib = 1000;
        let other = fixtures::vm("other", "h3");
        let mut limited = done(&vm, "h2", 1000, 100_000, 7);
        limited.bandwidth_mib_per_second = 10;
        let mut failed = done(&vm, "h2", 1000, 100_000, 7);
        failed.phase = Phase::Failed;
        let here = || done(&vm, "h2", 1000, 5000, 0);
        let elsewhere = |mib| done(&other, "h4", mib, 1000, 0);
        let carried = |gigabits: f64, mib: f64| mib * 1_048_576.0 / (gigabits * 110e6);
        for (past, links, resident, expected) in [
            (vec![], [0, 0], 0, carried(1.0, 1100.0)),
            (vec![limited, failed], [10, 25], 500, carried(10.0, 600.0)),
            (vec![here(), elsewhere(50)], [1, 1], 500, 3.0),
            (vec![elsewhere(50)], [1, 1], 2000, 22.0),
            (vec![elsewhere(500)], [1, 10], 0, carried(1.0, 1100.0)),
        ] {
            let seconds = predict(past, &vm, links, resident).await.seconds;
            assert!(
                (seconds - expected).abs() < 0.01,
                "{links:?} {resident}: {seconds} {expected}"
            );
        }
    }

    #[tokio::test]
    async fn a_stop_is_as_long_as_half_of_the_vms_own_were_or_of_those_between_its_hosts() {
        let (vm, other) = (fixtures::vm("web", "h1"), fixtures::vm("other", "h2"));
        let far = fixtures::vm("far", "h3");
        let all = [
            done(&far, "h4", 1, 1, 90),
            done(&other, "h1", 1, 1, 40),
            done(&other, "h1", 1, 1, 0),
            done(&vm, "h3", 1, 1, 20),
            done(&vm, "h3", 1, 1, 30),
            done(&vm, "h3", 1, 1, 500),
        ];
        for (count, expected) in [(0, None), (1, Some(90)), (3, Some(40)), (6, Some(30))] {
            let found = predict(all[..count].to_vec(), &vm, [1, 1], 0).await.downtime_ms;
            assert_eq!(found, expected, "of {count}");
        }
        let mut measured = done(&vm, "h2", 1, 1, 20);
        measured.network_blackout_ms = Some(35);
        let found = predict(vec![measured], &vm, [1, 1], 0).await;
        assert_eq!(found.downtime_ms, Some(35), "until its first packet");
    }
}
