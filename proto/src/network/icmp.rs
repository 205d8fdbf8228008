//! The types of ICMP that a rule may be about. Pure.
//!
//! They are those that begin an exchange, as conntrack of Linux has it (`valid_new` in `nf_conntrack_proto_icmp.c` and
//! `nf_conntrack_proto_icmpv6.c`). An answer passes with what it answers, an error with what it is about, and what belongs to nothing
//! passes never: a rule about those would say nothing.

use std::{fmt, net::IpAddr, str::FromStr};

use serde::{Deserialize, Serialize};

/// With which type of ICMP an exchange begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IcmpType {
    /// What `ping` sends.
    EchoRequest,
    /// Asks for the time.
    TimestampRequest,
    /// Asks for the network's number.
    InformationRequest,
    /// Asks for the subnet's mask.
    AddressMaskRequest,
    /// Asks a node for its names or addresses (RFC 4620).
    NodeInformationQuery,
}

/// It is none that a rule may be about.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "types of ICMP are {}, or any; answers and errors pass with what they belong to",
    every()
)]
pub struct UnknownIcmpType;

impl IcmpType {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::EchoRequest,
        Self::TimestampRequest,
        Self::InformationRequest,
        Self::AddressMaskRequest,
        Self::NodeInformationQuery,
    ];

    /// What people call it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::EchoRequest => "echo-request",
            Self::TimestampRequest => "timestamp-request",
            Self::InformationRequest => "information-request",
            Self::AddressMaskRequest => "address-mask-request",
            Self::NodeInformationQuery => "node-information-query",
        }
    }

    /// Its number in ICMP (RFC 792, RFC 950), where it has one.
    pub const fn ipv4(self) -> Option<u8> {
        match self {
            Self::EchoRequest => Some(8),
            Self::TimestampRequest => Some(13),
            Self::InformationRequest => Some(15),
            Self::AddressMaskRequest => Some(17),
            Self::NodeInformationQuery => None,
        }
    }

    /// Its number in `ICMPv6` (RFC 4443, RFC 4620).
    pub const fn ipv6(self) -> Option<u8> {
        match self {
            Self::EchoRequest => Some(128),
            Self::NodeInformationQuery => Some(139),
            Self::TimestampRequest | Self::InformationRequest | Self::AddressMaskRequest => None,
        }
    }

    /// Whether it is there between addresses of that family.
    pub const fn is_of(self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(_) => self.ipv4().is_some(),
            IpAddr::V6(_) => self.ipv6().is_some(),
        }
    }

    /// Its numbers: no two types have one in common.
    fn numbers(self) -> impl Iterator<Item = u8> {
        self.ipv4().into_iter().chain(self.ipv6())
    }
}

fn every() -> String {
    let one = |kind: IcmpType| {
        let numbers: Vec<_> = kind.numbers().map(|number| number.to_string()).collect();
        format!("{kind} ({})", numbers.join(", "))
    };
    IcmpType::ALL.map(one).join(", ")
}

impl fmt::Display for IcmpType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// By its name, or by one of its numbers, which means it in both families.
impl FromStr for IcmpType {
    type Err = UnknownIcmpType;

    fn from_str(text: &str) -> Result<Self, UnknownIcmpType> {
        let number = text.parse::<u8>().ok();
        let known = Self::ALL.into_iter().find(|kind| {
            kind.as_str() == text || number.is_some_and(|number| kind.numbers().any(|own| own == number))
        });
        known.ok_or(UnknownIcmpType)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_is_known_by_its_name_and_by_each_of_its_numbers() {
        let mut seen = std::collections::BTreeSet::new();
        for kind in IcmpType::ALL {
            assert_eq!(kind.as_str().parse(), Ok(kind));
            for number in kind.numbers() {
                assert_eq!(number.to_string().parse(), Ok(kind));
                assert!(seen.insert(number), "{number} is of two types");
            }
        }
    }

    #[test]
    fn what_begins_nothing_is_refused_with_all_that_does() {
        for bad in ["", "0", "3", "echo-reply", "Echo-Request", "256", "-8", "8;drop"] {
            let error = bad.parse::<IcmpType>().unwrap_err().to_string();
            assert!(
                error.contains("echo-request (8, 128), timestamp-request (13)"),
                "{error}"
            );
        }
    }
}
