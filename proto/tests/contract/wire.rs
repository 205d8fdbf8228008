//! The wire contract as lines of text, one for each field, enum value and call, and what may become of a line.
//!
//! A line is what another program relies on: number, name and type (the name too, for the JSON form and grpcurl use it). A
//! line may be added; it may go only when its number and its name are reserved, so that they are never used for
//! something else. Calls can never go. Comments, and the order and place of declarations, are free.

use std::collections::{BTreeMap, BTreeSet};

use prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorProto, field_descriptor_proto::Type};

use crate::descriptors::{enums, is_map_entry, messages};

const HEADER: &str = "\
# What programs of other versions rely on; checked by the tests of dalgu-proto.
# New lines are written by: UPDATE_WIRE_LOCK=1 cargo nextest run -p dalgu-proto
# message number name type | enum number value | service rpc name request -> answer
";

/// What identifies a line: the type it belongs to and its number, or the call's name.
type Key = (String, String);

/// The recorded contract.
pub struct Lock(BTreeMap<Key, String>);

impl Lock {
    /// Reads the lines of a lock; those that start with # are for people.
    pub fn parse(text: &str) -> Self {
        let lines = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        Self(lines.map(|line| (key(line), line.to_owned())).collect())
    }
}

fn key(line: &str) -> Key {
    let mut words = line.split(' ');
    let owner = words.next().unwrap_or_default().to_owned();
    let number = match words.next() {
        Some("rpc") => format!("rpc {}", words.next().unwrap_or_default()),
        other => other.unwrap_or_default().to_owned(),
    };
    (owner, number)
}

/// The text of the lock for these files.
pub fn render(files: &[FileDescriptorProto]) -> String {
    let mut owner = String::new();
    let mut out = HEADER.to_owned();
    for line in lines(files) {
        let its = key(&line).0;
        if its != owner {
            out.push('\n');
            owner = its;
        }
        out.push_str(&line);
        out.push('\n');
    }
    out
}

/// Recorded lines that are gone or say something else now, and are not reserved.
pub fn breaks(lock: &Lock, files: &[FileDescriptorProto]) -> Vec<String> {
    let now = Lock(lines(files).into_iter().map(|line| (key(&line), line)).collect());
    let reserved = reserved(files);
    let mut found = Vec::new();
    for (key, line) in &lock.0 {
        match now.0.get(key) {
            Some(current) if current == line => {}
            Some(current) => found.push(format!("changed: {line}\n    now: {current}")),
            None if !is_reserved(line, &reserved) => found.push(format!("removed: {line}")),
            None => {}
        }
    }
    found
}

/// Lines that the lock does not have yet, and lines it still has of what was given up properly.
pub fn additions(lock: &Lock, files: &[FileDescriptorProto]) -> Vec<String> {
    let recorded: BTreeSet<String> = lock.0.values().cloned().collect();
    let now: BTreeSet<String> = lines(files).into_iter().collect();
    let new = now
        .difference(&recorded)
        .map(|line| format!("not in wire.lock: {line}"));
    let old = recorded
        .difference(&now)
        .map(|line| format!("still in wire.lock: {line}"));
    new.chain(old).collect()
}

fn lines(files: &[FileDescriptorProto]) -> Vec<String> {
    let mut out = Vec::new();
    let mut files: Vec<_> = files.iter().collect();
    files.sort_by_key(|file| file.name().to_owned());
    for file in files {
        for service in &file.service {
            for method in &service.method {
                let stream = |is: bool| if is { "stream " } else { "" };
                out.push(format!(
                    "{}.{} rpc {} {}{} -> {}{}",
                    file.package(),
                    service.name(),
                    method.name(),
                    stream(method.client_streaming()),
                    method.input_type().trim_start_matches('.'),
                    stream(method.server_streaming()),
                    method.output_type().trim_start_matches('.'),
                ));
            }
        }
        for item in enums(file) {
            let values = item.proto.value.iter();
            out.extend(values.map(|value| format!("{} {} {}", item.full_name, value.number(), value.name())));
        }
        for message in messages(file) {
            let mut fields: Vec<_> = message.proto.field.iter().collect();
            fields.sort_by_key(|field| field.number());
            out.extend(fields.iter().map(|field| {
                let kind = shape(field, message.proto);
                format!("{} {} {} {kind}", message.full_name, field.number(), field.name())
            }));
        }
    }
    out
}

