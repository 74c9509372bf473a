//! Frozen projections of one input, with a trainable product of low-rank factors beside them, as one operation.
//!
//! y = x Wᵀ + s·(x' Aᵀ) Bᵀ with `x` (rows, inputs), `W` (outputs, inputs), `A` (rank, inputs), `B` (outputs, rank)
//! (Hu et al. 2021, arXiv:2106.09685, equation 3), where x' is x, or x under a dropout mask. Its backward: dU = s·g B,
//! dA = dUᵀ x', dB = s·gᵀ (x' Aᵀ), dx = g W + dU A (the latter under the mask). Forward and backward each take
//! two parallel parts for all projections of the input together.

use candle_core::{Device, Result, Tensor, TensorId};
use rayon::prelude::*;

use crate::kernels::products::{Out, Product, Right, Term, run};
use crate::kernels::real::Real;
use crate::kernels::slices::with_slice_list;
use crate::ops::project::frozen_linear;
use crate::storage::FrozenWeight;
use crate::tape::{Gradients, Recompute, Tape};

/// A change of rank r beside a frozen weight. Of the two factors, those get a gradient that the tape follows.
#[derive(Clone)]
pub struct LowRankTerm {
    /// (rank, inputs).
    pub a: Tensor,
    /// (outputs, rank).
    pub b: Tensor,
    /// α/r, or what the method has in its place.
    pub scaling: f64,
    /// Multiplies the input of the change only, (rows, inputs): 0 where an element is dropped, 1/(1 − p) elsewhere.
    pub mask: Option<Tensor>,
    /// Multiplies the gradient that reaches the change, (outputs); the forward knows nothing of it.
    pub gradient_scale: Option<Tensor>,
}

/// One projection of an input that several may share.
#[derive(Clone)]
pub struct Part<'a> {
    /// (outputs, inputs); none for the change alone.
    pub weight: Option<&'a FrozenWeight>,
    /// The change.
    pub low_rank: Option<LowRankTerm>,
}

impl LowRankTerm {
    /// scaling · b a, plainly.
    pub fn new(a: Tensor, b: Tensor, scaling: f64) -> Self {
        Self { a, b, scaling, mask: None, gradient_scale: None }
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        [Some(&self.a), Some(&self.b), self.mask.as_ref(), self.gradient_scale.as_ref()].into_iter().flatten()
    }
}

impl Part<'_> {
    /// The reference form out of plain candle operations.
    pub fn reference(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.weight.map(|weight| frozen_linear(x, weight)).transpose()?;
        let Some(LowRankTerm { a, b, scaling, mask, gradient_scale }) = &self.low_rank else {
            return y
                .ok_or_else(|| candle_core::Error::Msg("a projection without a weight and without a change".into()));
        };
        let dropped = mask.as_ref().map_or(Ok(x.clone()), |mask| x * mask)?;
        let mut change = (dropped.matmul(&a.t()?)?.matmul(&b.t()?)? * *scaling)?;
        if let Some(scale) = gradient_scale {
            change = (change.broadcast_mul(scale)? + change.broadcast_mul(&(1.0 - scale)?)?.detach())?;
        }
        y.map_or(Ok(change.clone()), |y| y + change)
    }

    pub(crate) fn kept(&self, tape: &Tape) -> Kept {
        let wants = self.low_rank.as_ref().map_or((false, false), |l| (tape.tracks(&l.a), tape.tracks(&l.b)));
        Kept { weight: self.weight.cloned(), low_rank: self.low_rank.clone(), wants }
    }

    fn check(&self, (rows, inputs): (usize, usize)) -> Result<()> {
        let (outputs, expected) = match (self.weight, &self.low_rank) {
            (Some(weight), _) => weight.dims()?,
            (None, Some(low)) => (low.b.dim(0)?, inputs),
            (None, None) => candle_core::bail!("a projection without a weight and without a change"),
        };
        if inputs != expected {
            candle_core::bail!("projection: x is ({rows}, {inputs}) but the weight is ({outputs}, {expected})");
        }
        if let Some(LowRankTerm { a, b, mask, gradient_scale, .. }) = &self.low_rank {
            let rank = a.dim(0)?;
            if gradient_scale.as_ref().is_some_and(|scale| scale.dims() != [outputs]) {
                candle_core::bail!("low-rank product: a gradient's scale that is not one number an output");
            }
            let masked = mask.as_ref().is_none_or(|m| m.dims() == [rows, inputs]);
            if a.dims() != [rank, inputs] || b.dims() != [outputs, rank] || !masked {
                candle_core::bail!(
                    "low-rank product: A is {:?}, B is {:?} on a weight of ({outputs}, {inputs})",
                    a.shape(),
                    b.shape()
                );
            }
        }
        Ok(())
    }
}

