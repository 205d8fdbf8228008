//! The controller as a process of its own: the real program on a store on disk, killed and started again.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::Context as _;
use dalgu_controller::pki;
use dalgu_proto::ids::ClusterId;
use dalgu_proto::tls::Identity;
use tokio::process::{Child, Command};
use tokio::time::{Duration, Instant, sleep};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::Settings;
use crate::bench::process;
use crate::operator::Operator;

/// A controller that does not serve after this time never will.
const LIMIT: Duration = Duration::from_secs(120);
/// Time between two attempts to reach one that starts.
const AGAIN: Duration = Duration::from_millis(10);

/// See the module. Killed when it is dropped.
pub struct Controller {
    program: PathBuf,
    arguments: Vec<String>,
    dir: PathBuf,
    /// Where it listens.
    pub address: SocketAddr,
    /// The site.
    pub cluster: ClusterId,
    admin: Identity,
    child: Option<Child>,
}

impl Controller {
    /// Makes a site in an empty directory; nothing runs yet.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn new(settings: &Settings, address: SocketAddr) -> anyhow::Result<Self> {
        let dir = settings.dir.clone();
        let data = dir.join("data");
        let cluster = pki::init(&data, "scale", &["127.0.0.1".to_owned()])?;
        let config = format!(
            "data_dir = {data:?}\nlisten = \"{address}\"\nreport_interval_ms = {}\n",
            settings.report_interval.as_millis()
        );
        fs::write(dir.join("controller.toml"), config)?;
        Ok(Self {
            program: settings.program.clone(),
            arguments: settings.arguments.clone(),
            admin: Identity::load_dir(&data, "admin")?,
            dir,
            address,
            cluster,
            child: None,
        })
    }

    /// Where its keys and its store are.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// Size of the store's files, in MiB.
    ///
    /// # Errors
    /// If they are not there.
    pub fn store_mib(&self) -> anyhow::Result<f64> {
        let size = |name: &str| fs::metadata(self.data().join(name)).map_or(0, |file| file.len());
        let kib = (size("dalgu.db") + size("dalgu.db-wal")) >> 10;
        Ok(f64::from(u32::try_from(kib)?) / 1024.0)
    }

    /// Starts the program; it need not serve yet when this returns.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(&mut self) -> anyhow::Result<()> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("controller.log"))?;
        let child = Command::new(&self.program)
            .args(&self.arguments)
            .arg(self.dir.join("controller.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {}", self.program.display()))?;
        self.child = Some(child);
        Ok(())
    }

    /// Kills the program with SIGKILL, and returns when it has gone.
    ///
    /// # Errors
    /// If it does not run.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        let mut child = self.child.take().context("the controller does not run")?;
        child.kill().await.context("kill the controller")
    }

    /// Waits until it says of itself that it serves; gives an operator's connection.
    ///
    /// # Errors
    /// If it does not within two minutes.
    pub async fn serving(&mut self) -> anyhow::Result<Operator> {
        let began = Instant::now();
        loop {
            match self.ask().await {
                Ok(operator) => return Ok(operator),
                Err(error) if began.elapsed() > LIMIT => {
                    return Err(error.context("the controller does not serve"));
                }
                Err(_) => sleep(AGAIN).await,
            }
        }
    }

    async fn ask(&self) -> anyhow::Result<Operator> {
        let operator = self.operator().await?;
        HealthClient::new(operator.channel())
            .check(HealthCheckRequest::default())
            .await?;
        Ok(operator)
    }

    /// A new connection of the first operator.
    ///
    /// # Errors
    /// If the controller does not take it.
    pub async fn operator(&self) -> anyhow::Result<Operator> {
        Operator::dial(self.address, &self.admin).await
    }

    /// A new connection of another operator.
    ///
    /// # Errors
    /// If it has no identity, or the controller does not take it.
    pub async fn operator_named(&self, name: &str) -> anyhow::Result<Operator> {
        Operator::dial(self.address, &self.identity(name)?).await
    }

    /// An operator's certificate, made when it is asked for first.
    ///
    /// # Errors
    /// If it cannot be made or read.
    pub fn identity(&self, name: &str) -> anyhow::Result<Identity> {
        let dir = self.dir.join(name);
        if !dir.is_dir() {
            pki::issue_operator(&self.data(), name, &dir)?;
        }
        Ok(Identity::load_dir(&dir, name)?)
    }

    fn pid(&self) -> anyhow::Result<u32> {
        let running = self.child.as_ref().and_then(Child::id);
        running.context("the controller does not run")
    }

    /// Its resident memory, in MiB.
    ///
    /// # Errors
    /// If it does not run.
    pub fn memory_mib(&self) -> anyhow::Result<f64> {
        process::mib(self.pid()?, "VmRSS:")
    }

    /// Its processor time so far, in seconds.
    ///
    /// # Errors
    /// If it does not run.
    pub fn cpu_seconds(&self) -> anyhow::Result<f64> {
        process::cpu_seconds(self.pid()?)
    }

    /// Its log so far.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.dir.join("controller.log")
    }
}

/// The program of that name beside the one that runs, where cargo puts both.
///
/// # Errors
/// If it was not built.
pub fn beside(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("find the running program")?;
    let mut dir = own.parent().context("the program has no directory")?;
    if dir.ends_with("deps") {
        dir = dir.parent().unwrap_or_else(|| Path::new("/"));
    }
    let program = dir.join(name);
    anyhow::ensure!(program.is_file(), "{} is not built", program.display());
    Ok(program)
}
