//! Makes a program speak an earlier version: each message passes through that version's descriptors, so that fields it does not
//! have are dropped as its own decoder would, and calls it does not have are UNIMPLEMENTED.
//!
//! Values of enums stay numbers, as they do in every version.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use prost::{Message, bytes::Bytes};
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};

use super::wire::{Side, Tap};

/// See the module.
pub struct Lens {
    pool: DescriptorPool,
    calls: BTreeSet<String>,
}

impl Lens {
    /// The version of these descriptors.
    ///
    /// # Errors
    /// If they are none.
    pub fn new(descriptors: &[u8]) -> Result<Self> {
        let pool = DescriptorPool::decode(descriptors).context("the recorded descriptors")?;
        let calls = pool
            .services()
            .flat_map(|service| service.methods().collect::<Vec<_>>());
        let calls = calls
            .map(|method| format!("/{}/{}", method.parent_service().full_name(), method.name()))
            .collect();
        Ok(Self { pool, calls })
    }

    /// Its calls, "/SERVICE/METHOD".
    pub fn calls(&self) -> &BTreeSet<String> {
        &self.calls
    }

    /// The type of a call's message.
    pub fn message_of(&self, path: &str, side: Side) -> Option<MessageDescriptor> {
        let (service, method) = path.strip_prefix('/')?.split_once('/')?;
        let service = self.pool.get_service_by_name(service)?;
        let method = service.methods().find(|known| known.name() == method)?;
        Some(match side {
            Side::Request => method.input(),
            Side::Answer => method.output(),
        })
    }

    /// A message as this version reads it.
    ///
    /// # Errors
    /// If the version has no such call, or cannot read the message.
    pub fn read(&self, path: &str, side: Side, message: &[u8]) -> Result<DynamicMessage> {
        let of = self.message_of(path, side).context("no such call")?;
        Ok(DynamicMessage::decode(of, message)?)
    }
}

impl Tap for Lens {
    fn has(&self, path: &str) -> bool {
        self.calls.contains(path)
    }

    fn message(&self, _call: u64, path: &str, side: Side, message: Bytes) -> Bytes {
        let mut read = self
            .read(path, side, &message)
            .unwrap_or_else(|error| panic!("{path} {side:?} cannot be read by the earlier version: {error}"));
        forget_unknown(&mut read);
        read.encode_to_vec().into()
    }
}

/// Drops what is not in the descriptors, at every depth.
pub fn forget_unknown(message: &mut DynamicMessage) {
    use prost_reflect::Value;
    message.take_unknown_fields().for_each(drop);
    for (_, value) in message.fields_mut() {
        match value {
            Value::Message(inner) => forget_unknown(inner),
            Value::List(items) => items.iter_mut().for_each(|item| {
                if let Value::Message(inner) = item {
                    forget_unknown(inner);
                }
            }),
            Value::Map(entries) => entries.values_mut().for_each(|item| {
                if let Value::Message(inner) = item {
                    forget_unknown(inner);
                }
            }),
            _ => {}
        }
    }
}
