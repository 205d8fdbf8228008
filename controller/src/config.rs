//! The configuration file, `controller.toml`. Read once at start by `run`; tests build a [`Config`] themselves.
//!
//! Every key has a default, so that an empty file serves. An unknown key is an error, as it is most often a misspelt one.
//! The sample with all keys and their meaning is systemd/controller.toml.

use std::{
    net::SocketAddr,
    num::NonZeroU32,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::Deserialize;

use crate::{
    model::Bounds,
    placement::{Named, Order, Policy, PoolPolicy, Protect},
    power::{policy::Rules, redfish::Redfish},
    server::limits::Limits,
};

/// Why a configuration is not usable.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// It is not TOML, or has a key or a type that is not known.
    #[error("the configuration cannot be understood")]
    Syntax(#[from] toml::de::Error),
    /// A value is out of range.
    #[error("{key} = {value}: must be {allowed}")]
    Value {
        /// The key.
        key: &'static str,
        /// What it was set to.
        value: String,
        /// What is allowed.
        allowed: String,
    },
}

/// How the controller runs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where the store and the identities are.
    pub data_dir: PathBuf,
    /// Where ca.pem, controller.pem and controller.key are; `None` means in `data_dir`.
    pub tls_dir: Option<PathBuf>,
    /// Address and port for operators, agents and scrapers. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// Socket for callers on this machine: root and the controller's own user, no certificate asked.
    pub unix_socket: Option<PathBuf>,
    /// How often agents report, in milliseconds; they learn it when they register.
    pub report_interval_ms: u32,
    /// After so many intervals without a report a host counts as unreachable and takes no new VM.
    pub unreachable_after_intervals: u32,
    /// Events kept; the oldest go first.
    pub event_retention: u32,
    /// Hours for which operations that have ended are kept.
    pub operation_retention_hours: u32,
    /// Minutes for which a deleted volume can be had back; 0 removes its data at once.
    pub volume_grace_minutes: Option<u32>,
    /// The same in hours, as files of before there were minutes have it. Without either it is a week.
    pub volume_grace_hours: Option<u32>,
    /// Free space that is kept on the file system of `data_dir`, below which nothing new is made; 0 means 5 % of it, at most 1 GiB.
    pub store_reserve_mib: u32,
    /// Part of a pool's room, in percent, from which on it is told that it is nearly full.
    pub pool_warn_percent: u32,
    /// Part of a pool's room, in percent, from which on it takes no new disks.
    pub pool_full_percent: u32,
    /// How much of a pool's room is promised to disks: 1.0 is all, more than that promises what is not there.
    pub pool_overcommit_ratio: Ratio,
    /// Where VMs go.
    pub placement: Placement,
    /// Moves without an operator, away from contended hosts.
    pub rebalance: Moves,
    /// Moves without an operator, off hosts that the others can take over.
    pub consolidate: Moves,
    /// Hosts that are switched off and on.
    pub power: Power,
    /// How much the port bears; not in the file.
    #[serde(skip)]
    pub limits: Limits,
}

/// A ratio, in hundredths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "f64")]
pub struct Ratio(u32);

impl TryFrom<f64> for Ratio {
    type Error = String;

    fn try_from(ratio: f64) -> Result<Self, String> {
        if !(1.0..=100.0).contains(&ratio) {
            return Err(format!("{ratio}: must be 1.0 to 100.0"));
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "in range by the test above"
        )]
        let hundredths = (ratio * 100.0).round() as u32;
        Ok(Self(hundredths))
    }
}

/// Where VMs go.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Placement {
    /// What makes a host better.
    pub policy: Named,
    /// The order of the parts of a score, where it is not the policy's.
    pub order: Option<Order>,
    /// Between which ratios the over-commit of a host's processors follows its load.
    pub cpu_overcommit: CpuOvercommit,
    /// Whether a host whose VMs are short of processors, memory or I/O takes no new ones.
    pub close_pressed_hosts: bool,
    /// The domains of which any one may fail: room for its VMs is kept on the others.
    pub protect: Protect,
    /// Most VMs on a host that has no limit of its own; none where it is not said.
    pub max_vms_per_host: Option<NonZeroU32>,
}

impl Default for Placement {
    fn default() -> Self {
        Self {
            policy: Named::default(),
            order: None,
            cpu_overcommit: CpuOvercommit::default(),
            close_pressed_hosts: true,
            protect: Protect::default(),
            max_vms_per_host: None,
        }
    }
}

