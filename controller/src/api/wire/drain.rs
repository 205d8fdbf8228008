//! How a host is emptied, on the wire.

use dalgu_proto::{
    ids::{HostName, VmName},
    reason, time, v1,
};
use tonic::Status;

use crate::{
    drains::advance,
    model::{Direction, Drain, DrainMode, DrainState, DrainedVm, Stage},
};

/// What becomes of a VM; `None` where nothing is said.
pub fn drain_mode(field: &str, value: i32) -> Result<Option<DrainMode>, Status> {
    Ok(match v1::DrainMode::try_from(value) {
        Ok(v1::DrainMode::Unspecified) => None,
        Ok(v1::DrainMode::LiveMigrate) => Some(DrainMode::LiveMigrate),
        Ok(v1::DrainMode::Stop) => Some(DrainMode::Stop),
        Ok(v1::DrainMode::Leave) => Some(DrainMode::Leave),
        Ok(v1::DrainMode::Ask) => Some(DrainMode::Ask),
        Err(_) => return Err(reason::invalid(field, "is not a mode that this version knows")),
    })
}

/// That, on its way out.
pub const fn mode(mode: DrainMode) -> v1::DrainMode {
    match mode {
        DrainMode::LiveMigrate => v1::DrainMode::LiveMigrate,
        DrainMode::Stop => v1::DrainMode::Stop,
        DrainMode::Leave => v1::DrainMode::Leave,
        DrainMode::Ask => v1::DrainMode::Ask,
    }
}

const fn stage(stage: Stage) -> v1::DrainedVmState {
    match stage {
        Stage::Waiting => v1::DrainedVmState::Waiting,
        Stage::Moving => v1::DrainedVmState::Moving,
        Stage::Moved => v1::DrainedVmState::Moved,
        Stage::Stopping => v1::DrainedVmState::Stopping,
        Stage::Stopped => v1::DrainedVmState::Stopped,
        Stage::Starting => v1::DrainedVmState::Starting,
        Stage::Started => v1::DrainedVmState::Started,
        Stage::Left => v1::DrainedVmState::Left,
        Stage::Blocked => v1::DrainedVmState::Blocked,
    }
}

/// What can be done about a VM that is blocked.
fn options(direction: Direction, name: &VmName, drained: &DrainedVm) -> Vec<String> {
    if drained.stage != Stage::Blocked {
        return Vec::new();
    }
    match direction {
        Direction::Out => {
            let other = match drained.mode {
                DrainMode::LiveMigrate => format!("dalgu vm stop {name}"),
                _ => format!("dalgu vm migrate {name}"),
            };
            let stop = (drained.mode == DrainMode::Ask).then(|| format!("dalgu vm stop {name}"));
            let leave = format!("dalgu vm update {name} --drain-mode leave");
            [Some(other), stop, Some(leave)].into_iter().flatten().collect()
        }
        Direction::Back if drained.mode == DrainMode::Stop => vec![format!("dalgu vm start {name}")],
        Direction::Back => vec![format!("dalgu vm migrate {name}")],
    }
}

/// Where it moves or has moved to, of a drain of `own`.
fn destination(own: &HostName, direction: Direction, drained: &DrainedVm) -> String {
    let host = match (direction, drained.stage) {
        (Direction::Out, _) => drained.host.as_ref(),
        (Direction::Back, Stage::Moving | Stage::Moved) => Some(own),
        (Direction::Back, _) => None,
    };
    host.map(ToString::to_string).unwrap_or_default()
}

fn drained_vm(own: &HostName, drain: &Drain, name: &VmName, drained: &DrainedVm) -> v1::DrainedVm {
    v1::DrainedVm {
        vm: name.to_string(),
        mode: mode(drained.mode).into(),
        state: stage(drained.stage).into(),
        host: destination(own, drain.direction, drained),
        operation: drained
            .operation
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        error: drained.fault.as_ref().map(super::operation_error),
        options: options(drain.direction, name, drained),
        tried_again: drain.is_active() && drained.stage == Stage::Blocked && drained.passes,
    }
}

/// How a host is emptied or restored.
pub fn drain(own: &HostName, drain: &Drain) -> v1::HostDrain {
    let vms = drain.vms.iter();
    v1::HostDrain {
        restoring: drain.direction == Direction::Back,
        state: match drain.state {
            DrainState::Active => v1::DrainState::Active,
            DrainState::Done => v1::DrainState::Done,
            DrainState::Blocked => v1::DrainState::Blocked,
            DrainState::Cancelled => v1::DrainState::Cancelled,
        }
        .into(),
        mode: drain.mode.map_or(v1::DrainMode::Unspecified, mode).into(),
        principal: drain.principal.clone(),
        begin_time: Some(time::to_wire(drain.begin_time)),
        deadline: Some(time::to_wire(drain.deadline)),
        end_time: drain.end_time.map(time::to_wire),
        vms: vms.map(|(name, vm)| drained_vm(own, drain, name, vm)).collect(),
        summary: advance::summary(drain),
    }
}
