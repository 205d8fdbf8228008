//! The domain XML against libvirt's own schema, disks against the real qemu-img, and the contract on libvirt's test
//! driver. Real hosts run the contract in the lab.

mod layers;
mod storage;

use std::{collections::BTreeMap, process::Command};

use dalgu_proto::{
    host::GuestFeature,
    ids::{ClusterId, Epoch, Generation},
    vm::{
        CloneMode, Disk, DiskFormat, DiskLimits, Firmware, KernelBoot, MAX_DISK_IOPS,
        MAX_DISK_MIB_PER_SECOND, MAX_DISKS, MAX_NICS, Nic, PageSize, PciAddress, Plug, RestartPolicy, Spec,
        first_boot::{Documents, MEDIUM},
    },
};
use proptest::prelude::*;
use uuid::Uuid;

use super::{
    pins::Pinning,
    read,
    tree::Element,
    xml::{BackingModel, Cache, DiskModel, KernelModel, Model, NicModel},
    *,
};
use crate::hypervisor::{Mark, contract};

const FIRMWARE: [Firmware; 3] = [Firmware::Bios, Firmware::Uefi, Firmware::UefiSecureBoot];

fn mark() -> Mark {
    Mark {
        cluster: ClusterId::from_uuid(Uuid::from_u128(7)),
        epoch: Epoch(u64::MAX),
        generation: Generation(3),
    }
}

fn text() -> impl Strategy<Value = String> {
    // Carriage returns are left out: a parser must turn them into newlines.
    prop::string::string_regex("[\\t\\n -\u{d7ff}\u{e000}-\u{fffd}\u{10000}-\u{10ffff}]{1,20}")
        .expect("a regex")
}

/// Two older layers, and the image that is the last.
fn behind(image: Option<String>) -> Vec<BackingModel> {
    let Some(image) = image else { return Vec::new() };
    let file = |path: &str, format, image| BackingModel {
        path: path.into(),
        format,
        image,
    };
    vec![
        file("/pool/root.3.qcow2", DiskFormat::Qcow2, false),
        file("/pool/root.raw", DiskFormat::Raw, false),
        file(&image, DiskFormat::Qcow2, true),
    ]
}

