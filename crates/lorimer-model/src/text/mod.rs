//! Text in and out: tokenizer, special tokens and chat template of one model.

pub mod chat;
pub mod messages;
pub mod sentencepiece;

use std::path::Path;

use candle_core::quantized::gguf_file::Value as GgufValue;
use candle_core::quantized::tokenizer::TokenizerFromGguf;
use serde_json::{Map, Value};
use tokenizers::decoders::DecoderWrapper;
use tokenizers::pre_tokenizers::{byte_level::ByteLevel, digits::Digits, sequence::Sequence};
use tokenizers::{Decoder, PostProcessor, Tokenizer, TruncationDirection};

use crate::error::{Error, Result, first_line};
use crate::files::{MAX_JSON_BYTES, read_bounded, read_json};
use crate::weights::gguf::Gguf;
use chat::ChatTemplate;

/// Tokenizer, special tokens and chat template.
pub struct TextModel {
    tokenizer: Tokenizer,
    template: Option<Template>,
    /// What stands in its place for conversations with tools, where the model has such a one (`tool_use`).
    template_for_tools: Option<Template>,
    /// Further special tokens that templates may name (`pad_token`, `unk_token`, …).
    named_tokens: Map<String, Value>,
    /// Text of the token that begins a sequence, where there is one.
    pub bos: Option<String>,
    /// Text of the token that ends a turn or sequence.
    pub eos: Option<String>,
    /// Tokens at which generation stops.
    pub eos_ids: Vec<u32>,
}

/// A chat template, or its text and why it does not compile: only a conversation needs one that does.
type Template = Result<ChatTemplate, (String, String)>;

/// Texts of chat templates: that for every conversation, and one for those with tools.
#[derive(Default)]
struct Sources {
    template: Option<String>,
    for_tools: Option<String>,
    named_tokens: Map<String, Value>,
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

/// Special tokens by their names in `tokenizer_config.json`, without those that begin and end a sequence.
fn named_tokens(config: &Value) -> Map<String, Value> {
    let names = config.as_object().into_iter().flat_map(|fields| fields.keys());
    let names = names.filter(|name| name.ends_with("_token") && !matches!(name.as_str(), "bos_token" | "eos_token"));
    names.filter_map(|name| Some((name.clone(), special(config, name)?.into()))).collect()
}

fn source(template: &Template) -> &str {
    match template {
        Ok(template) => template.source(),
        Err((source, _)) => source,
    }
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

/// The byte that a character stands for in byte-level vocabularies (GPT-2's): printable ones of Latin-1 for themselves, the other bytes in
/// order from U+0100.
fn byte_of(c: char) -> Option<u8> {
    let own = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    match u32::from(c) {
        b if b < 0x100 => own(b).then_some(b as u8),
        n => (0..0x100).filter(|&b| !own(b)).nth((n - 0x100) as usize).map(|b| b as u8),
    }
}

/// Tokens that end a turn in one of the known chat formats, by their text: llama.cpp ends there too, since many GGUF files name only
/// the end of the whole text.
const ENDS_OF_TURNS: [&str; 9] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<EOT>",
];

/// What ends a turn by the files beside a `tokenizer.json`: ids, and the text of the end token.
fn ends_beside(tokenizer: &Path) -> Result<(Vec<u32>, Option<String>)> {
    let beside = |name: &str| optional_json(&tokenizer.with_file_name(name));
    Ok((ids_of(&beside("generation_config.json")?), special(&beside("tokenizer_config.json")?, "eos_token")))
}

impl TextModel {
    /// From a Hugging Face folder: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`,
    /// `generation_config.json`.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let tokenizer = Self::tokenizer_file(&folder.join("tokenizer.json"))?;
        let config = optional_json(&folder.join("tokenizer_config.json"))?;
        let file = |name: &str| {
            let path = folder.join(name);
            let bytes = if path.is_file() { Some(read_bounded(&path, 1 << 20)?) } else { None };
            let text = bytes.map(String::from_utf8).transpose();
            text.map_err(|_| Error::invalid(&path, "is not UTF-8 text"))
        };
        let mut sources = Sources {
            template: file("chat_template.jinja")?,
            for_tools: file("additional_chat_templates/tool_use.jinja")?,
            named_tokens: named_tokens(&config),
        };
        if sources.template.is_none() {
            match config.get("chat_template") {
                Some(Value::String(text)) => sources.template = Some(text.clone()),
                Some(Value::Array(items)) => {
                    let text = |item: &Value| item.get("template")?.as_str().map(str::to_string);
                    let named = |name: &str| items.iter().find(|i| i.get("name").and_then(Value::as_str) == Some(name));
                    sources.template = named("default").or_else(|| items.first()).and_then(text);
                    sources.for_tools = named("tool_use").and_then(text).or(sources.for_tools);
                }
                _ => {}
            }
        }
        let mut ids = ids_of(&optional_json(&folder.join("generation_config.json"))?);
        ids.extend(ids_of(&optional_json(&folder.join("config.json"))?));
        Self::assemble(tokenizer, sources, special(&config, "bos_token"), special(&config, "eos_token"), ids)
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

