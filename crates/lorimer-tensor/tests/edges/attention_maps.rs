//! Attention in every mask, with a cap and without, and its map as a graph: segments of no query and one, of no key and one, and no segment.

use std::ops::Range;

use super::*;

const D: usize = 2;
const HEADS: usize = 4;

/// Queries (rows, heads·d), keys and values (key rows, two heads).
struct Inputs {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    segments: Vec<Segment>,
    form: AttentionForm,
}

impl Inputs {
    /// Of each sequence so many queries and so many keys more than these (fewer: attention to another sequence, in which all are seen), and
    /// `shared` keys that all of them see first.
    fn new(sequences: &[(usize, isize)], shared: usize, mask: Mask, cap: Option<f64>) -> Self {
        let (mut rows, mut keys, mut segments) = (0, shared, Vec::new());
        for &(n, more) in sequences {
            let count = n.saturating_add_signed(more);
            segments.push(Segment { q_start: rows, q_len: n, keys: vec![(0, shared), (keys, count)] });
            (rows, keys) = (rows + n, keys + count);
        }
        let numbers = |n: usize, seed| numbers(n, seed).into_iter().map(|v| 2.0 * v).collect();
        let (q, k, v) = (numbers(rows * HEADS * D, 1), numbers(keys * 2 * D, 2), numbers(keys * 2 * D, 3));
        Self { q, k, v, segments, form: AttentionForm { mask, cap, ..AttentionForm::causal(D, 0.6) } }
    }

    fn tensors(&self, dtype: DType) -> Result<[Tensor; 3]> {
        let of = |v: &[f64], width: usize| {
            Tensor::from_vec(v.to_vec(), (v.len() / width, width), &Device::Cpu)?.to_dtype(dtype)
        };
        Ok([of(&self.q, HEADS * D)?, of(&self.k, 2 * D)?, of(&self.v, 2 * D)?])
    }

    /// Of each query of each segment: its row, its own place, its keys' rows in their order, which of them it sees, and the weights of
    /// these by head.
    fn rows(&self, mut each: impl FnMut(usize, usize, &[usize], Range<usize>, &[Vec<f64>])) {
        for s in &self.segments {
            let keys: Vec<usize> = s.keys.iter().flat_map(|&(start, n)| start..start + n).collect();
            for i in 0..s.q_len {
                let own = (i + keys.len()).saturating_sub(s.q_len);
                let seen = match self.form.mask {
                    Mask::Causal => 0..own + 1,
                    Mask::Window(n) => (own + 1).saturating_sub(n.max(1))..own + 1,
                    Mask::Full => 0..keys.len(),
                };
                let weights = |head: usize| {
                    let q = &self.q[((s.q_start + i) * HEADS + head) * D..][..D];
                    let score = |&key: &usize| {
                        let k = &self.k[(key * 2 + head / 2) * D..][..D];
                        let score = 0.6 * q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>();
                        self.form.cap.map_or(score, |cap| cap * (score / cap).tanh()).exp()
                    };
                    let all: Vec<f64> = keys[seen.clone()].iter().map(score).collect();
                    let sum: f64 = all.iter().sum();
                    all.iter().map(|p| p / sum).collect()
                };
                let weights: Vec<Vec<f64>> = (0..HEADS).map(weights).collect();
                each(s.q_start + i, own, &keys, seen, &weights);
            }
        }
    }

    fn output(&self) -> Vec<f64> {
        let mut y = vec![0.0; self.q.len()];
        self.rows(|row, _, keys, seen, weights| {
            for (head, weights) in weights.iter().enumerate() {
                for (p, key) in weights.iter().zip(&keys[seen.clone()]) {
                    for c in 0..D {
                        y[(row * HEADS + head) * D + c] += p * self.v[(key * 2 + head / 2) * D + c];
                    }
                }
            }
        });
        y
    }

    /// Offsets, key rows and sums of the edges.
    fn edges(&self, rule: EdgeRule) -> (Vec<usize>, Vec<usize>, Vec<f64>) {
        let (mut offsets, mut columns, mut sums) = (vec![0], Vec::new(), Vec::new());
        self.rows(|_, own, keys, seen, weights| {
            for (at, place) in seen.enumerate() {
                let sum: f64 = weights.iter().map(|w| w[at]).sum();
                let may = match rule.keys {
                    EdgeKeys::All => place <= own,
                    EdgeKeys::WithoutFirst => place <= own && (place > 0 || own == 0),
                    EdgeKeys::Own => place == own,
                };
                if may && sum > rule.above {
                    columns.push(keys[place]);
                    sums.push(sum.min(1.0));
                }
            }
            offsets.push(columns.len());
        });
        (offsets, columns, sums)
    }

    fn parts(&mut self) -> [&mut Vec<f64>; 3] {
        [&mut self.q, &mut self.k, &mut self.v]
    }

