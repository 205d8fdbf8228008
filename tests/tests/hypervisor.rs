//! The hypervisor on real libvirt hosts keeps its contract, and what is promised when things die or hang. Run by
//! `make test`; needs root and the set-up step.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    future::Future,
    os::fd::AsFd as _,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    pin::Pin,
    process::Command,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use async_trait::async_trait;
use dalgu_agent::{
    hypervisor::{
        About, Change, Connection, Definition, Domain, DomainState, Error, Hardware, Hint, Hypervisor,
        LayerChange, Layers, Migrate, Progress,
        backup::{Manifest, Order},
        contract::{self, Broken, Fixture, Pair},
        files::PoolFile,
        libvirt::{Accel, Libvirt, LibvirtConfig, Pool},
    },
    image, images,
};
use dalgu_proto::{
    host::{GuestFeature, VmUsage},
    ids::{BackupId, ClusterId, VmId, VolumeId},
    image::Digest,
    v1,
    vm::{
        CloneMode, Disk, DiskFormat, Firmware, KernelBoot, Nic, NumaPlace, Plug, PowerReason, RestartPolicy,
        Spec, first_boot::Documents,
    },
};
use dalgu_tests::lab::{Daemon, Lab, Options, guest, layout::SHARED_DIR, with_lab};
use nix::{
    sched::{CloneFlags, setns, unshare},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    net::{UnixListener, UnixStream},
    runtime::{Builder, Handle},
    sync::{broadcast, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

/// The hypervisor of a host of the lab. Its threads are inside the host, so that it sees the host's files; calls are
/// carried to them.
struct InHost {
    libvirt: Arc<Libvirt>,
    runtime: Handle,
    /// The host's directories, seen from outside.
    outside: PathBuf,
    control: PathBuf,
    _end: tokio_util::sync::DropGuard,
}

impl InHost {
    async fn open(lab: &Lab, number: u8, cluster: ClusterId) -> anyhow::Result<Self> {
        let host = lab.layout().host(number);
        let anchor = fs::read_to_string(lab.layout().pid_file(&host.anchor()))?;
        let namespace = File::open(format!("/proc/{}/ns/mnt", anchor.trim()))?;
        let end = tokio_util::sync::CancellationToken::new();
        let (send, receive) = tokio::sync::oneshot::channel();
        let ended = end.clone();
        std::thread::spawn(move || {
            let run = || -> anyhow::Result<()> {
                // Threads made from here on are in the host too.
                unshare(CloneFlags::CLONE_FS)?;
                setns(namespace.as_fd(), CloneFlags::CLONE_NEWNS)?;
                let runtime = Builder::new_multi_thread()
                    .worker_threads(2)
                    .enable_all()
                    .build()?;
                let libvirt = Arc::new(runtime.block_on(Libvirt::start(config(cluster)))?);
                // The test may have given up.
                let _ = send.send((libvirt, runtime.handle().clone()));
                runtime.block_on(ended.cancelled());
                runtime.shutdown_background();
                Ok(())
            };
            if let Err(error) = run() {
                eprintln!("the hypervisor's thread: {error:#}");
            }
        });
        let (libvirt, runtime) = receive.await.context("the hypervisor did not start")?;
        let up = async {
            libvirt
                .connection()
                .wait_for(|state| *state == Connection::Up)
                .await
                .is_ok()
        };
        ensure!(
            timeout(Duration::from_secs(20), up).await?,
            "the hypervisor ended"
        );
        let control = libvirt.control_socket().to_owned();
        Ok(Self {
            libvirt,
            runtime,
            outside: host.dir.join("root"),
            control,
            _end: end.drop_guard(),
        })
    }

    async fn call<T, F>(&self, call: F) -> T
    where
        T: Send + 'static,
        F: FnOnce(Arc<Libvirt>) -> Pin<Box<dyn Future<Output = T> + Send>> + Send,
    {
        self.runtime
            .spawn(call(self.libvirt.clone()))
            .await
            .expect("the hypervisor does not panic")
    }

    fn outside(&self, path: &Path) -> PathBuf {
        self.outside.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Process id of a guest's QEMU.
    fn qemu(&self, vm: &Definition) -> anyhow::Result<Pid> {
        let file = self
            .outside(Path::new("/run/libvirt/qemu"))
            .join(format!("{}.pid", vm.name));
        Ok(Pid::from_raw(fs::read_to_string(file)?.trim().parse()?))
    }
}

macro_rules! carried {
    ($self:ident, $libvirt:ident => $call:expr) => {
        $self
            .call(move |$libvirt| Box::pin(async move { $call.await }))
            .await
    };
}

#[async_trait]
impl Hypervisor for InHost {
    async fn about(&self) -> Result<About, Error> {
        carried!(self, libvirt => libvirt.about())
    }
    fn connection(&self) -> watch::Receiver<Connection> {
        self.libvirt.connection()
    }
    fn hints(&self) -> broadcast::Receiver<Hint> {
        self.libvirt.hints()
    }
    async fn list(&self) -> Result<Vec<Domain>, Error> {
        carried!(self, libvirt => libvirt.list())
    }
    async fn get(&self, id: VmId) -> Result<Option<Domain>, Error> {
        carried!(self, libvirt => libvirt.get(id))
    }
    fn changing(&self, id: VmId) -> bool {
        self.libvirt.changing(id)
    }
    async fn create_volumes(&self, definition: &Definition, incoming: bool) -> Result<(), Error> {
        let definition = definition.clone();
        carried!(self, libvirt => libvirt.create_volumes(&definition, incoming))
    }
    async fn hardware(&self, id: VmId) -> Result<Option<Hardware>, Error> {
        carried!(self, libvirt => libvirt.hardware(id))
    }
    async fn change_hardware(&self, definition: &Definition, change: &Change) -> Result<(), Error> {
        let (definition, change) = (definition.clone(), change.clone());
        carried!(self, libvirt => libvirt.change_hardware(&definition, &change))
    }
    async fn layers(&self, definition: &Definition) -> Result<Layers, Error> {
        let definition = definition.clone();
        carried!(self, libvirt => libvirt.layers(&definition))
    }
    async fn change_layers(&self, definition: &Definition, change: &LayerChange) -> Result<bool, Error> {
        let (definition, change) = (definition.clone(), *change);
        carried!(self, libvirt => libvirt.change_layers(&definition, &change))
    }
    async fn delete_volume(&self, id: VmId, disk: &Disk) -> Result<(), Error> {
        let disk = disk.clone();
        carried!(self, libvirt => libvirt.delete_volume(id, &disk))
    }
    async fn delete_volumes(&self, id: VmId, keep_shared: bool) -> Result<(), Error> {
        carried!(self, libvirt => libvirt.delete_volumes(id, keep_shared))
    }
    async fn purge_volume(&self, pool: &str, volume: VolumeId, keep_shared: bool) -> Result<(), Error> {
        let pool = pool.to_owned();
        carried!(self, libvirt => libvirt.purge_volume(&pool, volume, keep_shared))
    }
    async fn define(&self, definition: &Definition) -> Result<(), Error> {
        let definition = definition.clone();
        carried!(self, libvirt => libvirt.define(&definition))
    }
    async fn pin(&self, places: &BTreeMap<VmId, Vec<NumaPlace>>) -> Result<(), Error> {
        let places = places.clone();
        carried!(self, libvirt => libvirt.pin(&places))
    }
    async fn start(&self, id: VmId) -> Result<(), Error> {
        carried!(self, libvirt => Hypervisor::start(&*libvirt, id))
    }
    async fn shutdown(&self, id: VmId) -> Result<(), Error> {
        carried!(self, libvirt => libvirt.shutdown(id))
    }
    async fn destroy(&self, id: VmId) -> Result<(), Error> {
        carried!(self, libvirt => libvirt.destroy(id))
    }
    async fn reboot(&self, id: VmId) -> Result<(), Error> {
        carried!(self, libvirt => libvirt.reboot(id))
    }
    async fn reset(&self, id: VmId) -> Result<(), Error> {
        carried!(self, libvirt => libvirt.reset(id))
    }
    async fn pause(&self, id: VmId) -> Result<(), Error> {
        carried!(self, libvirt => libvirt.pause(id))
    }
    async fn resume(&self, id: VmId) -> Result<(), Error> {
        carried!(self, libvirt => libvirt.resume(id))
    }
    async fn undefine(&self, id: VmId) -> Result<(), Error> {
        carried!(self, libvirt => libvirt.undefine(id))
    }
    async fn usage(&self) -> Result<Vec<(VmId, VmUsage)>, Error> {
        carried!(self, libvirt => libvirt.usage())
    }
    fn console_log(&self, id: VmId) -> Option<PathBuf> {
        Some(self.outside(&self.libvirt.console_log(id)?))
    }
    fn control_socket(&self) -> &Path {
        &self.control
    }
    async fn migrate(&self, migrate: &Migrate) -> Result<Progress, Error> {
        let migrate = migrate.clone();
        carried!(self, libvirt => libvirt.migrate(&migrate))
    }
    async fn progress(&self, id: VmId) -> Result<Option<Progress>, Error> {
        carried!(self, libvirt => libvirt.progress(id))
    }
    async fn abort_migration(&self, id: VmId) -> Result<(), Error> {
        carried!(self, libvirt => libvirt.abort_migration(id))
    }
    async fn back_up(&self, order: &Order) -> Result<Manifest, Error> {
        let order = order.clone();
        carried!(self, libvirt => libvirt.back_up(&order))
    }
    async fn backup_progress(&self, id: VmId) -> Result<Option<(u64, u64)>, Error> {
        carried!(self, libvirt => libvirt.backup_progress(id))
    }
    async fn backup(&self, pool: &str, id: BackupId) -> Result<Option<Manifest>, Error> {
        let pool = pool.to_owned();
        carried!(self, libvirt => libvirt.backup(&pool, id))
    }
    async fn remove_backup(&self, vm: VmId, pool: &str, id: BackupId) -> Result<(), Error> {
        let pool = pool.to_owned();
        carried!(self, libvirt => libvirt.remove_backup(vm, &pool, id))
    }
    async fn files(&self, pool: &str) -> Result<Vec<PoolFile>, Error> {
        let pool = pool.to_owned();
        carried!(self, libvirt => libvirt.files(&pool))
    }
}

fn config(cluster: ClusterId) -> LibvirtConfig {
    let pool = |name: &str, path: &str, shared| Pool {
        name: name.into(),
        path: path.into(),
        shared,
        mounted: false,
    };
    LibvirtConfig {
        cluster,
        uri: "qemu:///system".into(),
        pools: vec![
            pool("local", "/var/lib/dalgu/local", false),
            pool("shared", SHARED_DIR, true),
        ],
        images_dir: guest::IMAGES_DIR.into(),
        image_store_dir: "/var/lib/dalgu/image-store".into(),
        console_dir: "/var/lib/dalgu/contract-console".into(),
        accel: Accel::Tcg,
        run_dir: "/run/dalgu".into(),
        qemu_user: None,
    }
}

fn cluster() -> ClusterId {
    ClusterId::from_uuid(Uuid::new_v4())
}

fn disk(name: &str, pool: &str, format: DiskFormat) -> Disk {
    Disk {
        name: name.into(),
        size_mib: 64,
        pool: pool.into(),
        image: None,
        format,
        digest: None,
        clone_mode: CloneMode::Any,
        volume: None,
        limits: Default::default(),
        backup: None,
    }
}

fn fixture(cluster: ClusterId, disks: Vec<Disk>) -> Fixture {
    let kernel = KernelBoot {
        kernel: guest::KERNEL.into(),
        initrd: Some(guest::INITRD.into()),
        cmdline: guest::CMDLINE.into(),
    };
    let spec = Spec {
        vcpus: 1,
        memory_mib: 128,
        disks,
        nics: vec![Nic {
            name: "net0".into(),
            plug: Plug::Bridge { bridge: "br0".into() },
            mac: String::new(),
            reserved_mbit: None,
        }],
        kernel_boot: Some(kernel),
        restart_policy: RestartPolicy::Never,
        host_selector: Default::default(),
        first_boot: None,
        firmware: Default::default(),
        tpm: false,
        max_vcpus: None,
        max_memory_mib: None,
        fitting: Default::default(),
        devices: Default::default(),
    };
    Fixture {
        cluster,
        spec,
        documents: Documents::default(),
        guests_obey: true,
        has_volumes: true,
        image: None,
        other_pool: Some("shared".into()),
        moves_running: true,
        has_usage: true,
        booted_line: Some("tick 3".into()),
        patience: Duration::from_secs(60),
    }
}

fn libvirt_only(hosts: u8) -> Options {
    Options {
        hosts,
        dalgu: false,
        ..Options::default()
    }
}

fn none_broken(broken: &[(&str, Broken)]) -> anyhow::Result<()> {
    ensure!(broken.is_empty(), "{broken:#?}");
    Ok(())
}

async fn running(hypervisor: &InHost, fixture: &Fixture) -> anyhow::Result<Definition> {
    let vm = fixture.new_vm();
    hypervisor.create_volumes(&vm, false).await?;
    hypervisor.define(&vm).await?;
    hypervisor.start(vm.id).await?;
    Ok(vm)
}

async fn state(hypervisor: &InHost, id: VmId) -> Result<Option<DomainState>, Broken> {
    let domain = hypervisor
        .get(id)
        .await
        .map_err(|error| Broken::new(error.to_string()))?;
    Ok(domain.map(|domain| domain.state))
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_real_host_keeps_the_contract() -> anyhow::Result<()> {
    with_lab(&libvirt_only(1), async |lab| {
        let cluster = cluster();
        let host = InHost::open(lab, 1, cluster).await?;
        let disks = vec![
            disk("root", "local", DiskFormat::Qcow2),
            disk("data", "shared", DiskFormat::Raw),
        ];
        let fixture = Fixture {
            image: Some(give_image(&host, &filled_image()?)?),
            ..fixture(cluster, disks)
        };
        none_broken(&fixture.check(&host).await)?;
        ensure!(host.list().await?.is_empty(), "domains are left");
        // The directory of backups stays when they are gone.
        let backups = host.outside(Path::new("/var/lib/dalgu/local/backups"));
        ensure!(fs::read_dir(&backups)?.count() == 0, "backups are left");
        fs::remove_dir(backups)?;
        ensure!(
            fs::read_dir(host.outside(Path::new("/var/lib/dalgu/local")))?.count() == 0,
            "disks are left"
        );
        a_foreign_domain_stays(lab, &host, cluster).await
    })
    .await
}

async fn a_foreign_domain_stays(lab: &Lab, host: &InHost, cluster: ClusterId) -> anyhow::Result<()> {
    let id = VmId::from_uuid(Uuid::new_v4());
    let xml = format!(
        "<domain type='qemu'><name>Somebody's own 1</name><uuid>{id}</uuid><memory unit='MiB'>32</memory>\
         <os><type arch='x86_64'>hvm</type></os></domain>"
    );
    fs::write(host.outside(Path::new("/run/dalgu/foreign.xml")), xml)?;
    lab.virsh(1, &["create", "/run/dalgu/foreign.xml"]).await?;
    contract::a_foreign_domain_is_not_touched(host, &fixture(cluster, Vec::new()), id).await?;
    // And to another site this one's domains are foreign.
    let vm = fixture(cluster, Vec::new()).new_vm();
    host.define(&vm).await?;
    let other_site = self::cluster();
    let other = InHost::open(lab, 1, other_site).await?;
    contract::a_foreign_domain_is_not_touched(&other, &fixture(other_site, Vec::new()), vm.id).await?;
    Ok(())
}

/// Carries one Unix socket to another, as the agents do between hosts.
fn carry(from: PathBuf, to: PathBuf) -> anyhow::Result<AbortOnDropHandle<()>> {
    for socket in [&from, &to] {
        fs::create_dir_all(socket.parent().context("a socket has a directory")?)?;
    }
    let listener = UnixListener::bind(&from).with_context(|| format!("listen at {}", from.display()))?;
    Ok(AbortOnDropHandle::new(tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let to = to.clone();
            tokio::spawn(async move {
                if let Ok(mut far) = UnixStream::connect(&to).await {
                    // Either end's loss ends the other.
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                }
            });
        }
    })))
}

/// Two hosts, the sockets between them, and what VMs are made of.
struct Two {
    source: InHost,
    destination: InHost,
    fixture: Fixture,
    _carried: Vec<AbortOnDropHandle<()>>,
}

const SOCKETS: &str = "/run/dalgu/contract";

impl Two {
    async fn open(lab: &Lab, disks: Vec<Disk>) -> anyhow::Result<Self> {
        let cluster = cluster();
        let (source, destination) = (
            InHost::open(lab, 1, cluster).await?,
            InHost::open(lab, 2, cluster).await?,
        );
        let dir = Path::new(SOCKETS);
        let _ = fs::remove_dir_all(source.outside(dir));
        let mut carried = vec![carry(
            source.outside(&dir.join("control")),
            destination.outside(destination.control_socket()),
        )?];
        for stream in ["memory", "disks"] {
            carried.push(carry(
                source.outside(&dir.join(stream)),
                destination.outside(&dir.join(stream)),
            )?);
        }
        Ok(Self {
            source,
            destination,
            fixture: fixture(cluster, disks),
            _carried: carried,
        })
    }

    fn pair(&self) -> Pair<'_> {
        let at = |name: &str| Path::new(SOCKETS).join(name);
        Pair {
            source: &self.source,
            destination: &self.destination,
            control: at("control"),
            memory: at("memory"),
            disks: at("disks"),
            fixture: &self.fixture,
            slow_mib_per_second: 2,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the lab's packages: make test"]
async fn real_hosts_keep_the_contract_of_migration_with_disks_shared_and_copied() -> anyhow::Result<()> {
    with_lab(&libvirt_only(2), async |lab| {
        let shared = || disk("data", "shared", DiskFormat::Raw);
        let local = || disk("root", "local", DiskFormat::Qcow2);
        for disks in [vec![shared()], vec![local(), shared()]] {
            let two = Two::open(lab, disks).await?;
            none_broken(&two.pair().check().await)?;
            ensure!(
                two.source.list().await?.is_empty(),
                "domains are left at the source"
            );
            ensure!(
                two.destination.list().await?.is_empty(),
                "domains are left at the destination"
            );
        }
        Ok(())
    })
    .await
}

/// Where hosts keep copies of images.
const STORE: &str = "/var/lib/dalgu/image-store";
/// Size of the disk in the image, in MiB; the guests' disks are larger.
const IMAGE_MIB: usize = 32;

/// A disk's bytes of which none is 0, with what a guest says of its disk at its beginning.
fn filled() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..IMAGE_MIB << 18)
        .flat_map(|n| (u32::try_from(n).unwrap_or(0).wrapping_mul(2_654_435_761) | 0x0101_0101).to_le_bytes())
        .collect();
    let first = format!("{:<511}\n", "dalgu-tick 4711");
    bytes[..512].copy_from_slice(first.as_bytes());
    bytes
}

/// The same as an image.
fn filled_image() -> anyhow::Result<Vec<u8>> {
    let dir = tempfile::tempdir()?;
    let (raw, image) = (dir.path().join("raw"), dir.path().join("image"));
    fs::write(&raw, filled())?;
    let converted = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([&raw, &image])
        .status()?;
    ensure!(converted.success(), "qemu-img: {converted}");
    Ok(fs::read(image)?)
}

/// Puts a copy of an image into a host's store, as its agent does.
fn give_image(host: &InHost, image: &[u8]) -> anyhow::Result<Digest> {
    let mut sum = [0; 32];
    sum.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, image).as_ref());
    let digest = Digest::from_bytes(&sum);
    let store = host.outside(Path::new(STORE));
    fs::create_dir_all(&store)?;
    fs::write(store.join(images::copy_name(&digest)), image)?;
    Ok(digest)
}

