//! Target `records`: the agent's ledger and the rows of the controller's store, as a defect, another version or a bad disk may
//! have left them.
//!
//! Promises: a file or row is read or is an error that names it, never a panic; what is read of the ledger is written as it
//! was; a controller that starts on a store can show all of it and take requests.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, LazyLock, Mutex, MutexGuard},
};

use async_trait::async_trait;
use dalgu_agent::ledger::{Files, Ledger};
use dalgu_controller::{
    state,
    store::{Batch, Image, Store, Table, Write, memory::Disk},
};
use serde_json::{Value, json};

use crate::{
    input::Input,
    rpc,
    site::{SITE, Site, answer, operator, wait},
};
use dalgu_proto::v1::{self, host_service_server::HostService, vm_service_server::VmService};

/// Rows that a controller wrote.
static ROWS: LazyLock<Image> = LazyLock::new(|| wait(rows()));

/// Takes one input: the first byte says what the rest is.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.byte() % 4 {
        0 => ledger(&mut input),
        1 => {
            let mut entry = entry();
            let file = input.pick(&["host.json", "vms/a.json", "migrations/a.json"]);
            for _ in 0..=input.byte() % 4 {
                change(&mut entry[file], &mut input);
            }
            wait(one_entry(file, entry[file].to_string().as_bytes()));
        }
        2 => raw_rows(&mut input),
        _ => changed_rows(&mut input),
    }
}

fn ledger(input: &mut Input<'_>) {
    let file = input.pick(&["host.json", "vms/a.json", "migrations/a.json"]);
    wait(one_entry(file, input.bytes(usize::MAX)));
}

fn entry() -> Value {
    let id = "018f0000-0000-7000-8000-000000000001";
    json!({
        "host.json": {"cluster": id, "session": 3, "term": 9},
        "vms/a.json": {
            "id": id, "name": "a", "epoch": 2, "generation": 5, "disposition": {"is": "incoming", "migration": id},
            "intent": {
                "generation": 5, "epoch": 2, "power": "running", "power_sequence": 1, "restart_sequence": 2,
                "restart_mode": "reset", "grace_period_seconds": 60,
                "spec": {
                    "vcpus": 1, "memory_mib": 128, "disks": [{"name": "root", "size_mib": 16, "pool": "local", "image": "i"}],
                    "nics": [{"name": "eth0", "bridge": "br0", "mac": "52:54:00:00:00:01"}],
                    "kernel_boot": {"kernel": "k", "cmdline": "quiet"}, "host_selector": {"rack": "1"}
                }
            },
            "done": {"defined": 2, "volumes": true, "power_begun": 1, "power": 1, "restart": 0},
            "last_seen": ["running", "requested"], "boot_id": "b"
        },
        "migrations/a.json": {
            "id": id, "vm": id, "role": "source", "peer": "h2", "settled": false, "finished": "2026-01-01T00:00:00Z",
            "transfer": {"is": "failed", "reason": "R", "message": "m"}
        }
    })
}

/// A ledger's files in memory.
#[derive(Default)]
struct Memory(Mutex<BTreeMap<String, Vec<u8>>>);

impl Memory {
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Vec<u8>>> {
        self.0.lock().expect("nothing panics while it is held")
    }
}

#[async_trait]
impl Files for Memory {
    async fn load(&self) -> io::Result<Vec<(String, Vec<u8>)>> {
        let files = self.all();
        Ok(files
            .iter()
            .map(|(name, bytes)| (name.clone(), bytes.clone()))
            .collect())
    }

    async fn replace(&self, name: &str, bytes: Vec<u8>) -> io::Result<()> {
        self.all().insert(name.to_owned(), bytes);
        Ok(())
    }

    async fn remove(&self, name: &str) -> io::Result<()> {
        self.all().remove(name);
        Ok(())
    }
}

/// A ledger with one file, read, and written again where it could be understood.
async fn one_entry(file: &str, content: &[u8]) {
    let files = Arc::new(Memory::default());
    let written = files.replace(file, content.to_vec()).await;
    written.expect("memory takes everything");
    let ledger = Ledger::on(files.clone());
    let contents = match ledger.load().await {
        Ok(contents) => contents,
        Err(error) => {
            assert_eq!(file, "host.json", "{error}");
            assert!(error.to_string().contains("host.json"));
            return;
        }
    };
    let read = contents.vms.len() + contents.migrations.len() + contents.damaged.len();
    assert_eq!(read, usize::from(file != "host.json"), "an entry was lost");
    files.all().clear();
    let host = ledger.save_host(&contents.host).await;
    host.expect("it can be written");
    for vm in &contents.vms {
        ledger.save_vm(vm).await.expect("it can be written");
    }
    for migration in &contents.migrations {
        let saved = ledger.save_migration(migration).await;
        saved.expect("it can be written");
    }
    let again = ledger.load().await.expect("what was written can be read");
    assert_eq!(
        (again.host, again.vms, again.migrations),
        (contents.host, contents.vms, contents.migrations)
    );
    assert!(again.damaged.is_empty());
}

