//! Rotary frequencies and how they are stretched to longer contexts.

use std::f64::consts::TAU;

use lorimer_seam::Frequencies;
use serde_json::Value;

use super::fields::{Fields, short_str};
use crate::error::{Error, Result};

/// How rotary frequencies are stretched to longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// Stretch.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a smooth ramp between.
    Llama3 {
        /// Stretch of the low frequencies.
        factor: f64,
        /// Wavelengths over `original/low_freq_factor` are stretched.
        low_freq_factor: f64,
        /// Wavelengths under `original/high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length before stretching.
        original: f64,
    },
    /// YaRN (Peng et al. 2023, arXiv 2309.00071).
    Yarn {
        /// Stretch.
        factor: f64,
        /// Turns over the original context above which a frequency is kept.
        beta_fast: f64,
        /// Turns below which it is fully stretched.
        beta_slow: f64,
        /// Context length before stretching.
        original: f64,
        /// Multiplies sine and cosine.
        attention_factor: f64,
    },
    /// Each frequency divided by its own factor (GGUF's `rope_freqs.weight`).
    Factors {
        /// One a frequency.
        factors: Vec<f64>,
        /// Multiplies sine and cosine.
        attention_factor: f64,
    },
    /// LongRoPE (Ding et al. 2024, arXiv 2402.13753): one list of such factors for sequences up to the original context length, another for
    /// all positions of longer ones.
    Long {
        /// One a frequency, of sequences up to `original`.
        short: Vec<f64>,
        /// One a frequency, of longer ones.
        long: Vec<f64>,
        /// Context length before stretching.
        original: usize,
        /// Multiplies sine and cosine, of both.
        attention_factor: f64,
    },
}

impl RopeScaling {
    /// The longest sequence: YaRN's is its original length times its factor, whatever the configuration calls the longest.
    pub fn reach(&self, max_positions: usize) -> usize {
        match self {
            Self::Yarn { factor, original, .. } => {
                max_positions.max((factor * original).min(f64::from(u32::MAX)) as usize)
            }
            _ => max_positions,
        }
    }
}

/// Rotary frequencies of some layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Their stretching.
    pub scaling: RopeScaling,
    /// Elements of a head that turn; the others do not.
    pub width: usize,
}

impl Rope {
    /// The length that longer sequences turn otherwise than shorter ones from, where any is that long.
    pub(crate) fn border(&self, max_positions: usize) -> Option<usize> {
        match self.scaling {
            RopeScaling::Long { original, .. } => Some(original).filter(|&original| original < max_positions),
            _ => None,
        }
    }

    /// [`Self::frequencies`], with those of longer sequences.
    pub fn all_frequencies(&self) -> Frequencies {
        let (turns, scale) = self.frequencies();
        let long = match &self.scaling {
            RopeScaling::Long { long, original, attention_factor, .. } => {
                let scaling = RopeScaling::Factors { factors: long.clone(), attention_factor: *attention_factor };
                Some((*original, Self { scaling, ..self.clone() }.frequencies().0))
            }
            _ => None,
        };
        Frequencies { turns, scale, long }
    }

    /// Radians a position (width/2 of them), and the factor on sine and cosine.
    pub fn frequencies(&self) -> (Vec<f64>, f64) {
        let d = self.width as f64;
        let plain = (0..self.width / 2).map(|i| self.theta.powf(-2.0 * i as f64 / d));
        match &self.scaling {
            RopeScaling::None => (plain.collect(), 1.0),
            RopeScaling::Linear { factor } => (plain.map(|f| f / factor).collect(), 1.0),
            RopeScaling::Factors { factors, attention_factor }
            | RopeScaling::Long { short: factors, attention_factor, .. } => {
                (plain.zip(factors).map(|(f, x)| f / x).collect(), *attention_factor)
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let stretch = |f: f64| {
                    let turns = original * f / TAU;
                    let keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    keep * f + (1.0 - keep) * f / factor
                };
                (plain.map(stretch).collect(), 1.0)
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original, attention_factor } => {
                let dimension = |turns: f64| d * (original / (turns * TAU)).ln() / (2.0 * self.theta.ln());
                let low = dimension(*beta_fast).floor().max(0.0);
                let high = dimension(*beta_slow).ceil().min(d - 1.0);
                let high = if high == low { high + 0.001 } else { high };
                let stretch = |(i, f): (usize, f64)| {
                    let stretched = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    stretched * f / factor + (1.0 - stretched) * f
                };
                (plain.enumerate().map(stretch).collect(), *attention_factor)
            }
        }
    }
}

pub(crate) fn rope_from_json(f: &Fields<'_>, max_positions: usize) -> Result<(f64, RopeScaling)> {
    let object = |key: &str| f.optional(key, "an object", |v| v.as_object().cloned());
    let inner = match object("rope_parameters")? {
        Some(parameters) => Some(parameters),
        None => object("rope_scaling")?,
    };
    let theta_above = f.number("rope_theta")?;
    let Some(inner) = inner else { return Ok((theta_above.unwrap_or(10_000.0), RopeScaling::None)) };
    let r = Fields { path: f.path, map: &inner };
    let theta = r.number("rope_theta")?.or(theta_above).unwrap_or(10_000.0);
    let kind = inner.get("rope_type").or_else(|| inner.get("type")).and_then(Value::as_str).unwrap_or("default");
    let factor = r.number("factor")?.unwrap_or(1.0);
    if factor < 1.0 {
        return Err(Error::invalid(f.path, format!("rope factor {factor} should be 1 or more")));
    }
    let original = r.number("original_max_position_embeddings")?.unwrap_or(max_positions as f64);
    let scaling = match kind {
        "default" => RopeScaling::None,
        // Up to the length the model was trained for, dynamic scaling is none; longer sequences are refused.
        "dynamic" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor },
        "llama3" => RopeScaling::Llama3 {
            factor,
            low_freq_factor: r.number("low_freq_factor")?.unwrap_or(1.0),
            high_freq_factor: r.number("high_freq_factor")?.unwrap_or(4.0),
            original,
        },
        "yarn" => RopeScaling::Yarn {
            factor,
            beta_fast: r.number("beta_fast")?.unwrap_or(32.0),
            beta_slow: r.number("beta_slow")?.unwrap_or(1.0),
            original,
            attention_factor: r.number("attention_factor")?.unwrap_or(0.1 * factor.ln() + 1.0),
        },
        other => {
            return Err(Error::invalid(
                f.path,
                format!("rope scaling `{}` is not one of default, linear, dynamic, llama3, yarn", short_str(other)),
            ));
        }
    };
    Ok((theta, scaling))
}
