//! Values as people write them: sizes, times, labels, disks, in [`limits`] their limits, and in [`network`] what belongs to networks.
//! Pure.

pub mod limits;
pub mod network;

use std::time::Duration;

use dalgu_proto::{
    image::Reference,
    network::UnknownIcmpType,
    time::{NoTimeOfDay, TimeOfDay},
    tls::{Peer, Role},
    v1,
};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// Why a value cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not a size.
    #[error("{0:?} is not a size: write a number with a unit, for example 256MiB or 4GiB")]
    Size(String),
    /// A size without a unit.
    #[error("{0:?} has no unit: write {0}MiB or {0}GiB")]
    NoUnit(String),
    /// A size that is not whole.
    #[error("{0:?} is not a whole number of {1}")]
    NotWhole(String, &'static str),
    /// Not the size of a huge page.
    #[error("{0:?} is not the size of a huge page: write 2MiB or 1GiB")]
    Page(String),
    /// Not a NUMA policy.
    #[error("{0:?} is not a NUMA policy: write none, pack, or spread:N with a number of nodes")]
    Numa(String),
    /// Not devices.
    #[error("{0:?} names no PCI devices: write CLASS or CLASS=COUNT, for example gpu or gpu=2")]
    Device(String),
    /// Not a time.
    #[error("{0:?} is not a time: write for example 500ms, 90s, 5m or 1h")]
    Duration(String),
    /// Not a time of day.
    #[error(transparent)]
    TimeOfDay(#[from] NoTimeOfDay),
    /// Not a label.
    #[error("{0:?} is not a label: write KEY=VALUE")]
    Label(String),
    /// Not a change of labels.
    #[error("{0:?} is neither KEY=VALUE (to set) nor KEY- (to remove)")]
    LabelChange(String),
    /// Not a disk.
    #[error(
        "{0:?} is not a disk: write NAME=SIZE[,pool=POOL][,image=IMAGE[:VERSION]|FILE][,format=qcow2|raw][,clone=overlay|full]\
         [,read-iops=N][,write-iops=N][,read-rate=SIZE][,write-rate=SIZE]"
    )]
    Disk(String),
    /// Not the limits of a disk.
    #[error(
        "{0:?} says no limits: write NAME,read-iops=N[,write-iops=N][,read-rate=SIZE][,write-rate=SIZE], with none instead of a number \
         to lift one, or NAME,none"
    )]
    Limits(String),
    /// Not a disk and a pool.
    #[error("{0:?} is not a disk and its pool: write NAME=POOL")]
    DiskPool(String),
    /// Not an interface and a security group.
    #[error("{0:?} is not a network interface and its security group: write NAME=GROUP")]
    NicGroup(String),
    /// Not an interface and a network.
    #[error(
        "{0:?} is not a network interface and its network: write NAME=NETWORK, or NAME=none to leave it out"
    )]
    NicNetwork(String),
    /// Not limits of an interface.
    #[error(
        "{0:?} is not a network interface and its limits: write NAME,receive=RATE[,send=RATE], each once, with `none` to lift one, or NAME,none"
    )]
    NicLimits(String),
    /// Not a network interface.
    #[error(
        "{0:?} is not a network interface: write NAME,network=NETWORK[,ip=ADDRESS][,group=GROUP][,receive=RATE][,send=RATE], or \
         NAME=BRIDGE[,mac=ADDRESS]"
    )]
    Nic(String),
    /// Not an IP address.
    #[error("{0:?} is not an IP address")]
    Address(String),
    /// Not a rate.
    #[error("{0:?} is not a rate: write for example 100Mbit or 1Gbit")]
    Rate(String),
    /// Not a subnet.
    #[error(
        "{0:?} is not a subnet: write CIDR[,gateway=ADDRESS][,first=ADDRESS][,last=ADDRESS][,service=ADDRESS][,no-dhcp], for \
         example 10.20.0.0/16"
    )]
    Subnet(String),
    /// Not a rule.
    #[error(
        "{0:?} is not a rule: {1}; write DIRECTION,PROTOCOL[,PORTS][,WITH], for example ingress,tcp,22,from=10.0.0.0/8"
    )]
    Rule(String, &'static str),
    /// A rule about a type of ICMP that there is not.
    #[error(
        "{0:?} is not a rule: {1}; write DIRECTION,icmp[,TYPE][,WITH], for example ingress,icmp,echo-request,from=10.0.0.0/8"
    )]
    IcmpRule(String, UnknownIcmpType),
    /// An option that a disk or a network interface does not have, or has already.
    #[error("{option:?} is not expected here: {allowed}")]
    Option {
        /// The option.
        option: String,
        /// What could stand there.
        allowed: &'static str,
    },
    /// Not a UUID.
    #[error("{0:?} is not a UUID")]
    Uuid(String),
    /// Not an image.
    #[error("{0:?} is not an image: write NAME or NAME:VERSION")]
    Image(String),
    /// An image without a version.
    #[error("{0:?} names no version: write {0}:VERSION")]
    NoVersion(String),
    /// Not an operator.
    #[error(
        "{0:?} is not an operator: write the name in the certificate, as `dalgu image list -o wide` shows owners"
    )]
    Operator(String),
    /// Not a file on a host.
    #[error("{0:?} is not a file on a host: write HOST:FILE")]
    HostFile(String),
    /// Not a number of hosts.
    #[error("{0:?} is not a number of hosts: write 1 to 10000, or all")]
    Replicas(String),
}

