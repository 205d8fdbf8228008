//! The threshold policy of that study (THR-MMT 0.8), in the same run: hosts above four fifths of their speed give away the VMs with the least memory;
//! then each host, the least used first, is emptied if all its VMs fit elsewhere. VMs go where they take the least power more. Of the
//! power before, it does not know what the same decision has added: the study's programs do not either.

use super::setting::{HOSTS, Move, Setting, kind};

/// Share of its speed above which a host gives VMs away.
const MOST: f64 = 0.8;

struct Decision {
    demand: Vec<f64>,
    here: Vec<Vec<usize>>,
    /// What was used before the decision.
    before: Vec<f64>,
    /// Hosts that take none.
    shut: Vec<bool>,
    moves: Vec<Move>,
}

/// What it decides now.
#[must_use]
pub fn decide(setting: &Setting) -> Vec<Move> {
    let demand: Vec<_> = (0..setting.vms().len()).map(|vm| setting.demand(vm)).collect();
    let here: Vec<_> = (0..HOSTS).map(|host| setting.here(host).to_vec()).collect();
    let before: Vec<f64> = here
        .iter()
        .map(|vms| vms.iter().map(|vm| demand[*vm]).sum())
        .collect();
    let mut decision = Decision {
        shut: (0..HOSTS)
            .map(|host| before[host] / kind(host).mips() > MOST)
            .collect(),
        demand,
        here,
        before,
        moves: Vec::new(),
    };
    decision.relieve(setting);
    decision.empty();
    decision.moves
}

impl Decision {
    fn used(&self, host: usize) -> f64 {
        self.here[host].iter().map(|vm| self.demand[*vm]).sum()
    }

    fn relieve(&mut self, setting: &Setting) {
        let mut leaving = Vec::new();
        for host in (0..HOSTS).filter(|host| self.shut[*host]) {
            while self.used(host) / kind(host).mips() > MOST {
                let vms = self.here[host].iter().copied();
                let Some(vm) = vms.min_by_key(|vm| setting.vms()[*vm].mib) else {
                    break;
                };
                self.here[host].retain(|other| *other != vm);
                leaving.push(vm);
            }
        }
        self.place(leaving);
    }

    fn empty(&mut self) {
        let mut seen = self.shut.clone();
        for (host, seen) in seen.iter_mut().enumerate() {
            let off = self.before[host] == 0.0;
            self.shut[host] |= off;
            *seen |= off;
        }
        self.moves.iter().for_each(|(_, to)| seen[*to] = true);
        loop {
            let share = |host: &usize| self.used(*host) / kind(*host).mips();
            let left = (0..HOSTS).filter(|host| !seen[*host] && share(host) > 0.0);
            let Some(host) = left.min_by(|a, b| share(a).total_cmp(&share(b))) else {
                return;
            };
            seen[host] = true;
            self.shut[host] = true;
            let (here, moves) = (self.here.clone(), self.moves.len());
            if self.place(self.here[host].clone()) {
                self.moves[moves..].iter().for_each(|(_, to)| seen[*to] = true);
            } else {
                self.here = here;
                self.moves.truncate(moves);
            }
        }
    }

    /// Places what can be placed, the busiest first; whether that is all.
    fn place(&mut self, mut vms: Vec<usize>) -> bool {
        vms.sort_by(|a, b| self.demand[*b].total_cmp(&self.demand[*a]));
        let mut all = true;
        for vm in vms {
            let more = |host: usize| {
                let kind = kind(host);
                let (used, needed) = (self.used(host), self.demand[vm]);
                let share = (used + needed) / kind.mips();
                let fits = kind.core >= needed && share <= 1.0 && (used == 0.0 || share <= MOST);
                fits.then(|| kind.power(share) - kind.power(self.before[host] / kind.mips()))
            };
            let open = (0..HOSTS).filter(|host| !self.shut[*host]);
            let best = open
                .filter_map(|host| Some((more(host)?, host)))
                .min_by(|a, b| a.0.total_cmp(&b.0));
            match best {
                Some((_, to)) => {
                    self.here[to].push(vm);
                    self.moves.push((vm, to));
                }
                None => all = false,
            }
        }
        all
    }
}
