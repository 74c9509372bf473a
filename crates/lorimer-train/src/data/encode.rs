//! Rows to tokens, with the tokens that are supervised marked.

use lorimer_model::weights::hex;
use sha2::{Digest, Sha256};
use std::path::Path;

use lorimer_model::TextModel;
use serde::Serialize;

use crate::data::answers::{Conversation, Part};
use crate::data::{Format, Row, Sample, detect, read_rows, sample};
use crate::error::{Error, Result};

/// One training or evaluation sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Whether each token is supervised, that is predicted from those before it.
    pub supervised: Vec<bool>,
    /// Text of the last answer, for choice accuracy.
    pub answer: Option<String>,
}

impl Example {
    /// Indices of supervised tokens (never 0: the first token follows nothing).
    pub fn targets(&self) -> impl Iterator<Item = usize> + '_ {
        (1..self.tokens.len()).filter(|&i| self.supervised[i])
    }

    /// The tokens that a step has to compute. What comes after the last predicting row is seen by nobody, and is left out where
    /// rows are independent of each other.
    pub fn seen(&self, independent: bool) -> &[u32] {
        let end = if independent { self.targets().last().unwrap_or(0) } else { self.tokens.len() };
        &self.tokens[..end]
    }

    /// Supervised tokens of the last answer up to its end-of-turn token (all of them if it has none).
    pub fn last_answer(&self, eos: &[u32]) -> std::ops::Range<usize> {
        let Some(last) = self.targets().last() else { return 0..0 };
        let mut start = last;
        while start > 1 && self.supervised[start - 1] {
            start -= 1;
        }
        let end = (start..=last).find(|&i| eos.contains(&self.tokens[i])).unwrap_or(last);
        start..end + 1
    }
}

/// What to do with sequences over the length limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TooLong {
    /// Cut at the end.
    #[default]
    Cut,
    /// Leave the row out.
    Drop,
}

/// How rows become examples.
#[derive(Clone, Debug)]
pub struct EncodeOptions {
    /// Forced format; None looks at the keys.
    pub format: Option<Format>,
    /// Longest sequence in tokens.
    pub max_length: usize,
    /// What happens to longer ones.
    pub too_long: TooLong,
    /// Learn the prompt as well.
    pub train_on_prompt: bool,
    /// Count bad rows instead of stopping at the first.
    pub skip_bad_rows: bool,
    /// Only the first rows.
    pub limit: Option<usize>,
}

impl Default for EncodeOptions {
    fn default() -> Self {
        Self {
            format: None,
            max_length: 1024,
            too_long: TooLong::Cut,
            train_on_prompt: false,
            skip_bad_rows: false,
            limit: None,
        }
    }
}

/// What became of a file's rows.
#[derive(Clone, Debug, Serialize)]
pub struct DataReport {
    /// The format found or forced.
    pub format: Format,
    /// Rows read.
    pub rows: usize,
    /// Examples made.
    pub examples: usize,
    /// Bad rows skipped.
    pub skipped: usize,
    /// Sequences cut to the length limit.
    pub cut: usize,
    /// Sequences left out: too long, or nothing to learn left after the cut.
    pub dropped: usize,
    /// Tokens in all examples.
    pub tokens: usize,
    /// Supervised tokens in all examples.
    pub supervised_tokens: usize,
}

/// Reads and encodes a data file.
pub fn load(path: &Path, text: &TextModel, options: &EncodeOptions) -> Result<(Vec<Example>, DataReport)> {
    let rows = read_rows(path, options.limit)?;
    let format = match options.format {
        Some(format) => format,
        None => detect(path, &rows)?,
    };
    let mut report = DataReport {
        format,
        rows: rows.len(),
        examples: 0,
        skipped: 0,
        cut: 0,
        dropped: 0,
        tokens: 0,
        supervised_tokens: 0,
    };
    let mut examples = Vec::new();
    for row in &rows {
        let encoded = match encode_row(row, format, text, options.train_on_prompt) {
            Ok(encoded) => encoded,
            Err(problem) if options.skip_bad_rows => {
                tracing::debug!("{}", row.error(problem));
                report.skipped += 1;
                continue;
            }
            Err(problem) => return Err(row.error(format!("{problem}; mend the row or pass --skip-bad-rows"))),
        };
        for mut example in encoded {
            if example.tokens.len() > options.max_length {
                if options.too_long == TooLong::Drop {
                    report.dropped += 1;
                    continue;
                }
                example.tokens.truncate(options.max_length);
                example.supervised.truncate(options.max_length);
                report.cut += 1;
            }
            if example.targets().next().is_none() {
                report.dropped += 1;
                continue;
            }
            report.tokens += example.tokens.len();
            report.supervised_tokens += example.targets().count();
            examples.push(example);
        }
    }
    report.examples = examples.len();
    if examples.is_empty() {
        return Err(Error::data(
            path,
            format!(
                "none of its {} rows can be used ({} skipped, {} dropped)",
                report.rows, report.skipped, report.dropped
            ),
        ));
    }
    Ok((examples, report))
}

