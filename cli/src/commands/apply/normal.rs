//! What objects are declared to be, in the form in which the controller would say it: with all defaults. Pure.

use dalgu_proto::{
    network, placement,
    v1::{self, DrainMode},
    vm::{self, Invalid},
};

/// A VM.
pub fn vm(vm: &v1::Vm) -> Result<v1::Vm, Invalid> {
    let spec = vm.spec.clone().map(vm::Spec::try_from).transpose()?;
    let mut normal = v1::Vm {
        spec: spec.map(Into::into),
        ..vm.clone()
    };
    if normal.drain_mode() == DrainMode::Unspecified {
        normal.set_drain_mode(DrainMode::LiveMigrate);
    }
    // In the order in which the controller says them.
    normal.placement_groups.sort();
    normal
        .tolerations
        .sort_by(|a, b| (&a.key, &a.value).cmp(&(&b.key, &b.value)));
    Ok(normal)
}

/// A network.
pub fn network(network: &v1::Network) -> Result<v1::Network, Invalid> {
    let normal = v1::Network::from(network::Network::try_from(network.clone())?);
    Ok(v1::Network {
        labels: network.labels.clone(),
        description: network.description.clone(),
        ..normal
    })
}

/// A volume.
pub fn volume(volume: &v1::Volume) -> Result<v1::Volume, Invalid> {
    let disk = v1::Disk::from(vm::Disk::try_from(volume)?);
    Ok(v1::Volume {
        size_mib: disk.size_mib,
        pool: disk.pool,
        format: disk.format,
        ..volume.clone()
    })
}

/// A security group.
pub fn group(group: &v1::SecurityGroup) -> Result<v1::SecurityGroup, Invalid> {
    let normal = v1::SecurityGroup::from(network::Group::try_from(group.clone())?);
    Ok(v1::SecurityGroup {
        labels: group.labels.clone(),
        description: group.description.clone(),
        ..normal
    })
}

/// A placement group.
pub fn placement_group(group: &v1::PlacementGroup) -> Result<v1::PlacementGroup, Invalid> {
    let normal = v1::PlacementGroup::from(placement::Group::try_from(group.clone())?);
    Ok(v1::PlacementGroup {
        description: group.description.clone(),
        ..normal
    })
}
