//! `dalgu vm update`: the VM as it is, with what was asked for changed in it.

use std::time::Duration;

use dalgu_proto::v1;
use prost_types::FieldMask;
use tokio::time::{Instant, sleep};

use crate::{
    args::{WaitArgs, values::TolerationChange, vm::UpdateArgs},
    client::CALL_TIMEOUT,
    commands::{Session, host, request_id, show::get},
    exit::Error,
    output::{self, Format, human},
};

/// How often a change is tried again that somebody else's came before.
const ATTEMPTS: u32 = 4;
/// How often it is looked at whether its host has carried a change out.
const LOOK: Duration = Duration::from_millis(250);

pub(super) async fn update(args: UpdateArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let mut attempt = 1;
    let mut vm = loop {
        let old = get(&session.client, &args.name).await?;
        let request = changed(&args, &old)?;
        let answer = session
            .change(CALL_TIMEOUT, async |client| {
                client.vms().update_vm(request.clone()).await
            })
            .await;
        // An etag or a request_id of the user's own is not replaced behind his back.
        let again = args.etag.is_none() && args.request_id.is_none() && attempt < ATTEMPTS;
        match answer {
            Err(error) if again && host::overtaken(&error) => attempt += 1,
            outcome => break outcome?,
        }
        sleep(Duration::from_millis(50)).await;
    };
    if args.wait {
        vm = carried_out(vm, args.timeout.unwrap_or(WaitArgs::DEFAULT), session).await?;
    }
    match session.format {
        Format::Table | Format::Wide => {
            session.term.say(&format!("changed {}", human::clean(&vm.name)))?;
            say_pending(&vm, session)
        }
        format => output::one(session.term, format, &vm),
    }
}

/// What a VM does not have yet of its specification.
pub fn pending(vm: &v1::Vm) -> impl Iterator<Item = &v1::PendingChange> {
    vm.status.iter().flat_map(|status| &status.pending_changes)
}

/// Says that.
pub fn say_pending(vm: &v1::Vm, session: &mut Session<'_>) -> Result<(), Error> {
    for pending in pending(vm) {
        let text = format!(
            "pending: {} is {}, to be {}: {}",
            pending.field, pending.current, pending.wanted, pending.message
        );
        session.term.say(&human::clean(&text))?;
    }
    Ok(())
}

/// Waits until the VM's host has done all that it can of what the VM is now to be.
pub async fn carried_out(vm: v1::Vm, limit: Duration, session: &Session<'_>) -> Result<v1::Vm, Error> {
    let limit = Instant::now() + limit;
    let (name, wanted) = (vm.name, vm.generation);
    loop {
        let vm: v1::Vm = get(&session.client, &name).await?;
        let status = vm.status.clone().unwrap_or_default();
        // Where a disk has not gone to its pool yet, that goes on by itself; what else is pending waits for others.
        let mut pending = status.pending_changes.iter();
        let moves = pending.any(|pending| pending.field.ends_with("].pool"));
        if status.observed_generation >= wanted && !moves {
            return Ok(vm);
        }
        let fault = status.error.filter(|error| !error.retrying);
        if let Some(fault) = fault {
            let text = format!("{name}: {} ({})", fault.message, fault.reason);
            return Err(Error::NotChanged(human::clean(&text)));
        }
        if Instant::now() >= limit {
            return Err(Error::ChangeTimedOut(human::clean(&name)));
        }
        sleep(LOOK).await;
    }
}

