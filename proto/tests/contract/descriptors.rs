//! Descriptors to check: those of the crate, and those of made-up files for the tests of the checks.

use dalgu_proto::DESCRIPTORS;
use prost::Message as _;
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet};
use protox::{
    Compiler, Error,
    file::{File, FileResolver},
};

/// The project's own files, without those they import from elsewhere.
pub fn published() -> Vec<FileDescriptorProto> {
    let set = FileDescriptorSet::decode(DESCRIPTORS).expect("the crate's descriptors are well formed");
    set.file
        .into_iter()
        .filter(|file| file.package().starts_with("dalgu."))
        .collect()
}

/// A message with its full name and its path in the source information.
pub struct Message<'a> {
    pub full_name: String,
    pub path: Vec<i32>,
    pub proto: &'a DescriptorProto,
}

/// An enum, likewise.
pub struct Enum<'a> {
    pub full_name: String,
    pub path: Vec<i32>,
    pub proto: &'a EnumDescriptorProto,
}

/// All messages of a file with those nested in them, in the order of the file; without the entries of maps, which the
/// compiler makes.
pub fn messages(file: &FileDescriptorProto) -> Vec<Message<'_>> {
    let mut found = Vec::new();
    for (index, proto) in (0..).zip(&file.message_type) {
        walk(proto, file.package(), vec![4, index], &mut found);
    }
    found
}

fn walk<'a>(proto: &'a DescriptorProto, scope: &str, path: Vec<i32>, found: &mut Vec<Message<'a>>) {
    if is_map_entry(proto) {
        return;
    }
    let full_name = format!("{scope}.{}", proto.name());
    found.push(Message {
        full_name: full_name.clone(),
        path: path.clone(),
        proto,
    });
    for (index, nested) in (0..).zip(&proto.nested_type) {
        walk(nested, &full_name, [path.as_slice(), &[3, index]].concat(), found);
    }
}

/// Whether the compiler made this message for a map.
pub fn is_map_entry(proto: &DescriptorProto) -> bool {
    proto.options.as_ref().is_some_and(|options| options.map_entry())
}

/// All enums of a file, first those outside messages.
pub fn enums(file: &FileDescriptorProto) -> Vec<Enum<'_>> {
    let mut found: Vec<Enum<'_>> = (0..)
        .zip(&file.enum_type)
        .map(|(index, proto)| Enum {
            full_name: format!("{}.{}", file.package(), proto.name()),
            path: vec![5, index],
            proto,
        })
        .collect();
    for message in messages(file) {
        found.extend((0..).zip(&message.proto.enum_type).map(|(index, proto)| Enum {
            full_name: format!("{}.{}", message.full_name, proto.name()),
            path: [message.path.as_slice(), &[4, index]].concat(),
            proto,
        }));
    }
    found
}

/// A resolver that knows one file.
struct OneFile(String);

impl FileResolver for OneFile {
    fn open_file(&self, name: &str) -> Result<File, Error> {
        if name == "made_up.proto" {
            File::from_source(name, &self.0)
        } else {
            Err(Error::file_not_found(name))
        }
    }
}

/// Compiles a made-up file of the package `dalgu.v1`; the header is put before it.
pub fn made_up(body: &str) -> Vec<FileDescriptorProto> {
    compile(&format!(
        "// A made-up file.\nsyntax = \"proto3\";\npackage dalgu.v1;\n{body}"
    ))
}

/// Compiles one file as it is.
pub fn compile(source: &str) -> Vec<FileDescriptorProto> {
    let mut compiler = Compiler::with_file_resolver(OneFile(source.to_owned()));
    compiler
        .include_source_info(true)
        .open_file("made_up.proto")
        .expect("the made-up file compiles");
    compiler.file_descriptor_set().file
}
