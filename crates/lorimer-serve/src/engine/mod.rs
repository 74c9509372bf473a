//! The engine: requests in, tokens out, step by step; no clock, no network and no files.
//!
//! A step takes what the scheduler planned through the model in one forward, whatever adapters the rows belong to, and draws a token for
//! every request whose last row is there. The same requests with the same seeds get the same tokens, alone or among others.

pub mod adapter_account;
pub mod adapter_cache;
mod advance;
pub mod batched;
pub mod batching;
mod draft;
#[cfg(test)]
pub(crate) mod fault;
pub mod kept;
pub mod pool;
pub mod prefix;
pub(crate) mod routes;
pub mod scheduler;
pub mod simulate;
mod speculation;
pub mod worker;
pub mod workload;

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use candle_core::DType;
use lorimer_model::BaseModel;
use lorimer_tensor::KeyDtype;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::adapters::hosted::Hosted;
use crate::error::{Error, Result};
use crate::generation::form::Constraint;
use crate::generation::generate::FinishReason;
use crate::generation::sampling::{Sampling, likeliest, weights};
use batching::{Asked, Batching};
use pool::{BLOCK, Geometry, Numbers, pool, shares};
use scheduler::{Policy, Refusal, Tenant};

/// Tokens that an answer is expected to have where no number is asked for.
const EXPECTED: usize = 256;

/// How an engine is set up.
#[derive(Clone, Debug)]
pub struct EngineSettings {
    /// Bytes of the pool of keys, values and adapters.
    pub pool_bytes: usize,
    /// How requests are scheduled.
    pub policy: Policy,
    /// Whether keys and values of prompts are kept for requests that begin alike.
    pub prefix_cache: bool,
    /// How keys and values are kept.
    pub kv_cache_dtype: KeyDtype,
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self { pool_bytes: 1 << 30, policy: Policy::default(), prefix_cache: true, kv_cache_dtype: KeyDtype::F32 }
    }
}

/// What is asked of the engine.
#[derive(Clone, Debug)]
pub struct Request {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Adapters with their weights; none for the base.
    pub adapters: Vec<(Arc<Hosted>, f32)>,
    /// Most tokens to generate; none for as many as model and pool have room for.
    pub max_tokens: Option<usize>,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Where random numbers come from.
    pub seed: u64,
    /// Tokens that end the answer.
    pub stop: Vec<u32>,
    /// How many of the likeliest tokens to tell with each; none for no log-probabilities.
    pub log_probabilities: Option<usize>,
    /// Whether to tell the log-probabilities of the prompt's tokens too.
    pub of_prompt: bool,
    /// Whom it is for.
    pub tenant: Tenant,
    /// Names under which the adapters were asked for, for figures.
    pub names: Vec<String>,
    /// What the answer is held to.
    pub form: Option<Constraint>,
}

/// A token of an answer or a prompt.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Token {
    /// Its id.
    pub token: u32,
    /// log p before any sampling setting, where asked for; none for the first of a prompt, which nothing comes before.
    pub log_probability: Option<f32>,
    /// The likeliest tokens, where asked for.
    pub top: Vec<(u32, f32)>,
}

/// What a step brought.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Tokens of a request's prompt with their log-probabilities; with the reason if no answer was asked for and these are the last.
    Prompt(u64, Vec<Token>, Option<FinishReason>),
    /// A token of a request; with the reason if it is the last.
    Token(u64, Token, Option<FinishReason>),
    /// A request is refused.
    Refused(u64, Refusal),
    /// A request could not be computed.
    Failed(u64, Failure),
}

impl Event {
    /// The request that it is about.
    pub fn id(&self) -> u64 {
        match self {
            Self::Prompt(id, ..) | Self::Token(id, ..) | Self::Refused(id, _) | Self::Failed(id, _) => *id,
        }
    }
}

/// Why a request could not be computed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// A defect of the engine, with what it said.
    Defect(String),
    /// With the adapters and weights asked for, or in the base itself, logits are not finite.
    NotFinite(String),
    /// No token can follow that both the form and the rest of the request allow, or the form takes too long to follow.
    Form(String),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (Self::Defect(text) | Self::NotFinite(text) | Self::Form(text)) = self;
        f.write_str(text)
    }
}

