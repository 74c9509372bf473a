//! GaLore (Zhao et al. 2024, arXiv 2403.03507, algorithm 2): AdamW's moments in a low-rank space of each weight's gradient.

use std::collections::BTreeMap;
use std::time::Instant;

use candle_core::{DType, Device, Tensor, Var};
use lorimer_adapter::step::site_seed;
use lorimer_adapter::training::{Galore, GaloreProjection};
use lorimer_tensor::linalg::{qr, truncated_svd};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::{AdamW, AdamWConfig, Optimizer, ParamGroup};
use crate::error::Result;

/// Rounds of subspace iteration.
const ROUNDS: usize = 2;

/// The space of one weight's gradient (m, n): orthonormal columns on the left (m, r), orthonormal rows on the right (r, n), or both.
#[derive(Clone, Debug, Default)]
pub struct Space {
    left: Option<Tensor>,
    right: Option<Tensor>,
}

impl Space {
    /// Which sides a gradient of this shape is projected on.
    fn sides(kind: GaloreProjection, (m, n): (usize, usize)) -> (bool, bool) {
        match kind {
            GaloreProjection::Std => (m < n, m >= n),
            GaloreProjection::ReverseStd => (m >= n, m < n),
            GaloreProjection::Left => (true, false),
            GaloreProjection::Right => (false, true),
            GaloreProjection::Full => (true, true),
        }
    }

    fn exact(settings: &Galore, g: &Tensor) -> Result<Self> {
        let (m, n) = g.dims2()?;
        let (left, right) = Self::sides(settings.proj_type, (m, n));
        let (u, _, vt) = truncated_svd(g, settings.rank.min(m).min(n))?;
        let of = |t: Tensor| -> Result<Tensor> { Ok(t.to_dtype(g.dtype())?.contiguous()?) };
        Ok(Self { left: if left { Some(of(u)?) } else { None }, right: if right { Some(of(vt)?) } else { None } })
    }

    /// By subspace iteration from what there was.
    fn iterated(settings: &Galore, g: &Tensor, before: &Self, name: &str) -> Result<Self> {
        let (m, n) = g.dims2()?;
        let rank = settings.rank.min(m).min(n);
        let (left, right) = Self::sides(settings.proj_type, (m, n));
        let g64 = g.to_dtype(DType::F64)?;
        let other = g64.t()?.contiguous()?;
        let random = |rows: usize| {
            let mut rng = ChaCha8Rng::seed_from_u64(site_seed(rows as u64, name));
            let data: Vec<f64> = (0..rows * rank).map(|_| rng.random_range(-1.0..1.0)).collect();
            Tensor::from_vec(data, (rows, rank), &Device::Cpu)
        };
        // Columns that span the largest directions of `to`'s rows.
        let iterate = |to: &Tensor, back: &Tensor, from: Tensor| -> Result<Tensor> {
            let mut q = from;
            for _ in 0..ROUNDS {
                q = qr(&back.matmul(&to.matmul(&q)?)?)?.0;
            }
            Ok(q)
        };
        let start = |kept: Option<Tensor>, rows| match kept {
            Some(t) => t.to_dtype(DType::F64),
            None => random(rows),
        };
        let mut space = Self::default();
        if left {
            let q = iterate(&other, &g64, start(before.left.clone(), m)?)?;
            space.left = Some(q.to_dtype(g.dtype())?);
        }
        if right {
            let kept = before.right.as_ref().map(|t| t.t()?.contiguous()).transpose()?;
            let q = iterate(&g64, &other, start(kept, n)?)?;
            space.right = Some(q.t()?.contiguous()?.to_dtype(g.dtype())?);
        }
        Ok(space)
    }

    /// The gradient in the space.
    pub fn project(&self, g: &Tensor) -> candle_core::Result<Tensor> {
        let g = match &self.left {
            Some(left) => left.t()?.matmul(g)?,
            None => g.clone(),
        };
        match &self.right {
            Some(right) => g.matmul(&right.t()?),
            None => Ok(g),
        }
    }

