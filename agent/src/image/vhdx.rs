//! VHDX, as the specification MS-VHDX describes it. Numbers have their lowest byte first. Called by [`super::inspect`].
//!
//! An image with a log that is still to be replayed is refused: replaying means writing, and images are never written to.

use std::io::{Read, Seek};

use uuid::{Uuid, uuid};

use super::{
    MAX_SIZE_BYTES, MAX_TABLE_BYTES, Refusal,
    source::{Source, field, le32, le64, take},
};

const MIB: u64 = 1 << 20;
/// Where the two headers are, and how long each is.
const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const HEADER_BYTES: u64 = 4 << 10;
/// Where the region table is that readers use; its copy follows.
const REGION_TABLE: u64 = 192 << 10;
/// Length of a region table, and of the table of metadata items.
const TABLE_BYTES: u64 = 64 << 10;
/// Most entries of either.
const MAX_ENTRIES: u32 = 2047;

const BAT: Uuid = uuid!("2dc27766-f623-4200-9d64-115e9bfd4a08");
const METADATA: Uuid = uuid!("8b7ca206-4790-4b9a-b8fe-575f050f886e");

const FILE_PARAMETERS: Uuid = uuid!("caa16737-fa36-4d43-b3b6-33f0aa44e76b");
const DISK_SIZE: Uuid = uuid!("2fa54224-cd1b-4876-b211-5dbed83bf4b8");
const DISK_ID: Uuid = uuid!("beca12ab-b2e6-4523-93ef-c309e000c746");
const LOGICAL_SECTOR: Uuid = uuid!("8141bf1d-a96f-4709-ba47-f233a8faab5f");
const PHYSICAL_SECTOR: Uuid = uuid!("cda348c7-445d-4471-9cc9-e9885251c556");
const PARENT_LOCATOR: Uuid = uuid!("a8d35f2d-b30b-454d-abf7-d3d84834ab0c");

/// Bit of the file parameters: there is a parent.
const HAS_PARENT: u32 = 1 << 1;
/// Bit of a metadata item: who does not know it must not open the image.
const ITEM_REQUIRED: u32 = 1 << 2;
/// Sectors that one block of sector bitmaps covers.
const SECTORS_OF_A_CHUNK: u64 = 1 << 23;

/// The size that a guest sees.
pub(super) fn virtual_size<R: Read + Seek>(source: &mut Source<R>) -> Result<u64, Refusal> {
    source.place("header section", 0, MIB)?;
    header(source)?;
    let regions = regions(source)?;
    let disk = metadata(source, &regions)?;
    bat(source, &regions, &disk)?;
    Ok(disk.size)
}

/// CRC-32C (Castagnoli), as of RFC 3720, with the four bytes at `field`, where the sum itself is kept, taken for zeros.
pub fn crc32c(bytes: &[u8], field: usize) -> u32 {
    let sum = bytes.iter().enumerate().fold(u32::MAX, |sum, (at, byte)| {
        let byte = if at >= field && at - field < 4 { 0 } else { *byte };
        (sum >> 8) ^ CRC_OF_BYTE[usize::from(sum.to_le_bytes()[0] ^ byte)]
    });
    !sum
}

const CRC_OF_BYTE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256_u32 {
        let (mut sum, mut bit) = (byte, 0);
        while bit < 8 {
            sum = (sum >> 1) ^ (0x82f6_3b78 & (sum & 1).wrapping_neg());
            bit += 1;
        }
        table[byte as usize] = sum;
        byte += 1;
    }
    table
};

fn is_sound(bytes: &[u8], signature: &[u8; 4]) -> bool {
    bytes.starts_with(signature) && le32(bytes, 4) == crc32c(bytes, 4)
}

fn guid(bytes: &[u8], at: usize) -> Uuid {
    Uuid::from_bytes_le(take(bytes, at))
}

