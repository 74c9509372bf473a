//! A decoder's shape and constants out of a GGUF file's metadata.

use candle_core::quantized::GgmlDType;
use lorimer_seam::LayerShape;

use super::config::{DecoderConfig, Rope, RopeScaling};
use crate::error::{Error, Result};
use crate::weights::gguf::Gguf;

impl DecoderConfig {
    /// What all decoders have in common.
    pub(crate) fn common_of_gguf(file: &Gguf, architecture: &str, model_type: &str) -> Result<Self> {
        let key = |name: &str| format!("{architecture}.{name}");
        let needed = |name: &str| {
            file.size(&key(name))?.ok_or_else(|| Error::invalid(&file.path, format!("has no `{}`", key(name))))
        };
        let (hidden_size, heads) = (needed("embedding_length")?, needed("attention.head_count")?);
        let max_positions = file.size(&key("context_length"))?.unwrap_or(2048);
        let vocab_size = match file.tensor("token_embd.weight")? {
            Some((_, dims, _)) if dims.len() == 2 => dims[0],
            _ => return Err(Error::invalid(&file.path, "has no matrix `token_embd.weight`")),
        };
        let head_dim = file.size(&key("attention.key_length"))?.unwrap_or(hidden_size / heads);
        let rope_scaling = rope_scaling(file, architecture, head_dim, max_positions)?;
        let shape = LayerShape {
            heads,
            kv_heads: file.size(&key("attention.head_count_kv"))?.unwrap_or(heads),
            head_dim,
            inner: needed("feed_forward_length")?,
        };
        let mut config = Self::plain(model_type, hidden_size, vocab_size, shape, needed("block_count")?);
        config.rms_norm_eps = file.number(&key("attention.layer_norm_rms_epsilon")).unwrap_or(1e-5);
        config.max_positions = rope_scaling.reach(max_positions);
        let theta = file.number(&key("rope.freq_base")).unwrap_or(10_000.0);
        config.ropes = vec![Rope { theta, scaling: rope_scaling, width: head_dim }];
        config.tied = !file.content.tensor_infos.contains_key("output.weight");
        config.qkv_bias = file.content.tensor_infos.contains_key("blk.0.attn_q.bias");
        config.output_bias = file.content.tensor_infos.contains_key("blk.0.attn_output.bias");
        config.mlp_bias = file.content.tensor_infos.contains_key("blk.0.ffn_gate.bias");
        Ok(config)
    }
}

fn rope_scaling(file: &Gguf, architecture: &str, head_dim: usize, max_positions: usize) -> Result<RopeScaling> {
    if let Some((GgmlDType::F32, dims, bytes)) = file.tensor("rope_freqs.weight")?
        && dims == [head_dim / 2]
    {
        let factors = bytes.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b)));
        return Ok(RopeScaling::Factors { factors: factors.collect(), attention_factor: 1.0 });
    }
    let factor = file.number(&format!("{architecture}.rope.scaling.factor")).unwrap_or(1.0);
    let original =
        file.number(&format!("{architecture}.rope.scaling.original_context_length")).unwrap_or(max_positions as f64);
    match file.text(&format!("{architecture}.rope.scaling.type")) {
        None | Some("none") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor }),
        Some("yarn") => Ok(RopeScaling::Yarn {
            factor,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original,
            attention_factor: 0.1 * factor.ln() + 1.0,
        }),
        Some(other) => {
            let other: String = other.chars().take(40).collect();
            Err(Error::invalid(&file.path, format!("rope scaling `{other}` is not one of none, linear, yarn")))
        }
    }
}
