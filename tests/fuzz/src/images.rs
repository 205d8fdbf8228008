//! Target `images`: disk images that VMs' disks are made from.
//!
//! Promises: no bytes make a panic or an overflow; no more is read than a few times the file, in reads that stay within it;
//! what is taken has a size that a disk may have; what is refused says why in one short line.
//!
//! An input is a file of zeros with pieces laid over it, so that structures megabytes apart fit in an input: the format, whether
//! VHDX's checksums are made right, the length in KiB (4 bytes) and in bytes besides (2), then pieces: place (4 bytes), count (1),
//! bytes.

use std::{
    io::{self, Cursor, Read, Seek, SeekFrom},
    ops::Range,
};

use dalgu_agent::image::{Format, MAX_SIZE_BYTES, Refusal, crc32c, inspect};

use crate::input::Input;

/// Longest file.
const MAX_LENGTH: usize = 4 << 20;
/// What VHDX has checksums of: two headers, the region table.
const SUMMED: [Range<usize>; 3] = [64 << 10..68 << 10, 128 << 10..132 << 10, 192 << 10..256 << 10];
/// Longest text for an operator.
const MAX_TEXT: usize = 1000;

/// Takes one input.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let format = input.pick(&Format::ALL);
    let summed = input.byte() & 1 == 1;
    let mut file = file(&mut input);
    if summed {
        sum(&mut file);
    }
    let length = file.len() as u64;
    let mut reader = Watched {
        file: Cursor::new(file),
        read: 0,
    };
    match inspect(&mut reader, format) {
        Ok(found) => {
            assert_eq!(found.format, format);
            assert!((1..=MAX_SIZE_BYTES).contains(&found.virtual_size_bytes));
            assert!(found.virtual_size_bytes.is_multiple_of(512));
        }
        Err(Refusal::Unreadable { at, kind }) => panic!("a read at {at} left the file: {kind}"),
        Err(refusal) => {
            let text = refusal.to_string();
            assert!(
                text.len() <= MAX_TEXT && !text.contains(char::is_control),
                "{text:?}"
            );
        }
    }
    assert!(
        reader.read <= length * 3 + 512,
        "{} of {length} read",
        reader.read
    );
}

fn file(input: &mut Input<'_>) -> Vec<u8> {
    let kib = input.pair() << 16 | input.pair();
    let length = (kib << 10 | input.pair()) % (MAX_LENGTH + 1);
    let mut file = vec![0; length];
    while !input.is_empty() {
        let at = input.pair() << 16 | input.pair();
        let count = usize::from(input.byte());
        let bytes = input.bytes(count);
        if let Some(place) = file.get_mut(at..).and_then(|rest| rest.get_mut(..bytes.len())) {
            place.copy_from_slice(bytes);
        }
    }
    file
}

fn sum(file: &mut [u8]) {
    for range in SUMMED {
        if let Some(part) = file.get_mut(range) {
            let sum = crc32c(part, 4);
            part[4..8].copy_from_slice(&sum.to_le_bytes());
        }
    }
}

/// Counts what is read.
struct Watched {
    file: Cursor<Vec<u8>>,
    read: u64,
}

impl Read for Watched {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.read += read as u64;
        Ok(read)
    }
}

impl Seek for Watched {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}
