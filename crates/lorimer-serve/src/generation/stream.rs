//! Tokens to text as they come: no half letters, no half stop texts.

use lorimer_model::{Result, TextModel};

/// Tokens of a prompt that its answer's text may depend on.
const CONTEXT: usize = 64;

/// How an answer's tokens become text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TextOptions {
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Whether the text that ends the answer is a part of it.
    pub keep_stop: bool,
    /// Whether special tokens are written out.
    pub special: bool,
    /// Tokens that an answer has before a stop text can end it.
    pub min_tokens: usize,
}

/// The text of an answer so far, piece by piece.
pub struct TextStream<'a> {
    text: &'a TextModel,
    options: &'a TextOptions,
    /// The end of the prompt, and the answer.
    ids: Vec<u32>,
    /// Tokens from `from` on are decoded again with each new one, since text depends on neighbours; up to `to` their text is known.
    from: usize,
    to: usize,
    generated: usize,
    /// Decoded and not yet given out, because it may be the beginning of a stop text.
    held: String,
    stopped: bool,
}

/// The end of a prompt that the text of its answer may depend on: a SentencePiece vocabulary drops the space before the first word of a text,
/// and an answer is not one.
pub fn context<'p>(text: &TextModel, prompt: &'p [u32]) -> &'p [u32] {
    let last =
        prompt.iter().rev().take(CONTEXT).position(|&id| !text.is_special(id) && !text.token_bytes(id).is_empty());
    // Some more, so that the last of them has neighbours itself.
    let from = last.map_or(prompt.len(), |at| prompt.len().saturating_sub(at + 5));
    &prompt[from..]
}

impl<'a> TextStream<'a> {
    /// The answer after the end of a prompt.
    pub fn new(text: &'a TextModel, options: &'a TextOptions, prompt: &[u32]) -> Self {
        let ids = context(text, prompt).to_vec();
        let (to, held) = (ids.len(), String::new());
        Self { text, options, ids, from: 0, to, generated: 0, held, stopped: false }
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
        self.generated += 1;
        Ok(if self.decode(false)? { self.release(false) } else { String::new() })
    }

    /// What is left when no token comes any more.
    pub fn finish(&mut self) -> Result<String> {
        if !self.stopped {
            self.decode(true)?;
        }
        Ok(self.release(true))
    }

    /// Decodes what is new, half letters only where no token comes any more. Whether there was text.
    fn decode(&mut self, last: bool) -> Result<bool> {
        let known = self.text.decode(&self.ids[self.from..self.to], self.options.special)?;
        let now = self.text.decode(&self.ids[self.from..], self.options.special)?;
        // A replacement character at the end is half of a letter whose other bytes are still to come; a prompt may end with one too.
        let same: usize = known.chars().zip(now.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum();
        let new = now.get(same..).unwrap_or_default();
        if new.is_empty() || (new.ends_with('\u{fffd}') && !last) {
            return Ok(false);
        }
        self.held.push_str(new);
        (self.from, self.to) = (self.to, self.ids.len());
        Ok(true)
    }

    fn release(&mut self, all: bool) -> String {
        let stops = || self.options.stop.iter().filter(|s| !s.is_empty());
        if self.generated > self.options.min_tokens
            && let Some((at, stop)) = stops().filter_map(|s| Some((self.held.find(s.as_str())?, s))).min()
        {
            self.stopped = true;
            self.held.truncate(if self.options.keep_stop { at + stop.len() } else { at });
            return std::mem::take(&mut self.held);
        }
        if all || self.stopped {
            return std::mem::take(&mut self.held);
        }
        // The longest end of the text that a stop text begins with.
        let begins = |stop: &String| {
            let most = (stop.len() - 1).min(self.held.len());
            (1..=most).rev().find(|&n| stop.is_char_boundary(n) && self.held.ends_with(&stop[..n])).unwrap_or(0)
        };
        let keep = stops().map(begins).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }
}

#[cfg(test)]
mod tests {
    use lorimer_model::weights::gguf::Gguf;

    use super::*;

    fn golden(name: &str) -> std::path::PathBuf {
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens").join(name)
    }

    fn streamed(text: &TextModel, prompt: &[u32], answer: &[u32]) -> String {
        let options = TextOptions::default();
        let mut stream = TextStream::new(text, &options, prompt);
        let pieces: Vec<String> = answer.iter().map(|&t| stream.push(t).unwrap()).collect();
        pieces.concat() + &stream.finish().unwrap()
    }

