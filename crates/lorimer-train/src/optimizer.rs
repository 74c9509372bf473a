//! Optimisers: from gradients to new parameters.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use lorimer_tensor::blockwise::{Code, SIGNED, UNSIGNED};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Turns gradients into steps. State is saved by the parameter's name, so that a run resumes exactly.
pub trait Optimizer {
    /// One step at rate `rate`; a parameter without a gradient stays.
    fn step(&mut self, parameters: &[(String, &Var)], gradients: &[Option<Tensor>], rate: f64) -> Result<()>;
    /// State tensors by name.
    fn state(&self) -> Result<Vec<(String, Tensor)>>;
    /// Puts state back; `steps` have been taken.
    fn restore(&mut self, state: &BTreeMap<String, Tensor>, steps: usize) -> Result<()>;
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

/// Which optimiser, by the name that `--optimizer` takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OptimizerKind {
    /// AdamW with moments in the parameters' type.
    #[default]
    #[serde(rename = "adamw")]
    AdamW,
    /// AdamW with block-wise 8-bit moments.
    #[serde(rename = "adamw-8bit")]
    AdamW8bit,
}

/// Numbers that share a scale in 8-bit moments.
const BLOCK: usize = 256;
/// Parameters with fewer elements keep their moments in full, as in bitsandbytes.
const LEAST: usize = 4096;

/// AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), in the order of operations of torch. With 8-bit state (Dettmers et al.
/// 2022, arXiv 2110.02861) the moments are kept in blocks of 256 with the dynamic code, 2.03 bytes a parameter in place of 8.
pub struct AdamW {
    config: AdamWConfig,
    kind: OptimizerKind,
    /// By parameter name.
    moments: BTreeMap<String, Moments>,
    steps: usize,
}

/// First and second moments of one parameter.
enum Moments {
    Full(Tensor, Tensor),
    Blocks(Blockwise, Blockwise),
}

/// Numbers in 8 bits, in blocks of [`BLOCK`].
struct Blockwise {
    indices: Vec<u8>,
    scales: Vec<f32>,
}

impl Blockwise {
    fn zeros(count: usize, code: &Code) -> Self {
        Self { indices: vec![code.index(0.0); count], scales: vec![0.0; count.div_ceil(BLOCK)] }
    }

    fn blocks(&mut self) -> impl IndexedParallelIterator<Item = (&mut [u8], &mut f32)> {
        self.indices.par_chunks_mut(BLOCK).zip(self.scales.par_iter_mut())
    }
}

/// The numbers of one step that all elements share.
#[derive(Clone, Copy)]
struct Constants<T> {
    keep: T,
    take1: T,
    beta2: T,
    take2: T,
    step_size: T,
    root: T,
    eps: T,
}

impl<T: candle_core::WithDType + num_traits::Float> Constants<T> {
    fn update(&self, p: &mut [T], g: &[T], m: &mut [T], v: &mut [T]) {
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            *m = *m + self.take1 * (g - *m);
            *v = *v * self.beta2 + self.take2 * g * g;
            let denominator = v.sqrt() / self.root + self.eps;
            *p = *p * self.keep - self.step_size * *m / denominator;
        }
    }
}

fn flat<T: candle_core::WithDType>(t: &Tensor) -> candle_core::Result<Vec<T>> {
    t.flatten_all()?.to_vec1::<T>()
}

impl AdamW {
    /// An optimiser that has taken no step.
    pub fn new(config: AdamWConfig, kind: OptimizerKind) -> Self {
        Self { config, kind, moments: Default::default(), steps: 0 }
    }

    fn constants<T: candle_core::WithDType>(&self, rate: f64) -> Constants<T> {
        let c = &self.config;
        let of = |x: f64| <T as candle_core::WithDType>::from_f64(x);
        let steps = self.steps as i32;
        Constants {
            keep: of(1.0 - rate * c.weight_decay),
            take1: of(1.0 - c.beta1),
            beta2: of(c.beta2),
            take2: of(1.0 - c.beta2),
            step_size: of(rate / (1.0 - c.beta1.powi(steps))),
            root: of((1.0 - c.beta2.powi(steps)).sqrt()),
            eps: of(c.eps),
        }
    }

