//! Products in whole numbers.

#[cfg(any(test, doc))]
use std::ops::Range;

use rayon::prelude::*;

use super::{Form, PANEL, Panels, Rounded, portable};
#[cfg(target_arch = "x86_64")]
use super::{pairs, vnni};
use crate::kernels::portable::FUSED;
use crate::kernels::shared::Shared;

/// Panels of a task.
const TASK: usize = 2;

/// The processor's fastest form, and whether it takes pairs.
fn fastest() -> (Form, bool) {
    #[cfg(target_arch = "x86_64")]
    {
        if vnni::available() {
            return (vnni::panels, false);
        }
        if let Some(form) = pairs::best() {
            return (form, true);
        }
    }
    (portable::panels::<FUSED>, true)
}

/// Every form that the processor has: the reference form first, the portable one that is the same to the bit, and then those that round a product
/// and its addition once.
#[cfg(test)]
pub(super) fn forms() -> Vec<(Form, bool)> {
    let mut all: Vec<(Form, bool)> = vec![(plain, false), (portable::panels::<false>, true)];
    all.push((portable::panels::<true>, true));
    #[cfg(target_arch = "x86_64")]
    {
        if vnni::available() {
            all.push((vnni::panels, false));
        }
        all.extend(pairs::all().into_iter().map(|form| (form, true)));
    }
    all
}

/// `x Wᵀ` with x (rows, inputs) rounded, for weights of the same inputs; each (rows, outputs). A row's result does not depend on the
/// others.
pub(crate) fn products(x: &[f32], inputs: usize, weights: &[&Panels]) -> Vec<Vec<f32>> {
    products_by(x, inputs, weights, fastest())
}

/// As [`products`] by a form that the processor has, which takes pairs or not.
pub(super) fn products_by(x: &[f32], inputs: usize, weights: &[&Panels], (form, pairs): (Form, bool)) -> Vec<Vec<f32>> {
    let rows = x.len() / inputs.max(1);
    let rounded = Rounded::new(x, inputs, pairs);
    let mut outs: Vec<Vec<f32>> = weights.iter().map(|w| vec![0f32; rows * w.shape.0]).collect();
    let shared: Vec<Shared<f32>> = outs.iter_mut().map(|out| Shared(out.as_mut_ptr())).collect();
    let tasks: Vec<(usize, usize)> = weights
        .iter()
        .enumerate()
        .flat_map(|(i, w)| (0..w.shape.0.div_ceil(PANEL)).step_by(TASK).map(move |panel| (i, panel)))
        .collect();
    tasks.par_iter().with_max_len(1).for_each(|&(i, panel)| {
        assert!(
            weights[i].shape.1 == inputs && rounded.blocks == weights[i].blocks(),
            "product in whole numbers: shapes"
        );
        let panels = panel..(panel + TASK).min(weights[i].shape.0.div_ceil(PANEL));
        // SAFETY: the result has `rows` rows of `outputs` numbers; every task writes to its own panels' columns.
        unsafe { form(&rounded, weights[i], panels, shared[i].at(0)) };
    });
    outs
}

/// The reference form.
///
/// # Safety
/// `out` holds a row of the weight's outputs for each of `x`'s rows, and nobody else uses the panels' columns of it.
#[cfg(any(test, doc))]
pub(super) unsafe fn plain(x: &Rounded, weight: &Panels, panels: Range<usize>, out: *mut f32) {
    use super::BLOCK;

    let outputs = weight.shape.0;
    for output in panels.start * PANEL..(panels.end * PANEL).min(outputs) {
        for (row, (values, scales)) in x.bytes().chunks(x.blocks * 2 * BLOCK).zip(x.scales.chunks(x.blocks)).enumerate()
        {
            let mut sum = 0f32;
            for (b, (values, [s, offset])) in values.chunks_exact(2 * BLOCK).zip(scales).enumerate() {
                let (d, m, codes) = weight.unpack(output, b);
                let (first, second) = values.split_at(BLOCK);
                let sum_of =
                    |values: &[i8]| codes.iter().zip(values).map(|(&q, &p)| i32::from(q) * i32::from(p)).sum::<i32>();
                let whole = sum_of(first) * 256 + sum_of(second);
                sum += m * offset;
                sum += d * s * whole as f32;
            }
            // SAFETY: the caller's shapes.
            unsafe { *out.add(row * outputs + output) = sum };
        }
    }
}
