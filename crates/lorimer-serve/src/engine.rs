//! The engine: requests in, tokens out, step by step; no clock, no network and no files.
//!
//! A step takes what the scheduler planned through the model in one forward, whatever adapters the rows belong to, and draws a token for
//! every request whose last row is there. The same requests with the same seeds get the same tokens, alone or among others.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::DType;
use lorimer_model::Llama;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::Serialize;

use crate::batched::{Batched, Rows, Used};
use crate::error::{Error, Result};
use crate::generate::FinishReason;
use crate::hosted::Hosted;
use crate::pool::{BLOCK, Geometry, Pool};
use crate::prefix::{NodeId, PrefixCache};
use crate::residents::Residents;
use crate::sampling::Sampling;
use crate::scheduler::{Job, Plan, Policy, Refusal, Scheduler};

/// How an engine is set up.
#[derive(Clone, Debug)]
pub struct EngineSettings {
    /// Bytes of the pool of keys, values and adapters.
    pub pool_bytes: usize,
    /// How requests are scheduled.
    pub policy: Policy,
    /// Whether keys and values of prompts are kept for requests that begin alike.
    pub prefix_cache: bool,
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self { pool_bytes: 1 << 30, policy: Policy::default(), prefix_cache: true }
    }
}

/// What is asked of the engine.
#[derive(Clone, Debug)]
pub struct Request {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Adapters with their weights; none for the base.
    pub adapters: Vec<(Arc<Hosted>, f32)>,
    /// Most tokens to generate, at least one.
    pub max_tokens: usize,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Where random numbers come from.
    pub seed: u64,
    /// Tokens that end the answer.
    pub stop: Vec<u32>,
    /// How many of the likeliest tokens to tell with each; none for no log-probabilities.
    pub log_probabilities: Option<usize>,
    /// Whom it is for.
    pub tenant: String,
    /// Names under which the adapters were asked for, for figures.
    pub names: Vec<String>,
}

/// A generated token.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Token {
    /// Its id.
    pub token: u32,
    /// log p before any sampling setting, where asked for.
    pub log_probability: Option<f32>,
    /// The likeliest tokens, where asked for.
    pub top: Vec<(u32, f32)>,
}

/// What a step brought.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A token of a request; with the reason if it is the last.
    Token(u64, Token, Option<FinishReason>),
    /// A request is refused.
    Refused(u64, Refusal),
    /// A request could not be computed.
    Failed(u64, String),
}

/// A request in the engine.
struct Sequence {
    request: Request,
    /// Prompt and answer.
    tokens: Vec<u32>,
    generated: usize,
    /// Tokens whose keys and values are in the pool.
    computed: usize,
    /// Pages of its blocks, a page a layer.
    blocks: Vec<Vec<u32>>,
    /// Its blocks that stand in the prefix cache, and the last of them.
    shared: usize,
    node: Option<NodeId>,
    /// What its keys and values depend on beside the tokens.
    content: String,
    /// Whether it was let in, and how many of its adapters are leased to it.
    runs: bool,
    leased: usize,
    rng: ChaCha8Rng,
}

/// Names of adapters that requests use, at most some hundred of each.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct AtWork {
    /// Of those that run.
    pub running: Vec<String>,
    /// Of those that wait.
    pub waiting: Vec<String>,
}

/// Figures of an engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct EngineState {
    /// Requests that run.
    pub running: usize,
    /// Requests that wait.
    pub waiting: usize,
    /// Pages of the pool.
    pub pages: usize,
    /// Pages that nobody uses.
    pub free_pages: usize,
    /// Pages of adapters.
    pub adapter_pages: usize,
    /// Pages that only the prefix cache holds.
    pub cached_pages: usize,
    /// Adapters in the pool.
    pub adapters: usize,
    /// Copies of adapters into the pool.
    pub adapter_loads: u64,
    /// Adapters that had to leave the pool.
    pub adapter_evictions: u64,
    /// Prompt tokens computed.
    pub prompt_tokens: u64,
    /// Prompt tokens that the prefix cache had.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Requests that were put back because the pool was full after all.
    pub put_back: u64,
}

