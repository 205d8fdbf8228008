//! Histories of hosts that come and go, fill up and lose commands: no copy is lost that is needed, and when faults end all
//! comes to rest.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use proptest::{collection::vec, prelude::*};

use super::{
    plan::{Change, Step, changes, steps},
    tests::{db, host},
    *,
};
use crate::{
    fixtures,
    model::{ImageRecord, ImageState, Replicas},
    state::{Db, State},
};

const HOSTS: usize = 5;
const IMAGES: u8 = 3;
const GIB: u64 = 1 << 30;
const ROOM: u64 = 100 * GIB;

#[derive(Debug, Clone)]
enum Event {
    /// A host falls silent or is heard again.
    Turn(usize),
    /// A host's disk is full of other things, or not any more.
    Fill(usize),
    /// A VM is made from an image on a host.
    Make(u8, usize),
    /// An image's deletion is asked for.
    Delete(u8),
    /// What is planned is done, but for commands to this host, which are lost.
    Pass(usize),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        2 => (0..HOSTS).prop_map(Event::Turn),
        2 => (0..HOSTS).prop_map(Event::Fill),
        2 => (0..IMAGES, 0..HOSTS).prop_map(|(image, host)| Event::Make(image, host)),
        1 => (0..IMAGES).prop_map(Event::Delete),
        8 => (0..=HOSTS).prop_map(Event::Pass),
    ]
}

/// What is true on hosts.
#[derive(Default, Clone)]
struct Machine {
    copies: BTreeSet<u8>,
    silent: bool,
    full: bool,
}

struct World {
    db: Db,
    machines: Vec<Machine>,
    images: BTreeMap<u8, ImageRecord>,
    vms: BTreeSet<(u8, usize)>,
}

fn name(host: usize) -> HostName {
    fixtures::host_name(&format!("h{host}"))
}

fn number(digest: &Digest) -> u8 {
    u8::from_str_radix(&digest.as_str()[..2], 16).unwrap()
}

impl World {
    async fn new(replicas: &[u32]) -> Self {
        let mut world = Self {
            db: db(),
            machines: vec![Machine::default(); HOSTS],
            images: BTreeMap::new(),
            vms: BTreeSet::new(),
        };
        // One that the catalogue does not know.
        world.machines[1].copies.insert(99);
        for (image, replicas) in (0..IMAGES).zip(replicas) {
            world.machines[usize::from(image)].copies.insert(image);
            let mut record = fixtures::image(&image.to_string(), image);
            record.replicas = match replicas {
                0 => Replicas::All,
                copies => Replicas::Count(*copies),
            };
            world.db.change(|tx| tx.put_image(record.clone())).await;
            world.images.insert(image, record);
        }
        world.report().await;
        world
    }

    /// Hosts tell what they have, if they are heard.
    async fn report(&self) {
        self.db
            .change(|tx| {
                for (index, machine) in self.machines.iter().enumerate() {
                    let copies = machine.copies.iter().map(|image| (*image, ImagePhase::Ready));
                    let copies: Vec<_> = copies.collect();
                    let free = if machine.full { 0 } else { ROOM };
                    let name = format!("h{index}");
                    if machine.silent {
                        if let Some(live) = tx.live.get(&fixtures::host_name(&name)).cloned() {
                            let state = HostState::Unreachable;
                            let live = crate::model::HostLive {
                                state,
                                ..(*live).clone()
                            };
                            tx.set_live(fixtures::host_name(&name), live);
                        }
                    } else {
                        host(tx, &name, HostState::Ready, free, &copies);
                    }
                }
            })
            .await;
    }

    fn state(&self) -> std::sync::Arc<State> {
        self.db.snapshot()
    }

    fn heard_with(&self, image: u8) -> usize {
        let heard = self.machines.iter().filter(|machine| !machine.silent);
        heard.filter(|machine| machine.copies.contains(&image)).count()
    }