/// Bounds of the over-commit ratio of a host's processors. Equal ones, as they are where nothing is said, leave every host its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CpuOvercommit {
    /// At least.
    pub least: Ratio,
    /// At most.
    pub most: Ratio,
}

impl Default for CpuOvercommit {
    fn default() -> Self {
        Self {
            least: Ratio(100),
            most: Ratio(100),
        }
    }
}

impl CpuOvercommit {
    /// The same as numbers.
    pub fn bounds(self) -> Bounds {
        let times = |ratio: Ratio| f64::from(ratio.0) / 100.0;
        Bounds {
            least: times(self.least),
            most: times(self.most),
        }
    }

    fn check(self) -> Result<(), Error> {
        let Bounds { least, most } = self.bounds();
        if (least..=MOST_OVERCOMMIT).contains(&most) {
            return Ok(());
        }
        Err(Error::Value {
            key: "placement.cpu_overcommit.most",
            value: most.to_string(),
            allowed: format!("{least}, the least, to {MOST_OVERCOMMIT}"),
        })
    }
}

impl Placement {
    /// What makes a host better.
    pub fn policy(&self) -> Policy {
        let policy = Policy::from(self.policy);
        Policy {
            order: self.order.unwrap_or(policy.order),
            ..policy
        }
    }
}

/// Plans that are made and approved without an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Moves {
    /// Whether there are any.
    pub automatic: bool,
    /// VMs that they move in an hour at most; each kind has its own number where nothing is said.
    pub moves_per_hour: Option<u32>,
}

/// VMs that are moved in an hour where nothing is said: away from contended hosts,
const RELIEVED_PER_HOUR: u32 = 10;
/// and off hosts that are emptied, which takes all that is there.
const EMPTIED_PER_HOUR: u32 = 40;

impl Moves {
    const fn at_most(most: u32) -> Self {
        Self {
            automatic: false,
            moves_per_hour: Some(most),
        }
    }

    /// VMs that are moved in an hour at most, `most` where nothing is said; none where it is off.
    fn an_hour(self, most: u32) -> usize {
        match self.automatic {
            true => usize::try_from(self.moves_per_hour.unwrap_or(most)).unwrap_or(usize::MAX),
            false => 0,
        }
    }
}

/// Hosts that are switched off while nobody needs them, and on again.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Power {
    /// Whether they are without an operator.
    pub automatic: bool,
    /// Room of so many of the largest host that is kept free on hosts that are on.
    pub reserve_hosts: u32,
    /// Minutes for which a host has nothing that is needed before it is switched off.
    pub settle_minutes: u32,
    /// Minutes for which a host stays on,
    pub min_on_minutes: u32,
    /// and off.
    pub min_off_minutes: u32,
    /// Switches in an hour.
    pub switches_per_hour: u32,
    /// Minutes in which a host is off that is told to shut down.
    pub off_limit_minutes: u32,
    /// Minutes in which a host reports that was switched on.
    pub on_limit_minutes: u32,
    /// Where user and password of management controllers are; `None` for systemd's directory of credentials, or else [`CREDENTIALS_DIR`].
    pub credentials_dir: Option<PathBuf>,
    /// Who signs the certificates of management controllers of which no fingerprint is known.
    pub ca: Option<PathBuf>,
}

/// Where the credentials are if nothing else is said.
pub const CREDENTIALS_DIR: &str = "/etc/dalgu/bmc";

impl Default for Power {
    fn default() -> Self {
        Self {
            automatic: false,
            reserve_hosts: 1,
            settle_minutes: 15,
            min_on_minutes: 30,
            min_off_minutes: 10,
            switches_per_hour: 10,
            off_limit_minutes: 10,
            on_limit_minutes: 15,
            credentials_dir: None,
            ca: None,
        }
    }
}

impl Power {
    /// How hosts are switched without an operator, if they are.
    pub fn rules(&self) -> Option<Rules> {
        let minutes = |minutes: u32| Duration::from_secs(u64::from(minutes) * 60);
        self.automatic.then(|| Rules {
            settle: minutes(self.settle_minutes),
            min_on: minutes(self.min_on_minutes),
            min_off: minutes(self.min_off_minutes),
            per_hour: usize::try_from(self.switches_per_hour).unwrap_or(usize::MAX),
            reserve_hosts: self.reserve_hosts,
        })
    }

