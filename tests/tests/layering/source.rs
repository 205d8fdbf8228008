//! Reads Rust source just well enough to see which paths it names, and how its `select!`s begin. Used by the layering
//! test alone; it knows nothing of macros that make paths, or of names brought in by `*`.

/// A word, or a sign; text, numbers and comments are left out.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Word(String),
    /// `::`
    Join,
    Sign(char),
}

/// All paths that the file names outside its test modules, such as `tokio::time::sleep`: `use` declarations written out
/// one by one, and paths in the code as they stand there.
pub fn paths(source: &str) -> Vec<String> {
    let tokens = without_tests(tokens(source));
    let mut found = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        match &tokens[at] {
            Token::Word(word) if word == "use" => at = use_tree(&tokens, at + 1, "", &mut found),
            Token::Word(_) => at = path(&tokens, at, &mut found),
            _ => at += 1,
        }
    }
    found
}

/// How many `select!` outside its test modules choose at random among what is ready: those that do not begin with
/// `biased;`.
pub fn unbiased_selects(source: &str) -> usize {
    let tokens = without_tests(tokens(source));
    let opens = |at: usize| {
        tokens[at] == Token::Word("select".to_owned())
            && tokens.get(at + 1) == Some(&Token::Sign('!'))
            && matches!(tokens.get(at + 2), Some(Token::Sign('{' | '(')))
    };
    let biased = Token::Word("biased".to_owned());
    (0..tokens.len())
        .filter(|at| opens(*at) && tokens.get(at + 3) != Some(&biased))
        .count()
}

/// Takes one path in the code; a single word counts too, for a struct may be used by its own name.
fn path(tokens: &[Token], mut at: usize, found: &mut Vec<String>) -> usize {
    let mut name = String::new();
    while let Some(Token::Word(word)) = tokens.get(at) {
        name.push_str(word);
        at += 1;
        if tokens.get(at) != Some(&Token::Join) {
            break;
        }
        name.push_str("::");
        at += 1;
    }
    found.push(name);
    at
}

/// Takes what stands behind `use`, or one part of a group; returns what comes behind it.
fn use_tree(tokens: &[Token], mut at: usize, prefix: &str, found: &mut Vec<String>) -> usize {
    let mut name = prefix.to_owned();
    loop {
        match tokens.get(at) {
            Some(Token::Word(word)) if word == "as" => at += 2,
            Some(Token::Word(word)) if word == "self" && !prefix.is_empty() => at += 1,
            Some(Token::Word(word)) => {
                name.push_str(word);
                at += 1;
            }
            Some(Token::Join) => {
                name.push_str("::");
                at += 1;
            }
            Some(Token::Sign('*')) => at += 1,
            Some(Token::Sign('{')) => return use_group(tokens, at + 1, &name, found),
            _ => {
                found.push(name.trim_end_matches("::").to_owned());
                return at;
            }
        }
    }
}

fn use_group(tokens: &[Token], mut at: usize, prefix: &str, found: &mut Vec<String>) -> usize {
    loop {
        match tokens.get(at) {
            None => return at,
            Some(Token::Sign('}')) => return at + 1,
            Some(Token::Sign(',')) => at += 1,
            Some(_) => at = use_tree(tokens, at, prefix, found).max(at + 1),
        }
    }
}

/// Leaves out `#[cfg(test)] mod name { ... }`.
fn without_tests(tokens: Vec<Token>) -> Vec<Token> {
    let words = ["#", "[", "cfg", "(", "test", ")", "]", "mod"];
    let head: Vec<Token> = words
        .iter()
        .map(|word| match word.chars().next() {
            Some(sign) if !sign.is_alphabetic() => Token::Sign(sign),
            _ => Token::Word((*word).to_owned()),
        })
        .collect();
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let inline = tokens.get(at + head.len() + 1) == Some(&Token::Sign('{'));
        if inline && tokens[at..].starts_with(&head) {
            at = behind_block(&tokens, at + head.len() + 1);
        } else {
            kept.push(tokens[at].clone());
            at += 1;
        }
    }
    kept
}

/// The place behind the brace that closes the one at `at`.
fn behind_block(tokens: &[Token], at: usize) -> usize {
    let mut depth = 0_usize;
    for (index, token) in tokens.iter().enumerate().skip(at) {
        match token {
            Token::Sign('{') => depth += 1,
            Token::Sign('}') if depth == 1 => return index + 1,
            Token::Sign('}') => depth -= 1,
            _ => {}
        }
    }
    tokens.len()
}

