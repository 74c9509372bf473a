//! Every operation at its edges: no row and one, no column and one, no segment and one, on a tape and without, against sums written
//! out. A chunk of a prompt whose rows' logits nobody needs is a product of no rows; each of these sizes occurs in a real batch.

mod attention_maps;
mod others;
mod single_rows;

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Result, Tensor};
use lorimer_tensor::ops::project::frozen_backward_input;
use lorimer_tensor::storage::affine::Affine;
use lorimer_tensor::storage::levels::ScaleType;
use lorimer_tensor::storage::normal_float::NfConfig;
use lorimer_tensor::*;
use proptest::prelude::*;

/// Numbers that differ from each other, of any shape, the empty ones included.
fn numbers(n: usize, seed: u64) -> Vec<f64> {
    (0..n).map(|i| ((i as f64 + 1.0) * 0.754_877_666 + seed as f64 * 0.569_840_29).sin()).collect()
}

fn matrix((rows, columns): (usize, usize), seed: u64, dtype: DType) -> Result<Tensor> {
    Tensor::from_vec(numbers(rows * columns, seed), (rows, columns), &Device::Cpu)?.to_dtype(dtype)
}

fn values(t: &Tensor) -> Result<Vec<f64>> {
    t.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// `a b` with a (m, k) and b (k, n), as sums.
fn product(a: &[f64], b: &[f64], (m, k, n): (usize, usize, usize)) -> Vec<f64> {
    let sum = |i: usize, j: usize| (0..k).map(|d| a[i * k + d] * b[d * n + j]).sum();
    (0..m * n).map(|at| sum(at / n, at % n)).collect()
}

fn transposed(a: &[f64], (rows, columns): (usize, usize)) -> Vec<f64> {
    (0..rows * columns).map(|at| a[at % rows * columns + at / rows]).collect()
}

#[track_caller]
fn assert_values(what: &str, found: &Tensor, shape: (usize, usize), expected: &[f64], tolerance: f64) -> Result<()> {
    assert_eq!(found.dims(), [shape.0, shape.1], "{what}");
    for (a, b) in values(found)?.iter().zip(expected) {
        assert!((a - b).abs() <= tolerance * (1.0 + b.abs()), "{what} {shape:?}: {a} for {b}");
    }
    Ok(())
}

#[track_caller]
fn assert_same(what: &str, a: &Tensor, b: &Tensor) -> Result<()> {
    assert_eq!(a.dims(), b.dims(), "{what}");
    for (a, b) in values(a)?.iter().zip(values(b)?) {
        assert!((a - b).abs() <= 1e-4 * (1.0 + b.abs()), "{what}: {a} for {b}");
    }
    Ok(())
}

/// The gradients of some tensors, the output's gradient being ones; an absent one is an error.
fn backward(tape: Tape, y: &Tensor, of: &[&Tensor]) -> Result<Vec<Tensor>> {
    let mut gradients = Gradients::default();
    tape.backward(y, y.ones_like()?, &mut gradients)?;
    let missing = || candle_core::Error::Msg("a gradient is missing".into());
    of.iter().map(|t| gradients.remove(t).ok_or_else(missing)).collect()
}

/// Every way in which a weight (outputs, inputs) is kept.
fn storages((outputs, inputs): (usize, usize)) -> Result<Vec<FrozenWeight>> {
    let dense = FrozenWeight::Dense(matrix((outputs, inputs), 1, DType::F32)?);
    let mut all = vec![dense.clone()];
    for dtype in [DType::F64, DType::F16, DType::BF16] {
        all.push(FrozenWeight::Dense(matrix((outputs, inputs), 1, dtype)?));
    }
    all.push(dense.to_nf4()?);
    all.push(dense.to_panels()?);
    for bits in [2, 3, 4, 8] {
        let config = NfConfig { bits, scale_bits: bits, scale_type: ScaleType::Bf16, block: 16, scale_block: 3 };
        all.push(dense.to_normal_float(&config)?);
    }
    let groups = inputs.div_ceil(5);
    let order = (0..inputs as u32).map(|i| i * 7 % groups.max(1) as u32).collect();
    for (group, order) in [(5, None), (5, Some(order))] {
        let scales = numbers(outputs * groups, 6).into_iter().map(half::f16::from_f64).collect();
        let zeros = (0..outputs * groups).map(|i| (i * 3 % 16) as u8).collect();
        let code = |o: usize, i: usize| ((o * 5 + i * 11) % 16) as u8;
        let affine = Affine::new((outputs, inputs), code, (scales, zeros), (group, order))?;
        all.push(FrozenWeight::Affine(Arc::new(affine)));
    }
    for kind in [GgmlDType::Q4_0, GgmlDType::Q8_0, GgmlDType::Q6K] {
        if inputs > 0 && outputs > 0 && inputs.is_multiple_of(kind.block_size()) {
            let blocks = QTensor::quantize(&dense.dense(DType::F32)?, kind)?;
            all.push(FrozenWeight::from_ggml(kind, &blocks.data()?, (outputs, inputs))?);
        }
    }
    Ok(all)
}

/// x Wᵀ, g W and both on a tape, with and without a change of some rank beside it.
fn products(rows: usize, outputs: usize, inputs: usize, rank: usize) -> Result<()> {
    let x = matrix((rows, inputs), 2, DType::F32)?;
    let g = matrix((rows, outputs), 3, DType::F32)?;
    let (a, b) = (matrix((rank, inputs), 4, DType::F32)?, matrix((outputs, rank), 5, DType::F32)?);
    for weight in storages((outputs, inputs))? {
        if inputs == 0 {
            assert!(frozen_linear(&x, &weight).is_err() && frozen_left(&g, &weight).is_err());
            continue;
        }
        let what = format!("{rows} rows, {outputs} outputs, {inputs} inputs, rank {rank}, {}", weight.storage_name());
        let w = values(&weight.dense(DType::F32)?)?;
        let wt = transposed(&w, (outputs, inputs));
        let y = product(&values(&x)?, &wt, (rows, inputs, outputs));
        assert_values(&what, &frozen_linear(&x, &weight)?, (rows, outputs), &y, 1e-4)?;
        let dx = product(&values(&g)?, &w, (rows, outputs, inputs));
        assert_values(&what, &frozen_left(&g, &weight)?, (rows, inputs), &dx, 1e-4)?;
        assert_values(&what, &frozen_backward_input(&g, &weight)?, (rows, inputs), &dx, 1e-4)?;

        let u = product(&values(&x)?, &transposed(&values(&a)?, (rank, inputs)), (rows, inputs, rank));
        let change = product(&u, &transposed(&values(&b)?, (outputs, rank)), (rows, rank, outputs));
        let both: Vec<f64> = y.iter().zip(&change).map(|(y, c)| y + 0.5 * c).collect();
        let part = Part { weight: Some(&weight), low_rank: Some(LowRankTerm::new(a.clone(), b.clone(), 0.5)) };
        let plain = Part { weight: Some(&weight), low_rank: None };
        let tape = Tape::new([&x, &a, &b]);
        let outs = Ops::recorded(&tape).project(&x, &[part.clone(), plain])?;
        assert_values(&what, &outs[0], (rows, outputs), &both, 1e-4)?;
        assert_values(&what, &outs[1], (rows, outputs), &y, 1e-4)?;
        let found = backward(tape, &outs[0], &[&x, &a, &b])?;
        let ones = vec![1.0; rows * outputs];
        let du: Vec<f64> = product(&ones, &values(&b)?, (rows, outputs, rank)).iter().map(|v| v * 0.5).collect();
        let dx = product(&ones, &w, (rows, outputs, inputs));
        let through = product(&du, &values(&a)?, (rows, rank, inputs));
        let dx: Vec<f64> = dx.iter().zip(through).map(|(a, b)| a + b).collect();
        assert_values(&what, &found[0], (rows, inputs), &dx, 1e-4)?;
        let da = product(&transposed(&du, (rows, rank)), &values(&x)?, (rank, rows, inputs));
        assert_values(&what, &found[1], (rank, inputs), &da, 1e-4)?;
        let scaled: Vec<f64> = u.iter().map(|v| v * 0.5).collect();
        let db = product(&transposed(&ones, (rows, outputs)), &scaled, (outputs, rows, rank));
        assert_values(&what, &found[2], (outputs, rank), &db, 1e-4)?;
    }
    for dtype in [DType::F32, DType::F64] {
        let what = format!("dense: {rows} rows, {outputs} outputs, {inputs} inputs");
        let (x, w) = (matrix((rows, inputs), 2, dtype)?, matrix((outputs, inputs), 1, dtype)?);
        let tape = Tape::new([&x, &w]);
        let y = Ops::recorded(&tape).dense(&x, &w)?;
        let expected = product(&values(&x)?, &transposed(&values(&w)?, (outputs, inputs)), (rows, inputs, outputs));
        assert_values(&what, &y, (rows, outputs), &expected, 1e-4)?;
        let found = backward(tape, &y, &[&x, &w])?;
        let ones = vec![1.0; rows * outputs];
        let dx = product(&ones, &values(&w)?, (rows, outputs, inputs));
        assert_values(&what, &found[0], (rows, inputs), &dx, 1e-4)?;
        let dw = product(&transposed(&ones, (rows, outputs)), &values(&x)?, (outputs, rows, inputs));
        assert_values(&what, &found[1], (outputs, inputs), &dw, 1e-4)?;
    }
    Ok(())
}

/// Frozen products of rows that belong to no adapter, to one, to several, in f32 and in whole numbers.
fn segmented(rows: usize, outputs: usize, inputs: usize, rank: usize, groups: usize) -> Result<()> {
    const PAGE: usize = 48;
    let pool: Vec<f32> = numbers(64 * PAGE, 7).into_iter().map(|v| v as f32).collect();
    let pages: Vec<u32> = (0..64).map(|i| (i * 37 + 5) % 64).collect();
    let paged = |start, count, length| Paged { pool: &pool, page: PAGE, pages: &pages, start, count, length };
    let x = matrix((rows, inputs), 2, DType::F32)?;
    for weight in storages((outputs, inputs))?.iter().filter(|w| !matches!(w, FrozenWeight::Panels(_))) {
        // Groups of no rows between those of some.
        let group = |i: usize| {
            let at = |i: usize| i * rows / groups.max(1);
            let scale = i.is_multiple_of(2).then(|| paged(9, 1, outputs));
            let (a, b) = (paged(3, rank, inputs), paged(17, rank, outputs));
            let addition =
                Addition { a, b, output_scale: scale, bias: Some(paged(5, 1, outputs)), gate: None, weight: 0.5 };
            Group { rows: at(i)..at(i + 1), additions: vec![addition] }
        };
        let groups: Vec<Group<'_>> = (0..groups).map(group).collect();
        let part = || Segmented { weight, bias: None, groups: groups.clone() };
        let found = project_segmented(&x, &[part(), part()]);
        if inputs == 0 {
            assert!(found.is_err());
            continue;
        }
        let found = found?;
        let dense = values(&weight.dense(DType::F32)?)?;
        let frozen = product(&values(&x)?, &transposed(&dense, (outputs, inputs)), (rows, inputs, outputs));
        let mut expected = frozen.clone();
        let take = |p: &Paged<'_>| -> Vec<f64> {
            let of = |at: usize| f64::from(pool[pages[at / PAGE] as usize * PAGE + at % PAGE]);
            (p.start..p.start + p.count * p.length).map(of).collect()
        };
        for group in &groups {
            let n = group.rows.len();
            let rows = values(&x)?[group.rows.start * inputs..group.rows.end * inputs].to_vec();
            for addition in &group.additions {
                let u = product(&rows, &transposed(&take(&addition.a), (rank, inputs)), (n, inputs, rank));
                let change = product(&u, &take(&addition.b), (n, rank, outputs));
                let bias = addition.bias.as_ref().map(take).unwrap_or_default();
                let scale = addition.output_scale.as_ref().map(take);
                for (i, change) in change.iter().enumerate() {
                    let at = group.rows.start * outputs + i;
                    let scaled = scale.as_ref().map_or(0.0, |o| frozen[at] * (o[i % outputs] - 1.0));
                    expected[at] += 0.5 * (change + bias[i % outputs] + scaled);
                }
            }
        }
        for y in &found {
            assert_values("segmented", y, (rows, outputs), &expected, 1e-4)?;
        }
    }
    Ok(())
}

