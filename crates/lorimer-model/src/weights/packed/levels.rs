//! `lorimer-nf` and bitsandbytes' 4 bits: codes in blocks with scales.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use lorimer_tensor::FrozenWeight;
use lorimer_tensor::storage::levels::{DoubleScales, Levels, ScaleType, Scales};
use lorimer_tensor::storage::normal_float::{self, NfConfig};
use lorimer_tensor::storage::{bits, nf4};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::checkpoint::{Checkpoint, Packed, floats};
use crate::error::Result;

/// `quant_method` of a checkpoint in LQ-LoRA's NormalFloat.
pub const FORMAT: &str = "lorimer-nf";
/// Longest `quant_state` that is read.
const MAX_STATE: usize = 1 << 16;

/// How one weight of a `lorimer-nf` checkpoint is kept: an entry of `quantization_config.modules`, with the names that LQ-LoRA's code has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NormalFloatModule {
    /// (outputs, inputs).
    pub shape: (usize, usize),
    /// b.
    pub num_bits: usize,
    /// b₀.
    pub num_bits_0: usize,
    /// b₁: `bf16`, `fp16` or `fp32`.
    pub num_bits_1: String,
    /// B₀.
    pub block_size_0: usize,
    /// B₁.
    pub block_size_1: usize,
}

impl NormalFloatModule {
    /// A configuration as it is written.
    pub fn of(shape: (usize, usize), config: &NfConfig) -> Self {
        Self {
            shape,
            num_bits: config.bits,
            num_bits_0: config.scale_bits,
            num_bits_1: scale_name(config.scale_type).into(),
            block_size_0: config.block,
            block_size_1: config.scale_block,
        }
    }

    /// The configuration, checked.
    ///
    /// # Errors
    ///
    /// Fails if a number is out of its range or the type unknown.
    pub fn config(&self) -> candle_core::Result<NfConfig> {
        let scale_type = [ScaleType::Bf16, ScaleType::F16, ScaleType::F32].into_iter();
        let Some(scale_type) = scale_type.into_iter().find(|kind| scale_name(*kind) == self.num_bits_1) else {
            let shown: String = self.num_bits_1.chars().take(20).collect();
            candle_core::bail!("`num_bits_1` is `{}`; it is bf16, fp16 or fp32", shown.escape_debug());
        };
        let config = NfConfig {
            bits: self.num_bits,
            scale_bits: self.num_bits_0,
            scale_type,
            block: self.block_size_0,
            scale_block: self.block_size_1,
        };
        config.check()?;
        Ok(config)
    }
}

/// `bf16`, `fp16` or `fp32`, as LQ-LoRA's code names them.
fn scale_name(kind: ScaleType) -> &'static str {
    match kind {
        ScaleType::Bf16 => "bf16",
        ScaleType::F16 => "fp16",
        ScaleType::F32 => "fp32",
    }
}

fn scale_dtype(kind: ScaleType) -> DType {
    match kind {
        ScaleType::Bf16 => DType::BF16,
        ScaleType::F16 => DType::F16,
        ScaleType::F32 => DType::F32,
    }
}

/// Numbers in a matrix, where that is a number.
fn count(shape: (usize, usize)) -> Option<usize> {
    // Bits of the codes must be countable too.
    shape.0.checked_mul(shape.1).filter(|count| *count > 0 && count.checked_mul(8).is_some())
}

pub(super) fn normal_float(checkpoint: &Checkpoint<'_, '_>) -> Result<BTreeMap<String, Packed<NormalFloatModule>>> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Settings {
        quant_method: String,
        modules: BTreeMap<String, NormalFloatModule>,
    }
    let settings: Settings = serde_json::from_value(Value::Object(checkpoint.settings.clone()))
        .map_err(|e| checkpoint.invalid(format!("`quantization_config` is not that of {FORMAT}: {e}")))?;
    let mut weights = BTreeMap::new();
    for (module, own) in settings.modules {
        let shown = module.escape_debug();
        let config = own.config().map_err(|e| checkpoint.invalid(format!("module `{shown}`: {e}")))?;
        let Some(count) = count(own.shape) else {
            return Err(checkpoint.invalid(format!("module `{shown}` has shape {:?}", own.shape)));
        };
        let name = format!("{module}.weight");
        let (_, shape, _) = checkpoint.tensor(&name, &[DType::U8], 1)?;
        if shape[0] != bits::bytes(count, config.bits) {
            let (found, wanted) = (shape[0], bits::bytes(count, config.bits));
            return Err(checkpoint
                .invalid(format!("tensor `{}` has {found} bytes, {wanted} were expected", name.escape_debug())));
        }
        let bytes = config.bytes(count) + 4;
        weights.insert(name, Packed { shape: own.shape, bytes, kind: own });
    }
    Ok(weights)
}

