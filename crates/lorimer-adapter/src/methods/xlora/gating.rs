//! From a head's logits to gates.

use candle_core::{D, Result, Tensor};

use crate::methods::routing::top_k;

/// How weights come out of the head's numbers, and which of them count.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gating {
    /// Softmax over the experts, of numbers divided by the temperature.
    pub softmax: bool,
    /// The temperature.
    pub temperature: f64,
    /// How many experts count, the largest first; the others are 0.
    pub top_k: Option<usize>,
    /// Softmax over those that are not 0.
    pub softmax_top_k: bool,
}

/// e^x over its sum along the last dimension, where `keep` (0 or 1) says what takes part; a row without any is 0.
fn softmax(x: &Tensor, keep: Option<&Tensor>) -> Result<Tensor> {
    let largest = match keep {
        // What takes no part is far below every number that does.
        Some(keep) => (x.detach() + ((keep - 1.0)? * 1e30)?)?.max_keepdim(D::Minus1)?,
        None => x.detach().max_keepdim(D::Minus1)?,
    };
    let shifted = x.broadcast_sub(&largest)?;
    let e = match keep {
        Some(keep) => ((shifted * keep)?.exp()? * keep)?,
        None => shifted.exp()?,
    };
    let sum = e.sum_keepdim(D::Minus1)?;
    let empty = sum.detach().eq(0.0)?.to_dtype(sum.dtype())?;
    e.broadcast_div(&(sum + empty)?)
}

impl Gating {
    /// λ of logits (…, n).
    ///
    /// # Errors
    /// Tensor operations.
    pub fn scalings(&self, logits: &Tensor) -> Result<Tensor> {
        match self.softmax {
            true => softmax(&(logits / self.temperature)?, None),
            false => Ok(logits.clone()),
        }
    }

    /// The gates of λ (rows, n): the k largest of each row, as they are or after a softmax over those that are not 0. The choice has no
    /// gradient.
    ///
    /// # Errors
    /// Tensor operations.
    pub fn kept(&self, scalings: &Tensor) -> Result<Tensor> {
        let n = scalings.dim(D::Minus1)?;
        let kept = match self.top_k.filter(|&k| k < n) {
            Some(k) => (scalings * top_k(scalings, k)?.0)?,
            None => scalings.clone(),
        };
        match self.softmax_top_k {
            true => softmax(&kept, Some(&kept.detach().ne(0.0)?.to_dtype(kept.dtype())?)),
            false => Ok(kept),
        }
    }
}