/// Requests, pool and adapters of one model.
pub struct Engine<'m> {
    model: &'m Llama,
    geometry: Geometry,
    pool: Pool,
    prefix: Option<PrefixCache>,
    residents: Residents,
    scheduler: Scheduler,
    sequences: HashMap<u64, Sequence>,
    next: u64,
    counted: EngineState,
}

impl<'m> Engine<'m> {
    /// An engine over a model that computes in f32.
    pub fn new(model: &'m Llama, settings: EngineSettings) -> Result<Self> {
        if lorimer_model::BaseModel::dtype(model) != DType::F32 {
            return Err(Error::Pool("the engine computes in f32; open the model so".into()));
        }
        let geometry = Geometry::of(&model.config);
        let pool = Pool::new(geometry, settings.pool_bytes)?;
        let scheduler = Scheduler::new(settings.policy, geometry, pool.pages());
        Ok(Self {
            model,
            geometry,
            pool,
            prefix: settings.prefix_cache.then(PrefixCache::default),
            residents: Residents::default(),
            scheduler,
            sequences: HashMap::new(),
            next: 0,
            counted: EngineState::default(),
        })
    }

    /// How pages are laid out.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Takes a request at time `now` (seconds, of any clock that does not go back). Gives its number; the refusal where the queue is full or
    /// the pool could never hold it.
    pub fn submit(&mut self, request: Request, now: f64) -> Result<std::result::Result<u64, Refusal>> {
        self.check(&request)?;
        let id = self.next;
        let job = Job {
            id,
            tenant: request.tenant.clone(),
            adapters: request
                .adapters
                .iter()
                .map(|(a, _)| (a.content_id.as_str().into(), a.pages(self.geometry)))
                .collect(),
            prompt: request.prompt.len(),
            max_output: request.max_tokens,
            arrived: now,
        };
        if let Err(refusal) = self.scheduler.submit(job) {
            return Ok(Err(refusal));
        }
        self.next += 1;
        let content: Vec<String> =
            request.adapters.iter().map(|(a, weight)| format!("{}*{}", a.content_id, weight.to_bits())).collect();
        let sequence = Sequence {
            tokens: request.prompt.clone(),
            generated: 0,
            computed: 0,
            blocks: Vec::new(),
            shared: 0,
            node: None,
            content: content.join("+"),
            runs: false,
            leased: 0,
            rng: ChaCha8Rng::seed_from_u64(request.seed),
            request,
        };
        self.sequences.insert(id, sequence);
        Ok(Ok(id))
    }

    fn check(&self, request: &Request) -> Result<()> {
        let fail = |text: String| Err(Error::Request(text));
        if request.prompt.is_empty() {
            return fail("the prompt is empty; there is nothing to go on from".into());
        }
        if request.max_tokens == 0 {
            return fail("max_tokens should be at least 1".into());
        }
        self.model.check_length(request.prompt.len().saturating_add(request.max_tokens))?;
        let vocabulary = self.model.config.vocab_size;
        if let Some(bad) = request.prompt.iter().find(|&&t| t as usize >= vocabulary) {
            return fail(format!("token {bad} is outside the vocabulary of {vocabulary}"));
        }
        request.sampling.check().map_err(Error::Request)?;
        for (i, (adapter, weight)) in request.adapters.iter().enumerate() {
            if !weight.is_finite() {
                return fail("an adapter's weight should be a finite number".into());
            }
            if let Some(why) = adapter.not_additive
                && (request.adapters.len() > 1 || *weight != 1.0)
            {
                return fail(format!("a `{}` adapter can only be used alone and at weight 1: {why}", adapter.method));
            }
            if request.adapters[..i].iter().any(|(a, _)| a.content_id == adapter.content_id) {
                return fail(
                    "an adapter stands twice in the request; give it once, with the sum of its weights".into(),
                );
            }
        }
        Ok(())
    }

