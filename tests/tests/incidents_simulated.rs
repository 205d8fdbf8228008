//! Incidents of other systems, replayed on the deterministic fleet: real controller and agents, simulated hypervisors, one
//! clock that is stepped. Each test is named for one of docs/incidents.md and is one story with nothing else going wrong.
//!
//! The fleet's checker looks on at every step: one copy of each VM, nothing started or stopped against its owner's will,
//! no operation without an end, reservations equal to the sum of the VMs, nothing left of what is gone.

use std::time::Duration;

use dalgu_controller::status::VmState;
use dalgu_tests::fleet::{
    Outcome, Settings,
    fate::{Fate, Kind, Point, Source},
    plan::{Event, Node, Plan, Request, Size, Verb},
    run,
};

/// Nothing happens to any point.
const CALM: Source = Source::Exactly {
    point: u64::MAX,
    fate: Fate::Pass,
};
/// Hosts of each story.
const HOSTS: usize = 2;
/// The first request comes so late: the hosts have registered.
const BEGIN: u64 = 6_000;

/// A request at a time in ms.
fn ask(at: u64, verb: Verb, object: usize) -> (u64, Event) {
    let request = Request {
        verb,
        object,
        other: None,
        retries: 3,
        again: false,
    };
    (at, Event::Request(request))
}

/// As [`ask`], and made once more with the same id although it succeeded.
fn ask_twice(at: u64, verb: Verb, object: usize) -> (u64, Event) {
    match ask(at, verb, object) {
        (at, Event::Request(request)) => (
            at,
            Event::Request(Request {
                again: true,
                ..request
            }),
        ),
        other => other,
    }
}

/// All hosts are cut off from the controller.
fn cut_off(at: u64, seconds: u64) -> impl Iterator<Item = (u64, Event)> {
    (0..HOSTS).map(move |host| {
        let event = Event::Partition {
            from: Node::Controller(0),
            to: Node::Host(host),
            both: true,
            time: Duration::from_secs(seconds),
        };
        (at, event)
    })
}

/// Replays a story with one fault, or none, at the points of the programs. Nothing may be violated.
fn replay(events: &[(u64, Event)], faults: Source) -> Outcome {
    let mut plan: Plan = events
        .iter()
        .map(|(at, event)| (Duration::from_millis(*at), *event))
        .collect();
    plan.sort_by_key(|(time, _)| *time);
    let last = plan.last().map_or(Duration::ZERO, |(time, _)| *time);
    let outcome = run(&Settings {
        seed: 1,
        size: Size {
            hosts: HOSTS,
            vms: 2,
            time: last + Duration::from_secs(30),
            requests: 0,
            faults: 0,
        },
        least_faults: 0,
        faults,
        plan: Some(plan),
        explain: true,
    });
    assert_eq!(outcome.violations, [], "{events:?}");
    outcome
}

/// Replays a story once for each such point and fault.
fn replay_each(
    events: &[(u64, Event)],
    is: impl Fn(&Point) -> bool,
    fates: &[Fate],
) -> Vec<(String, Outcome)> {
    let calm = replay(events, CALM);
    let points = calm.seen.iter().enumerate().filter(|(_, point)| is(point));
    let cells =
        points.flat_map(|(number, point)| fates.iter().map(move |fate| (number as u64, point, *fate)));
    let outcomes: Vec<_> = cells
        .map(|(point, what, fate)| {
            let outcome = replay(events, Source::Exactly { point, fate });
            (format!("{fate:?} at {what:?}"), outcome)
        })
        .collect();
    assert!(!outcomes.is_empty(), "the story has no such point");
    outcomes
}

/// The calls that changed something in a hypervisor.
fn changes(outcome: &Outcome) -> Vec<&'static str> {
    let changes = outcome.seen.iter().filter(|point| point.kind == Kind::Change);
    changes.map(|point| point.name).collect()
}

fn count(outcome: &Outcome, kind: Kind, name: &str) -> usize {
    let same = |point: &&Point| point.kind == kind && point.name == name;
    outcome.seen.iter().filter(same).count()
}