/// Operations that work row by row, in both types, on a tape and in candle's graph.
fn row_by_row(rows: usize, heads: usize) -> Result<()> {
    let width = heads * 4;
    for dtype in [DType::F32, DType::F64] {
        let (x, other) = (matrix((rows, width), 1, dtype)?, matrix((rows, width), 2, dtype)?);
        let vector = matrix((1, width), 3, dtype)?.reshape(width)?;
        let positions: Vec<usize> = (0..rows).collect();
        let table = RotaryTable::new(&positions, &[1.0, 0.1], 1.0);
        type Op<'a> = Box<dyn Fn(Ops<'_>, &Tensor) -> Result<Tensor> + 'a>;
        let every: Vec<u32> = (0..rows as u32).chain((0..rows as u32).rev()).collect();
        let operations: Vec<(&str, Op<'_>)> = vec![
            ("rms_norm", Box::new(|ops, x| ops.rms_norm(x, &vector, 1e-6))),
            ("rotary", Box::new(|ops, x| ops.rotary(x, &table))),
            ("silu_mul", Box::new(|ops, x| ops.silu_mul(x, &other))),
            ("add", Box::new(|ops, x| ops.add(x, &other))),
            ("scale_columns", Box::new(|ops, x| ops.scale_columns(x, &vector))),
            ("add_bias", Box::new(|ops, x| ops.add_bias(x, &vector))),
            ("reshape", Box::new(|ops, x| ops.reshape(x, (rows * 2, width / 2)))),
            ("no rows", Box::new(|ops, x| ops.rows(x, &[]))),
            ("every row twice", Box::new(|ops, x| ops.rows(x, &every))),
        ];
        for (what, op) in operations {
            let plain = op(Ops::plain(), &x)?;
            let tape = Tape::new([&x]);
            let y = op(Ops::recorded(&tape), &x)?;
            assert_same(what, &y, &plain)?;
            let dx = backward(tape, &y, &[&x])?.remove(0);
            assert_eq!(dx.dims(), x.dims(), "{what}");
            if rows > 0 && width > 0 {
                let var = candle_core::Var::from_tensor(&x)?;
                let expected = op(Ops::plain(), var.as_tensor())?;
                if expected.elem_count() > 0 {
                    let expected = expected.sum_all()?.backward()?;
                    assert_same(what, &dx, expected.get(&var).expect("a gradient"))?;
                }
            }
        }
    }
    Ok(())
}

