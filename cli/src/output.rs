//! How results are shown: the terminal, the formats, and what each kind of object looks like in them. Used by every
//! command. Data goes to [`Term::out`], everything else to [`Term::err`].

use std::{
    borrow::Cow,
    io::{self, IsTerminal as _, Write},
    pin::Pin,
};

use anstyle::{AnsiColor, Style};
use clap::ValueEnum;
use jiff::Timestamp;

use crate::{args::Color, exit::Error};

pub mod backup;
pub mod doctor;
pub mod event;
pub mod explain;
pub mod host;
pub mod human;
pub mod image;
pub mod json;
pub mod network;
pub mod operation;
pub mod placement;
pub mod plan;
pub mod site;
pub mod snapshot;
pub mod table;
pub mod vm;
pub mod volume;

/// Things that are well.
pub const GOOD: Style = AnsiColor::Green.on_default();
/// Things under way, or to look at.
pub const WARN: Style = AnsiColor::Yellow.on_default();
/// Things that are wrong.
pub const BAD: Style = AnsiColor::Red.on_default().bold();
/// Next steps.
pub const HINT: Style = AnsiColor::Cyan.on_default();

/// Forms of output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    /// A table, or a description of a single object.
    #[default]
    Table,
    /// A table with more columns.
    Wide,
    /// JSON as the API defines it.
    Json,
    /// The same as YAML.
    Yaml,
    /// Names only.
    Name,
}

/// Resolves when the user interrupts.
pub type Interrupt = Pin<Box<dyn Future<Output = ()>>>;

/// Where output goes, and what can be shown there. Tests put their own in place.
pub struct Term {
    /// Data.
    pub out: Box<dyn Write>,
    /// Messages and progress.
    pub err: Box<dyn Write>,
    /// Whether data is shown on a screen, which can be redrawn.
    pub out_screen: bool,
    /// Whether messages are shown on a screen, which can show moving bars.
    pub err_screen: bool,
    /// Whether data may be coloured.
    pub color: bool,
    /// Whether messages may be coloured.
    pub err_color: bool,
    /// The present time.
    pub now: fn() -> Timestamp,
    /// Waits for an interruption.
    pub interrupt: fn() -> Interrupt,
}

async fn ctrl_c() {
    if tokio::signal::ctrl_c().await.is_err() {
        // No handler could be set: the signal ends the process by itself.
        std::future::pending().await
    }
}

impl Term {
    /// The process's own standard output and error.
    pub fn standard(color: Color) -> Self {
        let may = |auto: anstream::ColorChoice| match color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => auto != anstream::ColorChoice::Never,
        };
        let (out, err) = (io::stdout(), io::stderr());
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        Self {
            color: may(anstream::AutoStream::choice(&out)),
            err_color: may(anstream::AutoStream::choice(&err)),
            out_screen: out.is_terminal() && !dumb,
            err_screen: err.is_terminal() && !dumb,
            out: Box::new(io::BufWriter::new(out)),
            err: Box::new(err),
            now: Timestamp::now,
            interrupt: || Box::pin(ctrl_c()),
        }
    }

    /// A style for messages, or none where colours are not wanted.
    pub fn paint_err(&self, style: Style) -> Style {
        if self.err_color { style } else { Style::new() }
    }

    /// A style for data, or none where colours are not wanted.
    pub fn paint(&self, style: Style) -> Style {
        if self.color { style } else { Style::new() }
    }

    /// Writes a line for the user to standard error.
    pub fn say(&mut self, text: &str) -> io::Result<()> {
        writeln!(self.err, "{text}")
    }

    /// Writes text to standard output, at once.
    pub fn print(&mut self, text: &str) -> io::Result<()> {
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }
}

/// A piece of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cell {
    /// What it says; control characters have been taken out.
    pub text: String,
    /// How it is painted.
    pub style: Option<Style>,
}

impl Cell {
    /// An ordinary piece.
    pub fn plain(text: impl AsRef<str>) -> Self {
        Self {
            text: human::clean(text.as_ref()),
            style: None,
        }
    }

    /// A painted piece.
    pub fn painted(text: impl AsRef<str>, style: Style) -> Self {
        Self {
            style: Some(style),
            ..Self::plain(text)
        }
    }
}

/// An object of the API that can be listed and shown.
pub trait Resource: prost::Message + Clone + PartialEq + Default {
    /// Its message's full name.
    const MESSAGE: &'static str;
    /// What people call several of them.
    const PLURAL: &'static str;
    /// Its name or id.
    fn key(&self) -> Cow<'_, str>;
    /// Columns of the table.
    fn columns(wide: bool) -> &'static [&'static str];
    /// Its row.
    fn row(&self, wide: bool, now: Timestamp) -> Vec<Cell>;
    /// All about it, for people.
    fn describe(&self, now: Timestamp) -> human::Page;
}

/// Shows several objects.
pub fn list<R: Resource>(term: &mut Term, format: Format, items: &[R]) -> Result<(), Error> {
    let text = match format {
        Format::Json => json::array(items)?,
        Format::Yaml => json::yaml_array(items)?,
        Format::Name => items.iter().map(|item| item.key().into_owned() + "\n").collect(),
        Format::Table | Format::Wide if items.is_empty() => {
            term.say(&format!("no {}", R::PLURAL))?;
            String::new()
        }
        Format::Table | Format::Wide => table::of(items, format == Format::Wide, (term.now)(), term.color),
    };
    Ok(term.print(&text)?)
}

/// Shows one object.
pub fn one<R: Resource>(term: &mut Term, format: Format, item: &R) -> Result<(), Error> {
    let text = match format {
        Format::Json => json::object(item)?,
        Format::Yaml => json::yaml(item)?,
        Format::Name => item.key().into_owned() + "\n",
        Format::Table | Format::Wide => item.describe((term.now)()).render(term.color),
    };
    Ok(term.print(&text)?)
}
