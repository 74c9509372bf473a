//! The chained gradient against the exact one, and the exact one against autograd.

use candle_core::{Device, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

struct Drawn {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    up: Vec<f64>,
    width: usize,
    scale: f64,
}

impl Drawn {
    /// Entries of up to 1 in size; queries and keys so large that τ is `tau`, if that is given.
    fn new(rng: &mut ChaCha8Rng, (rows, width): (usize, usize), tau: Option<f64>) -> Self {
        let mut draw = || (0..rows * width).map(|_| rng.random_range(-1.0..1.0)).collect::<Vec<f64>>();
        let mut own = Self { q: draw(), k: draw(), v: draw(), up: draw(), width, scale: (width as f64).powf(-0.5) };
        if let Some(tau) = tau {
            let factor = (tau / own.head().largest_score()).min(1.0);
            own.q.iter_mut().for_each(|q| *q *= factor);
        }
        own
    }

    fn head(&self) -> Head<'_> {
        Head { q: &self.q, k: &self.k, v: &self.v, width: self.width, scale: self.scale }
    }
}

fn largest(a: &[f64]) -> f64 {
    a.iter().fold(0.0, |top, v| top.max(v.abs()))
}

fn apart(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |top, (a, b)| top.max((a - b).abs()))
}

fn rng() -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(17)
}

#[test]
fn exact_is_autograd_and_tiles_are_the_whole() -> Result<()> {
    let mut rng = rng();
    for shape in [(1, 3), (7, 2), (33, 8)] {
        let own = Drawn::new(&mut rng, shape, None);
        let var = |t: &[f64]| Var::from_tensor(&Tensor::from_slice(t, shape, &Device::Cpu)?);
        let (q, k, v) = (var(&own.q)?, var(&own.k)?, var(&own.v)?);
        let scores = (q.matmul(&k.t()?)? * own.scale)?.exp()?;
        let output = scores.broadcast_div(&scores.sum_keepdim(1)?)?.matmul(&v)?;
        let found = (&output * Tensor::from_slice(&own.up, shape, &Device::Cpu)?)?.sum_all()?.backward()?;
        let numbers = |t: &Tensor| t.flatten_all()?.to_vec1::<f64>();
        let whole = own.head().exact(&own.up, shape.0)?;
        assert!(apart(&whole.output, &numbers(&output)?) < 1e-12);
        for (var, own) in [(&q, &whole.q), (&k, &whole.k), (&v, &whole.v)] {
            assert!(apart(own, &numbers(found.get(var).unwrap())?) < 1e-10);
        }
        for tile in [1, 4, 1000] {
            assert_eq!(own.head().exact(&own.up, tile)?, whole);
        }
        // ρ_i = Σ_j f_ij q_ij is ⟨dO_i, O_i⟩: so every row of p sums to nothing, and a constant in all keys' place gives no dQ.
        let constant = Head { k: &vec![0.7; own.k.len()], ..own.head() };
        assert!(largest(&constant.exact(&own.up, 4)?.q) < 1e-12);
    }
    assert!(Head { v: &[0.0], ..Drawn::new(&mut rng, (2, 2), None).head() }.exact(&[0.0; 4], 1).is_err());
    Ok(())
}

