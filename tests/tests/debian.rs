//! A department's first VMs from a standard template, on a real Debian or Ubuntu: imported once, an address by DHCP, an SSH key
//! and user data by cloud-init. Called by `make tour-image`, which makes the image; not among the tests of `make test`, as its
//! guests boot for minutes under emulation.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::at_rest;
use dalgu_tests::e2e::words::{self, Vm, dalgu, json};
use dalgu_tests::e2e::{self, REST_LIMIT, story};
use dalgu_tests::lab::{Lab, run, wait_for, with_lab};
use tokio::time::Instant;

/// A whole system boots for minutes under emulation, two at once for longer.
const BOOT_LIMIT: Duration = Duration::from_mins(8);
/// The address of who serves DHCP, on the first host's bridge.
const SERVER: &str = "192.168.77.1/24";
/// The file in which it writes down whom it gave what.
const LEASES: &str = "/var/lib/dalgu/leases";
/// What user data makes the guest say.
const DONE: &str = "USER-DATA-DONE";

/// Serves addresses to guests on every host: their bridges are one network.
async fn serve_addresses(lab: &Lab) -> anyhow::Result<()> {
    let words = format!(
        "ip address add {SERVER} dev br0 && dnsmasq --conf-file=/dev/null --port=0 --interface=br0 --bind-interfaces \
         --dhcp-range=192.168.77.50,192.168.77.150,1h --dhcp-leasefile={LEASES} --pid-file= --user=root"
    );
    lab.exec(1, &["sh", "-c", &words]).await.map(drop)
}

/// The address that a guest was given.
fn address(lab: &Lab, vm: &Vm) -> anyhow::Result<String> {
    let mac = vm.all["spec"]["nics"][0]["mac"]
        .as_str()
        .context("no MAC address")?;
    let leases = fs::read_to_string(lab.layout().host(1).outside(LEASES))?;
    let lease = leases.lines().find(|lease| lease.contains(mac));
    let lease = lease.with_context(|| format!("{mac} has no lease among {leases}"))?;
    Ok(lease
        .split(' ')
        .nth(2)
        .context("a lease without an address")?
        .to_owned())
}

/// Says something to a guest's shell by SSH, from the first host.
async fn ssh(lab: &Lab, key: &Path, vm: &Vm, words: &str) -> anyhow::Result<String> {
    let (key, to) = (key.to_string_lossy().into_owned(), address(lab, vm)?);
    let options = [
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "BatchMode=yes",
        "ConnectTimeout=60",
    ];
    let mut command = vec!["ssh", "-q", "-i", &key];
    command.extend(options.iter().flat_map(|option| ["-o", option]));
    let user = format!("kim@{to}");
    command.extend([user.as_str(), words]);
    lab.exec(1, &command).await
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
        serve_addresses(lab).await?;
        let key = lab.layout().dir().join("key");
        run("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-f", &key.to_string_lossy()]).await?;
        let public = fs::read_to_string(key.with_extension("pub"))?;
        let user_data = lab.layout().dir().join("user-data");
        fs::write(
            &user_data,
            format!(
                "#cloud-config\nusers:\n  - name: kim\n    shell: /bin/bash\n    ssh_authorized_keys: [\"{}\"]\nruncmd:\n  \
                 - [sh, -c, \"echo {DONE} > /dev/ttyS0\"]\n",
                public.trim()
            ),
        )?;

        let (image, user_data) = (image.to_string_lossy(), user_data.to_string_lossy());
        let began = Instant::now();
        dalgu(lab, &["image", "import", &image, "--name", "standard", "--version", "1", "--replicas", "1"]).await?;
        println!("imported in {:.1} s", began.elapsed().as_secs_f64());
        let mut vms = Vec::new();
        for (name, host) in [("tax", "h1"), ("parks", "h2"), ("school", "h2")] {
            let words = [
                "vm", "create", name, "--host", host, "--memory", "512MiB", "--vcpus", "1", "--disk",
                "root=4GiB,image=standard:1", "--nic", "eth0=br0", "--user-data", &user_data,
            ];
            let began = Instant::now();
            dalgu(lab, &words).await?;
            println!("{name} runs on {host} after {:.2} s", began.elapsed().as_secs_f64());
            vms.push(words::vm(lab, name).await?);
        }
        for vm in &vms {
            said(lab, vm, DONE).await?;
            let told = ssh(lab, &key, vm, "hostname; df --output=size -BM / | tail -1").await?;
            let mut lines = told.lines().map(str::trim);
            ensure!(lines.next() == Some(vm.name.as_str()), "{} calls itself {told}", vm.name);
            let size: u64 = lines.next().unwrap_or_default().trim_end_matches('M').parse()?;
            ensure!(size > 3_500, "its root file system did not grow: {size} MiB");
        }
        // It came once, and crossed to the other host once.
        let shown = json(lab, &["image", "get", "standard:1"]).await?;
        let copies = shown["status"]["copies"].as_array().map_or(0, Vec::len);
        ensure!(copies == 2, "{shown}");
        for vm in &vms {
            dalgu(lab, &["vm", "delete", &vm.name, "--force"]).await?;
        }
        lab.exec(1, &["pkill", "-f", LEASES]).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}
