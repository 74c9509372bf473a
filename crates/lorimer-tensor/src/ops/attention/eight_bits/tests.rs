//! Against the reference form over the rounded numbers, and the rounding itself.

use candle_core::{DType, Device};

use super::super::edges::{EdgeKeys, EdgeRule, attention_edges, edges_in_pool};
use super::super::{AttentionForm, Mask, Segment, attention_in_pool, attention_reference};
use super::*;
use crate::check::{assert_close, random};

/// A pool of `rows` keys and as many values after them, and the numbers that stand there for each.
fn pool_of(k: &Tensor, v: &Tensor, d: usize, more: usize) -> Result<(Vec<f32>, usize, [Tensor; 2])> {
    let (rows, width) = k.dims2()?;
    let heads = width / d;
    let stride = KeyDtype::Int8.row(heads, d) + more;
    // What was there before does not matter.
    let mut pool = vec![f32::NAN; 2 * rows * stride];
    store_rows_in_8_bits((&mut pool, stride), (k, d), 0..rows)?;
    store_rows_in_8_bits((&mut pool, stride), (v, d), rows..2 * rows)?;
    let expanded = |first: usize| {
        let number = |row: usize, column: usize| {
            let row = &pool[(first + row) * stride..][..stride];
            let bytes = row[heads + column / 4].to_ne_bytes();
            f32::from(bytes[column % 4] as i8) * row[column / d]
        };
        let all: Vec<f32> = (0..rows * width).map(|i| number(i / width, i % width)).collect();
        Tensor::from_vec(all, (rows, width), &Device::Cpu)
    };
    let found = [expanded(0)?, expanded(rows)?];
    Ok((pool, stride, found))
}

fn numbers(t: &Tensor) -> Result<Vec<f32>> {
    t.flatten_all()?.to_vec1()
}

#[test]
fn a_number_is_within_half_a_step_of_its_heads_largest() -> Result<()> {
    for (d, heads) in [(1, 3), (5, 1), (8, 2), (64, 3), (80, 2)] {
        // Heads of very different sizes, which do not disturb each other.
        let sizes: Vec<f32> = (0..heads * d).map(|i| 100f32.powi((i / d) as i32)).collect();
        let x = random((9, heads * d), 1, DType::F32)?.broadcast_mul(&Tensor::new(sizes, &Device::Cpu)?)?;
        let (_, _, [found, _]) = pool_of(&x, &x, d, 0)?;
        for (x, found) in numbers(&x)?.chunks(d).zip(numbers(&found)?.chunks(d)) {
            let largest = x.iter().fold(0f32, |most, x| most.max(x.abs()));
            for (x, found) in x.iter().zip(found) {
                assert!((x - found).abs() <= largest / 254.0 * 1.001, "{x} became {found} beside {largest}");
            }
        }
    }
    Ok(())
}

/// Nothing, the smallest numbers and very large ones; what is not finite stays so, in its own head.
#[test]
fn extreme_numbers_are_rounded_as_others_are() -> Result<()> {
    let rows: Vec<f32> = [[0.0, -0.0], [1e-45, -1e-45], [3e38, -3e38], [f32::INFINITY, 1.0], [1.0, f32::NAN]].concat();
    let x = Tensor::from_vec([rows.as_slice(), &[3.0; 10]].concat(), (2, 10), &Device::Cpu)?;
    let (_, _, [found, _]) = pool_of(&x, &x, 2, 0)?;
    let found = numbers(&found)?;
    assert_eq!(found[..4], [0.0; 4]);
    assert!((found[4] / 3e38 - 1.0).abs() < 1e-6 && (found[5] / 3e38 + 1.0).abs() < 1e-6, "{found:?}");
    assert!(found[6..10].iter().all(|x| !x.is_finite()), "{found:?}");
    assert!(found[10..].iter().all(|x| (x - 3.0).abs() < 1e-6), "{found:?}");
    Ok(())
}

