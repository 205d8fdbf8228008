//! One sample of the host's use.
//!
//! The agent's reporter owns a [`Sampler`] and calls it every few seconds from a blocking thread; everything else
//! reads the last sample. It costs well under a millisecond, plus at most 50 ms when a pool is slow to answer
//! and 2 s when one does not answer at the very first sample.

use std::{path::PathBuf, time::Duration};

use dalgu_proto::host::{Inventory, Usage};
use jiff::Timestamp;

use super::{
    Error, PoolConfig, Root, cpu, inventory, memory,
    nic::Nics,
    pci, pressure,
    rates::{Reading, busy},
    root::since_boot,
    storage::Storage,
};

/// Takes samples, and remembers of the last one what rates need.
#[derive(Debug)]
pub struct Sampler {
    root: Root,
    nics: Nics,
    storage: Storage,
    named: Vec<pci::Named>,
    simulated: bool,
    last: Option<Reading<f64>>,
}

impl Sampler {
    /// A sampler of this host, its pools, and the file systems that hold them and the agent's `data`.
    pub fn new(pools: Vec<PoolConfig>, data: Vec<PathBuf>) -> Self {
        Self::with_root(Root::default(), pools, data)
    }

    /// As [`Self::new`] with /proc and /sys elsewhere.
    pub fn with_root(root: Root, pools: Vec<PoolConfig>, data: Vec<PathBuf>) -> Self {
        Self {
            root,
            nics: Nics::default(),
            storage: Storage::new(pools, data),
            named: Vec::new(),
            simulated: false,
            last: None,
        }
    }

    /// The same, which also tells of the PCI devices that are named for VMs; of simulated ones where guests are simulated.
    #[must_use]
    pub fn naming(self, named: Vec<pci::Named>, simulated: bool) -> Self {
        Self {
            named,
            simulated,
            ..self
        }
    }

    /// What the host is made of, with its pools. What only the hypervisor knows (`hypervisor`, `accelerator`,
    /// `accelerator_reason`) is empty.
    ///
    /// # Errors
    /// When /proc cannot be read or is of another form than documented.
    pub fn inventory(&mut self) -> Result<Inventory, Error> {
        let now = since_boot()?;
        self.storage.refresh(now);
        Ok(Inventory {
            pools: self.storage.pools(now),
            pci_devices: match self.simulated {
                true => pci::simulated(&self.named),
                false => pci::read(&self.root, &self.named),
            },
            ..inventory::read(&self.root)?
        })
    }

    /// A sample of now.
    ///
    /// # Errors
    /// As [`Self::inventory`]; never because of an interface, a pool or a pressure file.
    pub fn sample(&mut self) -> Result<Usage, Error> {
        self.sample_at(since_boot()?, Timestamp::now())
    }

    /// A sample at `now` since boot, to be dated `sample_time`. Rates are since the last sample; the first has none.
    ///
    /// # Errors
    /// As [`Self::sample`].
    pub fn sample_at(&mut self, now: Duration, sample_time: Timestamp) -> Result<Usage, Error> {
        self.storage.refresh(now);
        let (cpu, cpus) = cpu::times(&self.root)?;
        let reading = Reading {
            at: now,
            value: cpu.busy(),
        };
        let cpus_busy = self.last.and_then(|last| busy(last, reading, cpus as f64));
        let usage = Usage {
            sample_time,
            interval: self.last.and_then(|last| now.checked_sub(last.at)),
            cpu,
            cpus_busy: cpus_busy.unwrap_or(0.0),
            rates_valid: cpus_busy.is_some(),
            load: cpu::load(&self.root)?,
            pressure: pressure::usage(&self.root),
            memory: memory::usage(&self.root)?,
            nics: self.nics.sample(&self.root, now)?,
            file_systems: self.storage.file_systems(&self.root, now),
            pools: self.storage.pools(now),
            uptime_seconds: now.as_secs_f64(),
        };
        self.last = Some(reading);
        Ok(usage)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::root::fake::{MEMINFO, Tree},
        *,
    };

