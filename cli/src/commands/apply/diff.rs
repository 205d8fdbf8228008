//! What a declaration changes about an object. Pure, and of the API's JSON form, so that all kinds of objects are served.

use std::fmt::Write as _;

use serde_json::{Map, Value};

/// Maps of the API, of which a declaration means all entries.
const MAPS: &[&str] = &["labels", "hostSelector", "labelSelector"];

/// A field that is to be another.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    /// Path, for example `spec.disks[data].sizeMib`.
    pub path: String,
    /// What it is; `None` for nothing.
    pub current: Option<Value>,
    /// What it should be; `None` for nothing.
    pub wanted: Option<Value>,
}

/// Whether a declaration means all of a field's value, and not only the parts of it that it names: limits that are given without
/// any are none.
fn is_whole(name: &str, declared: &Map<String, Value>) -> bool {
    MAPS.contains(&name) || (name == "limits" && declared.is_empty())
}

/// Whether a value says what a field is that does not occur: nothing, 0, false.
pub fn is_nothing(name: &str, value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) if MAPS.contains(&name) => fields.is_empty(),
        Value::Object(fields) => fields.iter().all(|(name, value)| is_nothing(name, value)),
        Value::Bool(true) => false,
    }
}

/// Whether the elements of a list are told apart by names, as disks are.
fn are_named(list: &[Value]) -> bool {
    list.iter().all(|item| item.get("name").is_some())
}

fn by_name<'a>(list: &'a [Value], name: &Value) -> Option<&'a Value> {
    list.iter().find(|item| item.get("name") == Some(name))
}

/// Of what was declared only, as it should be said: `normal` says the same with all defaults, in the form in which the
/// controller answers.
pub fn normalized(declared: &Value, normal: &Value) -> Value {
    match (declared, normal) {
        (Value::Object(declared), Value::Object(normal)) => {
            let fields = declared.iter().map(|(name, value)| {
                let value = match (normal.get(name), value) {
                    (Some(normal), value) => normalized(value, normal),
                    (None, Value::Object(_)) => normalized(value, &Value::Object(Map::new())),
                    (None, value) if is_nothing(name, value) => value.clone(),
                    // Said with a word for what is so without it.
                    (None, _) => Value::Null,
                };
                (name.clone(), value)
            });
            Value::Object(fields.collect())
        }
        (Value::Array(declared), Value::Array(normal))
            if are_named(declared) && declared.len() == normal.len() =>
        {
            let items = declared.iter().zip(normal);
            Value::Array(
                items
                    .map(|(declared, normal)| normalized(declared, normal))
                    .collect(),
            )
        }
        _ => normal.clone(),
    }
}

/// What is otherwise than declared.
pub fn differences(current: &Value, declared: &Value) -> Vec<Difference> {
    let mut found = Vec::new();
    walk("", Some(current), declared, &mut found);
    found
}

fn walk(path: &str, current: Option<&Value>, declared: &Value, found: &mut Vec<Difference>) {
    match (current, declared) {
        (Some(Value::Object(current)), Value::Object(declared)) if !is_whole(last(path), declared) => {
            for (name, value) in declared {
                let path = if path.is_empty() {
                    name.clone()
                } else {
                    format!("{path}.{name}")
                };
                walk(&path, current.get(name), value, found);
            }
        }
        (current, Value::Array(declared)) if are_named(declared) && current.is_none_or(is_named_list) => {
            let current = current.and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            let inside = |item: &Value| format!("{path}[{}]", text(item.get("name").unwrap_or(&Value::Null)));
            for item in declared {
                match by_name(current, &item["name"]) {
                    Some(there) => walk(&inside(item), Some(there), item, found),
                    None => found.push(Difference {
                        path: inside(item),
                        current: None,
                        wanted: Some(item.clone()),
                    }),
                }
            }
            let gone = current
                .iter()
                .filter(|item| by_name(declared, &item["name"]).is_none());
            found.extend(gone.map(|item| Difference {
                path: inside(item),
                current: Some(item.clone()),
                wanted: None,
            }));
        }
        (None, declared) if is_nothing(last(path), declared) => {}
        (current, declared) if current == Some(declared) || is_named_version(path, current, declared) => {}
        (current, declared) => found.push(Difference {
            path: path.to_owned(),
            current: current.cloned(),
            wanted: Some(declared.clone()),
        }),
    }
}

