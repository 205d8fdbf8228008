//! What keeps versions working together: messages, stores and ledgers as earlier versions wrote them, kept in
//! `tests/samples`, and a lens that makes a program speak an earlier version.
//!
//! [`story`] is a site's life that makes every call of the API, on a [`site`] in memory; [`record`] writes down what was
//! said and what is left on disk, one folder for each version ([`samples`]). `tests/versions` reads them all with this
//! version's programs. [`future`] makes a program speak a version that does not exist yet. [`full`] walks the descriptors, so that no field is left out. The folder of a release is
//! written by `make samples`; see CONTRIBUTING.md.

pub mod full;
pub mod future;
pub mod lens;
pub mod record;
pub mod samples;
pub mod site;
pub mod story;
pub mod wire;
