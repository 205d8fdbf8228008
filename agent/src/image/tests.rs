//! A corpus of hostile images, each refused for its own reason; what is sound is taken. Real images of every format, made and
//! read by `qemu-img`, are in the tests of the hypervisor's storage.

mod build;
pub(crate) mod hostile;

use std::{
    collections::HashSet,
    fs,
    io::{self, Cursor, Read, Seek, SeekFrom},
    os::unix::{fs::symlink, net::UnixListener},
};

use build::{Image, VALUES, qcow2, stream, vdi, vhdx, vmdk};
use hostile::corpus;

use super::{
    source::{le32, take},
    *,
};

/// Counts what is read.
struct Counting {
    inner: Cursor<Vec<u8>>,
    bytes: u64,
}

impl Read for Counting {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.bytes += read as u64;
        Ok(read)
    }
}

impl Seek for Counting {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.inner.seek(to)
    }
}

/// What is thought of an image, and how many bytes of it were read.
fn judge(image: Image, format: Format) -> (Result<Inspected, Refusal>, u64) {
    let mut reader = Counting {
        inner: Cursor::new(image.0),
        bytes: 0,
    };
    (inspect(&mut reader, format), reader.bytes)
}

#[test]
fn every_hostile_image_is_refused_for_its_own_reason_and_read_within_bounds() {
    let corpus = corpus("/etc/shadow");
    let names: HashSet<_> = corpus.iter().map(|case| case.name).collect();
    assert_eq!(names.len(), corpus.len(), "a name is given twice");
    assert!(corpus.len() >= 40);
    for case in corpus {
        let length = case.image.0.len() as u64;
        let (found, read) = judge(case.image, case.format);
        assert_eq!(found, Err(case.refusal), "{}", case.name);
        assert!(
            read <= 512 << 10 && read <= length * 3,
            "{}: {read} of {length}",
            case.name
        );
    }
}

#[test]
fn sound_images_are_taken_with_their_size() {
    let v2 = qcow2().be32(4, 2).with(72, &[0; 40]);
    let extended = qcow2()
        .be64(72, 1 << 4)
        .be32(20, 14)
        .be64(24, 1 << 20)
        .be64(40, 3 << 14)
        .be64(48, 1 << 14);
    let zstd = qcow2().be64(72, 1 << 3).be32(100, 112).with(104, &[1]);
    let cases = [
        (qcow2(), Format::Qcow2, 32 << 10),
        (v2, Format::Qcow2, 32 << 10),
        (extended.long(4 << 14), Format::Qcow2, 1 << 20),
        (zstd, Format::Qcow2, 32 << 10),
        (vmdk(), Format::Vmdk, 32 << 20),
        (stream(), Format::Vmdk, 32 << 20),
        (vdi(), Format::Vdi, 1 << 20),
        (
            vdi().le32(0x4c, 2).le32(512, 0).long(1024 + (1 << 20)),
            Format::Vdi,
            1 << 20,
        ),
        // Of an odd raw file, as VirtualBox makes it.
        (vdi().le64(0x170, 1000), Format::Vdi, 1024),
        (vhdx(), Format::Vhdx, 32 << 20),
        // A block that is there.
        (
            vhdx()
                .le32(VALUES, 1 << 20)
                .le64(VALUES + 16, 1 << 20)
                .le64(1 << 20, (3 << 20) | 6)
                .long(4 << 20),
            Format::Vhdx,
            1 << 20,
        ),
        (Image(vec![7; 1000]), Format::Raw, 1024),
        (Image(vec![7]), Format::Raw, 512),
    ];
    for (number, (image, format, virtual_size_bytes)) in cases.into_iter().enumerate() {
        let expected = Inspected {
            format,
            virtual_size_bytes,
        };
        assert_eq!(judge(image, format).0, Ok(expected), "number {number}");
    }
}

#[test]
fn of_two_vhdx_headers_the_sound_and_newer_one_counts() {
    let torn = vhdx().with((128 << 10) + 100, b"torn");
    assert!(judge(torn, Format::Vhdx).0.is_ok());
    // The older one had a log, which the newer one has not.
    let replayed = vhdx().with((64 << 10) + 48, &[9; 16]).summed();
    assert!(judge(replayed, Format::Vhdx).0.is_ok());
}

#[test]
fn no_byte_and_no_cut_of_an_image_makes_a_panic() {
    let images = [
        (qcow2(), Format::Qcow2),
        (vmdk(), Format::Vmdk),
        (stream(), Format::Vmdk),
        (vdi(), Format::Vdi),
    ];
    for (image, format) in images {
        let length = image.0.len();
        for at in (0..length.min(700)).chain(length - 128..length) {
            for value in [0, 0xff] {
                let _ = judge(image.clone().with(at, &[value]), format);
            }
        }
        for cut in (0..length).step_by(61) {
            let _ = judge(image.clone().long(cut), format);
        }
    }
}

