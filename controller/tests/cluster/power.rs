//! Hosts are switched off and on, by operators and without, through management controllers that do what real ones do wrong.

use std::{os::unix::fs::PermissionsExt, time::Duration};

use dalgu_controller::{
    config::Power as Config,
    model::Redfish,
    power::{Error, Power, Reset, redfish::Redfish as Client},
};
use dalgu_proto::v1::{self, HostState, PlanKind};

use super::{
    plan::{approval, over, propose, vms},
    redfish::{Fault, PASSWORD, Server, credentials},
    site::{Clients, Site, create, eventually, reason},
};

struct Bench {
    _dir: tempfile::TempDir,
    server: Server,
    client: Client,
}

async fn bench() -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(|_| {}).await;
    let ca = dir.path().join("ca.pem");
    std::fs::write(&ca, &server.ca).unwrap();
    let client = Client {
        credentials: credentials(dir.path(), PASSWORD),
        ca: Some(ca),
    };
    Bench {
        _dir: dir,
        server,
        client,
    }
}

#[tokio::test]
async fn a_machine_is_read_and_switched_by_an_authority_or_by_its_fingerprint() {
    let bench = bench().await;
    let pinned = bench.server.known_by_fingerprint();
    let signed = Redfish {
        fingerprint: String::new(),
        system: "1".into(),
        ..pinned.clone()
    };
    for (machine, on) in [(&pinned, true), (&signed, false)] {
        assert!(bench.client.read(machine).await.unwrap().is_on());
        bench
            .client
            .reset(machine, Reset::GracefulShutdown)
            .await
            .unwrap();
        assert!(bench.client.read(machine).await.unwrap().is_off(), "{on}");
        bench.client.reset(machine, Reset::On).await.unwrap();
    }
    assert_eq!(
        bench.server.machine().resets,
        ["GracefulShutdown", "On", "GracefulShutdown", "On"]
    );
    let unpinned = Client {
        ca: None,
        ..bench.client.clone()
    };
    assert!(
        unpinned.read(&pinned).await.is_ok(),
        "a fingerprint needs no authority"
    );
}

#[tokio::test]
async fn who_is_not_the_machine_that_is_known_gets_no_password() {
    let bench = bench().await;
    let stranger = Server::start(|_| {}).await;
    let pinned = Redfish {
        fingerprint: bench.server.fingerprint.clone(),
        ..stranger.known_by_fingerprint()
    };
    let signed_by_another = Redfish {
        fingerprint: String::new(),
        ..stranger.known_by_fingerprint()
    };
    for machine in [pinned, signed_by_another] {
        let error = bench.client.read(&machine).await.unwrap_err();
        assert!(matches!(error, Error::Connect { .. }), "{error}");
        assert!(
            error.to_string().contains(&stranger.fingerprint),
            "what it shows can be compared with the machine: {error}"
        );
    }
    assert_eq!(stranger.machine().requests, [""; 0], "not a word was said");
    // The right certificate, for another address.
    let elsewhere = Redfish {
        url: format!("https://localhost:{}", bench.server.address.port()),
        fingerprint: String::new(),
        ..bench.server.known_by_fingerprint()
    };
    let error = bench.client.read(&elsewhere).await.unwrap_err();
    assert!(error.to_string().contains("not valid for name"), "{error}");
}