fn ended(outcome: &Outcome, how: &str) -> u64 {
    outcome.operations.get(how).copied().unwrap_or(0)
}

fn shown(outcome: &Outcome, object: usize) -> Option<VmState> {
    outcome.vms.get(&format!("vm-{object}")).copied()
}

fn message(name: &'static str) -> impl Fn(&Point) -> bool {
    move |point| point.kind == Kind::Message && point.name == name
}

#[test]
fn incident_12_a_time_out_before_a_migration_leaves_the_vm_running() {
    let story = [ask(BEGIN, Verb::Create, 0), ask(20_000, Verb::Migrate, 0)];
    let late = [
        Fate::Lose,
        Fate::LoseReply,
        Fate::Fail,
        Fate::Delay(Duration::from_secs(95)),
    ];
    for (case, outcome) in replay_each(&story, message("PrepareMigration"), &late) {
        assert_eq!(shown(&outcome, 0), Some(VmState::Running), "{case}");
        assert_eq!(count(&outcome, Kind::Change, "start"), 1, "{case}: started once");
        assert_eq!(
            count(&outcome, Kind::Change, "destroy"),
            0,
            "{case}: never stopped"
        );
    }
    // Nobody answers for longer than the migration waits.
    let mut story = story.to_vec();
    story.extend(cut_off(19_900, 300));
    story.push(ask(330_000, Verb::Get, 0));
    let outcome = replay(&story, CALM);
    assert_eq!(ended(&outcome, "migrate failed"), 1, "{:?}", outcome.operations);
    assert_eq!(shown(&outcome, 0), Some(VmState::Running));
    assert_eq!(count(&outcome, Kind::Change, "destroy"), 0);
}

#[test]
fn incident_16_a_migrate_command_that_comes_twice_and_late_begins_no_second_migration() {
    let story = [ask(BEGIN, Verb::Create, 0), ask_twice(20_000, Verb::Migrate, 0)];
    let late = [
        Fate::Repeat(Duration::from_secs(1)),
        Fate::Repeat(Duration::from_secs(90)),
        Fate::LoseReply,
    ];
    for name in ["MigrateVm", "PrepareMigration", "StartMigration"] {
        for (case, outcome) in replay_each(&story, message(name), &late) {
            assert_eq!(count(&outcome, Kind::Transfer, "migrate"), 1, "{case}");
            assert_eq!(ended(&outcome, "migrate succeeded"), 1, "{case}");
        }
    }
}

#[test]
fn incident_31_a_controller_or_a_store_that_stands_still_for_ten_minutes_stops_and_recreates_nothing() {
    let ten_minutes = Duration::from_mins(10);
    let quiet = [
        ask(BEGIN, Verb::Create, 0),
        ask(BEGIN, Verb::Create, 1),
        ask(30_000, Verb::Relabel, 0),
        ask(700_000, Verb::ForceStop, 0),
    ];
    let calm = replay(&quiet, CALM);
    assert_eq!(ended(&calm, "create succeeded"), 2);
    let before = changes(&calm);

    let mut frozen = quiet.to_vec();
    let freeze = Event::Freeze {
        node: Node::Controller(0),
        time: ten_minutes,
    };
    frozen.push((40_000, freeze));
    let outcome = replay(&frozen, CALM);
    assert_eq!(changes(&outcome), before, "no VM was touched");
    assert_eq!(
        ended(&outcome, "stop succeeded"),
        1,
        "and then it is in charge again"
    );

    // The write of the label is the first that hangs; all others wait behind it.
    let label = calm
        .seen
        .iter()
        .position(message("UpdateVm"))
        .expect("it was asked");
    let commit = (label..calm.seen.len()).find(|number| calm.seen[*number].kind == Kind::Commit);
    let outcome = replay(
        &quiet,
        Source::Exactly {
            point: commit.expect("a label is stored") as u64,
            fate: Fate::Delay(ten_minutes),
        },
    );
    assert_eq!(outcome.faults.get("store slow"), Some(&1));
    assert_eq!(changes(&outcome), before, "no VM was touched");
    assert_eq!(ended(&outcome, "stop succeeded"), 1);
}