    /// Takes a request out: its client has gone.
    pub fn cancel(&mut self, id: u64) {
        self.scheduler.remove(id);
        if let Some(mut sequence) = self.sequences.remove(&id) {
            self.vacate(&mut sequence);
        }
    }

    /// Whether nothing waits or runs.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Names of the adapters at work.
    pub fn at_work(&self) -> AtWork {
        const MOST: usize = 256;
        let names = |runs: bool| {
            let of = self.sequences.values().filter(|s| s.runs == runs).flat_map(|s| &s.request.names);
            let unique: std::collections::BTreeSet<&String> = of.collect();
            unique.into_iter().take(MOST).cloned().collect()
        };
        AtWork { running: names(true), waiting: names(false) }
    }

    /// Number of requests that run.
    pub fn running(&self) -> usize {
        self.scheduler.running()
    }

    /// Keeps an adapter in the pool once it is there, or no longer.
    pub fn pin(&mut self, content: &str, pinned: bool) {
        self.residents.account().pin(content, pinned);
    }

    /// Figures of now.
    pub fn state(&mut self) -> EngineState {
        let adapters = self.residents.account();
        let (adapter_pages, count, loads, evictions) =
            (adapters.pages(), adapters.len(), adapters.loads, adapters.evictions);
        EngineState {
            running: self.scheduler.running(),
            waiting: self.scheduler.waiting(),
            pages: self.pool.pages(),
            free_pages: self.pool.free(),
            adapter_pages,
            cached_pages: self.prefix.as_ref().map_or(0, |prefix| prefix.idle_pages(&self.pool)),
            adapters: count,
            adapter_loads: loads,
            adapter_evictions: evictions,
            ..self.counted
        }
    }

    /// Seconds after which a refused client may try again.
    pub fn retry_after(&mut self, now: f64) -> f64 {
        self.scheduler.retry_after(now)
    }

    /// One step: the scheduler's plan, one forward, a token for each request that has come so far.
    pub fn step(&mut self, now: f64) -> Vec<Event> {
        let Self { sequences, prefix, pool, counted, .. } = self;
        let plan = self.scheduler.plan(now, |job| {
            let Some((s, prefix)) = sequences.get_mut(&job.id).zip(prefix.as_mut()) else { return 0 };
            // The pages are held from here on, so that making room does not take them.
            for node in prefix.find(&s.content, &s.tokens) {
                let pages = prefix.pages(node).to_vec();
                pool.share(&pages);
                s.blocks.push(pages);
                s.node = Some(node);
            }
            s.shared = s.blocks.len();
            s.computed = s.shared * BLOCK;
            counted.cached_tokens += s.computed as u64;
            s.computed
        });
        let mut events = Vec::new();
        for id in &plan.refused {
            self.sequences.remove(id);
            events.push(Event::Refused(*id, Refusal::TooLate));
        }
        let work = self.prepare(plan);
        if work.is_empty() {
            return events;
        }
        match self.forward(&work) {
            Ok(mut tokens) => events.append(&mut tokens),
            Err(error) => {
                // Whatever it was, it was one of these; the others go on.
                for (id, _) in work {
                    self.cancel(id);
                    events.push(Event::Failed(id, error.to_string()));
                }
            }
        }
        events
    }

