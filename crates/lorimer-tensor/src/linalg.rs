//! Dense decompositions by `faer`, in f64 (initialisations and adapter algebra are done once,
//! so accuracy comes before speed).

use candle_core::{DType, Device, Result, Tensor};
use faer::Mat;

use crate::NotFinite;

fn to_mat(t: &Tensor) -> Result<Mat<f64>> {
    let (rows, columns) = t.dims2()?;
    let data = t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    if data.iter().any(|v| !v.is_finite()) {
        let message = format!("a matrix of shape ({rows}, {columns}) holds values that are not finite");
        return Err(NotFinite::error(message));
    }
    Ok(Mat::from_fn(rows, columns, |i, j| data[i * columns + j]))
}

fn to_tensor(m: faer::MatRef<'_, f64>) -> Result<Tensor> {
    let (rows, columns) = (m.nrows(), m.ncols());
    let data: Vec<f64> = (0..rows).flat_map(|i| (0..columns).map(move |j| m[(i, j)])).collect();
    Tensor::from_vec(data, (rows, columns), &Device::Cpu)
}

/// Thin singular value decomposition `W = U diag(S) Vᵀ` of (m, n): U (m, k), S (k), Vᵀ (k, n), k = min(m, n),
/// singular values falling; f64.
pub fn svd(w: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
    let decomposition = to_mat(w)?.thin_svd().map_err(|e| candle_core::Error::Msg(format!("svd: {e:?}")))?;
    let s: Vec<f64> = decomposition.S().column_vector().iter().copied().collect();
    let k = s.len();
    Ok((
        to_tensor(decomposition.U())?,
        Tensor::from_vec(s, k, &Device::Cpu)?,
        to_tensor(decomposition.V())?.t()?.contiguous()?,
    ))
}

/// Thin QR decomposition `W = Q R` of (m, n): Q (m, k), R (k, n), k = min(m, n); f64.
///
/// The signs are Householder's, as LAPACK and torch give them (R's diagonal is not made positive).
pub fn qr(w: &Tensor) -> Result<(Tensor, Tensor)> {
    let decomposition = to_mat(w)?.qr();
    Ok((to_tensor(decomposition.compute_thin_Q().as_ref())?, to_tensor(decomposition.thin_R())?))
}

/// The `k` largest singular triplets of (m, n): U (m, k), S (k), Vᵀ (k, n); f64, each pair's sign so that the largest number of a row of
/// Vᵀ is positive. They come from the eigenvectors of the smaller Gram matrix in f64, which is several times faster than a whole
/// decomposition and loses digits only in singular values below about 1e-8 of the largest.
pub fn truncated_svd(w: &Tensor, k: usize) -> Result<(Tensor, Tensor, Tensor)> {
    let w = w.to_dtype(DType::F64)?;
    let (m, n) = w.dims2()?;
    if k > m.min(n) {
        candle_core::bail!("svd: {k} singular triplets of a ({m}, {n}) matrix");
    }
    let wide = m <= n;
    let mat = to_mat(&if wide { w.clone() } else { w.t()?.contiguous()? })?;
    let gram = &mat * mat.transpose();
    let eigen =
        gram.self_adjoint_eigen(faer::Side::Lower).map_err(|e| candle_core::Error::Msg(format!("svd: {e:?}")))?;
    // Eigenvalues rise.
    let side = m.min(n);
    let u = Mat::from_fn(side, k, |i, j| eigen.U()[(i, side - 1 - j)]);
    let mut other = u.transpose() * &mat;
    let mut s = vec![0f64; k];
    let mut u = u;
    for j in 0..k {
        s[j] = (0..other.ncols()).map(|c| other[(j, c)] * other[(j, c)]).sum::<f64>().sqrt();
        // The rows of Vᵀ decide the sign.
        let row: Vec<f64> = match wide {
            true => (0..other.ncols()).map(|c| other[(j, c)]).collect(),
            false => (0..side).map(|i| u[(i, j)]).collect(),
        };
        let sign = row.iter().fold(0f64, |top, v| if v.abs() > top.abs() { *v } else { top }).signum();
        let scale = if s[j] > 0.0 { sign / s[j] } else { 0.0 };
        (0..other.ncols()).for_each(|c| other[(j, c)] *= scale);
        (0..side).for_each(|i| u[(i, j)] *= sign);
    }
    let s = Tensor::from_vec(s, k, &Device::Cpu)?;
    let (u, other) = (to_tensor(u.as_ref())?, to_tensor(other.as_ref())?);
    Ok(match wide {
        true => (u, s, other),
        false => (other.t()?.contiguous()?, s, u.t()?.contiguous()?),
    })
}