    /// Out of the space.
    pub fn back(&self, n: &Tensor) -> candle_core::Result<Tensor> {
        let n = match &self.left {
            Some(left) => left.matmul(n)?,
            None => n.clone(),
        };
        match &self.right {
            Some(right) => n.matmul(right),
            None => Ok(n),
        }
    }
}

/// GaLore's state: a space a weight, and AdamW's moments in it.
pub struct GaloreOptimizer {
    settings: Galore,
    adam: AdamW,
    spaces: BTreeMap<String, Space>,
    seconds: f64,
}

impl GaloreOptimizer {
    /// One that has taken no step.
    pub fn new(settings: Galore, config: AdamWConfig) -> Self {
        let adam = AdamW::new(config, settings.bits == 8);
        Self { settings, adam, spaces: BTreeMap::new(), seconds: 0.0 }
    }
}

impl Optimizer for GaloreOptimizer {
    fn step_with(
        &mut self,
        parameters: &[(String, &Var)],
        gradients: &[Option<Tensor>],
        how: &dyn Fn(&str) -> Result<ParamGroup>,
        rate: f64,
    ) -> Result<()> {
        let is_projected =
            |(name, var): &(String, &Var)| -> Result<bool> { Ok(var.dims().len() == 2 && how(name)?.projected) };
        let projected = parameters.iter().map(is_projected).collect::<Result<Vec<bool>>>()?;
        let due: Vec<(&String, &Tensor)> = parameters
            .iter()
            .zip(gradients)
            .zip(&projected)
            .filter(|(((name, _), _), projected)| {
                **projected && self.adam.steps(name).is_multiple_of(self.settings.update_proj_gap)
            })
            .filter_map(|(((name, _), g), _)| Some((name, g.as_ref()?)))
            .collect();
        let clock = Instant::now();
        let find = |(name, g): &(&String, &Tensor)| -> Result<(String, Space)> {
            let space = match (self.settings.randomized, self.spaces.get(*name)) {
                (false, _) => Space::exact(&self.settings, g)?,
                (true, before) => Space::iterated(&self.settings, g, before.unwrap_or(&Space::default()), name)?,
            };
            Ok(((*name).clone(), space))
        };
        let found = due.par_iter().map(find).collect::<Result<Vec<_>>>()?;
        self.spaces.extend(found);
        self.seconds += clock.elapsed().as_secs_f64();
        for (i, (name, var)) in parameters.iter().enumerate() {
            let Some(g) = &gradients[i] else { continue };
            let Some(space) = self.spaces.get(name).filter(|_| projected[i]) else {
                self.adam.step_with(&parameters[i..=i], &gradients[i..=i], how, rate)?;
                continue;
            };
            let step = space.back(&self.adam.direction(name, &space.project(g)?)?)?;
            let how = how(name)?;
            let rate = rate * how.rate;
            let keep = if how.decay { 1.0 - rate * self.adam.config.weight_decay } else { 1.0 };
            let moved = (var.as_tensor() - (step * (rate * self.settings.scale))?)?;
            var.set(&if keep == 1.0 { moved } else { (moved * keep)? })?;
        }
        Ok(())
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut all = self.adam.state()?;
        for (name, space) in &self.spaces {
            all.extend(space.left.iter().map(|t| (format!("{name}{LEFT}"), t.clone())));
            all.extend(space.right.iter().map(|t| (format!("{name}{RIGHT}"), t.clone())));
        }
        Ok(all)
    }

    fn restore(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        self.spaces.clear();
        for (key, t) in state {
            if let Some(name) = key.strip_suffix(LEFT) {
                self.spaces.entry(name.to_string()).or_default().left = Some(t.clone());
            }
            if let Some(name) = key.strip_suffix(RIGHT) {
                self.spaces.entry(name.to_string()).or_default().right = Some(t.clone());
            }
        }
        self.adam.restore(state)
    }

    fn decomposing_seconds(&self) -> f64 {
        self.seconds
    }
}

/// Endings of the names under which spaces are saved.
const LEFT: &str = ".galore_left";
const RIGHT: &str = ".galore_right";
