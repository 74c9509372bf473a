//! Where subcommands run inside another program, as they do in the Python package: who stops them, who hears of their progress, which base is loaded already,
//! and where their result goes.

use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use lorimer_model::{Base, LoadDtype};
use serde_json::Value;

/// The program around a subcommand.
pub struct Host {
    /// Set to stop a run after its step.
    pub stop: Arc<AtomicBool>,
    /// A base that need not be loaded again, and in which type its weights are kept.
    pub base: Option<(Arc<Base>, LoadDtype)>,
    /// Hears of progress: objects with a `kind`.
    pub tell: Box<dyn FnMut(Value)>,
}

thread_local! {
    static HOST: RefCell<Option<(Host, Option<Value>)>> = const { RefCell::new(None) };
}

/// Runs a subcommand on this thread; what it gives, and what it would have printed as JSON.
pub fn with<R>(host: Host, f: impl FnOnce() -> R) -> (R, Option<Value>) {
    HOST.with_borrow_mut(|current| *current = Some((host, None)));
    let given = f();
    (given, HOST.take().and_then(|(_, printed)| printed))
}

/// Whether there is a program around.
pub fn is_there() -> bool {
    HOST.with_borrow(Option::is_some)
}

/// Keeps a result in the place of printing it.
pub fn keep(result: Value) {
    HOST.with_borrow_mut(|host| {
        if let Some((_, printed)) = host {
            *printed = Some(result);
        }
    });
}

/// Tells the program around how far the subcommand is, if there is one.
pub fn tell(event: impl FnOnce() -> Value) {
    HOST.with_borrow_mut(|host| {
        if let Some((host, _)) = host {
            (host.tell)(event());
        }
    });
}

/// What stops the subcommand, if there is a program around.
pub(crate) fn stop() -> Option<Arc<AtomicBool>> {
    HOST.with_borrow(|host| host.as_ref().map(|(host, _)| host.stop.clone()))
}

/// The base of a path, if it is loaded.
pub(crate) fn base(path: &Path, dtype: LoadDtype) -> Option<Arc<Base>> {
    let there = HOST.with_borrow(|host| host.as_ref().and_then(|(host, _)| host.base.clone()));
    there.filter(|(base, kept)| base.path == path && *kept == dtype).map(|(base, _)| base)
}
