//! AdamW, with moments in full or in blocks of 8 bits.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var, WithDType};
use lorimer_tensor::storage::blockwise::{Code, SIGNED, UNSIGNED};
use num_traits::Float;
use rayon::prelude::*;

use super::optimizer::{AdamWConfig, Module, Optimizer, OptimizerKind, ParamGroup};
use crate::error::{Error, Result};

/// AdamW as a choice: with moments in the parameters' type, or with block-wise 8-bit moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Adam {
    /// Whether moments are kept in 8 bits.
    pub eight_bit: bool,
}

impl OptimizerKind for Adam {
    fn name(&self) -> &'static str {
        if self.eight_bit { "adamw-8bit" } else { "adamw" }
    }

    fn build(&self, config: AdamWConfig, _method: &str, _modules: &[Module<'_>]) -> Result<Box<dyn Optimizer>> {
        Ok(Box::new(AdamW::new(config, self.eight_bit)))
    }

    fn takes_any_parameter(&self) -> bool {
        true
    }

    fn bytes_per_number(&self) -> f64 {
        if self.eight_bit { EIGHT_BIT_BYTES } else { 8.0 }
    }
}

/// Bytes of both moments of a number in 8 bits, with their scales.
pub(crate) const EIGHT_BIT_BYTES: f64 = 2.04;

/// Numbers that share a scale in 8-bit moments.
const BLOCK: usize = 256;
/// Parameters with fewer elements keep their moments in full, as in bitsandbytes.
const LEAST: usize = 4096;
/// Elements that one thread takes at a time.
const CHUNK: usize = 1 << 15;

/// AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), in the order of operations of torch. With 8-bit state (Dettmers et al.
/// 2022, arXiv 2110.02861) the moments are kept in blocks of 256 with the dynamic code, 2.03 bytes a parameter in place of 8.
pub struct AdamW {
    pub(crate) config: AdamWConfig,
    eight_bit: bool,
    /// By parameter name.
    moments: BTreeMap<String, Moments>,
}

/// First and second moments of one parameter, and how many steps they have seen.
struct Moments {
    kept: Kept,
    steps: Steps,
}

enum Kept {
    Full(Tensor, Tensor),
    Blocks(Blockwise, Blockwise),
}

/// Steps of the whole parameter, or of each row where rows are stepped apart.
#[derive(Clone)]
enum Steps {
    All(usize),
    Rows(Vec<usize>),
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

impl<T: WithDType + Float> Constants<T> {
    /// Of the `steps`-th step.
    fn new(c: &AdamWConfig, steps: usize, rate: f64, decay: bool, scale: f64) -> Self {
        let of = |x: f64| <T as WithDType>::from_f64(x);
        let steps = steps.min(i32::MAX as usize) as i32;
        Self {
            keep: of(if decay { 1.0 - rate * c.weight_decay } else { 1.0 }),
            take1: of(1.0 - c.beta1),
            beta2: of(c.beta2),
            take2: of(1.0 - c.beta2),
            step_size: of(scale * rate / (1.0 - c.beta1.powi(steps))),
            root: of((1.0 - c.beta2.powi(steps)).sqrt()),
            eps: of(c.eps),
        }
    }

    fn update(&self, p: &mut [T], g: &[T], m: &mut [T], v: &mut [T]) {
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            *m = *m + self.take1 * (g - *m);
            *v = *v * self.beta2 + self.take2 * g * g;
            let denominator = v.sqrt() / self.root + self.eps;
            *p = *p * self.keep - self.step_size * *m / denominator;
        }
    }
}

fn flat<T: WithDType>(t: &Tensor) -> candle_core::Result<Vec<T>> {
    t.flatten_all()?.to_vec1::<T>()
}

impl AdamW {
    /// An optimiser that has taken no step, with 8-bit moments or full ones.
    pub fn new(config: AdamWConfig, eight_bit: bool) -> Self {
        Self { config, eight_bit, moments: BTreeMap::new() }
    }

    /// Steps that a parameter has taken.
    pub(crate) fn steps(&self, name: &str) -> usize {
        self.moments.get(name).map_or(0, |m| match &m.steps {
            Steps::All(n) => *n,
            Steps::Rows(rows) => rows.iter().copied().max().unwrap_or(0),
        })
    }

