//! Objects as files say them: read, and in the form in which the controller would say them.

use serde::Deserialize as _;
use serde_json::Value;
use serde_norway::Value as Raw;

use super::{
    diff::{self, is_nothing},
    kind::{Declared, Kind},
    said::said,
};
use crate::{exit::Error, output::json};

const DECLARATION: &str = "dalgu.v1.Declaration";

/// An object of a file.
#[derive(Debug)]
pub struct Object {
    /// As a message, in which nothing tells an empty field from one that was not said.
    pub declared: Declared,
    /// What was said.
    said: Value,
}

/// The objects of a file's documents.
pub fn read(text: &str) -> Result<Vec<Object>, String> {
    let mut objects = Vec::new();
    for document in serde_norway::Deserializer::from_str(text) {
        let raw = Raw::deserialize(document).map_err(|error| error.to_string())?;
        if raw.is_null() {
            continue;
        }
        let canonical = json::canonical(DECLARATION, raw.clone())?;
        let mut said = said(&json::named(DECLARATION), &raw, &canonical, "")?;
        for (kind, list) in Kind::LISTS {
            let list = said.get_mut(list).and_then(Value::as_array_mut);
            for item in list.into_iter().flat_map(std::mem::take) {
                objects.push(Object::new(kind, item)?);
            }
        }
    }
    Ok(objects)
}

/// The objects in the order in which they can be made: each after what it names.
pub fn in_order(mut all: Vec<Object>) -> Result<Vec<Object>, Error> {
    all.sort_by_key(|object| object.declared.kind());
    for (index, Object { declared, .. }) in all.iter().enumerate() {
        let twin = |other: &Object| {
            (other.declared.kind(), other.declared.name()) == (declared.kind(), declared.name())
        };
        if all[..index].iter().any(twin) {
            return Err(Error::Usage(format!("{} is declared twice", declared.title())));
        }
    }
    Ok(all)
}

impl Object {
    /// What only the controller says is passed over: what `-o yaml` shows may be given back.
    fn new(kind: Kind, mut said: Value) -> Result<Self, String> {
        kind.keep_chosen(&mut said);
        leave_to_controller(kind, &mut said);
        let declared = Declared::from_value(kind, said.clone()).map_err(|error| error.to_string())?;
        Ok(Self { declared, said })
    }

    /// What is declared, in the form in which the controller would say it. Of an object that is there a declaration need not say more
    /// than what is to be otherwise: what a new one could not do without is what `there` says.
    pub fn wanted(&self, there: Option<&Declared>) -> Result<Value, Error> {
        let title = self.declared.title();
        let refused = |why: String| Error::Usage(format!("{title}: {why}"));
        for name in self.declared.kind().never_empty() {
            if self.said.get(name).is_some_and(|value| is_nothing(name, value)) {
                return Err(refused(format!(
                    "{name} cannot be empty or 0: write what it is to be, or leave it out to keep what it is"
                )));
            }
        }
        let normal = match (self.declared.normal(), there) {
            (Err(_), Some(there)) => self.completed(there)?.normal(),
            (alone, _) => alone,
        };
        let normal = normal.map_err(|error| refused(error.to_string()))?;
        let normal = normal.value()?;
        let mut value = diff::normalized(&self.said, &normal);
        // Documents are shown by nobody: what can be compared is what is said in their place.
        let told = normal.pointer("/spec/firstBoot");
        if let (Some(said), Some(told)) = (value.pointer_mut("/spec/firstBoot"), told) {
            *said = told.clone();
        }
        Ok(value)
    }

    /// What is declared, and for the rest what is there.
    fn completed(&self, there: &Declared) -> Result<Declared, Error> {
        let mut there = there.value()?;
        if self.said.pointer("/spec/firstBoot").is_some()
            && let Some(spec) = there.get_mut("spec").and_then(Value::as_object_mut)
        {
            // The digests of its documents are not those of the declared ones.
            spec.remove("firstBoot");
        }
        Declared::from_value(self.declared.kind(), diff::merged(&there, &self.said))
    }
}

/// Takes out what is said to be empty where that leaves the choice to the controller, or what is there as it is: it is as good as
/// not said.
fn leave_to_controller(kind: Kind, said: &mut Value) {
    fn leave(object: &mut Value, names: &[&str]) {
        if let Some(fields) = object.as_object_mut() {
            fields.retain(|name, value| !(names.contains(&name.as_str()) && is_nothing(name, value)));
        }
    }
    fn items<'a>(said: &'a mut Value, pointer: &str) -> impl Iterator<Item = &'a mut Value> {
        let list = said.pointer_mut(pointer).and_then(Value::as_array_mut);
        list.into_iter().flatten()
    }
    match kind {
        Kind::Network => {
            if let Some(overlay) = said.get_mut("overlay") {
                leave(overlay, &["vni"]);
            }
        }
        Kind::Volume => leave(said, &["sizeMib", "cloneMode"]),
        Kind::Vm => {
            if let Some(spec) = said.get_mut("spec") {
                leave(spec, &["firmware"]);
            }
            items(said, "/spec/nics").for_each(|nic| leave(nic, &["mac", "ipv4Address", "ipv6Address"]));
            for disk in items(said, "/spec/disks") {
                leave(disk, &["pool", "sizeMib", "cloneMode"]);
                // A volume says these for itself.
                if disk
                    .get("volume")
                    .is_some_and(|volume| !is_nothing("volume", volume))
                {
                    leave(disk, &["image", "format"]);
                }
            }
        }
        Kind::SecurityGroup | Kind::BackupSchedule | Kind::PlacementGroup => {}
    }
}

#[cfg(test)]
mod tests;
