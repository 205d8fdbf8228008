//! What the documents say of the commands is what there is.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::{fs, path::PathBuf};

use clap::{CommandFactory as _, Parser as _, error::ErrorKind};
use dalgu::args::Cli;

/// The documents for operators, with their names.
fn documents() -> Vec<(String, String)> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut paths = vec![root.join("README.md"), root.join("README.ko.md")];
    let operations = fs::read_dir(root.join("docs/operations")).unwrap();
    paths.extend(operations.map(|entry| entry.unwrap().path()));
    paths.retain(|path| path.extension().is_some_and(|end| end == "md"));
    paths.sort();
    let named = paths.iter().map(|path| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        (name, fs::read_to_string(path).unwrap())
    });
    named.collect()
}

/// The commands of a line as a shell reads it, without its comment.
fn commands(line: &str) -> Vec<Vec<String>> {
    let (mut all, mut words, mut word) = (Vec::new(), Vec::new(), String::new());
    let mut quote = None;
    for letter in line.chars() {
        match quote {
            Some(end) if letter == end => quote = None,
            Some(_) => word.push(letter),
            None if letter == '\'' || letter == '"' => quote = Some(letter),
            None if letter == '#' && word.is_empty() => break,
            None if letter.is_whitespace() => {
                words.extend((!word.is_empty()).then(|| std::mem::take(&mut word)))
            }
            None => word.push(letter),
        }
    }
    words.extend((!word.is_empty()).then_some(word));
    for command in words.split(|word| ["&&", "|", ";"].contains(&word.as_str())) {
        all.push(command.to_vec());
    }
    all.retain(|command| command.first().is_some_and(|program| program == "dalgu"));
    all
}

/// What is wrong with a command that is to be typed.
fn fault(words: &[String]) -> Option<String> {
    let left_out = |word: &&String| *word != "...";
    let error = Cli::try_parse_from(words.iter().filter(left_out)).err()?;
    // A word in capitals stands for a value.
    let stands_for = |word: &String| word.chars().all(|letter| letter.is_ascii_uppercase());
    let shown = match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => true,
        ErrorKind::ValueValidation | ErrorKind::InvalidValue => words.iter().any(stands_for),
        // What is left out may have been needed.
        ErrorKind::MissingRequiredArgument => words.iter().any(|word| word == "..."),
        _ => false,
    };
    (!shown).then(|| error.to_string())
}

/// Whether a command with commands of its own also stands for itself.
fn takes_a_name(command: &clap::Command) -> bool {
    command.get_positionals().next().is_some()
}

/// What is wrong with a command that is named within a sentence, where what it needs may be left out.
fn misnamed(root: &clap::Command, words: &[String]) -> Option<String> {
    let mut command = root;
    for word in words.iter().skip(1) {
        if let Some(flag) = word.strip_prefix("--") {
            let name = flag.split('=').next().unwrap_or(flag);
            let mut known = command.get_arguments();
            if !known.any(|arg| {
                arg.get_long_and_visible_aliases()
                    .is_some_and(|all| all.contains(&name))
            }) {
                return Some(format!("`{}` has no --{name}", command.get_name()));
            }
        } else if let Some(inner) = command.find_subcommand(word) {
            command = inner;
        } else if command.has_subcommands() && !takes_a_name(command) && !word.starts_with('-') {
            return Some(format!("`{}` has no {word}", command.get_name()));
        }
    }
    None
}

#[test]
fn each_command_in_a_document_exists() {
    let mut root = Cli::command();
    root.build();
    let (mut typed, mut named, mut faults) = (0, 0, Vec::new());
    for (document, text) in documents() {
        let mut fenced = false;
        let whole = text.replace("\\\n", " ");
        for line in whole.lines() {
            fenced ^= line.starts_with("```");
            let block = fenced || line.starts_with("    ");
            let line = line.trim_start().trim_start_matches("$ ");
            if block {
                for words in commands(line) {
                    typed += 1;
                    let fault = fault(&words).map(|fault| format!("{document}: {line}\n{fault}"));
                    faults.extend(fault);
                }
            }
        }
        for code in text.replace('\n', " ").split('`').skip(1).step_by(2) {
            for words in commands(code.trim_start_matches("$ ")) {
                named += 1;
                let fault = misnamed(&root, &words);
                faults.extend(fault.map(|fault| format!("{document}: {code}: {fault}")));
            }
        }
    }
    assert!(typed > 100 && named > 100, "{typed} and {named} were found");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    let words = |line: &str| commands(line).remove(0);
    assert!(fault(&words("dalgu vm mend web")).is_some());
    assert!(fault(&words("dalgu vm start web --slowly")).is_some());
    assert!(misnamed(&root, &words("dalgu vm mend")).is_some());
    assert!(misnamed(&root, &words("dalgu vm start --slowly")).is_some());
}
