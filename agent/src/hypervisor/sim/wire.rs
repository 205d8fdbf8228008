//! The line protocol between two simulated hypervisors: one JSON object a line, one answer to each but the last.

use std::collections::{BTreeMap, BTreeSet};

use dalgu_proto::{
    ids::{ClusterId, Epoch, Generation, VmId, VmName},
    vm::{Spec, first_boot::Documents},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};

use super::{layers::Chain, lines::Stream};
use crate::hypervisor::{Definition, Hardware, Mark};

/// Longest line accepted; the largest specification has some tens of kilobytes.
const MAX_LINE: u64 = 1 << 20;

/// What a source says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub(super) enum Say {
    /// Make room for this VM.
    Prepare {
        id: VmId,
        name: VmName,
        cluster: ClusterId,
        epoch: Epoch,
        generation: Generation,
        spec: Box<Spec>,
        vcpus: u32,
        memory_mib: u64,
        /// What it runs with; not told by versions in which that could not be changed.
        #[serde(default)]
        hardware: Option<Hardware>,
    },
    /// So many bytes of its memory and disks.
    Data { bytes: u64 },
    /// It is stopped here and all data is over: let it go on.
    Finish {
        paused: bool,
        ticks: u64,
        /// What its disks hold, by name; not told by versions in which that stayed behind.
        #[serde(default)]
        contents: BTreeMap<String, u64>,
        /// Their layers.
        #[serde(default)]
        chain: Option<Chain>,
    },
    /// It is gone here.
    Confirm,
}

/// What a destination answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub(super) enum Answer {
    /// Done.
    Ok,
    /// Refused; the VM stays where it is.
    No { why: String },
}

impl Say {
    pub(super) fn prepare(definition: &Definition, hardware: &Hardware) -> Self {
        Self::Prepare {
            id: definition.id,
            name: definition.name.clone(),
            cluster: definition.mark.cluster,
            epoch: definition.mark.epoch,
            generation: definition.mark.generation,
            spec: Box::new(definition.spec.clone()),
            vcpus: hardware.vcpus,
            memory_mib: hardware.memory_mib,
            hardware: Some(hardware.clone()),
        }
    }

    /// The definition in a `Prepare`, with the hardware the guest runs on.
    pub(super) fn into_definition(self) -> Option<(Definition, Hardware)> {
        let Self::Prepare {
            id,
            name,
            cluster,
            epoch,
            generation,
            spec,
            vcpus,
            memory_mib,
            hardware,
        } = self
        else {
            return None;
        };
        let hardware = hardware.unwrap_or_else(|| Hardware {
            vcpus,
            memory_mib,
            ..Hardware::of(&spec)
        });
        let mark = Mark {
            cluster,
            epoch,
            generation,
        };
        Some((
            Definition {
                id,
                name,
                mark,
                spec: *spec,
                // The volume is copied like the rest.
                documents: Documents::default(),
                networks: Vec::new(),
                layers: BTreeSet::new(),
                places: Vec::new(),
                devices: Vec::new(),
            },
            hardware,
        ))
    }
}

/// One end of the connection.
pub(super) struct Line(BufReader<Stream>);

impl Line {
    pub(super) fn new(stream: Stream) -> Self {
        Self(BufReader::new(stream))
    }

    pub(super) async fn send(&mut self, message: &impl Serialize) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        self.0.write_all(&line).await
    }

    /// The next message; an error when the other end is gone or speaks otherwise.
    pub(super) async fn receive<T: DeserializeOwned>(&mut self) -> std::io::Result<T> {
        let mut line = Vec::new();
        (&mut self.0).take(MAX_LINE).read_until(b'\n', &mut line).await?;
        if line.last() != Some(&b'\n') {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_slice(&line)?)
    }
}
