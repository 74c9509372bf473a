//! The chained causal gradient against its reference form in plain loops, against autograd, and against its bounds.

use std::borrow::Cow;

use candle_core::{Device, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::super::{attention, attention_reference};
use super::*;
use crate::check::{assert_close, random};
use crate::tape::{Gradients, Tape};

/// One group, drawn.
struct Drawn {
    q: Vec<f64>,
    g: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    heads: usize,
    rows: usize,
    keys: usize,
    d: usize,
    scale: f64,
}

impl Drawn {
    /// Entries of up to 1 in size, keys and values about a mean; queries so large that the bound of τ is `tau`.
    fn new(rng: &mut ChaCha8Rng, (heads, rows, keys, d): (usize, usize, usize, usize), tau: f64) -> Self {
        let mut draw = |n: usize, about: f64| (0..n).map(|_| about + rng.random_range(-1.0..1.0)).collect::<Vec<f64>>();
        let mut own = Self {
            q: draw(rows * heads * d, 0.0),
            g: draw(rows * heads * d, 0.0),
            k: draw(keys * d, 0.7),
            v: draw(keys * d, -0.4),
            heads,
            rows,
            keys,
            d,
            scale: (d as f64).powf(-0.5),
        };
        let factor = tau / own.group::<f64>().score_bound().max(1e-9);
        own.q.iter_mut().for_each(|q| *q *= factor);
        own
    }

    /// A shape with some tiles, of which queries stand at the last positions.
    fn any(rng: &mut ChaCha8Rng, tau: f64) -> (Self, usize) {
        let (keys, heads) = (rng.random_range(2..=30), rng.random_range(1..=3));
        let (rows, d) = (rng.random_range(1..=keys), rng.random_range(1..=4));
        (Self::new(rng, (heads, rows, keys, d), tau), rng.random_range(1..=9))
    }

    fn group<T: Real>(&self) -> HeadGroup<'static, T> {
        let of = |all: &[f64]| -> &'static [T] { Vec::leak(all.iter().map(|&v| T::from_f64(v)).collect()) };
        let given = [&self.k, &self.v].map(|all| (Cow::Borrowed(of(all)), self.d));
        let shape = (self.heads, self.rows, self.keys, self.d);
        HeadGroup::new((of(&self.q), of(&self.g), self.heads * self.d), given, shape, self.scale)
    }

    /// The reference form: f̃ pair by pair, P_g(s) before the own tile and e^s in it (`degree` None: everywhere), and from it all sums in full.
    fn reference(&self, degree: Option<usize>, tile: usize) -> GroupGradients<f64> {
        let (d, group) = (self.d, self.group::<f64>());
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let mut all =
            GroupGradients { q: vec![0.0; self.q.len()], k: vec![0.0; self.k.len()], v: vec![0.0; self.v.len()] };
        for (i, head) in (0..self.rows).flat_map(|i| (0..self.heads).map(move |h| (i, h))) {
            let own = (i * self.heads + head) * d;
            let (q, g) = (&self.q[own..own + d], &self.g[own..own + d]);
            let position = i + self.keys - self.rows;
            let weight = |j: usize| {
                let s = self.scale * dot(q, &group.k[j * d..][..d]);
                match degree.filter(|_| j / tile < position / tile) {
                    Some(g) => (1..=g).rev().fold(1.0, |sum, n| 1.0 + sum * s / n as f64),
                    None => s.exp(),
                }
            };
            let w: Vec<f64> = (0..=position).map(weight).collect();
            let total: f64 = w.iter().sum();
            let along: Vec<f64> = (0..=position).map(|j| dot(g, &self.v[j * d..][..d])).collect();
            let rho = dot(&w, &along) / total;
            for j in 0..=position {
                let (f, p) = (w[j] / total, self.scale * w[j] / total * (along[j] - rho));
                for a in 0..d {
                    all.q[own + a] += p * self.k[j * d + a];
                    all.k[j * d + a] += p * q[a];
                    all.v[j * d + a] += f * g[a];
                }
            }
        }
        all
    }
}

