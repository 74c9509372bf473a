//! Guesses by a draft model, a smaller base of the same tokenizer (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318): it draws what a
//! request may get next, with the request's own settings and random numbers, and the base checks that in one step as it does other guesses.
//!
//! The draft keeps keys and values of its own in a pool of its own. They are nobody's but its: where they are missing they are computed again, some rows a step, and
//! where they find no room, or anything else fails, there is no guess.

use std::collections::HashMap;

use candle_core::DType;
use lorimer_model::{Base, BaseModel};
use rand_chacha::ChaCha8Rng;

use super::batched::{Batched, Rows};
use super::pool::{BLOCK, Geometry, Numbers, Pages, pool};
use crate::error::{Error, Result};
use crate::generation::sampling::{Sampling, all_finite};

/// A request to guess for.
pub(super) struct Wanted<'a> {
    pub id: u64,
    /// Its tokens, those of the prompt and those of the answer.
    pub tokens: (&'a [u32], &'a [u32]),
    /// How many to guess, at least one.
    pub count: usize,
    pub sampling: &'a Sampling,
    /// The state of its random numbers.
    pub rng: ChaCha8Rng,
}

impl Wanted<'_> {
    fn len(&self) -> usize {
        self.tokens.0.len() + self.tokens.1.len()
    }

    /// Its tokens from one on.
    fn from(&self, start: usize) -> impl Iterator<Item = u32> {
        self.tokens.0.iter().chain(self.tokens.1).skip(start).copied()
    }
}

/// What the draft's pool has of a request.
#[derive(Default)]
struct Held {
    /// The tokens whose keys and values are there.
    tokens: Vec<u32>,
    blocks: Vec<Vec<u32>>,
}

/// A request while it is guessed for.
struct Guessing<'a> {
    wanted: Wanted<'a>,
    /// Rows of the first forward.
    rows: usize,
    guess: Vec<u32>,
    /// Whether more may be guessed.
    goes_on: bool,
}

/// A draft model with its keys and values.
pub(super) struct Draft<'m> {
    model: &'m dyn BaseModel,
    geometry: Geometry,
    pages: Pages,
    numbers: Numbers,
    held: HashMap<u64, Held>,
    /// Tokens that the base has too.
    vocabulary: usize,
    /// Most rows of a forward.
    rows: usize,
}

impl<'m> Draft<'m> {
    /// A draft for a base whose vocabulary has so many tokens, with a pool of so many bytes.
    pub(super) fn new(
        model: &'m dyn BaseModel,
        (geometry, bytes): (Geometry, usize),
        vocabulary: usize,
        rows: usize,
    ) -> Result<Self> {
        if model.dtype() != DType::F32 || !model.shape().causal {
            return Err(Error::Pool("a draft generates tokens and computes in f32; open the model so".into()));
        }
        let (pages, numbers) = pool(geometry, bytes)?;
        let vocabulary = vocabulary.min(model.shape().vocabulary);
        Ok(Self { model, geometry, pages, numbers, held: HashMap::new(), vocabulary, rows })
    }

    /// Gives up what it has of requests that are not among those wanted.
    pub(super) fn keep(&mut self, wanted: impl Fn(u64) -> bool) {
        for (_, gone) in self.held.extract_if(|id, _| !wanted(*id)) {
            gone.blocks.iter().for_each(|pages| self.pages.release(pages));
        }
    }

    /// Gives up all that it has.
    pub(super) fn reset(&mut self) {
        self.held.clear();
        self.pages = Pages::new(self.pages.count() as u32);
    }