fn is_named_list(value: &Value) -> bool {
    value.as_array().is_some_and(|list| are_named(list))
}

fn last(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// An image without a version was the newest when the disk was made.
fn is_named_version(path: &str, current: Option<&Value>, declared: &Value) -> bool {
    let (Some(Value::String(current)), Value::String(declared)) = (current, declared) else {
        return false;
    };
    let newest = || current.split_once(':').is_some_and(|(name, _)| name == declared);
    (path == "image" || path.starts_with("spec.disks[")) && last(path) == "image" && newest()
}

/// The object with what was declared put into it.
pub fn merged(current: &Value, declared: &Value) -> Value {
    fn merge(name: &str, current: &Value, declared: &Value) -> Value {
        match (current, declared) {
            (Value::Object(current), Value::Object(declared)) if !is_whole(name, declared) => {
                let mut all: Map<_, _> = current.clone();
                for (name, value) in declared {
                    let old = current.get(name).unwrap_or(&Value::Null);
                    all.insert(name.clone(), merge(name, old, value));
                }
                Value::Object(all)
            }
            (Value::Array(current), Value::Array(declared)) if are_named(current) && are_named(declared) => {
                let items = declared.iter().map(|item| {
                    let old = by_name(current, &item["name"]).unwrap_or(&Value::Null);
                    merge("", old, item)
                });
                Value::Array(items.collect())
            }
            _ => declared.clone(),
        }
    }
    merge("", current, declared)
}

/// A value on one line.
pub fn text(value: &Value) -> String {
    match value {
        Value::Null => "default".to_owned(),
        Value::String(text) if text.is_empty() => "\"\"".to_owned(),
        Value::String(text) => text.clone(),
        Value::Object(fields) => {
            let mut line = String::new();
            for (name, value) in fields {
                let comma = if line.is_empty() { "" } else { ", " };
                // Writing to a String cannot fail.
                let _ = write!(line, "{comma}{name}: {}", text(value));
            }
            format!("{{{line}}}")
        }
        Value::Array(items) => format!("[{}]", items.iter().map(text).collect::<Vec<_>>().join(", ")),
        value => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn paths(current: &Value, declared: &Value) -> Vec<String> {
        differences(current, declared)
            .into_iter()
            .map(|found| found.path)
            .collect()
    }

    #[test]
    fn what_is_not_declared_is_left_as_it_is() {
        let current = json!({"name": "web", "uid": "x", "spec": {"vcpus": 1, "memoryMib": "512"}});
        assert_eq!(
            differences(&current, &json!({"name": "web", "spec": {"vcpus": 1}})),
            []
        );
        let changed = differences(&current, &json!({"spec": {"vcpus": 2}}));
        assert_eq!(
            changed,
            [Difference {
                path: "spec.vcpus".into(),
                current: Some(json!(1)),
                wanted: Some(json!(2)),
            }]
        );
    }

    #[test]
    fn things_with_names_are_compared_one_by_one() {
        let current = json!({"spec": {"disks": [
            {"name": "root", "sizeMib": "1", "pool": "local"},
            {"name": "old", "sizeMib": "2"},
        ]}});
        let declared = json!({"spec": {"disks": [{"name": "root", "sizeMib": "3"}, {"name": "new"}]}});
        assert_eq!(
            paths(&current, &declared),
            ["spec.disks[root].sizeMib", "spec.disks[new]", "spec.disks[old]"]
        );
        let merged = merged(&current, &declared);
        assert_eq!(
            merged,
            json!({"spec": {"disks": [{"name": "root", "sizeMib": "3", "pool": "local"}, {"name": "new"}]}})
        );
        assert_eq!(paths(&merged, &declared), [] as [String; 0]);
        assert_eq!(
            paths(&json!({"spec": {}}), &declared),
            ["spec.disks[root]", "spec.disks[new]"]
        );
    }

    #[test]
    fn of_labels_and_of_lists_without_names_all_is_meant() {
        let current = json!({"labels": {"a": "1", "b": "2"}, "rules": [{"firstPort": 22}]});
        assert_eq!(paths(&current, &json!({"labels": {"a": "1"}})), ["labels"]);
        assert_eq!(
            merged(&current, &json!({"labels": {"a": "1"}}))["labels"],
            json!({"a": "1"})
        );
        assert_eq!(
            paths(&current, &json!({"rules": [{"firstPort": 22}]})),
            [] as [String; 0]
        );
        assert_eq!(paths(&current, &json!({"rules": []})), ["rules"]);
    }

    #[test]
    fn an_image_without_a_version_is_the_one_that_the_disk_was_made_from() {
        let current = json!({"spec": {"disks": [{"name": "root", "image": "debian:12"}]}});
        let declared = |image: &str| json!({"spec": {"disks": [{"name": "root", "image": image}]}});
        assert_eq!(paths(&current, &declared("debian")), [] as [String; 0]);
        assert_eq!(paths(&current, &declared("debian:12")), [] as [String; 0]);
        for other in ["debian:13", "deb", "alpine"] {
            assert_eq!(
                paths(&current, &declared(other)),
                ["spec.disks[root].image"],
                "{other}"
            );
        }
    }

    #[test]
    fn what_is_declared_as_nothing_is_otherwise_than_what_is_there() {
        let current = json!({"rules": [{"firstPort": 22}], "paused": true, "keepDays": 30, "description": "old", "labels": {"a": ""},
        "spec": {"firmware": "FIRMWARE_UEFI", "disks": [
            {"name": "root", "limits": {"readMibPerSecond": "5"}}, {"name": "data", "limits": {"readMibPerSecond": "5"}},
        ]}});
        let declared = json!({"rules": [], "paused": false, "keepDays": 0, "description": "", "labels": {},
        "spec": {"firmware": null, "disks": [
            {"name": "root", "limits": {"readMibPerSecond": 0}}, {"name": "data", "limits": {}},
        ]}});
        let wanted = [
            "rules",
            "paused",
            "keepDays",
            "description",
            "labels",
            "spec.firmware",
            "spec.disks[root].limits.readMibPerSecond",
            "spec.disks[data].limits",
        ];
        let mut found = paths(&current, &declared);
        found.sort_by_key(|path| wanted.iter().position(|other| other == path));
        assert_eq!(found, wanted);
        let merged = merged(&current, &declared);
        assert_eq!(paths(&merged, &declared), [] as [String; 0]);
        assert_eq!(merged["spec"]["disks"][1]["limits"], json!({}));
        let bare = json!({"spec": {"disks": [{"name": "root"}, {"name": "data"}]}});
        assert_eq!(paths(&bare, &declared), [] as [String; 0]);
        // A label without a value is a label.
        assert_eq!(paths(&bare, &json!({"labels": {"a": ""}})), ["labels"]);
    }

    #[test]
    fn only_what_was_declared_is_kept_of_the_normal_form() {
        let declared = json!({"mac": "52:54:00:AB:00:01", "rules": [{"cidr": "192.0.2.7"}]});
        let rules = json!([{"cidr": "192.0.2.7/32", "lastPort": 22}]);
        let normal = json!({"mac": "52:54:00:ab:00:01", "mtu": 1450, "rules": rules});
        // A rule is compared as a whole.
        let wanted = json!({"mac": "52:54:00:ab:00:01", "rules": rules});
        assert_eq!(normalized(&declared, &normal), wanted);
        // What the normal form leaves out is so by default, in whatever words; and nothing stays nothing of its kind.
        let declared = json!({"firmware": "FIRMWARE_BIOS", "paused": false, "limits": {"readMibPerSecond": 0}, "labels": {}});
        let wanted =
            json!({"firmware": null, "paused": false, "limits": {"readMibPerSecond": 0}, "labels": {}});
        assert_eq!(normalized(&declared, &json!({})), wanted);
    }
}
