//! What a step takes: requests that are let in, and how many of each one's tokens.

use super::{Job, LOOK, Plan, RECENT, Refusal, Running, Scheduler, Tenant};
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

/// Prompt rows of a step, shared among clients.
pub(super) struct Shares {
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

impl Scheduler {
    /// Pages that keys and values of some requests take at most before the last is done, if each generates all that it may: after the
    /// request with the i-th most tokens to go is done, only those before it are left, each with as many tokens more.
    /// Each request: its tokens, those to go, and the pages that a block takes beside a page a layer.
    pub(super) fn most_pages(&self, requests: &mut [(usize, usize, usize)]) -> usize {
        requests.sort_unstable_by_key(|&(_, remaining, _)| std::cmp::Reverse(remaining));
        let at = |i: usize| {
            let steps = requests[i].1;
            requests[..=i].iter().map(|&(tokens, _, more)| self.geometry.pages_with(tokens + steps, more)).sum()
        };
        (0..requests.len()).map(at).max().unwrap_or(0)
    }

    /// Whether the pool holds this one too until all are done.
    pub(super) fn fits(&self, job: &Job) -> bool {
        let mut requests: Vec<_> =
            self.running.iter().map(|r| (r.tokens(), r.remaining(), r.job.pages_per_block)).collect();
        requests.push((job.prompt, job.expected, job.pages_per_block));
        let new = |(key, pages): &(Arc<str>, usize)| if self.adapters.contains_key(key) { 0 } else { *pages };
        let adapters = self.adapter_pages + job.adapters.iter().map(new).sum::<usize>();
        adapters + self.most_pages(&mut requests) <= self.pages
    }

    /// Whether a job's adapters are all in the batch, and how many would be there with it.
    pub(super) fn adapters_with(&self, job: &Job) -> (bool, usize) {
        let new = job.adapters.iter().filter(|(key, _)| !self.adapters.contains_key(key)).count();
        (new == 0, self.adapters.len() + new)
    }

    /// Seconds from now until a request's first token, if it is let in at once.
    pub(super) fn until_first_token(&mut self, prompt: usize, now: f64) -> f64 {
        let rate = self.rows.at(now);
        if rate > 0.0 { prompt as f64 / rate } else { 0.0 }
    }

    /// Whether the first of a tenant's queue has been passed over for long enough.
    pub(super) fn starves(&self, tenant: &Tenant, now: f64) -> bool {
        self.fronts.get(tenant).is_some_and(|(_, since)| now - since > self.policy.starvation)
    }

    /// Which of a tenant's waiting requests is next.
    pub(super) fn choose(&self, tenant: &Tenant, queue: &VecDeque<Job>, newest_first: bool, now: f64) -> usize {
        let order = |i: usize| if newest_first { queue.len() - 1 - i } else { i };
        if !self.policy.cluster || self.starves(tenant, now) {
            return order(0);
        }
        let mut look = (0..queue.len().min(LOOK)).map(order);
        look.find(|&i| self.adapters_with(&queue[i]).0).unwrap_or(order(0))
    }

    /// Decides on a step. `cached` tells how many tokens of a prompt need not be computed.
    pub fn plan(&mut self, now: f64, cached: impl FnMut(&Job) -> usize) -> Plan {
        let mut plan = Plan { refused: std::mem::take(&mut self.dropped), ..Default::default() };
        plan.work.extend(self.running.iter().filter(|r| r.generates()).map(|r| (r.job.id, 1)));
        let mut shares = self.shares(self.policy.batch_tokens.saturating_sub(plan.work.len()), now);
        // A client's running prompts first, as far as its share goes, then its waiting ones, then what others have left over.
        for r in self.running.iter_mut().filter(|r| !r.generates()) {
            let n = shares.take(&r.job.tenant.client, r.job.prompt - r.computed);
            if n > 0 {
                plan.work.push((r.job.id, n));
                r.computed += n;
            }
        }
        let arriving = self.arrivals.at(now);
        let newest_first = self.policy.first_token.is_some() && arriving > self.admissions.at(now) && arriving > 0.0;
        if let Some(promised) = self.policy.first_token {
            self.refuse_late(promised, now, &mut plan);
        }
        self.note_fronts(None, now);
        self.admit(newest_first, now, &mut shares, &mut plan, cached);
        let mut rows = shares.rows;
        for r in self.running.iter_mut().filter(|r| !r.generates()) {
            let n = (r.job.prompt - r.computed).min(rows);
            if n == 0 {
                continue;
            }
            match plan.work.iter_mut().find(|(id, _)| *id == r.job.id) {
                Some((_, rows)) => *rows += n,
                None => plan.work.push((r.job.id, n)),
            }
            rows -= n;
            r.computed += n;
        }
        let computed: usize = plan.work.iter().map(|(_, n)| n).sum();
        self.rows.add(now, computed as f64);
        plan
    }

    /// Lets waiting requests in, in turns, while there are rows and room for them.
    fn admit(
        &mut self,
        newest_first: bool,
        now: f64,
        shares: &mut Shares,
        plan: &mut Plan,
        mut cached: impl FnMut(&Job) -> usize,
    ) {
        let mut passed_over: HashSet<Tenant> = HashSet::new();
        while shares.rows > 0 && self.running.len() < self.policy.max_running {
            let open = |tenant: &Tenant| !passed_over.contains(tenant) && shares.left(&tenant.client) > 0;
            let Some((tenant, queue)) = self.least_served(open) else { break };
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
            plan.admitted.push((job.id, skip));
            plan.work.push((job.id, n));
            self.begin(job, skip + n, now);
        }
    }

    /// The tenant whose turn it is among some, with its queue.
    fn least_served(&self, open: impl Fn(&Tenant) -> bool) -> Option<(&Tenant, &VecDeque<Job>)> {
        let candidates = self.waiting.iter().filter(|(tenant, _)| open(tenant));
        let key = |(tenant, queue): &(&Tenant, &VecDeque<Job>)| {
            let (client, oldest) = self.clients.get(&tenant.client).copied().unwrap_or_default();
            let user = if oldest { 0.0 } else { self.counters.get(*tenant).copied().unwrap_or(0.0) };
            let (client, user) = if self.policy.fair { (client, user) } else { (0.0, 0.0) };
            (client, user, queue.front().map_or(0.0, |job| job.arrived))
        };
        candidates.min_by(|a, b| key(a).partial_cmp(&key(b)).unwrap_or(std::cmp::Ordering::Equal))
    }

    /// A request that was let in runs from now on, with so many of its prompt's tokens computed.
    fn begin(&mut self, job: Job, computed: usize, now: f64) {
        self.give(&job.tenant, job.prompt as f64);
        if let Some((_, oldest)) = self.clients.get_mut(&job.tenant.client) {
            *oldest = !*oldest;
        }
        for (key, pages) in &job.adapters {
            let entry = self.adapters.entry(key.clone()).or_insert((0, *pages));
            self.adapter_pages += if entry.0 == 0 { *pages } else { 0 };
            entry.0 += 1;
        }
        self.admissions.add(now, 1.0);
        self.note_fronts(Some(&job.tenant), now);
        self.running.push(Running { job, computed, generated: 0 });
    }

    /// What each client may have of a step's prompt rows before the others have had theirs. Steps stay short too while another client was
    /// here a moment ago, whose next request would wait for the end of this one.
    pub(super) fn shares(&self, rows: usize, now: f64) -> Shares {
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
    pub(super) fn note_fronts(&mut self, only: Option<&Tenant>, now: f64) {
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
    pub(super) fn refuse_late(&mut self, promised: f64, now: f64, plan: &mut Plan) {
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
}
