//! The settings of a host, and how they turn a definition into a domain and an order to migrate into a transfer.
//! Called by [`super::Libvirt`], on workers only: it may block on files.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use dalgu_proto::{
    host::GuestFeature,
    ids::{ClusterId, VmId},
    vm::{Disk, Firmware, Nic},
};
use virt::connect::Connect;

use super::{
    accel::Accel,
    copies::Copies,
    error, migrate,
    pins::{self, Applied, Pinning, Places},
    read,
    snapshot::Tops,
    storage::{Pool, Storage},
    xml::{Accelerator, DiskModel, KernelModel, Model, NicModel},
};
use crate::{
    host::Root,
    hypervisor::{Definition, Error, Migrate},
    network::names,
};

/// Settings of the hypervisor.
#[derive(Debug, Clone)]
pub struct LibvirtConfig {
    /// The site; domains with another site's mark are not Dalgu's.
    pub cluster: ClusterId,
    /// Where libvirt is, for example "qemu:///system".
    pub uri: String,
    /// Directories for disks.
    pub pools: Vec<Pool>,
    /// Directory of images, kernels and initial RAM disks.
    pub images_dir: PathBuf,
    /// Directory of the copies of the catalogue's images; the same path on every host.
    pub image_store_dir: PathBuf,
    /// Directory of console logs.
    pub console_dir: PathBuf,
    /// What runs guests.
    pub accel: Accel,
    /// Directory for what need not outlive a restart.
    pub run_dir: PathBuf,
    /// User that QEMU runs as; disks are given to it. `None` leaves them to root (libvirt gives them away itself
    /// unless its `dynamic_ownership` is off).
    pub qemu_user: Option<String>,
}

/// What guests can have here.
pub(super) fn guest_features(
    connect: &Connect,
    accelerator: Accelerator,
) -> Result<Vec<GuestFeature>, Error> {
    // It is asked about the machine that domains are defined with.
    let (arch, machine) = match accelerator {
        Accelerator::Test => (None, None),
        Accelerator::Kvm | Accelerator::Tcg => (Some("x86_64"), Some("q35")),
    };
    let capabilities = connect
        .domain_capabilities(None, arch, machine, Some(accelerator.domain_type()), 0)
        .map_err(|error| error::general("about", &error))?;
    Ok(read::guest_features(&capabilities)?)
}

/// An interface: on a bridge of the host, or of a network. A guest is told the largest packet of a network, which is its bridge's.
fn nic_model(id: VmId, nic: &Nic) -> NicModel {
    let network = nic.port().map(|port| names::bridge(&port.network));
    let mtu = network.as_ref().and_then(|bridge| {
        let text = std::fs::read_to_string(format!("/sys/class/net/{bridge}/mtu")).ok()?;
        text.trim().parse().ok()
    });
    NicModel {
        name: nic.name.clone(),
        target: network.as_ref().map(|_| names::tap(id, &nic.name)),
        bridge: network.unwrap_or_else(|| nic.bridge().unwrap_or_default().to_owned()),
        mac: nic.mac.clone(),
        mtu,
    }
}

/// How a host's settings turn definitions into domains. May block on files: used on workers only.
pub(super) struct Host {
    pub(super) config: LibvirtConfig,
    pub(super) accelerator: Accelerator,
    pub(super) storage: Storage,
    /// Of disks of domains that are off.
    pub(super) copies: Copies,
    /// Disks of running domains that QEMU was told to copy: in which run of the domain, and to which file.
    pub(super) copying: Mutex<HashMap<(VmId, String), (u32, PathBuf)>>,
    /// Where fitted VMs are.
    pub(super) places: Mutex<Places>,
    /// What running domains were told of it.
    pub(super) applied: Mutex<Applied>,
}

