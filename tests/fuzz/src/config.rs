//! Target `config`: the configuration of both daemons and of the command line, and what people type: values of flags, a VM
//! in a file.
//!
//! Promises: no text makes a panic; what is accepted has values that the programs can work with, and is written back as it
//! was read.

use std::{path::Path, sync::LazyLock};

use dalgu::{
    args::values,
    config::{Choice, Error},
    output::json,
};
use dalgu_proto::{
    network::{Group, Network},
    v1,
    vm::Spec,
};
use prost::Message;

use crate::{input::Input, scratch::Scratch};

/// YAML reads no key of more than 1024 characters that stands on the line of its value, as keys of JSON do; a label has at
/// most 63.
const MAX_KEY: usize = 63;

static FILES: LazyLock<Scratch> = LazyLock::new(Scratch::new);

/// Takes one input: the first byte says what the rest is.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let what = input.byte();
    let text = input.rest();
    match what % 5 {
        0 => controller(&text),
        1 => agent(&text),
        2 => command_line(&text),
        3 => typed(&text),
        _ => file(&text),
    }
}

fn controller(text: &str) {
    if let Ok(config) = dalgu_controller::config::Config::parse(text) {
        assert!(config.unreachable_after() >= config.report_interval());
        assert!(config.operation_retention().as_secs() >= 7 * 24 * 3600);
        assert!(config.tls_dir().is_absolute());
    }
}

fn agent(text: &str) {
    if let Ok(config) = dalgu_agent::config::Config::parse(text, Path::new("agent.toml")) {
        assert!(!config.usage_interval().is_zero());
        assert!(!config.address().is_empty());
        assert_eq!(config.pool_configs().len(), config.pools.len());
    }
}

fn command_line(text: &str) {
    let path = FILES.write("config.toml", text);
    let mut choice = Choice {
        config: Some(path),
        ..Choice::default()
    };
    let Ok(config) = choice.load() else { return };
    let _ = choice.target();
    for name in config.contexts.keys() {
        choice.context = Some(name.clone());
        let target = choice.target();
        if let Ok(target) = &target {
            assert_eq!(target.context.as_ref(), Some(name));
        }
        // Choosing a context changes that and nothing else, or nothing at all.
        FILES.write("config.toml", text);
        let chosen = config.use_context(name);
        let after = choice
            .load()
            .expect("the file is still read after a context was chosen");
        assert_eq!(after.contexts, config.contexts);
        match chosen {
            Ok(()) => assert_eq!(after.current_context.as_ref(), Some(name)),
            Err(Error::Edit { .. }) => assert_eq!(after.current_context, config.current_context),
            Err(error) => panic!("the file is there and can be written: {error}"),
        }
    }
}

fn typed(text: &str) {
    let size = values::size_bytes(text);
    if let Ok(mib) = values::size_mib(text) {
        assert_eq!(size.ok(), mib.checked_mul(1 << 20));
    }
    if let Ok(span) = values::duration(text)
        && let Ok(millis) = u64::try_from(span.as_millis())
    {
        assert_eq!(values::duration(&format!("{millis}ms")), Ok(span));
    }
    if let Ok((key, value)) = values::label(text) {
        assert_eq!(format!("{key}={value}"), text);
    }
    let _ = values::label_change(text);
    if let Ok(id) = values::uuid(text) {
        assert_eq!(values::uuid(&id), Ok(id));
    }
    let spec = v1::VmSpec {
        vcpus: 1,
        memory_mib: 64,
        disks: values::disk(text).into_iter().collect(),
        nics: values::network::nic(text).into_iter().collect(),
        ..Default::default()
    };
    let _ = Spec::try_from(spec);
    let group = v1::SecurityGroup {
        name: "a".to_owned(),
        rules: values::network::rule(text).into_iter().collect(),
        ..Default::default()
    };
    let _ = Group::try_from(group);
    let network = v1::Network {
        name: "a".to_owned(),
        kind: Some(v1::network::Kind::Overlay(v1::OverlayNetwork::default())),
        ipv4: values::network::subnet(text).ok(),
        ..Default::default()
    };
    let _ = Network::try_from(network);
}

fn file(text: &str) {
    let Ok(vm) = json::read::<v1::Vm>(text) else {
        return;
    };
    let bytes = vm.encode_to_vec();
    let again = v1::Vm::decode(bytes.as_slice()).expect("what was encoded is decoded");
    let spec = vm.spec.iter().flat_map(|spec| spec.host_selector.keys());
    let long_key = vm.labels.keys().chain(spec).any(|key| key.len() > MAX_KEY);
    if again != vm || long_key {
        // A number that is none is not equal to itself.
        return;
    }
    let written = json::yaml(&vm).expect("what was read can be written");
    assert_eq!(json::read::<v1::Vm>(&written).as_ref(), Ok(&vm), "{written}");
    let written = json::object(&vm).expect("what was read can be written");
    assert_eq!(json::read::<v1::Vm>(&written).as_ref(), Ok(&vm), "{written}");
}