    /// Guesses of the next tokens of some requests.
    pub(super) fn guess(&mut self, wanted: Vec<Wanted<'_>>) -> Result<Vec<(u64, Vec<u32>)>> {
        let mut left = self.rows;
        let mut all: Vec<Guessing<'_>> =
            wanted.into_iter().filter_map(|wanted| self.begin(wanted, &mut left)).collect();
        let next = |g: &Guessing<'_>, held: &Held| match g.guess.last() {
            Some(&guess) => vec![guess],
            None => g.wanted.from(held.tokens.len()).take(g.rows).collect(),
        };
        while all.iter().any(|g| g.goes_on) {
            self.forward(&mut all, &next)?;
        }
        Ok(all.into_iter().map(|g| (g.wanted.id, g.guess)).collect())
    }

    /// What is to be computed of a request before it can be guessed for, as far as there are rows, with pages for that; None where there are none.
    fn begin<'a>(&mut self, wanted: Wanted<'a>, left: &mut usize) -> Option<Guessing<'a>> {
        let held = self.held.entry(wanted.id).or_default();
        let same = held.tokens.iter().zip(wanted.from(0)).take_while(|(a, b)| *a == b).count();
        // One row is left to compute.
        held.tokens.truncate(same.min(wanted.len().checked_sub(1)?));
        let rows = (wanted.len() - held.tokens.len()).min(*left);
        let known = |token: u32| (token as usize) < self.model.shape().vocabulary;
        let end = wanted.len() + wanted.count - 1;
        if rows == 0
            || end > self.model.shape().cached_positions()
            || !wanted.from(held.tokens.len()).take(rows).all(known)
        {
            return None;
        }
        let more = end.div_ceil(BLOCK).saturating_sub(held.blocks.len()) * self.geometry.layers;
        let taken = self.pages.take(more)?;
        held.blocks.extend(taken.chunks(self.geometry.layers.max(1)).map(<[u32]>::to_vec));
        *left -= rows;
        Some(Guessing { wanted, rows, guess: Vec::new(), goes_on: true })
    }

    /// One forward: the next rows of the requests that go on, and a guess for each that has come so far.
    fn forward(&mut self, all: &mut [Guessing<'_>], next: &dyn Fn(&Guessing<'_>, &Held) -> Vec<u32>) -> Result<()> {
        let (mut rows, mut tokens, mut needed) = (Vec::new(), Vec::new(), Vec::new());
        for g in all.iter().filter(|g| g.goes_on) {
            let Some(held) = self.held.get(&g.wanted.id) else { continue };
            let own = next(g, held);
            let count = own.len();
            rows.push(Rows { count, position: held.tokens.len(), blocks: &held.blocks, adapters: Vec::new() });
            tokens.extend(own);
            if held.tokens.len() + count >= g.wanted.len() {
                needed.push(tokens.len() as u32 - 1);
            }
        }
        let batch = Batched::new(self.numbers.all(), self.geometry, rows, &needed);
        let logits = rayon::scope(|_| batch.logits(self.model, &tokens, &needed))?;
        let logits = logits.map(|l| l.to_dtype(DType::F32)?.to_vec2::<f32>()).transpose()?.unwrap_or_default();
        drop(batch);
        let mut logits = logits.into_iter();
        for g in all.iter_mut().filter(|g| g.goes_on) {
            let Some(held) = self.held.get_mut(&g.wanted.id) else { continue };
            let own = next(g, held);
            held.tokens.extend(own);
            // Of a long prompt the rest is computed in the next steps.
            g.goes_on = held.tokens.len() >= g.wanted.len();
            let Some(logits) = g.goes_on.then(|| logits.next()).flatten() else { continue };
            let logits = logits.get(..self.vocabulary).unwrap_or(&logits);
            g.goes_on = all_finite(logits);
            if g.goes_on {
                let answer = [g.wanted.tokens.1, &g.guess].concat();
                g.guess.push(g.wanted.sampling.draw(logits, (g.wanted.tokens.0, &answer), &mut g.wanted.rng));
                g.goes_on = g.guess.len() < g.wanted.count;
            }
        }
        Ok(())
    }
}

/// Refuses a draft whose tokens are not the base's.
pub(super) fn check(base: &Base, draft: &Base) -> Result<()> {
    let fail = |why: String| {
        let name = draft.path.display();
        Err(Error::Pool(format!("the draft `{name}` {why}; a draft is a smaller model of the base's own tokenizer")))
    };
    if !draft.model().shape().causal {
        return fail("is an encoder, which generates nothing".into());
    }
    let (own, other) = (base.text.vocabulary(), draft.text.vocabulary());
    if own != other {
        return fail(format!("has {other} tokens and the base {own}"));
    }
    let differs = (0..own as u32).find(|&id| base.text.token(id) != draft.text.token(id));
    if let Some(id) = differs {
        let text = |base: &Base| base.text.token(id).unwrap_or_default();
        return fail(format!("has `{}` for token {id} and the base `{}`", text(draft), text(base)));
    }
    Ok(())
}
