//! How many connections each interface of a VM may have begun: the kernel's table of connections is one for the whole host, and the VM that
//! fills it would cut off all others. Pure.
//!
//! It is a table of its own for `nft`, because what is counted has to outlive the filters, which are replaced whenever a VM comes or
//! goes. It stands behind them: a connection that they refuse counts for nobody. Interfaces are told apart by their MAC addresses, which the filters
//! have judged.

use super::names;

/// Of the host's connections, one interface may have begun this part: 15 others may do the same at once. What is counted is looked
/// through when one is added, at most once a tick of the kernel, which sets an end to larger parts.
const PART: u64 = 16;
/// As many at least; more than what runs on a server usually has.
const LEAST: u64 = 1024;
/// Connections that a host of more than 4 GiB may have, where nobody has said otherwise: Linux, nf_conntrack-sysctl.
const USUAL: u64 = 262_144;
/// Taps that have begun a connection; only numbers that a tap can have, see [`super::rules`].
const BY_A_VM: &str = "meta mark & 0xffff0000 != { 0, 0xffff0000 }";

/// Connections that one interface may have begun on a host that may have so many.
pub fn bound(host: Option<u64>) -> u64 {
    (host.unwrap_or(USUAL) / PART).max(LEAST)
}

/// The table, which takes the place of the one before.
pub fn table(bound: u64) -> String {
    let bridge = names::BRIDGE;
    format!(
        "table inet dalgu-counts
delete table inet dalgu-counts
table inet dalgu-counts {{
  set begun {{
    type ether_addr
    size 65535
    flags dynamic
  }}
  set refused {{
    type ether_addr
    size 65535
    flags dynamic, timeout
    timeout 5m
  }}
  chain forward {{
    type filter hook forward priority filter + 1; policy accept;
    iifname \"{bridge}*\" ct state new {BY_A_VM} add @begun {{ ether saddr ct count over {bound} }} update @refused {{ ether saddr }} drop
  }}
}}
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_has_a_part_of_what_the_host_has_and_never_too_few() {
        assert_eq!(bound(None), 16_384);
        assert_eq!(bound(Some(1_048_576)), 65_536);
        assert_eq!(bound(Some(8192)), 1024);
    }
}