/// An orthonormal basis Q (m, k) of what the largest singular vectors of W (m, n) span, by subspace iteration (Halko et al. 2011, "Finding structure with
/// randomness", algorithm 4.4), and Qᵀ W (k, n); k the columns of `start` (n, k). Products are in the matrix's own type, the basis in f64.
pub fn leading_basis(w: &Tensor, start: &Tensor, iterations: usize) -> Result<(Tensor, Tensor)> {
    let dtype = w.dtype();
    let project = |q: &Tensor| q.t()?.contiguous()?.to_dtype(dtype)?.matmul(w);
    let (mut q, _) = qr(&w.matmul(&start.to_dtype(dtype)?)?)?;
    for _ in 0..iterations {
        let (z, _) = qr(&project(&q)?.t()?)?;
        (q, _) = qr(&w.matmul(&z.to_dtype(dtype)?)?)?;
    }
    let projected = project(&q)?;
    Ok((q, projected))
}

/// Eigenvalues (rising) of a symmetric matrix (n, n), and its eigenvectors as columns (n, n); f64.
pub fn eigh(t: &Tensor) -> Result<(Vec<f64>, Tensor)> {
    let mat = to_mat(t)?;
    if mat.nrows() != mat.ncols() {
        candle_core::bail!("eigenvalues of a ({}, {}) matrix", mat.nrows(), mat.ncols());
    }
    let eigen =
        mat.self_adjoint_eigen(faer::Side::Lower).map_err(|e| candle_core::Error::Msg(format!("eigen: {e:?}")))?;
    Ok((eigen.S().column_vector().iter().copied().collect(), to_tensor(eigen.U())?))
}

/// The upper triangular U (n, n) with a positive diagonal for which `H⁻¹ = Uᵀ U`, of a symmetric positive definite H (n, n); f64. H⁻¹ itself is not
/// computed: with `J` turning the order round, `J H J = L Lᵀ` gives `U = J L⁻¹ J`.
///
/// # Errors
///
/// Fails if H is not square, not finite or not positive definite.
pub fn inverse_cholesky(h: &Tensor) -> Result<Tensor> {
    let mat = to_mat(h)?;
    let n = mat.nrows();
    if n != mat.ncols() {
        candle_core::bail!("Cholesky of a ({n}, {}) matrix", mat.ncols());
    }
    let turned = Mat::from_fn(n, n, |i, j| mat[(n - 1 - i, n - 1 - j)]);
    let llt = turned.llt(faer::Side::Lower).map_err(|e| candle_core::Error::Msg(format!("Cholesky: {e:?}")))?;
    let mut inverse = Mat::zeros(n, n);
    let parallel = faer::get_global_parallelism();
    faer::linalg::triangular_inverse::invert_lower_triangular(inverse.as_mut(), llt.L(), parallel);
    let upper = Mat::from_fn(n, n, |i, j| if i <= j { inverse[(n - 1 - i, n - 1 - j)] } else { 0.0 });
    to_tensor(upper.as_ref())
}

/// P L U = W with partial pivoting, for (m, n) with k = min(m, n): rows of `L` (m, k) already in W's order (that is, P L), U (k, n);
/// f64. L's columns are unit lower triangular up to the permutation.
pub fn lu(w: &Tensor) -> Result<(Tensor, Tensor)> {
    let mat = to_mat(w)?;
    let decomposition = mat.partial_piv_lu();
    let (l, u) = (decomposition.L(), decomposition.U());
    let (_, inverse) = decomposition.P().arrays();
    let (m, n) = (mat.nrows(), mat.ncols());
    let k = m.min(n);
    let l = Mat::from_fn(m, k, |i, j| l[(inverse[i], j)]);
    Ok((to_tensor(l.as_ref())?, to_tensor(u)?))
}

/// The pseudo-inverse of (m, n), singular values below `rcond` times the largest taken as zero; f64.
pub fn pinv(w: &Tensor, rcond: f64) -> Result<Tensor> {
    let (u, s, vt) = svd(w)?;
    let s = s.to_vec1::<f64>()?;
    let limit = rcond * s.first().copied().unwrap_or(0.0);
    let inverse: Vec<f64> = s.iter().map(|&s| if s > limit { 1.0 / s } else { 0.0 }).collect();
    let inverse = Tensor::from_vec(inverse, s.len(), &Device::Cpu)?;
    vt.t()?.broadcast_mul(&inverse)?.matmul(&u.t()?.contiguous()?)
}

