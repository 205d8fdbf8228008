//! What a guest is told at its first boot: the validated form of `dalgu.v1.FirstBoot`, and the documents that belong to it.
//!
//! [`FirstBoot`] is part of a [`Spec`](super::Spec), so it is compared, stored and shown like the rest of it; of the
//! documents it has fingerprints only. The [`Documents`] themselves may hold passwords. They travel beside the specification, are
//! kept until the volume is made, and are printed by nothing: the messages that bear them have no debug form either.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Disk, Invalid};
use crate::{
    agent::v1::FirstBootDocuments,
    image::Digest,
    secret::Secret,
    v1::{self, DocumentDigest},
};

pub(super) mod check;
mod yaml;

/// Largest document, in bytes.
pub const MAX_DOCUMENT_BYTES: usize = 64 << 10;
/// Most public keys.
pub const MAX_KEYS: usize = 64;
/// Longest public key, in bytes.
pub const MAX_KEY_BYTES: usize = 4096;
/// Name of the volume among a VM's disks. No disk can be called so: names of disks have no `_`.
pub const MEDIUM: &str = "first_boot";
/// Size of the volume. Documents and keys at their largest fit, even if each character of a key is one that JSON escapes.
pub const MEDIUM_MIB: u64 = 1;

/// What a guest is told at its first boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirstBoot {
    /// Host name; `None` for the VM's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Public keys, one line each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ssh_keys: Vec<String>,
    /// The document for cloud-init.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_data: Option<Fingerprint>,
    /// The network configuration; `None` for the usual one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_config: Option<Fingerprint>,
    /// The volume that tells it.
    pub medium: Disk,
}

/// What is known of a document without having it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Its SHA-256.
    pub sha256: Digest,
    /// Its size.
    pub size_bytes: u64,
}

impl Fingerprint {
    /// Of a document.
    pub fn of(text: &str) -> Self {
        let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest.as_ref());
        Self {
            sha256: Digest::from_bytes(&bytes),
            size_bytes: text.len() as u64,
        }
    }
}

impl From<Fingerprint> for DocumentDigest {
    fn from(own: Fingerprint) -> Self {
        Self {
            sha256: own.sha256.into(),
            size_bytes: own.size_bytes,
        }
    }
}

/// The documents of a [`FirstBoot`], as far as they are here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Documents {
    /// For cloud-init.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_data: Option<Secret>,
    /// The network configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_config: Option<Secret>,
}

fn kept(text: &str) -> Option<Secret> {
    (!text.is_empty()).then(|| Secret::new(text.to_owned()))
}

impl Documents {
    /// Whether there is none.
    pub const fn is_empty(&self) -> bool {
        self.user_data.is_none() && self.network_config.is_none()
    }
}

impl From<&v1::FirstBoot> for Documents {
    fn from(wire: &v1::FirstBoot) -> Self {
        Self {
            user_data: kept(&wire.user_data),
            network_config: kept(&wire.network_config),
        }
    }
}

impl From<&FirstBootDocuments> for Documents {
    fn from(wire: &FirstBootDocuments) -> Self {
        Self {
            user_data: kept(&wire.user_data),
            network_config: kept(&wire.network_config),
        }
    }
}

impl From<&Documents> for FirstBootDocuments {
    fn from(own: &Documents) -> Self {
        let text =
            |secret: &Option<Secret>| secret.as_ref().map(Secret::expose).unwrap_or_default().to_owned();
        Self {
            user_data: text(&own.user_data),
            network_config: text(&own.network_config),
        }
    }
}

impl FirstBoot {
    /// That these are its documents, all of them.
    ///
    /// # Errors
    /// The field whose document is missing, is another, or is not expected.
    pub fn check(&self, documents: &Documents) -> Result<(), Invalid> {
        let pairs = [
            ("user_data", &self.user_data, &documents.user_data),
            ("network_config", &self.network_config, &documents.network_config),
        ];
        for (field, known, document) in pairs {
            let found = document
                .as_ref()
                .map(|document| Fingerprint::of(document.expose()));
            if *known == found {
                continue;
            }
            let message = match document {
                None => {
                    "only its digest is here: documents are not kept once the VM's disks are made, give it again"
                }
                Some(_) => "is not the document that its digest is of",
            };
            return Err(Invalid {
                field: format!("first_boot.{field}"),
                message: message.to_owned(),
            });
        }
        Ok(())
    }
}

impl From<FirstBoot> for v1::FirstBoot {
    fn from(own: FirstBoot) -> Self {
        Self {
            user_data: String::new(),
            network_config: String::new(),
            ssh_authorized_keys: own.ssh_keys,
            hostname: own.hostname.unwrap_or_default(),
            pool: own.medium.pool,
            user_data_digest: own.user_data.map(Into::into),
            network_config_digest: own.network_config.map(Into::into),
        }
    }
}

impl fmt::Debug for v1::FirstBoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FirstBoot")
            .field("documents", &Documents::from(self))
            .field("ssh_authorized_keys", &self.ssh_authorized_keys)
            .field("hostname", &self.hostname)
            .field("pool", &self.pool)
            .field("user_data_digest", &self.user_data_digest)
            .field("network_config_digest", &self.network_config_digest)
            .finish()
    }
}

impl fmt::Debug for FirstBootDocuments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Documents::from(self).fmt(f)
    }
}

#[cfg(test)]
mod tests;
