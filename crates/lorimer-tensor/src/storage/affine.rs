//! Weights of 4 bits with a scale and a zero point a group of inputs: what GPTQ and AWQ keep.
//!
//! `w = s·(q − z)` with q and z whole numbers and s in half precision, all of a group of inputs of one output. Inputs are grouped one after
//! the other, or each has its group's number (GPTQ's `desc_act`).

use std::ops::Range;

use candle_core::Result;
use half::f16;

use crate::storage::bits;

/// A matrix (outputs, inputs) in 4 bits.
#[derive(Debug, Clone)]
pub struct Affine {
    shape: (usize, usize),
    /// Two inputs a byte, the first in the upper half; every row starts a byte.
    codes: Vec<u8>,
    /// (outputs, groups).
    scales: Vec<f16>,
    /// (outputs, groups), up to 16.
    zeros: Vec<u8>,
    groups: usize,
    /// Inputs of a group, where they stand one after the other.
    group: usize,
    /// The group of each input, where they do not.
    order: Option<Vec<u32>>,
}

/// Bytes that a matrix (outputs, inputs) of so many groups takes.
pub fn bytes((outputs, inputs): (usize, usize), groups: usize, ordered: bool) -> usize {
    outputs * inputs.div_ceil(2) + outputs * groups * 3 + if ordered { inputs * 4 } else { 0 }
}

impl Affine {
    /// Puts the parts together: `codes(output, input)` below 16; scales and zero points (outputs, groups); inputs of a group, or the group of
    /// each input.
    ///
    /// # Errors
    ///
    /// Fails if lengths do not fit the shape and each other, or if a group's number is too large.
    pub fn new(
        (outputs, inputs): (usize, usize),
        code: impl Fn(usize, usize) -> u8,
        (scales, zeros): (Vec<f16>, Vec<u8>),
        (group, order): (usize, Option<Vec<u32>>),
    ) -> Result<Self> {
        let groups = scales.len().checked_div(outputs).unwrap_or(0);
        if scales.len() != outputs * groups || zeros.len() != scales.len() {
            candle_core::bail!("{} scales and {} zero points for {outputs} outputs", scales.len(), zeros.len());
        }
        match &order {
            _ if outputs == 0 => {}
            Some(order) if order.len() != inputs || order.iter().any(|&g| g as usize >= groups) => {
                candle_core::bail!(
                    "groups of {} inputs up to {:?}, {groups} groups of {inputs} inputs are there",
                    order.len(),
                    order.iter().max()
                );
            }
            None if group == 0 || inputs.div_ceil(group) != groups => {
                candle_core::bail!("{groups} groups of {group} inputs where there are {inputs} inputs");
            }
            _ => {}
        }
        let row_bytes = inputs.div_ceil(2);
        let mut codes = vec![0; outputs * row_bytes];
        let mut numbers = vec![0; inputs];
        for (output, codes) in codes.chunks_exact_mut(row_bytes.max(1)).enumerate() {
            numbers.iter_mut().enumerate().for_each(|(input, number)| *number = code(output, input));
            bits::pack(&numbers, 4, codes);
        }
        Ok(Self { shape: (outputs, inputs), codes, scales, zeros, groups, group, order })
    }

    /// (outputs, inputs).
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// Bytes taken.
    pub fn bytes(&self) -> usize {
        bytes(self.shape, self.groups, self.order.is_some())
    }

    /// Columns of a row as f32.
    pub(crate) fn expand(&self, row: usize, columns: Range<usize>, out: &mut [f32]) {
        let row_bytes = self.shape.1.div_ceil(2);
        let codes = &self.codes[row * row_bytes..][..row_bytes];
        let of = |group: usize| {
            let at = row * self.groups + group;
            (self.scales[at].to_f32(), f32::from(self.zeros[at]))
        };
        let out = &mut out[..columns.len()];
        if let Some(order) = &self.order {
            bits::each(codes, 4, columns.start, columns.len(), |i, code| {
                let (scale, zero) = of(order[columns.start + i] as usize);
                out[i] = scale * (f32::from(code) - zero);
            });
            return;
        }
        let mut done = 0;
        while done < out.len() {
            let at = columns.start + done;
            let count = (self.group - at % self.group).min(out.len() - done);
            let (scale, zero) = of(at / self.group);
            let out = &mut out[done..][..count];
            bits::each(codes, 4, at, count, |i, code| out[i] = scale * (f32::from(code) - zero));
            done += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// To be seen to fail: `at % self.group` left out.
    #[test]
    fn groups_are_found_from_anywhere() -> Result<()> {
        let (outputs, inputs, group) = (3, 11, 4);
        let scales: Vec<f16> = (0..9).map(|i| f16::from_f32(0.5 + i as f32)).collect();
        let zeros: Vec<u8> = (0..9).map(|i| i as u8 * 2 % 17).collect();
        let code = |o: usize, i: usize| ((o * 5 + i * 7) % 16) as u8;
        let mixed: Vec<u32> = (0..inputs as u32).map(|i| i * 2 % 3).collect();
        for order in [None, Some(mixed)] {
            let affine = Affine::new((outputs, inputs), code, (scales.clone(), zeros.clone()), (group, order.clone()))?;
            assert_eq!(affine.bytes(), bytes((outputs, inputs), 3, order.is_some()));
            for o in 0..outputs {
                for start in 0..inputs {
                    let mut row = vec![0f32; inputs - start];
                    affine.expand(o, start..inputs, &mut row);
                    for (i, found) in (start..inputs).zip(row) {
                        let g = order.as_ref().map_or(i / group, |order| order[i] as usize);
                        let expected =
                            scales[o * 3 + g].to_f32() * (f32::from(code(o, i)) - f32::from(zeros[o * 3 + g]));
                        assert_eq!(found, expected, "{o} {i}");
                    }
                }
            }
        }
        assert!(Affine::new((3, 11), code, (scales.clone(), zeros.clone()), (5, None)).is_ok());
        assert!(Affine::new((3, 11), code, (scales.clone(), zeros.clone()), (6, None)).is_err());
        assert!(Affine::new((3, 11), code, (scales, zeros), (4, Some(vec![3; 11]))).is_err());
        Ok(())
    }
}
