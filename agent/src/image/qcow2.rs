//! qcow2, versions 2 and 3; the format is described in QEMU's docs/interop/qcow2.rst. Numbers have their highest byte first.
//! Called by [`super::inspect`].
//!
//! Internal snapshots and bitmaps are refused, although they lie in the file: a copy does not have them, so that they would be
//! lost in silence, and `qemu-img` parses their tables for nothing when it opens the file.

use std::io::{Read, Seek};

use super::{
    MAX_SIZE_BYTES, Refusal,
    source::{Source, be32, be64, field},
};

// Bits of the incompatible features.
const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
/// Of the autoclear features: the data file is raw.
const RAW_DATA_FILE: u64 = 1 << 1;

// Header extensions.
const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const BITMAPS: u32 = 0x2385_2875;
const ENCRYPTION: u32 = 0x0537_be77;
const DATA_FILE_NAME: u32 = 0x4441_5441;

/// Most bytes of an L1 table and of a refcount table that QEMU opens.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_BYTES: u64 = 8 << 20;
/// The most an L1 entry may hold besides an offset: its bit 63, that the table is not shared.
const L1_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const L1_NOT_SHARED: u64 = 1 << 63;

/// Length of the header of version 2, and least one of version 3.
const V2_LENGTH: u64 = 72;
const V3_LENGTH: u64 = 104;

struct Header {
    length: u64,
    cluster: u64,
    size: u64,
    features: u64,
    l1_offset: u64,
    l1_entries: u64,
}

/// The size that a guest sees.
pub(super) fn virtual_size<R: Read + Seek>(source: &mut Source<R>) -> Result<u64, Refusal> {
    let header = header(source)?;
    extensions(source, &header)?;
    l1(source, &header)?;
    Ok(header.size)
}

fn header<R: Read + Seek>(source: &mut Source<R>) -> Result<Header, Refusal> {
    let mut bytes = source.read("header", 0, V2_LENGTH)?;
    let version = be32(&bytes, 4);
    let mut length = V2_LENGTH;
    let cluster_bits = be32(&bytes, 20);
    field("cluster_bits", cluster_bits, (9..=21).contains(&cluster_bits))?;
    let cluster = 1 << cluster_bits;
    match version {
        2 => {}
        3 => {
            bytes = source.read("header", 0, V3_LENGTH)?;
            length = be32(&bytes, 100).into();
            let right = length >= V3_LENGTH && length.is_multiple_of(8) && length <= cluster;
            field("header length", length, right)?;
        }
        version => return Err(Refusal::Version { version }),
    }
    source.within("header", 0, length)?;
    source.place("header", 0, cluster.min(source.length()))?;
    let features = match version {
        3 => features(source, &bytes, length, cluster_bits)?,
        _ => 0,
    };
    references(&bytes)?;
    tables(source, &bytes, cluster)?;
    Ok(Header {
        length,
        cluster,
        size: be64(&bytes, 24),
        features,
        l1_offset: be64(&bytes, 40),
        l1_entries: be32(&bytes, 36).into(),
    })
}

/// The fields that version 3 has more.
fn features<R: Read + Seek>(
    source: &mut Source<R>,
    bytes: &[u8],
    length: u64,
    cluster_bits: u32,
) -> Result<u64, Refusal> {
    let features = be64(bytes, 72);
    let unknown = features & !(DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2);
    if unknown != 0 {
        return Err(Refusal::Features { bits: unknown });
    }
    if features & DATA_FILE != 0 || be64(bytes, 88) & RAW_DATA_FILE != 0 {
        return Err(Refusal::DataFile { field: "feature bit" });
    }
    for (bit, what) in [(DIRTY, "dirty"), (CORRUPT, "corrupt")] {
        if features & bit != 0 {
            return Err(Refusal::Unclean { what });
        }
    }
    let order = be32(bytes, 96);
    field("refcount order", order, order <= 6)?;
    let compression = match length {
        V3_LENGTH => 0,
        _ => source.read("header", V3_LENGTH, 1)?[0],
    };
    let right = compression <= 1 && (compression != 0) == (features & COMPRESSION != 0);
    field("compression type", compression, right)?;
    // A cluster has 32 subclusters of at least a sector each.
    let right = features & EXTENDED_L2 == 0 || cluster_bits >= 14;
    field("cluster_bits", cluster_bits, right)?;
    Ok(features)
}

