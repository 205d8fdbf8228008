//! Messages with something in each of their fields, by their descriptors: what comes to the API later is in them too.

use std::sync::LazyLock;

use prost::Message;
use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, Value,
};

/// This version's messages.
pub static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(dalgu_proto::DESCRIPTORS).expect("the compiler of this build made them")
});

/// A message of this version by its full name.
pub fn descriptor(name: &str) -> MessageDescriptor {
    POOL.get_message_by_name(name)
        .unwrap_or_else(|| panic!("{name} is no message"))
}

/// A message of this version with something in each field.
pub fn sample<T: Message + Default>(name: &str) -> T {
    let bytes = message(&descriptor(name)).encode_to_vec();
    T::decode(bytes.as_slice()).expect("both are of this version")
}

/// A message with something in each field.
pub fn message(of: &MessageDescriptor) -> DynamicMessage {
    let mut message = DynamicMessage::new(of.clone());
    for field in of.fields() {
        message.set_field(&field, value(&field));
    }
    message
}

fn value(field: &FieldDescriptor) -> Value {
    if let (true, Kind::Message(entry)) = (field.is_map(), field.kind()) {
        let value = value(&entry.map_entry_value_field());
        return Value::Map([(MapKey::String("k".into()), value)].into());
    }
    let one = match field.kind() {
        Kind::Message(of) => Value::Message(message(&of)),
        Kind::Enum(of) => Value::EnumNumber(of.values().map(|value| value.number()).max().unwrap_or(0)),
        Kind::String => Value::String("x".into()),
        Kind::Bytes => Value::Bytes("x".into()),
        Kind::Bool => Value::Bool(true),
        Kind::Double => Value::F64(1.0),
        Kind::Float => Value::F32(1.0),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => Value::I32(1),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Value::I64(1),
        Kind::Uint32 | Kind::Fixed32 => Value::U32(1),
        Kind::Uint64 | Kind::Fixed64 => Value::U64(1),
    };
    if field.is_list() {
        Value::List(vec![one])
    } else {
        one
    }
}

/// Fields that lead from a message to an enum.
pub type Path = Vec<FieldDescriptor>;

/// The name of a path: `spec.disks.format`.
pub fn name(path: &[FieldDescriptor]) -> String {
    let names: Vec<_> = path.iter().map(FieldDescriptor::name).collect();
    names.join(".")
}

/// The ways to every enum below a message.
pub fn enums(of: &MessageDescriptor) -> Vec<Path> {
    let mut found = Vec::new();
    for field in of.fields().filter(|field| !field.is_map()) {
        match field.kind() {
            Kind::Enum(_) => found.push(vec![field]),
            Kind::Message(below) => found.extend(enums(&below).into_iter().map(|mut path| {
                path.insert(0, field.clone());
                path
            })),
            _ => {}
        }
    }
    found
}

/// Puts a number into the enum at the end of a path; what is missing on the way is made.
pub fn set_enum(message: &mut DynamicMessage, path: &[FieldDescriptor], number: i32) {
    let Some((field, below)) = path.split_first() else {
        return;
    };
    if below.is_empty() {
        let value = Value::EnumNumber(number);
        let value = if field.is_list() {
            Value::List(vec![value])
        } else {
            value
        };
        message.set_field(field, value);
        return;
    }
    let inner = match message.get_field_mut(field) {
        Value::Message(inner) => inner,
        Value::List(items) => {
            if items.is_empty() {
                let Kind::Message(of) = field.kind() else { return };
                items.push(Value::Message(self::message(&of)));
            }
            match items.first_mut() {
                Some(Value::Message(inner)) => inner,
                _ => return,
            }
        }
        _ => return,
    };
    set_enum(inner, below, number);
}

/// What is set in a message: paths of fields, with the values of enums. Two messages of one shape tell versions the same.
pub fn shape(message: &DynamicMessage) -> Vec<String> {
    let mut found = Vec::new();
    collect(message, "", &mut found);
    found.sort();
    found.dedup();
    found
}

fn collect(message: &DynamicMessage, at: &str, found: &mut Vec<String>) {
    for (field, value) in message.fields() {
        let here = format!("{at}.{}", field.name());
        let items = match value {
            Value::List(items) => items.clone(),
            value => vec![value.clone()],
        };
        for item in items {
            match item {
                Value::Message(inner) => collect(&inner, &here, found),
                Value::EnumNumber(number) => found.push(format!("{here}={number}")),
                _ => found.push(here.clone()),
            }
        }
    }
}
