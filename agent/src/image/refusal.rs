//! Why an image is refused. The texts reach the operator at the VM, after "image NAME is refused: ".

use std::io;

use uuid::Uuid;

use super::Format;

/// Why an image is refused. Texts out of the image are cut short and escaped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Its name says no format.
    #[error("its name must end in .qcow2, .raw, .img, .vmdk, .vdi or .vhdx")]
    Name,
    /// A directory, a device, a pipe.
    #[error("it is not a regular file; put the image itself there")]
    NotAFile,
    /// A link to elsewhere.
    #[error("it is a link that leads out of the images directory; put the image itself there")]
    Outside,
    /// The system does not let it be read. Not the image's fault.
    #[error("it cannot be read at byte {at}: {kind}")]
    Unreadable {
        /// Where.
        at: u64,
        /// What the system said.
        kind: io::ErrorKind,
    },
    /// It begins as another format does.
    #[error("it is said to be {said}, and begins as {found} does; name it after its format, or convert it")]
    Disguised {
        /// What its name, or whoever brought it, says.
        said: Format,
        /// What it begins as.
        found: &'static str,
    },
    /// It does not begin as its format does.
    #[error("it is said to be {said}, and does not begin as one; a raw image must be said to be raw")]
    NotSo {
        /// What its name, or whoever brought it, says.
        said: Format,
    },
    /// A version that is not known.
    #[error(
        "it is of version {version}, which is not known here; convert it with qemu-img where it was made"
    )]
    Version {
        /// The version.
        version: u32,
    },
    /// A field holds what it may not.
    #[error("its {field} is {value}, which no sound image has; make it anew where it came from")]
    Field {
        /// The field.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// Something that must be there is not.
    #[error("it has no {part}; make it anew where it came from")]
    Missing {
        /// What.
        part: &'static str,
    },
    /// A part lies outside of the file.
    #[error("its {part} ({length} bytes at {offset}) lies outside of the file; copy it again, whole")]
    OutOfFile {
        /// The part.
        part: &'static str,
        /// Where it should begin.
        offset: u64,
        /// How long it should be.
        length: u64,
    },
    /// A part lies on another.
    #[error("its {part} at {offset} lies on its {other}; make it anew where it came from")]
    Overlap {
        /// The part.
        part: &'static str,
        /// Where it begins.
        offset: u64,
        /// What is there.
        other: &'static str,
    },
    /// A table is larger than any sound image needs.
    #[error("its {part} is of {bytes} bytes, where {most} are the most; convert it with larger blocks")]
    TableTooLong {
        /// The table.
        part: &'static str,
        /// Its size.
        bytes: u64,
        /// The most that is taken.
        most: u64,
    },
    /// A table is too small for the size that the image claims.
    #[error(
        "its {part} has {has} entries, and its virtual size asks for {needs}; make it anew where it came from"
    )]
    TableTooShort {
        /// The table.
        part: &'static str,
        /// Entries that are there.
        has: u64,
        /// Entries that must be there.
        needs: u64,
    },
    /// An entry of a table leads astray.
    #[error(
        "entry {index} of its {part} is {value:#x}, which leads nowhere; make it anew where it came from"
    )]
    Entry {
        /// The table.
        part: &'static str,
        /// Which entry.
        index: u64,
        /// What it holds.
        value: u64,
    },
    /// A header extension runs out of the header.
    #[error(
        "its header extension {kind:#010x} of {length} bytes runs out of the header; make it anew where it came from"
    )]
    Extension {
        /// The extension.
        kind: u32,
        /// Its length.
        length: u32,
    },
    /// It is an overlay on another image.
    #[error("it refers to another image ({field}); flatten it with qemu-img convert")]
    Parent {
        /// What says so.
        field: &'static str,
    },
    /// Its data are in another file.
    #[error("its data are in another file ({field}); make one file of it with qemu-img convert")]
    DataFile {
        /// What says so.
        field: &'static str,
    },
    /// It is encrypted.
    #[error("it is encrypted; decrypt it with qemu-img convert, or encrypt within the guest")]
    Encrypted,
    /// It has features that are not known.
    #[error(
        "it has features that are not known here (bits {bits:#x}); convert it with qemu-img where it was made"
    )]
    Features {
        /// Their bits.
        bits: u64,
    },
    /// It was not closed properly.
    #[error("it was not closed properly ({what}); repair it where it was made, or convert it there")]
    Unclean {
        /// What says so.
        what: &'static str,
    },
    /// It holds snapshots. A disk made of it would not have them, and opening it means parsing them.
    #[error(
        "it holds {count} snapshots, which a disk made from it would lose; drop them with qemu-img convert"
    )]
    Snapshots {
        /// How many.
        count: u32,
    },
    /// It holds bitmaps of backups. A disk made of it would not have them, and opening it means parsing them.
    #[error(
        "it holds {count} bitmaps, which a disk made from it would lose; drop them with qemu-img convert"
    )]
    Bitmaps {
        /// How many.
        count: u32,
    },
    /// It holds no disk.
    #[error("its virtual size is 0; make it anew where it came from")]
    Empty,
    /// It claims to hold a disk that is larger than one may be.
    #[error("its virtual size is {bytes} bytes, and a disk has at most 64 TiB")]
    TooLarge {
        /// What it claims.
        bytes: u64,
    },
    /// A kind of its format that is not taken.
    #[error(
        "it is of the kind {kind:?}, which is not taken; make one sparse file of it with qemu-img convert"
    )]
    Kind {
        /// The kind, by its own words.
        kind: String,
    },
    /// An extent that is not in the file.
    #[error(
        "its descriptor names an extent that is not in it ({line:?}); make one sparse file of it with qemu-img convert"
    )]
    Extent {
        /// The descriptor's line.
        line: String,
    },
    /// A checksum is wrong.
    #[error("the checksum of its {part} is wrong; copy it again, whole")]
    Checksum {
        /// Of what.
        part: &'static str,
    },
    /// A part that its reader must understand is not known.
    #[error("it asks for a {part} that is not known here ({id}); convert it where it was made")]
    Unknown {
        /// What it is.
        part: &'static str,
        /// Which.
        id: Uuid,
    },
    /// `qemu-img` fails with it, though it seemed sound.
    #[error("qemu-img cannot read it: {detail}")]
    Unconvertible {
        /// What it said.
        detail: String,
    },
    /// `qemu-img` makes another disk of it than its header says.
    #[error("its header says {said} bytes, and qemu-img makes {made} of it; make it anew where it came from")]
    Ambiguous {
        /// By its header.
        said: u64,
        /// By `qemu-img`.
        made: u64,
    },
}
