//! Tokens to text as they come: no half letters, no half stop texts.

use lorimer_model::{Result, TextModel};

/// The text of an answer so far, piece by piece.
pub struct TextStream<'a> {
    text: &'a TextModel,
    stop: &'a [String],
    ids: Vec<u32>,
    /// Tokens from `from` on are decoded again with each new one, since text depends on neighbours; up to `to` their text is known.
    from: usize,
    to: usize,
    /// Decoded and not yet given out, because it may be the beginning of a stop text.
    held: String,
    stopped: bool,
}

impl<'a> TextStream<'a> {
    /// An answer that ends before any of the stop texts.
    pub fn new(text: &'a TextModel, stop: &'a [String]) -> Self {
        Self { text, stop, ids: Vec::new(), from: 0, to: 0, held: String::new(), stopped: false }
    }

    /// Whether a stop text has come.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// The text that became certain with a token.
    pub fn push(&mut self, token: u32) -> Result<String> {
        if self.stopped {
            return Ok(String::new());
        }
        self.ids.push(token);
        let known = self.text.decode(&self.ids[self.from..self.to], false)?;
        let now = self.text.decode(&self.ids[self.from..], false)?;
        // A replacement character at the end is half of a letter whose other bytes are still to come.
        if now.len() <= known.len() || now.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        self.held.push_str(now.get(known.len()..).unwrap_or_default());
        (self.from, self.to) = (self.to, self.ids.len());
        Ok(self.release(false))
    }

    /// What is left when no token comes any more.
    pub fn finish(&mut self) -> Result<String> {
        if !self.stopped {
            let known = self.text.decode(&self.ids[self.from..self.to], false)?;
            let now = self.text.decode(&self.ids[self.from..], false)?;
            self.held.push_str(now.get(known.len()..).unwrap_or_default());
            (self.from, self.to) = (self.to, self.ids.len());
        }
        Ok(self.release(true))
    }

    fn release(&mut self, all: bool) -> String {
        let stops = || self.stop.iter().filter(|s| !s.is_empty());
        if let Some(at) = stops().filter_map(|s| self.held.find(s.as_str())).min() {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        if all || self.stopped {
            return std::mem::take(&mut self.held);
        }
        // The longest end of the text that a stop text begins with.
        let begins = |stop: &String| {
            let most = stop.len().min(self.held.len());
            (1..=most).rev().find(|&n| stop.is_char_boundary(n) && self.held.ends_with(&stop[..n])).unwrap_or(0)
        };
        let keep = stops().map(begins).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }
}
