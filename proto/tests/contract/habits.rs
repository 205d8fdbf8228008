//! Habits of the API: enums start with a value for "not known", and calls that change something can be repeated.

use prost_types::{FileDescriptorProto, field_descriptor_proto::Type};

use crate::descriptors::{Enum, enums, messages};

/// First words of calls that change nothing, or that may be repeated without a request id (Cancel: the operation's own
/// id serves; Upload: each piece says where it belongs).
const WITHOUT_REQUEST_ID: &[&str] = &[
    "Get", "List", "Watch", "Wait", "Read", "Explain", "Estimate", "Plan", "Cancel", "Upload",
];

/// What does not keep the habits; one line each.
pub fn findings(files: &[FileDescriptorProto]) -> Vec<String> {
    let mut found: Vec<String> = files
        .iter()
        .flat_map(enums)
        .flat_map(|item| of_enum(&item))
        .collect();
    found.extend(
        files
            .iter()
            .filter(|file| file.package() == "dalgu.v1")
            .flat_map(|file| requests(file, files)),
    );
    found
}

fn of_enum(item: &Enum<'_>) -> Vec<String> {
    let prefix = screaming(item.proto.name());
    let mut found = Vec::new();
    let zero = item.proto.value.first().filter(|value| value.number() == 0);
    if zero.is_none_or(|value| value.name() != format!("{prefix}_UNSPECIFIED")) {
        found.push(format!(
            "{}: does not start with {prefix}_UNSPECIFIED = 0",
            item.full_name
        ));
    }
    for value in &item.proto.value {
        if !value.name().starts_with(&format!("{prefix}_")) {
            found.push(format!(
                "{}.{}: does not begin with {prefix}_",
                item.full_name,
                value.name()
            ));
        }
    }
    found
}

/// `HaTier` as `HA_TIER`.
fn screaming(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if c.is_uppercase() && !out.is_empty() {
            out.push('_');
        }
        out.extend(c.to_uppercase());
    }
    out
}

/// Calls of the operator API that change something and whose request has no request id.
fn requests(file: &FileDescriptorProto, files: &[FileDescriptorProto]) -> Vec<String> {
    let known: Vec<_> = files.iter().flat_map(messages).collect();
    let mut found = Vec::new();
    for service in &file.service {
        for method in &service.method {
            if WITHOUT_REQUEST_ID.contains(&first_word(method.name())) {
                continue;
            }
            let input = method.input_type().trim_start_matches('.');
            let has_request_id = known
                .iter()
                .filter(|message| message.full_name == input)
                .any(|message| {
                    message
                        .proto
                        .field
                        .iter()
                        .any(|f| f.name() == "request_id" && f.r#type() == Type::String)
                });
            if !has_request_id {
                let rpc = format!("{}.{}.{}", file.package(), service.name(), method.name());
                found.push(format!(
                    "{rpc}: changes something, but {input} has no `string request_id`"
                ));
            }
        }
    }
    found
}

/// `GetVm`: `Get`.
fn first_word(name: &str) -> &str {
    let end = name
        .char_indices()
        .skip(1)
        .find(|(_, c)| c.is_uppercase())
        .map_or(name.len(), |(at, _)| at);
    &name[..end]
}

mod tests {
    use super::findings;
    use crate::descriptors::{compile, made_up};

    #[test]
    fn an_enum_whose_zero_means_something_is_found() {
        let found = findings(&made_up(
            "enum DiskKind { DISK_KIND_RAW = 0; DISK_KIND_UNSPECIFIED = 1; }",
        ));
        assert_eq!(
            found,
            ["dalgu.v1.DiskKind: does not start with DISK_KIND_UNSPECIFIED = 0"]
        );
    }

    #[test]
    fn an_enum_value_without_the_name_of_its_enum_is_found() {
        let found = findings(&made_up(
            "message A { enum DiskKind { DISK_KIND_UNSPECIFIED = 0; RAW = 1; } }",
        ));
        assert_eq!(found, ["dalgu.v1.A.DiskKind.RAW: does not begin with DISK_KIND_"]);
    }

    #[test]
    fn a_call_that_changes_something_without_a_request_id_is_found() {
        let service = |request: &str| {
            format!(
                "message A {{}}  message B {{ {request} }}
                 service S {{ rpc GetA(A) returns (A); rpc WatchA(A) returns (stream A); rpc GetterA(B) returns (A); }}"
            )
        };
        assert_eq!(
            findings(&made_up(&service("bytes request_id = 1;"))),
            ["dalgu.v1.S.GetterA: changes something, but dalgu.v1.B has no `string request_id`"]
        );
        assert_eq!(
            findings(&made_up(&service("string request_id = 1;"))),
            Vec::<String>::new()
        );
    }

    #[test]
    fn the_agents_commands_need_none_for_they_bear_generations() {
        let file = "syntax = \"proto3\"; package dalgu.agent.v1;
                    message A {} service S { rpc EnsureA(A) returns (A); }";
        assert_eq!(findings(&compile(file)), Vec::<String>::new());
    }
}
