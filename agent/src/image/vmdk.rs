//! VMDK in one sparse file, as VMware's Virtual Disk Format describes it and QEMU's block/vmdk.c reads it. Numbers have their
//! lowest byte first. Called by [`super::inspect`].
//!
//! Readers differ, so what any of them would use is judged: QEMU looks for a parent in the 20 sectors from the second one,
//! whatever the header says of the descriptor; takes a header without capacity for a pointer to a descriptor; and believes
//! the footer of a stream, not its header.

use std::io::{Read, Seek};

use super::{
    MAX_SIZE_BYTES, MAX_TABLE_BYTES, Refusal, SECTOR,
    source::{Source, field, le32, le64, take},
};

// Flags.
const NEWLINE_TEST: u32 = 1;
const REDUNDANT_TABLE: u32 = 1 << 1;
const ZERO_GRAINS: u32 = 1 << 2;
const COMPRESSED: u32 = 1 << 16;
const MARKERS: u32 = 1 << 17;

/// In place of the grain directory's offset: the header at the end of the file has it.
const AT_END: u64 = u64::MAX;
/// Kind of the marker before that header.
const FOOTER: u32 = 3;
/// Sectors of marker, header and end marker at the end of a stream.
const FOOTER_SECTORS: u64 = 3;
/// Entries of a grain table, of 4 bytes each.
const GRAIN_TABLE_ENTRIES: u32 = 512;
const GRAIN_TABLE_BYTES: u64 = 2048;
/// Where QEMU looks for the descriptor, and how far.
const DESCRIPTOR_OFFSET: u64 = SECTOR;
const DESCRIPTOR_SECTORS: u64 = 20;
/// Most sectors of a descriptor.
const MAX_DESCRIPTOR_SECTORS: u64 = 128;
/// So much of a line of the descriptor is shown.
const SHOWN: usize = 80;

/// The size that a guest sees.
pub(super) fn virtual_size<R: Read + Seek>(source: &mut Source<R>) -> Result<u64, Refusal> {
    let first = source.read("header", 0, SECTOR)?;
    let capacity = le64(&first, 12);
    // Before anything else: such a header only points to a descriptor.
    if capacity == 0 {
        return Err(Refusal::Empty);
    }
    if capacity > MAX_SIZE_BYTES / SECTOR {
        let bytes = capacity.saturating_mul(SECTOR);
        return Err(Refusal::TooLarge { bytes });
    }
    source.place("header", 0, SECTOR)?;
    let sectors = le64(&first, 36);
    field("descriptor's offset", le64(&first, 28), le64(&first, 28) == 1)?;
    field(
        "descriptor's size",
        sectors,
        (1..=MAX_DESCRIPTOR_SECTORS).contains(&sectors),
    )?;
    source.place("descriptor", DESCRIPTOR_OFFSET, sectors * SECTOR)?;
    descriptor(source, sectors)?;
    let header = match le64(&first, 56) {
        AT_END => footer(source, capacity)?,
        _ => first,
    };
    check_header(&header)?;
    tables(source, &header, capacity)?;
    Ok(capacity * SECTOR)
}

/// The header at the end of a stream.
fn footer<R: Read + Seek>(source: &mut Source<R>, capacity: u64) -> Result<Vec<u8>, Refusal> {
    field(
        "length of a stream",
        source.length(),
        source.length().is_multiple_of(SECTOR),
    )?;
    let length = FOOTER_SECTORS * SECTOR;
    let offset = source.length().saturating_sub(length);
    source.place("footer", offset, length)?;
    let marker = source.read("footer", offset, SECTOR)?;
    let header = source.read("footer", offset + SECTOR, SECTOR)?;
    let end = source.read("footer", offset + 2 * SECTOR, SECTOR)?;
    let sound = le32(&marker, 8) == 0
        && le32(&marker, 12) == FOOTER
        && header.starts_with(b"KDMV")
        && end[..16].iter().all(|byte| *byte == 0);
    if !sound {
        return Err(Refusal::Missing { part: "footer" });
    }
    let again = le64(&header, 12);
    field("capacity in the footer", again, again == capacity)?;
    Ok(header)
}

fn check_header(header: &[u8]) -> Result<(), Refusal> {
    let version = le32(header, 4);
    if !(1..=3).contains(&version) {
        return Err(Refusal::Version { version });
    }
    let flags = le32(header, 8);
    let unknown = flags & !(NEWLINE_TEST | REDUNDANT_TABLE | ZERO_GRAINS | COMPRESSED | MARKERS);
    if unknown != 0 {
        return Err(Refusal::Features { bits: unknown.into() });
    }
    if header[72] != 0 {
        return Err(Refusal::Unclean {
            what: "unclean shutdown",
        });
    }
    // A transfer as text has changed the ends of lines, and much else.
    if flags & NEWLINE_TEST != 0 && header[73..77] != *b"\n \r\n" {
        return Err(Refusal::Checksum { part: "line ends" });
    }
    let compression = u16::from_le_bytes(take(header, 77));
    field("compression", compression, compression <= 1)?;
    let grain = le64(header, 20);
    field(
        "grain size",
        grain,
        grain.is_power_of_two() && (8..=1 << 16).contains(&grain),
    )?;
    let entries = le32(header, 44);
    field("grain table's entries", entries, entries == GRAIN_TABLE_ENTRIES)
}

