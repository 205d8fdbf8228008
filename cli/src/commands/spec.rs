//! Makes a VM of flags or of a file.

use std::{io::Read as _, path::Path};

use dalgu_proto::v1;

use crate::{
    args::vm::{CreateArgs, SpecArgs},
    exit::Error,
    output::json,
};

/// Memory of a VM for which none is asked, in MiB.
const DEFAULT_MEMORY_MIB: u64 = 256;

/// The VM to be created.
pub fn vm(args: &CreateArgs) -> Result<v1::Vm, Error> {
    let Some(path) = &args.spec.file else {
        return Ok(v1::Vm {
            name: args.name.clone().unwrap_or_default(),
            spec: Some(flags(&args.spec)),
            labels: args.labels.iter().cloned().collect(),
            description: args.description.clone().unwrap_or_default(),
            ..Default::default()
        });
    };
    let read = file(path)?;
    // What `dalgu vm show` prints of another VM may be given: only what a caller may choose is taken.
    let vm = v1::Vm {
        name: args.name.clone().unwrap_or(read.name),
        spec: read.spec,
        labels: read.labels,
        description: read.description,
        ..Default::default()
    };
    if vm.name.is_empty() {
        return Err(Error::Usage(format!(
            "{} gives no name: write `dalgu vm create NAME -f FILE`",
            path.display()
        )));
    }
    Ok(vm)
}

/// The specification alone.
pub fn of(args: &SpecArgs) -> Result<v1::VmSpec, Error> {
    match &args.file {
        Some(path) => Ok(file(path)?.spec.unwrap_or_default()),
        None => Ok(flags(args)),
    }
}

fn flags(args: &SpecArgs) -> v1::VmSpec {
    let kernel_boot = args.kernel.as_ref().map(|kernel| v1::KernelBoot {
        kernel: kernel.clone(),
        initrd: args.initrd.clone().unwrap_or_default(),
        cmdline: args.cmdline.clone().unwrap_or_default(),
    });
    v1::VmSpec {
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
    }
}

fn file(path: &Path) -> Result<v1::Vm, Error> {
    let text = if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(path)
    };
    let text = text.map_err(|error| Error::Usage(format!("cannot read {}: {error}", path.display())))?;
    json::read(&text).map_err(|why| Error::Usage(format!("{} does not hold a VM: {why}", path.display())))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command, vm::VmCommand};

    fn create(args: &[&str]) -> Result<v1::Vm, Error> {
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
