//! What can be typed after `dalgu vm` and `dalgu explain`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use dalgu_proto::v1;

use super::{EventsArgs, WaitArgs, host::DrainMode, values};
use crate::complete;

/// VMs.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Creates a VM, places it, and starts it.
    Create(Box<CreateArgs>),
    /// Lists VMs.
    #[command(visible_alias = "ls")]
    List {
        /// Only VMs on this host.
        #[arg(long, value_name = "HOST", add = complete::hosts())]
        host: Option<String>,
        /// Only VMs with this label; may be given again.
        #[arg(short = 'l', long = "selector", value_parser = values::label, value_name = "KEY=VALUE")]
        selector: Vec<(String, String)>,
        /// Go on and show changes as they come.
        #[arg(short, long)]
        watch: bool,
    },
    /// Shows one VM in full.
    #[command(visible_alias = "get")]
    Show {
        /// Name of the VM.
        #[arg(add = complete::vms())]
        name: String,
        /// Go on and show changes as they come.
        #[arg(short, long)]
        watch: bool,
    },
    /// Starts a stopped VM on its host.
    Start(VerbArgs),
    /// Asks the guest to shut down, and powers it off if it does not in time.
    Stop {
        /// What, and how to wait.
        #[command(flatten)]
        verb: VerbArgs,
        /// Time the guest has to shut down, for example 30s [default: 60s].
        #[arg(long, value_parser = values::duration, value_name = "TIME")]
        grace: Option<std::time::Duration>,
        /// Power it off at once, as by pulling the plug.
        #[arg(long, conflicts_with = "grace")]
        force: bool,
    },
    /// Restarts the guest.
    #[command(visible_alias = "reboot")]
    Restart {
        /// What, and how to wait.
        #[command(flatten)]
        verb: VerbArgs,
        /// As by the reset button: the guest is not asked.
        #[arg(long)]
        reset: bool,
    },
    /// Freezes a running VM; its memory stays.
    Pause(VerbArgs),
    /// Lets a paused VM go on.
    Resume(VerbArgs),
    /// Moves a running VM to another host without stopping it.
    Migrate {
        /// What, and how to wait.
        #[command(flatten)]
        verb: VerbArgs,
        /// Host to move to [default: the controller chooses].
        #[arg(long, visible_alias = "to", value_name = "HOST", add = complete::hosts())]
        host: Option<String>,
        /// Longest stop of the guest at the switch-over, for example 100ms [default: 100ms].
        #[arg(long, value_parser = values::duration, value_name = "TIME")]
        max_downtime: Option<std::time::Duration>,
        /// Limit of the transfer, per second, for example 100MiB [default: none].
        #[arg(long, value_parser = values::size_mib, value_name = "SIZE")]
        bandwidth: Option<u64>,
        /// It may take the room that is kept for protected failure domains.
        #[arg(long)]
        ignore_protection: bool,
    },
    /// Deletes a VM and its disks.
    #[command(visible_alias = "rm")]
    Delete {
        /// What, and how to wait.
        #[command(flatten)]
        verb: VerbArgs,
        /// Power a running VM off first.
        #[arg(long)]
        force: bool,
    },
    /// Changes what is said of a VM, and what it is made of: while it runs where that is possible, else at its next start.
    Update(Box<UpdateArgs>),
    /// Shows what has happened to a VM.
    Events {
        /// Name of the VM.
        #[arg(add = complete::vms())]
        name: String,
        /// Which.
        #[command(flatten)]
        events: EventsArgs,
    },
    /// Prints the log of a VM's serial console.
    Console {
        /// Name of the VM.
        #[arg(add = complete::vms())]
        name: String,
        /// Go on and print what comes.
        #[arg(short, long)]
        follow: bool,
        /// Print only the last so many bytes, for example 4KiB [default: all that the host has kept].
        #[arg(long, value_parser = values::size_bytes, value_name = "SIZE")]
        tail: Option<u64>,
    },
}

