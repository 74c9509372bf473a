//! How much memory and time a run will take, told before it begins.
//!
//! The memory of a training step is known from shapes: what the tape keeps of every layer until the backward, what the backward holds
//! beside it, logits of one chunk, the adapter with its gradients and moments, and the base. [`Work`] says how many rows the
//! largest batch computes, exactly where the data are at hand.

use lorimer_adapter::method::{Bias, BlockMethod};
use lorimer_adapter::methods::OptimizerChoice;
use lorimer_adapter::targets::Matcher;
use lorimer_adapter::training::objective::BLOCK_ROWS;
use lorimer_adapter::{BlockSite, Calibration, Method};
use lorimer_model::{Batch, Config, LayerShape, ModelShape, Site};
use lorimer_tensor::ops::loss::CHUNK_BYTES;
use serde::Serialize;

use crate::data::encode::Example;
use crate::error::Result;
use crate::run::attention::AttentionGradient;
use crate::run::frozen::FrozenCache;
use crate::run::trainer::TrainSettings;

/// Micro-batches that are looked at; longer runs are scaled up from these.
const LOOKED_AT: usize = 2048;

/// What the steps of a run compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Work {
    /// Token rows that the largest micro-batch computes, prefixes shared.
    pub rows: usize,
    /// Rows of it that predict a supervised token.
    pub predicting: usize,
    /// Token rows of the whole run.
    pub total_rows: f64,
    /// Predicting rows of the whole run.
    pub total_predicting: f64,
    /// Tokens of all training rows.
    pub data_tokens: usize,
    /// Whether rows are seen more than once.
    pub repeats: bool,
    /// Rows of data in a micro-batch.
    pub batch: usize,
}

impl Work {
    /// From the data itself. `independent` as [`lorimer_adapter::Delta::rows_are_independent`].
    pub fn of_rows(train: &[Example], settings: &TrainSettings, independent: bool) -> Self {
        let data_tokens = train.iter().map(|e| e.tokens.len()).sum();
        let (repeats, batch) = (settings.repeats(train.len()), settings.batch_size);
        let mut work = Self { data_tokens, repeats, batch, ..Self::default() };
        if train.is_empty() {
            return work;
        }
        let (mut order, mut looked_at, mut steps) = (None, 0, 0);
        let total = settings.total_steps(train.len());
        while steps < total && looked_at < LOOKED_AT {
            for places in settings.rows(steps, train.len(), &mut order) {
                let sequences = places.iter().map(|&i| train[i].seen(independent));
                let batch = match settings.step.share_prefixes && independent {
                    true => Batch::share(sequences),
                    false => Batch::pack(sequences),
                };
                let predicting: usize = places.iter().map(|&i| train[i].targets().count()).sum();
                work.rows = work.rows.max(batch.tokens.len());
                work.predicting = work.predicting.max(predicting);
                work.total_rows += batch.tokens.len() as f64;
                work.total_predicting += predicting as f64;
                looked_at += 1;
            }
            steps += 1;
        }
        let scale = total as f64 / steps.max(1) as f64;
        work.total_rows *= scale;
        work.total_predicting *= scale;
        work
    }

    /// Without data: `batch` rows of `length` tokens that share nothing, all supervised, for `steps` micro-batches.
    pub fn worst(batch: usize, length: usize, steps: usize) -> Self {
        let rows = batch.saturating_mul(length);
        let total = rows as f64 * steps as f64;
        Self {
            rows,
            predicting: rows,
            total_rows: total,
            total_predicting: total,
            data_tokens: rows.saturating_mul(steps),
            repeats: false,
            batch,
        }
    }
}

/// What is asked for.
pub struct Request<'a> {
    /// The base's shape.
    pub config: &'a Config,
    /// Bytes of its weights in memory: [`Config::planned_bytes`].
    pub base_bytes: usize,
    /// Bytes of the base's files, which are mapped while the weights are read.
    pub file_bytes: u64,
    /// The method with its configuration.
    pub method: &'a dyn Method,
    /// The steps.
    pub work: Work,
    /// Whether layers are computed again in the backward.
    pub checkpointing: bool,
    /// The optimiser.
    pub optimizer: OptimizerChoice,
    /// Whether there is a further term of the loss, which looks at the frozen base's logits too.
    pub objective: bool,
    /// What becomes of frozen lower layers' output.
    pub frozen_cache: FrozenCache,
    /// How gradients of attention are computed.
    pub attention_gradient: AttentionGradient,
}

