//! The places of the largest numbers, for all methods that choose by size.

use std::cmp::Ordering;

/// The places of the `k` largest numbers, all of them where there are no more, in no order: of equal ones the lowest places, and what is no number
/// after all that are.
pub(crate) fn largest_places<T: PartialOrd + Copy>(values: &[T], k: usize) -> Vec<u32> {
    let mut places: Vec<u32> = (0..values.len() as u32).collect();
    // A total order, without which a selection may panic.
    let none = |value: &T| value.partial_cmp(value).is_none();
    let by = |&a: &u32, &b: &u32| {
        let (a_value, b_value) = (&values[a as usize], &values[b as usize]);
        let order = b_value.partial_cmp(a_value).unwrap_or_else(|| none(a_value).cmp(&none(b_value)));
        if order == Ordering::Equal { a.cmp(&b) } else { order }
    };
    if k < places.len() {
        places.select_nth_unstable_by(k, by);
        places.truncate(k);
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(values: &[f64], k: usize) -> Vec<u32> {
        let mut places = largest_places(values, k);
        places.sort_unstable();
        places
    }

    #[test]
    fn the_lowest_place_wins_where_numbers_are_equal() {
        assert_eq!(chosen(&[1.0, 2.0, 2.0, 2.0, 0.0], 2), [1, 2]);
        assert_eq!(chosen(&[0.0, -0.0, 0.0, 0.0, 0.0], 3), [0, 1, 2]);
        assert_eq!(chosen(&[3.0, 1.0, 2.0, 5.0, 4.0], 5), [0, 1, 2, 3, 4]);
        assert_eq!(chosen(&[3.0, 1.0], 9), [0, 1]);
        assert!(chosen(&[], 2).is_empty() && chosen(&[1.0], 0).is_empty());
    }

    #[test]
    fn what_is_no_number_comes_last() {
        let none = f64::NAN;
        assert_eq!(chosen(&[none, 1.0, none, -2.0, f64::NEG_INFINITY], 3), [1, 3, 4]);
        assert_eq!(chosen(&[none, 1.0, none, -2.0], 3), [0, 1, 3]);
        // Many, in every arrangement that a selection meets.
        let values: Vec<f64> = (0..200).map(|i| if i % 3 == 0 { none } else { f64::from((i * 37) % 11) }).collect();
        for k in 0..200 {
            let mut order: Vec<u32> = (0..200).collect();
            let rank = |i: u32| if values[i as usize].is_nan() { -1.0 } else { values[i as usize] };
            order.sort_by(|&a, &b| rank(b).total_cmp(&rank(a)));
            let mut expected = order[..k].to_vec();
            expected.sort_unstable();
            assert_eq!(chosen(&values, k), expected, "{k}");
        }
    }
}