    /// Central differences of a number that comes of queries, keys and values.
    fn differences(&mut self, of: impl Fn(&Self) -> f64) -> [Vec<f64>; 3] {
        let mut all = [Vec::new(), Vec::new(), Vec::new()];
        for (part, found) in all.iter_mut().enumerate() {
            for i in 0..self.parts()[part].len() {
                let at = self.parts()[part][i];
                let mut moved = |by: f64| {
                    self.parts()[part][i] = at + by;
                    of(self)
                };
                let (up, down) = (moved(1e-5), moved(-1e-5));
                self.parts()[part][i] = at;
                found.push((up - down) / 2e-5);
            }
        }
        all
    }
}

#[track_caller]
fn assert_numbers(what: &str, found: &Tensor, expected: &[f64], tolerance: f64) -> Result<()> {
    let found = values(found)?;
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance * (1.0 + b.abs()), "{what}, number {i}: {a} for {b}");
    }
    Ok(())
}

/// Numbers by which outputs are summed.
fn mixed(values: &[f64]) -> f64 {
    values.iter().enumerate().map(|(i, v)| v * (i as f64 * 0.7).cos()).sum()
}

fn mixing(of: &Tensor) -> Result<Tensor> {
    let mix: Vec<f64> = (0..of.elem_count()).map(|i| (i as f64 * 0.7).cos()).collect();
    Tensor::from_vec(mix, of.shape(), &Device::Cpu)?.to_dtype(of.dtype())
}

fn gradients(tape: Tape, y: &Tensor, of: &[&Tensor]) -> Result<Vec<Tensor>> {
    let mut gradients = Gradients::default();
    tape.backward(y, mixing(y)?, &mut gradients)?;
    let zeros = |t: &&Tensor| gradients.remove(t).map_or_else(|| t.zeros_like(), Ok);
    of.iter().map(zeros).collect()
}

fn attends(what: &str, inputs: &mut Inputs) -> Result<()> {
    let (form, segments, expected) = (inputs.form, inputs.segments.clone(), inputs.output());
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-4)] {
        let [q, k, v] = inputs.tensors(dtype)?;
        assert_numbers(what, &attention((&q, &k, &v), &segments, &form)?, &expected, tolerance)?;
        let tape = Tape::new([&q, &k, &v]);
        let y = Ops::recorded(&tape).attention((&q, &k, &v), &segments, &form)?;
        assert_numbers(what, &y, &expected, tolerance)?;
        let found = gradients(tape, &y, &[&q, &k, &v])?;
        if dtype == DType::F64 {
            for (found, expected) in found.iter().zip(inputs.differences(|i| mixed(&i.output()))) {
                assert_numbers(&format!("{what}, gradient"), found, &expected, 1e-6)?;
            }
        } else {
            let pool: Vec<f32> = inputs.k.iter().chain(&inputs.v).map(|&v| v as f32).collect();
            let keys =
                KeyPool { numbers: &pool, stride: 2 * D, width: 2 * D, values_at: k.dim(0)?, dtype: KeyDtype::F32 };
            assert_numbers(what, &attention_in_pool(&q, keys, &segments, &form)?, &expected, tolerance)?;
        }
    }
    Ok(())
}

fn shows(what: &str, inputs: &mut Inputs, rule: EdgeRule) -> Result<()> {
    let (form, segments) = (inputs.form, inputs.segments.clone());
    let (offsets, columns, sums) = inputs.edges(rule);
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-4)] {
        let [q, k, _] = inputs.tensors(dtype)?;
        let tape = Tape::new([&q, &k]);
        let mut all = vec![
            attention_edges((&q, &k), &segments, &form, rule)?,
            Ops::recorded(&tape).attention_edges((&q, &k), &segments, &form, rule)?,
        ];
        let pool: Vec<f32> = inputs.k.iter().map(|&v| v as f32).collect();
        if dtype == DType::F32 {
            let keys = KeyPool { numbers: &pool, stride: 2 * D, width: 2 * D, values_at: 0, dtype: KeyDtype::F32 };
            all.push(edges_in_pool(&q, keys, &segments, &form, rule)?);
        }
        for edges in &all {
            assert_eq!((&edges.offsets[..], &edges.columns[..]), (&offsets[..], &columns[..]), "{what}");
            assert_numbers(what, &edges.sums, &sums, tolerance)?;
        }
        if dtype == DType::F64 {
            let found = gradients(tape, &all[1].sums, &[&q, &k])?;
            let [dq, dk, _] = inputs.differences(|i| mixed(&i.edges(rule).2));
            assert_numbers(&format!("{what}, gradient of q"), &found[0], &dq, 1e-6)?;
            assert_numbers(&format!("{what}, gradient of k"), &found[1], &dk, 1e-6)?;
        }
        for width in [0, 1, 3] {
            along(what, &all[0], (k.dim(0)?, width), dtype)?;
        }
    }
    Ok(())
}

