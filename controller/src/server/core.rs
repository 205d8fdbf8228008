//! The controller without its port, its certificates and its files: the state, the agents, the reconciler, the tasks
//! beside it, and the services.
//!
//! [`super::Controller`] is this behind a TLS port. Tests that hold the time start it by itself: all that it knows of the
//! world it is handed here, and it calls nothing else. The same inputs at the same times give the same history.

use std::{num::NonZeroU32, panic::AssertUnwindSafe, sync::Arc};

use dalgu_proto::{
    agent::v1::registrar_service_server::RegistrarServiceServer,
    ids::{ClusterId, NewIds},
    size::MAX_REQUEST_BYTES,
    time::Clock,
    tls::{
        Peer,
        client::{Caller, caller_in_process_as},
    },
    v1,
};
use futures::FutureExt;
use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::{Routes, interceptor::InterceptedService};

use super::Error;
use crate::{
    agent_client::{Agents, Dial},
    api::{self, Services},
    backups,
    config::Config,
    drains, hosts, housekeeping, images,
    metrics::{Metrics, Page},
    networks,
    plans::{self, automatic::Kind},
    power::{self, Power},
    reconcile::{queue::Queue, runner::Runner},
    state::{BeforeCommit, Db, Hooks},
    store::{self, Store},
    volumes,
};

/// How the store's writer runs.
pub enum Writer {
    /// On its own thread: a commit may block.
    Thread,
    /// As a task, after this wait before each commit: for a store that answers at once.
    Task(BeforeCommit),
}

/// What a controller is handed besides its configuration and the way to its agents.
pub struct Parts {
    /// Where records are kept.
    pub store: Box<dyn Store>,
    /// How they get there.
    pub writer: Writer,
    /// What follows from a failed commit.
    pub failed: Box<dyn Fn(&store::Error) + Send + Sync>,
    /// The wall clock.
    pub clock: Clock,
    /// Where new ids come from.
    pub new_ids: NewIds,
    /// What switches hosts on and off; `None` for Redfish, as the configuration has it.
    pub power: Option<Arc<dyn Power>>,
}

impl Parts {
    /// A store, and for the rest what the program uses.
    pub fn new(store: impl Store, failed: impl Fn(&store::Error) + Send + Sync + 'static) -> Self {
        Self {
            store: Box::new(store),
            writer: Writer::Thread,
            failed: Box::new(failed),
            clock: Clock::system(),
            new_ids: NewIds::random(),
            power: None,
        }
    }
}

/// A running controller that nothing leads to but its own methods.
pub struct Core {
    services: Services,
    routes: Routes,
    queue: Arc<Queue<dalgu_proto::ids::VmId>>,
    metrics: Arc<Metrics>,
    tasks: TaskTracker,
    failed: mpsc::Receiver<&'static str>,
}

impl Core {
    /// Starts a controller: its term is in the store when this returns. It runs until `stop`.
    pub async fn start(
        config: Arc<Config>,
        cluster_id: ClusterId,
        dial: Arc<dyn Dial>,
        parts: Parts,
        stop: CancellationToken,
    ) -> Result<Self, Error> {
        let metrics = Arc::new(Metrics::default());
        let queue = Arc::new(Queue::default());
        let hooks = Hooks {
            touched: Box::new({
                let queue = queue.clone();
                move |vms| vms.iter().for_each(|vm| queue.add(*vm))
            }),
            committed: Box::new({
                let metrics = metrics.clone();
                move |time| metrics.committed(time)
            }),
            failed: parts.failed,
            events_kept: usize::try_from(config.event_retention).unwrap_or(usize::MAX),
            clock: parts.clock,
            new_ids: parts.new_ids,
        };
        let (fail, failed) = mpsc::channel(1);
        let db = match parts.writer {
            Writer::Thread => Db::open(parts.store, cluster_id, hooks)?,
            Writer::Task(before_commit) => {
                let (db, writing) = Db::open_as_task(parts.store, cluster_id, hooks, before_commit).await?;
                // Not among the tasks that the end waits for: it ends with the last handle to the state.
                tokio::spawn(vital("store", fail.clone(), writing));
                db
            }
        };
        configure(&db, &config).await;
        let agents = Arc::new(Agents::new(dial));
        let power = parts.power.unwrap_or_else(|| config.power.redfish());
        let services = Services {
            db: db.clone(),
            power: power.clone(),
            agents: agents.clone(),
            config: config.clone(),
            metrics: metrics.clone(),
            plan_usage: plans::usage::Usage::default(),
            stop: stop.clone(),
        };
        let tasks = TaskTracker::new();
        let heartbeat = hosts::heartbeat::run(db.clone(), config.unreachable_after(), stop.clone());
        tasks.spawn(vital("heartbeat", fail.clone(), heartbeat));
        let housekeeping = housekeeping::run(db.clone(), config.operation_retention(), stop.clone());
        tasks.spawn(vital("housekeeping", fail.clone(), housekeeping));
        let images = images::runner::Runner {
            db: db.clone(),
            agents: agents.clone(),
        };
        tasks.spawn(vital("images", fail.clone(), images.run(stop.clone())));
        let networks = networks::runner::Runner {
            db: db.clone(),
            agents: agents.clone(),
        };
        tasks.spawn(vital("networks", fail.clone(), networks.run(stop.clone())));
        let volumes = volumes::runner::Runner {
            db: db.clone(),
            agents: agents.clone(),
        };
        tasks.spawn(vital("volumes", fail.clone(), volumes.run(stop.clone())));
        let backups = backups::runner::Runner {
            db: db.clone(),
            agents: agents.clone(),
        };
        tasks.spawn(vital("backups", fail.clone(), backups.run(stop.clone())));
        let drains = drains::runner::Runner {
            db: db.clone(),
            policy: config.placement.policy(),
        };
        tasks.spawn(vital("drains", fail.clone(), drains.run(stop.clone())));
        let (relieved, emptied) = config.moves_an_hour();
        let plans = plans::runner::Runner {
            db: db.clone(),
            policy: config.placement.policy(),
            usage: services.plan_usage.clone(),
            moves_an_hour: [(Kind::Rebalance, relieved), (Kind::Consolidate, emptied)],
        };
        tasks.spawn(vital("plans", fail.clone(), plans.run(stop.clone())));
        let usage = services.plan_usage.clone();
        let power = power::runner::Runner::new(db.clone(), power, usage, &config.power);
        tasks.spawn(vital("power", fail.clone(), power.run(stop.clone())));
        let runner = Runner {
            db,
            agents,
            queue: queue.clone(),
            metrics: metrics.clone(),
        };
        tasks.spawn(vital("reconciler", fail, runner.run(stop)));
        tasks.close();
        Ok(Self {
            routes: routes(&services),
            services,
            queue,
            metrics,
            tasks,
            failed,
        })
    }

