//! Whether a command may be obeyed at all: the right site, host and session, no older term.
//!
//! Asked by the server before every command. What it has accepted it remembers in the ledger, so that a restart does
//! not make the agent obey a controller that has been replaced.

use dalgu_proto::{
    ids::{ClusterId, HostName, Session, Term},
    mutant::{self, Mutant},
};
use tokio::sync::{Mutex, watch};
use uuid::Uuid;

use crate::ledger::{self, Host, Ledger};

/// Who gives a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Context<'a> {
    /// The site.
    pub cluster: ClusterId,
    /// The controller's term.
    pub term: Term,
    /// The host's session.
    pub session: Session,
    /// Name of the host that is meant.
    pub host: &'a str,
    /// Run of the controller; `None` from an older version, which does not say.
    pub run: Option<Uuid>,
}

/// Why a command is not obeyed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The agent does not know yet what is true on its host.
    #[error("the agent is finding out what is true on its host; try again")]
    Recovering,
    /// It has never registered with a controller.
    #[error("the agent has not registered with its controller yet; try again")]
    Unregistered,
    /// Another host is meant.
    #[error("the command is for host {given:?}, this is {own}")]
    WrongHost {
        /// In the command.
        given: String,
        /// This host.
        own: HostName,
    },
    /// Another site's controller.
    #[error("the command comes from site {given}, this host belongs to {own}")]
    WrongCluster {
        /// In the command.
        given: ClusterId,
        /// In the ledger.
        own: ClusterId,
    },
    /// Another session: the host was declared dead meanwhile, or the command is older than that.
    #[error("the command is for session {given}, the host's session is {own}")]
    WrongSession {
        /// In the command.
        given: Session,
        /// In the ledger.
        own: Session,
    },
    /// A controller that has been replaced.
    #[error("the command's term {given} is older than {known}")]
    StaleTerm {
        /// In the command.
        given: Term,
        /// In the ledger.
        known: Term,
    },
    /// Two controllers with the same credentials and the same term.
    #[error(
        "term {term} is held by run {known} of the controller, this comes from run {given}: two controllers are running"
    )]
    OtherController {
        /// The term.
        term: Term,
        /// In the command.
        given: Uuid,
        /// In the ledger.
        known: Uuid,
    },
    /// The ledger failed.
    #[error("the controller's term could not be written down")]
    Ledger(#[from] ledger::Error),
}

impl Error {
    /// Stable reason for programs.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Recovering => "RECOVERING",
            Self::Unregistered => "UNREGISTERED",
            Self::WrongHost { .. } => "WRONG_HOST",
            Self::WrongCluster { .. } => "WRONG_CLUSTER",
            Self::WrongSession { .. } => "WRONG_SESSION",
            Self::StaleTerm { .. } => "STALE_TERM",
            Self::OtherController { .. } => "OTHER_CONTROLLER",
            Self::Ledger(_) => "LEDGER_FAILED",
        }
    }
}

/// See the module's documentation.
pub struct Gate {
    own: HostName,
    ledger: Ledger,
    host: Mutex<Host>,
    cluster: ClusterId,
    /// The machine this is; `None` where it does not know.
    machine: Option<Uuid>,
    open: watch::Sender<bool>,
}

impl Gate {
    /// A gate that is closed until [`Gate::open`].
    pub fn new(cluster: ClusterId, own: HostName, machine: Option<Uuid>, ledger: Ledger, host: Host) -> Self {
        Self {
            own,
            ledger,
            host: Mutex::new(host),
            cluster,
            machine,
            open: watch::Sender::new(false),
        }
    }

    /// The site.
    pub const fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// This host.
    pub const fn own(&self) -> &HostName {
        &self.own
    }

    /// The machine this is.
    pub const fn machine(&self) -> Option<Uuid> {
        self.machine
    }

    /// The other machine whose ledger this is a copy of, if it is one.
    pub async fn copied_from(&self) -> Option<Uuid> {
        let first = self.host.lock().await.machine;
        first.filter(|first| self.machine.is_some_and(|own| own != *first))
    }

    /// What is remembered.
    pub async fn host(&self) -> Host {
        *self.host.lock().await
    }

    /// Recovery is over.
    pub fn open(&self) {
        self.open.send_replace(true);
    }

    /// Returns when recovery is over.
    pub async fn opened(&self) {
        // It fails only when the gate is gone, and this holds it.
        let _ = self.open.subscribe().wait_for(|open| *open).await;
    }

    /// Whether recovery is over.
    pub fn is_open(&self) -> bool {
        *self.open.borrow()
    }

    /// Judges a command.
    pub async fn pass(&self, given: Context<'_>) -> Result<(), Error> {
        if !self.is_open() {
            return Err(Error::Recovering);
        }
        let mut host = self.host.lock().await;
        let changed = judge(self.cluster, &self.own, *host, given)?;
        if changed != *host {
            self.ledger.save_host(&changed).await?;
            *host = changed;
        }
        Ok(())
    }

    /// Takes over what the controller said at registration. Refuses another site and an older term.
    pub async fn registered(
        &self,
        cluster: ClusterId,
        session: Session,
        term: Term,
        run: Option<Uuid>,
    ) -> Result<(), Error> {
        let mut host = self.host.lock().await;
        if cluster != self.cluster {
            return Err(Error::WrongCluster {
                given: cluster,
                own: self.cluster,
            });
        }
        if term < host.term {
            return Err(Error::StaleTerm {
                given: term,
                known: host.term,
            });
        }
        if session < host.session {
            return Err(Error::WrongSession {
                given: session,
                own: host.session,
            });
        }
        let changed = Host {
            cluster: Some(self.cluster),
            session,
            term,
            run: holder(*host, term, run)?,
            machine: host.machine.or(self.machine),
        };
        if changed != *host {
            self.ledger.save_host(&changed).await?;
            *host = changed;
        }
        Ok(())
    }
}

