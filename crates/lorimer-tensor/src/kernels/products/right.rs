//! The right side of a product as numbers.

use super::terms::Right;
use crate::storage::View;

/// A right side as plain numbers, where it is that.
pub(super) fn plain<'a>(right: Right<'a, f32>) -> Option<(&'a [f32], usize)> {
    match right {
        Right::Slice(values, length) => Some((values, length)),
        Right::Weight(View::F32(values, length)) => Some((values, length)),
        Right::Weight(_) => None,
    }
}

/// A row of the right side where it is, or expanded into `room`.
pub(super) fn right_row<'a>(right: Right<'a, f32>, row: usize, depth: usize, room: &'a mut [f32]) -> &'a [f32] {
    match (plain(right), right) {
        (Some((values, length)), _) => &values[row * length..][..depth],
        (None, Right::Weight(view)) => {
            view.expand(row, 0..depth, room);
            &room[..depth]
        }
        (None, Right::Slice(..)) => &room[..depth],
    }
}
