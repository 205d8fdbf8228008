//! Documents, keys and names that somebody might try: each is refused by its field, or carried to its place as it is.

use super::*;
use crate::vm::{Spec, first_boot::check::first_boot};

const ED25519: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ2FmRUUD/Zl3Xv5ASCkMSMZDpKpUVyNYmHnHcmyMJmM";

fn user_data(text: impl Into<String>) -> v1::FirstBoot {
    v1::FirstBoot {
        user_data: text.into(),
        ..Default::default()
    }
}

fn cloud_config(text: &str) -> v1::FirstBoot {
    user_data(format!("#cloud-config\n{text}"))
}

fn network_config(text: impl Into<String>) -> v1::FirstBoot {
    v1::FirstBoot {
        network_config: text.into(),
        ..Default::default()
    }
}

fn key(text: impl Into<String>) -> v1::FirstBoot {
    v1::FirstBoot {
        ssh_authorized_keys: vec![text.into()],
        ..Default::default()
    }
}

fn hostname(text: impl Into<String>) -> v1::FirstBoot {
    v1::FirstBoot {
        hostname: text.into(),
        ..Default::default()
    }
}

/// Aliases that stand for 9^9 values.
fn laughs() -> String {
    let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..9 {
        let alias = format!("*a{}", level - 1);
        text += &format!("a{level}: &a{level} [{}]\n", [alias.as_str(); 9].join(", "));
    }
    text
}

/// A long list, and as many aliases of it as there is room for: within what the parser itself allows.
fn long_list() -> String {
    format!("a: &a [{}]\nb: [{}]\n", "x,".repeat(8_000), "*a,".repeat(10_000))
}

