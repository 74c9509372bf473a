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

use super::gbnf::to_lark;

/// Most bytes of a schema and of a choice's texts.
const LONGEST: usize = 256 << 10;
/// Most bytes of a regular expression, in a schema too, and of a grammar. What one step costs grows with their square.
const LONGEST_EXPRESSION: usize = 8 << 10;

/// Deepest brackets of a form. Grammars are read and compiled by recursion.
const DEEPEST: usize = 128;
/// Bytes of the stack of a thread that compiles a form: rules and references may follow each other in long chains.
const STACK: usize = 256 << 20;

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
    /// What a context-free grammar of llama.cpp (GBNF) gives, from `root` on.
    Gbnf(String),
    /// What a grammar of ours gives, in which `body` is JSON that fits a schema.
    Around(String, Value),
}

impl Form {
    /// Any JSON object.
    pub fn object() -> Self {
        Self::Schema(json!({ "type": "object" }))
    }

    /// Refuses what would take too long to compile or to follow, or recursion too deep.
    fn check(&self) -> Result<(), String> {
        let (length, most) = match self {
            Self::Schema(schema) | Self::Around(_, schema) => (schema.to_string().len(), LONGEST),
            Self::Choice(texts) => (texts.iter().map(|t| t.len() + 8).sum(), LONGEST),
            Self::Regex(text) | Self::Lark(text) | Self::Gbnf(text) => (text.len(), LONGEST_EXPRESSION),
        };
        if length > most {
            return Err(format!("it has {length} bytes; at most {most} are taken"));
        }
        let depth = self.depth();
        if depth > DEEPEST {
            return Err(format!("its brackets are {depth} deep; at most {DEEPEST} are taken"));
        }
        match self {
            Self::Schema(schema) | Self::Around(_, schema) => bounded(schema),
            // A schema inside of a grammar: its numbers are looked for in the text, which then has to show them.
            Self::Lark(text) if text.contains("%json") => {
                if text.contains("\\u") {
                    return Err("it has a schema with letters written as `\\u…`; write them as they are".into());
                }
                text.split("multipleOf").skip(1).try_for_each(|after| {
                    let number = after.trim_start_matches(|c: char| c == '"' || c == ':' || c.is_whitespace());
                    let end = number.find(|c: char| !(c.is_ascii_digit() || ".eE+-".contains(c)));
                    multiple(&number[..end.unwrap_or(number.len())])
                })
            }
            _ => Ok(()),
        }
    }

    /// How deep its brackets are; of a schema, its lists and objects.
    fn depth(&self) -> usize {
        fn of(value: &Value) -> usize {
            match value {
                Value::Array(all) => 1 + all.iter().map(of).max().unwrap_or(0),
                Value::Object(all) => 1 + all.values().map(of).max().unwrap_or(0),
                _ => 0,
            }
        }
        match self {
            Self::Schema(schema) | Self::Around(_, schema) => of(schema),
            Self::Choice(_) => 0,
            Self::Regex(text) | Self::Lark(text) | Self::Gbnf(text) => {
                let (mut depth, mut deepest) = (0usize, 0);
                for byte in text.bytes() {
                    match byte {
                        b'(' | b'[' | b'{' => depth += 1,
                        b')' | b']' | b'}' => depth = depth.saturating_sub(1),
                        _ => {}
                    }
                    deepest = deepest.max(depth);
                }
                deepest
            }
        }
    }

    fn grammar(&self) -> Result<TopLevelGrammar, String> {
        Ok(match self {
            Self::Schema(schema) => TopLevelGrammar::from_json_schema(schema.clone()),
            Self::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Self::Choice(texts) => {
                let quoted: Vec<String> = texts.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
                TopLevelGrammar::from_lark(format!("start: {}", quoted.join(" | ")))
            }
            Self::Lark(grammar) => TopLevelGrammar::from_lark(grammar.clone()),
            Self::Gbnf(grammar) => TopLevelGrammar::from_lark(to_lark(grammar)?),
            Self::Around(grammar, schema) => TopLevelGrammar::from_lark(format!("{grammar}\nbody: %json {schema}\n")),
        })
    }
}

/// The largest `multipleOf`, its decimals moved before the point: as many states has the automaton of such numbers.
const LARGEST_MULTIPLE: u64 = 10_000;

