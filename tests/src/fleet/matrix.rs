//! The step matrix: each kind of operation, made once while nothing else goes wrong, with every fault that is possible at
//! every point that it touches, one run each. No cell is left out.

use std::{collections::BTreeMap, time::Duration};

use super::{
    Outcome, Settings,
    fate::{self, Point, Source},
    objects::{CONNECTED, FROM_IMAGES, Thing},
    plan::{Event, Plan, Request, Size, Verb},
    run,
};

/// An operation of the matrix: the requests that lead to it, the last of which is the one looked at.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Its name.
    pub name: &'static str,
    verbs: &'static [Verb],
    /// A backup is taken before the last request, and restored after it: waived and resumed too, that is.
    restored: bool,
    /// Which VM, or what else, it is about.
    object: usize,
    seed: u64,
}

const fn of(name: &'static str, verbs: &'static [Verb]) -> Row {
    Row {
        name,
        verbs,
        restored: false,
        object: 0,
        seed: 1,
    }
}

/// A row about objects beside VMs: of a seed that is about these.
const fn objects(name: &'static str, object: usize, verbs: &'static [Verb]) -> Row {
    Row {
        name,
        verbs,
        restored: false,
        object,
        seed: OBJECTS_SEED,
    }
}

/// Asks for something about an object.
const fn ask(thing: Thing) -> Verb {
    Verb::Thing(thing)
}

const fn restored(name: &'static str, verbs: &'static [Verb]) -> Row {
    Row {
        name,
        verbs,
        restored: true,
        object: 0,
        seed: 1,
    }
}

/// A seed that is about objects, and whose hosts have room.
const OBJECTS_SEED: u64 = 10;

