//! Losses, tensor rings, sparse changes, decompositions, bases and blocks, rows into a pool.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use lorimer_tensor::*;

use super::{assert_values, backward, matrix, product, transposed, values};

#[test]
fn losses_of_no_row_and_one() -> Result<()> {
    for rows in [0usize, 1, 3] {
        let targets: Vec<u32> = (0..rows as u32).collect();
        for dtype in [DType::F32, DType::F64] {
            let logits = matrix((rows, 5), 1, dtype)?;
            let of = |row: &[f64], target: usize| row.iter().map(|v| v.exp()).sum::<f64>().ln() - row[target];
            let expected: Vec<f64> = values(&logits)?.chunks(5).enumerate().map(|(i, row)| of(row, i)).collect();
            let found = values(&cross_entropy(&logits, &targets)?)?;
            assert_eq!(found.len(), rows);
            found.iter().zip(&expected).for_each(|(a, b)| assert!((a - b).abs() < 1e-5, "{a} for {b}"));
            let (x, head) = (matrix((rows, 6), 2, dtype)?, FrozenWeight::Dense(matrix((9, 6), 3, dtype)?));
            let tape = Tape::new([&x]);
            let loss = Ops::recorded(&tape).head_loss(&x, &head, &targets, 0.0)?;
            let w = values(&head.dense(DType::F64)?)?;
            let logits = product(&values(&x)?, &transposed(&w, (9, 6)), (rows, 6, 9));
            let expected: f64 = logits.chunks(9).enumerate().map(|(i, row)| of(row, i)).sum();
            assert!((values(&loss)?[0] - expected).abs() < 1e-4, "{rows} rows");
            assert_eq!(backward(tape, &loss, &[&x])?[0].dims(), [rows, 6]);
        }
    }
    Ok(())
}

#[test]
fn other_changes_of_no_row_and_one() -> Result<()> {
    for rows in [0usize, 1, 3, 40] {
        for dtype in [DType::F32, DType::F64] {
            let x = matrix((rows, 6), 1, dtype)?;
            let core = |n: usize, seed| matrix((n * n, 4), seed, dtype)?.reshape((n, n, 2, 2));
            let (first, second) = (core(2, 2)?, core(3, 3)?);
            let tape = Tape::new([&x, &first, &second]);
            let y = Ops::recorded(&tape).ring_transform(&x, &first, &second)?;
            let t = values(&lorimer_tensor::ops::ring::ring_matrix(&first, &second)?)?;
            let expected = product(&values(&x)?, &transposed(&t, (6, 6)), (rows, 6, 6));
            assert_values("ring", &y, (rows, 6), &expected, 1e-4)?;
            for (g, of) in backward(tape, &y, &[&x, &first, &second])?.iter().zip([&x, &first, &second]) {
                assert_eq!(g.dims(), of.dims());
            }
            for positions in [&[][..], &[7], &[0, 5, 23]] {
                let index = Arc::new(SparseIndex::new(positions, (4, 6))?);
                let entries = matrix((1, positions.len()), 4, dtype)?.reshape(positions.len())?;
                let tape = Tape::new([&x, &entries]);
                let y = Ops::recorded(&tape).sparse(&x, &entries, &index)?;
                let mut s = vec![0.0; 24];
                positions.iter().zip(values(&entries)?).for_each(|(&at, v)| s[at as usize] = v);
                let expected = product(&values(&x)?, &transposed(&s, (4, 6)), (rows, 6, 4));
                assert_values("sparse", &y, (rows, 4), &expected, 1e-4)?;
                for (g, of) in backward(tape, &y, &[&x, &entries])?.iter().zip([&x, &entries]) {
                    assert_eq!(g.dims(), of.dims());
                }
            }
        }
    }
    Ok(())
}

