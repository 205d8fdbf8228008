//! Makes a VM of flags or of a file.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
};

use dalgu_proto::v1;

use crate::{
    args::{
        values::Numa,
        vm::{CreateArgs, FirstBootArgs, FittingArgs, SpecArgs},
    },
    exit::Error,
    output::{human, json},
};

/// Memory of a VM for which none is asked, in MiB.
const DEFAULT_MEMORY_MIB: u64 = 256;

/// How the MAC addresses begin that Dalgu makes.
const GENERATED_MAC: &str = "52:54:00:";

/// The VM to be created, and what the user should know of it.
pub fn vm(args: &CreateArgs) -> Result<(v1::Vm, Option<String>), Error> {
    let Some(path) = &args.spec.file else {
        let vm = v1::Vm {
            name: args.name.clone().unwrap_or_default(),
            spec: Some(flags(&args.spec)?),
            labels: args.labels.iter().cloned().collect(),
            description: args.description.clone().unwrap_or_default(),
            drain_mode: args
                .drain_mode
                .map_or(v1::DrainMode::Unspecified, Into::into)
                .into(),
            placement_groups: args.placement.groups.clone(),
            tolerations: args.placement.tolerations.clone(),
            ..Default::default()
        };
        return Ok((vm, None));
    };
    let mut read = file(path)?;
    let copied = args
        .name
        .as_ref()
        .is_some_and(|name| !read.name.is_empty() && *name != read.name);
    let dropped = match &mut read.spec {
        Some(spec) if copied => drop_given_addresses(spec),
        _ => Vec::new(),
    };
    let note = (!dropped.is_empty()).then(|| {
        let of = human::clean(&read.name);
        format!(
            "new addresses are given in place of those of {of}: {}",
            dropped.join(", ")
        )
    });
    // What `dalgu vm show` prints of another VM may be given: only what a caller may choose is taken.
    let vm = v1::Vm {
        name: args.name.clone().unwrap_or(read.name),
        spec: read.spec.map(|spec| fitted(spec, &args.spec.fitting)),
        labels: read.labels,
        description: read.description,
        drain_mode: args
            .drain_mode
            .map_or(read.drain_mode, |mode| v1::DrainMode::from(mode).into()),
        placement_groups: given(&args.placement.groups, read.placement_groups),
        tolerations: given(&args.placement.tolerations, read.tolerations),
        ..Default::default()
    };
    if vm.name.is_empty() {
        return Err(Error::Usage(format!(
            "{} gives no name: write `dalgu vm create NAME -f FILE`",
            path.display()
        )));
    }
    Ok((vm, note))
}

/// What flags say, else what the file says.
fn given<T: Clone>(flags: &[T], file: Vec<T>) -> Vec<T> {
    if flags.is_empty() { file } else { flags.to_vec() }
}

/// Takes out the MAC addresses that Dalgu made, and all in networks of the site: they are another VM's. Gives them with their
/// interfaces.
fn drop_given_addresses(spec: &mut v1::VmSpec) -> Vec<String> {
    let mut dropped = Vec::new();
    for nic in &mut spec.nics {
        let mut taken = vec![&mut nic.ipv4_address, &mut nic.ipv6_address];
        if nic.mac.starts_with(GENERATED_MAC) {
            taken.insert(0, &mut nic.mac);
        }
        let taken = taken
            .into_iter()
            .map(std::mem::take)
            .filter(|address| !address.is_empty());
        let taken: Vec<_> = taken.collect();
        dropped.extend(
            taken
                .iter()
                .map(|address| human::clean(&format!("{} {address}", nic.name))),
        );
    }
    dropped
}

/// The specification alone.
pub fn of(args: &SpecArgs) -> Result<v1::VmSpec, Error> {
    match &args.file {
        Some(path) => Ok(fitted(file(path)?.spec.unwrap_or_default(), &args.fitting)),
        None => flags(args),
    }
}