    fn stat(tree: &Tree, user: u64, iowait: u64) {
        tree.write(
            "proc/stat",
            &format!("cpu  {user} 0 0 0 {iowait} 0 0 0 0 0\ncpu0 1 0 0 0 0 0 0 0 0 0\ncpu1 1 0 0 0 0 0 0 0 0 0\nctxt 1\nbtime 1\nprocesses 1\n"),
        );
    }

    fn host() -> (Tree, Sampler) {
        let tree = Tree::new();
        tree.write("proc/meminfo", MEMINFO)
            .write("proc/loadavg", "0.10 0.20 0.30 1/2 3\n")
            .write("proc/net/dev", "a\nb\n");
        stat(&tree, 1_000, 500);
        let sampler = Sampler::with_root(tree.root(), vec![], vec![]);
        (tree, sampler)
    }

    fn sample(sampler: &mut Sampler, seconds: u64) -> Usage {
        sampler
            .sample_at(Duration::from_secs(seconds), Timestamp::UNIX_EPOCH)
            .unwrap()
    }

    #[test]
    fn the_first_sample_has_no_rates_and_no_interval() {
        let (_tree, mut sampler) = host();
        let usage = sample(&mut sampler, 10);
        assert_eq!(
            (usage.rates_valid, usage.cpus_busy, usage.interval),
            (false, 0.0, None)
        );
        assert_eq!((usage.load, usage.uptime_seconds), ([0.1, 0.2, 0.3], 10.0));
    }

    #[test]
    fn processors_in_use_come_from_two_samples() {
        let (tree, mut sampler) = host();
        sample(&mut sampler, 10);
        stat(&tree, 1_300, 500);
        let usage = sample(&mut sampler, 12);
        assert_eq!((usage.rates_valid, usage.cpus_busy), (true, 1.5));
        assert_eq!(usage.interval, Some(Duration::from_secs(2)));
        // more ticks than two processors have is rounding
        stat(&tree, 1_750, 500);
        assert_eq!(sample(&mut sampler, 14).cpus_busy, 2.0);
    }

    #[test]
    fn a_kernel_that_takes_iowait_back_disturbs_nothing() {
        let (tree, mut sampler) = host();
        sample(&mut sampler, 10);
        stat(&tree, 1_100, 400);
        let usage = sample(&mut sampler, 11);
        assert_eq!((usage.rates_valid, usage.cpus_busy), (true, 1.0));
    }

    #[test]
    fn a_counter_that_went_back_costs_one_sample() {
        let (tree, mut sampler) = host();
        sample(&mut sampler, 10);
        stat(&tree, 5, 0);
        assert!(!sample(&mut sampler, 11).rates_valid);
        stat(&tree, 105, 0);
        assert_eq!(sample(&mut sampler, 12).cpus_busy, 1.0);
    }

    #[test]
    fn a_host_without_proc_is_an_error_and_not_an_idle_host() {
        let (tree, mut sampler) = host();
        tree.remove("proc/stat");
        assert!(
            sampler
                .sample_at(Duration::from_secs(1), Timestamp::UNIX_EPOCH)
                .is_err()
        );
    }

    #[test]
    fn this_machine_can_be_sampled() {
        let mut sampler = Sampler::new(
            vec![PoolConfig {
                name: "local".into(),
                path: "/tmp".into(),
                shared: false,
                kind: Default::default(),
            }],
            vec!["/".into()],
        );
        let inventory = sampler.inventory().unwrap();
        assert!(
            inventory.cpus >= 1 && inventory.cores >= 1 && inventory.sockets >= 1,
            "{inventory:?}"
        );
        assert!(!inventory.numa_nodes.is_empty() && !inventory.kernel.is_empty());
        assert!(inventory.pools[0].capacity_bytes > 0 && inventory.pools[0].error.is_none());
        let usage = sampler.sample().unwrap();
        assert_eq!(usage.memory.total_bytes, inventory.memory_bytes);
        assert!(usage.cpu.idle > 0.0 && usage.uptime_seconds > 0.0);
        assert!(
            usage.file_systems.iter().any(|fs| fs.mount_point == "/"),
            "{:?}",
            usage.file_systems
        );
    }
}
