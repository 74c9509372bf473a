//! Attention against its reference form, and its gradients.

use super::*;
use crate::check::{assert_close, gradient_matches, random};
use proptest::prelude::*;

fn packed(lengths: &[(usize, usize)]) -> (Vec<Segment>, usize, usize) {
    let (mut q, mut k, mut segments) = (0, 0, Vec::new());
    for &(q_len, cached) in lengths {
        segments.push(Segment { q_start: q, q_len, keys: vec![(k, q_len + cached)] });
        q += q_len;
        k += q_len + cached;
    }
    (segments, q, k)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn equals_the_reference(
        lengths in prop::collection::vec((1usize..90, 0usize..9), 1..4),
        group in 1usize..4,
        kv_heads in 1usize..3,
    ) {
        let (segments, rows, keys) = packed(&lengths);
        let d = 8;
        let q = random((rows, group * kv_heads * d), 1, DType::F32).unwrap();
        let k = random((keys, kv_heads * d), 2, DType::F32).unwrap();
        let v = random((keys, kv_heads * d), 3, DType::F32).unwrap();
        let fast = attention((&q, &k, &v), &segments, &AttentionForm::causal(d, 0.4)).unwrap();
        let slow = attention_reference((&q, &k, &v), &segments, &AttentionForm::causal(d, 0.4)).unwrap();
        assert_close(&fast, &slow, 1e-5).unwrap();
    }
}

/// Keys and values of two sequences in pages of four, in no order.
#[test]
fn a_pool_gives_what_the_reference_gives() -> Result<()> {
    let (d, kv_width, page) = (8, 16, 4);
    let pool = random((10 * 2 * page, kv_width), 4, DType::F32)?;
    let keys = |pages: &[usize], mut n: usize| {
        let mut spans = Vec::new();
        for p in pages {
            spans.push((p * 2 * page, n.min(page)));
            n -= n.min(page);
        }
        spans
    };
    let segments = [
        Segment { q_start: 0, q_len: 1, keys: keys(&[7, 2, 9], 10) },
        Segment { q_start: 1, q_len: 6, keys: keys(&[3, 0], 7) },
        Segment { q_start: 7, q_len: 3, keys: keys(&[5, 1], 8) },
    ];
    let q = random((10, 32), 5, DType::F32)?;
    let values = pool.narrow(0, page, 10 * 2 * page - page)?;
    let keys = pool.narrow(0, 0, 10 * 2 * page - page)?;
    let slow = attention_reference((&q, &keys, &values), &segments, &AttentionForm::causal(d, 0.3))?;
    let numbers = pool.flatten_all()?.to_vec1::<f32>()?;
    let fast = attention_in_pool(
        &q,
        KeyPool { numbers: &numbers, stride: kv_width, width: kv_width, values_at: page, dtype: KeyDtype::F32 },
        &segments,
        &AttentionForm::causal(d, 0.3),
    )?;
    assert_close(&fast, &slow, 1e-5)
}

/// Single queries as decoding has them: heads that share keys together and each by itself, widths of one register and of several.
#[test]
fn one_query_gives_what_the_reference_gives() -> Result<()> {
    for (d, group, sequences) in [(8, 2, 5), (16, 3, 5), (64, 3, 6), (80, 7, 4), (128, 1, 2), (64, 3, 1)] {
        let lengths: Vec<_> = (0..sequences).map(|i| (1 + i % 2, 9 * i)).collect();
        let (segments, rows, keys) = packed(&lengths);
        let q = random((rows, group * 2 * d), 1, DType::F32)?;
        let (k, v) = (random((keys, 2 * d), 2, DType::F32)?, random((keys, 2 * d), 3, DType::F32)?);
        let fast = attention((&q, &k, &v), &segments, &AttentionForm::causal(d, 0.4))?;
        assert_close(&fast, &attention_reference((&q, &k, &v), &segments, &AttentionForm::causal(d, 0.4))?, 1e-5)?;
        // Alone, a sequence gives the same bits.
        for s in &segments {
            let alone = attention((&q, &k, &v), std::slice::from_ref(s), &AttentionForm::causal(d, 0.4))?
                .narrow(0, s.q_start, s.q_len)?;
            let together = fast.narrow(0, s.q_start, s.q_len)?;
            assert_eq!(alone.flatten_all()?.to_vec1::<f32>()?, together.flatten_all()?.to_vec1::<f32>()?);
        }
    }
    Ok(())
}

#[test]
fn gradients_equal_central_differences() -> Result<()> {
    let (segments, rows, keys) = packed(&[(3, 0), (2, 2)]);
    let (d, heads, kv_heads) = (4, 2, 1);
    let q = random((rows, heads * d), 1, DType::F64)?;
    let k = random((keys, kv_heads * d), 2, DType::F64)?;
    let v = random((keys, kv_heads * d), 3, DType::F64)?;
    gradient_matches(&q, |q| attention((q, &k, &v), &segments, &AttentionForm::causal(d, 0.5)))?;
    gradient_matches(&k, |k| attention((&q, k, &v), &segments, &AttentionForm::causal(d, 0.5)))?;
    gradient_matches(&v, |v| attention((&q, &k, v), &segments, &AttentionForm::causal(d, 0.5)))
}

