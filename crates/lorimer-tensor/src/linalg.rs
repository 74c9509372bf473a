//! Dense decompositions as thin calls on `faer`, in f64 (initialisations and adapter algebra are done once,
//! so accuracy comes before speed).

use candle_core::{DType, Device, Result, Tensor};
use faer::Mat;

fn to_mat(t: &Tensor) -> Result<Mat<f64>> {
    let (rows, columns) = t.dims2()?;
    let data = t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    if data.iter().any(|v| !v.is_finite()) {
        candle_core::bail!("a matrix of shape ({rows}, {columns}) holds values that are not finite");
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

/// Singular values of `B A` with B (m, r) and A (r, n), without forming the (m, n) product: QR of both, then
/// the SVD of an (r, r) matrix. Falling order, r values.
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