    /// What asks management controllers.
    pub fn redfish(&self) -> Arc<Redfish> {
        // systemd's directory of credentials, where it has one for this unit.
        let given = || std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
        let directory = self.credentials_dir.clone().or_else(given);
        Arc::new(Redfish {
            credentials: directory.unwrap_or_else(|| CREDENTIALS_DIR.into()),
            ca: self.ca.clone(),
        })
    }

    fn check(&self) -> Result<(), Error> {
        within("power.reserve_hosts", self.reserve_hosts, &RESERVE_HOSTS)?;
        for (key, value) in [
            ("power.settle_minutes", self.settle_minutes),
            ("power.min_on_minutes", self.min_on_minutes),
            ("power.min_off_minutes", self.min_off_minutes),
            ("power.off_limit_minutes", self.off_limit_minutes),
            ("power.on_limit_minutes", self.on_limit_minutes),
        ] {
            within(key, value, &POWER_MINUTES)?;
        }
        within(
            "power.switches_per_hour",
            self.switches_per_hour,
            &SWITCHES_PER_HOUR,
        )?;
        absolute("power.credentials_dir", self.credentials_dir.as_ref())?;
        absolute("power.ca", self.ca.as_ref())
    }
}

/// As `UpdateHost` takes it.
const MOST_OVERCOMMIT: f64 = 64.0;
const RESERVE_HOSTS: RangeInclusive<u32> = 0..=10_000;
const POWER_MINUTES: RangeInclusive<u32> = 1..=10_080;
/// To switch off takes two.
const SWITCHES_PER_HOUR: RangeInclusive<u32> = 2..=10_000;
const MOVES_PER_HOUR: RangeInclusive<u32> = 1..=1_000;
const REPORT_INTERVAL_MS: RangeInclusive<u32> = 500..=60_000;
const UNREACHABLE_AFTER_INTERVALS: RangeInclusive<u32> = 2..=100;
const POOL_PERCENT: RangeInclusive<u32> = 1..=100;
const EVENT_RETENTION: RangeInclusive<u32> = 1_000..=1_000_000;
/// A week at least: for so long the API promises to keep them.
const OPERATION_RETENTION_HOURS: RangeInclusive<u32> = 168..=8_760;
const VOLUME_GRACE_HOURS: RangeInclusive<u32> = 0..=8_760;
const VOLUME_GRACE_MINUTES: RangeInclusive<u32> = 0..=525_600;
/// A week.
const USUAL_VOLUME_GRACE_HOURS: u32 = 168;

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: "/var/lib/dalgu/controller".into(),
            tls_dir: None,
            listen: SocketAddr::from(([0, 0, 0, 0], 7443)),
            unix_socket: None,
            report_interval_ms: 3_000,
            unreachable_after_intervals: 3,
            event_retention: 20_000,
            operation_retention_hours: 168,
            volume_grace_minutes: None,
            volume_grace_hours: None,
            store_reserve_mib: 0,
            pool_warn_percent: 80,
            pool_full_percent: 95,
            pool_overcommit_ratio: Ratio(100),
            placement: Placement::default(),
            rebalance: Moves::at_most(RELIEVED_PER_HOUR),
            consolidate: Moves::at_most(EMPTIED_PER_HOUR),
            power: Power::default(),
            limits: Limits::default(),
        }
    }
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text)
    }

    /// VMs that are moved in an hour without an operator: away from contended hosts, and off hosts that are emptied.
    pub fn moves_an_hour(&self) -> (usize, usize) {
        (
            self.rebalance.an_hour(RELIEVED_PER_HOUR),
            self.consolidate.an_hour(EMPTIED_PER_HOUR),
        )
    }

    /// Reads and checks the text of a file.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let config: Self = toml::from_str(text)?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), Error> {
        within("report_interval_ms", self.report_interval_ms, &REPORT_INTERVAL_MS)?;
        within(
            "unreachable_after_intervals",
            self.unreachable_after_intervals,
            &UNREACHABLE_AFTER_INTERVALS,
        )?;
        within("event_retention", self.event_retention, &EVENT_RETENTION)?;
        within(
            "operation_retention_hours",
            self.operation_retention_hours,
            &OPERATION_RETENTION_HOURS,
        )?;
        self.check_volume_grace()?;
        for (key, moves) in [
            ("rebalance.moves_per_hour", self.rebalance),
            ("consolidate.moves_per_hour", self.consolidate),
        ] {
            let most = moves.moves_per_hour;
            most.map_or(Ok(()), |most| within(key, most, &MOVES_PER_HOUR))?;
        }
        self.power.check()?;
        self.placement.cpu_overcommit.check()?;
        within("pool_full_percent", self.pool_full_percent, &POOL_PERCENT)?;
        let below_full = 1..=self.pool_full_percent;
        within("pool_warn_percent", self.pool_warn_percent, &below_full)?;
        absolute("data_dir", Some(&self.data_dir))?;
        absolute("tls_dir", self.tls_dir.as_ref())?;
        absolute("unix_socket", self.unix_socket.as_ref())
    }

    fn check_volume_grace(&self) -> Result<(), Error> {
        match (self.volume_grace_minutes, self.volume_grace_hours) {
            (Some(minutes), None) => within("volume_grace_minutes", minutes, &VOLUME_GRACE_MINUTES),
            (None, Some(hours)) => within("volume_grace_hours", hours, &VOLUME_GRACE_HOURS),
            (None, None) => Ok(()),
            (Some(minutes), Some(_)) => Err(Error::Value {
                key: "volume_grace_minutes",
                value: minutes.to_string(),
                allowed: "left out where volume_grace_hours is given".to_owned(),
            }),
        }
    }

    /// How often agents report.
    pub fn report_interval(&self) -> Duration {
        Duration::from_millis(self.report_interval_ms.into())
    }

    /// How long a host may be silent before it counts as unreachable.
    pub fn unreachable_after(&self) -> Duration {
        self.report_interval() * self.unreachable_after_intervals
    }

    /// How long ended operations are kept.
    pub fn operation_retention(&self) -> Duration {
        Duration::from_secs(u64::from(self.operation_retention_hours) * 3600)
    }

    /// How long a deleted volume can be had back.
    pub fn volume_grace(&self) -> Duration {
        let hours = || u64::from(self.volume_grace_hours.unwrap_or(USUAL_VOLUME_GRACE_HOURS));
        let minutes = self.volume_grace_minutes.map_or_else(|| hours() * 60, u64::from);
        Duration::from_secs(minutes * 60)
    }

    /// How far pools are filled.
    pub fn pool_policy(&self) -> PoolPolicy {
        PoolPolicy {
            warn_percent: self.pool_warn_percent.into(),
            full_percent: self.pool_full_percent.into(),
            overcommit_percent: self.pool_overcommit_ratio.0.into(),
        }
    }

    /// Where the controller's identity is.
    pub fn tls_dir(&self) -> &Path {
        self.tls_dir.as_deref().unwrap_or(&self.data_dir)
    }
}