/// Peak memory by what it is for, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Breakdown {
    /// The program, its tokenizer and what it reads.
    pub program: u64,
    /// The base's weights.
    pub base: u64,
    /// Trainable parameters, and what the method holds beside them.
    pub adapter: u64,
    /// Their gradients.
    pub gradients: u64,
    /// The optimiser's moments.
    pub optimizer: u64,
    /// What the forward keeps for the backward.
    pub activations: u64,
    /// What one layer's backward holds beside that.
    pub backward: u64,
    /// Logits of one chunk of rows.
    pub logits: u64,
    /// Output of frozen lower layers kept from epoch to epoch.
    pub frozen_cache: u64,
}

impl Breakdown {
    /// Name and bytes of each part.
    pub fn parts(&self) -> [(&'static str, u64); 9] {
        [
            ("program", self.program),
            ("base weights", self.base),
            ("adapter", self.adapter),
            ("gradients", self.gradients),
            ("optimiser", self.optimizer),
            ("activations", self.activations),
            ("backward", self.backward),
            ("logits", self.logits),
            ("frozen layers", self.frozen_cache),
        ]
    }
}

/// A prediction.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// Peak resident bytes of the process.
    pub peak_bytes: u64,
    /// What they are for.
    pub breakdown: Breakdown,
    /// Floating-point operations of all steps.
    pub flops: f64,
    /// Trainable parameters.
    pub trainable_parameters: u64,
}

/// The program before it has read the base's weights, and what the tokenizer takes for each token; measured.
const PROGRAM: u64 = 68 << 20;
const TOKENIZER: u64 = 330;
/// Share of memory taken and freed that is not in one piece and so not used again; measured.
const SLACK: f64 = 0.05;

/// A model with a method on it, as the plan counts the two.
struct Adapted<'a> {
    request: &'a Request<'a>,
    shape: ModelShape,
    sites: Vec<Site>,
    matcher: Matcher,
    /// The blocks, where the method does something to whole ones.
    blocks: Vec<BlockSite>,
    /// Parameters of the head that makes routes, where the adapter has one.
    router: Option<usize>,
    /// Whether the embedding is trained whole.
    embedding: bool,
}

/// Numbers that are trained, and what goes with them.
#[derive(Default)]
struct Parameters {
    /// All of them.
    trained: u64,
    /// Those of targeted projections.
    on_projections: u64,
    /// What the method holds beside them.
    fixed: u64,
    /// Bytes of the optimiser's state.
    state: f64,
}

impl<'a> Adapted<'a> {
    fn new(request: &'a Request<'a>) -> Result<Self> {
        let (shape, sites) = (request.config.shape(), request.config.sites());
        let matcher = Matcher::new(request.method.targeting(), &sites)?;
        let own = request.method.blocks();
        let blocks = own.map(|m| BlockSite::all(&shape, &sites, m.module())).transpose()?.unwrap_or_default();
        let targeted = sites.iter().filter(|site| matcher.targets(site)).count();
        let router = request.method.router_parameters(shape.hidden, targeted);
        let embedding = matcher.saves("model.embed_tokens");
        Ok(Self { request, shape, sites, matcher, blocks, router, embedding })
    }

    fn adapts(&self, site: &Site) -> bool {
        self.matcher.targets(site)
    }

    fn in_layer(&self, i: usize) -> impl Iterator<Item = &Site> {
        self.sites.iter().filter(move |s| s.layer == Some(i))
    }

    fn layers(&self) -> usize {
        self.shape.layers.len()
    }

    /// What the method puts on a block.
    fn on_block(&self, i: usize) -> Option<(&dyn BlockMethod, &BlockSite)> {
        let own = self.request.method.blocks().filter(|m| m.targets(i))?;
        self.blocks.iter().find(|block| block.layer == i).map(|block| (own, block))
    }

    /// The first layer that a gradient goes through; those below keep nothing.
    fn first(&self) -> usize {
        if self.embedding {
            return 0;
        }
        let adapted = |&i: &usize| self.in_layer(i).any(|s| self.adapts(s)) || self.on_block(i).is_some();
        (0..self.layers()).find(adapted).unwrap_or(self.layers().saturating_sub(1))
    }

