//! A module's entries from one form of file into another.

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use super::positions::{compact, expand};
use crate::error::{Error, Result};
use crate::file::dialects::peft;

/// How the file holds entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// PEFT's.
    #[default]
    Peft,
    /// Positions by differences, values as trained.
    Compact,
    /// The same, values in f16.
    CompactF16,
}

/// A module's tensors in another form.
pub(super) fn reform_module(
    module: &str,
    own: &BTreeMap<String, Tensor>,
    form: Form,
) -> Result<Vec<(&'static str, Tensor)>> {
    let wrong = |key: &str| {
        let name = peft::tensor_name(module, key);
        Error::Mismatch(format!("tensor `{name}` does not hold positions of a weight"))
    };
    let [values, indices, positions] = ["shira_weight", "shira_indices", "shira_positions"].map(|key| own.get(key));
    let cast = |values: &Tensor| values.to_dtype(if form == Form::CompactF16 { DType::F16 } else { DType::F32 });
    let mut all = Vec::new();
    match (indices, positions) {
        (Some(indices), _) if form != Form::Peft => {
            let (order, sorted, width) = sorted_positions(indices).ok_or_else(|| wrong("shira_indices"))?;
            let k = order.len();
            let values = values.filter(|v| v.dims() == [k]).ok_or_else(|| wrong("shira_indices"))?;
            let values = values.index_select(&Tensor::from_vec(order, k, &Device::Cpu)?, 0)?;
            let bytes = compact(&sorted, width);
            let length = bytes.len();
            all.push(("shira_positions", Tensor::from_vec(bytes, length, &Device::Cpu)?));
            let values = if form == Form::CompactF16 { values.to_dtype(DType::F16)? } else { values };
            all.push(("shira_weight", values));
            return Ok(all);
        }
        (Some(indices), _) => all.push(("shira_indices", indices.clone())),
        (None, Some(positions)) if form != Form::Peft => all.push(("shira_positions", positions.clone())),
        (None, Some(positions)) => {
            let bytes = positions.to_vec1::<u8>().map_err(|_| wrong("shira_positions"))?;
            let (width, flat) = expand(&bytes).ok_or_else(|| wrong("shira_positions"))?;
            let k = flat.len();
            let rows = flat.iter().map(|p| (p / width) as i32);
            let indices: Vec<i32> = rows.chain(flat.iter().map(|p| (p % width) as i32)).collect();
            all.push(("shira_indices", Tensor::from_vec(indices, (2, k), &Device::Cpu)?));
        }
        (None, None) => {}
    }
    if let Some(values) = values {
        all.push(("shira_weight", cast(values)?));
    }
    Ok(all)
}

/// PEFT's indices (2, k) as places in the flat weight: the order that sorts them, the sorted places, and a width that holds all columns. None
/// where they are no such places.
fn sorted_positions(indices: &Tensor) -> Option<(Vec<u32>, Vec<u32>, u32)> {
    let indices = indices.to_dtype(DType::F64).ok()?.to_vec2::<f64>().ok()?;
    let [rows, columns] = &indices[..] else { return None };
    let most = |v: &[f64]| v.iter().copied().fold(0.0, f64::max) + 1.0;
    let (height, width) = (most(rows), most(columns));
    let sound = rows.iter().chain(columns).all(|v| *v >= 0.0 && v.fract() == 0.0);
    if !sound || height * width > f64::from(1u32 << 31) {
        return None;
    }
    let flat: Vec<u32> = rows.iter().zip(columns).map(|(r, c)| (r * width + c) as u32).collect();
    let mut order: Vec<u32> = (0..flat.len() as u32).collect();
    order.sort_by_key(|&i| flat[i as usize]);
    let sorted: Vec<u32> = order.iter().map(|&i| flat[i as usize]).collect();
    (!sorted.windows(2).any(|w| w[0] == w[1])).then_some((order, sorted, width as u32))
}
