//! A small XML tree: what the builder makes, what the reader reads, what a migration edits.
//!
//! Escaping is done by the writer, never by hand. What XML 1.0 cannot hold at all is refused, as is markup that
//! libvirt never sends (entities of its own, processing instructions are dropped).

use std::io::Write as _;

use quick_xml::{
    Reader, Writer,
    events::{BytesEnd, BytesRef, BytesStart, BytesText, Event},
};

/// Deepest nesting that is read. Trees are walked and dropped by recursion; libxml2, which libvirt reads with, has the same
/// limit.
const MAX_DEPTH: usize = 256;

/// Why a tree cannot be written or read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum XmlError {
    /// A character that XML cannot hold.
    #[error("{place} holds the character {character:?}, which XML cannot hold")]
    Character {
        /// Name of the element or attribute.
        place: String,
        /// The character.
        character: char,
    },
    /// Not well-formed.
    #[error("not well-formed XML: {detail}")]
    Malformed {
        /// What is wrong.
        detail: String,
    },
    /// A part that must be there is not, or does not hold an allowed value.
    #[error("{place} is not as expected")]
    Unexpected {
        /// Path of the part.
        place: &'static str,
    },
}

fn malformed(detail: impl ToString) -> XmlError {
    XmlError::Malformed {
        detail: detail.to_string(),
    }
}

/// A child of an element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// An element.
    Element(Element),
    /// Text between elements.
    Text(String),
}

/// An element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Element {
    /// Name with its prefix, if any.
    pub name: String,
    /// Attributes in order.
    pub attributes: Vec<(String, String)>,
    /// Children in order.
    pub children: Vec<Node>,
}

impl Element {
    /// An element without attributes and children.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            attributes: Vec::new(),
            children: Vec::new(),
        }
    }

    /// Adds an attribute.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.attributes.push((name.to_owned(), value.to_string()));
        self
    }

    /// Adds a child.
    #[must_use]
    pub fn child(mut self, child: Self) -> Self {
        self.children.push(Node::Element(child));
        self
    }

    /// Adds children.
    #[must_use]
    pub fn all(mut self, children: impl IntoIterator<Item = Self>) -> Self {
        self.children.extend(children.into_iter().map(Node::Element));
        self
    }

    /// Adds text.
    #[must_use]
    pub fn text(mut self, text: impl ToString) -> Self {
        self.children.push(Node::Text(text.to_string()));
        self
    }

    /// Value of an attribute.
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes
            .iter()
            .find(|(other, _)| other == name)
            .map(|(_, value)| value.as_str())
    }

    /// The elements among the children that have this name.
    pub fn each<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Self> {
        self.children.iter().filter_map(move |child| match child {
            Node::Element(element) if element.name == name => Some(element),
            _ => None,
        })
    }

    /// The elements among the children.
    pub fn elements_mut(&mut self) -> impl Iterator<Item = &mut Self> {
        self.children.iter_mut().filter_map(|child| match child {
            Node::Element(element) => Some(element),
            Node::Text(_) => None,
        })
    }

    /// The first element on a path of names.
    pub fn at(&self, path: &[&str]) -> Option<&Self> {
        match path {
            [] => Some(self),
            [first, rest @ ..] => self.children.iter().find_map(|child| match child {
                Node::Element(element) if element.name == *first => element.at(rest),
                _ => None,
            }),
        }
    }

    /// The text directly in the element.
    pub fn own_text(&self) -> String {
        let texts = self.children.iter().filter_map(|child| match child {
            Node::Text(text) => Some(text.as_str()),
            Node::Element(_) => None,
        });
        texts.collect()
    }

    /// The element as a document.
    ///
    /// # Errors
    /// If a string in it holds a character that XML cannot hold.
    pub fn to_xml(&self) -> Result<String, XmlError> {
        let mut writer = Writer::new(Vec::new());
        self.write(&mut writer)?;
        String::from_utf8(writer.into_inner()).map_err(malformed)
    }

    fn write(&self, writer: &mut Writer<Vec<u8>>) -> Result<(), XmlError> {
        let mut start = BytesStart::new(self.name.as_str());
        for (name, value) in &self.attributes {
            check(name, value)?;
            start.push_attribute((name.as_str(), value.as_str()));
        }
        if self.children.is_empty() {
            return writer.write_event(Event::Empty(start)).map_err(malformed);
        }
        writer.write_event(Event::Start(start)).map_err(malformed)?;
        for child in &self.children {
            match child {
                Node::Element(element) => element.write(writer)?,
                Node::Text(text) => {
                    check(&self.name, text)?;
                    writer
                        .write_event(Event::Text(BytesText::new(text)))
                        .map_err(malformed)?;
                }
            }
        }
        writer
            .write_event(Event::End(BytesEnd::new(self.name.as_str())))
            .map_err(malformed)?;
        writer.get_mut().flush().map_err(malformed)
    }

    /// Reads a document.
    ///
    /// # Errors
    /// If it is not well-formed.
    pub fn parse(xml: &str) -> Result<Self, XmlError> {
        let mut reader = Reader::from_str(xml);
        let mut open: Vec<Self> = Vec::new();
        loop {
            let closed = match reader.read_event().map_err(malformed)? {
                Event::Start(_) if open.len() == MAX_DEPTH => {
                    return Err(malformed("it is nested too deeply"));
                }
                Event::Start(start) => {
                    open.push(read_start(&start)?);
                    None
                }
                Event::Empty(start) => Some(read_start(&start)?),
                Event::End(_) => open.pop(),
                Event::Text(text) => {
                    add_text(&mut open, &text);
                    None
                }
                Event::CData(text) => {
                    add_text(&mut open, &text);
                    None
                }
                Event::GeneralRef(reference) => {
                    add_text(&mut open, &resolve(&reference)?);
                    None
                }
                Event::Eof => return Err(malformed("it ends too early")),
                Event::Decl(_) | Event::Comment(_) | Event::PI(_) | Event::DocType(_) => None,
            };
            if let Some(element) = closed {
                match open.last_mut() {
                    Some(parent) => parent.children.push(Node::Element(element)),
                    None => return Ok(element),
                }
            }
        }
    }
}

