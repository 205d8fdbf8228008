//! The simulator on traces small enough to be reckoned by hand.

use std::{fs, io::Write as _};

use clap::Parser;
use flate2::{Compression, write::GzEncoder};

use super::{
    chart,
    city::{self, Assumptions, Server},
    command,
    field::Shape,
    trace::{Error, Size, Trace},
    *,
};

const HOST: Shape = Shape {
    cpus: 16,
    memory_mib: 65_536,
    cpu_overcommit: 1.0,
};
/// Two fill a host; the third needs another; the fourth is larger than any.
const TRACE: &str = "arrival_s,departure_s,vcpus,memory_mib\n\
    0,600,8,16384\n0,,8,16384\n300,900,16,32768\n300,,20,1024\n";

fn trace(text: &str) -> Trace {
    Trace::read(text.as_bytes()).unwrap()
}

fn refusal(text: &str) -> String {
    Trace::read(text.as_bytes()).unwrap_err().to_string()
}

fn settings(hosts: usize, shape: Shape) -> Settings {
    Settings {
        hosts,
        shape,
        contended_from: 0.9,
        round_s: 1800,
        moves: 20,
    }
}

#[track_caller]
fn close(value: f64, expected: f64) {
    assert!((value - expected).abs() < 1e-3, "{value}, not {expected}");
}

#[test]
fn a_trace_of_ours_is_read_with_its_columns_in_any_order() {
    let read = trace(
        "system,vcpus,memory_mib,arrival_s,departure_s,cpu_percent,memory_percent\n\
         # what follows is a comment\n\
         tax, 2, 4096, 300, 3900, 10;50, 25\n\
         ,1,512,0,,,\n",
    );
    assert_eq!((read.start_s, read.end_s, read.vms.len()), (0, 3900, 2));
    let vm = &read.vms[0];
    assert_eq!(vm.system.as_deref(), Some("tax"));
    assert_eq!((vm.size.vcpus, vm.size.memory_mib), (2, 4096));
    let used = [300, 599, 600, 900].map(|at_s| vm.cpus_used(at_s));
    used.iter()
        .zip([0.2, 0.2, 1.0, 0.2])
        .for_each(|(a, b)| close(*a, b));
    close(vm.memory_mib_used(3000), 1024.0);
    assert_eq!((read.vms[1].system.as_deref(), read.vms[1].leave_s), (None, None));
}

#[test]
fn a_trace_of_azure_is_read_with_the_middle_of_each_lifetime_and_ends_with_its_last_arrival() {
    let read = trace(
        "vm_id,arrive_s,vcpu,mem_gb,dur_lo_s,dur_hi_s,censored\n\
         a,0,32,1.75,100,300,0\nb,600,32,140,0,0,1\n",
    );
    assert_eq!(read.vms[0].size.memory_mib, 1792);
    assert_eq!((read.vms[0].leave_s, read.vms[1].leave_s), (Some(200), None));
    assert_eq!(read.end_s, 900);
}

#[test]
fn a_trace_of_bitbrains_is_read_with_the_most_that_each_vm_had_and_what_it_used_of_that() {
    let read = trace(
        "vm,t,cores,cpu_cap_mhz,cpu_use_mhz,mem_cap_mib,mem_use_mib,disk_r_kbs\n\
         7,1,2,4000,1000,1000,500,0\n7,3,4,8000,2000,2000,500,0\n8,0,1,2000,0,100,0,0\n",
    );
    let [first, second] = read.vms.as_slice() else {
        panic!("two VMs")
    };
    assert_eq!(
        (first.size.vcpus, first.size.memory_mib, first.arrive_s),
        (4, 2000, 300)
    );
    // The sample that is missing is as the one before.
    let used = [300, 600, 900].map(|at_s| first.cpus_used(at_s));
    used.iter().zip([0.5, 0.5, 1.0]).for_each(|(a, b)| close(*a, b));
    close(first.memory_mib_used(900), 500.0);
    assert_eq!(
        (first.leave_s, second.leave_s, read.end_s),
        (None, Some(300), 1200)
    );
}