/// Sums along edges of rows of any width.
fn along(what: &str, edges: &Edges, (keys, width): (usize, usize), dtype: DType) -> Result<()> {
    let (count, rows) = (edges.columns.len(), edges.offsets.len() - 1);
    let weights = matrix((1, count), 4, dtype)?.reshape(count)?;
    let x = matrix((keys, width), 5, dtype)?;
    let (w, xs) = (values(&weights)?, values(&x)?);
    let mut y = vec![0.0; rows * width];
    let (mut dw, mut dx) = (vec![0.0; count], vec![0.0; keys * width]);
    for row in 0..rows {
        for e in edges.offsets[row]..edges.offsets[row + 1] {
            for c in 0..width {
                let (at, from) = (row * width + c, edges.columns[e] * width + c);
                let g = (at as f64 * 0.7).cos();
                y[at] += w[e] * xs[from];
                dw[e] += g * xs[from];
                dx[from] += g * w[e];
            }
        }
    }
    assert_numbers(what, &along_edges(edges, &weights, &x)?, &y, 1e-5)?;
    let tape = Tape::new([&weights, &x]);
    let found = Ops::recorded(&tape).along_edges(edges, &weights, &x)?;
    assert_eq!(found.dims(), [rows, width], "{what}");
    assert_numbers(what, &found, &y, 1e-5)?;
    let found = gradients(tape, &found, &[&weights, &x])?;
    assert_numbers(&format!("{what}, gradient of weights"), &found[0], &dw, 1e-5)?;
    assert_numbers(&format!("{what}, gradient along edges"), &found[1], &dx, 1e-5)
}

const MASKS: [Mask; 6] =
    [Mask::Causal, Mask::Window(0), Mask::Window(1), Mask::Window(2), Mask::Window(usize::MAX), Mask::Full];

fn in_every_form(sequences: &[(usize, isize)], shared: usize) -> Result<()> {
    for mask in MASKS {
        for cap in [None, Some(0.8)] {
            // Where fewer keys than queries are there, all of them have to be seen.
            let fewer = sequences.iter().any(|&(n, more)| n.saturating_add_signed(more) + shared < n);
            let mut inputs = Inputs::new(sequences, shared, mask, cap);
            let what = format!("{sequences:?} after {shared}, {mask:?}, cap {cap:?}");
            if fewer && mask != Mask::Full {
                let [q, k, v] = inputs.tensors(DType::F32)?;
                assert!(attention((&q, &k, &v), &inputs.segments, &inputs.form).is_err(), "{what}");
                continue;
            }
            attends(&what, &mut inputs)?;
            for keys in [EdgeKeys::All, EdgeKeys::WithoutFirst, EdgeKeys::Own] {
                // All edges, some and none.
                for above in [0.0, 0.9, HEADS as f64] {
                    shows(&format!("{what}, {keys:?} above {above}"), &mut inputs, EdgeRule { above, keys })?;
                }
            }
        }
    }
    Ok(())
}

/// To be seen to fail: `Window(0)` that sees nothing, a row without keys whose weights are formed, or edges of a segment without queries that move
/// those of the next.
#[test]
fn segments_of_no_query_and_one_in_every_mask() -> Result<()> {
    for (sequences, shared) in [
        (&[][..], 0),
        (&[], 2),
        (&[(0, 0)], 0),
        (&[(0, 0), (0, 0)], 1),
        (&[(1, 0)], 0),
        (&[(1, 0)], 1),
        (&[(0, 3), (1, 0), (0, 0), (2, 1)], 0),
        (&[(2, -1)], 0),
        (&[(3, -3), (1, 0)], 1),
    ] {
        in_every_form(sequences, shared)?;
    }
    // Queries that have nothing to see.
    for mask in MASKS {
        let inputs = Inputs::new(&[(2, -2)], 0, mask, None);
        let [q, k, v] = inputs.tensors(DType::F32)?;
        assert!(attention((&q, &k, &v), &inputs.segments, &inputs.form).is_err());
        let rule = EdgeRule { above: 0.0, keys: EdgeKeys::All };
        assert!(attention_edges((&q, &k), &inputs.segments, &inputs.form, rule).is_err());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(12) })]

    #[test]
    fn segments_of_any_size_in_every_mask(
        sequences in prop::collection::vec((0usize..4, -2isize..3), 0..4),
        shared in 0usize..2,
    ) {
        let some = |&(n, more): &(usize, isize)| n == 0 || n.saturating_add_signed(more) + shared > 0;
        let sequences: Vec<(usize, isize)> = sequences.into_iter().filter(some).collect();
        in_every_form(&sequences, shared).unwrap();
    }
}
