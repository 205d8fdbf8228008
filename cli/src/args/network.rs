//! What can be typed after `dalgu network` and `dalgu security-group`.

use std::net::IpAddr;

use clap::{Args, Subcommand};
use dalgu_proto::v1;

use super::{host::RequestArgs, values};
use crate::complete;

/// Networks.
#[derive(Debug, Subcommand)]
pub enum NetworkCommand {
    /// Makes a network.
    Create(Box<CreateArgs>),
    /// Lists networks.
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Shows one network in full.
    #[command(visible_alias = "show")]
    Get {
        /// Name of the network.
        #[arg(add = complete::networks())]
        name: String,
        /// Go on and show changes as they come.
        #[arg(short, long)]
        watch: bool,
    },
    /// Lists the interfaces in a network, with their addresses.
    Interfaces {
        /// Name of the network.
        #[arg(add = complete::networks())]
        name: String,
    },
    /// Changes labels, description, DNS domain and DNS servers.
    Update(UpdateArgs),
    /// Deletes a network that no VM has an interface in.
    #[command(visible_alias = "rm")]
    Delete {
        /// Name of the network.
        #[arg(add = complete::networks())]
        name: String,
        /// Refuse unless the network is still as it was with this etag.
        #[arg(long, default_value = "", hide_default_value = true)]
        etag: String,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
}

/// Which to list.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Only those with this label; may be given again.
    #[arg(short = 'l', long = "selector", value_parser = values::label, value_name = "KEY=VALUE")]
    pub selector: Vec<(String, String)>,
    /// Go on and show changes as they come.
    #[arg(short, long)]
    pub watch: bool,
}

const CREATE_HELP: &str = "\
  dalgu network create field --overlay --ipv4 10.20.0.0/16
  dalgu network create office --bridge br0 --vlan 12 --ipv4 192.0.2.0/24,gateway=192.0.2.1,first=192.0.2.100,last=192.0.2.199";

/// A network to be made.
#[derive(Debug, Args)]
#[command(after_help = CREATE_HELP, group(clap::ArgGroup::new("kind").required(true)))]
pub struct CreateArgs {
    /// Name of the network.
    pub name: String,
    /// A network of the site's own that spans hosts, in VXLAN.
    #[arg(long, group = "kind")]
    pub overlay: bool,
    /// VXLAN network identifier [default: one that is free].
    #[arg(long, value_name = "N", conflicts_with = "bridge")]
    pub vni: Option<u32>,
    /// A bridge that hosts have: the way to the site's own network.
    #[arg(long, value_name = "BRIDGE", group = "kind")]
    pub bridge: Option<String>,
    /// Tag of the VLAN on the bridge [default: untagged].
    #[arg(long, value_name = "TAG", conflicts_with = "overlay")]
    pub vlan: Option<u32>,
    /// IPv4 addresses: CIDR[,gateway=ADDRESS][,first=ADDRESS][,last=ADDRESS][,service=ADDRESS][,no-dhcp].
    #[arg(long, value_parser = values::network::subnet, value_name = "SUBNET")]
    pub ipv4: Option<v1::Subnet>,
    /// IPv6 addresses, in the same way.
    #[arg(long, value_parser = values::network::subnet, value_name = "SUBNET")]
    pub ipv6: Option<v1::Subnet>,
    /// Largest packet in bytes [default: 1500, of an overlay 1450].
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u32>,
    /// DNS domain in which VMs are found by their names [default: NAME.internal].
    #[arg(long, value_name = "DOMAIN")]
    pub domain: Option<String>,
    /// Server that other names are asked of; may be given again.
    #[arg(long = "dns", value_name = "ADDRESS")]
    pub dns_servers: Vec<IpAddr>,
    /// Label of the network; may be given again.
    #[arg(long = "label", value_parser = values::label, value_name = "KEY=VALUE")]
    pub labels: Vec<(String, String)>,
    /// Free text.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "TEXT")]
    pub description: String,
    /// The request.
    #[command(flatten)]
    pub request: RequestArgs,
}

/// A change of a network.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("change").required(true).multiple(true)))]
pub struct UpdateArgs {
    /// Name of the network.
    #[arg(add = complete::networks())]
    pub name: String,
    /// Set a label (KEY=VALUE) or remove it (KEY-); may be given again.
    #[arg(long = "label", value_parser = values::label_change, value_name = "CHANGE", group = "change")]
    pub labels: Vec<values::LabelChange>,
    /// New description.
    #[arg(long, value_name = "TEXT", group = "change")]
    pub description: Option<String>,
    /// New DNS domain.
    #[arg(long, value_name = "DOMAIN", group = "change")]
    pub domain: Option<String>,
    /// Server that other names are asked of from now on, instead of those before; may be given again.
    #[arg(long = "dns", value_name = "ADDRESS", group = "change")]
    pub dns_servers: Vec<IpAddr>,
    /// Answer for the network's own names only.
    #[arg(long, group = "change", conflicts_with = "dns_servers")]
    pub no_dns: bool,
    /// Refuse unless the network is still as it was with this etag.
    #[arg(long, value_name = "ETAG")]
    pub etag: Option<String>,
    /// The request.
    #[command(flatten)]
    pub request: RequestArgs,
}

