//! A SentencePiece tokenizer (Kudo and Richardson 2018, arXiv 1808.06226) out of a GGUF file's metadata, as BaseModel 1 and 2
//! and Mistral have it: `tokenizer.ggml.model = llama`.
//!
//! SentencePiece joins, of all neighbouring pieces, the two whose union has the highest score. That is byte-pair encoding
//! with one merge for every way to split a piece into two pieces, in the order of the scores.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

use crate::weights::gguf::Gguf;

/// What stands for a space.
const SPACE: &str = "▁";
/// `tokenizer.ggml.token_type` of pieces that are no text.
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
/// Longest piece that is split into merges; SentencePiece itself makes none longer than 16 characters by default.
const MAX_PIECE: usize = 256;

/// Whether the file's tokenizer is of this kind.
pub fn is_sentencepiece(file: &Gguf) -> bool {
    file.text("tokenizer.ggml.model") == Some("llama")
}

fn flag(file: &Gguf, key: &str) -> Option<bool> {
    match file.content.metadata.get(key) {
        Some(Value::Bool(flag)) => Some(*flag),
        _ => None,
    }
}

fn message(error: tokenizers::Error) -> String {
    error.to_string()
}

/// The vocabulary: each piece with its score and its kind, and the number of each.
struct Pieces<'a> {
    texts: Vec<&'a str>,
    scores: Vec<f32>,
    kinds: Vec<i64>,
    ids: HashMap<&'a str, u32>,
}

impl<'a> Pieces<'a> {
    fn read(file: &'a Gguf) -> Result<Self, String> {
        let array = |key: &str| match file.content.metadata.get(key) {
            Some(Value::Array(items)) => Ok(items),
            _ => Err(format!("`{key}` is missing")),
        };
        let texts: Vec<&str> = array("tokenizer.ggml.tokens")?
            .iter()
            .map(|v| v.to_string().map(String::as_str).map_err(|e| e.to_string()))
            .collect::<Result<_, _>>()?;
        let scores: Vec<f32> = array("tokenizer.ggml.scores")?
            .iter()
            .map(|v| v.to_f32().map_err(|e| e.to_string()))
            .collect::<Result<_, _>>()?;
        let kinds: Vec<i64> = array("tokenizer.ggml.token_type")?
            .iter()
            .map(|v| v.to_i32().map(i64::from).or_else(|_| v.to_u32().map(i64::from)).map_err(|e| e.to_string()))
            .collect::<Result<_, _>>()?;
        if scores.len() != texts.len() || kinds.len() != texts.len() {
            return Err(format!("{} tokens, {} scores and {} types", texts.len(), scores.len(), kinds.len()));
        }
        let ids: HashMap<&str, u32> = texts.iter().zip(0..).map(|(&piece, id)| (piece, id)).collect();
        if ids.len() != texts.len() {
            return Err("a token occurs twice".into());
        }
        Ok(Self { texts, scores, kinds, ids })
    }

    /// Every way to split a piece into two pieces, in the order of the scores.
    fn merges(&self) -> Vec<(String, String)> {
        let mut merges: Vec<(f32, u32, u32, (String, String))> = Vec::new();
        let normal = |(id, piece): &(usize, &&str)| self.kinds[*id] == 1 && piece.len() <= MAX_PIECE;
        for (id, piece) in self.texts.iter().enumerate().filter(normal) {
            for (at, _) in piece.char_indices().skip(1) {
                let (left, right) = piece.split_at(at);
                if let (Some(&l), Some(&r)) = (self.ids.get(left), self.ids.get(right)) {
                    merges.push((self.scores[id], l, r, (left.to_string(), right.to_string())));
                }
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| (a.1, a.2).cmp(&(b.1, b.2))));
        merges.into_iter().map(|m| m.3).collect()
    }

    fn of_kind(&self, kind: i64, special: bool) -> Vec<AddedToken> {
        let chosen = self.texts.iter().zip(&self.kinds).filter(move |(_, k)| **k == kind);
        chosen.map(|(piece, _)| AddedToken::from(*piece, special).normalized(false)).collect()
    }

    fn model(&self) -> Result<BPE, String> {
        let vocabulary: ahash::AHashMap<String, u32> =
            self.ids.iter().map(|(piece, &id)| (piece.to_string(), id)).collect();
        let mut builder = BPE::builder().vocab_and_merges(vocabulary, self.merges()).byte_fallback(true).fuse_unk(true);
        if let Some(id) = self.kinds.iter().position(|&k| k == UNKNOWN) {
            builder = builder.unk_token(self.texts[id].to_string());
        }
        builder.build().map_err(message)
    }
}

/// The tokenizer, or what its metadata lack.
pub fn from_gguf(file: &Gguf) -> Result<Tokenizer, String> {
    let pieces = Pieces::read(file)?;
    let mut tokenizer = Tokenizer::new(pieces.model()?);
    let prefix = flag(file, "tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let spaces = Replace::new(" ", SPACE).map_err(message)?;
    let mut steps = vec![spaces.into()];
    if prefix {
        steps.insert(0, Prepend::new(SPACE.into()).into());
    }
    tokenizer.with_normalizer(Some(Normalizers::new(steps))).map_err(message)?;
    let mut decoders: Vec<DecoderWrapper> =
        vec![Replace::new(SPACE, " ").map_err(message)?.into(), ByteFallback::default().into(), Fuse::default().into()];
    if prefix {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(Decoders::new(decoders)));
    tokenizer.add_special_tokens(pieces.of_kind(CONTROL, true)).map_err(message)?;
    tokenizer.add_special_tokens(pieces.of_kind(UNKNOWN, true)).map_err(message)?;
    tokenizer.add_tokens(pieces.of_kind(USER_DEFINED, false)).map_err(message)?;
    tokenizer.with_post_processor(Some(around(file, &pieces.texts)?));
    Ok(tokenizer)
}

/// What is put before and after a text.
fn around(file: &Gguf, pieces: &[&str]) -> Result<TemplateProcessing, String> {
    let id = |key: &str| file.number(key).map(|n| n as usize).filter(|&n| n < pieces.len());
    let (mut around, mut named) = (vec!["$A"], Vec::new());
    if flag(file, "tokenizer.ggml.add_bos_token").unwrap_or(true)
        && let Some(bos) = id("tokenizer.ggml.bos_token_id")
    {
        around.insert(0, pieces[bos]);
        named.push((pieces[bos].to_string(), bos as u32));
    }
    if flag(file, "tokenizer.ggml.add_eos_token").unwrap_or(false)
        && let Some(eos) = id("tokenizer.ggml.eos_token_id")
    {
        around.push(pieces[eos]);
        named.push((pieces[eos].to_string(), eos as u32));
    }
    let template = TemplateProcessing::builder().try_single(around)?.special_tokens(named).build();
    template.map_err(|e| e.to_string())
}
