//! Which requests run next, and how many of their tokens: decisions only, so that the engine and the simulator share them.
//!
//! Iteration by iteration (Yu et al. 2022, *Orca*): every step takes one token of each request that is generating, parts of the prompts of
//! those that are not yet, up to a number of token rows, and lets waiting requests in where the pool will hold them to their end. The test of
//! that, the preference for adapters that are in the batch, early refusal and the virtual token counter follow S-LoRA (arXiv 2311.03285,
//! sections 5 and 6, and its code; the counter is Sheng et al. 2024, arXiv 2401.00588).

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::pool::Geometry;

/// How a scheduler decides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Most requests that run at a time.
    pub max_running: usize,
    /// Most token rows of one step, the tokens of those that are generating included.
    pub batch_tokens: usize,
    /// Most requests that wait; more are refused at once.
    pub max_waiting: usize,
    /// Most adapters at work in one step; none for no bound.
    pub max_adapters: Option<usize>,
    /// Prefer waiting requests whose adapters are in the batch.
    pub cluster: bool,
    /// Seconds for which the first of a queue is passed over at most, for others whose adapters are in the batch.
    pub starvation: f64,
    /// Serve tenants by what they were given so far, prompt tokens + 2 · generated tokens, the least first.
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
            max_waiting: 10_000,
            max_adapters: None,
            cluster: true,
            starvation: 1.0,
            fair: true,
            first_token: None,
        }
    }
}

/// A request as the scheduler sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Its number.
    pub id: u64,
    /// Whom it is for.
    pub tenant: String,
    /// Its adapters, each by its content and the pages it takes.
    pub adapters: Vec<(Arc<str>, usize)>,
    /// Tokens of the prompt (of a request that was put back: those generated too).
    pub prompt: usize,
    /// Most tokens that are still to be generated.
    pub max_output: usize,
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
    fn remaining(&self) -> usize {
        self.job.max_output.saturating_sub(self.generated)
    }
}

/// What a step is to do.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Waiting requests that run from now on, with the tokens of their prompts that need not be computed.
    pub admitted: Vec<(u64, usize)>,
    /// Waiting requests that are refused.
    pub refused: Vec<u64>,
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
    waiting: BTreeMap<String, VecDeque<Job>>,
    waiting_count: usize,
    /// The first of each queue, and since when it is that.
    fronts: BTreeMap<String, (u64, f64)>,
    running: Vec<Running>,
    /// Uses of each adapter by running requests, and its pages.
    adapters: HashMap<Arc<str>, (usize, usize)>,
    adapter_pages: usize,
    counters: BTreeMap<String, f64>,
    arrivals: Rate,
    admissions: Rate,
    rows: Rate,
}

