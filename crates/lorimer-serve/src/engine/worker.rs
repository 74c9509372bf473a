//! The engine on a thread of its own, fed from anywhere.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lorimer_model::{Base, BaseModel};
use lorimer_tensor::KeyDtype;
use serde::Serialize;
use tokio::sync::{mpsc as channel, oneshot};

use crate::engine::draft;
use crate::engine::scheduler::Refusal;
use crate::engine::{AtWork, Engine, EngineSettings, EngineState, Event, Failure, Request, Token, caught};
use crate::error::Result;
use crate::generation::generate::FinishReason;

/// How often figures are brought up to date.
const FIGURES: Duration = Duration::from_millis(200);
/// How long an engine whose requests all wait sleeps.
const NAP: Duration = Duration::from_millis(2);

/// Tokens that wait for who hears them. An answer that is further behind is given up: its client reads nothing, or far too slowly.
const QUEUE: usize = 256;

/// What a request hears.
#[derive(Clone, Debug, PartialEq)]
pub enum StreamItem {
    /// Tokens of the prompt; with the reason if they are all that there is.
    Prompt(Vec<Token>, Option<FinishReason>),
    /// A token; with the reason if it is the last.
    Token(Token, Option<FinishReason>),
    /// The request is refused, and may come again after so many seconds.
    Refused(Refusal, f64),
    /// The request could not be computed.
    Failed(Failure),
    /// The answer was given up because its client takes it too slowly.
    TooSlow,
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq)]
pub enum Declined {
    /// It cannot be served as it is.
    Invalid(String),
    /// The queue is full or the pool too small; seconds after which it may come again.
    Refused(Refusal, f64),
    /// The server is shutting down.
    Stopping,
    /// The engine failed, with what it said.
    Failed(String),
}

enum Command {
    Submit(
        Box<Request>,
        oneshot::Sender<std::result::Result<u64, Declined>>,
        channel::Sender<StreamItem>,
        Arc<Outcome>,
    ),
    Cancel(u64),
}

/// Sums of observed seconds in classes, as Prometheus keeps them.
#[derive(Clone, Debug, Serialize)]
pub struct Histogram {
    /// Upper bounds of the classes.
    pub bounds: &'static [f64],
    /// Observations of each class, and those beyond the last.
    pub counts: Vec<u64>,
    /// Sum of all.
    pub sum: f64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    fn observe(&mut self, seconds: f64) {
        let class = self.bounds.iter().position(|&b| seconds <= b).unwrap_or(self.bounds.len());
        self.counts[class] += 1;
        self.sum += seconds;
    }
}

/// Figures of a running engine.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// The engine's.
    pub engine: EngineState,
    /// Adapters at work.
    pub adapters: AtWork,
    /// Seconds from arrival to the first token.
    pub first_token: Histogram,
    /// Seconds between two tokens of an answer.
    pub between_tokens: Histogram,
    /// Seconds from arrival to the last token.
    pub whole: Histogram,
    /// Requests answered.
    pub answered: u64,
    /// Requests refused.
    pub refused: u64,
    /// Requests whose client went away.
    pub cancelled: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Times that the engine had to be made anew after a panic.
    pub restarts: u64,
}

const FIRST: &[f64] = &[0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0];
const BETWEEN: &[f64] = &[0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.5, 1.0];
const WHOLE: &[f64] = &[0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0];

impl Default for Figures {
    fn default() -> Self {
        Self {
            engine: EngineState::default(),
            adapters: AtWork::default(),
            first_token: Histogram::new(FIRST),
            between_tokens: Histogram::new(BETWEEN),
            whole: Histogram::new(WHOLE),
            answered: 0,
            refused: 0,
            cancelled: 0,
            failed: 0,
            restarts: 0,
        }
    }
}

/// The engine's thread. Dropping the last handle ends it.
#[derive(Clone)]
pub struct Worker {
    commands: mpsc::Sender<Command>,
    figures: Arc<Mutex<Figures>>,
    stopping: Arc<AtomicBool>,
    most_adapters: usize,
    kv_cache_dtype: KeyDtype,
    thread: Arc<JoinHandle<()>>,
    /// Why the thread has ended, if it has and could say so.
    ended: Arc<OnceLock<String>>,
}

/// What a request's two ends tell each other beside its tokens.
#[derive(Default)]
struct Outcome {
    /// Whether it has all that it wants.
    answered: AtomicBool,
    /// How long it waited until the engine began with it.
    waited: OnceLock<Duration>,
}

