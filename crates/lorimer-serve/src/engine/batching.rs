//! Requests, the pages they hold, and what is computed next: all of the engine but the computation, so that the engine, the simulator and
//! the tests of progress drive the same code.
//!
//! Every request that is let in ends. Of those that run, the first is never preempted; what the prefix cache keeps is, block by block, what
//! some running request holds too or what can be given up; so the first always gets the pages that it was let in for.

use std::collections::HashMap;
use std::sync::Arc;

use crate::engine::adapter_cache::AdapterCache;
use crate::engine::pool::{BLOCK, Geometry, Pages};
use crate::engine::prefix::{NodeId, PrefixCache};
use crate::engine::scheduler::{Job, Policy, Refusal, Scheduler, Tenant};
use crate::engine::speculation::Speculation;

/// What is asked for.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// Token ids of the prompt, and of what there is of the answer.
    pub prompt: Vec<u32>,
    /// Whether all of it is computed, whatever is kept of prompts: something of it is to be told.
    pub whole: bool,
    /// How many of them are the answer's.
    pub answered: usize,
    /// Most tokens that are still to be generated.
    pub max_tokens: usize,
    /// How many of them are counted on when it is let in; none for all.
    pub expected: Option<usize>,
    /// Adapters, each by its content and the pages it takes.
    pub adapters: Vec<(Arc<str>, usize)>,
    /// Pages that a block of its tokens takes beside a page a layer: for keys and values of other passes, and what its adapters keep.
    pub pages_per_block: usize,
    /// What keys and values depend on beside the tokens.
    pub content: String,
    /// What its rows are computed with: those of a group stand next to each other.
    pub group: String,
    /// Whom it is for.
    pub tenant: Tenant,
}

/// A request that waits or runs.
pub struct Sequence {
    /// Prompt and answer.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens whose keys and values are in the pool.
    pub computed: usize,
    /// Pages of its blocks of tokens: a page a layer of each pass, the last pass first, and what adapters keep of them.
    pub blocks: Vec<Vec<u32>>,
    /// Whether it runs.
    pub runs: bool,
    /// Tokens that are guessed to come next, computed with the last.
    pub guess: Vec<u32>,
    /// Whether a draft model guessed them.
    drafted: bool,
    speculation: Speculation,
    drafting: Speculation,
    /// Most tokens that prompt and answer have.
    most: usize,
    /// Whether nothing is taken from the prefix cache.
    whole: bool,
    /// Pages that a block of its tokens takes.
    per_block: usize,
    /// What its keys and values depend on beside the tokens.
    content: String,
    /// What its rows are computed with.
    group: String,
    adapters: Vec<(Arc<str>, usize)>,
    /// How many of its adapters are leased to it.
    leased: usize,
    /// Its blocks that stand in the prefix cache, and the last of them.
    shared: usize,
    node: Option<NodeId>,
}

/// What a step is to do.
#[derive(Clone, Debug, Default)]
pub struct Step {
    /// Waiting requests that are refused.
    pub refused: Vec<(u64, Refusal)>,
    /// Requests for which there was no room though they had been let in; they are out.
    pub failed: Vec<u64>,
    /// Adapters that are to be copied into these pages, in this order and before anything is computed.
    pub loads: Vec<(Arc<str>, Vec<u32>)>,
    /// Requests with the number of their rows to compute, those with the same adapters next to each other.
    pub work: Vec<(u64, usize)>,
    /// Requests for which a draft model may guess so many tokens: [`Batching::drafted`] takes them, and their rows come to those of `work`.
    pub drafts: Vec<(u64, usize)>,
}

/// Figures of what has been done.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counted {
    /// Prompt tokens computed.
    pub prompt_tokens: u64,
    /// Prompt tokens that the prefix cache had.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Tokens guessed.
    pub guessed_tokens: u64,
    /// Guessed tokens that were drawn.
    pub accepted_tokens: u64,
    /// Requests that were preempted because the pool was full after all.
    pub preempted: u64,
}

fn job(id: u64, asked: &Asked, arrived: f64) -> Job {
    Job {
        id,
        tenant: asked.tenant.clone(),
        adapters: asked.adapters.clone(),
        pages_per_block: asked.pages_per_block,
        prompt: asked.prompt.len(),
        max_output: asked.max_tokens,
        expected: asked.expected.unwrap_or(asked.max_tokens).min(asked.max_tokens),
        arrived,
    }
}

