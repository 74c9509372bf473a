//! How answers are written: OpenAI's objects, whole or in events.

use std::time::{SystemTime, UNIX_EPOCH};

use lorimer_model::TextModel;
use serde_json::{Map, Value, json};

use super::answer::Piece;
use super::app::App;
use super::request::Common;
use crate::engine::Token;
use crate::generation::generate::FinishReason;
use crate::generation::tools::Call;

/// How one of the two calls writes its answers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `chat.completion`.
    Chat,
    /// `text_completion`.
    Completion,
}

/// What goes around every piece.
pub struct Shape {
    kind: Kind,
    id: String,
    created: u64,
    model: String,
    prompt_tokens: usize,
    /// Whether log-probabilities are told.
    logprobs: bool,
    /// Whether they name tokens by their numbers.
    by_number: bool,
    /// Whether special tokens are a part of the text.
    special: bool,
}

/// A place in a text, token by token.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// Whole characters before it.
    pub characters: usize,
    /// Bytes of a letter that is not whole.
    half: Vec<u8>,
}

impl Place {
    /// Where a token's bytes begin, in characters: those that go on a letter where that letter is. Bytes that are no letter are one character
    /// of replacement, as in the text.
    fn next(&mut self, bytes: &[u8]) -> usize {
        if !self.half.is_empty() && bytes.first().is_some_and(|b| b & 0xc0 != 0x80) {
            self.half.clear();
            self.characters += 1;
        }
        let start = self.characters;
        self.half.extend_from_slice(bytes);
        while let Err(error) = std::str::from_utf8(&self.half) {
            let whole = std::str::from_utf8(&self.half[..error.valid_up_to()]).map_or(0, |t| t.chars().count());
            self.characters += whole + usize::from(error.error_len().is_some());
            self.half.drain(..error.valid_up_to() + error.error_len().unwrap_or(0));
            if error.error_len().is_none() {
                return start;
            }
        }
        self.characters += std::str::from_utf8(&self.half).map_or(0, |t| t.chars().count());
        self.half.clear();
        start
    }
}

/// Where tokens stand in their text, in characters.
pub fn offsets(text: &TextModel, special: bool, tokens: &[u32], place: &mut Place) -> Vec<usize> {
    let bytes = |id: u32| if special || !text.is_special(id) { text.token_bytes(id) } else { Vec::new() };
    tokens.iter().map(|&id| place.next(&bytes(id))).collect()
}

/// Log-probabilities by the tokens' texts, the likeliest first: of two tokens with one text the likelier, but that of the token that was drawn
/// where it is one of them.
fn by_text(drawn: (String, f32), top: Vec<(u32, f32)>, text: impl Fn(u32) -> String) -> Value {
    let mut map = Map::new();
    for (id, p) in top {
        let text = text(id);
        let p = if text == drawn.0 { drawn.1 } else { p };
        map.entry(text).or_insert_with(|| json!(p));
    }
    Value::Object(map)
}

impl Shape {
    /// What goes around the answers to prompts of so many tokens.
    pub fn new(app: &App, kind: Kind, common: &Common, prompt_tokens: usize, logprobs: bool) -> Self {
        let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        Self {
            kind,
            id: format!("{prefix}-{:016x}", app.random()),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            model: common.model.clone().unwrap_or_else(|| app.name.clone()),
            prompt_tokens,
            logprobs,
            by_number: common.return_tokens_as_token_ids.unwrap_or(false),
            special: common.text().special,
        }
    }

    /// The answer's number, and the model that it is said to come from.
    pub fn names(&self) -> (&str, &str) {
        (&self.id, &self.model)
    }