    fn full<T: candle_core::WithDType + num_traits::Float>(
        &self,
        var: &Var,
        g: &Tensor,
        (m, v): (&Tensor, &Tensor),
        rate: f64,
    ) -> Result<Moments> {
        let (mut p, g, mut m, mut v) = (flat::<T>(var)?, flat::<T>(g)?, flat::<T>(m)?, flat::<T>(v)?);
        self.constants(rate).update(&mut p, &g, &mut m, &mut v);
        let back = |data: Vec<T>| Tensor::from_vec(data, var.shape(), &Device::Cpu);
        var.set(&back(p)?)?;
        Ok(Moments::Full(back(m)?, back(v)?))
    }

    fn blockwise(&self, var: &Var, g: &Tensor, (m, v): (&mut Blockwise, &mut Blockwise), rate: f64) -> Result<()> {
        let (mut p, g) = (flat::<f32>(var)?, flat::<f32>(g)?);
        let constants = self.constants::<f32>(rate);
        let moments = m.blocks().zip(v.blocks());
        p.par_chunks_mut(BLOCK).zip(g.par_chunks(BLOCK)).zip(moments).with_min_len(16).for_each(
            |((p, g), ((m, m_scale), (v, v_scale)))| {
                let (mut first, mut second) = ([0f32; BLOCK], [0f32; BLOCK]);
                let (first, second) = (&mut first[..p.len()], &mut second[..p.len()]);
                SIGNED.decode(*m_scale, m, first);
                UNSIGNED.decode(*v_scale, v, second);
                constants.update(p, g, first, second);
                *m_scale = SIGNED.encode(first, m);
                *v_scale = UNSIGNED.encode(second, v);
            },
        );
        var.set(&Tensor::from_vec(p, var.shape(), &Device::Cpu)?)?;
        Ok(())
    }
}

impl Optimizer for AdamW {
    fn step(&mut self, parameters: &[(String, &Var)], gradients: &[Option<Tensor>], rate: f64) -> Result<()> {
        self.steps += 1;
        for ((name, var), gradient) in parameters.iter().zip(gradients) {
            let Some(g) = gradient else { continue };
            let count = var.elem_count();
            let in_blocks = self.kind == OptimizerKind::AdamW8bit && count >= LEAST && var.dtype() == DType::F32;
            let moments = match self.moments.remove(name) {
                Some(moments) => moments,
                None if in_blocks => {
                    Moments::Blocks(Blockwise::zeros(count, &SIGNED), Blockwise::zeros(count, &UNSIGNED))
                }
                None => Moments::Full(var.zeros_like()?, var.zeros_like()?),
            };
            let moments = match moments {
                Moments::Full(m, v) if var.dtype() == DType::F64 => self.full::<f64>(var, g, (&m, &v), rate)?,
                Moments::Full(m, v) => self.full::<f32>(var, g, (&m, &v), rate)?,
                Moments::Blocks(mut m, mut v) => {
                    self.blockwise(var, g, (&mut m, &mut v), rate)?;
                    Moments::Blocks(m, v)
                }
            };
            self.moments.insert(name.clone(), moments);
        }
        Ok(())
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut all = Vec::new();
        for (name, moments) in &self.moments {
            match moments {
                Moments::Full(m, v) => {
                    all.extend([(format!("{name}{FIRST}"), m.clone()), (format!("{name}{SECOND}"), v.clone())]);
                }
                Moments::Blocks(m, v) => {
                    for (suffix, part) in [(FIRST, m), (SECOND, v)] {
                        let flat = |length: usize| (length,);
                        let indices = Tensor::from_slice(&part.indices, flat(part.indices.len()), &Device::Cpu)?;
                        let scales = Tensor::from_slice(&part.scales, flat(part.scales.len()), &Device::Cpu)?;
                        all.extend([(format!("{name}{suffix}"), indices), (format!("{name}{suffix}{SCALES}"), scales)]);
                    }
                }
            }
        }
        Ok(all)
    }

