//! What hosts must know, and the addresses that VMs get, case by case.

use std::net::IpAddr;

use dalgu_proto::{
    host::GuestFeature,
    ids::{HostName, NetworkName},
    vm::{Plug, Spec},
};

use super::{plan::*, resolve::*, *};
use crate::{
    fixtures::{self, bridged, group, host_name, nic, overlay, pinged, vm_in},
    model::{HostLive, HostState, MigrationRecord, Phase, VmRecord},
    state::{Db, Hooks, State, Tx},
    store::memory::Disk,
};

fn db() -> Db {
    Db::open(Disk::default().open(), fixtures::cluster_id(), Hooks::default()).unwrap()
}

/// Three hosts that are heard from, h1 to h3, at 192.0.2.1 to .3.
fn hosts(tx: &mut Tx) {
    for number in 1..=3 {
        fixtures::networked(tx, &format!("h{number}"), &format!("192.0.2.{number}"), "run");
    }
}

async fn site(change: impl FnOnce(&mut Tx)) -> Db {
    let db = db();
    db.change(|tx| {
        hosts(tx);
        change(tx);
    })
    .await;
    db
}

fn versions(state: &State) -> [u64; 3] {
    ["h1", "h2", "h3"].map(|host| version(state, &host_name(host)))
}

/// Which of the three hosts a change concerns.
async fn concerned(db: &Db, change: impl FnOnce(&mut Tx)) -> [bool; 3] {
    let before = versions(&db.snapshot());
    db.change(change).await;
    let after = versions(&db.snapshot());
    std::array::from_fn(|index| {
        assert!(after[index] >= before[index], "a version fell");
        after[index] > before[index]
    })
}

fn told(state: &State, host: &str) -> (Vec<String>, Vec<IpAddr>, Vec<String>, Vec<String>) {
    let document = document(state, &host_name(host));
    let names = document
        .networks
        .iter()
        .map(|part| part.network.network.name.to_string());
    let peers = document.networks.iter().flat_map(|part| part.peers.clone());
    let interfaces = document.networks.iter().flat_map(|part| &part.interfaces);
    let interfaces = interfaces.map(|one| format!("{}/{}", one.vm, one.nic));
    let groups = document.groups.iter().map(|group| group.group.name.to_string());
    (
        names.collect(),
        peers.collect(),
        interfaces.collect(),
        groups.collect(),
    )
}

