//! Adapters of the hub, for requests that name one that is not here: one fetch of a name at a time, few at once, and none again for a while where it failed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use futures_util::FutureExt;
use lorimer_model::Base;

use super::error::ApiError;
use super::work_queue::{Loading, WorkQueue};
use crate::adapters::hosted::Hosted;
use crate::adapters::hub::Hub;
use crate::adapters::store::{Code, Store, StoreError};

/// Adapters that are fetched at once, and the seconds for which a request waits for one. A fetch goes on without those that gave up.
const FETCHES: (usize, u64) = (2, 120);
/// Most names that are being fetched or wait for it.
const WAITING: usize = 32;
/// For how long a name that could not be fetched is refused without asking again, and how many such names are known.
const FAILED: Duration = Duration::from_secs(60);
const NAMES: usize = 1024;

/// Names on their way from the hub, and those that did not come.
pub(super) struct Fetches {
    hub: Arc<Hub>,
    queue: WorkQueue,
    names: Mutex<Names>,
}

#[derive(Default)]
struct Names {
    coming: HashMap<String, Loading>,
    failed: HashMap<String, (Instant, ApiError)>,
}

impl Names {
    /// Remembers why a name did not come.
    fn fail(&mut self, name: &str, error: &ApiError, now: Instant) {
        self.failed.retain(|_, (then, _)| now.duration_since(*then) < FAILED);
        if self.failed.len() >= NAMES {
            let oldest = self.failed.iter().min_by_key(|(_, (then, _))| *then).map(|(name, _)| name.clone());
            oldest.map(|oldest| self.failed.remove(&oldest));
        }
        self.failed.insert(name.to_string(), (now, error.clone()));
    }

    /// Why a name did not come a moment ago.
    fn failed(&self, name: &str, now: Instant) -> Option<ApiError> {
        let (then, error) = self.failed.get(name)?;
        let left = FAILED.checked_sub(now.duration_since(*then)).filter(|left| !left.is_zero())?;
        Some(ApiError { retry_after: Some(left.as_secs_f64()), ..error.clone() })
    }
}

impl Fetches {
    /// Of a hub.
    pub(super) fn new(hub: Hub) -> Self {
        let queue = WorkQueue::new(FETCHES.0, Duration::from_secs(FETCHES.1), "fetching the adapter from the hub");
        Self { hub: Arc::new(hub), queue, names: Mutex::default() }
    }

    /// Waits for an adapter, fetched once for all who ask meanwhile.
    pub(super) async fn wait(
        self: &Arc<Self>,
        name: String,
        store: &Arc<Store>,
        base: &Arc<Base>,
    ) -> Result<Arc<Hosted>, ApiError> {
        let coming = self.begin(name, store, base)?;
        self.queue.wait(coming).await
    }

    fn begin(self: &Arc<Self>, name: String, store: &Arc<Store>, base: &Arc<Base>) -> Result<Loading, ApiError> {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(coming) = names.coming.get(&name) {
            return Ok(coming.clone());
        }
        if let Some(error) = names.failed(&name, Instant::now()) {
            return Err(error);
        }
        if names.coming.len() >= WAITING {
            return Err(self.queue.late());
        }
        let (own, all, store, base) = (name.clone(), self.clone(), store.clone(), base.clone());
        let task = tokio::spawn(async move {
            let (hub, name) = (all.hub.clone(), own.clone());
            let work = move || match hub.fetch(&store, base.model(), &name) {
                // It came another way since it was asked for; or somebody took its name away, and its files are still there.
                Err(StoreError { code: Code::AdapterExists, .. }) => Ok(store.get(base.model(), &name)?),
                fetched => Ok(fetched?),
            };
            let fetched: Result<_, ApiError> = all.queue.run(work).await;
            if let Err(error) = &fetched {
                tracing::warn!("`{own}` was not fetched from the hub: {}", error.message);
            }
            let mut names = all.names.lock().unwrap_or_else(PoisonError::into_inner);
            names.coming.remove(&own);
            if let Err(error) = &fetched {
                names.fail(&own, error, Instant::now());
            }
            fetched
        });
        let ended = |_| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", "the adapter was not fetched");
        let coming: Loading = async move { task.await.map_err(ended)? }.boxed().shared();
        names.coming.insert(name, coming.clone());
        Ok(coming)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// To be seen to fail: failures that are kept for ever, or without a bound.
    #[test]
    fn failures_are_remembered_for_a_while() {
        let (mut names, begun) = (Names::default(), Instant::now());
        let error = ApiError::invalid("no");
        names.fail("a/b", &error, begun);
        assert!(names.failed("a/b", begun + Duration::from_secs(59)).unwrap().retry_after.unwrap() <= 1.0);
        assert!(names.failed("a/b", begun + FAILED).is_none() && names.failed("a/c", begun).is_none());
        for i in 0..2 * NAMES as u64 {
            names.fail(&format!("a/{i}"), &error, begun + Duration::from_micros(i));
        }
        assert_eq!(names.failed.len(), NAMES);
        assert!(
            names.failed("a/2047", begun + Duration::from_secs(1)).is_some() && names.failed("a/b", begun).is_none()
        );
        names.fail("x/y", &error, begun + 3 * FAILED);
        assert_eq!(names.failed.len(), 1);
    }
}