#[test]
#[allow(clippy::too_many_lines, reason = "a table")]
fn what_a_guest_must_not_be_told_is_refused_by_its_field() {
    let digest = |sha256: &str| {
        Some(DocumentDigest {
            sha256: sha256.into(),
            size_bytes: 1,
        })
    };
    let table = [
        ("a bomb of aliases", "user_data", cloud_config(&laughs())),
        ("a list and its aliases", "user_data", cloud_config(&long_list())),
        (
            "brackets without an end",
            "user_data",
            cloud_config(&"[".repeat(60_000)),
        ),
        (
            "braces without an end",
            "user_data",
            cloud_config(&"{".repeat(60_000)),
        ),
        (
            "brackets too deep",
            "user_data",
            cloud_config(&("[".repeat(900) + &"]".repeat(900))),
        ),
        (
            "a block too deep",
            "user_data",
            cloud_config(&("- ".repeat(500) + "x")),
        ),
        ("an alias of itself", "user_data", cloud_config("a: &a [*a]")),
        ("an alias of nothing", "user_data", cloud_config("a: *b")),
        ("a tag of its own", "user_data", cloud_config("a: !x y")),
        (
            "a second document",
            "user_data",
            cloud_config("a: 1\n---\nb: 2\n"),
        ),
        ("a list", "user_data", cloud_config("- a\n")),
        ("a scalar", "user_data", cloud_config("password\n")),
        ("a tab as indent", "user_data", cloud_config("a:\n\tb: 1\n")),
        ("an open quote", "user_data", cloud_config("a: \"b\n")),
        (
            "an escape that YAML has not",
            "user_data",
            cloud_config("a: \"\\q\"\n"),
        ),
        ("a control character", "user_data", cloud_config("a: \u{1}\n")),
        ("a NUL in YAML", "user_data", cloud_config("a: b\0\n")),
        ("a NUL in a script", "user_data", user_data("#!/bin/sh\n\0")),
        (
            "too long",
            "user_data",
            user_data(format!("#!{}", "x".repeat(MAX_DOCUMENT_BYTES))),
        ),
        ("of no kind", "user_data", user_data("password: x\n")),
        (
            "a space before its kind",
            "user_data",
            user_data(" #cloud-config\n"),
        ),
        (
            "a mark before its kind",
            "user_data",
            user_data("\u{feff}#cloud-config\n"),
        ),
        ("compressed", "user_data", user_data("\u{1f}\u{8b}\u{8}")),
        (
            "letters that look like it",
            "user_data",
            user_data("#сloud-config\n"),
        ),
        (
            "a network of version 1",
            "network_config",
            network_config("version: 1\nconfig: []\n"),
        ),
        (
            "a network without a version",
            "network_config",
            network_config("ethernets: {}\n"),
        ),
        (
            "a network one level down",
            "network_config",
            network_config("network: {version: 2}\n"),
        ),
        (
            "a version that is a text",
            "network_config",
            network_config("version: two\n"),
        ),
        (
            "a list of networks",
            "network_config",
            network_config("- version: 2\n"),
        ),
        (
            "a network with a bomb",
            "network_config",
            network_config("version: 2\n".to_owned() + &laughs()),
        ),
        (
            "a network too long",
            "network_config",
            network_config("x".repeat(MAX_DOCUMENT_BYTES + 1)),
        ),
        (
            "a network with a NUL",
            "network_config",
            network_config("version: 2\0"),
        ),
        (
            "a second line",
            "ssh_authorized_keys[0]",
            key(format!("{ED25519}\nssh-rsa AAAA")),
        ),
        (
            "CR and LF",
            "ssh_authorized_keys[0]",
            key(format!("{ED25519} a\r\n{ED25519}")),
        ),
        (
            "a CR alone",
            "ssh_authorized_keys[0]",
            key(format!("{ED25519}\r")),
        ),
        (
            "a line end of Unicode",
            "ssh_authorized_keys[0]",
            key(format!("{ED25519} a\u{2028}b")),
        ),
        (
            "a next line of Latin 1",
            "ssh_authorized_keys[0]",
            key(format!("{ED25519} a\u{85}b")),
        ),
        (
            "text turned round",
            "ssh_authorized_keys[0]",
            key(format!("{ED25519} \u{202e}toor")),
        ),
        (
            "a hidden space",
            "ssh_authorized_keys[0]",
            key(format!("{ED25519} a\u{200b}b")),
        ),
        (
            "a NUL in a key",
            "ssh_authorized_keys[0]",
            key(format!("{ED25519} a\0b")),
        ),
        ("a tab", "ssh_authorized_keys[0]", key(ED25519.replace(' ', "\t"))),
        (
            "options",
            "ssh_authorized_keys[0]",
            key(format!("command=\"sh\" {ED25519}")),
        ),
        (
            "a type that is weak",
            "ssh_authorized_keys[0]",
            key("ssh-dss AAAAB3NzaC1kc3MAAACBAOeB7ibFGJr0"),
        ),
        (
            "a type that is another",
            "ssh_authorized_keys[0]",
            key(ED25519.replace("ssh-ed25519", "ssh-rsa")),
        ),
        (
            "a private key",
            "ssh_authorized_keys[0]",
            key("-----BEGIN OPENSSH PRIVATE KEY-----"),
        ),
        (
            "no Base64",
            "ssh_authorized_keys[0]",
            key(ED25519.replace('/', "_")),
        ),
        (
            "Base64 cut off",
            "ssh_authorized_keys[0]",
            key(&ED25519[..ED25519.len() - 1]),
        ),
        (
            "a type alone",
            "ssh_authorized_keys[0]",
            key("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5"),
        ),
        ("an empty key", "ssh_authorized_keys[0]", key("")),
        (
            "a comment too long",
            "ssh_authorized_keys[0]",
            key(format!("{ED25519} {}", "x".repeat(MAX_KEY_BYTES))),
        ),
        ("a line end in a name", "hostname", hostname("web\nroot:")),
        (
            "a quote in a name",
            "hostname",
            hostname("web\", \"public-keys\": \"x"),
        ),
        ("a path", "hostname", hostname("../web")),
        ("an underscore", "hostname", hostname("web_1")),
        ("a hyphen first", "hostname", hostname("-web")),
        ("a dot last", "hostname", hostname("web.")),
        ("two dots", "hostname", hostname("web..local")),
        ("an address", "hostname", hostname("10.0.0.1")),
        ("a label too long", "hostname", hostname("a".repeat(64))),
        ("a name too long", "hostname", hostname(["a"; 128].join("."))),
        ("letters of another script", "hostname", hostname("wеb")),
        ("a NUL in a name", "hostname", hostname("web\0")),
        (
            "a pool that is a path",
            "pool",
            v1::FirstBoot {
                pool: "../x".into(),
                ..Default::default()
            },
        ),
        (
            "too many keys",
            "ssh_authorized_keys",
            v1::FirstBoot {
                ssh_authorized_keys: vec![ED25519.into(); MAX_KEYS + 1],
                ..Default::default()
            },
        ),
        (
            "a digest that is none",
            "user_data_digest",
            v1::FirstBoot {
                user_data_digest: digest("../x"),
                ..Default::default()
            },
        ),
        (
            "another's digest",
            "user_data_digest",
            v1::FirstBoot {
                user_data_digest: digest(&"ab".repeat(32)),
                ..user_data("#!x")
            },
        ),
    ];
    assert!(table.len() >= 40, "{} inputs", table.len());
    for (what, field, wire) in table {
        let refused = first_boot(&wire, &[]).map(drop).expect_err(what);
        assert_eq!(refused.field, format!("first_boot.{field}"), "{what}: {refused}");
        assert!(refused.message.len() < 500, "{what}: {refused}");
    }
}

