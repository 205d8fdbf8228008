//! The agent's configuration file. Read once at start by `main`; every key is explained in `systemd/agent.toml`.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use dalgu_proto::ids::{HostName, check_device_name};
use serde::Deserialize;

use uuid::Uuid;

use crate::host::{pci, storage::PoolConfig};

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// The file is not understood.
    #[error("the configuration {path} is not understood")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value is not allowed.
    #[error("the configuration {path}: {key} {problem}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is wrong, and what would be right.
        problem: String,
    },
}

/// Which hypervisor the agent drives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hypervisor {
    /// Real guests.
    Libvirt,
    /// Simulated guests, for demonstrations and large fleets.
    Sim,
}

/// How guests are to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// KVM where it is proven to run a guest, emulation otherwise.
    #[default]
    Auto,
    /// KVM.
    Kvm,
    /// Emulation.
    Tcg,
}

/// A storage pool.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    /// Name, the same on each host that has it.
    pub name: String,
    /// What it is.
    #[serde(default, rename = "type")]
    pub kind: PoolType,
    /// Directory; for `dir` and `nfs`.
    #[serde(default)]
    pub path: PathBuf,
    /// Whether every host sees the same files there; for `dir`.
    #[serde(default)]
    pub shared: bool,
    /// LVM's volume group; for `lvm-thin`.
    pub volume_group: Option<String>,
    /// The thin pool in it; for `lvm-thin`.
    pub thin_pool: Option<String>,
    /// Ceph's monitors, each HOST or HOST:PORT; for `rbd`.
    #[serde(default)]
    pub monitors: Vec<String>,
    /// Ceph's pool; for `rbd`.
    pub rbd_pool: Option<String>,
    /// Ceph's user; for `rbd`.
    pub user: Option<String>,
    /// UUID of libvirt's secret with that user's key; for `rbd`.
    pub secret_uuid: Option<Uuid>,
}

/// What a storage pool is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PoolType {
    /// A directory.
    #[default]
    Dir,
    /// A directory on which a network file system must be mounted.
    Nfs,
    /// A thin pool of LVM's.
    LvmThin,
    /// A pool of Ceph's.
    Rbd,
}

impl PoolType {
    /// Whether disks there are files in a directory.
    pub const fn is_directory(self) -> bool {
        matches!(self, Self::Dir | Self::Nfs)
    }
}

impl Pool {
    /// Whether every host sees the same disks there.
    pub const fn is_shared(&self) -> bool {
        self.shared || matches!(self.kind, PoolType::Nfs | PoolType::Rbd)
    }

    /// What is wrong with it.
    fn check(&self) -> Result<(), String> {
        let (name, kind) = (&self.name, self.kind);
        let word = match kind {
            PoolType::Dir => "dir",
            PoolType::Nfs => "nfs",
            PoolType::LvmThin => "lvm-thin",
            PoolType::Rbd => "rbd",
        };
        let fields = [
            ("path", self.path != Path::new(""), kind.is_directory()),
            (
                "volume_group",
                self.volume_group.is_some(),
                kind == PoolType::LvmThin,
            ),
            ("thin_pool", self.thin_pool.is_some(), kind == PoolType::LvmThin),
            ("monitors", !self.monitors.is_empty(), kind == PoolType::Rbd),
            ("rbd_pool", self.rbd_pool.is_some(), kind == PoolType::Rbd),
            ("user", self.user.is_some(), kind == PoolType::Rbd),
            ("secret_uuid", self.secret_uuid.is_some(), kind == PoolType::Rbd),
        ];
        for (field, given, wanted) in fields {
            match (given, wanted) {
                (true, false) => return Err(format!("{name}: {field} is not for pools of type {word}")),
                (false, true) => return Err(format!("{name}: a pool of type {word} needs {field}")),
                _ => {}
            }
        }
        if kind.is_directory() && !self.path.is_absolute() {
            return Err(format!("{name}: path must be absolute"));
        }
        if self.shared && kind != PoolType::Dir {
            return Err(format!(
                "{name}: shared is for pools of type dir; one of type {word} says it by itself"
            ));
        }
        let words = [&self.volume_group, &self.thin_pool, &self.rbd_pool, &self.user];
        let plain = |text: &String| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || "._-+".contains(c);
            !text.is_empty() && !text.starts_with('-') && text.chars().all(allowed)
        };
        if let Some(bad) = words.into_iter().flatten().find(|text| !plain(text)) {
            return Err(format!(
                "{name}: {bad:?} is no name: letters, digits, '.', '_', '-' and '+' are"
            ));
        }
        match self
            .monitors
            .iter()
            .find(|monitor| split_monitor(monitor).is_none())
        {
            Some(bad) => Err(format!("{name}: {bad:?} is no monitor: write HOST or HOST:PORT")),
            None => Ok(()),
        }
    }
}