/// A VM to do something with.
#[derive(Debug, Args)]
pub struct VerbArgs {
    /// Name of the VM.
    #[arg(add = complete::vms())]
    pub name: String,
    /// Refuse unless the VM is still as it was with this etag.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub etag: String,
    /// How to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// What a VM is made of.
#[derive(Debug, Clone, Default, Args)]
pub struct SpecArgs {
    /// Virtual processors [default: 1].
    #[arg(long, value_name = "N", conflicts_with = "file", allow_hyphen_values = true)]
    pub vcpus: Option<u32>,
    /// Memory, for example 512MiB or 4GiB [default: 256MiB].
    #[arg(long, value_parser = values::size_mib, value_name = "SIZE", conflicts_with = "file", allow_hyphen_values = true)]
    pub memory: Option<u64>,
    /// Most virtual processors that it can have without a restart [default: what it has].
    #[arg(long, value_name = "N", conflicts_with = "file")]
    pub max_vcpus: Option<u32>,
    /// Most memory that it can have without a restart [default: what it has].
    #[arg(long, value_parser = values::size_mib, value_name = "SIZE", conflicts_with = "file")]
    pub max_memory: Option<u64>,
    /// Disk, in boot order: NAME=SIZE[,pool=POOL][,image=IMAGE[:VERSION]|FILE][,format=qcow2|raw][,clone=overlay|full][,read-iops=N][,write-iops=N][,read-rate=SIZE][,write-rate=SIZE]; without =SIZE as large as its image; may be given again.
    #[arg(long = "disk", value_parser = values::disk, value_name = "DISK", conflicts_with = "file")]
    pub disks: Vec<v1::Disk>,
    /// Network interface: NAME,network=NETWORK[,ip=ADDRESS][,group=GROUP][,receive=RATE][,send=RATE] or NAME=BRIDGE[,reserve=RATE], each with [,mac=ADDRESS]; may be given again.
    #[arg(long = "nic", value_parser = values::network::nic, value_name = "NIC", conflicts_with = "file")]
    pub nics: Vec<v1::Nic>,
    /// Boot this kernel of the hosts' image directory instead of the first disk.
    #[arg(long, value_name = "FILE", conflicts_with = "file")]
    pub kernel: Option<String>,
    /// Initial RAM disk for the kernel.
    #[arg(long, value_name = "FILE", requires = "kernel", conflicts_with = "file")]
    pub initrd: Option<String>,
    /// Command line for the kernel.
    #[arg(long, value_name = "TEXT", requires = "kernel", conflicts_with = "file")]
    pub cmdline: Option<String>,
    /// Label a host must bear to take the VM; may be given again.
    #[arg(long = "host-selector", value_parser = values::label, value_name = "KEY=VALUE", conflicts_with = "file")]
    pub host_selector: Vec<(String, String)>,
    /// When its host starts it again by itself [default: on-failure].
    #[arg(long, value_enum, value_name = "POLICY", conflicts_with = "file")]
    pub restart_policy: Option<RestartPolicy>,
    /// What its guest is told at the first boot.
    #[command(flatten)]
    pub first_boot: FirstBootArgs,
    /// What starts it [default: what the image of the first disk says, else bios].
    #[arg(long, value_enum, value_name = "FIRMWARE", conflicts_with = "file")]
    pub firmware: Option<Firmware>,
    /// Give it a TPM 2.0 in software.
    #[arg(long, conflicts_with = "file")]
    pub tpm: bool,
    /// What it asks of its host's processors, huge pages and NUMA nodes.
    #[command(flatten)]
    pub fitting: FittingArgs,
    /// File that holds the VM as JSON or YAML, as `dalgu vm show -o yaml` prints it; - reads standard input.
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
}

/// What a VM asks of its host's processors, huge pages and NUMA nodes.
#[derive(Debug, Clone, Default, Args)]
pub struct FittingArgs {
    /// How its virtual processors run: with those of others, or each on a logical processor of its own [default: shared].
    #[arg(long, value_enum, value_name = "POLICY")]
    pub cpu_policy: Option<CpuPolicy>,
    /// Make its memory of huge pages that its host has set aside: 2MiB or 1GiB [default: ordinary memory].
    #[arg(long, value_parser = values::page_kib, value_name = "SIZE")]
    pub huge_pages: Option<u64>,
    /// Where on its host it is: none, pack (all on one NUMA node) or spread:N (in equal parts on N nodes, which the guest sees) [default: none].
    #[arg(long, value_parser = values::numa, value_name = "POLICY")]
    pub numa: Option<values::Numa>,
    /// Give it a PCI device of this class for itself, or so many: gpu, or gpu=2. The VM does not migrate then; repeatable.
    #[arg(long = "device", value_parser = values::device, value_name = "CLASS[=COUNT]")]
    pub devices: Vec<v1::DeviceRequest>,
}

/// How virtual processors run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CpuPolicy {
    /// With those of others.
    Shared,
    /// Each on a logical processor of its own.
    Dedicated,
}