fn apart<T: Real>(a: &GroupGradients<T>, b: &GroupGradients<f64>) -> f64 {
    let pairs = [(&a.q, &b.q), (&a.k, &b.k), (&a.v, &b.v)];
    pairs.iter().for_each(|(a, b)| assert_eq!(a.len(), b.len()));
    let off = |(a, b): &(&Vec<T>, &Vec<f64>)| {
        a.iter().zip(b.iter()).map(|(&a, b)| (a.to_f64() - b).abs()).fold(0.0, f64::max)
    };
    pairs.iter().map(off).fold(0.0, f64::max)
}

fn rng() -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(29)
}

#[test]
fn sums_over_tiles_are_the_reference_form() -> Result<()> {
    let mut rng = rng();
    for round in 0..200 {
        let tau = rng.random_range(0.0..1.2);
        let ((mut own, tile), degree) = (Drawn::any(&mut rng, tau), rng.random_range(0..=4));
        if round % 5 == 0 {
            own.scale = -own.scale;
        }
        let found = match own.group::<f64>().chained(&Powers::new(own.d, degree), tile) {
            Ok(found) => found,
            // A first-degree polynomial of a score below −1 is no weight.
            Err(_) if remainder(tau, degree) >= 1.0 => continue,
            Err(e) => return Err(e),
        };
        let off = apart(&found, &own.reference(Some(degree), tile));
        assert!(off < 1e-11, "{round}: degree {degree} tile {tile}: {off:e}");
        // One tile is the exact gradient.
        let whole = own.group::<f64>().chained(&Powers::new(own.d, degree), own.keys)?;
        assert!(apart(&whole, &own.reference(None, 1)) < 1e-12);
    }
    Ok(())
}

/// Entries of up to B give scores of up to β d B², and the error is within both bounds: the card's of dQ, and that of each entry.
#[test]
fn errors_are_within_their_bounds() -> Result<()> {
    let mut rng = rng();
    let (mut held, mut tight) = (0, Comparison::default());
    while held < 400 {
        let bound = rng.random_range(0.1..0.9);
        let (mut own, tile) = Drawn::any(&mut rng, 1.0);
        for all in [&mut own.q, &mut own.k] {
            let top = all.iter().fold(0f64, |top, v| top.max(v.abs()));
            all.iter_mut().for_each(|v| *v *= bound / top);
        }
        let (group, degree) = (own.group::<f64>(), rng.random_range(1..=4));
        let tau = group.score_bound();
        // Keys less their mean are at most twice as large.
        assert!(tau <= 2.0 * own.scale * own.d as f64 * bound * bound + 1e-12);
        let Some(eta) = super::super::chained::relative_error(tau, degree) else { continue };
        let (found, exact) = (group.chained(&Powers::new(own.d, degree), tile)?, own.reference(None, 1));
        let largest = |all: &[f64]| all.iter().fold(0f64, |top, v| top.max(v.abs()));
        let along = own.g.chunks_exact(own.d).flat_map(|g| {
            group.v.chunks_exact(own.d).map(move |v| g.iter().zip(v).map(|(g, v)| g * v).sum::<f64>().abs())
        });
        let card = own.scale * eta * (3.0 + eta) * along.fold(0.0, f64::max) * largest(&group.k);
        let off = found.q.iter().zip(&exact.q).fold(0f64, |top, (a, b)| top.max((a - b).abs()));
        assert!(off <= card + 1e-12, "degree {degree}: {off:e} > {card:e}");
        let compared = compare(&group, &found, (degree, tile));
        assert!(compared.share_of_bound <= 1.0, "degree {degree} tile {tile}: {compared:?}");
        tight = tight.most(compared);
        held += 1;
    }
    assert!(tight.share_of_bound > 0.1 && tight.relative_error > 1e-3, "{tight:?}");
    Ok(())
}

