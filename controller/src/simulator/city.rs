//! The city's figure: what the systems of a trace take each on servers of its own, and all of them on the shared field.
//!
//! Both sides hold the same VMs of the same trace, placed by the same engine (`pack`), with the fewest servers on which every VM finds a
//! place whenever it comes. A system buys one model of server, whichever is cheapest for it. Either side may keep servers in reserve.
//!
//! ```text
//!   energy a year  =  (servers · idle watts + busy servers' worth of load · (busy − idle watts)) · 8760 h · PUE
//!   cost a year    =  servers · (price / years + upkeep + place)  +  energy · price of a kWh
//! ```
//!
//! Every server is on all the time, reserves too; power rises in proportion to use. What the numbers are is in [`Assumptions`], and is printed with the figure.
//! Called by the command. Pure.

use std::{collections::BTreeMap, fmt::Write as _};

use serde::{Deserialize, Serialize};

use super::{
    Contender, Outcome, Settings,
    field::{self, Shape},
    replay, table,
    trace::{STEP_S, Size, Trace},
};

/// Hours of a year.
const YEAR_H: f64 = 8760.0;
/// What was said of the city's field before this one: the row to beat.
pub const TO_BEAT_PERCENT: f64 = 42.4;

/// Why the figure cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is no TOML, or has a key or a type that is not known.
    #[error("they cannot be understood")]
    Syntax(#[from] toml::de::Error),
    /// A value is out of range.
    #[error("{key} = {value}: must be {allowed}")]
    Value {
        /// The key.
        key: String,
        /// What it is.
        value: String,
        /// What is allowed.
        allowed: &'static str,
    },
    /// A VM fits on no server.
    #[error(
        "a VM of {} vCPUs and {} MiB fits on no server of {whose}: give a larger one in --assumptions",
        .vm.vcpus, .vm.memory_mib
    )]
    TooLarge {
        /// The VM.
        vm: Size,
        /// Whose servers these are.
        whose: &'static str,
    },
}

/// A model of server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Server {
    /// What it is called.
    pub name: String,
    /// Logical processors.
    pub cpus: u32,
    /// Memory for VMs, in GiB.
    pub memory_gib: u64,
    /// Watts when it does nothing.
    pub idle_watts: f64,
    /// Watts when all its processors are busy.
    pub busy_watts: f64,
    /// What it costs to buy.
    pub price: f64,
}

/// What the figure rests on. Anybody's own figures go into a file; these are round numbers, not quotations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Assumptions {
    /// Systems that the VMs are dealt to in turn, where the trace does not say whose each is.
    pub systems: u32,
    /// Servers that a system may buy.
    pub own: Vec<Server>,
    /// Servers that each system keeps in reserve.
    pub own_reserve: u32,
    /// The hosts of the shared field.
    pub shared: Server,
    /// Hosts that the field keeps in reserve.
    pub shared_reserve: u32,
    /// Virtual processors reserved per logical one on a system's own servers.
    pub own_cpu_overcommit: f64,
    /// The same on the shared field.
    pub shared_cpu_overcommit: f64,
    /// What VMs use of the processors they reserve, in percent, where the trace does not say.
    pub used_percent: f64,
    /// What money is counted in.
    pub currency: String,
    /// Price of a kilowatt-hour.
    pub kwh_price: f64,
    /// What the room takes for each watt of a server (PUE).
    pub pue: f64,
    /// Years that a server is used.
    pub years: f64,
    /// Upkeep of a server a year, in percent of its price.
    pub upkeep_percent: f64,
    /// Place in a rack, network ports and hands for a server, a year.
    pub place_price: f64,
}