#[test]
fn what_cannot_be_read_is_told_with_its_line_and_what_would_do() {
    assert!(matches!(Trace::read("".as_bytes()), Err(Error::Empty)));
    assert!(matches!(
        Trace::read("arrival_s,departure_s,vcpus,memory_mib\n".as_bytes()),
        Err(Error::NoVm)
    ));
    assert_eq!(
        refusal("when,size\n1,2\n"),
        "line 1: no known format has the columns \"when,size\"; a trace of Dalgu's has at least \
         \"arrival_s,departure_s,vcpus,memory_mib\""
    );
    let ours = |line: &str| refusal(&format!("{TRACE}{line}\n"));
    assert_eq!(
        ours("soon,,1,1024"),
        "line 6: arrival_s is \"soon\", but must be a whole number of seconds"
    );
    assert_eq!(
        ours("600,600,1,1024"),
        "line 6: departure_s is \"600\", but must be a whole number of seconds after arrival_s, or empty where the VM stays"
    );
    assert_eq!(
        ours("0,,0,1024"),
        "line 6: vcpus is \"0\", but must be a whole number of virtual processors from 1 to 4096"
    );
    assert_eq!(
        ours("0,,1,0.5"),
        "line 6: memory_mib is \"0.5\", but must be a whole number of MiB, at least 1"
    );
    assert_eq!(
        refusal("arrival_s,departure_s,vcpus,memory_mib,cpu_percent\n0,,1,1024,10;130\n"),
        "line 2: cpu_percent is \"10;130\", but must be percentages from 0 to 100 with ; between them, as in 12;30.5;8, or empty"
    );
    assert!(matches!(
        Trace::read(format!("{TRACE}0,,1\n").as_bytes()),
        Err(Error::Csv(error)) if error.position().is_some_and(|place| place.line() == 6)
    ));
    let twice = "vm,t,cores,cpu_cap_mhz,cpu_use_mhz,mem_cap_mib,mem_use_mib\n7,1,1,1,1,1,1\n7,1,1,1,1,1,1\n";
    assert_eq!(
        refusal(twice),
        "line 3: t is \"1\", but must be the number of a sample, later than the one of the same VM before"
    );
}

#[test]
fn a_trace_that_is_longer_than_what_is_replayed_is_refused_before_anything_is_made_of_it() {
    let too_long = |text: &str| match Trace::read(text.as_bytes()) {
        Err(Error::TooLong { days }) => Some(days),
        Ok(_) => None,
        Err(error) => panic!("{error}"),
    };
    let day_s = 24 * 3600;
    let ours = |end_s: u64| too_long(&format!("{TRACE}100,{end_s},1,1024\n"));
    assert_eq!(ours(366 * day_s), None);
    assert_eq!(ours(366 * day_s + 1), Some(367));
    assert_eq!(ours(999_999_999_999_999), Some(11_574_074_075));
    let azure = "arrive_s,vcpu,mem_gb,dur_lo_s,dur_hi_s,censored\n0,1,1,0,9e14,0\n";
    // It ends with its last arrival, however long a VM would live.
    assert_eq!(too_long(azure), None);
    assert_eq!(
        too_long(&format!("{azure}900000000000000,1,1,0,1,0\n")),
        Some(10_416_666_667)
    );
    let bitbrains = |sample: u64| {
        let head = "vm,t,cores,cpu_cap_mhz,cpu_use_mhz,mem_cap_mib,mem_use_mib";
        too_long(&format!("{head}\n7,0,1,1,1,1,1\n7,{sample},1,1,1,1,1\n"))
    };
    assert_eq!(bitbrains(366 * 288 - 1), None);
    assert_eq!(bitbrains(366 * 288), Some(367));
    assert_eq!(bitbrains(999_999_999_999_999), Some(3_472_222_222_223));
    assert!(
        refusal(&format!("{TRACE}100,31622401,1,1024\n")).starts_with(
            "the trace spans 367 days, from its first arrival to its last departure or sample, and no more than 366 are replayed: see that"
        )
    );
}