impl From<CpuPolicy> for v1::CpuPolicy {
    fn from(policy: CpuPolicy) -> Self {
        match policy {
            CpuPolicy::Shared => Self::Shared,
            CpuPolicy::Dedicated => Self::Dedicated,
        }
    }
}

/// What a guest is told at its first boot. Any of these gives the VM the volume that cloud-init looks for.
#[derive(Debug, Clone, Default, Args)]
pub struct FirstBootArgs {
    /// File for cloud-init, such as a #cloud-config or a script; - reads standard input.
    #[arg(long, value_name = "FILE", conflicts_with = "file")]
    pub user_data: Option<PathBuf>,
    /// File with the network configuration, version 2 in YAML; - reads standard input [default: DHCP on each interface; where the
    /// site gave it an address and there is no DHCP, that address].
    #[arg(long, value_name = "FILE", conflicts_with = "file")]
    pub network_config: Option<PathBuf>,
    /// Public key for the image's usual user, or a file with some, such as ~/.ssh/id_ed25519.pub; may be given again.
    #[arg(long = "ssh-key", value_name = "FILE|KEY", conflicts_with = "file")]
    pub ssh_keys: Vec<String>,
    /// Host name [default: the VM's name].
    #[arg(long, value_name = "NAME", conflicts_with = "file")]
    pub hostname: Option<String>,
    /// Pool of the volume that tells it [default: that of the first disk].
    #[arg(long, value_name = "POOL", conflicts_with = "file")]
    pub first_boot_pool: Option<String>,
}

/// Groups and tolerations of a VM.
#[derive(Debug, Clone, Default, Args)]
pub struct PlacementArgs {
    /// Placement group that it is in; may be given again.
    #[arg(long = "placement-group", value_name = "GROUP", add = complete::placement_groups())]
    pub groups: Vec<String>,
    /// Taint of hosts that it puts up with: KEY=VALUE, or KEY for any value; may be given again.
    #[arg(long = "tolerate", value_parser = values::toleration, value_name = "TAINT")]
    pub tolerations: Vec<v1::Toleration>,
}

/// A VM to be created.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Name of the VM; may be left out when a file gives it.
    #[arg(required_unless_present = "file")]
    pub name: Option<String>,
    /// What it is made of.
    #[command(flatten)]
    pub spec: SpecArgs,
    /// Label of the VM; may be given again.
    #[arg(long = "label", value_parser = values::label, value_name = "KEY=VALUE", conflicts_with = "file")]
    pub labels: Vec<(String, String)>,
    /// Free text.
    #[arg(long, value_name = "TEXT", conflicts_with = "file")]
    pub description: Option<String>,
    /// What becomes of it when its host is drained [default: live-migrate].
    #[arg(long, value_enum, value_name = "MODE")]
    pub drain_mode: Option<DrainMode>,
    /// What it is to be together with or apart from, and what it puts up with.
    #[command(flatten)]
    pub placement: PlacementArgs,
    /// Place it on this host, or refuse [default: the controller chooses].
    #[arg(long, value_name = "HOST", add = complete::hosts())]
    pub host: Option<String>,
    /// It may take the room that is kept for protected failure domains.
    #[arg(long)]
    pub ignore_protection: bool,
    /// Leave it powered off.
    #[arg(long)]
    pub stopped: bool,
    /// Check and place it, but do nothing.
    #[arg(long)]
    pub validate_only: bool,
    /// Create so many, NAME-1, NAME-2 and so on.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=2000), conflicts_with = "validate_only")]
    pub count: Option<u16>,
    /// Create all of them, or none where one cannot be created.
    #[arg(long, requires = "count")]
    pub all_or_nothing: bool,
    /// How to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// A change of a VM.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("change").required(true).multiple(true)))]
