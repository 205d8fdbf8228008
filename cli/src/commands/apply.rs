//! `dalgu apply`: compares what files declare with what is there, shows the difference, and makes the calls that bring it about.
//! Each call bears the etag of the object that was compared, so that nothing is changed but what was shown.

use std::io::{BufRead as _, IsTerminal as _};

use dalgu_proto::{
    network,
    v1::{self, Declaration},
    vm,
};
use serde::Deserialize as _;
use serde_json::Value;
use tonic::Code;

use super::Session;
use crate::{
    args::apply::ApplyArgs,
    exit::Error,
    output::{human, json},
    progress,
};

mod diff;
mod kind;
#[cfg(test)]
mod tests;

use diff::Difference;
use kind::{Declared, Kind};

/// What is to be done with one object.
enum Step {
    /// It is as declared.
    Nothing,
    /// It is not there.
    Create(Declared),
    /// It is otherwise.
    Update {
        /// The object with what was declared put into it.
        object: Declared,
        /// What changes.
        differences: Vec<Difference>,
        /// Names of the fields for the call.
        mask: Vec<String>,
    },
}

/// Does the command.
pub async fn run(args: ApplyArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let mut declaration = Declaration::default();
    for path in &args.files {
        let text = super::spec::text(path)?;
        read(&text, &mut declaration).map_err(|why| Error::Usage(format!("{}: {why}", path.display())))?;
    }
    let mut steps = Vec::new();
    for object in declared(declaration)? {
        steps.push(step(object, session).await?);
    }
    let changes = show(&steps, session)?;
    if changes == 0 || args.dry_run {
        return Ok(());
    }
    if !args.yes && !confirmed(session)? {
        return Err(Error::Usage("nothing was changed".to_owned()));
    }
    carry_out(steps, &args, session).await
}

/// Puts a file's documents into the declaration.
fn read(text: &str, declaration: &mut Declaration) -> Result<(), String> {
    for document in serde_norway::Deserializer::from_str(text) {
        let value = serde_norway::Value::deserialize(document).map_err(|error| error.to_string())?;
        if value.is_null() {
            continue;
        }
        let more: Declaration = json::message("dalgu.v1.Declaration", value)?;
        declaration.security_groups.extend(more.security_groups);
        declaration.networks.extend(more.networks);
        declaration.vms.extend(more.vms);
        declaration.volumes.extend(more.volumes);
        declaration.backup_schedules.extend(more.backup_schedules);
    }
    Ok(())
}

/// The objects in the order in which they can be made: each after what it names.
fn declared(declaration: Declaration) -> Result<Vec<Declared>, Error> {
    let groups = declaration
        .security_groups
        .into_iter()
        .map(Declared::SecurityGroup);
    let networks = declaration
        .networks
        .into_iter()
        .map(|network| Declared::Network(Box::new(network)));
    let vms = declaration.vms.into_iter().map(|vm| Declared::Vm(Box::new(vm)));
    let volumes = declaration
        .volumes
        .into_iter()
        .map(|volume| Declared::Volume(Box::new(volume)));
    let schedules = declaration
        .backup_schedules
        .into_iter()
        .map(|schedule| Declared::BackupSchedule(Box::new(schedule)));
    let all: Vec<_> = groups
        .chain(networks)
        .chain(volumes)
        .chain(schedules)
        .chain(vms)
        .collect();
    for (index, object) in all.iter().enumerate() {
        let twin = |other: &&Declared| (other.kind(), other.name()) == (object.kind(), object.name());
        if all[..index].iter().any(|other| twin(&other)) {
            return Err(Error::Usage(format!("{} is declared twice", object.title())));
        }
    }
    Ok(all)
}

/// Compares an object with what is there.
async fn step(object: Declared, session: &Session<'_>) -> Result<Step, Error> {
    let declared = object.declared()?;
    let current = match object.current(&session.client).await {
        Ok(current) => current,
        Err(status) if status.code() == Code::NotFound => return Ok(Step::Create(object)),
        Err(status) => return Err(status.into()),
    };
    let current = current.value()?;
    let differences = diff::differences(&current, &declared);
    if differences.is_empty() {
        return Ok(Step::Nothing);
    }
    let (mask, fixed) = object.kind().mask(&differences);
    if !fixed.is_empty() {
        return Err(Error::Usage(format!(
            "{} exists already and its {} cannot be changed: delete it first, or take that out of the file",
            object.title(),
            fixed.join(", ")
        )));
    }
    let object = Declared::from_value(object.kind(), diff::merged(&current, &declared))?;
    Ok(Step::Update {
        object,
        differences,
        mask,
    })
}

/// Shows what is to be done; how many objects change.
fn show(steps: &[Step], session: &mut Session<'_>) -> Result<usize, Error> {
    let (mut created, mut updated, mut same) = (0, 0, 0);
    for step in steps {
        match step {
            Step::Nothing => same += 1,
            Step::Create(object) => {
                created += 1;
                session.term.print(&format!("+ {}\n", object.title()))?;
            }
            Step::Update {
                object, differences, ..
            } => {
                updated += 1;
                let mut text = format!("~ {}\n", object.title());
                for difference in differences {
                    text += &line(difference);
                }
                session.term.print(&text)?;
            }
        }
    }
    session.term.say(&format!(
        "{created} to make, {updated} to change, {same} as declared"
    ))?;
    Ok(created + updated)
}

