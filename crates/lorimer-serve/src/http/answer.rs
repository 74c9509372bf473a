//! Requests under way: from tokens to pieces of text, for one or several choices at a time.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_util::FutureExt;
use lorimer_model::Base;
use tokio::sync::mpsc;
use tracing::Instrument;

use super::error::{ApiError, cut_off, failed, refused, too_slow};
use super::traced::{Call as Traced, call};
use crate::engine::worker::{StreamItem, Ticket, Worker};
use crate::engine::{Failure, Request, Token, panic_text};
use crate::generation::generate::FinishReason;
use crate::generation::stream::{TextOptions, TextStream, context};
use crate::generation::tools::{Call, CallReader};

/// Pieces that wait for a slow client before its answer waits too.
const PIECES: usize = 64;

/// A part of an answer.
#[derive(Clone, Debug, Default)]
pub struct Piece {
    /// Which of the choices.
    pub index: usize,
    /// Text that has become certain.
    pub text: String,
    /// Calls of tools that have become certain, the first of them with its number among the choice's.
    pub calls: (usize, Vec<Call>),
    /// Tokens of the prompt whose log-probabilities were asked for.
    pub prompt: Vec<Token>,
    /// The answer's tokens since the piece before.
    pub tokens: Vec<Token>,
    /// Why the choice ends with this piece, if it does.
    pub finish: Option<FinishReason>,
}

/// The choices of one request.
pub struct Answers {
    pieces: mpsc::Receiver<Result<Piece, ApiError>>,
    /// Choices that have not ended.
    open: usize,
    /// What hears of them.
    call: Option<Arc<Traced>>,
}

impl Answers {
    /// Hands requests to the engine, a choice each.
    pub async fn start(
        worker: &Worker,
        base: &Arc<Base>,
        requests: Vec<Request>,
        options: TextOptions,
        calls: Option<CallReader>,
    ) -> Result<Self, ApiError> {
        let (sender, pieces) = mpsc::channel(PIECES);
        let (open, options) = (requests.len(), Arc::new(options));
        for (index, request) in requests.into_iter().enumerate() {
            let prompt = context(&base.text, &request.prompt).to_vec();
            let ticket = worker.submit(request).await?;
            let (id, sender) = (ticket.id(), sender.clone());
            let reading = (prompt, options.clone(), calls.clone());
            let following = follow(ticket, base.clone(), reading, index, (sender.clone(), call()));
            let whole = async move {
                if let Err(panic) = AssertUnwindSafe(following).catch_unwind().await {
                    let problem = panic_text(panic);
                    tracing::error!("request {id} failed: {problem}");
                    let _ = sender.send(Err(failed(id, &Failure::Defect(problem)))).await;
                }
            };
            tokio::spawn(whole.in_current_span());
        }
        Ok(Self { pieces, open, call: call() })
    }

    /// The next piece of any choice; None after the last.
    pub async fn next(&mut self) -> Option<Result<Piece, ApiError>> {
        if self.open == 0 {
            return None;
        }
        let piece = self.pieces.recv().await.unwrap_or_else(|| Err(cut_off()));
        match &piece {
            Ok(piece) if piece.finish.is_some() => self.open -= 1,
            Ok(_) => {}
            Err(_) => self.open = 0,
        }
        match (&self.call, &piece) {
            (Some(call), Ok(piece)) => call.answered(piece.tokens.len(), piece.finish.map(FinishReason::name)),
            (Some(call), Err(error)) => call.failed(error.code),
            (None, _) => {}
        }
        Some(piece)
    }
}

/// Turns one choice's tokens into pieces until it ends or nobody listens.
async fn follow(
    mut ticket: Ticket,
    base: Arc<Base>,
    (prompt, options, mut calls): (Vec<u32>, Arc<TextOptions>, Option<CallReader>),
    index: usize,
    (sender, call): (mpsc::Sender<Result<Piece, ApiError>>, Option<Arc<Traced>>),
) {
    #[cfg(test)]
    crate::engine::fault::Fault::Text.fail(&prompt);
    let mut stream = TextStream::new(&base.text, &options, &prompt);
    let mut piece = Piece { index, ..Default::default() };
    let mut called = 0;
    loop {
        // A client that goes away while no text comes is noticed too.
        let item = tokio::select! {
            item = ticket.next() => item,
            () = sender.closed() => return,
        };
        if let (Some(call), Some(StreamItem::Token(..))) = (&call, &item) {
            call.first_token(ticket.waited());
        }
        let (token, reason) = match item {
            Some(StreamItem::Prompt(tokens, reason)) => {
                piece.prompt.extend(tokens);
                (None, reason)
            }
            Some(StreamItem::Token(token, reason)) => (Some(token), reason),
            Some(StreamItem::Refused(refusal, retry_after)) => {
                let _ = sender.send(Err(refused(refusal, retry_after))).await;
                return;
            }
            Some(StreamItem::Failed(failure)) => {
                // The engine, which knows no trace, has told the log why.
                tracing::error!("request {} is answered with its failure", ticket.id());
                let _ = sender.send(Err(failed(ticket.id(), &failure))).await;
                return;
            }
            Some(StreamItem::TooSlow) => {
                let _ = sender.send(Err(too_slow())).await;
                return;
            }
            // The engine has ended.
            None => {
                let _ = sender.send(Err(cut_off())).await;
                return;
            }
        };
        // A token that ends the answer is no part of it unless it is asked for.
        let text = match &token {
            Some(token) if reason != Some(FinishReason::Stop) || options.keep_stop => stream.push(token.token),
            _ => Ok(String::new()),
        };
        let rest = match reason {
            Some(_) => stream.finish(),
            None => Ok(String::new()),
        };
        let (text, rest) = match (text, rest) {
            (Ok(text), Ok(rest)) => (text, rest),
            (Err(e), _) | (_, Err(e)) => {
                let _ = sender.send(Err(ApiError::invalid(e.to_string()))).await;
                return;
            }
        };
        piece.text = text + &rest;
        piece.tokens.extend(token);
        piece.finish = if stream.stopped() { Some(FinishReason::Stop) } else { reason };
        if let Some(reader) = &mut calls {
            let (mut text, mut own) = reader.push(&piece.text);
            if piece.finish.is_some() {
                let (rest, more) = reader.finish();
                text += &rest;
                own.extend(more);
            }
            piece.text = text;
            piece.calls = (called, own);
            called += piece.calls.1.len();
            // An answer that was cut off may lack calls.
            let whole = reader.is_over() || matches!(piece.finish, Some(FinishReason::Stop | FinishReason::Complete));
            if whole && called > 0 {
                piece.finish = Some(FinishReason::ToolCalls);
            }
        }
        if piece.text.is_empty() && piece.calls.1.is_empty() && piece.finish.is_none() {
            continue;
        }
        let finish = piece.finish;
        let piece = std::mem::replace(&mut piece, Piece { index, ..Default::default() });
        if sender.send(Ok(piece)).await.is_err() {
            return;
        }
        if finish.is_some() {
            // After a stop text the engine would go on.
            ticket.finish();
            return;
        }
    }
}
