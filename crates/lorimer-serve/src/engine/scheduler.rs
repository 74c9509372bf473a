//! Which requests run next, and how many of their tokens: decisions only, so that the engine and the simulator share them.
//!
//! Iteration by iteration (Yu et al. 2022, *Orca*): every step takes one token of each request that is generating, parts of the prompts of
//! those that are not yet, up to a number of token rows, and lets waiting requests in where the pool will hold them to their end. The test of
//! that, the preference for adapters that are in the batch, early refusal and the virtual token counter follow S-LoRA (arXiv 2311.03285,
//! sections 5 and 6, and its code; the counter is Sheng et al. 2024, arXiv 2401.00588).

mod plan;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::engine::pool::Geometry;

/// How a scheduler decides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Most requests that run at a time.
    pub max_running: usize,
    /// Most token rows of one step, the tokens of those that are generating included.
    pub batch_tokens: usize,
    /// Most prompt rows of one step while prompts of several clients are to be computed: how long one client's answers wait for another's
    /// prompt. Each of these clients has an equal share of them first.
    pub shared_tokens: usize,
    /// Most tokens that are guessed of each answer in a step; 0 for none. They count for `batch_tokens`.
    pub guesses: usize,
    /// Most tokens that a draft model guesses of each answer in a step, where there is no other guess; 0 for none. They count for `batch_tokens`.
    pub draft_tokens: usize,
    /// Most requests that wait; more are refused at once.
    pub max_waiting: usize,
    /// Most adapters at work in one step; none for no bound.
    pub max_adapters: Option<usize>,
    /// Prefer waiting requests whose adapters are in the batch.
    pub cluster: bool,
    /// Seconds for which the first of a queue is passed over at most, for others whose adapters are in the batch.
    pub starvation: f64,
    /// Serve clients, and the users of each, by what they were given so far, prompt tokens + 2 · generated tokens, the least first. Every
    /// second of a client's requests is the one that has waited longest, so that none waits for ever where a client names ever new users.
    pub fair: bool,
    /// Seconds to the first token that are promised. Requests that cannot keep it are refused, and while more arrive than are served the
    /// newest go first.
    pub first_token: Option<f64>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            max_running: 64,
            batch_tokens: 512,
            shared_tokens: 48,
            guesses: 0,
            draft_tokens: 0,
            max_waiting: 10_000,
            max_adapters: None,
            cluster: true,
            starvation: 1.0,
            fair: true,
            first_token: None,
        }
    }
}

/// Whom a request is for. What a client gets does not depend on what users it names.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tenant {
    /// Who is connected, as the server knows it.
    pub client: Arc<str>,
    /// For whom, as the client says.
    pub user: Arc<str>,
}

/// A request as the scheduler sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Its number.
    pub id: u64,
    /// Whom it is for.
    pub tenant: Tenant,
    /// Its adapters, each by its content and the pages it takes.
    pub adapters: Vec<(Arc<str>, usize)>,
    /// Pages that a block of its tokens takes beside a page a layer.
    pub pages_per_block: usize,
    /// Tokens of the prompt (of a request that was preempted: those generated too).
    pub prompt: usize,
    /// Most tokens that are still to be generated.
    pub max_output: usize,
    /// How many are counted on when it is let in, at most `max_output`. Where more come and the pool is full, the request that came last is
    /// preempted.
    pub expected: usize,
    /// When it came, in seconds.
    pub arrived: f64,
}

/// Why a request is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// Too many wait.
    QueueFull,
    /// The first token would come later than promised.
    TooLate,
    /// It would not fit into the pool alone.
    TooLarge,
}

/// A request that runs.
#[derive(Clone, Debug)]
struct Running {
    job: Job,
    /// Tokens of the prompt whose keys and values are there.
    computed: usize,
    /// Tokens generated since it was let in.
    generated: usize,
}

impl Running {
    fn generates(&self) -> bool {
        self.computed >= self.job.prompt
    }
    fn tokens(&self) -> usize {
        self.job.prompt + self.generated
    }
    /// Tokens that are counted on: of an answer that is longer than expected, the next one.
    fn remaining(&self) -> usize {
        let most = self.job.max_output.saturating_sub(self.generated);
        self.job.expected.saturating_sub(self.generated).max(1).min(most)
    }
}

/// What a step is to do.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Waiting requests that run from now on, with the tokens of their prompts that need not be computed.
    pub admitted: Vec<(u64, usize)>,
    /// Waiting requests that are refused.
    pub refused: Vec<(u64, Refusal)>,
    /// Token rows of each request that has any: of its prompt, or the one that it generated last.
    pub work: Vec<(u64, usize)>,
}

/// An exponential mean of events a second.
#[derive(Clone, Debug, Default)]
struct Rate {
    since: f64,
    count: f64,
    rate: f64,
}

