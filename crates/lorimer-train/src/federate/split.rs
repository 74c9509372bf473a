//! Rows shared out to clients, alike or not.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Gamma};

use crate::error::{Error, Result};

/// How rows are shared out.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Split {
    /// At random, equally many each.
    Iid,
    /// Each category by shares out of a Dirichlet distribution of this concentration, as FLoRA's code does it.
    Dirichlet(f64),
    /// Rows in the order of their categories, cut into pieces, so many to a client.
    Shards(usize),
}

impl std::str::FromStr for Split {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (name, value) = text.split_once(':').unwrap_or((text, ""));
        match (name, value.parse::<f64>()) {
            ("iid", _) if value.is_empty() => Ok(Self::Iid),
            ("dirichlet", Ok(concentration)) if concentration > 0.0 && concentration.is_finite() => {
                Ok(Self::Dirichlet(concentration))
            }
            ("shards", Ok(count)) if count >= 1.0 && count.fract() == 0.0 && count < 1e6 => {
                Ok(Self::Shards(count as usize))
            }
            _ => Err(format!("`{text}` should be iid, dirichlet:CONCENTRATION or shards:COUNT")),
        }
    }
}

/// How often shares are drawn anew where a client would have too few rows.
const TRIES: usize = 1000;

/// Indices of each client's rows, in the order of the rows; every client has at least `least`.
///
/// # Errors
///
/// Fails if there are too few rows, or if no draw gives every client enough.
pub fn split(
    categories: &[Option<&str>],
    clients: usize,
    how: Split,
    least: usize,
    seed: u64,
) -> Result<Vec<Vec<usize>>> {
    let rows = categories.len();
    if clients == 0 || rows < clients * least.max(1) {
        return Err(Error::Settings(format!(
            "{rows} rows are too few for {clients} clients of at least {} rows",
            least.max(1)
        )));
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut shared = match how {
        Split::Iid => {
            let mut all: Vec<usize> = (0..rows).collect();
            all.shuffle(&mut rng);
            cut(&all, clients)
        }
        Split::Shards(each) => {
            let mut all: Vec<usize> = (0..rows).collect();
            all.sort_by_key(|&row| (categories[row], row));
            let mut pieces = cut(&all, clients * each);
            pieces.shuffle(&mut rng);
            pieces.chunks(each).map(|some| some.concat()).collect()
        }
        Split::Dirichlet(concentration) => dirichlet(categories, clients, concentration, least, &mut rng)?,
    };
    shared.iter_mut().for_each(|rows| rows.sort_unstable());
    match shared.iter().all(|rows| rows.len() >= least) {
        true => Ok(shared),
        false => Err(Error::Settings(format!("a client would have fewer than {least} rows; ask for fewer clients"))),
    }
}

/// As many pieces, as alike in length as they can be.
fn cut(all: &[usize], pieces: usize) -> Vec<Vec<usize>> {
    (0..pieces).map(|i| all[i * all.len() / pieces..(i + 1) * all.len() / pieces].to_vec()).collect()
}

fn dirichlet(
    categories: &[Option<&str>],
    clients: usize,
    concentration: f64,
    least: usize,
    rng: &mut ChaCha8Rng,
) -> Result<Vec<Vec<usize>>> {
    let gamma =
        Gamma::new(concentration, 1.0).map_err(|e| Error::Settings(format!("dirichlet:{concentration}: {e}")))?;
    let mut names: Vec<Option<&str>> = categories.to_vec();
    names.sort_unstable();
    names.dedup();
    for _ in 0..TRIES {
        let mut shared = vec![Vec::new(); clients];
        for name in &names {
            let mut rows: Vec<usize> = (0..categories.len()).filter(|&row| categories[row] == *name).collect();
            rows.shuffle(rng);
            // A client that has its part of all rows gets no more.
            let full = |rows: &Vec<usize>| rows.len() * clients >= categories.len();
            let drawn: Vec<f64> =
                (0..clients).map(|k| if full(&shared[k]) { 0.0 } else { gamma.sample(rng) }).collect();
            let sum: f64 = drawn.iter().sum();
            let mut given = 0.0;
            let mut from = 0;
            for (k, drawn) in drawn.iter().enumerate() {
                given += if sum > 0.0 { drawn / sum } else { 1.0 / clients as f64 };
                let to = if k + 1 == clients { rows.len() } else { (given * rows.len() as f64) as usize };
                shared[k].extend(&rows[from..to.max(from)]);
                from = to.max(from);
            }
        }
        if shared.iter().all(|rows: &Vec<usize>| rows.len() >= least) {
            return Ok(shared);
        }
    }
    Err(Error::Settings(format!(
        "{TRIES} draws of shares gave no client fewer than {least} rows in none; ask for fewer clients or a larger concentration"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every row goes to one client, the same seed gives the same, and a small concentration makes clients unlike. To be seen to fail: `from = to` left out.
    #[test]
    fn every_row_has_one_client() {
        let names = ["a", "b", "c"];
        let categories: Vec<Option<&str>> = (0..600).map(|i| Some(names[i % 3])).collect();
        for how in ["iid", "dirichlet:0.5", "dirichlet:100", "shards:2"] {
            let how: Split = how.parse().unwrap();
            let shared = split(&categories, 6, how, 20, 1).unwrap();
            assert_eq!(shared, split(&categories, 6, how, 20, 1).unwrap());
            assert_ne!(shared, split(&categories, 6, how, 20, 2).unwrap());
            let mut all = shared.concat();
            all.sort_unstable();
            assert_eq!(all, (0..600).collect::<Vec<_>>(), "{how:?}");
            assert!(shared.iter().all(|rows| rows.len() >= 20));
        }
        let spread = |how: &str| {
            let shared = split(&categories, 6, how.parse().unwrap(), 1, 3).unwrap();
            let share = |rows: &Vec<usize>| rows.iter().filter(|r| **r % 3 == 0).count() as f64 / rows.len() as f64;
            let shares: Vec<f64> = shared.iter().map(share).collect();
            shares.iter().copied().fold(0.0, f64::max) - shares.iter().copied().fold(1.0, f64::min)
        };
        assert!(spread("dirichlet:0.1") > 0.5 && spread("iid") < 0.25);
        assert!(split(&categories, 700, Split::Iid, 1, 0).is_err());
        for bad in ["", "iid:1", "dirichlet", "dirichlet:0", "dirichlet:nan", "shards:0", "shards:1.5", "files"] {
            assert!(bad.parse::<Split>().is_err(), "{bad}");
        }
    }
}
