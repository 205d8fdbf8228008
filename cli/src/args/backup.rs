//! What can be typed after `dalgu backup`.

use std::time::Duration;

use clap::{Args, Subcommand};

use super::{WaitArgs, host::RequestArgs, values};
use crate::complete;

/// Backups of VMs.
#[derive(Debug, Subcommand)]
pub enum BackupCommand {
    /// Takes a backup of a VM, running or off.
    Create(CreateArgs),
    /// Lists backups, oldest first.
    #[command(visible_alias = "ls")]
    List {
        /// Only those of this VM.
        #[arg(long, value_name = "VM", add = complete::vms())]
        vm: Option<String>,
        /// Only those of this schedule.
        #[arg(long, value_name = "NAME")]
        schedule: Option<String>,
        /// Only those with this label; may be given again.
        #[arg(short = 'l', long = "selector", value_parser = values::label, value_name = "KEY=VALUE")]
        selector: Vec<(String, String)>,
    },
    /// Shows one backup in full.
    #[command(visible_alias = "get")]
    Show {
        /// UUID of the backup.
        #[arg(value_parser = values::uuid)]
        uid: String,
    },
    /// Deletes a backup, or gives up one that is under way.
    #[command(visible_alias = "rm")]
    Delete {
        /// UUID of the backup.
        #[arg(value_parser = values::uuid)]
        uid: String,
        /// Delete those that need it too.
        #[arg(long)]
        with_children: bool,
        /// Refuse unless the backup is still as it was with this etag.
        #[arg(long, default_value = "", hide_default_value = true)]
        etag: String,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
    /// Makes a new VM from a backup.
    Restore(RestoreArgs),
    /// Schedules: which VMs are backed up, when, and how long backups are kept.
    #[command(subcommand, visible_alias = "schedules")]
    Schedule(ScheduleCommand),
}

/// A backup to be taken.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Name of the VM.
    #[arg(add = complete::vms())]
    pub vm: String,
    /// Pool of its host for the files; best one that other hosts see too.
    #[arg(long, value_name = "POOL")]
    pub pool: String,
    /// Copy everything.
    #[arg(long, conflicts_with = "incremental")]
    pub full: bool,
    /// Copy what has changed since the last one, or fail.
    #[arg(long)]
    pub incremental: bool,
    /// Label of the backup; may be given again.
    #[arg(long = "label", value_parser = values::label, value_name = "KEY=VALUE")]
    pub labels: Vec<(String, String)>,
    /// Free text.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "TEXT")]
    pub description: String,
    /// Wait until it is whole.
    #[arg(long)]
    pub wait: bool,
    /// Longest wait, for example 90s, 5m or 1h [default: 1h].
    #[arg(long, value_parser = values::duration, value_name = "TIME")]
    pub timeout: Option<Duration>,
    /// The request.
    #[command(flatten)]
    pub request: RequestArgs,
}

/// A VM to be made.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// UUID of the backup.
    #[arg(value_parser = values::uuid)]
    pub uid: String,
    /// Name of the new VM.
    pub name: String,
    /// Host that it must go to [default: the best one that sees the files].
    #[arg(long, value_name = "HOST", add = complete::hosts())]
    pub host: Option<String>,
    /// Leave it powered off.
    #[arg(long)]
    pub stopped: bool,
    /// Give it the MAC and network addresses that the VM had, which must be free.
    #[arg(long)]
    pub keep_addresses: bool,
    /// Label of the new VM, besides those that the VM had or instead of one with the same key; may be given again.
    #[arg(long = "label", value_parser = values::label, value_name = "KEY=VALUE")]
    pub labels: Vec<(String, String)>,
    /// Put it in none of the placement groups that the VM was in, as where their rules leave no room beside it.
    #[arg(long)]
    pub no_placement_groups: bool,
    /// It may take the room that is kept for protected failure domains.
    #[arg(long)]
    pub ignore_protection: bool,
    /// Put a disk in another pool than it was in, as where that is gone; may be given again.
    #[arg(long = "pool", value_parser = values::disk_pool, value_name = "DISK=POOL")]
    pub pools: Vec<(String, String)>,
    /// Plug an interface into another network, or leave it out; may be given again.
    #[arg(long = "nic", value_parser = values::network::nic_network, value_name = "NAME=NETWORK|none")]
    pub nics: Vec<(String, String)>,
    /// Waiting.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// Schedules of backups.
