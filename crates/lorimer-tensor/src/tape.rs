//! Recording a forward for its backward.
//!
//! candle's own graph starts every gradient as zeros, adds to it in passes of their own on one thread, and keeps
//! every intermediate until the end. A [`Tape`] records only the operations that lead from a trainable tensor to the
//! loss, lets products accumulate straight into gradients, and frees what an operation kept as soon as its backward has run.
//! Whatever has no operation here is recorded as a *subgraph* ([`crate::Ops::subgraph`]): any function of candle tensors.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Result, Tensor, TensorId};
use rayon::prelude::*;

use crate::kernels::real::Real;
use crate::kernels::slices::{with_mut_slice, with_slices};

/// Elements up to which a pass over memory is quicker on one thread than shared out.
pub(crate) const SERIAL: usize = 1 << 17;

type Backward = Box<dyn FnOnce(&[Option<Tensor>], &mut Gradients) -> Result<()> + Send>;

struct Node {
    outputs: Vec<TensorId>,
    backward: Backward,
}

/// Computes a tensor again.
pub(crate) type Recompute = Arc<dyn Fn() -> Result<Tensor> + Send + Sync>;

#[derive(Default)]
struct Record {
    nodes: Vec<Node>,
    tracked: HashSet<TensorId>,
    /// How outputs of element-wise operations come about, for nodes that would rather compute than keep them.
    recomputes: HashMap<TensorId, Recompute>,
}

/// The operations of one forward, in order.
pub struct Tape(Mutex<Record>);

struct Slot {
    gradient: Tensor,
    /// Whether nobody else holds the storage, so that it may be added to in place.
    owned: bool,
}

/// Gradients by tensor, while a backward runs and after it.
#[derive(Default)]
pub struct Gradients(HashMap<TensorId, Slot>);

impl Gradients {
    /// The gradient of a tensor, where one arrived.
    pub fn get(&self, of: &Tensor) -> Option<&Tensor> {
        self.0.get(&of.id()).map(|slot| &slot.gradient)
    }

    /// Takes the gradient of a tensor out.
    pub fn remove(&mut self, of: &Tensor) -> Option<Tensor> {
        self.0.remove(&of.id()).map(|slot| slot.gradient)
    }

    /// Whether a gradient has arrived.
    pub(crate) fn holds(&self, id: TensorId) -> bool {
        self.0.contains_key(&id)
    }

    /// Adds a gradient that nobody else holds.
    pub fn add(&mut self, id: TensorId, gradient: Tensor) -> Result<()> {
        self.put(id, gradient, true)
    }

    /// Adds a gradient that somebody else holds too.
    pub(crate) fn share(&mut self, id: TensorId, gradient: &Tensor) -> Result<()> {
        self.put(id, gradient.clone(), false)
    }

    fn put(&mut self, id: TensorId, gradient: Tensor, owned: bool) -> Result<()> {
        let sum = match self.0.remove(&id) {
            None => Slot { gradient, owned },
            Some(slot) if slot.owned => {
                add_into(&slot.gradient, &gradient)?;
                slot
            }
            Some(slot) if owned => {
                add_into(&gradient, &slot.gradient)?;
                Slot { gradient, owned }
            }
            Some(slot) => Slot { gradient: add(&slot.gradient, &gradient)?, owned: true },
        };
        self.0.insert(id, sum);
        Ok(())
    }

    /// Lets `write(destination, keep)` add to a gradient of `shape` in place; with `keep` false the destination is new and
    /// is to be overwritten.
    pub(crate) fn accumulate<T: Real>(
        &mut self,
        id: TensorId,
        shape: (usize, usize),
        write: impl FnOnce(&mut [T], bool) -> Result<()>,
    ) -> Result<()> {
        let (gradient, keep) = match self.0.remove(&id) {
            Some(slot) if slot.owned => (slot.gradient, true),
            Some(slot) => (slot.gradient.copy()?, true),
            None => (Tensor::zeros(shape, T::DTYPE, &candle_core::Device::Cpu)?, false),
        };
        with_mut_slice(&gradient, |destination| write(destination, keep))?;
        self.0.insert(id, Slot { gradient, owned: true });
        Ok(())
    }
}