/// What a guest sees of a disk, and how many bytes of it are in its own file.
fn content(host: &InHost, vm: &Definition, disk: &str) -> anyhow::Result<(Vec<u8>, u64)> {
    let path = Path::new("/var/lib/dalgu/local")
        .join(vm.id.to_string())
        .join(disk);
    let file = host.outside(&path);
    let allocated = fs::metadata(&file)?.blocks() * 512;
    // The image behind it is named as the host sees it.
    let dir = tempfile::tempdir()?;
    let (copy, raw) = (dir.path().join("copy"), dir.path().join("raw"));
    fs::copy(&file, &copy)?;
    let behind = image::behind(File::open(&copy)?)?.and_then(|disk| disk.backing);
    if let Some(behind) = behind {
        let told = Command::new("qemu-img")
            .args(["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b"])
            .args([&host.outside(&behind), &copy])
            .status()?;
        ensure!(told.success(), "qemu-img rebase: {told}");
    }
    let converted = Command::new("qemu-img")
        .args(["convert", "-f", "qcow2", "-O", "raw"])
        .args([&copy, &raw])
        .status()?;
    ensure!(converted.success(), "qemu-img convert: {converted}");
    Ok((fs::read(raw)?, allocated))
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the lab's packages: make test"]
async fn an_overlay_on_an_image_boots_and_migrates_with_its_difference_alone() -> anyhow::Result<()> {
    with_lab(&libvirt_only(2), async |lab| {
        let image = filled_image()?;
        let local = |name: &str| disk(name, "local", DiskFormat::Qcow2);
        let mut two = Two::open(lab, vec![local("root"), local("data")]).await?;
        let digest = give_image(&two.source, &image)?;
        give_image(&two.destination, &image)?;
        let root = &mut two.fixture.spec.disks[0];
        root.image = Some("filled:1".into());
        root.digest = Some(digest.clone());
        root.clone_mode = CloneMode::Overlay;
        let pair = two.pair();
        let vm = pair.make().await?;
        let says = |host: &InHost| -> anyhow::Result<String> {
            let log = host.console_log(vm.id).context("a console")?;
            Ok(String::from_utf8_lossy(&fs::read(log)?).into_owned())
        };
        ensure!(
            says(&two.source)?.contains("disk holds 4711"),
            "{}",
            says(&two.source)?
        );
        // It writes its count every 20 ticks.
        let line = |line: &str| Fixture {
            booted_line: Some(line.into()),
            ..two.fixture.clone()
        };
        contract::booted(&two.source, &line("tick 21\r"), vm.id).await?;
        two.source.migrate(&pair.order(&vm)).await?;
        let last = guest::ticks(says(&two.destination)?.as_bytes());
        let later = format!("tick {}\r", last.last().copied().unwrap_or(21) + 45);
        contract::booted(&two.destination, &line(&later), vm.id).await?;
        two.destination.destroy(vm.id).await?;
        let (bytes, allocated) = content(&two.destination, &vm, "root.qcow2")?;
        ensure!(bytes.len() == 64 << 20, "its size is {}", bytes.len());
        let written = String::from_utf8_lossy(&bytes[..32]).into_owned();
        let count: u64 = written
            .trim_start_matches("dalgu-tick ")
            .trim()
            .parse()
            .with_context(|| format!("the guest's count: {written:?}"))?;
        ensure!(count > 21 && count != 4711, "the guest's last count is {count}");
        ensure!(
            bytes[512..IMAGE_MIB << 20] == filled()[512..],
            "the image is not behind it"
        );
        ensure!(
            bytes[IMAGE_MIB << 20..].iter().all(|byte| *byte == 0),
            "what it has more is not empty"
        );
        ensure!(
            allocated < 4 << 20,
            "{allocated} bytes were copied of an overlay that has some clusters"
        );
        for host in [&two.source, &two.destination] {
            let copy = host.outside(Path::new(STORE)).join(images::copy_name(&digest));
            ensure!(fs::read(&copy)? == image, "the image was written to");
            ensure!(
                fs::metadata(&copy)?.mode() & 0o777 == 0o644,
                "the image was given away"
            );
        }
        // It starts again where it is, from what came.
        two.destination.start(vm.id).await?;
        let holds = format!("disk holds {count}");
        contract::booted(&two.destination, &line(&holds), vm.id).await?;
        pair.remove(vm.id).await?;
        none_broken(&pair.check().await)
    })
    .await
}

/// Who dies in the middle of a transfer, and where the VM is then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    DestinationQemu,
    DestinationLibvirtd,
    SourceLibvirtd,
    SourceQemu,
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the lab's packages: make test"]
async fn whoever_dies_during_a_transfer_the_vm_runs_at_the_source_or_nowhere() -> anyhow::Result<()> {
    with_lab(&libvirt_only(2), async |lab| {
        let two = Two::open(lab, vec![disk("root", "shared", DiskFormat::Qcow2)]).await?;
        use Victim::{DestinationLibvirtd, DestinationQemu, SourceLibvirtd, SourceQemu};
        for victim in [DestinationQemu, DestinationLibvirtd, SourceLibvirtd, SourceQemu] {
            one_dies(lab, &two, victim)
                .await
                .with_context(|| format!("{victim:?}"))?;
        }
        Ok(())
    })
    .await
}

async fn one_dies(lab: &Lab, two: &Two, victim: Victim) -> anyhow::Result<()> {
    let pair = two.pair();
    let vm = pair.make().await?;
    let mut order = pair.order(&vm);
    order.bandwidth_mib_per_second = pair.slow_mib_per_second;
    let dies = async {
        contract::eventually("a transfer under way", Duration::from_secs(20), async || {
            let progress = two
                .source
                .progress(vm.id)
                .await
                .map_err(|error| Broken::new(error.to_string()))?;
            Ok(progress.is_some_and(|progress| progress.memory_processed_bytes > 0))
        })
        .await?;
        ensure!(
            state(&two.destination, vm.id).await? == Some(DomainState::Incoming),
            "it does not arrive"
        );
        ensure!(
            two.destination.progress(vm.id).await?.is_none(),
            "the destination sends nothing"
        );
        match victim {
            Victim::DestinationQemu => kill(two.destination.qemu(&vm)?, Signal::SIGKILL)?,
            Victim::SourceQemu => kill(two.source.qemu(&vm)?, Signal::SIGKILL)?,
            Victim::DestinationLibvirtd => lab.signal(Daemon::Libvirtd(2), Signal::SIGKILL).await?,
            Victim::SourceLibvirtd => lab.signal(Daemon::Libvirtd(1), Signal::SIGKILL).await?,
        }
        anyhow::Ok(())
    };
    let (result, died) = tokio::join!(two.source.migrate(&order), dies);
    died?;
    ensure!(result.is_err(), "it never arrived, and migrate says {result:?}");
    let expected = match victim {
        Victim::SourceQemu => DomainState::Stopped,
        _ => DomainState::Running,
    };
    for (dead, number, host) in [
        (Victim::SourceLibvirtd, 1, &two.source),
        (Victim::DestinationLibvirtd, 2, &two.destination),
    ] {
        if dead == victim {
            lab.start(Daemon::Libvirtd(number)).await?;
            let mut connection = host.connection();
            timeout(
                Duration::from_secs(20),
                connection.wait_for(|state| *state == Connection::Up),
            )
            .await??;
        }
    }
    contract::eventually("both sides settled", Duration::from_secs(30), async || {
        Ok((
            state(&two.source, vm.id).await?,
            state(&two.destination, vm.id).await?,
        ) == (Some(expected), None))
    })
    .await?;
    if victim == Victim::SourceQemu {
        let reason = two.source.get(vm.id).await?.map(|domain| domain.reason);
        ensure!(
            reason == Some(PowerReason::Crashed),
            "its QEMU was killed, and the reason is {reason:?}"
        );
    }
    Ok(pair.remove(vm.id).await?)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_libvirtd_that_dies_or_hangs_is_noticed_and_found_again() -> anyhow::Result<()> {
    with_lab(&libvirt_only(1), async |lab| {
        let cluster = cluster();
        let host = InHost::open(lab, 1, cluster).await?;
        let vm = running(&host, &fixture(cluster, Vec::new())).await?;
        let (mut connection, mut hints) = (host.connection(), host.hints());
        for (ends, begins) in [(Signal::SIGKILL, None), (Signal::SIGSTOP, Some(Signal::SIGCONT))] {
            lab.signal(Daemon::Libvirtd(1), ends).await?;
            // A hung one is noticed after four silent periods of 5 s.
            timeout(
                Duration::from_secs(25),
                connection.wait_for(|state| *state != Connection::Up),
            )
            .await??;
            let failed = host.list().await;
            ensure!(
                matches!(failed, Err(Error::Unavailable { .. })),
                "while it is away: {failed:?}"
            );
            match begins {
                Some(signal) => lab.signal(Daemon::Libvirtd(1), signal).await?,
                None => lab.start(Daemon::Libvirtd(1)).await?,
            }
            timeout(
                Duration::from_secs(20),
                connection.wait_for(|state| *state == Connection::Up),
            )
            .await??;
            ensure!(
                state(&host, vm.id).await? == Some(DomainState::Running),
                "the guest did not run on"
            );
            let mut hinted = false;
            while let Ok(hint) = hints.try_recv() {
                hinted |= hint == Hint::All;
            }
            ensure!(hinted, "no hint to look at everything");
        }
        host.destroy(vm.id).await?;
        Ok(host.undefine(vm.id).await?)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_hung_guest_delays_no_other() -> anyhow::Result<()> {
    with_lab(&libvirt_only(1), async |lab| {
        let cluster = cluster();
        let host = InHost::open(lab, 1, cluster).await?;
        let fixture = fixture(cluster, Vec::new());
        let (hung, other) = (running(&host, &fixture).await?, running(&host, &fixture).await?);
        kill(host.qemu(&hung)?, Signal::SIGSTOP)?;
        let others = async {
            // Until the call about the hung one is stuck in libvirt.
            sleep(Duration::from_millis(500)).await;
            let began = Instant::now();
            host.pause(other.id).await?;
            host.resume(other.id).await?;
            ensure!(host.list().await?.len() == 2, "the list is not whole");
            ensure!(
                state(&host, hung.id).await? == Some(DomainState::Running),
                "libvirt does not know it is hung"
            );
            let usage: Vec<_> = host.usage().await?.into_iter().map(|(id, _)| id).collect();
            ensure!(usage == [other.id], "usage of {usage:?}");
            ensure!(
                began.elapsed() < Duration::from_secs(3),
                "others waited {:?}",
                began.elapsed()
            );
            host.destroy(hung.id).await?;
            anyhow::Ok(())
        };
        let (paused, others) = tokio::join!(host.pause(hung.id), others);
        others?;
        ensure!(paused.is_err(), "a hung guest was paused");
        ensure!(
            state(&host, hung.id).await? == Some(DomainState::Stopped),
            "it was not powered off"
        );
        for vm in [&hung, &other] {
            host.destroy(vm.id).await?;
            host.undefine(vm.id).await?;
        }
        Ok(())
    })
    .await
}

/// Waits for a line that a guest says.
async fn says(host: &InHost, id: VmId, line: &str) -> anyhow::Result<()> {
    let log = host.console_log(id).context("no console")?;
    contract::eventually(line, Duration::from_secs(90), async || {
        let said = fs::read(&log).unwrap_or_default();
        Ok(String::from_utf8_lossy(&said).contains(line))
    })
    .await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_guest_reads_what_it_is_told_at_its_first_boot_also_after_a_live_migration() -> anyhow::Result<()> {
    with_lab(&libvirt_only(2), async |lab| {
        for pool in ["local", "shared"] {
            let mut two = Two::open(lab, vec![disk("root", "local", DiskFormat::Qcow2)]).await?;
            let told = v1::FirstBoot {
                user_data: "#!/bin/sh\n#say well met\n".into(),
                hostname: "shop".into(),
                pool: pool.into(),
                ..Default::default()
            };
            let mut spec = v1::VmSpec::from(two.fixture.spec.clone());
            spec.first_boot = Some(told.clone());
            two.fixture.spec = Spec::try_from(spec)?;
            two.fixture.documents = Documents::from(&told);
            let pair = two.pair();
            let vm = pair.make().await?;
            says(&two.source, vm.id, "first boot says well met").await?;
            let name = format!("\"instance-id\":\"{}\",\"local-hostname\":\"shop\"", vm.id);
            says(&two.source, vm.id, &name).await?;

            two.source.migrate(&pair.order(&vm)).await?;
            let file = format!("{}/first_boot.raw", vm.id);
            let there = match pool {
                "local" => two
                    .destination
                    .outside(Path::new("/var/lib/dalgu/local"))
                    .join(file),
                _ => lab.layout().shared().join(file),
            };
            let sum = std::process::Command::new("sha256sum")
                .arg(&there)
                .output()?
                .stdout;
            let sum = String::from_utf8(sum)?;
            let sum = sum.split(' ').next().unwrap_or_default();
            ensure!(sum.len() == 64, "no volume at the destination");
            let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(&there)?);
            ensure!(mode & 0o777 == 0o600, "its mode is {mode:o}");
            // The console of the destination begins with the migration.
            says(&two.destination, vm.id, &format!("first boot is {sum}")).await?;
            pair.remove(vm.id).await?;
            ensure!(!there.exists(), "the volume is left");
        }
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the lab's packages: make test"]
async fn firmware_and_tpm_are_found_start_and_move_with_their_vm() -> anyhow::Result<()> {
    with_lab(&libvirt_only(2), async |lab| {
        let mut two = Two::open(lab, vec![disk("root", "local", DiskFormat::Raw)]).await?;
        let offered = two.source.about().await?.guest_features;
        for feature in [
            GuestFeature::Uefi,
            GuestFeature::UefiSecureBoot,
            GuestFeature::Tpm,
        ] {
            ensure!(
                offered.contains(&feature),
                "the set-up step installs ovmf and swtpm, and libvirt offers {offered:?}"
            );
        }
        // Nothing is on the disk: what runs is the firmware.
        two.fixture.spec.kernel_boot = None;
        two.fixture.booted_line = None;
        for firmware in [Firmware::Uefi, Firmware::UefiSecureBoot] {
            two.fixture.spec.firmware = firmware;
            two.fixture.spec.tpm = true;
            let pair = two.pair();
            let vm = pair.make().await?;
            says(&two.source, vm.id, "BdsDxe").await?;
            let nvram = format!("/var/lib/libvirt/qemu/nvram/{}_VARS.fd", vm.id);
            let state = format!("/var/lib/libvirt/swtpm/{}", vm.id);
            let own = |host: &InHost| [&nvram, &state].map(|path| host.outside(Path::new(path)).exists());
            ensure!(
                own(&two.source) == [true, true],
                "at the source: {:?}",
                own(&two.source)
            );
            two.source.migrate(&pair.order(&vm)).await?;
            ensure!(
                state_is(&two, vm.id).await? == (None, Some(DomainState::Running)),
                "it has not moved"
            );
            ensure!(
                own(&two.destination) == [true, true],
                "NVRAM and TPM did not come along"
            );
            // As the agent tidies up, when it knows that the VM has moved.
            two.source.delete_volumes(vm.id, true).await?;
            ensure!(
                own(&two.source) == [false, false],
                "left at the source: {:?}",
                own(&two.source)
            );
            pair.remove(vm.id).await?;
            ensure!(own(&two.destination) == [false, false], "left at the destination");
        }
        Ok(())
    })
    .await
}

async fn state_is(two: &Two, id: VmId) -> anyhow::Result<(Option<DomainState>, Option<DomainState>)> {
    Ok((state(&two.source, id).await?, state(&two.destination, id).await?))
}
