//! Whether what was asked for is what is, and whether what is under way will end.

use std::time::Duration;

use dalgu_proto::vm::{PowerReason, PowerState, RestartPolicy};

use super::{Finding, Invariant, Look, Severity, View, backups, images, networks, volumes};
use crate::{
    model::{MigrationRecord, Observation, OperationKind, OperationRecord, Phase, VmPhase, VmRecord},
    reconcile::plan,
    state::State,
};

/// An operation is ended at its deadline; one that is still open so long after it is not looked after.
const GRACE: Duration = Duration::from_mins(1);
/// A host that tries the same again and again for so long does not get on.
const TRYING: Duration = Duration::from_mins(5);

/// What is under way, if anything is: at rest there is neither.
pub fn open(state: &State) -> Option<String> {
    let operation = state.operations.values().find(|operation| operation.is_active());
    let migration = state.active_migrations.values().next();
    match (operation, migration) {
        (Some(operation), _) => Some(format!(
            "{} of {} ({}) is active",
            operation.kind.as_str(),
            operation.vm_name,
            operation.id
        )),
        (None, Some(id)) => Some(format!("migration {id} has not ended")),
        (None, None) => None,
    }
}

fn warning(
    invariant: Invariant,
    kind: &'static str,
    subject: String,
    seen: String,
    next: impl Into<String>,
) -> Finding {
    Finding {
        invariant,
        severity: Severity::Warning,
        kind,
        subject,
        seen,
        next_step: next.into(),
    }
}

/// I3: operations end with their subject and in their time; at rest each VM is as it was asked to be.
pub(super) fn as_asked(view: &View<'_>) -> Look {
    let state = view.state;
    let active = state.active_operations.values().flatten();
    let active = active.filter_map(|id| state.operations.get(id));
    let mut look = Look::at("VMs and operations", state.vms.len());
    look.unchecked = view.unseen_vms();
    for operation in active {
        look.checked += 1;
        look.findings.extend(without_end(view, operation));
    }
    for vm in state.vms.values() {
        look.findings.extend(unlike_asked(view, vm));
    }
    networks::are_told(view, &mut look);
    backups::are_taken(view, &mut look);
    look.findings.extend(drains_without_end(view));
    look
}

fn without_end(view: &View<'_>, operation: &OperationRecord) -> Option<Finding> {
    let state = view.state;
    let subject = format!("operation {}", operation.id);
    let what = format!("{} of {}", operation.kind.as_str(), operation.vm_name);
    let moves = |id| state.active_migrations.get(&operation.vm) == Some(id);
    let orphan = !state.vms.contains_key(&operation.vm)
        || (operation.kind == OperationKind::Migrate && !operation.migration.as_ref().is_some_and(moves));
    if orphan {
        return Some(Finding {
            severity: Severity::Critical,
            ..warning(
                Invariant::I3,
                "OPERATION_WITHOUT_SUBJECT",
                subject,
                format!("{what} is under way, and what it works on is not there"),
                "this is a defect of Dalgu: report it; `dalgu op cancel ID` may end it",
            )
        });
    }
    let deadline = plan::deadline(operation)?.saturating_add(GRACE).ok()?;
    (view.now > deadline).then(|| {
        let seen = format!(
            "{what} has not ended {} s after it was asked for",
            view.since(operation.create_time).as_secs()
        );
        let next = format!(
            "look at `dalgu vm show {}` and at the controller's log",
            operation.vm_name
        );
        warning(Invariant::I3, "OPERATION_OVERDUE", subject, seen, next)
    })
}

/// A drain ends at its deadline at the latest.
fn drains_without_end(view: &View<'_>) -> Vec<Finding> {
    let overdue = view.state.hosts.values().filter_map(|host| {
        let drain = host.drain.as_ref().filter(|drain| drain.is_active())?;
        let deadline = drain.deadline.saturating_add(GRACE).ok()?;
        (view.now > deadline).then(|| {
            let seen = format!(
                "it has not ended {} s after its deadline",
                view.since(drain.deadline).as_secs()
            );
            let next = format!(
                "look at the controller's log; `dalgu host cancel-drain {}` ends it",
                host.name
            );
            warning(
                Invariant::I3,
                "DRAIN_OVERDUE",
                format!("drain of {}", host.name),
                seen,
                next,
            )
        })
    });
    overdue.collect()
}