/// Matrices without rows or columns are decomposed or refused, and those of one number decomposed.
#[test]
fn decompositions_at_the_edges() -> Result<()> {
    for (rows, columns) in [(0, 0), (0, 3), (3, 0), (1, 1), (1, 4), (4, 1)] {
        let w = matrix((rows, columns), 1, DType::F64)?;
        let k = rows.min(columns);
        let rebuilt = |u: &Tensor, v: &Tensor, what: &str| -> Result<()> {
            let product = product(&values(u)?, &values(v)?, (rows, k, columns));
            assert_eq!((u.dims(), v.dims()), (&[rows, k][..], &[k, columns][..]), "{what}");
            product.iter().zip(values(&w)?).for_each(|(a, b)| assert!((a - b).abs() < 1e-9, "{what}: {a} for {b}"));
            Ok(())
        };
        let (u, s, vt) = linalg::svd(&w)?;
        let s = values(&s)?;
        let scaled: Vec<f64> = values(&vt)?.iter().enumerate().map(|(i, v)| v * s[i / columns]).collect();
        rebuilt(&u, &Tensor::from_vec(scaled, vt.shape(), &Device::Cpu)?, "svd")?;
        let (q, r) = linalg::qr(&w)?;
        rebuilt(&q, &r, "qr")?;
        let (l, upper) = linalg::lu(&w)?;
        rebuilt(&l, &upper, "lu")?;
        let (u, s, vt) = linalg::truncated_svd(&w, k)?;
        let s = values(&s)?;
        let scaled: Vec<f64> = values(&vt)?.iter().enumerate().map(|(i, v)| v * s[i / columns]).collect();
        rebuilt(&u, &Tensor::from_vec(scaled, vt.shape(), &Device::Cpu)?, "truncated svd")?;
        assert_eq!(linalg::pinv(&w, 1e-12)?.dims(), [columns, rows]);
        assert!(linalg::truncated_svd(&w, k + 1).is_err());
        let square = matrix((columns, columns), 2, DType::F64)?;
        let symmetric = (&square + square.t()?)?;
        assert_eq!(linalg::eigh(&symmetric)?.0.len(), columns);
        assert_eq!(linalg::product_singular_values(&w, &w.t()?.contiguous()?)?.len(), k);
    }
    Ok(())
}

#[test]
fn bases_and_blocks_at_the_edges() -> Result<()> {
    for (r, n, width) in [(0, 0, 0), (1, 0, 3), (0, 2, 3), (2, 2, 0), (1, 1, 1), (2, 3, 5)] {
        let (a, l, g) =
            (matrix((r, width), 1, DType::F64)?, matrix((r, n), 2, DType::F64)?, matrix((n, width), 3, DType::F64)?);
        let y = scaled_bases(&a, &l, &g)?;
        let (a, l, g) = (values(&a)?, values(&l)?, values(&g)?);
        let of = |at: usize| {
            let (row, c) = (at / width, at % width);
            a[row / n * width + c] * l[row] * g[row % n * width + c]
        };
        let expected: Vec<f64> = (0..r * n * width).map(of).collect();
        assert_values("bases", &y, (r * n, width), &expected, 1e-12)?;
    }
    for (n, r, inputs) in [(0, 1, 4), (1, 1, 1), (1, 1, 0), (2, 1, 3), (2, 2, 0), (1, 2, 4)] {
        let w = matrix((n * r, inputs), 1, DType::F64)?;
        let blocks = matrix((n * r, r), 2, DType::F64)?.reshape((n, r, r))?;
        let (ws, b) = (values(&w)?, values(&blocks)?);
        let of = |at: usize| {
            let (row, column) = (at / inputs, at % inputs);
            let (i, k, c) = (row / r, column / r * r, column % r);
            let sum: f64 = (0..r).map(|d| ws[row * inputs + k + d] * b[(i * r + d) * r + c]).sum();
            ws[at] + sum + b[row * r + c]
        };
        let expected: Vec<f64> = (0..n * r * inputs).map(of).collect();
        assert_values("blocks", &block_affine(&w, &blocks)?, (n * r, inputs), &expected, 1e-12)?;
    }
    Ok(())
}

#[test]
fn rows_go_into_a_pool_or_are_refused() -> Result<()> {
    let mut pool = vec![0f32; 12];
    store_rows((&mut pool, 4), &matrix((0, 4), 1, DType::F32)?, [].into_iter())?;
    store_rows((&mut pool, 4), &matrix((1, 4), 1, DType::F32)?, [2].into_iter())?;
    assert!(pool[..8].iter().all(|&v| v == 0.0) && pool[8..].iter().all(|&v| v != 0.0));
    store_rows((&mut pool, 0), &matrix((3, 0), 1, DType::F32)?, [0, 1, 2].into_iter())?;
    assert!(store_rows((&mut pool, 4), &matrix((1, 4), 1, DType::F32)?, [3].into_iter()).is_err());
    assert!(store_rows((&mut [], 4), &matrix((1, 4), 1, DType::F32)?, [0].into_iter()).is_err());
    Ok(())
}
