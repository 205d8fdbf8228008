//! What outlives the programs on disk: the controller's store and the agents' ledgers, with the faults of disks.

use std::{
    io,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use dalgu_agent::ledger::Files;
use dalgu_controller::store::{
    Batch, Error, Image, Store,
    memory::{Disk, Memory},
};
use serde::de::DeserializeOwned;

use super::{
    fate::{Fate, Kind},
    life::Life,
    lock,
    plan::Node,
    platter::{Platter, Until},
    site::Site,
};

/// What happens to the commit that comes next; decided before it, where waiting is possible.
pub type Next = Arc<Mutex<Fate>>;

/// Nothing happens to it yet.
pub fn next() -> Next {
    Arc::new(Mutex::new(Fate::Pass))
}

/// The controller's store: what was committed stays, whoever dies.
pub struct Records {
    memory: Memory,
    site: Arc<Site>,
    life: Life,
    node: Node,
    next: Next,
}

impl Records {
    /// A store on `disk` for one life of a controller.
    pub fn new(disk: &Disk, site: Arc<Site>, life: Life, node: Node, next: Next) -> Self {
        let memory = disk.open();
        Self {
            memory,
            site,
            life,
            node,
            next,
        }
    }
}

impl Store for Records {
    fn load(&mut self) -> Result<Image, Error> {
        self.memory.load()
    }

    fn commit(&mut self, batches: &[Batch]) -> Result<(), Error> {
        if self.life.is_over() {
            return Err(Error::Injected("the controller is dead"));
        }
        let fate = std::mem::replace(&mut *lock(&self.next), Fate::Pass);
        match fate {
            Fate::CrashBefore => self.site.kill(self.node),
            Fate::Fail => {}
            _ => self.memory.commit(batches)?,
        }
        match fate {
            Fate::CrashBefore | Fate::Fail => Err(Error::Injected("before the commit")),
            Fate::CrashAfter => {
                self.site.kill(self.node);
                Err(Error::Injected("after the commit"))
            }
            Fate::Lie => Err(Error::Injected("after the commit")),
            _ => Ok(()),
        }
    }
}

/// An agent's ledger.
pub struct Ledger {
    /// The site.
    pub site: Arc<Site>,
    /// Which host's.
    pub host: usize,
    /// The agent that writes.
    pub life: Life,
}

impl Ledger {
    async fn write(&self, name: &str, bytes: Option<Vec<u8>>) -> io::Result<()> {
        self.life.pass().await;
        let node = Node::Host(self.host);
        let kind = if name.starts_with("vms/") {
            "vm entry"
        } else {
            "entry"
        };
        let fate = self.site.at(Kind::Ledger, kind, node, node);
        match fate {
            Fate::Delay(time) => tokio::time::sleep(time).await,
            Fate::Fail => return Err(io::ErrorKind::StorageFull.into()),
            Fate::CrashBefore => {
                self.site.kill(node);
                return self.life.stop_here().await;
            }
            _ => {}
        }
        self.life.pass().await;
        let until = match fate {
            Fate::Lie | Fate::CrashAfter => Until::Name,
            Fate::PowerCut(calls) => Until::Calls(calls),
            _ => Until::End,
        };
        let written = self.site.write_ledger(self.host, name, bytes.as_deref(), until);
        match fate {
            Fate::CrashAfter => {
                self.site.kill(node);
                self.life.stop_here().await
            }
            Fate::PowerCut(_) => {
                self.site.cut_amid_write(self.host);
                self.life.stop_here().await
            }
            _ => written,
        }
    }
}

#[async_trait]
impl Files for Ledger {
    async fn load(&self) -> io::Result<Vec<(String, Vec<u8>)>> {
        self.life.pass().await;
        self.site.read_ledger(self.host)
    }

    async fn replace(&self, name: &str, bytes: Vec<u8>) -> io::Result<()> {
        self.write(name, Some(bytes)).await
    }

    async fn remove(&self, name: &str) -> io::Result<()> {
        self.write(name, None).await
    }
}

/// An entry in a ledger's files.
pub fn entry<T: DeserializeOwned>(platter: &Platter, name: &str) -> Option<T> {
    serde_json::from_slice(&platter.get(name)?).ok()
}
