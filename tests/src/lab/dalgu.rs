//! Dalgu in the lab: identities, configuration, the controller and the agents. Called when a lab goes up
//! and by tests that end and restart daemons.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::net::TcpStream;

use super::layout::{Host, Layout};
use super::process::{self, Place};
use super::run::{run, wait_for};

/// The controller's name among the lab's processes.
pub const CONTROLLER: &str = "controller";

/// How long a daemon may take until it listens.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Makes the certificate authority, the operator's identity and one for each agent, and writes all configuration.
///
/// # Errors
/// If a binary is not built, or fails.
pub async fn prepare(layout: &Layout, hosts: &[Host], report_interval_ms: u32) -> anyhow::Result<()> {
    let controller = program(layout, "dalgu-controller")?;
    program(layout, "dalgu-agent")?;
    let data = layout.controller_data().to_string_lossy().into_owned();
    let address = layout.controller_address();
    run(
        &controller,
        ["init", "--data-dir", &data, "--listen", &address, "--name", "lab"],
    )
    .await?;
    write(
        layout,
        "controller.toml",
        &format!(
            "data_dir = \"{data}\"\nlisten = \"{address}\"\nreport_interval_ms = {report_interval_ms}\n\
             # All hosts of a lab share the load of one machine, and its disk: how full that is besides is none of theirs.\n\
             placement.close_pressed_hosts = false\npool_warn_percent = 100\npool_full_percent = 100\n"
        ),
    )?;
    for host in hosts {
        let tls = host.outside("/etc/dalgu/tls");
        let tls = tls.to_string_lossy();
        run(
            &controller,
            [
                "issue-agent",
                "--data-dir",
                &data,
                "--host",
                &host.name,
                "--address",
                &host.agent_address(),
                "--out",
                &tls,
            ],
        )
        .await?;
        fs::write(host.outside("/etc/dalgu/agent.toml"), agent_toml(layout, host))
            .context("write agent.toml")?;
    }
    give_operator_identity(layout)?;
    write_cli_config(layout)
}

/// Copies the operator's identity out of the controller's directory. Under sudo it belongs to the caller, so that
/// `dalgu` and `grpcurl` need no root.
fn give_operator_identity(layout: &Layout) -> anyhow::Result<()> {
    let owner = |name: &str| std::env::var(name).ok().and_then(|id| id.parse().ok());
    let (user, group) = (owner("SUDO_UID"), owner("SUDO_GID"));
    let operator = layout.operator();
    fs::create_dir_all(&operator).context("make the operator's folder")?;
    for file in ["ca.pem", "admin.pem", "admin.key"] {
        let copy = operator.join(file);
        fs::copy(layout.controller_data().join(file), &copy).with_context(|| format!("copy {file}"))?;
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o600))
            .with_context(|| format!("protect {file}"))?;
        chown(&copy, user, group).with_context(|| format!("give {file} to its owner"))?;
    }
    Ok(())
}

fn agent_toml(layout: &Layout, host: &Host) -> String {
    format!(
        r#"host = "{name}"
listen = "{listen}"
controller = "https://{controller}"
data_dir = "/var/lib/dalgu/agent"
run_dir = "/run/dalgu"
tls_dir = "/etc/dalgu/tls"
images_dir = "/var/lib/dalgu/images"
hypervisor = "libvirt"
libvirt_uri = "qemu:///system"
accel = "tcg"

[[pools]]
name = "local"
path = "/var/lib/dalgu/local"
shared = false

[[pools]]
name = "fast"
path = "/var/lib/dalgu/fast"

[[pools]]
name = "shared"
path = "/var/lib/dalgu/shared"
shared = true
"#,
        name = host.name,
        listen = host.agent_address(),
        controller = layout.controller_address(),
    )
}

fn write_cli_config(layout: &Layout) -> anyhow::Result<()> {
    let operator = layout.operator();
    let operator = operator.display();
    let endpoint = layout.controller_address();
    write(
        layout,
        "cli.toml",
        &format!(
            "current_context = \"lab\"\n\n[contexts.lab]\nendpoint = \"https://{endpoint}\"\nca = \"{operator}/ca.pem\"\n\
         cert = \"{operator}/admin.pem\"\nkey = \"{operator}/admin.key\"\n"
        ),
    )
}

fn write(layout: &Layout, name: &str, text: &str) -> anyhow::Result<()> {
    fs::write(layout.dir().join(name), text).with_context(|| format!("write {name}"))
}

fn program(layout: &Layout, name: &str) -> anyhow::Result<String> {
    let path = layout.bin_dir().join(name);
    if !path.is_file() {
        bail!(
            "{} is not built: run `make lab`, or bring the lab up with --no-dalgu",
            path.display()
        );
    }
    Ok(path.to_string_lossy().into_owned())
}

/// Starts the controller and waits until it listens.
///
/// # Errors
/// If it does not come up.
pub async fn start_controller(layout: &Layout) -> anyhow::Result<()> {
    let config = layout
        .dir()
        .join("controller.toml")
        .to_string_lossy()
        .into_owned();
    let command = [
        program(layout, "dalgu-controller")?,
        "run".to_owned(),
        "--config".to_owned(),
        config,
    ];
    process::start(layout, Place::Machine, CONTROLLER, &command).await?;
    await_listening(layout, CONTROLLER, &layout.controller_address()).await
}

/// Starts a host's agent and waits until it listens.
///
/// # Errors
/// If it does not come up.
pub async fn start_agent(layout: &Layout, host: &Host) -> anyhow::Result<()> {
    let command = [
        program(layout, "dalgu-agent")?,
        "--config".to_owned(),
        "/etc/dalgu/agent.toml".to_owned(),
    ];
    process::start(layout, Place::Host(host), &host.agent(), &command).await?;
    await_listening(layout, &host.agent(), &host.agent_address()).await
}

async fn await_listening(layout: &Layout, name: &str, address: &str) -> anyhow::Result<()> {
    wait_for(
        &format!("{name} to listen on {address}"),
        START_LIMIT,
        async || process::running(layout, name).is_none() || TcpStream::connect(address).await.is_ok(),
    )
    .await?;
    process::running(layout, name)
        .map(drop)
        .with_context(|| format!("{name} ended: see {}", layout.log(name).display()))
}

/// Waits until the controller lists every host.
///
/// # Errors
/// If `dalgu` is not built, or some host did not register in time.
pub async fn await_hosts(layout: &Layout, hosts: &[Host]) -> anyhow::Result<()> {
    wait_for("registration of every host", START_LIMIT, async || {
        let Ok(listed) = cli(layout, &["host", "list", "-o", "json"]).await else {
            return false;
        };
        hosts
            .iter()
            .all(|host| listed.contains(&format!("\"{}\"", host.name)))
    })
    .await
    .with_context(|| {
        format!(
            "see {} and the agents' logs beside it",
            layout.log(CONTROLLER).display()
        )
    })
}

/// Runs `dalgu` against the lab's controller and returns what it printed.
///
/// # Errors
/// If it is not built, or fails.
pub async fn cli(layout: &Layout, arguments: &[&str]) -> anyhow::Result<String> {
    let config = format!("DALGU_CONFIG={}", layout.cli_config().display());
    let dalgu = program(layout, "dalgu")?;
    run("env", [config.as_str(), dalgu.as_str()].iter().chain(arguments)).await
}
