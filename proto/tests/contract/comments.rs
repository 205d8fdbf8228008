//! Everything in a `.proto` file has a leading comment that says something, and numbers say what they count.

use std::collections::HashMap;

use prost_types::{FieldDescriptorProto, FileDescriptorProto, field_descriptor_proto::Type};

use crate::descriptors::{enums, messages};

/// Units that a field's name can end with.
const UNIT_SUFFIXES: &[&str] = &["bytes", "mib", "ms", "seconds", "second", "percent", "ratio"];

/// Numbers that order or name things, and AIP's page_size: they have no unit.
const UNITLESS: &[&str] = &[
    "generation",
    "epoch",
    "incarnation",
    "term",
    "session",
    "sequence",
    "version",
    "rank",
    "id",
    "code",
    "iteration",
    "page_size",
    "vni",
    "vlan",
    "port",
    "number",
    "layer",
    "replaces",
    "order",
    "numa_node",
    "iommu_group",
];

/// Words of a comment that name a unit, or say that there is none.
const UNIT_WORDS: &[&str] = &[
    "bytes", "MiB", "ms", "seconds", "s", "percent", "Percent", "pages", "Pages", "bits", "unit", "average",
];

/// What is not documented, or not well; one line each.
pub fn findings(files: &[FileDescriptorProto]) -> Vec<String> {
    files.iter().flat_map(of_file).collect()
}

/// Something that must have a comment.
struct Item<'a> {
    /// Full name, for the findings.
    what: String,
    /// Own name.
    name: &'a str,
    /// Where the source information has it.
    path: Vec<i32>,
    field: Option<&'a FieldDescriptorProto>,
}

fn of_file(file: &FileDescriptorProto) -> Vec<String> {
    let comments = Comments::of(file);
    let whole = Item {
        what: file.name().to_owned(),
        name: file.name(),
        path: vec![12],
        field: None,
    };
    let items = [whole]
        .into_iter()
        .chain(in_messages(file))
        .chain(in_enums(file))
        .chain(in_services(file));
    items
        .filter_map(|item| Some(format!("{}: {}", item.what, comments.fault(&item)?)))
        .collect()
}

fn in_messages(file: &FileDescriptorProto) -> Vec<Item<'_>> {
    let mut items = Vec::new();
    for message in messages(file) {
        let part = |kind: i32, index: i32, name| Item {
            what: format!("{}.{name}", message.full_name),
            name,
            path: [message.path.as_slice(), &[kind, index]].concat(),
            field: None,
        };
        for (index, field) in (0..).zip(&message.proto.field) {
            items.push(Item {
                field: Some(field),
                ..part(2, index, field.name())
            });
        }
        for (index, oneof) in (0..).zip(&message.proto.oneof_decl) {
            // A field that is `optional` gets a oneof from the compiler, whose name starts so.
            if !oneof.name().starts_with('_') {
                items.push(part(8, index, oneof.name()));
            }
        }
        let (name, path) = (message.proto.name(), message.path.clone());
        items.push(Item {
            what: message.full_name.clone(),
            name,
            path,
            field: None,
        });
    }
    items
}

fn in_enums(file: &FileDescriptorProto) -> Vec<Item<'_>> {
    let mut items = Vec::new();
    for of in enums(file) {
        for (index, value) in (0..).zip(&of.proto.value) {
            items.push(Item {
                what: format!("{}.{}", of.full_name, value.name()),
                name: value.name(),
                path: [of.path.as_slice(), &[2, index]].concat(),
                field: None,
            });
        }
        items.push(Item {
            what: of.full_name,
            name: of.proto.name(),
            path: of.path,
            field: None,
        });
    }
    items
}

fn in_services(file: &FileDescriptorProto) -> Vec<Item<'_>> {
    let mut items = Vec::new();
    for (index, service) in (0..).zip(&file.service) {
        let what = format!("{}.{}", file.package(), service.name());
        for (call, method) in (0..).zip(&service.method) {
            let path = vec![6, index, 2, call];
            items.push(Item {
                what: format!("{what}.{}", method.name()),
                name: method.name(),
                path,
                field: None,
            });
        }
        items.push(Item {
            what,
            name: service.name(),
            path: vec![6, index],
            field: None,
        });
    }
    items
}

/// The leading comments of a file by the path of what they stand above.
struct Comments<'a>(HashMap<&'a [i32], &'a str>);

impl<'a> Comments<'a> {
    fn of(file: &'a FileDescriptorProto) -> Self {
        let locations = file.source_code_info.iter().flat_map(|info| &info.location);
        Self(
            locations
                .map(|location| (location.path.as_slice(), location.leading_comments()))
                .collect(),
        )
    }