fn unlike_asked(view: &View<'_>, vm: &VmRecord) -> Option<Finding> {
    let state = view.state;
    let subject = || format!("vm {}", vm.name);
    let show = format!("`dalgu vm show {}`", vm.name);
    let find = |kind, seen, next: String| Some(warning(Invariant::I3, kind, subject(), seen, next));
    if let Some(asked) = vm
        .delete_time
        .filter(|_| !state.active_operations.contains_key(&vm.id))
    {
        let ago = view.since(asked).as_secs();
        let seen = format!(
            "its deletion was asked for {ago} s ago, and {} has not confirmed it",
            vm.owner
        );
        return find(
            "DELETION_PENDING",
            seen,
            format!("bring {} back: it is deleted then", vm.owner),
        );
    }
    if !view.rests(vm) {
        return None;
    }
    let refusal = state.refusals.get(&vm.id);
    if let Some(refusal) = refusal.filter(|refusal| refusal.generation >= vm.intent.generation) {
        let fault = &refusal.fault;
        let seen = format!(
            "{} refuses what it should be: {} ({})",
            vm.owner, fault.message, fault.reason
        );
        return find(
            "REFUSED",
            seen,
            format!("{show}; ask for something that its host can do"),
        );
    }
    let seen = state.observation(vm)?;
    if seen.accepted < vm.intent.generation {
        let seen = format!(
            "{} has accepted generation {} of what it should be, which is at {}",
            vm.owner, seen.accepted, vm.intent.generation
        );
        let next = format!(
            "the controller cannot reach its agent: compare the address in `dalgu host show {}`, and look at the firewall",
            vm.owner
        );
        return find("NOT_TOLD", seen, next);
    }
    if let Some(fault) = seen
        .fault
        .as_ref()
        .filter(|fault| !fault.retrying && seen.phase == VmPhase::Failed)
    {
        let text = format!("{} has given up: {} ({})", vm.owner, fault.message, fault.reason);
        return find(
            "FAILED",
            text,
            format!(
                "mend the cause, then ask again, for example `dalgu vm start {}`",
                vm.name
            ),
        );
    }
    if !differs(vm, seen) || seen.power_reason == PowerReason::External {
        return None;
    }
    let text = format!(
        "{} on {}, asked to be {}{}",
        word(seen.power),
        vm.owner,
        word(Some(vm.intent.power)),
        why(seen.power_reason)
    );
    let next = match seen.power_reason {
        PowerReason::IoError => format!("make room in its pool, then `dalgu vm resume {}`", vm.name),
        _ => format!("{show}; ask again for what it should be"),
    };
    let finding = warning(Invariant::I3, "NOT_AS_ASKED", subject(), text, next);
    let by_itself =
        seen.power_reason == PowerReason::GuestShutdown && vm.spec.restart_policy != RestartPolicy::Always;
    Some(Finding {
        severity: if by_itself {
            Severity::Notice
        } else {
            finding.severity
        },
        ..finding
    })
}

/// Its host has carried out what it was told, or does not work on it, and it is in another power state.
fn differs(vm: &VmRecord, seen: &Observation) -> bool {
    let busy = seen.phase == VmPhase::Applying && seen.fault.is_none();
    seen.accepted == vm.intent.generation && !busy && seen.power != Some(vm.intent.power)
}

const fn word(power: Option<PowerState>) -> &'static str {
    match power {
        None => "not defined",
        Some(PowerState::Running) => "running",
        Some(PowerState::Paused) => "paused",
        Some(PowerState::Stopped) => "stopped",
    }
}

const fn why(reason: PowerReason) -> &'static str {
    match reason {
        PowerReason::GuestShutdown => ": its guest shut itself down",
        PowerReason::Crashed => ": QEMU ended unexpectedly or the guest panicked",
        PowerReason::IoError => ": an I/O error",
        PowerReason::HostReboot => ": the host was restarted",
        _ => "",
    }
}

