//! GPTQ's and AWQ's 4 bits: whole numbers with a scale and a zero point a group of inputs.
//!
//! Eight numbers stand in 32 bits. GPTQ packs along inputs, zero points along outputs; its first format keeps a zero point less one (and takes 15 + 1 as
//! 0, as AutoGPTQ does). AWQ packs both along outputs, in the order 0 2 4 6 1 3 5 7. Writing is the reverse.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Result as TensorResult, Tensor};
use half::f16;
use lorimer_tensor::FrozenWeight;
use lorimer_tensor::storage::affine::{Affine, bytes as affine_bytes};

use super::checkpoint::{Checkpoint, Packed};
use crate::error::Result;

/// Numbers of 4 bits in 32 bits.
const PACK: usize = 8;
/// The place in 32 bits of each of GPTQ's eight numbers.
const GPTQ_PLACES: [usize; PACK] = [0, 1, 2, 3, 4, 5, 6, 7];
/// The place in 32 bits of each of AWQ's eight outputs.
const AWQ_PLACES: [usize; PACK] = [0, 4, 1, 5, 2, 6, 3, 7];

pub(super) struct Gptq {
    group: usize,
    /// What a stored zero point lacks.
    lacks: u8,
    /// Whether inputs belong to groups in another order than they stand.
    ordered: bool,
}

pub(super) struct Awq {
    group: usize,
}

/// Number `place` of the 32 bits at `at`.
fn number(bytes: &[u8], at: usize, place: usize) -> u8 {
    let byte = bytes[at * 4 + place / 2];
    if place.is_multiple_of(2) { byte & 15 } else { byte >> 4 }
}

/// Group size of `inputs`, where −1 is all of them.
fn group_of(checkpoint: &Checkpoint<'_, '_>, keys: &[&str], inputs: usize) -> Result<usize> {
    match checkpoint.number(keys)? {
        None => Ok(128),
        Some(-1) => Ok(inputs),
        Some(n) if n > 0 => Ok(n as usize),
        Some(n) => Err(checkpoint.invalid(format!("quantization_config's group_size is {n}; it is −1 or more than 0"))),
    }
}

fn four_bits(checkpoint: &Checkpoint<'_, '_>, keys: &[&str], method: &str) -> Result<()> {
    match checkpoint.number(keys)? {
        Some(4) => Ok(()),
        other => {
            let bits = other.map_or("no".to_string(), |n| n.to_string());
            Err(checkpoint.invalid(format!("the weights are in {method} with {bits} bits; its 4 bits are read")))
        }
    }
}

/// Refuses a text of the settings that is none of these.
fn one_of(checkpoint: &Checkpoint<'_, '_>, key: &str, known: &[&str]) -> Result<()> {
    match checkpoint.settings.get(key) {
        None | Some(serde_json::Value::Null) => Ok(()),
        Some(v) if v.as_str().is_some_and(|v| known.iter().any(|k| k.eq_ignore_ascii_case(v))) => Ok(()),
        Some(v) => {
            let shown: String = v.to_string().chars().take(40).collect();
            Err(checkpoint
                .invalid(format!("quantization_config's `{key}` is {shown}; {} can be read", known.join(", "))))
        }
    }
}

/// Shape of a matrix of `qweight`; its tensors' sizes must fit it.
fn sized(checkpoint: &Checkpoint<'_, '_>, module: &str, along_inputs: bool) -> Result<(usize, usize)> {
    let (_, packed, _) = checkpoint.tensor(&format!("{module}.qweight"), &[DType::I32], 2)?;
    let numbers = |n: usize| n.checked_mul(PACK).filter(|n| *n > 0);
    let shape = match along_inputs {
        true => numbers(packed[0]).map(|inputs| (packed[1], inputs)),
        false => numbers(packed[1]).map(|outputs| (outputs, packed[0])),
    };
    match shape.filter(|(outputs, inputs)| *outputs > 0 && *inputs > 0 && outputs.checked_mul(*inputs).is_some()) {
        Some(shape) => Ok(shape),
        None => Err(checkpoint.invalid(format!("tensor `{}.qweight` has shape {packed:?}", module.escape_debug()))),
    }
}