/// What the backward needs of a [`Part`].
pub(crate) struct Kept {
    weight: Option<FrozenWeight>,
    low_rank: Option<LowRankTerm>,
    /// Whether gradients of A and of B are wanted.
    wants: (bool, bool),
}

impl Kept {
    fn outputs(&self) -> Result<usize> {
        match (&self.weight, &self.low_rank) {
            (Some(weight), _) => Ok(weight.dims()?.0),
            (None, Some(low)) => low.b.dim(0),
            (None, None) => Ok(0),
        }
    }

    /// Whether the backward looks at the input's numbers.
    pub(crate) fn needs_input(&self) -> bool {
        self.wants.0
    }
}

/// What the backward needs of the input that projections share.
pub(crate) struct Input {
    /// Whose gradient is wanted.
    pub id: Option<TensorId>,
    /// (rows, inputs).
    pub shape: (usize, usize),
    /// Its numbers, where a change needs them.
    pub values: Option<Recompute>,
}

/// `a ∘ b`, on all threads.
fn masked<T: Real>(a: &[T], b: &[T]) -> Vec<T> {
    a.par_iter().zip(b).with_min_len(1 << 16).map(|(&a, &b)| a * b).collect()
}

/// The factors and the mask of a change, as numbers.
struct Change<'a, T> {
    rank: usize,
    a: &'a [T],
    b: &'a [T],
    scaling: T,
    mask: Option<&'a [T]>,
    /// What multiplies the gradient of each output.
    scale: Option<&'a [T]>,
    /// x under the mask; empty without one.
    dropped: Vec<T>,
}

impl<'a, T: Real> Change<'a, T> {
    /// Takes the slices of `a`, `b` and the mask from `next`.
    fn new(x: &[T], term: &LowRankTerm, inputs: usize, next: &mut impl Iterator<Item = &'a [T]>) -> Self {
        let mut take = || next.next().unwrap_or_default();
        let (a, b) = (take(), take());
        let mask = term.mask.is_some().then(&mut take);
        let scale = term.gradient_scale.is_some().then(take);
        let dropped = mask.filter(|_| !x.is_empty()).map_or(Vec::new(), |mask| masked(x, mask));
        Self { rank: a.len() / inputs.max(1), a, b, scaling: T::from_f64(term.scaling), mask, scale, dropped }
    }

    /// B, its rows multiplied by the gradient's scale, where there is one.
    fn scaled_b(&self) -> Option<Vec<T>> {
        let rows = self.b.chunks_exact(self.rank.max(1)).zip(self.scale?);
        Some(rows.flat_map(|(row, &s)| row.iter().map(move |&b| b * s)).collect())
    }

    /// The input of the change.
    fn input<'b>(&'b self, x: &'b [T]) -> &'b [T] {
        if self.mask.is_some() { &self.dropped } else { x }
    }
}