prop_compose! {
    fn model()(
        (id, name, vcpus, memory_mib) in (any::<u128>(), text(), 1..255_u32, 32..1_000_000_u64),
        (more_vcpus, more_blocks) in (0..3_u32, 0..3_u64),
        disks in prop::collection::vec(
            (text(), text(), any::<bool>(), any::<bool>(), prop::option::of(text())),
            0..4,
        ),
        nics in prop::collection::vec((text(), text(), text()), 0..4),
        kernel in prop::option::of((text(), prop::option::of(text()), text())),
        (console, kvm, tpm, plugged) in (text(), any::<bool>(), any::<bool>(), any::<bool>()),
        (nvram, pinned) in (text(), prop::option::of(1..4_u32)),
        firmware in prop::sample::select(FIRMWARE.to_vec()),
        devices in prop::collection::vec((any::<u16>(), any::<u8>(), 0..32_u8, 0..8_u8), 0..3),
    ) -> Model {
        Model {
            id: Uuid::from_u128(id),
            name,
            accelerator: if kvm { Accelerator::Kvm } else { Accelerator::Tcg },
            mark: mark(),
            vcpus,
            max_vcpus: vcpus + more_vcpus,
            memory_mib,
            max_memory_mib: memory_mib + more_blocks * 2,
            disks: disks.into_iter().map(|(name, path, raw, direct, backing)| DiskModel {
                name,
                path: path.into(),
                format: if raw { DiskFormat::Raw } else { DiskFormat::Qcow2 },
                cache: if direct { Cache::None } else { Cache::Writeback },
                backing: behind(backing),
                limits: if raw { most_limits() } else { DiskLimits { write_iops: direct.then_some(1), ..DiskLimits::default() } },
            }).collect(),
            nics: nics.into_iter().map(|(name, bridge, mac)| NicModel {
                target: plugged.then(|| crate::network::names::tap(VmId::from_uuid(Uuid::from_u128(id)), &name)),
                mtu: plugged.then_some(1450),
                name,
                bridge,
                mac,
            }).collect(),
            kernel: kernel.map(|(kernel, initrd, cmdline)| KernelModel {
                kernel: kernel.into(),
                initrd: initrd.map(Into::into),
                cmdline,
            }),
            console: console.into(),
            nvram: (firmware != Firmware::Bios).then(|| nvram.into()),
            firmware,
            tpm,
            pinning: pinned.map(|nodes| pinning(vcpus, nodes)),
            devices: devices.into_iter().map(|(domain, bus, slot, function)| PciAddress { domain, bus, slot, function }).collect(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_domain_is_read_back_as_it_was_written_whatever_its_strings_hold(model in model()) {
        prop_assert_eq!(read::model(&model.to_xml().unwrap()), Ok(model));
    }
}

/// As a host of 512 processors has a VM on so many of its nodes.
fn pinning(vcpus: u32, nodes: u32) -> Pinning {
    Pinning {
        vcpus: (0..vcpus).map(|vcpu| vec![2 * vcpu]).collect(),
        nodes: (0..nodes).collect(),
        emulator: vec![1, 3, 5],
        pages: (nodes > 1).then_some(PageSize::Gib1),
    }
}

fn most_limits() -> DiskLimits {
    DiskLimits {
        read_iops: Some(MAX_DISK_IOPS),
        write_iops: Some(MAX_DISK_IOPS),
        read_mib_per_second: Some(MAX_DISK_MIB_PER_SECOND),
        write_mib_per_second: Some(MAX_DISK_MIB_PER_SECOND),
    }
}

/// A model such as the validated types allow, at its largest.
fn large(accelerator: Accelerator) -> Model {
    let id = Uuid::from_u128(u128::MAX / 3);
    let longest = |prefix: &str, index: usize| format!("{prefix}{index:0width$}", width = 15 - prefix.len());
    Model {
        id,
        name: format!("a{}", "-9".repeat(31)),
        accelerator,
        mark: mark(),
        vcpus: 254,
        max_vcpus: 254,
        memory_mib: 12_582_912,
        max_memory_mib: 12_582_912,
        disks: (0..MAX_DISKS)
            .map(|index| DiskModel {
                name: longest("d", index),
                path: format!("/var/lib/dalgu/it's <a> & \"b\"/{index}").into(),
                format: if index % 2 == 0 {
                    DiskFormat::Qcow2
                } else {
                    DiskFormat::Raw
                },
                cache: if index % 3 == 0 {
                    Cache::None
                } else {
                    Cache::Writeback
                },
                backing: behind((index % 4 == 2).then(|| format!("/store/<{index}>&.qcow2"))),
                limits: most_limits(),
            })
            .collect(),
        nics: (0..MAX_NICS)
            .map(|index| NicModel {
                name: longest("n", index),
                bridge: longest("br", index),
                mac: format!("52:54:00:00:00:{index:02x}"),
                target: None,
                mtu: None,
            })
            .collect(),
        kernel: (accelerator == Accelerator::Tcg).then(|| KernelModel {
            kernel: "/images/vm&linuz".into(),
            initrd: Some("/images/<initrd>".into()),
            cmdline: "console=ttyS0 \"'<>&'\" quiet".into(),
        }),
        console: "/var/log/dalgu/console/1.log".into(),
        firmware: Firmware::Bios,
        nvram: None,
        tpm: false,
        pinning: None,
        devices: (0..16).map(|bus| address(0xffff, bus * 17)).collect(),
    }
}

fn address(domain: u16, bus: u8) -> PciAddress {
    PciAddress {
        domain,
        bus,
        slot: 31,
        function: 7,
    }
}

#[test]
fn libvirts_schema_accepts_every_kind_of_domain() {
    let dir = tempfile::tempdir().unwrap();
    for accelerator in [Accelerator::Kvm, Accelerator::Tcg, Accelerator::Test] {
        let mut small = large(accelerator);
        small.disks.clear();
        small.nics.clear();
        small.devices = vec![address(0, 0x3b)];
        let firmware = |firmware| Model {
            firmware,
            nvram: (firmware != Firmware::Bios).then(|| "/nvram/<1>_VARS.fd".into()),
            tpm: true,
            pinning: Some(pinning(254, 2)),
            ..large(accelerator)
        };
        let roomy = Model {
            vcpus: 2,
            memory_mib: 4096,
            ..large(accelerator)
        };
        let all = FIRMWARE
            .map(firmware)
            .into_iter()
            .chain([large(accelerator), roomy, small]);
        for model in all {
            let file = dir.path().join("domain.xml");
            std::fs::write(&file, model.to_xml().unwrap()).unwrap();
            let output = Command::new("virt-xml-validate")
                .arg(&file)
                .arg("domain")
                .output()
                .expect("virt-xml-validate runs");
            let complaint = String::from_utf8_lossy(&output.stderr);
            assert!(
                output.status.success(),
                "{accelerator:?}: {complaint}\n{}",
                model.to_xml().unwrap()
            );
        }
    }
}

#[test]
fn a_pci_device_of_the_host_is_in_the_domain_by_its_address_there() {
    let mut model = large(Accelerator::Kvm);
    model.devices = vec!["0000:3b:00.1".parse().unwrap()];
    let xml = model.to_xml().unwrap();
    let device = r#"<hostdev mode="subsystem" type="pci" managed="yes"><source><address domain="0x0000" bus="0x3b" slot="0x00" function="0x1"/></source></hostdev>"#;
    assert!(xml.contains(device), "{xml}");
    // libvirt's own words besides are no other device.
    let longer = xml.replace(
        device,
        &device
            .replace("<source>", r#"<driver name="vfio"/><source>"#)
            .replace("</hostdev>", r#"<alias name="hostdev0"/></hostdev>"#),
    );
    assert_eq!(read::model(&longer).unwrap().devices, model.devices);
    let other = xml.replace("0x3b", "59");
    assert!(read::model(&other).is_err());
}

#[test]
fn the_domain_of_a_small_vm_looks_like_this() {
    let mut model = large(Accelerator::Tcg);
    model.disks.truncate(1);
    model.nics.truncate(1);
    model.devices.clear();
    let xml = model.to_xml().unwrap().replace("><", ">\n<");
    let expected = include_str!("tests/small.xml");
    assert_eq!(
        xml,
        expected.trim_end(),
        "if the change is meant, put the left side into tests/small.xml"
    );
}

#[test]
fn the_domain_of_a_vm_with_secure_boot_a_tpm_and_a_first_boot_looks_like_this() {
    let mut model = large(Accelerator::Kvm);
    model.disks.truncate(2);
    model.nics.clear();
    model.devices.clear();
    model.disks[1].name = MEDIUM.to_owned();
    model.firmware = Firmware::UefiSecureBoot;
    model.nvram = Some("/var/lib/libvirt/qemu/nvram/1_VARS.fd".into());
    model.tpm = true;
    let xml = model.to_xml().unwrap().replace("><", ">\n<");
    let expected = include_str!("tests/secure.xml");
    assert_eq!(
        xml,
        expected.trim_end(),
        "if the change is meant, put the left side into tests/secure.xml"
    );
}

#[test]
fn what_guests_can_have_is_read_from_libvirts_own_account() {
    use GuestFeature::{
        Backup, DiskChange, FirstBoot, HotChange, Numa, PciDevice, Snapshot, Tpm, Uefi, UefiSecureBoot,
        Volume, VolumeMove, VolumeSnapshot,
    };
    let account = |firmware: &str, secure: &str, backend: &str| {
        format!(
            "<domainCapabilities><os supported='yes'><enum name='firmware'>{firmware}</enum><loader supported='yes'>\
             <enum name='secure'>{secure}</enum></loader></os><devices><tpm supported='yes'><enum name='model'>\
             <value>tpm-tis</value><value>tpm-crb</value></enum><enum name='backendModel'>{backend}</enum></tpm></devices>\
             </domainCapabilities>"
        )
    };
    let (efi, no, yes) = (
        "<value>efi</value>",
        "<value>no</value>",
        "<value>yes</value><value>no</value>",
    );
    let emulator = "<value>passthrough</value><value>emulator</value>";
    let with = |own: &[_]| {
        [
            own,
            &[
                HotChange,
                Volume,
                DiskChange,
                Snapshot,
                Backup,
                VolumeMove,
                VolumeSnapshot,
                Numa,
                PciDevice,
            ],
        ]
        .concat()
    };
    for (xml, expected) in [
        (account("", no, ""), with(&[FirstBoot])),
        (account("", yes, "<value>passthrough</value>"), with(&[FirstBoot])),
        (account(efi, no, ""), with(&[FirstBoot, Uefi])),
        (
            account(efi, yes, emulator),
            with(&[FirstBoot, Uefi, UefiSecureBoot, Tpm]),
        ),
        ("<domainCapabilities/>".into(), with(&[FirstBoot])),
    ] {
        assert_eq!(read::guest_features(&xml).unwrap(), expected, "{xml}");
    }
}

#[test]
fn device_names_fit_the_kernel_and_do_not_repeat() {
    let id = Uuid::from_u128(u128::MAX);
    let nics: std::collections::BTreeSet<_> = (0..MAX_NICS).map(|index| xml::nic_target(id, index)).collect();
    assert_eq!(nics.len(), MAX_NICS);
    assert!(nics.iter().all(|name| name.len() <= 15), "{nics:?}");
    assert_eq!(
        [0, 25, 26, 27, 51, 52].map(xml::disk_target),
        ["vda", "vdz", "vdaa", "vdab", "vdaz", "vdba"]
    );
}

#[test]
fn a_mark_is_replaced_and_the_rest_of_the_domain_kept() {
    let xml = large(Accelerator::Tcg).to_xml().unwrap();
    let xml = xml.replacen(
        "</metadata>",
        "<other:app xmlns:other='urn:x' vm='1'>kept &amp; whole</other:app></metadata>",
        1,
    );
    let newer = Mark {
        epoch: Epoch(1),
        ..mark()
    };
    let changed = read::with_mark(&xml, &newer).unwrap();
    assert_eq!(
        read::model(&changed).unwrap(),
        Model {
            mark: newer,
            ..large(Accelerator::Tcg)
        }
    );
    let app = Element::parse(&changed).unwrap();
    let app = app.at(&["metadata", "other:app"]).unwrap();
    assert_eq!(
        (app.own_text().as_str(), app.attribute("vm")),
        ("kept & whole", Some("1"))
    );
    assert_eq!(changed.matches(xml::NAMESPACE).count(), 1);
}

#[test]
fn only_dalgus_own_element_is_a_mark() {
    let mut model = large(Accelerator::Tcg);
    model.disks.truncate(1);
    model.nics.truncate(2);
    let good = model.own_element().to_xml().unwrap();
    assert_eq!(read::mark(&good), Some(mark()));
    let pair = |target: &str, name: &str| (target.to_owned(), name.to_owned());
    let names = read::Names {
        disks: vec![pair("vda", "d00000000000000")],
        nics: vec![
            pair("dg55555555550", "n00000000000000"),
            pair("dgt2affec99719", "n00000000000000"),
            pair("dg55555555551", "n00000000000001"),
            pair("dgt1affec994a6", "n00000000000001"),
        ],
    };
    assert_eq!(read::names(&good, model.id), Some(names));
    for bad in [
        good.replace("dalgu:vm", "dalgu:host"),
        good.replace("epoch=", "epok="),
        good.replace("generation=\"3\"", "generation=\"three\""),
        String::new(),
    ] {
        assert_eq!(read::mark(&bad), None, "{bad}");
    }
    let xml = large(Accelerator::Tcg).to_xml().unwrap();
    assert!(
        read::model(&xml.replace("urn:dalgu:domain:1", "urn:dalgu:domain:2")).is_err(),
        "another namespace"
    );
}

#[tokio::test]
async fn the_operators_word_decides_the_accelerator() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(accel::decide(Accel::Tcg, dir.path()).await.0, Accelerator::Tcg);
    assert_eq!(accel::decide(Accel::Kvm, dir.path()).await.0, Accelerator::Kvm);
    let (_, reason) = accel::decide(Accel::Auto, dir.path()).await;
    assert!(!reason.is_empty());
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        0,
        "nothing is left behind"
    );
}

pub(super) fn disk(name: &str, pool: &str, image: Option<&str>, format: DiskFormat) -> Disk {
    Disk {
        name: name.into(),
        size_mib: 16,
        pool: pool.into(),
        image: image.map(Into::into),
        format,
        digest: None,
        clone_mode: CloneMode::Any,
        volume: None,
        limits: Default::default(),
        backup: None,
    }
}

pub(super) fn definition(disks: Vec<Disk>) -> Definition {
    let spec = Spec {
        vcpus: 1,
        memory_mib: 128,
        disks,
        nics: Vec::new(),
        kernel_boot: Some(KernelBoot {
            kernel: "k".into(),
            initrd: None,
            cmdline: String::new(),
        }),
        restart_policy: RestartPolicy::Never,
        host_selector: BTreeMap::new(),
        first_boot: None,
        firmware: Default::default(),
        tpm: false,
        max_vcpus: None,
        max_memory_mib: None,
        fitting: Default::default(),
        devices: Default::default(),
    };
    Definition {
        id: VmId::from_uuid(Uuid::new_v4()),
        name: "vm".parse().unwrap(),
        mark: mark(),
        spec,
        documents: Documents::default(),
        networks: Vec::new(),
        layers: Default::default(),
        places: Vec::new(),
        devices: Vec::new(),
    }
}

fn test_driver(dir: &Path, cluster: ClusterId) -> LibvirtConfig {
    LibvirtConfig {
        cluster,
        uri: "test:///default".into(),
        pools: vec![Pool {
            name: "local".into(),
            path: dir.join("pool"),
            shared: false,
            mounted: false,
        }],
        images_dir: dir.join("images"),
        image_store_dir: dir.join("store"),
        console_dir: dir.join("console"),
        accel: Accel::Auto,
        run_dir: dir.join("run"),
        qemu_user: None,
    }
}

fn fixture(cluster: ClusterId) -> contract::Fixture {
    let mut spec = definition(vec![disk("root", "local", None, DiskFormat::Qcow2)]).spec;
    spec.nics.push(Nic {
        name: "net0".into(),
        plug: Plug::Bridge { bridge: "br0".into() },
        mac: String::new(),
        reserved_mbit: None,
    });
    contract::Fixture {
        cluster,
        spec,
        documents: Documents::default(),
        guests_obey: true,
        // The driver opens no disks, so a start without them succeeds.
        has_volumes: false,
        image: None,
        // Its statistics are of the state only.
        other_pool: None,
        moves_running: false,
        has_usage: false,
        booted_line: None,
        patience: Duration::from_secs(10),
    }
}

#[tokio::test]
async fn libvirts_test_driver_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("pool")).unwrap();
    let cluster = ClusterId::from_uuid(Uuid::new_v4());
    let hypervisor = Libvirt::start(test_driver(dir.path(), cluster)).await.unwrap();
    hypervisor
        .connection()
        .wait_for(|connection| *connection == Connection::Up)
        .await
        .unwrap();
    let fixture = fixture(cluster);
    assert_eq!(fixture.check(&hypervisor).await, []);
    // The driver comes with a domain of its own, which is not Dalgu's.
    let foreign = hypervisor
        .list()
        .await
        .unwrap()
        .into_iter()
        .find(|domain| domain.name == "test")
        .unwrap();
    assert_eq!(
        contract::a_foreign_domain_is_not_touched(&hypervisor, &fixture, foreign.id).await,
        Ok(())
    );
}

#[tokio::test]
async fn a_disk_that_is_off_grows_where_its_domain_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = ClusterId::from_uuid(Uuid::new_v4());
    let mut config = test_driver(dir.path(), cluster);
    config.pools.push(Pool {
        name: "fast".into(),
        path: dir.path().join("fast"),
        ..config.pools[0].clone()
    });
    for pool in &config.pools {
        std::fs::create_dir(&pool.path).unwrap();
    }
    let hypervisor = Libvirt::start(config).await.unwrap();
    let mut connection = hypervisor.connection();
    connection
        .wait_for(|connection| *connection == Connection::Up)
        .await
        .unwrap();
    let fixture = contract::Fixture {
        has_volumes: true,
        ..fixture(cluster)
    };
    assert_eq!(
        contract::change::a_disk_grows_where_it_is(&hypervisor, &fixture, "fast").await,
        Ok(())
    );
}