pub(super) fn load_normal_float(
    checkpoint: &Checkpoint<'_, '_>,
    name: &str,
    module: &NormalFloatModule,
) -> Result<FrozenWeight> {
    let config = module.config()?;
    let (_, _, codes) = checkpoint.tensor(name, &[DType::U8], 1)?;
    let (_, _, scales) = checkpoint.tensor(&format!("{name}.absmax"), &[DType::U8], 1)?;
    let seconds = format!("{name}.nested_absmax");
    let (_, _, seconds) = checkpoint.tensor(&seconds, &[scale_dtype(config.scale_type)], 1)?;
    let (_, _, offset) = checkpoint.tensor(&format!("{name}.nested_offset"), &[DType::F32], 1)?;
    let offset = floats(offset).first().copied().unwrap_or_default();
    let parts = (codes.to_vec(), scales.to_vec(), seconds.to_vec());
    Ok(FrozenWeight::Levels(Arc::new(normal_float::stored(module.shape, &config, parts, offset)?)))
}

/// The tensors of a weight in a `lorimer-nf` checkpoint.
///
/// # Errors
///
/// Fails if the weight is not in NormalFloat with LQ-LoRA's scales.
pub fn normal_float_tensors(name: &str, levels: &Levels) -> candle_core::Result<Vec<(String, Tensor)>> {
    let Scales::Double(double) = levels.scales() else { candle_core::bail!("`{name}` has plain scales") };
    let bytes = |bytes: &[u8]| Tensor::from_slice(bytes, bytes.len(), &Device::Cpu);
    let dtype = scale_dtype(double.kind);
    let seconds = [double.seconds.len() / double.kind.bytes()];
    Ok(vec![
        (name.to_string(), bytes(levels.codes())?),
        (format!("{name}.absmax"), bytes(&double.codes)?),
        (format!("{name}.nested_absmax"), Tensor::from_raw_buffer(&double.seconds, dtype, &seconds, &Device::Cpu)?),
        (format!("{name}.nested_offset"), Tensor::from_slice(&[double.offset], 1, &Device::Cpu)?),
    ])
}

/// bitsandbytes' `quant_state`, a JSON in a tensor of its own.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct QuantState {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nested_blocksize: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nested_dtype: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nested_offset: Option<f32>,
}

/// Ends of the name of a weight's `quant_state`.
const STATES: [&str; 2] = [".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"];

pub(super) fn bitsandbytes(checkpoint: &Checkpoint<'_, '_>) -> Result<BTreeMap<String, Packed<QuantState>>> {
    if checkpoint.flag("load_in_8bit", false)? || !checkpoint.flag("load_in_4bit", true)? {
        return Err(checkpoint.invalid(
            "the weights are in bitsandbytes' 8 bits (LLM.int8); its 4 bits are read, or use the model before it was packed",
        ));
    }
    let mut weights = BTreeMap::new();
    for end in STATES {
        for name in checkpoint.ending(end) {
            let state_name = format!("{name}{end}");
            let (_, _, bytes) = checkpoint.tensor(&state_name, &[DType::U8], 1)?;
            let invalid = |what: String| checkpoint.invalid(format!("tensor `{}` {what}", state_name.escape_debug()));
            if bytes.len() > MAX_STATE {
                return Err(invalid(format!("has {} bytes, at most {MAX_STATE} are read", bytes.len())));
            }
            let state: QuantState =
                serde_json::from_slice(bytes).map_err(|e| invalid(format!("is not the JSON of a quant_state: {e}")))?;
            let shape = match state.shape[..] {
                [outputs, inputs] => (outputs, inputs),
                _ => return Err(invalid(format!("has shape {:?}, not that of a matrix", state.shape))),
            };
            let blocks = state.blocksize.is_power_of_two() && (32..=4096).contains(&state.blocksize);
            let Some(count) = count(shape).filter(|_| blocks && end.ends_with(&state.quant_type)) else {
                let (kind, block) = (state.quant_type.escape_debug(), state.blocksize);
                return Err(invalid(format!("is of `{kind}` in blocks of {block} and shape {:?}", state.shape)));
            };
            if state.nested_blocksize == Some(0) {
                return Err(invalid("has nested blocks of 0".into()));
            }
            let (_, packed, _) = checkpoint.tensor(&name, &[DType::U8], 2)?;
            if packed.iter().product::<usize>() != count.div_ceil(2) {
                let wanted = count.div_ceil(2);
                let shown = name.escape_debug();
                return Err(
                    checkpoint.invalid(format!("tensor `{shown}` has shape {packed:?}, {wanted} bytes were expected"))
                );
            }
            let scales = count.div_ceil(state.blocksize);
            let bytes = count.div_ceil(2)
                + match state.nested_blocksize {
                    Some(nested) => scales + scales.div_ceil(nested) * 4 + 4,
                    None => scales * 4,
                };
            weights.insert(name, Packed { shape, bytes, kind: state });
        }
    }
    Ok(weights)
}

