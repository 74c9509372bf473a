//! How much memory a combination takes on one projection, which says how many projections are combined at a time and which are refused.

use super::entry::{Combination, Kind};
use super::lego::LEGO;
use super::svd::KNOTS;
use crate::error::{Error, Result};

/// Memory that projections which are combined at a time may take together.
const TOGETHER: f64 = (1u64 << 30) as f64;
/// Most that one projection may take.
const MOST: f64 = (64u64 << 30) as f64;
/// Most units that LoRA-LEGO clusters: their inner products take 512 MB, and a start of the clustering as much at most.
pub(super) const MAX_UNITS: usize = 8192;

/// What the parents have on a projection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sizes {
    /// The sum of their ranks.
    pub ranks: usize,
    /// Their number.
    pub parents: usize,
    /// Outputs of the projection.
    pub outputs: usize,
    /// Its inputs.
    pub inputs: usize,
}

/// About what a combination takes, in bytes.
fn bytes(combination: &Combination, sizes: &Sizes) -> f64 {
    let [ranks, parents, outputs, inputs] =
        [sizes.ranks, sizes.parents, sizes.outputs, sizes.inputs].map(|size| size as f64);
    // Factors in f32, stacked in f64, decomposed, and held against the result.
    let factors = 40.0 * ranks * (outputs + inputs);
    let more = match combination.kind {
        // The mixed change and what its decomposition needs.
        Kind::WholeSites(_) => 24.0 * outputs * inputs,
        // All parents' coordinates along the common directions, thrice.
        _ if combination.name == KNOTS.name => 24.0 * ranks.min(outputs) * parents * inputs,
        // Inner products, of units and with centres.
        _ if combination.name == LEGO.name => 16.0 * ranks * ranks,
        _ => 0.0,
    };
    factors + more
}

/// How many projections are combined at a time, of at most `most`.
///
/// # Errors
///
/// Fails if one of them alone takes too much.
pub(super) fn at_once<'a>(
    combination: &Combination,
    modules: impl Iterator<Item = (&'a str, Sizes)>,
    most: usize,
) -> Result<usize> {
    let mut largest = 0f64;
    for (module, sizes) in modules {
        if combination.name == LEGO.name && sizes.ranks > MAX_UNITS {
            return Err(Error::Refused(format!(
                "`{module}` has {} units in {} adapters together, and `{}` clusters up to {MAX_UNITS}; combine fewer adapters at a time, or `lorimer resize` them first",
                sizes.ranks, sizes.parents, combination.name
            )));
        }
        let own = bytes(combination, &sizes);
        if own > MOST {
            return Err(Error::Refused(format!(
                "`{}` would take about {:.0} GB on `{module}`, with {} outputs, {} inputs and {} ranks in {} adapters together; combine fewer adapters at a time, or by another method",
                combination.name,
                own / 1e9,
                sizes.outputs,
                sizes.inputs,
                sizes.ranks,
                sizes.parents
            )));
        }
        largest = largest.max(own);
    }
    Ok(match combination.kind {
        Kind::WholeSites(_) => 1,
        _ => ((TOGETHER / largest.max(1.0)) as usize).clamp(1, most.max(1)),
    })
}

#[cfg(test)]
mod tests {
    use super::super::dense::TIES_SVD;
    use super::super::linear::LINEAR;
    use super::*;

    #[test]
    fn fewer_are_combined_at_a_time_the_more_they_take() {
        let of = |combination: &Combination, ranks: usize, outputs: usize, inputs: usize| {
            let sizes = Sizes { ranks, parents: 10, outputs, inputs };
            at_once(combination, [("m", Sizes::default()), ("m", sizes)].into_iter(), 64).map_err(|e| e.to_string())
        };
        // Ten adapters of rank 16 on a projection of a 7B model.
        assert_eq!(of(&LINEAR, 160, 4096, 4096), Ok(20));
        assert_eq!(of(&TIES_SVD, 160, 4096, 4096), Ok(1));
        assert!(of(&LEGO, 160, 4096, 4096).unwrap() > 16 && of(&KNOTS, 160, 4096, 4096).unwrap() < 7);
        assert_eq!(of(&LEGO, MAX_UNITS, 4096, 4096), Ok(1));
        let told = of(&LEGO, MAX_UNITS + 1, 2, 2).unwrap_err();
        assert!(told.contains("`m` has 8193 units in 10 adapters") && told.contains("up to 8192"), "{told}");
        let told = of(&TIES_SVD, 10, 1 << 20, 1 << 20).unwrap_err();
        assert!(told.contains("1048576 outputs, 1048576 inputs and 10 ranks"), "{told}");
        assert!(of(&KNOTS, 1 << 20, 1 << 16, 1 << 16).unwrap_err().contains("about"));
    }
}
