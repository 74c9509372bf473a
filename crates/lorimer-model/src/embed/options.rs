//! How texts become vectors, as a sentence-transformers folder says it.

use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::files::{MAX_JSON_BYTES, read_json};

/// How the hidden states of a text's tokens become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean, special tokens included.
    Mean,
    /// The first token's.
    Cls,
    /// The greatest of each column.
    Max,
    /// The last token's.
    Last,
}

impl Pooling {
    /// By the name that sentence-transformers has for it.
    fn named(name: &str) -> Option<Self> {
        match name {
            "mean" | "mean_tokens" => Some(Self::Mean),
            "cls" | "cls_token" => Some(Self::Cls),
            "max" | "max_tokens" => Some(Self::Max),
            "lasttoken" => Some(Self::Last),
            _ => None,
        }
    }
}

/// How texts become vectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmbedOptions {
    /// How a text's tokens become one vector.
    pub pooling: Pooling,
    /// Whether vectors are divided by their length.
    pub normalize: bool,
    /// Tokens of a text beyond so many are left out, those that the tokenizer puts around it counted in.
    pub max_tokens: usize,
    /// Whether texts are lower-cased before they are encoded.
    pub lowercase: bool,
    /// What stands before every text.
    pub prompt: String,
}

impl EmbedOptions {
    /// One vector a text of at most `max_tokens` tokens, by a pooling of one's own.
    pub fn new(pooling: Pooling, normalize: bool, max_tokens: usize) -> Self {
        Self { pooling, normalize, max_tokens, lowercase: false, prompt: String::new() }
    }

    /// What a sentence-transformers folder says (`modules.json` and the folders that it names), in the layout of version 6 or an older one; None
    /// where there is no `modules.json`. `positions`: as many as the model has.
    ///
    /// # Errors
    /// Names a module, a pooling or a setting that is not known.
    pub fn of_folder(folder: &Path, positions: usize) -> Result<Option<Self>> {
        let path = folder.join("modules.json");
        if !path.is_file() {
            return Ok(None);
        }
        let modules: Value = read_json(&path, MAX_JSON_BYTES)?;
        let modules = modules.as_array().ok_or_else(|| Error::invalid(&path, "should hold a JSON list"))?;
        let (mut pooling, mut normalize) = (None, false);
        for (i, module) in modules.iter().enumerate() {
            let text = |key: &str| module.get(key).and_then(Value::as_str).unwrap_or_default();
            match (text("type").rsplit('.').next().unwrap_or_default(), i) {
                ("Transformer", 0) if text("path").is_empty() => {}
                ("Pooling", 1) => pooling = Some(read_pooling(&folder.join(plain(&path, text("path"))?))?),
                ("Normalize", 2) => normalize = true,
                (other, _) => {
                    let shown: String = other.chars().take(40).collect();
                    let problem = format!(
                        "its module {i} is `{shown}`; read are a Transformer, a Pooling and a Normalize, in that order"
                    );
                    return Err(Error::invalid(&path, problem));
                }
            }
        }
        let pooling = pooling.ok_or_else(|| Error::invalid(&path, "names no Pooling"))?;
        let own = optional(&folder.join("sentence_bert_config.json"))?;
        let tokenizer = optional(&folder.join("tokenizer_config.json"))?;
        // Version 6 leaves it to the tokenizer, whose number may be beyond all bounds.
        let most = |value: Option<&Value>| value.and_then(Value::as_f64).filter(|n| *n >= 1.0).map(|n| n as usize);
        let most = most(own.get("max_seq_length")).or_else(|| most(tokenizer.get("model_max_length")));
        Ok(Some(Self {
            max_tokens: most.unwrap_or(positions).min(positions),
            lowercase: own.get("do_lower_case").and_then(Value::as_bool).unwrap_or(false),
            prompt: read_prompt(folder)?,
            ..Self::new(pooling, normalize, positions)
        }))
    }
}

fn optional(path: &Path) -> Result<Value> {
    if path.is_file() { read_json(path, MAX_JSON_BYTES) } else { Ok(Value::Null) }
}

/// A folder beside `modules.json`, and no other.
fn plain<'a>(path: &Path, name: &'a str) -> Result<&'a str> {
    match crate::files::is_plain_file_name(name) {
        true => Ok(name),
        false => Err(Error::invalid(path, "names a module that is not in the folder")),
    }
}

/// The text that stands before every other by `config_sentence_transformers.json`.
fn read_prompt(folder: &Path) -> Result<String> {
    let path = folder.join("config_sentence_transformers.json");
    let config = optional(&path)?;
    match config.get("default_prompt_name").and_then(Value::as_str) {
        None => Ok(String::new()),
        Some(name) => {
            let prompt = config.get("prompts").and_then(|all| all.get(name)).and_then(Value::as_str);
            prompt.map(str::to_string).ok_or_else(|| Error::invalid(&path, "`default_prompt_name` is not in `prompts`"))
        }
    }
}

/// `pooling_mode`, or the flags `pooling_mode_…` of versions before 6.
fn read_pooling(folder: &Path) -> Result<Pooling> {
    let path = folder.join("config.json");
    let config: Value = read_json(&path, MAX_JSON_BYTES)?;
    let modes: Vec<String> = match config.get("pooling_mode") {
        Some(Value::String(mode)) => vec![mode.clone()],
        Some(Value::Array(modes)) => modes.iter().filter_map(Value::as_str).map(str::to_string).collect(),
        _ => {
            let flags = config.as_object().into_iter().flatten().filter(|(_, on)| on.as_bool() == Some(true));
            flags.filter_map(|(key, _)| key.strip_prefix("pooling_mode_").map(str::to_string)).collect()
        }
    };
    if config.get("include_prompt").and_then(Value::as_bool) == Some(false) {
        return Err(Error::invalid(&path, "`include_prompt` is false, which is not read"));
    }
    match modes.as_slice() {
        [mode] => Pooling::named(mode).ok_or_else(|| {
            let shown: String = mode.chars().take(40).collect();
            Error::invalid(&path, format!("the pooling `{shown}` is not one of mean, cls, max, lasttoken"))
        }),
        [] => Err(Error::invalid(&path, "names no pooling")),
        many => Err(Error::invalid(&path, format!("joins {} poolings; one is read", many.len()))),
    }
}
