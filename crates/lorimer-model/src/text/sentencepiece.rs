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

/// The tokenizer, or what its metadata lack.
pub fn from_gguf(file: &Gguf) -> Result<Tokenizer, String> {
    let array = |key: &str| match file.content.metadata.get(key) {
        Some(Value::Array(items)) => Ok(items),
        _ => Err(format!("`{key}` is missing")),
    };
    let flag = |key: &str| match file.content.metadata.get(key) {
        Some(Value::Bool(flag)) => Some(*flag),
        _ => None,
    };
    let text = |e: tokenizers::Error| e.to_string();
    let pieces: Vec<&str> = array("tokenizer.ggml.tokens")?
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
    if scores.len() != pieces.len() || kinds.len() != pieces.len() {
        return Err(format!("{} tokens, {} scores and {} types", pieces.len(), scores.len(), kinds.len()));
    }
    let ids: HashMap<&str, u32> = pieces.iter().zip(0..).map(|(&piece, id)| (piece, id)).collect();
    if ids.len() != pieces.len() {
        return Err("a token occurs twice".into());
    }
    let unknown = kinds.iter().position(|&k| k == UNKNOWN).map(|id| pieces[id].to_string());

    let mut merges: Vec<(f32, u32, u32, (String, String))> = Vec::new();
    for (id, piece) in pieces.iter().enumerate().filter(|(id, p)| kinds[*id] == 1 && p.len() <= MAX_PIECE) {
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                merges.push((scores[id], l, r, (left.to_string(), right.to_string())));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| (a.1, a.2).cmp(&(b.1, b.2))));

    let vocabulary: ahash::AHashMap<String, u32> = ids.iter().map(|(piece, &id)| (piece.to_string(), id)).collect();
    let mut builder = BPE::builder()
        .vocab_and_merges(vocabulary, merges.into_iter().map(|m| m.3).collect::<Vec<_>>())
        .byte_fallback(true)
        .fuse_unk(true);
    if let Some(unknown) = &unknown {
        builder = builder.unk_token(unknown.clone());
    }
    let mut tokenizer = Tokenizer::new(builder.build().map_err(text)?);

    let prefix = flag("tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let spaces = Replace::new(" ", SPACE).map_err(text)?;
    let mut steps = vec![spaces.into()];
    if prefix {
        steps.insert(0, Prepend::new(SPACE.into()).into());
    }
    tokenizer.with_normalizer(Some(Normalizers::new(steps))).map_err(text)?;
    let mut decoders: Vec<DecoderWrapper> =
        vec![Replace::new(SPACE, " ").map_err(text)?.into(), ByteFallback::default().into(), Fuse::default().into()];
    if prefix {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(Decoders::new(decoders)));
    let of_kind = |kind: i64, special: bool| -> Vec<AddedToken> {
        let chosen = pieces.iter().zip(&kinds).filter(move |(_, k)| **k == kind);
        chosen.map(|(piece, _)| AddedToken::from(*piece, special).normalized(false)).collect()
    };
    tokenizer.add_special_tokens(of_kind(CONTROL, true)).map_err(text)?;
    tokenizer.add_special_tokens(of_kind(UNKNOWN, true)).map_err(text)?;
    tokenizer.add_tokens(of_kind(USER_DEFINED, false)).map_err(text)?;

    let id = |key: &str| file.number(key).map(|n| n as usize).filter(|&n| n < pieces.len());
    let (mut around, mut named) = (vec!["$A"], Vec::new());
    if flag("tokenizer.ggml.add_bos_token").unwrap_or(true)
        && let Some(bos) = id("tokenizer.ggml.bos_token_id")
    {
        around.insert(0, pieces[bos]);
        named.push((pieces[bos].to_string(), bos as u32));
    }
    if flag("tokenizer.ggml.add_eos_token").unwrap_or(false)
        && let Some(eos) = id("tokenizer.ggml.eos_token_id")
    {
        around.push(pieces[eos]);
        named.push((pieces[eos].to_string(), eos as u32));
    }
    let template = TemplateProcessing::builder().try_single(around)?.special_tokens(named).build();
    tokenizer.with_post_processor(Some(template.map_err(|e| e.to_string())?));
    Ok(tokenizer)
}