#[derive(Debug, Subcommand)]
pub enum ScheduleCommand {
    /// Enters a schedule.
    Create(CreateScheduleArgs),
    /// Lists schedules.
    #[command(visible_alias = "ls")]
    List,
    /// Shows one schedule in full.
    #[command(visible_alias = "get")]
    Show {
        /// Name of the schedule.
        name: String,
    },
    /// Changes a schedule.
    Update(UpdateScheduleArgs),
    /// Deletes a schedule; backups that were taken by it stay.
    #[command(visible_alias = "rm")]
    Delete {
        /// Name of the schedule.
        name: String,
        /// Refuse unless the schedule is still as it was with this etag.
        #[arg(long, default_value = "", hide_default_value = true)]
        etag: String,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
}

const SCHEDULE_HELP: &str = "\
  dalgu backup schedule create nightly -l tier=gold --pool vault --every 24h --at 02:00 --keep-last 14";

/// A schedule to be entered.
#[derive(Debug, Args)]
#[command(after_help = SCHEDULE_HELP)]
pub struct CreateScheduleArgs {
    /// Name of the schedule.
    pub name: String,
    /// Label that its VMs bear; may be given again, and then they bear all.
    #[arg(short = 'l', long = "selector", value_parser = values::label, value_name = "KEY=VALUE", required = true)]
    pub selector: Vec<(String, String)>,
    /// Pool of the VMs' hosts for the files.
    #[arg(long, value_name = "POOL")]
    pub pool: String,
    /// Time between two backups of a VM, 15m to 720h.
    #[arg(long, value_parser = values::duration, value_name = "TIME")]
    pub every: Duration,
    /// Time of day that this is counted from, in UTC or with a distance from it, for example 02:00 or 02:00+09:00
    /// [default: each VM's last backup].
    #[arg(long, value_parser = values::time_of_day, default_value = "", hide_default_value = true, value_name = "HH:MM")]
    pub at: String,
    /// So many incremental ones after each full one, 0 to 30.
    #[arg(long, default_value_t = 6, value_name = "N")]
    pub incrementals: u32,
    /// So many of the newest are kept, 1 to 60.
    #[arg(long, default_value_t = 14, value_name = "N")]
    pub keep_last: u32,
    /// Those younger than so many days are kept too.
    #[arg(long, default_value_t = 0, value_name = "DAYS")]
    pub keep_days: u32,
    /// Take none until it is resumed.
    #[arg(long)]
    pub paused: bool,
    /// Free text.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "TEXT")]
    pub description: String,
    /// The request.
    #[command(flatten)]
    pub request: RequestArgs,
}

/// A change of a schedule.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("change").required(true).multiple(true)))]
pub struct UpdateScheduleArgs {
    /// Name of the schedule.
    pub name: String,
    /// Label that its VMs bear from now on, instead of those before; may be given again.
    #[arg(short = 'l', long = "selector", value_parser = values::label, value_name = "KEY=VALUE", group = "change")]
    pub selector: Vec<(String, String)>,
    /// New pool.
    #[arg(long, value_name = "POOL", group = "change")]
    pub pool: Option<String>,
    /// New time between two backups.
    #[arg(long, value_parser = values::duration, value_name = "TIME", group = "change")]
    pub every: Option<Duration>,
    /// New time of day that this is counted from, or `none` for each VM's last backup.
    #[arg(long, value_parser = values::time_of_day, value_name = "HH:MM", group = "change")]
    pub at: Option<String>,
    /// New number of incremental ones after each full one.
    #[arg(long, value_name = "N", group = "change")]
    pub incrementals: Option<u32>,
    /// New number of those that are kept.
    #[arg(long, value_name = "N", group = "change")]
    pub keep_last: Option<u32>,
    /// New age up to which all are kept.
    #[arg(long, value_name = "DAYS", group = "change")]
    pub keep_days: Option<u32>,
    /// Take none and delete none until it is resumed.
    #[arg(long, group = "change", conflicts_with = "resume")]
    pub pause: bool,
    /// Go on.
    #[arg(long, group = "change")]
    pub resume: bool,
    /// New description.
    #[arg(long, value_name = "TEXT", group = "change")]
    pub description: Option<String>,
    /// Refuse unless the schedule is still as it was with this etag.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub etag: String,
    /// The request.
    #[command(flatten)]
    pub request: RequestArgs,
}
