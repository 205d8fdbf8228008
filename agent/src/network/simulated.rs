//! Networks where nothing is: for simulated hosts. What is wanted holds at once.

use std::net::IpAddr;

use async_trait::async_trait;
use dalgu_proto::host::GuestFeature;
use futures::future::BoxFuture;
use tokio::time::Instant;

use super::{Plugged, Problems, System, Wanted};

/// See the module's documentation.
#[derive(Debug, Clone, Copy, Default)]
pub struct Simulated {
    /// What it says of itself.
    pub overlay_address: Option<IpAddr>,
}

#[async_trait]
impl System for Simulated {
    async fn features(&self) -> Vec<GuestFeature> {
        vec![
            GuestFeature::Network,
            GuestFeature::Overlay,
            GuestFeature::Vlan,
            GuestFeature::IcmpType,
        ]
    }

    fn overlay_address(&self) -> Option<IpAddr> {
        self.overlay_address
    }

    async fn make(&self, _wanted: &Wanted) -> Problems {
        Problems::default()
    }

    async fn broken(&self) {
        std::future::pending().await
    }

    async fn arrived(&self, _plugged: &Plugged) {}

    async fn first_word(&self, _tap: &str) -> Option<BoxFuture<'static, Instant>> {
        None
    }

    async fn stop(&self) {}
}