    fn parameters(&self) -> Result<Parameters> {
        let (method, optimizer) = (self.request.method, self.request.optimizer.0.as_ref());
        let mut p = Parameters::default();
        for site in &self.sites {
            let adapted = self.adapts(site);
            if adapted {
                let own = method.parameters(site)? as u64;
                p.trained += own;
                p.on_projections += own;
                p.state += optimizer.bytes((site.outputs, site.inputs), own);
                p.fixed += method.activations_fixed(site) as u64;
            }
            if self.matcher.saves(&site.path) {
                p.trained += (site.inputs * site.outputs) as u64;
            }
            let biases = method.bias() == Bias::All || (method.bias() == Bias::LoraOnly && adapted);
            if biases && self.request.config.has_bias(&site.role) {
                p.trained += site.outputs as u64;
            }
        }
        let in_blocks = |i: usize| self.on_block(i).map_or(0, |(own, block)| own.parameters(block) as u64);
        p.trained += (0..self.layers()).map(in_blocks).sum::<u64>();
        p.trained += self.router.unwrap_or(0) as u64;
        let embedded = if self.embedding { (self.shape.vocabulary * self.shape.hidden) as u64 } else { 0 };
        p.trained += embedded;
        // Whole parameters beside the adapter.
        p.state += optimizer.bytes_per_number() * p.trained.saturating_sub(p.on_projections + embedded) as f64;
        // An embedding's moments are kept in full whatever the optimiser.
        p.state += 8.0 * embedded as f64;
        Ok(p)
    }

    /// Most numbers of gradients alive at a time.
    fn gradients(&self, parameters: &Parameters) -> Result<u64> {
        if !self.request.optimizer.0.per_layer() {
            return Ok(parameters.trained);
        }
        // Stepped layer by layer, only the largest layer's are.
        let mut largest = 0;
        for i in 0..self.layers() {
            let mut layer = 0u64;
            for site in self.in_layer(i).filter(|s| self.adapts(s)) {
                layer += self.request.method.parameters(site)? as u64;
            }
            largest = largest.max(layer);
        }
        Ok(largest + parameters.trained.saturating_sub(parameters.on_projections))
    }

    /// Floats that each row keeps in layer i: what norms, rotary, attention and gate need. What adapted projections read is one of
    /// these, or is computed again from them.
    fn kept_in_layer(&self, i: usize) -> u64 {
        let method = self.request.method;
        let changes: u64 =
            self.in_layer(i).filter(|s| self.adapts(s)).map(|s| method.activations_per_row(s) as u64).sum();
        let layer = &self.shape.layers[i];
        let (q, kv, inner) = (layer.q_width() as u64, layer.kv_width() as u64, layer.inner as u64);
        let after = self.on_block(i).map_or(0, |(own, block)| own.activations_per_row(block) as u64);
        2 * self.shape.hidden as u64 + 2 * q + 2 * kv + layer.heads as u64 + 2 * inner + changes + after
    }

    /// Floats that each row keeps until the backward.
    fn kept(&self) -> u64 {
        let (h, above) = (self.shape.hidden as u64, self.first()..self.layers());
        let row = match self.request.checkpointing {
            false => above.map(|i| self.kept_in_layer(i)).sum::<u64>(),
            true => h * above.len() as u64 + above.map(|i| self.kept_in_layer(i)).max().unwrap_or(0),
        };
        // With a router: the hidden states of the pass before.
        row + if self.router.is_some() { h } else { 0 }
    }

    /// Floats that one layer's backward holds beside them, of so many rows.
    fn held_in_backward(&self, rows: u64) -> Result<u64> {
        let one = |layer: &LayerShape| {
            let (q, kv, inner) = (layer.q_width() as u64, layer.kv_width() as u64, layer.inner as u64);
            5 * self.shape.hidden as u64 + 4 * inner + q + 2 * kv
        };
        let mut held = rows.saturating_mul(self.shape.layers.iter().map(one).max().unwrap_or(0));
        if let Some(own) = self.request.attention_gradient.low_rank() {
            // Each thread has the sums of a head, and queries' gradients are put together once all of them are there.
            let (mut sums, mut queries) = (0, 0);
            for layer in &self.shape.layers {
                sums = sums.max(own.rule().numbers(layer.head_dim)? as u64);
                queries = queries.max(layer.q_width() as u64);
            }
            let threads = rayon::current_num_threads() as u64;
            held = held.saturating_add(threads * sums).saturating_add(rows.saturating_mul(queries));
        }
        Ok(held)
    }

