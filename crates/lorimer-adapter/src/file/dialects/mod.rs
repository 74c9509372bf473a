//! How tools name the low-rank factors that a file holds: one table a tool, for reading and for writing.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use lorimer_model::weights::gguf::{module_from_gguf, module_to_gguf};

use crate::error::{Error, Result};

pub(crate) mod flylora;
pub(crate) mod lora_xs;
pub mod mlx;
pub mod peft;

/// Part of a module's low-rank change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Factor {
    /// A.
    A,
    /// B.
    B,
    /// α, one number.
    Alpha,
}

/// How module paths are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// As they are.
    Dotted,
    /// With underscores for dots.
    Underscored,
    /// As llama.cpp names the modules of the base's architecture.
    LlamaCpp,
}

/// Where a file says what the product of the factors is scaled by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// An α beside each module's factors; α is the rank where there is none.
    AlphaTensor,
    /// The same where one is read; written into B.
    InB,
    /// Outside of the tensors.
    Outside,
}

/// How one tool names factors in a file.
pub struct Dialect {
    /// The tool.
    pub name: &'static str,
    /// What stands before a module's name; the first is written.
    prefixes: &'static [&'static str],
    spelling: Spelling,
    /// What stands behind it; of each factor the first is written.
    ends: &'static [(&'static str, Factor)],
    /// Whether factors are (inputs, rank) and (rank, outputs).
    transposed: bool,
    /// Where the scaling is.
    pub scale: Scale,
}

/// kohya's scripts: one safetensors file.
pub const KOHYA: Dialect = Dialect {
    name: "kohya",
    prefixes: &["lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_unet_", "lora_"],
    spelling: Spelling::Underscored,
    ends: &[(".lora_down.weight", Factor::A), (".lora_up.weight", Factor::B), (".alpha", Factor::Alpha)],
    transposed: false,
    scale: Scale::AlphaTensor,
};

/// llama.cpp: a GGUF file with one α in its metadata.
pub const LLAMA_CPP: Dialect = Dialect {
    name: "llama.cpp",
    prefixes: &[""],
    spelling: Spelling::LlamaCpp,
    ends: &[(".weight.lora_a", Factor::A), (".weight.lora_b", Factor::B)],
    transposed: false,
    scale: Scale::Outside,
};

/// mlx-lm: `adapters.safetensors` with one scale in the `adapter_config.json` beside it.
pub const MLX: Dialect = Dialect {
    name: "mlx-lm",
    prefixes: &[""],
    spelling: Spelling::Dotted,
    ends: &[(".lora_a", Factor::A), (".lora_b", Factor::B)],
    transposed: true,
    scale: Scale::Outside,
};

/// diffusers, of a pipeline's text encoder: one safetensors file. It writes PEFT's ends; older versions wrote the others.
pub const DIFFUSERS: Dialect = Dialect {
    name: "diffusers",
    prefixes: &["text_encoder.", "text_encoder_2.", "text_encoder_3."],
    spelling: Spelling::Dotted,
    ends: &[
        (".lora_A.weight", Factor::A),
        (".lora_B.weight", Factor::B),
        (".lora_linear_layer.down.weight", Factor::A),
        (".lora_linear_layer.up.weight", Factor::B),
        (".alpha", Factor::Alpha),
    ],
    transposed: false,
    scale: Scale::InB,
};

/// Those whose files are safetensors without a folder of PEFT's.
pub const SAFETENSORS: [&Dialect; 3] = [&KOHYA, &MLX, &DIFFUSERS];

/// A module's factors.
pub struct Factors {
    /// (rank, inputs).
    pub a: Tensor,
    /// (outputs, rank).
    pub b: Tensor,
    /// α, where the file has one.
    pub alpha: Option<f64>,
}

/// Roles of the projections that a name with underscores may end with.
const ROLES: [&str; 9] =
    ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"];

/// `layers_3_self_attn_q_proj`, with or without `model_` → `model.layers.3.self_attn.q_proj`.
fn from_underscores(name: &str) -> Option<String> {
    if name == "lm_head" {
        return Some("lm_head".into());
    }
    let rest = name.strip_prefix("model_").unwrap_or(name).strip_prefix("layers_")?;
    let (layer, rest) = rest.split_once('_')?;
    let layer: usize = layer.parse().ok()?;
    let (block, role) = match rest.strip_prefix("self_attn_") {
        Some(role) => ("self_attn", role),
        None => ("mlp", rest.strip_prefix("mlp_")?),
    };
    ROLES.contains(&role).then(|| format!("model.layers.{layer}.{block}.{role}"))
}

impl Spelling {
    fn read(self, name: &str, architecture: &str) -> Option<String> {
        match self {
            Self::Dotted => (!name.is_empty()).then(|| name.to_string()),
            Self::Underscored => from_underscores(name),
            Self::LlamaCpp => module_from_gguf(architecture, name),
        }
    }

    fn write(self, module: &str, architecture: &str) -> Option<String> {
        let name = match self {
            Self::Dotted => module.to_string(),
            Self::Underscored => module.replace('.', "_"),
            Self::LlamaCpp => module_to_gguf(architecture, module)?,
        };
        (self.read(&name, architecture).as_deref() == Some(module)).then_some(name)
    }
}

/// The beginning of a name, for a message.
fn short(name: &str) -> String {
    name.chars().take(80).collect()
}

