//! The command that makes a site, as a person runs it.

use std::process::Command;

fn init(data_dir: &std::path::Path, more: &[&str]) -> String {
    let done = Command::new(env!("CARGO_BIN_EXE_dalgu-controller"))
        .args(["init", "--data-dir"])
        .arg(data_dir)
        .args(more)
        .output()
        .unwrap();
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(done.status.success(), "{said}");
    said
}

#[test]
fn a_new_site_tells_which_names_its_controller_answers_to() {
    let dir = tempfile::tempdir().unwrap();
    let said = init(&dir.path().join("a"), &[]);
    assert!(said.contains("localhost\""), "{said}");
    assert!(
        said.contains("no --address was given") && said.contains("-servername"),
        "{said}"
    );
    let addresses = ["--address", "10.0.0.1:7443", "--address", "ctl.example"];
    let said = init(&dir.path().join("b"), &addresses);
    assert!(said.contains("localhost, 10.0.0.1, ctl.example\""), "{said}");
    assert!(!said.contains("no --address"), "{said}");
}
