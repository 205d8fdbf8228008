//! The places for calls under way, and the calls that may begin in a second: so many for all, and a part for each caller,
//! so that no caller has all, and a few that are its own when others have taken all.
//!
//! [`Places`] is the port's, a [`Guest`] one caller's on all of its connections. An operator who finds no place is refused at
//! once: a queue would only make callers wait for their deadlines. An agent waits for its turn, and is refused only beyond its
//! own few: agents are as many as there are hosts, and each must be heard.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use dalgu_proto::tls::{Peer, Role};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use super::limits::{Class, Limits};

/// A place for one call: one of the caller's part, and one of all or of those kept for the caller.
#[derive(Debug)]
pub(super) struct Place {
    _part: OwnedSemaphorePermit,
    _place: OwnedSemaphorePermit,
}

/// Places by what a call counts as.
#[derive(Debug)]
struct Rooms {
    calls: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    agents: Arc<Semaphore>,
    probes: Arc<Semaphore>,
}

impl Rooms {
    fn new(calls: usize, streams: usize, agents: usize, probes: usize) -> Self {
        let room = |places| Arc::new(Semaphore::new(places));
        Self {
            calls: room(calls),
            streams: room(streams),
            agents: room(agents),
            probes: room(probes),
        }
    }

    fn of(&self, class: Class) -> Arc<Semaphore> {
        let room = match class {
            Class::Call => &self.calls,
            Class::Wait | Class::Stream => &self.streams,
            Class::Agent => &self.agents,
            Class::Probe => &self.probes,
        };
        room.clone()
    }
}

/// So many a second, and those of so many seconds at once after a pause.
#[derive(Debug)]
struct Rate {
    each: Duration,
    burst: Duration,
    /// When as many will have been due as were taken.
    due: Mutex<Instant>,
}

impl Rate {
    fn new(per_second: u32, burst: Duration) -> Self {
        Self {
            each: Duration::from_secs(1) / per_second.max(1),
            burst,
            due: Mutex::new(Instant::now()),
        }
    }

