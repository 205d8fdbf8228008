//! Writes this version's samples: tells the [`story`](super::story) and keeps what is said on the wires, and what is left on
//! disk before the site is restored from a backup.
//!
//! Of calls that tell the same fields, one is kept. Called by the program `record-samples`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context, Result};
use dalgu_controller::store::{Batch, Image, Store as _, Write, sqlite::Sqlite};
use prost::{Message, bytes::Bytes};
use rusqlite::{Connection, types::ValueRef};

use super::{
    full,
    lens::Lens,
    samples::{Call, LISTS},
    site::Site,
    story,
    wire::{Side, Tap},
};

/// Of one call, so many are kept at most.
const MOST: usize = 16;

/// Keeps what comes by.
#[derive(Debug, Default)]
pub struct Recorder(Mutex<BTreeMap<u64, Call>>);

impl Recorder {
    /// What was answered last to a call.
    pub fn answer(&self, path: &str) -> Option<Vec<u8>> {
        let calls = self.calls();
        let last = calls.values().rev().find(|call| call.path == path)?;
        Some(last.answers.concat())
    }

    fn calls(&self) -> MutexGuard<'_, BTreeMap<u64, Call>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tap for Recorder {
    fn message(&self, call: u64, path: &str, side: Side, message: Bytes) -> Bytes {
        let mut calls = self.calls();
        let entry = calls.entry(call).or_default();
        entry.number = call;
        path.clone_into(&mut entry.path);
        match side {
            Side::Request => entry.request = message.to_vec(),
            Side::Answer => entry.answers.push(message.to_vec()),
        }
        message
    }
}

/// Writes the samples of this version into a folder, in the place of what was there.
///
/// # Errors
/// If the story does not go well, or a file cannot be written.
pub async fn record(dir: &Path) -> Result<()> {
    let consoles = tempfile::tempdir()?;
    let recorder = Arc::new(Recorder::default());
    let mut site = Site::new(&story::HOSTS, Some(consoles.path().to_owned()))?;
    story::tell(&mut site, recorder.clone()).await?;
    if dir.exists() {
        fs::remove_dir_all(dir)?;
    }
    fs::create_dir_all(dir.join("wire"))?;
    fs::write(dir.join("descriptors.bin"), dalgu_proto::DESCRIPTORS)?;
    lists(&site, dir).await?;
    for (host, server) in &site.servers {
        for (name, content) in server.ledger.files() {
            let path = dir.join("ledger").join(host.as_str()).join(name);
            fs::create_dir_all(path.parent().context("it is in a folder")?)?;
            fs::write(path, content)?;
        }
    }
    fs::write(dir.join("store.sql"), sql(site.disk.open().load()?)?)?;
    story::resume(&mut site, recorder.clone()).await?;
    let calls = recorder.calls().clone();
    for (path, calls) in chosen(calls)? {
        let bytes: Vec<u8> = calls
            .iter()
            .flat_map(Message::encode_length_delimited_to_vec)
            .collect();
        let name = path.trim_start_matches('/').replace('/', ".");
        fs::write(dir.join("wire").join(name + ".bin"), bytes)?;
    }
    Ok(())
}

/// The lists as the API tells them now, each whole.
async fn lists(site: &Site, dir: &Path) -> Result<()> {
    let recorder = Arc::new(Recorder::default());
    let operator = story::Operator::new(site, recorder.clone())?;
    operator
        .vms()
        .list_vms(dalgu_proto::v1::ListVmsRequest::default())
        .await?;
    operator
        .hosts()
        .list_hosts(dalgu_proto::v1::ListHostsRequest::default())
        .await?;
    operator
        .operations()
        .list_operations(dalgu_proto::v1::ListOperationsRequest::default())
        .await?;
    for (file, path) in LISTS {
        fs::write(dir.join(file), recorder.answer(path).context("it was asked for")?)?;
    }
    Ok(())
}

/// One call of each shape.
fn chosen(calls: BTreeMap<u64, Call>) -> Result<BTreeMap<String, Vec<Call>>> {
    let lens = Lens::new(dalgu_proto::DESCRIPTORS)?;
    let mut kept: BTreeMap<String, (BTreeSet<Vec<String>>, Vec<Call>)> = BTreeMap::new();
    for call in calls.into_values().filter(|call| !call.answers.is_empty()) {
        let mut shape = full::shape(&lens.read(&call.path, Side::Request, &call.request)?);
        for answer in &call.answers {
            shape.extend(full::shape(&lens.read(&call.path, Side::Answer, answer)?));
        }
        shape.sort();
        shape.dedup();
        let (shapes, found) = kept.entry(call.path.clone()).or_default();
        if found.len() < MOST && shapes.insert(shape) {
            found.push(call);
        }
    }
    Ok(kept.into_iter().map(|(path, (_, calls))| (path, calls)).collect())
}

/// A store with these records, as the SQL that makes it.
fn sql(image: Image) -> Result<String> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("dalgu.db");
    let put = |(table, key, value)| Write {
        table,
        key,
        value: Some(value),
    };
    let mut store = Sqlite::open(&path)?;
    store.commit(&[Batch {
        writes: image.records.into_iter().map(put).collect(),
        events: image.events,
        forget_events_to: 0,
        erases: false,
    }])?;
    drop(store);
    dump(&Connection::open(&path)?)
}

fn dump(database: &Connection) -> Result<String> {
    let mut text = String::new();
    let mut tables =
        database.prepare("SELECT name, sql FROM sqlite_master WHERE type = 'table' ORDER BY name")?;
    let tables = tables.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))?;
    for table in tables {
        let (name, made_by) = table?;
        text += &format!("{made_by};\n");
        let mut rows = database.prepare(&format!("SELECT * FROM {name} ORDER BY 1"))?;
        let columns = rows.column_count();
        let mut rows = rows.query([])?;
        while let Some(row) = rows.next()? {
            let values = (0..columns).map(|column| Ok(literal(row.get_ref(column)?)));
            let values: Vec<String> = values.collect::<Result<_, rusqlite::Error>>()?;
            text += &format!("INSERT INTO {name} VALUES ({});\n", values.join(", "));
        }
    }
    let version: i64 = database.pragma_query_value(None, "user_version", |row| row.get(0))?;
    Ok(text + &format!("PRAGMA user_version = {version};\n"))
}

fn literal(value: ValueRef<'_>) -> String {
    match value {
        ValueRef::Null => "NULL".to_owned(),
        ValueRef::Integer(number) => number.to_string(),
        ValueRef::Real(number) => number.to_string(),
        ValueRef::Text(text) => format!("'{}'", String::from_utf8_lossy(text).replace('\'', "''")),
        ValueRef::Blob(bytes) => {
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("x'{hex}'")
        }
    }
}
