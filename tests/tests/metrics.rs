//! The metrics pages of the controller and the agents: promtool finds no fault, a real Prometheus scrapes them over
//! mutual TLS, what they say is so, a deleted VM leaves no series, and a hung libvirtd delays no scrape. Run by
//! `make test`; needs root and the set-up step.

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::at_rest;
use dalgu_tests::e2e::story::Story;
use dalgu_tests::e2e::words::{self, LOCAL, attempt, create, dalgu};
use dalgu_tests::e2e::{self, REST_LIMIT};
use dalgu_tests::lab::{Daemon, Lab, wait_for, with_lab};
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::process::{Child, Command};
use tokio::time::Instant;

/// No scrape may take longer, whatever hangs; Prometheus itself would wait 10 s.
const SCRAPE_LIMIT: Duration = Duration::from_secs(1);

fn pages(lab: &Lab) -> Vec<String> {
    let agents = lab.hosts().into_iter().map(|host| host.agent_address());
    [lab.layout().controller_address()]
        .into_iter()
        .chain(agents)
        .collect()
}

/// A page as `curl` gets it, with its headers.
async fn scrape(lab: &Lab, address: &str, accept: &str) -> anyhow::Result<String> {
    let operator = lab.layout().operator();
    let mut command = Command::new("curl");
    command.args([
        "-sS",
        "--fail",
        "--max-time",
        "10",
        "-H",
        &format!("Accept: {accept}"),
    ]);
    command.arg("--cacert").arg(operator.join("ca.pem"));
    command
        .arg("--cert")
        .arg(operator.join("admin.pem"))
        .arg("--key")
        .arg(operator.join("admin.key"));
    let ended = attempt(command.arg(format!("https://{address}/metrics"))).await?;
    ensure!(ended.code == 0, "{address}: {}", ended.stderr);
    Ok(ended.stdout)
}

async fn plain(lab: &Lab, address: &str) -> anyhow::Result<String> {
    scrape(lab, address, "text/plain; version=0.0.4").await
}

/// The value of a series, by the text before it.
fn value(page: &str, series: &str) -> Option<f64> {
    let rest = page.lines().find_map(|line| line.strip_prefix(series))?;
    rest.rsplit(' ').next()?.parse().ok()
}

async fn promtool_finds_no_fault(lab: &Lab) -> anyhow::Result<()> {
    for address in pages(lab) {
        let file = lab.layout().dir().join("page.txt");
        fs::write(&file, plain(lab, &address).await?)?;
        let mut check = Command::new("promtool");
        check.args(["check", "metrics"]).stdin(fs::File::open(&file)?);
        let output = check.output().await.context("run promtool")?;
        let said = [output.stdout, output.stderr].concat();
        ensure!(
            output.status.success() && said.is_empty(),
            "{address}: {}",
            String::from_utf8_lossy(&said)
        );
        let open = scrape(lab, &address, "application/openmetrics-text; version=1.0.0").await?;
        ensure!(open.ends_with("# EOF\n"), "{address} speaks no OpenMetrics");
    }
    let nobody =
        attempt(Command::new("curl").args(["-sSk", &format!("https://{}/metrics", pages(lab)[1])])).await?;
    ensure!(
        nobody.code != 0,
        "somebody without a certificate was answered: {}",
        nobody.stdout
    );
    Ok(())
}

/// A real Prometheus on a port of its own.
struct Prometheus {
    child: Child,
    address: String,
    log: PathBuf,
}

impl Prometheus {
    fn start(lab: &Lab) -> anyhow::Result<Self> {
        let dir = lab.layout().dir();
        let operator = lab.layout().operator();
        let operator = operator.display();
        let tls = format!(
            "    tls_config: {{ca_file: {operator}/ca.pem, cert_file: {operator}/admin.pem, key_file: {operator}/admin.key}}\n"
        );
        let job = |name: &str, targets: &[String]| {
            format!(
                "  - job_name: {name}\n    scheme: https\n{tls}    static_configs: [{{targets: {targets:?}}}]\n"
            )
        };
        let pages = pages(lab);
        let text = format!(
            "global: {{scrape_interval: 1s, scrape_timeout: 1s}}\nscrape_configs:\n{}{}",
            job("controller", &pages[..1]),
            job("agents", &pages[1..])
        );
        let config = dir.join("prometheus.yml");
        fs::write(&config, text)?;
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
        let log = dir.join("log/prometheus.log");
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", dir.join("tsdb").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?)
            .kill_on_drop(true)
            .spawn()
            .context("start prometheus")?;
        Ok(Self { child, address, log })
    }