/// A request under way; dropping it takes it out of the engine.
pub struct Ticket {
    id: u64,
    outcome: Arc<Outcome>,
    receiver: channel::Receiver<StreamItem>,
    commands: mpsc::Sender<Command>,
    over: bool,
}

impl Ticket {
    /// The request's number in the engine, which the log tells it by.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// How long it waited until the engine began with it, if it has.
    pub fn waited(&self) -> Option<Duration> {
        self.outcome.waited.get().copied()
    }

    /// What comes next; None after the last token, a refusal or a failure.
    pub async fn next(&mut self) -> Option<StreamItem> {
        let item = self.receiver.recv().await;
        self.over |= !matches!(item, Some(StreamItem::Token(_, None) | StreamItem::Prompt(_, None)));
        item
    }

    /// Ends the request because its answer is whole, as after a stop text, which the engine does not know.
    pub fn finish(self) {
        self.outcome.answered.store(true, Ordering::Relaxed);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.over {
            let _ = self.commands.send(Command::Cancel(self.id));
        }
    }
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// Fails if the engine cannot be set up so, or the thread not be started.
    pub fn start(base: Arc<Base>, settings: EngineSettings) -> Result<Self> {
        Self::start_with_draft(base, None, settings)
    }

    /// The same with a draft, a smaller model of the base's own tokenizer.
    ///
    /// # Errors
    ///
    /// Fails as [`Self::start`] does, and if the draft's tokens are others.
    pub fn start_with_draft(base: Arc<Base>, draft: Option<Arc<Base>>, settings: EngineSettings) -> Result<Self> {
        if let Some(draft) = &draft {
            draft::check(&base, draft)?;
        }
        // What cannot be set up is told here.
        Engine::with_draft(base.model(), draft.as_deref().map(Base::model), settings.clone())?;
        Self::start_unchecked(base, draft, settings)
    }

    pub(crate) fn start_unchecked(base: Arc<Base>, draft: Option<Arc<Base>>, settings: EngineSettings) -> Result<Self> {
        let (commands, inbox) = mpsc::channel();
        let policy = &settings.policy;
        let most_adapters = policy.max_adapters.unwrap_or(usize::MAX).min(policy.max_running);
        let kv_cache_dtype = settings.kv_cache_dtype;
        let shared = (Arc::default(), Arc::default(), Arc::default());
        let (figures, stopping, ended) = shared.clone();
        let run = move || {
            let draft = draft.as_deref().map(Base::model);
            Loop { base: &base, draft, settings, inbox, figures, stopping, ended, in_flight: HashMap::new() }.run();
        };
        let thread = std::thread::Builder::new().name("engine".into()).spawn(run);
        let thread = thread.map_err(|e| crate::Error::Pool(format!("the engine's thread cannot be started: {e}")))?;
        let (figures, stopping, ended) = shared;
        Ok(Self { commands, figures, stopping, most_adapters, kv_cache_dtype, thread: Arc::new(thread), ended })
    }

    /// Hands a request to the engine.
    pub async fn submit(&self, request: Request) -> std::result::Result<Ticket, Declined> {
        if self.stopping.load(Ordering::Relaxed) {
            return Err(Declined::Stopping);
        }
        let (reply, answer) = oneshot::channel();
        let (sender, receiver) = channel::channel(QUEUE);
        let outcome = Arc::<Outcome>::default();
        let sent = self.commands.send(Command::Submit(Box::new(request), reply, sender, outcome.clone()));
        sent.map_err(|_| self.gone())?;
        let id = answer.await.map_err(|_| self.gone())??;
        Ok(Ticket { id, outcome, receiver, commands: self.commands.clone(), over: false })
    }

    /// Why a request was not heard.
    fn gone(&self) -> Declined {
        let while_taking = || "the engine failed while it took the request, and is made anew".to_string();
        Declined::Failed(self.problem().unwrap_or_else(while_taking))
    }

    /// Why no requests can be served any more, if the engine's thread has ended.
    pub fn problem(&self) -> Option<String> {
        let why = self.ended.get().cloned();
        why.or_else(|| self.thread.is_finished().then(|| "the engine's thread has ended".to_string()))
    }

    /// Most adapters that can be at work at a time: there are no slots, so that is a bound on requests.
    pub fn most_adapters(&self) -> usize {
        self.most_adapters
    }

    /// How keys and values are kept.
    pub fn kv_cache_dtype(&self) -> KeyDtype {
        self.kv_cache_dtype
    }

