//! Names of what a network has on a host: the same on every host, so that a domain that migrates finds its bridge. Pure.
//!
//! All begin with two letters that say what it is, and no other software's are touched. The rest is FNV-1a of the network's name,
//! or of the VM and the interface: 40 bits, which no two networks of a site share but by an accident of one in a million
//! for a thousand of them; [`super::compile`] refuses that.

use dalgu_proto::{
    ids::{NetworkName, VmId},
    network::{Kind, Network},
};

/// Prefix of a network's bridge.
pub const BRIDGE: &str = "dgn";
/// Prefix of an overlay's VXLAN device.
pub const VXLAN: &str = "dgx";
/// Prefix of the port of a network's bridge that leads to the host's bridge.
pub const UPLINK: &str = "dgu";
/// Prefix of the port of the host's bridge that leads to a network's.
pub const HOST_SIDE: &str = "dgp";
/// Prefix of a VLAN on the host's bridge.
pub const VLAN: &str = "dgv";
/// Prefix of the port of a network's bridge that leads to its DHCP and DNS.
pub const SERVICE: &str = "dgs";
/// Prefix of an interface of a VM.
pub const TAP: &str = "dgt";

/// See "FNV hash parameters" of its authors.
fn hash<'a>(bytes: impl IntoIterator<Item = &'a u8>) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, step)
}

fn of(network: &NetworkName) -> u64 {
    let hash = hash(network.as_str().as_bytes());
    (hash ^ (hash >> 40)) & 0xff_ffff_ffff
}

/// The name with this prefix of a network's device: 13 characters.
pub fn device(prefix: &str, network: &NetworkName) -> String {
    format!("{prefix}{:010x}", of(network))
}

/// A network's bridge.
pub fn bridge(network: &NetworkName) -> String {
    device(BRIDGE, network)
}

/// The port of a network's bridge that leads to the rest of the network.
pub fn uplink(network: &Network) -> String {
    let prefix = match network.kind {
        Kind::Overlay { .. } => VXLAN,
        Kind::Bridge { vlan: None, .. } => UPLINK,
        Kind::Bridge { vlan: Some(_), .. } => VLAN,
    };
    device(prefix, &network.name)
}

/// The tap of a VM's interface: 14 characters.
pub fn tap(vm: VmId, nic: &str) -> String {
    let hash = hash(vm.uuid().as_bytes().iter().chain(nic.as_bytes()));
    format!("{TAP}{:011x}", (hash ^ (hash >> 44)) & 0xfff_ffff_ffff)
}

/// MAC address of a network's DHCP and DNS: locally administered, and the same on every host, so that a guest that has moved
/// finds it at once.
pub fn service_mac(network: &NetworkName) -> String {
    let [.., a, b, c, d, e] = of(network).to_be_bytes();
    format!("02:{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_the_kernel_and_are_the_same_on_every_host() {
        let (a, b): (NetworkName, NetworkName) = ("app".parse().unwrap(), "db".parse().unwrap());
        let vm = VmId::from_uuid(uuid::Uuid::from_u128(7));
        assert_eq!(bridge(&a), bridge(&a.clone()));
        assert_ne!(bridge(&a), bridge(&b));
        assert_ne!(tap(vm, "eth0"), tap(vm, "eth1"));
        for name in [bridge(&a), device(VXLAN, &b), tap(vm, "a-long-nic-name")] {
            assert!(name.len() <= 15, "{name}");
        }
        assert!(service_mac(&a).starts_with("02:"));
    }
}
