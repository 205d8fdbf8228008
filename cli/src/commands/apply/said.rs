//! What a file says, field by field. The API's JSON form leaves out what is empty, 0 or false; a file that says so means it, so
//! here it is kept. Pure.

use prost_reflect::{FieldDescriptor, Kind, MessageDescriptor};
use serde_json::{Map, Value};
use serde_norway::Value as Raw;

/// The fields that were written, in the canonical form: `canonical` is all of it in that form, without what is empty.
pub fn said(message: &MessageDescriptor, raw: &Raw, canonical: &Value, path: &str) -> Result<Value, String> {
    let mut fields = Map::new();
    for (key, raw) in raw.as_mapping().into_iter().flatten() {
        let key = key.as_str().unwrap_or_default();
        let field = message.get_field_by_json_name(key);
        let Some(field) = field.or_else(|| message.get_field_by_name(key)) else {
            return Err(format!("there is no field {key}"));
        };
        let path = match path {
            "" => key.to_owned(),
            path => format!("{path}.{key}"),
        };
        let value = match (canonical.get(field.json_name()), field.kind()) {
            // A list of objects of which all are commented out declares none.
            _ if raw.is_null() && !path.contains('.') => continue,
            _ if raw.is_null() => {
                return Err(format!(
                    "{path} has no value: write [], {{}}, \"\", 0 or false for none, or leave it out to keep what is there"
                ));
            }
            (None, _) => empty(&field),
            (Some(canonical), Kind::Message(part)) if !field.is_map() => parts(&part, raw, canonical, &path)?,
            (Some(canonical), _) => canonical.clone(),
        };
        fields.insert(field.json_name().to_owned(), value);
    }
    Ok(Value::Object(fields))
}

/// As [`said`], of a message or of a list of them.
fn parts(part: &MessageDescriptor, raw: &Raw, canonical: &Value, path: &str) -> Result<Value, String> {
    match (raw.as_sequence(), canonical) {
        (Some(raw), Value::Array(canonical)) => {
            let items = raw.iter().zip(canonical).enumerate().map(|(index, (raw, item))| {
                let name = item.get("name").and_then(Value::as_str);
                let name = name.map_or_else(|| index.to_string(), str::to_owned);
                said(part, raw, item, &format!("{path}[{name}]"))
            });
            Ok(Value::Array(items.collect::<Result<_, _>>()?))
        }
        (None, Value::Object(_)) => said(part, raw, canonical, path),
        // A duration or a time is a text in this form.
        _ => Ok(canonical.clone()),
    }
}

/// Nothing, of the field's kind; of an enum `null`, since no text of the form says it for all of them.
fn empty(field: &FieldDescriptor) -> Value {
    match field.kind() {
        _ if field.is_list() => Value::Array(Vec::new()),
        _ if field.is_map() => Value::Object(Map::new()),
        Kind::Bool => false.into(),
        Kind::String | Kind::Bytes => "".into(),
        Kind::Enum(_) | Kind::Message(_) => Value::Null,
        _ => 0.into(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::output::json as form;

    fn of(text: &str) -> Result<Value, String> {
        let raw: Raw = serde_norway::from_str(text).unwrap();
        let canonical = form::canonical("dalgu.v1.Declaration", raw.clone())?;
        said(&form::named("dalgu.v1.Declaration"), &raw, &canonical, "")
    }

    #[test]
    fn what_is_written_as_nothing_is_said_and_what_is_not_written_is_not() {
        let text = "
security_groups: [{name: web, rules: [], labels: {}, description: ''}]
backupSchedules: [{name: nightly, paused: false, keep_days: 0, every: 900s}]
vms:
- name: shop
  drainMode: DRAIN_MODE_UNSPECIFIED
  spec:
    memory_mib: 512
    maxMemoryMib: 0
    tpm: false
    disks: [{name: root, limits: {readMibPerSecond: 0, writeMibPerSecond: 7}}, {name: data, limits: {}}]
volumes:
";
        let disks = json!([
            {"name": "root", "limits": {"readMibPerSecond": 0, "writeMibPerSecond": "7"}},
            {"name": "data", "limits": {}},
        ]);
        let wanted = json!({
            "securityGroups": [{"name": "web", "rules": [], "labels": {}, "description": ""}],
            "backupSchedules": [{"name": "nightly", "paused": false, "keepDays": 0, "every": "900s"}],
            "vms": [{
                "name": "shop",
                "drainMode": null,
                "spec": {"memoryMib": "512", "maxMemoryMib": 0, "tpm": false, "disks": disks},
            }],
        });
        assert_eq!(of(text), Ok(wanted));
    }

    #[test]
    fn a_field_without_a_value_is_refused_by_its_path() {
        for (text, path) in [
            (
                "securityGroups: [{name: web, rules: }]",
                "securityGroups[web].rules has no value",
            ),
            (
                "vms: [{name: a, spec: {nics: [{name: eth0, mac: ~}]}}]",
                "vms[a].spec.nics[eth0].mac has no value",
            ),
        ] {
            let error = of(text).unwrap_err();
            assert!(error.starts_with(path), "{error}");
        }
    }
}
