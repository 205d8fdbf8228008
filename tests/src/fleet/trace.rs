//! The history of a run: a digest of every line of it, and the lines themselves when somebody wants to read them.

use std::{fmt, time::Duration};

use tokio::time::Instant;

/// Lines kept when they are not all wanted: enough to see what came before a violation.
const LAST: usize = 60;

/// See the module.
#[derive(Debug)]
pub struct Trace {
    begun: Instant,
    digest: u64,
    lines: Vec<String>,
    keep_all: bool,
    text: String,
}

impl Trace {
    /// An empty history that begins now.
    pub fn new(keep_all: bool) -> Self {
        Self {
            begun: Instant::now(),
            // FNV-1a, 64 bits: offset basis and prime of its authors.
            digest: 0xcbf2_9ce4_8422_2325,
            lines: Vec::new(),
            keep_all,
            text: String::new(),
        }
    }

    /// Adds a line.
    pub fn say(&mut self, line: fmt::Arguments<'_>) {
        use fmt::Write as _;
        self.text.clear();
        let time = self.time();
        let written = write!(
            self.text,
            "{:>4}.{:03} {line}",
            time.as_secs(),
            time.subsec_millis()
        );
        written.expect("a string takes everything");
        for byte in self.text.bytes() {
            self.digest = (self.digest ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        if self.keep_all || self.lines.len() < 2 * LAST {
            self.lines.push(self.text.clone());
        } else {
            // The older half goes, so that each line is moved once only.
            self.lines.drain(..LAST);
            self.lines.push(self.text.clone());
        }
    }

    /// Time since the beginning.
    pub fn time(&self) -> Duration {
        self.begun.elapsed()
    }

    /// The digest of all lines so far.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// The lines that were kept.
    pub fn lines(&self) -> &[String] {
        &self.lines
    }
}
