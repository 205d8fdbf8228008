//! Dependencies point one way. This test reads the manifests and the paths that the sources name, and refuses what
//! docs/architecture.md forbids: programs that know each other, decisions that do I/O, generated types behind the edge.

mod source;

use std::{
    fs,
    path::{Path, PathBuf},
};

/// What each crate may use of the workspace. The tests may use everything.
const WORKSPACE: &[(&str, &[&str])] = &[
    ("proto", &[]),
    ("cli", &["dalgu-proto"]),
    ("agent", &["dalgu-proto"]),
    ("controller", &["dalgu-proto"]),
];

/// Decisions: the same input gives the same answer, so that tables and properties can test them. Files or folders.
const PURE: &[&str] = &[
    "agent/src/image/backing.rs",
    "agent/src/image/qcow2.rs",
    "agent/src/image/refusal.rs",
    "agent/src/image/source.rs",
    "agent/src/image/vdi.rs",
    "agent/src/image/vhdx.rs",
    "agent/src/image/vmdk.rs",
    "agent/src/network/links.rs",
    "agent/src/network/names.rs",
    "agent/src/vm/plan.rs",
    "agent/src/vm/policy.rs",
    "controller/src/doctor",
    "controller/src/doctor.rs",
    "controller/src/images/plan.rs",
    "controller/src/images/resolve.rs",
    "controller/src/migration/decide.rs",
    "controller/src/placement",
    "controller/src/planner",
    "controller/src/reconcile/plan.rs",
    "controller/src/simulator/chart.rs",
    "controller/src/simulator/city.rs",
    "controller/src/simulator/contender.rs",
    "controller/src/simulator/field.rs",
    "controller/src/simulator/forecast.rs",
    "controller/src/simulator/overcommit.rs",
    "controller/src/simulator/peers.rs",
    "controller/src/simulator/replay.rs",
    "controller/src/simulator/table.rs",
    "controller/src/simulator/trace",
    "controller/src/volumes/resolve.rs",
];

/// What decisions must not name: the runtime, the network, libvirt, the store, logs, clocks and chance.
const IMPURE: &[&str] = &[
    "tokio",
    "tonic",
    "virt",
    "virt_sys",
    "rusqlite",
    "tracing",
    "crate::store",
    "crate::hypervisor::libvirt",
    "std::fs",
    "std::net",
    "std::env",
    "std::process",
    "std::thread",
    "SystemTime",
    "Instant",
    "std::time::SystemTime",
    "std::time::Instant",
    "Timestamp::now",
    "jiff::Timestamp::now",
    "Uuid::new_v4",
    "Uuid::now_v7",
    "rand",
];

/// What a test must be able to run again: the same input at the same times gives the same history.
const REPEATABLE: &[&str] = &["agent/src", "controller/src"];

/// Where the programs meet their machine; what is below is not run in such a test, or is handed in.
const UNREPEATABLE: &[&str] = &[
    "agent/src/host",
    "agent/src/hypervisor/contract",
    "agent/src/hypervisor/contract.rs",
    "agent/src/hypervisor/libvirt",
    "agent/src/main.rs",
    "controller/src/fixtures.rs",
    "controller/src/main.rs",
    "controller/src/pki",
    "controller/src/pki.rs",
    "controller/src/server.rs",
];

/// Clocks and chance, which reach the code through `dalgu_proto::time::Clock` and `dalgu_proto::ids::NewIds` instead.
const CHANCE: &[&str] = &[
    "SystemTime::now",
    "Timestamp::now",
    "Zoned::now",
    "Uuid::new_v4",
    "Uuid::now_v7",
];

/// The only place that knows libvirt's bindings.
const LIBVIRT: &str = "agent/src/hypervisor/libvirt";

/// Where generated types may be: the places that speak gRPC, and the conversions beside them.
const EDGES: &[&str] = &[
    "agent/src/agent.rs",
    "agent/src/backups/server.rs",
    "agent/src/console.rs",
    "agent/src/images/peers.rs",
    "agent/src/images/report.rs",
    "agent/src/images/server.rs",
    "agent/src/lib.rs",
    "agent/src/network/server.rs",
    "agent/src/reporter.rs",
    "agent/src/server.rs",
    "agent/src/volumes/server.rs",
    "agent/src/wire.rs",
    "cli",
    "controller/src/agent_client",
    "controller/src/agent_client.rs",
    "controller/src/agent_wire",
    "controller/src/agent_wire.rs",
    "controller/src/api",
    "controller/src/placement/wire.rs",
    "controller/src/server",
    "controller/src/server.rs",
    "proto",
    "tests",
];

