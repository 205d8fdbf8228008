//! The definitions of pools that libvirt would keep: of LVM's and of Ceph's. Pure.
//!
//! Dalgu keeps disks in directories itself, and uses no pool of libvirt's yet. What is written here is what an operator would give to
//! `virsh pool-define`; see docs/operations/storage.md for what was tried with it.

use super::tree::{Element, XmlError};
use crate::config::{Pool, PoolType, split_monitor};

/// Ceph's port for monitors where none is said: messenger version 1, which every client knows.
const MONITOR_PORT: u16 = 6789;

/// The definition of a pool; `None` for directories, of which libvirt need not know.
///
/// # Errors
/// If a string holds a character that XML cannot hold.
pub fn definition(pool: &Pool) -> Result<Option<String>, XmlError> {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let source = Element::new("source");
    let (kind, source, target) = match pool.kind {
        PoolType::Dir | PoolType::Nfs => return Ok(None),
        PoolType::LvmThin => {
            let group = text(&pool.volume_group);
            let target = Element::new("path").text(format!("/dev/{group}"));
            let source = source
                .child(Element::new("name").text(&group))
                .child(Element::new("format").with("type", "lvm2"));
            ("logical", source, Some(Element::new("target").child(target)))
        }
        PoolType::Rbd => {
            let hosts = pool.monitors.iter().filter_map(|monitor| split_monitor(monitor));
            let hosts = hosts.map(|(host, port)| {
                Element::new("host")
                    .with("name", host)
                    .with("port", port.unwrap_or(MONITOR_PORT))
            });
            let secret = pool.secret_uuid.unwrap_or_default();
            let auth = Element::new("auth")
                .with("type", "ceph")
                .with("username", text(&pool.user))
                .child(Element::new("secret").with("uuid", secret));
            let source = source
                .child(Element::new("name").text(text(&pool.rbd_pool)))
                .all(hosts)
                .child(auth);
            ("rbd", source, None)
        }
    };
    Element::new("pool")
        .with("type", kind)
        .child(Element::new("name").text(&pool.name))
        .child(source)
        .all(target)
        .to_xml()
        .map(Some)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use virt::connect::Connect;
    use virt_sys as sys;

    use super::*;
    use crate::config::Config;

    fn pools() -> Vec<Pool> {
        let text = r#"
            host = "h1"
            listen = "10.0.0.1:7444"
            controller = "https://10.0.0.9:7443"
            [[pools]]
            name = "local"
            path = "/var/lib/dalgu/local"
            [[pools]]
            name = "thin"
            type = "lvm-thin"
            volume_group = "vg0"
            thin_pool = "thin"
            [[pools]]
            name = "ceph"
            type = "rbd"
            monitors = ["10.0.0.1", "[fd00::1]:3300"]
            rbd_pool = "vms"
            user = "dalgu"
            secret_uuid = "6e0ac8a3-8e0c-4f56-a4e5-3b9d3f0b6a11"
        "#;
        Config::parse(text, Path::new("agent.toml")).unwrap().pools
    }

    #[test]
    fn definitions_say_where_the_disks_would_be() {
        let all: Vec<_> = pools().iter().map(|pool| definition(pool).unwrap()).collect();
        assert_eq!(all[0], None);
        assert_eq!(
            all[1].as_deref(),
            Some(
                "<pool type=\"logical\"><name>thin</name><source><name>vg0</name><format type=\"lvm2\"/></source>\
                 <target><path>/dev/vg0</path></target></pool>"
            )
        );
        assert_eq!(
            all[2].as_deref(),
            Some(
                "<pool type=\"rbd\"><name>ceph</name><source><name>vms</name><host name=\"10.0.0.1\" port=\"6789\"/>\
                 <host name=\"fd00::1\" port=\"3300\"/><auth type=\"ceph\" username=\"dalgu\">\
                 <secret uuid=\"6e0ac8a3-8e0c-4f56-a4e5-3b9d3f0b6a11\"/></auth></source></pool>"
            )
        );
    }

    #[test]
    fn libvirt_takes_them_by_its_own_schema() {
        let connect = Connect::open(Some("test:///default")).unwrap();
        let valid = sys::VIR_STORAGE_POOL_DEFINE_VALIDATE;
        for pool in pools() {
            let Some(xml) = definition(&pool).unwrap() else {
                continue;
            };
            let defined = connect.define_storage_pool_xml(&xml, valid).unwrap();
            assert_eq!(defined.name().unwrap(), pool.name);
            defined.undefine().unwrap();
            let broken = xml
                .replace("<source>", "<sources>")
                .replace("</source>", "</sources>");
            assert!(connect.define_storage_pool_xml(&broken, valid).is_err());
        }
    }
}
