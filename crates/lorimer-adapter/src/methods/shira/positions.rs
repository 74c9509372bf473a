//! Which entries of a weight: how masks choose them, and how a compact file says them.

use std::collections::HashSet;

use candle_core::{DType, Tensor};
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::error::Result;
use crate::methods::largest::largest_places;

/// The diagonal, then whole rows and columns in turn in a random order, until there are k.
pub(super) fn structured(k: usize, (outputs, inputs): (usize, usize), rng: &mut ChaCha8Rng) -> Vec<u32> {
    let (mut rows, mut columns): (Vec<usize>, Vec<usize>) = ((0..outputs).collect(), (0..inputs).collect());
    rows.shuffle(rng);
    columns.shuffle(rng);
    let at = |row: usize, column: usize| (row * inputs + column) as u32;
    let mut chosen: HashSet<u32> = HashSet::with_capacity(k);
    let mut take = |positions: &mut dyn Iterator<Item = u32>| {
        for p in positions {
            if chosen.len() < k {
                chosen.insert(p);
            }
        }
        chosen.len() < k
    };
    let mut going = take(&mut (0..outputs.min(inputs)).map(|i| at(i, i)));
    let (mut rows, mut columns) = (rows.into_iter(), columns.into_iter());
    while going {
        let (row, column) = (rows.next(), columns.next());
        if let Some(row) = row {
            going = take(&mut (0..inputs).map(|j| at(row, j)));
        }
        if let Some(column) = column.filter(|_| going) {
            going = take(&mut (0..outputs).map(|i| at(i, column)));
        }
        going &= row.is_some() || column.is_some();
    }
    chosen.into_iter().collect()
}

/// Flat positions of the k largest magnitudes; of equal ones the first.
pub(super) fn largest(t: &Tensor, k: usize) -> Result<Vec<u32>> {
    let values = t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    let magnitudes: Vec<f64> = values.into_iter().map(f64::abs).collect();
    Ok(largest_places(&magnitudes, k))
}

/// Rising positions as differences in groups of 7 bits, the lowest first.
pub fn encode(positions: &[u32]) -> Vec<u8> {
    let (mut bytes, mut before) = (Vec::with_capacity(positions.len()), 0);
    for &p in positions {
        let mut left = p - before;
        before = p;
        while left >= 0x80 {
            bytes.push(left as u8 | 0x80);
            left >>= 7;
        }
        bytes.push(left as u8);
    }
    bytes
}

/// What [`encode`] wrote, for a weight of `all` entries; None where the bytes are something else.
pub fn decode(bytes: &[u8], all: usize) -> Option<Vec<u32>> {
    let (mut positions, mut at, mut difference, mut shift) = (Vec::new(), 0u64, 0u64, 0u32);
    for &byte in bytes {
        difference |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 != 0 {
            shift += 7;
            if shift > 28 {
                return None;
            }
            continue;
        }
        if difference == 0 && !positions.is_empty() {
            return None;
        }
        at += difference;
        if at >= all as u64 {
            return None;
        }
        positions.push(at as u32);
        (difference, shift) = (0, 0);
    }
    (shift == 0).then_some(positions)
}

/// The width of a weight, then its rising positions: see [`encode`].
pub(super) fn compact(positions: &[u32], width: u32) -> Vec<u8> {
    let mut bytes = encode(&[width]);
    bytes.extend(encode(positions));
    bytes
}

/// What [`compact`] wrote: the width of the weight, or of that part of it which has entries, and positions in it.
pub(super) fn expand(bytes: &[u8]) -> Option<(u32, Vec<u32>)> {
    let end = bytes.iter().position(|b| b & 0x80 == 0)? + 1;
    let width = *decode(&bytes[..end], 1 << 31)?.first()?;
    decode(&bytes[end..], 1 << 31).filter(|_| width > 0).map(|positions| (width, positions))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use rand::SeedableRng;
    use rand::seq::index;

    use super::*;

    #[test]
    fn masks_have_their_counts_and_definitions() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let found: HashSet<u32> = structured(60, (12, 20), &mut rng).into_iter().collect();
        assert_eq!(found.len(), 60);
        assert!((0..12).all(|i| found.contains(&(i * 20 + i))), "the diagonal");
        assert!((0..12).any(|row| (0..20).all(|c| found.contains(&(row * 20 + c)))), "a whole row");
        assert_eq!(structured(240, (12, 20), &mut rng).len(), 240);
        let t = Tensor::new(&[[1f64, -5., 3.], [4., 0., -2.]], &Device::Cpu).unwrap();
        let mut top = largest(&t, 3).unwrap();
        top.sort_unstable();
        assert_eq!(top, [1, 2, 3]);
    }

    #[test]
    fn positions_survive_the_compact_form() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let mut positions: Vec<u32> = index::sample(&mut rng, 1 << 22, 40_000).into_iter().map(|p| p as u32).collect();
        positions.sort_unstable();
        let bytes = encode(&positions);
        assert!(bytes.len() < 2 * positions.len());
        assert_eq!(decode(&bytes, 1 << 22).unwrap(), positions);
        // Damage is seen, and nothing is read beyond the weight.
        for bad in [&[0x80][..], &[5, 0], &[0xff; 8], &[0xff, 0xff, 0xff, 0x7f]] {
            assert!(decode(bad, 1 << 20).is_none(), "{bad:?}");
        }
        assert!(decode(&[], 10).unwrap().is_empty());
    }
}
