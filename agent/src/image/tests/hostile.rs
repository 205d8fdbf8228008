//! The hostile images: one table. The store of images imports each as a file besides.

use uuid::Uuid;

use super::{
    super::{Format, MAX_SIZE_BYTES, MAX_TABLE_BYTES, Refusal},
    build::{EXTENT, ITEM, Image, REGION, VALUES, descriptor, qcow2, stream, vdi, vhdx, vmdk},
};

/// One of them.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) format: Format,
    pub(crate) image: Image,
    pub(crate) refusal: Refusal,
}

fn field(field: &'static str, value: u64) -> Refusal {
    Refusal::Field { field, value }
}

fn overlap(part: &'static str, offset: u64, other: &'static str) -> Refusal {
    Refusal::Overlap { part, offset, other }
}

fn out_of_file(part: &'static str, offset: u64, length: u64) -> Refusal {
    Refusal::OutOfFile { part, offset, length }
}

fn too_short(part: &'static str, has: u64, needs: u64) -> Refusal {
    Refusal::TableTooShort { part, has, needs }
}

fn too_long(part: &'static str, bytes: u64, most: u64) -> Refusal {
    Refusal::TableTooLong { part, bytes, most }
}

fn entry(part: &'static str, index: u64, value: u64) -> Refusal {
    Refusal::Entry { part, index, value }
}

fn parent(field: &'static str) -> Refusal {
    Refusal::Parent { field }
}