/// Of two headers the sound one with the higher number counts.
fn header<R: Read + Seek>(source: &mut Source<R>) -> Result<(), Refusal> {
    let mut current: Option<Vec<u8>> = None;
    for offset in HEADERS {
        let header = source.read("header", offset, HEADER_BYTES)?;
        if !is_sound(&header, b"head") {
            continue;
        }
        let number = le64(&header, 8);
        match &current {
            Some(other) if le64(other, 8) > number => {}
            Some(other) if le64(other, 8) == number && *other != header => {
                field("sequence number of both headers", number, false)?;
            }
            _ => current = Some(header),
        }
    }
    let header = current.ok_or(Refusal::Checksum { part: "headers" })?;
    let version = u16::from_le_bytes(take(&header, 66));
    if version != 1 {
        let version = version.into();
        return Err(Refusal::Version { version });
    }
    if !guid(&header, 48).is_nil() {
        return Err(Refusal::Unclean {
            what: "a log that is still to be replayed",
        });
    }
    let (length, offset) = (le32(&header, 68), le64(&header, 72));
    field("log's length", length, u64::from(length).is_multiple_of(MIB))?;
    field("log's offset", offset, offset.is_multiple_of(MIB))?;
    match length {
        0 => Ok(()),
        length => source.place("log", offset, length.into()),
    }
}

struct Region {
    offset: u64,
    length: u64,
}

struct Regions {
    bat: Region,
    metadata: Region,
}

fn regions<R: Read + Seek>(source: &mut Source<R>) -> Result<Regions, Refusal> {
    let table = source.read("region table", REGION_TABLE, TABLE_BYTES)?;
    if !is_sound(&table, b"regi") {
        return Err(Refusal::Checksum { part: "region table" });
    }
    let count = le32(&table, 8);
    field("number of regions", count, count <= MAX_ENTRIES)?;
    let (mut bat, mut metadata) = (None, None);
    let entries = table[16..].as_chunks::<32>().0;
    for entry in entries.iter().take(count as usize) {
        let id = guid(entry, 0);
        let region = Region {
            offset: le64(entry, 16),
            length: le32(entry, 24).into(),
        };
        let (part, found) = match id {
            BAT => ("block allocation table", Some(&mut bat)),
            METADATA => ("metadata region", Some(&mut metadata)),
            id if le32(entry, 28) & 1 != 0 => return Err(Refusal::Unknown { part: "region", id }),
            _ => ("region", None),
        };
        let whole = region.length.is_multiple_of(MIB) && region.length > 0;
        field("length of a region", region.length, whole)?;
        field(
            "offset of a region",
            region.offset,
            region.offset.is_multiple_of(MIB),
        )?;
        source.place_table(part, region.offset, region.length, u64::MAX)?;
        if let Some(found) = found
            && found.replace(region).is_some()
        {
            field("number of regions of a kind", 2_u32, false)?;
        }
    }
    Ok(Regions {
        bat: bat.ok_or(Refusal::Missing {
            part: "block allocation table",
        })?,
        metadata: metadata.ok_or(Refusal::Missing {
            part: "metadata region",
        })?,
    })
}

struct Disk {
    size: u64,
    block: u64,
    sector: u64,
}

