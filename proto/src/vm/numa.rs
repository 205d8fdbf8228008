//! What a VM asks of the processors, huge pages and NUMA nodes of its host ([`Fitting`]), and what it got there ([`NumaPlace`]).

use serde::{Deserialize, Serialize};

use super::Invalid;
use crate::v1;

/// Fewest and most nodes that a VM can be spread over.
const SPREAD: std::ops::RangeInclusive<u32> = 2..=8;

/// How virtual processors run on the logical ones of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CpuPolicy {
    /// With those of others.
    #[default]
    Shared,
    /// Each on one of its own.
    Dedicated,
}

/// Size of a huge page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PageSize {
    /// 2 MiB.
    Mib2,
    /// 1 GiB.
    Gib1,
}

impl PageSize {
    /// In KiB.
    pub const fn kib(self) -> u64 {
        match self {
            Self::Mib2 => 2048,
            Self::Gib1 => 1_048_576,
        }
    }

    /// In MiB.
    pub const fn mib(self) -> u64 {
        self.kib() / 1024
    }

    /// For people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Mib2 => "2 MiB",
            Self::Gib1 => "1 GiB",
        }
    }
}

/// On how many NUMA nodes a VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NumaPolicy {
    /// Nobody minds.
    #[default]
    None,
    /// On one.
    Pack,
    /// In equal parts on so many.
    Spread(u32),
}

impl NumaPolicy {
    /// The nodes that are named with it, on the wire.
    pub(super) const fn nodes_named(self) -> u32 {
        match self {
            Self::None | Self::Pack => 0,
            Self::Spread(nodes) => nodes,
        }
    }
}

/// What a VM asks of its host besides room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Fitting {
    /// How its processors run.
    #[serde(default)]
    pub cpus: CpuPolicy,
    /// What its memory is made of; `None` for ordinary memory.
    #[serde(default)]
    pub pages: Option<PageSize>,
    /// Where it is.
    #[serde(default)]
    pub numa: NumaPolicy,
}

impl Fitting {
    /// Whether it asks for nothing, so that any processor and any memory of the host will do.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Whether its processors are its own.
    pub fn is_dedicated(&self) -> bool {
        self.cpus == CpuPolicy::Dedicated
    }

    /// The nodes that it is on.
    pub const fn nodes(&self) -> u32 {
        match self.numa {
            NumaPolicy::None | NumaPolicy::Pack => 1,
            NumaPolicy::Spread(nodes) => nodes,
        }
    }
}

/// Where a host has a NUMA node of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NumaPlace {
    /// The host's node.
    pub node: u32,
    /// Logical processors, one for each virtual one; none where they are shared.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpus: Vec<u32>,
}

impl From<v1::NumaPlace> for NumaPlace {
    fn from(wire: v1::NumaPlace) -> Self {
        let v1::NumaPlace { node, cpus } = wire;
        Self { node, cpus }
    }
}

impl From<NumaPlace> for v1::NumaPlace {
    fn from(place: NumaPlace) -> Self {
        let NumaPlace { node, cpus } = place;
        Self { node, cpus }
    }
}

impl From<CpuPolicy> for v1::CpuPolicy {
    fn from(policy: CpuPolicy) -> Self {
        match policy {
            CpuPolicy::Shared => Self::Shared,
            CpuPolicy::Dedicated => Self::Dedicated,
        }
    }
}

impl From<NumaPolicy> for v1::NumaPolicy {
    fn from(policy: NumaPolicy) -> Self {
        match policy {
            NumaPolicy::None => Self::None,
            NumaPolicy::Pack => Self::Pack,
            NumaPolicy::Spread(_) => Self::Spread,
        }
    }
}

