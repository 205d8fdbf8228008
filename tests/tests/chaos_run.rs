//! A minute of chaos: random operations and faults on three real hosts, judged by the independent eye. `make chaos` is
//! the long form. Run by `make test`; needs root and the set-up step.

use std::time::Duration;

use anyhow::ensure;
use dalgu_tests::chaos::{self, Settings};
use dalgu_tests::e2e;
use dalgu_tests::lab::with_lab;

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_minute_of_chaos_violates_nothing() -> anyhow::Result<()> {
    let settings = Settings {
        seed: 1,
        lasts: Duration::from_mins(1),
        vms: 6,
    };
    Box::pin(with_lab(&e2e::hosts(3), async |lab| {
        let (report, timeline) = chaos::run(lab, &settings).await?;
        ensure!(
            report.is_clean(),
            "{}\n{report}\n{timeline}",
            report.tale(&timeline)
        );
        ensure!(
            report.faults_total > 0 && report.migrations_total > 0,
            "nothing happened:\n{report}"
        );
        Ok(())
    }))
    .await
}
