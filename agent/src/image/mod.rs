//! Images that VMs' disks are made from, judged before any other program opens them.
//!
//! An image comes from people, and `qemu-img` believes what its header says: it opens the files that the header names
//! (CVE-2024-32498) and takes the memory that its tables ask for (CVE-2015-5162). So [`open`] takes hold of a regular file of
//! the images directory, and [`inspect`] reads its header and top tables with bounds of its own. What passes refers to no
//! other file, and has tables within the file that cover the disk it claims to be. Whoever converts it must read the very
//! descriptor that was inspected. Called by the hypervisor's storage and by the host's store of images. Pure but for reading the one file it is given; makes
//! nothing, starts nothing.
//!
//! The tables below the top ones (L2 tables, grain tables) are not read: wherever they lead, a reader stays in the file, and
//! what it can make of them is bounded by the disk's size.

mod backing;
pub mod content;
mod qcow2;
mod refusal;
mod source;
#[cfg(test)]
pub(crate) mod tests;
mod vdi;
mod vhdx;
mod vmdk;

use std::{
    fs::File,
    io::{self, Read, Seek},
    path::Path,
};

pub use dalgu_proto::image::Format;
use dalgu_proto::vm::DISK_MIB;
use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
};

pub use backing::{Behind, behind};
pub use refusal::Refusal;
use source::Source;
pub use vhdx::crc32c;

/// Most bytes of one table that is read whole. Enough for 16 TiB of VDI, for 8 TiB of VHDX with its smallest blocks, and for
/// 64 TiB of the others as they are usually made.
pub const MAX_TABLE_BYTES: u64 = 64 << 20;
/// Largest disk that an image may hold: as large as a VM's disk may be.
pub const MAX_SIZE_BYTES: u64 = *DISK_MIB.end() << 20;
/// Unit of every format's sizes.
const SECTOR: u64 = 512;

/// What an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inspected {
    /// Its format, as its name says and its content confirms.
    pub format: Format,
    /// Size that a guest sees: a multiple of 512, more than 0 and at most [`MAX_SIZE_BYTES`].
    pub virtual_size_bytes: u64,
}

/// Takes hold of an image. A link is followed only within the directory; a pipe is not waited for.
///
/// # Errors
/// [`Refusal::Outside`], [`Refusal::NotAFile`], or [`Refusal::Unreadable`] with what the system said.
pub fn open(dir: &Path, name: &str) -> Result<File, Refusal> {
    let unreadable = |kind| Refusal::Unreadable { at: 0, kind };
    let dir = File::open(dir).map_err(|error| unreadable(error.kind()))?;
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = match openat2(&dir, name, how) {
        Ok(file) => File::from(file),
        Err(Errno::EXDEV | Errno::ELOOP) => return Err(Refusal::Outside),
        // A socket, or a device without a driver.
        Err(Errno::ENXIO | Errno::ENODEV) => return Err(Refusal::NotAFile),
        Err(errno) => return Err(unreadable(io::Error::from(errno).kind())),
    };
    match file.metadata() {
        Ok(metadata) if metadata.is_file() => Ok(file),
        Ok(_) => Err(Refusal::NotAFile),
        Err(error) => Err(unreadable(error.kind())),
    }
}

/// Judges an image. Reads its beginning and its top tables, the larger ones in pieces: at most some [`MAX_TABLE_BYTES`], and
/// never more than a few times the file's length.
///
/// # Errors
/// The first [`Refusal`] that fits.
pub fn inspect<R: Read + Seek>(reader: R, format: Format) -> Result<Inspected, Refusal> {
    let mut source = Source::new(reader)?;
    check_content(&mut source, format)?;
    let virtual_size_bytes = match format {
        Format::Raw => source.length().next_multiple_of(SECTOR),
        Format::Qcow2 => qcow2::virtual_size(&mut source)?,
        Format::Vmdk => vmdk::virtual_size(&mut source)?,
        Format::Vdi => vdi::virtual_size(&mut source)?,
        Format::Vhdx => vhdx::virtual_size(&mut source)?,
    };
    check_size(virtual_size_bytes)?;
    Ok(Inspected {
        format,
        virtual_size_bytes,
    })
}

/// What formats begin with: where, what, the name for people, and the format if it is one of ours. A raw image that begins
/// so is refused: somebody, or some tool, would take it for what it seems to be.
const BEGINNINGS: [(usize, &[u8], &str, Option<Format>); 12] = [
    (0, b"QFI\xfb", "qcow2", Some(Format::Qcow2)),
    (0, b"KDMV", "vmdk", Some(Format::Vmdk)),
    (0, b"COWD", "vmdk of ESX", None),
    (0, b"# Disk DescriptorFile", "a vmdk descriptor", None),
    (0, b"\xbe\xba\xfe\xca", "vmdk of ESXi (seSparse)", None),
    (0x40, b"\x7f\x10\xda\xbe", "vdi", Some(Format::Vdi)),
    (0, b"vhdxfile", "vhdx", Some(Format::Vhdx)),
    (0, b"conectix", "vhd", None),
    (0, b"QED\0", "qed", None),
    (0, b"WithoutFreeSpace", "parallels", None),
    (0, b"WithouFreSpacExt", "parallels", None),
    (0, b"Bochs Virtual HD Image", "bochs", None),
];
/// So much of a file tells which of these it is.
const BEGINNING_BYTES: u64 = 0x48;

fn check_content<R: Read + Seek>(source: &mut Source<R>, said: Format) -> Result<(), Refusal> {
    let length = source.length().min(BEGINNING_BYTES);
    let begins = source.read("beginning", 0, length)?;
    let found = BEGINNINGS
        .iter()
        .find(|(at, bytes, ..)| begins.get(*at..).is_some_and(|rest| rest.starts_with(bytes)));
    match (said, found) {
        (Format::Raw, None) => Ok(()),
        (_, None) => Err(Refusal::NotSo { said }),
        (_, Some((.., format))) if *format == Some(said) => Ok(()),
        (_, Some((_, _, found, _))) => Err(Refusal::Disguised { said, found }),
    }
}

fn check_size(bytes: u64) -> Result<(), Refusal> {
    match bytes {
        0 => Err(Refusal::Empty),
        bytes if bytes > MAX_SIZE_BYTES => Err(Refusal::TooLarge { bytes }),
        bytes if !bytes.is_multiple_of(SECTOR) => Err(Refusal::Field {
            field: "virtual size",
            value: bytes,
        }),
        _ => Ok(()),
    }
}
