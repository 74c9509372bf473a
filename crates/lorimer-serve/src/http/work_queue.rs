//! Work that would hold up the connections: each kind on threads of its own, so many at a time, each within its time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use futures_util::future::{BoxFuture, Shared};
use tokio::sync::{Semaphore, oneshot};

use super::error::ApiError;
use crate::adapters::hosted::Hosted;

/// By how much threads that read large bodies yield to those that compute: each takes a tenth of what one of those takes.
#[cfg(target_os = "linux")]
const LARGE_NICE: i32 = 10;

/// An adapter on its way into memory, for all who wait for it.
pub(super) type Loading = Shared<BoxFuture<'static, Result<Arc<Hosted>, ApiError>>>;

/// A kind of work.
pub struct WorkQueue {
    permits: Arc<Semaphore>,
    /// How long one that asks waits, for its turn and for the work.
    patience: Duration,
    /// What the work does, for the answer to one that has waited so long.
    what: &'static str,
    /// Threads of its own that yield to all others; None for the runtime's.
    yielding: Option<rayon::ThreadPool>,
}

impl WorkQueue {
    /// Work of which `at_once` is done at a time.
    pub fn new(at_once: usize, patience: Duration, what: &'static str) -> Self {
        Self { permits: Arc::new(Semaphore::new(at_once)), patience, what, yielding: None }
    }

    /// The same on threads of its own, which run when those that compute leave them time. Where they cannot be started, as [`Self::new`].
    pub fn yielding(at_once: usize, patience: Duration, what: &'static str) -> Self {
        let threads = rayon::ThreadPoolBuilder::new().num_threads(at_once).thread_name(|i| format!("large-{i}"));
        #[cfg(target_os = "linux")]
        let threads = threads.start_handler(|_| _ = rustix::process::nice(LARGE_NICE));
        Self { yielding: threads.build().ok(), ..Self::new(at_once, patience, what) }
    }

    /// The answer to one that has waited long enough.
    pub fn late(&self) -> ApiError {
        let message = format!("{} takes longer than {} seconds; try again later", self.what, self.patience.as_secs());
        ApiError { retry_after: Some(5.0), ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded", message) }
    }

    /// Waits for what was begun, as long as patience lasts.
    pub async fn wait<T>(&self, what: impl Future<Output = Result<T, ApiError>>) -> Result<T, ApiError> {
        tokio::time::timeout(self.patience, what).await.map_err(|_| self.late())?
    }

    /// Runs work when it is its turn, however long that takes. Work that was begun goes on when who asked has gone, and counts until it ends.
    pub async fn run<T: Send + 'static>(
        &self,
        f: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let permit = self.permits.clone().acquire_owned().await;
        let (done, ended) = oneshot::channel();
        // The log tells whose work it was.
        let log = tracing::Span::current();
        let work = move || {
            let _permit = permit;
            // Who asked may have gone.
            let _ = done.send(catch_unwind(AssertUnwindSafe(|| log.in_scope(f))));
        };
        match &self.yielding {
            Some(threads) => threads.spawn(work),
            None => drop(tokio::task::spawn_blocking(work)),
        }
        let ended = ended.await;
        ended.ok().and_then(Result::ok).ok_or_else(|| {
            // The panic has told the log what it was.
            tracing::error!("{} failed", self.what);
            let message = format!("{} failed; the server's log has more", self.what);
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", message)
        })?
    }

    /// Runs work within the time.
    pub async fn within<T: Send + 'static>(
        &self,
        f: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        self.wait(self.run(f)).await
    }
}

tokio::task_local! {
    /// Whether the request that is handled came with a large body.
    pub static LARGE: bool;
}

/// Work on requests, of which those with large bodies wait for each other only.
pub struct Readers {
    small: WorkQueue,
    large: WorkQueue,
}

impl Readers {
    /// Work of which, for small and for large bodies each, `at_once` is done at a time.
    pub fn new(at_once: usize, patience: Duration, what: &'static str) -> Self {
        Self { small: WorkQueue::new(at_once, patience, what), large: WorkQueue::yielding(at_once, patience, what) }
    }

    /// Runs work for the request that is handled, within the time.
    pub async fn within<T: Send + 'static>(
        &self,
        f: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let large = LARGE.try_with(|large| *large).unwrap_or(false);
        if large { self.large.within(f).await } else { self.small.within(f).await }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap()
    }

    /// Whoever leaves early leaves his work to count: no more runs at a time than is allowed.
    #[test]
    fn work_counts_until_it_ends_though_nobody_waits_for_it() {
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        runtime().block_on(async {
            let queue = WorkQueue::new(2, Duration::from_secs(20), "the work");
            for _ in 0..20 {
                let (running, most) = (running.clone(), most.clone());
                let work = queue.run(move || {
                    most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_millis(20));
                    running.fetch_sub(1, Ordering::SeqCst);
                    Ok(())
                });
                // The client goes away.
                let _ = tokio::time::timeout(Duration::from_millis(1), work).await;
            }
            queue.within(|| Ok(())).await.unwrap();
        });
        assert_eq!(most.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn who_waits_too_long_is_told_so_and_a_panic_is_an_error() {
        runtime().block_on(async {
            let queue = WorkQueue::new(1, Duration::from_millis(30), "the work");
            let slow = queue.within(|| {
                std::thread::sleep(Duration::from_millis(200));
                Ok(())
            });
            let error = slow.await.unwrap_err();
            assert_eq!((error.status.as_u16(), error.code), (503, "overloaded"));
            assert_eq!(queue.within(|| Ok(1)).await.unwrap_err().code, "overloaded", "the first is still at it");
            let other = WorkQueue::new(1, Duration::from_secs(5), "the work");
            let error = other.within(|| -> Result<(), ApiError> { panic!("a defect") }).await.unwrap_err();
            assert_eq!(error.status.as_u16(), 500);
            other.within(|| Ok(())).await.unwrap();
        });
    }

    /// What is done in parallel for a large body stays on the threads that yield, as the encoding of many texts. To be seen to fail: large bodies
    /// read on the runtime's threads, whose parallel parts go to the threads that compute.
    #[test]
    fn large_bodies_take_no_thread_of_those_that_compute() {
        use rayon::prelude::*;
        runtime().block_on(async {
            let readers = Readers::new(2, Duration::from_secs(20), "reading");
            let names = || {
                let name = |_| std::thread::current().name().unwrap_or_default().to_string();
                Ok((0..64).into_par_iter().with_max_len(1).map(name).collect::<Vec<String>>())
            };
            let found = LARGE.scope(true, async { readers.within(names).await }).await.unwrap();
            assert!(found.iter().all(|name| name.starts_with("large-")), "{found:?}");
        });
    }

    /// However many large prompts are read, a small one is read at once.
    #[test]
    fn small_requests_do_not_wait_for_large_ones() {
        runtime().block_on(async {
            let readers = Arc::new(Readers::new(1, Duration::from_millis(500), "reading"));
            let slow = || {
                std::thread::sleep(Duration::from_secs(2));
                Ok(())
            };
            let mut large = Vec::new();
            for _ in 0..4 {
                let own = readers.clone();
                large.push(tokio::spawn(LARGE.scope(true, async move { own.within(slow).await })));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
            readers.within(|| Ok(())).await.unwrap();
            for one in large {
                assert_eq!(one.await.unwrap().unwrap_err().code, "overloaded");
            }
        });
    }
}