/// The `k` largest singular triplets of `B A` with B (m, r) and A (r, n), without forming the (m, n) product: QR of both, then the SVD of a
/// matrix of at most (r, r). U (m, k'), S (all min(m, r, n) of them, falling), Vᵀ (k', n) with k' = min(k, m, r, n); f64.
pub fn product_svd(b: &Tensor, a: &Tensor, k: usize) -> Result<(Tensor, Vec<f64>, Tensor)> {
    let (qb, rb) = qr(b)?;
    let (qa, ra) = qr(&a.t()?)?;
    let (u, s, vt) = svd(&rb.matmul(&ra.t()?.contiguous()?)?)?;
    let s = s.to_vec1::<f64>()?;
    let k = k.min(s.len());
    let u = qb.matmul(&u.narrow(1, 0, k)?.contiguous()?)?;
    let vt = vt.narrow(0, 0, k)?.contiguous()?.matmul(&qa.t()?.contiguous()?)?;
    Ok((u, s, vt))
}

/// About the `k` largest singular triplets of (m, n) where [`truncated_svd`] would take too long: U (m, k), S (k), Vᵀ (k, n); f64.
///
/// Subspace iteration on k + 10 random directions that `next` draws, until no singular value moves by more than 1e-5 of the largest, at most
/// 12 times (Halko et al. 2011, arXiv 0909.4061). Where singular values fall slowly the directions near the k-th are not exact; how much of
/// `w` is kept is hardly less than the most that is possible.
pub fn subspace_svd(w: &Tensor, k: usize, mut next: impl FnMut() -> f64) -> Result<(Tensor, Tensor, Tensor)> {
    let (m, n) = w.dims2()?;
    let side = m.min(n);
    if k > side {
        candle_core::bail!("svd: {k} singular triplets of a ({m}, {n}) matrix");
    }
    let width = (k + 10).min(side);
    let w = w.to_dtype(DType::F32)?;
    let start: Vec<f32> = (0..n * width).map(|_| next() as f32).collect();
    let mut columns = Tensor::from_vec(start, (n, width), &Device::Cpu)?;
    let orthonormal = |t: &Tensor| -> Result<Tensor> { qr(t)?.0.to_dtype(DType::F32) };
    let mut before: Vec<f64> = Vec::new();
    for _ in 0..12 {
        let rows = orthonormal(&w.matmul(&columns)?)?;
        let (q, r) = qr(&w.t()?.matmul(&rows)?)?;
        columns = q.to_dtype(DType::F32)?;
        let found = svd(&r)?.1.to_vec1::<f64>()?;
        let largest = found.first().copied().unwrap_or(0.0);
        let moved = found.iter().zip(&before).take(k).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        let still = !before.is_empty() && moved <= 1e-5 * largest;
        before = found;
        if still {
            break;
        }
    }
    // W V = U' S' V'ᵀ, so W is about U' S' (V V')ᵀ.
    let (u, s, vt) = svd_tall(&w.matmul(&columns)?)?;
    let vt = vt.matmul(&columns.t()?.to_dtype(DType::F64)?.contiguous()?)?;
    Ok((u.narrow(1, 0, k)?.contiguous()?, s.narrow(0, 0, k)?, vt.narrow(0, 0, k)?.contiguous()?))
}

/// [`svd`] of a matrix with many rows and few columns, by way of its QR.
fn svd_tall(w: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
    let (q, r) = qr(w)?;
    let (u, s, vt) = svd(&r)?;
    Ok((q.matmul(&u)?, s, vt))
}

