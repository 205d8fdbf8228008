//! Calls to agents: the only place that dials them.
//!
//! Called by `reconcile::step`, the runners of `images`, `networks`, `volumes` and `backups`, and the API's streams of consoles and uploads. One channel a host, opened at the first call and again
//! when the host's address changes, closed when the host is deleted; every command bears the site, the term and the host's session, and has a
//! deadline. Decides nothing: an answer or an [`Error`] goes back to the caller.

mod backup;
mod files;
mod image;
mod network;
mod volume;

use std::{
    collections::BTreeMap,
    error::Error as _,
    future::Future,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use dalgu_proto::{
    agent::v1::{self as agent, agent_service_client::AgentServiceClient},
    ids::{Epoch, Generation, HostName, MigrationId, VmId},
    reason,
    tls::{
        self, Identity,
        client::{Caller, caller, connect_lazy},
    },
};
use tokio::sync::{Semaphore, SemaphorePermit};
use tonic::{Code, Response, Status, Streaming};

use crate::{
    agent_wire::{self, Part, Reported},
    model::{Fault, MigrationRecord, VmRecord},
    state::State,
};

/// Longest wait for the answer to a command.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);

/// Most calls under way to hosts that do not report; each may last until its deadline.
const CALLS_TO_SILENT_HOSTS: usize = 16;

/// Refusals that pass by themselves: the agent is starting, or has to register again.
const PASSING: [&str; 9] = [
    "STALE_TERM",
    "OTHER_CONTROLLER",
    "WRONG_SESSION",
    "WRONG_CLUSTER",
    "RECOVERING",
    "UNREGISTERED",
    "HYPERVISOR_UNAVAILABLE",
    "MIGRATION_IN_PROGRESS",
    "VM_BUSY",
];

/// Why a command was not carried out, as far as is known.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such host any more.
    #[error("host {0} is not registered")]
    UnknownHost(HostName),
    /// The host's address is no good.
    #[error("the agent of host {host} cannot be dialled")]
    Channel {
        /// The host.
        host: HostName,
        /// Why.
        #[source]
        source: tls::Error,
    },
    /// No answer in time; the command may have been carried out.
    #[error("host {host} did not answer {command} within {} s", COMMAND_TIMEOUT.as_secs())]
    Timeout {
        /// The host.
        host: HostName,
        /// The command.
        command: &'static str,
    },
    /// The agent, or the way to it, said no.
    #[error("host {host} answered {command} with {}: {}", status.code(), status.message())]
    Refused {
        /// The host.
        host: HostName,
        /// The command.
        command: &'static str,
        /// What was said.
        status: Box<Status>,
    },
    /// The answer makes no sense.
    #[error("host {host} answered {command} with a message that lacks its content")]
    Malformed {
        /// The host.
        host: HostName,
        /// The command.
        command: &'static str,
    },
}

impl Error {
    /// Whether the same command would be refused again for ever; the reason to keep, if so.
    pub fn refusal(&self) -> Option<Fault> {
        let Self::Refused { command, status, .. } = self else {
            return None;
        };
        let code = match status.code() {
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented => status.code(),
            _ => return None,
        };
        let reason = reason::of(status).unwrap_or_else(|| "REFUSED_BY_AGENT".to_owned());
        // A destination is asked after the VM's last migration has ended on both hosts. One that it still takes part in was
        // forgotten by a restore, and does not pass.
        let forgotten = *command == "PrepareMigration" && reason == "MIGRATION_IN_PROGRESS";
        if PASSING.contains(&reason.as_str()) && !forgotten {
            return None;
        }
        Some(Fault {
            code: code.into(),
            reason,
            message: self.to_string(),
        })
    }

    /// Whether the agent said no for this reason.
    pub fn is(&self, wanted: &str) -> bool {
        matches!(self, Self::Refused { status, .. } if reason::of(status).as_deref() == Some(wanted))
    }

    /// Whether the agent is of a version that does not know the command.
    pub fn is_unknown_command(&self) -> bool {
        matches!(self, Self::Refused { status, .. } if status.code() == Code::Unimplemented)
    }

    /// What the agent said, if it obeys another controller that has this site's credentials.
    pub fn replaced(&self) -> Option<String> {
        let Self::Refused { status, .. } = self else {
            return None;
        };
        let reason = reason::of(status)?;
        ["STALE_TERM", "OTHER_CONTROLLER"]
            .contains(&reason.as_str())
            .then(|| self.to_string())
    }