impl Default for Assumptions {
    fn default() -> Self {
        let server = |name: &str, cpus, memory_gib, watts: (f64, f64), price| Server {
            name: name.to_owned(),
            cpus,
            memory_gib,
            idle_watts: watts.0,
            busy_watts: watts.1,
            price,
        };
        let large = server("large", 64, 512, (200.0, 650.0), 24e6);
        Self {
            systems: 78,
            own: vec![
                server("small", 16, 64, (90.0, 250.0), 7e6),
                server("medium", 32, 256, (130.0, 400.0), 14e6),
                large.clone(),
            ],
            own_reserve: 1,
            shared: large,
            shared_reserve: 1,
            own_cpu_overcommit: 1.0,
            shared_cpu_overcommit: 1.0,
            used_percent: 15.0,
            currency: "KRW".to_owned(),
            kwh_price: 150.0,
            pue: 1.6,
            years: 5.0,
            upkeep_percent: 10.0,
            place_price: 1e6,
        }
    }
}

impl Assumptions {
    /// Reads assumptions; what is not given is as by default.
    ///
    /// # Errors
    /// If they are no TOML, or a value is out of range.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let assumptions: Self = toml::from_str(text)?;
        assumptions.check()?;
        Ok(assumptions)
    }

    fn check(&self) -> Result<(), Error> {
        let value = |key: String, value: String, allowed| Err(Error::Value { key, value, allowed });
        if self.systems == 0 {
            return value("systems".into(), "0".into(), "at least 1");
        }
        if self.own.is_empty() {
            return value("own".into(), "[]".into(), "at least one server");
        }
        let positive = [
            ("own_cpu_overcommit", self.own_cpu_overcommit),
            ("shared_cpu_overcommit", self.shared_cpu_overcommit),
            ("pue", self.pue),
            ("years", self.years),
        ];
        if let Some((key, found)) = positive
            .iter()
            .find(|(_, value)| !(*value > 0.0 && value.is_finite()))
        {
            return value((*key).into(), found.to_string(), "a number above 0");
        }
        let amounts = [
            ("used_percent", self.used_percent),
            ("kwh_price", self.kwh_price),
            ("upkeep_percent", self.upkeep_percent),
            ("place_price", self.place_price),
        ];
        let bad = |value: f64| !(value >= 0.0 && value.is_finite());
        if let Some((key, found)) = amounts.iter().find(|(_, value)| bad(*value)) {
            return value((*key).into(), found.to_string(), "a number that is not negative");
        }
        for server in self.own.iter().chain([&self.shared]) {
            let key = |key: &str| format!("{key} of server {:?}", server.name);
            if server.cpus == 0 || server.memory_gib == 0 || server.memory_gib > 1 << 20 {
                let size = format!("{}, {}", server.cpus, server.memory_gib);
                return value(
                    key("cpus, memory_gib"),
                    size,
                    "at least 1 each, and at most 1048576 GiB",
                );
            }
            if bad(server.price) || bad(server.idle_watts) || bad(server.busy_watts - server.idle_watts) {
                let found = format!("{}, {}, {}", server.price, server.idle_watts, server.busy_watts);
                return value(
                    key("price, idle_watts, busy_watts"),
                    found,
                    "not negative, and no fewer watts when busy",
                );
            }
        }
        Ok(())
    }
}

/// What one side takes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Bill {
    /// Servers of each model, reserves too.
    pub servers: BTreeMap<String, usize>,
    /// All of them.
    pub hosts: usize,
    /// Kilowatt-hours a year, with what the room takes.
    pub kwh_a_year: f64,
    /// What it costs a year.
    pub cost_a_year: f64,
}

/// The figure.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figure {
    /// Systems that there are.
    pub systems: usize,
    /// Their VMs.
    pub vms: usize,
    /// Processors that all VMs use together, over time.
    pub cpus_used: f64,
    /// Each on its own servers, with those it keeps in reserve.
    pub own: Bill,
    /// The same without any in reserve, as systems often have it.
    pub own_without_reserve: Bill,
    /// On the shared field.
    pub shared: Bill,
    /// How the trace went on the field's hosts without those in reserve.
    #[serde(skip)]
    pub field: Outcome,
}