impl Host {
    pub(super) fn copying(&self) -> MutexGuard<'_, HashMap<(VmId, String), (u32, PathBuf)>> {
        self.copying.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn places(&self) -> Places {
        self.places.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_places(&self, places: Places) {
        *self.places.lock().unwrap_or_else(PoisonError::into_inner) = places;
    }

    /// Tells what runs which processors are a VM's own.
    pub(super) fn apply_pins(&self, connect: &Connect, cluster: ClusterId) -> Result<(), Error> {
        if self.accelerator == Accelerator::Test {
            return Ok(());
        }
        let mut applied = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
        pins::apply(connect, cluster, &self.places(), &mut applied, &Root::default())
    }

    /// The same right after a start, where there is something to tell and nobody is about to. What fails is told again soon.
    pub(super) fn pin(&self, connect: &Connect, cluster: ClusterId) {
        let places = self.places();
        if places.is_empty() || self.accelerator == Accelerator::Test {
            return;
        }
        if let Ok(mut applied) = self.applied.try_lock()
            && let Err(error) = pins::apply(connect, cluster, &places, &mut applied, &Root::default())
        {
            tracing::debug!(%error, "not every domain was told yet which processors are whose");
        }
    }

    /// Where a domain is to be; on another host where its places are there.
    fn pinning(&self, definition: &Definition) -> Option<Pinning> {
        Pinning::of(
            &definition.spec,
            &definition.places,
            &self.places(),
            &Root::default(),
        )
    }

    pub(super) fn console_log(&self, id: VmId) -> PathBuf {
        self.config.console_dir.join(format!("{id}.log"))
    }

    /// The domain that a definition asks for on this host, with these files as the tops of its disks as far as they are known.
    pub(super) fn model(&self, definition: &Definition, tops: &Tops) -> Result<Model, Error> {
        let spec = &definition.spec;
        let image = |name: &String| self.config.images_dir.join(name);
        let disk = |disk: &Disk| {
            let top = match tops.get(&disk.name) {
                Some(top) => top.clone(),
                None => self.storage.likely_top(definition.id, disk, &definition.layers)?,
            };
            let chain = self.storage.chain(definition.id, disk, &top)?;
            Ok(DiskModel {
                name: disk.name.clone(),
                path: top,
                format: chain.last().map_or(disk.format, |link| link.format),
                cache: self.storage.cache(disk)?,
                backing: self.storage.behind_chain(disk, &chain),
                limits: disk.limits,
            })
        };
        let nic = |nic: &Nic| nic_model(definition.id, nic);
        Ok(Model {
            id: definition.id.uuid(),
            name: definition.name.to_string(),
            accelerator: self.accelerator,
            mark: definition.mark,
            vcpus: spec.vcpus,
            max_vcpus: spec.most_vcpus(),
            memory_mib: spec.memory_mib,
            // QEMU 10.0 without KVM ends with a failed assertion (tlb_reset_dirty_range_all) when a guest with memory that has
            // come and gone migrates, and the guest with it.
            max_memory_mib: match self.accelerator {
                Accelerator::Tcg => spec.memory_mib,
                Accelerator::Kvm | Accelerator::Test => spec.most_memory_mib(),
            },
            disks: spec.volumes().map(disk).collect::<Result<_, Error>>()?,
            nics: spec.nics.iter().map(nic).collect(),
            kernel: spec.kernel_boot.as_ref().map(|boot| KernelModel {
                kernel: image(&boot.kernel),
                initrd: boot.initrd.as_ref().map(image),
                cmdline: boot.cmdline.clone(),
            }),
            console: self.console_log(definition.id),
            firmware: spec.firmware,
            nvram: (spec.firmware != Firmware::Bios).then(|| self.storage.nvram(definition.id)),
            tpm: spec.tpm,
            pinning: self.pinning(definition),
            devices: definition.devices.iter().map(|device| device.address).collect(),
        })
    }

    pub(super) fn order(&self, migrate: &Migrate) -> Result<migrate::Order, Error> {
        let definition = &migrate.definition;
        let volumes: Vec<_> = definition.spec.volumes().collect();
        let shared = volumes
            .iter()
            .map(|disk| Ok(self.storage.pool(&disk.pool)?.shared));
        let shared = shared.collect::<Result<Vec<bool>, Error>>()?;
        let copied: Vec<_> = volumes
            .iter()
            .zip(&shared)
            .filter(|(_, shared)| !**shared)
            .collect();
        let overlay = |disk: &Disk| self.storage.behind(disk).is_some();
        // Which processors others share there, this host does not know; the VM is told when it has arrived.
        let pinning = self
            .pinning(definition)
            .map(|pinning| pinning.own(&definition.places));
        let mut model = self.model(definition, &Tops::new())?;
        model.pinning.clone_from(&pinning);
        Ok(migrate::Order {
            uri: self.config.uri.clone(),
            cluster: self.config.cluster,
            id: definition.id,
            mark: definition.mark,
            pinning,
            persistent_xml: model.to_xml()?,
            destination: migrate::destination_uri(&migrate.control)?,
            memory: migrate::stream_uri(&migrate.memory)?,
            disks: migrate::stream_uri(&migrate.disks)?,
            copies_differences: copied.iter().any(|(disk, _)| overlay(disk)),
            copied: copied.iter().map(|(disk, _)| disk.name.clone()).collect(),
            shares_disks: shared.contains(&true),
            max_downtime_ms: migrate.max_downtime_ms,
            bandwidth_mib_per_second: migrate.bandwidth_mib_per_second,
            arrives_paused: migrate.arrives_paused,
        })
    }
}