/// The modules that are generated from the .proto files.
const GENERATED: &[&str] = &["dalgu_proto::v1", "dalgu_proto::agent"];

/// One source file, its path relative to the workspace.
struct File {
    path: String,
    text: String,
}

#[test]
fn each_program_depends_on_the_contract_alone() {
    let mut findings = Vec::new();
    for (name, allowed) in WORKSPACE {
        let manifest =
            fs::read_to_string(root().join(name).join("Cargo.toml")).expect("the manifest can be read");
        findings.extend(
            foreign_crates(&manifest, allowed)
                .into_iter()
                .map(|found| format!("{name} uses {found}")),
        );
    }
    assert!(findings.is_empty(), "{findings:#?}");
}

#[test]
fn decisions_do_no_io_and_read_no_clock() {
    refuse(impure);
    for path in PURE {
        assert!(
            root().join(path).exists(),
            "{path} is gone: where are its decisions now?"
        );
    }
}

#[test]
fn no_clock_and_no_chance_but_those_handed_in() {
    refuse(chance);
    for path in REPEATABLE.iter().chain(UNREPEATABLE) {
        assert!(
            root().join(path).exists(),
            "{path} is gone: name its new place here"
        );
    }
}

#[test]
fn only_one_module_knows_libvirt() {
    refuse(libvirt);
}

#[test]
fn generated_types_stop_at_the_edge() {
    refuse(generated);
}

#[test]
fn every_file_says_first_what_it_is_for() {
    refuse(purpose);
}

#[test]
fn every_third_party_crate_has_its_reason_on_the_page_of_dependencies() {
    let manifest =
        fs::read_to_string(root().join("Cargo.toml")).expect("the workspace's manifest can be read");
    let page =
        fs::read_to_string(root().join("docs/adr/0000-dependencies.md")).expect("the page can be read");
    assert_eq!(
        unexplained(&manifest, &page),
        Vec::<String>::new(),
        "docs/adr/0000-dependencies.md says why"
    );
}

/// Crates of the workspace's table that have no row on the page.
fn unexplained(manifest: &str, page: &str) -> Vec<String> {
    let manifest: toml::Table = manifest.parse().expect("a manifest is TOML");
    let crates = manifest["workspace"]["dependencies"]
        .as_table()
        .expect("the workspace names its dependencies");
    let rows = page
        .lines()
        .filter_map(|line| line.strip_prefix('|')?.split('|').next());
    let explained: Vec<&str> = rows.flat_map(|names| names.split(',')).map(str::trim).collect();
    let third_party = crates
        .iter()
        .filter(|(_, how)| how.get("path").is_none())
        .map(|(name, _)| name);
    third_party
        .filter(|name| !explained.contains(&name.as_str()))
        .cloned()
        .collect()
}

/// Asks every source file and fails with all findings.
#[track_caller]
fn refuse(check: fn(&File) -> Vec<String>) {
    let files = sources();
    assert!(files.len() > 50, "only {} source files were found", files.len());
    let findings: Vec<String> = files.iter().flat_map(check).collect();
    assert!(findings.is_empty(), "\n{}\n", findings.join("\n"));
}

/// Crates of the workspace among the dependencies of a manifest, less those allowed.
fn foreign_crates(manifest: &str, allowed: &[&str]) -> Vec<String> {
    let manifest: toml::Table = manifest.parse().expect("a manifest is TOML");
    let tables = ["dependencies", "dev-dependencies", "build-dependencies"];
    let names = tables
        .iter()
        .filter_map(|table| manifest.get(*table)?.as_table())
        .flat_map(|table| table.keys());
    names
        .filter(|name| name.split('-').next() == Some("dalgu") && !allowed.contains(&name.as_str()))
        .cloned()
        .collect()
}

