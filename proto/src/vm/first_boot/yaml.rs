//! Whether a text is YAML that may be given to a guest. Nothing is made of it: values are counted as they pass, so that aliases
//! which stand for millions of values cost no memory and little time.

use std::{cell::Cell, fmt};

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

/// Most values, with what aliases stand for.
const MAX_VALUES: u32 = 100_000;
/// Most brackets that may be open. The parser's time grows with their square, and nobody writes so many.
const MAX_OPEN: usize = 1000;

/// What a document is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nothing but comments.
    Nothing,
    /// Keys with values.
    Mapping,
    /// Anything else.
    Other,
}

/// Reads a document. What is wrong with it is told without quoting it.
pub(super) fn read(text: &str) -> Result<Kind, String> {
    if open_brackets(text) > MAX_OPEN {
        return Err(format!("must not have more than {MAX_OPEN} open brackets"));
    }
    let comment = |line: &str| line.trim_start().is_empty() || line.starts_with('#');
    if text.lines().all(comment) {
        return Ok(Kind::Nothing);
    }
    let left = Cell::new(MAX_VALUES);
    let parsed = Count(&left).deserialize(serde_norway::Deserializer::from_str(text));
    parsed.map_err(|error| match error.location() {
        _ if left.get() == 0 => {
            format!("must not have more than {MAX_VALUES} values, with what its aliases stand for")
        }
        Some(at) => format!(
            "is not YAML that can be read: see line {}, column {}",
            at.line(),
            at.column()
        ),
        None => "is not one YAML document, without tags of its own and not too deep".to_owned(),
    })
}

/// At most so many brackets are open anywhere, as far as a look that knows no quotes can tell.
fn open_brackets(text: &str) -> usize {
    let (mut open, mut most) = (0_usize, 0);
    for byte in text.bytes() {
        match byte {
            b'[' | b'{' => open += 1,
            b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        most = most.max(open);
    }
    most
}

/// Counts down with each value.
#[derive(Clone, Copy)]
struct Count<'a>(&'a Cell<u32>);

impl<'de> DeserializeSeed<'de> for Count<'_> {
    type Value = Kind;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Kind, D::Error> {
        let left = self.0.get().saturating_sub(1);
        self.0.set(left);
        if left == 0 {
            return Err(D::Error::custom("too many values"));
        }
        deserializer.deserialize_any(self)
    }
}

macro_rules! scalars {
    ($($visit:ident: $of:ty),*) => {
        $(fn $visit<E>(self, _: $of) -> Result<Kind, E> {
            Ok(Kind::Other)
        })*
    };
}

impl<'de> Visitor<'de> for Count<'_> {
    type Value = Kind;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value without a tag of its own")
    }

    scalars!(visit_bool: bool, visit_i64: i64, visit_u64: u64, visit_i128: i128, visit_u128: u128, visit_f64: f64, visit_str: &str);

    fn visit_unit<E>(self) -> Result<Kind, E> {
        Ok(Kind::Nothing)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Kind, A::Error> {
        while items.next_element_seed(self)?.is_some() {}
        Ok(Kind::Other)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Kind, A::Error> {
        while entries.next_key_seed(self)?.is_some() {
            entries.next_value_seed(self)?;
        }
        Ok(Kind::Mapping)
    }
}
