//! Hints and explanations, as people read them.

use dalgu_proto::vm::Spec;

use super::{
    tests::{host, name, spec, with},
    *,
};

/// The hint's text for a request that is refused.
fn hint(request: &Request, hosts: &[HostView]) -> String {
    let decision = decide(request, hosts, &Policy::SPREAD);
    assert_eq!(decision.host, None);
    decision.hint.unwrap().text
}

fn one() -> Request {
    Request::new(spec())
}

fn changed(change: impl FnOnce(&mut Spec)) -> Request {
    let mut spec = spec();
    change(&mut spec);
    Request::new(spec)
}

fn cordoned() -> HostView<'static> {
    with(|host| host.cordoned = true)
}

/// A host whose memory is short of what the VM needs by so much.
fn short(host_name: &str, missing_mib: u64) -> HostView<'static> {
    HostView {
        memory_mib_reserved: 15_360 - 4194 + missing_mib,
        ..host(host_name)
    }
}

#[test]
fn a_hint_says_what_could_change_on_a_host_or_in_the_request() {
    let smaller = "ask for at most 3587 MiB of memory";
    let expected = format!("free 512 MiB of memory on h1, or {smaller} (h1 can take it then)");
    assert_eq!(hint(&one(), &[short("h1", 512), short("h2", 2000)]), expected);
    let expected = format!("uncordon h1, or {smaller} (h2 can take it then)");
    assert_eq!(hint(&one(), &[cordoned(), short("h2", 512)]), expected);
    let picky = changed(|spec| drop(spec.host_selector.insert("rack".into(), "a".into())));
    let expected =
        "give h1 the label rack=a, or leave label rack out of the host selector (h1 can take it then)";
    assert_eq!(hint(&picky, &[host("h1")]), expected);
    // What no VM of Dalgu's holds cannot be freed.
    let large = changed(|spec| spec.vcpus = 12);
    assert_eq!(
        hint(&large, &[host("h1")]),
        "ask for at most 8 vCPUs (h1 can take it then)"
    );
    let huge = changed(|spec| spec.memory_mib = 64 << 10);
    assert_eq!(
        hint(&huge, &[host("h1")]),
        "ask for at most 15175 MiB of memory (h1 can take it then)"
    );
}

#[test]
fn a_hint_names_all_that_must_change_together() {
    assert_eq!(hint(&one(), &[cordoned()]), "uncordon h1");
    let silent = with(|host| (host.ready, host.state) = (false, "unreachable for 40 s".into()));
    assert_eq!(
        hint(&one(), &[silent]),
        "get h1 ready (it is unreachable for 40 s)"
    );
    // That the pool is full shows only once it works again.
    let broken = with(|host| {
        host.pools[0].error = Some("stale handle".into());
        host.pools[0].reserved_mib = 102_000;
    });
    let expected = "repair pool local of h1 and free 9840 MiB in pool local of h1";
    assert_eq!(hint(&one(), &[broken]), expected);
}

#[test]
fn a_hint_minds_the_host_that_was_asked_for_and_the_one_that_is_left() {
    let on = |request: Request, host: &str| request.on(Some(name(host)));
    let expected = "uncordon h1, or name no host (h2 can take it then)";
    assert_eq!(hint(&on(one(), "h1"), &[cordoned(), host("h2")]), expected);
    assert_eq!(
        hint(&on(one(), "h7"), &[host("h2")]),
        "name no host (h2 can take it then)"
    );
    let expected = "start an agent on h7 (it needs 2 processors and 4194 MiB for VMs)";
    assert_eq!(hint(&on(one(), "h7"), &[]), expected);
    let another = "add a host with at least 2 processors and 4194 MiB for VMs";
    assert_eq!(hint(&one(), &[]), another);
    let migration = Request::migration(spec(), name("h1"), "kvm");
    assert_eq!(hint(&migration, &[host("h1")]), another);
    assert_eq!(
        hint(&migration, &[host("h1"), short("h2", 512)]),
        "free 512 MiB of memory on h2"
    );
    assert_eq!(
        hint(&on(migration, "h1"), &[host("h1")]),
        format!("name no host and {another}")
    );
}

#[test]
fn a_refusal_explains_itself() {
    let hosts = [
        with(|h| (h.cordoned, h.cordon_reason) = (true, "new firmware".into())),
        HostView {
            name: name("h2"),
            memory_mib_reserved: 13_000,
            vcpus_reserved: 31,
            ..host("h2")
        },
        HostView {
            ready: false,
            state: "unreachable for 40 s".into(),
            ..host("h3")
        },
    ];
    let decision = decide(&Request::new(spec()), &hosts, &Policy::SPREAD);
    insta::assert_snapshot!("refusal", serde_json::to_string_pretty(&decision).unwrap());
    assert_survives_storage(&decision);
}

#[test]
fn a_placement_explains_itself() {
    let mut busy = host("h2");
    busy.usage.as_mut().unwrap().cpus_busy = Some(7.5);
    let hosts = [with(|h| h.cordoned = true), busy, host("h3")];
    let decision = decide(&Request::new(spec()), &hosts, &Policy::SPREAD);
    insta::assert_snapshot!("placement", serde_json::to_string_pretty(&decision).unwrap());
    assert_survives_storage(&decision);
}

fn assert_survives_storage(decision: &Decision) {
    let text = serde_json::to_string(decision).unwrap();
    assert_eq!(serde_json::from_str::<Decision>(&text).unwrap(), *decision);
}