/// Reads a size in bytes. K, M, G and T mean KiB, MiB, GiB and TiB.
pub fn size_bytes(text: &str) -> Result<u64, Error> {
    let bad = || Error::Size(text.to_owned());
    let text = text.trim();
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" if number.parse::<u64>().is_ok() => return Err(Error::NoUnit(text.to_owned())),
        "b" => 1,
        "k" | "kib" => KIB,
        "m" | "mib" => MIB,
        "g" | "gib" => 1024 * MIB,
        "t" | "tib" => 1024 * 1024 * MIB,
        _ => return Err(bad()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = whole.parse().map_err(|_| bad())?;
    let mut bytes = whole.checked_mul(factor).ok_or_else(bad)?;
    if number.contains('.') {
        if fraction.is_empty() || fraction.len() > 9 {
            return Err(bad());
        }
        let scale = 10_u128.pow(u32::try_from(fraction.len()).map_err(|_| bad())?);
        let part = u128::from(fraction.parse::<u64>().map_err(|_| bad())?) * u128::from(factor);
        if part % scale != 0 {
            return Err(Error::NotWhole(text.to_owned(), "bytes"));
        }
        bytes = u64::try_from(part / scale)
            .ok()
            .and_then(|part| bytes.checked_add(part))
            .ok_or_else(bad)?;
    }
    Ok(bytes)
}

/// A NUMA policy, with the number of nodes that it names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Numa(pub v1::NumaPolicy, pub u32);

/// Where on its host a VM is: `none`, `pack` or `spread:N`.
pub fn numa(text: &str) -> Result<Numa, Error> {
    let bad = || Error::Numa(text.to_owned());
    match text.split_once(':') {
        None if text == "none" => Ok(Numa(v1::NumaPolicy::None, 0)),
        None if text == "pack" => Ok(Numa(v1::NumaPolicy::Pack, 0)),
        Some(("spread", nodes)) => {
            let nodes = nodes.parse().map_err(|_| bad())?;
            Ok(Numa(v1::NumaPolicy::Spread, nodes))
        }
        _ => Err(bad()),
    }
}

/// PCI devices of one class: `CLASS` for one, or `CLASS=COUNT`.
pub fn device(text: &str) -> Result<v1::DeviceRequest, Error> {
    let (class, count) = text.split_once('=').unwrap_or((text, "1"));
    match count.parse() {
        Ok(count) if !class.is_empty() => Ok(v1::DeviceRequest {
            class: class.to_owned(),
            count,
        }),
        _ => Err(Error::Device(text.to_owned())),
    }
}

/// The size of a huge page in KiB: `2MiB` or `1GiB`.
pub fn page_kib(text: &str) -> Result<u64, Error> {
    match size_mib(text) {
        Ok(mib @ (2 | 1024)) => Ok(mib * 1024),
        _ => Err(Error::Page(text.to_owned())),
    }
}

/// Reads a size in MiB.
pub fn size_mib(text: &str) -> Result<u64, Error> {
    match size_bytes(text)? {
        bytes if bytes % MIB == 0 => Ok(bytes / MIB),
        _ => Err(Error::NotWhole(text.to_owned(), "MiB")),
    }
}

/// Reads an operator: its name, or all of what it is called.
pub fn operator(text: &str) -> Result<String, Error> {
    let whole = match text.contains('/') {
        true => text.to_owned(),
        false => format!("operator/{text}"),
    };
    let peer = Peer::parse(&whole).filter(|peer| peer.role == Role::Operator);
    let peer = peer.ok_or_else(|| Error::Operator(text.to_owned()))?;
    Ok(peer.to_string())
}

/// Reads a time of day, as the API has it: `none` is empty there.
pub fn time_of_day(text: &str) -> Result<String, Error> {
    match text {
        "" | "none" => Ok(String::new()),
        text => Ok(text.parse::<TimeOfDay>()?.to_string()),
    }
}

/// Reads a time: a whole number with ms, s, m or h, or several of them (1h30m).
pub fn duration(text: &str) -> Result<Duration, Error> {
    let bad = || Error::Duration(text.to_owned());
    let (mut rest, mut total) = (text.trim(), Duration::ZERO);
    if rest.is_empty() {
        return Err(bad());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
        let (number, tail) = rest.split_at(digits);
        let letters = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(letters);
        let number: u64 = number.parse().map_err(|_| bad())?;
        let seconds = |factor: u64| {
            number
                .checked_mul(factor)
                .map(Duration::from_secs)
                .ok_or_else(bad)
        };
        let part = match unit {
            "ms" => Duration::from_millis(number),
            "s" => seconds(1)?,
            "m" | "min" => seconds(60)?,
            "h" => seconds(3600)?,
            _ => return Err(bad()),
        };
        total = total.checked_add(part).ok_or_else(bad)?;
        rest = tail;
    }
    Ok(total)
}

/// Reads KEY=VALUE; the value may be empty.
pub fn label(text: &str) -> Result<(String, String), Error> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(Error::Label(text.to_owned())),
    }
}

