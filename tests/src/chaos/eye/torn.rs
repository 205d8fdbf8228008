//! Which migrations a fault may have torn: those of a VM that was seen on two hosts lately, with a libvirtd or an agent of one of
//! the two killed lately. Used by the eye.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::processes::Process;

/// From a daemon's death until its successor has recovered.
const RECOVERY: Duration = Duration::from_secs(20);

/// Where each VM's processes were seen, and when last.
#[derive(Debug, Default)]
pub struct Torn(BTreeMap<String, BTreeMap<u8, Instant>>);

impl Torn {
    /// Notes where VMs are.
    pub fn note(&mut self, processes: &[Process]) {
        for process in processes {
            let places = self.0.entry(process.uid.clone()).or_default();
            places.insert(process.host, Instant::now());
        }
        for places in self.0.values_mut() {
            places.retain(|_, seen| seen.elapsed() < RECOVERY);
        }
        self.0.retain(|_, places| !places.is_empty());
    }

    /// Whether a fault may have torn a migration from or to this host; `None` is any host. `killed` has when a daemon that carries
    /// migrations was last killed, by host.
    pub fn is_at(&self, host: Option<u8>, killed: &BTreeMap<u8, Instant>) -> bool {
        let lately = |host: &u8| killed.get(host).is_some_and(|at| at.elapsed() < RECOVERY);
        let moved = self.0.values().filter(|places| places.len() > 1);
        let mut here = moved.filter(|places| host.is_none_or(|host| places.contains_key(&host)));
        here.any(|places| places.keys().any(lately))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(uid: &str, host: u8) -> Process {
        Process {
            uid: uid.to_owned(),
            host,
            pid: 1,
            incoming: false,
            state: 'S',
        }
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_migration_with_a_killed_daemon_at_one_of_its_ends_is_torn() {
        let mut torn = Torn::default();
        torn.note(&[at("moves", 1), at("moves", 2), at("stays", 3)]);
        let killed = |host| BTreeMap::from([(host, Instant::now())]);
        assert!(torn.is_at(Some(1), &killed(2)), "the other end was killed");
        assert!(torn.is_at(None, &killed(1)));
        assert!(!torn.is_at(Some(1), &killed(3)), "a host that has no part in it");
        assert!(!torn.is_at(Some(3), &killed(3)), "nothing moves there");
        assert!(!torn.is_at(Some(1), &BTreeMap::new()), "nothing was killed");
        let before = killed(2);
        tokio::time::advance(RECOVERY).await;
        torn.note(&[]);
        assert!(!torn.is_at(Some(1), &before), "long ago");
    }
}