/// Grain directories cover the disk, and lead to grain tables that are in the file.
fn tables<R: Read + Seek>(source: &mut Source<R>, header: &[u8], capacity: u64) -> Result<(), Refusal> {
    let overhead = le64(header, 64);
    source.within("overhead", 0, overhead.saturating_mul(SECTOR))?;
    let entries = capacity.div_ceil(u64::from(GRAIN_TABLE_ENTRIES) * le64(header, 20));
    let redundant = le32(header, 8) & REDUNDANT_TABLE != 0;
    let directories = [
        ("grain directory", le64(header, 56), true),
        ("redundant grain directory", le64(header, 48), redundant),
    ];
    for (part, sector, used) in directories {
        if !used {
            continue;
        }
        let offset = sector.saturating_mul(SECTOR);
        source.place_table(part, offset, entries * 4, MAX_TABLE_BYTES)?;
        source.entries(part, offset, entries, |source, index, entry: [u8; 4]| {
            let value = u64::from(u32::from_le_bytes(entry));
            let offset = value * SECTOR;
            let sound = value == 0
                || source.within(part, offset, GRAIN_TABLE_BYTES).is_ok()
                    && source.on(offset, GRAIN_TABLE_BYTES).is_none();
            match sound {
                true => Ok(()),
                false => Err(Refusal::Entry { part, index, value }),
            }
        })?;
    }
    Ok(())
}

fn descriptor<R: Read + Seek>(source: &mut Source<R>, sectors: u64) -> Result<(), Refusal> {
    let length = sectors.max(DESCRIPTOR_SECTORS) * SECTOR;
    let length = length.min(source.length() - DESCRIPTOR_OFFSET);
    let bytes = source.read("descriptor", DESCRIPTOR_OFFSET, length)?;
    let hint = b"parentfilenamehint";
    let lower = bytes.to_ascii_lowercase();
    if lower.windows(hint.len()).any(|window| window == hint) {
        return Err(Refusal::Parent {
            field: "parentFileNameHint",
        });
    }
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(text);
    let (mut kind, mut parent, mut extents) = (false, false, 0);
    for line in text.lines().map(str::trim) {
        if is_extent(line) {
            check_extent(line)?;
            extents += 1;
            if extents > 1 {
                return Err(Refusal::Extent { line: shown(line) });
            }
        } else if let Some((key, value)) = line.split_once('=') {
            let value = value.trim().trim_matches('"');
            match key.trim().to_ascii_lowercase().as_str() {
                "parentcid" if value.eq_ignore_ascii_case("ffffffff") => parent = true,
                "parentcid" => return Err(Refusal::Parent { field: "parentCID" }),
                "createtype" if matches!(value, "monolithicSparse" | "streamOptimized") => kind = true,
                "createtype" => return Err(Refusal::Kind { kind: shown(value) }),
                _ => {}
            }
        }
    }
    let needed = [
        (kind, "createType in its descriptor"),
        (parent, "parentCID in its descriptor"),
        (extents == 1, "extent in its descriptor"),
    ];
    match needed.iter().find(|(there, _)| !there) {
        Some((_, part)) => Err(Refusal::Missing { part }),
        None => Ok(()),
    }
}

fn is_extent(line: &str) -> bool {
    let access = line.split_ascii_whitespace().next().unwrap_or_default();
    ["RW", "RDONLY", "NOACCESS"]
        .iter()
        .any(|word| access.eq_ignore_ascii_case(word))
}

/// The one extent is this file. Its name may be an older one of it, so it is not compared; it must be a mere name.
fn check_extent(line: &str) -> Result<(), Refusal> {
    let mut words = line.splitn(4, ' ');
    let kind = words.nth(2).unwrap_or_default();
    let name = words.next().unwrap_or_default().trim();
    let name = name.strip_prefix('"').and_then(|name| name.strip_suffix('"'));
    let sound = kind == "SPARSE" && name.is_some_and(|name| !name.contains(['/', '\\', ':', '"']));
    match sound {
        true => Ok(()),
        false => Err(Refusal::Extent { line: shown(line) }),
    }
}

fn shown(text: &str) -> String {
    text.chars().take(SHOWN).collect()
}