#[test]
fn chained_is_exact_within_its_bounds() -> Result<()> {
    let mut rng = rng();
    for _ in 0..8 {
        let shape = (rng.random_range(1..=64), rng.random_range(1..=4));
        let own = Drawn::new(&mut rng, shape, Some(0.6));
        let (exact, chained) = (own.head().exact(&own.up, 16)?, own.head().chained(&own.up, 9)?);
        for (a, b) in
            [(&exact.q, &chained.q), (&exact.k, &chained.k), (&exact.v, &chained.v), (&exact.output, &chained.output)]
        {
            assert!(apart(a, b) < 1e-8, "{shape:?}: {:e}", apart(a, b));
        }
    }
    // Both bounds, on a thousand heads.
    let (mut held, mut tight) = (0, 0.0f64);
    while held < 1000 {
        let shape = (rng.random_range(1..=12), rng.random_range(1..=3));
        let tau = rng.random_range(0.05..1.5);
        let (own, degree) = (Drawn::new(&mut rng, shape, Some(tau)), rng.random_range(1..=4));
        let head = own.head();
        let tau = head.largest_score();
        let Some(eta) = relative_error(tau, degree) else { continue };
        let (exact, chained) = (head.exact(&own.up, 16)?, head.chained(&own.up, degree)?);
        // dV of a gradient that is one row's is that row of f.
        for i in 0..shape.0 {
            let mut one = vec![0.0; own.up.len()];
            one[i * shape.1] = 1.0;
            let (f, near) = (head.exact(&one, 16)?.v, head.chained(&one, degree)?.v);
            for (f, near) in f.iter().zip(&near) {
                assert!((f - near).abs() <= eta * f + 1e-12);
            }
        }
        let d = shape.1;
        let scores = own.up.chunks_exact(d).flat_map(|up| own.v.chunks_exact(d).map(move |v| dot(up, v).abs()));
        let bound = own.scale * eta * (3.0 + eta) * scores.fold(0.0, f64::max) * largest(&own.k);
        let off = apart(&exact.q, &chained.q);
        assert!(off <= bound + 1e-12, "{shape:?} τ {tau} g {degree}: {off:e} > {bound:e}");
        tight = tight.max(off / bound);
        held += 1;
    }
    assert!(tight > 1e-3, "{tight:e}");
    Ok(())
}

#[test]
fn features_are_as_many_as_they_should_be() {
    for (d, g, k) in [(64, 2, 2145), (8, 4, 495), (4, 6, 210), (5, 0, 1)] {
        assert_eq!(feature_count(d, g), Some(k));
        assert_eq!(Powers::new(d, g).steps.len() as u64 + 1, k);
    }
    assert_eq!(feature_count(1 << 40, 40), None);
    // (x·y) up to the degree.
    let (powers, x, y) = (Powers::new(3, 4), [0.3, -0.5, 0.9], [1.1, 0.2, -0.4]);
    let product = dot(&powers.of(&x, 1.0), &powers.of(&y, 1.0));
    let s: f64 = dot(&x, &y);
    assert!((product - (1.0 + s + s * s / 2.0 + s.powi(3) / 6.0 + s.powi(4) / 24.0)).abs() < 1e-14);
}

#[test]
fn centred_keys_change_nothing_but_scores() -> Result<()> {
    let mut rng = rng();
    let mut own = Drawn::new(&mut rng, (20, 4), None);
    own.k.iter_mut().for_each(|k| *k += 3.0);
    let before = own.head().exact(&own.up, 8)?;
    let keys = centred(&own.k, 4);
    let head = Head { k: &keys, ..own.head() };
    let after = head.exact(&own.up, 8)?;
    assert!(apart(&before.output, &after.output) < 1e-12 && apart(&before.q, &after.q) < 1e-12);
    assert!(head.largest_score() < own.head().largest_score());
    Ok(())
}