/// Requests, pages and decisions.
pub struct Batching {
    geometry: Geometry,
    /// Most tokens that are guessed of an answer, by looking up and by a draft model, and most rows of a step.
    guesses: (usize, usize),
    batch_tokens: usize,
    pages: Pages,
    prefix: Option<PrefixCache>,
    adapters: AdapterCache,
    scheduler: Scheduler,
    sequences: HashMap<u64, Sequence>,
    counted: Counted,
}

impl Batching {
    /// No requests over free pages.
    pub fn new(policy: Policy, geometry: Geometry, pages: Pages, prefix_cache: bool) -> Self {
        Self {
            geometry,
            guesses: (policy.guesses, policy.draft_tokens),
            batch_tokens: policy.batch_tokens,
            scheduler: Scheduler::new(policy, geometry, pages.count()),
            pages,
            prefix: prefix_cache.then(PrefixCache::default),
            adapters: AdapterCache::default(),
            sequences: HashMap::new(),
            counted: Counted::default(),
        }
    }

    /// Takes a request with a number of its own at time `now`, in seconds; the refusal where the queue is full or the pool could never
    /// hold it.
    pub fn submit(&mut self, id: u64, asked: Asked, now: f64) -> Result<(), Refusal> {
        self.scheduler.submit(job(id, &asked, now))?;
        self.insert(id, asked);
        Ok(())
    }

    /// Takes a request that was let in before, to another account, and arrived then.
    pub fn restore(&mut self, id: u64, asked: Asked, arrived: f64) {
        self.scheduler.restore(job(id, &asked, arrived));
        self.insert(id, asked);
    }

    fn insert(&mut self, id: u64, asked: Asked) {
        let sequence = Sequence {
            prompt: asked.prompt.len().saturating_sub(asked.answered),
            most: asked.prompt.len().saturating_add(asked.max_tokens),
            tokens: asked.prompt,
            computed: 0,
            blocks: Vec::new(),
            runs: false,
            guess: Vec::new(),
            drafted: false,
            speculation: Speculation::default(),
            drafting: Speculation::default(),
            whole: asked.whole,
            per_block: self.geometry.layers + asked.pages_per_block,
            content: asked.content,
            group: asked.group,
            adapters: asked.adapters,
            leased: 0,
            shared: 0,
            node: None,
        };
        self.sequences.insert(id, sequence);
    }

    #[cfg(test)]
    fn seeded_faults(&mut self) {
        use crate::engine::fault::Fault;
        let lost = self.sequences.iter().find(|(_, s)| Fault::Lost.is_in(&s.tokens)).map(|(id, _)| *id);
        if let Some(id) = lost {
            self.sequences.remove(&id);
            panic!("a seeded fault");
        }
        for s in self.sequences.values() {
            Fault::Step.fail(&s.tokens);
            Fault::Rebuild.fail(&s.tokens);
            if s.tokens.len() >= s.prompt + Fault::LATER {
                Fault::Later.fail(&s.tokens);
            }
        }
    }

    /// The prompts of all requests, by number.
    pub fn into_prompts(self) -> Vec<(u64, Vec<u32>)> {
        #[cfg(test)]
        self.sequences.values().for_each(|s| crate::engine::fault::Fault::Rebuild.fail(&s.tokens));
        let prompt = |(id, mut s): (u64, Sequence)| {
            s.tokens.truncate(s.prompt);
            (id, s.tokens)
        };
        self.sequences.into_iter().map(prompt).collect()
    }

    /// Takes a request out, with its tokens: it is answered, or its client has gone.
    pub fn remove(&mut self, id: u64) -> Option<Vec<u32>> {
        self.scheduler.remove(id);
        let mut sequence = self.sequences.remove(&id)?;
        self.vacate(&mut sequence);
        Some(sequence.tokens)
    }

    /// Whether nothing waits or runs.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// A request that waits or runs.
    pub fn sequence(&self, id: u64) -> Option<&Sequence> {
        self.sequences.get(&id)
    }

    /// Where an adapter is in the pool, if it is there.
    pub fn adapter(&self, content: &str) -> Option<&[u32]> {
        self.adapters.get(content)
    }

    /// The scheduler's figures.
    pub fn scheduler(&mut self) -> &mut Scheduler {
        &mut self.scheduler
    }