/// The comparison's exact gradient is the exact one, and its errors are those that there are.
#[test]
fn the_comparison_measures_what_there_is() -> Result<()> {
    let mut rng = rng();
    for _ in 0..30 {
        let (own, tile) = Drawn::any(&mut rng, 0.5);
        let group = own.group::<f64>();
        let exact = compare(&group, &own.reference(None, 1), (2, tile));
        assert!(exact.relative_error < 1e-9 && exact.share_of_bound <= 1.0, "{exact:?}");
        let found = group.chained(&Powers::new(own.d, 1), tile)?;
        let relative = |found: &[f64], exact: &[f64]| {
            let top = exact.iter().fold(0f64, |top, v| top.max(v.abs()));
            found.iter().zip(exact).fold(0f64, |most, (a, b)| most.max((a - b).abs())) / top
        };
        let exact = own.reference(None, 1);
        let expected = relative(&found.q, &exact.q).max(relative(&found.k, &exact.k)).max(relative(&found.v, &exact.v));
        let compared = compare(&group, &found, (1, tile)).relative_error;
        assert!((compared - expected).abs() <= 1e-6 * expected + 1e-12, "{compared:e} and {expected:e}");
    }
    Ok(())
}

/// Faults of a size that a user would not see in the loss are outside the bound.
#[test]
fn faults_are_outside_the_bound() -> Result<()> {
    let own = Drawn::new(&mut rng(), (2, 40, 48, 4), 0.3);
    let powers = Powers::new(4, 3);
    let off = |group: &HeadGroup<'_, f64>, change: &dyn Fn(&mut GroupGradients<f64>)| -> Result<f64> {
        let mut found = group.chained(&powers, 8)?;
        change(&mut found);
        Ok(compare(group, &found, (3, 8)).share_of_bound)
    };
    let group = own.group::<f64>();
    assert!(off(&group, &|_| {})? <= 1.0);
    assert!(off(&group, &|found| found.q.iter_mut().for_each(|q| *q *= 1.01))? > 1.0);
    assert!(off(&group, &|found| found.k[5] *= 1.02)? > 1.0);
    assert!(off(&group, &|found| found.v[0] += 0.01)? > 1.0);
    assert!(off(&group, &|found| found.q[7] = f64::NAN)?.is_nan());
    // A key of the first tile that later queries did not see.
    let missing = own.group::<f64>();
    let short = group.chained(&powers, 48)?;
    let mut found = missing.chained(&powers, 8)?;
    found.v[..4].iter_mut().zip(&short.v[..4]).for_each(|(found, whole)| *found -= 0.1 * whole);
    assert!(compare(&missing, &found, (3, 8)).share_of_bound > 1.0);
    Ok(())
}

#[test]
fn single_precision_is_within_the_bound_too() -> Result<()> {
    let mut rng = rng();
    let mut held = 0;
    while held < 100 {
        let tau = rng.random_range(0.0..2.0);
        let ((own, tile), degree) = (Drawn::any(&mut rng, tau), rng.random_range(0..=6));
        let rule = LowRankGradient { degree, tolerance: 0.1, tile };
        if !rule.holds(tau, f32::EPSILON.into()) {
            continue;
        }
        let group = own.group::<f32>();
        let found = group.chained(&Powers::new(own.d, degree), tile)?;
        let compared = compare(&group, &found, (degree, tile));
        assert!(compared.share_of_bound <= 1.0, "τ {tau} degree {degree} tile {tile}: {compared:?}");
        held += 1;
    }
    Ok(())
}

/// Packed segments: a prefix that two share, one that stands alone, one of few queries, one without queries, one row, one shorter than a tile.
fn segments() -> [Segment; 6] {
    [
        Segment::plain(0, 30),
        Segment { q_start: 30, q_len: 9, keys: vec![(0, 12), (30, 9)] },
        Segment { q_start: 39, q_len: 0, keys: vec![(0, 12)] },
        Segment { q_start: 39, q_len: 1, keys: vec![(0, 12), (39, 1)] },
        Segment { q_start: 40, q_len: 1, keys: vec![(40, 1)] },
        Segment::plain(41, 6),
    ]
}

const FORM: AttentionForm = AttentionForm { head_dim: 4, scale: 0.5, mask: Mask::Causal, cap: None };
const RULE: LowRankGradient = LowRankGradient { degree: 9, tolerance: 1e-2, tile: 8 };