/// Runs a part of a step; what a panic said, in place of a result.
fn caught<T>(f: impl FnOnce() -> T) -> std::result::Result<T, String> {
    catch_unwind(AssertUnwindSafe(f)).map_err(panic_text)
}

/// What a panic said.
pub(crate) fn panic_text(panic: Box<dyn Any + Send>) -> String {
    match panic.downcast_ref::<&str>() {
        Some(text) => (*text).to_string(),
        None => panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "a panic that says nothing".into()),
    }
}

/// What is kept of a request beside its tokens and pages.
struct InFlight {
    /// Its prompt is with the tokens.
    request: Request,
    arrived: f64,
    /// Most tokens to generate, and how many are expected.
    limit: usize,
    expected: usize,
    /// Tokens of the prompt whose log-probabilities have been told.
    reported: usize,
    /// Tokens that were given out, and the state of the random numbers after them.
    answer: Vec<u32>,
    rng: ChaCha8Rng,
    /// How far the answer is in its form.
    form: Option<Mutex<Constraint>>,
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
    /// Pages of those adapters that running requests use.
    pub adapter_pages_at_work: usize,
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
    /// Tokens that were guessed.
    pub guessed_tokens: u64,
    /// Guessed tokens that were drawn.
    pub accepted_tokens: u64,
    /// Requests that were preempted because the pool was full after all.
    #[serde(rename = "put_back")]
    pub preempted: u64,
}

/// Requests, pool and adapters of one model.
pub struct Engine<'m> {
    model: &'m dyn BaseModel,
    geometry: Geometry,
    numbers: Numbers,
    settings: EngineSettings,
    batching: Batching,
    draft: Option<draft::Draft<'m>>,
    in_flight: HashMap<u64, InFlight>,
    next: u64,
    events: Vec<Event>,
    /// After a failure: prompts of requests that are still to be taken in again, one a step.
    again: VecDeque<(u64, Vec<u32>)>,
    /// The request that the account is at, or that it was given last.
    at: Option<u64>,
}

impl<'m> Engine<'m> {
    /// An engine over a model that computes in f32.
    pub fn new(model: &'m dyn BaseModel, settings: EngineSettings) -> Result<Self> {
        Self::with_draft(model, None, settings)
    }

    /// An engine whose guesses a draft model makes: a smaller one of the same tokens, which computes in f32 too. It has as much of the pool as keys and
    /// values of as many tokens take as those of the base in the rest.
    pub fn with_draft(
        model: &'m dyn BaseModel,
        draft: Option<&'m dyn BaseModel>,
        mut settings: EngineSettings,
    ) -> Result<Self> {
        if lorimer_model::BaseModel::dtype(model) != DType::F32 {
            return Err(Error::Pool("the engine computes in f32; open the model so".into()));
        }
        let geometry = Geometry::with(model.shape(), settings.kv_cache_dtype);
        let with = draft.map(|draft| Geometry::with(draft.shape(), settings.kv_cache_dtype));
        let [own, other] = shares(settings.pool_bytes, geometry, with);
        let vocabulary = model.shape().vocabulary;
        let rows = settings.policy.batch_tokens;
        let draft = draft.zip(with).map(|(draft, with)| draft::Draft::new(draft, (with, other), vocabulary, rows));
        let draft = draft.transpose()?;
        if draft.is_none() {
            settings.policy.draft_tokens = 0;
        }
        let (pages, numbers) = pool(geometry, own)?;
        let batching = Batching::new(settings.policy.clone(), geometry, pages, settings.prefix_cache);
        Ok(Self {
            model,
            geometry,
            numbers,
            settings,
            batching,
            draft,
            in_flight: HashMap::new(),
            next: 0,
            events: Vec::new(),
            again: VecDeque::new(),
            at: None,
        })
    }