    /// Sees to the pages of a plan: adapters of requests that are let in, and new blocks of tokens. What of the plan can be computed: a
    /// request with its rows, those with the same adapters next to each other.
    fn prepare(&mut self, plan: Plan) -> Vec<(u64, usize)> {
        for (id, _) in &plan.admitted {
            if let Some(s) = self.sequences.get_mut(id) {
                s.runs = true;
            }
        }
        for (id, _) in &plan.admitted {
            self.lease(*id);
        }
        let mut work = Vec::new();
        for (id, rows) in plan.work {
            // It may have been put back to make room for another.
            let Some(s) = self.sequences.get(&id).filter(|s| s.runs && s.leased == s.request.adapters.len()) else {
                continue;
            };
            let blocks = (s.computed + rows).div_ceil(BLOCK);
            let wanted = blocks.saturating_sub(s.blocks.len()) * self.geometry.layers;
            if !self.make_room(wanted, id) {
                continue;
            }
            let (Some(pages), Some(s)) = (self.pool.take(wanted), self.sequences.get_mut(&id)) else { continue };
            s.blocks.extend(pages.chunks(self.geometry.layers.max(1)).map(<[u32]>::to_vec));
            work.push((id, rows));
        }
        // Making room for a later one may have put an earlier one back.
        work.retain(|(id, _)| self.sequences.get(id).is_some_and(|s| s.runs));
        work.sort_by_cached_key(|(id, _)| (self.sequences.get(id).map(|s| s.content.clone()), *id));
        work
    }

    /// Sees to a request's adapters in the pool, as long as it runs: making room for one may put it back.
    fn lease(&mut self, id: u64) {
        loop {
            let Some(s) = self.sequences.get(&id).filter(|s| s.runs) else { return };
            let Some((adapter, _)) = s.request.adapters.get(s.leased) else { return };
            let adapter = adapter.clone();
            let account = self.residents.account();
            if !account.lease(&adapter.content_id) {
                // That it fits was the scheduler's test.
                let room = self.make_room(adapter.pages(self.geometry), id);
                if !room || !self.residents.load(&adapter, self.geometry, &mut self.pool) {
                    return;
                }
                continue;
            }
            if let Some(s) = self.sequences.get_mut(&id) {
                s.leased += 1;
            }
        }
    }

    /// Frees pages: adapters that no request uses, then prompts that are kept, then the request that came last, which starts again later.
    /// Whether there are so many, and `id` still runs.
    fn make_room(&mut self, wanted: usize, id: u64) -> bool {
        loop {
            if self.residents.make_room(&mut self.pool, wanted)
                || self.prefix.as_mut().is_some_and(|prefix| prefix.make_room(&mut self.pool, wanted))
            {
                return true;
            }
            let Some(last) = self.scheduler.put_back_last() else { return false };
            self.counted.put_back += 1;
            if let Some(mut sequence) = self.sequences.remove(&last) {
                self.vacate(&mut sequence);
                self.sequences.insert(last, sequence);
            }
            if last == id {
                return false;
            }
        }
    }

    /// Gives back what a request holds.
    fn vacate(&mut self, sequence: &mut Sequence) {
        sequence.blocks.drain(..).for_each(|pages| self.pool.release(&pages));
        (sequence.computed, sequence.shared, sequence.node) = (0, 0, None);
        sequence.runs = false;
        for (adapter, _) in &sequence.request.adapters[..std::mem::take(&mut sequence.leased)] {
            self.residents.account().unlease(&adapter.content_id);
        }
    }

    /// Computes the rows of some requests together and draws their next tokens.
    fn forward(&mut self, work: &[(u64, usize)]) -> Result<Vec<Event>> {
        let Self { sequences, residents, pool, geometry, model, .. } = self;
        let (mut rows, mut tokens, mut needed, mut draws) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for &(id, count) in work {
            let Some(s) = sequences.get(&id) else { continue };
            let used = s.request.adapters.iter().filter_map(|(adapter, weight)| {
                let (hosted, pages) = residents.get(&adapter.content_id)?;
                Some(Used { hosted, pages, weight: *weight })
            });
            let adapters: Vec<Used<'_>> = used.collect();
            if adapters.len() != s.request.adapters.len() {
                return Err(Error::Pool("an adapter of a running request is not in the pool".into()));
            }
            rows.push(Rows { count, position: s.computed, blocks: &s.blocks, adapters });
            tokens.extend_from_slice(&s.tokens[s.computed..s.computed + count]);
            if s.computed + count == s.tokens.len() {
                needed.push(tokens.len() as u32 - 1);
                draws.push(id);
            }
        }
        let batch = Batched::new(pool.numbers(), *geometry, rows, &needed);
        // Inside the pool, so that each parallel part begins without waking a thread to carry it there.
        let logits = rayon::scope(|_| batch.logits(model, &tokens, &needed))?;
        let logits = logits.map(|l| l.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()).transpose()?;
        for &(id, count) in work {
            self.advance(id, count);
        }
        Ok(self.draw(&draws, &logits.unwrap_or_default()))
    }

