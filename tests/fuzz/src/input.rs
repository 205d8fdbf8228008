//! The bytes of an input, taken from the front. Used by every target. What is not there reads as 0, so that every
//! input means something and a shorter one means less of the same.

use prost::Message;

/// What is left of an input.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// All of it.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether nothing is left.
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    /// The next two bytes as a number.
    pub fn pair(&mut self) -> usize {
        usize::from(self.byte()) << 8 | usize::from(self.byte())
    }

    /// The next bytes, at most `count`.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// Bytes with their count before them.
    pub fn block(&mut self) -> &'a [u8] {
        let count = self.pair();
        self.bytes(count)
    }

    /// As [`Self::block`], as text.
    pub fn text(&mut self) -> String {
        String::from_utf8_lossy(self.block()).into_owned()
    }

    /// A short text: its length is one byte.
    pub fn word(&mut self) -> String {
        let count = usize::from(self.byte());
        String::from_utf8_lossy(self.bytes(count)).into_owned()
    }

    /// All that is left, as text.
    pub fn rest(&mut self) -> String {
        String::from_utf8_lossy(self.bytes(usize::MAX)).into_owned()
    }

    /// One of several.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::from(self.byte()) % of.len()]
    }

    /// A message: a whole one with the next block laid over it, as protobuf merges. `None` when the block is no such
    /// message. So one changed byte reaches what is behind the checks.
    pub fn over<M: Message>(&mut self, mut whole: M) -> Option<M> {
        whole.merge(self.block()).ok().map(|()| whole)
    }
}