/// Security groups.
#[derive(Debug, Subcommand)]
pub enum GroupCommand {
    /// Makes a security group.
    Create(CreateGroupArgs),
    /// Lists security groups.
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Shows one security group with its rules.
    #[command(visible_alias = "show")]
    Get {
        /// Name of the group.
        #[arg(add = complete::security_groups())]
        name: String,
        /// Go on and show changes as they come.
        #[arg(short, long)]
        watch: bool,
    },
    /// Changes rules, labels and description; hosts follow within seconds.
    Update(UpdateGroupArgs),
    /// Deletes a security group that nothing uses.
    #[command(visible_alias = "rm")]
    Delete {
        /// Name of the group.
        #[arg(add = complete::security_groups())]
        name: String,
        /// Refuse unless the group is still as it was with this etag.
        #[arg(long, default_value = "", hide_default_value = true)]
        etag: String,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
}

const RULE_HELP: &str = "\
A rule is DIRECTION,PROTOCOL[,PORTS][,WITH][,description=TEXT]; icmp has a type instead of ports:
  ingress,tcp,22,from=10.0.0.0/8       SSH from these addresses
  ingress,any,from-group=web           everything from interfaces of the group web in the same network
  ingress,udp,5000-5010                these ports, from everybody
  egress,tcp,443,to=192.0.2.7          with it, nothing else goes out
  ingress,icmp,echo-request            what ping sends, by IPv4 (type 8) and IPv6 (128)
  ingress,icmp,description=ping, as monitoring does    the text is the last part, and may have commas

An interface lets in what a rule of one of its groups allows, and nothing where it has none. It lets out everything, unless
one of its groups has a rule for egress.";

/// A security group to be made.
#[derive(Debug, Args)]
#[command(after_help = RULE_HELP)]
pub struct CreateGroupArgs {
    /// Name of the group.
    pub name: String,
    /// What it lets through: DIRECTION,PROTOCOL[,PORTS][,WITH][,description=TEXT]; may be given again.
    #[arg(long = "rule", value_parser = values::network::rule, value_name = "RULE")]
    pub rules: Vec<v1::SecurityRule>,
    /// Label of the group; may be given again.
    #[arg(long = "label", value_parser = values::label, value_name = "KEY=VALUE")]
    pub labels: Vec<(String, String)>,
    /// Free text.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "TEXT")]
    pub description: String,
    /// The request.
    #[command(flatten)]
    pub request: RequestArgs,
}

/// A change of a security group.
#[derive(Debug, Args)]
#[command(after_help = RULE_HELP, group(clap::ArgGroup::new("change").required(true).multiple(true)))]
pub struct UpdateGroupArgs {
    /// Name of the group.
    #[arg(add = complete::security_groups())]
    pub name: String,
    /// What it lets through from now on, instead of all that it had; may be given again.
    #[arg(long = "rule", value_parser = values::network::rule, value_name = "RULE", group = "change", conflicts_with_all = ["add", "remove"])]
    pub rules: Vec<v1::SecurityRule>,
    /// What it lets through besides, or the description of a rule that it has; may be given again.
    #[arg(long = "add-rule", value_parser = values::network::rule, value_name = "RULE", group = "change")]
    pub add: Vec<v1::SecurityRule>,
    /// A rule that it has no longer, with or without its description; may be given again.
    #[arg(long = "remove-rule", value_parser = values::network::rule, value_name = "RULE", group = "change")]
    pub remove: Vec<v1::SecurityRule>,
    /// Set a label (KEY=VALUE) or remove it (KEY-); may be given again.
    #[arg(long = "label", value_parser = values::label_change, value_name = "CHANGE", group = "change")]
    pub labels: Vec<values::LabelChange>,
    /// New description.
    #[arg(long, value_name = "TEXT", group = "change")]
    pub description: Option<String>,
    /// Refuse unless the group is still as it was with this etag.
    #[arg(long, value_name = "ETAG")]
    pub etag: Option<String>,
    /// The request.
    #[command(flatten)]
    pub request: RequestArgs,
}
