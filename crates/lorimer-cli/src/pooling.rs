//! Flags that say how texts become vectors.

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use lorimer_model::Base;
use lorimer_model::embed::{EmbedOptions, Pooling};

/// How the tokens of a text become one vector.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum PoolingFlag {
    /// The mean of all of them
    Mean,
    /// The first one's
    Cls,
    /// The last one's
    Last,
    /// The greatest of each column
    Max,
}

impl From<PoolingFlag> for Pooling {
    fn from(flag: PoolingFlag) -> Self {
        match flag {
            PoolingFlag::Mean => Self::Mean,
            PoolingFlag::Cls => Self::Cls,
            PoolingFlag::Last => Self::Last,
            PoolingFlag::Max => Self::Max,
        }
    }
}

/// Flags that say how texts become vectors, where the model's folder does not.
#[derive(Args, Clone, Debug)]
pub struct PoolingArgs {
    /// How the tokens of a text become one vector [default: as the model's sentence-transformers files say]
    #[arg(long, value_enum)]
    pooling: Option<PoolingFlag>,
    /// Divide every vector by its length
    #[arg(long)]
    normalize: bool,
}

impl PoolingArgs {
    /// What the folder says, or what the flags say in its place.
    pub fn options(&self, base: &Base) -> Result<EmbedOptions> {
        let positions = base.model().shape().max_positions;
        let of_folder = EmbedOptions::of_folder(&base.path, positions)?;
        Ok(match (self.pooling, of_folder) {
            (None, Some(own)) => EmbedOptions { normalize: own.normalize || self.normalize, ..own },
            (Some(pooling), Some(own)) => EmbedOptions { pooling: pooling.into(), normalize: self.normalize, ..own },
            (Some(pooling), None) => EmbedOptions::new(pooling.into(), self.normalize, positions),
            (None, None) => bail!(
                "`{}` does not say how tokens become a vector (it has no modules.json); give --pooling mean, cls, max or last",
                base.path.display()
            ),
        })
    }
}
