//! One host of the lab: its directories and configuration, the anchor that keeps its namespaces, its libvirtd.
//! Called when a lab goes up, by the tests that power hosts off and on, and (for [`hold`]) by the anchor process itself.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use nix::mount::{MsFlags, mount};
use nix::unistd::sethostname;

use super::layout::{Host, Layout, OWN_DIRS, SHARED_DIR};
use super::load::{self, Account};
use super::process::{self, Place};
use super::run::{run, wait_for};

/// Files that give each host an identity of its own, as the machine shows them.
const OWN_FILES: [&str; 2] = ["/proc/sys/kernel/random/boot_id", "/etc/machine-id"];

/// Writes a host's directories and libvirt's configuration.
///
/// # Errors
/// If a file cannot be written.
pub fn prepare(layout: &Layout, host: &Host) -> anyhow::Result<()> {
    for dir in OWN_DIRS {
        let outside = host.outside(dir);
        fs::create_dir_all(&outside).with_context(|| format!("make {}", outside.display()))?;
    }
    for dir in [
        SHARED_DIR,
        "/var/lib/dalgu/local",
        "/var/lib/dalgu/fast",
        "/var/lib/dalgu/images",
        "/var/lib/dalgu/agent",
        "/etc/libvirt/nwfilter",
    ] {
        fs::create_dir_all(host.outside(dir)).with_context(|| format!("make {dir} of {}", host.name))?;
    }
    fs::create_dir_all(layout.shared()).context("make the shared directory")?;
    copy_network_filters(host)?;
    let uuid = format!(
        "0d0{:x}0000-0000-4000-8000-0000000000{:02x}",
        layout.id(),
        host.number
    );
    write(host, "/etc/libvirt/libvirtd.conf", &libvirtd_conf(&uuid))?;
    write(host, "/etc/libvirt/qemu.conf", QEMU_CONF)?;
    write(host, "/etc/machine-id", &format!("{}\n", uuid.replace('-', "")))?;
    new_boot(host)
}

const QEMU_CONF: &str = r#"# A host of the lab: guests run as root, without cgroups and namespaces of their own.
user = "root"
group = "root"
remember_owner = 0
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"#;

fn libvirtd_conf(uuid: &str) -> String {
    format!(
        r#"# A host of the lab. It listens on its Unix sockets only.
host_uuid = "{uuid}"
unix_sock_group = "root"
unix_sock_ro_perms = "0700"
unix_sock_rw_perms = "0700"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_outputs = "3:stderr"
"#
    )
}

/// libvirt's stock filters, none of the machine's guests or networks.
fn copy_network_filters(host: &Host) -> anyhow::Result<()> {
    let Ok(entries) = fs::read_dir("/etc/libvirt/nwfilter") else {
        return Ok(());
    };
    for entry in entries.flatten().filter(|entry| entry.path().is_file()) {
        fs::copy(
            entry.path(),
            host.outside("/etc/libvirt/nwfilter").join(entry.file_name()),
        )
        .context("copy libvirt's network filters")?;
    }
    Ok(())
}

/// Gives the host a new boot id, as a reboot would.
fn new_boot(host: &Host) -> anyhow::Result<()> {
    let id = fs::read_to_string("/proc/sys/kernel/random/uuid").context("read a random id")?;
    // In place: the running host has this very file mounted.
    write(host, OWN_FILES[0], &id)
}

fn write(host: &Host, path: &str, text: &str) -> anyhow::Result<()> {
    let outside = host.outside(path);
    if let Some(parent) = outside.parent() {
        fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
    }
    fs::write(&outside, text).with_context(|| format!("write {}", outside.display()))
}

/// Starts the anchor: the process whose namespaces are the host.
///
/// # Errors
/// If it does not come up.
pub async fn start_anchor(layout: &Layout, host: &Host) -> anyhow::Result<()> {
    let ready = host.dir.join("ready");
    let _ = fs::remove_file(&ready);
    load::make(host);
    let command = [
        layout.bin_dir().join("lab").to_string_lossy().into_owned(),
        "--id".to_owned(),
        layout.id().to_string(),
        "--dir".to_owned(),
        layout.dir().to_string_lossy().into_owned(),
        "anchor".to_owned(),
        host.number.to_string(),
    ];
    process::start(layout, Place::NewHost(host), &host.anchor(), &command).await?;
    wait_for(
        &format!("namespaces of {}", host.name),
        Duration::from_secs(15),
        async || ready.exists() || process::running(layout, &host.anchor()).is_none(),
    )
    .await?;
    process::enter(layout, host)
        .map(drop)
        .with_context(|| format!("see {}", layout.log(&host.anchor()).display()))
}

