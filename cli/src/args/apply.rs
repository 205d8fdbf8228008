//! Arguments of `dalgu apply`.

use std::path::PathBuf;

use clap::Args;

use super::WaitArgs;

const HELP: &str = "\
The file is YAML (or JSON) with lists of objects in the API's form, as `-o yaml` shows them; several documents may follow
each other, and files each other:

    securityGroups:
    - name: web
      rules: [{direction: DIRECTION_INGRESS, protocol: PROTOCOL_TCP, firstPort: 443}]
    networks:
    - name: field
      overlay: {}
      ipv4: {cidr: 10.20.0.0/16}
    volumes:
    - name: ledger
      sizeMib: 20480
    placementGroups:
    - {name: apart, rule: PLACEMENT_RULE_ANTI_AFFINITY, topologyKey: rack}
    vms:
    - name: shop
      placementGroups: [apart]
      spec:
        vcpus: 2
        memoryMib: 2048
        disks: [{name: root, image: debian, sizeMib: 10240}, {name: data, volume: ledger}]
        nics: [{name: eth0, network: field, securityGroups: [web]}]

What an object does not say is left as it is; what it says to be empty, 0 or false is to be so. Of its disks, interfaces, rules
and labels, where they are given, all are meant: one that is not named is taken away. Objects that are not in the file are left alone. The same file again changes nothing.";

/// What should be, and how to get there.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct ApplyArgs {
    /// File that says what should be; `-` for standard input.
    #[arg(short, long = "file", required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Show what would change, and change nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Do not ask.
    #[arg(short, long)]
    pub yes: bool,
    /// How to wait for VMs that are made or changed.
    #[command(flatten)]
    pub wait: WaitArgs,
}