    /// Adapters in the pool.
    pub fn adapters(&self) -> &AdapterCache {
        &self.adapters
    }

    /// The account of the pages.
    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    /// Pages that only the prefix cache holds.
    pub fn cached_pages(&self) -> usize {
        self.prefix.as_ref().map_or(0, |prefix| prefix.idle_pages(&self.pages))
    }

    /// What has been done.
    pub fn counted(&self) -> Counted {
        self.counted
    }

    /// Decides on a step at time `now` and sees to its pages: adapters of requests that are let in, and new blocks of tokens.
    pub fn step(&mut self, now: f64) -> Step {
        #[cfg(test)]
        self.seeded_faults();
        let Self { sequences, prefix, pages, counted, .. } = self;
        let plan = self.scheduler.plan(now, |job| {
            let Some((s, prefix)) = sequences.get_mut(&job.id).filter(|s| !s.whole).zip(prefix.as_mut()) else {
                return 0;
            };
            // The pages are held from here on, so that making room does not take them.
            for node in prefix.find(&s.content, &s.tokens) {
                let found = prefix.pages(node).to_vec();
                pages.share(&found);
                s.blocks.push(found);
                s.node = Some(node);
            }
            s.shared = s.blocks.len();
            s.computed = s.shared * BLOCK;
            counted.cached_tokens += s.computed as u64;
            s.computed
        });
        let mut step = Step::default();
        for (id, refusal) in plan.refused {
            // Its client may have gone meanwhile.
            if self.sequences.remove(&id).is_some() {
                step.refused.push((id, refusal));
            }
        }
        for (id, _) in &plan.admitted {
            if let Some(s) = self.sequences.get_mut(id) {
                s.runs = true;
            }
        }
        for (id, _) in &plan.admitted {
            self.lease(*id, &mut step);
        }
        let mut spare = self.batch_tokens.saturating_sub(plan.work.iter().map(|(_, rows)| rows).sum());
        for (id, rows) in plan.work {
            // It may have been preempted to make room for another.
            let Some(s) = self.sequences.get(&id).filter(|s| s.runs) else { continue };
            let blocks = (s.computed + rows).div_ceil(BLOCK);
            let per_block = s.per_block;
            let wanted = blocks.saturating_sub(s.blocks.len()) * per_block;
            let leased = s.leased == s.adapters.len();
            let taken = match leased && self.make_room(wanted, id) {
                true => self.pages.take(wanted),
                false => None,
            };
            let Some(s) = self.sequences.get_mut(&id).filter(|s| s.runs) else { continue };
            match taken {
                Some(taken) => {
                    s.blocks.extend(taken.chunks(per_block.max(1)).map(<[u32]>::to_vec));
                    let (guessed, wanted) = self.guess(id, spare);
                    spare -= guessed + wanted;
                    step.work.push((id, rows + guessed));
                    if wanted > 0 {
                        step.drafts.push((id, wanted));
                    }
                }
                // It runs and nothing can make room for it: better an end than waiting for ever.
                None => {
                    self.remove(id);
                    step.failed.push(id);
                }
            }
        }
        // Making room for a later one may have preempted an earlier one.
        let runs = |(id, _): &(u64, usize)| self.sequences.get(id).is_some_and(|s| s.runs);
        step.work.retain(runs);
        step.drafts.retain(runs);
        step.work.sort_by_cached_key(|(id, _)| (self.sequences.get(id).map(|s| s.group.clone()), *id));
        step
    }

    /// Guesses what comes after the last token of a request that generates, as far as there are rows, and pages that nobody else wants. Gives how many
    /// tokens, and where there are none how many a draft may guess.
    fn guess(&mut self, id: u64, rows: usize) -> (usize, usize) {
        let Some(s) = self.sequences.get_mut(&id) else { return (0, 0) };
        s.guess.clear();
        s.drafted = false;
        if s.computed + 1 != s.tokens.len() || s.tokens.len() == s.prompt {
            return (0, 0);
        }
        let left = rows.min(s.most.saturating_sub(s.tokens.len() + 1));
        if self.guesses.0 > 0 {
            s.guess = s.speculation.guess(&s.tokens, self.guesses.0.min(left));
        }
        let most = if s.guess.is_empty() { self.guesses.1.min(left) } else { 0 };
        let drafts = if most > 0 { s.drafting.length(most) } else { 0 };
        let end = s.tokens.len() + s.guess.len() + drafts;
        let more = end.div_ceil(BLOCK).saturating_sub(s.blocks.len()) * s.per_block;
        // Some stay free for those that have to have them.
        let taken = if self.pages.free() >= 4 * more { self.pages.take(more) } else { None };
        if let Some(taken) = taken {
            s.blocks.extend(taken.chunks(s.per_block.max(1)).map(<[u32]>::to_vec));
        }
        let room = s.blocks.len() * BLOCK - s.tokens.len();
        s.guess.truncate(room);
        self.counted.guessed_tokens += s.guess.len() as u64;
        (s.guess.len(), drafts.min(room))
    }

