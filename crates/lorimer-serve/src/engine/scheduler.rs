//! Which requests run next, and how many of their tokens: decisions only, so that the engine and the simulator share them.
//!
//! Iteration by iteration (Yu et al. 2022, *Orca*): every step takes one token of each request that is generating, parts of the prompts of
//! those that are not yet, up to a number of token rows, and lets waiting requests in where the pool will hold them to their end. The test of
//! that, the preference for adapters that are in the batch, early refusal and the virtual token counter follow S-LoRA (arXiv 2311.03285,
//! sections 5 and 6, and its code; the counter is Sheng et al. 2024, arXiv 2401.00588).

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
    /// Tokens of the prompt (of a request that was preempted: those generated too).
    pub prompt: usize,
    /// Most tokens that are still to be generated.
    pub max_output: usize,
    /// How many are counted on when it is let in, at most `max_output`. Where more come and the pool is full, the request that came last is
    /// preempted.
    pub expected: usize,
    /// When it came, in seconds.
    pub arrived: f64,
    /// Passes over its rows, each with keys and values of its own.
    pub passes: usize,
}

impl Job {
    /// Pages of its keys and values, with so many tokens.
    fn pages(&self, geometry: Geometry, tokens: usize) -> usize {
        self.passes * geometry.pages_of_tokens(tokens)
    }
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

/// Prompt rows of a step, shared among clients.
struct Shares {
    /// All rows that are left.
    rows: usize,
    /// A client's share.
    each: usize,
    taken: HashMap<Arc<str>, usize>,
}

impl Shares {
    /// What a client may still have.
    fn left(&self, client: &Arc<str>) -> usize {
        (self.each - self.taken.get(client).copied().unwrap_or(0)).min(self.rows)
    }