/// Other files, keys, and what a copy would lose.
fn references(bytes: &[u8]) -> Result<(), Refusal> {
    if be64(bytes, 8) != 0 || be32(bytes, 16) != 0 {
        return Err(Refusal::Parent {
            field: "backing file",
        });
    }
    if be32(bytes, 32) != 0 {
        return Err(Refusal::Encrypted);
    }
    match be32(bytes, 60) {
        0 => Ok(()),
        count => Err(Refusal::Snapshots { count }),
    }
}

/// Where the tables are.
fn tables<R: Read + Seek>(source: &mut Source<R>, bytes: &[u8], cluster: u64) -> Result<(), Refusal> {
    let l1_offset = be64(bytes, 40);
    let l1_bytes = u64::from(be32(bytes, 36)) * 8;
    field("L1 table's offset", l1_offset, l1_offset.is_multiple_of(cluster))?;
    source.place_table("L1 table", l1_offset, l1_bytes, MAX_L1_BYTES)?;
    let offset = be64(bytes, 48);
    let clusters = u64::from(be32(bytes, 56));
    field("refcount table's offset", offset, offset.is_multiple_of(cluster))?;
    field("refcount table's size", clusters, clusters > 0)?;
    source.place_table("refcount table", offset, clusters * cluster, MAX_REFCOUNT_BYTES)
}

fn extensions<R: Read + Seek>(source: &mut Source<R>, header: &Header) -> Result<(), Refusal> {
    let end = header.cluster.min(source.length());
    let bytes = source.read("header extensions", header.length, end - header.length)?;
    let mut rest = bytes.as_slice();
    while rest.len() >= 8 {
        let (kind, length) = (be32(rest, 0), be32(rest, 4));
        if kind == END {
            break;
        }
        let runs_on = Refusal::Extension { kind, length };
        let padded = usize::try_from(length)
            .ok()
            .and_then(|length| length.checked_next_multiple_of(8));
        let (Some(padded), Some(data)) = (padded, rest.get(8..)) else {
            return Err(runs_on);
        };
        let Some((data, after)) = data.split_at_checked(padded) else {
            return Err(runs_on);
        };
        match kind {
            BACKING_FORMAT => {
                return Err(Refusal::Parent {
                    field: "backing format",
                });
            }
            DATA_FILE_NAME => {
                return Err(Refusal::DataFile {
                    field: "header extension",
                });
            }
            ENCRYPTION => return Err(Refusal::Encrypted),
            BITMAPS => {
                let count = data.first_chunk().map_or(0, |count| u32::from_be_bytes(*count));
                return Err(Refusal::Bitmaps { count });
            }
            // Names of features, and whatever may be overlooked by its own account.
            _ => {}
        }
        rest = after;
    }
    Ok(())
}

/// The L1 table covers the disk, and leads to L2 tables that are in the file.
fn l1<R: Read + Seek>(source: &mut Source<R>, header: &Header) -> Result<(), Refusal> {
    let entry = match header.features & EXTENDED_L2 {
        0 => 8,
        _ => 16,
    };
    if header.size > MAX_SIZE_BYTES {
        return Err(Refusal::TooLarge { bytes: header.size });
    }
    let needs = header.size.div_ceil(header.cluster / entry * header.cluster);
    if header.l1_entries < needs {
        return Err(Refusal::TableTooShort {
            part: "L1 table",
            has: header.l1_entries,
            needs,
        });
    }
    let cluster = header.cluster;
    source.entries(
        "L1 table",
        header.l1_offset,
        header.l1_entries,
        |source, index, entry| {
            let value = u64::from_be_bytes(entry);
            let offset = value & L1_OFFSET;
            let sound = value & !(L1_OFFSET | L1_NOT_SHARED) == 0
                && offset.is_multiple_of(cluster)
                && (offset == 0
                    || source.within("L2 table", offset, cluster).is_ok()
                        && source.on(offset, cluster).is_none());
            match sound {
                true => Ok(()),
                false => Err(Refusal::Entry {
                    part: "L1 table",
                    index,
                    value,
                }),
            }
        },
    )
}