#[test]
fn incident_36_a_restart_after_a_crash_does_not_bring_back_what_is_being_given_up() {
    // Its host has just reported, and tells of what changes a moment later.
    let begin = 5_010;
    let (mut cancelled, mut restarted) = (0, 0);
    for crash in (0..200).step_by(20) {
        for (wait, verb) in [
            (0, Verb::Cancel),
            (15, Verb::Cancel),
            (5, Verb::ForceDelete),
            (120, Verb::ForceDelete),
        ] {
            let story = [
                ask(begin, Verb::Create, 0),
                (begin + crash, Event::GuestCrash { vm: 0 }),
                ask(begin + crash + wait, verb, 0),
            ];
            let outcome = replay(&story, CALM);
            cancelled += ended(&outcome, "create cancelled");
            restarted += u64::from(count(&outcome, Kind::Change, "start") > 1);
            let gone = ended(&outcome, "create cancelled") + ended(&outcome, "delete succeeded") > 0;
            assert_eq!(
                shown(&outcome, 0).is_none(),
                gone,
                "{story:?}: {:?}",
                outcome.operations
            );
        }
    }
    assert!(
        cancelled > 0 && restarted > 0,
        "the race was not run: {cancelled} given up, {restarted} restarted"
    );
}

#[test]
fn incident_37_an_operation_on_a_deleted_vm_ends_and_a_step_that_is_done_can_be_done_again() {
    for verb in [
        Verb::Stop,
        Verb::ForceStop,
        Verb::Pause,
        Verb::Reboot,
        Verb::Reset,
        Verb::Migrate,
    ] {
        // Its host hears of both only when the VM is condemned already.
        let mut story = vec![
            ask(BEGIN, Verb::Create, 0),
            ask_twice(20_500, verb, 0),
            ask_twice(21_500, Verb::ForceDelete, 0),
        ];
        story.extend(cut_off(20_000, 25));
        let outcome = replay(&story, CALM);
        assert_eq!(ended(&outcome, "delete succeeded"), 1, "{verb:?}");
        let open = outcome.operations.keys().find(|how| how.ends_with("active"));
        assert_eq!(open, None, "{verb:?}");
        let all: u64 = outcome.operations.values().sum();
        assert_eq!(all, 3, "{verb:?}: {:?}", outcome.operations);
    }
    let story = [ask(BEGIN, Verb::Create, 0), ask(20_000, Verb::ForceDelete, 0)];
    let again = [
        Fate::LoseReply,
        Fate::Repeat(Duration::from_secs(1)),
        Fate::Repeat(Duration::from_secs(90)),
    ];
    for name in ["EnsureVm", "DeleteVm"] {
        for (case, outcome) in replay_each(&story, message(name), &again) {
            assert_eq!(ended(&outcome, "delete succeeded"), 1, "{case}");
            assert_eq!(shown(&outcome, 0), None, "{case}");
        }
    }
}

#[test]
fn incident_44_after_every_failed_or_deleted_move_reservations_are_the_sum_of_the_vms() {
    let transfer = |point: &Point| point.kind == Kind::Transfer;
    let breaks = [0, 1, 2, 3, 4].map(Fate::Break);
    let mut outcomes = Vec::new();
    let move_only = [ask(BEGIN, Verb::Create, 0), ask(20_000, Verb::Migrate, 0)];
    outcomes.extend(replay_each(&move_only, transfer, &breaks));
    outcomes.extend(replay_each(
        &move_only,
        message("PrepareMigration"),
        &[Fate::LoseReply, Fate::Delay(Duration::from_secs(95))],
    ));
    for verb in [Verb::ForceDelete, Verb::Cancel, Verb::ForceStop] {
        for after in [50, 300, 700, 1_100, 1_600] {
            let mut story = move_only.to_vec();
            story.push(ask(20_000 + after, verb, 0));
            outcomes.push((format!("{verb:?} after {after} ms"), replay(&story, CALM)));
        }
    }
    let failed =
        |outcome: &Outcome| ended(outcome, "migrate failed") + ended(outcome, "migrate cancelled") > 0;
    let count = outcomes.iter().filter(|(_, outcome)| failed(outcome)).count();
    assert!(count > 5, "{count} of {} moves failed", outcomes.len());
    for (case, outcome) in outcomes {
        let checked = outcome
            .checks
            .get("I5 reservations are the sum of specifications");
        assert!(
            checked.is_some_and(|times| *times > 10),
            "{case}: {:?}",
            outcome.checks
        );
    }
}

