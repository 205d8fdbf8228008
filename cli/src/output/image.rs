//! What an image looks like in tables and on its own page. Pure.

use std::borrow::Cow;

use dalgu_proto::v1;
use jiff::Timestamp;

use super::{BAD, Cell, GOOD, Resource, WARN, human};

/// How far it is, in words; with a share while it gets on.
pub fn state(image: &v1::Image) -> String {
    let status = image.status.clone().unwrap_or_default();
    let word = human::value::<v1::ImageState>(status.state);
    let under_way = matches!(
        status.state(),
        v1::ImageState::AwaitingUpload | v1::ImageState::Importing
    );
    if under_way && status.bytes_done > 0 {
        let share = status.bytes_done.saturating_mul(100) / status.bytes_total.max(1);
        return format!("{word} {share}%");
    }
    word
}

/// What starts an image's operating system, in words.
pub fn firmware(value: i32) -> String {
    human::value::<v1::Firmware>(match value {
        0 => v1::Firmware::Bios.into(),
        // Also one that only a newer controller knows.
        other => other,
    })
}

fn state_cell(image: &v1::Image) -> Cell {
    let status = image.status.clone().unwrap_or_default();
    let style = match status.state() {
        v1::ImageState::Available => GOOD,
        v1::ImageState::Failed => BAD,
        _ => WARN,
    };
    Cell::painted(state(image), style)
}

fn copies(image: &v1::Image) -> String {
    let status = image.status.clone().unwrap_or_default();
    let ready = status.copies.iter().filter(|copy| copy.ready).count();
    match image.replicas {
        -1 => format!("{ready}/all"),
        wanted => format!("{ready}/{wanted}"),
    }
}

fn size(bytes: u64) -> String {
    match bytes {
        0 => "-".to_owned(),
        bytes => human::bytes(bytes),
    }
}

impl Resource for v1::Image {
    const MESSAGE: &'static str = "dalgu.v1.Image";
    const PLURAL: &'static str = "images";

    fn key(&self) -> Cow<'_, str> {
        Cow::Owned(format!("{}:{}", self.name, self.version))
    }

    fn columns(wide: bool) -> &'static [&'static str] {
        const ALL: &[&str] = &[
            "NAME",
            "VERSION",
            "STATE",
            "DISK",
            "STORED",
            "COPIES",
            "VMS",
            "AGE",
            "OS",
            "FIRMWARE",
            "FORMAT",
            "VISIBILITY",
            "OWNER",
        ];
        if wide { ALL } else { &ALL[..8] }
    }

    fn row(&self, wide: bool, now: Timestamp) -> Vec<Cell> {
        let status = self.status.clone().unwrap_or_default();
        let mut row = vec![
            Cell::plain(&self.name),
            Cell::plain(&self.version),
            state_cell(self),
            Cell::plain(size(status.virtual_size_bytes)),
            Cell::plain(size(status.stored_bytes)),
            Cell::plain(copies(self)),
            Cell::plain(status.vms.to_string()),
            Cell::plain(human::age(self.create_time.as_ref(), now)),
        ];
        if wide {
            row.push(Cell::plain(human::or_dash(&self.os)));
            row.push(Cell::plain(firmware(self.firmware)));
            row.push(Cell::plain(
                human::value::<v1::ImageFormat>(self.format).to_lowercase(),
            ));
            row.push(Cell::plain(human::value::<v1::ImageVisibility>(self.visibility)));
            row.push(Cell::plain(human::or_dash(&self.owner)));
        }
        row
    }

    fn describe(&self, now: Timestamp) -> human::Page {
        let status = self.status.clone().unwrap_or_default();
        let mut page = human::Page::default();
        page.line("Name", &self.name)
            .line("Version", &self.version)
            .painted("State", &state_cell(self));
        if let Some(error) = &status.error {
            let again = if error.retrying {
                " (it is tried again)"
            } else {
                ""
            };
            let text = format!("{} ({}){again}", error.message, error.reason);
            page.painted("Error", &Cell::painted(text, BAD));
        }
        page.line("Disk", size(status.virtual_size_bytes))
            .line("Stored", size(status.stored_bytes))
            .line_if("OS", &self.os)
            .line("Firmware", firmware(self.firmware))
            .line_if("Description", &self.description)
            .line("Labels", human::labels(&self.labels))
            .line("Visibility", human::value::<v1::ImageVisibility>(self.visibility))
            .line("Owner", human::or_dash(&self.owner))
            .line("VMs", status.vms.to_string())
            .line("Copies", copies(self));
        page.line("Created", human::clock_and_age(self.create_time.as_ref(), now))
            .line("UID", human::or_dash(&self.uid))
            .line("ETag", human::or_dash(&self.etag))
            .line("Digest", human::or_dash(&status.digest));
        let source = self.source.clone().unwrap_or_default().file;
        page.section("File")
            .line(
                "Format",
                human::value::<v1::ImageFormat>(self.format).to_lowercase(),
            )
            .line("Size", size(self.size_bytes))
            .line("SHA-256", human::or_dash(&self.sha256))
            .line("Imported by", human::or_dash(&status.import_host))
            .line_if("From its file", &source);
        let rows = status.copies.iter().map(|copy| {
            let how = if copy.ready {
                "whole".to_owned()
            } else {
                format!("fetching, {}", human::share(copy.bytes_done, status.stored_bytes))
            };
            let texts = [
                copy.host.clone(),
                how,
                human::age(copy.last_use_time.as_ref(), now),
            ];
            texts.map(Cell::plain).to_vec()
        });
        page.table("Copies on hosts", &["HOST", "COPY", "LAST USE"], rows.collect());
        page
    }
}
