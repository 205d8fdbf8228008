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
        erases: false,
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

/// Whatever the keys and values are, and in whatever order they come, what is there is what was written last.
fn texts<S: Store>(mut open: impl FnMut() -> S) {
    let long = "x".repeat(1 << 20);
    let keys = ["", " ", "a'b\"c", "a\\0b", "다른 현장", "Z", "a", "z"];
    for (round, value) in ["", "{}", "'; DROP TABLE vms; --", "빛", &long]
        .into_iter()
        .enumerate()
    {
        let mut store = open();
        for table in Table::ALL {
            let writes = keys.iter().rev().map(|key| put(table, key, value)).collect();
            store.commit(&[batch(writes, &[])]).unwrap();
        }
        // Within one batch the last of two counts, and a key of another table is another key.
        let writes = vec![
            put(Table::Vms, "a", "x"),
            delete(Table::Vms, "a"),
            delete(Table::Hosts, "z"),
            put(Table::Hosts, "z", "back"),
        ];
        store.commit(&[batch(writes, &[])]).unwrap();
        drop(store);
        let mut expected = Vec::new();
        for table in Table::ALL {
            let mut sorted = keys;
            sorted.sort_unstable();
            expected.extend(
                sorted
                    .iter()
                    .map(|key| (table, (*key).to_owned(), value.to_owned())),
            );
        }
        expected.retain(|(table, key, _)| !(*table == Table::Vms && key == "a"));
        for (table, key, value) in &mut expected {
            if *table == Table::Hosts && key == "z" {
                "back".clone_into(value);
            }
        }
        assert_eq!(open().load().unwrap().records, expected, "round {round}");
    }
}

/// A batch that only forgets, or that does nothing, is as good as any.
fn events<S: Store>(mut open: impl FnMut() -> S) {
    let revisions = |store: &mut S| -> Vec<u64> {
        let events = store.load().unwrap().events;
        events.into_iter().map(|(revision, _)| revision).collect()
    };
    let mut store = open();
    // 63 bits: what SQLite keeps, and more than is ever given out.
    let last = i64::MAX.unsigned_abs();
    store.commit(&[batch(vec![], &[5, 7, last])]).unwrap();
    store.commit(&[Batch::default(), Batch::default()]).unwrap();
    assert_eq!(revisions(&mut store), [5, 7, last]);
    let forget = |to| Batch {
        forget_events_to: to,
        ..Batch::default()
    };
    store.commit(&[forget(5), forget(1)]).unwrap();
    assert_eq!(revisions(&mut store), [7, last], "what is forgotten stays so");
    // In one commit, in the order of the batches.
    store
        .commit(&[batch(vec![], &[8]), forget(8), batch(vec![], &[9])])
        .unwrap();
    drop(store);
    assert_eq!(revisions(&mut open()), [9, last]);
}

/// Everything a store must do; `open` opens a new one at each call of the outer function, the same one at each of the inner.
fn all<S: Store, O: FnMut() -> S>(mut new: impl FnMut() -> O) {
    contract(new());
    texts(new());
    events(new());
}

#[test]
fn sqlite_keeps_the_contract() {
    let mut dirs = Vec::new();
    all(|| {
        dirs.push(tempfile::tempdir().unwrap());
        let path = dirs[dirs.len() - 1].path().join("dalgu.db");
        move || sqlite::Sqlite::open(&path).unwrap()
    });
}

#[test]
fn memory_keeps_the_contract() {
    all(|| {
        let disk = memory::Disk::default();
        move || disk.open()
    });
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