    /// Wherever a text is cut into prompt and answer, the prompt's text and the streamed one are the whole: transformers' and SentencePiece's
    /// decoding of all tokens. A stream that decodes the answer alone loses the space before its first word.
    #[test]
    fn an_answer_goes_on_where_its_prompt_ends() {
        let sentencepiece = TextModel::from_gguf(&Gguf::open(&golden("sentencepiece.gguf")).unwrap()).unwrap();
        let bytes = TextModel::from_folder(&golden("tiny-llama")).unwrap();
        let cases = std::fs::read_to_string(golden("sentencepiece.json")).unwrap();
        let (mut cuts, mut spaces) = (0, 0);
        for case in serde_json::from_str::<Vec<serde_json::Value>>(&cases).unwrap() {
            let (given, whole) = (case["text"].as_str().unwrap(), case["decoded"].as_str().unwrap());
            let ids: Vec<u32> = serde_json::from_value(case["tokens"].clone()).unwrap();
            let others = bytes.encode(given, false).unwrap().ids;
            for (text, ids, whole) in [(&sentencepiece, ids, whole), (&bytes, others, given)] {
                for at in 1..ids.len().min(60) {
                    let prompt = text.decode(&ids[..at], false).unwrap();
                    // Not inside of a letter: there both sides have halves.
                    let Some(rest) = whole.strip_prefix(&prompt).filter(|_| !prompt.ends_with('\u{fffd}')) else {
                        continue;
                    };
                    assert_eq!(streamed(text, &ids[..at], &ids[at..]), rest, "{given:?} at {at}");
                    (cuts, spaces) = (cuts + 1, spaces + usize::from(rest.starts_with(' ')));
                }
                assert_eq!(streamed(text, &[], &ids), whole);
            }
        }
        assert!(cuts > 1000 && spaces > 200, "{cuts} {spaces}");
    }

    /// A token's bytes, whatever stands beside it, one after the other are the text.
    #[test]
    fn the_bytes_of_tokens_are_the_text() {
        let text = TextModel::from_gguf(&Gguf::open(&golden("sentencepiece.gguf")).unwrap()).unwrap();
        let bytes =
            |text: &TextModel, ids: &[u32]| ids.iter().flat_map(|&id| text.token_bytes(id)).collect::<Vec<u8>>();
        let cases = std::fs::read_to_string(golden("sentencepiece.json")).unwrap();
        for case in serde_json::from_str::<Vec<serde_json::Value>>(&cases).unwrap() {
            let ids: Vec<u32> = serde_json::from_value(case["tokens"].clone()).unwrap();
            let whole = case["decoded"].as_str().unwrap();
            // The first word's token has the space that its text has not.
            let expected = if ids.is_empty() { String::new() } else { format!(" {whole}") };
            assert_eq!(bytes(&text, &ids), expected.as_bytes(), "{whole:?}");
        }
        assert_eq!(bytes(&text, &[1, 1_000_000]), b"<s>");
        let text = TextModel::from_folder(&golden("tiny-llama")).unwrap();
        let given = "naïve café\n 東京 🙂\u{0}\u{7f}\u{a0}";
        assert_eq!(bytes(&text, &text.encode(given, false).unwrap().ids), given.as_bytes());
        assert_eq!(bytes(&text, &[2]), b"<|im_end|>");
    }

    #[test]
    fn stop_texts_end_an_answer_with_or_without_themselves() {
        let text = TextModel::from_folder(&golden("tiny-llama")).unwrap();
        let ids = text.encode("one two three", false).unwrap().ids;
        let run = |options: &TextOptions| {
            let mut stream = TextStream::new(&text, options, &ids);
            let pieces: Vec<String> = ids.iter().map(|&t| stream.push(t).unwrap()).collect();
            pieces.concat() + &stream.finish().unwrap()
        };
        let options = |stop: &str| TextOptions { stop: vec![stop.into()], ..Default::default() };
        assert_eq!(run(&options("o t")), "one tw");
        assert_eq!(run(&TextOptions { keep_stop: true, ..options("o t") }), "one two t");
        // Of the first tokens only the beginning of a stop text can be.
        assert_eq!(run(&TextOptions { min_tokens: 7, ..options("o") }), "one two three");
        assert_eq!(run(&TextOptions { min_tokens: 6, ..options("o") }), "one tw");
        assert_eq!(run(&TextOptions { min_tokens: 6, ..options("wo") }), "one t");
    }
}