/// Refuses scales or zero points of another shape than (groups, outputs).
fn expect(checkpoint: &Checkpoint<'_, '_>, name: &str, found: &[usize], wanted: [usize; 2]) -> Result<()> {
    match found == wanted {
        true => Ok(()),
        false => {
            let name = name.escape_debug();
            Err(checkpoint.invalid(format!("tensor `{name}` has shape {found:?}, {wanted:?} was expected")))
        }
    }
}

pub(super) fn gptq(checkpoint: &Checkpoint<'_, '_>) -> Result<BTreeMap<String, Packed<Gptq>>> {
    four_bits(checkpoint, &["bits"], "GPTQ")?;
    one_of(checkpoint, "checkpoint_format", &["gptq", "gptq_v2"])?;
    one_of(checkpoint, "pack_dtype", &["int32"])?;
    let dynamic = checkpoint.settings.get("dynamic");
    if dynamic.and_then(|v| v.as_object()).is_some_and(|map| !map.is_empty()) {
        return Err(checkpoint
            .invalid("quantization_config's `dynamic` gives modules settings of their own, which is not read"));
    }
    if checkpoint.flag("is_marlin_format", false)? {
        return Err(checkpoint.invalid("the weights are in Marlin's order; GPTQ's own formats are read"));
    }
    let second = checkpoint.settings.get("checkpoint_format").and_then(|v| v.as_str()) == Some("gptq_v2");
    let mut weights = BTreeMap::new();
    for module in checkpoint.ending(".qweight") {
        let (outputs, inputs) = sized(checkpoint, &module, true)?;
        let group = group_of(checkpoint, &["group_size"], inputs)?;
        let groups = inputs.div_ceil(group);
        let scales = format!("{module}.scales");
        expect(checkpoint, &scales, &checkpoint.tensor(&scales, &[DType::F16], 2)?.1, [groups, outputs])?;
        let zeros = format!("{module}.qzeros");
        expect(checkpoint, &zeros, &checkpoint.tensor(&zeros, &[DType::I32], 2)?.1, [groups, outputs.div_ceil(PACK)])?;
        let order = order(checkpoint, &module, (inputs, groups), group)?;
        let kind = Gptq { group, lacks: u8::from(!second), ordered: order.is_some() };
        let bytes = affine_bytes((outputs, inputs), groups, kind.ordered);
        weights.insert(format!("{module}.weight"), Packed { shape: (outputs, inputs), bytes, kind });
    }
    Ok(weights)
}

/// The group of each input, where they are not one after the other.
fn order(
    checkpoint: &Checkpoint<'_, '_>,
    module: &str,
    (inputs, groups): (usize, usize),
    group: usize,
) -> Result<Option<Vec<u32>>> {
    let name = format!("{module}.g_idx");
    if (checkpoint.find)(&name)?.is_none() {
        return Ok(None);
    }
    let (_, shape, bytes) = checkpoint.tensor(&name, &[DType::I32], 1)?;
    let order: Vec<i32> = bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect();
    if shape[0] != inputs || order.iter().any(|&g| usize::try_from(g).map_or(true, |g| g >= groups)) {
        let name = name.escape_debug();
        return Err(checkpoint
            .invalid(format!("tensor `{name}` should name one of {groups} groups for each of {inputs} inputs")));
    }
    let plain = order.iter().enumerate().all(|(i, &g)| g as usize == i / group);
    Ok((!plain).then(|| order.into_iter().map(|g| g as u32).collect()))
}

/// Scales (groups, outputs) as (outputs, groups).
fn scales(checkpoint: &Checkpoint<'_, '_>, module: &str, outputs: usize) -> Result<Vec<f16>> {
    let (_, _, bytes) = checkpoint.tensor(&format!("{module}.scales"), &[DType::F16], 2)?;
    let of = |at: usize| f16::from_le_bytes([bytes[at * 2], bytes[at * 2 + 1]]);
    let groups = bytes.len() / 2 / outputs;
    Ok((0..outputs * groups).map(|at| of(at % groups * outputs + at / groups)).collect())
}

