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
    /// 4 bits with a scale and a zero point a group, each weight rounded to the nearest.
    Rtn,
    /// The same, rounded column by column so that later weights make up for what earlier ones lose on the inputs of some rows.
    Gptq,
}

impl Method {
    /// As `--method` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::LqLora => "lq-lora",
            Self::Loftq => "loftq",
            Self::Nf => "nf",
            Self::Rtn => "rtn",
            Self::Gptq => "gptq",
        }
    }

    /// Whether an adapter repairs what it loses.
    pub fn repairs(self) -> bool {
        matches!(self, Self::LqLora | Self::Loftq)
    }

    /// Whether weights have scales and zero points of groups, and no NormalFloat.
    pub fn has_groups(self) -> bool {
        matches!(self, Self::Rtn | Self::Gptq)
    }
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
    /// GPTQ's.
    Gptq,
    /// AWQ's (gemm).
    Awq,
}

impl Format {
    /// As `--format` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::LorimerNf => "lorimer-nf",
            Self::Bitsandbytes => "bitsandbytes",
            Self::Gptq => "gptq",
            Self::Awq => "awq",
        }
    }
}

/// Which weights share a scale and a zero point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Groups {
    /// Inputs of a group; None for all of a row.
    pub size: Option<usize>,
    /// Whether zero points are 8 throughout.
    pub symmetric: bool,
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
    /// Of [`Method::Rtn`] and [`Method::Gptq`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub groups: Option<Groups>,
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
        let method = self.method.name();
        if self.method == Method::LqLora && !(self.bits > 0.0 && self.bits <= 16.0) {
            return fail(format!("--bits {} should be between the grid's fewest, about 2.1, and 16", self.bits));
        }
        if self.method.has_groups() && self.bits != 4.0 {
            return fail(format!("--bits {} should be 4: `{method}` has no others", self.bits));
        }
        if self.method != Method::LqLora && !whole {
            return fail(format!(
                "--bits {} should be 2, 3, 4 or 8; a budget between is for --method lq-lora",
                self.bits
            ));
        }
        match (self.method.repairs(), self.rank) {
            (false, 0) => {}
            (false, _) => return fail(format!("`{method}` has no low-rank change; leave --rank out")),
            (true, 0) => {
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
        self.check_groups()
    }

    fn check_groups(&self) -> Result<()> {
        let fail = |text: String| Err(Error::Settings(text));
        let (method, format) = (self.method.name(), self.format.name());
        if self.method.has_groups() != matches!(self.format, Format::Gptq | Format::Awq) {
            return fail(format!(
                "`--format {format}` does not go with `--method {method}`: gptq and awq hold what rtn and gptq make, the other formats NormalFloat"
            ));
        }
        let Some(groups) = self.groups else {
            return match self.method.has_groups() {
                true => fail(format!("`{method}` needs the size of a group")),
                false => Ok(()),
            };
        };
        if !self.method.has_groups() {
            return fail(format!("--group-size and --asym go with `--method rtn` and `gptq`, not `{method}`"));
        }
        if groups.size.is_some_and(|size| size == 0 || !size.is_multiple_of(8)) {
            return fail("--group-size should be a multiple of 8, or -1 for whole rows".into());
        }
        if self.format == Format::Awq && groups.symmetric {
            return fail("AWQ's format has zero points: its groups are not symmetric".into());
        }
        Ok(())
    }

    pub(super) fn configs(&self) -> Vec<NfConfig> {
        match self.method {
            Method::LqLora => self.grid.configs(),
            Method::Loftq | Method::Nf => vec![NfConfig::plain(self.bits as usize)],
            Method::Rtn | Method::Gptq => Vec::new(),
        }
    }
}
