//! What identifies an image: its name and version in the catalogue, the digest of its content, the format of the file it comes
//! from. Parsing is strict, as in [`crate::ids`]: a digest is safe to put into a path.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    ids::{Error, ImageName, shorten},
    v1,
};

/// Version of an image that was entered without one.
pub const DEFAULT_VERSION: &str = "1";
/// Largest file that is imported.
pub const MAX_FILE_BYTES: u64 = 16 << 40;
/// Largest piece of an upload.
pub const MAX_PIECE_BYTES: usize = 1 << 20;

/// SHA-256 of something, as 64 lower-case hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    /// From the 32 bytes.
    pub fn from_bytes(bytes: &[u8; 32]) -> Self {
        Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Digest {
    type Err = Error;

    fn from_str(value: &str) -> Result<Self, Error> {
        if value.len() == 64 && value.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Ok(Self(value.to_ascii_lowercase()));
        }
        Err(Error::Name {
            what: "SHA-256",
            value: shorten(value),
            rule: "64 hexadecimal digits",
        })
    }
}

impl TryFrom<String> for Digest {
    type Error = Error;

    fn try_from(value: String) -> Result<Self, Error> {
        value.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Checks the version of an image.
pub fn check_version(value: &str) -> Result<(), Error> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let begins = value
        .bytes()
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric());
    if begins && value.len() <= 63 && value.bytes().all(allowed) {
        return Ok(());
    }
    Err(Error::Name {
        what: "image version",
        value: shorten(value),
        rule: "1 to 63 characters a-z, A-Z, 0-9, '.', '_' and '-', the first a letter or digit",
    })
}

/// Which image of the catalogue a disk asks for: `NAME` or `NAME:VERSION`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// Its name.
    pub name: ImageName,
    /// Its version; `None` for the newest that is there.
    pub version: Option<String>,
}

impl Reference {
    /// Whether a text means an image of the catalogue, and not a file, whose name has an ending.
    pub fn is_meant(value: &str) -> bool {
        value.contains(':') || !value.contains('.')
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.version {
            Some(version) => write!(f, "{}:{version}", self.name),
            None => self.name.fmt(f),
        }
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(value: &str) -> Result<Self, Error> {
        let (name, version) = match value.split_once(':') {
            Some((name, version)) => (name, Some(version)),
            None => (value, None),
        };
        version.map(check_version).transpose()?;
        Ok(Self {
            name: name.parse()?,
            version: version.map(str::to_owned),
        })
    }
}

/// Format of a file that an image is imported from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// QEMU's own, versions 2 and 3.
    Qcow2,
    /// The disk's bytes as they are.
    Raw,
    /// VMware's, in one sparse file: monolithicSparse or streamOptimized.
    Vmdk,
    /// VirtualBox's, dynamic or fixed.
    Vdi,
    /// Hyper-V's, dynamic or fixed.
    Vhdx,
}

impl Format {
    /// Every format.
    pub const ALL: [Self; 5] = [Self::Qcow2, Self::Raw, Self::Vmdk, Self::Vdi, Self::Vhdx];

    /// QEMU's name of it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
            Self::Vmdk => "vmdk",
            Self::Vdi => "vdi",
            Self::Vhdx => "vhdx",
        }
    }

    /// The format that a file's name says.
    pub fn of_name(name: &str) -> Option<Self> {
        match name.rsplit_once('.')?.1 {
            "qcow2" => Some(Self::Qcow2),
            "raw" | "img" => Some(Self::Raw),
            "vmdk" => Some(Self::Vmdk),
            "vdi" => Some(Self::Vdi),
            "vhdx" => Some(Self::Vhdx),
            _ => None,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<Format> for v1::ImageFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Qcow2 => Self::Qcow2,
            Format::Raw => Self::Raw,
            Format::Vmdk => Self::Vmdk,
            Format::Vdi => Self::Vdi,
            Format::Vhdx => Self::Vhdx,
        }
    }
}

impl TryFrom<v1::ImageFormat> for Format {
    type Error = &'static str;

    fn try_from(wire: v1::ImageFormat) -> Result<Self, Self::Error> {
        match wire {
            v1::ImageFormat::Qcow2 => Ok(Self::Qcow2),
            v1::ImageFormat::Raw => Ok(Self::Raw),
            v1::ImageFormat::Vmdk => Ok(Self::Vmdk),
            v1::ImageFormat::Vdi => Ok(Self::Vdi),
            v1::ImageFormat::Vhdx => Ok(Self::Vhdx),
            v1::ImageFormat::Unspecified => Err("must be given"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_64_digits_whatever_their_case_and_nothing_else() {
        let digits = "AB".repeat(32);
        let digest: Digest = digits.parse().unwrap();
        assert_eq!(digest, Digest::from_bytes(&[0xab; 32]));
        for bad in ["", "ab", &"../".repeat(21), &"g".repeat(64), &"a".repeat(65)] {
            bad.parse::<Digest>().unwrap_err();
        }
    }

    #[test]
    fn a_reference_is_told_from_a_files_name() {
        for (text, version) in [("debian", None), ("debian:12.8", Some("12.8"))] {
            assert!(Reference::is_meant(text), "{text}");
            let reference: Reference = text.parse().unwrap();
            assert_eq!(reference.name.as_str(), "debian");
            assert_eq!(reference.version.as_deref(), version);
        }
        assert!(!Reference::is_meant("debian.qcow2"));
        for bad in ["", ":1", "Debian", "debian:", "debian:-1", "debian:1:2", "../x:1"] {
            bad.parse::<Reference>().unwrap_err();
        }
    }

    #[test]
    fn every_format_survives_the_wire_and_names_its_files() {
        for format in Format::ALL {
            assert_eq!(Format::try_from(v1::ImageFormat::from(format)), Ok(format));
            assert_eq!(Format::of_name(&format!("a.b.{format}")), Some(format));
        }
        assert_eq!(Format::of_name("qcow2"), None);
    }
}