pub(super) fn load_gptq(
    checkpoint: &Checkpoint<'_, '_>,
    name: &str,
    (outputs, inputs): (usize, usize),
    kind: &Gptq,
) -> Result<FrozenWeight> {
    let module = name.strip_suffix(".weight").unwrap_or(name);
    let (_, _, codes) = checkpoint.tensor(&format!("{module}.qweight"), &[DType::I32], 2)?;
    let (_, packed, zeros) = checkpoint.tensor(&format!("{module}.qzeros"), &[DType::I32], 2)?;
    let groups = inputs.div_ceil(kind.group);
    let order = if kind.ordered { order(checkpoint, module, (inputs, groups), kind.group)? } else { None };
    let zero = |at: usize| {
        let (output, group) = (at / groups, at % groups);
        (number(zeros, group * packed[1] + output / PACK, output % PACK) + kind.lacks) & 15
    };
    let zeros: Vec<u8> = (0..outputs * groups).map(zero).collect();
    let code = |output: usize, input: usize| number(codes, input / PACK * outputs + output, input % PACK);
    let parts = (scales(checkpoint, module, outputs)?, zeros);
    Ok(FrozenWeight::Affine(Arc::new(Affine::new((outputs, inputs), code, parts, (kind.group, order))?)))
}

pub(super) fn awq(checkpoint: &Checkpoint<'_, '_>) -> Result<BTreeMap<String, Packed<Awq>>> {
    four_bits(checkpoint, &["bits", "w_bit"], "AWQ")?;
    one_of(checkpoint, "version", &["gemm"])?;
    if !checkpoint.flag("zero_point", true)? {
        return Err(checkpoint.invalid("the weights are in AWQ without zero points; those with zero points are read"));
    }
    let mut weights = BTreeMap::new();
    for module in checkpoint.ending(".qweight") {
        let (outputs, inputs) = sized(checkpoint, &module, false)?;
        let group = group_of(checkpoint, &["group_size", "q_group_size"], inputs)?;
        let groups = inputs.div_ceil(group);
        let scales = format!("{module}.scales");
        expect(checkpoint, &scales, &checkpoint.tensor(&scales, &[DType::F16], 2)?.1, [groups, outputs])?;
        let zeros = format!("{module}.qzeros");
        expect(checkpoint, &zeros, &checkpoint.tensor(&zeros, &[DType::I32], 2)?.1, [groups, outputs / PACK])?;
        let bytes = affine_bytes((outputs, inputs), groups, false);
        let weight = Packed { shape: (outputs, inputs), bytes, kind: Awq { group } };
        weights.insert(format!("{module}.weight"), weight);
    }
    Ok(weights)
}

pub(super) fn load_awq(
    checkpoint: &Checkpoint<'_, '_>,
    name: &str,
    (outputs, inputs): (usize, usize),
    kind: &Awq,
) -> Result<FrozenWeight> {
    let module = name.strip_suffix(".weight").unwrap_or(name);
    let (_, _, codes) = checkpoint.tensor(&format!("{module}.qweight"), &[DType::I32], 2)?;
    let (_, _, zeros) = checkpoint.tensor(&format!("{module}.qzeros"), &[DType::I32], 2)?;
    let groups = inputs.div_ceil(kind.group);
    let of = |bytes: &[u8], row: usize, output: usize| {
        number(bytes, row * (outputs / PACK) + output / PACK, AWQ_PLACES[output % PACK])
    };
    let zeros: Vec<u8> = (0..outputs * groups).map(|at| of(zeros, at % groups, at / groups)).collect();
    let parts = (scales(checkpoint, module, outputs)?, zeros);
    let code = |output: usize, input: usize| of(codes, input, output);
    Ok(FrozenWeight::Affine(Arc::new(Affine::new((outputs, inputs), code, parts, (kind.group, None))?)))
}

/// GPTQ's forms of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GptqFormat {
    /// `gptq`: a zero point is kept less one.
    First,
    /// `gptq_v2`: as it is.
    Second,
}