    /// The object around some choices.
    fn envelope(&self, object: &str, choices: Value) -> Value {
        json!({ "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices })
    }

    /// Tokens of the prompts and of so much of the answers.
    fn usage(&self, completion: usize) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        })
    }

    /// A token as OpenAI writes it. One that is no whole letters is written with its bytes; only so are two such tokens not the same.
    fn token(&self, app: &App, id: u32) -> (String, Vec<u8>) {
        let bytes = app.base.text.token_bytes(id);
        let text = match std::str::from_utf8(&bytes) {
            _ if self.by_number => format!("token_id:{id}"),
            Ok(text) => text.to_string(),
            Err(_) => {
                let before = if self.kind == Kind::Completion { "bytes:" } else { "" };
                bytes.iter().fold(before.to_string(), |text, b| text + &format!("\\x{b:02x}"))
            }
        };
        (text, bytes)
    }

    /// The likeliest tokens at a token's place; the token itself always stands among them, where any are asked for.
    fn top(t: &Token, of_chat: bool) -> Vec<(u32, f32)> {
        let mut top = t.top.clone();
        let asked = !(of_chat && top.is_empty());
        if let Some(own) = t.log_probability.filter(|_| asked && top.iter().all(|(id, _)| *id != t.token)) {
            top.push((t.token, own));
        }
        top
    }

    /// Log-probabilities of some tokens, which stand in the text at `offsets`, in the form of the call.
    fn logprobs(&self, app: &App, tokens: &[Token], offsets: &[usize]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        match self.kind {
            Kind::Chat => {
                let describe = |id: u32, p: Option<f32>| {
                    let (text, bytes) = self.token(app, id);
                    json!({ "token": text, "logprob": p, "bytes": bytes })
                };
                let one = |t: &Token| {
                    let mut entry = describe(t.token, t.log_probability);
                    entry["top_logprobs"] =
                        Self::top(t, true).into_iter().map(|(id, p)| describe(id, Some(p))).collect();
                    entry
                };
                json!({ "content": tokens.iter().map(one).collect::<Vec<_>>() })
            }
            Kind::Completion => {
                // The first token of a prompt has nothing that it could follow.
                let text = |id: u32| self.token(app, id).0;
                let top = |t: &Token| match t.log_probability {
                    None => Value::Null,
                    Some(own) => by_text((text(t.token), own), Self::top(t, false), text),
                };
                json!({
                    "text_offset": offsets,
                    "tokens": tokens.iter().map(|t| self.token(app, t.token).0).collect::<Vec<_>>(),
                    "token_logprobs": tokens.iter().map(|t| t.log_probability).collect::<Vec<_>>(),
                    "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
                })
            }
        }
    }

    /// Where a piece's tokens stand, the prompt's first.
    fn offsets(&self, app: &App, answer: &[Token], of_prompt: &[usize], place: &mut Place) -> Vec<usize> {
        if !self.logprobs || self.kind == Kind::Chat {
            return Vec::new();
        }
        let ids: Vec<u32> = answer.iter().map(|t| t.token).collect();
        of_prompt.iter().copied().chain(offsets(&app.base.text, self.special, &ids, place)).collect()
    }

    /// A choice, or a piece of one, with `text` before the piece's.
    fn choice(&self, app: &App, piece: &Piece, before: &Before, place: &mut Place, first: bool) -> Map<String, Value> {
        // What is told of a prompt comes whole, with the first piece.
        let of_prompt = piece.prompt.len().min(before.offsets.len());
        let offsets = self.offsets(app, &piece.tokens, &before.offsets[..of_prompt], place);
        let tokens = [&piece.prompt[..], &piece.tokens].concat();
        let mut choice = Map::new();
        choice.insert("index".into(), piece.index.into());
        if self.kind == Kind::Completion {
            let text = if first { before.text.clone() + &piece.text } else { piece.text.clone() };
            choice.insert("text".into(), text.into());
        }
        choice.insert("logprobs".into(), self.logprobs(app, &tokens, &offsets));
        choice.insert("finish_reason".into(), piece.finish.map(FinishReason::name).into());
        choice
    }

    /// The whole answer.
    pub fn whole(&self, app: &App, choices: &[(Piece, &Before)], generated: usize) -> Value {
        let of = |(piece, before): &(Piece, &Before)| {
            let mut choice = self.choice(app, piece, before, &mut before.end(), true);
            if self.kind == Kind::Chat {
                let mut message = json!({ "role": "assistant", "content": piece.text });
                if !piece.calls.1.is_empty() {
                    message["tool_calls"] = self.calls(piece, false);
                    if piece.text.is_empty() {
                        message["content"] = Value::Null;
                    }
                }
                choice.insert("message".into(), message);
            }
            Value::Object(choice)
        };
        let object = if self.kind == Kind::Chat { "chat.completion" } else { "text_completion" };
        let mut body = self.envelope(object, choices.iter().map(of).collect());
        body["usage"] = self.usage(generated);
        body
    }

    /// A piece's calls of tools; in a stream with their places among the choice's.
    fn calls(&self, piece: &Piece, streamed: bool) -> Value {
        let (first, calls) = &piece.calls;
        let id = self.id.rsplit('-').next().unwrap_or_default();
        let one = |(i, call): (usize, &Call)| {
            let i = first + i;
            let mut object = json!({
                "id": format!("call_{id}_{}_{i}", piece.index), "type": "function",
                "function": { "name": call.name, "arguments": call.arguments },
            });
            if streamed {
                object["index"] = i.into();
            }
            object
        };
        calls.iter().enumerate().map(one).collect()
    }

    fn event(&self) -> &'static str {
        if self.kind == Kind::Chat { "chat.completion.chunk" } else { "text_completion" }
    }

    /// A piece of a choice, for a stream; its tokens begin at `place` of the choice's text.
    pub fn chunk(&self, app: &App, piece: &Piece, before: &Before, place: &mut Place, first: bool) -> Value {
        let mut choice = self.choice(app, piece, before, place, first);
        if self.kind == Kind::Chat {
            let mut delta = json!({ "content": piece.text });
            if !piece.calls.1.is_empty() {
                delta["tool_calls"] = self.calls(piece, true);
            }
            if first {
                delta["role"] = "assistant".into();
            }
            choice.insert("delta".into(), delta);
        }
        self.envelope(self.event(), json!([choice]))
    }

    /// The last event, which tells the tokens.
    pub fn last(&self, generated: usize) -> Value {
        let mut last = self.envelope(self.event(), json!([]));
        last["usage"] = self.usage(generated);
        last
    }

    /// Tells the tokens so far in an event: `generated` of the answer, or that the last event will.
    pub fn with_usage(&self, mut chunk: Value, generated: Option<usize>) -> Value {
        chunk["usage"] = generated.map_or(Value::Null, |n| self.usage(n));
        chunk
    }
}

