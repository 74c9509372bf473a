//! Spans on their way to a collector: a queue with a bound, which a task beside all others empties. Whoever ends a span never waits.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::http::{StatusCode, header};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use super::context::Parent;
use super::otlp;
use super::settings::{Sampler, TraceSettings, shown};
use super::span::Span;

/// Spans that wait for the collector; what comes beyond them is dropped.
const QUEUE: usize = 2048;
/// Spans of one request to the collector.
const BATCH: usize = 512;
/// For how long spans are gathered.
const GATHERED: Duration = Duration::from_secs(1);
/// How often a batch is sent, and for how long the exporter waits after the first time, twice as long after the next …
const TIMES: u32 = 5;
const PAUSE: Duration = Duration::from_secs(1);
/// Longest pause, which a collector may ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Time for what is left when the server ends.
const LAST: Duration = Duration::from_secs(5);
/// Bytes of an answer of a collector that are read.
const ANSWER: usize = 64 << 10;

/// Figures of an exporter.
#[derive(Debug, Default)]
struct Counts {
    exported: AtomicU64,
    /// Those for which the queue had no room, and those that the collector did not take.
    full: AtomicU64,
    lost: AtomicU64,
    /// Whether it was said that spans are dropped.
    warned: AtomicBool,
}

impl Counts {
    fn drop_spans(&self, count: &AtomicU64, n: usize, why: impl FnOnce() -> String) {
        count.fetch_add(n as u64, Ordering::Relaxed);
        if !self.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "spans are dropped, which is said only this time and counted by lorimer_spans_dropped_total: {}",
                why()
            );
        }
    }
}

/// The way to a collector.
pub struct Exporter {
    queue: mpsc::Sender<Span>,
    counts: Arc<Counts>,
    sampler: Sampler,
    stop: watch::Sender<bool>,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Exporter {
    /// Starts the task, on the runtime that it is called on.
    ///
    /// # Errors
    ///
    /// Fails if no client for HTTP can be set up.
    pub fn start(settings: TraceSettings) -> Result<Self, String> {
        let client = lorimer_model::http::client().timeout(settings.timeout);
        let client = client.user_agent(concat!("lorimer/", env!("CARGO_PKG_VERSION"))).build();
        let client = client.map_err(|e| format!("spans cannot be exported: {e}"))?;
        let (queue, spans) = mpsc::channel(QUEUE);
        let (stop, stopped) = watch::channel(false);
        let (counts, sampler) = (Arc::<Counts>::default(), settings.sampler);
        let sending = Sending { client, settings, counts: counts.clone(), spans, stopped };
        let task = Mutex::new(Some(tokio::spawn(sending.run())));
        Ok(Self { queue, counts, sampler, stop, task })
    }

    /// Whether a request is recorded.
    pub fn samples(&self, parent: Option<&Parent>, trace: u128) -> bool {
        self.sampler.samples(parent, trace)
    }

    /// Takes a span, or drops it.
    pub fn offer(&self, span: Span) {
        if self.queue.try_send(span).is_err() {
            self.counts.drop_spans(&self.counts.full, 1, || format!("more than {QUEUE} wait for the collector"));
        }
    }

    /// Spans that the collector took, for which there was no room, and that it did not take.
    pub fn figures(&self) -> [u64; 3] {
        [&self.counts.exported, &self.counts.full, &self.counts.lost].map(|count| count.load(Ordering::Relaxed))
    }

    /// Sends what is left, within a time, and ends the task.
    pub async fn finish(&self) {
        self.stop.send_replace(true);
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut task) = task else { return };
        if timeout(LAST, &mut task).await.is_err() {
            task.abort();
            tracing::warn!("the collector did not take the last spans within {} seconds", LAST.as_secs());
        }
    }
}

struct Sending {
    client: reqwest::Client,
    settings: TraceSettings,
    counts: Arc<Counts>,
    spans: mpsc::Receiver<Span>,
    stopped: watch::Receiver<bool>,
}

/// What came of an attempt that failed: why, and whether it may be made again, after the time that the collector asks for.
struct Problem(String, Option<Option<Duration>>);

