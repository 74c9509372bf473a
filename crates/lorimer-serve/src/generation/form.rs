//! Answers that are held to a form: JSON that fits a schema, a regular expression, one of some texts, a grammar. Before each token the form tells which
//! tokens can go on (llguidance: derivatives of regular expressions and an Earley parser over the vocabulary's trie), and the others are taken out of the
//! logits.

use std::fmt;
use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use lorimer_model::TextModel;
use serde_json::{Value, json};

/// Most bytes of a form as it is given.
const LONGEST: usize = 256 << 10;

/// What an answer has to be.
#[derive(Clone, Debug, PartialEq)]
pub enum Form {
    /// JSON that fits a schema.
    Schema(Value),
    /// What a regular expression matches as a whole.
    Regex(String),
    /// One of some texts.
    Choice(Vec<String>),
    /// What a context-free grammar in Lark's syntax gives, from `start` on.
    Lark(String),
}

impl Form {
    /// Any JSON object.
    pub fn object() -> Self {
        Self::Schema(json!({ "type": "object" }))
    }

    fn length(&self) -> usize {
        match self {
            Self::Schema(schema) => schema.to_string().len(),
            Self::Regex(text) | Self::Lark(text) => text.len(),
            Self::Choice(texts) => texts.iter().map(|t| t.len() + 8).sum(),
        }
    }

    fn grammar(&self) -> TopLevelGrammar {
        match self {
            Self::Schema(schema) => TopLevelGrammar::from_json_schema(schema.clone()),
            Self::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Self::Choice(texts) => {
                let quoted: Vec<String> = texts.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
                TopLevelGrammar::from_lark(format!("start: {}", quoted.join(" | ")))
            }
            Self::Lark(grammar) => TopLevelGrammar::from_lark(grammar.clone()),
        }
    }
}

/// A vocabulary as forms see it.
pub struct Vocabulary {
    factory: ParserFactory,
    /// Tokens that end an answer.
    ends: Vec<u32>,
}

impl Vocabulary {
    /// The tokens of a model with `size` logits.
    ///
    /// # Errors
    ///
    /// Fails where no token ends a text.
    pub fn new(text: &TextModel, size: usize) -> Result<Self, String> {
        let ends: Vec<u32> = text.eos_ids.iter().copied().filter(|&id| (id as usize) < size).collect();
        let Some(&end) = ends.first() else {
            return Err(
                "the tokenizer has no token that ends a text, so that an answer cannot be held to a form".into()
            );
        };
        let word = |id: u32| {
            let bytes = text.token_bytes(id);
            match text.is_special(id) || ends.contains(&id) {
                true => [&[TokTrie::SPECIAL_TOKEN_MARKER], &bytes[..]].concat(),
                false => bytes,
            }
        };
        let words: Vec<Vec<u8>> = (0..size as u32).map(word).collect();
        let trie = TokTrie::from(&TokRxInfo::new(size as u32, end), &words);
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let factory = ParserFactory::new(&tokens, InferenceCapabilities::default(), &slices);
        let mut factory = factory.map_err(|e| e.to_string())?;
        factory.quiet().limits_mut().verbose_errors = false;
        Ok(Self { factory, ends })
    }

    /// The beginning of an answer that is held to a form.
    ///
    /// # Errors
    ///
    /// Says in one line what of the form cannot be.
    pub fn begin(&self, form: &Form) -> Result<Constraint, String> {
        if form.length() > LONGEST {
            return Err(format!("it has {} bytes; at most {LONGEST} are taken", form.length()));
        }
        let parser = self.factory.create_parser(form.grammar());
        let matcher = Matcher::new(parser);
        match matcher.get_error() {
            Some(problem) => {
                // What follows speaks of the library's own settings.
                let line = problem.lines().next().unwrap_or_default();
                let line = line.split(". Enable 'coerce_one_of'").next().unwrap_or_default();
                Err(line.replace(" without 'referencing' feature", ""))
            }
            None => Ok(Constraint { matcher, ends: self.ends.clone() }),
        }
    }
}

/// How far an answer is in its form.
pub struct Constraint {
    matcher: Matcher,
    ends: Vec<u32>,
}

impl Clone for Constraint {
    fn clone(&self) -> Self {
        // Answers that are computed at once share nothing.
        Self { matcher: self.matcher.deep_clone(), ends: self.ends.clone() }
    }
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constraint").finish_non_exhaustive()
    }
}

