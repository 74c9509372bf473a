//! Optimisers: from gradients to new parameters.

use candle_core::{DType, Device, Tensor, Var};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Turns gradients into steps. State is saved by the parameter's name, so that a run resumes exactly.
pub trait Optimizer {
    /// One step at rate `rate`; a parameter without a gradient stays.
    fn step(&mut self, parameters: &[(String, &Var)], gradients: &[Option<Tensor>], rate: f64) -> Result<()>;
    /// State tensors by name.
    fn state(&self) -> Result<Vec<(String, Tensor)>>;
    /// Puts state back; `steps` have been taken.
    fn restore(&mut self, state: &std::collections::BTreeMap<String, Tensor>, steps: usize) -> Result<()>;
}

/// AdamW's constants.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), in the order of operations of torch.
pub struct AdamW {
    config: AdamWConfig,
    /// First and second moments by parameter name.
    moments: std::collections::BTreeMap<String, (Tensor, Tensor)>,
    steps: usize,
}

impl AdamW {
    /// An optimiser that has taken no step.
    pub fn new(config: AdamWConfig) -> Self {
        Self { config, moments: Default::default(), steps: 0 }
    }

    fn update<T: candle_core::WithDType + num_traits::Float>(
        &self,
        [p, g, m, v]: [&Tensor; 4],
        rate: f64,
    ) -> Result<[Tensor; 3]> {
        let flat = |t: &Tensor| -> candle_core::Result<Vec<T>> { t.flatten_all()?.to_vec1::<T>() };
        let (mut p_new, g, mut m_new, mut v_new) = (flat(p)?, flat(g)?, flat(m)?, flat(v)?);
        let c = &self.config;
        let of = |x: f64| <T as candle_core::WithDType>::from_f64(x);
        let steps = self.steps as i32;
        let (keep, take1) = (of(1.0 - rate * c.weight_decay), of(1.0 - c.beta1));
        let (beta2, take2) = (of(c.beta2), of(1.0 - c.beta2));
        let step_size = of(rate / (1.0 - c.beta1.powi(steps)));
        let root = of((1.0 - c.beta2.powi(steps)).sqrt());
        let eps = of(c.eps);
        for i in 0..p_new.len() {
            m_new[i] = m_new[i] + take1 * (g[i] - m_new[i]);
            v_new[i] = v_new[i] * beta2 + take2 * g[i] * g[i];
            let denominator = v_new[i].sqrt() / root + eps;
            p_new[i] = p_new[i] * keep - step_size * m_new[i] / denominator;
        }
        let back = |data: Vec<T>| Tensor::from_vec(data, p.shape(), &Device::Cpu);
        Ok([back(p_new)?, back(m_new)?, back(v_new)?])
    }
}

impl Optimizer for AdamW {
    fn step(&mut self, parameters: &[(String, &Var)], gradients: &[Option<Tensor>], rate: f64) -> Result<()> {
        self.steps += 1;
        for ((name, var), gradient) in parameters.iter().zip(gradients) {
            let Some(g) = gradient else { continue };
            let zeros = || -> Result<_> { Ok((var.zeros_like()?, var.zeros_like()?)) };
            let (m, v) = match self.moments.remove(name) {
                Some(moments) => moments,
                None => zeros()?,
            };
            let [p, m, v] = match var.dtype() {
                DType::F64 => self.update::<f64>([var.as_tensor(), g, &m, &v], rate)?,
                _ => self.update::<f32>([var.as_tensor(), g, &m, &v], rate)?,
            };
            var.set(&p)?;
            self.moments.insert(name.clone(), (m, v));
        }
        Ok(())
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let both = |(name, (m, v)): (&String, &(Tensor, Tensor))| {
            [(format!("{name}.exp_avg"), m.clone()), (format!("{name}.exp_avg_sq"), v.clone())]
        };
        Ok(self.moments.iter().flat_map(both).collect())
    }

    fn restore(&mut self, state: &std::collections::BTreeMap<String, Tensor>, steps: usize) -> Result<()> {
        self.steps = steps;
        self.moments.clear();
        for (key, m) in state {
            let Some(name) = key.strip_suffix(".exp_avg") else { continue };
            let v = state
                .get(&format!("{name}.exp_avg_sq"))
                .ok_or_else(|| Error::Settings(format!("the checkpoint has no second moment for `{name}`")))?;
            self.moments.insert(name.to_string(), (m.clone(), v.clone()));
        }
        Ok(())
    }
}

/// Norm of all gradients together, and the gradients scaled so that it is at most `limit` (0: no limit), as torch's
/// `clip_grad_norm_`.
pub fn clip(gradients: &mut [Option<Tensor>], limit: f64) -> Result<f64> {
    let mut squares = 0.0;
    for g in gradients.iter().flatten() {
        squares += g.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?;
    }
    let norm = squares.sqrt();
    if !norm.is_finite() {
        return Err(Error::Settings(format!("the gradient is {norm}; lower --lr, or look for damaged data")));
    }
    let factor = limit / (norm + 1e-6);
    if limit > 0.0 && factor < 1.0 {
        for g in gradients.iter_mut().flatten() {
            *g = (&*g * factor)?;
        }
    }
    Ok(norm)
}
