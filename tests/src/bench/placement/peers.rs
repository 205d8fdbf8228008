//! The schedulers of others, run beside ours in the same run by a program that is given.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};

use super::one;
use crate::bench::report::Report;

/// Hosts on which others are measured at most: their time for one decision grows with the hosts.
const MOST: usize = 10_000;

/// Runs a program that measures Nova with Placement on sites of so many hosts, and adds its figures, each beside ours.
///
/// # Errors
/// If it fails, or says nothing of one of the sites.
pub fn run(program: &Path, hosts: &[usize], report: &mut Report) -> anyhow::Result<()> {
    let hosts = hosts.iter().filter(|hosts| **hosts <= MOST);
    let sites: Vec<_> = hosts.map(ToString::to_string).collect();
    println!("{}, {} hosts", program.display(), sites.join(", "));
    let output = Command::new(program)
        .args(&sites)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("run {}", program.display()))?;
    ensure!(output.status.success(), "{} failed", program.display());
    let said = String::from_utf8_lossy(&output.stdout);
    for site in &sites {
        let theirs = figure(&said, site)
            .with_context(|| format!("{} said nothing of {site} hosts: {said}", program.display()))?;
        let ours = format!("pack, {site} hosts: decisions a second");
        let ours = report.0.iter().find(|measure| measure.name == ours);
        let ours = ours.map(|measure| measure.value);
        let name = format!("{site} hosts: decisions a second, beside Nova with Placement");
        if let Some(ours) = ours {
            report.add(one(name, "1/s", ours).map(|row| row.over(&[theirs])));
        }
    }
    Ok(())
}

/// Decisions a second on a site, in lines as `FIGURE nova+placement N=100 decision_ms=41.0 decisions_per_s=24.4`.
fn figure(said: &str, hosts: &str) -> Option<f64> {
    let number = format!("N={hosts}");
    let mut figures = said.lines().filter(|line| line.starts_with("FIGURE nova"));
    let line = figures.find(|line| line.split(' ').any(|word| word == number))?;
    let mut words = line.split(' ');
    words.find_map(|word| word.strip_prefix("decisions_per_s=")?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figure_of_a_site_is_found_by_its_number() {
        let said = "{}\nFIGURE nova+placement N=1000 decision_ms=200.0 decisions_per_s=5.0\n\
                    FIGURE nova+placement N=100 decision_ms=41.0 decisions_per_s=24.4\n";
        assert_eq!(figure(said, "100"), Some(24.4));
        assert_eq!(figure(said, "1000"), Some(5.0));
        assert_eq!(figure(said, "10"), None);
    }
}
