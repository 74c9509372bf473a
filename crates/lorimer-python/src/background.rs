//! Work on a thread of its own while Python's thread hears its progress and Ctrl-C.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Result, anyhow};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use serde_json::Value;

use crate::problem::sentence;
use crate::values::to_python;

/// How often Ctrl-C is looked for.
const LISTEN: Duration = Duration::from_millis(50);
/// A main thread's stack: the others have less.
const STACK: usize = 8 << 20;

/// What work that was asked to stop unwinds with.
struct Stopped;

/// What the work is given: a flag that asks it to stop, and where it tells how far it is.
pub struct Context {
    /// Set on Ctrl-C, or where the listener raises.
    pub stop: Arc<AtomicBool>,
    events: Sender<Value>,
}

impl Context {
    /// Tells the listener; ends the work, by unwinding up to [`run`], where it is asked to stop. For work that leaves nothing half done.
    pub fn tell(&self, event: Value) {
        if self.stop.load(Ordering::Relaxed) {
            resume_unwind(Box::new(Stopped));
        }
        // A listener that is gone hears nothing.
        let _ = self.events.send(event);
    }

    /// Where others tell the listener.
    pub fn teller(&self) -> impl FnMut(Value) + Send + 'static {
        let events = self.events.clone();
        move |event| {
            let _ = events.send(event);
        }
    }
}

/// Runs `work` and gives its result. On Ctrl-C the work is asked to stop and waited for, so that what it was at is kept; the second time it is left alone.
pub fn run<T: Send + 'static>(
    py: Python<'_>,
    listener: Option<Py<PyAny>>,
    work: impl FnOnce(Context) -> Result<T> + Send + 'static,
) -> PyResult<T> {
    let (events, inbox) = mpsc::channel();
    let stop = Arc::new(AtomicBool::new(false));
    let context = Context { stop: stop.clone(), events };
    let guarded = move || {
        catch_unwind(AssertUnwindSafe(|| work(context))).unwrap_or_else(|panic| {
            let said = panic.downcast_ref::<&str>().map(|text| (*text).to_string());
            let said = said.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
            Err(anyhow!("a defect of Lorimer: {said}"))
        })
    };
    let thread = std::thread::Builder::new().name("lorimer".into()).stack_size(STACK).spawn(guarded);
    let thread = thread.map_err(|e| PyRuntimeError::new_err(format!("no thread can be started: {e}")))?;
    let inbox = Mutex::new(inbox);
    let mut raised: Option<PyErr> = None;
    loop {
        let heard = py.detach(|| inbox.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(LISTEN));
        let problem = match heard {
            Ok(event) => match &listener {
                Some(listener) if raised.is_none() => listener.call1(py, (to_python(py, &event)?,)).err(),
                _ => None,
            },
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => break,
        };
        if let Some(problem) = problem.or_else(|| py.check_signals().err()) {
            if raised.replace(problem).is_some() {
                break;
            }
            stop.store(true, Ordering::Relaxed);
        }
    }
    if let Some(problem) = raised {
        return Err(problem);
    }
    let done = py.detach(|| thread.join()).map_err(|_| PyRuntimeError::new_err("the thread of the work is gone"))?;
    done.map_err(|error| sentence(&error))
}