#[test]
fn errors_fall_with_the_degree_and_rise_with_scores() -> Result<()> {
    let mut rng = rng();
    let own = Drawn::new(&mut rng, (40, 3), Some(1.0));
    let off = |degree: usize, factor: f64| {
        let q: Vec<f64> = own.q.iter().map(|q| q * factor).collect();
        let head = Head { q: &q, ..own.head() };
        Ok::<f64, candle_core::Error>(apart(&head.exact(&own.up, 8)?.q, &head.chained(&own.up, degree)?.q))
    };
    let by_degree = [off(2, 1.0)?, off(4, 1.0)?, off(6, 1.0)?, off(8, 1.0)?];
    assert!(by_degree.windows(2).all(|two| two[1] < 0.2 * two[0]), "{by_degree:?}");
    let by_score = [off(3, 0.25)?, off(3, 0.5)?, off(3, 1.0)?];
    assert!(by_score.windows(2).all(|two| two[1] > 4.0 * two[0]), "{by_score:?}");
    // The least k rises with τ, and at a width of 64 nothing but degree 2 is small.
    let least = [0.01, 0.1, 0.5, 1.0, 2.0].map(|tau| least_degree(tau, 1e-3, 64).unwrap());
    assert!(least.is_sorted() && least[0] < least[4], "{least:?}");
    assert_eq!(least_degree(500.0, 1e-3, 64), None);
    assert!(relative_error(3.0, 1).is_none());
    let far = own.head().chained(&own.up, 40).is_err() || feature_count(3, 40).unwrap() < 20_000;
    assert!(far);
    assert!(Head { width: 64, ..Drawn::new(&mut rng, (1, 64), None).head() }.chained(&[0.0; 64], 12).is_err());
    Ok(())
}

/// G_A and G_B are central differences of Σ dO·O through y = x (W + s B A)ᵀ as queries.
#[test]
fn factors_have_their_gradients() -> Result<()> {
    let mut rng = rng();
    let (rows, inputs, d, r, s) = (9, 5, 4, 2, 1.7);
    let mut draw = |shape: (usize, usize)| {
        let data: Vec<f64> = (0..shape.0 * shape.1).map(|_| rng.random_range(-0.6..0.6)).collect();
        Tensor::from_vec(data, shape, &Device::Cpu)
    };
    let (x, w, a, b) = (draw((rows, inputs))?, draw((d, inputs))?, draw((r, inputs))?, draw((d, r))?);
    let own = Drawn::new(&mut self::rng(), (rows, d), None);
    let numbers = |t: &Tensor| t.flatten_all()?.to_vec1::<f64>();
    let queries = |a: &Tensor, b: &Tensor| numbers(&x.matmul(&(&w + (b.matmul(a)? * s)?)?.t()?)?);
    let value = |a: &Tensor, b: &Tensor| {
        let q = queries(a, b)?;
        Ok::<f64, candle_core::Error>(dot(&own.up, &Head { q: &q, ..own.head() }.exact(&own.up, 4)?.output))
    };
    let q = queries(&a, &b)?;
    let head = Head { q: &q, ..own.head() };
    for (dq, tolerance) in [(head.exact(&own.up, 4)?.q, 1e-8), (head.chained(&own.up, 9)?.q, 1e-6)] {
        let dq = Tensor::from_vec(dq, (rows, d), &Device::Cpu)?;
        let (of_a, of_b) = low_rank_gradients((&dq, &x), (&a, &b, s))?;
        for (which, t, found) in [(0, &a, of_a), (1, &b, of_b)] {
            let (plain, found) = (numbers(t)?, numbers(&found)?);
            for i in 0..plain.len() {
                let moved = |by: f64| {
                    let mut other = plain.clone();
                    other[i] += by;
                    let other = Tensor::from_vec(other, t.dims2()?, &Device::Cpu)?;
                    if which == 0 { value(&other, &b) } else { value(&a, &other) }
                };
                let slope = (moved(1e-5)? - moved(-1e-5)?) / 2e-5;
                assert!((slope - found[i]).abs() < tolerance, "{slope} and {}", found[i]);
            }
        }
    }
    Ok(())
}

#[test]
fn chained_costs_grow_with_the_length_and_exact_ones_with_its_square() {
    let (exact, chained) = operations(4096, 4, feature_count(4, 2).unwrap(), false);
    let (more, linear) = operations(8192, 4, feature_count(4, 2).unwrap(), false);
    assert!((more / exact - 4.0).abs() < 1e-9 && (linear / chained - 2.0).abs() < 1e-9);
    assert!(chained < exact && operations(4096, 64, feature_count(64, 2).unwrap(), false).1 > exact);
}