/// A matrix of `rows` rows of words, eight numbers of 4 bits each: `number(row, word, i)`.
fn words(
    (rows, columns): (usize, usize),
    places: [usize; PACK],
    number: impl Fn(usize, usize, usize) -> u8,
) -> TensorResult<Tensor> {
    let word = |at: usize| {
        let number = |i: usize| u32::from(number(at / columns, at % columns, i)) << (4 * places[i]);
        (0..PACK).fold(0, |word, i| word | number(i)).cast_signed()
    };
    Tensor::from_vec((0..rows * columns).map(word).collect::<Vec<i32>>(), (rows, columns), &Device::Cpu)
}

/// Refuses what cannot be written; scales (groups, outputs).
fn writable(module: &str, weight: &Affine, least: u8) -> TensorResult<Tensor> {
    let ((outputs, inputs), groups) = (weight.shape(), weight.groups());
    if !outputs.is_multiple_of(PACK) || !inputs.is_multiple_of(PACK) {
        candle_core::bail!("`{module}` has shape ({outputs}, {inputs}); multiples of {PACK} are packed");
    }
    let grids = (0..groups * outputs).map(|at| weight.grid(at % outputs, at / outputs));
    if let Some(grid) = grids.clone().find(|grid| !(least..=15).contains(&grid.zero)) {
        candle_core::bail!("`{module}` has a zero point of {}; {least} to 15 can be kept", grid.zero);
    }
    Tensor::from_vec(grids.map(|grid| grid.scale).collect::<Vec<f16>>(), (groups, outputs), &Device::Cpu)
}

/// The tensors of a module in a GPTQ checkpoint: `qweight`, `qzeros`, `scales` and `g_idx`.
///
/// # Errors
///
/// Fails if a side of the matrix is no multiple of 8, or if a zero point cannot be kept: 0 in the first format, where tools disagree on it, and 16.
pub fn gptq_tensors(module: &str, weight: &Affine, format: GptqFormat) -> TensorResult<Vec<(String, Tensor)>> {
    let ((outputs, inputs), groups) = (weight.shape(), weight.groups());
    let lacks = u8::from(format == GptqFormat::First);
    let scales = writable(module, weight, lacks)?;
    let codes = words((inputs / PACK, outputs), GPTQ_PLACES, |row, output, i| weight.code(output, row * PACK + i))?;
    let zeros = words((groups, outputs / PACK), GPTQ_PLACES, |group, word, i| {
        weight.grid(word * PACK + i, group).zero - lacks
    })?;
    let order: Vec<i32> = (0..inputs).map(|input| weight.group_of(input) as i32).collect();
    let order = Tensor::from_vec(order, inputs, &Device::Cpu)?;
    let name = |part: &str| format!("{module}.{part}");
    Ok(vec![(name("qweight"), codes), (name("qzeros"), zeros), (name("scales"), scales), (name("g_idx"), order)])
}

/// The tensors of a module in an AWQ checkpoint (gemm): `qweight`, `qzeros` and `scales`.
///
/// # Errors
///
/// Fails if a side of the matrix is no multiple of 8, if a zero point is 16, or if inputs are not in the order of their groups.
pub fn awq_tensors(module: &str, weight: &Affine) -> TensorResult<Vec<(String, Tensor)>> {
    let ((outputs, inputs), groups) = (weight.shape(), weight.groups());
    let scales = writable(module, weight, 0)?;
    if (1..inputs).any(|input| weight.group_of(input) < weight.group_of(input - 1)) {
        candle_core::bail!("`{module}` has inputs in another order than that of their groups, which AWQ cannot keep");
    }
    let codes = words((inputs, outputs / PACK), AWQ_PLACES, |input, word, i| weight.code(word * PACK + i, input))?;
    let zeros = words((groups, outputs / PACK), AWQ_PLACES, |group, word, i| weight.grid(word * PACK + i, group).zero)?;
    let name = |part: &str| format!("{module}.{part}");
    Ok(vec![(name("qweight"), codes), (name("qzeros"), zeros), (name("scales"), scales)])
}
