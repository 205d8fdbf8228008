//! What earlier versions left on disk, found by this one; and what a later one leaves.

use std::{collections::BTreeMap, fs, path::Path, sync::Arc};

use dalgu_agent::ledger::{Disposition, Ledger};
use dalgu_controller::store::{self, Store as _, sqlite::Sqlite};
use dalgu_proto::v1;
use dalgu_tests::versions::{
    lens::{Lens, forget_unknown},
    record::Recorder,
    samples::{self, LISTS, Sample},
    site::{Shelf, Site},
    story::Operator,
    wire::Side,
};
use prost_reflect::DynamicMessage;
use serde_json::{Value, json};

use crate::nobody;

/// A database as a version left it.
fn database(sample: &Sample, dir: &Path) -> std::path::PathBuf {
    let path = dir.join("dalgu.db");
    let database = rusqlite::Connection::open(&path).unwrap();
    database.execute_batch(&sample.store().unwrap()).unwrap();
    path
}

/// A list without what agents tell: it is learnt anew after each start.
fn stored(lens: &Lens, path: &str, list: &[u8]) -> Value {
    let mut list = lens.read(path, Side::Answer, list).unwrap();
    forget_unknown(&mut list);
    let mut list = serde_json::to_value::<DynamicMessage>(list).unwrap();
    list.as_object_mut().unwrap().remove("resourceVersion");
    for item in list
        .as_object_mut()
        .unwrap()
        .values_mut()
        .filter_map(Value::as_array_mut)
        .flatten()
    {
        let item = item.as_object_mut().unwrap();
        if let Some(status) = item.get_mut("status").and_then(Value::as_object_mut) {
            status.retain(|field, _| ["host", "epoch", "migrationId"].contains(&field.as_str()));
        }
        let ended = item.contains_key("endTime");
        for told in [
            "state",
            "usage",
            "reportTime",
            "unmanagedDomains",
            "hypervisorError",
        ] {
            // An operation that has ended says how.
            if told != "state" || !ended {
                item.remove(told);
            }
        }
        if !ended {
            item.remove("statusMessage");
            item.remove("migration");
        }
    }
    list
}