#[test]
fn a_replay_comes_to_what_is_reckoned_by_hand() {
    let outcome = replay(&trace(TRACE), &settings(2, HOST), Contender::Pack);
    assert_eq!((outcome.accepted, outcome.refused, outcome.peak_hosts), (3, 1, 2));
    assert_eq!((outcome.moves, outcome.contended_percent), (0, None));
    // One host for 300 s, two for 600 s; 16, 32 and 24 processors, 300 s each.
    close(outcome.host_hours, 1500.0 / 3600.0);
    close(outcome.cpu_percent, 90.0);
    close(outcome.memory_percent, 45.0);
    let points: Vec<_> = outcome
        .series
        .iter()
        .map(|point| (point.hosts, point.refused))
        .collect();
    assert_eq!(points, [(1, 0), (2, 1), (2, 1)]);
    let fragmented = outcome.series.iter().map(|point| point.fragmentation_percent);
    fragmented
        .zip([40.0, 100.0, 64.285_7])
        .for_each(|(value, expected)| close(value, expected));
    close(outcome.fragmentation_percent, 68.095_2);
}

#[test]
fn spread_uses_both_hosts_and_refuses_what_pack_has_room_for() {
    let outcome = replay(&trace(TRACE), &settings(2, HOST), Contender::Spread);
    assert_eq!((outcome.accepted, outcome.refused, outcome.peak_hosts), (2, 2, 2));
}

#[test]
fn consolidation_empties_a_host_and_its_moves_are_counted() {
    let text = "arrival_s,departure_s,vcpus,memory_mib\n\
        0,600,8,16384\n0,7200,8,16384\n0,600,8,16384\n0,,8,16384\n";
    let pack = replay(&trace(text), &settings(4, HOST), Contender::Pack);
    let moved = replay(&trace(text), &settings(4, HOST), Contender::Consolidate);
    let last = |outcome: &Outcome| outcome.series.last().unwrap().hosts;
    assert_eq!((pack.moves, last(&pack)), (0, 2));
    assert_eq!((moved.moves, last(&moved)), (1, 1));
    close(moved.moved_gib, 16.0);
    assert!(moved.host_hours < pack.host_hours);
}

#[test]
fn room_is_made_for_a_vm_that_finds_none_within_the_moves_of_a_round() {
    // Three hosts with 10, 10 and 6 processors of 16 taken: one with 12 fits on none, until the last one's VM is beside another.
    let text = "arrival_s,departure_s,vcpus,memory_mib\n\
        0,,10,16384\n0,600,6,16384\n0,,10,16384\n0,600,6,16384\n0,,6,8192\n1200,,12,16384\n";
    let host = Shape {
        cpus: 16,
        memory_mib: 65_536,
        cpu_overcommit: 1.0,
    };
    let hosts = settings(3, host);
    let pack = replay(&trace(text), &hosts, Contender::Pack);
    let made = replay(&trace(text), &hosts, Contender::MakeRoom);
    assert_eq!((pack.refused, pack.moves), (1, 0));
    assert_eq!((made.refused, made.moves), (0, 1));
    let none = Settings { moves: 0, ..hosts };
    assert_eq!(replay(&trace(text), &none, Contender::MakeRoom).refused, 1);
}

#[test]
fn contended_hosts_are_relieved_by_the_planner_and_not_by_placement() {
    let text = "arrival_s,departure_s,vcpus,memory_mib,cpu_percent\n\
        0,,4,1024,0\n0,86400,2,1024,90\n0,,2,1024,90\n0,,2,1024,0\n0,,2,1024,90\n";
    let host = Shape {
        cpus: 4,
        memory_mib: 65_536,
        cpu_overcommit: 4.0,
    };
    let spread = replay(&trace(text), &settings(2, host), Contender::Spread);
    let relieved = replay(&trace(text), &settings(2, host), Contender::Rebalance);
    close(spread.contended_percent.unwrap(), 50.0);
    assert!(relieved.moves >= 1, "{}", relieved.moves);
    assert!(
        relieved.contended_percent.unwrap() < 2.0,
        "{:?}",
        relieved.contended_percent
    );
}

#[test]
fn balancing_as_ganeti_does_evens_out_what_departures_left() {
    let text = "arrival_s,departure_s,vcpus,memory_mib\n\
        0,7200,2,4096\n0,600,2,4096\n0,,2,4096\n0,600,2,4096\n";
    let hail = replay(&trace(text), &settings(2, HOST), Contender::Hail);
    let hbal = replay(&trace(text), &settings(2, HOST), Contender::Hbal);
    let last = |outcome: &Outcome| outcome.series.last().unwrap().hosts;
    assert_eq!((hail.moves, last(&hail)), (0, 1));
    assert_eq!((hbal.moves, last(&hbal)), (1, 2));
}

