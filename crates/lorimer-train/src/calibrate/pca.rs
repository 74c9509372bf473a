//! Principal directions of rows that come batch by batch.

use candle_core::{DType, Device, Result as TensorResult, Tensor};
use lorimer_tensor::linalg::truncated_svd;

/// Principal directions of rows that come batch by batch.
#[derive(Clone, Debug)]
pub struct IncrementalPca {
    wanted: usize,
    seen: f64,
    /// Mean of each column, and sum of squared distances from it.
    mean: Vec<f64>,
    spread: Vec<f64>,
    /// Singular values times directions, (k, width); the values alone.
    components: Option<(Tensor, Vec<f64>)>,
    /// Rows that are too few for a step.
    pending: Vec<Tensor>,
    /// Cosine of each direction with what it was before the last step.
    cosines: Vec<f64>,
}

impl IncrementalPca {
    /// For `wanted` directions.
    pub fn new(wanted: usize) -> Self {
        Self {
            wanted,
            seen: 0.0,
            mean: Vec::new(),
            spread: Vec::new(),
            components: None,
            pending: Vec::new(),
            cosines: Vec::new(),
        }
    }

    /// Takes rows (n, width). They wait until there are as many as directions are wanted.
    pub fn add(&mut self, rows: &Tensor) -> TensorResult<()> {
        self.pending.push(rows.to_dtype(DType::F64)?);
        let waiting: usize = self.pending.iter().map(|t| t.dim(0)).sum::<TensorResult<usize>>()?;
        if waiting >= self.wanted {
            self.step()?;
        }
        Ok(())
    }

    /// Takes in the rows that wait, however few.
    pub fn finish(&mut self) -> TensorResult<()> {
        if self.pending.is_empty() { Ok(()) } else { self.step() }
    }

    fn step(&mut self) -> TensorResult<()> {
        let x = Tensor::cat(&std::mem::take(&mut self.pending), 0)?;
        let (n, width) = x.dims2()?;
        let batch_mean = x.mean_keepdim(0)?;
        let centred = x.broadcast_sub(&batch_mean)?;
        let own = batch_mean.flatten_all()?.to_vec1::<f64>()?;
        let spread = centred.sqr()?.sum(0)?.to_vec1::<f64>()?;
        let (n, seen) = (n as f64, self.seen);
        let before = self.components.take();
        let joined = match &before {
            None => {
                (self.mean, self.spread) = (own, spread);
                centred
            }
            Some((components, values)) => {
                // The means differ; their difference is one more direction.
                let weight = seen * n / (seen + n);
                let between: Vec<f64> = self.mean.iter().zip(&own).map(|(a, b)| weight.sqrt() * (a - b)).collect();
                for (i, b) in own.iter().enumerate() {
                    let difference = self.mean[i] - b;
                    self.spread[i] += spread[i] + weight * difference * difference;
                    self.mean[i] = (seen * self.mean[i] + n * b) / (seen + n);
                }
                let values = Tensor::from_slice(values, (values.len(), 1), &Device::Cpu)?;
                let between = Tensor::from_vec(between, (1, width), &Device::Cpu)?;
                Tensor::cat(&[&components.broadcast_mul(&values)?, &centred, &between], 0)?
            }
        };
        self.seen += n;
        let k = self.wanted.min(joined.dim(0)?).min(width);
        let (_, values, components) = truncated_svd(&joined, k)?;
        self.cosines = match before {
            None => vec![-1.0; k],
            Some((old, _)) => {
                let both = old.dim(0)?.min(k);
                let product = (old.narrow(0, 0, both)? * components.narrow(0, 0, both)?)?.sum(1)?;
                let mut cosines = product.to_vec1::<f64>()?;
                cosines.resize(k, -1.0);
                cosines
            }
        };
        self.components = Some((components, values.to_vec1::<f64>()?));
        Ok(())
    }

    /// Share of the rows' whole variance that each direction explains.
    pub fn explained(&self) -> Vec<f64> {
        let total: f64 = self.spread.iter().sum();
        let values = self.components.as_ref().map(|(_, values)| values.as_slice()).unwrap_or_default();
        values.iter().map(|s| if total > 0.0 { s * s / total } else { 0.0 }).collect()
    }

    /// Directions (k, width) and singular values, once there are any.
    pub fn components(&self) -> Option<(&Tensor, &[f64])> {
        self.components.as_ref().map(|(t, values)| (t, values.as_slice()))
    }

    /// Whether the first `needed` directions have a cosine of at least `threshold` with what they were.
    pub(super) fn holds_still(&self, needed: usize, threshold: f64) -> bool {
        self.components.is_some() && self.cosines.iter().take(needed).all(|c| *c >= threshold)
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};

    use super::*;

    fn random(shape: (usize, usize), seed: u64) -> Tensor {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let scale = |j: usize| 3.0 / (1.0 + j as f64);
        let data: Vec<f64> =
            (0..shape.0 * shape.1).map(|i| 0.5 + scale(i % shape.1) * rng.random_range(-1.0..1.0)).collect();
        Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
    }

    /// The directions found batch by batch are those of all rows at once, where as many are kept as there are.
    #[test]
    fn incremental_components_equal_those_of_all_rows() {
        let (width, k) = (12, 12);
        let parts = [random((20, width), 1), random((15, width), 2), random((31, width), 3), random((5, width), 4)];
        let mut pca = IncrementalPca::new(k);
        parts.iter().for_each(|x| pca.add(x).unwrap());
        pca.finish().unwrap();
        let all = Tensor::cat(&parts, 0).unwrap();
        let centred = all.broadcast_sub(&all.mean_keepdim(0).unwrap()).unwrap();
        let (_, values, directions) = truncated_svd(&centred, k).unwrap();
        let (found, singular) = pca.components().unwrap();
        for (a, b) in singular.iter().zip(values.to_vec1::<f64>().unwrap()) {
            assert!((a - b).abs() < 1e-8 * values.get(0).unwrap().to_scalar::<f64>().unwrap(), "{a} {b}");
        }
        let cosines = (found * &directions).unwrap().sum(1).unwrap().to_vec1::<f64>().unwrap();
        assert!(cosines.iter().take(6).all(|c| *c > 1.0 - 1e-6), "{cosines:?}");
        assert!((pca.explained().iter().sum::<f64>() - 1.0).abs() < 1e-9);
    }
}