#[test]
fn what_a_guest_may_be_told_is_taken_as_it_is() {
    let table = [
        cloud_config(""),
        cloud_config(
            "password: \"' }], - x\"\nusers: [default, {name: 김, groups: &g [sudo]}, {name: b, groups: *g}]\n",
        ),
        user_data("#cloud-config\r\npassword: x\r\n"),
        // Means nothing here, and cloud-init refuses to make objects.
        cloud_config("a: !!python/object/apply:os.system [id]"),
        user_data("#cloud-config-archive\n- a\n"),
        user_data("#!/bin/sh\n[[ -e /x ]] || echo '{{{'\n"),
        user_data("## template: jinja\n#cloud-config\n{% if x %}\na: {{ b }}\n{% endif %}\n"),
        user_data("#include\nhttp://10.0.0.1/a\n"),
        user_data("Content-Type: multipart/mixed; boundary=\"x\"\nMIME-Version: 1.0\n\n--x--\n"),
        user_data(format!("#!{}", "x".repeat(MAX_DOCUMENT_BYTES - 2))),
        network_config(
            "version: 2\nethernets: {a: {match: {macaddress: '52:54:00:00:00:01'}, dhcp4: true}}\n",
        ),
        network_config("{\"version\": 2}"),
        key(ED25519),
        key(format!("{ED25519} 홍길동@대구 \"quoted\", {{braced}}: yes")),
        key(
            "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBEmKSENjQEezOmxkZMy7opKgwFB9nkt5YRrYMjNuG5N87uRgg6CLrbo5wAdT/y6v0mKV0U2w0WZ2YB/++Tpockg=",
        ),
        hostname("web"),
        hostname("3com.Example.KR"),
        v1::FirstBoot::default(),
    ];
    for wire in table {
        let own = first_boot(&wire, &[]).unwrap_or_else(|refused| panic!("{wire:?}: {refused}"));
        let documents = Documents::from(&wire);
        own.check(&documents).unwrap();
        let exposed =
            |secret: &Option<Secret>| secret.as_ref().map(Secret::expose).unwrap_or_default().to_owned();
        assert_eq!(
            (exposed(&documents.user_data), exposed(&documents.network_config)),
            (wire.user_data, wire.network_config)
        );
        assert_eq!(own.ssh_keys, wire.ssh_authorized_keys);
    }
}

#[test]
fn a_first_boot_survives_the_wire_and_the_store_without_its_documents() {
    let wire = v1::VmSpec {
        vcpus: 1,
        memory_mib: 64,
        disks: vec![v1::Disk {
            name: "root".into(),
            size_mib: 1,
            pool: "fast".into(),
            ..Default::default()
        }],
        first_boot: Some(v1::FirstBoot {
            network_config: "version: 2".into(),
            ..cloud_config("password: marker")
        }),
        firmware: v1::Firmware::UefiSecureBoot.into(),
        tpm: true,
        ..Default::default()
    };
    let spec = Spec::try_from(wire).unwrap();
    let names: Vec<_> = spec
        .volumes()
        .map(|disk| (disk.name.as_str(), disk.pool.as_str()))
        .collect();
    assert_eq!(names, [("root", "fast"), (MEDIUM, "fast")]);
    assert_eq!(spec.features().count(), 3);
    let shown = v1::VmSpec::from(spec.clone());
    assert!(!format!("{shown:?}{spec:?}").contains("marker"));
    assert_eq!(Spec::try_from(shown).unwrap(), spec);
    let stored = serde_json::to_string(&spec).unwrap();
    assert!(!stored.contains("marker"), "{stored}");
    assert_eq!(serde_json::from_str::<Spec>(&stored).unwrap(), spec);
}

#[test]
fn a_document_is_printed_by_nothing() {
    let wire = cloud_config("password: marker");
    let documents = Documents::from(&wire);
    let sent = FirstBootDocuments::from(&documents);
    assert_eq!(sent.user_data, wire.user_data, "it is sent");
    let request = v1::CreateVmRequest {
        vm: Some(v1::Vm {
            spec: Some(v1::VmSpec {
                first_boot: Some(wire.clone()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let printed = format!(
        "{wire:?} {documents:?} {sent:?} {request:?} {:#?}",
        documents.user_data
    );
    assert!(!printed.contains("marker"), "{printed}");
    assert!(printed.contains("[30 bytes]"), "{printed}");
}

#[test]
fn a_document_that_is_missing_or_another_is_told_by_its_field() {
    let own = first_boot(&cloud_config("a: 1"), &[]).unwrap();
    let other = Documents::from(&cloud_config("a: 2"));
    for documents in [Documents::default(), other] {
        assert_eq!(own.check(&documents).unwrap_err().field, "first_boot.user_data");
    }
    let bare = first_boot(&v1::FirstBoot::default(), &[]).unwrap();
    bare.check(&Documents::default()).unwrap();
    bare.check(&Documents::from(&network_config("version: 2")))
        .unwrap_err();
}
