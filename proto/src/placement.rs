//! What operators say of where VMs may be, besides what a VM is made of: placement groups, taints of hosts, tolerations of VMs.
//!
//! From the wire they are checked, and the field that does not hold is named; to the wire they are total.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{
    ids::{PlacementGroupName, check_label},
    v1,
    vm::Invalid,
};

/// Most placement groups that a VM may be in.
pub const MAX_GROUPS_OF_VM: usize = 8;
/// Most taints of a host, and most tolerations of a VM.
pub const MAX_TAINTS: usize = 16;

/// What a placement group does with its members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// Keeps them together, in one domain.
    Affinity,
    /// Keeps them apart, each in a domain of its own.
    AntiAffinity,
}

impl Rule {
    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Affinity => "AFFINITY",
            Self::AntiAffinity => "ANTI_AFFINITY",
        }
    }
}

/// VMs that are to be together or apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Its name.
    pub name: PlacementGroupName,
    /// What it does.
    pub rule: Rule,
    /// The rule makes hosts better or worse, and refuses none.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub preferred: bool,
    /// Label whose value is a host's domain; `None`: each host is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology_key: Option<String>,
}

/// What keeps VMs away from a host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Taint {
    /// Its key, given once on a host.
    pub key: String,
    /// Its value; may be empty.
    pub value: String,
    /// Hosts without it come first; else no VM comes that does not tolerate it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub soft: bool,
}

/// What lets a VM come to hosts with a taint.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Toleration {
    /// The taint's key.
    pub key: String,
    /// Its value; `None` for any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
}

impl Toleration {
    /// Whether it lets VMs come in spite of a taint.
    pub fn covers(&self, taint: &Taint) -> bool {
        self.key == taint.key && self.value.as_ref().is_none_or(|value| *value == taint.value)
    }
}

fn invalid(field: impl Into<String>, message: impl ToString) -> Invalid {
    Invalid {
        field: field.into(),
        message: message.to_string(),
    }
}

