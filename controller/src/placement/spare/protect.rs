//! What is protected, as the configuration says it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use dalgu_proto::ids::HostName;
use serde::Deserialize;

/// The domains of which any one may fail. None, where nobody says.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(try_from = "Vec<String>")]
pub struct Protect(BTreeSet<Mark>);

/// Marks domains.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Mark {
    /// Each host by itself.
    Host,
    /// All hosts with the same value of a label.
    Label(String),
    /// The hosts with this value of a label.
    Domain(String, String),
}

impl TryFrom<Vec<String>> for Protect {
    type Error = String;

    fn try_from(marks: Vec<String>) -> Result<Self, String> {
        let mark = |text: &String| {
            let label =
                |text: &str| !text.is_empty() && !text.contains(|c: char| c == '=' || c.is_whitespace());
            match text.split_once('=') {
                None if text == "host" => Ok(Mark::Host),
                None if label(text) => Ok(Mark::Label(text.clone())),
                Some((key, value)) if label(key) && label(value) => {
                    Ok(Mark::Domain(key.into(), value.into()))
                }
                _ => Err(format!(
                    "{text:?}: must be \"host\", the key of a label of hosts (\"rack\"), or a key and its value (\"rack=r1\")"
                )),
            }
        };
        marks.iter().map(mark).collect::<Result<_, _>>().map(Self)
    }
}

impl Protect {
    /// Each host by itself.
    pub fn hosts() -> Self {
        Self(BTreeSet::from([Mark::Host]))
    }

    /// The same, and each host by itself.
    #[must_use]
    pub fn and_hosts(&self) -> Self {
        Self(self.0.iter().cloned().chain([Mark::Host]).collect())
    }

    /// Whether nothing is protected.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Names of the protected domains that a host is of. One without the label that others go by is a domain by itself.
    pub fn domains(&self, host: &HostName, labels: &BTreeMap<String, String>) -> Vec<String> {
        let alone = || format!("host {host}");
        let name = |mark: &Mark| match mark {
            Mark::Host => Some(alone()),
            Mark::Label(key) => Some(match labels.get(key) {
                Some(value) => format!("{key} {value}"),
                None => alone(),
            }),
            Mark::Domain(key, value) => (labels.get(key) == Some(value)).then(|| format!("{key} {value}")),
        };
        let mut names: Vec<_> = self.0.iter().filter_map(name).collect();
        names.sort_unstable();
        names.dedup();
        names
    }
}

impl fmt::Display for Protect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, mark) in self.0.iter().enumerate() {
            f.write_str(if index > 0 { ", " } else { "" })?;
            match mark {
                Mark::Host => f.write_str("each host")?,
                Mark::Label(key) => write!(f, "each {key}")?,
                Mark::Domain(key, value) => write!(f, "{key} {value}")?,
            }
        }
        Ok(())
    }
}