    /// A draft model has guessed tokens of a request, at most as many as [`Step::drafts`] says.
    pub fn drafted(&mut self, id: u64, guess: Vec<u32>) {
        let Some(s) = self.sequences.get_mut(&id) else { return };
        self.counted.guessed_tokens += guess.len() as u64;
        (s.guess, s.drafted) = (guess, true);
    }

    /// Of the tokens that were guessed of a request, so many were drawn.
    pub fn stood(&mut self, id: u64, stood: usize) {
        let Some(s) = self.sequences.get_mut(&id) else { return };
        let guessed = std::mem::take(&mut s.guess).len();
        let speculation = if s.drafted { &mut s.drafting } else { &mut s.speculation };
        speculation.stood(stood, guessed);
        self.counted.accepted_tokens += stood as u64;
    }

    /// Sees to a request's adapters in the pool, as long as it runs: making room for one may preempt it.
    fn lease(&mut self, id: u64, step: &mut Step) {
        loop {
            let Some(s) = self.sequences.get_mut(&id).filter(|s| s.runs) else { return };
            let Some((content, count)) = s.adapters.get(s.leased).cloned() else { return };
            if self.adapters.account().lease(&content) {
                s.leased += 1;
                continue;
            }
            // That it fits was the scheduler's test.
            if !self.make_room(count, id) {
                return;
            }
            let Some(loaded) = self.adapters.load(&content, count, &mut self.pages) else { return };
            step.loads.push((content, loaded.to_vec()));
        }
    }

    /// Frees pages: adapters that no request uses, then prompts that are kept, then the request that came last, which starts again later.
    /// Whether there are so many, and `id` still runs.
    fn make_room(&mut self, wanted: usize, id: u64) -> bool {
        loop {
            if self.adapters.make_room(&mut self.pages, wanted)
                || self.prefix.as_mut().is_some_and(|prefix| prefix.make_room(&mut self.pages, wanted))
            {
                return true;
            }
            let Some(last) = self.scheduler.preempt_last() else { return false };
            self.counted.preempted += 1;
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
        sequence.blocks.drain(..).for_each(|pages| self.pages.release(&pages));
        (sequence.computed, sequence.shared, sequence.node) = (0, 0, None);
        sequence.guess.clear();
        sequence.runs = false;
        for (content, _) in &sequence.adapters[..std::mem::take(&mut sequence.leased)] {
            self.adapters.account().unlease(content);
        }
    }

    /// Rows of a request have been computed: whole blocks go into the prefix cache, or give way to the same that are there.
    pub fn advance(&mut self, id: u64, rows: usize) {
        let Some(s) = self.sequences.get_mut(&id) else { return };
        s.computed += rows;
        if s.tokens.len() == s.prompt || rows > 1 {
            self.counted.prompt_tokens += rows as u64;
        }
        let Some(prefix) = &mut self.prefix else { return };
        while s.shared < s.computed / BLOCK {
            let Ok(tokens) = <&[u32; BLOCK]>::try_from(&s.tokens[s.shared * BLOCK..][..BLOCK]) else { return };
            let node = prefix.insert(&s.content, s.node, tokens, &mut s.blocks[s.shared], &mut self.pages);
            let Some(node) = node else { return };
            s.node = Some(node);
            s.shared += 1;
        }
    }

    /// A request has got its next token.
    pub fn push(&mut self, id: u64, token: u32) {
        if let Some(s) = self.sequences.get_mut(&id) {
            s.tokens.push(token);
            self.counted.generated_tokens += 1;
            self.scheduler.generated(id);
        }
    }
}