#[test]
fn a_qcow2_that_ends_before_its_last_table_does_is_refused() {
    for length in 0..1544 {
        assert!(judge(qcow2().long(length), Format::Qcow2).0.is_err(), "{length}");
    }
}

#[test]
fn a_size_has_its_limits() {
    assert_eq!(check_size(0), Err(Refusal::Empty));
    assert_eq!(check_size(MAX_SIZE_BYTES), Ok(()));
    let bytes = MAX_SIZE_BYTES + 512;
    assert_eq!(check_size(bytes), Err(Refusal::TooLarge { bytes }));
    assert!(matches!(
        check_size(1000),
        Err(Refusal::Field { value: 1000, .. })
    ));
}

#[test]
fn the_checksum_is_the_one_of_the_standard() {
    assert_eq!(crc32c(b"123456789", 9), 0xe306_9283);
    assert_eq!(crc32c(b"1234\xff\xff\xff\xff9", 4), crc32c(b"1234\0\0\0\09", 9));
    assert_eq!(
        (le32(&[1, 2, 3, 4], 0), take(&[1, 2, 3], 1)),
        (0x0403_0201, [2, 3])
    );
}

#[test]
fn the_name_says_the_format() {
    let names = ["a.qcow2", "a.b.raw", "a.img", "a.vmdk", "a.vdi", "a.vhdx"];
    let formats: Vec<_> = names
        .iter()
        .map(|name| Format::of_name(name).unwrap().as_str())
        .collect();
    assert_eq!(formats, ["qcow2", "raw", "raw", "vmdk", "vdi", "vhdx"]);
    for name in ["", "qcow2", "a", "a.QCOW2", "a.vhd", "a.qcow2.gz", "a."] {
        assert_eq!(Format::of_name(name), None, "{name}");
    }
}

#[test]
fn only_a_regular_file_of_the_directory_is_opened() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("images");
    fs::create_dir(&dir).unwrap();
    fs::create_dir(dir.join("folder.raw")).unwrap();
    fs::write(dir.join("good.raw"), "good").unwrap();
    fs::write(place.path().join("secret.raw"), "secret").unwrap();
    symlink("good.raw", dir.join("within.raw")).unwrap();
    symlink("../secret.raw", dir.join("up.raw")).unwrap();
    symlink(place.path().join("secret.raw"), dir.join("absolute.raw")).unwrap();
    symlink(dir.join("good.raw"), dir.join("absolute-within.raw")).unwrap();
    symlink("/proc/self/fd/0", dir.join("magic.raw")).unwrap();
    symlink("loop.raw", dir.join("loop.raw")).unwrap();
    nix::unistd::mkfifo(&dir.join("pipe.raw"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    let _socket = UnixListener::bind(dir.join("socket.raw")).unwrap();
    for name in ["good.raw", "within.raw"] {
        let mut text = String::new();
        open(&dir, name).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "good");
    }
    let refused = |name| open(&dir, name).unwrap_err();
    for name in [
        "up.raw",
        "absolute.raw",
        "absolute-within.raw",
        "magic.raw",
        "loop.raw",
        "../secret.raw",
    ] {
        assert_eq!(refused(name), Refusal::Outside, "{name}");
    }
    for name in ["folder.raw", "pipe.raw", "socket.raw"] {
        assert_eq!(refused(name), Refusal::NotAFile, "{name}");
    }
    let missing = Refusal::Unreadable {
        at: 0,
        kind: io::ErrorKind::NotFound,
    };
    assert_eq!(refused("missing.raw"), missing);
}

#[test]
fn what_is_behind_a_disk_is_read_from_its_header() {
    let behind = |image: Image| behind(Cursor::new(image.0));
    let disk = |backing: Option<&str>| {
        Some(Behind {
            virtual_size_bytes: 32 << 10,
            backing: backing.map(Into::into),
        })
    };
    let named = |offset: u64, length: u32| {
        let image = qcow2().with(2048, b"/store/a.qcow2");
        image.be64(8, offset).be32(16, length)
    };
    assert_eq!(behind(qcow2()).unwrap(), disk(None));
    assert_eq!(behind(named(2048, 14)).unwrap(), disk(Some("/store/a.qcow2")));
    assert_eq!(behind(Image(vec![0; 4096])).unwrap(), None, "a raw disk");
    assert_eq!(behind(Image(b"QFI\xfb".to_vec())).unwrap(), None, "a short one");
    for (offset, length) in [(2048, 1024), (2048, 15), (u64::MAX, 1), (2, 2)] {
        behind(named(offset, length)).unwrap_err();
    }
}
