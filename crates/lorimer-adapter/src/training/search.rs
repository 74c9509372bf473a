//! A search before a run: what it may use, and what it gives.

use candle_core::Var;
use lorimer_model::BaseModel;
use lorimer_tensor::Gradients;
use serde_json::Value;

use crate::attached::Attached;
use crate::error::Result;
use crate::method::CalibrationStats;
use crate::targets::Targeting;

/// The model and the rows of data that a search looks at.
pub trait SearchData {
    /// The frozen model.
    fn model(&self) -> &dyn BaseModel;
    /// Number of rows.
    fn rows(&self) -> usize;
    /// Supervised tokens of a row.
    fn supervised(&self, row: usize) -> usize;
    /// Σ −log p over the supervised tokens of some rows, and the gradients of `scale` times that.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    fn gradients(
        &self,
        attached: &Attached<'_>,
        parameters: &[(String, &Var)],
        rows: &[usize],
        scale: f64,
    ) -> Result<(f64, Gradients)>;
}

/// Finds what a method wants to know of each targeted projection, from its settings ([`crate::Calibration::Search`]). It tells how many of
/// how many steps are done.
pub type Search = fn(&dyn SearchData, &Targeting, &Value, &mut dyn FnMut(usize, usize)) -> Result<CalibrationStats>;
