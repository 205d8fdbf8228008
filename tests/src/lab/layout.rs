//! Where everything of a lab lies: names, addresses and paths. Used by every other part of the lab.
//! Pure: nothing here touches the machine, except to read where it runs.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

/// At most this many hosts: their addresses share one /24, and a real libvirtd each takes memory.
pub const MAX_HOSTS: u8 = 20;

/// The directories of a host that are its own: bound over the machine's in its mount namespace.
pub const OWN_DIRS: [&str; 9] = [
    "/etc/libvirt",
    "/var/lib/libvirt",
    "/run/libvirt",
    "/var/log/libvirt",
    "/var/cache/libvirt",
    "/etc/dalgu",
    "/run/dalgu",
    "/var/lib/dalgu",
    "/var/log/dalgu",
];

/// What labs are on this machine, and which directories they made in its own file system.
pub const RECORDS: &str = "/run/dalgu-labs";

/// The one directory all hosts of a lab see, at the same path in each.
pub const SHARED_DIR: &str = "/var/lib/dalgu/shared";

/// Names, addresses and paths of one lab. Labs with different ids can run side by side.
#[derive(Debug, Clone)]
pub struct Layout {
    id: u8,
    dir: PathBuf,
    bin_dir: PathBuf,
    target_dir: PathBuf,
    repository: PathBuf,
}

impl Layout {
    /// The layout of lab `id` (0 to 9), run by the program that calls this.
    ///
    /// # Errors
    /// If the id is out of range, or the running program lies in no build directory.
    pub fn new(id: u8) -> anyhow::Result<Self> {
        if id > 9 {
            bail!("lab id {id}: must be 0 to 9");
        }
        let program = env::current_exe().context("find the running program")?;
        let mut bin_dir = program
            .parent()
            .context("the program has no directory")?
            .to_path_buf();
        if bin_dir.ends_with("deps") {
            bin_dir.pop();
        }
        let target_dir = bin_dir
            .parent()
            .context("the program is in no build directory")?
            .to_path_buf();
        let suffix = if id == 0 { String::new() } else { id.to_string() };
        let mut dir = target_dir.join(format!("lab-run{suffix}"));
        // Some Unix sockets lie below it, and the kernel allows 107 bytes for their path.
        if dir.as_os_str().len() > 50 {
            dir = PathBuf::from(format!("/tmp/dalgu-lab{suffix}"));
        }
        let repository = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let repository = repository.parent().context("tests/ has no parent")?.to_path_buf();
        Ok(Self {
            id,
            dir,
            bin_dir,
            target_dir,
            repository,
        })
    }

    /// The same layout with its state elsewhere.
    #[must_use]
    pub fn with_dir(mut self, dir: PathBuf) -> Self {
        self.dir = dir;
        self
    }

    /// Number of this lab, 0 to 9.
    #[must_use]
    pub fn id(&self) -> u8 {
        self.id
    }

    /// Everything this lab writes is below here.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the daemons' binaries are.
    #[must_use]
    pub fn bin_dir(&self) -> &Path {
        &self.bin_dir
    }

    /// What the set-up step fetched: grpcurl, the guest's kernel.
    #[must_use]
    pub fn tools_dir(&self) -> PathBuf {
        self.target_dir.join("tools")
    }

    /// The repository's root.
    #[must_use]
    pub fn repository(&self) -> &Path {
        &self.repository
    }

    /// Says which lab directory is in use for this id; outlives a crash of the lab tool.
    #[must_use]
    pub fn record(&self) -> PathBuf {
        PathBuf::from(RECORDS).join(format!("{}.dir", self.id))
    }

    /// Bridge that joins the hosts; its own end is the controller's.
    #[must_use]
    pub fn bridge(&self) -> String {
        format!("dalgubr{}", self.id)
    }

    /// Bridge that joins the hosts' guest bridges.
    #[must_use]
    pub fn guest_bridge(&self) -> String {
        format!("dalgunet{}", self.id)
    }

    /// First three bytes of the lab's network.
    #[must_use]
    pub fn network(&self) -> String {
        format!("10.{}.0", 77 + u16::from(self.id))
    }

    /// Where the controller listens.
    #[must_use]
    pub fn controller_address(&self) -> String {
        format!("{}.1:7443", self.network())
    }