/// Outputs, and s·x' Aᵀ (rows, rank) of every part, empty for parts without a change.
pub(crate) fn forward<T: Real>(x: &Tensor, parts: &[Part<'_>]) -> Result<(Vec<Tensor>, Vec<Vec<T>>)> {
    let (rows, inputs) = x.dims2()?;
    parts.iter().try_for_each(|part| part.check((rows, inputs)))?;
    let terms = parts.iter().filter_map(|p| p.low_rank.as_ref());
    let of = terms.flat_map(LowRankTerm::tensors);
    let tensors: Vec<&Tensor> = std::iter::once(x).chain(of).collect();
    with_slice_list(&tensors, |slices: &[&[T]]| {
        let mut slices = slices.iter().copied();
        let x = slices.next().unwrap_or_default();
        let mut change = |l: &LowRankTerm| Change::new(x, l, inputs, &mut slices);
        let changes: Vec<_> = parts.iter().map(|p| p.low_rank.as_ref().map(&mut change)).collect();

        let products = changes.iter().flatten().map(|c| {
            let terms = vec![Term::forward(c.input(x), inputs, Right::Slice(c.a, inputs))];
            Product::new((rows, c.rank), terms)
        });
        let down = spread(run(products.collect())?, changes.iter().map(Option::as_ref));

        let guards: Vec<_> = parts.iter().map(|part| part.weight.map(FrozenWeight::guard)).collect();
        let views = guards.iter().map(|guard| guard.as_ref().map(|g| g.view()).transpose());
        let views = views.collect::<Result<Vec<_>>>()?;
        let widths = views.iter().zip(&changes).map(|(view, c)| match (view, c) {
            (Some(view), _) => view.shape().0,
            (None, Some(c)) => c.b.len() / c.rank.max(1),
            (None, None) => 0,
        });
        let widths: Vec<usize> = widths.collect();
        let products = views.iter().zip(&widths).zip(changes.iter().zip(&down)).map(|((view, width), (c, down))| {
            let mut terms: Vec<_> = view.iter().map(|view| Term::forward(x, inputs, Right::Weight(*view))).collect();
            terms.extend(c.as_ref().map(|c| Term::forward(down, c.rank, Right::Slice(c.b, c.rank))));
            Product::new((rows, *width), terms)
        });
        let outs = run(products.collect())?.into_iter().zip(&widths);
        let outs = outs.map(|(out, width)| Tensor::from_vec(out, (rows, *width), &Device::Cpu));
        Ok((outs.collect::<Result<_>>()?, down))
    })
}

/// Results of parts with a change, times its scaling, among empty ones for parts without.
fn spread<'a: 'b, 'b, T: Real>(
    results: Vec<Vec<T>>,
    changes: impl Iterator<Item = Option<&'b Change<'a, T>>>,
) -> Vec<Vec<T>> {
    let mut results = results.into_iter();
    let one = |c: Option<&Change<'_, T>>| match c {
        Some(c) => {
            let mut values = results.next().unwrap_or_default();
            values.iter_mut().for_each(|v| *v *= c.scaling);
            values
        }
        None => Vec::new(),
    };
    changes.map(one).collect()
}

/// A part whose output has a gradient.
struct LivePart<'a, T> {
    kept: &'a Kept,
    outputs: usize,
    /// (rows, outputs).
    g: &'a [T],
    change: Option<Change<'a, T>>,
    /// s·x' Aᵀ, (rows, rank).
    down: &'a [T],
}

/// From the outputs' gradients (where there are any) to those of x, A and B. `down` is what [`forward`] gave beside the outputs.
pub(crate) fn backward<T: Real>(
    found: &[Option<Tensor>],
    input: &Input,
    parts: &[Kept],
    down: &[Vec<T>],
    gradients: &mut Gradients,
) -> Result<()> {
    let (rows, inputs) = input.shape;
    let live = found.iter().zip(parts).zip(down).filter_map(|((g, part), down)| Some((g.as_ref()?, part, down)));
    let live: Vec<(&Tensor, &Kept, &Vec<T>)> = live.collect();
    let values = input.values.as_ref().map(|values| values()).transpose()?;
    let mut tensors: Vec<&Tensor> = values.iter().collect();
    for (g, part, _) in &live {
        tensors.push(g);
        tensors.extend(part.low_rank.iter().flat_map(LowRankTerm::tensors));
    }
    with_slice_list(&tensors, |slices: &[&[T]]| {
        let mut slices = slices.iter().copied();
        let x = values.as_ref().and_then(|_| slices.next()).unwrap_or_default();
        let live = live.iter().map(|&(_, kept, down)| {
            let (g, outputs) = (slices.next().unwrap_or_default(), kept.outputs()?);
            let change = kept.low_rank.as_ref().map(|l| Change::new(x, l, inputs, &mut slices));
            Ok(LivePart { kept, outputs, g, change, down })
        });
        let live: Vec<LivePart<'_, T>> = live.collect::<Result<_>>()?;
        let du = down_gradients(&live, rows)?;
        let guards: Vec<_> = live.iter().map(|part| part.kept.weight.as_ref().map(FrozenWeight::guard)).collect();
        let mut products = Products { into_x: Vec::new(), new: Vec::new() };
        for ((part, du), guard) in live.iter().zip(&du).zip(&guards) {
            if let Some(guard) = guard.as_ref().filter(|_| input.id.is_some()) {
                products.into_x.push(Term::backward(part.g, part.outputs, Right::Weight(guard.view()?)));
            }
            products.add_change(part, du, x, input);
        }
        let new = products.run(input, gradients)?;
        add_results(&live, new, input, gradients)
    })
}