pub struct UpdateArgs {
    /// Name of the VM.
    #[arg(add = complete::vms())]
    pub name: String,
    /// Set a label (KEY=VALUE) or remove it (KEY-); may be given again.
    #[arg(long = "label", value_parser = values::label_change, value_name = "CHANGE", group = "change")]
    pub labels: Vec<values::LabelChange>,
    /// New description.
    #[arg(long, value_name = "TEXT", group = "change")]
    pub description: Option<String>,
    /// What becomes of it when its host is drained.
    #[arg(long, value_enum, value_name = "MODE", group = "change")]
    pub drain_mode: Option<DrainMode>,
    /// Join a placement group; may be given again.
    #[arg(long = "join-group", value_name = "GROUP", group = "change", add = complete::placement_groups())]
    pub join_groups: Vec<String>,
    /// Leave a placement group; may be given again.
    #[arg(long = "leave-group", value_name = "GROUP", group = "change", add = complete::placement_groups())]
    pub leave_groups: Vec<String>,
    /// Put up with a taint of hosts, KEY=VALUE or KEY, or with one no more: KEY-; may be given again.
    #[arg(long = "tolerate", value_parser = values::toleration_change, value_name = "CHANGE", group = "change")]
    pub tolerations: Vec<values::TolerationChange>,
    /// New restart policy.
    #[arg(long, value_enum, value_name = "POLICY", group = "change")]
    pub restart_policy: Option<RestartPolicy>,
    /// Virtual processors.
    #[arg(long, value_name = "N", group = "change")]
    pub vcpus: Option<u32>,
    /// Memory, for example 4GiB.
    #[arg(long, value_parser = values::size_mib, value_name = "SIZE", group = "change")]
    pub memory: Option<u64>,
    /// Most virtual processors without a restart, from the next start on; 0: what it has.
    #[arg(long, value_name = "N", group = "change")]
    pub max_vcpus: Option<u32>,
    /// Most memory without a restart, from the next start on; 0MiB: what it has.
    #[arg(long, value_parser = values::size_mib, value_name = "SIZE", group = "change")]
    pub max_memory: Option<u64>,
    /// Add a disk, said as for `vm create --disk`; may be given again.
    #[arg(long = "add-disk", value_parser = values::disk, value_name = "DISK", group = "change")]
    pub add_disks: Vec<v1::Disk>,
    /// Remove a disk with all that is on it; may be given again.
    #[arg(long = "remove-disk", value_name = "NAME", group = "change")]
    pub remove_disks: Vec<String>,
    /// Enlarge a disk: NAME=SIZE; may be given again.
    #[arg(long = "grow-disk", value_parser = values::disk_size, value_name = "NAME=SIZE", group = "change")]
    pub grow_disks: Vec<(String, u64)>,
    /// Move a disk to another pool of the VM's host, also while it runs: NAME=POOL; may be given again.
    #[arg(long = "move-disk", value_parser = values::disk_pool, value_name = "NAME=POOL", group = "change")]
    pub move_disks: Vec<(String, String)>,
    /// Limit what the guest may read and write on a disk: NAME,read-iops=N[,write-iops=N][,read-rate=SIZE][,write-rate=SIZE], `none` in place of a number to lift one, or NAME,none to lift all; may be given again.
    #[arg(long = "limit-disk", value_parser = values::limits::disk_limits, value_name = "NAME,LIMIT", group = "change")]
    pub limit_disks: Vec<(String, values::limits::Change)>,
    /// Add a network interface, said as for `vm create --nic`; may be given again.
    #[arg(long = "add-nic", value_parser = values::network::nic, value_name = "NIC", group = "change")]
    pub add_nics: Vec<v1::Nic>,
    /// Remove a network interface; may be given again.
    #[arg(long = "remove-nic", value_name = "NAME", group = "change")]
    pub remove_nics: Vec<String>,
    /// Limit what an interface in a network receives and sends: NAME,receive=RATE[,send=RATE], `none` in place of a rate to lift one, or NAME,none to lift both; may be given again.
    #[arg(long = "limit-nic", value_parser = values::network::nic_limits, value_name = "NAME,LIMIT", group = "change")]
    pub limit_nics: Vec<(String, values::network::NicLimits)>,
    /// Give an interface in a network one more security group: NAME=GROUP; may be given again.
    #[arg(long = "add-nic-group", value_parser = values::network::nic_group, value_name = "NAME=GROUP", group = "change")]
    pub add_nic_groups: Vec<(String, String)>,
    /// Take a security group from an interface: NAME=GROUP; may be given again.
    #[arg(long = "remove-nic-group", value_parser = values::network::nic_group, value_name = "NAME=GROUP", group = "change")]
    pub remove_nic_groups: Vec<(String, String)>,
    /// More processors or memory may take the room that is kept for protected failure domains.
    #[arg(long)]
    pub ignore_protection: bool,
    /// Wait until its host has done all that it can; what is left for the next start is told.
    #[arg(long)]
    pub wait: bool,
    /// Longest wait [default: 5m].
    #[arg(long, value_parser = values::duration, value_name = "TIME", requires = "wait")]
    pub timeout: Option<std::time::Duration>,
    /// Refuse unless the VM is still as it was with this etag.
    #[arg(long, value_name = "ETAG")]
    pub etag: Option<String>,
    /// UUID of the request [default: a new one].
    #[arg(long, value_parser = values::uuid, value_name = "UUID")]
    pub request_id: Option<String>,
}