impl Dialect {
    /// A tensor's name taken apart, into the module's name as it is written, prefix included, and which factor it is.
    pub fn split<'n>(&self, name: &'n str) -> Option<(&'n str, Factor)> {
        let (stem, factor) = self.ends.iter().find_map(|(end, factor)| Some((name.strip_suffix(end)?, *factor)))?;
        self.prefixes.iter().any(|prefix| stem.starts_with(prefix)).then_some((stem, factor))
    }

    fn end(&self, factor: Factor) -> &'static str {
        self.ends.iter().find(|(_, f)| *f == factor).map_or("", |(end, _)| end)
    }

    /// The name of a module's factor; None where the module has none here. `architecture`: of the base, in llama.cpp's files.
    pub fn name_of(&self, module: &str, factor: Factor, architecture: &str) -> Option<String> {
        let name = self.spelling.write(module, architecture)?;
        Some(format!("{}{name}{}", self.prefixes.first().copied().unwrap_or_default(), self.end(factor)))
    }

    /// A module's path from its name as it is written, prefix included.
    fn module(&self, stem: &str, architecture: &str) -> Option<String> {
        let rest = |prefix: &&str| stem.strip_prefix(*prefix).and_then(|rest| self.spelling.read(rest, architecture));
        self.prefixes.iter().find_map(rest)
    }

    /// A factor as it is stored, from (rank, inputs) or (outputs, rank), and back.
    pub fn turned(&self, t: &Tensor) -> Result<Tensor> {
        Ok(if self.transposed { t.t()?.contiguous()? } else { t.clone() })
    }

    /// Every module's factors out of a file's tensors, each of which has to be a factor of a module that is whole.
    ///
    /// # Errors
    ///
    /// Fails, as `fail` says, if a tensor has no name in this dialect or belongs to no known module, if a factor is missing or there twice, or
    /// if factors have no rank in common; and as `load` does.
    pub fn read(
        &self,
        names: &[String],
        architecture: &str,
        load: &dyn Fn(&str) -> Result<Option<Tensor>>,
        fail: &dyn Fn(String) -> Error,
    ) -> Result<BTreeMap<String, Factors>> {
        let mut stems: BTreeMap<&str, BTreeMap<Factor, Tensor>> = BTreeMap::new();
        for name in names {
            let Some((stem, factor)) = self.split(name) else {
                return Err(fail(format!("tensor `{}` has no name that {} gives to factors", short(name), self.name)));
            };
            let Some(tensor) = load(name)? else { return Err(fail(format!("lacks tensor `{}`", short(name)))) };
            if stems.entry(stem).or_default().insert(factor, tensor).is_some() {
                return Err(fail(format!("`{}` has two tensors for {factor:?}", short(stem))));
            }
        }
        let mut modules = BTreeMap::new();
        for (stem, mut parts) in stems {
            let Some(module) = self.module(stem, architecture) else {
                return Err(fail(format!("`{}` is no module of a model that is known here", short(stem))));
            };
            let lacks = |factor| fail(format!("`{stem}` lacks {}", self.end(factor).trim_start_matches('.')));
            let a = self.turned(&parts.remove(&Factor::A).ok_or_else(|| lacks(Factor::A))?)?;
            let b = self.turned(&parts.remove(&Factor::B).ok_or_else(|| lacks(Factor::B))?)?;
            if a.dims().len() != 2 || b.dims().len() != 2 || a.dim(0)? == 0 || a.dim(0)? != b.dim(1)? {
                let text = format!("`{stem}`: A {:?} and B {:?} have no rank in common", a.dims(), b.dims());
                return Err(fail(text));
            }
            let alpha = match parts.remove(&Factor::Alpha) {
                None => None,
                Some(t) if t.elem_count() == 1 => {
                    Some(t.flatten_all()?.to_dtype(DType::F64)?.get(0)?.to_scalar::<f64>()?)
                }
                Some(t) => {
                    return Err(fail(format!("`{stem}.alpha` should be one number, found {:?}", t.dims())));
                }
            };
            if modules.insert(module, Factors { a, b, alpha }).is_some() {
                return Err(fail(format!("`{stem}` is the second that the file has for its module")));
            }
        }
        Ok(modules)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_every_projection_go_both_ways_in_every_dialect() {
        for role in ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"] {
            let module = format!("model.layers.11.{role}");
            for dialect in [&KOHYA, &LLAMA_CPP, &MLX, &DIFFUSERS] {
                for factor in [Factor::A, Factor::B] {
                    let name = dialect.name_of(&module, factor, "llama").unwrap();
                    let (stem, found) = dialect.split(&name).unwrap();
                    assert_eq!(
                        (dialect.module(stem, "llama").as_deref(), found),
                        (Some(module.as_str()), factor),
                        "{name}"
                    );
                }
            }
        }
        let fused = "model.layers.11.self_attn.qkv_proj";
        assert_eq!(
            KOHYA.name_of(fused, Factor::A, "").unwrap(),
            "lora_te_model_layers_11_self_attn_qkv_proj.lora_down.weight"
        );
        assert_eq!(KOHYA.module("lora_te_text_model_encoder_layers_0_self_attn_q_proj", ""), None);
        // A module whose name with underscores would be read as another's has none.
        assert_eq!(KOHYA.name_of("layers.11.self_attn.q_proj", Factor::A, ""), None);
    }
}