fn encode_row(row: &Row, format: Format, text: &TextModel, train_on_prompt: bool) -> Result<Vec<Example>, String> {
    let fields = row.value.as_ref().map_err(Clone::clone)?;
    encode(&sample(fields, format)?, text, train_on_prompt)
}

/// Tokens of one sample. A conversation gives one example; or one for each answer, where the template writes an earlier
/// answer differently once later messages follow (as templates do that drop earlier reasoning).
///
/// A token that lies over the boundary between what is given and what is supervised is supervised, since it has a part of the answer.
pub fn encode(sample: &Sample, text: &TextModel, train_on_prompt: bool) -> Result<Vec<Example>, String> {
    let say = |e: lorimer_model::Error| e.to_string();
    match sample {
        Sample::Text(content) => {
            let mut ids = text.encode(content, true).map_err(say)?.ids;
            end_sequence(&mut ids, text);
            Ok(vec![Example { supervised: vec![true; ids.len()], tokens: ids, answer: None }])
        }
        Sample::Completion { prompt, completion } => {
            let whole = text.encode(&format!("{prompt}{completion}"), true).map_err(say)?;
            let mut supervised: Vec<bool> =
                whole.spans.iter().map(|&(_, end)| train_on_prompt || end > prompt.len()).collect();
            // Tokens after the text's last are the tokenizer's own end of a sequence; they cover no text.
            let added = whole.spans.iter().rev().take_while(|(start, end)| start == end).count();
            let first = supervised.len() - added;
            supervised[first..].fill(true);
            let mut ids = whole.ids;
            end_sequence(&mut ids, text);
            supervised.resize(ids.len(), true);
            Ok(vec![Example { tokens: ids, supervised, answer: Some(completion.trim().to_string()) }])
        }
        Sample::Chat { messages, tools, variables } => {
            let template = text.template_for(tools.is_some()).map_err(say)?;
            let conversation = Conversation { template, messages, tools: tools.as_ref(), variables };
            let answer = conversation.last_answer();
            let parts = if train_on_prompt { vec![conversation.context()?] } else { conversation.supervised()? };
            let example = |part: Part| {
                let encoded = text.encode(&part.text, false).map_err(say)?;
                let inside =
                    |&(start, end): &(usize, usize)| part.answers.iter().any(|a| end > a.start && start < a.end);
                // The ranges are what is supervised, or what is not where everything else is.
                let supervised = encoded.spans.iter().map(|span| inside(span) != train_on_prompt).collect();
                Ok(Example { tokens: encoded.ids, supervised, answer: answer.clone() })
            };
            parts.into_iter().map(example).collect()
        }
    }
}

/// Adds the end token where the tokenizer has not.
fn end_sequence(ids: &mut Vec<u32>, text: &TextModel) {
    let eos = text.eos.as_ref().and_then(|t| text.encode(t, false).ok()).filter(|e| e.ids.len() == 1);
    if let Some(eos) = eos
        && ids.last() != eos.ids.last()
    {
        ids.extend(eos.ids);
    }
}