/// Every operation.
pub const ROWS: &[Row] = &[
    of("create", &[Verb::Create]),
    of("create stopped", &[Verb::CreateStopped]),
    of("start", &[Verb::CreateStopped, Verb::Start]),
    of("stop", &[Verb::Create, Verb::Stop]),
    of("stop by force", &[Verb::Create, Verb::ForceStop]),
    of("reboot", &[Verb::Create, Verb::Reboot]),
    of("reset", &[Verb::Create, Verb::Reset]),
    of("pause", &[Verb::Create, Verb::Pause]),
    of("resume", &[Verb::Create, Verb::Pause, Verb::Resume]),
    of("migrate", &[Verb::Create, Verb::Migrate]),
    of("relabel", &[Verb::Create, Verb::Relabel]),
    of("cordon", &[Verb::Create, Verb::Cordon]),
    of("uncordon", &[Verb::Create, Verb::Cordon, Verb::Uncordon]),
    of("relabel a host", &[Verb::Create, Verb::RelabelHost]),
    of("forget a host", &[Verb::ForgetHost]),
    of("cancel a creation", &[Verb::Create, Verb::Cancel]),
    of(
        "cancel a start",
        &[Verb::CreateStopped, Verb::Start, Verb::Cancel],
    ),
    of("cancel a stop", &[Verb::Create, Verb::Stop, Verb::Cancel]),
    of("cancel a migration", &[Verb::Create, Verb::Migrate, Verb::Cancel]),
    of("delete", &[Verb::CreateStopped, Verb::Delete]),
    of("delete by force", &[Verb::Create, Verb::ForceDelete]),
    restored("create, then restore", &[Verb::Create]),
    restored("stop, then restore", &[Verb::Create, Verb::Stop]),
    restored("migrate, then restore", &[Verb::Create, Verb::Migrate]),
    restored("delete, then restore", &[Verb::Create, Verb::ForceDelete]),
    objects(
        "attach a volume",
        0,
        &[ask(Thing::CreateVolume), Verb::Create, ask(Thing::Attach)],
    ),
    objects(
        "detach a volume",
        0,
        &[
            ask(Thing::CreateVolume),
            ask(Thing::CreateWithVolume),
            ask(Thing::Detach),
        ],
    ),
    objects(
        "move a volume to another pool",
        0,
        &[
            ask(Thing::CreateVolume),
            ask(Thing::CreateWithVolume),
            ask(Thing::MoveVolume),
        ],
    ),
    objects(
        "call a volume back",
        0,
        &[
            ask(Thing::CreateVolume),
            ask(Thing::CreateWithVolume),
            ask(Thing::MoveVolume),
            ask(Thing::ReturnVolume),
        ],
    ),
    objects(
        "grow a volume",
        0,
        &[
            ask(Thing::CreateVolume),
            ask(Thing::CreateWithVolume),
            ask(Thing::GrowVolume),
        ],
    ),
    objects(
        "migrate with a volume",
        0,
        &[
            ask(Thing::CreateVolume),
            ask(Thing::CreateWithVolume),
            Verb::Migrate,
        ],
    ),
    objects(
        "create in a network",
        CONNECTED,
        &[ask(Thing::CreateNetwork), ask(Thing::CreateGroup), Verb::Create],
    ),
    objects(
        "migrate in a network",
        CONNECTED,
        &[
            ask(Thing::CreateNetwork),
            ask(Thing::CreateGroup),
            Verb::Create,
            Verb::Migrate,
        ],
    ),
    objects(
        "delete in a network",
        CONNECTED,
        &[
            ask(Thing::CreateNetwork),
            ask(Thing::CreateGroup),
            Verb::Create,
            Verb::ForceDelete,
        ],
    ),
    objects(
        "change rules",
        CONNECTED,
        &[
            ask(Thing::CreateNetwork),
            ask(Thing::CreateGroup),
            Verb::Create,
            ask(Thing::UpdateGroup),
        ],
    ),
    objects("import an image", 0, &[ask(Thing::CreateImage)]),
    objects(
        "create from an image",
        FROM_IMAGES,
        &[
            ask(Thing::CreateNetwork),
            ask(Thing::CreateGroup),
            ask(Thing::CreateImage),
            Verb::Create,
        ],
    ),
    objects(
        "delete an image",
        0,
        &[ask(Thing::CreateImage), ask(Thing::DeleteImage)],
    ),
    objects("make a snapshot", 0, &[Verb::Create, ask(Thing::CreateSnapshot)]),
    objects(
        "delete a snapshot",
        0,
        &[
            Verb::Create,
            ask(Thing::CreateSnapshot),
            ask(Thing::DeleteSnapshot),
        ],
    ),
    objects(
        "go back to a snapshot",
        0,
        &[
            Verb::Create,
            ask(Thing::CreateSnapshot),
            Verb::ForceStop,
            ask(Thing::RevertSnapshot),
        ],
    ),
    objects(
        "go back to a snapshot with a volume",
        0,
        &[
            ask(Thing::CreateVolume),
            ask(Thing::CreateWithVolume),
            ask(Thing::CreateSnapshot),
            Verb::ForceStop,
            ask(Thing::RevertSnapshot),
        ],
    ),
    objects(
        "delete a snapshot with a volume",
        0,
        &[
            ask(Thing::CreateVolume),
            ask(Thing::CreateWithVolume),
            ask(Thing::CreateSnapshot),
            ask(Thing::DeleteSnapshot),
        ],
    ),
    objects("back up", 0, &[Verb::Create, ask(Thing::CreateBackup)]),
    objects(
        "delete a backup",
        0,
        &[Verb::Create, ask(Thing::CreateBackup), ask(Thing::DeleteBackup)],
    ),
    objects(
        "restore a backup",
        0,
        &[
            Verb::Create,
            ask(Thing::CreateBackup),
            Verb::ForceDelete,
            ask(Thing::RestoreBackup),
        ],
    ),
];

/// Time between the requests of a row: the one before has been carried out.
const APART: Duration = Duration::from_secs(15);
/// A migration is cancelled so soon.
const SOON: Duration = Duration::from_millis(900);

