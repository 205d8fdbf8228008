//! The site's certificate authority and the identities it gives out.
//!
//! Called by the commands `init`, `issue-agent` and `issue-operator`, never by the running controller: that only reads
//! its own certificate. Everything lies in the controller's data directory, beside the store:
//!
//! ```text
//! ca.pem ca.key                  the authority; the key is all of the site's security
//! cluster-id                     which site this is; agents obey no other
//! controller.pem controller.key  the controller's identity
//! admin.pem admin.key            the first operator's identity
//! ```
//!
//! A file appears whole, synced, or not at all. Keys are readable by their owner only. An existing authority is never
//! overwritten; an `init` that was interrupted can be run again. Must not write to a log: it handles keys.

use std::path::{Path, PathBuf};

use dalgu_proto::{
    ids::{self, ClusterId, HostName},
    tls,
};
use rcgen::KeyPair;

mod certificate;
mod files;
#[cfg(test)]
mod tests;

use self::certificate::{Authority, Use};

/// File that says which site a data directory belongs to.
pub const CLUSTER_ID_FILE: &str = "cluster-id";
/// Name of the controller in its certificate, and of its files.
const CONTROLLER: &str = "controller";
/// Name of the first operator, and of its files.
const ADMIN: &str = "admin";
/// Names that an operator cannot have, as files of that name mean something else.
const RESERVED_NAMES: [&str; 3] = ["ca", CONTROLLER, "agent"];

/// Why an authority or an identity cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is an authority already.
    #[error("{} exists already: this site has an authority, and making another would lock out all its hosts", .0.display())]
    AlreadyInitialised(PathBuf),
    /// There is no authority.
    #[error("{} does not exist: run `dalgu-controller init` first, or name another data directory", .0.display())]
    NotInitialised(PathBuf),
    /// A file cannot be read or written.
    #[error("cannot {action} {}", .path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// A name or address is not of the form that is allowed.
    #[error("{what} {value:?}: {rule}")]
    Name {
        /// What it was meant to be.
        what: &'static str,
        /// What was given.
        value: String,
        /// The rule in words.
        rule: &'static str,
    },
    /// A certificate or key cannot be made or used.
    #[error("the authority, a certificate or a key cannot be made or used")]
    Certificate(#[from] rcgen::Error),
    /// The authority's certificate does not say which site it is for.
    #[error("{} names no cluster id (spiffe://UUID): it was not made by `dalgu-controller init`", .0.display())]
    NoSite(PathBuf),
    /// The file with the cluster id holds something else.
    #[error("{} does not hold a cluster id", .path.display())]
    ClusterId {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ids::Error,
    },
}

/// Makes a site: its authority, its id, the controller's identity and that of the first operator, `admin`.
///
/// `site` is the site's name, for people who look at the authority; programs tell sites apart by the id. `addresses` are names and addresses under which the controller can be
/// reached (`HOST`, `IP`, `HOST:PORT`); hosts do not need them, browsers and scrapers do. Refuses a directory that has an
/// authority.
pub fn init(data_dir: &Path, site: &str, addresses: &[String]) -> Result<ClusterId, Error> {
    check_site(site)?;
    let names = controller_names(addresses)?;
    files::make_private_dir(data_dir)?;
    let (certificate, key) = authority_files(data_dir);
    if files::exists(&certificate)? {
        return Err(Error::AlreadyInitialised(certificate));
    }
    // A key without a certificate is what an interrupted run leaves; nobody trusts it yet, and it is as good as new.
    if !files::exists(&key)? {
        files::write_new_private(&key, &KeyPair::generate()?.serialize_pem())?;
    }
    let key = KeyPair::from_pem(&files::read(&key)?)?;
    let cluster = ClusterId::from_uuid(uuid::Uuid::new_v4());
    let (authority, pem) = Authority::create(key, site, cluster)?;
    files::write_public(&data_dir.join(CLUSTER_ID_FILE), &format!("{cluster}\n"))?;

    let controller = authority.issue("controller", "main", &names, Use::ServerAndClient)?;
    files::write_identity(data_dir, CONTROLLER, &controller)?;
    let admin = authority.issue("operator", ADMIN, &[], Use::Client)?;
    files::write_identity(data_dir, ADMIN, &admin)?;
    // Last: its presence says that all the rest is there.
    files::write_public(&certificate, &pem)?;
    Ok(cluster)
}

