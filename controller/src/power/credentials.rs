//! User and password for management controllers: files in one directory, read anew at each use, so that a new password needs no restart.
//!
//! They are never logged, stored or shown: [`Credentials`] has no way to be written but into the header that it is for.

use std::{
    fmt,
    io::Read,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use base64::{Engine, engine::general_purpose::STANDARD};

/// A file of two short lines is no larger.
const MAX_BYTES: u64 = 4096;

/// Why there are none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("the credentials {} cannot be read: {message}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        message: String,
    },
    /// Others may read it.
    #[error("the credentials {} can be read by others (mode {mode:o}): `chmod 600` it", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It is not two lines.
    #[error("the credentials {} are not a line with the user and a line with the password", .path.display())]
    Form {
        /// The file.
        path: PathBuf,
    },
}

/// User and password.
pub struct Credentials {
    user: String,
    password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials")
    }
}

impl Credentials {
    /// Reads those of a name, which is a file's and leads to no other directory ([`dalgu_proto::ids::check_file_name`]).
    ///
    /// # Errors
    /// When they are not there, not two lines, or others may read them.
    pub fn read(directory: &Path, name: &str) -> Result<Self, Error> {
        let path = directory.join(name);
        let failed = |error: std::io::Error| Error::Read {
            path: path.clone(),
            message: error.to_string(),
        };
        let file = std::fs::File::open(&path).map_err(failed)?;
        let mode = file.metadata().map_err(failed)?.mode() & 0o777;
        if mode & 0o007 != 0 {
            return Err(Error::Open { path, mode });
        }
        let mut text = String::new();
        file.take(MAX_BYTES).read_to_string(&mut text).map_err(failed)?;
        let mut lines = text.lines();
        match (lines.next(), lines.next(), lines.next()) {
            // A colon ends the user's name in what is sent (RFC 7617).
            (Some(user), Some(password), None) if !user.is_empty() && !user.contains(':') => Ok(Self {
                user: user.to_owned(),
                password: password.to_owned(),
            }),
            _ => Err(Error::Form { path }),
        }
    }

    /// The header's value (RFC 7617), marked so that nothing shows it.
    pub fn basic(&self) -> http::HeaderValue {
        let text = STANDARD.encode(format!("{}:{}", self.user, self.password));
        let mut value = http::HeaderValue::try_from(format!("Basic {text}"))
            .unwrap_or_else(|_| http::HeaderValue::from_static(""));
        value.set_sensitive(true);
        value
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn of(text: &str, mode: u32) -> Result<Credentials, Error> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bmc");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        Credentials::read(dir.path(), "bmc")
    }

    #[test]
    fn they_are_two_lines_that_nobody_else_reads_and_nothing_shows() {
        let read = of("Aladdin\nopen sesame\n", 0o600).unwrap();
        // The example of RFC 7617.
        assert_eq!(
            read.basic().to_str().unwrap(),
            "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="
        );
        assert!(read.basic().is_sensitive());
        assert_eq!(format!("{read:?} {:?}", read.basic()), "Credentials Sensitive");
        assert!(of("user\npassword", 0o440).is_ok(), "as systemd gives them");
        for text in [
            "",
            "user",
            "user\npassword\nmore",
            "\npassword",
            "us:er\npassword",
        ] {
            assert!(matches!(of(text, 0o600), Err(Error::Form { .. })), "{text:?}");
        }
        let open = of("user\nsecret", 0o644).unwrap_err();
        assert!(matches!(open, Error::Open { mode: 0o644, .. }), "{open}");
        assert!(!open.to_string().contains("secret"));
        let missing = Credentials::read(Path::new("/nonexistent"), "bmc").unwrap_err();
        assert!(missing.to_string().contains("/nonexistent/bmc"), "{missing}");
    }
}