    /// Host `number`, counted from 1.
    #[must_use]
    pub fn host(&self, number: u8) -> Host {
        let prefix = if self.id == 0 {
            "dalgu".to_owned()
        } else {
            format!("dalgu{}", self.id)
        };
        Host {
            number,
            name: format!("h{number}"),
            namespace: format!("{prefix}-h{number}"),
            veth: format!("{prefix}-v{number}"),
            guest_veth: format!("{prefix}-g{number}"),
            ip: format!("{}.{}", self.network(), 10 + u16::from(number)),
            dir: self.dir.join(format!("h{number}")),
        }
    }

    /// The controller's data directory, made by `dalgu-controller init`.
    #[must_use]
    pub fn controller_data(&self) -> PathBuf {
        self.dir.join("controller")
    }

    /// The operator's own certificate, readable by who brought the lab up.
    #[must_use]
    pub fn operator(&self) -> PathBuf {
        self.dir.join("operator")
    }

    /// The operator's configuration for `dalgu`.
    #[must_use]
    pub fn cli_config(&self) -> PathBuf {
        self.dir.join("cli.toml")
    }

    /// Wrapper scripts that `lab env` puts on the path.
    #[must_use]
    pub fn wrappers(&self) -> PathBuf {
        self.dir.join("bin")
    }

    /// One log file a process.
    #[must_use]
    pub fn log(&self, process: &str) -> PathBuf {
        self.dir.join("log").join(format!("{process}.log"))
    }

    /// Process id of a daemon, written by its reaper.
    #[must_use]
    pub fn pid_file(&self, process: &str) -> PathBuf {
        self.dir.join("pid").join(format!("{process}.pid"))
    }

    /// The folder all hosts see as [`SHARED_DIR`].
    #[must_use]
    pub fn shared(&self) -> PathBuf {
        self.dir.join("shared")
    }
}

/// Names and paths of one host of the lab.
#[derive(Debug, Clone)]
pub struct Host {
    /// Counted from 1.
    pub number: u8,
    /// Its host name, and its name in Dalgu: `h1`, `h2`, ...
    pub name: String,
    /// Its network namespace.
    pub namespace: String,
    /// The end of its cable that is on the bridge.
    pub veth: String,
    /// The outer end of its guests' cable.
    pub guest_veth: String,
    /// Its address on the lab's network.
    pub ip: String,
    /// Its state, in the machine's own file system.
    pub dir: PathBuf,
}

impl Host {
    /// Where the agent listens.
    #[must_use]
    pub fn agent_address(&self) -> String {
        format!("{}:7444", self.ip)
    }

    /// What lies at `path` (absolute, below one of [`OWN_DIRS`]) in the host, seen from outside.
    #[must_use]
    pub fn outside(&self, path: &str) -> PathBuf {
        self.dir.join("root").join(path.trim_start_matches('/'))
    }

    /// Name of the process that keeps the host's namespaces.
    #[must_use]
    pub fn anchor(&self) -> String {
        format!("{}-anchor", self.name)
    }

    /// Name of its libvirtd among the lab's processes.
    #[must_use]
    pub fn libvirtd(&self) -> String {
        format!("{}-libvirtd", self.name)
    }

    /// Name of its agent among the lab's processes.
    #[must_use]
    pub fn agent(&self) -> String {
        format!("{}-agent", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labs_with_different_ids_share_no_name_and_no_address() {
        let first = Layout::new(0).unwrap();
        let second = Layout::new(1).unwrap();
        assert_ne!(first.dir(), second.dir());
        assert_ne!(first.bridge(), second.bridge());
        assert_ne!(first.network(), second.network());
        assert_ne!(first.record(), second.record());
        assert_ne!(first.host(1).namespace, second.host(1).namespace);
        assert_ne!(first.host(1).veth, second.host(1).veth);
    }

    #[test]
    fn the_names_of_the_last_host_fit_the_kernel_limit_for_interfaces() {
        let host = Layout::new(9).unwrap().host(MAX_HOSTS);
        assert!(host.veth.len() <= 15, "{}", host.veth);
    }

    #[test]
    fn a_lab_id_past_nine_is_refused() {
        assert!(Layout::new(10).is_err());
    }
}
