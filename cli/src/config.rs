//! The configuration file: which controllers there are and how to reach them. Read by [`crate::client`] and
//! `dalgu context`; the only thing ever written is the name of the current context.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use serde::Deserialize;

/// Where a controller on the same machine listens.
pub const LOCAL_SOCKET: &str = "/run/dalgu-controller/controller.sock";

/// Why the configuration is no good.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no file, and nothing else says where the controller is.
    #[error("no configuration: {} does not exist", .0.display())]
    Missing(PathBuf),
    /// Neither a home directory nor a path is known.
    #[error("no configuration: neither --config nor HOME is set")]
    NoHome,
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is written in a way in which its current context cannot be replaced without touching the rest.
    #[error("cannot tell how {} names its current context", path.display())]
    Edit {
        /// The file.
        path: PathBuf,
        /// The context that was chosen.
        name: String,
    },
    /// The file is not what it should be.
    #[error("{} is not a valid configuration: {}", path.display(), source.message())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<toml::de::Error>,
    },
    /// No context is chosen.
    #[error("{} names no current_context", .0.display())]
    NoCurrent(PathBuf),
    /// There is no context of that name.
    #[error("there is no context {name:?} in {}", path.display())]
    Unknown {
        /// The name.
        name: String,
        /// The file.
        path: PathBuf,
    },
    /// TCP needs an identity.
    #[error("{endpoint} needs a certificate, and {what} is not set")]
    NoIdentity {
        /// The endpoint.
        endpoint: String,
        /// What is missing: "ca", "cert" or "key".
        what: &'static str,
    },
}

impl Error {
    /// What to do next.
    pub fn hint(&self) -> String {
        match self {
            Self::Missing(path) => format!(
                "write {} (`dalgu context --help` shows an example), or name a controller with --endpoint",
                path.display()
            ),
            Self::NoHome => "name the file with --config or DALGU_CONFIG".to_owned(),
            Self::Read { .. } => {
                "check the path and its permissions, or name another with --config".to_owned()
            }
            Self::Write { .. } => "check the permissions of the file and of its directory".to_owned(),
            Self::Edit { name, .. } => {
                let line = format!("current_context = {}", toml::Value::String(name.clone()));
                format!("write {line} into it by hand, on a line above the first [section]")
            }
            Self::Parse { .. } => "`dalgu context --help` shows an example".to_owned(),
            Self::NoCurrent(_) => "choose one with `dalgu context use NAME`, or give --context".to_owned(),
            Self::Unknown { .. } => "`dalgu context list` shows the contexts there are".to_owned(),
            Self::NoIdentity { .. } => {
                "set ca, cert and key in the context (`dalgu context --help` shows an example)".to_owned()
            }
        }
    }
}

/// One controller.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Context {
    /// `https://HOST:PORT` or `unix:/PATH`.
    pub endpoint: String,
    /// The site's authority, PEM.
    pub ca: Option<PathBuf>,
    /// The caller's certificate, PEM.
    pub cert: Option<PathBuf>,
    /// The caller's key, PEM.
    pub key: Option<PathBuf>,
}

/// The file.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of the context in use.
    pub current_context: Option<String>,
    /// Contexts by name.
    #[serde(default)]
    pub contexts: BTreeMap<String, Context>,
    /// Where it was read from.
    #[serde(skip)]
    pub path: PathBuf,
}

/// Files that prove who the caller is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityFiles {
    /// The site's authority.
    pub ca: PathBuf,
    /// The caller's certificate.
    pub cert: PathBuf,
    /// The caller's key.
    pub key: PathBuf,
}

/// Which controller is meant in the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Name of the context; `None` when no context was used.
    pub context: Option<String>,
    /// `https://HOST:PORT` or `unix:/PATH`.
    pub endpoint: String,
    /// Present for `https`.
    pub identity: Option<IdentityFiles>,
}

/// What the command line and the environment say.
#[derive(Debug, Clone, Default)]
pub struct Choice {
    /// `--config`.
    pub config: Option<PathBuf>,
    /// `--context`.
    pub context: Option<String>,
    /// `--endpoint`.
    pub endpoint: Option<String>,
}

/// The file that is meant where none is named.
fn default_path() -> Result<PathBuf, Error> {
    let given = |name| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let base = given("XDG_CONFIG_HOME").or_else(|| given("HOME").map(|home| home.join(".config")));
    Ok(base.ok_or(Error::NoHome)?.join("dalgu/config.toml"))
}

impl Choice {
    /// The file that is meant.
    pub fn path(&self) -> Result<PathBuf, Error> {
        self.config.clone().map_or_else(default_path, Ok)
    }

