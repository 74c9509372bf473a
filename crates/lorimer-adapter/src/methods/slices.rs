//! Frozen matrices that projections of one shape share.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use candle_core::Tensor;

use crate::error::Result;

/// Matrices by what tells them apart: which of the method's, and sizes.
#[derive(Default)]
pub struct Slices(Mutex<BTreeMap<(char, usize, usize), Tensor>>);

impl Slices {
    /// The matrix of a key, made the first time.
    pub fn get(&self, key: (char, usize, usize), make: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = all.get(&key) {
            return Ok(found.clone());
        }
        let made = make()?;
        all.insert(key, made.clone());
        Ok(made)
    }
}