    /// Takes no more requests. Those under way are answered.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// Whether no more requests are taken.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Figures, at most a fifth of a second old.
    pub fn figures(&self) -> Figures {
        self.figures.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// One request's listener.
struct InFlight {
    sender: channel::Sender<StreamItem>,
    outcome: Arc<Outcome>,
    arrived: f64,
    last: Option<f64>,
    #[cfg(test)]
    prompt: Vec<u32>,
}

impl InFlight {
    /// The engine began with it at `now`, unless it had before.
    fn began(&self, now: f64) {
        self.outcome.waited.get_or_init(|| Duration::try_from_secs_f64(now - self.arrived).unwrap_or_default());
    }

    /// Counts a request whose client no longer listens.
    fn count_gone(&self, now: f64, figures: &mut Figures) {
        if self.outcome.answered.load(Ordering::Relaxed) {
            figures.answered += 1;
            figures.whole.observe(now - self.arrived);
        } else {
            figures.cancelled += 1;
        }
    }
}

struct Loop<'a> {
    base: &'a Base,
    draft: Option<&'a dyn BaseModel>,
    settings: EngineSettings,
    inbox: mpsc::Receiver<Command>,
    figures: Arc<Mutex<Figures>>,
    stopping: Arc<AtomicBool>,
    ended: Arc<OnceLock<String>>,
    in_flight: HashMap<u64, InFlight>,
}

impl Loop<'_> {
    /// Runs until nobody can hand in requests any more, or no engine can be made.
    fn run(mut self) {
        let clock = Instant::now();
        loop {
            let engine = caught(|| {
                Engine::with_draft(self.base.model(), self.draft, self.settings.clone()).map_err(|e| e.to_string())
            });
            let mut engine = match engine.and_then(|engine| engine) {
                Ok(engine) => engine,
                Err(problem) => {
                    let problem = format!("the engine cannot be started, so the server has to be: {problem}");
                    tracing::error!("{problem}");
                    // Before those who still ask are told that nobody hears them.
                    return self.ended.set(problem).unwrap_or_default();
                }
            };
            // The engine and what is done for one request see to what fails there. Where they fail at that, it costs the requests of this moment,
            // not the server.
            match caught(|| self.serve(&mut engine, clock)) {
                Ok(()) => return,
                Err(problem) => self.lose_all(&problem),
            }
        }
    }

    /// Tells all requests that they are lost.
    fn lose_all(&mut self, problem: &str) {
        let lost = self.in_flight.len();
        tracing::error!("the engine failed and is made anew; the {lost} requests under way are lost: {problem}");
        self.change(|f| (f.restarts, f.failed) = (f.restarts + 1, f.failed + lost as u64));
        for (_, in_flight) in self.in_flight.drain() {
            let why = format!("the engine failed, and is made anew ({problem}); ask again");
            let _ = in_flight.sender.try_send(StreamItem::Failed(Failure::Defect(why)));
        }
    }

    /// Ends one request, which could not be told what came of a step.
    fn lose(&mut self, engine: &mut Engine<'_>, id: u64, problem: String) {
        tracing::error!("request {id} failed: {problem}");
        engine.cancel(id);
        if let Some(in_flight) = self.in_flight.remove(&id) {
            self.change(|f| f.failed += 1);
            let _ = in_flight.sender.try_send(StreamItem::Failed(Failure::Defect(problem)));
        }
    }

