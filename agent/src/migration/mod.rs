//! Live migration between two agents: the streams between them.
//!
//! What a host's part is, and how far it has come, is the business of the VM's task ([`crate::vm`]) and of its ledger
//! entry; here is only how the bytes travel. See [`transport`].

pub mod transport;