    /// A GGUF file's special tokens and chat template around a tokenizer from `tokenizer.json`. What ends a turn by the files beside
    /// that ends it as well.
    pub fn from_gguf_with_tokenizer(file: &Gguf, tokenizer: &Path) -> Result<Self> {
        Self::from_gguf_parts(file, Self::tokenizer_file(tokenizer)?)?.ending_as_beside(tokenizer)
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
        let known = tokenizer.get_vocab_size(true) as f64;
        let ends = ["eos", "eot", "eom"].map(|kind| file.number(&format!("tokenizer.ggml.{kind}_token_id")));
        // Some files say 2³² − 1 where there is none.
        let ends = ends.into_iter().flatten().filter(|id| *id >= 0.0 && *id < known).map(|id| id as u32);
        let ends = ends.chain(ENDS_OF_TURNS.iter().filter_map(|text| tokenizer.token_to_id(text))).collect();
        let text = |key: &str| file.text(key).map(str::to_string);
        let (template, for_tools) = (text("tokenizer.chat_template"), text("tokenizer.chat_template.tool_use"));
        Self::assemble(tokenizer, Sources { template, for_tools, ..Default::default() }, bos, eos, ends)
    }

    /// Puts another tokenizer in, from a `tokenizer.json`. What ended a turn still does, and so does what ends it by the files beside.
    pub fn with_tokenizer_file(self, path: &Path) -> Result<Self> {
        let template = self.template_source().map(str::to_string);
        let for_tools = self.template_for_tools.as_ref().map(|t| source(t).to_string());
        let sources = Sources { template, for_tools, named_tokens: self.named_tokens };
        Self::assemble(Self::tokenizer_file(path)?, sources, self.bos, self.eos, self.eos_ids)?.ending_as_beside(path)
    }

    fn ending_as_beside(mut self, tokenizer: &Path) -> Result<Self> {
        let (ids, text) = ends_beside(tokenizer)?;
        self.eos_ids.extend(ids);
        self.eos_ids.extend(text.and_then(|text| self.tokenizer.token_to_id(&text)));
        self.eos_ids.sort_unstable();
        self.eos_ids.dedup();
        Ok(self)
    }

    fn tokenizer_file(path: &Path) -> Result<Tokenizer> {
        let bytes = read_bounded(path, MAX_JSON_BYTES)?;
        let mut tokenizer = Tokenizer::from_bytes(&bytes).map_err(|e| {
            Error::invalid(path, format!("is not a readable tokenizer: {}", first_line(&e.to_string())))
        })?;
        // Files of encoders cut and pad as they were last used; who encodes says how long a text may be.
        tokenizer.with_padding(None);
        let _ = tokenizer.with_truncation(None);
        Ok(tokenizer)
    }

    fn assemble(
        tokenizer: Tokenizer,
        sources: Sources,
        bos: Option<String>,
        eos: Option<String>,
        mut eos_ids: Vec<u32>,
    ) -> Result<Self> {
        let (begin, end) = (bos.as_deref().unwrap_or_default(), eos.as_deref().unwrap_or_default());
        let compile = |text: String| match ChatTemplate::new(&text, begin, end) {
            Ok(template) => Ok(template.with_tokens(sources.named_tokens.clone())),
            Err(e) => Err((text, e.to_string())),
        };
        let (template, template_for_tools) = (sources.template.map(compile), sources.for_tools.map(compile));
        eos_ids.extend(eos.as_ref().and_then(|t| tokenizer.token_to_id(t)));
        eos_ids.sort_unstable();
        eos_ids.dedup();
        let named_tokens = sources.named_tokens;
        Ok(Self { tokenizer, template, template_for_tools, named_tokens, bos, eos, eos_ids })
    }

    /// The chat template's text, where the model has one.
    pub fn template_source(&self) -> Option<&str> {
        self.template.as_ref().map(source)
    }

    /// The chat template.
    ///
    /// # Errors
    /// Says what to do where there is none, and why one cannot be used.
    pub fn needed_template(&self) -> Result<&ChatTemplate> {
        self.template_for(false)
    }

