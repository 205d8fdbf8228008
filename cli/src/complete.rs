//! Completion of names with the Tab key: asks the controller of the default context, briefly and silently. Called by
//! the shell through `clap_complete`, before any argument is parsed.

use std::{env, time::Duration};

use clap_complete::engine::{ArgValueCandidates, CompletionCandidate};
use dalgu_proto::v1;
use tonic::Status;

use crate::{client::Client, config::Choice};

/// Nobody waits longer for a Tab.
const PATIENCE: Duration = Duration::from_secs(1);

/// Names of VMs.
pub fn vms() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        ask(async |client| {
            let request = v1::ListVmsRequest {
                page_size: 1000,
                ..Default::default()
            };
            let page = client.vms().list_vms(request).await?.into_inner();
            Ok(page.vms.into_iter().map(|vm| vm.name).collect())
        })
    })
}

/// Names of hosts.
pub fn hosts() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        ask(async |client| {
            let request = v1::ListHostsRequest {
                page_size: 1000,
                ..Default::default()
            };
            let page = client.hosts().list_hosts(request).await?.into_inner();
            Ok(page.hosts.into_iter().map(|host| host.name).collect())
        })
    })
}

/// Names and versions of images.
pub fn images() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        ask(async |client| {
            let request = v1::ListImagesRequest {
                page_size: 1000,
                ..Default::default()
            };
            let page = client.images().list_images(request).await?.into_inner();
            let name = |image: v1::Image| format!("{}:{}", image.name, image.version);
            Ok(page.images.into_iter().map(name).collect())
        })
    })
}

/// Names of networks.
pub fn networks() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        ask(async |client| {
            let request = v1::ListNetworksRequest {
                page_size: 1000,
                ..Default::default()
            };
            let page = client.networks().list_networks(request).await?.into_inner();
            Ok(page.networks.into_iter().map(|network| network.name).collect())
        })
    })
}

/// Names of volumes.
pub fn volumes() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        ask(async |client| {
            let request = v1::ListVolumesRequest {
                page_size: 1000,
                ..Default::default()
            };
            let page = client.volumes().list_volumes(request).await?.into_inner();
            Ok(page.volumes.into_iter().map(|volume| volume.name).collect())
        })
    })
}

/// Names of security groups.
pub fn security_groups() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        ask(async |client| {
            let request = v1::ListSecurityGroupsRequest {
                page_size: 1000,
                ..Default::default()
            };
            let page = client
                .networks()
                .list_security_groups(request)
                .await?
                .into_inner();
            Ok(page.security_groups.into_iter().map(|group| group.name).collect())
        })
    })
}

/// Names of placement groups.
pub fn placement_groups() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        ask(async |client| {
            let request = v1::ListPlacementGroupsRequest {
                page_size: 1000,
                ..Default::default()
            };
            let page = client.placement().list_placement_groups(request).await?;
            let groups = page.into_inner().placement_groups.into_iter();
            Ok(groups.map(|group| group.name).collect())
        })
    })
}

/// Ids of operations that have not ended.
pub fn operations() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        ask(async |client| {
            let request = v1::ListOperationsRequest {
                active_only: true,
                ..Default::default()
            };
            let page = client.operations().list_operations(request).await?.into_inner();
            Ok(page
                .operations
                .into_iter()
                .map(|operation| operation.id)
                .collect())
        })
    })
}

/// Names of contexts.
pub fn contexts() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let names = choice()
            .load()
            .map(|config| config.contexts.into_keys().collect());
        candidates(names.unwrap_or_default())
    })
}

fn choice() -> Choice {
    let text = |name| env::var(name).ok().filter(|value| !value.is_empty());
    Choice {
        config: text("DALGU_CONFIG").map(Into::into),
        context: text("DALGU_CONTEXT"),
        endpoint: text("DALGU_ENDPOINT"),
    }
}

fn candidates(names: Vec<String>) -> Vec<CompletionCandidate> {
    names.into_iter().map(CompletionCandidate::new).collect()
}

/// What cannot be had in time is not completed: an error text would end up in the command line.
fn ask(question: impl AsyncFn(&Client) -> Result<Vec<String>, Status>) -> Vec<CompletionCandidate> {
    let Ok(target) = choice().target() else {
        return Vec::new();
    };
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return Vec::new();
    };
    let answer = async {
        let client = Client::connect(&target).await.ok()?;
        question(&client).await.ok()
    };
    let names = runtime.block_on(async { tokio::time::timeout(PATIENCE, answer).await });
    candidates(names.ok().flatten().unwrap_or_default())
}
