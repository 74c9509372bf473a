//! A step of the engine: what runs, its forward, the tokens drawn, and what is done where it fails.

use std::borrow::Cow;
use std::sync::PoisonError;

use candle_core::DType;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::batched::{Batched, Rows, Used};
use super::batching::{Batching, Sequence};
use super::draft::Wanted;
use super::pool::Pages;
use super::{Engine, Event, Failure, InFlight, Token, caught, log_probabilities};
use crate::error::{Error, Result};
use crate::generation::generate::FinishReason;
use crate::generation::sampling::all_finite;

/// Rows whose logits are needed: each one's request, and the place of the token that comes after it.
type Needs = Vec<(u64, usize)>;

/// A row of logits: of which request, and the place of the token that comes after it.
struct Row<'a> {
    id: u64,
    next: usize,
    logits: &'a [f32],
}

/// Refuses logits that are no numbers, and says with which adapters.
fn finite(in_flight: &InFlight, logits: &[f32]) -> std::result::Result<(), Failure> {
    if all_finite(logits) {
        return Ok(());
    }
    let request = &in_flight.request;
    let with: Vec<String> = request
        .adapters
        .iter()
        .enumerate()
        .map(|(i, (a, weight))| format!("`{}` at weight {weight}", request.names.get(i).unwrap_or(&a.content_id)))
        .collect();
    Err(Failure::NotFinite(match with.is_empty() {
        true => "the logits of the base are not finite numbers".into(),
        false => format!("the logits with {} are not finite numbers; give smaller weights", with.join(" and ")),
    }))
}

/// A token that was drawn.
struct Drawn {
    token: Token,
    /// Why it is the last of the answer, if it is.
    reason: Option<FinishReason>,
    /// The state of the random numbers after it.
    rng: ChaCha8Rng,
}

/// The next token of a request after its prompt and answer.
fn next_token(
    in_flight: &InFlight,
    history: (&[u32], &[u32]),
    logits: &[f32],
    mut rng: ChaCha8Rng,
) -> std::result::Result<Drawn, Failure> {
    let request = &in_flight.request;
    finite(in_flight, logits)?;
    let (token, complete) = match &in_flight.form {
        None => (request.sampling.draw(logits, history, &mut rng), false),
        Some(form) => {
            let mut form = form.lock().unwrap_or_else(PoisonError::into_inner);
            let mut restricted = logits.to_vec();
            form.restrict(&mut restricted).map_err(Failure::Form)?;
            let token = request.sampling.draw(&restricted, history, &mut rng);
            let allowed = request.sampling.allowed.as_ref().is_none_or(|allowed| allowed.contains(&token));
            if !allowed || restricted.get(token as usize).is_none_or(|l| l.is_infinite()) {
                let text = "no token that the request allows can follow in the form asked for";
                return Err(Failure::Form(text.into()));
            }
            (token, form.push(token).map_err(Failure::Form)?)
        }
    };
    let reason = match () {
        () if request.stop.contains(&token) => Some(FinishReason::Stop),
        () if complete => Some(FinishReason::Complete),
        () if history.1.len() + 1 >= in_flight.limit => Some(FinishReason::Length),
        () => None,
    };
    let reported = request.log_probabilities.map(|n| log_probabilities(logits, token, n));
    let (log_probability, top) = reported.map_or((None, Vec::new()), |(own, top)| (Some(own), top));
    Ok(Drawn { token: Token { token, log_probability, top }, reason, rng })
}

