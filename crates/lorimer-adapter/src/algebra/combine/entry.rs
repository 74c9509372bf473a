//! One line of the registry of combinations.

use super::settings::Settings;
use super::site::{Made, Pool};
use crate::error::{Error, Result};

/// Which weights a combination takes, and those that it has where none are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// Any; 1 each.
    Sum,
    /// Any; one over the number of parents.
    Mean,
    /// Positive ones; 1 each.
    Positive,
}

/// How a combination is computed.
#[derive(Clone, Copy)]
pub enum Kind {
    /// Of one projection's factors; several projections at a time.
    Sites(fn(&Pool, &Settings) -> Result<Made>),
    /// The same, by way of an (outputs, inputs) matrix; one projection at a time.
    WholeSites(fn(&Pool, &Settings) -> Result<Made>),
    /// As [`Self::Sites`], and FlyLoRA's and SMoRA's factors are taken with every rank acting.
    GatedSites(fn(&Pool, &Settings) -> Result<Made>),
    /// The weighted sum of each stored tensor.
    Tensors,
}

/// One way to combine adapters.
pub struct Combination {
    /// Name on the command line.
    pub name: &'static str,
    /// What it gives.
    pub help: &'static str,
    /// Where it is from.
    pub source: &'static str,
    /// Names of the settings that it has.
    pub takes: &'static [&'static str],
    /// Its weights.
    pub weights: Weights,
    /// What it does.
    pub kind: Kind,
}

impl Combination {
    /// What it makes of one projection; None for the combination that goes by tensors.
    ///
    /// # Errors
    ///
    /// Fails if the parents' ranks are none that it takes, or if a tensor operation fails.
    pub fn site(&self, pool: &Pool, settings: &Settings) -> Option<Result<Made>> {
        match self.kind {
            Kind::Sites(make) | Kind::WholeSites(make) | Kind::GatedSites(make) => Some(make(pool, settings)),
            Kind::Tensors => None,
        }
    }

    /// The weights of so many parents: those given, the others' as it has them.
    pub(super) fn weights_of(&self, given: &[Option<f64>]) -> Result<Vec<f64>> {
        let own = if self.weights == Weights::Mean { 1.0 / given.len().max(1) as f64 } else { 1.0 };
        let weights: Vec<f64> = given.iter().map(|w| w.unwrap_or(own)).collect();
        if let Some(weight) = weights.iter().find(|w| !w.is_finite()) {
            return Err(Error::Config(format!("the weight {weight} should be a finite number")));
        }
        if let (Weights::Positive, Some(weight)) = (self.weights, weights.iter().find(|w| **w <= 0.0)) {
            let name = self.name;
            return Err(Error::Config(format!(
                "`{name}` weighs members of clusters; the weight {weight} should be above 0"
            )));
        }
        match weights.iter().all(|w| *w == 0.0) {
            true => Err(Error::Config("all weights are 0, which leaves nothing".into())),
            false => Ok(weights),
        }
    }
}