    /// Reads the file. `Missing` when there is none.
    pub fn load(&self) -> Result<Config, Error> {
        let path = self.path()?;
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Err(Error::Missing(path)),
            Err(source) => return Err(Error::Read { path, source }),
        };
        Config::parse(&text, path)
    }

    /// Says which controller is meant.
    pub fn target(&self) -> Result<Target, Error> {
        let config = match self.load() {
            Ok(config) => config,
            // Without a file an endpoint alone may do, or the controller of this very machine.
            Err(error @ (Error::Missing(_) | Error::NoHome)) if self.context.is_none() => {
                let local = || {
                    Path::new(LOCAL_SOCKET)
                        .exists()
                        .then(|| format!("unix:{LOCAL_SOCKET}"))
                };
                let endpoint = self.endpoint.clone().or_else(local).ok_or(error)?;
                return Target::new(None, endpoint, None);
            }
            Err(error) => return Err(error),
        };
        let chosen = self.context.clone().or_else(|| config.current_context.clone());
        match (chosen, &self.endpoint) {
            (Some(name), endpoint) => {
                let context = config.context(&name)?;
                let endpoint = endpoint.clone().unwrap_or_else(|| context.endpoint.clone());
                Target::new(Some(name), endpoint, Some(context))
            }
            (None, Some(endpoint)) => Target::new(None, endpoint.clone(), None),
            (None, None) => Err(Error::NoCurrent(config.path)),
        }
    }
}

impl Target {
    fn new(name: Option<String>, endpoint: String, context: Option<&Context>) -> Result<Self, Error> {
        if endpoint.starts_with("unix:") {
            return Ok(Self {
                context: name,
                endpoint,
                identity: None,
            });
        }
        let file = |what: &'static str, pick: fn(&Context) -> Option<&PathBuf>| {
            let missing = || Error::NoIdentity {
                endpoint: endpoint.clone(),
                what,
            };
            context.and_then(pick).cloned().ok_or_else(missing)
        };
        let identity = IdentityFiles {
            ca: file("ca", |context| context.ca.as_ref())?,
            cert: file("cert", |context| context.cert.as_ref())?,
            key: file("key", |context| context.key.as_ref())?,
        };
        Ok(Self {
            context: name,
            endpoint,
            identity: Some(identity),
        })
    }
}

impl Config {
    /// Reads a configuration; relative paths in it become relative to its directory.
    pub fn parse(text: &str, path: PathBuf) -> Result<Self, Error> {
        let parsed: Result<Self, _> = toml::from_str(text);
        let mut config = parsed.map_err(|source| Error::Parse {
            path: path.clone(),
            source: Box::new(source),
        })?;
        let base = path.parent().unwrap_or_else(|| Path::new("")).to_owned();
        for context in config.contexts.values_mut() {
            for file in [&mut context.ca, &mut context.cert, &mut context.key] {
                *file = file.take().map(|file| base.join(file));
            }
        }
        config.path = path;
        Ok(config)
    }

    /// A context by its name.
    pub fn context(&self, name: &str) -> Result<&Context, Error> {
        let unknown = || Error::Unknown {
            name: name.to_owned(),
            path: self.path.clone(),
        };
        self.contexts.get(name).ok_or_else(unknown)
    }

    /// Makes a context the current one: rewrites the file's one line, keeps all else, in one step.
    pub fn use_context(&self, name: &str) -> Result<(), Error> {
        self.context(name)?;
        let text = fs::read_to_string(&self.path).map_err(|source| Error::Read {
            path: self.path.clone(),
            source,
        })?;
        let changed = with_current(&text, name);
        // Never leaves a file behind that says something else, or that cannot be read.
        let as_meant = Self::parse(&changed, self.path.clone()).is_ok_and(|read| {
            read.current_context.as_deref() == Some(name) && read.contexts == self.contexts
        });
        if !as_meant {
            return Err(Error::Edit {
                path: self.path.clone(),
                name: name.to_owned(),
            });
        }
        // A link stays a link: what it points to is rewritten.
        let real = fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        replace_file(&real, &changed).map_err(|source| Error::Write {
            path: self.path.clone(),
            source,
        })
    }
}

/// The text of a configuration with another current context; comments and order stay.
fn with_current(text: &str, name: &str) -> String {
    let line = format!("current_context = {}", toml::Value::String(name.to_owned()));
    // Some editors put a byte order mark at the front, which must not come to lie behind the new line.
    let text = text.trim_start_matches('\u{feff}');
    let mut lines: Vec<&str> = text.lines().collect();
    let top = lines
        .iter()
        .position(|line| line.trim_start().starts_with('['))
        .unwrap_or(lines.len());
    let is_key = |line: &str| {
        line.split_once('=')
            .is_some_and(|(key, _)| key.trim().trim_matches(['"', '\'']) == "current_context")
    };
    match lines[..top].iter().position(|line| is_key(line)) {
        Some(at) => lines[at] = &line,
        None => lines.insert(0, &line),
    }
    lines.join("\n") + "\n"
}

