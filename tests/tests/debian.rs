//! A department's first VMs from a standard template, on a real Debian or Ubuntu: imported once, addresses by DHCP and DHCPv6 in a network of
//! the site, an SSH key and user data by cloud-init, and let in is whom a security group allows. Called by `make tour-image`, which makes the image; not among the tests of `make test`, as its
//! guests boot for minutes under emulation.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::at_rest;
use dalgu_tests::e2e::network::beside::Machine;
use dalgu_tests::e2e::words::{self, Vm, dalgu, json};
use dalgu_tests::e2e::{self, REST_LIMIT, story};
use dalgu_tests::lab::{Lab, run, wait_for, with_lab};
use tokio::time::Instant;

/// A whole system boots for minutes under emulation, two at once for longer.
const BOOT_LIMIT: Duration = Duration::from_mins(8);
/// The network, over both hosts.
const NETWORK: &str = "field";
/// The machine beside the hosts in it.
const BESIDE: (&str, [&str; 2]) = ("52:54:00:00:30:c8", ["10.30.0.200/24", "fd30::c8/64"]);
/// What user data makes the guest say.
const DONE: &str = "USER-DATA-DONE";

/// An address that the controller gave a guest's interface: its IPv4 or its IPv6 one.
fn address<'a>(vm: &'a Vm, field: &str) -> anyhow::Result<&'a str> {
    let address = vm.all["spec"]["nics"][0][field].as_str();
    address.with_context(|| format!("no {field}: {}", vm.all))
}

/// Says something to a guest's shell by SSH, from the machine beside the hosts.
async fn ssh(machine: &Machine, key: &str, user: &str, address: &str, words: &str) -> anyhow::Result<String> {
    let options = [
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "BatchMode=yes",
        "ConnectTimeout=60",
    ];
    let mut command = vec!["ssh", "-q", "-i", key];
    command.extend(options.iter().flat_map(|option| ["-o", option]));
    let user = format!("{user}@{address}");
    command.extend([user.as_str(), words]);
    machine.run(&command).await
}

/// Who an image of this machine's own release has for its usual user: called as the distribution is.
fn usual_user() -> anyhow::Result<String> {
    let release = fs::read_to_string("/etc/os-release")?;
    let id = release.lines().find_map(|line| line.strip_prefix("ID="));
    Ok(id.context("no ID in os-release")?.trim_matches('"').to_owned())
}

async fn said(lab: &Lab, vm: &Vm, words: &str) -> anyhow::Result<()> {
    let file = story::file(lab, vm.host_number()?, &vm.uid);
    wait_for(words, BOOT_LIMIT, async || {
        fs::read(&file).is_ok_and(|said| String::from_utf8_lossy(&said).contains(words))
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and an image: make tour-image"]
async fn departments_get_their_first_vms_from_one_image() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let image = lab.layout().tools_dir().with_file_name("lab-image").join("image.qcow2");
        ensure!(image.exists(), "{} is not there: make lab-image", image.display());
        dalgu(lab, &["network", "create", NETWORK, "--overlay", "--ipv4", "10.30.0.0/24", "--ipv6", "fd30::/64"]).await?;
        dalgu(lab, &["security-group", "create", "admin", "--rule", "ingress,tcp,22"]).await?;
        let key = lab.layout().dir().join("key");
        run("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-f", &key.to_string_lossy()]).await?;
        let public = key.with_extension("pub");
        let user_data = lab.layout().dir().join("user-data");
        fs::write(
            &user_data,
            format!(
                "#cloud-config\nusers:\n  - name: kim\n    shell: /bin/bash\n    ssh_authorized_keys: [\"{}\"]\nruncmd:\n  \
                 - [sh, -c, \"echo {DONE} > /dev/ttyS0\"]\n",
                fs::read_to_string(&public)?.trim()
            ),
        )?;

        let (image, user_data) = (image.to_string_lossy(), user_data.to_string_lossy());
        let (key, public) = (key.to_string_lossy(), public.to_string_lossy());
        let began = Instant::now();
        dalgu(lab, &["image", "import", &image, "--name", "standard", "--version", "1", "--replicas", "1"]).await?;
        println!("imported in {:.1} s", began.elapsed().as_secs_f64());
        let mut vms = Vec::new();
        // One has a key for the image's usual user, and two have users of their own; one is not to be reached.
        for (name, host, nic, how) in [
            ("tax", "h1", "eth0,network=field,group=admin", ["--ssh-key", &*public]),
            ("parks", "h2", "eth0,network=field,group=admin", ["--user-data", &*user_data]),
            ("school", "h2", "eth0,network=field", ["--user-data", &*user_data]),
        ] {
            let mut words = vec![
                "vm", "create", name, "--host", host, "--memory", "512MiB", "--vcpus", "1", "--disk",
                "root=4GiB,image=standard:1", "--nic", nic,
            ];
            words.extend(how);
            let began = Instant::now();
            dalgu(lab, &words).await?;
            println!("{name} runs on {host} after {:.2} s", began.elapsed().as_secs_f64());
            vms.push(words::vm(lab, name).await?);
        }
        let machine = Machine::new(lab);
        machine.join(lab, NETWORK, 1, BESIDE.0, &BESIDE.1).await?;
        let usual = usual_user()?;
        for (vm, user) in vms.iter().zip([usual.as_str(), "kim"]) {
            let reached = wait_for("a shell by SSH", BOOT_LIMIT, async || {
                let v4 = address(vm, "ipv4Address").unwrap_or_default();
                ssh(&machine, &key, user, v4, "true").await.is_ok()
            });
            reached.await.with_context(|| vm.name.clone())?;
            for field in ["ipv4Address", "ipv6Address"] {
                let told = "hostname; df --output=size -BM / | tail -1; ip -o address show scope global";
                let told = ssh(&machine, &key, user, address(vm, field)?, told).await?;
                let mut lines = told.lines().map(str::trim);
                ensure!(lines.next() == Some(vm.name.as_str()), "{} calls itself {told}", vm.name);
                let size: u64 = lines.next().unwrap_or_default().trim_end_matches('M').parse()?;
                ensure!(size > 3_500, "its root file system did not grow: {size} MiB");
                for field in ["ipv4Address", "ipv6Address"] {
                    ensure!(told.contains(address(vm, field)?), "{} has not {field}: {told}", vm.name);
                }
            }
            let name = format!("getent hosts parks.{NETWORK}.internal");
            let found = ssh(&machine, &key, user, address(vm, "ipv4Address")?, &name).await?;
            ensure!(found.contains("10.30.0.") || found.contains("fd30:"), "{}: {found}", vm.name);
        }
        // It is up, and lets nobody in.
        said(lab, &vms[1], DONE).await?;
        said(lab, &vms[2], DONE).await?;
        let refused = ssh(&machine, &key, "kim", address(&vms[2], "ipv4Address")?, "true").await;
        ensure!(refused.is_err(), "a VM without a group was reached");
        // It came once, and crossed to the other host once.
        let shown = json(lab, &["image", "get", "standard:1"]).await?;
        let copies = shown["status"]["copies"].as_array().map_or(0, Vec::len);
        ensure!(copies == 2, "{shown}");
        for vm in &vms {
            dalgu(lab, &["vm", "delete", &vm.name, "--force"]).await?;
        }
        dalgu(lab, &["network", "delete", NETWORK]).await?;
        dalgu(lab, &["security-group", "delete", "admin"]).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}
