//! Many prompts and their answers, together through an engine, without a server.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use lorimer_model::TextModel;

use crate::engine::Request;
use crate::engine::worker::{Declined, StreamItem, Ticket, Worker};
use crate::error::{Error, Result};
use crate::generation::generate::{FinishReason, Generation};
use crate::generation::stream::{TextOptions, TextStream};

/// Requests that the engine is given at a time; the others wait here.
const TOGETHER: usize = 256;
/// How often it is looked whether to stop.
const LOOK: Duration = Duration::from_millis(50);

/// A request, and how its answer's tokens become text.
pub struct Asked {
    /// The request; tokens that end its answer are not a part of the text.
    pub request: Request,
    /// Stop texts.
    pub options: TextOptions,
}

/// The answers in the order of their requests; None where `stop` was set before all were there. `done` hears of each as it ends, with its place.
///
/// # Errors
///
/// Fails if a request cannot be served or computed; the others are given up.
pub fn answer_all(
    worker: &Worker,
    text: &TextModel,
    asked: Vec<Asked>,
    stop: &AtomicBool,
    mut done: impl FnMut(usize, &Generation),
) -> Result<Option<Vec<Generation>>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.map_err(|e| Error::Pool(format!("requests cannot be waited for: {e}")))?;
    runtime.block_on(async {
        let mut answers: Vec<Option<Generation>> = asked.iter().map(|_| None).collect();
        let each = asked.into_iter().enumerate();
        let each = each.map(|(at, asked)| async move { (at, answer(worker, text, asked).await) });
        let mut running = futures_util::stream::iter(each).buffer_unordered(TOGETHER);
        loop {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            match tokio::time::timeout(LOOK, running.next()).await {
                Err(_) => {}
                Ok(None) => return Ok(answers.into_iter().collect()),
                Ok(Some((at, answer))) => {
                    let answer = answer?;
                    done(at, &answer);
                    answers[at] = Some(answer);
                }
            }
        }
    })
}

/// One answer.
async fn answer(worker: &Worker, text: &TextModel, asked: Asked) -> Result<Generation> {
    let Asked { request, options } = asked;
    let ends = request.stop.clone();
    let prompt = request.prompt.clone();
    let mut ticket: Ticket = worker.submit(request).await.map_err(declined)?;
    let mut pieces = TextStream::new(text, &options, &prompt);
    let (mut answer, mut tokens, mut finish_reason) = (String::new(), 0, FinishReason::Length);
    while let Some(item) = ticket.next().await {
        match item {
            StreamItem::Prompt(..) => {}
            StreamItem::Token(token, reason) => {
                tokens += 1;
                if !ends.contains(&token.token) {
                    answer += &pieces.push(token.token)?;
                }
                if pieces.stopped() {
                    finish_reason = FinishReason::Stop;
                    ticket.finish();
                    break;
                }
                if let Some(reason) = reason {
                    finish_reason = reason;
                    break;
                }
            }
            StreamItem::Refused(refusal, _) => return Err(Error::Request(refused(refusal))),
            StreamItem::Failed(failure) => return Err(Error::Request(failure.to_string())),
            StreamItem::TooSlow => return Err(Error::Request("an answer came faster than it was taken".into())),
        }
    }
    answer += &pieces.finish()?;
    if pieces.stopped() {
        finish_reason = FinishReason::Stop;
    }
    Ok(Generation { text: answer, tokens, finish_reason, prompt_tokens: prompt.len() })
}

fn declined(declined: Declined) -> Error {
    match declined {
        Declined::Invalid(problem) => Error::Request(problem),
        Declined::Refused(refusal, _) => Error::Request(refused(refusal)),
        Declined::Stopping => Error::Request("the engine takes no more requests".into()),
        Declined::Failed(problem) => Error::Request(format!("the engine failed: {problem}")),
    }
}

fn refused(refusal: crate::engine::scheduler::Refusal) -> String {
    use crate::engine::scheduler::Refusal;
    match refusal {
        Refusal::QueueFull => "too many requests wait".into(),
        Refusal::TooLate => "the first token would come later than was promised".into(),
        Refusal::TooLarge => {
            "the request with its adapters does not fit into the pool alone; give the engine more memory".into()
        }
    }
}
