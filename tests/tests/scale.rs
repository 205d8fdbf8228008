//! `bench-scale` with few hosts: what must hold at any size holds, whatever the figures are.

use std::time::Duration;

use dalgu_tests::bench::{
    report::Report,
    scale::{self, Settings},
};

/// Requests a second that a controller built for tests bears.
const RATED: u32 = 40;

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_is_killed_or_asked_ten_times_too_much_loses_nothing_and_refuses_with_a_delay() {
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings {
        hosts: 40,
        vms: 120,
        report_interval: Duration::from_secs(3),
        restarts: 2,
        window: Duration::from_secs(3),
        rated: RATED,
        load: Duration::from_secs(5),
        connections: 8,
        program: env!("CARGO_BIN_EXE_bench-scale").into(),
        arguments: ["controller", "--rated", &RATED.to_string()]
            .map(str::to_owned)
            .to_vec(),
        dir: dir.path().to_owned(),
    };
    let mut report = Report::default();
    let outcome = scale::run(&settings, &mut report).await;
    if outcome.is_err() {
        let log = std::fs::read_to_string(dir.path().join("controller.log")).unwrap_or_default();
        let last: Vec<_> = log.lines().rev().take(40).collect();
        eprintln!(
            "{report}\n{}",
            last.into_iter().rev().collect::<Vec<_>>().join("\n")
        );
    }
    outcome.unwrap();
}
