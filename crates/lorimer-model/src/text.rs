//! Text in and out: tokenizer, special tokens and chat template of one model.

use std::path::Path;

use candle_core::quantized::gguf_file::Value as GgufValue;
use candle_core::quantized::tokenizer::TokenizerFromGguf;
use serde_json::Value;
use tokenizers::Tokenizer;
use tokenizers::pre_tokenizers::{byte_level::ByteLevel, digits::Digits, sequence::Sequence};

use crate::chat::ChatTemplate;
use crate::error::{Error, Result, first_line};
use crate::files::{MAX_JSON_BYTES, read_bounded, read_json};
use crate::gguf::Gguf;
use crate::sentencepiece;

/// Tokenizer, special tokens and chat template.
pub struct TextModel {
    tokenizer: Tokenizer,
    /// The chat template, or its text and why it does not compile: only a conversation needs one that does.
    template: Option<Result<ChatTemplate, (String, String)>>,
    /// Text of the token that begins a sequence, where there is one.
    pub bos: Option<String>,
    /// Text of the token that ends a turn or sequence.
    pub eos: Option<String>,
    /// Tokens at which generation stops.
    pub eos_ids: Vec<u32>,
}

/// Tokens of a text, each with the bytes it covers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// First byte of each token in the text, and the byte after its last.
    pub spans: Vec<(usize, usize)>,
}

/// A special token in `tokenizer_config.json` is a string or an object with `content`.
fn special(config: &Value, key: &str) -> Option<String> {
    let value = config.get(key)?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_string)
}

fn optional_json(path: &Path) -> Result<Value> {
    if path.is_file() { read_json(path, MAX_JSON_BYTES) } else { Ok(Value::Null) }
}

fn ids_of(config: &Value) -> Vec<u32> {
    let one = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
    match config.get("eos_token_id") {
        Some(Value::Array(items)) => items.iter().filter_map(one).collect(),
        Some(value) => one(value).into_iter().collect(),
        None => Vec::new(),
    }
}