/// Type of a field with all that matters on the wire and to generated code.
fn shape(field: &FieldDescriptorProto, message: &DescriptorProto) -> String {
    use prost_types::field_descriptor_proto::Label;
    let kind = kind(field);
    if field.label() == Label::Repeated {
        let short = kind.rsplit('.').next().unwrap_or_default();
        let entry = message
            .nested_type
            .iter()
            .find(|nested| is_map_entry(nested) && nested.name() == short);
        return match entry.map(|entry| entry.field.as_slice()) {
            Some([key, value]) => format!("map<{}, {}>", self::kind(key), self::kind(value)),
            _ => format!("repeated {kind}"),
        };
    }
    if field.proto3_optional() {
        return format!("optional {kind}");
    }
    let oneof = field
        .oneof_index
        .and_then(|index| message.oneof_decl.get(usize::try_from(index).ok()?));
    oneof.map_or_else(|| kind.clone(), |oneof| format!("oneof {} {kind}", oneof.name()))
}

fn kind(field: &FieldDescriptorProto) -> String {
    match field.r#type() {
        Type::Message | Type::Enum | Type::Group => field.type_name().trim_start_matches('.').to_owned(),
        scalar => scalar.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
    }
}

/// What is reserved in a message or an enum: ranges of numbers, ends included, and names.
type Reserved = BTreeMap<String, (Vec<(i32, i32)>, Vec<String>)>;

fn reserved(files: &[FileDescriptorProto]) -> Reserved {
    let mut out = Reserved::new();
    for file in files {
        for message in messages(file) {
            // The end of a message's range is behind its last number, that of an enum's is its last number.
            let ranges = message
                .proto
                .reserved_range
                .iter()
                .map(|range| (range.start(), range.end() - 1));
            out.insert(
                message.full_name,
                (ranges.collect(), message.proto.reserved_name.clone()),
            );
        }
        for item in enums(file) {
            let ranges = item
                .proto
                .reserved_range
                .iter()
                .map(|range| (range.start(), range.end()));
            out.insert(
                item.full_name,
                (ranges.collect(), item.proto.reserved_name.clone()),
            );
        }
    }
    out
}

fn is_reserved(line: &str, reserved: &Reserved) -> bool {
    let mut words = line.split(' ');
    let (Some(owner), Some(number), Some(name)) = (words.next(), words.next(), words.next()) else {
        return false;
    };
    let (Some((ranges, names)), Ok(number)) = (reserved.get(owner), number.parse::<i32>()) else {
        return false;
    };
    ranges
        .iter()
        .any(|(first, last)| (*first..=*last).contains(&number))
        && names.iter().any(|n| n == name)
}

mod tests {
    use super::{Lock, additions, breaks, render};
    use crate::descriptors::made_up;

    const BEFORE: &str = "
        service S { rpc GetA(A) returns (stream A); }
        enum E { E_UNSPECIFIED = 0; E_ONE = 1; }
        message A {
            string name = 1;
            repeated E kinds = 2;
            map<string, uint32> labels = 3;
            oneof which { A left = 4; bool right = 5; }
            optional bool maybe = 6;
        }";

    fn broken_by(old: &str, new: &str) -> Vec<String> {
        assert!(BEFORE.contains(old), "{old} is in the file");
        let lock = Lock::parse(&render(&made_up(BEFORE)));
        breaks(&lock, &made_up(&BEFORE.replace(old, new)))
    }

