//! What a host keeps of what it was told.

use super::*;
use crate::network::compile::tests::{plugged, told};

#[test]
fn a_network_that_is_left_out_stays_while_an_interface_in_it_is_here() {
    let all = told();
    let here = plugged(&all, "web-1");
    let kept = Kept::default().told(all.clone(), &here);
    let less = Document {
        version: 4,
        networks: Vec::new(),
        groups: Vec::new(),
    };
    let after = kept.told(less.clone(), &here);
    assert_eq!(after.networks().count(), 2);
    assert_eq!(after.groups().count(), 2);
    assert_eq!(after.zones, kept.zones);
    assert!(here.iter().all(|plugged| after.missing(plugged).is_none()));

    let over = after.told(Document { version: 5, ..less }, &[]);
    assert_eq!(over.networks().count(), 0);
    assert_eq!(over.groups().count(), 0);
    assert!(over.zones.is_empty());
    assert_eq!(over.missing(&here[0]), Some("network app".to_owned()));
}

#[test]
fn a_network_keeps_its_zone_and_no_two_have_the_same() {
    let all = told();
    let mut only_site = all.clone();
    only_site.networks.remove(0);
    let kept = Kept::default().told(only_site, &[]).told(all, &[]);
    let zones: Vec<_> = kept
        .zones
        .iter()
        .map(|(name, zone)| (name.as_str(), *zone))
        .collect();
    assert_eq!(zones, [("app", FIRST_ZONE + 1), ("site", FIRST_ZONE)]);
}

#[test]
fn what_an_interface_still_lacks_is_said() {
    let mut all = told();
    let here = plugged(&all, "web-1");
    all.networks[0]
        .interfaces
        .retain(|interface| interface.vm.as_str() != "web-1");
    let kept = Kept::default().told(all.clone(), &here);
    assert_eq!(
        kept.missing(&here[0]),
        Some("the VM's own interface in network app".to_owned())
    );
    all.groups.retain(|group| group.name.as_str() != "web");
    let kept = Kept::default().told(all, &here);
    assert_eq!(kept.missing(&here[0]), Some("security group web".to_owned()));
}
