//! Makes a program speak a version that does not exist yet: fields that nobody knows, and values that no enum has.

use std::collections::BTreeSet;

use prost::{Message, bytes::Bytes};
use prost_reflect::{DynamicMessage, ReflectMessage as _, Value};

use super::{
    full,
    lens::Lens,
    wire::{Side, Tap},
};

/// A value that no enum has.
pub const UNKNOWN: i32 = 77;
/// Field 4000, a text: "new".
const FIELD: [u8; 7] = [0x82, 0xfa, 0x01, 3, b'n', b'e', b'w'];

/// Adds a field that nobody knows to every message at every depth.
pub struct MoreFields(Lens);

impl MoreFields {
    /// To the messages of this version.
    ///
    /// # Panics
    /// If this build's descriptors are none.
    pub fn new() -> Self {
        Self(Lens::new(dalgu_proto::DESCRIPTORS).expect("the compiler of this build made them"))
    }
}

impl Default for MoreFields {
    fn default() -> Self {
        Self::new()
    }
}

impl Tap for MoreFields {
    fn message(&self, _call: u64, path: &str, side: Side, message: Bytes) -> Bytes {
        match self.0.read(path, side, &message) {
            Ok(read) => with_more(&read).into(),
            Err(_) => message,
        }
    }
}

/// The encoding of a message with a field that nobody knows, in it and in each message in it.
pub fn with_more(message: &DynamicMessage) -> Vec<u8> {
    let mut message = message.clone();
    deepen(&mut message);
    message.encode_to_vec()
}

fn deepen(message: &mut DynamicMessage) {
    let of = message.descriptor();
    for (_, value) in message.fields_mut() {
        match value {
            Value::Message(inner) => deepen(inner),
            Value::List(items) => items.iter_mut().for_each(|item| {
                if let Value::Message(inner) = item {
                    deepen(inner);
                }
            }),
            _ => {}
        }
    }
    // Decoded again, it is kept as what is unknown, and encoded with the rest.
    let mut bytes = message.encode_to_vec();
    bytes.extend(FIELD);
    *message = DynamicMessage::decode(of, bytes.as_slice()).expect("a field more is no error");
}

/// Replaces the values of chosen enums.
pub struct MoreValues {
    lens: Lens,
    calls: BTreeSet<&'static str>,
    fields: BTreeSet<&'static str>,
}

impl MoreValues {
    /// In these calls ("EnsureVm"), in both directions, the enums of these names ("power_state").
    ///
    /// # Panics
    /// If this build's descriptors are none.
    pub fn new(calls: &[&'static str], fields: &[&'static str]) -> Self {
        Self {
            lens: Lens::new(dalgu_proto::DESCRIPTORS).expect("the compiler of this build made them"),
            calls: calls.iter().copied().collect(),
            fields: fields.iter().copied().collect(),
        }
    }
}

impl Tap for MoreValues {
    fn message(&self, _call: u64, path: &str, side: Side, message: Bytes) -> Bytes {
        let call = path.rsplit('/').next().unwrap_or_default();
        // A request tells what is wanted; what agents say of themselves is in their reports and answers.
        let told = side == Side::Answer || ["Register", "Report"].contains(&call);
        if !told || !self.calls.contains(call) {
            return message;
        }
        let Ok(mut read) = self.lens.read(path, side, &message) else {
            return message;
        };
        replace(&mut read, &self.fields);
        read.encode_to_vec().into()
    }
}

fn replace(message: &mut DynamicMessage, fields: &BTreeSet<&'static str>) {
    let of = message.descriptor();
    for field in of.fields() {
        let is_enum = matches!(field.kind(), prost_reflect::Kind::Enum(_));
        if is_enum && fields.contains(field.name()) && !field.is_list() {
            full::set_enum(message, &[field], UNKNOWN);
        }
    }
    for (_, value) in message.fields_mut() {
        match value {
            Value::Message(inner) => replace(inner, fields),
            Value::List(items) => items.iter_mut().for_each(|item| {
                if let Value::Message(inner) = item {
                    replace(inner, fields);
                }
            }),
            _ => {}
        }
    }
}
