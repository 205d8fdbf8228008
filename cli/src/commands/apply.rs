//! `dalgu apply`: compares what files declare with what is there, shows the difference, and makes the calls that bring it about.
//! Each call bears the etag of the object that was compared, so that nothing is changed but what was shown.

use std::io::{BufRead as _, IsTerminal as _};

use serde_json::Value;
use tonic::Code;

use super::{Session, vm};
use crate::{args::apply::ApplyArgs, exit::Error, output::human};

mod diff;
mod kind;
mod normal;
mod object;
mod said;
mod work;

use diff::Difference;
use kind::Declared;
use object::Object;

/// What is to be done with one object.
enum Step {
    /// It is as declared; here is what is there.
    Nothing(Declared),
    /// It is not there.
    Create(Declared),
    /// It is otherwise.
    Update(Box<Update>),
}

/// A change of an object that is there.
struct Update {
    /// What was compared, and shown.
    there: Declared,
    /// What was declared.
    wanted: Value,
    /// What changes.
    differences: Vec<Difference>,
    /// Names of the fields for the call.
    mask: Vec<String>,
}

/// Does the command.
pub async fn run(args: ApplyArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let mut objects = Vec::new();
    for path in &args.files {
        let text = super::spec::text(path)?;
        let read = object::read(&text).map_err(|why| Error::Usage(format!("{}: {why}", path.display())))?;
        objects.extend(read);
    }
    let mut steps = Vec::new();
    for object in object::in_order(objects)? {
        steps.push(step(object, session).await?);
    }
    let changes = show(&steps, session)?;
    if changes == 0 || args.dry_run {
        return Ok(());
    }
    if !args.yes && !confirmed(session)? {
        return Err(Error::Usage("nothing was changed".to_owned()));
    }
    work::carry_out(steps, &args, session).await
}

/// Compares an object with what is there.
async fn step(object: Object, session: &Session<'_>) -> Result<Step, Error> {
    let there = match object.declared.current(&session.client).await {
        Ok(there) => there,
        Err(status) if status.code() == Code::NotFound => {
            object.wanted(None)?;
            return Ok(Step::Create(object.declared));
        }
        Err(status) => return Err(status.into()),
    };
    let wanted = object.wanted(Some(&there))?;
    if let Some(hindrance) = there.hindrance() {
        return Err(Error::NotNow(hindrance));
    }
    let differences = diff::differences(&there.value()?, &wanted);
    if differences.is_empty() && there.deleted().is_none() {
        return Ok(Step::Nothing(there));
    }
    let (mask, fixed) = there.kind().mask(&differences);
    if !fixed.is_empty() {
        return Err(Error::Usage(format!(
            "{} exists already and its {} cannot be changed: delete it first, or take that out of the file",
            there.title(),
            fixed.join(", ")
        )));
    }
    Ok(Step::Update(Box::new(Update {
        there,
        wanted,
        differences,
        mask,
    })))
}

/// Shows what is to be done; how many objects change.
fn show(steps: &[Step], session: &mut Session<'_>) -> Result<usize, Error> {
    let (mut created, mut updated, mut same) = (0, 0, 0);
    for step in steps {
        match step {
            Step::Nothing(there) => {
                same += 1;
                say_waits(there, session)?;
            }
            Step::Create(object) => {
                created += 1;
                session.term.print(&format!("+ {}\n", object.title()))?;
            }
            Step::Update(update) => {
                updated += 1;
                let mut text = format!("~ {}\n", update.there.title());
                if let Some(time) = update.there.deleted() {
                    text += &format!("  - deleteTime: {time} (its deletion is taken back)\n");
                }
                for difference in &update.differences {
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

/// Says what a VM that is as declared does not have yet.
fn say_waits(there: &Declared, session: &mut Session<'_>) -> Result<(), Error> {
    match there {
        Declared::Vm(vm) if vm::pending(vm).next().is_some() => {
            session.term.say(&format!(
                "{} is as declared, but does not have all of it yet",
                there.title()
            ))?;
            vm::say_pending(vm, session)
        }
        _ => Ok(()),
    }
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