fn metadata<R: Read + Seek>(source: &mut Source<R>, regions: &Regions) -> Result<Disk, Refusal> {
    let region = &regions.metadata;
    let table = source.read("metadata table", region.offset, TABLE_BYTES)?;
    if !table.starts_with(b"metadata") {
        return Err(Refusal::Missing {
            part: "metadata table",
        });
    }
    let count = u16::from_le_bytes(take(&table, 10));
    field("number of metadata items", count, u32::from(count) <= MAX_ENTRIES)?;
    let (mut parameters, mut size, mut sector) = (None, None, None);
    let entries = table[32..].as_chunks::<32>().0;
    for entry in entries.iter().take(count.into()) {
        let id = guid(entry, 0);
        let (known, least) = match id {
            FILE_PARAMETERS => (Some(&mut parameters), 8),
            DISK_SIZE => (Some(&mut size), 8),
            LOGICAL_SECTOR => (Some(&mut sector), 4),
            PHYSICAL_SECTOR | DISK_ID => (None, 4),
            PARENT_LOCATOR => {
                return Err(Refusal::Parent {
                    field: "parent locator",
                });
            }
            id if le32(entry, 24) & ITEM_REQUIRED != 0 => {
                return Err(Refusal::Unknown {
                    part: "metadata item",
                    id,
                });
            }
            _ => (None, 0),
        };
        let (offset, length) = (u64::from(le32(entry, 16)), u64::from(le32(entry, 20)));
        let within = length >= least && offset >= TABLE_BYTES && offset + length <= region.length;
        // An item without content has no place.
        if !within && (length, offset) != (0, 0) || length < least {
            return Err(Refusal::OutOfFile {
                part: "metadata item",
                offset,
                length,
            });
        }
        if let Some(known) = known {
            let bytes = source.read("metadata item", region.offset + offset, least)?;
            if known.replace(bytes).is_some() {
                field("number of metadata items of a kind", 2_u32, false)?;
            }
        }
    }
    let parameters = parameters.ok_or(Refusal::Missing {
        part: "file parameters",
    })?;
    let size = size.ok_or(Refusal::Missing { part: "disk size" })?;
    let sector = sector.ok_or(Refusal::Missing { part: "sector size" })?;
    disk(&parameters, le64(&size, 0), le32(&sector, 0))
}

fn disk(parameters: &[u8], size: u64, sector: u32) -> Result<Disk, Refusal> {
    if le32(parameters, 4) & HAS_PARENT != 0 {
        return Err(Refusal::Parent {
            field: "file parameters",
        });
    }
    let block = u64::from(le32(parameters, 0));
    let sound = block.is_power_of_two() && (MIB..=256 * MIB).contains(&block);
    field("block size", block, sound)?;
    // The specification has 4096 too, of which QEMU makes a disk of an eighth of its size.
    field("logical sector size", sector, sector == 512)?;
    let sector = u64::from(sector);
    match size {
        0 => Err(Refusal::Empty),
        bytes if bytes > MAX_SIZE_BYTES => Err(Refusal::TooLarge { bytes }),
        _ => Ok(Disk { size, block, sector }),
    }
}

/// The block allocation table covers the disk, and leads to blocks that are in the file.
fn bat<R: Read + Seek>(source: &mut Source<R>, regions: &Regions, disk: &Disk) -> Result<(), Refusal> {
    let part = "block allocation table";
    let region = &regions.bat;
    if region.length > MAX_TABLE_BYTES {
        return Err(Refusal::TableTooLong {
            part,
            bytes: region.length,
            most: MAX_TABLE_BYTES,
        });
    }
    // After so many blocks comes an entry for sector bitmaps, which only images with a parent use.
    let chunk = SECTORS_OF_A_CHUNK * disk.sector / disk.block;
    let blocks = disk.size.div_ceil(disk.block);
    let needs = blocks + (blocks - 1) / chunk;
    let has = region.length / 8;
    if has < needs {
        return Err(Refusal::TableTooShort { part, has, needs });
    }
    let block = disk.block;
    source.entries(part, region.offset, needs, |source, index, entry| {
        let value = u64::from_le_bytes(entry);
        let offset = value & !(MIB - 1);
        let sound = match value & 7 {
            _ if index % (chunk + 1) == chunk => true,
            // Not there, undefined, zero, unmapped (as now, and as of an older draft).
            0 | 1 | 2 | 3 | 5 => true,
            6 => source.within(part, offset, block).is_ok() && source.on(offset, block).is_none(),
            _ => false,
        };
        match sound {
            true => Ok(()),
            false => Err(Refusal::Entry { part, index, value }),
        }
    })
}
