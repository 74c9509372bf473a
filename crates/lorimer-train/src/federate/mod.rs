//! Federated fine-tuning: clients keep their rows and send adapters; the server puts these together.
//!
//! FLoRA (Wang et al. 2024, arXiv 2409.05976): client k trains a fresh LoRA of its own rank on the current model, and the server stacks the factors,
//! `A = [p₁s₁A₁; …]`, `B = [B₁ …]`, so that `BA = Σ pₖ sₖ BₖAₖ` exactly, with pₖ the client's share of the rows. Beside it the two that it is compared with:
//! FedIT's mean of the factors, carried from round to round, and the mean of factors that are filled up with zeros to one rank.

pub mod privacy;
pub mod simulate;
pub mod split;

/// How clients' adapters become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aggregate {
    /// FLoRA's stack, exact at any ranks.
    Stack,
    /// The mean of A and of B, of one rank (FedIT): clients go on from it.
    Fedavg,
    /// The same of factors filled up with zeros to the largest rank.
    ZeroPad,
}

impl Aggregate {
    /// The combination that does it (see `lorimer_adapter::algebra::combine`).
    pub fn combination(self) -> &'static str {
        match self {
            Self::Stack => "cat",
            Self::Fedavg => "tensors",
            Self::ZeroPad => "zero_pad",
        }
    }

    /// Whether clients go on from the global adapter, in the place of beginning anew on top of it.
    pub fn carries(self) -> bool {
        self == Self::Fedavg
    }
}

/// Each client's share of the rows of those that answered.
pub fn shares(rows: &[usize]) -> Vec<f64> {
    let all: usize = rows.iter().sum();
    rows.iter().map(|n| *n as f64 / all.max(1) as f64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_those_that_answered() {
        assert_eq!(shares(&[30, 10]), [0.75, 0.25]);
        assert!((shares(&[7, 5, 11]).iter().sum::<f64>() - 1.0).abs() < 1e-15);
        assert_eq!(shares(&[4]), [1.0]);
    }
}