/// Gradients of q, k and v (4 query heads, 2 key heads, 47 rows) on a tape, with what was counted; `factor` of queries.
fn on_tape(
    dtype: DType,
    factor: f64,
    rule: Option<LowRankGradient>,
) -> Result<([Tensor; 3], [Tensor; 4], GradientTotals)> {
    let q = (random((47, 16), 1, dtype)? * factor)?;
    let (k, v, g) = (random((47, 8), 2, dtype)?, random((47, 8), 3, dtype)?, random((47, 16), 4, dtype)?);
    let (tape, segments) = (Tape::new([&q, &k, &v]), segments());
    let ops = crate::Ops::recorded(&tape);
    let meter = Arc::new(GradientMeter::new(Some(11)));
    let y = match rule {
        Some(rule) => {
            let how = CheckedGradient { rule, meter: meter.clone() };
            ops.attention_low_rank((&q, &k, &v), (&segments, &FORM), &how, 3)?
        }
        None => ops.attention((&q, &k, &v), &segments, &FORM)?,
    };
    let mut gradients = Gradients::default();
    tape.backward(&y, g.clone(), &mut gradients)?;
    let found = [&q, &k, &v].map(|t| gradients.remove(t).expect("a gradient"));
    Ok((found, [q, k, v, g], meter.totals()))
}

/// Heads that share keys, in segments that share rows: within 1e-9 of autograd through the reference form of attention, and counted.
#[test]
fn packed_segments_have_the_exact_gradient() -> Result<()> {
    let (found, [q, k, v, g], totals) = on_tape(DType::F64, 0.2, Some(RULE))?;
    let vars = [&q, &k, &v].map(|t| Var::from_tensor(t).expect("a variable"));
    // Plain rows only: the reference form takes no segment without queries.
    let segments: Vec<Segment> = segments().into_iter().filter(|s| s.q_len > 0).collect();
    let y = attention_reference((&vars[0], &vars[1], &vars[2]), &segments, &FORM)?;
    let exact = (&y * &g)?.sum_all()?.backward()?;
    for (found, var) in found.iter().zip(&vars) {
        assert_close(found, exact.get(var).expect("a gradient"), 1e-9)?;
    }
    // Three segments have more than a tile of keys and a query, of 4 heads each.
    assert_eq!((totals.heads, totals.low_rank), (12, 12));
    let (checked, (least, most)) = (totals.checked.expect("a comparison"), totals.scores.expect("scores"));
    assert!(checked.relative_error < 1e-8 && checked.share_of_bound <= 1.0, "{checked:?}");
    assert!(0.0 < least && least < most && most < 1.0, "{totals:?}");
    // At a low degree it is another gradient, and the error is told.
    let (low, _, totals) = on_tape(DType::F64, 0.05, Some(LowRankGradient { degree: 1, ..RULE }))?;
    let (exact, ..) = on_tape(DType::F64, 0.05, None)?;
    let off = (&low[0] - &exact[0])?.abs()?.max_all()?.to_scalar::<f64>()?;
    assert!(off > 1e-7 && off < 1e-2, "{off:e}");
    assert!(totals.checked.is_some_and(|c| c.relative_error > 1e-6 && c.share_of_bound <= 1.0), "{totals:?}");
    Ok(())
}

/// Where a bound misses the tolerance, the bits are those of the exact backward: of all groups, or of the group alone.
#[test]
fn beyond_the_tolerance_gradients_are_exact_to_the_bit() -> Result<()> {
    let bits = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
    let (found, _, totals) = on_tape(DType::F32, 40.0, Some(RULE))?;
    let (exact, ..) = on_tape(DType::F32, 40.0, None)?;
    assert_eq!((totals.heads, totals.low_rank, totals.checked), (12, 0, None));
    for (found, exact) in found.iter().zip(&exact) {
        assert_eq!(bits(found)?, bits(exact)?);
    }
    // Segments of a tile or less have nothing to approximate.
    let (found, [q, ..], totals) = on_tape(DType::F32, 0.05, Some(LowRankGradient { tile: 30, ..RULE }))?;
    let (exact, ..) = on_tape(DType::F32, 0.05, None)?;
    assert_eq!((totals.heads, totals.scores), (0, None));
    assert_eq!(bits(&found[1])?, bits(&exact[1])?);
    // The bound of one group alone is too large: queries of the first segment's first two heads.
    let mut large = q.to_vec2::<f32>()?;
    large[..30].iter_mut().for_each(|row| row[..8].iter_mut().for_each(|q| *q *= 300.0));
    let q = Tensor::new(large, &Device::Cpu)?;
    let (k, v) = (random((47, 8), 2, DType::F32)?, random((47, 8), 3, DType::F32)?);
    let y = attention((&q, &k, &v), &segments(), &FORM)?;
    let g = random((47, 16), 4, DType::F32)?;
    let op = LowRankAttention::new((&q, &k, &v), (&segments(), &FORM), LowRankGradient { degree: 2, ..RULE }, 0)?;
    let meter = GradientMeter::default();
    let [dq, ..] = op.bwd([&q, &k, &v, &y, &g], &meter)?;
    assert_eq!((meter.totals().heads, meter.totals().low_rank), (12, 10));
    let exact = with_slices::<f32, _, 5>([&q, &k, &v, &y, &g], |inputs| Ok(op.exact().backward(inputs)))?;
    let (dq, exact) = (dq.flatten_all()?.to_vec1::<f32>()?, &exact[0]);
    let same = |row: usize, at: usize| dq[row * 16 + at..][..8] == exact[row * 16 + at..][..8];
    assert!((0..30).all(|row| same(row, 0)) && !(8..30).any(|row| same(row, 8)));
    Ok(())
}

