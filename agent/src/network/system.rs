//! The host itself: carries out what [`super::compile`] wants by `nft`, `ip`, `bridge` and `dnsmasq`.
//!
//! Programs and not netlink: what is done is text, which the tests read, an operator can repeat by hand, and which works in
//! the namespace of a network's service as well. Each call has a deadline; nothing is left half-made that the next pass does not
//! finish.

use std::{
    collections::BTreeMap,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use dalgu_proto::host::GuestFeature;
use futures::future::BoxFuture;
use serde::de::DeserializeOwned;
use tokio::{
    io::AsyncWriteExt as _,
    process::Command,
    sync::{Mutex, Notify},
    task::spawn_blocking,
    time::{Instant, timeout},
};

use super::{
    Plugged, Problems, System, Wanted,
    compile::{self, Segment},
    counts,
    document::Kept,
    ear,
    links::{self, Script, Seen},
    names,
    process::{Running, directory, end_former},
};

/// Longest time of one program.
const LIMIT: Duration = Duration::from_secs(20);
/// A scratch namespace, in which something is tried.
const TRY: [&str; 4] = ["--net", "--", "sh", "-c"];

/// What `nft` shows of the filters.
const FILTERS: &[&[&str]] = &[
    &["list", "table", "bridge", "dalgu"],
    &["list", "table", "inet", "dalgu"],
];
/// What it shows of the count of connections, without what has been counted.
const COUNTS: &[&[&str]] = &[&["--terse", "list", "table", "inet", "dalgu-counts"]];
/// Connections that the host may have.
const CONNECTIONS: &str = "/proc/sys/net/netfilter/nf_conntrack_max";

/// A program that did not do what it was to.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Failed(pub(super) String);

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self(error.to_string())
    }
}

/// Runs a program to its end and answers what it printed.
pub(super) async fn run(program: &str, words: &[&str], input: Option<&str>) -> Result<String, Failed> {
    let mut command = Command::new(program);
    command
        .args(words)
        .stdin(input.map_or_else(Stdio::null, |_| Stdio::piped()))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let told = async {
        let mut child = command.spawn()?;
        let stdin = child.stdin.take();
        let feed = async {
            if let (Some(mut stdin), Some(input)) = (stdin, input) {
                // One that ends before it has read all says why.
                let _ = stdin.write_all(input.as_bytes()).await;
            }
        };
        let ((), output) = tokio::join!(feed, child.wait_with_output());
        output
    };
    let output = timeout(LIMIT, told)
        .await
        .map_err(|_| Failed(format!("{program} did not end within {LIMIT:?}")))?
        .map_err(|error| Failed(format!("{program} cannot be run: {error}")))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let complaint: String = complaint.lines().take(3).collect::<Vec<_>>().join("; ");
    Err(Failed(format!("{program}: {complaint}")))
}

/// Rules that were loaded last, and how the kernel shows them.
struct Loaded {
    rules: String,
    shown: String,
}

#[derive(Default)]
struct Acted {
    loaded: Option<Loaded>,
    counts: Option<Loaded>,
    /// It has been said that connections are not counted.
    uncounted: bool,
    services: BTreeMap<String, Running>,
}

/// See the module's documentation.
pub struct Linux {
    dir: PathBuf,
    overlay_address: Option<IpAddr>,
    acted: Mutex<Acted>,
    ended: Arc<Notify>,
}

impl Linux {
    /// With a directory for the files of what it starts.
    pub fn new(run_dir: &Path, overlay_address: Option<IpAddr>) -> Self {
        Self {
            dir: run_dir.join("network"),
            overlay_address,
            acted: Mutex::default(),
            ended: Arc::default(),
        }
    }

    async fn look() -> Result<Seen, Failed> {
        let links = json(&run("ip", &["-json", "-details", "link", "show"], None).await?)?;
        let entries = json(&run("bridge", &["-json", "fdb", "show"], None).await?)?;
        Ok(Seen::new(links, entries))
    }