/// Reads a toleration: KEY=VALUE, or KEY for any value.
pub fn toleration(text: &str) -> Result<v1::Toleration, Error> {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    if key.is_empty() || key.ends_with('-') {
        return Err(Error::Label(text.to_owned()));
    }
    Ok(v1::Toleration {
        key: key.to_owned(),
        value: value.to_owned(),
    })
}

/// A change of one toleration.
#[derive(Debug, Clone, PartialEq)]
pub enum TolerationChange {
    /// Put up with it.
    Add(v1::Toleration),
    /// Put up with no taint of that key any more.
    Remove(String),
}

/// Reads KEY=VALUE, KEY, or KEY-.
pub fn toleration_change(text: &str) -> Result<TolerationChange, Error> {
    match text.strip_suffix('-') {
        Some(key) if !key.is_empty() && !key.contains('=') => Ok(TolerationChange::Remove(key.to_owned())),
        _ => toleration(text).map(TolerationChange::Add),
    }
}

/// Reads a taint: KEY=VALUE, with `:prefer` behind it for a soft one.
pub fn taint(text: &str) -> Result<v1::Taint, Error> {
    let (pair, soft) = match text.strip_suffix(":prefer") {
        Some(pair) => (pair, true),
        None => (text, false),
    };
    let (key, value) = label(pair).map_err(|_| Error::Label(text.to_owned()))?;
    if value.contains(':') {
        return Err(Error::Label(text.to_owned()));
    }
    Ok(v1::Taint { key, value, soft })
}

