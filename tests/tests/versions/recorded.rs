//! What earlier versions said, read by this one.

use std::collections::{BTreeMap, BTreeSet};

use dalgu_agent::wire as agent_side;
use dalgu_controller::{
    agent_wire,
    model::{Presence, VmPhase},
};
use dalgu_proto::{
    agent::v1 as agent,
    host::{Inventory, Usage},
    ids::HostName,
    v1,
    vm::Spec,
};
use dalgu_tests::versions::{
    full,
    lens::Lens,
    samples::{self, Call, Sample},
    site::Site,
    story,
    wire::Side,
};
use prost::Message;
use prost_reflect::Value;
use tonic::Code;

use crate::{call, nobody};

/// Calls that the first sample lacks: its guests had no consoles.
const NOT_RECORDED: [(&str, &str); 2] = [
    ("0.0.1-24b2ddb", "/dalgu.v1.VmService/ReadConsole"),
    ("0.0.1-24b2ddb", "/dalgu.agent.v1.AgentService/ReadConsole"),
];

/// Each message of a call with its side.
fn messages(call: &Call) -> impl Iterator<Item = (Side, &[u8])> {
    let answers = call
        .answers
        .iter()
        .map(|answer| (Side::Answer, answer.as_slice()));
    std::iter::once((Side::Request, call.request.as_slice())).chain(answers)
}

#[test]
fn there_is_a_sample_of_every_call_of_each_version() {
    let samples = samples::all().unwrap();
    assert!(!samples.is_empty());
    for sample in samples {
        let recorded = sample.calls.iter().map(|call| call.path.clone());
        let mut recorded: BTreeSet<_> = recorded.collect();
        recorded.extend(
            NOT_RECORDED
                .iter()
                .filter(|(version, _)| *version == sample.name)
                .map(|(_, call)| (*call).to_owned()),
        );
        assert_eq!(&recorded, sample.lens.calls(), "{}", sample.name);
    }
}

#[test]
fn what_an_earlier_version_said_means_the_same_today() {
    let today = Lens::new(dalgu_proto::DESCRIPTORS).unwrap();
    for sample in samples::all().unwrap() {
        for call in &sample.calls {
            for (side, message) in messages(call) {
                let meant = sample.lens.read(&call.path, side, message).unwrap();
                let read = today.read(&call.path, side, message).unwrap();
                let names = |message| serde_json::to_value(message).unwrap();
                assert_eq!(names(&read), names(&meant), "{} {}", sample.name, call.path);
                assert_eq!(full::shape(&read), full::shape(&meant));
            }
        }
    }
}

/// Takes a message of today's type, if the call has it.
fn of<T: Message + Default>(call: &Call, side: Side, path: &str) -> Vec<T> {
    if call.path != path {
        return Vec::new();
    }
    let wanted = messages(call).filter(|(of, _)| *of == side);
    wanted.map(|(_, message)| T::decode(message).unwrap()).collect()
}

fn report(vm: agent::VmReport) {
    let host: HostName = "h1".parse().unwrap();
    let own = agent_wire::reported(&host, vm.clone()).expect("the VM has an id");
    assert_eq!(own.observation.power.is_some(), vm.power_state != 0);
    assert_ne!(own.observation.phase, VmPhase::Unknown, "{vm:?}");
    assert_eq!(own.observation.epoch.0, vm.epoch);
    assert_eq!(own.observation.observed.0, vm.observed_generation);
    assert_eq!(own.observation.usage.map(v1::VmUsage::from), vm.usage);
    assert_eq!(own.migration.is_some(), vm.migration.is_some());
}

fn part(part: agent::MigrationReport) {
    let own = agent_wire::part(part.clone());
    assert_eq!((own.known, own.settled), (part.role != 0, part.settled));
    let presence = match part.presence() {
        agent::DomainPresence::Unspecified => None,
        agent::DomainPresence::Absent => Some(Presence::Absent),
        agent::DomainPresence::Stopped => Some(Presence::Stopped),
        agent::DomainPresence::Running => Some(Presence::Running),
        agent::DomainPresence::Paused => Some(Presence::Paused),
        agent::DomainPresence::Incoming => Some(Presence::Incoming),
        agent::DomainPresence::HandedOver => Some(Presence::HandedOver),
    };
    assert_eq!(own.presence, presence);
}

/// What an earlier version said, as it is said since BIOS is said in words.
fn in_words(mut spec: v1::VmSpec) -> v1::VmSpec {
    if spec.firmware() == v1::Firmware::Unspecified {
        spec.set_firmware(v1::Firmware::Bios);
    }
    if spec.cpu_policy() == v1::CpuPolicy::Unspecified {
        spec.set_cpu_policy(v1::CpuPolicy::Shared);
    }
    if spec.numa_policy() == v1::NumaPolicy::Unspecified {
        spec.set_numa_policy(v1::NumaPolicy::None);
    }
    spec
}

fn intent(vm: Option<agent::VmIntent>) {
    let vm = vm.unwrap();
    let (id, told) = agent_side::intent(vm.clone()).unwrap();
    let intent = told.intent;
    assert_eq!((id.to_string(), intent.generation.0), (vm.uid, vm.generation));
    assert_eq!(Some(v1::VmSpec::from(intent.spec)), vm.spec.map(in_words));
}