    /// What `p` becomes.
    fn update(&mut self, name: &str, p: &Tensor, g: &Tensor, how: &ParamGroup, rate: f64) -> Result<Tensor> {
        let in_blocks = self.eight_bit && how.eight_bit && p.elem_count() >= LEAST && p.dtype() == DType::F32;
        if in_blocks && (how.rows.is_some() || how.row_scale.is_some()) {
            return Err(Error::Config(
                "8-bit moments and rows that are stepped apart do not go together; use --optimizer adamw".into(),
            ));
        }
        let Moments { kept, mut steps } = match self.moments.remove(name) {
            Some(moments) => moments,
            None => {
                let count = p.elem_count();
                let kept = match in_blocks {
                    true => Kept::Blocks(Blockwise::zeros(count, &SIGNED), Blockwise::zeros(count, &UNSIGNED)),
                    false => Kept::Full(p.zeros_like()?, p.zeros_like()?),
                };
                let rows = how.rows.is_some();
                Moments { kept, steps: if rows { Steps::Rows(vec![0; p.dim(0)?]) } else { Steps::All(0) } }
            }
        };
        let rate = rate * how.rate;
        let (p, kept) = match kept {
            Kept::Blocks(mut m, mut v) => {
                if let Steps::All(n) = &mut steps {
                    *n += 1;
                }
                let p = self.blockwise(p, g, (&mut m, &mut v), &steps, how.decay, rate)?;
                (p, Kept::Blocks(m, v))
            }
            Kept::Full(m, v) => match p.dtype() {
                DType::F64 => self.full::<f64>(p, g, (&m, &v), &mut steps, how, rate)?,
                _ => self.full::<f32>(p, g, (&m, &v), &mut steps, how, rate)?,
            },
        };
        self.moments.insert(name.to_string(), Moments { kept, steps });
        Ok(p)
    }

    /// m̂ / (√v̂ + ε) of a gradient, which takes part in the moments of `name`.
    pub(crate) fn direction(&mut self, name: &str, g: &Tensor) -> Result<Tensor> {
        let how = ParamGroup { decay: false, ..Default::default() };
        self.update(name, &g.zeros_like()?, g, &how, -1.0)
    }

    fn full<T: WithDType + Float>(
        &self,
        p: &Tensor,
        g: &Tensor,
        (m, v): (&Tensor, &Tensor),
        steps: &mut Steps,
        how: &ParamGroup,
        rate: f64,
    ) -> Result<(Tensor, Kept)> {
        let shape = p.shape().clone();
        let (mut p, g, mut m, mut v) = (flat::<T>(p)?, flat::<T>(g)?, flat::<T>(m)?, flat::<T>(v)?);
        let constants = |steps, scale| Constants::<T>::new(&self.config, steps, rate, how.decay, scale);
        match steps {
            Steps::All(n) if how.row_scale.is_none() => {
                *n += 1;
                let constants = constants(*n, 1.0);
                let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
                p.par_chunks_mut(CHUNK)
                    .zip(g.par_chunks(CHUNK))
                    .zip(moments)
                    .for_each(|((p, g), (m, v))| constants.update(p, g, m, v));
            }
            _ => {
                let rows = shape.dims().first().copied().unwrap_or(1).max(1);
                let width = p.len() / rows;
                if let Steps::All(n) = steps {
                    *n += 1;
                }
                for row in how.rows.clone().unwrap_or(0..rows) {
                    let seen = match steps {
                        Steps::All(n) => *n,
                        Steps::Rows(counts) => {
                            counts[row] += 1;
                            counts[row]
                        }
                    };
                    let scale = how.row_scale.as_ref().and_then(|s| s.get(row)).copied().unwrap_or(1.0);
                    let at = row * width..(row + 1) * width;
                    let (p, g) = (&mut p[at.clone()], &g[at.clone()]);
                    constants(seen, scale).update(p, g, &mut m[at.clone()], &mut v[at]);
                }
            }
        }
        let back = |data: Vec<T>| Tensor::from_vec(data, &shape, &Device::Cpu);
        Ok((back(p)?, Kept::Full(back(m)?, back(v)?)))
    }

    fn blockwise(
        &self,
        p: &Tensor,
        g: &Tensor,
        (m, v): (&mut Blockwise, &mut Blockwise),
        steps: &Steps,
        decay: bool,
        rate: f64,
    ) -> Result<Tensor> {
        let shape = p.shape().clone();
        let (mut p, g) = (flat::<f32>(p)?, flat::<f32>(g)?);
        let Steps::All(steps) = steps else { return Err(Error::Config("8-bit moments have no rows".into())) };
        let constants = Constants::<f32>::new(&self.config, *steps, rate, decay, 1.0);
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
        Ok(Tensor::from_vec(p, shape, &Device::Cpu)?)
    }
}

