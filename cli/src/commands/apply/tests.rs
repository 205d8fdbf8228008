//! What files declare, compared with what is there.

use super::*;

const FILE: &str = "\
backupSchedules:
- {name: nightly, labelSelector: {tier: gold}, pool: vault, every: 86400s, incrementals: 6, keepLast: 14}
---
vms: [{name: web, labels: {tier: gold}}]
";

fn schedule() -> v1::BackupSchedule {
    v1::BackupSchedule {
        name: "nightly".into(),
        label_selector: [("tier".into(), "gold".into())].into(),
        pool: "vault".into(),
        every: Some(prost_types::Duration {
            seconds: 86_400,
            nanos: 0,
        }),
        incrementals: 6,
        keep_last: 14,
        vms: 3,
        failures: 1,
        etag: "e1".into(),
        ..Default::default()
    }
}

/// What of a schedule that is there is to change by the file, the call's mask, and what it is to be then.
fn compared(there: v1::BackupSchedule) -> (Vec<String>, Vec<String>, Declared) {
    let mut declaration = Declaration::default();
    read(FILE, &mut declaration).unwrap();
    let object = declared(declaration).unwrap().remove(0);
    let current = Declared::BackupSchedule(Box::new(there)).value().unwrap();
    let wanted = object.declared().unwrap();
    let differences = diff::differences(&current, &wanted);
    let (mask, fixed) = object.kind().mask(&differences);
    assert_eq!(fixed, [""; 0]);
    let paths = differences.into_iter().map(|difference| difference.path);
    let merged = Declared::from_value(object.kind(), diff::merged(&current, &wanted)).unwrap();
    (paths.collect(), mask, merged)
}

#[test]
fn a_schedule_is_made_before_the_vms_that_it_is_for_and_twice_is_refused() {
    let mut declaration = Declaration::default();
    read(FILE, &mut declaration).unwrap();
    let titles: Vec<_> = declared(declaration.clone())
        .unwrap()
        .iter()
        .map(Declared::title)
        .collect();
    assert_eq!(titles, ["backup schedule nightly", "VM web"]);
    read(FILE, &mut declaration).unwrap();
    let error = declared(declaration).err().unwrap();
    assert!(
        error
            .to_string()
            .contains("backup schedule nightly is declared twice"),
        "{error}"
    );
}

#[test]
fn a_schedule_as_declared_is_left_alone_whatever_the_controller_says_of_it_besides() {
    let (paths, mask, _) = compared(schedule());
    assert_eq!((paths, mask), (vec![], vec![]));
}

#[test]
fn a_schedule_is_changed_to_what_is_declared_and_all_its_labels_are_meant() {
    let there = v1::BackupSchedule {
        label_selector: [("tier".into(), "gold".into()), ("site".into(), "north".into())].into(),
        every: Some(prost_types::Duration {
            seconds: 3600,
            nanos: 0,
        }),
        keep_days: 30,
        paused: true,
        ..schedule()
    };
    let (mut paths, mut mask, merged) = compared(there);
    paths.sort();
    mask.sort();
    assert_eq!(paths, ["every", "labelSelector"]);
    assert_eq!(mask, ["every", "label_selector"]);
    let Declared::BackupSchedule(merged) = merged else {
        panic!("{merged:?}");
    };
    assert_eq!(merged.label_selector, schedule().label_selector);
    assert_eq!(merged.every, schedule().every);
    // What is not said stays.
    assert!(merged.paused && merged.keep_days == 30 && merged.etag == "e1");
}