/// A change of one label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LabelChange {
    /// Give it this value.
    Set(String, String),
    /// Remove it.
    Remove(String),
}

/// Reads KEY=VALUE or KEY-.
pub fn label_change(text: &str) -> Result<LabelChange, Error> {
    if let Ok((key, value)) = label(text) {
        return Ok(LabelChange::Set(key, value));
    }
    match text.strip_suffix('-') {
        Some(key) if !key.is_empty() && !key.contains('=') => Ok(LabelChange::Remove(key.to_owned())),
        _ => Err(Error::LabelChange(text.to_owned())),
    }
}

/// Reads a UUID.
pub fn uuid(text: &str) -> Result<String, Error> {
    uuid::Uuid::try_parse(text)
        .map(|uuid| uuid.to_string())
        .map_err(|_| Error::Uuid(text.to_owned()))
}

/// Reads NAME or NAME:VERSION.
pub fn image(text: &str) -> Result<Reference, Error> {
    text.parse().map_err(|_| Error::Image(text.to_owned()))
}

/// Reads NAME:VERSION.
pub fn image_version(text: &str) -> Result<Reference, Error> {
    let reference = image(text)?;
    match reference.version {
        Some(_) => Ok(reference),
        None => Err(Error::NoVersion(text.to_owned())),
    }
}

/// Reads HOST:FILE.
pub fn host_file(text: &str) -> Result<v1::ImageFile, Error> {
    match text.split_once(':') {
        Some((host, file)) if !host.is_empty() && !file.is_empty() => Ok(v1::ImageFile {
            host: host.to_owned(),
            file: file.to_owned(),
        }),
        _ => Err(Error::HostFile(text.to_owned())),
    }
}

/// Reads a number of hosts, or `all`.
pub fn replicas(text: &str) -> Result<i32, Error> {
    match text {
        "all" => Ok(-1),
        _ => match text.parse() {
            Ok(copies @ 1..=10_000) => Ok(copies),
            _ => Err(Error::Replicas(text.to_owned())),
        },
    }
}

/// Options and their values.
type Pairs<'a> = Vec<(&'a str, &'a str)>;

/// Splits `A=B,k=v,k=v` into A, B and its options, of which each may be given once. B may be left out, where the caller
/// knows what is meant then.
fn parts(text: &str, bad: Error) -> Result<(&str, Option<&str>, Pairs<'_>), Error> {
    let mut pieces = text.split(',');
    let first = pieces.next().unwrap_or_default();
    let (name, value) = match first.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (first, None),
    };
    if name.is_empty() || value.is_some_and(str::is_empty) {
        return Err(bad);
    }
    let options = pieces
        .map(|piece| piece.split_once('=').ok_or_else(|| bad.clone()))
        .collect::<Result<Vec<_>, _>>()?;
    Ok((name, value, options))
}

fn set_once(field: &mut String, option: &str, value: &str, allowed: &'static str) -> Result<(), Error> {
    if !field.is_empty() || value.is_empty() {
        return Err(Error::Option {
            option: format!("{option}={value}"),
            allowed,
        });
    }
    value.clone_into(field);
    Ok(())
}

