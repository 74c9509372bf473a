//! How much memory and time a run will take, told before it begins.
//!
//! The memory of a training step is known from shapes: what the tape keeps of every layer until the backward, what the backward holds
//! beside it, logits of one chunk, the adapter with its gradients and moments, and the base. [`Work`] says how many rows the
//! largest batch computes, exactly where the data are at hand.

use lorimer_adapter::method::Bias;
use lorimer_adapter::methods::OptimizerChoice;
use lorimer_adapter::targets::Matcher;
use lorimer_adapter::training::objective::BLOCK_ROWS;
use lorimer_adapter::{BlockSite, Calibration, Method};
use lorimer_model::{Batch, Config, Site};
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

/// Predicts a run's memory and arithmetic.
pub fn plan(request: &Request<'_>) -> Result<Plan> {
    let (c, work) = (request.config.shape(), &request.work);
    let sites = request.config.sites();
    let matcher = Matcher::new(request.method.targeting(), &sites)?;
    let adapted = |site: &Site| matcher.targets(site);
    let (mut parameters, mut held, mut state, mut stepped) = (0u64, 0u64, 0f64, 0u64);
    for site in &sites {
        if adapted(site) {
            let own = request.method.parameters(site)? as u64;
            parameters += own;
            stepped += own;
            state += request.optimizer.0.bytes((site.outputs, site.inputs), own);
            held += request.method.activations_fixed(site) as u64;
        }
        if matcher.saves(&site.path) {
            parameters += (site.inputs * site.outputs) as u64;
        }
        let biases = request.method.bias() == Bias::All || (request.method.bias() == Bias::LoraOnly && adapted(site));
        if biases && request.config.has_bias(&site.role) {
            parameters += site.outputs as u64;
        }
    }
    let own = request.method.blocks();
    let blocks = own.map(|m| BlockSite::all(&c, &sites, m.module())).transpose()?.unwrap_or_default();
    let on_block = |i: usize| {
        let own = own.filter(|m| m.targets(i))?;
        blocks.iter().find(|block| block.layer == i).map(|block| (own, block))
    };
    let in_blocks = |i: usize| on_block(i).map_or(0, |(own, block)| own.parameters(block) as u64);
    parameters += (0..c.layers.len()).map(in_blocks).sum::<u64>();
    let targeted = sites.iter().filter(|site| adapted(site)).count();
    let router = request.method.router_parameters(c.hidden, targeted);
    parameters += router.unwrap_or(0) as u64;
    let embedding = matcher.saves("model.embed_tokens");
    if embedding {
        parameters += (c.vocabulary * c.hidden) as u64;
    }

    // Floats that each row keeps in layer i: what norms, rotary, attention and gate need. What adapted projections read is one of
    // these, or is computed again from them.
    let (h, layers) = (c.hidden as u64, c.layers.len());
    let widths = |i: usize| {
        let layer = &c.layers[i];
        (layer.q_width() as u64, layer.kv_width() as u64, layer.heads as u64, layer.inner as u64)
    };
    let in_layer = |i: usize| sites.iter().filter(move |s| s.layer == Some(i));
    let kept = |i: usize| -> u64 {
        let changes: u64 =
            in_layer(i).filter(|s| adapted(s)).map(|s| request.method.activations_per_row(s) as u64).sum();
        let (q, kv, heads, inner) = widths(i);
        let after = on_block(i).map_or(0, |(own, block)| own.activations_per_row(block) as u64);
        2 * h + 2 * q + 2 * kv + heads + 2 * inner + changes + after
    };
    let first = match embedding {
        true => 0,
        false => {
            (0..layers).find(|&i| in_layer(i).any(adapted) || on_block(i).is_some()).unwrap_or(layers.saturating_sub(1))
        }
    };
    let rows = work.rows as u64;
    let row = match request.checkpointing {
        false => (first..layers).map(kept).sum::<u64>(),
        true => h * (layers - first) as u64 + (first..layers).map(kept).max().unwrap_or(0),
    };
    // With a router: the hidden states of the pass before.
    let activations = rows.saturating_mul(row + if router.is_some() { h } else { 0 });
    let one_layer = |(q, kv, _, inner): (u64, u64, u64, u64)| 5 * h + 4 * inner + q + 2 * kv;
    let mut backward = rows.saturating_mul((0..layers).map(|i| one_layer(widths(i))).max().unwrap_or(0));
    if let Some(own) = request.attention_gradient.low_rank() {
        // Each thread has the sums of a head, and queries' gradients are put together once all of them are there.
        let (mut sums, mut queries) = (0, 0);
        for layer in &c.layers {
            sums = sums.max(own.rule().numbers(layer.head_dim)? as u64);
            queries = queries.max(layer.q_width() as u64);
        }
        let threads = rayon::current_num_threads() as u64;
        backward = backward.saturating_add(threads * sums).saturating_add(rows.saturating_mul(queries));
    }
    let chunk = (CHUNK_BYTES as u64 / (4 * c.vocabulary.max(1) as u64)).clamp(1, work.predicting.max(1) as u64);
    let logits = chunk * c.vocabulary as u64;
    // Whole parameters beside the adapter.
    let embedded = if embedding { (c.vocabulary * c.hidden) as u64 } else { 0 };
    state += request.optimizer.0.bytes_per_number() * parameters.saturating_sub(stepped + embedded) as f64;
    // An embedding's moments are kept in full whatever the optimiser.
    state += 8.0 * embedded as f64;
    // Stepped layer by layer, only the largest layer's gradients are alive at a time.
    let gradients = match request.optimizer.0.per_layer() {
        true => {
            let mut largest = 0;
            for i in 0..layers {
                let mut layer = 0u64;
                for site in in_layer(i).filter(|s| adapted(s)) {
                    layer += request.method.parameters(site)? as u64;
                }
                largest = largest.max(layer);
            }
            largest + parameters.saturating_sub(stepped)
        }
        false => parameters,
    };
    // Logits of both models, their logarithms, exponentials and gradients.
    let further = if request.objective { 10 * (work.predicting.min(BLOCK_ROWS) * c.vocabulary) as u64 } else { 0 };
    let cached = work.repeats && first > 0;
    let cache_bytes = if cached { (work.data_tokens as u64).saturating_mul(4 * h) } else { 0 };
    let breakdown = Breakdown {
        program: PROGRAM + TOKENIZER * c.vocabulary as u64,
        base: request.base_bytes as u64,
        adapter: 4 * (parameters + held),
        gradients: 4 * gradients,
        optimizer: state as u64,
        activations: activations.saturating_mul(4),
        backward: backward.saturating_mul(4),
        logits: 4 * (logits + further),
        frozen_cache: match request.frozen_cache.resolved(cache_bytes) {
            FrozenCache::Memory | FrozenCache::Disk => cache_bytes,
            _ => 0,
        },
    };
    let used = breakdown.parts().iter().fold(0u64, |sum, (_, bytes)| sum.saturating_add(*bytes));
    let moving = breakdown.base.saturating_add(breakdown.activations).saturating_add(breakdown.backward);
    let steps = used.saturating_add((moving as f64 * SLACK) as u64);
    let loading = breakdown.program + breakdown.base + request.file_bytes;
    // Calibration keeps every layer's input for all the rows that it looks at, and of one layer the gradients and what the method
    // makes of them in double precision.
    let looking = match request.method.calibration() {
        Calibration::Gradients { samples, .. } => {
            let rows = rows.saturating_mul(samples.div_ceil(work.batch.max(1)) as u64);
            let hidden = rows.saturating_mul(4 * h * (layers - first) as u64);
            let layer: u64 = in_layer(first).map(|s| (s.inputs * s.outputs) as u64).sum();
            breakdown.program.saturating_add(breakdown.base).saturating_add(hidden).saturating_add(32 * layer)
        }
        _ => 0,
    };

    let flops_of = |site: &Site| (site.inputs * site.outputs) as f64;
    let below: f64 = sites.iter().filter(|s| s.layer.is_some_and(|l| l < first)).map(flops_of).sum();
    let above: f64 = sites.iter().filter(|s| s.layer.is_some_and(|l| l >= first)).map(flops_of).sum();
    let passes = if request.checkpointing { 6.0 } else { 4.0 };
    let below = if breakdown.frozen_cache > 0 { 0.0 } else { 2.0 * below };
    let head = 4.0 * (c.vocabulary * c.hidden) as f64;
    // With a router, a forward of all layers comes first.
    let below = if router.is_some() { below + 2.0 * above + below } else { below };
    let flops = work.total_rows * (passes * above + below) + work.total_predicting * head;
    Ok(Plan { peak_bytes: steps.max(loading).max(looking), breakdown, flops, trainable_parameters: parameters })
}