fn flags(args: &SpecArgs) -> Result<v1::VmSpec, Error> {
    let kernel_boot = args.kernel.as_ref().map(|kernel| v1::KernelBoot {
        kernel: kernel.clone(),
        initrd: args.initrd.clone().unwrap_or_default(),
        cmdline: args.cmdline.clone().unwrap_or_default(),
    });
    Ok(v1::VmSpec {
        vcpus: args.vcpus.unwrap_or(1),
        memory_mib: args.memory.unwrap_or(DEFAULT_MEMORY_MIB),
        disks: args.disks.clone(),
        nics: args.nics.clone(),
        kernel_boot,
        restart_policy: args
            .restart_policy
            .map_or(v1::RestartPolicy::Unspecified, Into::into)
            .into(),
        ha_tier: v1::HaTier::Unspecified.into(),
        host_selector: args.host_selector.iter().cloned().collect(),
        first_boot: first_boot(&args.first_boot)?,
        firmware: args.firmware.map_or(v1::Firmware::Unspecified, Into::into).into(),
        tpm: args.tpm,
        max_vcpus: args.max_vcpus.unwrap_or_default(),
        max_memory_mib: args.max_memory.unwrap_or_default(),
        ..fitted(v1::VmSpec::default(), &args.fitting)
    })
}

/// The specification with what the flags ask of its host; what they do not say stays.
pub fn fitted(mut spec: v1::VmSpec, args: &FittingArgs) -> v1::VmSpec {
    if let Some(policy) = args.cpu_policy {
        spec.set_cpu_policy(policy.into());
    }
    if let Some(kib) = args.huge_pages {
        spec.huge_page_kib = kib;
    }
    if let Some(Numa(policy, nodes)) = args.numa {
        spec.set_numa_policy(policy);
        spec.numa_nodes = nodes;
    }
    if !args.devices.is_empty() {
        spec.devices.clone_from(&args.devices);
    }
    spec
}

fn first_boot(args: &FirstBootArgs) -> Result<Option<v1::FirstBoot>, Error> {
    let document = |path: &Option<PathBuf>| path.as_deref().map(text).transpose();
    let mut keys = Vec::new();
    for key in &args.ssh_keys {
        keys.extend(public_keys(key)?);
    }
    let first_boot = v1::FirstBoot {
        user_data: document(&args.user_data)?.unwrap_or_default(),
        network_config: document(&args.network_config)?.unwrap_or_default(),
        ssh_authorized_keys: keys,
        hostname: args.hostname.clone().unwrap_or_default(),
        pool: args.first_boot_pool.clone().unwrap_or_default(),
        ..Default::default()
    };
    Ok((first_boot != v1::FirstBoot::default()).then_some(first_boot))
}

/// A key, or those in a file: one a line, but for comments. The file with the private one beside it has a like name, so
/// nothing is sent that is no public key's line.
fn public_keys(key: &str) -> Result<Vec<String>, Error> {
    if key.contains(' ') {
        return Ok(vec![key.to_owned()]);
    }
    let text = text(Path::new(key))?;
    let lines = text.lines().map(str::trim);
    let keys: Vec<_> = lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect();
    let public = |key: &String| ["ssh-", "ecdsa-", "sk-"].iter().any(|kind| key.starts_with(kind));
    if keys.is_empty() || !keys.iter().all(public) {
        let message = format!("{key} does not hold public keys: give a file that ends in .pub");
        return Err(Error::Usage(message));
    }
    Ok(keys)
}

fn file(path: &Path) -> Result<v1::Vm, Error> {
    let text = text(path)?;
    json::read(&text).map_err(|why| Error::Usage(format!("{} does not hold a VM: {why}", path.display())))
}