/// Reads NAME[=SIZE][,pool=POOL][,image=IMAGE][,format=qcow2|raw][,clone=overlay|full][,volume=VOLUME] and limits; only an image of the
/// catalogue and a volume have a size of their own.
pub fn disk(text: &str) -> Result<v1::Disk, Error> {
    const ALLOWED: &str = "a disk takes pool=POOL, image=IMAGE, format=qcow2|raw, clone=overlay|full, volume=VOLUME and limits (read-iops=N, \
         write-iops=N, read-rate=SIZE, write-rate=SIZE), each once";
    let bad = || Error::Disk(text.to_owned());
    let (name, size, options) = parts(text, bad())?;
    let mut disk = v1::Disk {
        name: name.to_owned(),
        size_mib: size.map_or(Ok(0), size_mib)?,
        ..Default::default()
    };
    let (mut format, mut clone) = (String::new(), String::new());
    let mut limits = limits::Change::default();
    for (option, value) in options {
        let unknown = || Error::Option {
            option: format!("{option}={value}"),
            allowed: ALLOWED,
        };
        match option {
            "pool" => set_once(&mut disk.pool, option, value, ALLOWED)?,
            "image" => set_once(&mut disk.image, option, value, ALLOWED)?,
            "volume" => set_once(&mut disk.volume, option, value, ALLOWED)?,
            "format" => {
                set_once(&mut format, option, value, ALLOWED)?;
                disk.format = match value {
                    "qcow2" => v1::DiskFormat::Qcow2.into(),
                    "raw" => v1::DiskFormat::Raw.into(),
                    _ => return Err(unknown()),
                };
            }
            "clone" => {
                set_once(&mut clone, option, value, ALLOWED)?;
                disk.clone_mode = match value {
                    "overlay" => v1::CloneMode::Overlay.into(),
                    "full" => v1::CloneMode::Full.into(),
                    _ => return Err(unknown()),
                };
            }
            _ if limits.take(option, value)? => {}
            _ => return Err(unknown()),
        }
    }
    disk.limits = limits.of(None);
    let listed = !disk.image.is_empty() && Reference::is_meant(&disk.image);
    if size.is_none() && !listed && disk.volume.is_empty() {
        return Err(bad());
    }
    Ok(disk)
}

/// Reads NAME=SIZE.
pub fn disk_size(text: &str) -> Result<(String, u64), Error> {
    let bad = || Error::Disk(text.to_owned());
    let (name, size) = text.split_once('=').ok_or_else(bad)?;
    if name.is_empty() {
        return Err(bad());
    }
    Ok((name.to_owned(), size_mib(size)?))
}

