//! Schedules of backups, for [`super`].

use std::{collections::BTreeMap, ops::Bound, ops::RangeInclusive};

use dalgu_proto::{
    ids::ScheduleName,
    reason,
    time::{NoTimeOfDay, TimeOfDay},
    v1,
};
use jiff::Timestamp;
use tonic::{Request, Response, Status};

use super::{MAX_DESCRIPTION, Services, parsed, pool};
use crate::{
    api::{page::Page, request, wire},
    model::{Outcome, ScheduleRecord},
    verbs::{self, Caller, Error, backup},
};

const EVERY_SECONDS: RangeInclusive<u64> = 15 * 60..=30 * 86_400;
const INCREMENTALS: RangeInclusive<u32> = 0..=30;
const KEEP_LAST: RangeInclusive<u32> = 1..=60;
const KEEP_DAYS: RangeInclusive<u32> = 0..=3650;
const MUTABLE: [&str; 9] = [
    "label_selector",
    "pool",
    "every",
    "incrementals",
    "keep_last",
    "keep_days",
    "paused",
    "description",
    "at",
];
const MUTABLE_TEXT: &str =
    "label_selector, pool, every, incrementals, keep_last, keep_days, paused, description, at";

fn count(field: &str, value: u32, allowed: &RangeInclusive<u32>) -> Result<u32, Status> {
    if allowed.contains(&value) {
        return Ok(value);
    }
    let message = format!("must be {} to {}, got {value}", allowed.start(), allowed.end());
    Err(reason::invalid(&format!("backup_schedule.{field}"), message))
}

fn every(value: Option<&prost_types::Duration>) -> Result<u64, Status> {
    let seconds = value.map_or(0, |every| every.seconds);
    let whole = value.is_none_or(|every| every.nanos == 0);
    let seconds = u64::try_from(seconds).unwrap_or(0);
    if whole && EVERY_SECONDS.contains(&seconds) {
        return Ok(seconds);
    }
    let message = "must be 15 minutes to 30 days, in whole seconds";
    Err(reason::invalid("backup_schedule.every", message))
}

/// Empty is none.
fn at(value: &str) -> Result<Option<TimeOfDay>, Status> {
    let refused = |error: NoTimeOfDay| reason::invalid("backup_schedule.at", error.to_string());
    match value {
        "" => Ok(None),
        value => value.parse().map(Some).map_err(refused),
    }
}

fn selector(wire: &v1::BackupSchedule) -> Result<BTreeMap<String, String>, Status> {
    const FIELD: &str = "backup_schedule.label_selector";
    let selector = request::labels(FIELD, &wire.label_selector)?;
    if selector.is_empty() {
        return Err(reason::invalid(FIELD, "must name at least one label"));
    }
    Ok(selector)
}

/// Checks a schedule as a whole.
fn record(wire: &v1::BackupSchedule) -> Result<ScheduleRecord, Status> {
    Ok(ScheduleRecord {
        name: parsed("backup_schedule.name", &wire.name)?,
        selector: selector(wire)?,
        pool: pool("backup_schedule.pool", &wire.pool)?,
        every_seconds: every(wire.every.as_ref())?,
        at: at(&wire.at)?,
        incrementals: count("incrementals", wire.incrementals, &INCREMENTALS)?,
        keep_last: count("keep_last", wire.keep_last, &KEEP_LAST)?,
        keep_days: count("keep_days", wire.keep_days, &KEEP_DAYS)?,
        paused: wire.paused,
        description: request::text(
            "backup_schedule.description",
            wire.description.clone(),
            MAX_DESCRIPTION,
        )?,
        create_time: Timestamp::UNIX_EPOCH,
        revision: 0,
    })
}

/// Puts the named fields of one in the place of another's.
fn apply(paths: &[String], from: ScheduleRecord, to: &mut ScheduleRecord) {
    let ScheduleRecord {
        selector,
        pool,
        every_seconds,
        at,
        incrementals,
        keep_last,
        keep_days,
        paused,
        description,
        ..
    } = from;
    let named = |path: &str| paths.iter().any(|named| named == path);
    let old = to.clone();
    *to = ScheduleRecord {
        selector: if named("label_selector") {
            selector
        } else {
            old.selector
        },
        pool: if named("pool") { pool } else { old.pool },
        every_seconds: if named("every") {
            every_seconds
        } else {
            old.every_seconds
        },
        at: if named("at") { at } else { old.at },
        incrementals: if named("incrementals") {
            incrementals
        } else {
            old.incrementals
        },
        keep_last: if named("keep_last") {
            keep_last
        } else {
            old.keep_last
        },
        keep_days: if named("keep_days") {
            keep_days
        } else {
            old.keep_days
        },
        paused: if named("paused") { paused } else { old.paused },
        description: if named("description") {
            description
        } else {
            old.description
        },
        ..old
    };
}

/// The fields that are not named, as they are: so that only what is named is checked.
fn filled(
    old: &ScheduleRecord,
    new: &v1::BackupSchedule,
    paths: &[String],
) -> Result<ScheduleRecord, Status> {
    let mut whole = wire::schedule_fields(old);
    let named = |path: &str| paths.iter().any(|named| named == path);
    if named("label_selector") {
        whole.label_selector.clone_from(&new.label_selector);
    }
    if named("pool") {
        whole.pool.clone_from(&new.pool);
    }
    if named("every") {
        whole.every = new.every;
    }
    if named("at") {
        whole.at.clone_from(&new.at);
    }
    if named("description") {
        whole.description.clone_from(&new.description);
    }
    let pick = |path: &str, new: u32, old: u32| if named(path) { new } else { old };
    whole.incrementals = pick("incrementals", new.incrementals, whole.incrementals);
    whole.keep_last = pick("keep_last", new.keep_last, whole.keep_last);
    whole.keep_days = pick("keep_days", new.keep_days, whole.keep_days);
    whole.paused = if named("paused") { new.paused } else { whole.paused };
    record(&whole)
}