    async fn make_all(&self, acted: &mut Acted, wanted: &Wanted) -> Result<Problems, Failed> {
        load(&mut acted.loaded, &wanted.rules, FILTERS).await?;
        count(acted).await;
        let seen = Self::look().await?;
        let mut problems = Problems::default();
        for segment in &wanted.segments {
            if let Err(error) = self.segment(acted, segment, &seen).await {
                problems
                    .networks
                    .insert(segment.network.clone(), error.to_string());
            }
        }
        self.end_services(acted, &wanted.segments).await?;
        remove(&wanted.segments).await?;
        Ok(problems)
    }

    async fn segment(&self, acted: &mut Acted, segment: &Segment, seen: &Seen) -> Result<(), Failed> {
        carry_out(&links::make(segment, seen).map_err(Failed)?).await?;
        let Some(service) = &segment.service else {
            return Ok(());
        };
        // The port goes with the process, and somebody may have taken it away.
        let port = names::device(names::SERVICE, &segment.network);
        let right = |running: &Running| running.is_right(service) && seen.has(&port);
        match acted.services.get_mut(&segment.bridge) {
            Some(running) if right(running) => running.update(&self.dir, &segment.bridge, service),
            _ => {
                if let Some(former) = acted.services.remove(&segment.bridge) {
                    former.stop().await;
                }
                let started = Running::start(&self.dir, segment, service, self.ended.clone()).await?;
                acted.services.insert(segment.bridge.clone(), started);
                Ok(())
            }
        }
    }

    /// Ends what no network here needs, also what an earlier run of the agent started.
    async fn end_services(&self, acted: &mut Acted, segments: &[Segment]) -> Result<(), Failed> {
        let served = |bridge: &str| {
            let mut segments = segments.iter();
            segments.any(|segment| segment.bridge == bridge && segment.service.is_some())
        };
        let over: Vec<_> = acted
            .services
            .keys()
            .filter(|bridge| !served(bridge))
            .cloned()
            .collect();
        for bridge in over {
            if let Some(running) = acted.services.remove(&bridge) {
                running.stop().await;
            }
        }
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return Ok(());
        };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(names::BRIDGE) && !served(&name) {
                let dir = directory(&self.dir, &name);
                end_former(&dir).await?;
                fs::remove_dir_all(&dir)?;
            }
        }
        Ok(())
    }
}

/// An empty answer is an empty list.
fn json<T: DeserializeOwned + Default>(text: &str) -> Result<T, Failed> {
    match text.trim() {
        "" => Ok(T::default()),
        text => serde_json::from_str(text).map_err(|error| Failed(format!("ip: {error}"))),
    }
}

/// Lines as `ip` and `bridge` read them.
fn batch(lines: &[String]) -> String {
    lines.join("\n") + "\n"
}

async fn carry_out(script: &Script) -> Result<(), Failed> {
    for (program, lines) in [("ip", &script.ip), ("bridge", &script.bridge)] {
        if !lines.is_empty() {
            tracing::debug!(program, ?lines, "changing devices");
            run(program, &["-batch", "-"], Some(&batch(lines))).await?;
        }
    }
    if !script.fading.is_empty() {
        // What has gone by itself is a failure here, and what stays is seen by the next pass.
        let gone = run("bridge", &["-force", "-batch", "-"], Some(&batch(&script.fading))).await;
        tracing::debug!(lines = ?script.fading, ?gone, "removing what was learnt");
    }
    Ok(())
}

/// Removes what no network needs. Some of it goes by itself meanwhile, with the namespace of a service.
async fn remove(segments: &[Segment]) -> Result<(), Failed> {
    let left = async || Ok::<_, Failed>(links::remove(segments, &Linux::look().await?).ip);
    let lines = left().await?;
    if lines.is_empty() {
        return Ok(());
    }
    let removed = run("ip", &["-force", "-batch", "-"], Some(&batch(&lines))).await;
    match left().await?.is_empty() {
        true => Ok(()),
        false => removed.map(drop),
    }
}