    /// How pages are laid out.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Takes a request at time `now` (seconds, of any clock that does not go back). Gives its number; the refusal where the queue is full or
    /// the pool could never hold it. One that makes the engine fail has a number too, and the next step tells so.
    ///
    /// # Errors
    ///
    /// Says what of the request cannot be served as it is.
    pub fn submit(&mut self, request: Request, now: f64) -> Result<std::result::Result<u64, Refusal>> {
        let prepared = caught(|| self.prepare(request, now)).map_or_else(|problem| Ok(Err(problem)), |r| r.map(Ok))?;
        let id = self.next;
        self.next += 1;
        let problem = match prepared {
            Ok((in_flight, asked)) => match caught(|| self.batching.submit(id, asked, now)) {
                Ok(Ok(())) => {
                    self.in_flight.insert(id, in_flight);
                    return Ok(Ok(id));
                }
                Ok(Err(refusal)) => return Ok(Err(refusal)),
                Err(problem) => {
                    self.rebuild(&problem);
                    problem
                }
            },
            // Nothing was changed yet.
            Err(problem) => problem,
        };
        self.events.push(Event::Failed(id, Failure::Defect(problem)));
        Ok(Ok(id))
    }

    /// A request that can be served, and how it is scheduled.
    fn prepare(&self, mut request: Request, now: f64) -> Result<(InFlight, Asked)> {
        #[cfg(test)]
        fault::Fault::Submit.fail(&request.prompt);
        self.check(&request)?;
        let rng = ChaCha8Rng::seed_from_u64(request.seed);
        let (limit, expected) = self.length_of(&request);
        let prompt = std::mem::take(&mut request.prompt);
        let form = request.form.take().map(Mutex::new);
        let in_flight = InFlight { request, arrived: now, limit, expected, reported: 0, answer: Vec::new(), rng, form };
        let asked = self.asked(&in_flight, prompt);
        Ok((in_flight, asked))
    }

    /// A request as it is scheduled: what it has of its answer is computed like a prompt.
    fn asked(&self, in_flight: &InFlight, mut prompt: Vec<u32>) -> Asked {
        let request = &in_flight.request;
        let named = |wanted: &dyn Fn(&Hosted) -> bool| {
            let wanted = request.adapters.iter().filter(|(a, _)| wanted(a));
            wanted.map(|(a, weight)| format!("{}*{}", a.content_id, weight.to_bits())).collect::<Vec<_>>().join("+")
        };
        let pages = |(a, _): &(Arc<Hosted>, f32)| (a.content_id.as_str().into(), a.pages(self.geometry));
        let whole = request.of_prompt && in_flight.reported < prompt.len();
        prompt.extend_from_slice(&in_flight.answer);
        let max_tokens = in_flight.limit.saturating_sub(in_flight.answer.len());
        Asked {
            prompt,
            whole,
            answered: in_flight.answer.len(),
            max_tokens,
            expected: Some(in_flight.expected.min(max_tokens)),
            adapters: request.adapters.iter().map(pages).collect(),
            pages_per_block: self.pages_per_block(request),
            content: named(&|a| !a.leaves_keys),
            group: named(&|_| true),
            tenant: request.tenant.clone(),
        }
    }

    /// Pages that a block of a request's tokens takes beside a page a layer.
    fn pages_per_block(&self, request: &Request) -> usize {
        request.adapters.iter().map(|(a, _)| a.pages_per_block(self.geometry)).sum()
    }

    /// Most tokens of a request's answer, and how many are expected.
    fn length_of(&self, request: &Request) -> (usize, usize) {
        if let Some(asked) = request.max_tokens {
            return (asked, asked);
        }
        let adapters: usize = request.adapters.iter().map(|(a, _)| a.pages(self.geometry)).sum();
        let per_block = self.geometry.layers + self.pages_per_block(request);
        let blocks = self.batching.pages().count().saturating_sub(adapters) / per_block.max(1);
        let longest = self.model.shape().cached_positions().min(blocks * BLOCK);
        let limit = longest.saturating_sub(request.prompt.len()).max(1);
        (limit, limit.min(EXPECTED))
    }

