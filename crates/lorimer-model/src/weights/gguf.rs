//! GGUF files: a guard that bounds what a damaged file can ask for, names as Hugging Face writes them, and
//! rows in Hugging Face's order.

use std::borrow::Cow;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, Value};
use lorimer_tensor::storage::mapped::MappedFile;

use crate::error::{Error, Result, first_line};
use crate::weights::raw::RawTensor;

/// Most elements that all metadata arrays together may have (a vocabulary of 256k tokens has about a million).
const MAX_METADATA_VALUES: u64 = 8 << 20;
/// Most metadata entries, and most tensors.
const MAX_ENTRIES: u64 = 1 << 16;

/// An opened GGUF file.
pub struct Gguf {
    /// Where it is.
    pub path: PathBuf,
    /// Metadata and tensor table.
    pub content: Content,
    bytes: MappedFile,
}

/// Walks the header without allocating and counts what candle's reader would have to hold.
struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
    values: u64,
}

impl Walk<'_> {
    fn skip(&mut self, n: u64) -> Result<(), String> {
        let end = (self.at as u64).checked_add(n).filter(|&end| end <= self.bytes.len() as u64);
        self.at = end.ok_or("the header ends before its lengths say")? as usize;
        Ok(())
    }
    fn number<const N: usize>(&mut self) -> Result<u64, String> {
        let start = self.at;
        self.skip(N as u64)?;
        let mut wide = [0; 8];
        wide[..N].copy_from_slice(&self.bytes[start..start + N]);
        Ok(u64::from_le_bytes(wide))
    }
    fn string(&mut self) -> Result<(), String> {
        let length = self.number::<8>()?;
        self.skip(length)
    }
    fn value(&mut self, kind: u64, depth: usize) -> Result<(), String> {
        match kind {
            0 | 1 | 7 => self.skip(1),
            2 | 3 => self.skip(2),
            4..=6 => self.skip(4),
            10..=12 => self.skip(8),
            8 => self.string(),
            9 if depth < 4 => {
                let (kind, length) = (self.number::<4>()?, self.number::<8>()?);
                self.values = self.values.saturating_add(length);
                if self.values > MAX_METADATA_VALUES {
                    return Err(format!("the metadata holds more than {MAX_METADATA_VALUES} values"));
                }
                (0..length).try_for_each(|_| self.value(kind, depth + 1))
            }
            other => Err(format!("metadata type {other} is unknown or nested too deeply")),
        }
    }
    fn header(&mut self) -> Result<(), String> {
        if self.number::<4>()? != 0x4655_4747 {
            return Err("does not begin with `GGUF`".into());
        }
        let version = self.number::<4>()?;
        if !(2..=3).contains(&version) {
            return Err(format!("GGUF version {version} is not 2 or 3"));
        }
        let (tensors, entries) = (self.number::<8>()?, self.number::<8>()?);
        if tensors > MAX_ENTRIES || entries > MAX_ENTRIES {
            return Err(format!("{tensors} tensors and {entries} metadata entries, at most {MAX_ENTRIES} are read"));
        }
        for _ in 0..entries {
            self.string()?;
            let kind = self.number::<4>()?;
            self.value(kind, 0)?;
        }
        for _ in 0..tensors {
            self.string()?;
            let dimensions = self.number::<4>()?;
            if dimensions > 4 {
                return Err(format!("a tensor with {dimensions} dimensions, at most 4 are possible"));
            }
            self.skip(dimensions * 8 + 4 + 8)?;
        }
        Ok(())
    }
}