    /// The instant values of a query, as numbers.
    async fn query(&self, query: &str) -> anyhow::Result<Vec<f64>> {
        let url = format!("http://{}/api/v1/query", self.address);
        let ended = attempt(Command::new("curl").args([
            "-sS",
            "--max-time",
            "5",
            "-G",
            &url,
            "--data-urlencode",
            &format!("query={query}"),
        ]))
        .await?;
        let answer: Value = serde_json::from_str(&ended.stdout).with_context(|| ended.stderr.clone())?;
        let results = answer["data"]["result"]
            .as_array()
            .with_context(|| format!("{query}: {answer}"))?;
        Ok(results
            .iter()
            .filter_map(|result| result["value"][1].as_str()?.parse().ok())
            .collect())
    }

    /// Waits until a query's values are as wanted.
    async fn until(&self, query: &str, wanted: impl Fn(&[f64]) -> bool) -> anyhow::Result<()> {
        let mut last = Ok(Vec::new());
        wait_for(query, REST_LIMIT, async || {
            last = self.query(query).await;
            last.as_ref().is_ok_and(|values| wanted(values))
        })
        .await
        .with_context(|| format!("it is {last:?}; see {}", self.log.display()))
    }

    async fn end(mut self) -> anyhow::Result<()> {
        self.child.kill().await.context("end prometheus")
    }
}

/// What a real Prometheus has gathered after some scrapes is what is there.
async fn prometheus_gathers_the_truth(lab: &Lab) -> anyhow::Result<()> {
    let prometheus = Prometheus::start(lab)?;
    let count = lab.hosts().len();
    prometheus
        .until("up", |up| up.len() == count + 1 && up.iter().all(|up| *up == 1.0))
        .await?;
    prometheus
        .until(r#"dalgu_controller_vms{state="running"}"#, |vms| vms == [2.0])
        .await?;
    prometheus
        .until("sum(dalgu_controller_host_vcpus_reserved)", |sum| sum == [2.0])
        .await?;
    let hosts = f64::from(u8::try_from(count)?);
    prometheus
        .until(r#"dalgu_controller_hosts{state="ready"}"#, |ready| {
            ready == [hosts]
        })
        .await?;
    prometheus
        .until(r#"dalgu_vm_power_state{state="running"} == 1"#, |all| {
            all == [1.0, 1.0]
        })
        .await?;
    // Guests under emulation that count use some of a processor, and less than all of it.
    let busy = |rates: &[f64]| rates.len() == 2 && rates.iter().all(|rate| (0.0001..2.0).contains(rate));
    prometheus
        .until("rate(dalgu_vm_cpu_seconds_total[10s])", busy)
        .await?;
    let resident = |all: &[f64]| all.len() == 2 && all.iter().all(|bytes| (50e6..1e9).contains(bytes));
    prometheus
        .until("dalgu_vm_memory_resident_bytes", resident)
        .await?;
    // In the lab every host is the same machine: their processors are all there, each second of each in some mode.
    let cpus = "sum by (instance) (rate(dalgu_host_cpu_seconds_total[10s])) / on (instance) dalgu_host_cpus";
    prometheus
        .until(cpus, |all| {
            all.len() == count && all.iter().all(|share| (0.7..1.3).contains(share))
        })
        .await?;
    let memory = format!(
        "sum by (instance) (dalgu_host_memory_bytes) / {}",
        memory_bytes()?
    );
    prometheus
        .until(&memory, |all| {
            all.len() == count && all.iter().all(|share| (0.95..1.05).contains(share))
        })
        .await?;
    prometheus
        .until("dalgu_sample_age_seconds", |all| {
            all.iter().all(|age| (0.0..10.0).contains(age))
        })
        .await?;
    prometheus.end().await
}

