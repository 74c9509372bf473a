//! # GaLore: full-parameter training with the optimiser's state in a low-rank space
//!
//! Zhao et al. 2024, *GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection*, ICML, arXiv 2403.03507, algorithm 2. The
//! targeted weights are trained whole (see `full`). For a gradient G (m, n), every T steps: P is the first r right singular
//! vectors (r, n) where m ≥ n and `R = G Pᵀ` (m, r), else the first r left ones (m, r) and `R = PᵀG` (r, n). AdamW's moments are those of R; what
//! they give, N, goes back: `W ← W − lr · α · N P` (or P N), with decoupled weight decay on W. Moments stay when P changes, as in the reference.
//!
//! Settings: `rank` (r), `update_proj_gap` (T), `scale` (α), `proj_type` (`std`, `reverse_std`, `left`, `right`, `full`), `bits` (8: block-wise
//! 8-bit moments), `per_layer` (each layer is stepped as soon as its gradient exists and the gradient dropped, with layers computed
//! again in the backward; the limit on the gradient's norm then uses the last step's norm), `randomized` (subspace iteration from the last P
//! in place of an exact decomposition). Embeddings and norms (`modules_to_save`) get plain AdamW.
//!
//! Trainable parameters of a projection: `inputs · outputs`. State: `2·r·max(m, n) + r·min(m, n)` numbers in place of `2·m·n`.
//!
//! Meant for: pre-training and full fine-tuning with moments of rank r in place of whole ones; the weights and a layer's gradient stay whole, so that it
//! takes more memory than LoRA (docs/comparison.md: 2.5 times). Step time as `full`, and a decomposition of every weight's gradient
//! every T steps (its share is printed).
//!
//! ```
//! use lorimer_adapter::methods;
//! let settings = serde_json::from_str(r#"{"rank": 4, "bits": 8}"#).unwrap();
//! assert_eq!(methods::build("galore", &settings).unwrap().training().optimizer.unwrap().name(), "galore-8bit");
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor, Var};
use lorimer_tensor::linalg::{qr, truncated_svd};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::entry::{Entry, Part, Served};
use super::full::{self, Full};
use crate::error::{Error, Result};
use crate::method::Method;
use crate::parameter::Role;
use crate::settings::{configure, settings_of, split_off};
use crate::step::site_seed;
use crate::training::adamw::EIGHT_BIT_BYTES;
use crate::training::{AdamW, AdamWConfig, Module, Optimizer, OptimizerKind, ParamGroup, Training};

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "galore",
    title: "Full training, moments in a low-rank space",
    paper: "arXiv 2403.03507",
    kind: "optimizer",
    variants: &[],
    peft_type: "FULL",
    mergeable: true,
    served: Served::Converted,
    lr: 2e-3,
    parts: &[
        ("galore", Part::Optimizer(|settings| Ok(Arc::new(Galore::given(settings)?)))),
        (
            "galore-8bit",
            Part::Optimizer(|settings| {
                let mut settings = settings.clone();
                settings.insert("bits".into(), 8.into());
                Ok(Arc::new(Galore::given(&settings)?))
            }),
        ),
    ],
    flags: &[("rank", "rank"), ("bias", "bias")],
    source: include_str!("galore.rs"),
    laws: &[(r#"{"rank": 4}"#, 1e-12), (r#"{"rank": 4, "proj_type": "full", "update_proj_gap": 10}"#, 1e-12)],
    build: |settings| {
        let mut settings = settings.clone();
        let own = split_off::<Galore>(&mut settings);
        let optimizer: Option<Arc<dyn OptimizerKind>> = Some(Arc::new(Galore::given(&own)?));
        let training = Training { optimizer, ..Default::default() };
        Ok(Box::new(Full { config: configure("galore", &settings)?, name: "galore", training }) as Box<dyn Method>)
    },
    // Its files are those of full fine-tuning.
    recognises: |_| false,
    from_file: full::ENTRY.from_file,
};

/// Settings of GaLore.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Galore {
    /// Rank of the space.
    pub rank: usize,
    /// Steps between two looks for a new space: T.
    pub update_proj_gap: usize,
    /// What the step is multiplied by: α.
    pub scale: f64,
    /// Which side is projected.
    pub proj_type: GaloreProjection,
    /// 32, or 8 for block-wise 8-bit moments.
    pub bits: usize,
    /// Step each layer as soon as its gradient is there, and drop the gradient.
    pub per_layer: bool,
    /// Find the space by subspace iteration from the last one in place of an exact decomposition.
    pub randomized: bool,
}

impl Default for Galore {
    fn default() -> Self {
        Self {
            rank: 128,
            update_proj_gap: 200,
            scale: 0.25,
            proj_type: GaloreProjection::Std,
            bits: 32,
            per_layer: false,
            randomized: false,
        }
    }
}

/// Which side of a gradient (m, n) GaLore projects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GaloreProjection {
    /// The shorter: right singular vectors where m ≥ n, else left.
    #[default]
    Std,
    /// The longer.
    ReverseStd,
    /// Left singular vectors.
    Left,
    /// Right singular vectors.
    Right,
    /// Both.
    Full,
}

impl Galore {
    /// From settings by name.
    pub fn given(settings: &Map<String, Value>) -> Result<Self> {
        let g: Self = configure("galore", settings)?;
        if g.rank == 0 || g.rank > 1 << 16 || g.update_proj_gap == 0 {
            return Err(Error::Config("galore: rank should be between 1 and 65536, update_proj_gap at least 1".into()));
        }
        if !(g.scale.is_finite() && g.scale > 0.0) {
            return Err(Error::Config(format!("galore: scale = {} should be above 0", g.scale)));
        }
        if ![8, 32].contains(&g.bits) {
            return Err(Error::Config(format!("galore: bits = {} should be 32 or 8", g.bits)));
        }
        Ok(g)
    }
}

impl OptimizerKind for Galore {
    fn name(&self) -> &'static str {
        if self.bits == 8 { "galore-8bit" } else { "galore" }
    }

    fn family(&self) -> &'static str {
        "galore"
    }

    fn settings(&self) -> Map<String, Value> {
        settings_of(self)
    }

    fn build(&self, config: AdamWConfig, method: &str, modules: &[Module<'_>]) -> Result<Box<dyn Optimizer>> {
        if modules.iter().any(|(_, _, delta)| delta.parameters().iter().any(|p| p.role != Role::Weight)) {
            return Err(Error::Config(format!(
                "galore projects gradients of whole weights, which `{method}` does not train; use --method full or --method galore"
            )));
        }
        Ok(Box::new(GaloreOptimizer::new(self.clone(), config)))
    }

    fn per_layer(&self) -> bool {
        self.per_layer
    }

    fn bytes_per_number(&self) -> f64 {
        if self.bits == 8 { EIGHT_BIT_BYTES } else { 8.0 }
    }

    fn bytes(&self, (outputs, inputs): (usize, usize), _parameters: u64) -> f64 {
        let (m, n) = (outputs as f64, inputs as f64);
        let (least, most) = (m.min(n), m.max(n));
        let r = (self.rank as f64).min(least);
        let (moments, spaces) = match self.proj_type {
            GaloreProjection::ReverseStd => (r * least, r * most),
            GaloreProjection::Left => (r * n, r * m),
            GaloreProjection::Right => (r * m, r * n),
            GaloreProjection::Full => (r * r, r * (m + n)),
            GaloreProjection::Std => (r * most, r * least),
        };
        self.bytes_per_number() * moments + 4.0 * spaces
    }
}

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
