//! Compiles the .proto files with a Rust compiler, so that no protoc is needed.

use std::{env, error::Error, fs, path::PathBuf};

const FILES: &[&str] = &[
    "dalgu/v1/backup.proto",
    "dalgu/v1/declaration.proto",
    "dalgu/v1/diagnosis.proto",
    "dalgu/v1/event.proto",
    "dalgu/v1/host.proto",
    "dalgu/v1/image.proto",
    "dalgu/v1/network.proto",
    "dalgu/v1/operation.proto",
    "dalgu/v1/placement.proto",
    "dalgu/v1/plan.proto",
    "dalgu/v1/site.proto",
    "dalgu/v1/snapshot.proto",
    "dalgu/v1/telemetry.proto",
    "dalgu/v1/vm.proto",
    "dalgu/v1/volume.proto",
    "dalgu/agent/v1/agent.proto",
    "dalgu/agent/v1/backup.proto",
    "dalgu/agent/v1/image.proto",
    "dalgu/agent/v1/network.proto",
    "dalgu/agent/v1/registrar.proto",
    "dalgu/agent/v1/volume.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=dalgu");
    let descriptors = protox::compile(FILES, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?).join("dalgu.descriptors.bin");
    fs::write(out, prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure()
        .bytes(".dalgu.v1.ReadConsoleResponse")
        .bytes(".dalgu.agent.v1.ReadConsoleResponse")
        .bytes(".dalgu.v1.UploadImageRequest")
        .bytes(".dalgu.agent.v1.UploadImageRequest")
        .bytes(".dalgu.agent.v1.ReadImageResponse")
        // They may hold passwords, and a message is printed in many ways: see `vm::first_boot`.
        .skip_debug([".dalgu.v1.FirstBoot", ".dalgu.agent.v1.FirstBootDocuments"])
        .compile_fds(descriptors)?;
    Ok(())
}