impl Sending {
    async fn run(mut self) {
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            self.gather(&mut batch).await;
            if batch.is_empty() {
                return;
            }
            let n = batch.len();
            let body = otlp::request(&self.settings.resource, &batch);
            batch.clear();
            match self.deliver(body).await {
                Ok(rejected) => {
                    let rejected = usize::try_from(rejected).unwrap_or(n).min(n);
                    self.counts.exported.fetch_add((n - rejected) as u64, Ordering::Relaxed);
                    if rejected > 0 {
                        self.counts.drop_spans(&self.counts.lost, rejected, || self.told("it rejected some"));
                    }
                }
                Err(problem) => self.counts.drop_spans(&self.counts.lost, n, || self.told(&problem)),
            }
        }
    }

    fn told(&self, problem: &str) -> String {
        format!("the collector at {} does not take them ({problem})", shown(self.settings.endpoint.as_str()))
    }

    /// Waits for a batch; what is left at the end, and then none.
    async fn gather(&mut self, batch: &mut Vec<Span>) {
        let mut end = None;
        while batch.len() < BATCH && !*self.stopped.borrow() {
            let gathered = async move {
                match end {
                    Some(end) => tokio::time::sleep_until(end).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                span = self.spans.recv() => match span {
                    Some(span) => batch.push(span),
                    None => return,
                },
                () = gathered => return,
                _ = self.stopped.changed() => {}
            }
            end = end.or_else(|| Some(Instant::now() + GATHERED));
        }
        while batch.len() < BATCH
            && let Ok(span) = self.spans.try_recv()
        {
            batch.push(span);
        }
    }

    /// Sends a batch until it is taken, or no longer. How many spans of it were rejected.
    async fn deliver(&mut self, body: Vec<u8>) -> Result<u64, String> {
        let mut pause = PAUSE;
        for attempt in 1.. {
            let Problem(problem, again) = match self.send(body.clone()).await {
                Ok(rejected) => return Ok(rejected),
                Err(problem) => problem,
            };
            let ends = *self.stopped.borrow();
            let Some(asked) = again.filter(|_| attempt < TIMES && !ends) else { return Err(problem) };
            tracing::debug!("spans are sent again: {problem}");
            tokio::select! {
                () = sleep(asked.unwrap_or(pause).min(LONGEST_PAUSE)) => {}
                // One time more, at once.
                _ = self.stopped.changed() => {}
            }
            pause *= 2;
        }
        Ok(0)
    }

    async fn send(&self, body: Vec<u8>) -> Result<u64, Problem> {
        let request = self.client.post(self.settings.endpoint.clone()).headers(self.settings.headers.clone());
        let request = request.header(header::CONTENT_TYPE, "application/x-protobuf").body(body);
        let unreached = |e: reqwest::Error| Problem(deepest(&e), Some(None));
        let mut answer = request.send().await.map_err(unreached)?;
        let status = answer.status();
        if status.is_success() {
            let mut told = Vec::new();
            while let Some(part) = answer.chunk().await.map_err(unreached)? {
                told.extend_from_slice(&part);
                if told.len() > ANSWER {
                    break;
                }
            }
            return Ok(otlp::rejected(&told));
        }
        let again = matches!(
            status,
            StatusCode::TOO_MANY_REQUESTS
                | StatusCode::BAD_GATEWAY
                | StatusCode::SERVICE_UNAVAILABLE
                | StatusCode::GATEWAY_TIMEOUT
        );
        let after = answer.headers().get(header::RETRY_AFTER).and_then(|v| v.to_str().ok()?.trim().parse().ok());
        Err(Problem(format!("status {status}"), again.then(|| after.map(Duration::from_secs))))
    }
}