    /// Whether nobody answered at all.
    pub fn is_silence(&self) -> bool {
        match self {
            Self::Timeout { .. } | Self::Channel { .. } => true,
            Self::Refused { status, .. } => match status.code() {
                Code::Unavailable | Code::DeadlineExceeded => true,
                // With a source it was made on this side: the connection broke before an answer came.
                Code::Unknown | Code::Cancelled | Code::Internal => status.source().is_some(),
                _ => false,
            },
            Self::UnknownHost(_) | Self::Malformed { .. } => false,
        }
    }
}

/// How an agent is reached.
pub trait Dial: Send + Sync + 'static {
    /// A way to the agent of `host` at `address`. Returns at once: it connects at the first call, and again by itself.
    fn dial(&self, host: &HostName, address: &str) -> Result<Caller, tls::Error>;
}

/// Over TLS, with the controller's identity.
impl Dial for Identity {
    fn dial(&self, host: &HostName, address: &str) -> Result<Caller, tls::Error> {
        let endpoint = format!("https://{address}");
        connect_lazy(&endpoint, &tls::agent_name(host), self).map(caller)
    }
}

type Client = AgentServiceClient<Caller>;

/// The agents of the site.
pub struct Agents {
    silent: Semaphore,
    /// Number of the last command.
    order: AtomicU64,
    dial: Arc<dyn Dial>,
    channels: Mutex<BTreeMap<HostName, (String, Caller)>>,
}

impl Agents {
    /// Nobody is dialled yet.
    pub fn new(dial: Arc<dyn Dial>) -> Self {
        Self {
            silent: Semaphore::new(CALLS_TO_SILENT_HOSTS),
            order: AtomicU64::new(0),
            dial,
            channels: Mutex::default(),
        }
    }