/// Waiting requests of one tenant that are looked at for one whose adapter is in the batch.
const LOOK: usize = 64;
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
            counters: BTreeMap::new(),
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
        let adapters: usize = job.adapters.iter().map(|(_, pages)| pages).sum();
        if adapters + self.geometry.pages_of_tokens(job.prompt + job.max_output) > self.pages {
            return Err(Refusal::TooLarge);
        }
        if self.waiting_count >= self.policy.max_waiting {
            return Err(Refusal::QueueFull);
        }
        self.put(job, false);
        Ok(())
    }

    fn put(&mut self, job: Job, first: bool) {
        if !self.waiting.contains_key(&job.tenant) && !self.running.iter().any(|r| r.job.tenant == job.tenant) {
            // Who comes new, or again, starts where the least served of the others is.
            let active = self.waiting.keys().chain(self.running.iter().map(|r| &r.job.tenant));
            let least = active.filter_map(|t| self.counters.get(t)).copied().fold(f64::INFINITY, f64::min);
            if self.counters.len() >= MAX_COUNTERS {
                let waiting = &self.waiting;
                let running = &self.running;
                self.counters.retain(|t, _| waiting.contains_key(t) || running.iter().any(|r| r.job.tenant == *t));
            }
            let counter = self.counters.entry(job.tenant.clone()).or_insert(0.0);
            if least.is_finite() {
                *counter = counter.max(least);
            }
        }
        let queue = self.waiting.entry(job.tenant.clone()).or_default();
        match first {
            true => queue.push_front(job),
            false => queue.push_back(job),
        }
        self.waiting_count += 1;
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

    fn take(&mut self, tenant: &str, at: usize) -> Option<Job> {
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
    pub fn put_back_last(&mut self) -> Option<u64> {
        if self.running.len() < 2 {
            return None;
        }
        let gone = self.leave(self.running.len() - 1);
        let (prompt, max_output) = (gone.tokens(), gone.remaining());
        let job = Job { prompt, max_output, ..gone.job };
        let id = job.id;
        self.put(job, true);
        Some(id)
    }

    /// A request has generated a token.
    pub fn generated(&mut self, id: u64) {
        if let Some(r) = self.running.iter_mut().find(|r| r.job.id == id) {
            r.generated += 1;
            *self.counters.entry(r.job.tenant.clone()).or_default() += 2.0;
        }
    }

    /// Pages that keys and values of some requests take at most before the last is done, if each generates all that it may: after the
    /// request with the i-th most tokens to go is done, only those before it are left, each with as many tokens more.
    fn most_pages(&self, requests: &mut [(usize, usize)]) -> usize {
        requests.sort_unstable_by_key(|&(_, remaining)| std::cmp::Reverse(remaining));
        let at = |i: usize| {
            let steps = requests[i].1;
            requests[..=i].iter().map(|&(tokens, _)| self.geometry.pages_of_tokens(tokens + steps)).sum()
        };
        (0..requests.len()).map(at).max().unwrap_or(0)
    }

    /// Whether the pool holds this one too until all are done.
    fn fits(&self, job: &Job) -> bool {
        let mut requests: Vec<_> = self.running.iter().map(|r| (r.tokens(), r.remaining())).collect();
        requests.push((job.prompt, job.max_output));
        let new = |(key, pages): &(Arc<str>, usize)| if self.adapters.contains_key(key) { 0 } else { *pages };
        let adapters = self.adapter_pages + job.adapters.iter().map(new).sum::<usize>();
        adapters + self.most_pages(&mut requests) <= self.pages
    }

    /// Whether a job's adapters are all in the batch, and how many would be there with it.
    fn adapters_with(&self, job: &Job) -> (bool, usize) {
        let new = job.adapters.iter().filter(|(key, _)| !self.adapters.contains_key(key)).count();
        (new == 0, self.adapters.len() + new)
    }

    /// Seconds from now until a request's first token, if it is let in at once.
    fn until_first_token(&mut self, prompt: usize, now: f64) -> f64 {
        let rate = self.rows.at(now);
        if rate > 0.0 { prompt as f64 / rate } else { 0.0 }
    }

    /// Whether the first of a tenant's queue has been passed over for long enough.
    fn starves(&self, tenant: &str, now: f64) -> bool {
        self.fronts.get(tenant).is_some_and(|(_, since)| now - since > self.policy.starvation)
    }

    /// Which of a tenant's waiting requests is next.
    fn choose(&self, tenant: &str, queue: &VecDeque<Job>, newest_first: bool, now: f64) -> usize {
        let order = |i: usize| if newest_first { queue.len() - 1 - i } else { i };
        if !self.policy.cluster || self.starves(tenant, now) {
            return order(0);
        }
        let mut look = (0..queue.len().min(LOOK)).map(order);
        look.find(|&i| self.adapters_with(&queue[i]).0).unwrap_or(order(0))
    }

    /// Decides on a step. `cached` tells how many tokens of a prompt need not be computed.
    pub fn plan(&mut self, now: f64, mut cached: impl FnMut(&Job) -> usize) -> Plan {
        let mut plan = Plan::default();
        let mut rows = self.policy.batch_tokens;
        for r in self.running.iter().filter(|r| r.generates()) {
            plan.work.push((r.job.id, 1));
            rows = rows.saturating_sub(1);
        }
        let mut computed = plan.work.len();
        for r in self.running.iter_mut().filter(|r| !r.generates()) {
            let n = (r.job.prompt - r.computed).min(rows);
            if n > 0 {
                plan.work.push((r.job.id, n));
                (rows, computed) = (rows - n, computed + n);
                r.computed += n;
            }
        }
        let arriving = self.arrivals.at(now);
        let newest_first = self.policy.first_token.is_some() && arriving > self.admissions.at(now) && arriving > 0.0;
        if let Some(promised) = self.policy.first_token {
            self.refuse_late(promised, now, &mut plan);
        }
        let mut passed_over: Vec<String> = Vec::new();
        self.note_fronts(None, now);
        while rows > 0 && self.running.len() < self.policy.max_running {
            let candidates = self.waiting.iter().filter(|(tenant, _)| !passed_over.contains(tenant));
            let key = |(tenant, queue): &(&String, &VecDeque<Job>)| {
                let counter = if self.policy.fair { self.counters.get(*tenant).copied().unwrap_or(0.0) } else { 0.0 };
                (counter, queue.front().map_or(0.0, |job| job.arrived))
            };
            let least = candidates.min_by(|a, b| key(a).partial_cmp(&key(b)).unwrap_or(std::cmp::Ordering::Equal));
            let Some((tenant, queue)) = least else { break };
            let at = self.choose(tenant, queue, newest_first, now);
            let job = &queue[at];
            let bound = self.policy.max_adapters.unwrap_or(usize::MAX);
            let (present, adapters) = self.adapters_with(job);
            if !self.fits(job) || (!present && adapters > bound.max(job.adapters.len())) {
                // The others wait with one that has waited long, so that its turn comes.
                if self.starves(tenant, now) {
                    break;
                }
                passed_over.push(tenant.clone());
                continue;
            }
            let tenant = tenant.clone();
            let Some(job) = self.take(&tenant, at) else { break };
            let skip = cached(&job).min(job.prompt.saturating_sub(1));
            let n = (job.prompt - skip).min(rows);
            (rows, computed) = (rows - n, computed + n);
            *self.counters.entry(tenant).or_default() += job.prompt as f64;
            for (key, pages) in &job.adapters {
                let entry = self.adapters.entry(key.clone()).or_insert((0, *pages));
                self.adapter_pages += if entry.0 == 0 { *pages } else { 0 };
                entry.0 += 1;
            }
            plan.admitted.push((job.id, skip));
            plan.work.push((job.id, n));
            self.admissions.add(now, 1.0);
            self.note_fronts(Some(&job.tenant), now);
            self.running.push(Running { job, computed: skip + n, generated: 0 });
        }
        self.rows.add(now, computed as f64);
        plan
    }

    /// Notes since when each tenant's first is that, or only one tenant's.
    fn note_fronts(&mut self, only: Option<&str>, now: f64) {
        for (tenant, queue) in self.waiting.iter().filter(|(tenant, _)| only.is_none_or(|only| only == *tenant)) {
            let Some(first) = queue.front().map(|job| job.id) else { continue };
            match self.fronts.get_mut(tenant) {
                Some(front) if front.0 == first => {}
                Some(front) => *front = (first, now),
                None => _ = self.fronts.insert(tenant.clone(), (first, now)),
            }
        }
    }

    /// Refuses waiting requests whose first token would come too late even if they were let in now.
    fn refuse_late(&mut self, promised: f64, now: f64, plan: &mut Plan) {
        let late: Vec<(String, u64)> = {
            // Seconds a row.
            let each = self.until_first_token(1, now);
            let jobs = self.waiting.iter().flat_map(|(tenant, queue)| queue.iter().map(move |job| (tenant, job)));
            let late = jobs.filter(|(_, job)| now - job.arrived + each * job.prompt as f64 > promised);
            late.map(|(tenant, job)| (tenant.clone(), job.id)).collect()
        };
        for (tenant, id) in late {
            let at = self.waiting.get(&tenant).and_then(|queue| queue.iter().position(|job| job.id == id));
            if let Some(at) = at
                && self.take(&tenant, at).is_some()
            {
                plan.refused.push(id);
            }
        }
    }

    /// Seconds after which a refused client may try again: until what waits is let in at the present rate.
    pub fn retry_after(&mut self, now: f64) -> f64 {
        let rate = self.admissions.at(now);
        let first = self.until_first_token(self.policy.batch_tokens, now);
        if rate > 0.0 { (self.waiting_count as f64 / rate).clamp(1.0, 60.0) } else { first.clamp(1.0, 60.0) }
    }
}
