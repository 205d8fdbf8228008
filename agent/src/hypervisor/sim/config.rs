//! Settings of a simulated hypervisor.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};

use dalgu_proto::{ids::ClusterId, time::Clock};

use super::{Behaviour, Lines, SharedStorage, UnixLines};

/// How long calls take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delays {
    /// A call that only looks.
    pub look: Duration,
    /// Defining and undefining.
    pub define: Duration,
    /// Starting and powering off.
    pub power: Duration,
    /// Making or deleting the disks of a VM.
    pub volumes: Duration,
    /// Copying a disk to another pool.
    pub copy: Duration,
    /// The stop at the end of a migration.
    pub downtime: Duration,
}

impl Delays {
    /// Everything at once.
    pub const NONE: Self = Self {
        look: Duration::ZERO,
        define: Duration::ZERO,
        power: Duration::ZERO,
        volumes: Duration::ZERO,
        copy: Duration::ZERO,
        downtime: Duration::ZERO,
    };
    /// About what real hosts take.
    pub const LIFELIKE: Self = Self {
        look: Duration::from_millis(1),
        define: Duration::from_millis(40),
        power: Duration::from_millis(300),
        volumes: Duration::from_millis(30),
        copy: Duration::from_secs(4),
        downtime: Duration::from_millis(30),
    };
}

/// Whether calls go on by themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Stepping {
    /// They do.
    #[default]
    Auto,
    /// Each call that changes something, and each phase of a migration, waits for one [`Sim::step`].
    ByHand,
}

/// Settings of a simulated hypervisor.
#[derive(Debug, Clone)]
pub struct SimConfig {
    /// The site; domains that bear another site's mark are not Dalgu's.
    pub cluster: ClusterId,
    /// Where to listen for migrations; without it none can arrive.
    pub control_socket: Option<PathBuf>,
    /// How it listens there, and how a source reaches the path that its orders name.
    pub lines: Arc<dyn Lines>,
    /// Where running guests write their counter, one file each.
    pub console_dir: Option<PathBuf>,
    /// How often a guest counts.
    pub console_interval: Duration,
    /// Names of pools that other hosts see too.
    pub shared_pools: BTreeSet<String>,
    /// What lies on the shared pools; give clones of one to the hosts that share.
    pub shared_storage: SharedStorage,
    /// Images and kernels that exist; `None` means every one.
    pub images: Option<BTreeSet<String>>,
    /// How long calls take.
    pub delays: Delays,
    /// Whether calls go on by themselves.
    pub stepping: Stepping,
    /// What guests do unless [`Sim::set_behaviour`] says otherwise.
    pub behaviour: Behaviour,
    /// The wall clock, for the time of samples.
    pub clock: Clock,
    /// Speed of migrations, in bytes per second.
    pub rate_bytes_per_second: u64,
}

impl SimConfig {
    /// A site's host without sockets and files, whose calls take no time.
    pub fn new(cluster: ClusterId) -> Self {
        Self {
            cluster,
            control_socket: None,
            lines: Arc::new(UnixLines),
            console_dir: None,
            console_interval: Duration::from_secs(1),
            shared_pools: BTreeSet::new(),
            shared_storage: SharedStorage::default(),
            images: None,
            delays: Delays::NONE,
            stepping: Stepping::Auto,
            behaviour: Behaviour::default(),
            clock: Clock::system(),
            rate_bytes_per_second: 1 << 30,
        }
    }
}
