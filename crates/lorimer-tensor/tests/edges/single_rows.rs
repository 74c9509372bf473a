//! Norms, activations, rotary of a part of each head, and losses with smoothed labels: no row and one, no column and one.

use super::*;

const SIZES: [usize; 4] = [0, 1, 2, 33];

/// Values and gradients of a vector of numbers, by the type that is computed in.
const TYPES: [(DType, f64); 2] = [(DType::F64, 1e-9), (DType::F32, 2e-4)];

/// The gradients of some tensors, the output's gradient being ones, against those that candle finds through the reference form.
fn assert_gradients(what: &str, found: &[Tensor], of: &[&Tensor], reference: &Tensor, tolerance: f64) -> Result<()> {
    let expected = reference.sum_all()?.backward()?;
    for (found, of) in found.iter().zip(of) {
        assert_eq!(found.dims(), of.dims(), "{what}");
        if of.elem_count() == 0 {
            continue;
        }
        let zero = of.zeros_like()?;
        let expected = values(expected.get(of).unwrap_or(&zero))?;
        for (a, b) in values(found)?.iter().zip(expected) {
            assert!((a - b).abs() <= tolerance * (1.0 + b.abs()), "{what}, gradient: {a} for {b}");
        }
    }
    Ok(())
}

fn variable(t: &Tensor) -> Result<Tensor> {
    Ok(candle_core::Var::from_tensor(t)?.as_tensor().clone())
}