fn judge(cluster: ClusterId, own: &HostName, host: Host, given: Context<'_>) -> Result<Host, Error> {
    if host.cluster.is_none() {
        return Err(Error::Unregistered);
    }
    if given.host != own.as_str() {
        return Err(Error::WrongHost {
            given: given.host.to_owned(),
            own: own.clone(),
        });
    }
    if given.cluster != cluster {
        return Err(Error::WrongCluster {
            given: given.cluster,
            own: cluster,
        });
    }
    if given.session != host.session && !mutant::on(Mutant::SessionNotChecked) {
        return Err(Error::WrongSession {
            given: given.session,
            own: host.session,
        });
    }
    if given.term < host.term && !mutant::on(Mutant::TermNotChecked) {
        return Err(Error::StaleTerm {
            given: given.term,
            known: host.term,
        });
    }
    Ok(Host {
        term: given.term,
        run: holder(host, given.term, given.run)?,
        ..host
    })
}

/// The run that holds the term from now on: the first that was heard of. A copy of the store, with the same credentials,
/// reaches the same term; obeying both would be obeying nobody.
fn holder(host: Host, term: Term, run: Option<Uuid>) -> Result<Option<Uuid>, Error> {
    match (host.run, run) {
        _ if term > host.term || mutant::on(Mutant::TermNotChecked) => Ok(run),
        (Some(known), Some(given)) if known != given && !mutant::on(Mutant::RunNotCompared) => {
            Err(Error::OtherController { term, given, known })
        }
        (known, given) => Ok(known.or(given)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(id: u128) -> ClusterId {
        ClusterId::from_uuid(uuid::Uuid::from_u128(id))
    }

    #[test]
    fn only_the_right_controller_and_session_pass() {
        let own: HostName = "h1".parse().unwrap();
        let host = Host {
            cluster: Some(cluster(1)),
            session: Session(4),
            term: Term(7),
            run: Some(Uuid::from_u128(1)),
            machine: None,
        };
        let good = Context {
            cluster: cluster(1),
            term: Term(7),
            session: Session(4),
            host: "h1",
            run: Some(Uuid::from_u128(1)),
        };
        assert_eq!(judge(cluster(1), &own, host, good).unwrap(), host);
        assert_eq!(
            judge(
                cluster(1),
                &own,
                host,
                Context {
                    term: Term(9),
                    ..good
                }
            )
            .unwrap()
            .term,
            Term(9)
        );
        let reason = |given| judge(cluster(1), &own, host, given).map_err(|error| error.reason());
        assert_eq!(
            reason(Context {
                term: Term(6),
                ..good
            }),
            Err("STALE_TERM")
        );
        assert_eq!(
            reason(Context {
                session: Session(3),
                ..good
            }),
            Err("WRONG_SESSION")
        );
        assert_eq!(
            reason(Context {
                session: Session(5),
                ..good
            }),
            Err("WRONG_SESSION")
        );
        assert_eq!(
            reason(Context {
                cluster: cluster(2),
                ..good
            }),
            Err("WRONG_CLUSTER")
        );
        assert_eq!(reason(Context { host: "h2", ..good }), Err("WRONG_HOST"));
        let second = Context {
            run: Some(Uuid::from_u128(2)),
            ..good
        };
        assert_eq!(reason(second), Err("OTHER_CONTROLLER"));
        let newer = Context {
            term: Term(8),
            ..second
        };
        assert_eq!(reason(newer).unwrap().run, second.run, "the later term wins");
        assert_eq!(
            reason(Context { run: None, ..good }).unwrap(),
            host,
            "an older version"
        );
        let fresh = judge(cluster(1), &own, Host::default(), good).map_err(|error| error.reason());
        assert_eq!(fresh, Err("UNREGISTERED"));
    }

    #[tokio::test]
    async fn what_passed_is_remembered_over_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        let own: HostName = "h1".parse().unwrap();
        let gate = Gate::new(cluster(1), own.clone(), None, ledger.clone(), Host::default());
        gate.open();
        gate.registered(cluster(1), Session(2), Term(3), Some(Uuid::from_u128(1)))
            .await
            .unwrap();
        gate.pass(Context {
            cluster: cluster(1),
            term: Term(5),
            session: Session(2),
            host: "h1",
            run: Some(Uuid::from_u128(2)),
        })
        .await
        .unwrap();
        let again = Gate::new(
            cluster(1),
            own,
            None,
            ledger.clone(),
            ledger.load().await.unwrap().host,
        );
        assert_eq!(again.host().await.term, Term(5));
        let copy = again.registered(cluster(1), Session(2), Term(5), Some(Uuid::from_u128(3)));
        assert!(matches!(copy.await, Err(Error::OtherController { .. })));
        assert!(matches!(
            again.registered(cluster(1), Session(2), Term(4), None).await,
            Err(Error::StaleTerm { .. })
        ));
        assert!(matches!(
            again.registered(cluster(2), Session(2), Term(9), None).await,
            Err(Error::WrongCluster { .. })
        ));
    }
}