#[tokio::test]
async fn every_fault_of_a_management_controller_is_told_for_what_it_is() {
    let bench = bench().await;
    let machine = bench.server.known_by_fingerprint();
    let url = bench.server.url();
    let table = [
        (
            Fault::Status(500),
            format!("{url} answers GET /redfish/v1/Systems with status 500: the fan is loose"),
        ),
        (Fault::Status(503), "status 503".to_owned()),
        (
            Fault::Status(401),
            format!("{url} refuses user and password of \"bmc\" (status 401)"),
        ),
        (Fault::Status(403), "(status 403)".to_owned()),
        (Fault::Garbage, "what is not Redfish".to_owned()),
        (Fault::Endless, "length limit exceeded".to_owned()),
        (Fault::Elsewhere, "it points to \"https://192.0.2.1/".to_owned()),
        (
            Fault::TwoSystems,
            "has the computer systems 1, blade-2: say which one the host is (--system)".to_owned(),
        ),
    ];
    for (fault, expected) in table {
        bench.server.set(fault);
        let error = bench.client.read(&machine).await.unwrap_err().to_string();
        assert!(error.contains(&expected), "{fault:?}: {error}");
        assert!(!error.contains(PASSWORD), "{error}");
        assert!(
            bench.client.reset(&machine, Reset::On).await.is_err(),
            "{fault:?}"
        );
    }
    assert!(bench.server.machine().resets.is_empty());
    bench.server.set(Fault::OnlyForce);
    let error = bench
        .client
        .reset(&machine, Reset::GracefulShutdown)
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("cannot do GracefulShutdown, only On, ForceOff"),
        "{error}"
    );
    bench.server.set(Fault::Redirects);
    let slashed = Redfish {
        system: "1".into(),
        ..machine.clone()
    };
    assert!(
        bench.client.read(&slashed).await.unwrap().is_on(),
        "one slash is followed"
    );
    bench.server.set(Fault::Closes);
    bench.client.reset(&machine, Reset::On).await.unwrap();
    bench.server.set(Fault::EndlessTask);
    bench
        .client
        .reset(&machine, Reset::GracefulShutdown)
        .await
        .unwrap();
    assert!(
        bench.client.read(&machine).await.unwrap().is_on(),
        "a task is no power state"
    );
    bench.server.set(Fault::None);
    let missing = Redfish {
        system: "7".into(),
        ..machine.clone()
    };
    let error = bench.client.read(&missing).await.unwrap_err();
    assert!(
        error.to_string().contains("status 404: no such resource"),
        "{error}"
    );
}

#[tokio::test]
async fn a_management_controller_that_hangs_is_given_up() {
    let bench = bench().await;
    bench.server.set(Fault::Hangs);
    let machine = bench.server.known_by_fingerprint();
    let reading = bench.client.read(&machine);
    tokio::pin!(reading);
    assert!(futures::poll!(&mut reading).is_pending());
    let asked = || async { !bench.server.machine().requests.is_empty() };
    tokio::select! {
        outcome = &mut reading => panic!("{outcome:?}"),
        () = eventually("it is asked", asked) => {}
    }
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(31)).await;
    let error = reading.await.unwrap_err();
    assert!(
        error.to_string().ends_with("has not answered within 30 s"),
        "{error}"
    );
}

#[tokio::test]
async fn a_password_is_read_anew_at_each_call_and_must_be_nobody_elses_to_read() {
    let bench = bench().await;
    let machine = bench.server.known_by_fingerprint();
    let dir = bench.client.credentials.parent().unwrap();
    credentials(dir, "an old one");
    let error = bench.client.read(&machine).await.unwrap_err();
    assert!(
        matches!(error, Error::Unauthorized { status: 401, .. }),
        "{error}"
    );
    credentials(dir, PASSWORD);
    assert!(bench.client.read(&machine).await.is_ok());
    let file = bench.client.credentials.join("bmc");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    let error = bench.client.read(&machine).await.unwrap_err();
    assert!(error.to_string().contains("can be read by others"), "{error}");
}

/// A site whose hosts have management controllers, which cut them off the network when they are off.
struct Powered {
    site: Site,
    machines: Vec<Server>,
}

async fn powered(hosts: usize, power: Config) -> Powered {
    let mut site = Site::new(hosts).await;
    site.power = Config {
        credentials_dir: Some(credentials(site.dir.path(), PASSWORD)),
        ..power
    };
    let mut machines = Vec::new();
    for number in 1..=hosts {
        let (fabric, name) = (site.fabric.clone(), format!("h{number}"));
        let switched = move |on: bool| fabric.lock().hosts.get_mut(&name).unwrap().cut_off = !on;
        machines.push(Server::start(switched).await);
    }
    Powered { site, machines }
}

impl Powered {
    async fn start(&mut self) -> Clients {
        let mut clients = self.site.start().await;
        for (machine, number) in self.machines.iter().zip(1..) {
            clients.hosts.set_host_power(set(number, machine)).await.unwrap();
        }
        clients
    }

    fn machine(&self, number: usize) -> &Server {
        &self.machines[number - 1]
    }
}

