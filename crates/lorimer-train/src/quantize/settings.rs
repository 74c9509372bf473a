//! How a model is quantised.

use lorimer_tensor::storage::levels::ScaleType;
use lorimer_tensor::storage::normal_float::NfConfig;
use serde::Serialize;

use crate::error::{Error, Result};

/// How a model is quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Configurations under a budget, and an adapter that repairs.
    LqLora,
    /// One configuration, and an adapter that repairs.
    Loftq,
    /// One configuration, no adapter.
    Nf,
}

/// Configurations that LQ-LoRA chooses from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Grid {
    /// Thirteen, from 2.06 to 8.13 bits.
    Small,
    /// The paper's 432.
    Paper,
}

impl Grid {
    /// Its configurations.
    pub fn configs(self) -> Vec<NfConfig> {
        match self {
            Self::Small => {
                let all = [2, 3, 4, 8].map(|bits| {
                    [(4, 64), (8, 64), (4, 32), (4, 16)].map(|(scale_bits, block)| NfConfig {
                        bits,
                        scale_bits,
                        scale_type: ScaleType::Bf16,
                        block,
                        scale_block: 256,
                    })
                });
                all.into_iter().flatten().filter(|c| c.bits < 8 || (c.scale_bits, c.block) == (8, 64)).collect()
            }
            Self::Paper => {
                let mut all = Vec::new();
                for bits in [2, 3, 4, 8] {
                    for scale_bits in [2, 3, 4, 8] {
                        for scale_type in [ScaleType::Bf16, ScaleType::F16, ScaleType::F32] {
                            for block in [16, 32, 64] {
                                for scale_block in [16, 64, 256] {
                                    all.push(NfConfig { bits, scale_bits, scale_type, block, scale_block });
                                }
                            }
                        }
                    }
                }
                all
            }
        }
    }
}

/// How the weights are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Lorimer's own.
    LorimerNf,
    /// bitsandbytes' NF4 with double quantisation, which transformers loads.
    Bitsandbytes,
}

/// What `lorimer quantize` is told.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct QuantizeSettings {
    /// How.
    pub method: Method,
    /// Bits a weight: a budget for LQ-LoRA, 2, 3, 4 or 8 otherwise.
    pub bits: f64,
    /// Rank of the adapter; 0 with [`Method::Nf`].
    pub rank: usize,
    /// α of the adapter.
    pub alpha: f64,
    /// Configurations to choose from.
    pub grid: Grid,
    /// Most steps of a decomposition.
    pub steps: usize,
    /// Seed of the randomised SVD.
    pub seed: u64,
    /// How the weights are written.
    pub format: Format,
}

impl QuantizeSettings {
    /// Refuses what does not go together.
    ///
    /// # Errors
    ///
    /// Fails if a setting is out of its range or does not go with another.
    pub fn check(&self) -> Result<()> {
        let fail = |text: String| Err(Error::Settings(text));
        let whole = [2.0, 3.0, 4.0, 8.0].contains(&self.bits);
        if self.method == Method::LqLora && !(self.bits > 0.0 && self.bits <= 16.0) {
            return fail(format!("--bits {} should be between the grid's fewest, about 2.1, and 16", self.bits));
        }
        if self.method != Method::LqLora && !whole {
            return fail(format!(
                "--bits {} should be 2, 3, 4 or 8; a budget between is for --method lq-lora",
                self.bits
            ));
        }
        match (self.method, self.rank) {
            (Method::Nf, 0) => {}
            (Method::Nf, _) => return fail("`nf` has no low-rank change; leave --rank out".into()),
            (_, 0) => {
                return fail("--rank should be at least 1; `--method nf` quantises without a low-rank change".into());
            }
            _ => {}
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            return fail(format!("--alpha {} should be a number above 0", self.alpha));
        }
        if !(1..=1000).contains(&self.steps) {
            return fail(format!("--steps {} should be between 1 and 1000", self.steps));
        }
        if self.format == Format::Bitsandbytes && (self.method, self.bits) != (Method::Nf, 4.0) {
            return fail("bitsandbytes has NF4 only: `--format bitsandbytes` goes with `--method nf --bits 4`".into());
        }
        Ok(())
    }

    pub(super) fn configs(&self) -> Vec<NfConfig> {
        match self.method {
            Method::LqLora => self.grid.configs(),
            _ => vec![NfConfig::plain(self.bits as usize)],
        }
    }
}