/// Reads NAME=POOL.
pub fn disk_pool(text: &str) -> Result<(String, String), Error> {
    match text.split_once('=') {
        Some((name, pool)) if !name.is_empty() && !pool.is_empty() => Ok((name.to_owned(), pool.to_owned())),
        _ => Err(Error::DiskPool(text.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_units() {
        for (text, mib) in [
            ("256MiB", 256),
            ("1GiB", 1024),
            ("1.5GiB", 1536),
            ("2g", 2048),
            ("512M", 512),
            ("1T", 1 << 20),
            ("1024KiB", 1),
            ("2 GiB", 2048),
        ] {
            assert_eq!(size_mib(text), Ok(mib), "{text}");
        }
        assert_eq!(size_bytes("4KiB"), Ok(4096));
        assert_eq!(size_bytes("100B"), Ok(100));
    }

    #[test]
    fn sizes_that_could_be_meant_differently_are_refused() {
        assert_eq!(size_mib("256"), Err(Error::NoUnit("256".into())));
        assert!(matches!(size_mib("100KiB"), Err(Error::NotWhole(_, "MiB"))));
        for bad in [
            "",
            "MiB",
            "-1GiB",
            "1GB",
            "1.GiB",
            ".5GiB",
            "1.2.3GiB",
            "1GiBs",
            "99999999999999T",
            "0.0000000001G",
            "1e3MiB",
        ] {
            assert!(size_mib(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn times_are_read_and_added_up() {
        for (text, ms) in [
            ("500ms", 500),
            ("90s", 90_000),
            ("5m", 300_000),
            ("1h30m", 5_400_000),
            ("0s", 0),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for bad in [
            "",
            "5",
            "m",
            "-5s",
            "5 days",
            "1.5h",
            "99999999999999999999s",
            "18446744073709551615h",
        ] {
            assert!(duration(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn an_operator_is_named_with_or_without_its_role() {
        assert_eq!(operator("kim").as_deref(), Ok("operator/kim"));
        assert_eq!(operator("operator/kim").as_deref(), Ok("operator/kim"));
        for bad in ["", "operator/", "agent/h1", "a/b/c", "/kim"] {
            assert!(operator(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn a_time_of_day_is_read_and_none_is_empty() {
        assert_eq!(time_of_day("02:00").as_deref(), Ok("02:00"));
        assert_eq!(time_of_day("02:00+09:00").as_deref(), Ok("02:00+09:00"));
        assert_eq!(time_of_day("none").as_deref(), Ok(""));
        for bad in ["2:00", "02:00 KST", "25:00", "02:00Z", "daily"] {
            assert!(time_of_day(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn a_disk_is_read_with_all_its_options_in_any_order() {
        let read = disk("root=1GiB,format=raw,image=debian.img,pool=shared").unwrap();
        let raw = v1::DiskFormat::Raw.into();
        let wanted = v1::Disk {
            name: "root".into(),
            size_mib: 1024,
            pool: "shared".into(),
            image: "debian.img".into(),
            format: raw,
            ..Default::default()
        };
        assert_eq!(read, wanted);
        assert_eq!(disk("data=2GiB").unwrap().pool, "");
        let volume = disk("data,volume=ledger").unwrap();
        assert_eq!((volume.volume.as_str(), volume.size_mib), ("ledger", 0));
        for bad in [
            "",
            "root",
            "root=",
            "=1GiB",
            "root=1",
            "root=1GiB,",
            "root=1GiB,pool",
            "root=1GiB,pool=",
            "root=1GiB,size=2",
            "root=1GiB,format=vmdk",
            "root=1GiB,pool=a,pool=b",
        ] {
            assert!(disk(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn a_disk_of_an_image_of_the_catalogue_needs_no_size() {
        let read = disk("root,image=debian:12,clone=full").unwrap();
        let wanted = v1::Disk {
            name: "root".into(),
            image: "debian:12".into(),
            clone_mode: v1::CloneMode::Full.into(),
            ..Default::default()
        };
        assert_eq!(read, wanted);
        assert_eq!(disk("root=1GiB,image=debian").unwrap().size_mib, 1024);
        for bad in [
            "root,image=debian.qcow2",
            "root,pool=a",
            "root,image=debian,clone=any",
            "root,image=debian,clone=full,clone=full",
        ] {
            assert!(disk(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn images_files_and_numbers_of_hosts_are_read() {
        assert_eq!(image("debian").unwrap().version, None);
        assert_eq!(image_version("debian:12").unwrap().version.as_deref(), Some("12"));
        assert_eq!(image_version("debian"), Err(Error::NoVersion("debian".into())));
        let file = host_file("h1:debian.qcow2").unwrap();
        assert_eq!((file.host.as_str(), file.file.as_str()), ("h1", "debian.qcow2"));
        assert_eq!([replicas("all"), replicas("3")], [Ok(-1), Ok(3)]);
        for bad in ["", "0", "-1", "10001", "every"] {
            assert!(replicas(bad).is_err(), "{bad} was accepted");
        }
        for bad in ["", "Debian", "debian:", "debian:1:2", "../x"] {
            assert!(image(bad).is_err(), "{bad} was accepted");
        }
        for bad in ["", "h1", "h1:", ":x"] {
            assert!(host_file(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn labels_are_set_and_removed() {
        assert_eq!(label("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert_eq!(label("a="), Ok(("a".into(), String::new())));
        assert_eq!(label_change("rack-"), Ok(LabelChange::Remove("rack".into())));
        assert_eq!(
            label_change("rack=a-"),
            Ok(LabelChange::Set("rack".into(), "a-".into()))
        );
        for bad in ["a", "=b", "", "-"] {
            assert!(
                label(bad).is_err() && label_change(bad).is_err(),
                "{bad} was accepted"
            );
        }
    }
}
