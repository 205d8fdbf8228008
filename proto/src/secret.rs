//! Text that is written where it must be kept and shown nowhere: not in logs, not in answers, not in errors.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Such a text. Its debug form tells the size only; whoever needs the text says so with [`Secret::expose`]. Serialised it is
/// the text itself, for the store and the ledger.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Keeps a text.
    pub const fn new(text: String) -> Self {
        Self(text)
    }

    /// The text.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{} bytes]", self.0.len())
    }
}