fn add_text(open: &mut [Element], text: &str) {
    let Some(element) = open.last_mut() else { return };
    match element.children.last_mut() {
        Some(Node::Text(last)) => last.push_str(text),
        _ => element.children.push(Node::Text(text.to_owned())),
    }
}

fn read_start(start: &BytesStart<'_>) -> Result<Element, XmlError> {
    let mut element = Element::new(start.name().as_ref());
    check_name(&element.name)?;
    for attribute in start.attributes() {
        let attribute = attribute.map_err(malformed)?;
        check_name(attribute.key.as_ref())?;
        let value = quick_xml::escape::unescape(&attribute.value).map_err(malformed)?;
        element
            .attributes
            .push((attribute.key.as_ref().to_owned(), value.into_owned()));
    }
    Ok(element)
}

fn resolve(reference: &BytesRef<'_>) -> Result<String, XmlError> {
    if let Some(character) = reference.resolve_char_ref().map_err(malformed)? {
        return Ok(character.to_string());
    }
    let name: &str = reference;
    quick_xml::escape::resolve_predefined_entity(name)
        .map(str::to_owned)
        .ok_or_else(|| malformed(format!("entity {name}")))
}

/// XML 1.0, production 5 "Name", with everything beyond ASCII. The reader takes for a name what stands in its place, quotes too.
fn check_name(name: &str) -> Result<(), XmlError> {
    let first = |character: char| {
        character.is_ascii_alphabetic() || "_:".contains(character) || !character.is_ascii()
    };
    let later = |character: char| first(character) || character.is_ascii_digit() || "-.".contains(character);
    if name.starts_with(first) && name.chars().all(later) {
        return Ok(());
    }
    Err(malformed(format!("{name:?} is no name")))
}

/// XML 1.0, production 2 "Char".
fn check(place: &str, value: &str) -> Result<(), XmlError> {
    let allowed = |character: &char| matches!(character, '\t' | '\n' | '\r' | ' '..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..='\u{10ffff}');
    match value.chars().find(|character| !allowed(character)) {
        Some(character) => Err(XmlError::Character {
            place: place.to_owned(),
            character,
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn xml_text() -> impl Strategy<Value = String> {
        // Carriage returns are left out: a parser must turn them into newlines.
        prop::string::string_regex("[\\t\\n -\u{d7ff}\u{e000}-\u{fffd}\u{10000}-\u{10ffff}]{0,40}")
            .expect("a regex")
    }

    proptest! {
        #[test]
        fn any_string_comes_back_as_the_same_attribute_and_text(attribute in xml_text(), text in xml_text()) {
            let mut tree = Element::new("a").child(Element::new("b").with("c", &attribute));
            if !text.is_empty() {
                tree = tree.text(&text);
            }
            prop_assert_eq!(Element::parse(&tree.to_xml().unwrap()).unwrap(), tree);
        }
    }

    #[test]
    fn markup_in_a_string_stays_a_string() {
        let hostile = "'/><disk type=\"file\"/>]]><!-- &lt; &#0; \" %s";
        let xml = Element::new("a")
            .with("b", hostile)
            .child(Element::new("c").text(hostile))
            .to_xml()
            .unwrap();
        let read = Element::parse(&xml).unwrap();
        assert_eq!(read.attribute("b"), Some(hostile));
        assert_eq!(read.at(&["c"]).map(Element::own_text).as_deref(), Some(hostile));
        assert_eq!(read.children.len(), 1);
    }

    #[test]
    fn control_characters_are_refused() {
        for character in ['\0', '\u{1}', '\u{1f}', '\u{fffe}', '\u{ffff}'] {
            let error = XmlError::Character {
                place: "b".into(),
                character,
            };
            assert_eq!(Element::new("a").with("b", character).to_xml(), Err(error));
            assert!(Element::new("a").text(character).to_xml().is_err());
        }
    }

    #[test]
    fn what_is_nested_too_deeply_is_an_error_and_not_the_end_of_the_stack() {
        let nested = |depth| "<a>".repeat(depth) + &"</a>".repeat(depth);
        assert!(Element::parse(&nested(MAX_DEPTH)).is_ok());
        assert!(Element::parse(&nested(MAX_DEPTH + 1)).is_err());
        assert!(Element::parse(&nested(1_000_000)).is_err());
    }

    #[test]
    fn broken_documents_are_errors() {
        let names = [
            "< />",
            "<1/>",
            "<a=<\" b=\"\"/>",
            "<a ><b=\"\"/>",
            "<a x\"=\"\"/>",
        ];
        let documents = ["", "<a>", "<a></b>", "<a b=c/>", "<a>&unknown;</a>", "text"];
        for broken in names.into_iter().chain(documents) {
            assert!(Element::parse(broken).is_err(), "{broken:?} was read");
        }
    }
}