    /// What is wrong with the comment of an item, if anything.
    fn fault(&self, item: &Item<'_>) -> Option<&'static str> {
        let comment = self
            .0
            .get(item.path.as_slice())
            .map_or("", |comment| comment.trim_end());
        if comment.is_empty() {
            return Some("no comment");
        }
        if ["TODO", "FIXME", "XXX", "TBD"]
            .iter()
            .any(|word| comment.contains(word))
        {
            return Some("the comment is unfinished");
        }
        // One space stands behind the slashes, and four more make an example.
        if comment.lines().any(|line| line.starts_with("     ")) {
            return Some("an indented line would be compiled as a Rust example");
        }
        if letters(comment).len() < 3 || letters(comment) == letters(item.name) {
            return Some("the comment only repeats the name");
        }
        if item.field.is_some_and(|field| !has_unit(field, comment)) {
            return Some("a number, and neither its name nor its comment says of what");
        }
        None
    }
}

fn letters(text: &str) -> String {
    text.chars()
        .filter(|c| c.is_alphanumeric())
        .flat_map(char::to_lowercase)
        .collect()
}

/// Whether a reader learns what a number counts. Fields of other types pass. A plural in the name ("vcpus",
/// "inodes_free") says it; so does a unit at its end, before or after "total".
fn has_unit(field: &FieldDescriptorProto, comment: &str) -> bool {
    if !is_number(field.r#type()) {
        return true;
    }
    let name = field.name().trim_end_matches("_total");
    let mut words = name.split('_');
    let plural = words.any(|word| word.len() > 2 && word.ends_with('s') && !word.ends_with("ss"));
    let ends_with = |end: &&str| {
        name.strip_suffix(*end)
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('_'))
    };
    plural
        || UNIT_SUFFIXES.iter().any(ends_with)
        || UNITLESS.iter().any(ends_with)
        || comment
            .split(|c: char| !c.is_alphanumeric())
            .any(|word| UNIT_WORDS.contains(&word))
}

fn is_number(kind: Type) -> bool {
    !matches!(
        kind,
        Type::Bool | Type::String | Type::Bytes | Type::Message | Type::Enum | Type::Group
    )
}

mod tests {
    use super::findings;
    use crate::descriptors::{compile, made_up};

    const GOOD: &str = "
        // Sings.
        service SongService {
            // Sings one song.
            rpc Sing(Song) returns (Song);
        }
        // What is sung.
        message Song {
            // First line of it.
            string title = 1;
            // How it ends.
            oneof ending {
                // Suddenly, in ms.
                uint64 stop = 2;
                // Softly.
                bool fade = 3;
            }
            // A part of it.
            message Verse {
                // Kinds of verse.
                enum Kind {
                    // Not known.
                    KIND_UNSPECIFIED = 0;
                }
            }
        }";

    #[test]
    fn a_documented_file_passes() {
        assert_eq!(findings(&made_up(GOOD)), Vec::<String>::new());
    }

    #[test]
    fn a_comment_missed_anywhere_is_found() {
        let comments = GOOD.lines().filter(|line| line.trim().starts_with("//"));
        for (number, comment) in comments.enumerate() {
            let found = findings(&made_up(&GOOD.replace(&format!("{comment}\n"), "")));
            assert_eq!(found.len(), 1, "comment {number}: {comment}: {found:?}");
            assert!(found[0].ends_with("no comment"), "{found:?}");
        }
        let found = findings(&compile("syntax = \"proto3\"; package dalgu.v1;"));
        assert_eq!(found, ["made_up.proto: no comment"]);
    }

    #[test]
    fn a_comment_behind_its_field_does_not_count() {
        let found = findings(&made_up(
            "// A thing.\nmessage Thing {\n string name = 1; // How it is called.\n}",
        ));
        assert_eq!(found, ["dalgu.v1.Thing.name: no comment"]);
    }

    #[test]
    fn a_comment_that_says_nothing_is_found() {
        for (comment, verdict) in [
            ("Boot disk.", "the comment only repeats the name"),
            ("?", "the comment only repeats the name"),
            ("TODO: describe", "the comment is unfinished"),
            (
                "Where it boots.\n//\n//     let it = boot();",
                "an indented line would be compiled as a Rust example",
            ),
        ] {
            let file = format!("// A thing.\nmessage Thing {{\n// {comment}\nstring boot_disk = 1;\n}}");
            assert_eq!(
                findings(&made_up(&file)),
                [format!("dalgu.v1.Thing.boot_disk: {verdict}")]
            );
        }
    }

    #[test]
    fn a_number_says_what_it_counts_in_its_name_or_its_comment() {
        let with = |field: &str, comment: &str| {
            findings(&made_up(&format!(
                "// A thing.\nmessage Thing {{\n// {comment}\n{field} = 1;\n}}"
            )))
        };
        let found = with("uint64 size", "How large it is.");
        assert_eq!(
            found,
            ["dalgu.v1.Thing.size: a number, and neither its name nor its comment says of what"]
        );
        assert_eq!(with("repeated double speed", "How fast they are.").len(), 1);
        for (field, comment) in [
            ("uint64 size_mib", "How large it is."),
            ("uint64 size", "How large it is, in bytes."),
            ("uint64 receive_packets_total", "Since it started."),
            ("uint64 generation", "Rises with each change."),
            ("string size", "How large it is."),
        ] {
            assert_eq!(with(field, comment), Vec::<String>::new(), "{field}");
        }
    }
}