fn set(number: usize, machine: &Server) -> v1::SetHostPowerRequest {
    v1::SetHostPowerRequest {
        name: format!("h{number}"),
        redfish: Some(v1::RedfishService {
            url: machine.url(),
            fingerprint: machine.fingerprint.to_uppercase(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn off(name: &str) -> v1::PowerOffHostRequest {
    v1::PowerOffHostRequest {
        name: name.into(),
        ..Default::default()
    }
}

fn on(name: &str) -> v1::PowerOnHostRequest {
    v1::PowerOnHostRequest {
        name: name.into(),
        ..Default::default()
    }
}

async fn host(clients: &Clients, name: &str) -> v1::Host {
    let request = v1::GetHostRequest { name: name.into() };
    clients
        .clone()
        .hosts
        .get_host(request)
        .await
        .unwrap()
        .into_inner()
}

async fn becomes(clients: &Clients, name: &str, state: HostState) {
    let so = || async { host(clients, name).await.state() == state };
    eventually(&format!("{name} is {state:?}"), so).await;
}

async fn events(clients: &Clients) -> Vec<v1::Event> {
    let request = v1::ListEventsRequest {
        page_size: 1000,
        ..Default::default()
    };
    clients
        .clone()
        .events
        .list_events(request)
        .await
        .unwrap()
        .into_inner()
        .events
}

async fn told(clients: &Clients, of: &str) -> Vec<String> {
    let events = events(clients).await;
    let of_host = events
        .into_iter()
        .filter(|event| event.subject == of && event.reason.starts_with("Host"));
    of_host.map(|event| event.reason).collect()
}

#[tokio::test]
async fn an_operator_switches_an_empty_host_off_and_on_and_nobody_misses_it() {
    let mut powered = powered(3, Config::default()).await;
    let mut clients = powered.start().await;
    vms(&mut clients, &[("a", "h1")]).await;
    assert_eq!(
        reason(clients.hosts.power_off_host(off("h1")).await),
        "HOST_NOT_EMPTY"
    );
    assert_eq!(
        reason(clients.hosts.power_on_host(on("h3")).await),
        "HOST_POWER_CHANGES"
    );

    let read = v1::ReadHostPowerRequest { name: "h3".into() };
    let reading = clients
        .hosts
        .read_host_power(read.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(reading.power_state, "On");
    let going = clients
        .hosts
        .power_off_host(off("h3"))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(going.state(), HostState::PoweringOff, "{going:?}");
    becomes(&clients, "h3", HostState::Off).await;
    assert_eq!(powered.machine(3).machine().resets, ["GracefulShutdown"]);
    let silent = || async { powered.site.fabric.lock().hosts["h3"].cut_off };
    eventually("it is silent", silent).await;

    // The controller is another one meanwhile, and misses nobody either.
    powered.site.kill();
    powered.site.start().await;
    let mut clients = powered.site.start().await;
    assert_eq!(host(&clients, "h3").await.state(), HostState::Off);
    let mut request = create("b");
    request.host = "h3".into();
    let refused = clients.vms.create_vm(request).await.unwrap_err();
    assert!(refused.message().contains("off since"), "{refused:?}");
    assert!(
        refused.message().contains("`dalgu host power on h3`"),
        "{refused:?}"
    );

    clients.hosts.power_on_host(on("h3")).await.unwrap();
    becomes(&clients, "h3", HostState::Ready).await;
    assert_eq!(powered.machine(3).machine().resets, ["GracefulShutdown", "On"]);
    let mut request = create("b");
    request.host = "h3".into();
    let operation = clients.vms.create_vm(request).await.unwrap().into_inner();
    clients.succeeded(operation).await;
    let told = told(&clients, "h3").await;
    assert!(!told.contains(&"HostUnreachable".to_owned()), "{told:?}");
    for wanted in [
        "HostPowerSet",
        "HostPoweringOff",
        "HostOff",
        "HostPoweringOn",
        "HostOn",
    ] {
        assert!(told.contains(&wanted.to_owned()), "{wanted}: {told:?}");
    }
}

#[tokio::test]
async fn a_management_controller_that_fails_holds_up_its_own_host_alone() {
    let mut powered = powered(4, Config::default()).await;
    let mut clients = powered.start().await;
    powered.machine(3).set(Fault::Status(500));
    clients.hosts.power_off_host(off("h3")).await.unwrap();
    let failing = || async {
        host(&clients, "h3")
            .await
            .power
            .unwrap()
            .fault
            .contains("the fan is loose")
    };
    eventually("its fault is shown", failing).await;
    clients.clone().hosts.power_off_host(off("h4")).await.unwrap();
    becomes(&clients, "h4", HostState::Off).await;
    let read = v1::ReadHostPowerRequest { name: "h3".into() };
    assert_eq!(
        reason(clients.hosts.read_host_power(read).await),
        "HOST_POWER_FAILED"
    );
    // Its time is over: it stays on, and takes VMs again.
    powered.site.pass(Duration::from_secs(11 * 60));
    becomes(&clients, "h3", HostState::Ready).await;
    let told = told(&clients, "h3").await;
    assert_eq!(told[0], "HostPowerOffFailed", "newest first: {told:?}");
    powered.machine(3).set(Fault::None);
    clients.clone().hosts.power_off_host(off("h3")).await.unwrap();
    becomes(&clients, "h3", HostState::Off).await;
}

#[tokio::test]
async fn a_host_that_does_not_come_back_is_told_once_and_by_doctor() {
    let mut powered = powered(3, Config::default()).await;
    let mut clients = powered.start().await;
    clients.hosts.power_off_host(off("h3")).await.unwrap();
    becomes(&clients, "h3", HostState::Off).await;
    powered.machine(3).set(Fault::EndlessTask);
    clients.hosts.power_on_host(on("h3")).await.unwrap();
    let ordered = || async { powered.machine(3).machine().resets.contains(&"On".to_owned()) };
    eventually("it is ordered on", ordered).await;
    powered.site.pass(Duration::from_secs(16 * 60));
    let overdue = || async { host(&clients, "h3").await.power.unwrap().overdue };
    eventually("it is missed", overdue).await;
    assert_eq!(host(&clients, "h3").await.state(), HostState::PoweringOn);
    let told = told(&clients, "h3").await;
    assert_eq!(
        told.iter().filter(|reason| *reason == "HostNotBack").count(),
        1,
        "{told:?}"
    );
    powered.machine(3).set(Fault::None);
    // It hangs; it is cut off and switched on again.
    let force = v1::PowerOffHostRequest {
        force: true,
        ..off("h3")
    };
    clients.hosts.power_off_host(force).await.unwrap();
    becomes(&clients, "h3", HostState::Off).await;
    clients.hosts.power_on_host(on("h3")).await.unwrap();
    becomes(&clients, "h3", HostState::Ready).await;
    assert!(!host(&clients, "h3").await.power.unwrap().overdue);
}

#[tokio::test]
async fn what_an_operator_says_of_a_management_controller_is_checked() {
    let mut powered = powered(1, Config::default()).await;
    let mut clients = powered.start().await;
    let good = set(1, powered.machine(1));
    let change = |change: fn(&mut v1::RedfishService)| {
        let mut request = good.clone();
        change(request.redfish.as_mut().unwrap());
        request
    };
    for wrong in [
        change(|redfish| redfish.url = "http://10.0.0.1".into()),
        change(|redfish| redfish.url = "https://user:secret@10.0.0.1".into()),
        change(|redfish| redfish.url = "https://10.0.0.1/redfish/v1".into()),
        change(|redfish| redfish.url = "10.0.0.1".into()),
        change(|redfish| redfish.system = "../Managers/1".into()),
        change(|redfish| redfish.fingerprint = "aa:bb".into()),
        change(|redfish| redfish.fingerprint = String::new()),
        change(|redfish| redfish.credentials = "../../etc/shadow".into()),
    ] {
        assert_eq!(
            reason(clients.hosts.set_host_power(wrong.clone()).await),
            "INVALID_FIELD",
            "{wrong:?}"
        );
    }
    let none = v1::SetHostPowerRequest {
        redfish: None,
        ..good.clone()
    };
    let forgotten = clients.hosts.set_host_power(none).await.unwrap().into_inner();
    assert_eq!(forgotten.power, None);
    assert_eq!(
        reason(clients.hosts.power_off_host(off("h1")).await),
        "HOST_POWER_UNKNOWN"
    );
    let read = v1::ReadHostPowerRequest { name: "h1".into() };
    assert_eq!(
        reason(clients.hosts.read_host_power(read).await),
        "HOST_POWER_UNKNOWN"
    );
}

#[tokio::test]
async fn a_host_that_the_site_needs_is_switched_off_only_when_that_is_said() {
    let mut powered = powered(2, Config::default()).await;
    let mut clients = powered.start().await;
    vms(&mut clients, &[("a", "h1")]).await;
    let refused = clients.hosts.power_off_host(off("h2")).await.unwrap_err();
    assert_eq!(reason::<()>(Err(refused.clone())), "HOST_NEEDED");
    assert!(
        refused.message().contains("its VMs might find no room"),
        "{refused:?}"
    );
    let anyhow = v1::PowerOffHostRequest {
        even_if_needed: true,
        ..off("h2")
    };
    clients.hosts.power_off_host(anyhow).await.unwrap();
    becomes(&clients, "h2", HostState::Off).await;
}

#[tokio::test]
async fn a_consolidated_site_switches_hosts_off_by_itself_and_wakes_one_when_room_is_needed() {
    let automatic = Config {
        automatic: true,
        reserve_hosts: 0,
        ..Config::default()
    };
    let mut powered = powered(4, automatic).await;
    let mut clients = powered.start().await;
    vms(&mut clients, &[("a", "h1"), ("b", "h2"), ("c", "h3")]).await;
    let plan = propose(&mut clients, PlanKind::Consolidate, &[]).await;
    clients.plans.approve_plan(approval(&plan)).await.unwrap();
    over(&clients, &plan.id).await;
    // A look must have seen them empty before the time passes.
    tokio::time::sleep(Duration::from_secs(6)).await;
    powered.site.pass(Duration::from_secs(31 * 60));
    let state = |clients: &Clients| {
        let mut clients = clients.clone();
        async move {
            let hosts = clients
                .hosts
                .list_hosts(v1::ListHostsRequest::default())
                .await
                .unwrap();
            let hosts = hosts.into_inner().hosts;
            let of = |state: HostState| -> Vec<String> {
                hosts
                    .iter()
                    .filter(|host| host.state() == state)
                    .map(|host| host.name.clone())
                    .collect()
            };
            (of(HostState::Ready), of(HostState::Off))
        }
    };
    eventually("two hosts are off", || async {
        state(&clients).await.1.len() == 2
    })
    .await;
    let (ready, asleep) = state(&clients).await;
    assert_eq!(ready.len(), 2, "one has the VMs, and one is spare");
    for name in &asleep {
        assert_eq!(
            host(&clients, name).await.power.unwrap().principal,
            "controller/power"
        );
    }
    let told_before = events(&clients).await.len();

    // Two VMs that fill a host each find no room beside what is there.
    let mut whole = create("whole");
    whole.vm.as_mut().unwrap().spec.as_mut().unwrap().memory_mib = 5000;
    for name in ["d", "e", "f"] {
        let mut request = whole.clone();
        request.vm.as_mut().unwrap().name = name.into();
        let made = || {
            let (mut clients, request) = (clients.clone(), request.clone());
            async move { clients.vms.create_vm(request).await }
        };
        let first = made().await;
        let operation = match first {
            Ok(operation) => operation.into_inner(),
            Err(refused) => {
                assert_eq!(reason::<()>(Err(refused.clone())), "NO_CAPACITY");
                assert!(refused.message().contains("has room and is"), "{refused:?}");
                let mut operation = None;
                for _ in 0..600 {
                    if let Ok(made) = made().await {
                        operation = Some(made.into_inner());
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                operation.expect("the host that was woken takes it")
            }
        };
        clients.succeeded(operation).await;
    }
    let events = events(&clients).await;
    let woken = events[..]
        .iter()
        .filter(|event| event.reason == "HostPoweringOn")
        .count();
    assert!(woken >= 1, "{events:?}");
    assert!(events.len() > told_before);
    assert!(
        !events.iter().any(|event| event.reason == "HostUnreachable"),
        "no host is missed that is off: {events:?}"
    );
}
