//! Decisions stay pure: what decides may not reach for a runtime, the network, the store, a clock, chance or the log.

use std::{fs, path::Path};

const PURE: [&str; 23] = [
    "doctor",
    "doctor.rs",
    "images/plan.rs",
    "images/resolve.rs",
    "networks/plan.rs",
    "networks/resolve.rs",
    "placement",
    "planner",
    "power/policy.rs",
    "simulator/chart.rs",
    "simulator/city.rs",
    "simulator/contender.rs",
    "simulator/field.rs",
    "simulator/forecast.rs",
    "simulator/overcommit.rs",
    "simulator/peers.rs",
    "simulator/replay.rs",
    "simulator/table.rs",
    "simulator/trace",
    "migration",
    "reconcile/plan.rs",
    "status.rs",
    "volumes/resolve.rs",
];
const BANNED: [&str; 9] = [
    "tokio::",
    "tonic::",
    "rusqlite",
    "tracing::",
    "Timestamp::now",
    "Instant::now",
    "Uuid::now",
    "rand::",
    "crate::store",
];
/// They speak the wire, and nothing else in these places does.
const EDGES: [&str; 1] = ["placement/wire.rs"];

fn files(path: &Path, found: &mut Vec<std::path::PathBuf>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).expect("readable") {
            files(&entry.expect("readable").path(), found);
        }
    } else if path.extension().is_some_and(|extension| extension == "rs") {
        found.push(path.to_owned());
    }
}

#[test]
fn what_decides_reaches_for_nothing() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = vec![];
    for path in PURE {
        let path = root.join(path);
        assert!(
            path.exists(),
            "{} has moved: name its new place here",
            path.display()
        );
        files(&path, &mut found);
    }
    assert!(found.len() > 8);
    for file in found {
        let is_test = file.ends_with("tests.rs") || file.parent().is_some_and(|dir| dir.ends_with("tests"));
        if is_test || EDGES.iter().any(|edge| file.ends_with(edge)) {
            continue;
        }
        let text = fs::read_to_string(&file).expect("readable");
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        for (number, line) in code
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim_start().starts_with("//"))
        {
            for banned in BANNED {
                assert!(
                    !line.contains(banned),
                    "{}:{}: {banned} in what decides",
                    file.display(),
                    number + 1
                );
            }
        }
    }
}
