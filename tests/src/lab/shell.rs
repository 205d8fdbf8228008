//! What a lab puts into an operator's shell: wrapper scripts and the exports of `lab env`.

use std::fs;

use anyhow::Context as _;

use super::Lab;
use super::host::{quoted, write_script, write_wrapper};
use super::layout::{Host, Layout};

/// Writes the wrappers: `virsh-hN`, `on-hN COMMAND` and, with Dalgu, `grpcurl` with the operator's certificate.
///
/// # Errors
/// If one cannot be written.
pub fn write_wrappers(layout: &Layout, hosts: &[Host], dalgu: bool) -> anyhow::Result<()> {
    fs::create_dir_all(layout.wrappers()).context("make the folder of wrappers")?;
    for host in hosts {
        write_wrapper(
            layout,
            host,
            &format!("virsh-{}", host.name),
            "virsh -c qemu:///system",
        )?;
        write_wrapper(layout, host, &format!("on-{}", host.name), "")?;
    }
    if dalgu {
        let operator = layout.operator();
        let text = format!(
            "#!/bin/sh\n# grpcurl with the lab's operator certificate. Try: grpcurl {} list\nexec {} -cacert {} -cert {} -key {} \"$@\"\n",
            layout.controller_address(),
            quoted(&layout.tools_dir().join("bin/grpcurl")),
            quoted(&operator.join("ca.pem")),
            quoted(&operator.join("admin.pem")),
            quoted(&operator.join("admin.key")),
        );
        write_script(&layout.wrappers().join("grpcurl"), &text)?;
    }
    Ok(())
}

/// The exports of `lab env`, for `eval`.
#[must_use]
pub fn exports(lab: &Lab) -> String {
    let layout = lab.layout();
    let paths = [
        layout.wrappers(),
        layout.bin_dir().to_path_buf(),
        layout.tools_dir().join("bin"),
    ];
    let paths: Vec<_> = paths.iter().map(|path| quoted(path)).collect();
    let mut text = format!(
        "export PATH={}:\"$PATH\"\nexport DALGU_LAB_ID={}\nexport DALGU_LAB_DIR={}\n",
        paths.join(":"),
        layout.id(),
        quoted(layout.dir()),
    );
    if lab.has_dalgu() {
        text += &format!(
            "export DALGU_CONFIG={}\nexport DALGU_LAB_ENDPOINT={}\n",
            quoted(&layout.cli_config()),
            layout.controller_address(),
        );
    }
    text
}
