//! The block-affine weight: W'ᵢⱼ = Wᵢⱼ (I + bᵢ) + bᵢ on the r × r blocks of W (Bone, arXiv 2409.15371, section 3.2), whose backward reduces
//! the gradient of W' to dbᵢ = Σⱼ (Wᵢⱼ + I)ᵀ gᵢⱼ. W is frozen.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, WithDType};

use crate::kernels::products::{Product, Right, Term, run};
use crate::kernels::real::Real;
use crate::kernels::slices::{slice, with_slices};

/// `weight` (outputs, inputs) and `blocks` (outputs/r, r, r) of one type → (outputs, inputs). The gradient flows to `blocks` only.
pub fn block_affine(weight: &Tensor, blocks: &Tensor) -> Result<Tensor> {
    let ((outputs, inputs), (n, r, columns)) = (weight.dims2()?, blocks.dims3()?);
    if r != columns || n * r != outputs || !inputs.is_multiple_of(r.max(1)) {
        candle_core::bail!(
            "block-affine weight: W is ({outputs}, {inputs}), the blocks {:?}; expected (outputs/r, r, r)",
            blocks.dims()
        );
    }
    if !weight.device().is_cpu() {
        return block_affine_reference(weight, blocks);
    }
    blocks.contiguous()?.apply_op1(BlockAffine { weight: weight.contiguous()? })
}

/// The reference form out of plain candle operations.
pub fn block_affine_reference(weight: &Tensor, blocks: &Tensor) -> Result<Tensor> {
    let ((_, inputs), (n, r, _)) = (weight.dims2()?, blocks.dims3()?);
    // Row i·r + a of W holds the rows a of the blocks (i, 0), (i, 1), … one after the other, so W b is a product per i.
    let pieces = inputs / r;
    let moved = weight.reshape((n, r * pieces, r))?.matmul(blocks)?.reshape((n, r, pieces, r))?;
    let moved = moved.broadcast_add(&blocks.unsqueeze(2)?)?;
    weight + moved.reshape((n * r, inputs))?
}

struct BlockAffine {
    weight: Tensor,
}

impl BlockAffine {
    fn forward<T: Real>(&self, blocks: &[T]) -> Result<Vec<T>> {
        let (outputs, inputs) = self.weight.dims2()?;
        if outputs * inputs == 0 {
            return Ok(Vec::new());
        }
        let r = blocks.len() / outputs;
        with_slices([&self.weight], |[w]: [&[T]; 1]| {
            let products = w
                .chunks(r * inputs)
                .zip(blocks.chunks(r * r))
                .map(|(w, b)| Product::new((w.len() / r, r), vec![Term::backward(w, r, Right::Slice(b, r))]));
            let mut out = run(products.collect())?.concat();
            for (row, (out, w)) in out.chunks_mut(inputs).zip(w.chunks(inputs)).enumerate() {
                let b = &blocks[row * r..][..r];
                for (out, w) in out.chunks_mut(r).zip(w.chunks(r)) {
                    out.iter_mut().zip(w.iter().zip(b)).for_each(|(out, (&w, &b))| *out += w + b);
                }
            }
            Ok(out)
        })
    }

    fn backward<T: Real>(&self, blocks: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let (inputs, r) = (self.weight.dim(1)?, blocks.dim(1)?);
        if self.weight.elem_count() == 0 {
            return blocks.zeros_like();
        }
        with_slices([&self.weight, grad], |[w, g]: [&[T]; 2]| {
            let products = w
                .chunks(r * inputs)
                .zip(g.chunks(r * inputs))
                .map(|(w, g)| Product::new((r, r), vec![Term::outer(w, (w.len() / r, r), Right::Slice(g, r))]));
            let mut db = run(products.collect())?.concat();
            for (row, g) in g.chunks(inputs).enumerate() {
                let db = &mut db[row * r..][..r];
                g.chunks(r).for_each(|g| db.iter_mut().zip(g).for_each(|(db, &g)| *db += g));
            }
            Tensor::from_vec(db, blocks.shape(), blocks.device())
        })
    }
}

impl CustomOp1 for BlockAffine {
    fn name(&self) -> &'static str {
        "block-affine"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let storage = match storage {
            CpuStorage::F32(_) => f32::to_cpu_storage_owned(self.forward(slice::<f32>(storage, layout)?)?),
            CpuStorage::F64(_) => f64::to_cpu_storage_owned(self.forward(slice::<f64>(storage, layout)?)?),
            _ => candle_core::bail!("block-affine weight: f32 or f64 expected"),
        };
        Ok((storage, self.weight.shape().clone()))
    }

    fn bwd(&self, blocks: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(match grad.dtype() {
            DType::F64 => self.backward::<f64>(blocks, grad)?,
            _ => self.backward::<f32>(blocks, grad)?,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{assert_close, gradient_matches, random};

    #[test]
    fn equals_the_reference_and_central_differences() -> Result<()> {
        let (w, b) = (random((6, 9), 1, DType::F64)?, random((2, 3, 3), 2, DType::F64)?);
        assert_close(&block_affine(&w, &b)?, &block_affine_reference(&w, &b)?, 1e-13)?;
        gradient_matches(&b, |b| block_affine(&w, b))
    }
}
