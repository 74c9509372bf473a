//! What stands in `lorimer.json` for a method's frozen parts, which are found again from the base or a seed: a hash, and a sketch
//! for machines that round differently.

use candle_core::{DType, Result as TensorResult, Tensor};
use lorimer_model::weights::hex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::delta::Delta;
use crate::error::{Error, Result};
use crate::file::bytes::raw_bytes;

/// How far a sketch may be from the recorded one, relative to the norm of the tensor.
const TOLERANCE: f64 = 1e-3;

/// The frozen parts of one module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FrozenParts {
    /// First 16 hexadecimal digits of the SHA-256 of all their bytes.
    pub hash: String,
    /// For each tensor its norm, and its inner product with signs that follow from the place.
    pub sketch: Vec<(f32, f32)>,
}

/// Norm, and Σ ±t with signs out of the place.
fn sketch(t: &Tensor) -> TensorResult<(f32, f32)> {
    let values = t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    let sign = |i: usize| match (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 63 {
        0 => 1.0,
        _ => -1.0,
    };
    let along: f64 = values.iter().enumerate().map(|(i, v)| sign(i) * v).sum();
    Ok((values.iter().map(|v| v * v).sum::<f64>().sqrt() as f32, along as f32))
}

impl FrozenParts {
    /// Of a module; None where it has none.
    ///
    /// # Errors
    ///
    /// Fails if a frozen part cannot be read as `f32`.
    pub fn of(delta: &dyn Delta) -> Result<Option<Self>> {
        let frozen = delta.frozen();
        if frozen.is_empty() {
            return Ok(None);
        }
        let mut hash = Sha256::new();
        for (key, t) in &frozen {
            hash.update(format!("|{key}|{:?}|", t.dims()).as_bytes());
            hash.update(raw_bytes(&t.to_dtype(DType::F32)?)?);
        }
        let sketch = frozen.iter().map(|(_, t)| sketch(t)).collect::<TensorResult<_>>()?;
        Ok(Some(Self { hash: hex(&hash.finalize())[..16].to_string(), sketch }))
    }

    /// Refuses a module whose frozen parts are others than the adapter was trained with.
    ///
    /// # Errors
    ///
    /// Fails if the frozen parts differ from the recorded ones by more than rounding.
    pub fn check(&self, module: &str, delta: &dyn Delta) -> Result<()> {
        let Some(now) = Self::of(delta)? else { return Ok(()) };
        if now.hash == self.hash {
            return Ok(());
        }
        let near = |(a, b): (&(f32, f32), &(f32, f32))| {
            let norm = f64::from(a.0.abs().max(1e-30));
            let close = |x: f32, y: f32| (f64::from(x) - f64::from(y)).abs() <= TOLERANCE * norm;
            close(a.0, b.0) && close(a.1, b.1)
        };
        match now.sketch.len() == self.sketch.len() && self.sketch.iter().zip(&now.sketch).all(near) {
            true => Ok(()),
            false => Err(Error::Mismatch(format!(
                "the frozen factors of `{module}` come out otherwise than when the adapter was trained; use the base it was trained on, in the same storage (--dtype), or an adapter saved with its frozen factors"
            ))),
        }
    }
}
