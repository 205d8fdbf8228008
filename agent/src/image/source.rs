//! The file under inspection: reads within bounds, and remembers what lies where. Nothing else reads an image.

use std::{
    io::{self, Read, Seek, SeekFrom},
    ops::Range,
};

use super::{MAX_TABLE_BYTES, Refusal};

/// Tables are read in pieces of so many bytes.
const PIECE: usize = 64 << 10;

/// A file under inspection.
pub(super) struct Source<R> {
    reader: R,
    length: u64,
    /// What was found to lie where.
    parts: Vec<(&'static str, Range<u64>)>,
}

impl<R: Read + Seek> Source<R> {
    pub(super) fn new(mut reader: R) -> Result<Self, Refusal> {
        let length = reader
            .seek(SeekFrom::End(0))
            .map_err(|error| unreadable(0, &error))?;
        Ok(Self {
            reader,
            length,
            parts: Vec::new(),
        })
    }

    /// Length of the file in bytes.
    pub(super) const fn length(&self) -> u64 {
        self.length
    }

    /// Where a part ends, if it lies within the file.
    pub(super) fn within(&self, part: &'static str, offset: u64, length: u64) -> Result<u64, Refusal> {
        offset
            .checked_add(length)
            .filter(|end| *end <= self.length)
            .ok_or(Refusal::OutOfFile { part, offset, length })
    }

    /// What lies on so many bytes, if anything.
    pub(super) fn on(&self, offset: u64, length: u64) -> Option<&'static str> {
        let end = offset.saturating_add(length);
        let found = self
            .parts
            .iter()
            .find(|(_, range)| range.start < end && offset < range.end);
        found.map(|(part, _)| *part)
    }

    /// Takes note of where a part is: within the file, and on no other part.
    pub(super) fn place(&mut self, part: &'static str, offset: u64, length: u64) -> Result<(), Refusal> {
        let end = self.within(part, offset, length)?;
        if let Some(other) = self.on(offset, length) {
            return Err(Refusal::Overlap { part, offset, other });
        }
        self.parts.push((part, offset..end));
        Ok(())
    }

    /// As [`Self::place`], for a table that must not be larger than `most`.
    pub(super) fn place_table(
        &mut self,
        part: &'static str,
        offset: u64,
        length: u64,
        most: u64,
    ) -> Result<(), Refusal> {
        if length > most {
            return Err(Refusal::TableTooLong {
                part,
                bytes: length,
                most,
            });
        }
        self.place(part, offset, length)
    }

    /// Reads a part; the caller bounds its length.
    pub(super) fn read(&mut self, part: &'static str, offset: u64, length: u64) -> Result<Vec<u8>, Refusal> {
        self.within(part, offset, length)?;
        let too_long = Refusal::TableTooLong {
            part,
            bytes: length,
            most: MAX_TABLE_BYTES,
        };
        let size = match usize::try_from(length) {
            Ok(size) if length <= MAX_TABLE_BYTES => size,
            _ => return Err(too_long),
        };
        let mut bytes = vec![0; size];
        self.reader
            .seek(SeekFrom::Start(offset))
            .and_then(|_| self.reader.read_exact(&mut bytes))
            .map_err(|error| unreadable(offset, &error))?;
        Ok(bytes)
    }

    /// Gives each entry of a table, with its number, to a function.
    pub(super) fn entries<const N: usize>(
        &mut self,
        part: &'static str,
        offset: u64,
        count: u64,
        mut check: impl FnMut(&Self, u64, [u8; N]) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let (piece, size) = ((PIECE / N) as u64, N as u64);
        let mut index = 0;
        while index < count {
            let now = piece.min(count - index);
            let bytes = self.read(part, offset + index * size, now * size)?;
            for entry in bytes.as_chunks::<N>().0 {
                check(self, index, *entry)?;
                index += 1;
            }
        }
        Ok(())
    }
}

fn unreadable(at: u64, error: &io::Error) -> Refusal {
    Refusal::Unreadable {
        at,
        kind: error.kind(),
    }
}

/// `N` bytes of a header that was read whole.
pub(super) fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    *bytes[at..]
        .first_chunk()
        .expect("the header was read to beyond its fields")
}

/// A number, lowest byte first.
pub(super) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(take(bytes, at))
}

/// A number, lowest byte first.
pub(super) fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(take(bytes, at))
}

/// A number, highest byte first.
pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(take(bytes, at))
}

/// A number, highest byte first.
pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(take(bytes, at))
}

/// Refuses a field unless it is right.
pub(super) fn field(field: &'static str, value: impl Into<u64>, right: bool) -> Result<(), Refusal> {
    if right {
        return Ok(());
    }
    Err(Refusal::Field {
        field,
        value: value.into(),
    })
}
