//! `dalgu context`: which controllers are known. Talks to none.

use std::path::Path;

use crate::{
    args::ContextCommand,
    config::{Choice, Config, Target},
    exit::Error,
    output::{Cell, Format, Term, human, table},
};

/// Does a command.
pub fn run(command: ContextCommand, choice: &Choice, format: Format, term: &mut Term) -> Result<(), Error> {
    match command {
        ContextCommand::List => list(&choice.load()?, format, term),
        ContextCommand::Use { name } => {
            choice.load()?.use_context(&name)?;
            Ok(term.say(&format!("the current context is now {}", human::clean(&name)))?)
        }
        ContextCommand::Show => show(&choice.target()?, choice, format, term),
    }
}

fn list(config: &Config, format: Format, term: &mut Term) -> Result<(), Error> {
    let current = |name: &str| config.current_context.as_deref() == Some(name);
    let values: Vec<_> = config
        .contexts
        .iter()
        .map(|(name, context)| {
            serde_json::json!({ "name": name, "endpoint": context.endpoint, "current": current(name) })
        })
        .collect();
    let text = match format {
        Format::Json => as_json(&values)?,
        Format::Yaml => as_yaml(&values)?,
        Format::Name => config.contexts.keys().map(|name| format!("{name}\n")).collect(),
        Format::Table | Format::Wide => {
            let rows = config.contexts.iter().map(|(name, context)| {
                let mark = if current(name) { "*" } else { "" };
                vec![
                    Cell::plain(mark),
                    Cell::plain(name),
                    Cell::plain(&context.endpoint),
                ]
            });
            let style = table::Style {
                color: term.color,
                ..table::Style::default()
            };
            table::layout(&["CURRENT", "NAME", "ENDPOINT"], rows.collect(), &style)
        }
    };
    Ok(term.print(&text)?)
}

fn show(target: &Target, choice: &Choice, format: Format, term: &mut Term) -> Result<(), Error> {
    let file = choice
        .path()
        .map(|path| path.display().to_string())
        .unwrap_or_default();
    let files = target
        .identity
        .as_ref()
        .map(|files| [("ca", &files.ca), ("cert", &files.cert), ("key", &files.key)]);
    let value = serde_json::json!({
        "context": target.context,
        "endpoint": target.endpoint,
        "config": file,
        "ca": target.identity.as_ref().map(|files| &files.ca),
        "cert": target.identity.as_ref().map(|files| &files.cert),
        "key": target.identity.as_ref().map(|files| &files.key),
    });
    let text = match format {
        Format::Json => as_json(&value)?,
        Format::Yaml => as_yaml(&value)?,
        Format::Name => format!("{}\n", target.context.as_deref().unwrap_or_default()),
        Format::Table | Format::Wide => {
            let mut page = human::Page::default();
            page.line("Context", target.context.as_deref().unwrap_or("-"))
                .line("Endpoint", &target.endpoint);
            page.line("Configuration", human::or_dash(&file));
            for (name, path) in files.into_iter().flatten() {
                page.line(name, format!("{}{}", path.display(), readable(path)));
            }
            page.render(term.color)
        }
    };
    Ok(term.print(&text)?)
}

fn readable(path: &Path) -> String {
    std::fs::File::open(path).map_or_else(|error| format!(" (cannot be read: {error})"), |_| String::new())
}

fn as_json(value: &impl serde::Serialize) -> Result<String, Error> {
    let text =
        serde_json::to_string_pretty(value).map_err(|error| Error::Format("JSON", error.to_string()))?;
    Ok(text + "\n")
}

fn as_yaml(value: &impl serde::Serialize) -> Result<String, Error> {
    serde_norway::to_string(value).map_err(|error| Error::Format("YAML", error.to_string()))
}