/// I7: no VM was started, stopped or paused by somebody else.
pub(super) fn nobody_else(view: &View<'_>) -> Look {
    let state = view.state;
    let mut look = Look::at("VMs", state.vms.len());
    look.unchecked = view.unseen_vms();
    look.limits = "what was changed outside and is as asked again is not seen; `dalgu vm events NAME` has it";
    for vm in state
        .vms
        .values()
        .filter(|vm| vm.delete_time.is_none() && view.rests(vm))
    {
        let Some(seen) = state.observation(vm) else {
            continue;
        };
        if differs(vm, seen) && seen.power_reason == PowerReason::External {
            let text = format!(
                "{} on {}, asked to be {}: somebody changed it outside Dalgu",
                word(seen.power),
                vm.owner,
                word(Some(vm.intent.power))
            );
            let next = match vm.intent.power {
                PowerState::Running => format!(
                    "`dalgu vm start {0}`, or `dalgu vm stop {0}` if that was meant",
                    vm.name
                ),
                PowerState::Stopped => format!(
                    "`dalgu vm stop {0}`, or `dalgu vm start {0}` if that was meant",
                    vm.name
                ),
                PowerState::Paused => format!("`dalgu vm show {}`; ask again for what it should be", vm.name),
            };
            look.findings.push(warning(
                Invariant::I7,
                "CHANGED_OUTSIDE",
                format!("vm {}", vm.name),
                text,
                next,
            ));
        }
    }
    look
}

/// I14: migrations get on, and hosts do not try the same for ever.
pub(super) fn comes_to_rest(view: &View<'_>) -> Look {
    let state = view.state;
    let moving = state.active_migrations.values();
    let moving: Vec<_> = moving.filter_map(|id| state.migrations.get(id)).collect();
    let mut look = Look::at("VMs and migrations", state.vms.len() + moving.len());
    look.unchecked = view.unseen_vms();
    look.limits = "a transfer has no deadline: one of more than an hour is told";
    for migration in moving {
        look.findings.extend(stands_still(view, migration));
    }
    for vm in state.vms.values() {
        let Some(seen) = state.observation(vm) else {
            continue;
        };
        let Some(fault) = seen.fault.as_ref().filter(|fault| fault.retrying) else {
            continue;
        };
        let since = fault.time.map(|time| view.since(time)).unwrap_or_default();
        if since > TRYING {
            look.findings.push(warning(
                Invariant::I14,
                "TRIES_FOR_LONG",
                format!("vm {}", vm.name),
                format!(
                    "{} has tried for {} s: {} ({})",
                    vm.owner,
                    since.as_secs(),
                    fault.message,
                    fault.reason
                ),
                "mend the cause: docs/operations/troubleshooting.md; it is tried again by itself",
            ));
        }
    }
    images::deletions_end(view, &mut look);
    volumes::purges_end(view, &mut look);
    look
}

/// How long a migration may be in a phase; beyond that somebody should look.
const fn patience(phase: Phase) -> Duration {
    match phase {
        Phase::Reserving | Phase::CleaningSource | Phase::CleaningDestination => Duration::from_mins(10),
        Phase::PreparingDestination => Duration::from_mins(5),
        Phase::Transferring => Duration::from_hours(1),
        Phase::CuttingOver => Duration::from_mins(2),
        Phase::Done | Phase::Failed | Phase::Aborted => Duration::MAX,
    }
}

fn stands_still(view: &View<'_>, migration: &MigrationRecord) -> Option<Finding> {
    let vm = view.state.vms.get(&migration.vm);
    let operation = view.state.operations.get(&migration.operation);
    let subject = format!("migration {}", migration.id);
    let Some(vm) = vm.filter(|_| operation.is_some_and(|operation| operation.is_active())) else {
        return Some(Finding {
            severity: Severity::Critical,
            ..warning(
                Invariant::I14,
                "MIGRATION_WITHOUT_SUBJECT",
                subject,
                "it is under way, and its VM or its operation is not".to_owned(),
                "this is a defect of Dalgu: report it",
            )
        });
    };
    let (source, destination) = (&migration.source, &migration.destination);
    let way = format!("{} from {source} to {destination}", vm.name);
    let doubt = view.state.migration_live(migration.id).doubt;
    let since = view.since(migration.phase_time);
    if let Some(doubt) = doubt.filter(|_| migration.phase == Phase::CuttingOver) {
        let seen = format!(
            "where it is, is not known for {} s ({way}): {doubt}",
            since.as_secs()
        );
        let next = "bring that host's agent back; nothing is started meanwhile";
        return Some(warning(
            Invariant::I14,
            "RESOLVING",
            format!("vm {}", vm.name),
            seen,
            next,
        ));
    }
    (since > patience(migration.phase)).then(|| {
        let seen = format!(
            "{way} has been {} for {} s",
            migration.phase.as_str(),
            since.as_secs()
        );
        let next = format!(
            "`dalgu op show {0}` shows its progress; `dalgu op cancel {0}` gives it up until it cuts over",
            migration.operation
        );
        warning(Invariant::I14, "MIGRATION_STANDS", subject, seen, next)
    })
}
