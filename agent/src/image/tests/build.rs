//! Small images made byte by byte, and changes to them.

use uuid::Uuid;

use super::super::crc32c;

/// Bytes of a file, to be changed.
#[derive(Clone)]
pub(crate) struct Image(pub(crate) Vec<u8>);

impl Image {
    /// With these bytes at that place; the file grows where it must.
    pub(super) fn with(mut self, at: usize, bytes: &[u8]) -> Self {
        self.0.resize(self.0.len().max(at + bytes.len()), 0);
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    pub(super) fn be32(self, at: usize, value: u32) -> Self {
        self.with(at, &value.to_be_bytes())
    }

    pub(super) fn be64(self, at: usize, value: u64) -> Self {
        self.with(at, &value.to_be_bytes())
    }

    pub(super) fn le32(self, at: usize, value: u32) -> Self {
        self.with(at, &value.to_le_bytes())
    }

    pub(super) fn le64(self, at: usize, value: u64) -> Self {
        self.with(at, &value.to_le_bytes())
    }

    pub(super) fn guid(self, at: usize, id: &str) -> Self {
        self.with(at, &id.parse::<Uuid>().unwrap().to_bytes_le())
    }

    /// Cut, or lengthened by zeros.
    pub(super) fn long(mut self, length: usize) -> Self {
        self.0.resize(length, 0);
        self
    }

    /// With the checksums of a VHDX as they should be.
    pub(super) fn summed(mut self) -> Self {
        for (at, length) in [(64 << 10, 4 << 10), (128 << 10, 4 << 10), (192 << 10, 64 << 10)] {
            let sum = crc32c(&self.0[at..at + length], 4);
            self = self.le32(at + 4, sum);
        }
        self
    }
}

/// A disk of 32 KiB in clusters of 512 bytes, version 3: header, refcount table, refcount block, L1 table.
pub(super) fn qcow2() -> Image {
    Image(vec![0; 2048])
        .with(0, b"QFI\xfb")
        .be32(4, 3)
        .be32(20, 9)
        .be64(24, 32 << 10)
        .be32(36, 1)
        .be64(40, 1536)
        .be64(48, 512)
        .be32(56, 1)
        .be32(96, 4)
        .be32(100, 104)
        .be64(512, 1024)
        .with(1024, &[0, 1, 0, 1, 0, 1, 0, 1])
}

/// The descriptor of a VMDK.
pub(super) fn descriptor(kind: &str, parent: &str, extents: &str) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID={parent}\ncreateType=\"{kind}\"\n\n{extents}\n"
    )
}

/// Its usual extent.
pub(super) const EXTENT: &str = "RW 65536 SPARSE \"disk.vmdk\"";

/// A disk of 32 MiB, with an empty grain directory after the descriptor.
pub(super) fn vmdk() -> Image {
    Image(vec![0; 22 * 512])
        .with(0, b"KDMV")
        .le32(4, 1)
        .le32(8, 1)
        .le64(12, 65536)
        .le64(20, 128)
        .le64(28, 1)
        .le64(36, 20)
        .le32(44, 512)
        .le64(56, 21)
        .le64(64, 22)
        .with(73, b"\n \r\n")
        .with(512, descriptor("monolithicSparse", "ffffffff", EXTENT).as_bytes())
}

/// The same as a stream, with its header again at the end.
pub(super) fn stream() -> Image {
    let image = vmdk()
        .le32(4, 3)
        .le32(8, 0x3_0001)
        .with(77, &[1, 0])
        .with(512, &[0; 20 * 512])
        .with(512, descriptor("streamOptimized", "ffffffff", EXTENT).as_bytes());
    let header = image.0[..512].to_vec();
    image
        .le64(56, u64::MAX)
        .long(25 * 512)
        .le32(22 * 512 + 12, 3)
        .with(23 * 512, &header)
}

/// A disk of 1 MiB whose only block is not there.
pub(super) fn vdi() -> Image {
    Image(vec![0; 1024])
        .le32(0x40, 0xbeda_107f)
        .le32(0x44, 0x0001_0001)
        .le32(0x48, 0x190)
        .le32(0x4c, 1)
        .le32(0x154, 512)
        .le32(0x158, 1024)
        .le32(0x168, 512)
        .le64(0x170, 1 << 20)
        .le32(0x178, 1 << 20)
        .le32(0x180, 1)
        .le32(512, u32::MAX)
}

/// Where the region table's first entry is, and the metadata table's.
pub(super) const REGION: usize = (192 << 10) + 16;
pub(super) const ITEM: usize = (2 << 20) + 32;
/// Where the metadata items' values are.
pub(super) const VALUES: usize = (2 << 20) + (64 << 10);

/// A disk of 32 MiB: headers, block allocation table, metadata, each of a MiB.
pub(super) fn vhdx() -> Image {
    let region = |image: Image, number: usize, id: &str, offset: u64| {
        let at = REGION + number * 32;
        image
            .guid(at, id)
            .le64(at + 16, offset)
            .le32(at + 24, 1 << 20)
            .le32(at + 28, 1)
    };
    let item = |image: Image, number: u32, id: &str, length: u32| {
        let at = ITEM + number as usize * 32;
        image
            .guid(at, id)
            .le32(at + 16, (64 << 10) + number * 16)
            .le32(at + 20, length)
            .le32(at + 24, 4)
    };
    let mut image = Image(vec![0; 3 << 20]).with(0, b"vhdxfile");
    for (at, number) in [(64 << 10, 1), (128 << 10, 2)] {
        image = image
            .with(at, b"head")
            .le64(at + 8, number)
            .with(at + 66, &[1, 0]);
    }
    image = image.with(192 << 10, b"regi").le32((192 << 10) + 8, 2);
    image = region(image, 0, "2dc27766-f623-4200-9d64-115e9bfd4a08", 1 << 20);
    image = region(image, 1, "8b7ca206-4790-4b9a-b8fe-575f050f886e", 2 << 20);
    image = image.with(2 << 20, b"metadata").with((2 << 20) + 10, &[5, 0]);
    image = item(image, 0, "caa16737-fa36-4d43-b3b6-33f0aa44e76b", 8);
    image = item(image, 1, "2fa54224-cd1b-4876-b211-5dbed83bf4b8", 8);
    image = item(image, 2, "8141bf1d-a96f-4709-ba47-f233a8faab5f", 4);
    image = item(image, 3, "cda348c7-445d-4471-9cc9-e9885251c556", 4);
    image = item(image, 4, "beca12ab-b2e6-4523-93ef-c309e000c746", 16);
    image
        .le32(VALUES, 32 << 20)
        .le64(VALUES + 16, 32 << 20)
        .le32(VALUES + 32, 512)
        .le32(VALUES + 48, 512)
        .summed()
}