    /// Its state.
    pub fn db(&self) -> &Db {
        &self.services.db
    }

    /// Its services. Each call must bear the [`Peer`] that it comes from among its extensions, and is not checked for
    /// whether that one may make it; [`Core::caller`] does both.
    pub fn services(&self) -> &Services {
        &self.services
    }

    /// Calls its services in this process as if `peer` had called through the port: by the same rules, and through all
    /// of gRPC's encoding.
    pub fn caller(&self, peer: Peer) -> Caller {
        caller_in_process_as(peer, self.routes.clone())
    }

    /// The services that serve the API, each with the rule who may call it.
    pub(super) fn routes(&self) -> Routes {
        self.routes.clone()
    }

    /// Its metrics page.
    pub fn page(&self) -> Page {
        self.metrics.page(self.db().clone(), self.queue.clone())
    }

    /// What [`Core::stopped`] waits for.
    pub(super) fn tasks(&self) -> &TaskTracker {
        &self.tasks
    }

    /// Waits for a part to fail, which is a defect: without it the rest would seem to work. Returns which. Cancel safe.
    pub async fn failed(&mut self) -> &'static str {
        match self.failed.recv().await {
            Some(part) => part,
            // All parts have ended as they were told to.
            None => std::future::pending().await,
        }
    }

    /// Waits until all has ended that was under way. For ever, unless it was told to stop.
    pub async fn stopped(&self) {
        self.tasks.wait().await;
    }
}

/// What of the configuration the state goes by.
async fn configure(db: &Db, config: &Config) {
    db.change(|tx| {
        tx.set_pool_policy(config.pool_policy());
        tx.set_cpu_bounds(config.placement.cpu_overcommit.bounds());
        tx.set_close_pressed(config.placement.close_pressed_hosts);
        tx.set_wakes_hosts(config.power.automatic);
        tx.set_protect(Arc::new(config.placement.protect.clone()));
        tx.set_vms_most(config.placement.max_vms_per_host.map(NonZeroU32::get));
    })
    .await;
}

/// Runs a part of the controller that nobody waits for, and tells when it fails.
async fn vital(name: &'static str, failed: mpsc::Sender<&'static str>, part: impl Future<Output = ()>) {
    if AssertUnwindSafe(part).catch_unwind().await.is_err() {
        // Full: another part has failed already.
        let _ = failed.try_send(name);
    }
}

/// Decides who may call a service.
#[allow(
    clippy::result_large_err,
    reason = "tonic's error is what an interceptor returns"
)]
pub(super) type Rule = fn(tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status>;

macro_rules! guarded {
    ($server:expr, $rule:path) => {
        InterceptedService::new(
            $server.max_decoding_message_size(MAX_REQUEST_BYTES),
            $rule as Rule,
        )
    };
}

fn routes(services: &Services) -> Routes {
    let s = services;
    Routes::default()
        .add_service(guarded!(
            v1::vm_service_server::VmServiceServer::new(s.clone()),
            api::only_operators
        ))
        .add_service(guarded!(
            v1::host_service_server::HostServiceServer::new(s.clone()),
            api::only_operators
        ))
        .add_service(guarded!(
            v1::operation_service_server::OperationServiceServer::new(s.clone()),
            api::only_operators
        ))
        .add_service(guarded!(
            v1::placement_service_server::PlacementServiceServer::new(s.clone()),
            api::only_operators
        ))
        .add_service(guarded!(
            v1::event_service_server::EventServiceServer::new(s.clone()),
            api::only_operators
        ))
        .add_service(guarded!(
            v1::site_service_server::SiteServiceServer::new(s.clone()),
            api::only_operators
        ))
        .add_service(guarded!(
            v1::image_service_server::ImageServiceServer::new(s.clone()),
            api::only_operators
        ))
        .add_service(guarded!(
            v1::backup_service_server::BackupServiceServer::new(s.clone()),
            api::only_operators
        ))
        .add_service(guarded!(
            v1::network_service_server::NetworkServiceServer::new(s.clone()),
            api::only_operators
        ))
        .add_service(guarded!(
            v1::volume_service_server::VolumeServiceServer::new(s.clone()),
            api::only_operators
        ))
        .add_service(guarded!(
            v1::snapshot_service_server::SnapshotServiceServer::new(s.clone()),
            api::only_operators
        ))
        .add_service(guarded!(
            v1::plan_service_server::PlanServiceServer::new(s.clone()),
            api::only_operators
        ))
        .add_service(guarded!(RegistrarServiceServer::new(s.clone()), api::only_agents))
}

#[cfg(test)]
mod tests;