    /// Rows of a request have been computed: whole blocks go into the prefix cache.
    fn advance(&mut self, id: u64, rows: usize) {
        let Some(s) = self.sequences.get_mut(&id) else { return };
        s.computed += rows;
        if s.generated == 0 || rows > 1 {
            self.counted.prompt_tokens += rows as u64;
        }
        let Some(prefix) = &mut self.prefix else { return };
        while s.shared < s.computed / BLOCK {
            let Ok(tokens) = <&[u32; BLOCK]>::try_from(&s.tokens[s.shared * BLOCK..][..BLOCK]) else { return };
            let node = prefix.insert(&s.content, s.node, tokens, &s.blocks[s.shared], &mut self.pool);
            let Some(node) = node else { return };
            s.node = Some(node);
            s.shared += 1;
        }
    }

    /// Draws the next token of some requests, each from its row of `logits`.
    fn draw(&mut self, ids: &[u64], logits: &[f32]) -> Vec<Event> {
        if ids.is_empty() || logits.is_empty() {
            return Vec::new();
        }
        let rows: HashMap<u64, &[f32]> =
            ids.iter().copied().zip(logits.chunks(logits.len().div_ceil(ids.len()))).collect();
        let mut drawing: Vec<_> =
            self.sequences.iter_mut().filter_map(|(id, s)| Some((*id, s, *rows.get(id)?))).collect();
        let mut drawn: HashMap<u64, (Token, Option<FinishReason>)> = drawing
            .par_iter_mut()
            .with_max_len(1)
            .map(|(id, s, logits)| {
                let history = s.tokens.split_at(s.request.prompt.len());
                let token = s.request.sampling.draw(logits, history, &mut s.rng);
                s.tokens.push(token);
                s.generated += 1;
                let told = s.request.log_probabilities.map(|n| log_probabilities(logits, token, n));
                let (log_probability, top) = told.map_or((None, Vec::new()), |(own, top)| (Some(own), top));
                let reason = match () {
                    () if s.request.stop.contains(&token) => Some(FinishReason::Stop),
                    () if s.generated >= s.request.max_tokens => Some(FinishReason::Length),
                    () => None,
                };
                (*id, (Token { token, log_probability, top }, reason))
            })
            .collect();
        let mut events = Vec::new();
        for &id in ids {
            let Some((token, reason)) = drawn.remove(&id) else { continue };
            self.counted.generated_tokens += 1;
            self.scheduler.generated(id);
            if reason.is_some() {
                self.cancel(id);
            }
            events.push(Event::Token(id, token, reason));
        }
        events
    }
}

/// log p of a token, and of the `n` likeliest.
pub(crate) fn log_probabilities(logits: &[f32], token: u32, n: usize) -> (f32, Vec<(u32, f32)>) {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - largest).exp()).sum();
    let of = |l: f32| (f64::from(l - largest) - sum.ln()) as f32;
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let n = n.min(order.len());
    let by = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if n > 0 && n < order.len() {
        order.select_nth_unstable_by(n - 1, by);
    }
    order.truncate(n);
    order.sort_unstable_by(by);
    (
        logits.get(token as usize).map_or(f32::NEG_INFINITY, |&l| of(l)),
        order.iter().map(|&t| (t, of(logits[t as usize]))).collect(),
    )
}
