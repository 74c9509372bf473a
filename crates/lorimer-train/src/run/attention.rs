//! How gradients of attention are computed: exactly, or low-rank where a bound allows it, and checked (experimental).

use std::str::FromStr;
use std::sync::Arc;

use candle_core::DType;
use lorimer_model::DecoderConfig;
use lorimer_tensor::{AttentionForm, CheckedGradient, GradientMeter, GradientTotals, LowRankGradient, Mask};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::run::log::Record;

/// How gradients of attention are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttentionGradient {
    /// Exactly.
    #[default]
    Exact,
    /// By chained low-rank factors (arXiv 2406.03136) where a bound of the scores says that they are within a tolerance, exactly elsewhere; experimental.
    LowRank(LowRankSettings),
}

/// Settings of the low-rank gradient.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LowRankSettings {
    /// Degree of the polynomial in the place of exp.
    pub degree: usize,
    /// Largest error of an attention weight, as a share of it.
    pub tolerance: f64,
    /// Positions that are taken together; a query has the keys of its own tile exactly.
    pub tile: usize,
    /// At the first step and each so many, one low-rank group of every block is held against its exact gradient.
    pub check_steps: usize,
}

impl Default for LowRankSettings {
    fn default() -> Self {
        Self { degree: 2, tolerance: 0.01, tile: 64, check_steps: 100 }
    }
}

fn fail<T>(text: String) -> Result<T> {
    Err(Error::Settings(text))
}

impl LowRankSettings {
    /// The settings as the operation takes them.
    pub fn rule(&self) -> LowRankGradient {
        LowRankGradient { degree: self.degree, tolerance: self.tolerance, tile: self.tile }
    }

    /// What the attentions of a step need. `seed` decides which groups are looked at.
    pub fn at_step(&self, step: usize, seed: u64) -> CheckedGradient {
        let check = step.is_multiple_of(self.check_steps.max(1)).then_some(seed);
        CheckedGradient { rule: self.rule(), meter: Arc::new(GradientMeter::new(check)) }
    }

    /// Refuses a run whose first step would have exact gradients only.
    ///
    /// # Errors
    ///
    /// Fails with what would have to be different.
    pub fn check_use(&self, totals: &GradientTotals, dtype: DType) -> Result<()> {
        let Self { degree, tolerance, tile, .. } = self;
        match totals.scores {
            None => fail(format!(
                "--attention-grad lowrank has nothing to do: no row of the first step has more than a tile of {tile} tokens; choose a smaller tile, or leave it out"
            )),
            Some((least, _)) if totals.low_rank == 0 => fail(format!(
                "--attention-grad lowrank has nothing to do: the attention scores of the first step are bounded by {least:.2} in the best head, and degree {degree} is within {tolerance} up to {:.2} only; raise degree or tolerance, or leave it out",
                self.rule().reach(dtype)
            )),
            Some(_) => Ok(()),
        }
    }
}

impl AttentionGradient {
    /// Whether nothing is approximated.
    pub fn is_exact(&self) -> bool {
        *self == Self::Exact
    }

    /// The settings, where it is low-rank.
    pub fn low_rank(&self) -> Option<&LowRankSettings> {
        match self {
            Self::Exact => None,
            Self::LowRank(settings) => Some(settings),
        }
    }

    /// Refuses what cannot be.
    ///
    /// # Errors
    ///
    /// Fails with the first setting that is out of its range.
    pub fn check(&self) -> Result<()> {
        let Some(LowRankSettings { degree, tolerance, tile, check_steps }) = self.low_rank() else { return Ok(()) };
        if *degree > 64 {
            return fail(format!("--attention-grad: degree {degree} should be at most 64"));
        }
        if !(*tolerance > 0.0 && *tolerance < 1.0) {
            return fail(format!("--attention-grad: tolerance {tolerance} should be above 0 and below 1"));
        }
        if *tile == 0 || *tile > 1 << 16 {
            return fail(format!("--attention-grad: tile {tile} should be 1 to 65536"));
        }
        if *check_steps == 0 {
            return fail("--attention-grad: check_steps should be at least 1".into());
        }
        Ok(())
    }