/// Few queries and many, masks and caps, more keys than a tile has, in pages in no order, with rows that are wider than they need be.
#[test]
fn equals_the_reference_over_the_rounded_numbers() -> Result<()> {
    let forms = [(Mask::Causal, None), (Mask::Window(3), None), (Mask::Window(70), Some(0.7)), (Mask::Full, None)];
    for (d, kv_heads, group) in [(4, 2, 2), (64, 3, 3), (80, 1, 7)] {
        let (k, v) = (random((700, kv_heads * d), 2, DType::F32)?, random((700, kv_heads * d), 3, DType::F32)?);
        let (pool, stride, [k, v]) = pool_of(&k, &v, d, 3)?;
        let pool = KeyPool { numbers: &pool, stride, width: kv_heads * d, values_at: 700, dtype: KeyDtype::Int8 };
        let paged = (0..20).rev().map(|page| (32 * page, 16 + page % 2)).collect();
        let segments = [
            Segment { q_start: 0, q_len: 90, keys: vec![(0, 600)] },
            Segment { q_start: 90, q_len: 1, keys: paged },
            Segment { q_start: 91, q_len: 4, keys: vec![(600, 20), (3, 50)] },
            Segment { q_start: 95, q_len: 5, keys: vec![(7, 5)] },
            Segment { q_start: 101, q_len: 1, keys: vec![(699, 1)] },
        ];
        let q = random((102, kv_heads * group * d), 1, DType::F32)?;
        for (mask, cap) in forms {
            let form = AttentionForm { head_dim: d, scale: 0.4, mask, cap };
            let fast = attention_in_pool(&q, pool, &segments, &form)?;
            let slow = attention_reference((&q, &k, &v), &segments, &form)?;
            // The reference has no rows for what no segment covers.
            let covered = Tensor::cat(&[fast.narrow(0, 0, 100)?, fast.narrow(0, 101, 1)?], 0)?;
            assert_close(&covered, &slow, 1e-5)?;
            // Alone, a sequence gives the same bits.
            for s in &segments {
                let alone =
                    attention_in_pool(&q, pool, std::slice::from_ref(s), &form)?.narrow(0, s.q_start, s.q_len)?;
                assert_eq!(numbers(&alone)?, numbers(&fast.narrow(0, s.q_start, s.q_len)?)?);
            }
            if mask != Mask::Full {
                let rule = EdgeRule { above: 0.1, keys: EdgeKeys::All };
                let (found, expected) = (
                    edges_in_pool(&q, pool, &segments, &form, rule)?,
                    attention_edges((&q, &k), &segments, &form, rule)?,
                );
                assert_eq!((&found.offsets, &found.columns), (&expected.offsets, &expected.columns));
                assert_eq!(numbers(&found.sums)?, numbers(&expected.sums)?);
            }
        }
    }
    Ok(())
}

#[test]
fn a_pool_that_does_not_fit_is_refused() -> Result<()> {
    let x = random((2, 8), 1, DType::F32)?;
    let mut pool = vec![0f32; 16];
    assert_eq!((KeyDtype::Int8.row(2, 4), KeyDtype::Int8.row(3, 64), KeyDtype::F32.row(3, 64)), (4, 51, 192));
    store_rows_in_8_bits((&mut pool, 4), (&x, 4), [3, 0].into_iter())?;
    for (stride, d, to) in
        [(4, 4, vec![0, 4]), (4, 4, vec![0]), (3, 4, vec![0, 1]), (4, 3, vec![0, 1]), (4, 0, vec![0, 1])]
    {
        assert!(store_rows_in_8_bits((&mut pool, stride), (&x, d), to.into_iter()).is_err(), "{stride} {d}");
    }
    let form = AttentionForm::causal(4, 0.5);
    let one = [Segment { q_start: 0, q_len: 1, keys: vec![(0, 1)] }];
    let asked = |stride, width, values_at, dtype| {
        let pool = KeyPool { numbers: &pool, stride, width, values_at, dtype };
        let rule = EdgeRule { above: 0.1, keys: EdgeKeys::All };
        let q = x.narrow(0, 0, 1)?;
        let edges = edges_in_pool(&q, pool, &one, &form, rule).is_ok();
        Ok::<_, candle_core::Error>((attention_in_pool(&q, pool, &one, &form).is_ok(), edges))
    };
    assert_eq!(asked(4, 8, 2, KeyDtype::Int8)?, (true, true));
    for (stride, width, dtype) in
        [(3, 8, KeyDtype::Int8), (0, 8, KeyDtype::Int8), (4, 6, KeyDtype::Int8), (4, 8, KeyDtype::F32)]
    {
        assert_eq!(asked(stride, width, 2, dtype)?, (false, false), "{stride} {width}");
    }
    assert!(!asked(4, 8, 5, KeyDtype::Int8)?.0 && !asked(4, 8, 4, KeyDtype::Int8)?.0);
    Ok(())
}