/// Makes both bills.
///
/// # Errors
/// If a VM fits on no server of a side.
pub fn figure(trace: &Trace, assumptions: &Assumptions) -> Result<Figure, Error> {
    let systems = systems(trace, assumptions.systems);
    let cpus_used = cpus_used(trace, assumptions.used_percent / 100.0);
    let mut bought = Vec::with_capacity(systems.len());
    for system in systems.values() {
        bought.push(cheapest(&trace.only(system.iter().copied()), assumptions)?);
    }
    let own = |reserve: u32| {
        let with = |(server, count): &(usize, usize)| (&assumptions.own[*server], count + reserve as usize);
        bill(bought.iter().map(with), cpus_used, assumptions)
    };
    let shape = shape(&assumptions.shared, assumptions.shared_cpu_overcommit);
    let hosts = needed(trace, &shape, "the shared field")?;
    let settings = Settings {
        hosts,
        shape,
        contended_from: 0.9,
        round_s: u64::MAX / 2,
        moves: 0,
    };
    let shared = (&assumptions.shared, hosts + assumptions.shared_reserve as usize);
    Ok(Figure {
        systems: systems.len(),
        vms: trace.vms.len(),
        cpus_used,
        own: own(assumptions.own_reserve),
        own_without_reserve: own(0),
        shared: bill([shared].into_iter(), cpus_used, assumptions),
        field: replay(trace, &settings, Contender::Pack),
    })
}

/// The VMs of each system, by its name or number.
fn systems(trace: &Trace, count: u32) -> BTreeMap<String, Vec<usize>> {
    let mut systems = BTreeMap::<String, Vec<usize>>::new();
    for (index, vm) in trace.vms.iter().enumerate() {
        let dealt = || format!("system {}", index % count as usize);
        let name = vm.system.clone().unwrap_or_else(dealt);
        systems.entry(name).or_default().push(index);
    }
    systems
}

fn shape(server: &Server, cpu_overcommit: f64) -> Shape {
    Shape {
        cpus: server.cpus,
        memory_mib: server.memory_gib << 10,
        cpu_overcommit,
    }
}

/// The fewest servers on which all find a place.
fn needed(trace: &Trace, shape: &Shape, whose: &'static str) -> Result<usize, Error> {
    field::needed(trace, shape, Contender::Pack.chooser()).ok_or_else(|| Error::TooLarge {
        vm: trace
            .larger_than(shape.largest())
            .map_or_else(|| shape.largest(), |vm| vm.size),
        whose,
    })
}

/// Which server a system buys, and how many: what costs the least with the reserve, and does not count its own energy's use, which is the same on all.
fn cheapest(trace: &Trace, assumptions: &Assumptions) -> Result<(usize, usize), Error> {
    let mut best: Option<(f64, usize, usize)> = None;
    let mut refused = None;
    for (index, server) in assumptions.own.iter().enumerate() {
        let shape = shape(server, assumptions.own_cpu_overcommit);
        let count = match needed(trace, &shape, "a system's own") {
            Ok(count) => count,
            Err(error) => {
                refused = Some(error);
                continue;
            }
        };
        let all = count + assumptions.own_reserve as usize;
        let cost = bill([(server, all)].into_iter(), 0.0, assumptions).cost_a_year;
        if best.is_none_or(|(least, ..)| cost < least) {
            best = Some((cost, index, count));
        }
    }
    match (best, refused) {
        (Some((_, server, count)), _) => Ok((server, count)),
        (None, Some(error)) => Err(error),
        (None, None) => Err(Error::Value {
            key: "own".to_owned(),
            value: "[]".to_owned(),
            allowed: "at least one server",
        }),
    }
}

/// Processors in use, as a mean over the trace.
#[expect(clippy::cast_precision_loss, reason = "counts and seconds far below 2^53")]
fn cpus_used(trace: &Trace, assumed: f64) -> f64 {
    let mut cpu_s = 0.0;
    for vm in &trace.vms {
        let end_s = vm.leave_s.unwrap_or(trace.end_s).min(trace.end_s);
        if vm.usage.cpu.is_empty() {
            let seconds = end_s.saturating_sub(vm.arrive_s) as f64;
            cpu_s += seconds * f64::from(vm.size.vcpus) * assumed;
            continue;
        }
        let mut at_s = vm.arrive_s;
        while at_s < end_s {
            let next_s = (at_s + STEP_S).min(end_s);
            cpu_s += vm.cpus_used(at_s) * (next_s - at_s) as f64;
            at_s = next_s;
        }
    }
    cpu_s / ((trace.end_s - trace.start_s) as f64).max(1.0)
}