#[test]
fn where_a_disk_is_copied_to_and_whether_that_is_whole_is_read_from_the_running_domain() {
    let mut model = large(Accelerator::Tcg);
    model.disks.truncate(1);
    let xml = model.to_xml().unwrap();
    let parts = read::parts(&xml).unwrap();
    assert_eq!(parts.disks[0].mirror, None);
    let [attached] = parts.hardware.disks.values().collect::<Vec<_>>()[..] else {
        panic!("{parts:?}");
    };
    assert_eq!(attached.limits, most_limits());
    for (ready, whole) in [("", false), (" ready='abort'", false), (" ready='yes'", true)] {
        let mirror = format!(
            "<mirror type='file' file='/fast/x.raw' format='raw' job='copy'{ready}><format type='raw'/>\
             <source file='/fast/x.raw'/></mirror><serial>"
        );
        let copied = read::parts(&xml.replacen("<serial>", &mirror, 1)).unwrap();
        assert_eq!(
            copied.disks[0].mirror,
            Some(("/fast/x.raw".into(), whole)),
            "{ready}"
        );
        assert_eq!(copied.disks[0].file, parts.disks[0].file);
        let committed = mirror.replace("'copy'", "'active-commit'");
        let other = read::parts(&xml.replacen("<serial>", &committed, 1)).unwrap();
        assert_eq!(other.disks[0].mirror, None, "another job");
    }
}

