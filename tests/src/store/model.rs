//! Numbered batches, and what a store holds after each of them.
//!
//! Each batch overwrites, deletes, adds an event and forgets one, so that no state of the store looks like another. They are
//! committed in groups, as the controller's writer does; a group is written whole or not at all.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result, ensure};
use dalgu_controller::store::{Batch, Image, Store, Table, Write, sqlite::Sqlite};

/// The numbers of the batches that are committed together, beginning with `first`.
pub fn group(first: u64) -> std::ops::RangeInclusive<u64> {
    first..=first + first * 31 % 4
}

fn padded(number: u64, longest: u64) -> String {
    let length = usize::try_from(number * 7919 % longest).unwrap_or(0);
    format!(r#"{{"n":{number},"pad":"{}"}}"#, "x".repeat(length))
}

/// The batch of that number; numbers begin with 1.
pub fn batch(number: u64) -> Batch {
    let put = |table, key: String, value: String| Write {
        table,
        key,
        value: Some(value),
    };
    let mut writes = vec![
        put(Table::Vms, format!("vm-{}", number % 7), padded(number, 3000)),
        put(Table::Hosts, format!("h{}", number % 3), padded(number, 700)),
        put(Table::Operations, format!("op-{number}"), padded(number, 300)),
    ];
    if number > 5 {
        writes.push(Write {
            table: Table::Operations,
            key: format!("op-{}", number - 5),
            value: None,
        });
    }
    writes.push(put(Table::Meta, "site".to_owned(), number.to_string()));
    Batch {
        writes,
        events: vec![(number, padded(number, 200))],
        forget_events_to: number.saturating_sub(10),
        erases: false,
    }
}

/// What a store should hold.
#[derive(Debug, Clone, Default)]
pub struct Model {
    /// Number of the last batch.
    pub number: u64,
    records: BTreeMap<(Table, String), String>,
    events: BTreeMap<u64, String>,
}

impl Model {
    /// After the batches up to `number`.
    pub fn after(number: u64) -> Self {
        let mut model = Self::default();
        model.advance(number);
        model
    }

    /// Goes on to `number`.
    pub fn advance(&mut self, number: u64) {
        for number in self.number + 1..=number {
            self.take(&batch(number));
        }
        self.number = self.number.max(number);
    }

    /// Takes a batch.
    pub fn take(&mut self, batch: &Batch) {
        for write in &batch.writes {
            let key = (write.table, write.key.clone());
            match &write.value {
                Some(value) => self.records.insert(key, value.clone()),
                None => self.records.remove(&key),
            };
        }
        self.events.extend(batch.events.iter().cloned());
        self.events
            .retain(|revision, _| *revision > batch.forget_events_to);
    }

    /// The same as a store tells it.
    pub fn image(&self) -> Image {
        let records = self.records.iter();
        Image {
            records: records
                .map(|((table, key), value)| (*table, key.clone(), value.clone()))
                .collect(),
            events: self.events.iter().map(|(r, v)| (*r, v.clone())).collect(),
        }
    }
}

/// Opens a database and says up to which batch it goes. An error when one that was acknowledged is not there, or if a group
/// is there in part, or the database does not open.
pub fn judge(database: &Path, acknowledged: u64) -> Result<u64> {
    let image = Sqlite::open(database).context("it does not open")?.load()?;
    let site = image.records.iter().find(|(table, ..)| *table == Table::Meta);
    let found = site.map_or(Ok(0), |(_, _, value)| value.parse::<u64>())?;
    let under_way = *group(acknowledged + 1).end();
    ensure!(
        found == acknowledged || found == under_way,
        "it goes up to {found}; acknowledged: {acknowledged}, under way: up to {under_way}"
    );
    ensure!(
        image == Model::after(found).image(),
        "its content is not that of batch {found}"
    );
    Ok(found)
}
