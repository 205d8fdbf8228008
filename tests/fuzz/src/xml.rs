//! Target `xml`: domains that Dalgu writes, and domains that libvirt hands out.
//!
//! Promises: what is written of any model is read back as that model, with the same elements whatever its strings hold; what
//! XML cannot hold is refused; no text makes a panic; another mark changes the mark alone.

use std::path::PathBuf;

use dalgu_agent::hypervisor::{
    Mark,
    libvirt::{
        Accelerator, read,
        tree::{Element, Node},
        xml::{BackingModel, Cache, DiskModel, KernelModel, Model, NicModel},
    },
};
use dalgu_proto::{
    ids::{ClusterId, Epoch, Generation},
    vm::{DiskFormat, DiskLimits, Firmware, PciAddress},
};
use uuid::Uuid;

use crate::input::Input;

/// Takes one input: the first byte says what the rest is.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.byte() % 4 {
        0 => written(&mut input),
        1 => changed(&mut input),
        2 => tree(&input.rest()),
        _ => domain(&input.rest()),
    }
}

fn mark(input: &mut Input<'_>) -> Mark {
    Mark {
        cluster: ClusterId::from_uuid(Uuid::from_u128(u128::from(input.byte()))),
        epoch: Epoch(u64::from(input.byte())),
        generation: Generation(input.pick(&[0, 1, u64::MAX])),
    }
}

fn model(input: &mut Input<'_>) -> Model {
    let mark = mark(input);
    let shape = usize::from(input.byte());
    let firmware = input.pick(&[Firmware::Bios, Firmware::Uefi, Firmware::UefiSecureBoot]);
    let mut model = Model {
        id: Uuid::from_u128(u128::from(input.byte())),
        name: input.word(),
        accelerator: input.pick(&[Accelerator::Kvm, Accelerator::Tcg, Accelerator::Test]),
        mark,
        vcpus: input.pick(&[1, 254, u32::MAX]),
        max_vcpus: 0,
        memory_mib: input.pick(&[32, 0, u64::MAX]),
        max_memory_mib: 0,
        disks: (0..shape & 3)
            .map(|_| DiskModel {
                name: input.word(),
                path: input.word().into(),
                format: input.pick(&[DiskFormat::Qcow2, DiskFormat::Raw]),
                cache: input.pick(&[Cache::None, Cache::Writeback]),
                backing: (0..input.pick(&[0, 1, 3]))
                    .map(|_| BackingModel {
                        path: input.word().into(),
                        format: input.pick(&[DiskFormat::Qcow2, DiskFormat::Raw]),
                        image: input.pick(&[false, true]),
                    })
                    .collect(),
                limits: DiskLimits::default(),
            })
            .collect(),
        nics: (0..shape >> 2 & 3)
            .map(|_| NicModel {
                name: input.word(),
                bridge: input.word(),
                mac: input.word(),
                target: None,
                mtu: None,
            })
            .collect(),
        kernel: (shape >> 4 & 1 == 1).then(|| KernelModel {
            kernel: input.word().into(),
            initrd: (shape >> 5 & 1 == 1).then(|| input.word().into()),
            cmdline: input.word(),
        }),
        console: input.word().into(),
        nvram: (firmware != Firmware::Bios).then(|| input.word().into()),
        firmware,
        tpm: input.pick(&[false, true]),
        pinning: None,
        devices: (0..shape & 1)
            .map(|bus| PciAddress {
                domain: u16::MAX,
                bus: u8::try_from(bus).unwrap_or_default(),
                slot: 31,
                function: 7,
            })
            .collect(),
    };
    // As they are: a maximum has an element for each processor.
    model.max_vcpus = model.vcpus;
    model.max_memory_mib = model.memory_mib;
    model
}