impl Constraint {
    /// Makes every token impossible that cannot be the next.
    ///
    /// # Errors
    ///
    /// Fails where the form takes too long to follow.
    pub fn restrict(&mut self, logits: &mut [f32]) -> Result<(), String> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(|e| first_line(&e))?;
        let end = self.ends.iter().any(|&id| allowed.is_allowed(id));
        for (id, logit) in logits.iter_mut().enumerate() {
            let id = id as u32;
            let can = (id as usize) < allowed.len() && allowed.is_allowed(id) || end && self.ends.contains(&id);
            if !can {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    /// Goes on by a token. Whether the form is complete, and nothing but an end can follow.
    ///
    /// # Errors
    ///
    /// Fails for a token that cannot be the next.
    pub fn push(&mut self, token: u32) -> Result<bool, String> {
        if self.ends.contains(&token) {
            return match self.matcher.is_accepting() {
                Ok(true) => Ok(true),
                _ => Err("the answer ended before its form was complete".into()),
            };
        }
        self.matcher.consume_token(token).map_err(|e| first_line(&e))?;
        Ok(self.matcher.is_stopped())
    }
}

fn first_line(error: &impl fmt::Display) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vocabulary() -> (TextModel, Vocabulary) {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/tiny-llama");
        let text = TextModel::from_folder(&folder).unwrap();
        let size = text.vocabulary();
        let vocabulary = Vocabulary::new(&text, size).unwrap();
        (text, vocabulary)
    }

    /// Whether a text is a beginning of the form, and whether it is the whole of it.
    fn follows((text, vocabulary): &(TextModel, Vocabulary), form: &Form, answer: &str) -> (bool, bool) {
        let mut constraint = vocabulary.begin(form).unwrap();
        for id in text.encode(answer, false).unwrap().ids {
            let mut logits = vec![0f32; text.vocabulary()];
            constraint.restrict(&mut logits).unwrap();
            let can = logits[id as usize] == 0.0;
            assert_eq!(can, constraint.clone().push(id).is_ok(), "{answer}");
            if !can {
                return (false, false);
            }
            constraint.push(id).unwrap();
        }
        let mut logits = vec![0f32; text.vocabulary()];
        constraint.restrict(&mut logits).unwrap();
        (true, text.eos_ids.iter().all(|&id| logits[id as usize] == 0.0))
    }

    #[test]
    fn forms_take_what_fits_them_and_nothing_else() {
        let own = vocabulary();
        let schema = Form::Schema(json!({
            "type": "object", "properties": { "name": { "type": "string" }, "age": { "type": "integer", "minimum": 0 } },
            "required": ["name", "age"], "additionalProperties": false,
        }));
        for (form, answer, expected) in [
            (&schema, r#"{"name": "Zoë \n", "age": 41}"#, (true, true)),
            (&schema, r#"{"name": "Zoë", "age": 4"#, (true, false)),
            (&schema, r#"{"name": 3"#, (false, false)),
            (&schema, r#"{"name": "a", "age": -1"#, (false, false)),
            (&schema, "Sure: ", (false, false)),
            (&Form::object(), r#"{"a": [1, {"b": null}]}"#, (true, true)),
            (&Form::object(), "[1]", (false, false)),
            (&Form::Regex("[0-9]{3}-[a-f]+".into()), "123-abc", (true, true)),
            (&Form::Regex("[0-9]{3}-[a-f]+".into()), "12-", (false, false)),
            (&Form::Choice(vec!["yes".into(), "a \"no\"\n".into()]), "a \"no\"\n", (true, true)),
            (&Form::Choice(vec!["yes".into(), "no".into()]), "maybe", (false, false)),
            (&Form::Lark("start: \"a\" start \"b\" | \"c\"".into()), "aacbb", (true, true)),
            (&Form::Lark("start: \"a\" start \"b\" | \"c\"".into()), "aacbbb", (false, false)),
        ] {
            assert_eq!(follows(&own, form, answer), expected, "{answer}");
        }
    }

    #[test]
    fn what_is_no_form_is_refused_in_one_line() {
        let (_, vocabulary) = vocabulary();
        let long = "a".repeat(LONGEST + 1);
        for form in [
            Form::Regex("a(".into()),
            Form::Lark("start: nowhere".into()),
            Form::Schema(json!({ "type": "colour" })),
            Form::Schema(json!({ "$ref": "https://example.com/a.json" })),
            Form::Schema(json!(3)),
            Form::Regex("((a{1000}){1000}){1000}".into()),
            Form::Choice(vec![]),
            Form::Regex(long),
        ] {
            let problem = vocabulary.begin(&form).unwrap_err();
            assert!(!problem.is_empty() && problem.lines().count() == 1 && problem.len() < 500, "{problem}");
        }
    }
}