fn within(key: &'static str, value: u32, range: &RangeInclusive<u32>) -> Result<(), Error> {
    if range.contains(&value) {
        return Ok(());
    }
    let allowed = format!("{} to {}", range.start(), range.end());
    Err(Error::Value {
        key,
        value: value.to_string(),
        allowed,
    })
}

fn absolute(key: &'static str, path: Option<&PathBuf>) -> Result<(), Error> {
    match path {
        // A relative path would mean another place under each service manager and shell.
        Some(path) if !path.is_absolute() => Err(Error::Value {
            key,
            value: format!("{:?}", path.display()),
            allowed: "an absolute path".to_owned(),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::Term;

    fn refusal(text: &str) -> String {
        let error = Config::parse(text).unwrap_err();
        match std::error::Error::source(&error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        }
    }

    #[test]
    fn an_empty_file_means_the_defaults() {
        assert_eq!(Config::parse("").unwrap(), Config::default());
        assert_eq!(Config::default().unreachable_after(), Duration::from_secs(9));
        assert_eq!(
            Config::default().tls_dir(),
            Path::new("/var/lib/dalgu/controller")
        );
        assert!(Config::default().check().is_ok());
    }

    #[test]
    fn the_sample_file_is_valid_and_shows_every_key_with_its_default() {
        let sample = include_str!("../../systemd/controller.toml");
        let shown = Config::parse(sample).unwrap();
        let with_socket = Some(PathBuf::from("/run/dalgu-controller/controller.sock"));
        assert_eq!(
            shown,
            Config {
                unix_socket: with_socket.clone(),
                ..Config::default()
            }
        );
        // Comments of the form "#key = value" are examples of keys; with them in force the file still parses.
        let uncommented: String = sample
            .lines()
            .map(|line| {
                line.strip_prefix('#')
                    .filter(|rest| rest.contains(" = ") && !rest.starts_with(' '))
                    .unwrap_or(line)
            })
            .fold(String::new(), |text, line| text + line + "\n");
        let tls_dir = Some(PathBuf::from("/etc/dalgu/tls"));
        assert_eq!(
            Config::parse(&uncommented).unwrap(),
            Config {
                unix_socket: with_socket,
                tls_dir,
                volume_grace_minutes: Some(10_080),
                power: Power {
                    credentials_dir: Some(CREDENTIALS_DIR.into()),
                    ca: Some("/etc/dalgu/bmc-ca.pem".into()),
                    ..Power::default()
                },
                ..Config::default()
            }
        );
    }

    #[test]
    fn every_key_is_read() {
        let text = "data_dir = '/d'\ntls_dir = '/t'\nlisten = '127.0.0.1:0'\nunix_socket = '/s'\nreport_interval_ms = 500\n\
            unreachable_after_intervals = 2\nevent_retention = 1000\noperation_retention_hours = 480\nvolume_grace_minutes = 90\nstore_reserve_mib = 9\n\
             pool_warn_percent = 60\npool_full_percent = 90\npool_overcommit_ratio = 1.29\n[placement]\npolicy = 'pack'\norder = ['reserved', 'pressure']\ncpu_overcommit = { least = 1.5, most = 6 }\nclose_pressed_hosts = false\nmax_vms_per_host = 40\n\
             protect = ['host', 'rack', 'room=m1']\n\
             [rebalance]\nautomatic = true\nmoves_per_hour = 7\n[consolidate]\nautomatic = true\nmoves_per_hour = 9\n[power]\nautomatic = true\nreserve_hosts = 2\nsettle_minutes = 1\n\
             min_on_minutes = 2\nmin_off_minutes = 3\nswitches_per_hour = 4\noff_limit_minutes = 5\non_limit_minutes = 6\n\
             credentials_dir = '/b'\nca = '/c'\n";
        let expected = Config {
            data_dir: "/d".into(),
            tls_dir: Some("/t".into()),
            listen: "127.0.0.1:0".parse().unwrap(),
            unix_socket: Some("/s".into()),
            report_interval_ms: 500,
            unreachable_after_intervals: 2,
            event_retention: 1000,
            operation_retention_hours: 480,
            volume_grace_minutes: Some(90),
            volume_grace_hours: None,
            store_reserve_mib: 9,
            pool_warn_percent: 60,
            pool_full_percent: 90,
            pool_overcommit_ratio: Ratio(129),
            placement: Placement {
                policy: Named::Pack,
                order: Some(Order::try_from(vec![Term::Reserved, Term::Pressure]).unwrap()),
                cpu_overcommit: CpuOvercommit {
                    least: Ratio(150),
                    most: Ratio(600),
                },
                close_pressed_hosts: false,
                protect: vec!["host".to_owned(), "rack".to_owned(), "room=m1".to_owned()]
                    .try_into()
                    .unwrap(),
                max_vms_per_host: NonZeroU32::new(40),
            },
            rebalance: Moves {
                automatic: true,
                moves_per_hour: Some(7),
            },
            consolidate: Moves {
                automatic: true,
                moves_per_hour: Some(9),
            },
            power: Power {
                automatic: true,
                reserve_hosts: 2,
                settle_minutes: 1,
                min_on_minutes: 2,
                min_off_minutes: 3,
                switches_per_hour: 4,
                off_limit_minutes: 5,
                on_limit_minutes: 6,
                credentials_dir: Some("/b".into()),
                ca: Some("/c".into()),
            },
            limits: Limits::default(),
        };
        assert_eq!(Config::parse(text).unwrap(), expected);
    }

    #[test]
    fn an_order_replaces_that_of_the_policy_and_leaves_what_it_judges_room_by() {
        let policy = |text: &str| Config::parse(text).unwrap().placement.policy();
        assert_eq!(policy(""), Policy::SPREAD);
        assert_eq!(policy("[placement]\npolicy = 'balanced'"), Policy::BALANCED);
        let order = "order = ['against_preferences', 'no_telemetry', 'pressure', 'network', 'reserved', 'cpu_busy_percent', 'network_busy_percent', 'images_missing']";
        for (name, expected) in [
            ("spread", Policy::SPREAD),
            ("pack", Policy::PACK),
            ("balanced", Policy::PACK),
        ] {
            assert_eq!(
                policy(&format!("[placement]\npolicy = '{name}'\n{order}")),
                expected,
                "{name}"
            );
        }
    }

    #[test]
    fn a_deleted_volume_is_kept_for_a_week_or_for_the_minutes_or_hours_that_are_said() {
        for (text, minutes) in [
            ("", 7 * 24 * 60),
            ("volume_grace_hours = 168", 7 * 24 * 60),
            ("volume_grace_hours = 0", 0),
            ("volume_grace_hours = 8760", 525_600),
            ("volume_grace_minutes = 0", 0),
            ("volume_grace_minutes = 90", 90),
            ("volume_grace_minutes = 525600", 525_600),
        ] {
            let config = Config::parse(text).unwrap();
            assert_eq!(config.volume_grace(), Duration::from_secs(minutes * 60), "{text}");
        }
    }

    #[test]
    fn a_refusal_names_the_key_and_what_is_allowed() {
        let table = [
            (
                "report_interval_ms = 499",
                "report_interval_ms = 499: must be 500 to 60000",
            ),
            (
                "report_interval_ms = 60001",
                "report_interval_ms = 60001: must be 500 to 60000",
            ),
            ("unreachable_after_intervals = 1", "must be 2 to 100"),
            (
                "event_retention = 0",
                "event_retention = 0: must be 1000 to 1000000",
            ),
            ("operation_retention_hours = 167", "must be 168 to 8760"),
            ("volume_grace_hours = 8761", "must be 0 to 8760"),
            (
                "volume_grace_minutes = 525601",
                "volume_grace_minutes = 525601: must be 0 to 525600",
            ),
            (
                "volume_grace_hours = 1\nvolume_grace_minutes = 90",
                "volume_grace_minutes = 90: must be left out where volume_grace_hours is given",
            ),
            ("pool_full_percent = 101", "must be 1 to 100"),
            ("pool_warn_percent = 96", "must be 1 to 95"),
            (
                "[placement]\ncpu_overcommit = { least = 4.0, most = 3.0 }",
                "placement.cpu_overcommit.most = 3: must be 4, the least, to 64",
            ),
            ("pool_overcommit_ratio = 0.5", "must be 1.0 to 100.0"),
            (
                "[rebalance]\nmoves_per_hour = 0",
                "rebalance.moves_per_hour = 0: must be 1 to 1000",
            ),
            (
                "[consolidate]\nmoves_per_hour = 1001",
                "consolidate.moves_per_hour = 1001: must be 1 to 1000",
            ),
            (
                "[power]\nswitches_per_hour = 1",
                "power.switches_per_hour = 1: must be 2 to 10000",
            ),
            (
                "[power]\nsettle_minutes = 0",
                "power.settle_minutes = 0: must be 1 to 10080",
            ),
            ("[power]\nca = 'ca.pem'", "must be an absolute path"),
            (
                "data_dir = 'dalgu'",
                "data_dir = \"dalgu\": must be an absolute path",
            ),
            ("unix_socket = 's'", "\"s\": must be an absolute path"),
            (
                "report_interval = 1",
                "unknown field `report_interval`, expected one of `data_dir`",
            ),
            (
                "[placement]\npolicy = 'best'",
                "unknown variant `best`, expected one of `spread`, `pack`, `balanced`",
            ),
            (
                "[placement]\nspread = true",
                "unknown field `spread`, expected one of `policy`, `order`, `cpu_overcommit`",
            ),
            (
                "[placement]\norder = ['speed']",
                "unknown variant `speed`, expected one of `against_preferences`, `no_telemetry`, `pressure`",
            ),
            (
                "[placement]\norder = ['pressure', 'reserved', 'pressure']",
                "pressure is there twice: name each part once, of against_preferences, no_telemetry, pressure, network, \
                 reserved_step, reserved, cpu_busy_percent, network_busy_percent, images_missing",
            ),
            (
                "[placement]\norder = ['pressure']",
                "reserved is missing: it tells hosts of the same load apart; name it last if it is to count for little. The parts are \
                 against_preferences, no_telemetry,",
            ),
            (
                "[placement]\norder = ['reserved', 'images_missing', 'cpu_busy_percent']",
                "images_missing is not the last",
            ),
            ("[placement]\norder = []", "reserved is missing"),
            (
                "[placement]\norder = ['reserved', 'against_preferences']",
                "against_preferences comes after reserved, where it would decide only between hosts with the same room",
            ),
            (
                "[placement]\nprotect = ['rack=']",
                "\"rack=\": must be \"host\", the key of a label of hosts",
            ),
            ("listen = 'here'", "listen = 'here'"),
            ("report_interval_ms = -1", "report_interval_ms = -1"),
        ];
        for (text, expected) in table {
            let refused = refusal(text);
            assert!(refused.contains(expected), "{text}: {refused}");
        }
    }
}