/// A monitor's host and port, if it is well written. An IPv6 address stands in brackets where a port follows.
pub fn split_monitor(monitor: &str) -> Option<(&str, Option<u16>)> {
    let (host, port) = match monitor.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']')?;
            let port = rest.strip_prefix(':').map(str::parse).transpose().ok()?;
            (host, port.filter(|_| !rest.is_empty()))
        }
        None if monitor.matches(':').count() == 1 => {
            let (host, port) = monitor.split_once(':')?;
            (host, Some(port.parse().ok()?))
        }
        None => (monitor, None),
    };
    let allowed = |c: char| c.is_ascii_alphanumeric() || ".-:".contains(c);
    (!host.is_empty() && host.chars().all(allowed)).then_some((host, port))
}

/// Everything that can be configured.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of this host; the one in its certificate.
    pub host: HostName,
    /// Address and port to listen at.
    pub listen: SocketAddr,
    /// Where controller and peers reach this agent, if not at `listen`.
    pub advertise: Option<String>,
    /// IP address at which other hosts' overlays reach this one; by default that of `advertise` or `listen`.
    pub overlay_address: Option<IpAddr>,
    /// The controller's endpoint, `https://HOST:PORT`.
    pub controller: String,
    /// Directory of the ledger.
    #[serde(default = "default_data_dir")]
    pub data_dir: PathBuf,
    /// Directory for sockets; the same path on every host of the site.
    #[serde(default = "default_run_dir")]
    pub run_dir: PathBuf,
    /// Directory with ca.pem, agent.pem and agent.key.
    #[serde(default = "default_tls_dir")]
    pub tls_dir: PathBuf,
    /// Directory with images and kernels.
    #[serde(default = "default_images_dir")]
    pub images_dir: PathBuf,
    /// Directory that copies of the catalogue's images are kept in; the same path on every host of the site.
    #[serde(default = "default_image_store_dir")]
    pub image_store_dir: PathBuf,
    /// Directory for console logs.
    #[serde(default = "default_console_dir")]
    pub console_dir: PathBuf,
    /// Which hypervisor.
    #[serde(default = "default_hypervisor")]
    pub hypervisor: Hypervisor,
    /// libvirt's connection URI.
    #[serde(default = "default_libvirt_uri")]
    pub libvirt_uri: String,
    /// How guests run.
    #[serde(default)]
    pub accel: Accelerator,
    /// User that QEMU runs as, where it is not the agent's own.
    #[serde(default)]
    pub qemu_user: Option<String>,
    /// Time between two samples of usage, in ms.
    #[serde(default = "default_usage_interval")]
    pub usage_interval_ms: u64,
    /// Storage pools.
    #[serde(default)]
    pub pools: Vec<Pool>,
    /// PCI devices for VMs.
    #[serde(default)]
    pub pci: Vec<pci::Named>,
}

fn default_data_dir() -> PathBuf {
    "/var/lib/dalgu/agent".into()
}

fn default_run_dir() -> PathBuf {
    "/run/dalgu".into()
}

fn default_tls_dir() -> PathBuf {
    "/etc/dalgu/tls".into()
}

fn default_images_dir() -> PathBuf {
    "/var/lib/dalgu/images".into()
}

fn default_image_store_dir() -> PathBuf {
    "/var/lib/dalgu/image-store".into()
}

fn default_console_dir() -> PathBuf {
    "/var/log/dalgu/console".into()
}

const fn default_hypervisor() -> Hypervisor {
    Hypervisor::Libvirt
}

fn default_libvirt_uri() -> String {
    "qemu:///system".to_owned()
}

const fn default_usage_interval() -> u64 {
    2000
}