#[test]
fn incident_46_a_deletion_at_any_step_of_a_creation_leaves_nothing() {
    let mut amid = 0;
    for after in 0..30 {
        let story = [
            ask(BEGIN, Verb::Create, 0),
            ask(BEGIN + after, Verb::ForceDelete, 0),
        ];
        let outcome = replay(&story, CALM);
        // One that overtook the creation found nothing to delete.
        assert_eq!(
            shown(&outcome, 0).is_none(),
            ended(&outcome, "delete succeeded") > 0
        );
        amid += ended(&outcome, "create cancelled");
    }
    assert!(amid > 0, "no deletion came amid a creation");
    // Each step of the creation takes so long that the deletion comes in the middle of it.
    let story = [
        ask(BEGIN, Verb::Create, 0),
        ask(BEGIN + 1_500, Verb::ForceDelete, 0),
    ];
    let creation = |point: &Point| {
        point.kind == Kind::Change && ["create_volumes", "define", "start"].contains(&point.name)
            || point.kind == Kind::Ledger
            || message("EnsureVm")(point)
    };
    let slow = [
        Fate::Delay(Duration::from_secs(4)),
        Fate::Delay(Duration::from_secs(40)),
    ];
    for (case, outcome) in replay_each(&story, creation, &slow) {
        assert_eq!(ended(&outcome, "delete succeeded"), 1, "{case}");
        assert_eq!(shown(&outcome, 0), None, "{case}");
    }
}

#[test]
fn incident_47_a_creation_that_is_delivered_twice_makes_one_vm() {
    let story = [ask_twice(BEGIN, Verb::Create, 0)];
    let once = changes(&replay(&[ask(BEGIN, Verb::Create, 0)], CALM));
    let twice = [
        Fate::Pass,
        Fate::LoseReply,
        Fate::Repeat(Duration::from_secs(1)),
        Fate::Repeat(Duration::from_secs(30)),
    ];
    for name in ["CreateVm", "EnsureVm"] {
        for (case, outcome) in replay_each(&story, message(name), &twice) {
            assert_eq!(changes(&outcome), once, "{case}");
            assert_eq!(ended(&outcome, "create succeeded"), 1, "{case}");
            assert_eq!(outcome.vms.len(), 1, "{case}");
        }
    }
}

#[test]
fn incident_52_a_clock_that_jumps_ten_minutes_changes_no_host_and_no_vm() {
    let quiet = [
        ask(BEGIN, Verb::Create, 0),
        ask(BEGIN, Verb::Create, 1),
        ask(120_000, Verb::ForceStop, 0),
    ];
    let calm = replay(&quiet, CALM);
    assert_eq!(shown(&calm, 1), Some(VmState::Running));
    for node in [Node::Controller(0), Node::Host(0), Node::Host(1)] {
        for seconds in [600, -600] {
            let mut story = quiet.to_vec();
            story.push((30_000, Event::ClockJump { node, seconds }));
            story.push((
                90_000,
                Event::ClockJump {
                    node,
                    seconds: -seconds,
                },
            ));
            let outcome = replay(&story, CALM);
            assert_eq!(changes(&outcome), changes(&calm), "{node} by {seconds} s");
            let entered = |outcome: &Outcome| count(outcome, Kind::Message, "Register");
            assert_eq!(
                entered(&outcome),
                entered(&calm),
                "{node} by {seconds} s: a host was lost"
            );
            assert_eq!(outcome.vms, calm.vms);
            assert_eq!(ended(&outcome, "stop succeeded"), 1);
        }
    }
}