/// A model with every string replaced.
fn plain(model: &Model) -> Model {
    let path = || PathBuf::from("x");
    let mut plain = model.clone();
    plain.name = "x".into();
    plain.console = path();
    plain.nvram = plain.nvram.as_ref().map(|_| path());
    for disk in &mut plain.disks {
        (disk.name, disk.path) = ("x".into(), path());
        for file in &mut disk.backing {
            file.path = path();
        }
    }
    for nic in &mut plain.nics {
        (nic.name, nic.bridge, nic.mac) = ("x".into(), "x".into(), "x".into());
    }
    if let Some(kernel) = &mut plain.kernel {
        kernel.kernel = path();
        kernel.initrd = kernel.initrd.as_ref().map(|_| path());
        if !kernel.cmdline.is_empty() {
            kernel.cmdline = "x".into();
        }
    }
    plain
}

/// Names of elements and attributes, without what they hold.
fn shape(element: &Element) -> String {
    let attributes: Vec<_> = element.attributes.iter().map(|(name, _)| name.as_str()).collect();
    let children = element.children.iter().filter_map(|child| match child {
        Node::Element(child) => Some(shape(child)),
        Node::Text(_) => None,
    });
    format!(
        "{} {attributes:?} [{}]",
        element.name,
        children.collect::<String>()
    )
}

fn written(input: &mut Input<'_>) {
    let model = model(input);
    let Ok(xml) = model.to_xml() else { return };
    assert_eq!(read::model(&xml).as_ref(), Ok(&model), "{xml}");
    let parsed = Element::parse(&xml).expect("what was written can be read");
    let plain = plain(&model).to_xml().expect("there is nothing odd in it");
    let plain = Element::parse(&plain).expect("what was written can be read");
    assert_eq!(shape(&parsed), shape(&plain), "a string became markup: {xml}");
    let files = read::files(&xml).expect("it can be read");
    assert_eq!(
        files.len(),
        model.disks.len()
            + model.disks.iter().map(|disk| disk.backing.len()).sum::<usize>()
            + model
                .kernel
                .iter()
                .map(|kernel| 1 + kernel.initrd.iter().count())
                .sum::<usize>()
    );
    let other = mark(input);
    let marked = read::with_mark(&xml, &other).expect("it bears a mark");
    assert_eq!(
        read::model(&marked),
        Ok(Model { mark: other, ..model }),
        "{marked}"
    );
}

/// A domain that Dalgu wrote, some bytes of it replaced.
fn changed(input: &mut Input<'_>) {
    let model = model(input);
    let Ok(xml) = model.to_xml() else { return };
    let mut bytes = xml.into_bytes();
    for _ in 0..=input.byte() % 4 {
        let at = input.pair() % (bytes.len() + 1);
        let until = (at + usize::from(input.byte())).min(bytes.len());
        let with = input.word();
        bytes.splice(at..until, with.into_bytes());
    }
    domain(&String::from_utf8_lossy(&bytes));
}

/// Any text as a tree: what is read can be written and read again, unless it holds what XML cannot.
fn tree(text: &str) {
    let Ok(element) = Element::parse(text) else { return };
    if let Ok(xml) = element.to_xml() {
        let again = Element::parse(&xml).map(tidy);
        assert_eq!(again, Ok(tidy(element)), "{xml}");
    }
}

/// Without texts that are empty, which leave no trace when they are written.
fn tidy(mut element: Element) -> Element {
    let children = std::mem::take(&mut element.children);
    for child in children {
        match (child, element.children.last_mut()) {
            (Node::Text(text), _) if text.is_empty() => {}
            (Node::Text(text), Some(Node::Text(last))) => last.push_str(&text),
            (Node::Text(text), _) => element.children.push(Node::Text(text)),
            (Node::Element(child), _) => element.children.push(Node::Element(tidy(child))),
        }
    }
    element
}

/// Any text as a domain.
fn domain(text: &str) {
    tree(text);
    let _ = read::files(text);
    let id = Uuid::from_u128(1);
    assert_eq!(read::names(text, id).is_some(), read::mark(text).is_some());
    let other = Mark {
        cluster: ClusterId::from_uuid(Uuid::from_u128(3)),
        epoch: Epoch(5),
        generation: Generation(6),
    };
    let (model, marked) = (read::model(text), read::with_mark(text, &other));
    if let (Ok(model), Ok(marked)) = (model, marked) {
        assert_eq!(
            read::model(&marked),
            Ok(Model { mark: other, ..model }),
            "{marked}"
        );
    }
}