/// The next tokens of a request from the logits of its last row and of the tokens that were guessed after it: as long as what is drawn is what was guessed.
fn next_tokens(in_flight: &InFlight, s: &Sequence, rows: &[Row<'_>]) -> (Vec<Drawn>, Option<Failure>) {
    let mut drawn: Vec<Drawn> = Vec::new();
    let (prompt, answer) = s.tokens.split_at(s.prompt);
    let mut answer: Cow<'_, [u32]> = answer.into();
    for (i, row) in rows.iter().enumerate() {
        let rng = drawn.last().map_or(&in_flight.rng, |before| &before.rng).clone();
        let next = caught(|| next_token(in_flight, (prompt, &answer), row.logits, rng));
        match next.unwrap_or_else(|panic| Err(Failure::Defect(panic))) {
            Err(failure) => return (drawn, Some(failure)),
            Ok(next) => {
                let (token, over) = (next.token.token, next.reason.is_some());
                drawn.push(next);
                if over || s.guess.get(i) != Some(&token) {
                    break;
                }
                answer.to_mut().push(token);
            }
        }
    }
    (drawn, None)
}

impl Engine<'_> {
    pub(super) fn try_step(&mut self, now: f64) {
        self.take_one_again();
        let step = self.batching.step(now);
        for (content, pages) in step.loads {
            let mut adapters = self.in_flight.values().flat_map(|u| &u.request.adapters);
            if let Some((hosted, _)) = adapters.find(|(a, _)| *a.content_id == *content) {
                self.numbers.write(&pages, &hosted.numbers);
            }
        }
        for (id, refusal) in step.refused {
            self.in_flight.remove(&id);
            self.events.push(Event::Refused(id, refusal));
        }
        for id in step.failed {
            let text = "there was no room for it in the pool, though it was let in";
            self.fail(id, Failure::Defect(text.into()));
        }
        let work = self.with_drafts(step.work, &step.drafts);
        if !work.is_empty() {
            self.compute(&work);
        }
    }

    /// Work with the rows of tokens that the draft guesses. Where the draft fails there is no guess.
    fn with_drafts(&mut self, mut work: Vec<(u64, usize)>, drafts: &[(u64, usize)]) -> Vec<(u64, usize)> {
        let Self { draft: Some(draft), batching, in_flight, .. } = self else { return work };
        draft.keep(|id| batching.sequence(id).is_some_and(|s| s.runs));
        let wanted = drafts.iter().filter_map(|&(id, count)| {
            let (s, u) = batching.sequence(id).zip(in_flight.get(&id))?;
            let tokens = s.tokens.split_at(s.prompt);
            Some(Wanted { id, tokens, count, sampling: &u.request.sampling, rng: u.rng.clone() })
        });
        let wanted: Vec<Wanted<'_>> = wanted.collect();
        if wanted.is_empty() {
            return work;
        }
        let guesses = caught(|| draft.guess(wanted)).and_then(|guesses| guesses.map_err(|e| e.to_string()));
        match guesses {
            Ok(guesses) => {
                for (id, guess) in guesses {
                    if let Some((_, rows)) = work.iter_mut().find(|(other, _)| *other == id) {
                        *rows += guess.len();
                        batching.drafted(id, guess);
                    }
                }
            }
            Err(problem) => {
                tracing::error!("the draft failed and begins anew: {problem}");
                draft.reset();
            }
        }
        work
    }

    pub(super) fn fail(&mut self, id: u64, failure: Failure) {
        self.in_flight.remove(&id);
        self.batching.remove(id);
        self.events.push(Event::Failed(id, failure));
    }

    /// A new account of requests and pages. Nothing that it has of them is used but the prompts.
    pub(super) fn rebuild(&mut self, problem: &str) {
        tracing::error!("the engine's account failed and is made anew; requests under way go on: {problem}");
        let pages = Pages::new(self.batching.pages().count() as u32);
        let new = Batching::new(self.settings.policy.clone(), self.geometry, pages, self.settings.prefix_cache);
        let mut prompts = std::mem::replace(&mut self.batching, new).into_prompts();
        prompts.extend(self.again.drain(..));
        prompts.retain(|(id, _)| self.in_flight.contains_key(id));
        prompts.sort_unstable_by_key(|(id, _)| *id);
        self.again = prompts.into();
        // Nobody has the tokens of one that the account has lost.
        let mut lost: Vec<u64> = self.in_flight.keys().copied().collect();
        lost.retain(|id| self.again.binary_search_by_key(id, |(id, _)| *id).is_err());
        for id in lost {
            self.in_flight.remove(&id);
            self.events.push(Event::Failed(id, Failure::Defect(problem.to_string())));
        }
    }

    /// Takes in the next of the requests that are to go on after a failure, once those before it have had a step.
    fn take_one_again(&mut self) {
        let Some((id, prompt)) = self.again.pop_front() else { return };
        self.at = Some(id);
        let Some(in_flight) = self.in_flight.get(&id) else { return };
        let (asked, arrived) = (self.asked(in_flight, prompt), in_flight.arrived);
        self.batching.restore(id, asked, arrived);
    }

    /// Computes the rows of some requests together and draws their next tokens; where that fails, in two parts.
    fn compute(&mut self, work: &[(u64, usize)]) {
        let problem = match caught(|| self.forward(work)) {
            Ok(Ok((needs, logits))) => {
                for &(id, count) in work {
                    self.at = Some(id);
                    let guessed = self.batching.sequence(id).map_or(0, |s| s.guess.len());
                    self.batching.advance(id, count - guessed);
                }
                let width = (logits.len() / needs.len().max(1)).max(1);
                let rows = needs.into_iter().zip(logits.chunks(width));
                let rows: Vec<Row<'_>> = rows.map(|((id, next), logits)| Row { id, next, logits }).collect();
                self.report(work, &rows);
                return self.draw(&rows);
            }
            Ok(Err(error)) => error.to_string(),
            Err(panic) => panic,
        };
        match work {
            [] => {}
            [(id, _)] => self.fail(*id, Failure::Defect(problem)),
            _ => {
                let (one, other) = work.split_at(work.len() / 2);
                self.compute(one);
                self.compute(other);
            }
        }
    }

    /// Computes the rows of some requests together: the logits that are needed, one row after the other, and for each its request and the
    /// place of the token that comes after it.
    fn forward(&mut self, work: &[(u64, usize)]) -> Result<(Needs, Vec<f32>)> {
        let Self { in_flight, batching, numbers, geometry, model, .. } = self;
        let (mut rows, mut tokens, mut needed, mut needs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for &(id, count) in work {
            let Some((s, u)) = batching.sequence(id).zip(in_flight.get(&id)) else { continue };
            let used = u.request.adapters.iter().filter_map(|(hosted, weight)| {
                Some(Used { hosted, pages: batching.adapter(&hosted.content_id)?, weight: *weight })
            });
            let adapters: Vec<Used<'_>> = used.collect();
            if adapters.len() != u.request.adapters.len() {
                return Err(Error::Pool("an adapter of a running request is not in the pool".into()));
            }
            rows.push(Rows { count, position: s.computed, blocks: &s.blocks, adapters });
            for next in s.computed + 1..=s.computed + count {
                let reported = u.request.of_prompt && (u.reported.max(1)..s.prompt).contains(&next);
                if reported || next >= s.tokens.len() {
                    needed.push((tokens.len() + next - 1 - s.computed) as u32);
                    needs.push((id, next));
                }
            }
            let own = s.tokens[s.computed..].iter().chain(&s.guess);
            tokens.extend(own.take(count));
        }
        let batch = Batched::new(numbers.all(), *geometry, rows, &needed);
        // Inside the pool, so that each parallel part begins without waking a thread to carry it there.
        let logits = rayon::scope(|_| batch.logits(*model, &tokens, &needed))?;
        let logits = logits.map(|l| l.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()).transpose()?;
        Ok((needs, logits.unwrap_or_default()))
    }

    /// Tells the log-probabilities of prompts, each token's from the row before it, and ends requests that ask for no more.
    fn report(&mut self, work: &[(u64, usize)], rows: &[Row<'_>]) {
        for &(id, _) in work {
            self.at = Some(id);
            let Some((u, s)) = self.in_flight.get_mut(&id).zip(self.batching.sequence(id)) else { continue };
            let mut reported = Vec::new();
            if u.request.of_prompt && u.reported < s.prompt {
                let own: Vec<&Row<'_>> = rows.iter().filter(|row| row.id == id && row.next < s.prompt).collect();
                if let Some(failure) = own.iter().find_map(|row| finite(u, row.logits).err()) {
                    self.fail(id, failure);
                    continue;
                }
                if u.reported == 0 {
                    reported.push(Token { token: s.tokens[0], log_probability: None, top: Vec::new() });
                }
                let n = u.request.log_probabilities.unwrap_or(0);
                let token = |row: &&Row<'_>| {
                    let (own, top) = log_probabilities(row.logits, s.tokens[row.next], n);
                    Token { token: s.tokens[row.next], log_probability: Some(own), top }
                };
                reported.par_extend(own.par_iter().map(token));
                u.reported += reported.len();
            }
            let over = u.limit == 0 && s.computed >= s.prompt;
            if over || !reported.is_empty() {
                self.events.push(Event::Prompt(id, reported, over.then_some(FinishReason::Length)));
            }
            if over {
                self.in_flight.remove(&id);
                self.batching.remove(id);
            }
        }
    }

    /// Draws the next tokens of requests whose last row is there.
    fn draw(&mut self, rows: &[Row<'_>]) {
        let (in_flight, batching) = (&self.in_flight, &self.batching);
        let one = |rows: &[Row<'_>]| {
            let id = rows.first()?.id;
            let (u, s) = in_flight.get(&id).zip(batching.sequence(id))?;
            let first = rows.iter().position(|row| row.next == s.tokens.len())?;
            Some((id, next_tokens(u, s, &rows[first..])))
        };
        let own: Vec<&[Row<'_>]> = rows.chunk_by(|a, b| a.id == b.id).collect();
        let drawn: Vec<_> = own.into_par_iter().with_max_len(1).filter_map(one).collect();
        for (id, (drawn, failure)) in drawn {
            self.at = Some(id);
            let stood = drawn.len().saturating_sub(1);
            self.batching.stood(id, stood);
            for (i, Drawn { token, reason, rng }) in drawn.into_iter().enumerate() {
                let Some(u) = self.in_flight.get_mut(&id) else { break };
                // What is told is what goes on from, whatever fails after this.
                u.rng = rng;
                u.answer.push(token.token);
                let next = token.token;
                self.events.push(Event::Token(id, token, reason));
                if reason.is_some() {
                    self.in_flight.remove(&id);
                }
                self.batching.push(id, next);
                if reason.is_some() {
                    self.batching.remove(id);
                } else if i < stood {
                    // It was guessed, so its row was computed with those before.
                    self.batching.advance(id, 1);
                }
            }
            if let Some(failure) = failure {
                self.fail(id, failure);
            }
        }
    }
}