/// With one column the mean is the number itself: what is left is the bias.
#[test]
fn layer_norms_of_no_row_and_one() -> Result<()> {
    for (rows, width) in SIZES.into_iter().flat_map(|rows| SIZES.map(|width| (rows, width))) {
        for (dtype, tolerance) in TYPES {
            let what = format!("layer norm of ({rows}, {width})");
            let x = variable(&matrix((rows, width), 1, dtype)?)?;
            let weight = variable(&matrix((1, width), 2, dtype)?.reshape(width)?)?;
            let bias = variable(&matrix((1, width), 3, dtype)?.reshape(width)?)?;
            let (xs, ws, bs) = (values(&x)?, values(&weight)?, values(&bias)?);
            let mut expected = Vec::new();
            for row in xs.chunks(width.max(1)) {
                let mean = row.iter().sum::<f64>() / row.len() as f64;
                let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / row.len() as f64;
                let scale = (variance + 1e-3).sqrt().recip();
                expected.extend((0..row.len()).map(|c| (row[c] - mean) * scale * ws[c] + bs[c]));
            }
            let of = [&x, &weight, &bias];
            assert_values(&what, &layer_norm(&x, &weight, &bias, 1e-3)?, (rows, width), &expected, tolerance)?;
            let tape = Tape::new(of);
            let y = Ops::recorded(&tape).layer_norm(&x, &weight, &bias, 1e-3)?;
            assert_values(&what, &y, (rows, width), &expected, tolerance)?;
            let found = backward(tape, &y, &of)?;
            match rows * width {
                // Of no row nothing comes to the weight.
                0 => {
                    for (found, of) in found.iter().zip(of) {
                        assert_eq!(found.dims(), of.dims(), "{what}");
                        assert!(values(found)?.iter().all(|v| *v == 0.0), "{what}");
                    }
                }
                _ => {
                    let reference = lorimer_tensor::ops::layer_norm::layer_norm_reference(&x, &weight, &bias, 1e-3)?;
                    assert_gradients(&what, &found, &of, &reference, tolerance)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn activations_of_no_row_and_one() -> Result<()> {
    for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
        for (rows, width) in SIZES.into_iter().flat_map(|rows| SIZES.map(|width| (rows, width))) {
            for (dtype, tolerance) in TYPES {
                let what = format!("{activation:?} of ({rows}, {width})");
                let (gate, up) =
                    (variable(&matrix((rows, width), 1, dtype)?)?, variable(&matrix((rows, width), 2, dtype)?)?);
                let alone = activation.reference(&gate)?;
                let both = (&alone * &up)?;
                let tape = Tape::new([&gate, &up]);
                let y = Ops::recorded(&tape).gated(activation, &gate, &up)?;
                assert_values(&what, &y, (rows, width), &values(&both)?, tolerance)?;
                assert_values(&what, &gated(activation, &gate, &up)?, (rows, width), &values(&both)?, tolerance)?;
                assert_gradients(&what, &backward(tape, &y, &[&gate, &up])?, &[&gate, &up], &both, tolerance)?;
                let tape = Tape::new([&gate]);
                let y = Ops::recorded(&tape).activate(activation, &gate)?;
                assert_values(&what, &y, (rows, width), &values(&alone)?, tolerance)?;
                assert_values(&what, &activate(activation, &gate)?, (rows, width), &values(&alone)?, tolerance)?;
                assert_gradients(&what, &backward(tape, &y, &[&gate])?, &[&gate], &alone, tolerance)?;
            }
        }
    }
    Ok(())
}

/// Heads of which no element turns, two, all, or all but one; a head of no elements fits no row that has some.
#[test]
fn a_part_of_a_head_turns() -> Result<()> {
    for (half, rest) in [(0, 1), (0, 4), (1, 0), (1, 1), (2, 0), (2, 3)] {
        let head = 2 * half + rest;
        for (rows, heads) in [(0, 0), (0, 2), (1, 0), (1, 1), (3, 2)] {
            let frequencies = &[1.0, 0.1][..half];
            let positions: Vec<usize> = (0..rows).map(|row| 5 * row + 1).collect();
            let table = RotaryTable::new(&positions, frequencies, 1.5).partial(head);
            for (dtype, tolerance) in TYPES {
                let what = format!("{rows} rows, {heads} heads of {head}, {} of which turn", 2 * half);
                let x = matrix((rows, heads * head), 1, dtype)?;
                let turned = |xs: &[f64], back: f64| -> Vec<f64> {
                    let mut y = xs.to_vec();
                    for (at, y) in y.chunks_mut(head).enumerate() {
                        for i in 0..half {
                            // As transformers forms it.
                            let angle = f64::from(positions[at / heads] as f32 * frequencies[i] as f32);
                            let (a, b) = (y[i], y[i + half]);
                            y[i] = 1.5 * (a * angle.cos() - back * b * angle.sin());
                            y[i + half] = 1.5 * (b * angle.cos() + back * a * angle.sin());
                        }
                    }
                    y
                };
                let expected = turned(&values(&x)?, 1.0);
                assert_values(&what, &rotary(&x, &table)?, (rows, heads * head), &expected, tolerance)?;
                let tape = Tape::new([&x]);
                let y = Ops::recorded(&tape).rotary(&x, &table)?;
                assert_values(&what, &y, (rows, heads * head), &expected, tolerance)?;
                let back = turned(&vec![1.0; rows * heads * head], -1.0);
                assert_values(&what, &backward(tape, &y, &[&x])?[0], (rows, heads * head), &back, tolerance)?;
            }
        }
    }
    let none = RotaryTable::new(&[0, 1], &[], 1.0);
    assert_eq!(rotary(&matrix((2, 0), 1, DType::F32)?, &none)?.dims(), [2, 0]);
    assert!(rotary(&matrix((2, 4), 1, DType::F32)?, &none).is_err());
    Ok(())
}

/// Of one token the loss is nothing, however labels are smoothed.
#[test]
fn smoothed_losses_of_no_row_and_one() -> Result<()> {
    for (rows, vocabulary) in [(0, 0), (0, 1), (0, 5), (1, 1), (3, 1), (1, 5), (3, 33)] {
        let targets: Vec<u32> = (0..rows as u32).map(|row| row * 7 % vocabulary as u32).collect();
        for smoothing in [0.0, 0.1, 1.0] {
            for (dtype, tolerance) in TYPES {
                let what = format!("{rows} rows of {vocabulary}, smoothed by {smoothing}");
                let logits = variable(&matrix((rows, vocabulary), 1, dtype)?)?;
                let (mut losses, mut gradient) = (Vec::new(), Vec::new());
                for (row, &target) in values(&logits)?.chunks(vocabulary.max(1)).zip(&targets) {
                    let sum: f64 = row.iter().map(|v| v.exp()).sum();
                    let mean = row.iter().sum::<f64>() / vocabulary as f64;
                    losses.push(sum.ln() - (1.0 - smoothing) * row[target as usize] - smoothing * mean);
                    let share = |c: usize| {
                        let own = if c == target as usize { 1.0 - smoothing } else { 0.0 };
                        row[c].exp() / sum - own - smoothing / vocabulary as f64
                    };
                    gradient.extend((0..vocabulary).map(share));
                }
                let found = smoothed_cross_entropy(&logits, &targets, smoothing)?;
                assert_values(&what, &found.reshape((rows, 1))?, (rows, 1), &losses, tolerance)?;
                let total = [losses.iter().sum::<f64>()];
                let tape = Tape::new([&logits]);
                let sum = Ops::recorded(&tape).cross_entropy(&logits, &targets, smoothing)?;
                assert_values(&what, &sum.reshape((1, 1))?, (1, 1), &total, tolerance)?;
                let found = backward(tape, &sum, &[&logits])?;
                assert_values(&what, &found[0], (rows, vocabulary), &gradient, tolerance)?;
                let (x, head) = (matrix((rows, 6), 2, dtype)?, matrix((vocabulary, 6), 3, dtype)?);
                let w = values(&head)?;
                let logits = product(&values(&x)?, &transposed(&w, (vocabulary, 6)), (rows, 6, vocabulary));
                let loss = |(row, &target): (&[f64], &u32)| {
                    let sum: f64 = row.iter().map(|v| v.exp()).sum();
                    let mean = row.iter().sum::<f64>() / vocabulary as f64;
                    sum.ln() - (1.0 - smoothing) * row[target as usize] - smoothing * mean
                };
                let expected: f64 = logits.chunks(vocabulary.max(1)).zip(&targets).map(loss).sum();
                let tape = Tape::new([&x]);
                let found = Ops::recorded(&tape).head_loss(&x, &FrozenWeight::Dense(head), &targets, smoothing)?;
                assert_values(&what, &found.reshape((1, 1))?, (1, 1), &[expected], tolerance)?;
                assert_eq!(backward(tape, &found, &[&x])?[0].dims(), [rows, 6], "{what}");
            }
        }
    }
    Ok(())
}