/// What a host sets aside for huge pages was counted in with its memory once.
fn less_huge_pages(list: &mut Value) {
    let number = |value: &Value| value.as_str().map_or(0, |text| text.parse::<u64>().unwrap());
    let hosts = list.get_mut("hosts").and_then(Value::as_array_mut);
    for host in hosts.into_iter().flatten() {
        let pages = host["inventory"]["hugePages"].as_array();
        let bytes = pages
            .into_iter()
            .flatten()
            .map(|pages| number(&pages["pageSizeBytes"]) * number(&pages["total"]));
        let aside = bytes.sum::<u64>().div_ceil(1 << 20);
        if let Some(capacity) = host.pointer_mut("/allocation/memoryMibCapacity") {
            *capacity = (number(capacity) - aside).to_string().into();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_of_an_earlier_version_is_opened_with_all_that_is_in_it() {
    for sample in samples::all().unwrap() {
        let dir = tempfile::tempdir().unwrap();
        let path = database(&sample, dir.path());
        let mut site = Site::new(&["h1", "h2"], None).unwrap();
        let store = Sqlite::open(&path).unwrap();
        site.start_controller_on(store, |_| nobody()).await.unwrap();
        let recorder = Arc::new(Recorder::default());
        let operator = Operator::new(&site, recorder.clone()).unwrap();
        operator
            .vms()
            .list_vms(v1::ListVmsRequest::default())
            .await
            .unwrap();
        operator
            .hosts()
            .list_hosts(v1::ListHostsRequest::default())
            .await
            .unwrap();
        let request = v1::ListOperationsRequest::default();
        operator.operations().list_operations(request).await.unwrap();
        for (file, path) in LISTS {
            let now = recorder.answer(path).unwrap();
            let now = stored(&sample.lens, path, &now);
            let mut then = stored(&sample.lens, path, &sample.list(file).unwrap());
            less_huge_pages(&mut then);
            assert_eq!(now, then, "{} {file}", sample.name);
        }
    }
}

#[test]
fn a_store_of_an_earlier_schema_is_copied_before_it_is_brought_up() {
    for sample in samples::all().unwrap() {
        let dir = tempfile::tempdir().unwrap();
        let path = database(&sample, dir.path());
        let version = |path: &Path| -> i64 {
            let database = rusqlite::Connection::open(path).unwrap();
            database
                .pragma_query_value(None, "user_version", |row| row.get(0))
                .unwrap()
        };
        let before = version(&path);
        drop(Sqlite::open(&path).unwrap());
        let copies = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let copies = copies.filter(|path| path.to_string_lossy().contains("-schema-"));
        let copies: Vec<_> = copies.map(|copy| version(&copy)).collect();
        let expected = if version(&path) > before {
            vec![before]
        } else {
            vec![]
        };
        assert_eq!(copies, expected, "{}", sample.name);
    }
}

#[test]
fn a_store_of_a_newer_schema_is_refused_and_left_as_it_is() {
    let sample = samples::all().unwrap().pop().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = database(&sample, dir.path());
    let newer = rusqlite::Connection::open(&path).unwrap();
    newer
        .execute_batch("PRAGMA journal_mode = WAL; PRAGMA user_version = 1000; CREATE TABLE later (x TEXT);")
        .unwrap();
    drop(newer);
    let before = fs::read(&path).unwrap();
    let Err(error) = Sqlite::open(&path) else {
        panic!("it was read");
    };
    assert!(
        matches!(error, store::Error::Schema { found: 1000, .. }),
        "{error}"
    );
    let text = error.to_string();
    assert!(
        text.contains("1000") && text.contains("use a version that has that schema"),
        "{text}"
    );
    assert_eq!(fs::read(&path).unwrap(), before);
}

/// Every object in a value gets a field that nobody knows, but for those whose fields are keys: labels, and what a request
/// led to, of which there is one.
fn deepen(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            let inner = fields.iter_mut();
            let inner =
                inner.filter(|(name, _)| !["labels", "host_selector", "outcome"].contains(&name.as_str()));
            inner.for_each(|(_, value)| deepen(value));
            fields.insert("from-the-future".to_owned(), json!({"a": [1]}));
        }
        Value::Array(items) => items.iter_mut().for_each(deepen),
        _ => {}
    }
}

/// Ways to every text in a value.
fn texts(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => fields
            .iter()
            .for_each(|(name, value)| texts(value, &format!("{at}/{name}"), found)),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .for_each(|(n, value)| texts(value, &format!("{at}/{n}"), found)),
        Value::String(_) => found.push(at.to_owned()),
        _ => {}
    }
}

async fn load(file: &str, content: &Value) -> dalgu_agent::ledger::Contents {
    let shelf = Shelf::default();
    shelf.put(file, content.to_string().into_bytes());
    Ledger::on(Arc::new(shelf)).load().await.unwrap()
}

#[tokio::test]
async fn the_ledgers_of_an_earlier_version_are_read_whole() {
    for sample in samples::all().unwrap() {
        let mut dispositions = BTreeMap::<String, usize>::new();
        for (host, files) in sample.ledgers().unwrap() {
            let shelf = Shelf::default();
            for (name, content) in &files {
                shelf.put(name, content.clone());
            }
            let read = Ledger::on(Arc::new(shelf)).load().await.unwrap();
            assert!(
                read.damaged.is_empty(),
                "{} {host}: {:?}",
                sample.name,
                read.damaged
            );
            assert_eq!(1 + read.vms.len() + read.migrations.len(), files.len());
            assert!(read.host.session.0 > 0 && read.host.term.0 > 0);
            for vm in read.vms {
                let is = match vm.disposition {
                    Disposition::Owned => "owned",
                    Disposition::Incoming { .. } => "incoming",
                    Disposition::Outgoing { .. } => "outgoing",
                    Disposition::Deleting => "deleting",
                    Disposition::Gone { .. } => "gone",
                };
                *dispositions.entry(is.to_owned()).or_default() += 1;
            }
        }
        for is in ["owned", "incoming", "outgoing", "gone"] {
            assert!(
                dispositions.contains_key(is),
                "{}: no VM is {is}: {dispositions:?}",
                sample.name
            );
        }
    }
}