/// Identity of encoded rows.
pub(crate) fn rows_hash(examples: &[&Example]) -> String {
    let mut hash = Sha256::new();
    for e in examples {
        e.tokens.iter().for_each(|t| hash.update(t.to_le_bytes()));
        hash.update(e.supervised.iter().map(|&l| u8::from(l)).collect::<Vec<_>>());
        hash.update(b"|");
    }
    hex(&hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// A folder with a tokenizer of bytes that joins a blank and a `y`, and one that also ends a text itself.
    fn text(ends: bool, template: &str) -> TextModel {
        let folder = tempfile::tempdir().unwrap();
        // Byte-level vocabularies write a blank as Ġ and a new line as Ċ.
        let letters = ["<s>", "</s>", "Ġ", "y", "Ġy", "a", ":", "e", "s", "<", ">", "Ċ", "q", "1", "/"];
        let vocabulary: Value = letters
            .iter()
            .enumerate()
            .map(|(id, t)| (t.to_string(), Value::from(id)))
            .collect::<serde_json::Map<_, _>>()
            .into();
        let special = |id: u32, content: &str| json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true });
        let around = json!({
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }, { "SpecialToken": { "id": "</s>", "type_id": 0 } }],
            "pair": [],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [0], "tokens": ["<s>"] }, "</s>": { "id": "</s>", "ids": [1], "tokens": ["</s>"] } },
        });
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true },
            "added_tokens": [special(0, "<s>"), special(1, "</s>")],
            "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true },
            "post_processor": if ends { around } else { Value::Null },
            "model": { "type": "BPE", "vocab": vocabulary, "merges": [["Ġ", "y"]], "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false },
        });
        let config = json!({ "bos_token": "<s>", "eos_token": "</s>", "chat_template": template });
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        TextModel::from_folder(folder.path()).unwrap()
    }

    fn supervised(sample: &Sample, text: &TextModel) -> Vec<String> {
        let examples = encode(sample, text, false).unwrap();
        let example = &examples[0];
        (0..example.tokens.len())
            .filter(|&i| example.supervised[i])
            .map(|i| text.decode(&example.tokens[i..=i], true).unwrap())
            .collect()
    }

    #[test]
    fn a_token_over_the_boundary_is_supervised() {
        let text = text(false, "");
        for (prompt, completion) in [("a: ", "yes"), ("a:", " yes")] {
            let sample = Sample::Completion { prompt: prompt.into(), completion: completion.into() };
            assert_eq!(supervised(&sample, &text), [" y", "e", "s", "</s>"], "{prompt:?}");
        }
    }

    #[test]
    fn the_end_is_supervised_once_whoever_adds_it() {
        for ends in [false, true] {
            let text = text(ends, "");
            let sample = Sample::Completion { prompt: "a:".into(), completion: "yes".into() };
            assert_eq!(supervised(&sample, &text), ["y", "e", "s", "</s>"], "{ends}");
            let sample = Sample::Text("yes".into());
            let all = supervised(&sample, &text);
            assert_eq!(
                (all.iter().filter(|t| *t == "</s>").count(), all.last().map(String::as_str)),
                (1, Some("</s>"))
            );
        }
    }

    #[test]
    fn only_a_conversation_needs_a_template_that_compiles() {
        let text = text(false, "{% nonsense %}");
        assert_eq!(text.template_source(), Some("{% nonsense %}"));
        let rows = [Sample::Text("yes".into()), Sample::Completion { prompt: "a:".into(), completion: "yes".into() }];
        assert!(rows.iter().all(|sample| encode(sample, &text, false).is_ok()));
        let messages =
            vec![json!({ "role": "user", "content": "a" }), json!({ "role": "assistant", "content": "yes" })];
        let chat = Sample::Chat { messages, tools: None, variables: serde_json::Map::new() };
        assert!(encode(&chat, &text, false).unwrap_err().starts_with("the chat template is not valid: "));
    }

    #[test]
    fn a_rows_own_variables_and_weights_count() {
        let text = text(
            false,
            "{% for m in messages %}<{{ m.role[0] if short else '' }}>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<{{ 'a' if short else '' }}>{% endif %}",
        );
        let messages = [("user", "q", 1), ("assistant", "es", 0), ("user", "q", 1), ("assistant", "yes", 1)];
        let messages: Vec<Value> = messages
            .map(|(role, content, weight)| json!({ "role": role, "content": content, "weight": weight }))
            .into();
        let variables = json!({ "short": false }).as_object().unwrap().clone();
        let chat = Sample::Chat { messages, tools: None, variables };
        assert_eq!(supervised(&chat, &text), ["y", "e", "s", "</s>"]);
        let whole = encode(&chat, &text, true).unwrap();
        let masked: String = (0..whole[0].tokens.len())
            .filter(|&i| !whole[0].supervised[i])
            .map(|i| text.decode(&whole[0].tokens[i..=i], true).unwrap())
            .collect();
        assert_eq!(masked, "es</s>", "everything else of the prompt is supervised");
    }
}
