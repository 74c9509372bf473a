//! k-means of weighted points that are known by their inner products only. Centres are weighted means of points, so every distance follows from
//! the Gram matrix: ‖m − μ‖² = ⟨m, m⟩ − 2⟨m, μ⟩ + ⟨μ, μ⟩, and a step costs n² whatever the points' width.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Distances below this share of the largest point are none: what rounding leaves between equal points.
const EQUAL: f64 = 1e-12;

/// Points by their inner products (n, n), row after row, and their weights.
pub(super) struct Points<'a> {
    pub gram: &'a [f64],
    pub weights: &'a [f64],
    /// Whether a point may stand for its opposite, if that is nearer to the centre.
    pub flips: bool,
}

/// A clustering, in which no cluster is empty.
#[derive(Clone, Debug)]
pub(super) struct Clusters {
    /// The cluster of each point.
    pub of: Vec<usize>,
    /// 1, or −1 where a point stands for its opposite.
    pub signs: Vec<f64>,
    /// Σ weight · ‖point − centre‖².
    pub inertia: f64,
}

impl Points<'_> {
    fn len(&self) -> usize {
        self.weights.len()
    }

    fn at(&self, i: usize, j: usize) -> f64 {
        self.gram[i * self.len() + j]
    }

    fn scale(&self) -> f64 {
        (0..self.len()).map(|i| self.at(i, i)).fold(0.0, f64::max)
    }

    /// ‖i − j‖², or ‖i + j‖² if that is smaller and allowed; and the sign.
    fn apart(&self, i: usize, j: usize) -> (f64, f64) {
        let inner = self.at(i, j);
        let sign = if self.flips && inner < 0.0 { -1.0 } else { 1.0 };
        let d = self.at(i, i) + self.at(j, j) - 2.0 * sign * inner;
        (if d > EQUAL * self.scale() { d } else { 0.0 }, sign)
    }

    /// The best of some starts, each k-means++ and Lloyd's steps; `k` between 1 and the number of points.
    pub(super) fn cluster(&self, k: usize, seed: u64, restarts: usize, iterations: usize) -> Clusters {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut best: Option<Clusters> = None;
        for _ in 0..restarts.max(1) {
            let found = self.lloyd(self.start(k, &mut rng), k, iterations);
            if best.as_ref().is_none_or(|best| found.inertia < best.inertia) {
                best = Some(found);
            }
        }
        best.unwrap_or(Clusters { of: Vec::new(), signs: Vec::new(), inertia: 0.0 })
    }

    /// k-means++: each next centre is a point drawn with weight times its squared distance to the centres so far.
    fn start(&self, k: usize, rng: &mut ChaCha8Rng) -> Clusters {
        let n = self.len();
        let mut of = vec![0; n];
        let mut signs = vec![1.0; n];
        let mut distance = vec![f64::INFINITY; n];
        let mut taken = vec![false; n];
        for cluster in 0..k {
            let mass = |i: usize| if cluster == 0 { self.weights[i] } else { self.weights[i] * distance[i] };
            let total: f64 = (0..n).filter(|i| !taken[*i]).map(mass).sum();
            let mut left = rng.random_range(0.0..1.0) * total;
            let free = || (0..n).filter(|i| !taken[*i]);
            let drawn = free().filter(|i| mass(*i) > 0.0).find(|i| {
                left -= mass(*i);
                left <= 0.0
            });
            // Where all that is left lies on centres, the next point in order.
            let Some(centre) = drawn.or_else(|| free().rfind(|i| mass(*i) > 0.0)).or_else(|| free().next()) else {
                break;
            };
            taken[centre] = true;
            for i in 0..n {
                let (d, sign) = self.apart(i, centre);
                if (d < distance[i] && !taken[i]) || i == centre {
                    (distance[i], of[i], signs[i]) = (d, cluster, sign);
                }
            }
            (distance[centre], signs[centre]) = (0.0, 1.0);
        }
        Clusters { of, signs, inertia: f64::INFINITY }
    }

    fn lloyd(&self, mut now: Clusters, k: usize, iterations: usize) -> Clusters {
        let n = self.len();
        let slack = EQUAL * self.scale();
        for _ in 0..iterations {
            let (inner, squares, sizes) = self.centres(&now, k);
            let distance = |i: usize, j: usize, sign: f64| self.at(i, i) - 2.0 * sign * inner[i * k + j] + squares[j];
            let mut moved = false;
            let mut own = vec![0.0; n];
            let mut left = sizes;
            for i in 0..n {
                let sign = |j: usize| if self.flips && inner[i * k + j] < 0.0 { -1.0 } else { 1.0 };
                own[i] = distance(i, now.of[i], now.signs[i]);
                let nearest = (0..k).map(|j| (distance(i, j, sign(j)), j));
                let (d, j) = nearest.fold((f64::INFINITY, 0), |a, b| if b.0 < a.0 { b } else { a });
                let turns = sign(j) != now.signs[i];
                if d < own[i] - slack && (j != now.of[i] || turns) {
                    left[now.of[i]] -= 1;
                    left[j] += 1;
                    (now.of[i], now.signs[i], own[i], moved) = (j, sign(j), d, true);
                }
            }
            // A cluster that lost its last point gets the one that is farthest from its centre.
            for j in 0..k {
                if left[j] > 0 {
                    continue;
                }
                let crowded = (0..n).filter(|i| left[now.of[*i]] > 1);
                let Some(far) = crowded.reduce(|a, b| if own[b] > own[a] { b } else { a }) else { continue };
                left[now.of[far]] -= 1;
                left[j] = 1;
                (now.of[far], now.signs[far], own[far], moved) = (j, 1.0, 0.0, true);
            }
            if !moved {
                break;
            }
        }
        let (inner, squares, _) = self.centres(&now, k);
        let of = |i: usize| {
            let j = now.of[i];
            self.weights[i] * (self.at(i, i) - 2.0 * now.signs[i] * inner[i * k + j] + squares[j]).max(0.0)
        };
        now.inertia = (0..n).map(of).sum();
        now
    }

    /// ⟨point, centre⟩ (n, k), ⟨centre, centre⟩ (k) and the number of points of each cluster.
    fn centres(&self, now: &Clusters, k: usize) -> (Vec<f64>, Vec<f64>, Vec<usize>) {
        let n = self.len();
        let (mut mass, mut sizes) = (vec![0.0; k], vec![0; k]);
        for (j, w) in now.of.iter().zip(self.weights) {
            mass[*j] += w;
            sizes[*j] += 1;
        }
        let mut inner = vec![0.0; n * k];
        for i in 0..n {
            for (other, j) in now.of.iter().enumerate() {
                inner[i * k + j] += self.weights[other] * now.signs[other] * self.at(i, other) / mass[*j];
            }
        }
        let mut squares = vec![0.0; k];
        for (i, j) in now.of.iter().enumerate() {
            squares[*j] += self.weights[i] * now.signs[i] * inner[i * k + j] / mass[*j];
        }
        (inner, squares, sizes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gram(points: &[[f64; 2]]) -> Vec<f64> {
        points.iter().flat_map(|a| points.iter().map(|b| a[0] * b[0] + a[1] * b[1])).collect()
    }

    /// Centres and inertia from inner products are those of the points themselves.
    #[test]
    fn distances_from_inner_products_are_those_of_points() {
        let points = [[0.0, 0.0], [0.0, 2.0], [9.0, 0.0], [9.0, 1.0], [9.0, 2.0]];
        let gram = gram(&points);
        let all = Points { gram: &gram, weights: &[1.0, 3.0, 1.0, 1.0, 1.0], flips: false };
        let found = all.cluster(2, 1, 10, 300);
        assert!(found.of[0] == found.of[1] && found.of[2] == found.of[3] && found.of[3] == found.of[4]);
        // Centres (0, 1.5) and (9, 1).
        assert!((found.inertia - (2.25 + 3.0 * 0.25 + 2.0)).abs() < 1e-9, "{}", found.inertia);
        let opposite = Points { gram: &self::gram(&[[1.0, 2.0], [-1.0, -2.0]]), weights: &[1.0, 1.0], flips: true };
        let found = opposite.cluster(1, 1, 1, 300);
        assert!(found.inertia < 1e-12 && found.signs[0] == -found.signs[1]);
    }

    #[test]
    fn a_cluster_without_points_gets_the_farthest() {
        let gram = gram(&[[10.0, 0.0], [10.1, 0.0], [14.0, 0.0]]);
        let all = Points { gram: &gram, weights: &[1.0; 3], flips: false };
        let start = Clusters { of: vec![0; 3], signs: vec![1.0; 3], inertia: 0.0 };
        let found = all.lloyd(start, 2, 300);
        assert!(found.of[0] == found.of[1] && found.of[2] != found.of[0], "{:?}", found.of);
    }
}
