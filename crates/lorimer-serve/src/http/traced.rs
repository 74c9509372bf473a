//! Calls in traces: whose each is, what is told of it, and when it is over, which is at the end of its answer's body.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes};
use axum::extract::{MatchedPath, Request, State};
use axum::http::HeaderValue;
use axum::middleware::Next;
use axum::response::Response;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tracing::Instrument;

use super::app::App;
use super::error::ErrorCode;
use crate::trace::span::{cut, list};
use crate::trace::{Parent, Span, Value};

/// The header of an answer that tells of its span (W3C Trace Context, responses): version, trace, span, flags.
const HEADER: &str = "traceresponse";

tokio::task_local! {
    /// The call that is handled.
    static CALL: Arc<Call>;
}

/// The call that is handled, where it is one that is traced.
pub fn call() -> Option<Arc<Call>> {
    CALL.try_with(Arc::clone).ok()
}

/// What is known of a call.
pub struct Call {
    trace: u128,
    span: u64,
    parent: Option<Parent>,
    /// Whether somebody wants to hear of it.
    recorded: bool,
    begun: (SystemTime, Instant),
    told: Mutex<Told>,
}

/// What is told of a call, as far as it has come.
#[derive(Default)]
struct Told {
    name: String,
    attributes: Vec<(&'static str, Value)>,
    status: Option<u16>,
    error: Option<&'static str>,
    /// Whether it asks for tokens; tokens of its answers so far, and why those ended that have.
    generates: bool,
    output: usize,
    finish: Vec<&'static str>,
    /// Seconds until the engine began, and to the first token.
    waited: Option<f64>,
    first: Option<f64>,
}

impl Call {
    /// Tells more of a call.
    fn tell(&self, f: impl FnOnce(&mut Told)) {
        if self.recorded {
            f(&mut self.told.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Tells what is asked for, `operation` in the words of OpenTelemetry.
    pub fn asked(
        &self,
        operation: &'static str,
        (asked, answered): (&str, &str),
        more: Vec<(&'static str, Option<Value>)>,
    ) {
        self.tell(|told| {
            told.name = format!("{operation} {}", cut(asked));
            told.generates = operation != "embeddings";
            let own: [(&'static str, Value); 4] = [
                ("gen_ai.operation.name", operation.into()),
                ("gen_ai.provider.name", "lorimer".into()),
                ("gen_ai.request.model", asked.into()),
                ("gen_ai.response.model", answered.into()),
            ];
            told.attributes.extend(own);
            told.attributes.extend(more.into_iter().filter_map(|(key, value)| Some((key, value?))));
        });
    }

    /// An answer's first token is there, of a request that waited so long for the engine.
    pub fn first_token(&self, waited: Option<Duration>) {
        let first = self.begun.1.elapsed().as_secs_f64();
        self.tell(|told| {
            told.first.get_or_insert(first);
            told.waited = told.waited.or(waited.map(|waited| waited.as_secs_f64()));
        });
    }

    /// So many tokens of an answer more, and why it ends, if it does.
    pub fn answered(&self, tokens: usize, finish: Option<&'static str>) {
        self.tell(|told| {
            told.output += tokens;
            told.finish.extend(finish);
        });
    }

    /// Why the answers that were chosen of several ended.
    pub fn chose(&self, finish: Vec<&'static str>) {
        self.tell(|told| told.finish = finish);
    }

    /// It failed after its answer had begun.
    pub fn failed(&self, code: &'static str) {
        self.tell(|told| told.error = Some(code));
    }

    fn header(&self) -> HeaderValue {
        let text = format!("00-{:032x}-{:016x}-{:02x}", self.trace, self.span, u8::from(self.sampled()));
        HeaderValue::from_str(&text).unwrap_or_else(|_| HeaderValue::from_static(""))
    }

    /// Whether others may have, or should have, recorded it.
    fn sampled(&self) -> bool {
        self.recorded || self.parent.as_ref().is_some_and(|parent| parent.sampled)
    }

    /// The span of a call that is over; `whole` if all of its answer was taken.
    fn span(&self, whole: bool) -> Span {
        let told = std::mem::take(&mut *self.told.lock().unwrap_or_else(PoisonError::into_inner));
        let taken = self.begun.1.elapsed();
        let begun = self.begun.0.duration_since(UNIX_EPOCH).unwrap_or_default();
        let nanoseconds = |d: Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
        let mut attributes = told.attributes;
        let mut tell = |key, value: Option<Value>| attributes.extend(value.map(|value| (key, value)));
        let error = told.error.or((!whole).then_some("cancelled"));
        tell("http.response.status_code", told.status.map(|status| Value::Int(status.into())));
        tell("error.type", error.map(Value::from));
        if told.generates {
            tell("gen_ai.usage.output_tokens", Some(told.output.into()));
            tell(
                "gen_ai.response.finish_reasons",
                (!told.finish.is_empty()).then(|| list(told.finish.iter().copied())),
            );
            tell("gen_ai.latency.time_in_queue", told.waited.map(Value::from));
            tell("gen_ai.latency.time_to_first_token", told.first.map(Value::from));
            tell("gen_ai.latency.e2e", Some(taken.as_secs_f64().into()));
        }
        let parent = self.parent.as_ref();
        Span {
            trace: self.trace,
            id: self.span,
            parent: parent.map(|parent| parent.span),
            state: parent.map(|parent| parent.state.clone()).unwrap_or_default(),
            name: told.name,
            time: (nanoseconds(begun), nanoseconds(begun + taken)),
            attributes,
            failed: told.status.is_some_and(|status| status >= 500) || told.error.is_some() && told.status == Some(200),
        }
    }
}

/// What ends a call when it goes.
struct Ending {
    app: Arc<App>,
    call: Arc<Call>,
    log: tracing::Span,
    what: String,
    status: Option<u16>,
    whole: bool,
}

impl Drop for Ending {
    fn drop(&mut self) {
        let seconds = self.call.begun.1.elapsed().as_secs_f64();
        self.log.in_scope(|| match self.status {
            Some(status) if self.whole => tracing::debug!("{}: {status} after {seconds:.3} s", self.what),
            _ => tracing::debug!("{}: its client went away after {seconds:.3} s", self.what),
        });
        if let Some(exporter) = self.app.exporter.get().filter(|_| self.call.recorded) {
            exporter.offer(self.call.span(self.whole));
        }
    }
}

/// The body of an answer, with what ends its call.
struct Followed {
    body: Body,
    ending: Ending,
}

impl HttpBody for Followed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        self.ending.whole |= frame.is_none() || self.body.is_end_stream();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Gives a call its place in a trace: in the log, in its answer, and, where spans are exported and it is sampled, in a span.
pub async fn traced(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let begun = (SystemTime::now(), Instant::now());
    let parent = Parent::of(request.headers());
    // Zero is no number of either.
    let trace = parent.as_ref().map_or_else(|| rand::random::<u128>().max(1), |parent| parent.trace);
    let recorded = app.exporter.get().is_some_and(|exporter| exporter.samples(parent.as_ref(), trace));
    let route = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
    let what = format!("{} {route}", request.method());
    let mut told = Told::default();
    if recorded {
        told.name = what.clone();
        told.attributes = vec![
            ("http.request.method", request.method().as_str().into()),
            ("http.route", route.into()),
            ("url.path", request.uri().path().into()),
        ];
    }
    let call = Call { trace, span: rand::random::<u64>().max(1), parent, recorded, begun, told: Mutex::new(told) };
    let call = Arc::new(call);
    let log = tracing::error_span!("request", trace = format_args!("{trace:032x}"));
    let mut ending = Ending { app, call: call.clone(), log: log.clone(), what, status: None, whole: false };
    let mut response = CALL.scope(call.clone(), next.run(request)).instrument(log).await;
    let status = response.status().as_u16();
    ending.status = Some(status);
    call.tell(|told| {
        told.status = Some(status);
        told.error = response.extensions().get().map(|ErrorCode(code)| *code).or(told.error);
    });
    response.headers_mut().insert(HEADER, call.header());
    response.map(|body| {
        ending.whole = body.is_end_stream();
        Body::new(Followed { body, ending })
    })
}