#[test]
fn what_an_earlier_version_said_becomes_what_the_programs_work_with() {
    for sample in samples::all().unwrap() {
        let mut seen = BTreeMap::<&str, usize>::new();
        let mut count = |what, found: usize| *seen.entry(what).or_default() += found;
        for call in &sample.calls {
            let name = |method: &str| format!("/dalgu.agent.v1.{method}");
            for m in of::<agent::RegisterRequest>(call, Side::Request, &name("RegistrarService/Register")) {
                let inventory = m.inventory.unwrap();
                assert_eq!(
                    v1::HostInventory::from(Inventory::from(inventory.clone())),
                    inventory
                );
                count("inventories", 1);
                m.vms.into_iter().for_each(report);
            }
            for m in of::<agent::ReportRequest>(call, Side::Request, &name("RegistrarService/Report")) {
                let usage = m.usage.unwrap();
                assert_eq!(v1::HostUsage::from(Usage::from(usage.clone())), usage);
                count("reports", m.vms.len());
                m.vms.into_iter().for_each(report);
            }
            for m in of::<agent::EnsureVmRequest>(call, Side::Request, &name("AgentService/EnsureVm")) {
                intent(m.vm);
                count("intents", 1);
            }
            for m in of::<agent::PrepareMigrationRequest>(
                call,
                Side::Request,
                &name("AgentService/PrepareMigration"),
            ) {
                intent(m.vm);
            }
            for m in of::<agent::EnsureVmResponse>(call, Side::Answer, &name("AgentService/EnsureVm")) {
                report(m.vm.unwrap());
            }
            for method in ["GetMigration", "SettleMigration"] {
                for m in of(call, Side::Answer, &name(&format!("AgentService/{method}"))) {
                    part(m);
                    count("parts", 1);
                }
            }
            for m in of::<v1::CreateVmRequest>(call, Side::Request, "/dalgu.v1.VmService/CreateVm") {
                let spec = m.vm.unwrap().spec.unwrap();
                let read = Spec::try_from(spec.clone()).map(v1::VmSpec::from);
                assert_eq!(read, Ok(in_words(spec)));
                count("specs", 1);
            }
        }
        for what in ["inventories", "reports", "intents", "parts", "specs"] {
            assert!(
                seen.get(what).copied().unwrap_or(0) > 0,
                "{}: no {what}",
                sample.name
            );
        }
    }
}

/// Asks this version's programs what an earlier one asked, in its order; the calls and how each was answered.
async fn asked(sample: &Sample) -> Vec<(String, Code, String)> {
    let mut site = Site::new(&story::HOSTS, None).unwrap();
    site.start_controller(nobody()).await.unwrap();
    for host in story::HOSTS {
        site.start_agent(&story::host(host).unwrap(), nobody())
            .await
            .unwrap();
    }
    let ready = story::Operator::new(&site, nobody()).unwrap();
    ready.until_ready(story::HOSTS.len()).await.unwrap();
    let mut answers = Vec::new();
    for sent in &sample.calls {
        let mut message = sample
            .lens
            .read(&sent.path, Side::Request, &sent.request)
            .unwrap();
        if let Some(Value::Message(context)) = message.get_field_by_name_mut("context") {
            // Its controller comes after this one.
            context.set_field_by_name("term", Value::U64(1000));
        }
        let read = serde_json::to_value(&message).unwrap();
        let server = if sent.path.contains("RegistrarService") {
            site.registrar(&read["host"].as_str().unwrap().parse().unwrap())
                .unwrap()
        } else if sent.path.contains("AgentService") {
            let host = read["context"]["host"].as_str().unwrap_or("h1");
            site.agent(&host.parse().unwrap(), nobody()).unwrap()
        } else {
            site.operator(nobody()).unwrap()
        };
        let (code, said) = call(server, &sent.path, &message.encode_to_vec()).await;
        answers.push((sent.path.clone(), code, said));
    }
    answers
}

/// The state of the new site is another, so some ask for what is not there; but they are understood.
const UNDERSTOOD: [Code; 6] = [
    Code::Ok,
    Code::NotFound,
    Code::AlreadyExists,
    Code::FailedPrecondition,
    Code::OutOfRange,
    Code::Aborted,
];

#[tokio::test(start_paused = true)]
async fn what_an_earlier_version_asks_is_answered_with_sense() {
    for sample in samples::all().unwrap() {
        let answers = asked(&sample).await;
        for (path, code, said) in &answers {
            // A list's token names a place in another list.
            let elsewhere = *code == Code::InvalidArgument && said.contains("page_token");
            let busy = *code == Code::Unavailable && said.contains("VM_BUSY");
            assert!(
                UNDERSTOOD.contains(code) || elsewhere || busy,
                "{} {path}: {code:?} {said}",
                sample.name
            );
        }
        let well = answers.iter().filter(|(_, code, _)| *code == Code::Ok).count();
        assert!(well * 2 > answers.len(), "{}: {answers:#?}", sample.name);
    }
}