pub(super) fn load_bitsandbytes(
    checkpoint: &Checkpoint<'_, '_>,
    name: &str,
    state: &QuantState,
) -> Result<FrozenWeight> {
    let (_, _, codes) = checkpoint.tensor(name, &[DType::U8], 2)?;
    let (_, _, map) = checkpoint.tensor(&format!("{name}.quant_map"), &[DType::F32], 1)?;
    let absmax = format!("{name}.absmax");
    let scales = match state.nested_blocksize {
        None => {
            let (_, _, scales) = checkpoint.tensor(&absmax, &[DType::F32], 1)?;
            Scales::Plain(floats(scales))
        }
        Some(block) => {
            let (_, _, scales) = checkpoint.tensor(&absmax, &[DType::U8], 1)?;
            let (_, _, seconds) = checkpoint.tensor(&format!("{name}.nested_absmax"), &[DType::F32], 1)?;
            let (_, _, table) = checkpoint.tensor(&format!("{name}.nested_quant_map"), &[DType::F32], 1)?;
            let table: Box<[f32; 256]> = floats(table).into_boxed_slice().try_into().map_err(|_| {
                checkpoint.invalid(format!("tensor `{}.nested_quant_map` should have 256 values", name.escape_debug()))
            })?;
            Scales::Double(DoubleScales {
                codes: scales.to_vec(),
                bits: 8,
                table: Some(table),
                block,
                seconds: seconds.to_vec(),
                kind: ScaleType::F32,
                offset: state.nested_offset.unwrap_or_default(),
            })
        }
    };
    let shape = (state.shape[0], state.shape[1]);
    let kind = if state.quant_type == "nf4" { "nf4" } else { "fp4" };
    let levels = Levels::new(kind, (shape, 4), floats(map), (state.blocksize, codes.to_vec()), scales)?;
    Ok(FrozenWeight::Levels(Arc::new(levels)))
}

/// The tensors of a weight in NF4 with double quantisation, as bitsandbytes writes them.
///
/// # Errors
///
/// Fails if the values do not fit the shape.
pub fn bitsandbytes_tensors(
    name: &str,
    values: &[f32],
    shape: (usize, usize),
) -> candle_core::Result<Vec<(String, Tensor)>> {
    let levels = nf4::quantise(values, shape)?;
    let Scales::Double(double) = levels.scales() else { candle_core::bail!("`{name}` has plain scales") };
    let state = QuantState {
        quant_type: "nf4".into(),
        blocksize: nf4::BLOCK,
        dtype: "float32".into(),
        shape: vec![shape.0, shape.1],
        nested_blocksize: Some(nf4::SCALES),
        nested_dtype: Some("float32".into()),
        nested_offset: Some(double.offset),
    };
    let state = serde_json::to_vec(&state).map_err(candle_core::Error::wrap)?;
    let bytes = |bytes: &[u8]| Tensor::from_slice(bytes, bytes.len(), &Device::Cpu);
    let numbers = |values: &[f32]| Tensor::from_slice(values, values.len(), &Device::Cpu);
    let table = double.table.as_deref().map_or(&[][..], |table| table.as_slice());
    Ok(vec![
        (name.to_string(), bytes(levels.codes())?.reshape(((), 1))?),
        (format!("{name}.absmax"), bytes(&double.codes)?),
        (format!("{name}.nested_absmax"), numbers(&floats(&double.seconds))?),
        (format!("{name}.nested_quant_map"), numbers(table)?),
        (format!("{name}.quant_map"), numbers(levels.levels())?),
        (format!("{name}{}", STATES[0]), bytes(&state)?),
    ])
}
