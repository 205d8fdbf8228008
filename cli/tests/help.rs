//! What `--help` says, over the whole tree of commands.
#![allow(missing_docs, reason = "tests")]

use clap::CommandFactory as _;
use dalgu::args::Cli;

#[test]
fn the_arguments_are_consistent_and_the_help_names_every_exit_code() {
    Cli::command().debug_assert();
    let help = Cli::command().render_long_help().to_string();
    for code in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 130] {
        assert!(
            help.lines()
                .any(|line| line.trim_start().starts_with(&format!("{code}  "))),
            "{code}"
        );
    }
}

/// Every help text of a command, with where it stands.
fn help_texts(command: &clap::Command, path: &str, texts: &mut Vec<(String, Option<String>)>) {
    let mut note =
        |place: String, short: Option<&clap::builder::StyledStr>, long: Option<&clap::builder::StyledStr>| {
            texts.push((place.clone(), short.map(ToString::to_string)));
            texts.extend(long.map(|long| (place, Some(long.to_string()))));
        };
    note(path.to_owned(), command.get_about(), command.get_long_about());
    for arg in command.get_arguments() {
        let place = format!("{path} {}", arg.get_id());
        note(place.clone(), arg.get_help(), arg.get_long_help());
        // The values of a switch are not shown.
        if !arg.get_action().takes_values() {
            continue;
        }
        for value in arg.get_possible_values() {
            note(format!("{place}={}", value.get_name()), value.get_help(), None);
        }
    }
    for inner in command.get_subcommands() {
        help_texts(inner, &format!("{path} {}", inner.get_name()), texts);
    }
}

/// What is wrong with a help text, which is one sentence without a full stop, as clap writes its own.
fn fault(text: Option<&str>) -> Option<&'static str> {
    let text = text.unwrap_or_default();
    if text.is_empty() {
        Some("says nothing")
    } else if text.trim() != text {
        Some("has white space around it")
    } else if text.ends_with(['.', ';', ':', ',']) {
        Some("ends in a full stop or another mark")
    } else {
        None
    }
}

#[test]
fn every_command_flag_and_value_has_a_help_text_without_a_full_stop() {
    let mut command = Cli::command();
    command.build();
    let mut texts = Vec::new();
    help_texts(&command, "dalgu", &mut texts);
    for place in [
        "dalgu vm migrate max_downtime",
        "dalgu host list selector",
        "dalgu completion shell=fish",
    ] {
        assert!(
            texts.iter().any(|(at, _)| at == place),
            "{place} was not looked at"
        );
    }
    let faults: Vec<_> = texts
        .iter()
        .filter_map(|(place, text)| Some(format!("{place}: {}: {text:?}", fault(text.as_deref())?)))
        .collect();
    assert!(faults.is_empty(), "{faults:#?}");
    assert!(fault(Some("Lists VMs.")).is_some() && fault(None).is_some());
}