    /// A place among those who wait for hosts that do not report, if one is free.
    pub fn place_for_silent_host(&self) -> Option<SemaphorePermit<'_>> {
        self.silent.try_acquire().ok()
    }

    /// Closes the channel to a host that is no longer of the site, once nobody uses it.
    pub fn forget(&self, host: &HostName) {
        self.channels
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(host);
    }

    fn channel(&self, host: &HostName, address: &str) -> Result<Caller, Error> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, channel)) = channels.get(host).filter(|(known, _)| known == address) {
            return Ok(channel.clone());
        }
        let channel = self.dial.dial(host, address).map_err(|source| Error::Channel {
            host: host.clone(),
            source,
        })?;
        channels.insert(host.clone(), (address.to_owned(), channel.clone()));
        Ok(channel)
    }

    /// The way to a host, and what each command to it bears.
    fn reach(
        &self,
        state: &State,
        host: &HostName,
    ) -> Result<(Caller, Option<agent::CommandContext>), Error> {
        let record = state
            .hosts
            .get(host)
            .ok_or_else(|| Error::UnknownHost(host.clone()))?;
        let context = agent::CommandContext {
            cluster_id: state.meta.cluster_id.to_string(),
            term: state.meta.term.0,
            session: record.session.0,
            host: host.to_string(),
            controller_run_id: state.run_id.to_string(),
            order: self.order.fetch_add(1, Ordering::Relaxed) + 1,
        };
        Ok((self.channel(host, &record.address)?, Some(context)))
    }

    fn client(
        &self,
        state: &State,
        host: &HostName,
    ) -> Result<(Client, Option<agent::CommandContext>), Error> {
        let (caller, context) = self.reach(state, host)?;
        Ok((AgentServiceClient::new(caller), context))
    }

    /// Says what a VM of its owner should be.
    pub async fn ensure(&self, state: &State, vm: &VmRecord) -> Result<Reported, Error> {
        const COMMAND: &str = "EnsureVm";
        let (mut client, context) = self.client(state, &vm.owner)?;
        let images = match vm.unmade().next() {
            Some(_) => agent_wire::image::needs(state, vm, &vm.owner),
            None => Vec::new(),
        };
        let request = agent::EnsureVmRequest {
            context,
            vm: Some(agent::VmIntent {
                images,
                first_boot: agent_wire::documents(vm),
                ..agent_wire::intent(vm, &vm.intent, vm.epoch, &vm.owner)
            }),
        };
        let answer = call(&vm.owner, COMMAND, client.ensure_vm(request)).await?;
        answer
            .vm
            .and_then(|report| agent_wire::reported(&vm.owner, report))
            .ok_or_else(|| Error::Malformed {
                host: vm.owner.clone(),
                command: COMMAND,
            })
    }

    /// Says that a VM should be gone. `None` when nothing is left of it.
    pub async fn delete(&self, state: &State, vm: &VmRecord) -> Result<Option<Reported>, Error> {
        const COMMAND: &str = "DeleteVm";
        let (mut client, context) = self.client(state, &vm.owner)?;
        let Generation(generation) = vm.intent.generation;
        let request = agent::DeleteVmRequest {
            context,
            uid: vm.id.to_string(),
            generation,
            epoch: vm.epoch.0,
        };
        let answer = call(&vm.owner, COMMAND, client.delete_vm(request)).await?;
        if answer.gone {
            return Ok(None);
        }
        let report = answer
            .vm
            .and_then(|report| agent_wire::reported(&vm.owner, report));
        report.map(Some).ok_or_else(|| Error::Malformed {
            host: vm.owner.clone(),
            command: COMMAND,
        })
    }

    /// Tells the destination of a migration to make room.
    pub async fn prepare(
        &self,
        state: &State,
        vm: &VmRecord,
        migration: &MigrationRecord,
    ) -> Result<(), Error> {
        let host = &migration.destination;
        let (mut client, context) = self.client(state, host)?;
        let request = agent::PrepareMigrationRequest {
            context,
            migration_id: migration.id.to_string(),
            vm: Some(agent::VmIntent {
                images: agent_wire::image::needs(state, vm, host),
                ..agent_wire::intent(vm, &migration.intent, migration.destination_epoch, host)
            }),
            source_host: migration.source.to_string(),
        };
        call(host, "PrepareMigration", client.prepare_migration(request)).await?;
        Ok(())
    }

    /// Tells the source of a migration to begin.
    pub async fn start(&self, state: &State, migration: &MigrationRecord) -> Result<(), Error> {
        let vm = state.vms.get(&migration.vm);
        let host = &migration.source;
        let destination = &migration.destination;
        let target = state
            .hosts
            .get(destination)
            .ok_or_else(|| Error::UnknownHost(destination.clone()))?;
        let (mut client, context) = self.client(state, host)?;
        let request = agent::StartMigrationRequest {
            context,
            migration_id: migration.id.to_string(),
            vm_uid: migration.vm.to_string(),
            epoch: migration.source_epoch.0,
            destination_host: destination.to_string(),
            destination_address: target.address.clone(),
            max_downtime_ms: migration.max_downtime_ms,
            bandwidth_mib_per_second: migration.bandwidth_mib_per_second,
            numa: vm.map_or_else(Vec::new, |vm| agent_wire::places(vm, destination)),
        };
        call(host, "StartMigration", client.start_migration(request)).await?;
        Ok(())
    }

    /// Asks a host how far its part in a migration is.
    pub async fn part(&self, state: &State, host: &HostName, id: MigrationId) -> Result<Part, Error> {
        let (mut client, context) = self.client(state, host)?;
        let request = agent::GetMigrationRequest {
            context,
            migration_id: id.to_string(),
        };
        Ok(agent_wire::part(
            call(host, "GetMigration", client.get_migration(request)).await?,
        ))
    }

    /// Asks a host to promise that nothing moves any more, and what is there.
    pub async fn settle(
        &self,
        state: &State,
        host: &HostName,
        id: MigrationId,
        vm: VmId,
    ) -> Result<Part, Error> {
        let (mut client, context) = self.client(state, host)?;
        let request = agent::SettleMigrationRequest {
            context,
            migration_id: id.to_string(),
            vm_uid: vm.to_string(),
        };
        Ok(agent_wire::part(
            call(host, "SettleMigration", client.settle_migration(request)).await?,
        ))
    }

    /// Tells a host who owns the VM; whether it has tidied up.
    pub async fn finish(
        &self,
        state: &State,
        host: &HostName,
        id: MigrationId,
        vm: VmId,
        owner: bool,
        epoch: Epoch,
    ) -> Result<bool, Error> {
        let (mut client, context) = self.client(state, host)?;
        let request = agent::FinishMigrationRequest {
            context,
            migration_id: id.to_string(),
            vm_uid: vm.to_string(),
            owner,
            epoch: epoch.0,
        };
        Ok(call(host, "FinishMigration", client.finish_migration(request))
            .await?
            .done)
    }

    /// Opens a VM's console log on its owner.
    pub async fn console(
        &self,
        state: &State,
        vm: &VmRecord,
        tail_bytes: u64,
        follow: bool,
    ) -> Result<Streaming<agent::ReadConsoleResponse>, Error> {
        let (mut client, _) = self.client(state, &vm.owner)?;
        let request = agent::ReadConsoleRequest {
            uid: vm.id.to_string(),
            tail_bytes,
            follow,
        };
        call(&vm.owner, "ReadConsole", client.read_console(request)).await
    }
}