    /// Gives a client as many rows as it may have, `wanted` at most.
    fn take(&mut self, client: &Arc<str>, wanted: usize) -> usize {
        let n = wanted.min(self.left(client));
        *self.taken.entry(client.clone()).or_default() += n;
        self.rows -= n;
        n
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
        if adapters + job.pages(self.geometry, job.prompt + job.max_output) > self.pages {
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

    /// Pages that keys and values of some requests take at most before the last is done, if each generates all that it may: after the
    /// request with the i-th most tokens to go is done, only those before it are left, each with as many tokens more.
    fn most_pages(&self, requests: &mut [(usize, usize, usize)]) -> usize {
        requests.sort_unstable_by_key(|&(_, remaining, _)| std::cmp::Reverse(remaining));
        let at = |i: usize| {
            let steps = requests[i].1;
            requests[..=i]
                .iter()
                .map(|&(tokens, _, passes)| passes * self.geometry.pages_of_tokens(tokens + steps))
                .sum()
        };
        (0..requests.len()).map(at).max().unwrap_or(0)
    }

    /// Whether the pool holds this one too until all are done.
    fn fits(&self, job: &Job) -> bool {
        let mut requests: Vec<_> = self.running.iter().map(|r| (r.tokens(), r.remaining(), r.job.passes)).collect();
        requests.push((job.prompt, job.expected, job.passes));
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
    fn starves(&self, tenant: &Tenant, now: f64) -> bool {
        self.fronts.get(tenant).is_some_and(|(_, since)| now - since > self.policy.starvation)
    }

    /// Which of a tenant's waiting requests is next.
    fn choose(&self, tenant: &Tenant, queue: &VecDeque<Job>, newest_first: bool, now: f64) -> usize {
        let order = |i: usize| if newest_first { queue.len() - 1 - i } else { i };
        if !self.policy.cluster || self.starves(tenant, now) {
            return order(0);
        }
        let mut look = (0..queue.len().min(LOOK)).map(order);
        look.find(|&i| self.adapters_with(&queue[i]).0).unwrap_or(order(0))
    }

    /// Decides on a step. `cached` tells how many tokens of a prompt need not be computed.
    pub fn plan(&mut self, now: f64, mut cached: impl FnMut(&Job) -> usize) -> Plan {
        let mut plan = Plan { refused: std::mem::take(&mut self.dropped), ..Default::default() };
        let mut rows = self.policy.batch_tokens;
        for r in self.running.iter().filter(|r| r.generates()) {
            plan.work.push((r.job.id, 1));
            rows = rows.saturating_sub(1);
        }
        let mut computed = plan.work.len();
        let mut shares = self.shares(rows, now);
        rows = shares.rows;
        // A client's running prompts first, as far as its share goes, then its waiting ones, then what others have left over.
        for r in self.running.iter_mut().filter(|r| !r.generates()) {
            let n = shares.take(&r.job.tenant.client, r.job.prompt - r.computed);
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
        let mut passed_over: HashSet<Tenant> = HashSet::new();
        self.note_fronts(None, now);
        while rows > 0 && self.running.len() < self.policy.max_running {
            let open = |tenant: &Tenant| !passed_over.contains(tenant) && shares.left(&tenant.client) > 0;
            let candidates = self.waiting.iter().filter(|(tenant, _)| open(tenant));
            let key = |(tenant, queue): &(&Tenant, &VecDeque<Job>)| {
                let (client, oldest) = self.clients.get(&tenant.client).copied().unwrap_or_default();
                let user = if oldest { 0.0 } else { self.counters.get(*tenant).copied().unwrap_or(0.0) };
                let (client, user) = if self.policy.fair { (client, user) } else { (0.0, 0.0) };
                (client, user, queue.front().map_or(0.0, |job| job.arrived))
            };
            let least = candidates.min_by(|a, b| key(a).partial_cmp(&key(b)).unwrap_or(std::cmp::Ordering::Equal));
            let Some((tenant, queue)) = least else { break };
            let at = self.choose(tenant, queue, newest_first, now);
            let job = &queue[at];
            let bound = self.policy.max_adapters.unwrap_or(usize::MAX);
            let (present, adapters) = self.adapters_with(job);
            if !self.fits(job) || (!present && adapters > bound.max(job.adapters.len())) {
                // The others wait with one that has waited long, so that its turn comes.
                if self.starves(tenant, now) || passed_over.len() >= LOOK {
                    break;
                }
                passed_over.insert(tenant.clone());
                continue;
            }
            let tenant = tenant.clone();
            let Some(job) = self.take(&tenant, at) else { break };
            let skip = cached(&job).min(job.prompt.saturating_sub(1));
            let n = shares.take(&tenant.client, job.prompt - skip);
            (rows, computed) = (rows - n, computed + n);
            self.give(&tenant, job.prompt as f64);
            if let Some((_, oldest)) = self.clients.get_mut(&tenant.client) {
                *oldest = !*oldest;
            }
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
        for r in self.running.iter_mut().filter(|r| !r.generates()) {
            let n = (r.job.prompt - r.computed).min(rows);
            if n == 0 {
                continue;
            }
            match plan.work.iter_mut().find(|(id, _)| *id == r.job.id) {
                Some((_, rows)) => *rows += n,
                None => plan.work.push((r.job.id, n)),
            }
            (rows, computed) = (rows - n, computed + n);
            r.computed += n;
        }
        self.rows.add(now, computed as f64);
        plan
    }

    /// What each client may have of a step's prompt rows before the others have had theirs. Steps stay short too while another client was
    /// here a moment ago, whose next request would wait for the end of this one.
    fn shares(&self, rows: usize, now: f64) -> Shares {
        let prompts = self.running.iter().filter(|r| !r.generates()).map(|r| &r.job.tenant.client);
        let clients: HashSet<&Arc<str>> = prompts.chain(self.waiting.keys().map(|tenant| &tenant.client)).collect();
        let alone = clients.len() < 2 && now - self.latest[1].1 > RECENT;
        if alone || !self.policy.fair {
            return Shares { rows, each: rows, taken: HashMap::new() };
        }
        let rows = rows.min(self.policy.shared_tokens.max(1));
        Shares { rows, each: (rows / clients.len().max(1)).max(1), taken: HashMap::new() }
    }

    /// Notes since when each tenant's first is that, or only one tenant's.
    fn note_fronts(&mut self, only: Option<&Tenant>, now: f64) {
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
        let late: Vec<(Tenant, u64)> = {
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
                plan.refused.push((id, Refusal::TooLate));
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