    fn change(&self, f: impl FnOnce(&mut Figures)) {
        f(&mut self.figures.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Serves until nobody can hand in requests any more.
    fn serve(&mut self, engine: &mut Engine<'_>, clock: Instant) {
        let mut reported = Instant::now();
        let mut waiting_only = false;
        loop {
            loop {
                let command = match () {
                    () if engine.is_idle() => self.inbox.recv_timeout(FIGURES),
                    () if waiting_only => self.inbox.recv_timeout(NAP),
                    () => self.inbox.try_recv().map_err(|e| match e {
                        TryRecvError::Empty => RecvTimeoutError::Timeout,
                        TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
                    }),
                };
                match command {
                    Ok(command) => {
                        waiting_only = false;
                        self.handle(engine, command, clock.elapsed().as_secs_f64());
                    }
                    Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) if engine.is_idle() => return,
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            if reported.elapsed() >= FIGURES {
                reported = Instant::now();
                // No answer depends on figures.
                match caught(|| (engine.state(), engine.at_work())) {
                    Ok((state, adapters)) => self.change(|f| (f.engine, f.adapters) = (state, adapters)),
                    Err(problem) => tracing::error!("the engine's figures are those of before: {problem}"),
                }
            }
            if engine.is_idle() {
                continue;
            }
            let begun = clock.elapsed().as_secs_f64();
            let events = engine.step(begun);
            let now = clock.elapsed().as_secs_f64();
            waiting_only = events.is_empty() && engine.running() == 0;
            for (_, in_flight) in
                self.in_flight.iter().filter(|(id, i)| i.outcome.waited.get().is_none() && engine.runs(**id))
            {
                in_flight.began(begun);
            }
            for event in events {
                let id = event.id();
                // One that was over within the step.
                if let Some(in_flight) = self.in_flight.get(&id) {
                    in_flight.began(begun);
                }
                if let Err(problem) = caught(|| self.report(engine, event, now)) {
                    self.lose(engine, id, problem);
                }
            }
        }
    }

    fn handle(&mut self, engine: &mut Engine<'_>, command: Command, now: f64) {
        match command {
            Command::Cancel(id) => {
                if let Some(in_flight) = self.in_flight.remove(&id) {
                    engine.cancel(id);
                    self.change(|f| in_flight.count_gone(now, f));
                }
            }
            Command::Submit(request, reply, sender, outcome) => {
                let stopping = self.stopping.load(Ordering::Relaxed);
                #[cfg(test)]
                let prompt = request.prompt.clone();
                let taken = match (!stopping).then(|| engine.submit(*request, now)) {
                    None => Err(Declined::Stopping),
                    Some(Err(error)) => Err(Declined::Invalid(error.to_string())),
                    Some(Ok(Err(refusal))) => {
                        self.change(|f| f.refused += 1);
                        Err(Declined::Refused(refusal, engine.retry_after(now)))
                    }
                    Some(Ok(Ok(id))) => Ok(id),
                };
                let id = taken.as_ref().ok().copied();
                // Who asked may be gone already.
                let waits = reply.send(taken).is_ok();
                match id {
                    Some(id) if waits => {
                        let in_flight = InFlight {
                            sender,
                            outcome,
                            arrived: now,
                            last: None,
                            #[cfg(test)]
                            prompt,
                        };
                        self.in_flight.insert(id, in_flight);
                    }
                    Some(id) => engine.cancel(id),
                    None => {}
                }
            }
        }
    }

    fn report(&mut self, engine: &mut Engine<'_>, event: Event, now: f64) {
        let (id, item) = match event {
            Event::Prompt(id, tokens, reason) => (id, StreamItem::Prompt(tokens, reason)),
            Event::Token(id, token, reason) => (id, StreamItem::Token(token, reason)),
            Event::Refused(id, refusal) => (id, StreamItem::Refused(refusal, engine.retry_after(now))),
            Event::Failed(id, problem) => {
                tracing::error!("request {id} failed: {problem}");
                (id, StreamItem::Failed(problem))
            }
        };
        let Some(in_flight) = self.in_flight.get_mut(&id) else { return };
        #[cfg(test)]
        crate::engine::fault::Fault::Report.fail(&in_flight.prompt);
        let over = !matches!(item, StreamItem::Token(_, None) | StreamItem::Prompt(_, None));
        let mut figures = self.figures.lock().unwrap_or_else(PoisonError::into_inner);
        match &item {
            StreamItem::Token(_, reason) => {
                match in_flight.last {
                    Some(last) => figures.between_tokens.observe(now - last),
                    None => figures.first_token.observe(now - in_flight.arrived),
                }
                in_flight.last = Some(now);
                if reason.is_some() {
                    figures.answered += 1;
                    figures.whole.observe(now - in_flight.arrived);
                }
            }
            StreamItem::Prompt(_, reason) => {
                if reason.is_some() {
                    figures.answered += 1;
                    figures.whole.observe(now - in_flight.arrived);
                }
            }
            StreamItem::Refused(..) => figures.refused += 1,
            StreamItem::TooSlow => {}
            StreamItem::Failed(_) => figures.failed += 1,
        }
        // One place is left for the last word.
        let behind = !over && in_flight.sender.capacity() <= 1;
        let item = if behind { StreamItem::TooSlow } else { item };
        let gone = in_flight.sender.try_send(item).is_err() || behind;
        if gone && !over {
            in_flight.count_gone(now, &mut figures);
        }
        drop(figures);
        if over || gone {
            self.in_flight.remove(&id);
        }
        if gone && !over {
            engine.cancel(id);
        }
    }
}
