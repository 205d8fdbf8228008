//! What a guest would read of a disk that lies in several files, each with what differs from the next: for backups of VMs that
//! are off, and for disks that are made from a backup. Called on threads that may block; decides nothing.
//!
//! Files of guests are opened by no other program here: a layer's own header says where its clusters are, the caller which
//! file is behind it. What lies outside of a file, is compressed or is encrypted is an error and never guessed at.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::FileExt,
};

use dalgu_proto::vm::DiskFormat;

use super::source::{be32, be64};

const MAX_L1_BYTES: u64 = 32 << 20;
/// Of the incompatible features: counts of references may be out of date, which a reader does not need.
const DIRTY: u64 = 1;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// A raw layer is read in units of so many bytes.
const RAW_UNIT: u64 = 64 << 10;

/// One file of a disk.
#[derive(Debug)]
pub struct Layer {
    file: File,
    size: u64,
    tables: Option<Tables>,
}

#[derive(Debug)]
struct Tables {
    cluster_bits: u32,
    zero_bit: bool,
    l1: Vec<u64>,
    l2: Option<(u64, Vec<u64>)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    /// The file behind has it.
    Absent,
    /// Nothing but zeros.
    Zero,
    /// There.
    At(u64),
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("its qcow2 {what}"))
}

fn entries(bytes: &[u8]) -> Vec<u64> {
    let chunks = bytes.chunks_exact(8);
    chunks.map(|entry| be64(entry, 0)).collect()
}

impl Layer {
    /// Takes a file as what the caller knows it to be.
    ///
    /// # Errors
    /// If it cannot be read, or has features that are not known here.
    pub fn open(mut file: File, format: DiskFormat) -> io::Result<Self> {
        match format {
            DiskFormat::Raw => Ok(Self {
                size: file.seek(SeekFrom::End(0))?,
                file,
                tables: None,
            }),
            DiskFormat::Qcow2 => Self::open_qcow2(file),
        }
    }

    fn open_qcow2(mut file: File) -> io::Result<Self> {
        let mut header = [0; 104];
        file.seek(SeekFrom::Start(0))?;
        file.read_exact(&mut header[..72])?;
        if !header.starts_with(b"QFI\xfb") {
            return Err(damaged("header is not there"));
        }
        let version = be32(&header, 4);
        if version == 3 {
            file.read_exact(&mut header[72..])?;
        }
        let cluster_bits = be32(&header, 20);
        let known = matches!(version, 2 | 3)
            && (9..=21).contains(&cluster_bits)
            && be64(&header, 72) & !DIRTY == 0
            && be32(&header, 32) == 0;
        if !known {
            return Err(damaged(
                "version or features (encryption, data file, subclusters) are not known",
            ));
        }
        let l1_bytes = u64::from(be32(&header, 36)) * 8;
        if l1_bytes > MAX_L1_BYTES {
            return Err(damaged("L1 table is too large"));
        }
        let mut l1 = vec![0; usize::try_from(l1_bytes).map_err(io::Error::other)?];
        file.read_exact_at(&mut l1, be64(&header, 40))?;
        Ok(Self {
            file,
            size: be64(&header, 24),
            tables: Some(Tables {
                cluster_bits,
                zero_bit: version == 3,
                l1: entries(&l1),
                l2: None,
            }),
        })
    }

    /// Size that a guest sees.
    pub const fn size(&self) -> u64 {
        self.size
    }

    fn unit(&self) -> u64 {
        self.tables
            .as_ref()
            .map_or(RAW_UNIT, |tables| 1 << tables.cluster_bits)
    }

    fn find(&mut self, at: u64) -> io::Result<Found> {
        if at >= self.size {
            return Ok(Found::Zero);
        }
        let Some(tables) = &mut self.tables else {
            return Ok(Found::At(at));
        };
        let in_cluster = at & ((1 << tables.cluster_bits) - 1);
        let cluster = at >> tables.cluster_bits;
        let per_table = tables.cluster_bits - 3;
        let l1 = usize::try_from(cluster >> per_table).map_err(io::Error::other)?;
        let table = tables
            .l1
            .get(l1)
            .ok_or_else(|| damaged("L1 table is too short"))?
            & OFFSET;
        if table == 0 {
            return Ok(Found::Absent);
        }
        if tables.l2.as_ref().is_none_or(|(offset, _)| *offset != table) {
            let mut bytes = vec![0; 1 << tables.cluster_bits];
            self.file.read_exact_at(&mut bytes, table)?;
            tables.l2 = Some((table, entries(&bytes)));
        }
        let index = usize::try_from(cluster & ((1 << per_table) - 1)).map_err(io::Error::other)?;
        let entry = tables.l2.as_ref().and_then(|(_, l2)| l2.get(index)).copied();
        let entry = entry.ok_or_else(|| damaged("L2 table is too short"))?;
        match entry & OFFSET {
            _ if entry & COMPRESSED != 0 => Err(damaged("clusters are compressed")),
            _ if tables.zero_bit && entry & ZERO != 0 => Ok(Found::Zero),
            0 => Ok(Found::Absent),
            offset => Ok(Found::At(offset + in_cluster)),
        }
    }
}