fn changed(args: &UpdateArgs, old: &v1::Vm) -> Result<v1::UpdateVmRequest, Error> {
    let mut new = v1::Vm {
        name: args.name.clone(),
        etag: args.etag.clone().unwrap_or_else(|| old.etag.clone()),
        ..Default::default()
    };
    let mut paths = Vec::new();
    if !args.labels.is_empty() {
        new.labels = host::changed(&old.labels, &args.labels);
        paths.push("labels");
    }
    if let Some(description) = &args.description {
        new.description.clone_from(description);
        paths.push("description");
    }
    if let Some(mode) = args.drain_mode {
        new.drain_mode = v1::DrainMode::from(mode).into();
        paths.push("drain_mode");
    }
    if !(args.join_groups.is_empty() && args.leave_groups.is_empty()) {
        new.placement_groups = groups(args, old)?;
        paths.push("placement_groups");
    }
    if !args.tolerations.is_empty() {
        new.tolerations = tolerations(&old.tolerations, &args.tolerations);
        paths.push("tolerations");
    }
    let mut spec = old.spec.clone().unwrap_or_default();
    if let Some(policy) = args.restart_policy {
        spec.restart_policy = v1::RestartPolicy::from(policy).into();
        paths.push("spec.restart_policy");
    }
    if let Some(vcpus) = args.vcpus {
        spec.vcpus = vcpus;
        paths.push("spec.vcpus");
    }
    if let Some(memory) = args.memory {
        spec.memory_mib = memory;
        paths.push("spec.memory_mib");
    }
    if let Some(most) = args.max_vcpus {
        spec.max_vcpus = most;
        paths.push("spec.max_vcpus");
    }
    if let Some(most) = args.max_memory {
        spec.max_memory_mib = most;
        paths.push("spec.max_memory_mib");
    }
    let touched = [
        args.add_disks.len(),
        args.remove_disks.len(),
        args.grow_disks.len(),
    ];
    let touched = touched
        .into_iter()
        .chain([args.move_disks.len(), args.limit_disks.len()]);
    if touched.sum::<usize>() > 0 {
        disks(args, &mut spec.disks)?;
        paths.push("spec.disks");
    }
    let touched = [
        args.add_nics.len(),
        args.remove_nics.len(),
        args.limit_nics.len(),
        args.add_nic_groups.len(),
        args.remove_nic_groups.len(),
    ];
    if touched.into_iter().sum::<usize>() > 0 {
        nics(args, &mut spec.nics)?;
        paths.push("spec.nics");
    }
    new.spec = Some(spec);
    Ok(v1::UpdateVmRequest {
        vm: Some(new),
        update_mask: Some(FieldMask {
            paths: paths.into_iter().map(str::to_owned).collect(),
        }),
        request_id: request_id(args.request_id.as_ref()),
        ignore_protection: args.ignore_protection,
    })
}

fn groups(args: &UpdateArgs, old: &v1::Vm) -> Result<Vec<String>, Error> {
    let mut groups = old.placement_groups.clone();
    for name in &args.leave_groups {
        let place = groups.iter().position(|group| group == name);
        groups.remove(place.ok_or_else(|| none(args, "placement group", name))?);
    }
    groups.extend(args.join_groups.iter().cloned());
    Ok(groups)
}

fn tolerations(old: &[v1::Toleration], changes: &[TolerationChange]) -> Vec<v1::Toleration> {
    let mut tolerations = old.to_vec();
    for change in changes {
        match change {
            TolerationChange::Add(new) => {
                tolerations.retain(|toleration| toleration != new);
                tolerations.push(new.clone());
            }
            TolerationChange::Remove(key) => tolerations.retain(|toleration| toleration.key != *key),
        }
    }
    tolerations
}

fn none(args: &UpdateArgs, what: &str, name: &str) -> Error {
    let text = format!(
        "{} has no {what} {name}: see `dalgu vm show {}`",
        args.name, args.name
    );
    Error::Usage(human::clean(&text))
}

fn known<'a>(args: &UpdateArgs, disks: &'a mut [v1::Disk], name: &str) -> Result<&'a mut v1::Disk, Error> {
    let disk = disks.iter_mut().find(|disk| disk.name == name);
    disk.ok_or_else(|| none(args, "disk", name))
}

fn disks(args: &UpdateArgs, disks: &mut Vec<v1::Disk>) -> Result<(), Error> {
    for name in &args.remove_disks {
        let place = disks.iter().position(|disk| disk.name == *name);
        disks.remove(place.ok_or_else(|| none(args, "disk", name))?);
    }
    for (name, size_mib) in &args.grow_disks {
        known(args, disks, name)?.size_mib = *size_mib;
    }
    for (name, pool) in &args.move_disks {
        known(args, disks, name)?.pool.clone_from(pool);
    }
    for (name, change) in &args.limit_disks {
        let disk = known(args, disks, name)?;
        disk.limits = change.of(disk.limits.as_ref());
    }
    disks.extend(args.add_disks.iter().cloned());
    Ok(())
}