/// dU = s·g B of every part, (rows, rank); empty for parts without a change.
fn down_gradients<T: Real>(live: &[LivePart<'_, T>], rows: usize) -> Result<Vec<Vec<T>>> {
    let scaled: Vec<Option<Vec<T>>> = live.iter().map(|part| part.change.as_ref()?.scaled_b()).collect();
    let products = live.iter().zip(&scaled).filter_map(|(part, scaled)| {
        let c = part.change.as_ref()?;
        let b = scaled.as_deref().unwrap_or(c.b);
        let terms = vec![Term::backward(part.g, part.outputs, Right::Slice(b, c.rank))];
        Some(Product::new((rows, c.rank), terms))
    });
    Ok(spread(run(products.collect())?, live.iter().map(|part| part.change.as_ref())))
}

/// What the backward computes at once: dx, and for each part in turn dA, dBᵀ = (s·x' Aᵀ)ᵀ g and, under a mask, dU A, as far as they are wanted.
struct Products<'a, T> {
    /// Terms of dx.
    into_x: Vec<Term<'a, T>>,
    /// The others; [`add_results`] takes their results in the same order.
    new: Vec<Product<'a, T>>,
}

impl<'a, T: Real> Products<'a, T> {
    fn add_change(&mut self, part: &'a LivePart<'_, T>, du: &'a [T], x: &'a [T], input: &Input) {
        let Some(c) = &part.change else { return };
        let (rows, inputs) = input.shape;
        let (rank, shape, (wants_a, wants_b)) = (c.rank, (rows, c.rank), part.kept.wants);
        if wants_a {
            let da = vec![Term::outer(du, shape, Right::Slice(c.input(x), inputs))];
            self.new.push(Product::new((rank, inputs), da));
        }
        if wants_b {
            let db = vec![Term::outer(part.down, shape, Right::Slice(part.g, part.outputs))];
            self.new.push(Product::new((rank, part.outputs), db));
        }
        let term = Term::backward(du, rank, Right::Slice(c.a, inputs));
        match (input.id, c.mask) {
            (Some(_), None) => self.into_x.push(term),
            (Some(_), Some(_)) => self.new.push(Product::new((rows, inputs), vec![term])),
            (None, _) => {}
        }
    }

    /// Computes all of it in one parallel part. dx goes to the gradients, the other results are returned.
    fn run(self, input: &Input, gradients: &mut Gradients) -> Result<Vec<Vec<T>>> {
        let (Self { into_x, new: products }, (rows, inputs)) = (self, input.shape);
        let Some(x) = input.id.filter(|_| !into_x.is_empty()) else { return run(products) };
        if !gradients.holds(x) {
            let mut products = products;
            products.push(Product::new((rows, inputs), into_x));
            let mut new = run(products)?;
            gradients.add(x, Tensor::from_vec(new.pop().unwrap_or_default(), (rows, inputs), &Device::Cpu)?)?;
            return Ok(new);
        }
        let mut new = Vec::new();
        gradients.accumulate(x, (rows, inputs), |dx: &mut [T], keep| {
            let mut products = products;
            products.push(Product { out: Out::Into(dx, keep), rows, columns: inputs, terms: into_x });
            new = run(products)?;
            Ok(())
        })?;
        Ok(new)
    }
}