impl Gguf {
    /// Bytes of the file.
    pub fn file_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Maps and checks a GGUF file.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = MappedFile::open(path).map_err(Error::io("read", path))?;
        Walk { bytes: &bytes, at: 0, values: 0 }.header().map_err(|p| Error::invalid(path, p))?;
        let content = Content::read(&mut Cursor::new(&bytes[..])).map_err(|e| {
            Error::invalid(path, format!("is not a readable GGUF file: {}", first_line(&e.to_string())))
        })?;
        Ok(Self { path: path.to_path_buf(), content, bytes })
    }

    /// `general.architecture`.
    pub fn architecture(&self) -> &str {
        self.text("general.architecture").unwrap_or("")
    }

    /// A string of the metadata.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.content.metadata.get(key) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        }
    }

    /// A number of the metadata, whatever its width.
    pub fn number(&self, key: &str) -> Option<f64> {
        Some(match self.content.metadata.get(key)? {
            Value::U8(v) => f64::from(*v),
            Value::I8(v) => f64::from(*v),
            Value::U16(v) => f64::from(*v),
            Value::I16(v) => f64::from(*v),
            Value::U32(v) => f64::from(*v),
            Value::I32(v) => f64::from(*v),
            Value::U64(v) => *v as f64,
            Value::I64(v) => *v as f64,
            Value::F32(v) => f64::from(*v),
            Value::F64(v) => *v,
            _ => return None,
        })
    }

    pub(crate) fn size(&self, key: &str) -> Result<Option<usize>> {
        match self.number(key) {
            None => Ok(None),
            Some(v) if (1.0..4e9).contains(&v) && v.fract() == 0.0 => Ok(Some(v as usize)),
            Some(v) => Err(Error::invalid(&self.path, format!("`{key}` should be a positive whole number, found {v}"))),
        }
    }

    /// Type, dimensions (outermost first) and raw bytes of a tensor, by its name in the file.
    pub fn tensor(&self, name: &str) -> Result<Option<RawTensor<'_, GgmlDType>>> {
        let Some(info) = self.content.tensor_infos.get(name) else { return Ok(None) };
        let fail = |problem: String| Error::invalid(&self.path, format!("tensor `{name}`: {problem}"));
        let dims = info.shape.dims().to_vec();
        let elements = dims
            .iter()
            .try_fold(1usize, |n, &d| n.checked_mul(d))
            .ok_or_else(|| fail(format!("shape {dims:?} is too large")))?;
        let (block, size) = (info.ggml_dtype.block_size(), info.ggml_dtype.type_size());
        if !elements.is_multiple_of(block) {
            return Err(fail(format!("{elements} values do not divide into blocks of {block}")));
        }
        let range = (elements / block).checked_mul(size).and_then(|length| {
            let start = usize::try_from(self.content.tensor_data_offset.checked_add(info.offset)?).ok()?;
            Some(start..start.checked_add(length)?)
        });
        let bytes = range.and_then(|range| self.bytes.get(range));
        let bytes = bytes.ok_or_else(|| fail("lies beyond the end of the file".to_string()))?;
        Ok(Some((info.ggml_dtype, dims, bytes)))
    }

    /// What is added to a vector in the file: Gemma's norms are stored as what they multiply by, 1 + their weight.
    pub fn offset(&self, file_name: &str) -> f64 {
        let raised = matches!(self.architecture(), "gemma2" | "gemma3") && file_name.ends_with("norm.weight");
        f64::from(u8::from(raised))
    }

    /// Rows of q and k stand pairwise interleaved in files of architecture `llama`; this gives their order in
    /// Hugging Face's files: element `i` of the result is the row of the file.
    pub fn row_order(&self, file_name: &str) -> Result<Option<Vec<usize>>> {
        let architecture = self.architecture();
        if architecture != "llama" {
            return Ok(None);
        }
        let size = |name: &str| self.size(&format!("{architecture}.{name}"));
        let heads = size("attention.head_count")?.unwrap_or(1);
        let kv_heads = size("attention.head_count_kv")?.unwrap_or(heads);
        let width = size("embedding_length")?.unwrap_or(0) / heads;
        let head_dim = size("attention.key_length")?.unwrap_or(width);
        Ok(row_order(architecture, HeadCounts { heads, kv_heads, head_dim }, file_name))
    }
}

/// Heads of a model's attention.
#[derive(Clone, Copy, Debug)]
pub struct HeadCounts {
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Width of one.
    pub head_dim: usize,
}

