//! From what the store holds to a state. Called once, by [`super::Db`], before anything is served; the fuzz targets call it
//! with what no controller has written.

use std::sync::Arc;

use dalgu_proto::ids::{ClusterId, NewIds, Session, Term};
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::{Meta, State, Tx, fleet::Fleet, refused::Refused};
use crate::{
    model::{
        BackupRecord, EventRecord, GroupRecord, HostLive, HostRecord, HostState, ImageRecord,
        MigrationRecord, NetworkRecord, OperationRecord, PlacementGroupRecord, PlanRecord, RefusedPlacement,
        RequestRecord, ScheduleRecord, UsageRecord, VmRecord, VolumeRecord,
    },
    store::{self, Image, Table},
};

/// Key of the one record in the table of site-wide numbers.
pub(crate) const META_KEY: &str = "site";

/// Why a state cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store failed.
    #[error("the store cannot be used")]
    Store(#[from] store::Error),
    /// A record is not what it should be.
    #[error("the record {key} of table {table} cannot be read")]
    Record {
        /// Its table.
        table: &'static str,
        /// Its key.
        key: String,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// The store is another site's.
    #[error(
        "the store belongs to site {found}, this directory to site {expected}: they do not belong together"
    )]
    Site {
        /// In the store.
        found: ClusterId,
        /// In the data directory.
        expected: ClusterId,
    },
    /// The writer could not be started.
    #[error("cannot start the store's thread")]
    Thread(#[source] std::io::Error),
}

fn parse<T: DeserializeOwned>(table: &'static str, key: &str, value: &str) -> Result<T, Error> {
    serde_json::from_str(value).map_err(|source| Error::Record {
        table,
        key: key.to_owned(),
        source,
    })
}

/// Numbers that every change raises must have room to rise; none that this program gave out comes near the limit.
fn check(meta: &Meta, key: &str) -> Result<(), Error> {
    const LIMIT: u64 = u64::MAX / 2;
    if meta.revision <= LIMIT && meta.term.0 <= LIMIT {
        return Ok(());
    }
    Err(Error::Record {
        table: "meta",
        key: key.to_owned(),
        source: serde::de::Error::custom("its revision or its term is beyond what was ever given out"),
    })
}

/// Makes the state that an image describes.
pub fn state(image: &Image, cluster_id: ClusterId) -> Result<State, Error> {
    let mut meta = Meta {
        cluster_id,
        term: Term(0),
        incarnation: 1,
        revision: 0,
        forgotten: 0,
        forgotten_session: Session(0),
        observing: None,
    };
    for (table, key, value) in &image.records {
        if *table == Table::Meta && key == META_KEY {
            meta = parse("meta", key, value)?;
            check(&meta, key)?;
        }
    }
    if meta.cluster_id != cluster_id {
        return Err(Error::Site {
            found: meta.cluster_id,
            expected: cluster_id,
        });
    }
    let mut state = State::empty(meta);
    state.networks_since = state.meta.revision + 1;
    for (revision, value) in &image.events {
        let event: EventRecord = parse("events", &revision.to_string(), value)?;
        // By its own number, as all other records: pages go by it.
        state.events.insert(event.revision, Arc::new(event));
    }
    // Nothing new is made here: neither the time nor an id is asked for.
    let mut tx = Tx::new(
        state,
        Refused::default(),
        Fleet::default(),
        Timestamp::UNIX_EPOCH,
        NewIds::random(),
        usize::MAX,
    );
    // Tables come in the order of their declaration: VMs before the migrations that refer to them.
    for (table, key, value) in &image.records {
        let name = table.as_str();
        match table {
            Table::Meta => {}
            Table::Vms => tx.index_vm(Arc::new(parse::<VmRecord>(name, key, value)?)),
            Table::Hosts => tx.index_host(Arc::new(parse::<HostRecord>(name, key, value)?)),
            Table::Operations => tx.index_operation(Arc::new(parse::<OperationRecord>(name, key, value)?)),
            Table::Migrations => tx.index_migration(Arc::new(parse::<MigrationRecord>(name, key, value)?)),
            Table::Requests => tx.index_request(Arc::new(parse::<RequestRecord>(name, key, value)?)),
            Table::Images => tx.index_image(Arc::new(parse::<ImageRecord>(name, key, value)?)),
            Table::Networks => tx.index_network(Arc::new(parse::<NetworkRecord>(name, key, value)?)),
            Table::Backups => tx.index_backup(Arc::new(parse::<BackupRecord>(name, key, value)?)),
            Table::BackupSchedules => tx.index_schedule(Arc::new(parse::<ScheduleRecord>(name, key, value)?)),
            Table::Plans => tx.index_plan(Arc::new(parse::<PlanRecord>(name, key, value)?)),
            Table::RefusedPlacements => {
                tx.index_refused_placement(Arc::new(parse::<RefusedPlacement>(name, key, value)?));
            }
            Table::Usage => tx.index_usage(Arc::new(parse::<UsageRecord>(name, key, value)?)),
            Table::Groups => tx.index_group(Arc::new(parse::<GroupRecord>(name, key, value)?)),
            Table::PlacementGroups => {
                tx.index_placement_group(Arc::new(parse::<PlacementGroupRecord>(name, key, value)?))
            }
            Table::Volumes => tx.index_volume(Arc::new(parse::<VolumeRecord>(name, key, value)?)),
        }
    }
    let (mut state, ..) = tx.finish();
    let silent = Arc::new(HostLive::silent(Instant::now()));
    // Of one that is off nobody waits to hear.
    let off = Arc::new(HostLive {
        state: HostState::Unreachable,
        ..HostLive::silent(Instant::now())
    });
    let live = |host: &HostRecord| if host.is_asleep() { &off } else { &silent };
    state.live = state
        .hosts
        .values()
        .map(|host| (host.name.clone(), live(host).clone()))
        .collect();
    Ok(state)
}
