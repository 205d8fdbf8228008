//! What placement groups and capacity look like. Pure.

use std::borrow::Cow;

use dalgu_proto::v1;
use jiff::Timestamp;

use super::{Cell, Resource, human};

fn rule(group: &v1::PlacementGroup) -> String {
    human::value::<v1::PlacementRule>(group.rule)
}

fn strength(group: &v1::PlacementGroup) -> &'static str {
    if group.preferred { "preferred" } else { "required" }
}

fn by(group: &v1::PlacementGroup) -> String {
    match group.topology_key.as_str() {
        "" => "host".to_owned(),
        key => format!("label {key}"),
    }
}

impl Resource for v1::PlacementGroup {
    const MESSAGE: &'static str = "dalgu.v1.PlacementGroup";
    const PLURAL: &'static str = "placement groups";

    fn key(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.name)
    }

    fn columns(wide: bool) -> &'static [&'static str] {
        const ALL: &[&str] = &["NAME", "RULE", "STRENGTH", "BY", "VMS", "AGE", "DESCRIPTION"];
        if wide { ALL } else { &ALL[..6] }
    }

    fn row(&self, wide: bool, now: Timestamp) -> Vec<Cell> {
        let mut row = vec![
            self.name.clone(),
            rule(self),
            strength(self).to_owned(),
            by(self),
            self.vms.len().to_string(),
            human::age(self.create_time.as_ref(), now),
        ];
        if wide {
            row.push(human::or_dash(&self.description));
        }
        row.into_iter().map(Cell::plain).collect()
    }

    fn describe(&self, now: Timestamp) -> human::Page {
        let mut page = human::Page::default();
        page.line("Name", &self.name)
            .line("Rule", format!("{}, {}", rule(self), strength(self)))
            .line("By", by(self))
            .line_if("Description", &self.description)
            .line("VMs", human::or_dash(&self.vms.join(", ")))
            .line("Created", human::clock_and_age(self.create_time.as_ref(), now));
        page
    }
}

impl Resource for v1::Capacity {
    const MESSAGE: &'static str = "dalgu.v1.Capacity";
    const PLURAL: &'static str = "capacities";

    fn key(&self) -> Cow<'_, str> {
        Cow::Borrowed("")
    }

    fn columns(_wide: bool) -> &'static [&'static str] {
        &["FIT", "FIT KEEPING"]
    }

    fn row(&self, _wide: bool, _now: Timestamp) -> Vec<Cell> {
        [self.vms, self.vms_keeping]
            .map(|vms| Cell::plain(vms.to_string()))
            .to_vec()
    }

    fn describe(&self, _now: Timestamp) -> human::Page {
        let mut page = human::Page::default();
        page.line("Fit now", self.vms.to_string())
            .line("Fit keeping", self.vms_keeping.to_string());
        page
    }
}

/// How many more VMs of a size fit.
pub fn capacity(asked: &v1::EstimateCapacityRequest, capacity: &v1::Capacity, color: bool) -> String {
    let domain = match asked.topology_key.as_str() {
        "" => "host",
        key => key,
    };
    let plural = if asked.keep_domains == 1 { "" } else { "s" };
    let mut page = human::Page::default();
    page.line(
        "Size",
        format!("{} vCPUs, {}", asked.vcpus, human::mib(asked.memory_mib)),
    )
    .line("Fit now", capacity.vms.to_string())
    .line(
        "Fit keeping",
        format!(
            "{} with room for any {} {domain}{plural}",
            capacity.vms_keeping, asked.keep_domains
        ),
    );
    if !capacity.protects.is_empty() {
        page.line(
            "Fit protected",
            format!("{} with room for {}", capacity.vms_protected, capacity.protects),
        );
        let short = |of: &v1::ShortDomain| {
            format!(
                "{} lacks {} vCPUs, {}",
                of.domain,
                of.vcpus,
                human::mib(of.memory_mib)
            )
        };
        let short: Vec<_> = capacity.short_domains.iter().map(short).collect();
        page.line(
            "Protection",
            if short.is_empty() {
                "kept".to_owned()
            } else {
                short.join("; ")
            },
        );
    }
    let row = |of: &v1::DomainCapacity| {
        let cells = [
            human::or_dash(&of.domain),
            of.hosts.to_string(),
            of.vms.to_string(),
            of.held_vms.to_string(),
        ];
        cells.map(Cell::plain).to_vec()
    };
    page.table(
        "By domain",
        &["DOMAIN", "HOSTS", "FIT", "HELD"],
        capacity.domains.iter().map(row).collect(),
    );
    page.render(color)
}