#[test]
fn a_chart_has_a_line_for_each_policy_in_each_panel() {
    let outcomes = [Contender::Pack, Contender::Spread]
        .map(|contender| replay(&trace(TRACE), &settings(2, HOST), contender));
    let svg = chart::draw("4 VMs", &outcomes).unwrap();
    assert!(
        svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"),
        "{svg}"
    );
    for text in [
        "4 VMs",
        "Hosts in use",
        "Fragmentation",
        "VMs refused so far",
        "pack",
        "spread",
    ] {
        assert!(svg.contains(text), "{text}");
    }
    for absent in ["Moves so far", "contended", "NaN", "inf"] {
        assert!(!svg.contains(absent), "{absent}");
    }
    // Blue and vermilion: five panels and the head.
    for colour in ["#0072B2", "#D55E00"] {
        assert_eq!(
            svg.matches(&format!("stroke=\"{colour}\"")).count(),
            6,
            "{colour}"
        );
    }
}

/// The command line as the program has it.
#[derive(Debug, Parser)]
struct Program {
    #[command(flatten)]
    arguments: command::Arguments,
}

fn simulate(words: &[&str]) -> Result<String, String> {
    let program =
        Program::try_parse_from(["simulate"].iter().chain(words)).map_err(|error| error.to_string())?;
    command::run(&program.arguments).map_err(|error| {
        let source = std::error::Error::source(&error).map(|source| format!(": {source}"));
        format!("{error}{}", source.unwrap_or_default())
    })
}

#[test]
fn the_command_compares_policies_on_a_compressed_trace_and_writes_chart_and_json() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let mut gz = GzEncoder::new(fs::File::create(file("t.csv.gz")).unwrap(), Compression::fast());
    gz.write_all(TRACE.as_bytes()).unwrap();
    gz.finish().unwrap();
    let (from, out, json) = (file("t.csv.gz"), file("r.svg"), file("r.json"));
    let words = [
        "--trace",
        &from,
        "--policy",
        "pack,default,nova,spread",
        "--out",
        &out,
        "--json",
        &json,
    ];
    let shown = simulate(
        &[
            &words[..],
            &["--hosts", "3", "--host-vcpus", "20", "--host-memory", "64GiB"],
        ]
        .concat(),
    );
    insta::assert_snapshot!(shown.unwrap(), @r"
    4 VMs on 3 hosts of 20 processors and 64 GiB

    POLICY  ACCEPTED  REFUSED  PEAK HOSTS  CPU %  MEMORY %  FRAGMENTED %  MOVES  MOVED GiB  HOST-HOURS  CONTENDED %
    pack           4        0           3   80.0      32.6          64.2      0          0           1            -
    spread         3        1           3   51.4      32.1          41.0      0          0           1            -
    nova           3        1           3   51.4      32.1          41.0      0          0           1            -
    ");
    assert!(fs::read_to_string(out).unwrap().contains("nova"));
    let report: serde_json::Value = serde_json::from_str(&fs::read_to_string(json).unwrap()).unwrap();
    assert_eq!(report["outcomes"][0]["series"].as_array().unwrap().len(), 3);
    assert_eq!(report["outcomes"][2]["policy"], "nova");
}

#[test]
fn the_command_refuses_what_cannot_be_and_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.csv");
    fs::write(&path, TRACE).unwrap();
    let from = path.to_str().unwrap();
    assert_eq!(
        simulate(&["--trace", from, "--host-vcpus", "16"]).unwrap_err(),
        "a VM of the trace has 20 vCPUs and 1024 MiB, and a host no more than 16 and 163840: give --host-vcpus and --host-memory"
    );
    assert!(
        simulate(&["--trace", "/nowhere"])
            .unwrap_err()
            .starts_with("cannot read /nowhere: ")
    );
    for (word, value, told) in [
        ("--host-memory", "160", "write a whole number with MiB or GiB"),
        ("--cpu-overcommit", "0", "is not a ratio"),
        ("--round", "1s", "at least 5 minutes"),
        ("--policy", "best", "possible values"),
        ("--hosts", "0", "not in 1..=1000000"),
    ] {
        let error = simulate(&["--trace", from, word, value]).unwrap_err();
        assert!(error.contains(told), "{word} {value}: {error}");
    }
    let error = simulate(&["--trace", from, "--city", "--hosts", "3"]).unwrap_err();
    assert!(error.contains("cannot be used with"), "{error}");
}