fn replace_file(path: &Path, text: &str) -> io::Result<()> {
    let dir = path
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or_else(|| Path::new("."));
    let temporary = dir.join(format!(".config.toml.{}", uuid::Uuid::new_v4()));
    let write = || {
        let mut file = fs::File::create_new(&temporary)?;
        file.set_permissions(fs::metadata(path)?.permissions())?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        fs::File::open(dir)?.sync_all()
    };
    let outcome = write();
    if outcome.is_err() {
        // Nothing to be done when even this fails; the first error is the one that matters.
        let _ = fs::remove_file(&temporary);
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# my sites\ncurrent_context = \"lab\" # for now\n\n[contexts.lab]\nendpoint = \"https://10.77.0.1:7443\"\nca = \"pki/ca.pem\"\ncert = \"/etc/dalgu/a.pem\"\nkey = \"a.key\"\n\n[contexts.local]\nendpoint = \"unix:/run/x.sock\"\n";

    fn choice(dir: &Path, text: &str) -> Choice {
        let path = dir.join("config.toml");
        fs::write(&path, text).unwrap();
        Choice {
            config: Some(path),
            ..Choice::default()
        }
    }

    #[test]
    fn paths_are_relative_to_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let target = choice(dir.path(), TEXT).target().unwrap();
        let identity = target.identity.unwrap();
        assert_eq!(target.context.as_deref(), Some("lab"));
        assert_eq!(identity.ca, dir.path().join("pki/ca.pem"));
        assert_eq!(identity.cert, Path::new("/etc/dalgu/a.pem"));
    }

    #[test]
    fn flags_win_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut choice = choice(dir.path(), TEXT);
        choice.context = Some("local".into());
        assert_eq!(choice.target().unwrap().endpoint, "unix:/run/x.sock");
        choice.endpoint = Some("unix:/run/y.sock".into());
        assert_eq!(choice.target().unwrap().endpoint, "unix:/run/y.sock");
        choice.context = Some("nowhere".into());
        assert!(matches!(choice.target(), Err(Error::Unknown { .. })));
    }

    #[test]
    fn tcp_without_a_certificate_is_refused_before_anything_is_sent() {
        let dir = tempfile::tempdir().unwrap();
        let config = Some(dir.path().join("none.toml"));
        let endpoint = Some("https://10.0.0.1:7443".to_owned());
        let choice = Choice {
            config,
            endpoint,
            context: None,
        };
        assert!(matches!(
            choice.target(),
            Err(Error::NoIdentity { what: "ca", .. })
        ));
    }

    #[test]
    fn a_misspelt_key_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let text = "[contexts.a]\nendpoint = \"unix:/x\"\ncertificate = \"a.pem\"\n";
        assert!(matches!(
            choice(dir.path(), text).load(),
            Err(Error::Parse { .. })
        ));
    }

    #[test]
    fn choosing_a_context_changes_one_line_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let choice = choice(dir.path(), TEXT);
        choice.load().unwrap().use_context("local").unwrap();
        let after = fs::read_to_string(choice.path().unwrap()).unwrap();
        assert_eq!(
            after,
            TEXT.replace(
                "current_context = \"lab\" # for now",
                "current_context = \"local\""
            )
        );
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "a temporary file was left"
        );
        assert!(choice.load().unwrap().use_context("nowhere").is_err());
    }

    #[test]
    fn a_file_in_which_a_choice_cannot_be_written_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        for (text, readable) in [
            ("\u{feff}# mine\n[contexts.a]\nendpoint = \"unix:/x\"\n", true),
            ("'current_context' = 'b'\ncontexts.a.endpoint = 'unix:/x'\n", true),
            ("contexts.a.endpoint = \"\"\"\ncurrent_context = \"\"\"\n", false),
        ] {
            let choice = choice(dir.path(), text);
            let chosen = choice.load().unwrap().use_context("a");
            let after = choice.load().unwrap();
            match chosen {
                Ok(()) => assert_eq!(after.current_context.as_deref(), Some("a"), "{text}"),
                Err(Error::Edit { .. }) => assert_eq!(fs::read_to_string(&after.path).unwrap(), text),
                Err(other) => panic!("{text}: {other}"),
            }
            assert_eq!(chosen_is(&after), readable, "{text}");
        }
    }

    fn chosen_is(config: &Config) -> bool {
        config.current_context.as_deref() == Some("a")
    }

    #[test]
    fn a_first_choice_of_context_is_put_at_the_top() {
        let text = "[contexts.a]\nendpoint = \"unix:/x\"\n";
        assert_eq!(
            with_current(text, "a"),
            format!("current_context = \"a\"\n{text}")
        );
    }
}