/// The bill of so many servers of each model that together have so many processors in use.
#[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
fn bill<'a>(
    servers: impl Iterator<Item = (&'a Server, usize)> + Clone,
    cpus_used: f64,
    assumptions: &Assumptions,
) -> Bill {
    let cpus: f64 = servers
        .clone()
        .map(|(server, count)| f64::from(server.cpus) * count as f64)
        .sum();
    let busy = (cpus_used / cpus.max(1.0)).min(1.0);
    let (mut watts, mut cost, mut hosts) = (0.0, 0.0, 0);
    let mut models = BTreeMap::<String, usize>::new();
    for (server, count) in servers {
        let many = count as f64;
        // Load is spread evenly over the processors: so much of each server is busy.
        watts += many * (server.idle_watts + busy * (server.busy_watts - server.idle_watts));
        let upkeep = server.price * assumptions.upkeep_percent / 100.0;
        cost += many * (server.price / assumptions.years + upkeep + assumptions.place_price);
        hosts += count;
        *models.entry(server.name.clone()).or_default() += count;
    }
    let kwh_a_year = watts / 1000.0 * YEAR_H * assumptions.pue;
    Bill {
        servers: models,
        hosts,
        kwh_a_year,
        cost_a_year: cost + kwh_a_year * assumptions.kwh_price,
    }
}

/// What is saved of the first by the second, in percent.
fn saved(of: f64, by: f64) -> f64 {
    if of > 0.0 { (of - by) / of * 100.0 } else { 0.0 }
}

/// The figure for people, with what it rests on.
pub fn show(assumptions: &Assumptions, figure: &Figure) -> String {
    let mut text = String::from("Assumptions (another file of them: --assumptions FILE)\n\n");
    // A table of numbers and names always becomes TOML.
    text += &toml::to_string(assumptions).unwrap_or_default();
    let _ = writeln!(
        text,
        "\n{} VMs of {} systems; {:.1} processors in use, over time\n",
        figure.vms, figure.systems, figure.cpus_used
    );
    let shared = &figure.shared;
    let less = |of: f64, by: f64| match (of, by) {
        (of, by) if of == by => "-".to_owned(),
        _ => format!("{:.1}", saved(of, by)),
    };
    #[expect(clippy::cast_precision_loss, reason = "counts of servers")]
    let row = |name: &str, bill: &Bill| {
        let models = bill.servers.iter().map(|(name, count)| format!("{count} {name}"));
        vec![
            name.to_owned(),
            models.collect::<Vec<_>>().join(", "),
            bill.hosts.to_string(),
            format!("{:.0}", bill.kwh_a_year),
            format!("{:.0}", bill.cost_a_year),
            less(bill.hosts as f64, shared.hosts as f64),
            less(bill.kwh_a_year, shared.kwh_a_year),
            less(bill.cost_a_year, shared.cost_a_year),
        ]
    };
    let money = format!("{} A YEAR", assumptions.currency);
    let columns = [
        "",
        "SERVERS",
        "HOSTS",
        "kWh A YEAR",
        &money,
        "HOSTS SAVED %",
        "ENERGY SAVED %",
        "COST SAVED %",
    ];
    let rows = [
        row("each on its own, with a reserve", &figure.own),
        row("each on its own, without", &figure.own_without_reserve),
        row("the shared field", &figure.shared),
    ];
    text += &table::layout(&columns, &rows);
    let _ = writeln!(
        text,
        "\nsaved: by the shared field, of what that row takes; the cost to beat: {TO_BEAT_PERCENT} %"
    );
    if let Some(contended) = figure.field.contended_percent {
        let _ = writeln!(
            text,
            "on the shared field without its reserve, {contended:.2} % of host-intervals use more than 90 % of the processors or the memory"
        );
    }
    text
}
