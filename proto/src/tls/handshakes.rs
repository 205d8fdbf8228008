//! Who may shake hands: so many at once in all, and so many of one address, so that a caller that stays silent, or a
//! thousand of them, keep nobody else out.
//!
//! Called by [`super::server`] for each connection it has accepted, before a byte of it is read.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Longest handshake, and longest wait for a place for one. A handshake takes 2 ms and three times the way.
pub(super) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// Most handshakes at once: more only take each other's processor time.
const MAX_HANDSHAKES: usize = 128;
/// Most of them of one address: silent callers of one address hold a quarter of all places.
const PER_ADDRESS: usize = 32;
/// Connections of one address that wait or shake hands; more are closed at once. A thousand agents may be behind one
/// address, and come back at the same time.
const ARRIVED_PER_ADDRESS: usize = 1024;

/// A connection that was closed because too many of its address had not shown who they are.
#[derive(Debug, thiserror::Error)]
#[error("{address} has {ARRIVED_PER_ADDRESS} connections that have not shown a certificate yet")]
pub struct TooMany {
    /// The address, of IPv6 the network.
    pub address: IpAddr,
}

#[derive(Clone)]
struct Address {
    places: Arc<Semaphore>,
    arrived: usize,
}

/// See the module.
#[derive(Clone)]
pub(super) struct Handshakes {
    all: Arc<Semaphore>,
    addresses: Arc<Mutex<HashMap<IpAddr, Address>>>,
}

/// A connection that has arrived and not yet shown who it is.
pub(super) struct Guest {
    address: IpAddr,
    places: Arc<Semaphore>,
    all: Arc<Semaphore>,
    addresses: Arc<Mutex<HashMap<IpAddr, Address>>>,
}

impl Handshakes {
    pub(super) fn new() -> Self {
        Self {
            all: Arc::new(Semaphore::new(MAX_HANDSHAKES)),
            addresses: Arc::default(),
        }
    }

    /// Counts a connection, for as long as the guest is kept.
    pub(super) fn arrive(&self, address: IpAddr) -> Result<Guest, TooMany> {
        let address = network(address);
        let mut addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = addresses.entry(address).or_insert_with(|| Address {
            places: Arc::new(Semaphore::new(PER_ADDRESS)),
            arrived: 0,
        });
        if entry.arrived == ARRIVED_PER_ADDRESS {
            return Err(TooMany { address });
        }
        entry.arrived += 1;
        Ok(Guest {
            address,
            places: entry.places.clone(),
            all: self.all.clone(),
            addresses: self.addresses.clone(),
        })
    }
}

impl Guest {
    /// Waits for a place. The address's own first, so that who waits for that holds none of the others'.
    pub(super) async fn place(&self) -> Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)> {
        let own = self.places.clone().acquire_owned().await.ok()?;
        let one = self.all.clone().acquire_owned().await.ok()?;
        Some((own, one))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = addresses.get_mut(&self.address) {
            entry.arrived -= 1;
            if entry.arrived == 0 {
                addresses.remove(&self.address);
            }
        }
    }
}

/// What counts as one address: of IPv6 the first half, as a machine has the whole of the second.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let prefix = u128::from(address) >> 64 << 64;
            IpAddr::V6(Ipv6Addr::from(prefix))
        }
        address @ IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_address_takes_no_more_than_its_part_and_is_forgotten_when_it_has_gone() {
        let handshakes = Handshakes::new();
        let (busy, other): (IpAddr, IpAddr) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let guests: Vec<_> = (0..ARRIVED_PER_ADDRESS)
            .map(|_| handshakes.arrive(busy).unwrap())
            .collect();
        assert!(handshakes.arrive(busy).is_err());
        let mut placed = vec![];
        for guest in &guests[..PER_ADDRESS] {
            placed.push(guest.place().await.unwrap());
        }
        let soon = Duration::from_millis(20);
        let waits = tokio::time::timeout(soon, guests[PER_ADDRESS].place()).await;
        assert!(waits.is_err(), "the address has its part");
        let guest = handshakes.arrive(other).unwrap();
        assert!(guest.place().await.is_some(), "others come in");
        drop((guests, guest));
        assert!(handshakes.addresses.lock().unwrap().is_empty());
        assert!(handshakes.arrive(busy).is_ok());
    }

    #[test]
    fn a_machine_with_many_addresses_is_one() {
        let of = |text: &str| network(text.parse().unwrap());
        assert_eq!(of("fd00::1"), of("fd00::2:3"));
        assert_ne!(of("fd00:0:0:1::1"), of("fd00::1"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
    }
}
