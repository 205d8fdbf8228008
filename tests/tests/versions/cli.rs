//! What a newer controller answers is shown as what it is by the command line. The descriptors are walked, so that no enum
//! is left out.

use dalgu::output::{Resource, json, operation::has_ended, table};
use dalgu_proto::v1;
use dalgu_tests::versions::{
    full,
    future::{UNKNOWN, with_more},
};
use jiff::Timestamp;

/// Where an enum is told only in JSON and YAML.
const NOT_FOR_PEOPLE: &[(&str, &str)] = &[
    ("dalgu.v1.Vm", "spec.ha_tier"),
    // What the VM was, which a VM made from it shows.
    ("dalgu.v1.Backup", "spec."),
    ("dalgu.v1.Backup", "vm_drain_mode"),
    // The object as it was then; the event says what happened to it.
    ("dalgu.v1.Event", "vm."),
    ("dalgu.v1.Event", "host."),
    ("dalgu.v1.Event", "operation."),
    ("dalgu.v1.Event", "image."),
    ("dalgu.v1.Event", "security_group."),
    ("dalgu.v1.Event", "volume."),
    ("dalgu.v1.Event", "plan."),
];

fn now() -> Timestamp {
    Timestamp::from_second(2_000_000_000).unwrap()
}

/// Shows one object with each of its enums unknown, and with fields that nobody knows; returns how many enums there were.
fn every_enum_of<R: Resource + std::fmt::Debug>() -> usize {
    let of = full::descriptor(R::MESSAGE);
    let paths = full::enums(&of);
    for path in &paths {
        let name = full::name(path);
        let mut message = full::message(&of);
        full::set_enum(&mut message, path, UNKNOWN);
        let item = R::decode(with_more(&message).as_slice()).unwrap();
        let page = item.describe(now()).render(false);
        let shown = table::of(std::slice::from_ref(&item), true, now(), false) + &page;
        let for_people = !NOT_FOR_PEOPLE
            .iter()
            .any(|(message, fields)| *message == R::MESSAGE && name.starts_with(fields));
        assert_eq!(
            shown.to_lowercase().contains("unknown (77)"),
            for_people,
            "{} {name}:\n{shown}",
            R::MESSAGE
        );
        for text in [json::object(&item).unwrap(), json::yaml(&item).unwrap()] {
            assert!(text.contains("77"), "{} {name}: {text}", R::MESSAGE);
        }
        let read = json::read::<R>(&json::object(&item).unwrap());
        assert_eq!(read, Ok(item), "{name}");
    }
    paths.len()
}

#[test]
fn a_value_that_only_a_newer_controller_knows_is_shown_by_its_number() {
    assert!(every_enum_of::<v1::Vm>() >= 7);
    assert!(every_enum_of::<v1::Host>() >= 1);
    assert!(every_enum_of::<v1::Operation>() >= 3);
    assert!(every_enum_of::<v1::Event>() >= 10);
    assert!(every_enum_of::<v1::Image>() >= 3);
    assert!(every_enum_of::<v1::Backup>() >= 2);
    assert!(every_enum_of::<v1::SecurityGroup>() >= 2);
    assert!(every_enum_of::<v1::PlacementGroup>() >= 1);
    assert!(every_enum_of::<v1::Volume>() >= 3);
    assert!(every_enum_of::<v1::Plan>() >= 3);
    assert!(every_enum_of::<v1::Site>() >= 1);
    assert!(every_enum_of::<v1::Placement>() >= 1);
}

#[test]
fn an_operation_in_a_state_that_is_not_known_has_ended_when_its_end_has_a_time_and_then_not_as_asked() {
    let mut operation = v1::Operation {
        state: UNKNOWN,
        ..Default::default()
    };
    assert!(!has_ended(&operation));
    operation.end_time = Some(prost_types::Timestamp::default());
    assert!(has_ended(&operation), "it would be waited for for ever");
    let error = dalgu::progress::outcome(operation).unwrap_err().to_string();
    assert!(
        error.contains("in a way that this version does not know"),
        "{error}"
    );
}