/// Reads a text; `-` for standard input.
pub fn text(path: &Path) -> Result<String, Error> {
    let text = if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(path)
    };
    text.map_err(|error| Error::Usage(format!("cannot read {}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command, vm::VmCommand};

    fn create(args: &[&str]) -> Result<v1::Vm, Error> {
        created(args).map(|(vm, _)| vm)
    }

    fn created(args: &[&str]) -> Result<(v1::Vm, Option<String>), Error> {
        let cli = Cli::try_parse_from(["dalgu", "vm", "create"].iter().chain(args)).unwrap();
        let Command::Vm(VmCommand::Create(args)) = cli.command else {
            panic!("not a create")
        };
        vm(&args)
    }

    #[test]
    fn flags_make_a_vm() {
        let vm = create(&[
            "web",
            "--vcpus",
            "2",
            "--memory",
            "1GiB",
            "--disk",
            "root=2GiB,pool=shared",
            "--nic",
            "eth0=br0",
            "--kernel",
            "vmlinuz",
            "--initrd",
            "initrd",
            "--cmdline",
            "console=ttyS0 quiet",
            "--label",
            "a=b",
            "--host-selector",
            "rack=1",
            "--restart-policy",
            "always",
            "--description",
            "shop",
        ]);
        let vm = vm.unwrap();
        let spec = vm.spec.clone().unwrap();
        assert_eq!((spec.vcpus, spec.memory_mib), (2, 1024));
        assert_eq!(spec.disks[0].pool, "shared");
        assert_eq!(spec.kernel_boot.as_ref().unwrap().cmdline, "console=ttyS0 quiet");
        assert_eq!(spec.restart_policy(), v1::RestartPolicy::Always);
        assert_eq!(
            (vm.labels["a"].as_str(), spec.host_selector["rack"].as_str()),
            ("b", "1")
        );
        assert!(dalgu_proto::vm::Spec::try_from(spec).is_ok());
    }

    #[test]
    fn files_and_flags_make_a_first_boot_and_only_where_one_is_asked_for() {
        const KEY: &str =
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ2FmRUUD/Zl3Xv5ASCkMSMZDpKpUVyNYmHnHcmyMJmM kim@city";
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let user_data = write("user", "#cloud-config\n{}\n");
        let network = write("network", "version: 2\n");
        let keys = write("keys", &format!("# two of us\n\n{KEY}\n{KEY}2\n"));
        let vm = create(&[
            "web",
            "--disk",
            "root=1GiB",
            "--user-data",
            &user_data,
            "--network-config",
            &network,
            "--ssh-key",
            KEY,
            "--ssh-key",
            &keys,
            "--hostname",
            "shop",
            "--first-boot-pool",
            "fast",
            "--firmware",
            "uefi-secure",
            "--tpm",
        ]);
        let spec = vm.unwrap().spec.unwrap();
        let told = spec.first_boot.clone().unwrap();
        assert_eq!(told.user_data, "#cloud-config\n{}\n");
        assert_eq!(
            (
                told.network_config.as_str(),
                told.hostname.as_str(),
                told.pool.as_str()
            ),
            ("version: 2\n", "shop", "fast")
        );
        assert_eq!(
            told.ssh_authorized_keys,
            [KEY.to_owned(), KEY.to_owned(), format!("{KEY}2")]
        );
        assert_eq!((spec.firmware(), spec.tpm), (v1::Firmware::UefiSecureBoot, true));
        assert!(dalgu_proto::vm::Spec::try_from(spec).is_ok());
        assert_eq!(create(&["web"]).unwrap().spec.unwrap().first_boot, None);
    }

    #[test]
    fn a_private_key_is_not_sent_and_a_file_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("id_ed25519");
        std::fs::write(&path, "-----BEGIN OPENSSH PRIVATE KEY-----\nmarker\n").unwrap();
        let private = create(&["web", "--ssh-key", path.to_str().unwrap()])
            .unwrap_err()
            .to_string();
        assert!(
            private.contains("id_ed25519") && !private.contains("marker"),
            "{private}"
        );
        for flag in ["--user-data", "--network-config", "--ssh-key"] {
            let missing = create(&["web", flag, "/nonexistent"]).unwrap_err();
            assert!(missing.to_string().contains("/nonexistent"), "{missing}");
        }
    }

    #[test]
    fn a_vm_that_was_shown_can_be_created_again_under_another_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.yaml");
        std::fs::write(&path, "name: old\nuid: x\nspec: {vcpus: 3, memoryMib: '512'}\nlabels: {a: b}\ngeneration: '7'\nstatus: {host: h1}\n").unwrap();
        let vm = create(&["new", "-f", path.to_str().unwrap()]).unwrap();
        assert_eq!(
            (vm.name.as_str(), vm.spec.unwrap().memory_mib, vm.labels.len()),
            ("new", 512, 1)
        );
        assert_eq!((vm.uid.as_str(), vm.generation, vm.status), ("", 0, None));
    }

    /// A shown VM `old` with two interfaces: `eth0` has the address Dalgu made for it, `eth1` one of its owner's choice.
    fn shown(dir: &Path) -> (String, String) {
        let nic = |name: &str, mac: &str| v1::Nic {
            name: name.into(),
            bridge: "br0".into(),
            mac: mac.into(),
            ..Default::default()
        };
        let wire = v1::VmSpec {
            vcpus: 1,
            memory_mib: 256,
            disks: vec![crate::args::values::disk("root=1GiB").unwrap()],
            nics: vec![nic("eth0", ""), nic("eth1", "02:00:00:00:00:07")],
            ..Default::default()
        };
        let mut spec = dalgu_proto::vm::Spec::try_from(wire).unwrap();
        spec.fill_in(dalgu_proto::ids::VmId::from_uuid(uuid::Uuid::from_u128(7)));
        let made = spec.nics[0].mac.clone();
        let vm = v1::Vm {
            name: "old".into(),
            spec: Some(spec.into()),
            ..Default::default()
        };
        let path = dir.join("vm.yaml");
        std::fs::write(&path, json::yaml(&vm).unwrap()).unwrap();
        (path.to_str().unwrap().to_owned(), made)
    }

    fn macs(vm: v1::Vm) -> Vec<String> {
        let nics = vm.spec.unwrap().nics.into_iter();
        nics.map(|nic| nic.mac).collect()
    }

    #[test]
    fn a_copy_does_not_take_the_mac_addresses_that_dalgu_made_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let (path, made) = shown(dir.path());
        let (vm, note) = created(&["new", "-f", &path]).unwrap();
        assert_eq!(macs(vm), ["", "02:00:00:00:00:07"]);
        let note = note.unwrap();
        assert!(
            note.contains(&format!("old: eth0 {made}")) && !note.contains("eth1"),
            "{note}"
        );
    }

    #[test]
    fn a_vm_made_again_under_its_own_name_keeps_its_mac_addresses() {
        let dir = tempfile::tempdir().unwrap();
        let (path, made) = shown(dir.path());
        for args in [&["-f", path.as_str()][..], &["old", "-f", path.as_str()]] {
            let (vm, note) = created(args).unwrap();
            assert_eq!(
                (macs(vm), note),
                (vec![made.clone(), "02:00:00:00:00:07".into()], None)
            );
        }
    }

    #[test]
    fn a_file_without_a_name_was_written_by_hand_and_is_taken_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.yaml");
        let text =
            "spec: {vcpus: 1, memoryMib: '256', nics: [{name: a, bridge: b, mac: '52:54:00:00:00:01'}]}";
        std::fs::write(&path, text).unwrap();
        let (vm, note) = created(&["new", "-f", path.to_str().unwrap()]).unwrap();
        assert_eq!((macs(vm), note), (vec!["52:54:00:00:00:01".to_owned()], None));
    }

    #[test]
    fn a_file_that_is_no_vm_is_a_usage_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.yaml");
        std::fs::write(&path, "spec: {cpus: 3}\n").unwrap();
        let error = create(&["-f", path.to_str().unwrap()]).unwrap_err();
        assert_eq!(error.code(), crate::exit::Exit::Usage);
        assert!(error.to_string().contains("cpus"), "{error}");
        assert!(matches!(create(&["-f", "/nonexistent"]), Err(Error::Usage(_))));
    }
}
