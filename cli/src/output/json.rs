//! The API's canonical JSON form, read and written with the descriptors of the .proto files, so that it is the same
//! as `grpcurl` and every other client shows. Pure.

use std::sync::LazyLock;

use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};
use serde_json::Value;

use super::Resource;
use crate::exit::Error;

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(dalgu_proto::DESCRIPTORS)
        .expect("the descriptors were made by the compiler of this build")
});

fn descriptor<R: Resource>() -> MessageDescriptor {
    named(R::MESSAGE)
}

/// What the message of that full name is made of.
pub fn named(name: &str) -> MessageDescriptor {
    POOL.get_message_by_name(name)
        .expect("callers name messages of the descriptors; tests check it")
}

fn failed(format: &'static str) -> impl Fn(String) -> Error {
    move |why| Error::Format(format, why)
}

fn dynamic<R: Resource>(item: &R) -> Result<DynamicMessage, Error> {
    DynamicMessage::decode(descriptor::<R>(), item.encode_to_vec().as_slice())
        .map_err(|error| failed("JSON")(error.to_string()))
}

fn dynamics<R: Resource>(items: &[R]) -> Result<Vec<DynamicMessage>, Error> {
    items.iter().map(dynamic).collect()
}

/// One object on several lines.
pub fn object<R: Resource>(item: &R) -> Result<String, Error> {
    let text = serde_json::to_string_pretty(&dynamic(item)?);
    text.map(|text| text + "\n")
        .map_err(|error| failed("JSON")(error.to_string()))
}

/// One object on one line.
pub fn line<R: Resource>(item: &R) -> Result<String, Error> {
    let text = serde_json::to_string(&dynamic(item)?);
    text.map(|text| text + "\n")
        .map_err(|error| failed("JSON")(error.to_string()))
}

/// An array of objects.
pub fn array<R: Resource>(items: &[R]) -> Result<String, Error> {
    let text = serde_json::to_string_pretty(&dynamics(items)?);
    text.map(|text| text + "\n")
        .map_err(|error| failed("JSON")(error.to_string()))
}

/// One object as YAML.
pub fn yaml<R: Resource>(item: &R) -> Result<String, Error> {
    serde_norway::to_string(&dynamic(item)?).map_err(|error| failed("YAML")(error.to_string()))
}

/// An array of objects as YAML.
pub fn yaml_array<R: Resource>(items: &[R]) -> Result<String, Error> {
    serde_norway::to_string(&dynamics(items)?).map_err(|error| failed("YAML")(error.to_string()))
}

/// A message as a value of JSON. `name` is its full name.
pub fn value(name: &str, message: &impl prost::Message) -> Result<Value, String> {
    let dynamic = DynamicMessage::decode(named(name), message.encode_to_vec().as_slice());
    let dynamic = dynamic.map_err(|error| error.to_string())?;
    serde_json::to_value(&dynamic).map_err(|error| error.to_string())
}

/// The message of a value of JSON or YAML. `name` is its full name.
pub fn message<'de, M, D>(name: &str, value: D) -> Result<M, String>
where
    M: prost::Message + Default,
    D: serde::Deserializer<'de>,
    D::Error: std::fmt::Display,
{
    let dynamic = DynamicMessage::deserialize(named(name), value).map_err(|error| error.to_string())?;
    M::decode(prost::Message::encode_to_vec(&dynamic).as_slice()).map_err(|error| error.to_string())
}

/// A value of JSON or YAML, checked, in the canonical form; what is empty, 0 or false is left out. `name` is the message's full name.
pub fn canonical<'de, D>(name: &str, value: D) -> Result<Value, String>
where
    D: serde::Deserializer<'de>,
    D::Error: std::fmt::Display,
{
    let dynamic = DynamicMessage::deserialize(named(name), value).map_err(|error| error.to_string())?;
    serde_json::to_value(&dynamic).map_err(|error| error.to_string())
}

/// Reads one object from YAML, of which JSON is a part.
pub fn read<R: Resource>(text: &str) -> Result<R, String> {
    message(R::MESSAGE, serde_norway::Deserializer::from_str(text))
}

#[cfg(test)]
mod tests {
    use dalgu_proto::v1;

    use super::*;

    fn vm() -> v1::Vm {
        let spec = v1::VmSpec {
            vcpus: 2,
            memory_mib: 4096,
            ..Default::default()
        };
        v1::Vm {
            name: "web".into(),
            spec: Some(spec),
            generation: u64::MAX,
            ..Default::default()
        }
    }

    #[test]
    fn every_resource_is_in_the_descriptors() {
        for found in [
            descriptor::<v1::Vm>(),
            descriptor::<v1::Host>(),
            descriptor::<v1::Image>(),
            descriptor::<v1::Network>(),
            descriptor::<v1::NetworkInterface>(),
            descriptor::<v1::SecurityGroup>(),
            descriptor::<v1::Volume>(),
            descriptor::<v1::Operation>(),
            descriptor::<v1::Event>(),
            descriptor::<v1::Placement>(),
            descriptor::<v1::Site>(),
            descriptor::<v1::Diagnosis>(),
        ] {
            assert!(found.full_name().starts_with("dalgu.v1."));
        }
    }

    #[test]
    fn json_and_yaml_are_the_canonical_form() {
        let json =
            r#"{"name":"web","spec":{"vcpus":2,"memoryMib":"4096"},"generation":"18446744073709551615"}"#;
        assert_eq!(line(&vm()).unwrap(), format!("{json}\n"));
        assert_eq!(
            yaml(&vm()).unwrap(),
            "name: web\nspec:\n  vcpus: 2\n  memoryMib: '4096'\ngeneration: '18446744073709551615'\n"
        );
        assert_eq!(array::<v1::Vm>(&[]).unwrap(), "[]\n");
    }

    #[test]
    fn what_is_shown_can_be_read_again() {
        assert_eq!(read::<v1::Vm>(&yaml(&vm()).unwrap()), Ok(vm()));
        assert_eq!(read::<v1::Vm>(&object(&vm()).unwrap()), Ok(vm()));
        let by_hand = "name: web\nspec: {vcpus: 2, memory_mib: 4096}\ngeneration: 18446744073709551615\n";
        assert_eq!(read::<v1::Vm>(by_hand), Ok(vm()));
    }

    #[test]
    fn a_misspelt_field_is_named() {
        let error = read::<v1::Vm>("name: web\nspec: {vcpu: 2}\n").unwrap_err();
        assert!(error.contains("vcpu"), "{error}");
    }
}
