//! What QEMU has of a backup that libvirt knows nothing of: its copying jobs and the files that they wrote. A libvirtd that is killed
//! between telling QEMU to begin and noting it leaves them; no other backup begins beside them, and their files take room.

use std::{thread, time::Duration};

use dalgu_proto::ids::BackupId;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use virt::domain::Domain;

use super::{Raw, is_absent, partial_name};

/// A job that is told to end does so within this, or is looked at again with the next try.
const LOOKS: u32 = 50;
const LOOK: Duration = Duration::from_millis(100);

#[derive(Deserialize)]
struct Job {
    id: String,
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Node {
    node_name: String,
    #[serde(default)]
    file: String,
}

/// Ends the copying jobs of a domain of which libvirt knows no backup, and closes the files of this backup.
pub(super) fn remove(domain: &Domain, id: BackupId) -> Result<(), Raw> {
    let mut jobs = copying(domain)?;
    for job in jobs.iter().filter(|job| job.status != "concluded") {
        say(domain, "job-cancel", &json!({ "id": job.id }))?;
    }
    for _ in 0..LOOKS {
        if jobs.iter().all(|job| job.status == "concluded") {
            break;
        }
        thread::park_timeout(LOOK);
        jobs = copying(domain)?;
    }
    for job in &jobs {
        tracing::warn!(%id, job = job.id, "QEMU had a backup that libvirt knows nothing of; it is ended");
        say(domain, "job-dismiss", &json!({ "id": job.id }))?;
    }
    close(domain, &partial_name(id))
}

fn copying(domain: &Domain) -> Result<Vec<Job>, Raw> {
    let jobs: Vec<Job> = ask(domain, "query-jobs", &json!({}))?;
    Ok(jobs.into_iter().filter(|job| job.kind == "backup").collect())
}

/// Closes the block nodes whose file lies below a directory of this name: those on top first, which is as often as a file has nodes.
fn close(domain: &Domain, directory: &str) -> Result<(), Raw> {
    let of_it = |domain: &Domain| -> Result<Vec<Node>, Raw> {
        let nodes: Vec<Node> = ask(domain, "query-named-block-nodes", &json!({ "flat": true }))?;
        let below = format!("{directory}/");
        Ok(nodes
            .into_iter()
            .filter(|node| node.file.contains(&below))
            .collect())
    };
    let mut nodes = of_it(domain)?;
    while !nodes.is_empty() {
        for node in &nodes {
            // One that another stands on is refused; it is the next round's.
            let _ = say(domain, "blockdev-del", &json!({ "node-name": node.node_name }));
        }
        let left = of_it(domain)?;
        if left.len() == nodes.len() {
            tracing::warn!(
                directory,
                nodes = left.len(),
                "QEMU does not close the files of a backup"
            );
            break;
        }
        nodes = left;
    }
    Ok(())
}

/// A question to QEMU itself; a domain that is off has nothing.
fn ask<T: DeserializeOwned + Default>(domain: &Domain, command: &str, arguments: &Value) -> Result<T, Raw> {
    #[derive(Deserialize)]
    struct Answer<T> {
        #[serde(rename = "return")]
        value: T,
    }
    let question = json!({ "execute": command, "arguments": arguments }).to_string();
    match domain.qemu_monitor_command(&question, 0) {
        Ok(answer) => Ok(match serde_json::from_str::<Answer<T>>(&answer) {
            Ok(answer) => answer.value,
            Err(error) => {
                tracing::warn!(command, %error, answer, "QEMU's answer is not what was expected");
                T::default()
            }
        }),
        Err(error) if is_absent(&error) => Ok(T::default()),
        Err(error) => Err(error),
    }
}

fn say(domain: &Domain, command: &str, arguments: &Value) -> Result<(), Raw> {
    ask::<Value>(domain, command, arguments).map(drop)
}