/// Refuses regular expressions of a schema that are too long, and multiples of too large numbers.
fn bounded(schema: &Value) -> Result<(), String> {
    match schema {
        Value::Array(all) => all.iter().try_for_each(bounded),
        Value::Object(all) => all.iter().try_for_each(|(name, value)| {
            let texts = match (name.as_str(), value) {
                ("pattern", Value::String(text)) => vec![text],
                ("patternProperties", Value::Object(all)) => all.keys().collect(),
                _ => Vec::new(),
            };
            match texts.iter().map(|text| text.len()).find(|&n| n > LONGEST_EXPRESSION) {
                Some(n) => Err(format!("`{name}` has {n} bytes; at most {LONGEST_EXPRESSION} are taken")),
                None if name == "multipleOf" && value.is_number() => multiple(&value.to_string()),
                None => bounded(value),
            }
        }),
        _ => Ok(()),
    }
}

/// Refuses a `multipleOf` that is too large; what is no number is not looked at.
fn multiple(number: &str) -> Result<(), String> {
    match number.starts_with(|c: char| c.is_ascii_digit()) && whole(number) > LARGEST_MULTIPLE {
        true => Err(format!(
            "`multipleOf` {number} has too many digits; at most {LARGEST_MULTIPLE} is taken, the point left out"
        )),
        false => Ok(()),
    }
}

