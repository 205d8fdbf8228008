//! What can be typed. Read by [`crate::commands`]; does nothing itself.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{complete, output::Format};

pub mod apply;
pub mod backup;
pub mod host;
pub mod image;
pub mod network;
pub mod placement;
pub mod plan;
pub mod site;
pub mod snapshot;
pub mod values;
pub mod vm;
pub mod volume;

const AFTER_HELP: &str = "\
Exit codes:
    0  done
    1  another failure
    2  wrong usage, or a value that is not allowed
    3  not found
    4  exists already, or was changed meanwhile
    5  refused: not possible in the present state, or no room
    6  the controller cannot be reached, or does not accept the caller
    7  gave up waiting; the operation goes on
    8  the operation failed or was cancelled
    9  the doctor found something, or could not see every host
  130  interrupted

Data goes to standard output, messages and progress to standard error.
`dalgu completion --help` shows how to complete names with the Tab key.";

/// Runs virtual machines on the servers of a site.
#[derive(Debug, Parser)]
#[command(name = "dalgu", version, after_help = AFTER_HELP, max_term_width = 110)]
pub struct Cli {
    /// Configuration file [default: $XDG_CONFIG_HOME/dalgu/config.toml].
    #[arg(
        long,
        global = true,
        env = "DALGU_CONFIG",
        value_name = "FILE",
        help_heading = "Global options"
    )]
    pub config: Option<PathBuf>,
    /// Context of the configuration file to use instead of its current one.
    #[arg(
        long,
        global = true,
        env = "DALGU_CONTEXT",
        value_name = "NAME",
        help_heading = "Global options"
    )]
    pub context: Option<String>,
    /// Controller to talk to instead of the context's: https://HOST:PORT or unix:/PATH.
    #[arg(
        long,
        global = true,
        env = "DALGU_ENDPOINT",
        value_name = "URL",
        help_heading = "Global options"
    )]
    pub endpoint: Option<String>,
    /// How to show results; json and yaml are the API's own JSON form.
    #[arg(
        short,
        long,
        global = true,
        value_enum,
        default_value_t,
        value_name = "FORMAT",
        help_heading = "Global options"
    )]
    pub output: Format,
    /// When to use colours; `auto` means on a terminal, unless NO_COLOR is set.
    #[arg(
        long,
        global = true,
        value_enum,
        default_value_t,
        value_name = "WHEN",
        help_heading = "Global options"
    )]
    pub color: Color,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// When to use colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Color {
    /// On a terminal.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// The nouns, and the few commands that need none.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Servers: their load, and whether they take new VMs.
    #[command(subcommand, visible_alias = "hosts")]
    Host(host::HostCommand),
    /// Virtual machines.
    #[command(subcommand, visible_alias = "vms")]
    Vm(vm::VmCommand),
    /// Snapshots: what the disks of VMs held at one moment.
    #[command(subcommand, visible_alias = "snapshots")]
    Snapshot(snapshot::SnapshotCommand),
    /// Images: what new disks are made from.
    #[command(subcommand, visible_alias = "images")]
    Image(image::ImageCommand),
    /// Backups of VMs, and the schedules by which they are taken.
    #[command(subcommand, visible_alias = "backups")]
    Backup(backup::BackupCommand),
    /// Networks: what VMs are connected to.
    #[command(subcommand, visible_alias = "networks")]
    Network(network::NetworkCommand),
    /// Security groups: who may talk to whom.
    #[command(subcommand, visible_alias = "security-groups")]
    SecurityGroup(network::GroupCommand),
    /// Placement groups: VMs that are to be together or apart.
    #[command(subcommand, visible_alias = "placement-groups")]
    PlacementGroup(placement::GroupCommand),
    /// Volumes: disks that outlive the VMs that have them.
    #[command(subcommand, visible_alias = "volumes")]
    Volume(volume::VolumeCommand),
    /// Plans: which VMs had better run elsewhere, shown before any moves.
    #[command(subcommand, visible_alias = "plans")]
    Plan(plan::PlanCommand),
    /// Makes networks, security groups, volumes and VMs as files declare them, after showing what changes.
    Apply(apply::ApplyArgs),
    /// Operations: long work that goes on after its command has returned.
    #[command(subcommand, visible_alias = "operation")]
    Op(OpCommand),
    /// The site as a whole: what to do after a backup was restored.
    #[command(subcommand)]
    Site(site::SiteCommand),
    /// Examines the site: what is wrong, what was looked at, and what could not be seen.
    Doctor(site::DoctorArgs),
    /// What has happened on the site.
    Events(EventsArgs),
    /// Why a VM is where it is, where it could go, or where a new one would go.
    Explain(Box<vm::ExplainArgs>),
    /// How many more VMs of one size fit, and how many so that hosts or racks can still be lost.
    Capacity(placement::CapacityArgs),
    /// Controllers this command knows.
    #[command(subcommand)]
    Context(ContextCommand),
    /// Prints a script that teaches a shell to complete commands and names.
    Completion(CompletionArgs),
    /// Prints the version.
    Version,
}