fn given(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

impl TryFrom<v1::PlacementGroup> for Group {
    type Error = Invalid;

    fn try_from(wire: v1::PlacementGroup) -> Result<Self, Invalid> {
        let rule = match v1::PlacementRule::try_from(wire.rule) {
            Ok(v1::PlacementRule::Affinity) => Rule::Affinity,
            Ok(v1::PlacementRule::AntiAffinity) => Rule::AntiAffinity,
            _ => return Err(invalid("rule", "must be AFFINITY or ANTI_AFFINITY")),
        };
        let topology_key = given(wire.topology_key);
        if let Some(key) = &topology_key {
            check_label(key, true).map_err(|error| invalid("topology_key", error))?;
        }
        Ok(Self {
            name: wire.name.parse().map_err(|error| invalid("name", error))?,
            rule,
            preferred: wire.preferred,
            topology_key,
        })
    }
}

impl From<Group> for v1::PlacementGroup {
    fn from(group: Group) -> Self {
        let rule = match group.rule {
            Rule::Affinity => v1::PlacementRule::Affinity,
            Rule::AntiAffinity => v1::PlacementRule::AntiAffinity,
        };
        Self {
            name: group.name.to_string(),
            rule: rule.into(),
            preferred: group.preferred,
            topology_key: group.topology_key.unwrap_or_default(),
            ..Self::default()
        }
    }
}

/// Checks the names of a VM's placement groups.
pub fn groups(field: &str, names: &[String]) -> Result<BTreeSet<PlacementGroupName>, Invalid> {
    let parsed = names.iter().enumerate().map(|(index, name)| {
        let parsed = name.parse();
        parsed.map_err(|error: crate::ids::Error| invalid(format!("{field}[{index}]"), error))
    });
    let parsed: BTreeSet<_> = parsed.collect::<Result<_, _>>()?;
    few(field, parsed.len(), MAX_GROUPS_OF_VM)?;
    Ok(parsed)
}

/// Checks the taints of a host.
pub fn taints(field: &str, wire: &[v1::Taint]) -> Result<BTreeSet<Taint>, Invalid> {
    few(field, wire.len(), MAX_TAINTS)?;
    let mut keys = BTreeSet::new();
    for (index, taint) in wire.iter().enumerate() {
        let at = |part: &str| format!("{field}[{index}].{part}");
        check_label(&taint.key, true).map_err(|error| invalid(at("key"), error))?;
        check_label(&taint.value, false).map_err(|error| invalid(at("value"), error))?;
        if !keys.insert(&taint.key) {
            return Err(invalid(at("key"), format!("{} is given twice", taint.key)));
        }
    }
    let taint = |wire: &v1::Taint| Taint {
        key: wire.key.clone(),
        value: wire.value.clone(),
        soft: wire.soft,
    };
    Ok(wire.iter().map(taint).collect())
}

/// Checks the tolerations of a VM.
pub fn tolerations(field: &str, wire: &[v1::Toleration]) -> Result<BTreeSet<Toleration>, Invalid> {
    few(field, wire.len(), MAX_TAINTS)?;
    for (index, toleration) in wire.iter().enumerate() {
        let at = |part: &str| format!("{field}[{index}].{part}");
        check_label(&toleration.key, true).map_err(|error| invalid(at("key"), error))?;
        check_label(&toleration.value, false).map_err(|error| invalid(at("value"), error))?;
    }
    let toleration = |wire: &v1::Toleration| Toleration {
        key: wire.key.clone(),
        value: given(wire.value.clone()),
    };
    Ok(wire.iter().map(toleration).collect())
}

fn few(field: &str, count: usize, most: usize) -> Result<(), Invalid> {
    if count <= most {
        return Ok(());
    }
    Err(invalid(field, format!("at most {most} are allowed, got {count}")))
}

impl From<Taint> for v1::Taint {
    fn from(taint: Taint) -> Self {
        let Taint { key, value, soft } = taint;
        Self { key, value, soft }
    }
}

impl From<Toleration> for v1::Toleration {
    fn from(toleration: Toleration) -> Self {
        Self {
            key: toleration.key,
            value: toleration.value.unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group() -> v1::PlacementGroup {
        v1::PlacementGroup {
            name: "web".into(),
            rule: v1::PlacementRule::AntiAffinity.into(),
            topology_key: "rack".into(),
            ..Default::default()
        }
    }

    fn field(found: Result<impl std::fmt::Debug, Invalid>) -> String {
        found.unwrap_err().field
    }

    #[test]
    fn a_group_survives_the_wire_and_names_the_field_that_does_not_hold() {
        let read = Group::try_from(group()).unwrap();
        assert_eq!(
            (read.rule, read.topology_key.as_deref()),
            (Rule::AntiAffinity, Some("rack"))
        );
        assert_eq!(v1::PlacementGroup::from(read), group());
        let with = |change: fn(&mut v1::PlacementGroup)| {
            let mut wire = group();
            change(&mut wire);
            field(Group::try_from(wire))
        };
        assert_eq!(with(|wire| wire.rule = 0), "rule");
        assert_eq!(with(|wire| wire.rule = 77), "rule");
        assert_eq!(with(|wire| wire.name = "Web".into()), "name");
        assert_eq!(with(|wire| wire.topology_key = "a b".into()), "topology_key");
    }

    #[test]
    fn a_toleration_without_a_value_covers_any_and_one_with_a_value_that_alone() {
        let taint = |value: &str| Taint {
            key: "use".into(),
            value: value.into(),
            soft: false,
        };
        let covers = |wire: (&str, &str), value: &str| {
            let wire = v1::Toleration {
                key: wire.0.into(),
                value: wire.1.into(),
            };
            let read = tolerations("tolerations", &[wire]).unwrap();
            read.first().unwrap().covers(&taint(value))
        };
        assert!(covers(("use", ""), "db") && covers(("use", ""), ""));
        assert!(covers(("use", "db"), "db") && !covers(("use", "db"), "web"));
        assert!(!covers(("used", ""), "db"));
    }

    #[test]
    fn what_is_too_much_or_given_twice_is_refused() {
        let taint = |key: &str| v1::Taint {
            key: key.into(),
            ..Default::default()
        };
        assert_eq!(field(taints("t", &[taint("a"), taint("a")])), "t[1].key");
        assert_eq!(field(taints("t", &[taint("")])), "t[0].key");
        let many: Vec<_> = (0..17).map(|number| taint(&format!("k{number}"))).collect();
        assert_eq!(field(taints("t", &many)), "t");
        assert!(taints("t", &many[..16]).is_ok());
        let names: Vec<_> = (0..9).map(|number| format!("g{number}")).collect();
        assert_eq!(field(groups("g", &names)), "g");
        assert_eq!(field(groups("g", &["a".into(), "-".into()])), "g[1]");
    }
}