    fn check(&self, request: &Request) -> Result<()> {
        let fail = |text: String| Err(Error::Request(text));
        if request.prompt.is_empty() {
            return fail("the prompt is empty; there is nothing to go on from".into());
        }
        self.model
            .check_cached_length(request.prompt.len().saturating_add(request.max_tokens.unwrap_or(1)))
            .map_err(lorimer_model::Error::from)?;
        let vocabulary = self.model.shape().vocabulary;
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
        self.in_flight.remove(&id);
        self.again.retain(|(other, _)| *other != id);
        if let Err(problem) = caught(|| _ = self.batching.remove(id)) {
            self.rebuild(&problem);
        }
    }

    /// Whether nothing waits or runs, and nothing is to be told.
    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty() && self.events.is_empty()
    }

    /// Whether a request runs.
    pub fn runs(&self, id: u64) -> bool {
        self.batching.sequence(id).is_some_and(|sequence| sequence.runs)
    }

    /// Names of the adapters at work.
    pub fn at_work(&self) -> AtWork {
        const MOST: usize = 256;
        let names = |runs: bool| {
            let with =
                self.in_flight.iter().filter(|(id, _)| self.batching.sequence(**id).is_some_and(|s| s.runs == runs));
            let unique: std::collections::BTreeSet<&String> = with.flat_map(|(_, u)| &u.request.names).collect();
            unique.into_iter().take(MOST).cloned().collect()
        };
        AtWork { running: names(true), waiting: names(false) }
    }

    /// Number of requests that run.
    pub fn running(&mut self) -> usize {
        self.batching.scheduler().running()
    }

    /// Figures of now.
    pub fn state(&mut self) -> EngineState {
        #[cfg(test)]
        self.in_flight.keys().filter_map(|id| self.batching.sequence(*id)).for_each(|s| {
            fault::Fault::Figures.fail(&s.tokens);
        });
        let counted = self.batching.counted();
        let adapters = self.batching.adapters().figures();
        let (adapter_pages, count, loads, evictions) =
            (adapters.pages(), adapters.len(), adapters.loads, adapters.evictions);
        let adapter_pages_at_work = adapters.leased_pages();
        EngineState {
            running: self.batching.scheduler().running(),
            waiting: self.batching.scheduler().waiting(),
            pages: self.batching.pages().count(),
            free_pages: self.batching.pages().free(),
            adapter_pages,
            adapter_pages_at_work,
            cached_pages: self.batching.cached_pages(),
            adapters: count,
            adapter_loads: loads,
            adapter_evictions: evictions,
            prompt_tokens: counted.prompt_tokens,
            cached_tokens: counted.cached_tokens,
            generated_tokens: counted.generated_tokens,
            guessed_tokens: counted.guessed_tokens,
            accepted_tokens: counted.accepted_tokens,
            preempted: counted.preempted,
        }
    }

    /// Seconds after which a refused client may try again.
    pub fn retry_after(&mut self, now: f64) -> f64 {
        caught(|| self.batching.scheduler().retry_after(now)).unwrap_or(1.0)
    }

    /// One step: the scheduler's plan, one forward, a token for each request that has come so far.
    ///
    /// What fails costs the request that it is about, and no other: of a batch that cannot be computed the halves are, until one request is
    /// left; and where the account of requests and pages itself fails, it is made anew and the requests go on one after the other, with the
    /// tokens that they have, until it is known with which of them it fails.
    pub fn step(&mut self, now: f64) -> Vec<Event> {
        self.at = None;
        if let Err(problem) = caught(|| self.try_step(now)) {
            if let Some(id) = self.at.filter(|id| self.in_flight.remove(id).is_some()) {
                self.events.push(Event::Failed(id, Failure::Defect(problem.clone())));
            }
            self.rebuild(&problem);
        }
        std::mem::take(&mut self.events)
    }
}

/// log p of a token, and of the `n` likeliest.
pub(crate) fn log_probabilities(logits: &[f32], token: u32, n: usize) -> (f32, Vec<(u32, f32)>) {
    let largest = logits.get(likeliest(logits) as usize).copied().unwrap_or(0.0);
    let sum: f64 = weights(logits, largest, 1.0).iter().sum();
    let of = |l: f32| (f64::from(l - largest) - sum.ln()) as f32;
    let n = n.min(logits.len());
    let mut order: Vec<u32> = if n > 0 { (0..logits.len() as u32).collect() } else { Vec::new() };
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

#[cfg(test)]
mod tests;