impl Config {
    /// Reads and checks a file.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// Reads and checks the text of the file at `path`.
    pub fn parse(text: &str, path: &Path) -> Result<Self, Error> {
        let config: Self = toml::from_str(text).map_err(|source| Error::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        config.check().map_err(|(key, problem)| Error::Value {
            path: path.to_owned(),
            key,
            problem,
        })?;
        Ok(config)
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        if !(500..=60_000).contains(&self.usage_interval_ms) {
            return Err((
                "usage_interval_ms",
                format!("must be 500 to 60000, is {}", self.usage_interval_ms),
            ));
        }
        if self.listen.ip().is_unspecified() && self.advertise.is_none() {
            let problem = format!(
                "must be given where listen is {}: others cannot reach that",
                self.listen.ip()
            );
            return Err(("advertise", problem));
        }
        if !self.controller.starts_with("https://") {
            return Err((
                "controller",
                format!("must be https://HOST:PORT, is {:?}", self.controller),
            ));
        }
        // A Unix socket's path has at most 107 bytes; ours adds "/migration/", a UUID and "/control.sock".
        if self.run_dir.as_os_str().len() > 107 - 60 {
            return Err((
                "run_dir",
                "is too long for the paths of sockets; use at most 47 characters".to_owned(),
            ));
        }
        // Disks name the images behind them by this path.
        if !self.image_store_dir.is_absolute() {
            return Err(("image_store_dir", "must be absolute".to_owned()));
        }
        pci::check(&self.pci).map_err(|problem| ("pci", problem))?;
        for (index, pool) in self.pools.iter().enumerate() {
            check_device_name(&pool.name).map_err(|error| ("pools", error.to_string()))?;
            if self.pools[..index].iter().any(|other| other.name == pool.name) {
                return Err(("pools", format!("has {:?} twice", pool.name)));
            }
            pool.check().map_err(|problem| ("pools", problem))?;
            let mut others = self.pools[..index].iter();
            let twin = others.find(|other| pool.kind.is_directory() && other.path == pool.path);
            if let Some(twin) = twin {
                let problem = format!(
                    "{} and {} have one path: each needs its own",
                    twin.name, pool.name
                );
                return Err(("pools", problem));
            }
        }
        Ok(())
    }

    /// Where controller and peers reach this agent.
    pub fn address(&self) -> String {
        self.advertise.clone().unwrap_or_else(|| self.listen.to_string())
    }

    /// IP address at which other hosts' overlays reach this one; `None` where only a name is known of it.
    pub fn overlay_address(&self) -> Option<IpAddr> {
        self.overlay_address.or_else(|| {
            let reached: SocketAddr = self.address().parse().ok()?;
            Some(reached.ip())
        })
    }

    /// Time between two samples of usage.
    pub const fn usage_interval(&self) -> Duration {
        Duration::from_millis(self.usage_interval_ms)
    }

    /// The pools, for sampling.
    pub fn pool_configs(&self) -> Vec<PoolConfig> {
        let pool = |pool: &Pool| PoolConfig {
            name: pool.name.clone(),
            path: match pool.kind {
                PoolType::Dir | PoolType::Nfs => pool.path.clone(),
                PoolType::LvmThin => [&pool.volume_group, &pool.thin_pool]
                    .into_iter()
                    .flatten()
                    .collect(),
                PoolType::Rbd => pool.rbd_pool.iter().collect(),
            },
            shared: pool.is_shared(),
            kind: pool.kind,
        };
        self.pools.iter().map(pool).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str =
        "host = \"h1\"\nlisten = \"10.0.0.1:7444\"\ncontroller = \"https://10.0.0.9:7443\"\n";

    fn read(text: &str) -> Result<Config, Error> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Config::read(file.path())
    }

    #[test]
    fn three_keys_are_enough() {
        let config = read(MINIMAL).unwrap();
        assert_eq!(config.address(), "10.0.0.1:7444");
        assert_eq!(config.run_dir, Path::new("/run/dalgu"));
    }

    #[test]
    fn the_sample_configuration_is_understood() {
        let sample = concat!(env!("CARGO_MANIFEST_DIR"), "/../systemd/agent.toml");
        let config = Config::read(Path::new(sample)).unwrap();
        assert!(!config.pools.is_empty());
    }

    #[test]
    fn an_address_that_nobody_can_reach_is_not_advertised() {
        let everywhere = MINIMAL.replace("10.0.0.1:7444", "0.0.0.0:7444");
        assert!(read(&everywhere).is_err());
        let config = read(&format!("{everywhere}advertise = \"h1.example:7444\"")).unwrap();
        assert_eq!(config.address(), "h1.example:7444");
    }

    #[test]
    fn overlays_reach_a_host_where_its_agent_is_reached_unless_it_is_said() {
        assert_eq!(
            read(MINIMAL).unwrap().overlay_address(),
            Some([10, 0, 0, 1].into())
        );
        let apart = read(&format!("{MINIMAL}overlay_address = \"10.1.0.1\"")).unwrap();
        assert_eq!(apart.overlay_address(), Some([10, 1, 0, 1].into()));
        let named = read(&format!("{MINIMAL}advertise = \"h1.example:7444\"")).unwrap();
        assert_eq!(named.overlay_address(), None);
    }

    #[test]
    fn each_type_of_pool_says_what_it_needs() {
        let config = read(&format!(
            "{MINIMAL}[[pools]]\nname = \"local\"\npath = \"/a\"\n\
             [[pools]]\nname = \"nfs\"\ntype = \"nfs\"\npath = \"/b\"\n\
             [[pools]]\nname = \"thin\"\ntype = \"lvm-thin\"\nvolume_group = \"vg0\"\nthin_pool = \"thin\"\n\
             [[pools]]\nname = \"ceph\"\ntype = \"rbd\"\nmonitors = [\"10.0.0.1:6789\", \"mon2\"]\nrbd_pool = \"vms\"\n\
             user = \"dalgu\"\nsecret_uuid = \"6e0ac8a3-8e0c-4f56-a4e5-3b9d3f0b6a11\"\n"
        ))
        .unwrap();
        let shown = config.pool_configs();
        let shown = shown
            .iter()
            .map(|pool| (&*pool.name, pool.path.to_str().unwrap(), pool.shared));
        assert_eq!(
            shown.collect::<Vec<_>>(),
            [
                ("local", "/a", false),
                ("nfs", "/b", true),
                ("thin", "vg0/thin", false),
                ("ceph", "vms", true)
            ]
        );
    }

    #[test]
    fn pci_devices_are_named_by_class_or_the_agent_does_not_start() {
        let named = |text: &str| read(&format!("{MINIMAL}{text}"));
        let config = named(
            "[[pci]]\nclass = \"gpu\"\nmatch = \"10de:20b0\"\n[[pci]]\nclass = \"nic\"\nmatch = \"0000:86:00.1\"\n",
        );
        let classes: Vec<_> = config.unwrap().pci.into_iter().map(|named| named.class).collect();
        assert_eq!(classes, ["gpu", "nic"]);
        for (text, part) in [
            ("class = \"gpu\"\nmatch = \"the big one\"", "lspci -D"),
            ("class = \"a gpu\"\nmatch = \"10de:20b0\"", "1 to 15 characters"),
            ("class = \"gpu\"", "match"),
        ] {
            let error = named(&format!("[[pci]]\n{text}\n")).unwrap_err();
            let error = format!("{error} {:?}", std::error::Error::source(&error));
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn monitors_are_hosts_with_or_without_ports() {
        for (text, expected) in [
            ("mon1", Some(("mon1", None))),
            ("10.0.0.1:6789", Some(("10.0.0.1", Some(6789)))),
            ("[fd00::1]:3300", Some(("fd00::1", Some(3300)))),
            ("[fd00::1]", Some(("fd00::1", None))),
            ("fd00::1", Some(("fd00::1", None))),
            ("", None),
            (":1", None),
            ("a b", None),
            ("a:x", None),
        ] {
            assert_eq!(split_monitor(text), expected, "{text}");
        }
    }

    #[test]
    fn a_mistake_is_named() {
        for (line, expected) in [
            ("usage_interval_ms = 1", "usage_interval_ms"),
            (
                "run_dir = \"/a-directory-name-that-is-much-too-long-for-a-socket\"",
                "run_dir",
            ),
            ("image_store_dir = \"images\"", "image_store_dir"),
            ("[[pools]]\nname = \"a/b\"\npath = \"/x\"", "pools"),
            ("[[pools]]\nname = \"a\"\npath = \"x\"", "absolute"),
            ("[[pools]]\nname = \"a\"", "needs path"),
            ("[[pools]]\nname = \"a\"\ntype = \"zfs\"", "zfs"),
            (
                "[[pools]]\nname = \"a\"\ntype = \"nfs\"\npath = \"/x\"\nshared = true",
                "by itself",
            ),
            (
                "[[pools]]\nname = \"a\"\npath = \"/x\"\nuser = \"u\"",
                "user is not for",
            ),
            (
                "[[pools]]\nname = \"a\"\npath = \"/x\"\n[[pools]]\nname = \"b\"\npath = \"/x\"",
                "one path",
            ),
            (
                "[[pools]]\nname = \"a\"\ntype = \"lvm-thin\"\nvolume_group = \"vg0\"",
                "needs thin_pool",
            ),
            (
                "[[pools]]\nname = \"a\"\ntype = \"lvm-thin\"\nvolume_group = \"-vg\"\nthin_pool = \"t\"",
                "no name",
            ),
            (
                "[[pools]]\nname = \"a\"\ntype = \"rbd\"\nmonitors = [\"a:b\"]\nrbd_pool = \"p\"\nuser = \"u\"\n\
                 secret_uuid = \"6e0ac8a3-8e0c-4f56-a4e5-3b9d3f0b6a11\"",
                "no monitor",
            ),
            ("colour = \"red\"", "colour"),
        ] {
            let error = anyhow::Error::from(read(&format!("{MINIMAL}{line}")).expect_err(line));
            assert!(format!("{error:#}").contains(expected), "{line}: {error:#}");
        }
    }
}