    /// Refuses a model whose attention has no low-rank gradient.
    ///
    /// # Errors
    ///
    /// Fails with the reason: a sliding window, a soft cap, or a degree that takes too many numbers at the width of its heads.
    pub fn check_model(&self, config: &DecoderConfig) -> Result<()> {
        let Some(settings) = self.low_rank() else { return Ok(()) };
        for (shape, kind) in config.layers.iter().zip(&config.kinds) {
            let mask = kind.window.map_or(Mask::Causal, Mask::Window);
            let form = AttentionForm { mask, cap: config.attention_cap, ..AttentionForm::causal(shape.head_dim, 1.0) };
            if let Err(reason) = settings.rule().check(&form) {
                return fail(format!(
                    "--attention-grad lowrank does not fit a `{}` model: {reason}",
                    config.model_type
                ));
            }
        }
        Ok(())
    }
}

impl FromStr for AttentionGradient {
    type Err = Error;

    /// `exact`, or `lowrank` with settings behind it: `lowrank:degree=3,tolerance=0.05`.
    fn from_str(text: &str) -> Result<Self> {
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        let short = |text: &str| text.chars().take(40).collect::<String>();
        match (name.trim(), rest.trim()) {
            ("exact", "") => return Ok(Self::Exact),
            ("exact", _) => return fail("`exact` has no settings".into()),
            ("lowrank", _) => {}
            (name, _) => return fail(format!("there is no gradient `{}`; there are exact, lowrank", short(name))),
        }
        let mut own = LowRankSettings::default();
        for pair in rest.split(',').filter(|pair| !pair.trim().is_empty()) {
            let (key, value) =
                pair.split_once('=').map_or((pair.trim(), ""), |(key, value)| (key.trim(), value.trim()));
            let bad = || Error::Settings(format!("`{}` after `lowrank:` should be {key}=NUMBER", short(pair)));
            match key {
                "degree" => own.degree = value.parse().map_err(|_| bad())?,
                "tolerance" => own.tolerance = value.parse().map_err(|_| bad())?,
                "tile" => own.tile = value.parse().map_err(|_| bad())?,
                "check_steps" => own.check_steps = value.parse().map_err(|_| bad())?,
                _ => {
                    return fail(format!(
                        "`lowrank` has no setting `{}`; it has degree, tolerance, tile, check_steps",
                        short(key)
                    ));
                }
            }
        }
        let all = Self::LowRank(own);
        all.check()?;
        Ok(all)
    }
}

/// Puts what a step's attentions were like into its record.
pub(crate) fn record(totals: &GradientTotals, record: &mut Record) {
    record.low_rank_heads = (totals.heads > 0).then(|| totals.low_rank as f64 / totals.heads as f64);
    record.low_rank_score = totals.scores.map(|(_, most)| most);
    record.low_rank_error = totals.checked.map(|checked| checked.relative_error);
    record.low_rank_bound = totals.checked.map(|checked| checked.share_of_bound);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_and_refused_by_name() {
        let read = |text: &str| text.parse::<AttentionGradient>();
        assert_eq!(read("exact").unwrap(), AttentionGradient::Exact);
        assert_eq!(read("lowrank").unwrap(), AttentionGradient::LowRank(LowRankSettings::default()));
        let given = LowRankSettings { degree: 3, tolerance: 0.5, tile: 8, check_steps: 7 };
        assert_eq!(
            read("lowrank: degree=3, tolerance=0.5,tile=8,check_steps=7").unwrap(),
            AttentionGradient::LowRank(given)
        );
        for (text, says) in [
            ("chained", "there are exact, lowrank"),
            ("exact:degree=2", "no settings"),
            ("lowrank:rank=2", "no setting `rank`"),
            ("lowrank:degree", "degree=NUMBER"),
            ("lowrank:degree=-1", "degree=NUMBER"),
            ("lowrank:degree=65", "at most 64"),
            ("lowrank:tolerance=0", "above 0 and below 1"),
            ("lowrank:tolerance=nan", "above 0 and below 1"),
            ("lowrank:tile=0", "1 to 65536"),
            ("lowrank:check_steps=0", "at least 1"),
        ] {
            let found = read(text).unwrap_err().to_string();
            assert!(found.contains(says), "{text}: {found}");
        }
        // What stands in a checkpoint is read again, and the default leaves no trace.
        let json = serde_json::to_value(AttentionGradient::LowRank(given)).unwrap();
        assert_eq!(json["lowrank"]["tile"], 8);
        assert_eq!(serde_json::from_value::<AttentionGradient>(json).unwrap(), AttentionGradient::LowRank(given));
        let settings = serde_json::to_value(crate::run::settings::TrainSettings::default()).unwrap();
        assert!(settings.get("attention_gradient").is_none());
    }
}
