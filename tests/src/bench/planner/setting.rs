//! The setting of CloudSim 3.0.3's study of consolidation, written from its description: hosts, VMs, time, and what is measured.
//!
//! 800 hosts of two kinds, one VM for each trace, a decision every 300 s. A migration copies the VM's memory over half of a Gigabit link;
//! until it has ended the VM gets nine tenths of what it asks for at its source, and a tenth is charged to the destination too. A host is
//! *short* while all its VMs together, the coming ones too, get less than they ask for: so every destination is, for the seconds of a migration.
//! Memory counts only when VMs are first placed.
//!
//! There, a VM that asks for nothing at some moment is removed for good; here it stays, unless [`Setting::new`] is told otherwise, for comparison with
//! figures that were measured so.

/// Time between two samples, and between two decisions.
pub const TICK_S: f64 = 300.0;
/// Samples of a day.
pub const TICKS: usize = 288;
/// Hosts.
pub const HOSTS: usize = 800;
/// Memory of a host, in MiB.
const HOST_MIB: u32 = 4096;
/// What a migration copies in a second, in MiB.
const MIB_PER_S: f64 = 1e6 / 16_000.0;
/// Watts of the two kinds at each tenth of their use (SPECpower, HP ProLiant ML110 G4 and G5).
const G4: [f64; 11] = [
    86.0, 89.4, 92.6, 96.0, 99.5, 102.0, 106.0, 108.0, 112.0, 114.0, 117.0,
];
const G5: [f64; 11] = [
    93.7, 97.0, 101.0, 105.0, 110.0, 116.0, 121.0, 125.0, 129.0, 133.0, 135.0,
];
/// Speed in MIPS and memory in MiB of the VMs, a quarter of them each.
const SIZES: [(f64, u32); 4] = [(2500.0, 870), (2000.0, 1740), (1000.0, 1740), (500.0, 613)];

/// A kind of host.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// Speed of one of its two processors, in MIPS.
    pub core: f64,
    watts: [f64; 11],
}

/// What kind a host is.
#[must_use]
pub fn kind(host: usize) -> Kind {
    match host % 2 {
        0 => Kind {
            core: 1860.0,
            watts: G4,
        },
        _ => Kind {
            core: 2660.0,
            watts: G5,
        },
    }
}

impl Kind {
    /// Speed of both processors, in MIPS.
    #[must_use]
    pub fn mips(self) -> f64 {
        2.0 * self.core
    }

    /// Watts at this use, from 0 to 1.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "from 0 to 10"
    )]
    pub fn power(self, used: f64) -> f64 {
        let tenths = used.clamp(0.0, 1.0) * 10.0;
        let (low, high) = (tenths.floor() as usize, tenths.ceil() as usize);
        self.watts[low] + (self.watts[high] - self.watts[low]) * (tenths - low as f64)
    }
}

/// A VM.
#[derive(Debug, Clone)]
pub struct Vm {
    /// Speed of its processor, in MIPS.
    pub mips: f64,
    /// Memory, in MiB.
    pub mib: u32,
    /// What it asks for at each tick, as a share of its speed.
    samples: Vec<f64>,
    /// Where it is.
    pub host: usize,
    /// Where it migrates to, and when that ends.
    moving: Option<(usize, f64)>,
    /// Removed for good.
    pub lost: bool,
    asks: f64,
    gets: f64,
    leaves: bool,
}

/// A VM, and where it goes.
pub type Move = (usize, usize);

/// What came of a day.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// Energy of all hosts.
    pub kwh: f64,
    /// Migrations.
    pub migrations: usize,
    /// Share of the hosts' time with VMs in which they were short.
    pub short: f64,
    /// Share of what VMs asked for that migrations took from them.
    pub degraded: f64,
    /// VMs that were not removed.
    pub alive: usize,
}

impl Outcome {
    /// What is called SLAV: both shares multiplied.
    #[must_use]
    pub fn violation(&self) -> f64 {
        self.short * self.degraded
    }
}

/// The setting at one moment.
pub struct Setting {
    vms: Vec<Vm>,
    /// By host, the VMs there and those that come.
    here: Vec<Vec<usize>>,
    now: f64,
    removes_idle: bool,
    used: Vec<f64>,
    short: Vec<bool>,
    joules: f64,
    on_s: f64,
    short_s: f64,
    asked: f64,
    taken: f64,
    migrations: usize,
}