#[test]
fn gradients_flow_into_keys_that_two_segments_share() -> Result<()> {
    let segments = [
        Segment { q_start: 0, q_len: 2, keys: vec![(0, 2)] },
        Segment { q_start: 2, q_len: 1, keys: vec![(0, 3)] },
        Segment { q_start: 3, q_len: 1, keys: vec![(0, 2), (3, 1)] },
    ];
    let (q, k) = (random((4, 4), 1, DType::F64)?, random((4, 4), 2, DType::F64)?);
    let v = random((4, 4), 3, DType::F64)?;
    let fast = attention((&q, &k, &v), &segments, &AttentionForm::causal(4, 0.5))?;
    assert_close(&fast, &attention_reference((&q, &k, &v), &segments, &AttentionForm::causal(4, 0.5))?, 1e-12)?;
    gradient_matches(&k, |k| attention((&q, k, &v), &segments, &AttentionForm::causal(4, 0.5)))?;
    gradient_matches(&v, |v| attention((&q, &k, v), &segments, &AttentionForm::causal(4, 0.5)))
}

/// Windows, caps and all keys at once, of few queries and of many, with keys in several spans, forward and backward.
#[test]
fn masks_and_caps_equal_the_reference() -> Result<()> {
    let (d, heads, kv_heads) = (4, 4, 2);
    let forms = [Mask::Causal, Mask::Window(1), Mask::Window(3), Mask::Window(70), Mask::Full];
    for (mask, cap) in forms.into_iter().flat_map(|mask| [(mask, None), (mask, Some(0.7))]) {
        let form = AttentionForm { head_dim: d, scale: 0.9, mask, cap };
        let segments = [
            Segment { q_start: 0, q_len: 90, keys: vec![(0, 100)] },
            Segment { q_start: 90, q_len: 2, keys: vec![(0, 20), (100, 2)] },
            Segment { q_start: 92, q_len: 7, keys: vec![(102, 7)] },
        ];
        let q = random((99, heads * d), 1, DType::F64)?;
        let (k, v) = (random((109, kv_heads * d), 2, DType::F64)?, random((109, kv_heads * d), 3, DType::F64)?);
        let fast = attention((&q, &k, &v), &segments, &form)?;
        assert_close(&fast, &attention_reference((&q, &k, &v), &segments, &form)?, 1e-12)?;
        let some = [Segment { q_start: 0, q_len: 6, keys: vec![(0, 2), (3, 6)] }];
        let (q, k, v) = (q.narrow(0, 0, 6)?, k.narrow(0, 0, 9)?, v.narrow(0, 0, 9)?);
        gradient_matches(&q, |q| attention((q, &k, &v), &some, &form))?;
        gradient_matches(&k, |k| attention((&q, k, &v), &some, &form))?;
        gradient_matches(&v, |v| attention((&q, &k, v), &some, &form))?;
    }
    Ok(())
}

/// Queries of one sequence and keys of another, of which there are fewer.
#[test]
fn all_keys_may_be_fewer_than_queries() -> Result<()> {
    let form = AttentionForm { mask: Mask::Full, ..AttentionForm::causal(4, 0.5) };
    let segments = [Segment { q_start: 0, q_len: 9, keys: vec![(1, 3)] }];
    let (q, k) = (random((9, 8), 1, DType::F64)?, random((4, 4), 2, DType::F64)?);
    let v = random((4, 4), 3, DType::F64)?;
    let fast = attention((&q, &k, &v), &segments, &form)?;
    assert_close(&fast, &attention_reference((&q, &k, &v), &segments, &form)?, 1e-12)?;
    gradient_matches(&k, |k| attention((&q, k, &v), &segments, &form))
}

/// Keys that are narrower than the rows of their pool.
#[test]
fn a_pool_may_have_wider_rows_than_keys() -> Result<()> {
    let (d, width, stride) = (16, 32, 48);
    let pool = random((12, stride), 4, DType::F32)?;
    let numbers = pool.flatten_all()?.to_vec1::<f32>()?;
    let (keys, values) = (pool.narrow(0, 0, 6)?.narrow(1, 0, width)?, pool.narrow(0, 6, 6)?.narrow(1, 0, width)?);
    for (q_len, mask) in [(1, Mask::Causal), (2, Mask::Window(2)), (6, Mask::Causal), (6, Mask::Window(3))] {
        let form = AttentionForm { mask, ..AttentionForm::causal(d, 0.3) };
        let segments = [Segment { q_start: 0, q_len, keys: vec![(0, 2), (3, 3), (2, 1)] }];
        let q = random((q_len, 64), 5, DType::F32)?;
        let slow = attention_reference((&q, &keys.contiguous()?, &values.contiguous()?), &segments, &form)?;
        let pool = KeyPool { numbers: &numbers, stride, width, values_at: 6, dtype: KeyDtype::F32 };
        assert_close(&attention_in_pool(&q, pool, &segments, &form)?, &slow, 1e-5)?;
    }
    Ok(())
}