/// All of them; what they refer to outside of themselves is this file, where its name is not what matters.
pub(crate) fn corpus(outside: &str) -> Vec<Case> {
    let formats = [
        (Format::Raw, raws(outside)),
        (Format::Qcow2, qcow2_references(outside)),
        (Format::Qcow2, qcow2_tables()),
        (Format::Vmdk, vmdks()),
        (Format::Vmdk, vmdk_descriptors(outside)),
        (Format::Vdi, vdis()),
        (Format::Vhdx, vhdx_references()),
        (Format::Vhdx, vhdx_tables()),
    ];
    let of = |(format, cases): (Format, Vec<(&'static str, Image, Refusal)>)| {
        cases.into_iter().map(move |(name, image, refusal)| Case {
            name,
            format,
            image,
            refusal,
        })
    };
    formats.into_iter().flat_map(of).collect()
}

/// A line for each: its name, its bytes, and why it is refused.
type Cases = Vec<(&'static str, Image, Refusal)>;

#[rustfmt::skip]
fn raws(outside: &str) -> Cases {
    let disguised = |found| Refusal::Disguised {
        said: Format::Raw,
        found,
    };
    let text = descriptor("monolithicFlat", "ffffffff", &format!("RW 8 FLAT \"{outside}\" 0"));
    vec![
        ("an empty raw", Image(vec![]), Refusal::Empty),
        ("a raw that is a qcow2", qcow2(), disguised("qcow2")),
        ("a raw that is a vmdk", vmdk(), disguised("vmdk")),
        ("a raw that is a vdi", vdi(), disguised("vdi")),
        ("a raw that is a vhdx", vhdx(), disguised("vhdx")),
        ("a raw that is a vhd", Image(b"conectix".to_vec()).long(512), disguised("vhd")),
        ("a raw that is a descriptor", Image(text.into_bytes()), disguised("a vmdk descriptor")),
        ("a raw that is a qed", Image(b"QED\0".to_vec()).long(512), disguised("qed")),
    ]
}

#[rustfmt::skip]
fn qcow2_references(outside: &str) -> Cases {
    let (file, length) = (outside.as_bytes(), u32::try_from(outside.len()).unwrap());
    let said = Format::Qcow2;
    let unclean = |what| Refusal::Unclean { what };
    let data_file = |field| Refusal::DataFile { field };
    let extension = |kind: u32, length: u32| qcow2().be32(104, kind).be32(108, length);
    vec![
        ("a qcow2 that is text", Image(b"not a qcow2 file".to_vec()), Refusal::NotSo { said }),
        ("a qcow2 that is a vmdk", vmdk(), Refusal::Disguised { said, found: "vmdk" }),
        ("version 1", qcow2().be32(4, 1), Refusal::Version { version: 1 }),
        ("version 4", qcow2().be32(4, 4), Refusal::Version { version: 4 }),
        ("a backing file", qcow2().be64(8, 200).be32(16, length).with(200, file), parent("backing file")),
        ("a backing file without a name", qcow2().be64(8, 200), parent("backing file")),
        ("a backing format", extension(0xe279_2aca, 3).with(112, b"raw"), parent("backing format")),
        ("a data file (CVE-2024-32498)", qcow2().be64(72, 4), data_file("feature bit")),
        ("a raw data file", qcow2().be64(88, 2), data_file("feature bit")),
        ("a data file's name", extension(0x4441_5441, length).with(112, file), data_file("header extension")),
        ("a data file's name after others", extension(0x6803_f857, 5).be32(120, 0x4441_5441), data_file("header extension")),
        ("encryption with AES", qcow2().be32(32, 1), Refusal::Encrypted),
        ("encryption with LUKS", qcow2().be32(32, 2), Refusal::Encrypted),
        ("an encryption header", extension(0x0537_be77, 16), Refusal::Encrypted),
        ("unknown features", qcow2().be64(72, 1 << 63 | 1 << 5), Refusal::Features { bits: 1 << 63 | 1 << 5 }),
        ("dirty", qcow2().be64(72, 1), unclean("dirty")),
        ("corrupt", qcow2().be64(72, 2), unclean("corrupt")),
        ("snapshots", qcow2().be32(60, 65536).be64(64, 1 << 60), Refusal::Snapshots { count: 65536 }),
        ("bitmaps", extension(0x2385_2875, 24).be32(112, 65535), Refusal::Bitmaps { count: 65535 }),
        ("an extension that runs on", extension(0x1234, 512), Refusal::Extension { kind: 0x1234, length: 512 }),
        ("an extension of 4 GiB", extension(0x1234, u32::MAX), Refusal::Extension { kind: 0x1234, length: u32::MAX }),
        ("compression without its bit", qcow2().be32(100, 112).with(104, &[1]), field("compression type", 1)),
        ("an unknown compression", qcow2().be64(72, 8).be32(100, 112).with(104, &[2]), field("compression type", 2)),
    ]
}

#[rustfmt::skip]
fn qcow2_tables() -> Cases {
    let (l1, refcounts) = ("L1 table", "refcount table");
    vec![
        ("a cut header", qcow2().long(60), out_of_file("header", 0, 72)),
        ("a cut header of version 3", qcow2().long(80), out_of_file("header", 0, 104)),
        ("clusters of 256 bytes", qcow2().be32(20, 8), field("cluster_bits", 8)),
        ("clusters of 4 MiB", qcow2().be32(20, 22), field("cluster_bits", 22)),
        ("clusters beyond any number", qcow2().be32(20, u32::MAX), field("cluster_bits", u32::MAX.into())),
        ("subclusters of half a sector", qcow2().be64(72, 16), field("cluster_bits", 9)),
        ("a header longer than a cluster", qcow2().be32(100, 520), field("header length", 520)),
        ("a header too short for its version", qcow2().be32(100, 72), field("header length", 72)),
        ("refcounts of 128 bits", qcow2().be32(96, 7), field("refcount order", 7)),
        ("an L1 table outside of the file", qcow2().be64(40, 1 << 40), out_of_file(l1, 1 << 40, 8)),
        ("an L1 table beyond any number", qcow2().be64(40, !511), out_of_file(l1, !511, 8)),
        ("an L1 table on the header", qcow2().be64(40, 0), overlap(l1, 0, "header")),
        ("an L1 table that is not aligned", qcow2().be64(40, 1537), field("L1 table's offset", 1537)),
        ("an L1 table of 32 GiB (CVE-2015-5162)", qcow2().be32(36, u32::MAX), too_long(l1, u64::from(u32::MAX) * 8, 32 << 20)),
        ("a disk too large for its L1 table", qcow2().be64(24, 64 << 40), too_short(l1, 1, 1 << 31)),
        ("a disk of 2^64 - 512 bytes", qcow2().be64(24, !511), Refusal::TooLarge { bytes: !511 }),
        ("no disk", qcow2().be64(24, 0), Refusal::Empty),
        ("half a sector", qcow2().be64(24, 256), field("virtual size", 256)),
        ("a refcount table outside of the file", qcow2().be64(48, 4096), out_of_file(refcounts, 4096, 512)),
        ("a refcount table on the L1 table", qcow2().be64(48, 1536), overlap(refcounts, 1536, l1)),
        ("a refcount table of 2 TiB", qcow2().be32(56, u32::MAX), too_long(refcounts, u64::from(u32::MAX) * 512, 8 << 20)),
        ("no refcount table", qcow2().be32(56, 0), field("refcount table's size", 0)),
        ("an L2 table outside of the file", qcow2().be64(1536, 1 << 63 | 1 << 40), entry(l1, 0, 1 << 63 | 1 << 40)),
        ("an L2 table on the L1 table", qcow2().be64(1536, 1536), entry(l1, 0, 1536)),
        ("reserved bits in the L1 table", qcow2().be64(1536, 1 << 62), entry(l1, 0, 1 << 62)),
    ]
}

#[rustfmt::skip]
fn vmdks() -> Cases {
    let directory = "grain directory";
    let missing = |part| Refusal::Missing { part };
    let many = MAX_SIZE_BYTES / 512;
    vec![
        ("a header that only points to a descriptor", vmdk().le64(12, 0), Refusal::Empty),
        ("a vmdk larger than a disk", vmdk().le64(12, 1 << 38), Refusal::TooLarge { bytes: 1 << 47 }),
        ("a capacity beyond any number", vmdk().le64(12, u64::MAX), Refusal::TooLarge { bytes: u64::MAX }),
        ("a vmdk of version 4", vmdk().le32(4, 4), Refusal::Version { version: 4 }),
        ("unknown flags", vmdk().le32(8, 0x8000_0001), Refusal::Features { bits: 0x8000_0000 }),
        ("an unclean shutdown", vmdk().with(72, &[1]), Refusal::Unclean { what: "unclean shutdown" }),
        ("changed line ends", vmdk().with(73, b"\n \n\n"), Refusal::Checksum { part: "line ends" }),
        ("an unknown compression of grains", vmdk().with(77, &[2, 0]), field("compression", 2)),
        ("no grain size", vmdk().le64(20, 0), field("grain size", 0)),
        ("an odd grain size", vmdk().le64(20, 129), field("grain size", 129)),
        ("grains beyond any number", vmdk().le64(20, 1 << 63), field("grain size", 1 << 63)),
        ("grain tables of no entries", vmdk().le32(44, 0), field("grain table's entries", 0)),
        ("grain tables of 4 Gi entries", vmdk().le32(44, u32::MAX), field("grain table's entries", u32::MAX.into())),
        ("a grain directory outside of the file", vmdk().le64(56, 22), out_of_file(directory, 22 * 512, 4)),
        ("a grain directory beyond any number", vmdk().le64(56, u64::MAX - 1), out_of_file(directory, u64::MAX, 4)),
        ("a grain directory on the descriptor", vmdk().le64(56, 5), overlap(directory, 5 * 512, "descriptor")),
        ("a grain directory of 128 MiB", vmdk().le64(12, many).le64(20, 8), too_long(directory, 128 << 20, MAX_TABLE_BYTES)),
        ("a redundant directory on the other", vmdk().le32(8, 3).le64(48, 21), overlap("redundant grain directory", 21 * 512, directory)),
        ("a grain table outside of the file", vmdk().le32(21 * 512, 22), entry(directory, 0, 22)),
        ("a grain table on the header", vmdk().le32(21 * 512, 1).long(30 * 512), entry(directory, 0, 1)),
        ("an overhead longer than the file", vmdk().le64(64, 1 << 40), out_of_file("overhead", 0, 1 << 49)),
        ("a stream without its end", vmdk().le64(56, u64::MAX).long(25 * 512), missing("footer")),
        ("a stream of which a part is lacking", stream().long(25 * 512 - 1), field("length of a stream", 25 * 512 - 1)),
        ("a stream whose end claims more", stream().le64(23 * 512 + 12, 1 << 30), field("capacity in the footer", 1 << 30)),
        ("a stream whose end points to the end", stream().le64(23 * 512 + 56, u64::MAX), out_of_file(directory, u64::MAX, 4)),
    ]
}

#[rustfmt::skip]
fn vmdk_descriptors(outside: &str) -> Cases {
    let of = |text: &str| vmdk().with(512, &[0; 20 * 512]).with(512, text.as_bytes());
    let extents = |lines: &str| of(&descriptor("monolithicSparse", "ffffffff", lines));
    let kind = |kind: &str| of(&descriptor(kind, "ffffffff", EXTENT));
    let extent = |line: &str| Refusal::Extent { line: line.into() };
    let flat = &format!("RW 65536 FLAT \"{outside}\" 0");
    let device = "RW 65536 SPARSE \"/dev/sda\"";
    let up = "RW 65536 SPARSE \"..\\other.vmdk\"";
    let second = "RW 65536 SPARSE \"second.vmdk\"";
    let hint = &format!("parentFileNameHint=\"{outside}\"");
    let late = vmdk().le64(36, 1).with(19 * 512, hint.as_bytes());
    let after_zero = vmdk().with(10 * 512, b"PARENTFILENAMEHINT=\"x\"");
    vec![
        ("a vmdk that is a descriptor", Image(descriptor("monolithicFlat", "ffffffff", flat).into_bytes()), Refusal::Disguised { said: Format::Vmdk, found: "a vmdk descriptor" }),
        ("a vmdk of ESX", Image(b"COWD".to_vec()).long(4096), Refusal::Disguised { said: Format::Vmdk, found: "vmdk of ESX" }),
        ("a parent", of(&descriptor("monolithicSparse", "ffffffff", &format!("{EXTENT}\n{hint}"))), parent("parentFileNameHint")),
        ("a parent beyond the descriptor's size", late, parent("parentFileNameHint")),
        ("a parent beyond the descriptor's end", after_zero, parent("parentFileNameHint")),
        ("a parent's id", of(&descriptor("monolithicSparse", "12345678", EXTENT)), parent("parentCID")),
        ("an extent that is another file", extents(flat), extent(flat)),
        ("an extent that is a device", extents(device), extent(device)),
        ("an extent elsewhere", extents(up), extent(up)),
        ("two extents", extents(&format!("{EXTENT}\n{second}")), extent(second)),
        ("no extent", extents(""), Refusal::Missing { part: "extent in its descriptor" }),
        ("a flat kind", kind("monolithicFlat"), Refusal::Kind { kind: "monolithicFlat".into() }),
        ("a kind with a device", kind("fullDevice"), Refusal::Kind { kind: "fullDevice".into() }),
        ("an endless kind", kind(&"x".repeat(300)), Refusal::Kind { kind: "x".repeat(80) }),
        ("an empty descriptor", of(""), Refusal::Missing { part: "createType in its descriptor" }),
        ("a descriptor elsewhere", vmdk().le64(28, 21), field("descriptor's offset", 21)),
        ("no descriptor", vmdk().le64(36, 0), field("descriptor's size", 0)),
        ("a descriptor of 8 EiB", vmdk().le64(36, 1 << 54), field("descriptor's size", 1 << 54)),
        ("a descriptor longer than the file", vmdk().le64(36, 100), out_of_file("descriptor", 512, 51_200)),
    ]
}

#[rustfmt::skip]
fn vdis() -> Cases {
    let map = "block map";
    let kind = |number: u32| Refusal::Kind {
        kind: format!("vdi type {number}"),
    };
    let blocks = 65_536_u32;
    vec![
        ("a vdi that is text", Image(vec![b'x'; 600]), Refusal::NotSo { said: Format::Vdi }),
        ("a cut vdi", vdi().long(511), out_of_file("header", 0, 512)),
        ("a vdi of version 0.1", vdi().le32(0x44, 1), Refusal::Version { version: 1 }),
        ("an undo image", vdi().le32(0x4c, 3), kind(3)),
        ("a differencing image", vdi().le32(0x4c, 4), kind(4)),
        ("a vdi's link", vdi().with(0x1a8, &[1]), parent("link")),
        ("a vdi's parent", vdi().with(0x1b8 + 15, &[1]), parent("parent")),
        ("sectors of 4096 bytes", vdi().le32(0x168, 4096), field("sector size", 4096)),
        ("blocks of no bytes", vdi().le32(0x178, 0), field("block size", 0)),
        ("bytes before blocks", vdi().le32(0x17c, 512), field("bytes before a block", 512)),
        ("an empty vdi", vdi().le64(0x170, 0), Refusal::Empty),
        ("a vdi larger than a disk", vdi().le64(0x170, u64::MAX), Refusal::TooLarge { bytes: u64::MAX }),
        ("a vdi of 32 MiB with one block", vdi().le64(0x170, 32 << 20), too_short(map, 1, 32)),
        ("a block map of 16 GiB", vdi().le32(0x180, u32::MAX), too_long(map, u64::from(u32::MAX) * 4, MAX_TABLE_BYTES)),
        ("a block map longer than the file", vdi().le32(0x180, blocks), out_of_file(map, 512, u64::from(blocks) * 4)),
        ("a block map on the header", vdi().le32(0x154, 0), overlap(map, 0, "header")),
        ("a block map that is not aligned", vdi().le32(0x154, 513), field("block map's offset", 513)),
        ("data on the block map", vdi().le32(0x158, 512), overlap("data", 512, map)),
        ("a block outside of the file", vdi().le32(512, 0), entry(map, 0, 0)),
        ("a block far outside of the file", vdi().le32(512, 0xffff_fffd), entry(map, 0, 0xffff_fffd)),
    ]
}

#[rustfmt::skip]
fn vhdx_references() -> Cases {
    let unknown = "11111111-2222-3333-4444-555555555555";
    let id: Uuid = unknown.parse().unwrap();
    let third = REGION + 64;
    let region = vhdx()
        .le32((192 << 10) + 8, 3)
        .guid(third, unknown)
        .le64(third + 16, 3 << 20)
        .le32(third + 24, 1 << 20);
    let log = vhdx().with((128 << 10) + 48, &[9; 16]);
    vec![
        ("a parent in the parameters", vhdx().le32(VALUES + 4, 2), parent("file parameters")),
        ("a parent locator", vhdx().guid(ITEM + 4 * 32, "a8d35f2d-b30b-454d-abf7-d3d84834ab0c"), parent("parent locator")),
        ("a log that is to be replayed", log.summed(), Refusal::Unclean { what: "a log that is still to be replayed" }),
        ("an unknown required region", region.le32(third + 28, 1).long(4 << 20).summed(), Refusal::Unknown { part: "region", id }),
        ("an unknown required item", vhdx().guid(ITEM + 4 * 32, unknown), Refusal::Unknown { part: "metadata item", id }),
        ("a vhdx of version 2", vhdx().with((128 << 10) + 66, &[2]).summed(), Refusal::Version { version: 2 }),
        ("headers whose sums are wrong", vhdx().with(66 << 10, b"x").with(130 << 10, b"x"), Refusal::Checksum { part: "headers" }),
        ("headers of one number that differ", vhdx().le64((128 << 10) + 8, 1).with((128 << 10) + 16, &[1]).summed(), field("sequence number of both headers", 1)),
        ("a region table whose sum is wrong", vhdx().with(REGION + 4000, b"x"), Refusal::Checksum { part: "region table" }),
        ("a vhdx without a disk", vhdx().le64(VALUES + 16, 0), Refusal::Empty),
        ("a vhdx larger than a disk", vhdx().le64(VALUES + 16, 1 << 47), Refusal::TooLarge { bytes: 1 << 47 }),
    ]
}

#[rustfmt::skip]
fn vhdx_tables() -> Cases {
    let table = "block allocation table";
    let item = |offset: u32, length: u32| vhdx().le32(ITEM + 16, offset).le32(ITEM + 20, length);
    let misplaced = |offset, length| out_of_file("metadata item", offset, length);
    let log = vhdx()
        .le32((128 << 10) + 68, 1 << 20)
        .le64((128 << 10) + 72, 1 << 20);
    vec![
        ("a vhdx without its header section", vhdx().long(64 << 10), out_of_file("header section", 0, 1 << 20)),
        ("4 Gi regions", vhdx().le32((192 << 10) + 8, u32::MAX).summed(), field("number of regions", u32::MAX.into())),
        ("no regions", vhdx().le32((192 << 10) + 8, 0).summed(), Refusal::Missing { part: table }),
        ("no metadata", vhdx().le32((192 << 10) + 8, 1).summed(), Refusal::Missing { part: "metadata region" }),
        ("a region outside of the file", vhdx().le64(REGION + 16, 3 << 20).summed(), out_of_file(table, 3 << 20, 1 << 20)),
        ("a region beyond any number", vhdx().le64(REGION + 16, u64::MAX << 20).summed(), out_of_file(table, u64::MAX << 20, 1 << 20)),
        ("a region on another", vhdx().le64(REGION + 48, 1 << 20).summed(), overlap("metadata region", 1 << 20, table)),
        ("a region on the headers", vhdx().le64(REGION + 16, 0).summed(), overlap(table, 0, "header section")),
        ("a region that is not aligned", vhdx().le64(REGION + 16, 4096).summed(), field("offset of a region", 4096)),
        ("a region without length", vhdx().le32(REGION + 24, 0).summed(), field("length of a region", 0)),
        ("a log on a region", log.summed(), overlap(table, 1 << 20, "log")),
        ("no metadata table", vhdx().with(2 << 20, b"METADATA"), Refusal::Missing { part: "metadata table" }),
        ("65,535 metadata items", vhdx().with((2 << 20) + 10, &[255, 255]), field("number of metadata items", 65_535)),
        ("a metadata item on its table", item(0, 8), misplaced(0, 8)),
        ("a metadata item outside of its region", item(1 << 20, 8), misplaced(1 << 20, 8)),
        ("a metadata item of 4 GiB", item(64 << 10, u32::MAX), misplaced(64 << 10, u32::MAX.into())),
        ("a metadata item cut short", item(64 << 10, 4), misplaced(64 << 10, 4)),
        ("no file parameters", vhdx().with((2 << 20) + 10, &[0, 0]), Refusal::Missing { part: "file parameters" }),
        ("blocks of three MiB", vhdx().le32(VALUES, 3 << 20), field("block size", 3 << 20)),
        ("blocks of no bytes in a vhdx", vhdx().le32(VALUES, 0), field("block size", 0)),
        ("sectors of 4096 bytes in a vhdx", vhdx().le32(VALUES + 32, 4096), field("logical sector size", 4096)),
        ("a disk too large for its table", vhdx().le64(VALUES + 16, 64 << 40), too_short(table, 131_072, (2 << 20) + 16_383)),
        ("a block of a vhdx outside of the file", vhdx().le64(1 << 20, 3 << 20 | 6), entry(table, 0, 3 << 20 | 6)),
        ("a block of a vhdx on its table", vhdx().le32(VALUES, 1 << 20).le64(1 << 20, 1 << 20 | 6), entry(table, 0, 1 << 20 | 6)),
        ("a block that is there in part", vhdx().le64(1 << 20, 7), entry(table, 0, 7)),
        ("a vhdx of half a sector", vhdx().le64(VALUES + 16, 256), field("virtual size", 256)),
    ]
}