    async fn event(&mut self, event: Event) {
        match event {
            Event::Turn(host) => self.machines[host].silent ^= true,
            Event::Fill(host) => self.machines[host].full ^= true,
            Event::Make(image, host) => {
                let there = self.images.get(&image);
                if let Some(record) = there.filter(|_| self.vms.insert((image, host))) {
                    let vm = fixtures::vm_of(record, &format!("vm-{image}-{host}"), name(host).as_str());
                    self.db.change(|tx| tx.put_vm(vm)).await;
                    self.machines[host].copies.insert(image);
                }
            }
            Event::Delete(image) => {
                let used = self.vms.iter().any(|(of, _)| *of == image);
                if let Some(mut record) = self.images.get(&image).cloned().filter(|_| !used) {
                    self.images.remove(&image);
                    record.state = ImageState::Deleting;
                    self.db.change(|tx| tx.put_image(record)).await;
                }
            }
            Event::Pass(lost) => drop(self.pass(Some(lost)).await),
        }
        self.report().await;
    }

    /// Does what is planned; how much that was.
    async fn pass(&mut self, lost: Option<usize>) -> usize {
        let mut done = 0;
        for change in changes(&self.state(), Timestamp::UNIX_EPOCH) {
            let Change::Gone(id) = change else {
                panic!("nobody imports: {change:?}");
            };
            done += 1;
            self.db.change(|tx| tx.delete_image(id)).await;
        }
        for step in steps(&self.state(), self.db.now()) {
            let host = (0..HOSTS).find(|host| name(*host) == *step.host()).unwrap();
            assert!(!self.machines[host].silent, "nobody hears {step:?}");
            done += 1;
            self.check(&step, host);
            if lost == Some(host) {
                continue;
            }
            match &step {
                Step::Import { .. } => unreachable!("nobody imports"),
                Step::Fetch { digest, .. } => drop(self.machines[host].copies.insert(number(digest))),
                Step::Remove { digest, image, .. } => {
                    if let Some(digest) = digest {
                        self.machines[host].copies.remove(&number(digest));
                    }
                    self.db
                        .change(|tx| tx.note_removed(&name(host), digest.as_ref(), *image))
                        .await;
                }
            }
        }
        self.report().await;
        done
    }

    /// The laws of one step.
    fn check(&self, step: &Step, host: usize) {
        match step {
            Step::Remove {
                digest: Some(digest), ..
            } => {
                let image = number(digest);
                assert_ne!(image, 99, "the catalogue does not know it");
                assert!(!self.vms.contains(&(image, host)), "a VM needs it: {step:?}");
                if let Some(record) = self.images.get(&image) {
                    let copies = match record.replicas {
                        Replicas::Count(copies) => usize::try_from(copies).unwrap(),
                        Replicas::All => HOSTS,
                    };
                    assert!(
                        self.heard_with(image) > copies.max(1),
                        "too few are left: {step:?}"
                    );
                }
            }
            Step::Fetch { digest, .. } => {
                assert!(self.heard_with(number(digest)) > 0, "nobody has it: {step:?}");
                assert!(!self.machines[host].full, "it has no room: {step:?}");
            }
            Step::Import { .. } | Step::Remove { .. } => {}
        }
    }
}

async fn history(replicas: Vec<u32>, events: Vec<Event>) {
    let mut world = World::new(&replicas).await;
    for event in events {
        world.event(event).await;
        for image in world.images.keys() {
            let anywhere = world
                .machines
                .iter()
                .any(|machine| machine.copies.contains(image));
            assert!(anywhere, "image {image} is lost");
        }
    }
    for machine in &mut world.machines {
        (machine.silent, machine.full) = (false, false);
    }
    world.report().await;
    let mut passes = 0;
    while world.pass(None).await > 0 {
        passes += 1;
        assert!(
            passes < 40,
            "it does not come to rest: {:?}",
            steps(&world.state(), world.db.now())
        );
    }
    let left: Vec<_> = world.state().images.values().map(|image| image.state).collect();
    assert!(
        left.iter().all(|state| *state == ImageState::Available),
        "{left:?}"
    );
    for (image, record) in &world.images {
        let copies = match record.replicas {
            Replicas::Count(copies) => usize::try_from(copies).unwrap().min(HOSTS),
            Replicas::All => HOSTS,
        };
        assert!(world.heard_with(*image) >= copies, "too few have image {image}");
    }
    for image in (0..IMAGES).filter(|image| !world.images.contains_key(image)) {
        assert_eq!(world.heard_with(image), 0, "image {image} was deleted");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_copy_that_is_needed_is_lost_and_all_comes_to_rest(
        replicas in vec(0..4_u32, usize::from(IMAGES)),
        events in vec(event(), 0..40),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(history(replicas, events));
    }
}
