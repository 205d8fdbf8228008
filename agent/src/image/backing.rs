//! What the header of a VM's qcow2 disk says of itself: whether another file is behind it, and how large it is. For disks that
//! were made here; an image from elsewhere is judged by [`super::inspect`], which takes none with a backing file.

use std::{
    io::{self, Read, Seek, SeekFrom},
    path::PathBuf,
};

use super::source::{be32, be64};

/// Longest name of a backing file (QEMU's own limit).
const MAX_NAME_BYTES: u32 = 1023;

/// A disk by its header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Behind {
    /// Size that a guest sees.
    pub virtual_size_bytes: u64,
    /// The backing file, as it is named.
    pub backing: Option<PathBuf>,
}

/// Reads the header of a disk; `None` where the file is not qcow2.
///
/// # Errors
/// If it cannot be read.
pub fn behind<R: Read + Seek>(mut reader: R) -> io::Result<Option<Behind>> {
    let mut header = [0; 32];
    reader.seek(SeekFrom::Start(0))?;
    match reader.read_exact(&mut header) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    if !header.starts_with(b"QFI\xfb") {
        return Ok(None);
    }
    let (offset, length) = (be64(&header, 8), be32(&header, 16));
    let backing = match (offset, length) {
        (0, _) | (_, 0) => None,
        (_, length) if length > MAX_NAME_BYTES => return Err(io::ErrorKind::InvalidData.into()),
        _ => {
            let mut name = vec![0; length as usize];
            reader.seek(SeekFrom::Start(offset))?;
            reader.read_exact(&mut name)?;
            let name = String::from_utf8(name).map_err(|_| io::ErrorKind::InvalidData)?;
            Some(PathBuf::from(name))
        }
    };
    Ok(Some(Behind {
        virtual_size_bytes: be64(&header, 24),
        backing,
    }))
}
