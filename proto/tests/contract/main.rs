//! The rules that every `.proto` file keeps, checked on the descriptors that are built into the crate.
//!
//! `comments`: everything is documented, for the comments are the manual. `wire`: what was once published is not
//! changed. `habits`: what readers of one service may expect of the next. Each check is a function over descriptors that
//! returns its findings, so that small made-up files show that it can fail. Nothing here reads the generated Rust code.

mod comments;
mod descriptors;
mod habits;
mod wire;

use std::{collections::BTreeSet, fs, path::Path};

use crate::descriptors::published;

/// Fails with all findings at once, one a line.
#[track_caller]
fn refuse(findings: &[String], advice: &str) {
    assert!(findings.is_empty(), "{}\n\n{advice}\n", findings.join("\n"));
}

#[test]
fn everything_in_the_proto_files_is_documented() {
    refuse(
        &comments::findings(&published()),
        "Write a comment above it: unit, range, default, who may change it.",
    );
}

#[test]
fn the_readmes_show_what_reflection_tells_of_a_call() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let proto = fs::read_to_string(root.join("dalgu/v1/vm.proto")).expect("it can be read");
    let (before, _) = proto.split_once("  rpc MigrateVm(").expect("the call is there");
    let lines = before.lines().rev().take_while(|line| line.starts_with("  //"));
    let mut comment: Vec<_> = lines.map(str::trim_start).collect();
    comment.reverse();
    let shown = format!(
        "describe dalgu.v1.VmService.MigrateVm\n{}\nrpc MigrateVm ( ",
        comment.join("\n")
    );
    for name in ["README.md", "README.ko.md"] {
        let readme = fs::read_to_string(root.join("..").join(name)).expect("it can be read");
        assert!(readme.contains(&shown), "{name} does not show:\n{shown}");
    }
}

#[test]
fn enums_requests_and_names_keep_the_habits() {
    refuse(
        &habits::findings(&published()),
        "See the services that are there already.",
    );
}

#[test]
fn the_wire_contract_is_not_broken() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("wire.lock");
    let lock = wire::Lock::parse(&fs::read_to_string(&path).expect("wire.lock can be read"));
    let now = published();
    refuse(
        &wire::breaks(&lock, &now),
        "Programs of the last version still say it the old way. Keep it and add something new beside it, or give it up:\n\
         delete it and write its number and its name as `reserved`. If nothing has ever used it, delete its line from\n\
         proto/wire.lock by hand, where a reviewer sees it.",
    );
    let additions = wire::additions(&lock, &now);
    if std::env::var_os("UPDATE_WIRE_LOCK").is_some() {
        fs::write(&path, wire::render(&now)).expect("wire.lock can be written");
        return;
    }
    refuse(
        &additions,
        "Record what is new: UPDATE_WIRE_LOCK=1 cargo nextest run -p dalgu-proto",
    );
}

#[test]
fn every_proto_file_is_compiled() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let compiled: BTreeSet<String> = published().iter().map(|file| file.name().to_owned()).collect();
    assert_eq!(
        compiled,
        proto_files(root, &root.join("dalgu")),
        "build.rs lists the files that are compiled"
    );
}

/// Paths of the .proto files below a folder, relative to the root.
fn proto_files(root: &Path, folder: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).expect("the folder can be read") {
        let path = entry.expect("the entry can be read").path();
        if path.is_dir() {
            found.append(&mut proto_files(root, &path));
        } else if path.extension().is_some_and(|extension| extension == "proto") {
            let relative = path.strip_prefix(root).expect("the folder is below the root");
            found.insert(relative.to_string_lossy().into_owned());
        }
    }
    found
}