/// Singular values of `B A` with B (m, r) and A (r, n), without forming the (m, n) product: QR of both, then
/// the SVD of a matrix of at most (r, r). Falling order, min(m, r, n) values.
pub fn product_singular_values(b: &Tensor, a: &Tensor) -> Result<Vec<f64>> {
    let (_, rb) = qr(b)?;
    let (_, ra) = qr(&a.t()?)?;
    let (_, s, _) = svd(&rb.matmul(&ra.t()?.contiguous()?)?)?;
    s.to_vec1::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{assert_close, random};

    #[test]
    fn svd_gives_the_matrix_back() -> Result<()> {
        for (m, n) in [(6, 4), (4, 6), (1, 3)] {
            let w = random((m, n), 1, DType::F64)?;
            let (u, s, vt) = svd(&w)?;
            assert_close(&u.broadcast_mul(&s)?.matmul(&vt)?, &w, 1e-12)?;
        }
        Ok(())
    }

    #[test]
    fn the_truncated_svd_is_the_svds_beginning() -> Result<()> {
        for (m, n) in [(9, 6), (6, 9), (5, 5)] {
            let w = random((m, n), 1, DType::F64)?;
            let (u, s, vt) = svd(&w)?;
            let (tu, ts, tvt) = truncated_svd(&w, 3)?;
            assert_close(&ts, &s.narrow(0, 0, 3)?, 1e-9)?;
            let best = |u: &Tensor, s: &Tensor, vt: &Tensor| u.broadcast_mul(s)?.matmul(vt);
            let expected = best(&u.narrow(1, 0, 3)?, &s.narrow(0, 0, 3)?, &vt.narrow(0, 0, 3)?)?;
            assert_close(&best(&tu, &ts, &tvt)?, &expected, 1e-9)?;
            assert_close(&tvt.matmul(&tvt.t()?)?, &Tensor::eye(3, DType::F64, &Device::Cpu)?, 1e-9)?;
            assert_close(&tu.t()?.matmul(&tu)?, &Tensor::eye(3, DType::F64, &Device::Cpu)?, 1e-9)?;
        }
        Ok(())
    }

    #[test]
    fn products_and_large_matrices_are_decomposed_as_the_whole_is() -> Result<()> {
        for (m, r, n) in [(9, 4, 6), (3, 5, 8), (40, 3, 30)] {
            let (b, a) = (random((m, r), 1, DType::F64)?, random((r, n), 2, DType::F64)?);
            let (u, s, vt) = svd(&b.matmul(&a)?)?;
            let (pu, ps, pvt) = product_svd(&b, &a, 2)?;
            assert_close(&Tensor::new(ps.clone(), &Device::Cpu)?, &s.narrow(0, 0, ps.len())?, 1e-10)?;
            let best = |u: &Tensor, s: &Tensor, vt: &Tensor| u.broadcast_mul(s)?.matmul(vt);
            let two = s.narrow(0, 0, 2)?;
            let expected = best(&u.narrow(1, 0, 2)?, &two, &vt.narrow(0, 0, 2)?)?;
            assert_close(&best(&pu, &two, &pvt)?, &expected, 1e-10)?;
            let mut state = 1u64;
            let next = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 40) as f64 / (1u64 << 24) as f64 - 0.5
            };
            let (su, ss, svt) = subspace_svd(&b.matmul(&a)?, 2, next)?;
            assert_close(&best(&su, &ss, &svt)?, &expected, 1e-4)?;
        }
        Ok(())
    }

    #[test]
    fn lu_and_pinv() -> Result<()> {
        for (m, n) in [(7, 4), (4, 7), (5, 5)] {
            let w = random((m, n), 1, DType::F64)?;
            let (l, u) = lu(&w)?;
            assert_close(&l.matmul(&u)?, &w, 1e-12)?;
            let p = pinv(&w, 1e-12)?;
            assert_close(&w.matmul(&p)?.matmul(&w)?, &w, 1e-10)?;
        }
        Ok(())
    }

    #[test]
    fn the_inverse_has_its_cholesky_factor() -> Result<()> {
        for n in [1, 2, 7, 40] {
            let x = random((2 * n, n), 1, DType::F64)?;
            let h = x.t()?.matmul(&x)?;
            let u = inverse_cholesky(&h)?;
            assert_close(&u.t()?.matmul(&u)?.matmul(&h)?, &Tensor::eye(n, DType::F64, &Device::Cpu)?, 1e-7)?;
            for (i, row) in u.to_vec2::<f64>()?.iter().enumerate() {
                assert!(row[i] > 0.0 && row[..i].iter().all(|v| *v == 0.0));
            }
        }
        assert!(inverse_cholesky(&Tensor::new(&[[1f64, 2.0], [2.0, 1.0]], &Device::Cpu)?).is_err());
        assert!(inverse_cholesky(&random((2, 3), 1, DType::F64)?).is_err());
        Ok(())
    }

    #[test]
    fn qr_gives_the_matrix_back_with_orthonormal_columns() -> Result<()> {
        let w = random((7, 3), 1, DType::F64)?;
        let (q, r) = qr(&w)?;
        assert_close(&q.matmul(&r)?, &w, 1e-12)?;
        assert_close(&q.t()?.matmul(&q)?, &Tensor::eye(3, DType::F64, &Device::Cpu)?, 1e-12)
    }

    #[test]
    fn singular_values_of_a_product() -> Result<()> {
        let (b, a) = (random((9, 3), 1, DType::F64)?, random((3, 7), 2, DType::F64)?);
        let (_, s, _) = svd(&b.matmul(&a)?)?;
        let expected = s.to_vec1::<f64>()?;
        for (x, y) in product_singular_values(&b, &a)?.iter().zip(expected) {
            assert!((x - y).abs() < 1e-10);
        }
        Ok(())
    }
}
