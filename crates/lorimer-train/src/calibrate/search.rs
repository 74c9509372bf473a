//! What a search before the run may use: the model and rows of the data.

use candle_core::Var;
use lorimer_adapter::Attached;
use lorimer_adapter::training::search::SearchData;
use lorimer_model::BaseModel;
use lorimer_tensor::Gradients;

use crate::data::encode::Example;
use crate::run::step::{StepOptions, accumulate_gradients};

/// Rows of data under a model.
pub struct SearchRows<'a> {
    /// The frozen model.
    pub model: &'a dyn BaseModel,
    /// The rows.
    pub rows: &'a [&'a Example],
}

impl SearchData for SearchRows<'_> {
    fn model(&self) -> &dyn BaseModel {
        self.model
    }

    fn rows(&self) -> usize {
        self.rows.len()
    }

    fn supervised(&self, row: usize) -> usize {
        self.rows[row].targets().count()
    }

    fn gradients(
        &self,
        attached: &Attached<'_>,
        parameters: &[(String, &Var)],
        rows: &[usize],
        scale: f64,
    ) -> lorimer_adapter::Result<(f64, Gradients)> {
        let rows: Vec<&Example> = rows.iter().map(|&row| self.rows[row]).collect();
        let (mut sums, options) = (Gradients::default(), StepOptions::default());
        let found = accumulate_gradients(self.model, attached, parameters, &rows, scale, options, None, &mut sums);
        let found = found.map_err(|error| lorimer_adapter::Error::Refused(error.to_string()))?;
        Ok((found.sum, sums))
    }
}