/// Reads what a specification asks for.
pub(super) fn check(wire: &v1::VmSpec) -> Result<Fitting, Invalid> {
    let invalid = |field: &str, message: String| Invalid {
        field: field.to_owned(),
        message,
    };
    let cpus = match v1::CpuPolicy::try_from(wire.cpu_policy) {
        Ok(v1::CpuPolicy::Unspecified | v1::CpuPolicy::Shared) => CpuPolicy::Shared,
        Ok(v1::CpuPolicy::Dedicated) => CpuPolicy::Dedicated,
        Err(_) => return Err(invalid("cpu_policy", "is not a value of CpuPolicy".to_owned())),
    };
    let pages = match wire.huge_page_kib {
        0 => None,
        2048 => Some(PageSize::Mib2),
        1_048_576 => Some(PageSize::Gib1),
        other => {
            let message =
                format!("must be 2048 (2 MiB), 1048576 (1 GiB), or 0 for ordinary memory, got {other}");
            return Err(invalid("huge_page_kib", message));
        }
    };
    let spread = match v1::NumaPolicy::try_from(wire.numa_policy) {
        Ok(policy) => policy == v1::NumaPolicy::Spread,
        Err(_) => return Err(invalid("numa_policy", "is not a value of NumaPolicy".to_owned())),
    };
    let numa = match (wire.numa_policy(), wire.numa_nodes) {
        (v1::NumaPolicy::Spread, nodes) if SPREAD.contains(&nodes) => NumaPolicy::Spread(nodes),
        (v1::NumaPolicy::Pack, 0) => NumaPolicy::Pack,
        (v1::NumaPolicy::Unspecified | v1::NumaPolicy::None, 0) => NumaPolicy::None,
        (_, nodes) => {
            let (least, most) = (SPREAD.start(), SPREAD.end());
            let message = match spread {
                true => format!("must be {least} to {most} with SPREAD, got {nodes}"),
                false => format!("is for SPREAD only: leave it out, got {nodes}"),
            };
            return Err(invalid("numa_nodes", message));
        }
    };
    let fitting = Fitting { cpus, pages, numa };
    let nodes = fitting.nodes();
    if !wire.vcpus.is_multiple_of(nodes) {
        let message = format!("must be a multiple of `numa_nodes` ({nodes}), got {}", wire.vcpus);
        return Err(invalid("vcpus", message));
    }
    let (block, of) = match pages {
        None => (u64::from(nodes), "of `numa_nodes`"),
        Some(pages) => (
            u64::from(nodes) * pages.mib(),
            "of the huge pages' size on each node",
        ),
    };
    if !wire.memory_mib.is_multiple_of(block) {
        let message = format!("must be a multiple {of} ({block} MiB), got {}", wire.memory_mib);
        return Err(invalid("memory_mib", message));
    }
    for (field, most) in [
        ("max_vcpus", u64::from(wire.max_vcpus)),
        ("max_memory_mib", wire.max_memory_mib),
    ] {
        if most != 0 && !fitting.is_none() {
            let message =
                "must be 0 with dedicated processors, huge pages or a NUMA policy, which fix a VM's size"
                    .to_owned();
            return Err(invalid(field, message));
        }
    }
    Ok(fitting)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::Spec;

    fn wire() -> v1::VmSpec {
        v1::VmSpec {
            vcpus: 4,
            memory_mib: 4096,
            cpu_policy: v1::CpuPolicy::Dedicated.into(),
            huge_page_kib: 1_048_576,
            numa_policy: v1::NumaPolicy::Spread.into(),
            numa_nodes: 2,
            disks: vec![v1::Disk {
                name: "root".into(),
                size_mib: 1024,
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn what_a_vm_asks_of_its_host_survives_the_wire_and_the_store() {
        let spec = Spec::try_from(wire()).unwrap();
        assert_eq!(
            spec.fitting,
            Fitting {
                cpus: CpuPolicy::Dedicated,
                pages: Some(PageSize::Gib1),
                numa: NumaPolicy::Spread(2),
            }
        );
        assert_eq!(Spec::try_from(v1::VmSpec::from(spec.clone())).unwrap(), spec);
        let stored = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<Spec>(&stored).unwrap(), spec, "{stored}");
        // The guest's memory is no ordinary one.
        assert_eq!(spec.reserved_memory_mib(), 64 + 4 + 32);
        assert!(
            spec.features()
                .any(|feature| feature == crate::host::GuestFeature::Numa)
        );
    }

    #[test]
    fn one_that_asks_for_nothing_says_so_in_words_and_is_stored_as_ever() {
        let mut plain = wire();
        (
            plain.cpu_policy,
            plain.huge_page_kib,
            plain.numa_policy,
            plain.numa_nodes,
        ) = (0, 0, 0, 0);
        let spec = Spec::try_from(plain).unwrap();
        assert!(spec.fitting.is_none() && spec.features().next().is_none());
        assert!(!serde_json::to_string(&spec).unwrap().contains("fitting"));
        let said = v1::VmSpec::from(spec);
        assert_eq!(said.cpu_policy(), v1::CpuPolicy::Shared);
        assert_eq!(said.numa_policy(), v1::NumaPolicy::None);
    }

    #[test]
    fn what_cannot_be_had_together_is_refused_by_its_field() {
        type Change = fn(&mut v1::VmSpec);
        let cases: &[(&str, Change)] = &[
            ("cpu_policy", |s| s.cpu_policy = 9),
            ("huge_page_kib", |s| s.huge_page_kib = 4096),
            ("numa_policy", |s| s.numa_policy = 9),
            ("numa_nodes", |s| s.numa_nodes = 1),
            ("numa_nodes", |s| s.numa_nodes = 9),
            ("numa_nodes", |s| s.numa_policy = v1::NumaPolicy::Pack.into()),
            ("vcpus", |s| s.vcpus = 5),
            ("memory_mib", |s| s.memory_mib = 3072),
            ("memory_mib", |s| {
                (s.memory_mib, s.huge_page_kib) = (4098, 2048);
            }),
            ("max_vcpus", |s| s.max_vcpus = 8),
            ("max_memory_mib", |s| s.max_memory_mib = 8192),
        ];
        for (field, change) in cases {
            let mut spec = wire();
            change(&mut spec);
            let error = Spec::try_from(spec).expect_err(field);
            assert_eq!(&error.field, field, "{error}");
        }
    }
}
