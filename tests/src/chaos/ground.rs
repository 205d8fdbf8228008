//! What a chaos run adds to a lab: each host's ledger and local pool on small file systems of their own, so that a disk
//! can be full without the machine's being so, and room for more guests than the machine has processors.
//! Called once at the beginning. `lab down` removes it all.

use std::fs;
use std::path::PathBuf;

use anyhow::Context as _;
use dalgu_proto::v1;
use nix::mount::{MsFlags, mount};

use crate::lab::Lab;
use crate::operator::Operator;

/// What lies on a small file system of its own, and its size.
const SMALL: [(Disk, &str); 2] = [(Disk::Ledger, "size=2m"), (Disk::Pool, "size=96m")];

/// A file system that can be full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Disk {
    /// The agent's ledger.
    Ledger,
    /// The host's own pool of VM disks.
    Pool,
}

impl Disk {
    fn path(self) -> &'static str {
        match self {
            Self::Ledger => "/var/lib/dalgu/agent",
            Self::Pool => "/var/lib/dalgu/local",
        }
    }

    /// The file that fills it, seen from outside the host.
    #[must_use]
    pub fn filler(self, lab: &Lab, host: u8) -> PathBuf {
        lab.layout().host(host).outside(self.path()).join(".full")
    }
}

/// Puts ledgers and pools on file systems of their own. The hosts are restarted for it: they see what was mounted before.
///
/// # Errors
/// If a mount fails or a host does not come back.
pub async fn lay(lab: &Lab) -> anyhow::Result<()> {
    for host in lab.hosts() {
        lab.power_off(host.number).await?;
        for (disk, size) in SMALL {
            let place = host.outside(disk.path());
            fs::create_dir_all(&place)?;
            let none = MsFlags::empty();
            mount(Some("dalgu-chaos"), &place, Some("tmpfs"), none, Some(size))
                .with_context(|| format!("mount a small file system on {}", place.display()))?;
        }
        lab.power_on(host.number).await?;
    }
    Ok(())
}

/// Lets hosts promise more processors than the machine has: the guests are mostly idle.
///
/// # Errors
/// If the controller refuses.
pub async fn make_room(operator: &Operator) -> anyhow::Result<()> {
    for host in operator.all_hosts().await?.into_values() {
        let request = v1::UpdateHostRequest {
            host: Some(v1::Host {
                name: host.name,
                cpu_overcommit_ratio: 16.0,
                ..v1::Host::default()
            }),
            update_mask: Some(prost_types::FieldMask {
                paths: vec!["cpu_overcommit_ratio".to_owned()],
            }),
            ..v1::UpdateHostRequest::default()
        };
        Box::pin(operator.hosts().update_host(request))
            .await
            .context("raise the over-commit ratio")?;
    }
    Ok(())
}