fn tokens(source: &str) -> Vec<Token> {
    let mut out = Vec::new();
    let mut rest = source;
    while let Some(c) = rest.chars().next() {
        if let Some(length) = skipped(rest) {
            rest = &rest[length..];
        } else if let Some(behind) = rest.strip_prefix("::") {
            out.push(Token::Join);
            rest = behind;
        } else if c.is_alphabetic() || c == '_' {
            let length = rest
                .find(|c: char| !c.is_alphanumeric() && c != '_')
                .unwrap_or(rest.len());
            out.push(Token::Word(rest[..length].to_owned()));
            rest = &rest[length..];
        } else {
            if !c.is_whitespace() && !c.is_numeric() {
                out.push(Token::Sign(c));
            }
            rest = &rest[c.len_utf8()..];
        }
    }
    out
}

/// Length of the comment, text or character that stands here, if one does.
fn skipped(rest: &str) -> Option<usize> {
    if rest.starts_with("//") {
        return Some(rest.find('\n').unwrap_or(rest.len()));
    }
    if rest.starts_with("/*") {
        return Some(rest.find("*/").map_or(rest.len(), |at| at + 2));
    }
    let text = rest.strip_prefix('b').unwrap_or(rest);
    if let Some(raw) = text.strip_prefix('r') {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if raw[hashes..].starts_with('"') {
            let start = rest.len() - raw.len() + hashes + 1;
            let end = format!("\"{}", "#".repeat(hashes));
            return Some(
                rest[start..]
                    .find(&end)
                    .map_or(rest.len(), |at| start + at + end.len()),
            );
        }
    }
    let start = rest.len() - text.len() + 1;
    match text.chars().next()? {
        '"' => Some(start + text_length(&text[1..], '"')),
        // A lifetime has no closing quote behind its first character.
        '\'' if text[1..].starts_with('\\') => Some(start + text_length(&text[1..], '\'')),
        '\'' => {
            let character = text[1..].chars().next()?;
            let behind = &text[1 + character.len_utf8()..];
            behind.starts_with('\'').then(|| start + character.len_utf8() + 1)
        }
        _ => None,
    }
}

/// Length up to and with the closing quote.
fn text_length(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        if !escaped && c == quote {
            return at + c.len_utf8();
        }
        escaped = !escaped && c == '\\';
    }
    text.len()
}

mod tests {
    use super::{paths, unbiased_selects};

    #[test]
    fn a_use_declaration_is_written_out_path_by_path() {
        assert_eq!(
            paths("pub use a::{self, b::{c, d as e}, f::*}; use ::g as h;"),
            ["pub", "a", "a::b::c", "a::b::d", "a::f", "::g"]
        );
    }

    #[test]
    fn a_path_in_the_code_is_found_and_one_in_text_or_a_comment_is_not() {
        let source = r##"
            // a::in_comment
            /* b::in_comment */
            fn f<'a>(x: &'a str) { c::d::<e::F>("g::in_text \" h::in_text", 'i', '\'', b"j::k", r#"l::"m"::n"#) }
        "##;
        let found: Vec<String> = paths(source)
            .into_iter()
            .filter(|path| path.contains("::"))
            .collect();
        assert_eq!(found, ["c::d::", "e::F"]);
    }

    #[test]
    fn a_select_that_chooses_at_random_is_counted() {
        let source = r#"
            fn f() {
                tokio::select! { _ = a() => {} }
                tokio::select! { biased; _ = a() => {} }
                select! {
                    // Urgent first.
                    biased;
                    _ = a() => {}
                }
                let x = "select! { }";
            }
            #[cfg(test)]
            mod tests { fn g() { tokio::select! { _ = a() => {} } } }
        "#;
        assert_eq!(unbiased_selects(source), 1);
    }

    #[test]
    fn a_test_module_does_not_count_and_what_follows_it_does() {
        let source =
            "#[cfg(test)]\nmod tests { use a::b; fn f() { if c::d() {} } }\nuse e::f;\n#[cfg(test)]\nmod g;";
        let found: Vec<String> = paths(source)
            .into_iter()
            .filter(|path| path.contains("::"))
            .collect();
        assert_eq!(found, ["e::f"]);
    }
}
