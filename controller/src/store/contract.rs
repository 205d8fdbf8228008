//! What every store must do, run on each of them.

use super::{Batch, Image, Store, Table, Write, memory, sqlite};

fn put(table: Table, key: &str, value: &str) -> Write {
    Write {
        table,
        key: key.to_owned(),
        value: Some(value.to_owned()),
    }
}

fn delete(table: Table, key: &str) -> Write {
    Write {
        table,
        key: key.to_owned(),
        value: None,
    }
}

fn batch(writes: Vec<Write>, events: &[u64]) -> Batch {
    let events = events.iter().map(|r| (*r, format!("{{\"n\":{r}}}"))).collect();
    Batch {
        writes,
        events,
        forget_events_to: 0,
    }
}

/// Runs the contract; `open` opens the same store each time.
fn contract<S: Store>(mut open: impl FnMut() -> S) {
    let mut store = open();
    assert_eq!(store.load().unwrap(), Image::default(), "a new store is empty");
    store
        .commit(&[
            batch(
                vec![
                    put(Table::Vms, "b", "1"),
                    put(Table::Vms, "a", "2"),
                    put(Table::Hosts, "b", "3"),
                ],
                &[1, 2],
            ),
            batch(
                vec![
                    put(Table::Vms, "b", "4"),
                    delete(Table::Hosts, "b"),
                    delete(Table::Hosts, "none"),
                ],
                &[3],
            ),
        ])
        .unwrap();
    store.commit(&[]).unwrap();
    drop(store);

    let mut store = open();
    let image = store.load().unwrap();
    let expected = [(Table::Vms, "a", "2"), (Table::Vms, "b", "4")];
    let expected: Vec<_> = expected
        .iter()
        .map(|(t, k, v)| (*t, (*k).to_owned(), (*v).to_owned()))
        .collect();
    assert_eq!(
        image.records, expected,
        "later batches win, order is that of the keys"
    );
    assert_eq!(image.events.iter().map(|e| e.0).collect::<Vec<_>>(), [1, 2, 3]);

    store
        .commit(&[Batch {
            forget_events_to: 2,
            ..batch(vec![], &[4])
        }])
        .unwrap();
    drop(store);
    let image = open().load().unwrap();
    assert_eq!(
        image.events,
        [(3, "{\"n\":3}".to_owned()), (4, "{\"n\":4}".to_owned())],
        "old events are forgotten"
    );
}

#[test]
fn sqlite_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    contract(|| sqlite::Sqlite::open(&dir.path().join("dalgu.db")).unwrap());
}

#[test]
fn memory_keeps_the_contract() {
    let disk = memory::Disk::default();
    contract(|| disk.open());
}

#[test]
fn a_commit_that_fails_before_leaves_nothing_and_one_that_fails_after_leaves_all() {
    for (crash, left) in [(memory::Crash::Before(0), 0), (memory::Crash::After(0), 1)] {
        let disk = memory::Disk::default();
        disk.crash_at(Some(crash));
        disk.open()
            .commit(&[batch(vec![put(Table::Vms, "a", "1")], &[])])
            .unwrap_err();
        assert_eq!(disk.open().load().unwrap().records.len(), left);
    }
}