/// Two weeks of VMs of a core: `vms` of them, each busy in its own hour of the day but for one that is busy in the second week alone.
fn two_weeks(vms: usize) -> String {
    let mut text = "arrival_s,departure_s,vcpus,memory_mib,cpu_percent,memory_percent\n".to_owned();
    for vm in 0..vms {
        let busy = |step: usize| match (vm, step / 12) {
            (0, hour) => hour >= 168,
            (vm, hour) => hour % 24 == vm % 24,
        };
        let percents: Vec<_> = (0..2 * 168 * 12)
            .map(|step| if busy(step) { "90" } else { "10" })
            .collect();
        text += &format!("0,,1,1024,{},10\n", percents.join(";"));
    }
    text
}

#[test]
fn overcommit_by_forecast_puts_more_vms_on_a_host_and_sees_what_it_did_not_expect() {
    let settings = overcommit::Settings {
        shape: Shape {
            cpus: 4,
            memory_mib: 65_536,
            cpu_overcommit: 1.0,
        },
        place: 0.85,
        relieve: 0.9,
        contended_from: 0.9,
    };
    let outcome = overcommit::overcommit(&trace(&two_weeks(24)), &settings).unwrap();
    // 24 cores on hosts of four; but only one VM at a time is busy: 0.9 and 23 times 0.1 of a core, 3.2 of 4 on one host.
    assert_eq!((outcome.hosts_reserved, outcome.hosts_peak), (6, 2));
    assert!(outcome.times.0 >= 3.0, "{outcome:?}");
    // The first one was not busy in the week that was seen. In its first hour no other is, in its second one is: 4 cores of 4, for the one hour of
    // 2 + 2 · 166 that hosts are in use. Then it gets a host of its own.
    assert_eq!(outcome.moves, 1, "{outcome:?}");
    close(outcome.exceeded_percent, 100.0 / 334.0);
    close(outcome.contended_percent, 100.0 / 334.0);
    let short = "arrival_s,departure_s,vcpus,memory_mib,cpu_percent\n0,604800,1,1024,5\n";
    for (text, refused) in [
        (
            TRACE,
            "the trace does not say what VMs use: it needs cpu_percent or memory_percent",
        ),
        (
            short,
            "the trace is 168 hours long: over-commit by forecast looks at a week, 168 hours, before it begins",
        ),
    ] {
        let error = overcommit::overcommit(&trace(text), &settings).unwrap_err();
        assert_eq!(error.to_string(), refused);
    }
}

#[test]
fn the_forecast_of_a_peak_is_judged_beside_simple_rules_and_knows_what_came_a_week_ago() {
    // Twenty VMs, one of which begins to be busy with the second week.
    let rows = forecast::judge(&trace(&two_weeks(20)));
    let of = |rule: &str| rows.iter().find(|row| row.rule.starts_with(rule)).unwrap();
    let (ours, day, oracle) = (
        of("the planner's"),
        of("highest of a day"),
        of("what it comes to"),
    );
    close(oracle.exceeded, 0.0);
    // Of 20 cores, four times 0.1 in the hours of no VM but the first, and so on: what is expected is never below what it comes to.
    assert!(ours.expected_of_limit >= oracle.expected_of_limit, "{rows:?}");
    // The first VM is busy in every hour of the second week: in the hour after its first one another is busy too, which none of the two could know.
    close(ours.exceeded, 1.0 / 168.0);
    close(day.exceeded, 1.0 / 168.0);
    assert!(of("highest of the last hour").exceeded > 0.01, "{rows:?}");
    // A trace of a day has nothing to be judged by.
    assert_eq!(forecast::judge(&trace(TRACE)), []);
}