impl Setting {
    /// One VM for each trace, which are in the order of their files' names; at the beginning each VM goes to the first host, of the kind that
    /// takes the least power more, that has its whole speed and its memory left.
    ///
    /// # Panics
    /// If they do not all find a host.
    #[must_use]
    pub fn new(traces: &[Vec<f64>], removes_idle: bool) -> Self {
        let quarter = traces.len().div_ceil(SIZES.len());
        let vm = |(index, trace): (usize, &Vec<f64>)| {
            let (mips, mib) = SIZES[index / quarter];
            let mut samples = trace.clone();
            samples.extend(trace.last());
            Vm {
                mips,
                mib,
                samples,
                host: 0,
                moving: None,
                lost: false,
                asks: 0.0,
                gets: 0.0,
                leaves: false,
            }
        };
        let mut setting = Self {
            vms: traces.iter().enumerate().map(vm).collect(),
            here: vec![Vec::new(); HOSTS],
            now: 0.0,
            removes_idle,
            used: vec![0.0; HOSTS],
            short: vec![false; HOSTS],
            joules: 0.0,
            on_s: 0.0,
            short_s: 0.0,
            asked: 0.0,
            taken: 0.0,
            migrations: 0,
        };
        setting.place();
        setting.serve();
        setting
    }

    fn place(&mut self) {
        let mut reserved = vec![(0.0, 0_u32); HOSTS];
        for (slot, vm) in self.vms.iter_mut().enumerate() {
            let fits = |host: &usize| {
                let (mips, mib) = reserved[*host];
                let kind = kind(*host);
                kind.core >= vm.mips && kind.mips() - mips >= vm.mips && mib + vm.mib <= HOST_MIB
            };
            let more = |host: usize| kind(host).power(vm.mips / kind(host).mips()) - kind(host).power(0.0);
            let best = (0..HOSTS)
                .filter(fits)
                .min_by(|a, b| more(*a).total_cmp(&more(*b)));
            let host = best.expect("room for all");
            reserved[host].0 += vm.mips;
            reserved[host].1 += vm.mib;
            vm.host = host;
            self.here[host].push(slot);
        }
    }

    /// The VMs.
    #[must_use]
    pub fn vms(&self) -> &[Vm] {
        &self.vms
    }

    /// The VMs of a host.
    #[must_use]
    pub fn here(&self, host: usize) -> &[usize] {
        &self.here[host]
    }

