//! Decides whether guests run on the processor (KVM) or under QEMU's translation (TCG). Called once at start.
//!
//! That /dev/kvm is there proves nothing: inside another virtual machine it may open, create a machine, and then hang
//! every ordinary kernel or abort QEMU. So `auto` lets KVM run a guest: a boot sector that goes the way a kernel goes,
//! from real mode by a page table to 64-bit mode, writes and sums 8 MiB, asks the processor what it is, and ends QEMU
//! through its debug port. Hardware takes some 0.1 s for it; what takes over 3 s is of no use.

use std::{path::Path, process::Stdio, time::Duration};

use tokio::{process::Command, time::timeout};

use super::xml::Accelerator;

/// Longest time the proof may take.
const LIMIT: Duration = Duration::from_secs(3);
/// `isa-debug-exit` ends QEMU with twice the written value plus one; the boot sector writes 16.
const PROVED: i32 = 33;
/// Names of the QEMU program, in the order in which they are tried.
const PROGRAMS: [&str; 2] = ["qemu-system-x86_64", "/usr/libexec/qemu-kvm"];

/// The operator's wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// KVM if it proves that it runs guests.
    #[default]
    Auto,
    /// KVM, come what may.
    Kvm,
    /// Translation.
    Tcg,
}

/// Decides, with the reason in words.
pub(super) async fn decide(wish: Accel, scratch: &Path) -> (Accelerator, String) {
    match wish {
        Accel::Kvm => (Accelerator::Kvm, "set by the configuration".into()),
        Accel::Tcg => (Accelerator::Tcg, "set by the configuration".into()),
        Accel::Auto => match prove(scratch).await {
            Ok(()) => (Accelerator::Kvm, "KVM ran a guest".into()),
            Err(why) => {
                tracing::warn!(why, "guests run under translation, which is slow");
                (Accelerator::Tcg, why)
            }
        },
    }
}

async fn prove(scratch: &Path) -> Result<(), String> {
    if !Path::new("/dev/kvm").exists() {
        return Err("there is no /dev/kvm".into());
    }
    let image = scratch.join("kvm-proof.img");
    let mut disk = vec![0_u8; 1 << 20];
    disk[..BOOT.len()].copy_from_slice(BOOT);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    std::fs::write(&image, disk).map_err(|error| format!("{}: {error}", image.display()))?;
    let proved = run(&image).await;
    // It is written anew each time.
    let _ = std::fs::remove_file(&image);
    proved
}

async fn run(image: &Path) -> Result<(), String> {
    for program in PROGRAMS {
        let mut command = Command::new("prlimit");
        // A QEMU that aborts must leave no core file.
        command.args([
            "--core=0", "--", program, "-accel", "kvm", "-cpu", "host", "-machine", "pc", "-m", "32",
        ]);
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-device",
            "isa-debug-exit,iobase=0xf4,iosize=1",
        ]);
        command.args([
            "-drive",
            &format!(
                "if=ide,format=raw,file.driver=file,file.filename={}",
                image.display()
            ),
        ]);
        command.stdin(Stdio::null()).kill_on_drop(true);
        let output = match timeout(LIMIT, command.output()).await {
            Err(_) => {
                return Err(format!(
                    "KVM did not run a guest of a few instructions within {LIMIT:?}"
                ));
            }
            Ok(Err(error)) => return Err(format!("prlimit cannot be run: {error}")),
            Ok(Ok(output)) => output,
        };
        match output.status.code() {
            Some(PROVED) => return Ok(()),
            // prlimit's answer when there is no such program.
            Some(127) => {}
            _ => {
                let complaint = String::from_utf8_lossy(&output.stderr);
                let first = complaint.lines().next().unwrap_or("it said nothing");
                return Err(format!("KVM ran no guest ({}): {first}", output.status));
            }
        }
    }
    Err("there is no QEMU to try KVM with".into())
}

/// The boot sector's code, loaded at 0x7c00. In short:
///
/// ```text
/// cli; segments 0; stack 0x7c00
/// page tables at 0x1000, 0x2000, 0x3000: the first 16 MiB mapped onto themselves by 2 MiB pages
/// A20 on (port 0x92); lgdt; cr4 = PAE; cr3 = 0x1000; EFER.LME on; cr0 = PG | PE; far jump to 64-bit code
/// write 0x01010101 to each of 0x100000 quadwords from 4 MiB on; sum them; stop unless the sum is 0x101010100000
/// cpuid 0; out 0xf4, 16
/// ```
const BOOT: &[u8] = &[
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, 0xbf, 0x00, 0x10, 0x66, //
    0x31, 0xc0, 0xb9, 0x00, 0x0c, 0xfc, 0x66, 0xf3, 0xab, 0x66, 0xc7, 0x06, 0x00, 0x10, 0x03, 0x20, //
    0x00, 0x00, 0x66, 0xc7, 0x06, 0x00, 0x20, 0x03, 0x30, 0x00, 0x00, 0xbf, 0x00, 0x30, 0x66, 0xb8, //
    0x83, 0x00, 0x00, 0x00, 0x66, 0x89, 0x05, 0x66, 0x05, 0x00, 0x00, 0x20, 0x00, 0x83, 0xc7, 0x08, //
    0x81, 0xff, 0x40, 0x30, 0x72, 0xee, 0xe4, 0x92, 0x0c, 0x02, 0xe6, 0x92, 0x66, 0x0f, 0x01, 0x16, //
    0xf0, 0x7c, 0x66, 0xb8, 0x20, 0x00, 0x00, 0x00, 0x0f, 0x22, 0xe0, 0x66, 0xb8, 0x00, 0x10, 0x00, //
    0x00, 0x0f, 0x22, 0xd8, 0x66, 0xb9, 0x80, 0x00, 0x00, 0xc0, 0x0f, 0x32, 0x66, 0x0d, 0x00, 0x01, //
    0x00, 0x00, 0x0f, 0x30, 0x66, 0xb8, 0x01, 0x00, 0x00, 0x80, 0x0f, 0x22, 0xc0, 0x66, 0xea, 0x85, //
    0x7c, 0x00, 0x00, 0x08, 0x00, 0xb8, 0x10, 0x00, 0x00, 0x00, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, //
    0xbf, 0x00, 0x00, 0x40, 0x00, 0xb9, 0x00, 0x00, 0x10, 0x00, 0xb8, 0x01, 0x01, 0x01, 0x01, 0x48, //
    0x89, 0xc0, 0xf3, 0x48, 0xab, 0xbe, 0x00, 0x00, 0x40, 0x00, 0xb9, 0x00, 0x00, 0x10, 0x00, 0x31, //
    0xdb, 0x48, 0x03, 0x1e, 0x48, 0x83, 0xc6, 0x08, 0xff, 0xc9, 0x75, 0xf5, 0x48, 0xb8, 0x00, 0x00, //
    0x10, 0x10, 0x10, 0x10, 0x00, 0x00, 0x48, 0x39, 0xc3, 0x75, 0x08, 0x31, 0xc0, 0x0f, 0xa2, 0xb0, //
    0x10, 0xe6, 0xf4, 0xf4, 0xeb, 0xfd, 0x66, 0x90, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, //
    0x00, 0x00, 0x00, 0x00, 0x00, 0x9a, 0x20, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x92, 0x00, 0x00, //
    0x17, 0x00, 0xd8, 0x7c,
];
