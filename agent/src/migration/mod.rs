//! Live migration between two agents: the streams between them.
//!
//! What a host's part is, and how far it has come, is the business of the VM's task ([`crate::vm`]) and of its ledger
//! entry; here is only how the bytes travel: [`transport`] says what a task needs, [`streams`] is how the program does it.

pub mod streams;
pub mod transport;