fn memory_bytes() -> anyhow::Result<u64> {
    let info = fs::read_to_string("/proc/meminfo")?;
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .context("no MemTotal")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1024)
}

/// With its libvirtd stopped in mid-air, a host is scraped at once, keeps reporting, and says how old its samples are.
async fn a_hung_libvirtd_delays_no_scrape(lab: &Lab) -> anyhow::Result<()> {
    let address = lab.layout().host(1).agent_address();
    lab.signal(Daemon::Libvirtd(1), Signal::SIGSTOP).await?;
    let looked = scrapes_during_the_hang(lab, &address).await;
    lab.signal(Daemon::Libvirtd(1), Signal::SIGCONT).await?;
    looked?;
    wait_for("a fresh sample of the VMs", REST_LIMIT, async || {
        let page = plain(lab, &address).await.unwrap_or_default();
        value(&page, r#"dalgu_sample_age_seconds{sample="vms"}"#).is_some_and(|age| age < 5.0)
    })
    .await?;
    at_rest(lab, &[], REST_LIMIT).await
}

async fn scrapes_during_the_hang(lab: &Lab, address: &str) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut slowest = Duration::ZERO;
    let aged = async || {
        let asked = Instant::now();
        let page = plain(lab, address).await.unwrap_or_default();
        slowest = slowest.max(asked.elapsed());
        let fresh = value(&page, r#"dalgu_sample_age_seconds{sample="host"}"#).is_some_and(|age| age < 5.0);
        fresh && value(&page, r#"dalgu_sample_age_seconds{sample="vms"}"#).is_some_and(|age| age > 6.0)
    };
    wait_for(
        "samples of VMs that age while the host's stay fresh",
        REST_LIMIT,
        aged,
    )
    .await?;
    ensure!(slowest < SCRAPE_LIMIT, "a scrape took {slowest:?}");
    wait_for("some reports", REST_LIMIT, async || {
        began.elapsed() > Duration::from_secs(8)
    })
    .await?;
    let host = words::json(lab, &["host", "show", "h1"]).await?;
    ensure!(
        host["state"] == "HOST_STATE_READY",
        "the heartbeat stopped with libvirtd: {}",
        host["state"]
    );
    Ok(())
}

async fn a_deleted_vm_leaves_no_series(lab: &Lab) -> anyhow::Result<()> {
    let vm = words::vm(lab, "m1").await?;
    let address = lab.layout().host(vm.host_number()?).agent_address();
    ensure!(
        plain(lab, &address).await?.contains(&vm.uid),
        "it never had a series"
    );
    dalgu(lab, &["vm", "delete", "m1", "--force"]).await?;
    wait_for("the end of its series", Duration::from_secs(10), async || {
        plain(lab, &address)
            .await
            .is_ok_and(|page| !page.contains(&vm.uid) && !page.contains("\"m1\""))
    })
    .await?;
    let page = plain(lab, &lab.layout().controller_address()).await?;
    ensure!(
        !page.contains(&vm.uid) && !page.contains("\"m1\""),
        "the controller still shows it: {page}"
    );
    Ok(())
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn prometheus_scrapes_clean_and_true_pages_whatever_hangs() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        for (name, host) in [("m1", "h1"), ("m2", "h2")] {
            dalgu(lab, &create(name, LOCAL, &["--host", host])).await?;
            Story::default()
                .more(lab, &words::vm(lab, name).await?, 3)
                .await?;
        }
        promtool_finds_no_fault(lab).await.context("promtool")?;
        prometheus_gathers_the_truth(lab).await.context("prometheus")?;
        a_hung_libvirtd_delays_no_scrape(lab)
            .await
            .context("libvirtd hangs")?;
        a_deleted_vm_leaves_no_series(lab).await.context("a deleted VM")
    })
    .await
}
