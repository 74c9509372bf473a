//! A row of training data: its shape, and what it asks for.

use std::fmt;
use std::path::PathBuf;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The shape of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// `{"messages": [{"role": …, "content": …}, …]}`, with optional `tools`.
    Messages,
    /// `{"instruction": …, "input": …, "output": …}`, with optional `system` and `history`.
    Alpaca,
    /// `{"conversations": [{"from": "human", "value": …}, …]}`, with optional `system`.
    Sharegpt,
    /// `{"prompt": …, "completion": …}`, texts or lists of messages.
    PromptCompletion,
    /// `{"text": …}`.
    Text,
}

impl Format {
    /// All formats with the key that tells them.
    pub const ALL: [(Format, &'static str); 5] = [
        (Format::Messages, "messages"),
        (Format::Sharegpt, "conversations"),
        (Format::Alpaca, "instruction"),
        (Format::PromptCompletion, "prompt"),
        (Format::Text, "text"),
    ];

    /// What `--format` takes.
    pub fn name(self) -> &'static str {
        match self {
            Format::Messages => "messages",
            Format::Alpaca => "alpaca",
            Format::Sharegpt => "sharegpt",
            Format::PromptCompletion => "prompt-completion",
            Format::Text => "text",
        }
    }

    /// The format of a row, by its keys.
    pub(super) fn detect(row: &Map<String, Value>) -> Option<Format> {
        let found = Format::ALL.iter().find(|(_, key)| row.contains_key(*key)).map(|(f, _)| *f)?;
        (found != Format::PromptCompletion || row.contains_key("completion")).then_some(found)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Format {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let found = Format::ALL.iter().map(|(f, _)| *f).find(|f| f.name() == s);
        found.ok_or_else(|| format!("`{s}` is not one of messages, alpaca, sharegpt, prompt-completion, text"))
    }
}

/// One row, understood.
#[derive(Clone, Debug, PartialEq)]
pub enum Sample {
    /// A conversation for the chat template.
    Chat {
        /// `{"role", "content"}` objects in the form of [`lorimer_model::text::messages`]. One with `"weight": 0` is context.
        messages: Vec<Value>,
        /// Tools for templates that know them.
        tools: Option<Value>,
        /// Further variables of the template (`chat_template_kwargs`).
        variables: Map<String, Value>,
    },
    /// Plain text to begin with and plain text to learn.
    Completion {
        /// Not supervised.
        prompt: String,
        /// Supervised.
        completion: String,
    },
    /// Plain text, all supervised.
    Text(String),
}

/// A row and where it stands.
#[derive(Clone, Debug)]
pub struct Row {
    /// The file.
    pub path: PathBuf,
    /// `line 3` or `row 3`.
    pub place: String,
    /// The row's keys and values, or why there are none.
    pub value: Result<Map<String, Value>, String>,
}

impl Row {
    /// The error of this row.
    pub fn error(&self, problem: impl Into<String>) -> Error {
        Error::Row { path: self.path.clone(), place: self.place.clone(), problem: problem.into() }
    }
}