impl Rate {
    /// Length of the windows that are counted, in seconds.
    const WINDOW: f64 = 1.0;

    fn add(&mut self, now: f64, n: f64) {
        self.at(now);
        self.count += n;
    }

    fn at(&mut self, now: f64) -> f64 {
        let windows = ((now - self.since) / Self::WINDOW).floor();
        if windows >= 1.0 {
            let new = self.count / Self::WINDOW;
            // 0.7 · new + 0.3 · old, and windows in which nothing came.
            self.rate = (0.7 * new + 0.3 * self.rate) * 0.3f64.powf((windows - 1.0).min(100.0));
            (self.since, self.count) = (self.since + windows * Self::WINDOW, 0.0);
        }
        self.rate
    }
}

/// Waiting and running requests.
pub struct Scheduler {
    policy: Policy,
    geometry: Geometry,
    pages: usize,
    waiting: BTreeMap<Tenant, VecDeque<Job>>,
    waiting_count: usize,
    /// The first of each queue, and since when it is that.
    fronts: BTreeMap<Tenant, (u64, f64)>,
    running: Vec<Running>,
    /// Uses of each adapter by running requests, and its pages.
    adapters: HashMap<Arc<str>, (usize, usize)>,
    adapter_pages: usize,
    /// What each client was given, and its users; and whether the client's next is the one that has waited longest.
    clients: BTreeMap<Arc<str>, (f64, bool)>,
    counters: BTreeMap<Tenant, f64>,
    /// The two clients whose requests came last, the newer first, each with the time of its last.
    latest: [(Arc<str>, f64); 2],
    /// Requests that gave way to those of other clients since the last plan.
    dropped: Vec<(u64, Refusal)>,
    arrivals: Rate,
    admissions: Rate,
    rows: Rate,
}

/// Waiting requests of one tenant that are looked at for one whose adapter is in the batch, and tenants that are looked at for one whose
/// request fits.
const LOOK: usize = 64;
/// Seconds for which a client that has asked is expected to ask again.
const RECENT: f64 = 5.0;
/// Tenants whose counters are kept.
const MAX_COUNTERS: usize = 100_000;

impl Scheduler {
    /// A scheduler over a pool of so many pages.
    pub fn new(policy: Policy, geometry: Geometry, pages: usize) -> Self {
        Self {
            policy,
            geometry,
            pages,
            waiting: BTreeMap::new(),
            waiting_count: 0,
            fronts: BTreeMap::new(),
            running: Vec::new(),
            adapters: HashMap::new(),
            adapter_pages: 0,
            clients: BTreeMap::new(),
            counters: BTreeMap::new(),
            latest: [("".into(), f64::NEG_INFINITY), ("".into(), f64::NEG_INFINITY)],
            dropped: Vec::new(),
            arrivals: Rate::default(),
            admissions: Rate::default(),
            rows: Rate::default(),
        }
    }

    /// Number of requests that wait.
    pub fn waiting(&self) -> usize {
        self.waiting_count
    }

    /// Number of requests that run.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Takes a request into the queue.
    pub fn submit(&mut self, job: Job) -> Result<(), Refusal> {
        self.arrivals.add(job.arrived, 1.0);
        if self.latest[0].0 != job.tenant.client {
            self.latest.swap(0, 1);
        }
        self.latest[0] = (job.tenant.client.clone(), job.arrived);
        let adapters: usize = job.adapters.iter().map(|(_, pages)| pages).sum();
        if adapters + self.geometry.pages_with(job.prompt + job.max_output, job.pages_per_block) > self.pages {
            return Err(Refusal::TooLarge);
        }
        if self.waiting_count >= self.policy.max_waiting && !self.give_way(&job.tenant) {
            return Err(Refusal::QueueFull);
        }
        self.put(job, false);
        Ok(())
    }

    /// With the queue full: takes the newest request of the client out that has most of it, for one of a client that has fewer. Whether
    /// there is such a one.
    fn give_way(&mut self, tenant: &Tenant) -> bool {
        let mut counts: BTreeMap<&Arc<str>, usize> = BTreeMap::new();
        for (tenant, queue) in &self.waiting {
            *counts.entry(&tenant.client).or_default() += queue.len();
        }
        let own = counts.get(&tenant.client).copied().unwrap_or(0);
        let Some((most, _)) = counts.into_iter().max_by_key(|(_, n)| *n).filter(|(_, n)| *n > own + 1) else {
            return false;
        };
        let queues = self.waiting.iter().filter(|(t, _)| t.client == *most);
        let newest = queues.filter_map(|(t, queue)| Some((t, queue.back()?))).max_by(|a, b| a.1.id.cmp(&b.1.id));
        let Some((tenant, id)) = newest.map(|(t, job)| (t.clone(), job.id)) else { return false };
        let at = self.waiting.get(&tenant).map_or(0, |queue| queue.len().saturating_sub(1));
        self.dropped.push((id, Refusal::QueueFull));
        self.take(&tenant, at).is_some()
    }

