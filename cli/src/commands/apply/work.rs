//! Carries out what was shown: makes what is not there, changes what is otherwise, and waits for the VMs.

use std::{collections::BTreeMap, time::Duration};

use dalgu_proto::v1;
use serde_json::Value;

use super::{
    Step, Update, diff,
    kind::{self, Declared, Kind},
};
use crate::{
    args::apply::ApplyArgs,
    commands::{Session, host, vm},
    exit::Error,
    output::human,
    progress,
};

/// How often a change is tried again that another came before, of what was not shown.
const ATTEMPTS: u32 = 4;

/// What was done so far that counts for what comes after.
#[derive(Default)]
struct Work {
    /// Volumes that were grown, and their sizes in MiB: VMs that have them were changed with them.
    grown: BTreeMap<String, u64>,
    /// VMs that are being made.
    operations: Vec<v1::Operation>,
    /// VMs that were changed.
    changed: Vec<v1::Vm>,
}

/// Does all steps.
pub async fn carry_out(steps: Vec<Step>, args: &ApplyArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let rest = make_groups(steps, session).await?;
    let mut work = Work::default();
    for step in rest {
        match step {
            Step::Nothing(_) => {}
            Step::Create(object) => {
                let title = object.kind().title();
                let (name, operation) = object.create(args.wait.limit(), session).await?;
                match operation {
                    Some(operation) => work.operations.push(operation),
                    None => done("made", title, &name, session)?,
                }
            }
            Step::Update(update) => work.update(*update, session).await?,
        }
    }
    work.wait(args, session).await
}

/// Makes all groups that are not there: first without the rules that name another of them, so that those who name each other, and
/// those who are there and come to name one, find it. Answers what is left to do.
async fn make_groups(steps: Vec<Step>, session: &mut Session<'_>) -> Result<Vec<Step>, Error> {
    let (mut groups, mut rest) = (Vec::new(), Vec::new());
    for step in steps {
        match step {
            Step::Create(Declared::SecurityGroup(group)) => groups.push(group),
            step => rest.push(step),
        }
    }
    let missing: Vec<_> = groups.iter().map(|group| group.name.clone()).collect();
    for group in &groups {
        let first = Declared::SecurityGroup(kind::without_rules_for(group, &missing));
        let (name, _) = first.create(Duration::ZERO, session).await?;
        done("made", Kind::SecurityGroup.title(), &name, session)?;
    }
    for group in groups {
        if kind::without_rules_for(&group, &missing).rules != group.rules {
            let group = Declared::SecurityGroup(group);
            group.update(vec!["rules".to_owned()], session).await?;
        }
    }
    Ok(rest)
}

impl Work {
    async fn update(&mut self, update: Update, session: &mut Session<'_>) -> Result<(), Error> {
        let kind = update.there.kind();
        let name = update.there.name().to_owned();
        let mut there = update.there.clone();
        if there.deleted().is_some() {
            there = there.undelete(session).await?;
            done("took back the deletion of", kind.title(), &name, session)?;
        }
        if update.mask.is_empty() {
            return Ok(());
        }
        match self.changed(&update, there, session).await? {
            Declared::Volume(volume) if update.mask.iter().any(|field| field == "size_mib") => {
                self.grown.insert(volume.name.clone(), volume.size_mib);
            }
            Declared::Vm(vm) => self.changed.push(*vm),
            _ => {}
        }
        done("changed", kind.title(), &name, session)
    }

    /// Changes an object; again where another change came before, if all that was shown is still so.
    async fn changed(
        &self,
        update: &Update,
        mut there: Declared,
        session: &mut Session<'_>,
    ) -> Result<Declared, Error> {
        let kind = there.kind();
        let shown = self.expected(&update.there)?;
        let mut attempt = 1;
        loop {
            let current = there.value()?;
            let mut object = diff::merged(&current, &update.wanted);
            kind.keep_chosen(&mut object);
            // What was compared is what is changed.
            object["etag"] = current["etag"].clone();
            let object = Declared::from_value(kind, object)?;
            match object.update(update.mask.clone(), session).await {
                Err(error) if host::overtaken(&error) && attempt < ATTEMPTS => {
                    there = there.current(&session.client).await?;
                    let mut now = there.value()?;
                    kind.keep_chosen(&mut now);
                    if now != shown || there.hindrance().is_some() || there.deleted().is_some() {
                        return Err(error);
                    }
                    attempt += 1;
                }
                outcome => return outcome,
            }
        }
    }

    /// What an object that was shown is to be found as, after what was done since.
    fn expected(&self, shown: &Declared) -> Result<Value, Error> {
        let mut value = shown.value()?;
        shown.kind().keep_chosen(&mut value);
        let disks = value.pointer_mut("/spec/disks").and_then(Value::as_array_mut);
        for disk in disks.into_iter().flatten() {
            let volume = disk.get("volume").and_then(Value::as_str);
            if let Some(size_mib) = volume.and_then(|volume| self.grown.get(volume)) {
                disk["sizeMib"] = size_mib.to_string().into();
            }
        }
        Ok(value)
    }

    /// Waits for the VMs, and says what those that were changed do not have yet.
    async fn wait(self, args: &ApplyArgs, session: &mut Session<'_>) -> Result<(), Error> {
        let limit = args.wait.limit();
        for operation in self.operations {
            if args.wait.no_wait {
                session.accepted(&operation)?;
                continue;
            }
            let operation = progress::wait(&session.client, operation, limit, session.term).await?;
            session.ended(operation).await?;
        }
        for mut changed in self.changed {
            let observed = changed
                .status
                .as_ref()
                .map_or(0, |status| status.observed_generation);
            if !args.wait.no_wait && observed < changed.generation {
                changed = vm::carried_out(changed, limit, session).await?;
            }
            if vm::pending(&changed).next().is_some() {
                let name = human::clean(&changed.name);
                session
                    .term
                    .say(&format!("VM {name} does not have all of it yet"))?;
                vm::say_pending(&changed, session)?;
            }
        }
        Ok(())
    }
}

fn done(what: &str, title: &str, name: &str, session: &mut Session<'_>) -> Result<(), Error> {
    Ok(session
        .term
        .say(&format!("{what} {title} {}", human::clean(name)))?)
}