/// See [`Gguf::row_order`].
pub fn row_order(architecture: &str, counts: HeadCounts, file_name: &str) -> Option<Vec<usize>> {
    if architecture != "llama" {
        return None;
    }
    let heads = if file_name.contains(".attn_q.") {
        counts.heads
    } else if file_name.contains(".attn_k.") {
        counts.kv_heads
    } else {
        return None;
    };
    let (d, half) = (counts.head_dim, counts.head_dim / 2);
    let order = (0..heads * d).map(|row| {
        let (head, within) = (row / d, row % d);
        head * d + (within % half) * 2 + within / half
    });
    Some(order.collect())
}

/// Rows of equal length put in `order`.
pub fn reorder_rows<'a>(bytes: &'a [u8], order: Option<&[usize]>) -> Cow<'a, [u8]> {
    let Some(order) = order else { return Cow::Borrowed(bytes) };
    let length = bytes.len() / order.len().max(1);
    Cow::Owned(order.iter().flat_map(|&row| &bytes[row * length..(row + 1) * length]).copied().collect())
}

/// Hugging Face's module names and GGUF's.
type Names = &'static [(&'static str, &'static str)];
/// Those inside a layer.
const LAYER_NAMES: [(&str, &str); 10] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("input_layernorm", "attn_norm"),
];
/// Those that are others in some architectures, which go before the others.
const OWN_NAMES: [(&[&str], Names); 3] = [
    (
        &["gemma2", "gemma3"],
        &[
            ("post_attention_layernorm", "post_attention_norm"),
            ("pre_feedforward_layernorm", "ffn_norm"),
            ("post_feedforward_layernorm", "post_ffw_norm"),
        ],
    ),
    (
        &["phi3"],
        &[("self_attn.qkv_proj", "attn_qkv"), ("mlp.gate_up_proj", "ffn_up"), ("post_attention_layernorm", "ffn_norm")],
    ),
    (&[], &[("post_attention_layernorm", "ffn_norm")]),
];
const TOP_NAMES: [(&str, &str); 3] =
    [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];

/// Names inside a layer of an architecture, its own first.
fn layer_names(architecture: &str) -> impl Iterator<Item = &'static (&'static str, &'static str)> {
    let own = OWN_NAMES.iter().find(|(of, _)| of.is_empty() || of.contains(&architecture));
    own.map_or(&[][..], |(_, names)| names).iter().chain(&LAYER_NAMES)
}

/// `model.layers.3.self_attn.q_proj` → `blk.3.attn_q`.
pub fn module_to_gguf(architecture: &str, module: &str) -> Option<String> {
    if let Some((_, gguf)) = TOP_NAMES.iter().find(|(hf, _)| *hf == module) {
        return Some((*gguf).to_string());
    }
    let (layer, rest) = module.strip_prefix("model.layers.")?.split_once('.')?;
    let (_, gguf) = layer_names(architecture).find(|(hf, _)| *hf == rest)?;
    Some(format!("blk.{}.{gguf}", layer.parse::<usize>().ok()?))
}

/// `blk.3.attn_q` → `model.layers.3.self_attn.q_proj`.
pub fn module_from_gguf(architecture: &str, module: &str) -> Option<String> {
    if let Some((hf, _)) = TOP_NAMES.iter().find(|(_, gguf)| *gguf == module) {
        return Some((*hf).to_string());
    }
    let (layer, rest) = module.strip_prefix("blk.")?.split_once('.')?;
    let (hf, _) = layer_names(architecture).find(|(_, gguf)| *gguf == rest)?;
    Some(format!("model.layers.{}.{hf}", layer.parse::<usize>().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for name in ["model.layers.12.mlp.down_proj", "model.embed_tokens", "lm_head", "model.layers.0.input_layernorm"]
        {
            for architecture in ["llama", "gemma3", "phi3"] {
                let stored = module_to_gguf(architecture, name).unwrap();
                assert_eq!(module_from_gguf(architecture, &stored).unwrap(), name);
            }
        }
        assert_eq!(module_to_gguf("llama", "model.layers.x.mlp.down_proj"), None);
        // The same words name another norm.
        let norm = |architecture| module_to_gguf(architecture, "model.layers.0.post_attention_layernorm").unwrap();
        assert_eq!((norm("llama").as_str(), norm("gemma2").as_str()), ("blk.0.ffn_norm", "blk.0.post_attention_norm"));
    }
}
