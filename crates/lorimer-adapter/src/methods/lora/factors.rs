//! LoRA's factors at their start.

use candle_core::{DType, Device, Tensor};
use lorimer_model::{Projection, Site};
use lorimer_tensor::linalg;
use rand_chacha::ChaCha8Rng;

use super::config::LoraConfig;
use super::start::Start;
use crate::error::{Error, Result};
use crate::methods::random::{kaiming, normal};

impl Start {
    /// A (r, inputs) and B (outputs, r), for a start that draws at most from `rng`.
    pub(crate) fn factors(
        self,
        config: &LoraConfig,
        (site, base): (&Site, &Projection),
        dtype: DType,
        rng: &mut ChaCha8Rng,
    ) -> Result<(Tensor, Tensor)> {
        let (outputs, inputs) = (site.outputs, site.inputs);
        let (rank, scaling) = (config.rank(&site.path)?, config.scaling(&site.path)?);
        let zero_b = || Tensor::zeros((outputs, rank), dtype, &Device::Cpu);
        if self.moves_base() && rank > outputs.min(inputs) {
            return Err(Error::Config(format!(
                "rank {rank} is more than `{}` ({outputs}, {inputs}) has; init_lora_weights {} needs at most {}",
                site.path,
                config.init_lora_weights,
                outputs.min(inputs)
            )));
        }
        let (a, b) = match self {
            Self::Default | Self::Eva => (kaiming((rank, inputs), dtype, rng)?, zero_b()?),
            Self::Gaussian => ((normal((rank, inputs), rng)? / rank as f64)?, zero_b()?),
            Self::Orthogonal => {
                let (q, _) = linalg::qr(&normal((rank, rank), rng)?)?;
                let half: Vec<u32> = (0..rank as u32 / 2).collect();
                let rows = |odd: u32| {
                    let index: Vec<u32> = half.iter().map(|i| 2 * i + odd).collect();
                    q.index_select(&Tensor::new(index, &Device::Cpu)?, 0)
                };
                let a = normal((inputs, rank / 2), rng)?.matmul(&rows(0)?)?.t()?;
                let b = normal((rank / 2, outputs), rng)?.t()?.matmul(&rows(1)?)?;
                ((a / 10.0)?, (b / 10.0)?)
            }
            Self::Pissa(iterations) => {
                let w = base.dense(DType::F64)?;
                let (u, s, vt) = match iterations {
                    None => linalg::svd(&w)?,
                    Some(n) => randomised_svd(&w, rank, n, rng)?,
                };
                let root = (s.narrow(0, 0, rank)? / scaling)?.sqrt()?;
                let a = vt.narrow(0, 0, rank)?.broadcast_mul(&root.unsqueeze(1)?)?;
                (a, u.narrow(1, 0, rank)?.broadcast_mul(&root)?)
            }
            Self::Olora => {
                let (q, r) = linalg::qr(&base.dense(DType::F64)?)?;
                (r.narrow(0, 0, rank)?, q.narrow(1, 0, rank)?)
            }
        };
        Ok((a.to_dtype(dtype)?.contiguous()?, b.to_dtype(dtype)?.contiguous()?))
    }
}

/// The `rank` largest singular triplets by subspace iteration, ten extra directions.
fn randomised_svd(
    w: &Tensor,
    rank: usize,
    iterations: usize,
    rng: &mut ChaCha8Rng,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (m, n) = w.dims2()?;
    let width = (rank + 10).min(m).min(n);
    let (q, projected) = linalg::leading_basis(w, &normal((n, width), rng)?, iterations)?;
    let (u, s, vt) = linalg::svd(&projected)?;
    Ok((q.matmul(&u)?, s, vt))
}