const EXPLAIN_HELP: &str = "\
  dalgu explain web                              why web is on its host
  dalgu explain web --move                       where web could migrate to now
  dalgu explain web --host h2                    whether web could migrate to h2
  dalgu explain --memory 8GiB --disk root=20GiB  where such a new VM would go";

/// What to explain.
#[derive(Debug, Args)]
#[command(after_help = EXPLAIN_HELP)]
pub struct ExplainArgs {
    /// Name of the VM; leave it out to describe a VM that does not exist.
    #[arg(add = complete::vms(), conflicts_with_all = ["vcpus", "memory", "max_vcpus", "max_memory", "disks", "nics", "kernel", "host_selector", "restart_policy", "user_data", "network_config", "ssh_keys", "hostname", "first_boot_pool", "firmware", "tpm", "file", "groups", "tolerations"])]
    pub vm: Option<String>,
    /// Describe a VM that does not exist by the flags that follow; implied when no VM is named.
    #[arg(long = "spec", conflicts_with = "vm")]
    pub what_if: bool,
    /// Tell where the VM could migrate to now, instead of why it is where it is.
    #[arg(long = "move", requires = "vm")]
    pub move_: bool,
    /// Consider only this host.
    #[arg(long, value_name = "HOST", add = complete::hosts())]
    pub host: Option<String>,
    /// It may take the room that is kept for protected failure domains.
    #[arg(long)]
    pub ignore_protection: bool,
    /// What it would be together with or apart from, and put up with.
    #[command(flatten)]
    pub placement: PlacementArgs,
    /// What it would be made of.
    #[command(flatten)]
    pub spec: SpecArgs,
}

/// What starts a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Firmware {
    /// SeaBIOS.
    Bios,
    /// UEFI.
    Uefi,
    /// UEFI that starts only what is signed.
    UefiSecure,
}

impl From<Firmware> for v1::Firmware {
    fn from(firmware: Firmware) -> Self {
        match firmware {
            Firmware::Bios => Self::Bios,
            Firmware::Uefi => Self::Uefi,
            Firmware::UefiSecure => Self::UefiSecureBoot,
        }
    }
}

/// When a host starts a VM again by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RestartPolicy {
    /// After a crash, or a restart of the host.
    OnFailure,
    /// Also when the guest shut itself down.
    Always,
    /// Never.
    Never,
}

impl From<RestartPolicy> for v1::RestartPolicy {
    fn from(policy: RestartPolicy) -> Self {
        match policy {
            RestartPolicy::OnFailure => Self::OnFailure,
            RestartPolicy::Always => Self::Always,
            RestartPolicy::Never => Self::Never,
        }
    }
}