    /// Takes a request into the queue that was taken before.
    pub fn restore(&mut self, job: Job) {
        self.put(job, false);
    }

    fn put(&mut self, job: Job, first: bool) {
        self.lift(&job.tenant);
        let queue = self.waiting.entry(job.tenant.clone()).or_default();
        match first {
            true => queue.push_front(job),
            false => queue.push_back(job),
        }
        self.waiting_count += 1;
    }

    /// Who comes new, or again, starts where the least served of the others is.
    fn lift(&mut self, tenant: &Tenant) {
        let active = || self.waiting.keys().chain(self.running.iter().map(|r| &r.job.tenant));
        let least = |counters: &mut dyn Iterator<Item = f64>| counters.fold(f64::INFINITY, f64::min);
        if active().any(|t| t == tenant) {
            return;
        }
        let mut clients = active().filter_map(|t| Some(self.clients.get(&t.client)?.0));
        let client = (!active().any(|t| t.client == tenant.client)).then(|| least(&mut clients));
        let mut users = active().filter(|t| t.client == tenant.client).filter_map(|t| self.counters.get(t)).copied();
        let user = least(&mut users);
        if self.counters.len() + self.clients.len() >= MAX_COUNTERS {
            let (kept, clients): (HashSet<Tenant>, HashSet<Arc<str>>) =
                active().map(|t| (t.clone(), t.client.clone())).unzip();
            self.counters.retain(|t, _| kept.contains(t));
            self.clients.retain(|c, _| clients.contains(c));
        }
        let counter = &mut self.clients.entry(tenant.client.clone()).or_default().0;
        if let Some(least) = client.filter(|c| c.is_finite()) {
            *counter = counter.max(least);
        }
        let counter = self.counters.entry(tenant.clone()).or_default();
        if user.is_finite() {
            *counter = counter.max(user);
        }
    }

    /// Notes what a tenant is given.
    fn give(&mut self, tenant: &Tenant, much: f64) {
        self.clients.entry(tenant.client.clone()).or_default().0 += much;
        *self.counters.entry(tenant.clone()).or_default() += much;
    }

    /// Takes a request out, wherever it is. Whether it was there.
    pub fn remove(&mut self, id: u64) -> bool {
        if let Some(at) = self.running.iter().position(|r| r.job.id == id) {
            self.leave(at);
            return true;
        }
        let found =
            self.waiting.iter().find_map(|(t, queue)| Some((t.clone(), queue.iter().position(|j| j.id == id)?)));
        found.is_some_and(|(tenant, at)| self.take(&tenant, at).is_some())
    }

    fn take(&mut self, tenant: &Tenant, at: usize) -> Option<Job> {
        let queue = self.waiting.get_mut(tenant)?;
        let job = queue.remove(at)?;
        if queue.is_empty() {
            self.waiting.remove(tenant);
            self.fronts.remove(tenant);
        }
        self.waiting_count -= 1;
        Some(job)
    }

    fn leave(&mut self, at: usize) -> Running {
        let gone = self.running.remove(at);
        for (key, _) in &gone.job.adapters {
            if let Some((uses, pages)) = self.adapters.get_mut(key) {
                *uses -= 1;
                if *uses == 0 {
                    self.adapter_pages -= *pages;
                    self.adapters.remove(key);
                }
            }
        }
        gone
    }

    /// Puts the running request that came last back into the queue, its generated tokens part of the prompt, because the pool is full after
    /// all. None if only one runs.
    pub fn preempt_last(&mut self) -> Option<u64> {
        if self.running.len() < 2 {
            return None;
        }
        let gone = self.leave(self.running.len() - 1);
        let (prompt, max_output) = (gone.tokens(), gone.job.max_output.saturating_sub(gone.generated));
        let job = Job { prompt, max_output, expected: gone.job.expected.min(max_output), ..gone.job };
        let id = job.id;
        self.put(job, true);
        Some(id)
    }

    /// A request has generated a token.
    pub fn generated(&mut self, id: u64) {
        if let Some(r) = self.running.iter_mut().find(|r| r.job.id == id) {
            r.generated += 1;
            let tenant = r.job.tenant.clone();
            self.give(&tenant, 2.0);
        }
    }

    /// Seconds after which a refused client may try again: until what waits is let in at the present rate.
    pub fn retry_after(&mut self, now: f64) -> f64 {
        let rate = self.admissions.at(now);
        let first = self.until_first_token(self.policy.batch_tokens, now);
        if rate > 0.0 { (self.waiting_count as f64 / rate).clamp(1.0, 60.0) } else { first.clamp(1.0, 60.0) }
    }
}