/// What of the prompt stands before an answer's text.
#[derive(Clone, Debug, Default)]
pub struct Before {
    /// The prompt, where the answer is to begin with it.
    pub text: String,
    /// Where the prompt's tokens stand in it.
    pub offsets: Vec<usize>,
}

impl Before {
    /// Its end.
    pub fn end(&self) -> Place {
        Place { characters: self.text.chars().count(), half: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// To be seen to fail: the likelier of two tokens with one text, whichever was drawn.
    #[test]
    fn the_drawn_token_is_listed_though_another_has_its_text() {
        let text = |id: u32| if id < 2 { "a".to_string() } else { id.to_string() };
        let top = vec![(0, -0.5), (7, -1.0), (1, -2.0)];
        let listed = |drawn: (u32, f32)| by_text((text(drawn.0), drawn.1), top.clone(), text);
        assert_eq!(listed((1, -2.0)).to_string(), r#"{"a":-2.0,"7":-1.0}"#);
        assert_eq!(listed((0, -0.5)).to_string(), r#"{"a":-0.5,"7":-1.0}"#);
        assert_eq!(listed((7, -1.0)).to_string(), r#"{"a":-0.5,"7":-1.0}"#);
    }

    #[test]
    fn places_are_those_of_letters() {
        let places = |tokens: &[&[u8]]| {
            let mut place = Place { characters: 4, ..Default::default() };
            (tokens.iter().map(|t| place.next(t)).collect::<Vec<_>>(), place.characters)
        };
        // 東 in three tokens, a letter, two halves that are none, the end of é with more.
        let tokens: [&[u8]; 7] = [b"\xe6", b"\x9d", b"\xb1", b"a", b"\x81", b"\xc3", b"\xa9b"];
        assert_eq!(places(&tokens), (vec![4, 4, 4, 5, 6, 7, 7], 9));
        // A letter that is not gone on with.
        assert_eq!(places(&[b"\xe6\x9d", b"x", b"", b"y"]), (vec![4, 5, 6, 6], 7));
    }
}