    fn take(&self) -> bool {
        let now = Instant::now();
        let mut due = lock(&self.due);
        let next = (*due).max(now) + self.each;
        if next - now > self.burst {
            return false;
        }
        *due = next;
        true
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See the module.
#[derive(Debug)]
pub(super) struct Places {
    rooms: Rooms,
    rate: Rate,
    limits: Limits,
    guests: Mutex<HashMap<String, Weak<Guest>>>,
}

/// One caller, for as long as it has a connection.
#[derive(Debug)]
pub(super) struct Guest {
    name: String,
    limited: bool,
    /// Its part of all places.
    part: Rooms,
    /// What is there for it when all places are taken.
    kept: Rooms,
    rate: Rate,
    places: Arc<Places>,
}

impl Places {
    pub(super) fn new(limits: &Limits) -> Arc<Self> {
        Arc::new(Self {
            rooms: Rooms::new(limits.calls, limits.streams, limits.agent_calls, limits.probes),
            rate: Rate::new(limits.calls_per_second, Duration::from_secs(1)),
            limits: *limits,
            guests: Mutex::default(),
        })
    }

    /// The caller of that name; the same for all its connections.
    pub(super) fn guest(self: &Arc<Self>, peer: &Peer) -> Arc<Guest> {
        let name = peer.to_string();
        let mut guests = lock(&self.guests);
        if let Some(known) = guests.get(&name).and_then(Weak::upgrade) {
            return known;
        }
        let limits = &self.limits;
        let guest = Arc::new(Guest {
            limited: !matches!(peer.role, Role::Agent(_)),
            part: Rooms::new(
                limits.calls_of_one,
                limits.streams_of_one,
                limits.agent_calls_of_one,
                limits.probes_of_one,
            ),
            kept: Rooms::new(limits.kept_for_one, limits.kept_for_one, 0, limits.kept_for_one),
            rate: Rate::new(limits.calls_per_second_of_one, Duration::from_secs(2)),
            places: self.clone(),
            name: name.clone(),
        });
        guests.insert(name, Arc::downgrade(&guest));
        guest
    }
}

impl Guest {
    /// Takes a place, if the caller may have one. Only an agent's call waits; cancel safe.
    pub(super) async fn take(&self, class: Class) -> Option<Place> {
        let part = self.part.of(class).try_acquire_owned().ok()?;
        let room = self.places.rooms.of(class);
        let place = match class {
            // They come in the order in which they have asked.
            Class::Agent => room.acquire_owned().await.ok()?,
            _ => room
                .try_acquire_owned()
                .or_else(|_| self.kept.of(class).try_acquire_owned())
                .ok()?,
        };
        let counted = self.limited && class != Class::Probe;
        if counted && !self.rate.take() && !self.places.rate.take() {
            return None;
        }
        Some(Place {
            _part: part,
            _place: place,
        })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut guests = lock(&self.places.guests);
        // Another of the same name may have come meanwhile.
        if guests
            .get(&self.name)
            .is_some_and(|known| known.strong_count() == 0)
        {
            guests.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn operator(name: &str) -> Peer {
        Peer {
            role: Role::Operator,
            name: name.to_owned(),
        }
    }

    fn agent(name: &str) -> Peer {
        Peer {
            role: Role::Agent(name.parse().unwrap()),
            name: name.to_owned(),
        }
    }

    /// A place that is there at once.
    fn now(guest: &Guest, class: Class) -> Option<Place> {
        guest.take(class).now_or_never().flatten()
    }

    #[tokio::test]
    async fn one_operator_has_its_part_on_all_its_connections_and_the_rest_is_for_others() {
        let places = Places::new(&Limits {
            calls: 3,
            calls_of_one: 2,
            ..Limits::default()
        });
        let (one, same) = (places.guest(&operator("a")), places.guest(&operator("a")));
        let held = (now(&one, Class::Call), now(&same, Class::Call));
        assert!(held.0.is_some() && held.1.is_some());
        assert!(now(&one, Class::Call).is_none(), "its part is two");
        let other = places.guest(&operator("b"));
        assert!(now(&other, Class::Call).is_some(), "the third");
        assert!(now(&one, Class::Wait).is_some(), "waits have places of their own");
        drop(held);
        assert!(now(&one, Class::Call).is_some(), "places come back");
    }

    #[tokio::test]
    async fn when_all_places_are_taken_each_operator_has_two_for_itself() {
        let places = Places::new(&Limits {
            calls: 3,
            calls_of_one: 4,
            kept_for_one: 2,
            ..Limits::default()
        });
        let many = |name: &str| {
            let guest = places.guest(&operator(name));
            (0..10)
                .filter_map(|_| now(&guest, Class::Call))
                .collect::<Vec<_>>()
        };
        let storm = many("storm");
        assert_eq!(storm.len(), 4, "its part: three of all and one of its own");
        let person = many("person");
        assert_eq!(person.len(), 2);
        drop(storm);
        assert_eq!(many("another").len(), 4, "what was taken is back");
    }

    #[tokio::test]
    async fn agents_that_take_all_they_can_leave_places_and_others_come_in_the_order_they_asked() {
        let places = Places::new(&Limits {
            agent_calls: 10,
            ..Limits::default()
        });
        let greedy: Vec<_> = (0..2).map(|n| places.guest(&agent(&format!("g{n}")))).collect();
        let mut held: Vec<_> = greedy
            .iter()
            .flat_map(|guest| (0..100).filter_map(|_| now(guest, Class::Agent)))
            .collect();
        assert_eq!(held.len(), 8, "four each");
        let guests: Vec<_> = (0..4).map(|n| places.guest(&agent(&format!("h{n}")))).collect();
        let mut waiting: Vec<_> = guests
            .iter()
            .map(|guest| Box::pin(guest.take(Class::Agent)))
            .collect();
        let mut ready = |held: &mut Vec<_>| {
            let mut came = vec![];
            for (number, call) in waiting.iter_mut().enumerate() {
                if let Some(Some(place)) = call.as_mut().now_or_never() {
                    held.push(place);
                    came.push(number);
                }
            }
            waiting = std::mem::take(&mut waiting)
                .into_iter()
                .enumerate()
                .filter(|(number, _)| !came.contains(number))
                .map(|(_, call)| call)
                .collect();
            came.len()
        };
        assert_eq!(ready(&mut held), 2, "two places were left");
        assert_eq!(ready(&mut held), 0, "the others wait and are not refused");
        drop(held.remove(0));
        assert_eq!(ready(&mut held), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn beyond_the_rate_all_are_refused_but_for_the_few_that_each_has_for_itself() {
        let places = Places::new(&Limits {
            calls_per_second: 100,
            calls_per_second_of_one: 5,
            ..Limits::default()
        });
        let (storm, person) = (
            places.guest(&operator("storm")),
            places.guest(&operator("person")),
        );
        let many = |guest: &Guest, asked: u32| {
            let taken = (0..asked).filter(|_| now(guest, Class::Call).is_some()).count();
            u32::try_from(taken).unwrap()
        };
        assert_eq!(
            many(&storm, 1000),
            110,
            "a second's of all and two seconds' of its own"
        );
        assert_eq!(many(&person, 3), 3, "another is let in");
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(many(&storm, 1000), 105);
        let agent = places.guest(&agent("h1"));
        // Fewer than a task of tokio's may do in a row.
        assert_eq!(
            (0..100).filter(|_| now(&agent, Class::Agent).is_some()).count(),
            100
        );
        assert_eq!(
            (0..1000).filter(|_| now(&storm, Class::Probe).is_some()).count(),
            1000
        );
    }

    #[test]
    fn who_has_gone_is_forgotten() {
        let places = Places::new(&Limits::default());
        let (first, second) = (places.guest(&operator("a")), places.guest(&operator("a")));
        drop(first);
        assert_eq!(lock(&places.guests).len(), 1);
        drop(second);
        assert!(lock(&places.guests).is_empty());
    }
}