/// Starts the host's libvirtd and waits until it answers.
///
/// # Errors
/// If it does not come up.
pub async fn start_libvirtd(layout: &Layout, host: &Host) -> anyhow::Result<()> {
    let command = [
        "libvirtd",
        "--config",
        "/etc/libvirt/libvirtd.conf",
        "--pid-file",
        "/run/libvirt/libvirtd.pid",
    ];
    let name = host.libvirtd();
    // As systemd/libvirtd-dalgu.conf does.
    let agent = layout.bin_dir().join("dalgu-agent");
    inside(layout, host, &[&agent.to_string_lossy(), "clear-cut-jobs"]).await?;
    process::start(layout, Place::Host(host), &name, &command.map(str::to_owned)).await?;
    wait_for(
        &format!("answer of {name}"),
        Duration::from_secs(60),
        async || {
            process::running(layout, &name).is_none()
                || inside(layout, host, &["virsh", "-c", "qemu:///system", "version"])
                    .await
                    .is_ok()
        },
    )
    .await?;
    process::running(layout, &name)
        .map(drop)
        .with_context(|| format!("{name} ended: see {}", layout.log(&name).display()))
}

/// Runs a command in the host and returns what it printed.
///
/// # Errors
/// If the host is not up, or the command fails.
pub async fn inside(layout: &Layout, host: &Host, command: &[&str]) -> anyhow::Result<String> {
    let mut words = process::enter(layout, host)?;
    words.extend(command.iter().map(|&word| word.to_owned()));
    let (program, rest) = words.split_first().context("no command")?;
    run(program, rest).await
}

/// Ends everything on the host at once, as a power cut does. Its disks stay, what was below /run does not.
///
/// # Errors
/// If a process does not end.
pub async fn power_off(layout: &Layout, host: &Host) -> anyhow::Result<()> {
    process::end_all(layout, std::slice::from_ref(host), false).await?;
    load::remove(host).await?;
    for dir in OWN_DIRS.iter().filter(|dir| dir.starts_with("/run/")) {
        let outside = host.outside(dir);
        fs::remove_dir_all(&outside).with_context(|| format!("empty {}", outside.display()))?;
        fs::create_dir_all(&outside).with_context(|| format!("make {}", outside.display()))?;
    }
    new_boot(host)
}

/// The anchor's own work: makes this process the host, then waits for ever. Called by `lab anchor` only, inside
/// new mount and UTS namespaces and the host's network namespace.
///
/// # Errors
/// If a mount fails, or what the host is to see of itself cannot be read.
pub async fn hold(layout: &Layout, host: &Host) -> anyhow::Result<()> {
    for path in OWN_DIRS.iter().chain(&OWN_FILES) {
        if Path::new(path).exists() {
            bind(&host.outside(path), Path::new(path))?;
        }
    }
    bind(&layout.shared(), Path::new(SHARED_DIR))?;
    let account = Account::show(host)?;
    sethostname(&host.name).context("set the host name")?;
    fs::write(host.dir.join("ready"), "").context("say that the host is ready")?;
    match account {
        Some(account) => account.keep().await,
        None => std::future::pending().await,
    }
}

/// Mounts what is at a path at another one.
///
/// # Errors
/// If it cannot be mounted.
pub fn bind(source: &Path, place: &Path) -> anyhow::Result<()> {
    // With what is mounted below it: a test may give a host a small disk.
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(source), place, None::<&str>, flags, None::<&str>)
        .with_context(|| format!("mount {} on {}", source.display(), place.display()))
}

/// Writes a script that runs `program` in the host, for the operator's shell.
///
/// # Errors
/// If it cannot be written.
pub fn write_wrapper(layout: &Layout, host: &Host, name: &str, program: &str) -> anyhow::Result<()> {
    let pid_file = layout.pid_file(&host.anchor());
    let text = format!(
        "#!/bin/sh\n# Runs in host {} of the lab.\n[ \"$(id -u)\" -eq 0 ] || exec sudo \"$0\" \"$@\"\nexec nsenter --target \"$(cat {})\" --mount --uts --net -- {program} \"$@\"\n",
        host.name,
        quoted(&pid_file),
    );
    write_script(&layout.wrappers().join(name), &text)
}

/// Writes an executable file.
///
/// # Errors
/// If it cannot be written.
pub fn write_script(path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).context("make a script executable")
}

/// A path as one word of a shell.
#[must_use]
pub fn quoted(path: &Path) -> String {
    format!("'{}'", path.to_string_lossy().replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_with_a_quote_stays_one_word_of_the_shell() {
        assert_eq!(quoted(Path::new("/a b/it's")), r"'/a b/it'\''s'");
    }
}
