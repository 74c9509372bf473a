//! Operations on a tape against candle's graph and central differences.

use super::*;
use crate::check::{assert_close, random};
use crate::tape::Gradients;
use candle_core::{Device, Var};

/// Σ f(x)·s on a tape: the gradient of x, and the value.
fn on_tape(x: &Tensor, f: impl Fn(Ops<'_>, &Tensor) -> Result<Tensor>) -> Result<(Tensor, f64)> {
    let tape = Tape::new([x]);
    let ops = Ops::recorded(&tape);
    let y = f(ops, x)?;
    let seed = random(y.shape().clone(), 77, DType::F64)?;
    let total = ops.subgraph(&[&y], &[], |t| (&t[0] * &seed)?.sum_all())?;
    let mut gradients = Gradients::default();
    tape.backward(&total, Tensor::ones((), DType::F64, &Device::Cpu)?, &mut gradients)?;
    let gradient = gradients.remove(x).ok_or_else(|| candle_core::Error::Msg("no gradient".into()))?;
    Ok((gradient, total.to_scalar()?))
}

/// The recorded form against candle's graph of the same operations, and against central differences, in f64.
fn holds(x: Tensor, f: impl Fn(Ops<'_>, &Tensor) -> Result<Tensor>) -> Result<()> {
    let (gradient, value) = on_tape(&x, &f)?;
    let var = Var::from_tensor(&x)?;
    let y = f(Ops::plain(), var.as_tensor())?;
    let seed = random(y.shape().clone(), 77, DType::F64)?;
    let total = (y * seed)?.sum_all()?;
    assert!((total.to_scalar::<f64>()? - value).abs() < 1e-9 * (1.0 + value.abs()));
    let plain = total.backward()?;
    assert_close(&gradient, plain.get(&var).expect("a gradient"), 1e-9)?;
    let direction = random(x.shape().clone(), 5, DType::F64)?;
    let at = |h: f64| -> Result<f64> { Ok(on_tape(&(&x + (&direction * h)?)?, &f)?.1) };
    let numeric = (at(1e-5)? - at(-1e-5)?) / 2e-5;
    let along: f64 = (&gradient * &direction)?.sum_all()?.to_scalar()?;
    assert!((numeric - along).abs() < 1e-6 * (1.0 + along.abs()), "{numeric} against {along}");
    Ok(())
}

#[test]
fn recorded_operations_equal_plain_ones() -> Result<()> {
    let x = || random((7, 12), 1, DType::F64);
    let weight = FrozenWeight::Dense(random((9, 12), 2, DType::F64)?);
    let head = FrozenWeight::Dense(random((30, 12), 3, DType::F64)?);
    let (norm, other) = (random(12, 4, DType::F64)?, x()?);
    holds(x()?, |ops, x| ops.rms_norm(x, &norm, 1e-6))?;
    holds(x()?, |ops, x| ops.silu_mul(x, &other))?;
    holds(x()?, |ops, x| ops.silu_mul(&other, x))?;
    holds(x()?, |ops, x| ops.gated(Activation::GeluTanh, x, &ops.activate(Activation::Gelu, x)?))?;
    let shift = random(12, 8, DType::F64)?;
    holds(x()?, |ops, x| ops.layer_norm(x, &norm, &shift, 1e-6))?;
    holds(norm.clone(), |ops, w| ops.layer_norm(&other, w, &shift, 1e-6))?;
    holds(shift.clone(), |ops, b| ops.layer_norm(&other, &norm, b, 1e-6))?;
    let table = RotaryTable::new(&[0, 1, 2, 3, 0, 1, 9], &[1.0, 0.1], 1.0);
    holds(x()?, |ops, x| ops.rotary(x, &table))?;
    holds(x()?, |ops, x| ops.linear(x, &weight))?;
    holds(x()?, |ops, x| ops.rows(x, &[0, 2, 2, 6]))?;
    holds(x()?, |ops, x| ops.reshape(x, (14, 6)))?;
    holds(x()?, |ops, x| ops.add_bias(x, &shift))?;
    holds(shift.clone(), |ops, b| ops.add_bias(&other, b))?;
    holds(x()?, |ops, x| {
        let [a, _, b] = ops.split(x, [5, 2, 5])?;
        ops.silu_mul(&a, &b)
    })?;
    for smoothing in [0.0, 0.2] {
        holds(x()?, |ops, x| ops.head_loss(x, &head, &[0, 29, 3, 3, 7, 1, 2], smoothing))?;
    }
    // A tensor that is used twice gets both gradients.
    holds(x()?, |ops, x| ops.add(x, &ops.silu_mul(x, x)?))?;
    let segments = [
        Segment { q_start: 0, q_len: 4, keys: vec![(0, 4)] },
        Segment { q_start: 4, q_len: 3, keys: vec![(0, 2), (4, 3)] },
    ];
    let narrow = random((7, 4), 6, DType::F64)?;
    holds(x()?, |ops, x| ops.attention((x, &narrow, &narrow), &segments, &AttentionForm::causal(4, 0.5)))?;
    holds(random((7, 4), 6, DType::F64)?, |ops, k| {
        ops.attention((&other, k, k), &segments, &AttentionForm::causal(4, 0.5))
    })
}