/// `a + b` on all threads; both contiguous and of one shape.
pub(crate) fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    fn run<T: Real>(a: &Tensor, b: &Tensor) -> Result<Tensor> {
        with_slices([a, b], |[a_values, b_values]: [&[T]; 2]| {
            let sum: Vec<T> = a_values.par_iter().zip(b_values).with_min_len(SERIAL).map(|(&a, &b)| a + b).collect();
            Tensor::from_vec(sum, a.shape(), a.device())
        })
    }
    if a.shape() != b.shape() || !a.device().is_cpu() {
        return a + b;
    }
    match a.dtype() {
        DType::F32 => run::<f32>(a, b),
        DType::F64 => run::<f64>(a, b),
        _ => a + b,
    }
}

/// `a += b` in place.
fn add_into(a: &Tensor, b: &Tensor) -> Result<()> {
    fn run<T: Real>(a: &Tensor, b: &Tensor) -> Result<()> {
        with_slices([b], |[b]: [&[T]; 1]| {
            with_mut_slice(a, |a: &mut [T]| {
                a.par_iter_mut().zip(b).with_min_len(SERIAL).for_each(|(a, &b)| *a += b);
                Ok(())
            })
        })
    }
    if a.shape() != b.shape() {
        candle_core::bail!("a gradient of shape {:?} met one of {:?}", b.shape(), a.shape());
    }
    match a.dtype() {
        DType::F64 => run::<f64>(a, b),
        _ => run::<f32>(a, b),
    }
}

impl Tape {
    /// An empty tape on which gradients of `trainable` are wanted.
    pub fn new<'a>(trainable: impl IntoIterator<Item = &'a Tensor>) -> Self {
        let tracked = trainable.into_iter().map(Tensor::id).collect();
        Self(Mutex::new(Record { tracked, ..Record::default() }))
    }

    /// Wants the gradient of another tensor, one that no operation on this tape made.
    pub fn track(&self, t: &Tensor) {
        self.lock().tracked.insert(t.id());
    }

    /// Whether the tensor depends on something trainable.
    pub fn tracks(&self, t: &Tensor) -> bool {
        self.lock().tracked.contains(&t.id())
    }

    /// How to have a tensor again: by computing it if that is cheap, else by keeping it.
    pub(crate) fn recompute(&self, t: &Tensor) -> Recompute {
        let kept = t.clone();
        self.lock().recomputes.get(&t.id()).cloned().unwrap_or_else(|| Arc::new(move || Ok(kept.clone())))
    }

    /// Says how a tensor comes about.
    pub(crate) fn keep_recompute(&self, t: &Tensor, recompute: Recompute) {
        self.lock().recomputes.insert(t.id(), recompute);
    }

    fn lock(&self) -> MutexGuard<'_, Record> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn record(
        &self,
        output: &Tensor,
        backward: impl FnOnce(&Tensor, &mut Gradients) -> Result<()> + Send + 'static,
    ) {
        self.record_all(std::slice::from_ref(output), |found, gradients| match found {
            [Some(gradient)] => backward(gradient, gradients),
            _ => Ok(()),
        });
    }

    /// An operation with several outputs; its backward runs where a gradient of any of them has arrived.
    pub(crate) fn record_all(
        &self,
        outputs: &[Tensor],
        backward: impl FnOnce(&[Option<Tensor>], &mut Gradients) -> Result<()> + Send + 'static,
    ) {
        let outputs: Vec<TensorId> = outputs.iter().map(Tensor::id).collect();
        let mut record = self.lock();
        record.tracked.extend(&outputs);
        record.nodes.push(Node { outputs, backward: Box::new(backward) });
    }

    /// From the gradient of one output to those of all trainable tensors, which are added to `gradients`. What was recorded is used up.
    pub fn backward(&self, output: &Tensor, gradient: Tensor, gradients: &mut Gradients) -> Result<()> {
        gradients.add(output.id(), gradient)?;
        let record = std::mem::take(&mut *self.lock());
        // Whoever computes a tensor again holds what it takes; the others are not to keep their inputs alive.
        drop(record.recomputes);
        for node in record.nodes.into_iter().rev() {
            let found = |id| gradients.0.remove(id).map(|slot| slot.gradient);
            let found: Vec<Option<Tensor>> = node.outputs.iter().map(found).collect();
            if found.iter().any(Option::is_some) {
                (node.backward)(&found, gradients)?;
            }
        }
        Ok(())
    }
}