/// Lines of a table, a key and JSON.
fn raw_rows(input: &mut Input<'_>) {
    let mut image = Image::default();
    for line in input.rest().lines() {
        let mut parts = line.splitn(3, ' ');
        let (Some(table), Some(key), Some(value)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        if table == "events" {
            image.events.push((key.parse().unwrap_or(1), value.to_owned()));
        } else if let Some(table) = Table::ALL.into_iter().find(|known| known.as_str() == table) {
            image.records.push((table, key.to_owned(), value.to_owned()));
        }
    }
    start(image);
}

/// What a controller wrote, with a few values replaced and rows left out.
fn changed_rows(input: &mut Input<'_>) {
    let mut image = ROWS.clone();
    for _ in 0..=input.byte() % 6 {
        let number = usize::from(input.byte());
        if number == 255 && image.records.len() > 1 {
            let number = usize::from(input.byte()) % image.records.len();
            image.records.remove(number);
            continue;
        }
        let records = image.records.len();
        let row = match number % (records + 2) {
            record if record < records => &mut image.records[record].2,
            _ => match image.events.last_mut() {
                Some((_, row)) => row,
                None => continue,
            },
        };
        let mut value: Value = serde_json::from_str(row).expect("the controller writes JSON");
        change(&mut value, input);
        *row = value.to_string();
    }
    start(image);
}

/// Replaces the value that the input points at.
fn change(value: &mut Value, input: &mut Input<'_>) {
    let mut at = value;
    loop {
        let here = usize::from(input.byte());
        let length = match &*at {
            Value::Array(items) => items.len(),
            Value::Object(fields) => fields.len(),
            _ => 0,
        };
        if length == 0 || here == 255 {
            break;
        }
        at = match at {
            Value::Array(items) => &mut items[here % length],
            Value::Object(fields) => fields
                .values_mut()
                .nth(here % length)
                .expect("it is below the length"),
            _ => unreachable!("only these two have parts"),
        };
    }
    let word = |input: &mut Input<'_>| Value::from(input.word());
    *at = match input.byte() % 14 {
        0 => Value::Null,
        1 => json!(0),
        2 => json!(u64::MAX),
        3 => json!(i64::MIN),
        4 => json!(1e308),
        5 => json!(-1.5),
        6 => json!([]),
        7 => json!({}),
        8 => json!(true),
        9 => json!(u32::MAX),
        10 => json!("9999-12-30T22:00:00.999999999Z"),
        11 => json!("-009999-01-02T01:59:59Z"),
        12 => json!(u64::from(input.byte())),
        _ => word(input),
    };
}

/// Starts a controller on rows, shows everything and asks for something.
fn start(mut image: Image) {
    image.records.sort();
    image.records.dedup_by(|a, b| (a.0, &a.1) == (b.0, &b.1));
    image.events.sort();
    if state::from_image(&image, SITE).is_err() {
        return;
    }
    let disk = Disk::default();
    let put = |(table, key, value)| Write {
        table,
        key,
        value: Some(value),
    };
    let batch = Batch {
        writes: image.records.into_iter().map(put).collect(),
        events: image.events,
        forget_events_to: 0,
        erases: false,
    };
    disk.open()
        .commit(&[batch])
        .expect("a store in memory takes everything");
    wait(async {
        let Ok(site) = Site::open(disk) else { return };
        rpc::pages(&site).await;
        let services = &site.services;
        for host in rpc::HOSTS {
            let _ = answer(services.get_host(operator(v1::GetHostRequest { name: host.into() }))).await;
        }
        for name in ["a", "new"] {
            let ask = v1::CreateVmRequest {
                vm: Some(rpc::vm(name)),
                ..Default::default()
            };
            let _ = answer(services.create_vm(operator(ask))).await;
            let ask = v1::StopVmRequest {
                name: name.into(),
                ..Default::default()
            };
            let _ = answer(services.stop_vm(operator(ask))).await;
        }
    });
}

async fn rows() -> Image {
    let site = rpc::site().await;
    let services = &site.services;
    for name in ["a", "b"] {
        let ask = v1::CreateVmRequest {
            vm: Some(rpc::vm(name)),
            host: "h1".into(),
            request_id: uuid::Uuid::from_u128(1).to_string(),
            ..Default::default()
        };
        drop(answer(services.create_vm(operator(ask))).await);
    }
    // Of the second VM there is a migration.
    let ask = v1::CreateVmRequest {
        vm: Some(rpc::vm("c")),
        ..Default::default()
    };
    drop(answer(services.create_vm(operator(ask))).await);
    site.disk.open().load().expect("a store in memory can be read")
}