fn line(difference: &Difference) -> String {
    let path = human::clean(&difference.path);
    let shown = |value: &Value| human::clean(&diff::text(value));
    match (&difference.current, &difference.wanted) {
        (Some(current), Some(wanted)) => format!("    {path}: {} -> {}\n", shown(current), shown(wanted)),
        (None, Some(wanted)) => format!("  + {path}: {}\n", shown(wanted)),
        (Some(current), None) if is_disk(&path) => {
            format!(
                "  - {path}: {} (deleted with all that is on it)\n",
                shown(current)
            )
        }
        (Some(current), None) => format!("  - {path}: {}\n", shown(current)),
        (None, None) => String::new(),
    }
}

fn is_disk(path: &str) -> bool {
    path.starts_with("spec.disks[") && path.ends_with(']')
}

/// Asks the user, where there is one.
fn confirmed(session: &mut Session<'_>) -> Result<bool, Error> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        let message = "nobody can be asked here: look at what would change with --dry-run, then add --yes";
        return Err(Error::Usage(message.to_owned()));
    }
    session.term.say("Go on? [y/N]")?;
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

async fn carry_out(steps: Vec<Step>, args: &ApplyArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let limit = args.wait.limit();
    let mut operations = Vec::new();
    // Groups that name each other can only be made without those rules at first.
    let missing: Vec<String> = steps
        .iter()
        .filter_map(|step| match step {
            Step::Create(object) if object.kind() == Kind::SecurityGroup => Some(object.name().to_owned()),
            _ => None,
        })
        .collect();
    let mut later = Vec::new();
    for step in steps {
        match step {
            Step::Nothing => {}
            Step::Create(Declared::SecurityGroup(group)) => {
                let first = kind::without_rules_for(&group, &missing);
                let whole = (first.rules != group.rules).then_some(group);
                let made = Declared::SecurityGroup(first).create(limit, session).await;
                later.extend(whole);
                done("made", "security group", &made?.0, session)?;
            }
            Step::Create(object) => {
                complete(&mut later, session).await?;
                let (title, (name, operation)) =
                    (object.kind().title(), object.create(limit, session).await?);
                match operation {
                    Some(operation) => operations.push(operation),
                    None => done("made", title, &name, session)?,
                }
            }
            Step::Update { object, mask, .. } => {
                complete(&mut later, session).await?;
                let (title, name) = (object.kind().title(), object.name().to_owned());
                object.update(mask, session).await?;
                done("changed", title, &name, session)?;
            }
        }
    }
    complete(&mut later, session).await?;
    for operation in operations {
        if args.wait.no_wait {
            session.accepted(&operation)?;
            continue;
        }
        let operation = progress::wait(&session.client, operation, limit, session.term).await?;
        session.ended(operation).await?;
    }
    Ok(())
}

/// Gives groups the rules that could not be there before all groups were.
async fn complete(later: &mut Vec<v1::SecurityGroup>, session: &mut Session<'_>) -> Result<(), Error> {
    for group in later.drain(..) {
        Declared::SecurityGroup(group)
            .update(vec!["rules".to_owned()], session)
            .await?;
    }
    Ok(())
}

fn done(what: &str, title: &str, name: &str, session: &mut Session<'_>) -> Result<(), Error> {
    Ok(session
        .term
        .say(&format!("{what} {title} {}", human::clean(name)))?)
}

/// What a VM is declared to be, as the controller would say it.
fn normal_vm(vm: &v1::Vm) -> Result<v1::Vm, vm::Invalid> {
    let spec = vm.spec.clone().map(vm::Spec::try_from).transpose()?;
    Ok(v1::Vm {
        spec: spec.map(Into::into),
        ..vm.clone()
    })
}

/// As [`normal_vm`].
fn normal_network(network: &v1::Network) -> Result<v1::Network, vm::Invalid> {
    let normal = v1::Network::from(network::Network::try_from(network.clone())?);
    Ok(v1::Network {
        labels: network.labels.clone(),
        description: network.description.clone(),
        ..normal
    })
}

/// As [`normal_vm`].
fn normal_volume(volume: &v1::Volume) -> Result<v1::Volume, vm::Invalid> {
    let disk = v1::Disk::from(vm::Disk::try_from(volume)?);
    Ok(v1::Volume {
        size_mib: disk.size_mib,
        pool: disk.pool,
        format: disk.format,
        ..volume.clone()
    })
}

/// As [`normal_vm`].
fn normal_group(group: &v1::SecurityGroup) -> Result<v1::SecurityGroup, vm::Invalid> {
    let normal = v1::SecurityGroup::from(network::Group::try_from(group.clone())?);
    Ok(v1::SecurityGroup {
        labels: group.labels.clone(),
        description: group.description.clone(),
        ..normal
    })
}
