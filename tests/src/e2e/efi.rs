//! A disk from which UEFI starts a program that says so on the serial line. It is where firmware looks on every disk, so that no
//! entry in a VM's NVRAM has to name it; and it is no operating system, which would boot for long on an emulated processor.

use std::fs;
use std::path::Path;

use anyhow::Context as _;

use crate::lab::run;

/// What it says.
pub const SAYS: &str = "started by UEFI from its disk";

/// Writes the disk: a FAT file system without partitions.
///
/// # Errors
/// If a file cannot be written, or mtools fail.
pub async fn write_disk(path: &Path) -> anyhow::Result<()> {
    let file = path.with_extension("efi");
    fs::write(&file, program()).with_context(|| format!("write {}", file.display()))?;
    let (image, file) = (path.to_string_lossy(), file.to_string_lossy());
    run("mformat", ["-C", "-f", "2880", "-i", &*image, "::"]).await?;
    run("mmd", ["-i", &*image, "::/EFI", "::/EFI/BOOT"]).await?;
    run("mcopy", ["-i", &*image, &*file, "::/EFI/BOOT/BOOTX64.EFI"]).await?;
    Ok(())
}

/// Where the code is in the file, and where in memory from the program's beginning: by the smallest alignments that there are.
const CODE: (usize, u32) = (0x200, 0x1000);
/// How much of either it takes.
const CODE_BYTES: u32 = 0x200;

/// A program as UEFI starts it: see "PE Format" of Microsoft's, PE32+ with one section and no relocations.
fn program() -> Vec<u8> {
    let mut file = vec![0; CODE.0 + CODE_BYTES as usize];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"MZ");
    put(0x3c, &0x40_u32.to_le_bytes());
    put(0x40, b"PE\0\0");
    // x86-64, one section, the size of what follows, an executable for large addresses.
    for (at, value) in [(0, 0x8664_u16), (2, 1), (16, 240), (18, 0x22)] {
        put(0x44 + at, &value.to_le_bytes());
    }
    let optional = 0x58;
    // PE32+, an application of UEFI.
    for (at, value) in [(0, 0x20b_u16), (68, 10)] {
        put(optional + at, &value.to_le_bytes());
    }
    // The code's size, its beginning twice, both alignments, the sizes of all and of the headers, the entries of a directory
    // that is empty.
    for (at, value) in [
        (4, CODE_BYTES),
        (16, CODE.1),
        (20, CODE.1),
        (32, 0x1000),
        (36, 0x200),
        (56, 0x2000),
        (60, 0x200),
        (108, 16),
    ] {
        put(optional + at, &value.to_le_bytes());
    }
    let section = optional + 240;
    put(section, b".text");
    // Its sizes and places in memory and file; it holds code, is run and read.
    for (at, value) in [
        (8, CODE_BYTES),
        (12, CODE.1),
        (16, CODE_BYTES),
        (20, 0x200),
        (36, 0x6000_0020),
    ] {
        put(section + at, &value.to_le_bytes());
    }
    put(CODE.0, &code());
    file
}

/// Writes [`SAYS`] to the first serial port as that takes it, and stands still.
fn code() -> Vec<u8> {
    let text = format!("\r\n{SAYS}\r\n");
    let length = u8::try_from(text.len()).unwrap_or(u8::MAX);
    let mut code = vec![
        0x48, 0x8d, 0x35, 28, 0, 0, 0, // lea rsi, [rip + 28]: the text, behind all this
        0xb9, length, 0, 0, 0, // mov ecx, length
        0x66, 0xba, 0xfd, 0x03, // next: mov dx, 0x3fd
        0xec, // wait: in al, dx
        0xa8, 0x20, // test al, 0x20
        0x74, 0xfb, // jz wait
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xac, // lodsb
        0xee, // out dx, al
        0xff, 0xc9, // dec ecx
        0x75, 0xed, // jnz next
        0xfa, // cli
        0xf4, // stand: hlt
        0xeb, 0xfd, // jmp stand
    ];
    code.extend(text.as_bytes());
    code
}
