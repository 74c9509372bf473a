//! Parts of a graph that candle records and walks back, on a tape of our own.

use super::{Ops, one};
use crate::tape::Tape;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, TensorId, Var};

/// The begin of a backward: a number of no meaning whose gradient, in what it is made of, is the given one.
pub(super) struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let zero = match storage {
            CpuStorage::F64(_) => CpuStorage::F64(vec![0.0]),
            _ => CpuStorage::F32(vec![0.0]),
        };
        Ok((zero, Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

/// The inputs as leaves of a graph of its own where the tape follows them, and the leaves with the parameters.
pub(super) fn leaves(tape: &Tape, inputs: &[&Tensor], parameters: &[&Tensor]) -> Result<(Vec<Tensor>, Leaves)> {
    let (mut leaves, mut given) = (Vec::new(), Vec::new());
    for &input in inputs {
        if tape.tracks(input) {
            let leaf = Var::from_tensor(&input.detach())?;
            given.push(leaf.as_tensor().clone());
            leaves.push((input.id(), leaf.as_tensor().clone()));
        } else {
            given.push(input.clone());
        }
    }
    leaves.extend(parameters.iter().filter(|p| tape.tracks(p)).map(|&p| (p.id(), p.clone())));
    Ok((given, leaves))
}

/// Where gradients of a subgraph belong, and the tensors of its graph that they are found of.
pub(super) type Leaves = Vec<(TensorId, Tensor)>;

impl<'a> Ops<'a> {
    /// A subgraph recorded by autograd: any function of candle tensors, recorded whole. Its own graph is made in the forward and walked in the backward.
    /// `parameters` are the trainable tensors that `f` uses besides its inputs.
    pub fn subgraph(
        &self,
        inputs: &[&Tensor],
        parameters: &[&Tensor],
        f: impl FnOnce(&[Tensor]) -> Result<Tensor>,
    ) -> Result<Tensor> {
        one(self.subgraph_all(inputs, parameters, |t| Ok(vec![f(t)?]))?)
    }

    /// [`Self::subgraph`] with several outputs. An output that is a parameter as it is, or depends on none, is passed on.
    pub fn subgraph_all(
        &self,
        inputs: &[&Tensor],
        parameters: &[&Tensor],
        f: impl FnOnce(&[Tensor]) -> Result<Vec<Tensor>>,
    ) -> Result<Vec<Tensor>> {
        let both: Vec<&Tensor> = inputs.iter().chain(parameters).copied().collect();
        let Some(tape) = self.tape(&both) else {
            let outputs = f(&inputs.iter().map(|&t| t.clone()).collect::<Vec<_>>())?;
            // On a tape that does not follow it, nobody will ask for its graph.
            return Ok(match self.0 {
                Some(_) => outputs.iter().map(Tensor::detach).collect(),
                None => outputs,
            });
        };
        let (given, leaves) = leaves(tape, inputs, parameters)?;
        let graphs = f(&given)?;
        let passed = |t: &Tensor| !t.track_op() || parameters.iter().any(|p| p.id() == t.id());
        let outputs: Vec<Tensor> = graphs.iter().map(|t| if passed(t) { t.clone() } else { t.detach() }).collect();
        let (ids, graphs): (Vec<Tensor>, Vec<Tensor>) =
            outputs.iter().cloned().zip(graphs).filter(|(_, t)| !passed(t)).unzip();
        if graphs.is_empty() {
            return Ok(outputs);
        }
        tape.record_all(&ids, move |found, gradients| {
            let mut total: Option<Tensor> = None;
            for (graph, g) in graphs.iter().zip(found) {
                let Some(g) = g else { continue };
                let sum = graph.contiguous()?.apply_op1(Seed(g.clone()))?;
                total = Some(match total {
                    Some(total) => (total + sum)?,
                    None => sum,
                });
            }
            let Some(total) = total else { return Ok(()) };
            let mut found = total.backward()?;
            for (id, leaf) in leaves {
                if let Some(gradient) = found.remove(&leaf) {
                    gradients.add(id, gradient.contiguous()?)?;
                }
            }
            Ok(())
        });
        Ok(outputs)
    }

    /// [`Self::subgraph`] of a scalar whose gradients are found at once, so that its graph is gone when this returns; the backward
    /// only multiplies them. For a part of a large sum.
    pub fn subgraph_eager(
        &self,
        inputs: &[&Tensor],
        parameters: &[&Tensor],
        f: impl FnOnce(&[Tensor]) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let both: Vec<&Tensor> = inputs.iter().chain(parameters).copied().collect();
        let Some(tape) = self.tape(&both) else { return self.subgraph(inputs, parameters, f) };
        let (given, leaves) = leaves(tape, inputs, parameters)?;
        let graph = f(&given)?;
        let value = graph.detach();
        if !graph.track_op() {
            return Ok(value);
        }
        let mut found = graph.backward()?;
        let gradients: Vec<(TensorId, Tensor)> =
            leaves.into_iter().filter_map(|(id, leaf)| Some((id, found.remove(&leaf)?.detach()))).collect();
        tape.record(&value, move |g, sums| {
            for (id, gradient) in &gradients {
                sums.add(*id, gradient.broadcast_mul(g)?.contiguous()?)?;
            }
            Ok(())
        });
        Ok(value)
    }

    /// Without a tape, `f` in candle's graph; with one, a subgraph.
    pub(super) fn fallback(&self, inputs: &[&Tensor], f: impl FnOnce(&[Tensor]) -> Result<Tensor>) -> Result<Tensor> {
        self.subgraph(inputs, &[], f)
    }
}