async fn call<T>(
    host: &HostName,
    command: &'static str,
    answer: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Error> {
    match tokio::time::timeout(COMMAND_TIMEOUT, answer).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(Error::Refused {
            host: host.clone(),
            command,
            status: Box::new(status),
        }),
        Err(_) => Err(Error::Timeout {
            host: host.clone(),
            command,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(status: Status) -> Error {
        Error::Refused {
            host: "h1".parse().unwrap(),
            command: "EnsureVm",
            status: Box::new(status),
        }
    }

    #[test]
    fn only_an_answer_that_would_be_the_same_again_is_final() {
        let said = |code, reason| {
            refused(reason::status(code, reason, "x"))
                .refusal()
                .map(|fault| fault.reason)
        };
        assert_eq!(
            said(Code::InvalidArgument, "IMAGE_NOT_FOUND").as_deref(),
            Some("IMAGE_NOT_FOUND")
        );
        assert_eq!(
            said(Code::FailedPrecondition, "GENERATION_CONFLICT").as_deref(),
            Some("GENERATION_CONFLICT")
        );
        for (code, reason) in [
            (Code::FailedPrecondition, "WRONG_SESSION"),
            (Code::FailedPrecondition, "STALE_TERM"),
            (Code::Unavailable, "RECOVERING"),
            (Code::ResourceExhausted, "BUSY"),
        ] {
            assert_eq!(said(code, reason), None, "{reason}");
        }
        assert_eq!(refused(Status::unavailable("connection refused")).refusal(), None);
        let migrating = reason::status(Code::FailedPrecondition, "MIGRATION_IN_PROGRESS", "x");
        assert_eq!(refused(migrating.clone()).refusal(), None, "it has an end");
        let prepare = Error::Refused {
            host: "h1".parse().unwrap(),
            command: "PrepareMigration",
            status: Box::new(migrating),
        };
        assert!(
            prepare.refusal().is_some(),
            "a restore has forgotten the other one"
        );
        assert!(refused(Status::unavailable("connection refused")).is_silence());
    }

    #[test]
    fn a_connection_that_breaks_before_an_answer_is_silence_and_what_an_agent_says_is_not() {
        for code in [Code::Unknown, Code::Cancelled, Code::Internal] {
            let mut broken = Status::new(code, "transport error");
            assert!(!refused(broken.clone()).is_silence(), "{code:?}");
            broken.set_source(Arc::new(std::io::Error::from(std::io::ErrorKind::BrokenPipe)));
            assert!(refused(broken).is_silence(), "{code:?}");
        }
    }

    #[derive(Default)]
    struct Counted(std::sync::atomic::AtomicUsize);

    impl Dial for Counted {
        fn dial(&self, host: &HostName, address: &str) -> Result<Caller, tls::Error> {
            self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            let nobody = tonic::service::Routes::default();
            let peer = tls::Peer {
                role: tls::Role::Controller,
                name: format!("{host} {address}"),
            };
            Ok(tls::client::caller_in_process_as(peer, nobody))
        }
    }

    #[test]
    fn a_host_is_dialled_once_and_again_at_another_address_or_when_it_was_forgotten() {
        let dial = Arc::new(Counted::default());
        let agents = Agents::new(dial.clone());
        let host: HostName = "h1".parse().unwrap();
        let dialled = |address| {
            agents.channel(&host, address).unwrap();
            dial.0.load(std::sync::atomic::Ordering::SeqCst)
        };
        assert_eq!([dialled("a:1"), dialled("a:1"), dialled("b:1")], [1, 1, 2]);
        agents.forget(&host);
        assert!(agents.channels.lock().unwrap().is_empty());
        assert_eq!([dialled("b:1"), dialled("b:1")], [3, 3]);
    }
}
