//! Rows to tokens, with the tokens that are learnt marked.

use std::path::Path;

use lorimer_model::TextModel;
use serde::Serialize;
use serde_json::Value;

use crate::data::{Format, Row, Sample, detect, read_rows, sample};
use crate::error::{Error, Result};

/// One training or evaluation sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Whether each token is learnt, that is predicted from those before it.
    pub learnt: Vec<bool>,
    /// Text of the last answer, for choice accuracy.
    pub answer: Option<String>,
}

impl Example {
    /// Indices of learnt tokens (never 0: the first token follows nothing).
    pub fn targets(&self) -> impl Iterator<Item = usize> + '_ {
        (1..self.tokens.len()).filter(|&i| self.learnt[i])
    }

    /// The tokens that a step has to compute. What comes after the last predicting row is seen by nobody, and is left out where
    /// rows are independent of each other.
    pub fn seen(&self, independent: bool) -> &[u32] {
        let end = if independent { self.targets().last().unwrap_or(0) } else { self.tokens.len() };
        &self.tokens[..end]
    }

    /// Learnt tokens of the last answer up to its end-of-turn token (all of them if it has none).
    pub fn last_answer(&self, eos: &[u32]) -> std::ops::Range<usize> {
        let Some(last) = self.targets().last() else { return 0..0 };
        let mut start = last;
        while start > 1 && self.learnt[start - 1] {
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
    /// Learnt tokens in all examples.
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
                example.learnt.truncate(options.max_length);
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

/// Tokens of one sample. A conversation gives one example; or one for each answer, where the template renders earlier
/// turns differently once later ones follow (as templates do that drop earlier reasoning).
pub fn encode(sample: &Sample, text: &TextModel, train_on_prompt: bool) -> Result<Vec<Example>, String> {
    let say = |e: lorimer_model::Error| e.to_string();
    match sample {
        Sample::Text(content) => {
            let mut ids = text.encode(content, true).map_err(say)?.ids;
            end_sequence(&mut ids, text);
            Ok(vec![Example { learnt: vec![true; ids.len()], tokens: ids, answer: None }])
        }
        Sample::Completion { prompt, completion } => {
            let whole = text.encode(&format!("{prompt}{completion}"), true).map_err(say)?;
            let mut learnt: Vec<bool> = whole
                .spans
                .iter()
                .map(|&(start, end)| train_on_prompt || (start >= prompt.len() && end > start))
                .collect();
            let mut ids = whole.ids;
            end_sequence(&mut ids, text);
            learnt.resize(ids.len(), true);
            Ok(vec![Example { tokens: ids, learnt, answer: Some(completion.trim().to_string()) }])
        }
        Sample::Chat { messages, tools } => chat(messages, tools.as_ref(), text, train_on_prompt),
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

fn chat(
    messages: &[Value],
    tools: Option<&Value>,
    text: &TextModel,
    train_on_prompt: bool,
) -> Result<Vec<Example>, String> {
    let say = |e: lorimer_model::Error| e.to_string();
    let template = text.needed_template().map_err(say)?;
    let role = |m: &Value| m.get("role").and_then(Value::as_str).unwrap_or_default().to_string();
    let answers: Vec<usize> = (0..messages.len()).filter(|&i| role(&messages[i]) == "assistant").collect();
    if answers.is_empty() && !train_on_prompt {
        return Err("has no assistant message to learn from".into());
    }
    let answer = answers.last().and_then(|&i| messages[i].get("content")?.as_str()).map(|s| s.trim().to_string());
    let whole = template.render(messages, tools, false).map_err(say)?;
    let common = |a: &str, b: &str| a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    // What the template adds after its generation prompt for each answer, as byte ranges of the whole text.
    let mut spans = Vec::new();
    let mut stable = true;
    for &i in &answers {
        let prompt = template.render(&messages[..i], tools, true).map_err(say)?;
        let through = template.render(&messages[..=i], tools, false).map_err(say)?;
        let start = common(&prompt, &through);
        stable &= whole.starts_with(&through) && start > 0;
        spans.push((start, through.len(), through));
    }
    let mark = |content: &str, ranges: &[(usize, usize)]| -> Result<Example, String> {
        let encoded = text.encode(content, false).map_err(say)?;
        let inside = |start: usize| ranges.iter().any(|&(a, b)| start >= a && start < b);
        let learnt = encoded.spans.iter().map(|&(start, _)| train_on_prompt || inside(start)).collect();
        Ok(Example { tokens: encoded.ids, learnt, answer: answer.clone() })
    };
    if stable || train_on_prompt {
        let ranges: Vec<_> = spans.iter().map(|(a, b, _)| (*a, *b)).collect();
        return Ok(vec![mark(&whole, &ranges)?]);
    }
    spans.iter().map(|(a, b, through)| mark(through, &[(*a, *b)])).collect()
}
