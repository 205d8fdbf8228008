//! The same VM without Dalgu: its domain's XML with another name, started by `qemu-img` and `virsh` in the same host.
//! Used by the benchmark only. `virsh` defines and starts in one call, so that its own start counts once.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, ensure};

use super::HOST;
use crate::lab::Lab;
use crate::serial::{disk_in, path_in};

/// Where the baseline's XML files are, in the host.
const XML_DIR: &str = "/var/lib/dalgu/bench";

/// What a baseline domain is made from: a VM of Dalgu's.
#[derive(Debug, Clone)]
pub struct Template {
    xml: String,
    uuid: String,
    name: String,
}

/// A domain made by hand.
#[derive(Debug, Clone)]
pub struct Domain {
    host: u8,
    name: String,
    /// Its disk, in the host; nothing is there yet.
    pub disk: String,
    xml_file: String,
    /// Its serial log, seen from outside.
    pub log: PathBuf,
}

impl Template {
    /// Reads the domain of a VM that Dalgu made.
    ///
    /// # Errors
    /// If the host does not have it.
    pub async fn of(lab: &Lab, uuid: &str) -> anyhow::Result<Self> {
        let xml = lab.virsh(HOST, &["dumpxml", "--inactive", uuid]).await?;
        let name = lab.virsh(HOST, &["domname", uuid]).await?.trim().to_owned();
        Ok(Self {
            xml: without_metadata(&xml),
            uuid: uuid.to_owned(),
            name,
        })
    }

    /// Where the serial log of a VM with this UUID is on a host, seen from outside.
    ///
    /// # Errors
    /// If the template has none.
    pub fn log_of(&self, lab: &Lab, host: u8, uuid: &str) -> anyhow::Result<PathBuf> {
        let path = path_in(&self.xml).context("the template has no serial log")?;
        ensure!(
            path.contains(&self.uuid),
            "the serial log {path} is not named by the VM's UUID"
        );
        Ok(lab.layout().host(host).outside(&path.replace(&self.uuid, uuid)))
    }

    /// Writes a domain's XML on a host and makes room for its disk; defines nothing yet.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn domain(&self, lab: &Lab, host: u8, name: &str) -> anyhow::Result<Domain> {
        let uuid = uuid::Uuid::new_v4().to_string();
        let xml = self
            .xml
            .replace(
                &format!("<name>{}</name>", self.name),
                &format!("<name>{name}</name>"),
            )
            .replace(&self.uuid, &uuid);
        let disk = disk_in(&xml).context("the template has no disk")?.to_owned();
        let serial = path_in(&xml)
            .context("the template has no serial log")?
            .to_owned();
        let place = lab.layout().host(host);
        let xml_file = format!("{XML_DIR}/{name}.xml");
        for path in [&disk, &xml_file] {
            let outside = place.outside(path);
            let parent = outside.parent().context("a file lies in a folder")?;
            fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
        }
        fs::write(place.outside(&xml_file), xml).context("write a domain's XML")?;
        Ok(Domain {
            host,
            name: name.to_owned(),
            disk,
            xml_file,
            log: place.outside(&serial),
        })
    }
}

fn without_metadata(xml: &str) -> String {
    match (xml.find("<metadata>"), xml.find("</metadata>")) {
        (Some(from), Some(to)) if from < to => {
            format!("{}{}", &xml[..from], &xml[to + "</metadata>".len()..])
        }
        _ => xml.to_owned(),
    }
}

impl Domain {
    /// Makes the disk by these words of a shell, defines the domain and starts it.
    ///
    /// # Errors
    /// If a command fails.
    pub async fn create(&self, lab: &Lab, disk: &str) -> anyhow::Result<()> {
        let script = format!(
            "{disk} && virsh -q -c qemu:///system 'define {}; start {}'",
            self.xml_file, self.name
        );
        lab.exec(self.host, &["sh", "-c", &script]).await.map(drop)
    }

    /// Powers it off.
    ///
    /// # Errors
    /// If it does not run.
    pub async fn destroy(&self, lab: &Lab) -> anyhow::Result<()> {
        lab.virsh(self.host, &["destroy", &self.name]).await.map(drop)
    }

    /// Starts it again.
    ///
    /// # Errors
    /// If it does not start.
    pub async fn start(&self, lab: &Lab) -> anyhow::Result<()> {
        lab.virsh(self.host, &["start", &self.name]).await.map(drop)
    }

    /// Removes the domain and its disk.
    ///
    /// # Errors
    /// If a command fails.
    pub async fn remove(&self, lab: &Lab) -> anyhow::Result<()> {
        let script = format!(
            "virsh -q -c qemu:///system 'destroy {0}; undefine {0}' && rm -f '{1}' '{1}.base'",
            self.name, self.disk
        );
        lab.exec(self.host, &["sh", "-c", &script]).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dalgus_metadata_is_cut_out_and_nothing_else() {
        assert_eq!(
            without_metadata("<a/><metadata><d:vm/></metadata><b/>"),
            "<a/><b/>"
        );
        assert_eq!(without_metadata("<a/><b/>"), "<a/><b/>");
    }
}