/// Texts of which every value is as good as another.
fn is_free(at: &str) -> bool {
    let last = at.rsplit('/').next().unwrap_or_default();
    [
        "boot_id", "name", "image", "pool", "bridge", "mac", "kernel", "initrd", "cmdline", "rack",
    ]
    .contains(&last)
        || ["reason", "message"].contains(&last)
        || at == "/peer"
}

#[tokio::test]
async fn a_ledger_of_a_later_version_loses_no_vm() {
    let sample = samples::all().unwrap().pop().unwrap();
    let mut tried = 0;
    for files in sample.ledgers().unwrap().into_values() {
        for (name, content) in files.into_iter().filter(|(name, _)| name != "host.json") {
            let entry: Value = serde_json::from_slice(&content).unwrap();
            let as_it_is = load(&name, &entry).await;
            let mut more = entry.clone();
            deepen(&mut more);
            let read = load(&name, &more).await;
            assert_eq!(
                (read.vms, read.migrations),
                (as_it_is.vms, as_it_is.migrations),
                "{name}"
            );
            let (mut found, vm) = (Vec::new(), entry.get("vm").unwrap_or_else(|| &entry["id"]));
            texts(&entry, "", &mut found);
            for at in found {
                let mut changed = entry.clone();
                *changed.pointer_mut(&at).unwrap() = json!("from-the-future");
                let read = load(&name, &changed).await;
                if is_free(&at) {
                    assert!(read.damaged.is_empty(), "{name} {at}: {:?}", read.damaged);
                    continue;
                }
                assert!(
                    read.vms.is_empty() && read.migrations.is_empty(),
                    "{name} {at} is not noticed"
                );
                let [damaged] = &read.damaged[..] else {
                    panic!("{name} {at}: neither read nor told");
                };
                // A migration whose VM cannot be read is nobody's.
                let of = (at != "/vm").then(|| vm.as_str().unwrap().parse().unwrap());
                assert_eq!(damaged.vm, of, "{name} {at}");
                tried += 1;
            }
        }
    }
    assert!(tried > 30, "{tried}");
}

#[tokio::test(start_paused = true)]
async fn a_row_of_a_later_version_is_read_or_keeps_the_controller_from_starting() {
    let sample = samples::all().unwrap().pop().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let image = Sqlite::open(&database(&sample, dir.path()))
        .unwrap()
        .load()
        .unwrap();
    let state = |image: &store::Image| {
        dalgu_controller::state::from_image(image, dalgu_tests::versions::site::CLUSTER)
    };
    let as_it_is = state(&image).unwrap();
    let mut more = image.clone();
    for (_, _, row) in &mut more.records {
        let mut value: Value = serde_json::from_str(row).unwrap();
        deepen(&mut value);
        *row = value.to_string();
    }
    let read = state(&more);
    // The inventory and the labels are maps of anything; all else is as it was.
    let read = read.map_err(|error| format!("{error:?}"));
    assert_eq!(read.map(|state| state.vms.len()), Ok(as_it_is.vms.len()));
    for (number, (table, key, row)) in image.records.iter().enumerate() {
        let mut value: Value = serde_json::from_str(row).unwrap();
        let known = [
            "/intent/power",
            "/state",
            "/kind",
            "/phase",
            "/intent/restart_mode",
        ];
        for at in known
            .iter()
            .filter(|at| value.pointer(at).is_some())
            .collect::<Vec<_>>()
        {
            let good = value.pointer(at).cloned().unwrap();
            *value.pointer_mut(at).unwrap() = json!("from-the-future");
            let mut changed = image.clone();
            changed.records[number].2 = value.to_string();
            let error = state(&changed)
                .err()
                .unwrap_or_else(|| panic!("{table:?} {at} is not noticed"));
            let text = error.to_string();
            assert!(text.contains(key) && text.contains(table.as_str()), "{text}");
            *value.pointer_mut(at).unwrap() = good;
        }
    }
}