impl Optimizer for AdamW {
    fn step_with(
        &mut self,
        parameters: &[(String, &Var)],
        gradients: &[Option<Tensor>],
        how: &dyn Fn(&str) -> Result<ParamGroup>,
        rate: f64,
    ) -> Result<()> {
        for ((name, var), gradient) in parameters.iter().zip(gradients) {
            let Some(g) = gradient else { continue };
            var.set(&self.update(name, var.as_tensor(), g, &how(name)?, rate)?)?;
        }
        Ok(())
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut all = Vec::new();
        for (name, moments) in &self.moments {
            let steps: Vec<i64> = match &moments.steps {
                Steps::All(n) => vec![*n as i64],
                Steps::Rows(rows) => rows.iter().map(|&n| n as i64).collect(),
            };
            let rows = matches!(moments.steps, Steps::Rows(_));
            let count = steps.len();
            let shape = if rows { vec![count] } else { vec![] };
            all.push((format!("{name}{STEP}"), Tensor::from_vec(steps, shape, &Device::Cpu)?));
            match &moments.kept {
                Kept::Full(m, v) => {
                    all.extend([(format!("{name}{FIRST}"), m.clone()), (format!("{name}{SECOND}"), v.clone())]);
                }
                Kept::Blocks(m, v) => {
                    for (suffix, part) in [(FIRST, m), (SECOND, v)] {
                        let indices = Tensor::from_slice(&part.indices, part.indices.len(), &Device::Cpu)?;
                        let scales = Tensor::from_slice(&part.scales, part.scales.len(), &Device::Cpu)?;
                        all.extend([(format!("{name}{suffix}"), indices), (format!("{name}{suffix}{SCALES}"), scales)]);
                    }
                }
            }
        }
        Ok(all)
    }

    fn restore(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        self.moments.clear();
        let get = |key: &str| {
            state.get(key).ok_or_else(|| Error::Config(format!("the checkpoint's optimiser has no `{key}`")))
        };
        let blocks = |key: &str| -> Result<Blockwise> {
            let (indices, scales) = (flat::<u8>(get(key)?)?, flat::<f32>(get(&format!("{key}{SCALES}"))?)?);
            if scales.len() != indices.len().div_ceil(BLOCK) {
                return Err(Error::Config(format!("the checkpoint's `{key}` has too few scales")));
            }
            Ok(Blockwise { indices, scales })
        };
        for (key, m) in state {
            let Some(name) = key.strip_suffix(FIRST) else { continue };
            let second = format!("{name}{SECOND}");
            let kept = match m.dtype() {
                DType::U8 => Kept::Blocks(blocks(key)?, blocks(&second)?),
                _ => Kept::Full(m.clone(), get(&second)?.clone()),
            };
            let steps = get(&format!("{name}{STEP}"))?;
            let counts: Vec<usize> = flat::<i64>(steps)?.into_iter().map(|n| n.max(0) as usize).collect();
            let steps = match steps.dims() {
                [] => Steps::All(counts[0]),
                [rows] if m.dims().first() == Some(rows) => Steps::Rows(counts),
                _ => return Err(Error::Config(format!("the checkpoint's `{name}{STEP}` does not fit"))),
            };
            self.moments.insert(name.to_string(), Moments { kept, steps });
        }
        Ok(())
    }
}

/// Endings of the names under which state is saved: torch's.
const FIRST: &str = ".exp_avg";
const SECOND: &str = ".exp_avg_sq";
const SCALES: &str = ".scales";
const STEP: &str = ".step";

#[cfg(test)]
mod tests {
    use super::*;

    /// Both kinds walk down the same bowl to nearly the same place; state saved and restored goes on to the same bits.
    #[test]
    fn eight_bit_moments_follow_full_ones_and_resume_exactly() -> Result<()> {
        let start: Vec<f32> = (0..8192).map(|i| (i as f32 * 0.01).sin() + 2.0).collect();
        let mut ends = Vec::new();
        for kind in [false, true] {
            let run = |pause: bool| -> Result<Vec<f32>> {
                let var = Var::from_slice(&start, 8192, &Device::Cpu)?;
                let parameters = [("p".to_string(), &var)];
                let mut optimizer = AdamW::new(AdamWConfig::default(), kind);
                for step in 0..200 {
                    if pause && step == 77 {
                        let state = optimizer.state()?.into_iter().collect();
                        optimizer = AdamW::new(AdamWConfig::default(), kind);
                        optimizer.restore(&state)?;
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
        assert!(bytes(true)? * 100 < bytes(false)? * 26);
        Ok(())
    }
}
