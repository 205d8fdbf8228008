//! What volumes look like in tables and on their own pages. Pure.

use std::borrow::Cow;

use dalgu_proto::v1::{self, VolumeState as S};
use jiff::Timestamp;

use super::{BAD, Cell, GOOD, Resource, WARN, human, image};

fn state(volume: &v1::Volume) -> Cell {
    let status = volume.status.clone().unwrap_or_default();
    let colour = match status.state() {
        S::InUse | S::Available => Some(GOOD),
        S::Deleted | S::Purging => Some(WARN),
        S::HostGone => Some(BAD),
        S::New | S::Unspecified => None,
    };
    let text = human::value::<S>(status.state);
    match colour {
        Some(colour) => Cell::painted(text, colour),
        None => Cell::plain(text),
    }
}

/// The VM that has it, and the disk that it is there.
fn user(status: &v1::VolumeStatus) -> String {
    match (status.vm.as_str(), status.disk.as_str()) {
        ("", _) => "-".to_owned(),
        (vm, "") => format!("{vm} (leaving)"),
        (vm, disk) => format!("{vm}/{disk}"),
    }
}

/// How it is made from its image; empty where it is not yet decided, or blank.
fn made_as(volume: &v1::Volume) -> String {
    match v1::CloneMode::try_from(volume.clone_mode) {
        Ok(v1::CloneMode::Unspecified) => String::new(),
        _ => human::value::<v1::CloneMode>(volume.clone_mode).to_ascii_lowercase(),
    }
}

/// What starts the operating system of its image; empty where it has none.
fn firmware(volume: &v1::Volume) -> String {
    match volume.image.as_str() {
        "" => String::new(),
        _ => image::firmware(volume.firmware),
    }
}

impl Resource for v1::Volume {
    const MESSAGE: &'static str = "dalgu.v1.Volume";
    const PLURAL: &'static str = "volumes";

    fn key(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.name)
    }

    fn columns(wide: bool) -> &'static [&'static str] {
        const ALL: &[&str] = &[
            "NAME", "STATE", "SIZE", "VM", "HOST", "AGE", "POOL", "IMAGE", "LABELS",
        ];
        if wide { ALL } else { &ALL[..6] }
    }

    fn row(&self, wide: bool, now: Timestamp) -> Vec<Cell> {
        let status = self.status.clone().unwrap_or_default();
        let mut row = vec![
            Cell::plain(self.name.clone()),
            state(self),
            Cell::plain(human::mib(self.size_mib)),
            Cell::plain(user(&status)),
            Cell::plain(human::or_dash(&status.host)),
            Cell::plain(human::age(self.create_time.as_ref(), now)),
        ];
        if wide {
            row.push(Cell::plain(human::or_dash(&self.pool)));
            row.push(Cell::plain(human::or_dash(&self.image)));
            row.push(Cell::plain(human::labels(&self.labels)));
        }
        row
    }

    fn describe(&self, now: Timestamp) -> human::Page {
        let status = self.status.clone().unwrap_or_default();
        let mut page = human::Page::default();
        page.line("Name", &self.name)
            .line("State", human::value::<S>(status.state))
            .line("Size", human::mib(self.size_mib))
            .line("VM", user(&status))
            .line("Host", human::or_dash(&status.host))
            .line("Pool", human::or_dash(&self.pool))
            .line(
                "Format",
                human::value::<v1::DiskFormat>(self.format).to_ascii_lowercase(),
            )
            .line_if("Image", &self.image)
            .line_if("Firmware", &firmware(self))
            .line_if("Made as", &made_as(self))
            .line_if("Description", &self.description)
            .line("Labels", human::labels(&self.labels))
            .line("Created", human::clock_and_age(self.create_time.as_ref(), now));
        if self.delete_time.is_some() {
            page.line("Deleted", human::clock_and_age(self.delete_time.as_ref(), now))
                .line("Purged from", human::clock(self.purge_time.as_ref()));
        }
        page.line("UID", human::or_dash(&self.uid))
            .line("ETag", human::or_dash(&self.etag));
        page
    }
}
