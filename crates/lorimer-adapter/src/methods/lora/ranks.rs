//! EVA's ranks by variance.

use candle_core::DType;
use lorimer_model::Site;

use super::config::LoraConfig;
use super::eva::EvaConfig;
use crate::error::{Error, Result};
use crate::method::CalibrationStats;
use crate::targets::Names;

/// Ranks out of the shares of variance that each projection's directions explain (falling): the `budget` largest win, ties go to
/// the earlier projection.
pub fn allocate(explained: &[&[f64]], budget: usize) -> Vec<usize> {
    let mut all: Vec<(usize, f64)> =
        explained.iter().enumerate().flat_map(|(i, shares)| shares.iter().map(move |s| (i, *s))).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    let mut ranks = vec![0; explained.len()];
    all.iter().take(budget).for_each(|(i, _)| ranks[*i] += 1);
    ranks
}

impl EvaConfig {
    /// Gives the ranks out.
    pub(crate) fn resolve(&self, config: &mut LoraConfig, targeted: &[&Site], stats: &CalibrationStats) -> Result<()> {
        let mut shares = Vec::new();
        let mut budget = 0;
        for site in targeted {
            let found = stats.get(&site.path).and_then(|f| f.get("explained"));
            let found =
                found.ok_or_else(|| Error::Config(format!("`{}` has not been calibrated for eva", site.path)))?;
            shares.push(found.to_dtype(DType::F64)?.to_vec1::<f64>()?);
            budget += config.rank(&site.path)?;
        }
        let ranks = allocate(&shares.iter().map(Vec::as_slice).collect::<Vec<_>>(), budget);
        let mut given = config.clone();
        (given.rank_pattern, given.alpha_pattern) = Default::default();
        for (site, rank) in targeted.iter().zip(&ranks).filter(|(_, rank)| **rank > 0) {
            let before = config.rank(&site.path)?;
            let mut alpha = config.alpha(&site.path)?;
            if self.adjust_scaling_factors {
                alpha *= *rank as f64 / before as f64;
            }
            if *rank != given.r {
                given.rank_pattern.insert(site.path.clone(), *rank);
            }
            if alpha != given.lora_alpha {
                given.alpha_pattern.insert(site.path.clone(), alpha);
            }
        }
        if ranks.contains(&0) {
            let kept = targeted.iter().zip(&ranks).filter(|(_, rank)| **rank > 0);
            given.targeting.target_modules = Names::List(kept.map(|(site, _)| site.path.clone()).collect());
            (given.targeting.exclude_modules, given.targeting.layers_to_transform) = (None, None);
        }
        *config = given;
        Ok(())
    }
}