fn server(name: &str, cpus: u32, memory_gib: u64, price: f64) -> Server {
    Server {
        name: name.to_owned(),
        cpus,
        memory_gib,
        idle_watts: 100.0,
        busy_watts: 300.0,
        price,
    }
}

/// Servers of 10 and 30, fields of the larger; power and the room's share in round numbers.
fn assumptions() -> Assumptions {
    Assumptions {
        systems: 2,
        own: vec![server("small", 4, 16, 10.0), server("large", 16, 64, 30.0)],
        own_reserve: 1,
        shared: server("large", 16, 64, 30.0),
        shared_reserve: 1,
        used_percent: 50.0,
        currency: "coins".to_owned(),
        kwh_price: 0.0,
        pue: 2.0,
        years: 5.0,
        upkeep_percent: 10.0,
        place_price: 1.0,
        ..Assumptions::default()
    }
}

#[test]
fn the_citys_bills_come_to_what_is_reckoned_by_hand() {
    // Each system has a VM that a small server holds; the second one has one for a large server besides.
    let text = "system,arrival_s,departure_s,vcpus,memory_mib\n\
        tax,0,3600,4,4096\nroads,0,,4,4096\nroads,0,,8,4096\n";
    let figure = city::figure(&trace(text), &assumptions()).unwrap();
    assert_eq!((figure.systems, figure.vms), (2, 3));
    close(figure.cpus_used, 8.0);
    // Tax: 1 + 1 small ones. Roads: 1 + 1 large ones. The field: 1 + 1 large ones.
    assert_eq!(
        (
            figure.own.hosts,
            figure.own_without_reserve.hosts,
            figure.shared.hosts
        ),
        (4, 2, 2)
    );
    // A small one: 10/5 + 1 + 1 a year; a large one: 30/5 + 3 + 1.
    close(figure.own.cost_a_year, 2.0 * 4.0 + 2.0 * 10.0);
    close(figure.shared.cost_a_year, 20.0);
    // 8 of 32 processors: a quarter between 100 and 300 W, twice for the room.
    close(figure.shared.kwh_a_year, 2.0 * 150.0 * 8.76 * 2.0);
    let shown = city::show(&assumptions(), &figure);
    assert!(shown.contains("the cost to beat: 42.4 %"), "{shown}");
    assert!(shown.contains("used_percent = 50.0"), "{shown}");
    assert!(shown.contains("28.6"), "the cost saved, of 28: {shown}");
}

#[test]
fn vms_of_no_system_are_dealt_in_turn_and_what_fits_on_no_server_is_refused() {
    let text = "arrival_s,departure_s,vcpus,memory_mib\n0,3600,4,4096\n0,,4,4096\n0,,4,4096\n";
    assert_eq!(city::figure(&trace(text), &assumptions()).unwrap().systems, 2);
    let large = format!("{text}0,,17,1024\n");
    assert!(matches!(
        city::figure(&trace(&large), &assumptions()),
        Err(city::Error::TooLarge {
            vm: Size { vcpus: 17, .. },
            whose: "a system's own"
        })
    ));
}

#[test]
fn assumptions_are_read_over_the_defaults_and_refused_with_the_key() {
    let read = Assumptions::parse(
        "systems = 3\n[shared]\nname = \"x\"\ncpus = 8\nmemory_gib = 8\nidle_watts = 1\nbusy_watts = 2\nprice = 3\n",
    );
    let read = read.unwrap();
    assert_eq!((read.systems, read.shared.cpus, read.own.len()), (3, 8, 3));
    let text = toml::to_string(&Assumptions::default()).unwrap();
    assert_eq!(Assumptions::parse(&text).unwrap(), Assumptions::default());
    let refused = |text: &str| Assumptions::parse(text).unwrap_err().to_string();
    assert_eq!(refused("years = 0.0"), "years = 0: must be a number above 0");
    assert_eq!(
        refused("kwh_price = -1.0"),
        "kwh_price = -1: must be a number that is not negative"
    );
    assert_eq!(refused("systems = 0"), "systems = 0: must be at least 1");
    assert!(matches!(
        Assumptions::parse("hosts = 1"),
        Err(city::Error::Syntax(_))
    ));
}