fn given(schedule: Option<&v1::BackupSchedule>) -> Result<&v1::BackupSchedule, Status> {
    schedule.ok_or_else(|| reason::invalid("backup_schedule", "must be given"))
}

/// Does a verb once, and answers with its schedule.
async fn done(
    services: &Services,
    caller: Caller,
    change: impl FnOnce(&mut crate::state::Tx) -> Result<Outcome, Error>,
) -> Result<Response<v1::BackupSchedule>, Status> {
    let outcome = services
        .db
        .transact(|tx| verbs::once(tx, &caller, change))
        .await?;
    let Outcome::Schedule(name) = outcome else {
        return Err(Error::RequestReused(caller.request_id).into());
    };
    get(services, name.as_str())
}

/// Reads one.
#[allow(clippy::result_large_err, reason = "tonic's error is what a service returns")]
pub(super) fn get(services: &Services, name: &str) -> Result<Response<v1::BackupSchedule>, Status> {
    let name: ScheduleName = parsed("name", name)?;
    let state = services.db.snapshot();
    let schedule = backup::get_schedule(&state, &name)?;
    Ok(Response::new(wire::schedule(&state, &schedule)))
}

/// Reads a page.
#[allow(clippy::result_large_err, reason = "tonic's error is what a service returns")]
pub(super) fn list(
    services: &Services,
    m: &v1::ListBackupSchedulesRequest,
) -> Result<Response<v1::ListBackupSchedulesResponse>, Status> {
    let page = Page::of(m.page_size, &m.page_token, "backup schedules")?;
    let from = match &page.after {
        Some(name) => Bound::Excluded(parsed::<ScheduleName>("page_token", name)?),
        None => Bound::Unbounded,
    };
    let state = services.db.snapshot();
    let found = state
        .schedules
        .range((from, Bound::Unbounded))
        .map(|(_, one)| one);
    let (found, next_page_token) = page.take(found, |one| one.name.to_string());
    let schedules = found.into_iter().map(|one| wire::schedule(&state, one));
    Ok(Response::new(v1::ListBackupSchedulesResponse {
        backup_schedules: schedules.collect(),
        next_page_token,
        resource_version: state.meta.revision,
    }))
}

/// Enters one.
pub(super) async fn create(
    services: &Services,
    request: &Request<v1::CreateBackupScheduleRequest>,
) -> Result<Response<v1::BackupSchedule>, Status> {
    let m = request.get_ref();
    let wire = given(m.backup_schedule.as_ref())?;
    let output_only = [
        ("last_time", wire.last_time.is_some()),
        ("next_time", wire.next_time.is_some()),
        ("vms", wire.vms != 0),
        ("failures", wire.failures != 0),
        ("etag", !wire.etag.is_empty()),
        ("create_time", wire.create_time.is_some()),
    ];
    if let Some((field, _)) = output_only.iter().find(|(_, set)| *set) {
        let field = format!("backup_schedule.{field}");
        return Err(reason::invalid(
            &field,
            "is set by the controller: leave it empty",
        ));
    }
    let new = record(wire)?;
    let caller = request::caller(request, &m.request_id, &format!("CreateBackupSchedule {new:?}"))?;
    done(services, caller, |tx| backup::create_schedule(tx, new)).await
}

/// Changes one.
pub(super) async fn update(
    services: &Services,
    request: &Request<v1::UpdateBackupScheduleRequest>,
) -> Result<Response<v1::BackupSchedule>, Status> {
    let m = request.get_ref();
    let new = given(m.backup_schedule.as_ref())?;
    let paths = request::mask(m.update_mask.clone(), &MUTABLE, MUTABLE_TEXT)?;
    let name: ScheduleName = parsed("backup_schedule.name", &new.name)?;
    let old = backup::get_schedule(&services.db.snapshot(), &name)?;
    let whole = filled(&old, new, &paths)?;
    let content = format!("UpdateBackupSchedule {} {paths:?} {whole:?}", new.etag);
    let caller = request::caller(request, &m.request_id, &content)?;
    let etag = new.etag.clone();
    done(services, caller, |tx| {
        backup::update_schedule(tx, &name, &etag, |record| apply(&paths, whole, record))
    })
    .await
}

/// Deletes one.
pub(super) async fn delete(
    services: &Services,
    request: &Request<v1::DeleteBackupScheduleRequest>,
) -> Result<Response<v1::DeleteBackupScheduleResponse>, Status> {
    let m = request.get_ref();
    let name: ScheduleName = parsed("name", &m.name)?;
    let content = format!("DeleteBackupSchedule {name} {:?}", m.etag);
    let caller = request::caller(request, &m.request_id, &content)?;
    services
        .db
        .transact(|tx| verbs::once(tx, &caller, |tx| backup::delete_schedule(tx, &name, &m.etag)))
        .await?;
    Ok(Response::new(v1::DeleteBackupScheduleResponse {}))
}