/// How to wait for the operation that a command starts.
#[derive(Debug, Clone, Args)]
pub struct WaitArgs {
    /// Return as soon as the request is accepted, and print the operation's id.
    #[arg(long, help_heading = "Waiting")]
    pub no_wait: bool,
    /// Longest wait, for example 90s, 5m or 1h [default: 5m; 1h for migrations].
    #[arg(long, value_parser = values::duration, value_name = "TIME", help_heading = "Waiting")]
    pub timeout: Option<Duration>,
    /// UUID of the request: repeating a command with the same one does the work once only [default: a new one].
    #[arg(long, value_parser = values::uuid, value_name = "UUID", help_heading = "Waiting")]
    pub request_id: Option<String>,
}

impl WaitArgs {
    /// Longest wait where none was given.
    pub const DEFAULT: Duration = Duration::from_secs(300);

    /// Longest wait.
    pub fn limit(&self) -> Duration {
        self.timeout.unwrap_or(Self::DEFAULT)
    }
}

/// Operations.
#[derive(Debug, Subcommand)]
pub enum OpCommand {
    /// Lists operations, newest first.
    #[command(visible_alias = "ls")]
    List {
        /// Only those of this VM.
        #[arg(long, value_name = "VM", add = complete::vms())]
        vm: Option<String>,
        /// Only those that have not ended.
        #[arg(long)]
        active: bool,
        /// Show at most so many.
        #[arg(long, default_value_t = 50, value_name = "N")]
        limit: usize,
        /// Go on and show changes as they come.
        #[arg(short, long)]
        watch: bool,
    },
    /// Shows one operation.
    Show {
        /// Id of the operation.
        #[arg(add = complete::operations())]
        id: String,
        /// Go on and show changes as they come.
        #[arg(short, long)]
        watch: bool,
    },
    /// Waits until an operation has ended.
    Wait {
        /// Id of the operation.
        #[arg(add = complete::operations())]
        id: String,
        /// Longest wait, for example 90s, 5m or 1h [default: 5m].
        #[arg(long, value_parser = values::duration, value_name = "TIME")]
        timeout: Option<Duration>,
    },
    /// Asks to give an operation up, and waits for its end.
    Cancel {
        /// Id of the operation.
        #[arg(add = complete::operations())]
        id: String,
        /// Return as soon as the request is accepted.
        #[arg(long)]
        no_wait: bool,
        /// Longest wait, for example 90s, 5m or 1h [default: 5m].
        #[arg(long, value_parser = values::duration, value_name = "TIME")]
        timeout: Option<Duration>,
    },
}

/// Which events to show.
#[derive(Debug, Clone, Args)]
pub struct EventsArgs {
    /// Go on and show events as they come.
    #[arg(short, long, visible_alias = "watch")]
    pub follow: bool,
    /// Show at most so many of the past.
    #[arg(long, default_value_t = 50, value_name = "N")]
    pub limit: usize,
    /// Only events of this kind.
    #[arg(long, value_enum, value_name = "KIND")]
    pub kind: Option<EventKind>,
}

/// Kinds of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EventKind {
    /// Of VMs.
    Vm,
    /// Of hosts.
    Host,
    /// Of operations.
    Operation,
    /// Of images.
    Image,
    /// Of networks.
    Network,
    /// Of security groups.
    SecurityGroup,
    /// Of volumes.
    Volume,
    /// Of plans of moves.
    Plan,
}

const CONTEXT_HELP: &str = "\
The configuration file is TOML; relative paths are relative to it:

    current_context = \"lab\"

    [contexts.lab]
    endpoint = \"https://10.77.0.1:7443\"
    ca = \"ca.pem\"
    cert = \"admin.pem\"
    key = \"admin.key\"

    [contexts.local]
    endpoint = \"unix:/run/dalgu-controller/controller.sock\"

Without a file, the local controller's socket is used where there is one.";

/// Contexts: which controllers there are, and which one is meant.
#[derive(Debug, Subcommand)]
#[command(after_help = CONTEXT_HELP)]
pub enum ContextCommand {
    /// Lists the contexts of the configuration file.
    #[command(visible_alias = "ls")]
    List,
    /// Makes a context the current one.
    Use {
        /// Name of the context.
        #[arg(add = complete::contexts())]
        name: String,
    },
    /// Shows the context that is in use, and checks its files.
    Show,
}

const COMPLETION_HELP: &str = "\
bash:  echo 'source <(dalgu completion bash)' >> ~/.bashrc
zsh:   echo 'source <(dalgu completion zsh)' >> ~/.zshrc
fish:  dalgu completion fish > ~/.config/fish/completions/dalgu.fish

Names of VMs, hosts and contexts are completed too; they are asked of the controller, for one second at most.";

/// For which shell.
#[derive(Debug, Args)]
#[command(after_help = COMPLETION_HELP)]
pub struct CompletionArgs {
    /// The shell.
    #[arg(value_enum)]
    pub shell: Shell,
}

/// Shells that can be taught.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// GNU Bash.
    Bash,
    /// Z shell.
    Zsh,
    /// fish.
    Fish,
}