    /// The chat template for a conversation with or without tools; some models have one of its own for the first.
    ///
    /// # Errors
    /// As [`Self::needed_template`].
    pub fn template_for(&self, tools: bool) -> Result<&ChatTemplate> {
        match self.template_for_tools.as_ref().filter(|_| tools).or(self.template.as_ref()) {
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

    /// Tokens of a text with what the tokenizer puts around it, `most` in all: what is too much is left out at the text's end.
    pub fn encode_cut(&self, text: &str, most: usize) -> Result<Vec<u32>> {
        let refused = |e: tokenizers::Error| {
            Error::Unsupported(format!("the tokenizer refuses the text: {}", first_line(&e.to_string())))
        };
        let mut plain = self.tokenizer.encode_fast(text, false).map_err(refused)?;
        let around = self.tokenizer.get_post_processor().map_or(0, |p| p.added_tokens(false));
        plain.truncate(most.saturating_sub(around), 0, TruncationDirection::Right);
        let whole = self.tokenizer.post_process(plain, None, true).map_err(refused)?;
        Ok(whole.get_ids().to_vec())
    }

    /// Text of tokens; special ones left out unless `special`.
    pub fn decode(&self, ids: &[u32], special: bool) -> Result<String> {
        self.tokenizer
            .decode(ids, !special)
            .map_err(|e| Error::Unsupported(format!("the tokenizer cannot decode: {}", first_line(&e.to_string()))))
    }

    /// Whether a token is a special one, which decoded text leaves out.
    pub fn is_special(&self, id: u32) -> bool {
        self.tokenizer.get_added_vocabulary().get_added_tokens_decoder().get(&id).is_some_and(|token| token.special)
    }

    /// A token as the vocabulary writes it; none for an id without a token.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// The bytes that a token stands for, which may be a part of a letter; none for an id without a token.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let added = self.tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        if let Some(token) = added.get(&id) {
            return token.content.clone().into_bytes();
        }
        let Some(piece) = self.tokenizer.id_to_token(id) else { return Vec::new() };
        let parts = match self.tokenizer.get_decoder() {
            Some(DecoderWrapper::Sequence(all)) => all.get_decoders(),
            Some(one) => std::slice::from_ref(one),
            None => &[],
        };
        if parts.iter().any(|d| matches!(d, DecoderWrapper::ByteFallback(_)))
            && let Some(byte) = piece.strip_prefix("<0x").and_then(|p| p.strip_suffix('>'))
            && byte.len() == 2
            && let Ok(byte) = u8::from_str_radix(byte, 16)
        {
            return vec![byte];
        }
        if parts.iter().any(|d| matches!(d, DecoderWrapper::ByteLevel(_))) {
            let bytes: Option<Vec<u8>> = piece.chars().map(byte_of).collect();
            return bytes.unwrap_or_else(|| piece.into_bytes());
        }
        // The others look at a piece's neighbours only to take a space off the first of a text: it is decoded as a later one.
        let mut pieces = vec![String::new(), piece];
        for part in parts.iter().filter(|d| !matches!(d, DecoderWrapper::Strip(_) | DecoderWrapper::Fuse(_))) {
            match part.decode_chain(pieces.clone()) {
                Ok(decoded) => pieces = decoded,
                Err(_) => break,
            }
        }
        pieces.concat().into_bytes()
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// transformers gives a template every special token under its name.
    #[test]
    fn templates_name_special_tokens() {
        let folder = tempfile::tempdir().unwrap();
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens/tiny-llama/tokenizer.json");
        std::fs::copy(golden, folder.path().join("tokenizer.json")).unwrap();
        let template =
            "{{ bos_token }}{{ pad_token }}{{ unk_token is defined }}{{ image_token }}{{ add_bos_token is defined }}";
        let config = json!({ "bos_token": "<s>", "pad_token": { "content": "<p>" }, "unk_token": null, "image_token": "<i>", "add_bos_token": true, "chat_template": template });
        std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let render = |text: &TextModel| text.needed_template().unwrap().render(&[], None, false).unwrap();
        let text = TextModel::from_folder(folder.path()).unwrap();
        assert_eq!(render(&text), "<s><p>False<i>False");
        let text = text.with_tokenizer_file(&folder.path().join("tokenizer.json")).unwrap();
        assert_eq!(render(&text), "<s><p>False<i>False");
    }

    /// Where a model has a template of its own for tools, in each place in which one may stand.
    #[test]
    fn conversations_with_tools_have_their_own_template() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens/tiny-llama/tokenizer.json");
        std::fs::copy(golden, folder.path().join("tokenizer.json")).unwrap();
        let sources = || {
            let text = TextModel::from_folder(folder.path()).unwrap();
            [false, true]
                .map(|tools| text.template_for(tools).map(|t| t.source().to_string()).map_err(|e| e.to_string()))
        };
        let named = |name: &str, text: &str| json!({ "name": name, "template": text });
        write(
            "tokenizer_config.json",
            &json!({ "chat_template": [named("tool_use", "t"), named("default", "d")] }).to_string(),
        );
        assert_eq!(sources(), [Ok("d".into()), Ok("t".into())]);
        write("tokenizer_config.json", &json!({ "chat_template": "d" }).to_string());
        assert_eq!(sources(), [Ok("d".into()), Ok("d".into())]);
        std::fs::create_dir(folder.path().join("additional_chat_templates")).unwrap();
        write("additional_chat_templates/tool_use.jinja", "{% t");
        write("chat_template.jinja", "j");
        let [plain, tools] = sources();
        assert_eq!(plain, Ok("j".into()));
        assert!(tools.unwrap_err().starts_with("the chat template is not valid: "));
    }
}