    /// Numbers of logits of one chunk of rows, and of what an auxiliary loss makes of a block of them.
    fn logits(&self) -> u64 {
        let (vocabulary, predicting) = (self.shape.vocabulary, self.request.work.predicting);
        let chunk = (CHUNK_BYTES as u64 / (4 * vocabulary.max(1) as u64)).clamp(1, predicting.max(1) as u64);
        // Logits of both models, their logarithms, exponentials and gradients.
        let further = if self.request.objective { 10 * (predicting.min(BLOCK_ROWS) * vocabulary) as u64 } else { 0 };
        chunk * vocabulary as u64 + further
    }

    /// Bytes of the frozen lower layers' output, where it is kept.
    fn frozen_cache(&self) -> u64 {
        let work = &self.request.work;
        let cached = work.repeats && self.first() > 0;
        let bytes = if cached { (work.data_tokens as u64).saturating_mul(4 * self.shape.hidden as u64) } else { 0 };
        match self.request.frozen_cache.resolved(bytes) {
            FrozenCache::Memory | FrozenCache::Disk => bytes,
            _ => 0,
        }
    }

    /// Bytes that calibration holds beside program and base: every layer's input for all the rows that it looks at, and of one layer the gradients
    /// and what the method makes of them in double precision. None where it keeps nothing.
    fn calibration(&self) -> Option<u64> {
        let Calibration::Gradients { samples, .. } = self.request.method.calibration() else { return None };
        let (first, work) = (self.first(), &self.request.work);
        let rows = (work.rows as u64).saturating_mul(samples.div_ceil(work.batch.max(1)) as u64);
        let hidden = rows.saturating_mul(4 * self.shape.hidden as u64 * (self.layers() - first) as u64);
        let layer: u64 = self.in_layer(first).map(|s| (s.inputs * s.outputs) as u64).sum();
        Some(hidden.saturating_add(32 * layer))
    }

    /// Floating-point operations of all steps. `cached`: the lower layers' output is kept.
    fn flops(&self, cached: bool) -> f64 {
        let (first, work) = (self.first(), &self.request.work);
        let flops_of = |site: &Site| (site.inputs * site.outputs) as f64;
        let below: f64 = self.sites.iter().filter(|s| s.layer.is_some_and(|l| l < first)).map(flops_of).sum();
        let above: f64 = self.sites.iter().filter(|s| s.layer.is_some_and(|l| l >= first)).map(flops_of).sum();
        let passes = if self.request.checkpointing { 6.0 } else { 4.0 };
        let below = if cached { 0.0 } else { 2.0 * below };
        let head = 4.0 * (self.shape.vocabulary * self.shape.hidden) as f64;
        // With a router, a forward of all layers comes first.
        let below = if self.router.is_some() { below + 2.0 * above + below } else { below };
        work.total_rows * (passes * above + below) + work.total_predicting * head
    }
}

/// Predicts a run's memory and arithmetic.
pub fn plan(request: &Request<'_>) -> Result<Plan> {
    let adapted = Adapted::new(request)?;
    let (rows, parameters) = (request.work.rows as u64, adapted.parameters()?);
    let breakdown = Breakdown {
        program: PROGRAM + TOKENIZER * adapted.shape.vocabulary as u64,
        base: request.base_bytes as u64,
        adapter: 4 * (parameters.trained + parameters.fixed),
        gradients: 4 * adapted.gradients(&parameters)?,
        optimizer: parameters.state as u64,
        activations: rows.saturating_mul(adapted.kept()).saturating_mul(4),
        backward: adapted.held_in_backward(rows)?.saturating_mul(4),
        logits: 4 * adapted.logits(),
        frozen_cache: adapted.frozen_cache(),
    };
    let used = breakdown.parts().iter().fold(0u64, |sum, (_, bytes)| sum.saturating_add(*bytes));
    let moving = breakdown.base.saturating_add(breakdown.activations).saturating_add(breakdown.backward);
    let steps = used.saturating_add((moving as f64 * SLACK) as u64);
    let resident = breakdown.program.saturating_add(breakdown.base);
    let loading = resident.saturating_add(request.file_bytes);
    let calibrating = adapted.calibration().map_or(0, |bytes| resident.saturating_add(bytes));
    Ok(Plan {
        peak_bytes: steps.max(loading).max(calibrating),
        breakdown,
        flops: adapted.flops(breakdown.frozen_cache > 0),
        trainable_parameters: parameters.trained,
    })
}