/// Tests of a module, in a file of their own, and what they begin with.
fn is_test(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    ["tests.rs", "properties.rs", "fixtures.rs"].contains(&name) || path.contains("/tests/")
}

fn impure(file: &File) -> Vec<String> {
    if is_test(&file.path) || !is_below(&file.path, PURE) {
        return Vec::new();
    }
    named(file, IMPURE, "a decision")
}

fn chance(file: &File) -> Vec<String> {
    if is_test(&file.path) || !is_below(&file.path, REPEATABLE) || is_below(&file.path, UNREPEATABLE) {
        return Vec::new();
    }
    let mut paths = source::paths(&file.text);
    paths.sort();
    paths.dedup();
    let asks = |path: &String| {
        CHANCE.iter().any(|name| {
            path.strip_suffix(name)
                .is_some_and(|rest| rest.is_empty() || rest.ends_with("::"))
        })
    };
    let mut found: Vec<String> = paths
        .iter()
        .filter(|path| asks(path))
        .map(|path| format!("{}: names {path}", file.path))
        .collect();
    match source::unbiased_selects(&file.text) {
        0 => {}
        count => found.push(format!(
            "{}: {count} select! without `biased;` choose at random",
            file.path
        )),
    }
    found
}

fn libvirt(file: &File) -> Vec<String> {
    if is_below(&file.path, &[LIBVIRT]) {
        return Vec::new();
    }
    // A word alone may be a variable; a path begins in the crate.
    let mut found = named(file, &["virt", "virt_sys"], "code outside the libvirt module");
    found.retain(|finding| finding.contains("virt::") || finding.contains("virt_sys::"));
    found
}

fn generated(file: &File) -> Vec<String> {
    // Tests may look at what goes over the wire.
    if is_below(&file.path, EDGES) || is_test(&file.path) {
        return Vec::new();
    }
    named(file, GENERATED, "code behind the edge")
}

fn purpose(file: &File) -> Vec<String> {
    if file.text.starts_with("//!") {
        Vec::new()
    } else {
        vec![format!("{}: does not begin with //!", file.path)]
    }
}

/// Findings for paths of a file that are, or lie in, one of the given ones.
fn named(file: &File, forbidden: &[&str], who: &str) -> Vec<String> {
    let mut paths = source::paths(&file.text);
    paths.sort();
    paths.dedup();
    let hits = paths
        .iter()
        .map(|path| path.trim_start_matches("::"))
        .filter(|path| {
            forbidden.iter().any(|name| {
                path.strip_prefix(name)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
            })
        });
    hits.map(|path| format!("{}: {who} names {path}", file.path))
        .collect()
}

fn is_below(path: &str, places: &[&str]) -> bool {
    places.iter().any(|place| {
        path.strip_prefix(place)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    })
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the workspace is above its crates")
        .to_owned()
}

fn sources() -> Vec<File> {
    let mut files = Vec::new();
    for name in ["proto", "agent", "controller", "cli", "tests"] {
        collect(&root().join(name), &mut files);
    }
    files
}

fn collect(folder: &Path, files: &mut Vec<File>) {
    for entry in fs::read_dir(folder).expect("a folder of the workspace can be read") {
        let path = entry.expect("an entry can be read").path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let relative = path
                .strip_prefix(root())
                .expect("it is below the root")
                .to_string_lossy()
                .into_owned();
            files.push(File {
                path: relative,
                text: fs::read_to_string(&path).expect("a source file can be read"),
            });
        }
    }
}

/// Shows that each check can fail.
mod tests {
    use super::{File, chance, foreign_crates, generated, impure, libvirt, purpose, unexplained};

    fn file(path: &str, text: &str) -> File {
        File {
            path: path.to_owned(),
            text: text.to_owned(),
        }
    }

    #[test]
    fn a_program_that_depends_on_another_is_found() {
        let manifest = "[dependencies]\ndalgu-proto.workspace = true\ntokio = \"1\"\n\
                        [dev-dependencies]\ndalgu-agent.workspace = true\n[build-dependencies]\ndalgu = \"1\"";
        assert_eq!(
            foreign_crates(manifest, &["dalgu-proto"]),
            ["dalgu-agent", "dalgu"]
        );
    }