impl TextModel {
    /// From a Hugging Face folder: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`,
    /// `generation_config.json`.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let tokenizer = Self::tokenizer_file(&folder.join("tokenizer.json"))?;
        let config = optional_json(&folder.join("tokenizer_config.json"))?;
        let jinja = folder.join("chat_template.jinja");
        let template = if jinja.is_file() {
            let bytes = read_bounded(&jinja, 1 << 20)?;
            Some(String::from_utf8(bytes).map_err(|_| Error::invalid(&jinja, "is not UTF-8 text"))?)
        } else {
            match config.get("chat_template") {
                Some(Value::String(text)) => Some(text.clone()),
                Some(Value::Array(items)) => {
                    let named = |name: &str| items.iter().find(|i| i.get("name").and_then(Value::as_str) == Some(name));
                    let chosen = named("default").or_else(|| items.first());
                    chosen.and_then(|i| i.get("template")?.as_str()).map(str::to_string)
                }
                _ => None,
            }
        };
        let mut ids = ids_of(&optional_json(&folder.join("generation_config.json"))?);
        ids.extend(ids_of(&optional_json(&folder.join("config.json"))?));
        Self::assemble(tokenizer, template, special(&config, "bos_token"), special(&config, "eos_token"), ids)
    }

    /// From the metadata of a GGUF file.
    pub fn from_gguf(file: &Gguf) -> Result<Self> {
        let unreadable = |problem: &str| {
            let problem: String = first_line(problem).chars().take(200).collect();
            let advice = "give the model's `tokenizer.json` with `--tokenizer`";
            Error::invalid(&file.path, format!("its tokenizer cannot be read ({problem}); {advice}"))
        };
        if sentencepiece::is_sentencepiece(file) {
            let tokenizer = sentencepiece::from_gguf(file).map_err(|problem| unreadable(&problem))?;
            return Self::from_gguf_parts(file, tokenizer);
        }
        let mut tokenizer = Tokenizer::from_gguf(&file.content).map_err(|e| unreadable(&e.to_string()))?;
        // candle knows the splitting rules of Qwen 2 and Llama 3; the others are GPT-2's, and SmolLM's adds single digits.
        let bytes = ByteLevel::new(false, true, true);
        match file.text("tokenizer.ggml.pre") {
            Some("qwen2" | "smaug-bpe" | "llama3" | "llama-bpe" | "lfm2") => {}
            Some("smollm") => {
                tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![Digits::new(true).into(), bytes.into()])));
                tokenizer.with_post_processor(Some(ByteLevel::new(false, false, true)));
            }
            _ => {
                tokenizer.with_pre_tokenizer(Some(bytes));
                tokenizer.with_post_processor(Some(ByteLevel::new(false, false, true)));
            }
        }
        Self::from_gguf_parts(file, tokenizer)
    }

    /// A GGUF file's special tokens and chat template around a tokenizer from `tokenizer.json`.
    pub fn from_gguf_with_tokenizer(file: &Gguf, tokenizer: &Path) -> Result<Self> {
        Self::from_gguf_parts(file, Self::tokenizer_file(tokenizer)?)
    }

    fn from_gguf_parts(file: &Gguf, tokenizer: Tokenizer) -> Result<Self> {
        let token = |key: &str| {
            let id = file.number(key)? as usize;
            match file.content.metadata.get("tokenizer.ggml.tokens") {
                Some(GgufValue::Array(tokens)) => tokens.get(id)?.to_string().ok().cloned(),
                _ => None,
            }
        };
        let (bos, eos) = (token("tokenizer.ggml.bos_token_id"), token("tokenizer.ggml.eos_token_id"));
        Self::assemble(tokenizer, file.text("tokenizer.chat_template").map(str::to_string), bos, eos, Vec::new())
    }

    /// Puts another tokenizer in, from a `tokenizer.json`.
    pub fn with_tokenizer_file(self, path: &Path) -> Result<Self> {
        let template = self.template_source().map(str::to_string);
        Self::assemble(Self::tokenizer_file(path)?, template, self.bos, self.eos, Vec::new())
    }

    fn tokenizer_file(path: &Path) -> Result<Tokenizer> {
        let bytes = read_bounded(path, MAX_JSON_BYTES)?;
        Tokenizer::from_bytes(&bytes)
            .map_err(|e| Error::invalid(path, format!("is not a readable tokenizer: {}", first_line(&e.to_string()))))
    }

    fn assemble(
        tokenizer: Tokenizer,
        template: Option<String>,
        bos: Option<String>,
        eos: Option<String>,
        mut eos_ids: Vec<u32>,
    ) -> Result<Self> {
        let (begin, end) = (bos.as_deref().unwrap_or_default(), eos.as_deref().unwrap_or_default());
        let template =
            template.map(|source| ChatTemplate::new(&source, begin, end).map_err(|e| (source, e.to_string())));
        eos_ids.extend(eos.as_ref().and_then(|t| tokenizer.token_to_id(t)));
        eos_ids.sort_unstable();
        eos_ids.dedup();
        Ok(Self { tokenizer, template, bos, eos, eos_ids })
    }

    /// The chat template's text, where the model has one.
    pub fn template_source(&self) -> Option<&str> {
        self.template.as_ref().map(|template| match template {
            Ok(template) => template.source(),
            Err((source, _)) => source,
        })
    }

    /// The chat template.
    ///
    /// # Errors
    /// Says what to do where there is none, and why one cannot be used.
    pub fn needed_template(&self) -> Result<&ChatTemplate> {
        match &self.template {
            Some(Ok(template)) => Ok(template),
            Some(Err((_, problem))) => Err(Error::Unsupported(problem.clone())),
            None => Err(Error::Unsupported(
                "the model has no chat template; use prompt/completion or text data, or a model that has one".into(),
            )),
        }
    }

    /// Tokens of a text. `special` adds what the tokenizer puts around plain text (a chat template brings its own).
    pub fn encode(&self, text: &str, special: bool) -> Result<Encoded> {
        let encoding = self.tokenizer.encode(text, special).map_err(|e| {
            Error::Unsupported(format!("the tokenizer refuses the text: {}", first_line(&e.to_string())))
        })?;
        Ok(Encoded { ids: encoding.get_ids().to_vec(), spans: encoding.get_offsets().to_vec() })
    }

    /// Text of tokens; special ones left out unless `special`.
    pub fn decode(&self, ids: &[u32], special: bool) -> Result<String> {
        self.tokenizer
            .decode(ids, !special)
            .map_err(|e| Error::Unsupported(format!("the tokenizer cannot decode: {}", first_line(&e.to_string()))))
    }

    /// One more than the largest token id.
    pub fn vocabulary(&self) -> usize {
        self.tokenizer.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1)
    }

    /// Bytes of the longest token, as the vocabulary writes it.
    pub fn longest_token(&self) -> usize {
        self.tokenizer.get_vocab(true).keys().map(String::len).max().unwrap_or(0)
    }

    /// The tokenizer as `tokenizer.json`.
    pub fn to_json(&self) -> Result<String> {
        self.tokenizer
            .to_string(false)
            .map_err(|e| Error::Unsupported(format!("the tokenizer cannot be written: {}", first_line(&e.to_string()))))
    }
}