/// An error's innermost cause, which says the most.
fn deepest(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string().lines().next().unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    fn settings(endpoint: &str) -> TraceSettings {
        TraceSettings::of(Some(endpoint), |_| None).unwrap().unwrap()
    }

    fn span(id: u64) -> Span {
        Span {
            trace: 1,
            id,
            parent: None,
            state: String::new(),
            name: "x".into(),
            time: (1, 2),
            attributes: vec![],
            failed: false,
        }
    }

    fn run(test: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(test);
    }

    /// A collector that answers each request with the next of some answers, the last of them for ever.
    async fn collector(answers: &'static [&'static str]) -> (String, Arc<AtomicU64>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, asked) = (listener.local_addr().unwrap(), Arc::<AtomicU64>::default());
        let count = asked.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let n = count.fetch_add(1, Ordering::SeqCst) as usize;
                let mut head = Vec::new();
                let mut part = [0; 4096];
                let whole = |all: &[u8]| {
                    let text = String::from_utf8_lossy(all).to_lowercase();
                    let (head, _) = text.split_once("\r\n\r\n")?;
                    let length: usize = head.split("content-length: ").nth(1)?.lines().next()?.parse().ok()?;
                    Some(head.len() + 4 + length)
                };
                while whole(&head).is_none_or(|n| head.len() < n) {
                    match stream.read(&mut part).await {
                        Ok(0) | Err(_) => break,
                        Ok(n) => head.extend_from_slice(&part[..n]),
                    }
                }
                let answer = answers[n.min(answers.len() - 1)];
                let _ = stream.write_all(format!("HTTP/1.1 {answer}\r\nConnection: close\r\n\r\n").as_bytes()).await;
            }
        });
        (format!("http://{address}"), asked)
    }

    /// A collector that says nothing, or is not there: spans are taken in no time, as many wait as may, the others are counted, and the end
    /// comes. To be seen to fail: a queue without bound, or a `finish` without a time.
    #[test]
    fn a_collector_that_is_down_holds_nobody_up() {
        run(async {
            let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let exporter = Exporter::start(settings(&format!("http://{}", silent.local_addr().unwrap()))).unwrap();
            let begun = Instant::now();
            (0..10_000).for_each(|i| exporter.offer(span(i + 1)));
            assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
            let [exported, full, lost] = exporter.figures();
            assert!(exported == 0 && lost == 0 && full >= 10_000 - (QUEUE + 2 * BATCH) as u64, "{full}");
            let begun = Instant::now();
            exporter.finish().await;
            assert!(begun.elapsed() < LAST + Duration::from_secs(2), "{:?}", begun.elapsed());
            exporter.finish().await;
            drop(silent);
            let gone = Exporter::start(settings("http://127.0.0.1:1")).unwrap();
            gone.offer(span(1));
            gone.finish().await;
            assert_eq!(gone.figures(), [0, 0, 1]);
        });
    }

    /// To be seen to fail: 503 taken for a refusal, 400 sent again, or what is left at the end forgotten.
    #[test]
    fn spans_are_sent_again_where_that_may_help() {
        run(async {
            let (address, asked) =
                collector(&["503 Service Unavailable\r\nRetry-After: 0", "200 OK\r\nContent-Length: 0"]).await;
            let exporter = Exporter::start(settings(&address)).unwrap();
            (0..3).for_each(|i| exporter.offer(span(i + 1)));
            let begun = Instant::now();
            while exporter.figures()[0] < 3 {
                assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", exporter.figures());
                sleep(Duration::from_millis(20)).await;
            }
            assert_eq!((exporter.figures(), asked.load(Ordering::SeqCst)), ([3, 0, 0], 2));
            (0..700).for_each(|i| exporter.offer(span(i + 1)));
            exporter.finish().await;
            assert_eq!(exporter.figures(), [703, 0, 0]);
            let (address, asked) = collector(&["400 Bad Request\r\nContent-Length: 0"]).await;
            let refused = Exporter::start(settings(&address)).unwrap();
            refused.offer(span(1));
            while refused.figures()[2] == 0 {
                assert!(begun.elapsed() < Duration::from_secs(40));
                sleep(Duration::from_millis(20)).await;
            }
            assert_eq!(asked.load(Ordering::SeqCst), 1);
            let (address, _) = collector(&["200 OK\r\nContent-Length: 4\r\n\r\n\x0a\x02\x08\x02"]).await;
            let partly = Exporter::start(settings(&address)).unwrap();
            (0..3).for_each(|i| partly.offer(span(i + 1)));
            partly.finish().await;
            assert_eq!(partly.figures(), [1, 0, 2]);
        });
    }
}