    #[test]
    fn a_crate_without_a_reason_is_found() {
        let manifest =
            "[workspace.dependencies]\nown = { path = \"own\" }\na = \"1\"\nb = { version = \"1\" }";
        assert_eq!(unexplained(manifest, "| a, c | why |\nb is not in a row"), ["b"]);
    }

    #[test]
    fn a_decision_that_names_the_runtime_or_a_clock_is_found() {
        let place = "controller/src/placement/score.rs";
        for (text, path) in [
            ("use tokio::time::sleep;", "tokio::time::sleep"),
            ("use std::time::{Duration, Instant};", "std::time::Instant"),
            (
                "use std::time; fn f() { time::sleep(Instant::now()) }",
                "Instant::now",
            ),
            ("fn f() { ::tonic::Status::ok() }", "tonic::Status::ok"),
            ("fn f() { Timestamp::now() }", "Timestamp::now"),
            ("fn f(store: &dyn crate::store::Store) {}", "crate::store::Store"),
        ] {
            assert_eq!(
                impure(&file(place, text)),
                [format!("{place}: a decision names {path}")]
            );
        }
        let tests = "use std::time::Duration; // tokio::time\n#[cfg(test)]\nmod tests { use tokio::test; }";
        assert_eq!(impure(&file(place, tests)), Vec::<String>::new());
        assert_eq!(
            impure(&file("controller/src/placement_runner.rs", "use tokio::time;")),
            Vec::<String>::new()
        );
    }

    #[test]
    fn a_clock_and_a_choice_at_random_are_found_where_a_run_must_be_repeatable() {
        let place = "controller/src/verbs/create.rs";
        for text in [
            "fn f() { Timestamp::now() }",
            "fn f() { jiff::Timestamp::now() }",
            "fn f() { std::time::SystemTime::now() }",
            "fn f() { ids.map(uuid::Uuid::now_v7) }",
            "fn f() { Uuid::new_v4() }",
            "fn f() { tokio::select! { () = a() => {} } }",
        ] {
            assert_eq!(chance(&file(place, text)).len(), 1, "{text}");
            assert_eq!(chance(&file("controller/src/pki/files.rs", text)).len(), 0);
            assert_eq!(chance(&file("controller/src/state/tests.rs", text)).len(), 0);
        }
        let text = "fn f() { clock.now(); Instant::now(); tokio::select! { biased; () = a() => {} } }";
        assert_eq!(chance(&file(place, text)).len(), 0);
    }

    #[test]
    fn libvirt_named_elsewhere_is_found() {
        assert_eq!(
            libvirt(&file("agent/src/server.rs", "use virt::domain::Domain;")).len(),
            1
        );
        assert_eq!(
            libvirt(&file("agent/src/vm/mod.rs", "fn f() { virt_sys::virFree() }")).len(),
            1
        );
        assert_eq!(
            libvirt(&file("agent/src/hypervisor/libvirt/ffi.rs", "use virt::x;")).len(),
            0
        );
        assert_eq!(
            libvirt(&file("agent/src/host/nic.rs", "let virt = virtual_devices();")).len(),
            0
        );
    }

    #[test]
    fn a_generated_type_behind_the_edge_is_found() {
        let uses = "use dalgu_proto::{agent::v1 as wire, ids::VmId};";
        let found = generated(&file("agent/src/ledger.rs", uses));
        assert_eq!(
            found,
            ["agent/src/ledger.rs: code behind the edge names dalgu_proto::agent::v1"]
        );
        assert_eq!(
            generated(&file(
                "controller/src/model.rs",
                "fn f(vm: dalgu_proto::v1::Vm) {}"
            ))
            .len(),
            1
        );
        assert_eq!(generated(&file("agent/src/wire.rs", uses)).len(), 0);
        assert_eq!(
            generated(&file("agent/src/ledger.rs", "use dalgu_proto::vm::Spec;")).len(),
            0
        );
    }

    #[test]
    fn a_file_that_does_not_say_what_it_is_for_is_found() {
        assert_eq!(purpose(&file("a.rs", "use b;")).len(), 1);
        assert_eq!(purpose(&file("a.rs", "//! Does a.\n")).len(), 0);
    }
}