/// Names and addresses that the controller's certificate is valid for when [`init`] is given these.
pub fn controller_names(addresses: &[String]) -> Result<Vec<String>, Error> {
    let mut names = vec![tls::CONTROLLER_NAME.to_owned(), "localhost".to_owned()];
    names.extend(certificate::alternatives(addresses)?);
    Ok(names)
}

/// Reads which site a data directory belongs to.
pub fn cluster_id(data_dir: &Path) -> Result<ClusterId, Error> {
    let path = data_dir.join(CLUSTER_ID_FILE);
    if !files::exists(&path)? {
        return Err(Error::NotInitialised(path));
    }
    files::read(&path)?
        .trim()
        .parse()
        .map_err(|source| Error::ClusterId { path, source })
}

/// Gives a host's agent an identity: `ca.pem`, `agent.pem` and `agent.key` in `out_dir`, replacing what is there.
///
/// `addresses` as for [`init`]: under which scrapers reach the agent.
pub fn issue_agent(
    data_dir: &Path,
    host: &HostName,
    addresses: &[String],
    out_dir: &Path,
) -> Result<(), Error> {
    let (authority, pem) = load(data_dir)?;
    let mut names = vec![tls::agent_name(host), host.to_string()];
    names.extend(certificate::alternatives(addresses)?);
    let identity = authority.issue("agent", host.as_str(), &names, Use::ServerAndClient)?;
    hand_out(out_dir, "agent", &identity, &pem)
}

/// Gives an operator an identity: `ca.pem`, `NAME.pem` and `NAME.key` in `out_dir`, replacing what is there.
///
/// The name is what events and logs call the operator.
pub fn issue_operator(data_dir: &Path, name: &str, out_dir: &Path) -> Result<(), Error> {
    check_operator(name)?;
    let (authority, pem) = load(data_dir)?;
    let identity = authority.issue("operator", name, &[], Use::Client)?;
    hand_out(out_dir, name, &identity, &pem)
}

fn hand_out(out_dir: &Path, name: &str, identity: &certificate::Issued, ca: &str) -> Result<(), Error> {
    files::make_private_dir(out_dir)?;
    files::write_identity(out_dir, name, identity)?;
    files::write_public(&out_dir.join("ca.pem"), ca)
}

fn authority_files(data_dir: &Path) -> (PathBuf, PathBuf) {
    (data_dir.join("ca.pem"), data_dir.join("ca.key"))
}

fn load(data_dir: &Path) -> Result<(Authority, String), Error> {
    let (certificate, key) = authority_files(data_dir);
    for path in [&certificate, &key] {
        if !files::exists(path)? {
            return Err(Error::NotInitialised(path.clone()));
        }
    }
    let pem = files::read(&certificate)?;
    let key = KeyPair::from_pem(&files::read(&key)?)?;
    let authority = Authority::load(&pem, key)?.ok_or(Error::NoSite(certificate))?;
    Ok((authority, pem))
}

fn check_site(site: &str) -> Result<(), Error> {
    let allowed =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'-' | b'_');
    if (1..=63).contains(&site.len()) && site.bytes().all(allowed) {
        return Ok(());
    }
    let rule = "a site's name is 1 to 63 characters a-z, 0-9, '.', '-' and '_'";
    Err(Error::Name {
        what: "site",
        value: site.to_owned(),
        rule,
    })
}

fn check_operator(name: &str) -> Result<(), Error> {
    if ids::check_file_name(name).is_ok() && name.len() <= 63 && !RESERVED_NAMES.contains(&name) {
        return Ok(());
    }
    let rule = "an operator's name is 1 to 63 characters a-z, A-Z, 0-9, '.', '_' and '-', the first not '.' or '-', \
                and not \"ca\", \"controller\" or \"agent\"";
    Err(Error::Name {
        what: "operator",
        value: name.to_owned(),
        rule,
    })
}