    #[test]
    fn a_lock_is_readable_and_matches_the_files_it_was_made_from() {
        let text = render(&made_up(BEFORE));
        let lines: Vec<_> = text
            .lines()
            .filter(|line| !line.starts_with('#') && !line.is_empty())
            .collect();
        assert_eq!(
            lines,
            [
                "dalgu.v1.S rpc GetA dalgu.v1.A -> stream dalgu.v1.A",
                "dalgu.v1.E 0 E_UNSPECIFIED",
                "dalgu.v1.E 1 E_ONE",
                "dalgu.v1.A 1 name string",
                "dalgu.v1.A 2 kinds repeated dalgu.v1.E",
                "dalgu.v1.A 3 labels map<string, uint32>",
                "dalgu.v1.A 4 left oneof which dalgu.v1.A",
                "dalgu.v1.A 5 right oneof which bool",
                "dalgu.v1.A 6 maybe optional bool",
            ]
        );
        let lock = Lock::parse(&text);
        assert_eq!(breaks(&lock, &made_up(BEFORE)), Vec::<String>::new());
        assert_eq!(additions(&lock, &made_up(BEFORE)), Vec::<String>::new());
    }

    #[test]
    fn another_number_name_type_or_shape_is_a_break() {
        for (old, new) in [
            ("string name = 1;", "string name = 7;"),
            ("string name = 1;", "string title = 1;"),
            ("string name = 1;", "bytes name = 1;"),
            ("string name = 1;", "repeated string name = 1;"),
            ("string name = 1;", "optional string name = 1;"),
            ("map<string, uint32>", "map<string, uint64>"),
            (
                "oneof which { A left = 4; bool right = 5; }",
                "A left = 4; bool right = 5;",
            ),
            ("optional bool maybe", "bool maybe"),
            ("returns (stream A)", "returns (A)"),
            ("E_ONE = 1;", "E_TWO = 1;"),
        ] {
            assert!(!broken_by(old, new).is_empty(), "{old} -> {new}");
        }
    }

    #[test]
    fn what_is_removed_is_a_break_unless_its_number_and_its_name_are_reserved() {
        let field = "string name = 1;";
        assert_eq!(broken_by(field, ""), ["removed: dalgu.v1.A 1 name string"]);
        assert_eq!(broken_by(field, "reserved 1;").len(), 1);
        assert_eq!(broken_by(field, "reserved \"name\";").len(), 1);
        assert_eq!(broken_by(field, "reserved 7; reserved \"name\";").len(), 1);
        assert_eq!(
            broken_by(field, "reserved 1; reserved \"name\";"),
            Vec::<String>::new()
        );
        assert_eq!(broken_by("E_ONE = 1;", "").len(), 1);
        assert_eq!(
            broken_by("E_ONE = 1;", "reserved 1; reserved \"E_ONE\";"),
            Vec::<String>::new()
        );
        assert_eq!(broken_by("rpc GetA(A) returns (stream A);", "").len(), 1);
    }

    #[test]
    fn what_is_new_is_no_break_but_has_to_be_recorded() {
        let lock = Lock::parse(&render(&made_up(BEFORE)));
        let after = made_up(&BEFORE.replace(
            "optional bool maybe = 6;",
            "optional bool maybe = 6; bytes more = 7;",
        ));
        assert_eq!(breaks(&lock, &after), Vec::<String>::new());
        assert_eq!(
            additions(&lock, &after),
            ["not in wire.lock: dalgu.v1.A 7 more bytes"]
        );
    }

    #[test]
    fn what_was_given_up_properly_leaves_the_lock() {
        let lock = Lock::parse(&render(&made_up(BEFORE)));
        let after = made_up(&BEFORE.replace("string name = 1;", "reserved 1; reserved \"name\";"));
        assert_eq!(
            additions(&lock, &after),
            ["still in wire.lock: dalgu.v1.A 1 name string"]
        );
    }
}
