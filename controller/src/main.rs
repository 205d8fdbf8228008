//! `dalgu-controller`: arguments, logs and signals; everything else is in the library.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Context;
use clap::{Parser, Subcommand};
use dalgu_controller::{backup, config::Config, pki, server, simulator};
use dalgu_proto::{daemon, ids::HostName};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

/// Holds what every virtual machine of a site should be, and makes the agents carry it out.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Logs as JSON lines.
    #[arg(long, global = true)]
    log_json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Makes a site: its authority, the controller's identity, and the first operator's ("admin").
    Init {
        /// Where the controller keeps its data; must not hold a site yet.
        #[arg(long, default_value = "/var/lib/dalgu/controller")]
        data_dir: PathBuf,
        /// Name of the site, in every identity.
        #[arg(long, alias = "name", default_value = "site")]
        site: String,
        /// IP address or DNS name under which the controller is reached, with or without a port; may be given several
        /// times.
        #[arg(long = "address", alias = "listen")]
        addresses: Vec<String>,
    },
    /// Makes the identity of a host's agent: ca.pem, agent.pem, agent.key.
    IssueAgent {
        /// The site's data directory.
        #[arg(long, default_value = "/var/lib/dalgu/controller")]
        data_dir: PathBuf,
        /// IP address or DNS name under which the agent is reached, with or without a port; may be given several times.
        #[arg(long = "address")]
        addresses: Vec<String>,
        /// Directory to write to.
        #[arg(long)]
        out: PathBuf,
        /// Name of the host.
        #[arg(long)]
        host: HostName,
    },
    /// Makes the identity of an operator: ca.pem, NAME.pem, NAME.key.
    IssueOperator {
        /// The site's data directory.
        #[arg(long, default_value = "/var/lib/dalgu/controller")]
        data_dir: PathBuf,
        /// Directory to write to.
        #[arg(long)]
        out: PathBuf,
        /// Name of the operator.
        #[arg(long)]
        name: String,
    },
    /// Copies the store to a new file, while the controller runs. Keys and certificates are not in it.
    Backup {
        /// The site's data directory.
        #[arg(long, default_value = "/var/lib/dalgu/controller")]
        data_dir: PathBuf,
        /// File to write; must not be there yet.
        #[arg(long)]
        to: PathBuf,
    },
    /// Puts a backup in the place of the store; the controller must be stopped. It only observes afterwards, until `dalgu
    /// site resume`. The old store is kept aside.
    Restore {
        /// The site's data directory.
        #[arg(long, default_value = "/var/lib/dalgu/controller")]
        data_dir: PathBuf,
        /// The backup.
        #[arg(long)]
        from: PathBuf,
        /// Incarnation to begin at least. Only needed when a backup was restored before and that store is lost.
        #[arg(long)]
        incarnation: Option<u64>,
    },
    /// Replays a trace of VMs through placement, beside the rules of other programs, and shows what came of it. Touches no site.
    Simulate(Box<simulator::command::Arguments>),
    /// Serves.
    Run {
        /// Configuration file; see controller.toml for what can be set.
        #[arg(long, default_value = "/etc/dalgu/controller.toml")]
        config: PathBuf,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    daemon::init_logs(arguments.log_json);
    match execute(arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Init {
            data_dir,
            site,
            addresses,
        } => {
            let addresses = names(addresses);
            let cluster = pki::init(&data_dir, &site, &addresses)?;
            tracing::info!(%cluster, dir = %data_dir.display(), "the site is made; admin.pem and admin.key are the first operator's");
            tell_names(&addresses)?;
        }
        Command::IssueAgent {
            data_dir,
            addresses,
            out,
            host,
        } => {
            pki::issue_agent(&data_dir, &host, &names(addresses), &out)?;
            tracing::info!(%host, dir = %out.display(), "the agent's identity is made");
        }
        Command::IssueOperator { data_dir, out, name } => {
            pki::issue_operator(&data_dir, &name, &out)?;
            tracing::info!(name, dir = %out.display(), "the operator's identity is made");
        }
        Command::Backup { data_dir, to } => {
            let made = backup::backup(&data_dir, &to, Timestamp::now())?;
            tracing::info!(file = %to.display(), vms = made.vms, revision = made.revision, sha256 = made.sha256, "the backup is made");
        }
        Command::Restore {
            data_dir,
            from,
            incarnation,
        } => {
            let cluster = pki::cluster_id(&data_dir)?;
            let done = backup::restore(&data_dir, &from, cluster, incarnation, Timestamp::now())?;
            let kept = done.kept.map(|path| path.display().to_string());
            tracing::info!(
                vms = done.backup.vms,
                sha256 = done.backup.sha256,
                incarnation = done.meta.incarnation,
                kept,
                "the backup is restored; start the controller, then see `dalgu site show`"
            );
        }
        Command::Simulate(arguments) => print!("{}", simulator::command::run(&arguments)?),
        Command::Run { config } => {
            let config =
                Config::load(&config).with_context(|| format!("the configuration {}", config.display()))?;
            tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .build()?
                .block_on(run(config))?;
        }
    }
    Ok(())
}

/// Says under which names the controller can prove itself, as nothing else shows it until a caller is turned away.
fn tell_names(addresses: &[String]) -> anyhow::Result<()> {
    let valid_for = pki::controller_names(addresses)?.join(", ");
    tracing::info!(valid_for, "names and addresses in the controller's certificate");
    if addresses.is_empty() {
        tracing::info!(
            "no --address was given: dalgu and the agents need none; Prometheus (server_name) and grpcurl (-servername) \
             must be told to expect {}",
            dalgu_proto::tls::CONTROLLER_NAME
        );
    }
    Ok(())
}

/// What goes into a certificate of an address: no port, and nothing that stands for all addresses.
fn names(addresses: Vec<String>) -> Vec<String> {
    let name = |address: String| match address.parse::<SocketAddr>() {
        Ok(socket) => socket.ip().to_string(),
        Err(_) => match address.rsplit_once(':') {
            Some((name, port)) if !name.contains(':') && port.parse::<u16>().is_ok() => name.to_owned(),
            _ => address,
        },
    };
    let wildcard = |name: &String| name.parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified());
    addresses
        .into_iter()
        .map(name)
        .filter(|name| !wildcard(name))
        .collect()
}

async fn run(config: Config) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    tokio::spawn(daemon::stop_on_signal(stop.clone()));
    tokio::spawn(daemon::watchdog());
    let outcome = server::run_with(config, stop, |_| daemon::ready()).await;
    daemon::stopping();
    Ok(outcome?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_become_names_for_a_certificate() {
        let given = [
            "10.0.0.1:7443",
            "10.0.0.2",
            "[fd00::1]:7443",
            "fd00::2",
            "ctl.example:7443",
            "ctl",
            "0.0.0.0:7443",
        ];
        let found = names(given.map(str::to_owned).to_vec());
        assert_eq!(
            found,
            ["10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2", "ctl.example", "ctl"]
        );
    }

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }
}