fn texts(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

fn put(tx: &mut Tx, vm: &VmRecord) {
    tx.put_vm(vm.clone());
}

#[tokio::test]
async fn a_host_is_told_of_its_networks_of_all_in_them_of_its_peers_and_of_every_group_that_rules_lead_to() {
    let db = site(|tx| {
        tx.put_network(overlay("field", 7));
        tx.put_network(bridged("office", "br0", 0));
        for (name, named) in [("a", &["b"][..]), ("b", &["c"]), ("c", &["c"]), ("d", &[])] {
            tx.put_group(group(name, named));
        }
        put(tx, &vm_in("field", &["a"], "web", "h1"));
        put(tx, &vm_in("field", &[], "db", "h2"));
        put(tx, &vm_in("office", &["d"], "desk", "h3"));
    })
    .await;
    let state = db.snapshot();
    let field = |peer: &str| {
        let peers = vec![peer.parse().unwrap()];
        (
            texts(&["field"]),
            peers,
            texts(&["db/eth0", "web/eth0"]),
            texts(&["a", "b", "c"]),
        )
    };
    assert_eq!(told(&state, "h1"), field("192.0.2.2"));
    assert_eq!(told(&state, "h2"), field("192.0.2.1"));
    let office = (texts(&["office"]), vec![], texts(&["desk/eth0"]), texts(&["d"]));
    assert_eq!(told(&state, "h3"), office);
}

#[tokio::test]
async fn a_change_concerns_those_hosts_alone_that_must_know_of_it() {
    let mut web = vm_in("field", &["a"], "web", "h1");
    let (lan, stored) = (vm_in("office", &[], "desk", "h3"), web.clone());
    let db = site(move |tx| {
        tx.put_network(overlay("field", 7));
        tx.put_network(overlay("empty", 8));
        tx.put_network(bridged("office", "br0", 0));
        tx.put_group(group("a", &["b"]));
        tx.put_group(group("b", &[]));
        tx.put_group(group("other", &[]));
        put(tx, &stored);
        put(tx, &lan);
    })
    .await;
    let none = [false; 3];
    let network = |name: &str| (*db.snapshot().networks[&name.parse::<NetworkName>().unwrap()]).clone();

    // Labels are nothing to hosts; nor is what no interface is in, or has.
    let mut labelled = network("field");
    labelled.labels.insert("a".into(), "b".into());
    assert_eq!(concerned(&db, |tx| tx.put_network(labelled)).await, none);
    let mut empty = network("empty");
    empty.network.domain = "other.internal".into();
    assert_eq!(concerned(&db, |tx| tx.put_network(empty)).await, none);
    assert_eq!(
        concerned(&db, |tx| tx.put_group(group("other", &["a"]))).await,
        none
    );

    let mut field = network("field");
    field.network.domain = "other.internal".into();
    let only_first = [true, false, false];
    assert_eq!(concerned(&db, |tx| tx.put_network(field)).await, only_first);
    // A group that only rules lead to.
    assert_eq!(
        concerned(&db, |tx| tx.put_group(group("b", &["b"]))).await,
        only_first
    );

    // What does not change a port concerns nobody.
    web.description = "changed".into();
    assert_eq!(concerned(&db, |tx| put(tx, &web)).await, none);
    // A second host of an overlay is its first one's peer.
    let db2 = vm_in("field", &[], "db", "h2");
    assert_eq!(concerned(&db, |tx| put(tx, &db2)).await, [true, true, false]);
    assert_eq!(
        concerned(&db, |tx| tx.delete_vm(db2.id)).await,
        [true, true, false]
    );
}

#[tokio::test]
async fn a_migration_concerns_all_hosts_of_an_overlay_and_of_a_bridge_its_two_only() {
    for (network, expected) in [
        (overlay("field", 7), [true, true, true]),
        (bridged("field", "br0", 0), [false, true, false]),
    ] {
        let (web, third) = (vm_in("field", &[], "web", "h1"), vm_in("field", &[], "db", "h3"));
        let begun = fixtures::migration(&web, "h2");
        let db = site(|tx| {
            tx.put_network(network);
            put(tx, &web);
            put(tx, &third);
        })
        .await;
        let start = begun.clone();
        assert_eq!(concerned(&db, |tx| tx.put_migration(start)).await, expected);
        let arrived = VmRecord {
            owner: host_name("h2"),
            ..web
        };
        assert_eq!(
            concerned(&db, |tx| put(tx, &arrived)).await,
            [false; 3],
            "both have it still"
        );
        let end = MigrationRecord {
            phase: Phase::Done,
            ..begun
        };
        let after = [true, expected[0], expected[2]];
        assert_eq!(concerned(&db, |tx| tx.put_migration(end)).await, after);
        let (names, ..) = told(&db.snapshot(), "h1");
        assert!(names.is_empty(), "the source has it no longer");
    }
}

#[tokio::test]
async fn a_new_overlay_address_of_a_host_is_told_to_the_others() {
    let db = site(|tx| {
        tx.put_network(overlay("field", 7));
        put(tx, &vm_in("field", &[], "web", "h1"));
        put(tx, &vm_in("field", &[], "db", "h2"));
    })
    .await;
    let moved = |tx: &mut Tx| fixtures::networked(tx, "h1", "198.51.100.9", "run");
    assert_eq!(concerned(&db, moved).await, [true, true, false]);
    assert_eq!(
        told(&db.snapshot(), "h2").1,
        ["198.51.100.9".parse::<IpAddr>().unwrap()]
    );
}

#[tokio::test]
async fn only_those_are_told_that_are_heard_and_have_not_taken_it_in_this_run() {
    let db = site(|tx| {
        tx.put_network(overlay("field", 7));
        put(tx, &vm_in("field", &[], "web", "h1"));
        put(tx, &vm_in("field", &[], "db", "h2"));
        tx.put_host(fixtures::host("old"));
        let silent = HostLive {
            state: HostState::Unreachable,
            ..(*tx.live[&host_name("h2")]).clone()
        };
        tx.set_live(host_name("h2"), silent);
    })
    .await;
    let names = |state: &State| {
        due(state)
            .into_iter()
            .map(|(host, _)| host)
            .collect::<Vec<HostName>>()
    };
    // The third has no network, and may have had one before the controller's start.
    assert_eq!(names(&db.snapshot()), [host_name("h1"), host_name("h3")]);
    let first = version(&db.snapshot(), &host_name("h1"));
    db.change(|tx| {
        tx.networks_taken(&host_name("h1"), "another run", first);
        tx.networks_taken(&host_name("h3"), "run", first);
    })
    .await;
    assert_eq!(names(&db.snapshot()), [host_name("h1")]);
    db.change(|tx| tx.networks_taken(&host_name("h1"), "run", first))
        .await;
    assert!(names(&db.snapshot()).is_empty());
    let changes = db.snapshot().network_changes;
    db.change(|tx| fixtures::networked(tx, "h1", "192.0.2.1", "a new run"))
        .await;
    assert_eq!(names(&db.snapshot()), [host_name("h1")]);
    assert!(db.snapshot().network_changes > changes, "nobody would look");
}

#[tokio::test]
async fn versions_are_higher_after_each_start_than_all_before() {
    let disk = Disk::default();
    let open = || Db::open(disk.open(), fixtures::cluster_id(), Hooks::default()).unwrap();
    let first = open();
    first
        .change(|tx| {
            hosts(tx);
            tx.put_network(overlay("field", 7));
            put(tx, &vm_in("field", &[], "web", "h1"));
            put(tx, &vm_in("field", &[], "db", "h2"));
        })
        .await;
    let (before, after) = (first.snapshot(), open().snapshot());
    let (old, new) = (versions(&before), versions(&after));
    assert!(old.iter().max() < new.iter().min(), "{old:?} {new:?}");
    for host in ["h1", "h2", "h3"] {
        assert_eq!(told(&before, host), told(&after, host), "{host}");
    }
}

#[tokio::test]
async fn a_migration_waits_for_those_who_must_know_where_the_vm_goes() {
    let web = vm_in("field", &[], "web", "h1");
    let migration = fixtures::migration(&web, "h2");
    for kind in [overlay("field", 7), bridged("field", "br0", 0)] {
        let is_overlay = matches!(kind.network.kind, dalgu_proto::network::Kind::Overlay { .. });
        let db = site(|tx| {
            tx.put_network(kind);
            put(tx, &web);
            put(tx, &vm_in("field", &[], "db", "h3"));
        })
        .await;
        let start = version(&db.snapshot(), &host_name("h1"));
        db.change(|tx| {
            for host in ["h1", "h2", "h3"] {
                tx.networks_taken(&host_name(host), "run", start);
            }
            tx.put_migration(migration.clone());
        })
        .await;
        let waits = |state: &State| {
            let unaware = unaware(state, &web, &migration);
            unaware.into_iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let all = if is_overlay {
            texts(&["h1", "h2", "h3"])
        } else {
            texts(&["h2"])
        };
        assert_eq!(waits(&db.snapshot()), all);
        // One falls silent, one takes it, and the destination's agent is started anew and will be told all.
        let newest = version(&db.snapshot(), &host_name("h2"));
        db.change(|tx| {
            let silent = HostLive {
                state: HostState::Unreachable,
                ..(*tx.live[&host_name("h1")]).clone()
            };
            tx.set_live(host_name("h1"), silent);
            tx.networks_taken(&host_name("h3"), "run", newest);
            fixtures::networked(tx, "h2", "192.0.2.2", "a new run");
        })
        .await;
        assert!(waits(&db.snapshot()).is_empty());
    }
}

fn spec(nics: Vec<dalgu_proto::vm::Nic>) -> Spec {
    Spec {
        nics,
        ..fixtures::spec()
    }
}

fn asking(name: &str, network: &str, ipv4: &str) -> dalgu_proto::vm::Nic {
    let mut nic = nic(name, network, &[]);
    if let Plug::Network(port) = &mut nic.plug {
        port.ipv4 = Some(ipv4.parse().unwrap());
    }
    nic
}

fn given(spec: &Spec) -> Vec<String> {
    let ports = spec.nics.iter().filter_map(|nic| nic.port());
    ports
        .flat_map(|port| {
            port.addresses()
                .map(|address| address.to_string())
                .collect::<Vec<_>>()
        })
        .collect()
}

#[tokio::test]
async fn a_vm_gets_the_lowest_free_addresses_but_for_the_gateways_and_the_services() {
    let db = site(|tx| {
        tx.put_network(overlay("field", 7));
        let mut spec = spec(vec![nic("eth0", "field", &[])]);
        ports(tx, &mut spec, None).unwrap();
        let mut vm = fixtures::vm("web", "h1");
        vm.spec = spec;
        put(tx, &vm);
    })
    .await;
    let state = db.snapshot();
    let mut three = spec(vec![
        nic("eth0", "field", &[]),
        asking("eth1", "field", "10.20.0.3"),
        nic("eth2", "field", &[]),
    ]);
    ports(&state, &mut three, None).unwrap();
    // 10.20.0.1 is the gateway's, .2 the other VM's, .3 asked for beside.
    let wanted = [
        "10.20.0.4",
        "fd00:20::2",
        "10.20.0.3",
        "fd00:20::3",
        "10.20.0.5",
        "fd00:20::4",
    ];
    assert_eq!(given(&three), wanted);

    let mut all = spec((0..16).map(|n| nic(&format!("eth{n}"), "field", &[])).collect());
    let none_left = ports(&state, &mut all, None).unwrap_err();
    assert!(matches!(none_left, Error::NoAddress { .. }), "{none_left}");
}

#[tokio::test]
async fn an_interface_that_cannot_be_had_is_refused_and_says_why() {
    let db = site(|tx| {
        tx.put_network(overlay("field", 7));
        let mut bare = bridged("bare", "br0", 0);
        (bare.network.ipv4, bare.network.ipv6) = (None, None);
        tx.put_network(bare);
        let mut vm = fixtures::vm("web", "h1");
        vm.spec.nics.push(asking("eth0", "field", "10.20.0.5"));
        put(tx, &vm);
    })
    .await;
    let state = db.snapshot();
    let refused = |nics| ports(&state, &mut spec(nics), None).unwrap_err().to_string();
    for (nics, why) in [
        (vec![nic("eth0", "gone", &[])], "no network gone"),
        (vec![nic("eth0", "field", &["gone"])], "no security group gone"),
        (vec![asking("eth0", "field", "10.20.0.5")], "in use by web/eth0"),
        (vec![asking("eth0", "field", "10.20.0.1")], "is the gateway's"),
        (vec![asking("eth0", "field", "10.20.0.14")], "of the hosts' DHCP"),
        (vec![asking("eth0", "field", "10.20.0.0")], "the subnet's own"),
        (vec![asking("eth0", "field", "10.20.0.15")], "broadcast"),
        (
            vec![asking("eth0", "field", "10.20.1.1")],
            "outside of 10.20.0.0/28",
        ),
        (vec![asking("eth0", "bare", "10.20.0.7")], "no IPv4 addresses"),
        (
            vec![
                asking("eth0", "field", "10.20.0.7"),
                asking("eth1", "field", "10.20.0.7"),
            ],
            "interface eth0 of the same VM",
        ),
    ] {
        let told = refused(nics);
        assert!(told.contains(why), "{told}");
    }
    let mut without = spec(vec![nic("eth0", "bare", &[])]);
    ports(&state, &mut without, None).unwrap();
    assert!(given(&without).is_empty());
}

#[tokio::test]
async fn an_interface_that_stays_keeps_its_addresses_and_a_new_one_gets_others() {
    let mut vm = fixtures::vm("web", "h1");
    vm.spec.nics = vec![nic("eth0", "field", &[]), nic("eth1", "field", &[])];
    let db = site(|tx| {
        tx.put_network(overlay("field", 7));
        tx.put_group(group("a", &[]));
        ports(tx, &mut vm.spec, None).unwrap();
        put(tx, &vm);
    })
    .await;
    let state = db.snapshot();
    let mut changed = spec(vec![nic("eth1", "field", &["a"]), nic("eth2", "field", &[])]);
    ports(&state, &mut changed, Some(&vm)).unwrap();
    assert_eq!(
        given(&changed),
        ["10.20.0.3", "fd00:20::2", "10.20.0.4", "fd00:20::3"]
    );
    // As it is shown.
    ports(&state, &mut changed.clone(), Some(&vm)).unwrap();
    let mut moved = spec(vec![asking("eth1", "field", "10.20.0.9")]);
    let told = ports(&state, &mut moved, Some(&vm)).unwrap_err().to_string();
    assert!(told.contains("it is 10.20.0.3"), "{told}");
}

#[tokio::test]
async fn a_network_takes_as_many_interfaces_as_a_network_may_have() {
    let mut large = bridged("large", "br0", 0);
    (large.network.ipv4, large.network.ipv6) = (None, None);
    let mut last = fixtures::vm("last", "h1");
    last.spec.nics = vec![nic("eth0", "large", &[])];
    let db = site(|tx| {
        tx.put_network(large);
        for number in 0..MAX_INTERFACES / 16 {
            let mut vm = fixtures::vm(&format!("vm{number}"), "h1");
            vm.spec.nics = (0..16).map(|n| nic(&format!("eth{n}"), "large", &[])).collect();
            if number == 0 {
                vm.spec.nics.truncate(15);
            }
            tx.put_vm(vm);
        }
        put(tx, &last);
    })
    .await;
    let state = db.snapshot();
    let full = Error::Full("large".parse().unwrap());
    let mut another = spec(vec![nic("eth0", "large", &[])]);
    assert_eq!(ports(&state, &mut another, None), Err(full.clone()));
    assert_eq!(
        ports(&state, &mut another, Some(&last)),
        Ok(()),
        "it is there already"
    );
    let mut two = spec(vec![nic("eth0", "large", &[]), nic("eth1", "large", &[])]);
    assert_eq!(ports(&state, &mut two, Some(&last)), Err(full));
}

#[tokio::test]
async fn the_networks_of_a_vm_say_what_its_host_must_have() {
    let db = site(|tx| {
        tx.put_network(overlay("field", 7));
        tx.put_network(bridged("office", "br0", 0));
        tx.put_network(bridged("guests", "br1", 12));
    })
    .await;
    let state = db.snapshot();
    let of = |networks: &[&str]| {
        let nics = networks
            .iter()
            .zip(0..)
            .map(|(network, n)| nic(&format!("eth{n}"), network, &[]));
        let needs = needs(&state, &spec(nics.collect()));
        (
            needs.features.into_iter().collect::<Vec<_>>(),
            needs.bridges.into_iter().collect::<Vec<_>>(),
        )
    };
    assert_eq!(of(&["field"]), (vec![GuestFeature::Overlay], vec![]));
    assert_eq!(of(&["office"]), (vec![], texts(&["br0"])));
    assert_eq!(
        of(&["guests", "office"]),
        (vec![GuestFeature::Vlan], texts(&["br0", "br1"]))
    );
}

fn knows_icmp_types(tx: &mut Tx, host: &str) {
    let mut record = (**tx.hosts.get(&host_name(host)).unwrap()).clone();
    record.inventory.guest_features.push(GuestFeature::IcmpType);
    tx.put_host(record);
}

#[tokio::test]
async fn a_host_whose_agent_does_not_know_types_of_icmp_is_told_of_all_but_groups_with_such_rules() {
    let db = site(|tx| {
        knows_icmp_types(tx, "h1");
        tx.put_network(overlay("field", 7));
        tx.put_group(group("web", &["ping"]));
        tx.put_group(pinged("ping"));
        put(tx, &vm_in("field", &["web"], "web", "h1"));
        put(tx, &vm_in("field", &["web"], "old", "h2"));
    })
    .await;
    let state = db.snapshot();
    assert_eq!(told(&state, "h1").3, texts(&["ping", "web"]));
    assert_eq!(told(&state, "h2").3, texts(&["web"]));
    let of = |groups| needs(&state, &spec(vec![nic("eth0", "field", groups)])).features;
    assert!(of(&["ping"]).contains(&GuestFeature::IcmpType));
    assert!(!of(&["web"]).contains(&GuestFeature::IcmpType));
}

#[tokio::test]
async fn an_answer_that_an_earlier_run_of_an_agent_was_asked_for_has_the_present_run_told() {
    let db = site(|tx| {
        tx.put_network(overlay("field", 7));
        put(tx, &vm_in("field", &[], "web", "h1"));
    })
    .await;
    let newest = version(&db.snapshot(), &host_name("h1"));
    let mut changes = db.network_changes();
    // The agent was started anew while the call was under way, and was passed over for that.
    db.change(|tx| fixtures::networked(tx, "h1", "192.0.2.1", "next"))
        .await;
    changes.mark_unchanged();
    db.change(|tx| tx.networks_taken(&host_name("h1"), "run", newest))
        .await;
    assert!(changes.has_changed().unwrap(), "nobody looks again");
    assert!(due(&db.snapshot()).contains(&(host_name("h1"), newest)));
}