    /// What a VM asks for now, in MIPS: between two samples, in proportion.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a tick of the day"
    )]
    pub fn demand(&self, vm: usize) -> f64 {
        let vm = &self.vms[vm];
        let tick = self.now / TICK_S;
        let (low, high) = (tick.floor() as usize, tick.ceil() as usize);
        let slope = (vm.samples[high] - vm.samples[low]) / TICK_S;
        vm.mips * (vm.samples[low] + slope * (self.now - low as f64 * TICK_S))
    }

    /// Serves all VMs as of now.
    fn serve(&mut self) {
        for host in 0..HOSTS {
            self.serve_host(host);
        }
    }

    fn serve_host(&mut self, host: usize) {
        let kind = kind(host);
        let here = std::mem::take(&mut self.here[host]);
        let demands: Vec<_> = here.iter().map(|vm| self.demand(*vm)).collect();
        let both = || {
            here.iter()
                .zip(&demands)
                .map(|(vm, asks)| (*vm, *asks, asks.min(kind.core)))
        };
        let charged = |(vm, _, wanted): (usize, f64, f64)| match self.vms[vm].host == host {
            true => wanted,
            false => wanted * 0.1,
        };
        let all: f64 = both().map(charged).sum();
        let scale = (all > kind.mips()).then(|| kind.mips() / all);
        let whole = |mips: f64| if scale.is_some() { mips.floor() } else { mips };
        let (mut used, mut asked) = (0.0, 0.0);
        for (slot, asks, wanted) in both() {
            let vm = &mut self.vms[slot];
            if vm.host == host {
                vm.leaves = vm.moving.is_some();
                let scaled = wanted * scale.unwrap_or(1.0);
                vm.gets = whole(if vm.leaves { scaled * 0.9 } else { scaled });
                vm.asks = asks;
                used += if vm.leaves { vm.gets / 0.9 } else { vm.gets };
            } else {
                used += whole(wanted * 0.1);
            }
            asked += asks;
        }
        self.used[host] = used.min(kind.mips());
        self.short[host] = used < asked;
        self.here[host] = here;
    }

    /// Lets time pass.
    fn advance(&mut self, to: f64) {
        let seconds = to - self.now;
        for host in (0..HOSTS).filter(|host| self.used[*host] > 0.0) {
            self.on_s += seconds;
            self.short_s += if self.short[host] { seconds } else { 0.0 };
        }
        for vm in self.vms.iter().filter(|vm| !vm.lost) {
            self.asked += vm.asks * seconds;
            if vm.leaves {
                self.taken += (vm.asks - vm.gets).max(0.0) * seconds;
            }
        }
        let before = self.used.clone();
        self.now = to;
        self.serve();
        for host in (0..HOSTS).filter(|host| before[*host] > 0.0) {
            let kind = kind(host);
            let power = |used: f64| kind.power(used / kind.mips());
            self.joules += f64::midpoint(power(before[host]), power(self.used[host])) * seconds;
        }
        if self.removes_idle {
            self.remove_idle();
        }
    }

    fn remove_idle(&mut self) {
        for slot in 0..self.vms.len() {
            let idle = self.demand(slot) == 0.0;
            let vm = &mut self.vms[slot];
            if idle && !vm.lost && vm.moving.is_none() {
                vm.lost = true;
                self.here[vm.host].retain(|other| *other != slot);
            }
        }
    }

    /// A day under a policy, which is asked at every tick for moves of VMs that are not lost.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a tick of the day")]
    pub fn day(mut self, mut policy: impl FnMut(&Self) -> Vec<Move>) -> Outcome {
        for tick in 1..=TICKS {
            self.advance(tick as f64 * TICK_S);
            if tick == TICKS {
                break;
            }
            for (slot, to) in policy(&self) {
                let vm = &mut self.vms[slot];
                vm.moving = Some((to, self.now + f64::from(vm.mib) / MIB_PER_S));
                self.here[to].push(slot);
                self.migrations += 1;
            }
            self.serve();
            self.end_migrations();
        }
        Outcome {
            kwh: self.joules / 3.6e6,
            migrations: self.migrations,
            short: self.short_s / self.on_s,
            degraded: self.taken / self.asked,
            alive: self.vms.iter().filter(|vm| !vm.lost).count(),
        }
    }

    /// All migrations end long before the next tick.
    fn end_migrations(&mut self) {
        loop {
            let ends = self.vms.iter().filter_map(|vm| vm.moving).map(|(_, end)| end);
            let Some(end) = ends.min_by(f64::total_cmp) else {
                return;
            };
            self.advance(end);
            for (slot, vm) in self.vms.iter_mut().enumerate() {
                if let Some((to, _)) = vm.moving.filter(|(_, at)| *at <= end) {
                    self.here[vm.host].retain(|other| *other != slot);
                    vm.host = to;
                    vm.moving = None;
                }
            }
            self.serve();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY_S: f64 = 86_400.0;

    fn steady(vms: usize, share: f64) -> Setting {
        Setting::new(&vec![vec![share; TICKS]; vms], false)
    }

    #[test]
    fn without_a_migration_nothing_is_short_and_power_is_that_of_the_use() {
        let outcome = steady(4, 0.5).day(|_| Vec::new());
        assert_eq!(
            (outcome.migrations, outcome.violation(), outcome.alive),
            (0, 0.0, 4)
        );
        // 2500 and 2000 MIPS, 1000 and 500: the first two on a G5, the others beside them or on the next.
        let hosts = [(2500.0 + 2000.0 + 500.0) / 2.0, 1000.0 / 2.0].map(g5);
        let expected = hosts.iter().sum::<f64>() * 24.0 / 1000.0;
        assert!(
            (outcome.kwh - expected).abs() < 0.5,
            "{} for {expected}",
            outcome.kwh
        );
    }

    fn g5(mips: f64) -> f64 {
        kind(1).power(mips / kind(1).mips())
    }

    #[test]
    fn a_migration_takes_a_tenth_while_it_lasts_and_makes_its_destination_short() {
        let mut moved = false;
        let outcome = steady(1, 0.5).day(|setting| {
            let first = !std::mem::replace(&mut moved, true);
            let to = setting.vms()[0].host + 2;
            if first { vec![(0, to)] } else { Vec::new() }
        });
        let seconds = 870.0 / MIB_PER_S;
        let taken = 0.1 * seconds / DAY_S;
        assert!(
            (outcome.degraded - taken).abs() < 1e-9,
            "{} for {taken}",
            outcome.degraded
        );
        assert!(
            (outcome.short - seconds / (DAY_S + seconds)).abs() < 1e-9,
            "{}",
            outcome.short
        );
    }

    #[test]
    fn a_vm_that_asks_for_nothing_is_removed_only_where_that_is_wanted() {
        let idle = || vec![vec![0.0; TICKS], vec![0.3; TICKS]];
        assert_eq!(Setting::new(&idle(), false).day(|_| Vec::new()).alive, 2);
        assert_eq!(Setting::new(&idle(), true).day(|_| Vec::new()).alive, 1);
    }
}