    fn restore(&mut self, state: &BTreeMap<String, Tensor>, steps: usize) -> Result<()> {
        self.steps = steps;
        self.moments.clear();
        let get = |key: &str| {
            state.get(key).ok_or_else(|| Error::Settings(format!("the checkpoint's optimiser has no `{key}`")))
        };
        let blocks = |key: &str| -> Result<Blockwise> {
            let (indices, scales) = (flat::<u8>(get(key)?)?, flat::<f32>(get(&format!("{key}{SCALES}"))?)?);
            if scales.len() != indices.len().div_ceil(BLOCK) {
                return Err(Error::Settings(format!("the checkpoint's `{key}` has too few scales")));
            }
            Ok(Blockwise { indices, scales })
        };
        for (key, m) in state {
            let Some(name) = key.strip_suffix(FIRST) else { continue };
            let second = format!("{name}{SECOND}");
            let moments = match m.dtype() {
                DType::U8 => Moments::Blocks(blocks(key)?, blocks(&second)?),
                _ => Moments::Full(m.clone(), get(&second)?.clone()),
            };
            self.moments.insert(name.to_string(), moments);
        }
        Ok(())
    }
}

/// Endings of the names under which state is saved: torch's.
const FIRST: &str = ".exp_avg";
const SECOND: &str = ".exp_avg_sq";
const SCALES: &str = ".scales";

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

#[cfg(test)]
mod tests {
    use super::*;

    /// Both kinds walk down the same bowl to nearly the same place; state saved and restored goes on to the same bits.
    #[test]
    fn eight_bit_moments_follow_full_ones_and_resume_exactly() -> Result<()> {
        let start: Vec<f32> = (0..8192).map(|i| (i as f32 * 0.01).sin() + 2.0).collect();
        let mut ends = Vec::new();
        for kind in [OptimizerKind::AdamW, OptimizerKind::AdamW8bit] {
            let run = |pause: bool| -> Result<Vec<f32>> {
                let var = Var::from_slice(&start, 8192, &Device::Cpu)?;
                let parameters = [("p".to_string(), &var)];
                let mut optimizer = AdamW::new(AdamWConfig::default(), kind);
                for step in 0..200 {
                    if pause && step == 77 {
                        let state = optimizer.state()?.into_iter().collect();
                        optimizer = AdamW::new(AdamWConfig::default(), kind);
                        optimizer.restore(&state, step)?;
                    }
                    optimizer.step(&parameters, &[Some((var.as_tensor() * 2.0)?.detach())], 0.02)?;
                }
                Ok(var.to_vec1()?)
            };
            let end = run(false)?;
            assert_eq!(end, run(true)?);
            ends.push(end);
        }
        let apart = ends[0].iter().zip(&ends[1]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let mean = |v: &[f32]| v.iter().map(|v| v.abs()).sum::<f32>() / v.len() as f32;
        assert!(apart < 0.05 && mean(&ends[1]) < 0.2 * mean(&start), "{apart}, {}", mean(&ends[1]));
        Ok(())
    }

    #[test]
    fn eight_bit_state_takes_a_quarter() -> Result<()> {
        let var = Var::ones(1 << 16, DType::F32, &Device::Cpu)?;
        let bytes = |kind| -> Result<usize> {
            let mut optimizer = AdamW::new(AdamWConfig::default(), kind);
            optimizer.step(&[("p".to_string(), &var)], &[Some(var.as_tensor().copy()?)], 0.1)?;
            Ok(optimizer.state()?.iter().map(|(_, t)| t.elem_count() * t.dtype().size_in_bytes()).sum())
        };
        assert!(bytes(OptimizerKind::AdamW8bit)? * 100 < bytes(OptimizerKind::AdamW)? * 26);
        Ok(())
    }
}