/// Adds the results of [`Products::run`] to the gradients of A and B and, under a mask, of x.
fn add_results<T: Real>(
    live: &[LivePart<'_, T>],
    new: Vec<Vec<T>>,
    input: &Input,
    gradients: &mut Gradients,
) -> Result<()> {
    let (rows, inputs) = input.shape;
    let mut new = new.into_iter();
    let mut next = || new.next().unwrap_or_default();
    let put = |sum: &mut T, v: T, keep: bool| *sum = if keep { *sum + v } else { v };
    for part in live {
        let (Some(term), Some(c)) = (&part.kept.low_rank, &part.change) else { continue };
        if part.kept.wants.0 {
            let da = next();
            gradients.accumulate(term.a.id(), (c.rank, inputs), |sum: &mut [T], keep| {
                sum.iter_mut().zip(&da).for_each(|(sum, &v)| put(sum, v, keep));
                Ok(())
            })?;
        }
        if part.kept.wants.1 {
            let (db, outputs) = (next(), part.outputs);
            gradients.accumulate(term.b.id(), (outputs, c.rank), |sum: &mut [T], keep| {
                for (o, sum) in sum.chunks_exact_mut(c.rank.max(1)).enumerate() {
                    let scale = c.scale.map_or(T::from_f64(1.0), |scale| scale[o]);
                    sum.iter_mut().enumerate().for_each(|(r, sum)| put(sum, db[r * outputs + o] * scale, keep));
                }
                Ok(())
            })?;
        }
        if let (Some(mask), Some(x)) = (c.mask, input.id) {
            let change = next();
            gradients.accumulate(x, (rows, inputs), |dx: &mut [T], keep| {
                dx.iter_mut().zip(change.iter().zip(mask)).for_each(|(dx, (&v, &m))| put(dx, v * m, keep));
                Ok(())
            })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Var};

    use super::*;
    use crate::check::{assert_close, random};
    use crate::ops::Ops;
    use crate::tape::Tape;

    /// Two projections of one input, one with a change under a mask, one with a plain one, and a third without: outputs and every
    /// gradient against the reference form in candle's graph, and that against central differences.
    #[test]
    fn outputs_and_gradients_equal_the_reference() -> Result<()> {
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-4)] {
            let weights =
                [(40, 64), (24, 64), (33, 64)].map(|shape| random(shape, 1, DType::F32).map(FrozenWeight::Dense));
            let [w1, w2, w3] = weights;
            let (w1, w2, w3) = (w1?.to_nf4()?, w2?, w3?);
            let x = Var::from_tensor(&random((130, 64), 2, dtype)?)?;
            let a = [random((3, 64), 3, dtype)?, random((5, 64), 4, dtype)?];
            let b = [random((40, 3), 5, dtype)?, random((24, 5), 6, dtype)?, random((17, 3), 12, dtype)?];
            let [a1, a2] = a.map(|t| Var::from_tensor(&t));
            let [b1, b2, b3] = b.map(|t| Var::from_tensor(&t));
            let (a1, a2, b1, b2, b3) = (a1?, a2?, b1?, b2?, b3?);
            let mask = (random((130, 64), 7, dtype)?.gt(0.0)?.to_dtype(dtype)? * 2.0)?;
            let first = LowRankTerm {
                mask: Some(mask),
                ..LowRankTerm::new(a1.as_tensor().clone(), b1.as_tensor().clone(), 0.7)
            };
            let second = LowRankTerm::new(a2.as_tensor().clone(), b2.as_tensor().clone(), 1.5);
            let third = LowRankTerm::new(a1.as_tensor().clone(), b3.as_tensor().clone(), 0.3);
            let parts = [
                Part { weight: Some(&w1), low_rank: Some(first) },
                Part { weight: Some(&w2), low_rank: Some(second) },
                Part { weight: Some(&w3), low_rank: None },
                Part { weight: None, low_rank: Some(third) },
            ];
            let seeds = [40, 24, 33, 17].map(|n| random((130, n), 8 + n as u64, dtype));
            let [s1, s2, s3, s4] = seeds;
            let seeds = [s1?, s2?, s3?, s4?];
            let objective = |outputs: &[Tensor]| -> Result<Tensor> {
                let sums = outputs.iter().zip(&seeds).map(|(y, s)| (y * s)?.sum_all());
                sums.reduce(|a, b| a? + b?).unwrap_or_else(|| Tensor::new(0f64, &Device::Cpu))
            };
            let reference: Vec<Tensor> = parts.iter().map(|p| p.reference(&x)).collect::<Result<_>>()?;
            let expected = objective(&reference)?.backward()?;

            let variables = [&x, &a1, &b1, &a2, &b2, &b3];
            let tape = Tape::new(variables.map(Var::as_tensor));
            let ops = Ops::recorded(&tape);
            let outputs = ops.project(&x, &parts)?;
            for (y, reference) in outputs.iter().zip(&reference) {
                assert_close(y, reference, 100.0 * tolerance)?;
            }
            let total = ops.subgraph(&outputs.iter().collect::<Vec<_>>(), &[], objective)?;
            let mut found = Gradients::default();
            tape.backward(&total, Tensor::ones((), dtype, &Device::Cpu)?, &mut found)?;
            for variable in variables {
                let (Some(found), Some(expected)) = (found.get(variable), expected.get(variable)) else {
                    panic!("a gradient is missing");
                };
                assert_close(found, expected, 100.0 * tolerance)?;
                if dtype == DType::F64 {
                    // One direction of each, by central differences.
                    let here = variable.as_tensor().copy()?;
                    let direction = random(variable.shape().clone(), 50, dtype)?;
                    let at = |h: f64| -> Result<f64> {
                        variable.set(&(&here + (&direction * h)?)?)?;
                        let outputs: Vec<Tensor> = parts.iter().map(|p| p.reference(&x)).collect::<Result<_>>()?;
                        objective(&outputs)?.to_scalar()
                    };
                    let numeric = (at(1e-5)? - at(-1e-5)?) / 2e-5;
                    variable.set(&here)?;
                    let along: f64 = (found * &direction)?.sum_all()?.to_scalar()?;
                    assert!((numeric - along).abs() < 1e-5 * (1.0 + along.abs()), "{numeric} against {along}");
                }
            }
        }
        Ok(())
    }
}