/// A decimal number without its point: 125 for 1.25, 1000 for 1e3.
fn whole(number: &str) -> u64 {
    let (digits, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let zeros = exponent.parse::<i32>().map_or(20, |e| e.clamp(0, 20));
    let digits: String = digits.chars().filter(char::is_ascii_digit).collect();
    digits.parse::<u64>().map_or(u64::MAX, |n| n.saturating_mul(10u64.saturating_pow(zeros as u32)))
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
        let limits = factory.quiet().limits_mut();
        limits.verbose_errors = false;
        // A state takes one or two kilobytes, and each request has its own.
        limits.max_lexer_states = 20_000;
        Ok(Self { factory, ends })
    }

    /// The beginning of an answer that is held to a form.
    ///
    /// # Errors
    ///
    /// Says in one line what of the form cannot be.
    pub fn begin(&self, form: &Form) -> Result<Constraint, String> {
        form.check()?;
        let compile = || Ok::<_, String>(Matcher::new(self.factory.create_parser(form.grammar()?)));
        let compiled = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, compile);
            thread.map_err(|e| e.to_string())?.join().map_err(|_| "it cannot be compiled".to_string())
        });
        let matcher = compiled??;
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
            Form::Schema(json!({ "type": "integer", "multipleOf": 999_983 })),
            Form::Lark("start: b\nb: %json {\"type\": \"integer\", \"multipleOf\" : 999983}".into()),
            Form::Lark("start: b\nb: %json {\"type\": \"integer\", \"multiple\\u004ff\": 999983}".into()),
            Form::Around("start: body".into(), json!({ "type": "integer", "multipleOf": 1e20 })),
            Form::Schema(json!(3)),
            Form::Regex(long),
        ] {
            let Err(problem) = vocabulary.begin(&form) else { panic!("{form:?} is taken") };
            assert!(!problem.is_empty() && problem.lines().count() == 1 && problem.len() < 500, "{problem}");
        }
    }

    /// A grammar of ours can begin with a special token, by its number.
    #[test]
    fn special_tokens_begin_a_form() {
        let (text, vocabulary) = vocabulary();
        let special =
            (0..text.vocabulary() as u32).find(|id| text.is_special(*id) && !text.eos_ids.contains(id)).unwrap();
        let form = Form::Around(format!("start: <[{special}]> body"), json!({ "enum": [7] }));
        let mut constraint = vocabulary.begin(&form).unwrap();
        for expected in [special, text.encode("7", false).unwrap().ids[0]] {
            let mut logits = vec![0f32; text.vocabulary()];
            constraint.restrict(&mut logits).unwrap();
            let allowed: Vec<u32> = (0..logits.len() as u32).filter(|&id| logits[id as usize] == 0.0).collect();
            assert_eq!(allowed, [expected]);
            constraint.push(expected).unwrap();
        }
    }

    #[test]
    fn points_are_left_out() {
        let all = [
            ("7", 7),
            ("0.07", 7),
            ("1.25", 125),
            ("1e3", 1000),
            ("2.5e-3", 25),
            ("1e30", u64::MAX),
            ("123456789012345678901", u64::MAX),
        ];
        all.iter().for_each(|(text, expected)| {
            assert!(whole(text) == *expected || *expected == u64::MAX && whole(text) > 1 << 60, "{text}")
        });
    }

    /// A form that would take long is followed or given up, one token at a time; nobody waits for it.
    #[test]
    fn forms_that_explode_are_followed_or_given_up() {
        let (text, vocabulary) = vocabulary();
        let letter = text.encode("a", false).unwrap().ids[0];
        let deep = |depth: usize| {
            Form::Schema((0..depth).fold(json!({}), |inner, _| json!({ "anyOf": [inner, { "type": "null" }] })))
        };
        let references = |count: usize| {
            let mut all = serde_json::Map::new();
            for i in 0..count {
                let next = json!({ "type": "array", "items": { "$ref": format!("#/$defs/a{}", (i + 1) % count) } });
                all.insert(format!("a{i}"), next);
            }
            Form::Schema(json!({ "$defs": all, "$ref": "#/$defs/a0" }))
        };
        let straight = |count: usize| {
            let rules = (0..count).map(|i| format!("r{i}: r{}\n", i + 1)).collect::<String>();
            Form::Lark(format!("start: r0\n{rules}r{count}: \"a\" r0\n"))
        };
        let nested = |open: &str, close: &str, depth: usize| format!("{}a{}", open.repeat(depth), close.repeat(depth));
        for form in
            [
                Form::Regex("((a{1000}){1000}){1000}".into()),
                Form::Regex("(.*a){200}(.*b){200}(.*c.*d|a*b*){50}".into()),
                Form::Regex("(a|aa|aaa|aaaa)*(a*)*((a*)*)*b".into()),
                Form::Lark("start: start start | \"a\" start \"a\" | \"a\" | \"\"".into()),
                deep(60),
                deep(120),
                references(3000),
                straight(5000),
                Form::Regex("a".repeat(8000)),
                Form::Regex("ab|".repeat(2500) + "a"),
                Form::Regex("a?".repeat(4000)),
                Form::Regex("(a|b?)".repeat(1300)),
                Form::Regex("[a-z]*a".repeat(1000)),
                Form::Lark(format!("start: {}", "\"a\"? ".repeat(1600))),
                Form::Lark(format!("start: {}", "start? ".repeat(1100))),
                Form::Gbnf(format!("root ::= {}", "\"a\"? ".repeat(1600))),
                Form::Gbnf(format!("root ::= {}", "root? ".repeat(1100))),
                Form::Gbnf("root ::= root root | \"a\" root \"a\" | \"a\" |".into()),
                Form::Gbnf("root ::= ((a{2000}){2000} root?){2000}\na ::= (\"a\"{0,2000}){0,2000}".into()),
                Form::Gbnf(
                    (0..300).fold(String::from("root ::= r0 root?\n"), |all, i| {
                        all + &format!("r{i} ::= r{} r{}\n", i + 1, i + 1)
                    }) + "r300 ::= \"a\"?",
                ),
                Form::Gbnf((0..300).fold(String::from("root ::= r0 root\n"), |all, i| {
                    all + &format!("r{i} ::= r{} | \"a\"\n", (i + 1) % 300)
                })),
                Form::Gbnf((0..200).fold(String::from("root ::= \"(\" root \")\""), |all, i| {
                    all + &format!(" | [a-z]* \"a{i}\" root")
                })),
                Form::Gbnf(format!("root ::= {}", nested("(\"a\" root? ", ")", 100).replace(" a)", " \"a\")"))),
                Form::Gbnf(format!("root ::= {}", nested("(", ")", 100_000))),
                Form::Schema(json!({ "type": "string", "pattern": "a?".repeat(4000) })),
                Form::Schema(json!({ "type": "string", "minLength": 1_000_000_000 })),
                Form::Schema(json!({ "type": "array", "minItems": 1_000_000_000, "items": { "type": "string" } })),
                Form::Schema(json!({ "enum": (0..20_000).collect::<Vec<i32>>() })),
                Form::Schema(json!({ "type": "integer", "minimum": 1, "maximum": 999_999_999_999_999u64 })),
                Form::Schema(json!({ "type": "integer", "multipleOf": 9973 })),
                Form::Schema(json!({ "type": "integer", "multipleOf": 999_983 })),
                Form::Schema(json!({ "type": "number", "multipleOf": 0.000_012_345_678 })),
                Form::Regex(nested("(", ")", 100)),
                Form::Regex(nested("(", ")*", 100_000)),
                Form::Lark(format!("start: {}", nested("(\"a\" ", ")", 100).replace('a', "\"a\""))),
                Form::Lark(format!("start: {}", nested("(", ")", 100_000).replace('a', "\"a\""))),
                Form::Choice((0..5000).map(|i| format!("a{i}")).collect()),
            ]
        {
            let shown = format!("{form:?}").chars().take(60).collect::<String>();
            let clock = std::time::Instant::now();
            let begun = vocabulary.begin(&form);
            if let Ok(mut constraint) = begun {
                for _ in 0..30 {
                    let mut logits = vec![0f32; text.vocabulary()];
                    if constraint.restrict(&mut logits).is_err() || constraint.push(letter).is_err() {
                        break;
                    }
                }
            }
            assert!(clock.elapsed().as_secs() < 5, "{shown}: {:?}", clock.elapsed());
        }
    }
}
