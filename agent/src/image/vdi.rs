//! VDI, as the comments of QEMU's block/vdi.c describe it. Numbers have their lowest byte first. Called by [`super::inspect`].

use std::io::{Read, Seek};

use super::{
    MAX_SIZE_BYTES, MAX_TABLE_BYTES, Refusal, SECTOR,
    source::{Source, field, le32, le64},
};

const HEADER_BYTES: u64 = 512;
const VERSION: u32 = 0x0001_0001;
const DYNAMIC: u32 = 1;
const FIXED: u32 = 2;
/// The only size of a block that is in use.
const BLOCK: u64 = 1 << 20;
/// Entries of the block map from here on lead to no block: 0xfffffffe is discarded, 0xffffffff not there yet.
const NO_BLOCK: u32 = 0xffff_fffe;

/// The size that a guest sees.
pub(super) fn virtual_size<R: Read + Seek>(source: &mut Source<R>) -> Result<u64, Refusal> {
    let header = source.read("header", 0, HEADER_BYTES)?;
    source.place("header", 0, HEADER_BYTES)?;
    let version = le32(&header, 0x44);
    if version != VERSION {
        return Err(Refusal::Version { version });
    }
    kind(&header)?;
    let (sector, block, extra) = (le32(&header, 0x168), le32(&header, 0x178), le32(&header, 0x17c));
    field("sector size", sector, u64::from(sector) == SECTOR)?;
    field("block size", block, u64::from(block) == BLOCK)?;
    field("bytes before a block", extra, extra == 0)?;
    let size = le64(&header, 0x170);
    if size > MAX_SIZE_BYTES {
        return Err(Refusal::TooLarge { bytes: size });
    }
    block_map(source, &header, size)?;
    // VirtualBox makes odd sizes of odd raw files; readers round up.
    Ok(size.next_multiple_of(SECTOR))
}

fn kind(header: &[u8]) -> Result<(), Refusal> {
    match le32(header, 0x4c) {
        DYNAMIC | FIXED => {}
        kind => {
            return Err(Refusal::Kind {
                kind: format!("vdi type {kind}"),
            });
        }
    }
    for (at, field) in [(0x1a8, "link"), (0x1b8, "parent")] {
        if header[at..at + 16].iter().any(|byte| *byte != 0) {
            return Err(Refusal::Parent { field });
        }
    }
    Ok(())
}

fn block_map<R: Read + Seek>(source: &mut Source<R>, header: &[u8], size: u64) -> Result<(), Refusal> {
    let part = "block map";
    let (map, data) = (u64::from(le32(header, 0x154)), u64::from(le32(header, 0x158)));
    let blocks = u64::from(le32(header, 0x180));
    field("block map's offset", map, map.is_multiple_of(SECTOR))?;
    field("data's offset", data, data.is_multiple_of(SECTOR))?;
    let needs = size.div_ceil(BLOCK);
    if blocks < needs {
        return Err(Refusal::TableTooShort {
            part,
            has: blocks,
            needs,
        });
    }
    source.place_table(part, map, blocks * 4, MAX_TABLE_BYTES)?;
    // Blocks follow the map.
    if data < map + blocks * 4 {
        return Err(Refusal::Overlap {
            part: "data",
            offset: data,
            other: part,
        });
    }
    source.entries(part, map, blocks, |source, index, entry| {
        let value = u32::from_le_bytes(entry);
        let offset = data + u64::from(value) * BLOCK;
        if value >= NO_BLOCK || source.within(part, offset, BLOCK).is_ok() {
            return Ok(());
        }
        let value = value.into();
        Err(Refusal::Entry { part, index, value })
    })
}