/// Loads rules, if they are not what the kernel has.
async fn load(loaded: &mut Option<Loaded>, rules: &str, tables: &[&[&str]]) -> Result<(), Failed> {
    if let Some(before) = loaded
        && before.rules == rules
        && shown(tables).await.is_ok_and(|shown| shown == before.shown)
    {
        return Ok(());
    }
    *loaded = None;
    run("nft", &["-f", "-"], Some(rules)).await?;
    *loaded = Some(Loaded {
        rules: rules.to_owned(),
        shown: shown(tables).await?,
    });
    Ok(())
}

async fn shown(tables: &[&[&str]]) -> Result<String, Failed> {
    let mut shown = String::new();
    for table in tables {
        shown += &run("nft", table, None).await?;
    }
    Ok(shown)
}

/// Has the kernel count connections, where it can: one that cannot serves networks all the same.
async fn count(acted: &mut Acted) {
    let host = fs::read_to_string(CONNECTIONS).ok();
    let bound = counts::bound(host.and_then(|host| host.trim().parse().ok()));
    let counted = load(&mut acted.counts, &counts::table(bound), COUNTS).await;
    if let Err(error) = &counted
        && !acted.uncounted
    {
        tracing::warn!(%error, "connections of VMs are not counted: one of them can use up the host's");
    }
    acted.uncounted = counted.is_err();
}

#[async_trait]
impl System for Linux {
    async fn features(&self) -> Vec<GuestFeature> {
        let rules = compile::compile(&Kept::default(), &[], &Default::default(), None).rules;
        let tried = async |what: &str, script: &str, input: Option<&str>| {
            let tried = run("unshare", &[&TRY[..], &[script]].concat(), input).await;
            if let Err(error) = &tried {
                tracing::info!(what, %error, "this host does not have it");
            }
            tried.is_ok()
        };
        // `br_netfilter` is a module: dalgu.modules-load names it.
        let network = "test -e /proc/sys/net/bridge/bridge-nf-call-iptables && dnsmasq --version >/dev/null && \
                       ip link add dev b type bridge nf_call_iptables 1 && nft -f -";
        if !tried("network", network, Some(&rules)).await {
            return Vec::new();
        }
        let mut features = vec![GuestFeature::Network, GuestFeature::IcmpType];
        let overlay = "ip link add dev x type vxlan id 1 dstport 4789";
        if self.overlay_address.is_some() && tried("overlay", overlay, None).await {
            features.push(GuestFeature::Overlay);
        }
        let vlan = "ip link add dev b type bridge && ip link add link b name v type vlan id 2";
        if tried("vlan", vlan, None).await {
            features.push(GuestFeature::Vlan);
        }
        features
    }

    fn overlay_address(&self) -> Option<IpAddr> {
        self.overlay_address
    }

    async fn make(&self, wanted: &Wanted) -> Problems {
        let mut acted = self.acted.lock().await;
        let made = self.make_all(&mut acted, wanted).await;
        made.unwrap_or_else(|error| Problems {
            all: Some(error.to_string()),
            ..Problems::default()
        })
    }

    async fn broken(&self) {
        self.ended.notified().await;
    }

    async fn arrived(&self, plugged: &Plugged) {
        let words = [
            "fdb",
            "replace",
            &plugged.mac,
            "dev",
            &plugged.tap,
            "master",
            "dynamic",
        ];
        if let Err(error) = run("bridge", &words, None).await {
            tracing::warn!(tap = plugged.tap, %error, "its first packet will show where it is");
        }
    }

    async fn first_word(&self, tap: &str) -> Option<BoxFuture<'static, Instant>> {
        let named = tap.to_owned();
        // The kernel lets whoever opens it wait for some milliseconds.
        let listening = spawn_blocking(move || ear::listen(&named)).await;
        match listening.unwrap_or_else(|panicked| Err(panicked.into())) {
            Ok(first) => Some(Box::pin(async move {
                match first.await {
                    Ok(first) => first,
                    // Nobody speaks at a tap that has gone.
                    Err(_) => std::future::pending().await,
                }
            })),
            Err(error) => {
                tracing::warn!(tap, %error, "when a VM first speaks here cannot be heard");
                None
            }
        }
    }

    async fn stop(&self) {
        // Guests go on without the agent, and so does what they ask for addresses and names. What was started is ended by the
        // next agent, or by systemd.
    }
}