/// Another number of threads or another checked group changes no bit.
#[test]
fn a_gradient_does_not_depend_on_threads() -> Result<()> {
    let bits = || -> Result<Vec<Vec<f32>>> {
        let (found, ..) = on_tape(DType::F32, 0.2, Some(RULE))?;
        found.iter().map(|t| t.flatten_all()?.to_vec1::<f32>()).collect()
    };
    let pool = |n: usize| rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("a pool");
    assert_eq!(pool(1).install(bits)?, pool(3).install(bits)?);
    Ok(())
}

#[test]
fn what_has_no_such_gradient_is_refused() {
    let rule = LowRankGradient { degree: 2, tolerance: 0.01, tile: 64 };
    let says = |rule: LowRankGradient, form: AttentionForm| rule.check(&form).expect_err("refused").to_string();
    assert!(rule.check(&FORM).is_ok());
    assert!(says(rule, AttentionForm { mask: Mask::Window(9), ..FORM }).contains("sliding window"));
    assert!(says(rule, AttentionForm { mask: Mask::Full, ..FORM }).contains("causal mask"));
    assert!(says(rule, AttentionForm { cap: Some(50.0), ..FORM }).contains("soft cap"));
    assert!(says(LowRankGradient { tile: 0, ..rule }, FORM).contains("at least 1"));
    let wide = AttentionForm { head_dim: 64, ..FORM };
    assert!(rule.check(&wide).is_ok());
    assert!(says(LowRankGradient { degree: 3, ..rule }, wide).contains("smaller degree"));
    for huge in [LowRankGradient { degree: usize::MAX, ..rule }, LowRankGradient { tile: usize::MAX, ..rule }] {
        assert!(says(huge, wide).contains("smaller degree or tile"));
    }
    assert!(LowRankGradient { degree: 64, ..rule }.numbers(usize::MAX).is_err());
}

/// The scores that a rule allows grow with degree and tolerance, and single precision allows fewer at high degrees.
#[test]
fn the_reach_of_a_rule_is_the_border() {
    let of = |degree, tolerance| LowRankGradient { degree, tolerance, tile: 64 };
    let reach = |degree: usize, tolerance: f64| of(degree, tolerance).reach(DType::F32);
    assert!(reach(1, 0.01) < reach(2, 0.01) && reach(2, 0.01) < reach(4, 0.01) && reach(2, 0.01) < reach(2, 0.1));
    for (degree, tolerance) in [(0, 0.05), (2, 0.01), (7, 0.001)] {
        let (rule, epsilon) = (of(degree, tolerance), f64::from(f32::EPSILON));
        let tau = rule.reach(DType::F32);
        assert!(rule.holds(tau * 0.999, epsilon) && !rule.holds(tau * 1.001, epsilon));
        assert!(!rule.holds(f64::NAN, epsilon) && !rule.holds(f64::INFINITY, epsilon));
    }
    assert!(of(30, 0.001).reach(DType::F64) > of(30, 0.001).reach(DType::F32) + 1.0);
}