/// Writes what the layers hold together, the top one first, to an empty file, and leaves holes where there is nothing.
/// Tells how far it is after each piece; gives the size of the disk.
///
/// # Errors
/// If a file cannot be read or written, or is damaged.
pub fn copy(layers: &mut [Layer], out: &File, mut copied: impl FnMut(u64)) -> io::Result<u64> {
    let size = layers.first().map_or(0, Layer::size);
    let unit = layers.iter().map(Layer::unit).min().unwrap_or(RAW_UNIT);
    let mut piece = vec![0; usize::try_from(unit).map_err(io::Error::other)?];
    let mut at = 0;
    while at < size {
        let length = usize::try_from(unit.min(size - at)).map_err(io::Error::other)?;
        if read(layers, at, &mut piece[..length])? && piece[..length].iter().any(|byte| *byte != 0) {
            out.write_all_at(&piece[..length], at)?;
        }
        at += length as u64;
        copied(at);
    }
    out.set_len(size)?;
    Ok(size)
}

/// Reads a piece; false where it is nothing but zeros.
fn read(layers: &mut [Layer], at: u64, piece: &mut [u8]) -> io::Result<bool> {
    for layer in layers {
        match layer.find(at)? {
            Found::Absent => {}
            Found::Zero => return Ok(false),
            Found::At(offset) => {
                // The end of a raw file need not be the end of a unit.
                let there = layer.size.saturating_sub(at).min(piece.len() as u64);
                let there = usize::try_from(there).map_err(io::Error::other)?;
                layer.file.read_exact_at(&mut piece[..there], offset)?;
                piece[there..].fill(0);
                return Ok(true);
            }
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, path::Path, process::Command};

    use super::*;

    fn qemu_img(words: &[&str], dir: &Path) {
        let status = Command::new("qemu-img").args(words).current_dir(dir).status();
        assert!(status.unwrap().success(), "{words:?}");
    }

    fn qemu_io(file: &str, write: &str, dir: &Path) {
        let words = ["-f", "qcow2", "-c", write, file];
        let output = Command::new("qemu-io").args(words).current_dir(dir).output();
        assert!(output.unwrap().status.success(), "{words:?}");
    }

    fn layer(dir: &Path, file: &str, format: DiskFormat) -> Layer {
        Layer::open(File::open(dir.join(file)).unwrap(), format).unwrap()
    }

    #[test]
    fn a_chain_reads_as_qemu_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        qemu_img(&["create", "-q", "-f", "qcow2", "base.qcow2", "3M"], dir);
        qemu_io("base.qcow2", "write -P 1 0 1M", dir);
        qemu_io("base.qcow2", "write -P 2 2M 100k", dir);
        let over = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "base.qcow2",
            "-F",
            "qcow2",
            "top.qcow2",
            "4M",
        ];
        qemu_img(&over, dir);
        qemu_io("top.qcow2", "write -P 3 64k 512", dir);
        qemu_io("top.qcow2", "write -z 128k 128k", dir);
        qemu_io("top.qcow2", "write -P 4 3500k 300k", dir);
        qemu_img(&["convert", "-O", "raw", "top.qcow2", "expected.raw"], dir);
        let mut layers = [
            layer(dir, "top.qcow2", DiskFormat::Qcow2),
            layer(dir, "base.qcow2", DiskFormat::Qcow2),
        ];
        let out = File::create(dir.join("out.raw")).unwrap();
        let mut last = 0;
        assert_eq!(copy(&mut layers, &out, |at| last = at).unwrap(), 4 << 20);
        assert_eq!(last, 4 << 20);
        let read = |file: &str| std::fs::read(dir.join(file)).unwrap();
        assert!(read("out.raw") == read("expected.raw"));
    }

    #[test]
    fn a_raw_file_may_be_behind_and_shorter() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let mut raw = File::create(dir.join("base.raw")).unwrap();
        raw.write_all(&[7; 100_000]).unwrap();
        raw.write_all(&[0; 352]).unwrap();
        let over = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "base.raw",
            "-F",
            "raw",
            "top.qcow2",
            "1M",
        ];
        qemu_img(&over, dir);
        let mut layers = [
            layer(dir, "top.qcow2", DiskFormat::Qcow2),
            layer(dir, "base.raw", DiskFormat::Raw),
        ];
        let out = File::create(dir.join("out.raw")).unwrap();
        copy(&mut layers, &out, |_| {}).unwrap();
        qemu_img(&["convert", "-O", "raw", "top.qcow2", "expected.raw"], dir);
        let read = |file: &str| std::fs::read(dir.join(file)).unwrap();
        assert!(read("out.raw") == read("expected.raw"));
    }

    #[test]
    fn what_is_compressed_or_cut_off_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let mut raw = File::create(dir.join("plain.raw")).unwrap();
        raw.write_all(&[9; 1 << 20]).unwrap();
        qemu_img(
            &[
                "convert",
                "-c",
                "-f",
                "raw",
                "-O",
                "qcow2",
                "plain.raw",
                "small.qcow2",
            ],
            dir,
        );
        let out = File::create(dir.join("out.raw")).unwrap();
        let error = copy(&mut [layer(dir, "small.qcow2", DiskFormat::Qcow2)], &out, |_| {}).unwrap_err();
        assert!(error.to_string().contains("compressed"), "{error}");
        qemu_img(
            &["convert", "-f", "raw", "-O", "qcow2", "plain.raw", "cut.qcow2"],
            dir,
        );
        let cut = File::options().write(true).open(dir.join("cut.qcow2")).unwrap();
        cut.set_len(600_000).unwrap();
        copy(&mut [layer(dir, "cut.qcow2", DiskFormat::Qcow2)], &out, |_| {}).unwrap_err();
        Layer::open(File::open(dir.join("plain.raw")).unwrap(), DiskFormat::Qcow2).unwrap_err();
    }
}