/// One cell that failed.
#[derive(Debug)]
pub struct Failure {
    /// The operation.
    pub row: &'static str,
    /// Number of the point.
    pub number: u64,
    /// The point.
    pub point: Point,
    /// What happened there.
    pub fate: fate::Fate,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of a row.
#[derive(Debug, Default)]
pub struct Result {
    /// Points that the operation touched.
    pub points: usize,
    /// Cells that were run, by fault.
    pub cells: BTreeMap<&'static str, u64>,
    /// Those that failed.
    pub failures: Vec<Failure>,
}

fn plan(row: &Row) -> (Plan, Duration) {
    let mut time = Duration::from_secs(6);
    let mut plan = Plan::new();
    for (index, verb) in row.verbs.iter().enumerate() {
        if index > 0 {
            time += if *verb == Verb::Cancel { SOON } else { APART };
        }
        let request = Request {
            verb: *verb,
            object: row.object,
            other: None,
            retries: 3,
            again: false,
        };
        plan.push((time, Event::Request(request)));
    }
    if row.restored {
        plan.insert(plan.len() - 1, (time, Event::Backup));
        time += APART;
        let restore = Event::Restore {
            time: Duration::from_secs(1),
            patience: APART,
            lost: false,
        };
        plan.push((time, restore));
        time += APART;
    }
    (plan, time)
}

/// Runs every cell of a row. `every` runs each cell (1), or each N-th only, for a quick look.
pub fn row(row: &Row, every: usize) -> Result {
    let (plan, last) = plan(row);
    let size = Size {
        hosts: 2,
        vms: 1,
        time: last + Duration::from_secs(30),
        requests: 0,
        faults: 0,
    };
    let settings = |faults| Settings {
        seed: row.seed,
        size,
        least_faults: 0,
        faults,
        plan: Some(plan.clone()),
        explain: true,
    };
    let quiet = run(&settings(Source::Exactly {
        point: u64::MAX,
        fate: fate::Fate::Pass,
    }));
    let mut result = Result::default();
    if !quiet.violations.is_empty() {
        let nothing = Point {
            kind: fate::Kind::Look,
            name: "none",
            by: super::plan::Node::Client,
            to: super::plan::Node::Client,
        };
        result.failures.push(Failure {
            row: row.name,
            number: u64::MAX,
            point: nothing,
            fate: fate::Fate::Pass,
            outcome: quiet,
        });
        return result;
    }
    // Points of the last request: those after the one before it was carried out, until each host has reported what came of it.
    // The heartbeats that follow tell nothing of it.
    let asked = row.verbs.last().map_or("", |verb| verb.method());
    let is_last = |point: &Point| point.by == super::plan::Node::Client && point.name == asked;
    let begin = quiet.seen.iter().rposition(is_last).unwrap_or(0);
    let mine = |point: &Point| !matches!(point.name, "Report" | "Register" | "list" | "usage" | "about");
    let last = quiet.seen.iter().rposition(mine).unwrap_or(0);
    let after = quiet.seen.iter().enumerate().skip(last);
    let reports = after
        .filter(|(_, point)| point.name == "Report")
        .map(|(number, _)| number);
    let end = reports.take(size.hosts).last().unwrap_or(last);
    let points: Vec<_> = quiet.seen.iter().enumerate().take(end + 1).skip(begin).collect();
    result.points = points.len();
    let cells = points.iter().flat_map(|(number, point)| {
        fate::possible(point.kind).map(move |fate| (*number as u64, **point, fate))
    });
    for (number, point, fate) in cells.step_by(every) {
        let class = fate.class(point.kind).unwrap_or("none");
        *result.cells.entry(class).or_default() += 1;
        let outcome = run(&Settings {
            explain: false,
            ..settings(Source::Exactly { point: number, fate })
        });
        if !outcome.violations.is_empty() {
            result.failures.push(Failure {
                row: row.name,
                number,
                point,
                fate,
                outcome,
            });
        }
    }
    result
}