fn nics(args: &UpdateArgs, nics: &mut Vec<v1::Nic>) -> Result<(), Error> {
    let place = |nics: &[v1::Nic], name: &str| {
        let place = nics.iter().position(|nic| nic.name == name);
        place.ok_or_else(|| none(args, "interface", name))
    };
    for name in &args.remove_nics {
        nics.remove(place(nics, name)?);
    }
    for (name, limits) in &args.limit_nics {
        let nic = place(nics, name)?;
        limits.apply(&mut nics[nic]);
    }
    for (name, group) in &args.remove_nic_groups {
        let nic = place(nics, name)?;
        let groups = &mut nics[nic].security_groups;
        let held = groups.iter().position(|held| held == group);
        groups.remove(held.ok_or_else(|| none(args, "security group", &format!("{group} on {name}")))?);
    }
    for (name, group) in &args.add_nic_groups {
        let nic = place(nics, name)?;
        let groups = &mut nics[nic].security_groups;
        if !groups.contains(group) {
            groups.push(group.clone());
        }
    }
    nics.extend(args.add_nics.iter().cloned());
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command, values, vm::VmCommand};

    fn asked(words: &[&str]) -> Result<v1::UpdateVmRequest, Error> {
        let old = v1::Vm {
            name: "web".into(),
            etag: "r7".into(),
            spec: Some(v1::VmSpec {
                vcpus: 2,
                memory_mib: 512,
                disks: vec![
                    values::disk("root=1GiB").unwrap(),
                    values::disk("data=2GiB,pool=fast").unwrap(),
                ],
                nics: vec![
                    values::network::nic("eth0=br0").unwrap(),
                    values::network::nic("eth1,network=field,ip=10.0.0.7,group=db,group=web,send=1Gbit")
                        .unwrap(),
                ],
                ..Default::default()
            }),
            ..Default::default()
        };
        let cli = Cli::try_parse_from(["dalgu", "vm", "update", "web"].iter().chain(words)).unwrap();
        let Command::Vm(VmCommand::Update(args)) = cli.command else {
            panic!("not an update")
        };
        changed(&args, &old)
    }

    #[test]
    fn devices_are_given_whole_with_what_was_asked_for_changed() {
        let request = asked(&[
            "--vcpus",
            "4",
            "--add-disk",
            "more=8MiB",
            "--grow-disk",
            "root=2GiB",
            "--remove-disk",
            "data",
            "--add-nic",
            "eth2=br1",
            "--remove-nic",
            "eth0",
            "--move-disk",
            "root=fast",
            "--limit-disk",
            "root,write-iops=500",
        ])
        .unwrap();
        let (vm, mask) = (request.vm.unwrap(), request.update_mask.unwrap());
        assert_eq!(mask.paths, ["spec.vcpus", "spec.disks", "spec.nics"]);
        let spec = vm.spec.unwrap();
        let limits = spec.disks[0].limits.unwrap();
        assert_eq!(
            (&*spec.disks[0].pool, limits.write_operations_per_second),
            ("fast", 500)
        );
        let disks: Vec<_> = spec
            .disks
            .iter()
            .map(|disk| (&*disk.name, disk.size_mib))
            .collect();
        assert_eq!(disks, [("root", 2048), ("more", 8)]);
        let nics: Vec<_> = spec.nics.iter().map(|nic| &*nic.bridge).collect();
        assert_eq!((nics, spec.vcpus, vm.etag), (vec!["", "br1"], 4, "r7".to_owned()));
    }

    #[test]
    fn an_interface_keeps_what_was_not_asked_about() {
        let request = asked(&[
            "--limit-nic",
            "eth1,receive=100Mbit,send=none",
            "--add-nic-group",
            "eth1=ssh",
            "--add-nic-group",
            "eth1=web",
            "--remove-nic-group",
            "eth1=db",
        ])
        .unwrap();
        assert_eq!(request.update_mask.unwrap().paths, ["spec.nics"]);
        let nics = request.vm.unwrap().spec.unwrap().nics;
        let wanted = "eth1,network=field,ip=10.0.0.7,group=web,group=ssh,receive=100Mbit";
        assert_eq!(
            nics,
            ["eth0=br0", wanted].map(|nic| values::network::nic(nic).unwrap())
        );
    }

    #[test]
    fn a_device_that_is_not_there_is_named_before_anything_is_asked() {
        for words in [
            ["--remove-disk", "logs"],
            ["--grow-disk", "logs=1GiB"],
            ["--move-disk", "logs=fast"],
            ["--limit-disk", "logs,none"],
            ["--remove-nic", "logs"],
            ["--limit-nic", "logs,none"],
            ["--add-nic-group", "logs=web"],
            ["--remove-nic-group", "eth0=logs"],
        ] {
            let error = asked(&words).unwrap_err();
            assert!(
                matches!(&error, Error::Usage(text) if text.contains("logs")),
                "{error}"
            );
        }
    }
}