#[tokio::test]
async fn a_libvirt_that_is_not_there_is_sought_and_said_to_be_down() {
    let dir = tempfile::tempdir().unwrap();
    let config = LibvirtConfig {
        uri: format!("qemu+unix:///system?socket={}/none", dir.path().display()),
        accel: Accel::Tcg,
        ..test_driver(dir.path(), ClusterId::from_uuid(Uuid::new_v4()))
    };
    let hypervisor = Libvirt::start(config).await.unwrap();
    let mut connection = hypervisor.connection();
    let told = |connection: &Connection| matches!(connection, Connection::Down(why) if why.contains("none"));
    tokio::time::timeout(Duration::from_secs(20), connection.wait_for(told))
        .await
        .unwrap()
        .unwrap();
    assert!(matches!(hypervisor.list().await, Err(Error::Unavailable { .. })));
    assert_eq!(hypervisor.control_socket(), dir.path().join("none"));
}

/// A running domain that was changed: a hole where a disk was, memory on its way, a device of somebody else's.
#[test]
fn what_a_changed_domain_has_is_read_from_its_definition() {
    let mut model = large(Accelerator::Tcg);
    (model.vcpus, model.max_vcpus) = (2, 8);
    (model.memory_mib, model.max_memory_mib) = (256, 1025);
    model.disks.truncate(3);
    model.nics.truncate(2);
    model.devices.clear();
    let xml = model.to_xml().unwrap();
    let parts = read::parts(&xml).unwrap();
    let has = &parts.hardware;
    assert_eq!((has.vcpus, has.max_vcpus), (2, 8));
    assert_eq!(
        (has.memory_mib, has.min_memory_mib, has.max_memory_mib),
        (256, 256, 1024)
    );
    assert_eq!((has.disks.len(), has.nics.len()), (3, 2));
    let targets: Vec<_> = parts.disks.iter().map(|disk| &*disk.target).collect();
    assert_eq!(targets, ["vda", "vdb", "vdc"]);
    // libvirt gives the addresses.
    assert_eq!(has.free_ports, 3 + 2 + 4 + crate::hypervisor::SPARE_PORTS);
    let used = "<target dev='vdb'/><address type='pci' bus='0x03'/>";
    let live = xml
        .replace(
            "<requested unit=\"MiB\">0</requested>",
            "<requested unit=\"KiB\">131072</requested><current unit=\"KiB\">65536</current>",
        )
        .replace("<target dev=\"vdb\" bus=\"virtio\"/>", used);
    let has = read::parts(&live).unwrap().hardware;
    assert_eq!((has.memory_mib, has.free_ports), (256 + 64, 16));
    let asked = read::with_requested(read::parts(&live).unwrap().memory.unwrap(), 32).unwrap();
    assert!(
        asked.contains("<requested unit=\"MiB\">32</requested>") && !asked.contains("<current"),
        "{asked}"
    );
}

#[test]
fn names_in_the_metadata_skip_a_place_that_is_free() {
    let own = "<vm cluster='6f1c6c5e-5d8b-4c39-9f0e-0a4a7a6c1c55' epoch='1' generation='2' disks='root' nics='eth0'/>";
    let renewed = read::with_names(own, "root - more", "").unwrap();
    assert!(!renewed.contains("xmlns"), "{renewed}");
    let names = read::names(&renewed, Uuid::from_u128(1)).unwrap();
    let named = [("vda", "root"), ("vdc", "more")].map(|(target, name)| (target.to_owned(), name.to_owned()));
    assert_eq!((names.disks, names.nics), (named.to_vec(), vec![]));
    assert_eq!(read::mark(&renewed), read::mark(own));
}