/// Segments of no queries, of one, of none at all; keys from a cache and without.
fn attends(lengths: &[usize], cached: usize) -> Result<()> {
    let (d, rows) = (16, lengths.iter().sum::<usize>());
    let keys = rows + cached;
    for dtype in [DType::F32, DType::F64] {
        let (q, k, v) = (matrix((rows, 2 * d), 1, dtype)?, matrix((keys, d), 2, dtype)?, matrix((keys, d), 3, dtype)?);
        let (mut segments, mut at) = (Vec::new(), 0);
        for &n in lengths {
            segments.push(Segment { q_start: at, q_len: n, keys: vec![(rows, cached), (at, n)] });
            at += n;
        }
        let mut expected = vec![0f64; rows * 2 * d];
        let (qs, ks, vs) = (values(&q)?, values(&k)?, values(&v)?);
        for s in &segments {
            for i in 0..s.q_len {
                let seen: Vec<usize> = (rows..keys).chain(s.q_start..=s.q_start + i).collect();
                for head in 0..2 {
                    let query = &qs[(s.q_start + i) * 2 * d + head * d..][..d];
                    let score =
                        |&key: &usize| (query.iter().zip(&ks[key * d..]).map(|(a, b)| a * b).sum::<f64>() * 0.25).exp();
                    let p: Vec<f64> = seen.iter().map(score).collect();
                    let all: f64 = p.iter().sum();
                    for c in 0..d {
                        let sum: f64 = seen.iter().zip(&p).map(|(&key, p)| p * vs[key * d + c]).sum();
                        expected[(s.q_start + i) * 2 * d + head * d + c] = sum / all;
                    }
                }
            }
        }
        let what = format!("attention over {lengths:?} after {cached}");
        let tape = Tape::new([&q, &k, &v]);
        let y = Ops::recorded(&tape).attention((&q, &k, &v), &segments, &AttentionForm::causal(d, 0.25))?;
        assert_values(&what, &y, (rows, 2 * d), &expected, 1e-4)?;
        assert_values(
            &what,
            &attention((&q, &k, &v), &segments, &AttentionForm::causal(d, 0.25))?,
            (rows, 2 * d),
            &expected,
            1e-4,
        )?;
        for (found, of) in backward(tape, &y, &[&q, &k, &v])?.iter().zip([&q, &k, &v]) {
            assert_eq!(found.dims(), of.dims(), "{what}");
            assert!(values(found)?.iter().all(|v| v.is_finite()), "{what}");
        }
        if dtype == DType::F32 {
            let pool: Vec<f32> = ks.iter().chain(&vs).map(|&v| v as f32).collect();
            let form = AttentionForm::causal(d, 0.25);
            let in_f32 = KeyPool { numbers: &pool, stride: d, width: d, values_at: keys, dtype: KeyDtype::F32 };
            let y = attention_in_pool(&q, in_f32, &segments, &form)?;
            assert_values(&what, &y, (rows, 2 * d), &expected, 1e-4)?;
            let stride = KeyDtype::Int8.row(1, d);
            let mut pool = vec![0f32; 2 * keys * stride];
            store_rows_in_8_bits((&mut pool, stride), (&k, d), 0..keys)?;
            store_rows_in_8_bits((&mut pool, stride), (&v, d), keys..2 * keys)?;
            let rounded = KeyPool { numbers: &pool, stride, width: d, values_at: keys, dtype: KeyDtype::Int8 };
            let y = attention_in_pool(&q, rounded, &segments, &form)?;
            assert_values(&what, &y, (rows, 2 * d), &expected, 1e-2)?;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]

    #[test]
    fn products_of_any_size(
        rows in prop::sample::select(vec![0usize, 1, 2, 7, 33]),
        outputs in prop::sample::select(vec![0usize, 1, 3, 16, 33, 200]),
        inputs in prop::sample::select(vec![0usize, 1, 5, 32, 256]),
        rank in 0usize..3,
    ) {
        products(rows, outputs, inputs, rank).unwrap();
    }

    #[test]
    fn products_of_segments_of_any_size(
        rows in prop::sample::select(vec![0usize, 1, 2, 5, 70]),
        outputs in prop::sample::select(vec![0usize, 1, 3, 33, 200]),
        inputs in prop::sample::select(vec![0usize, 1, 5, 32]),
        rank in 0usize..3,
        groups in 0usize..4,
    ) {
        segmented(rows, outputs, inputs, rank, groups).unwrap();
    }

    #[test]
    fn attention_over_segments_of_any_size(lengths in prop::collection::vec(0usize..7, 0..6), cached in 0usize..3) {
        attends(&lengths, cached).unwrap();
    }

    #[test]
    fn rows_of_any_number(rows in 0usize..4, heads in 0usize..3) {
        row_by_row(rows, heads).unwrap();
    }
}

/// The sizes themselves, so that none is left to chance.
#[test]
fn no_row_and_one_in_every_operation() -> Result<()> {
    for (rows, outputs, inputs, rank) in [
        (0, 16, 32, 2),
        (0, 200, 32, 2),
        (1, 200, 32, 2),
        (1, 16, 32, 2),
        (3, 0, 32, 2),
        (3, 1, 1, 1),
        (3, 16, 0, 2),
        (3, 16, 32, 0),
        (0, 0, 0, 0),
    ] {
        products(rows, outputs, inputs, rank)?;
        for groups in [0, 1, 3] {
            segmented(rows, outputs, inputs, rank, groups)?;
        }
    }
    for (lengths, cached) in [(&[][..], 0), (&[0], 0), (&[0, 0], 2), (&[1], 0), (&[1, 0, 5], 1), (&[0, 9], 0)] {
        attends(lengths, cached)?;
    }
    for (rows, heads) in [(0, 2), (1, 2), (2, 0), (0, 0), (1, 1)] {
        row_by_row(rows, heads)?;
    }
    Ok(())
}

/// Products in whole numbers have no exact oracle; none and one row against the weight expanded.
#[test]
fn whole_numbers_at_the_edges() -> Result<()> {
    for (rows, outputs, inputs) in [(0, 200, 32), (1, 1, 1), (1, 0, 32), (1, 17, 33)] {
        let weight = FrozenWeight::Dense(matrix((outputs, inputs), 1, DType::F32)?).to_panels()?;
        let x = matrix((rows, inputs), 2, DType::F32)?;
        let y = project_segmented(&x, &[Segmented { weight: &weight, bias: None, groups: vec![] }])?.remove(0);
        let w = values(&weight.dense(DType::F32)?)?;
        let expected = product(&values(&x)?, &transposed(&w, (outputs, inputs)), (rows, inputs, outputs));
        assert_values("whole numbers", &y, (rows, outputs), &expected, 1e-2)?;
    }
    Ok(())
}
