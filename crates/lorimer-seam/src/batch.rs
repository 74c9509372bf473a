//! Token rows of one or more sequences, packed without padding; what sequences share can be held once.

use lorimer_tensor::Segment;

/// Token rows of one or more sequences, packed without padding.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Token ids, one a row.
    pub tokens: Vec<u32>,
    /// Position of each row in its sequence.
    pub positions: Vec<usize>,
    /// Which rows belong together.
    pub segments: Vec<Segment>,
    /// For every sequence, the row of each of its tokens.
    pub rows: Vec<Vec<u32>>,
}

impl Batch {
    /// Sequences that know nothing of each other, each from position 0.
    pub fn pack<'a>(sequences: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let mut batch = Self::default();
        for tokens in sequences {
            let rows = batch.push(tokens, 0, Vec::new());
            batch.rows.push(rows.collect());
        }
        batch
    }

    /// Sequences that share what they begin with: their prefix tree, each node's rows once. A causal model computes the
    /// same for every sequence as [`Self::pack`], and gradients from all continuations flow back into the shared rows.
    pub fn share<'a>(sequences: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let sequences: Vec<&[u32]> = sequences.into_iter().collect();
        let mut batch = Self { rows: vec![Vec::new(); sequences.len()], ..Self::default() };
        // Groups of sequences that agree up to a depth, with the spans of rows that hold what they agree on.
        let mut groups = vec![((0..sequences.len()).collect::<Vec<_>>(), 0, Vec::new())];
        while let Some((group, depth, before)) = groups.pop() {
            let Some(first) = group.first().map(|&i| sequences[i]) else { continue };
            let common = |other: &[u32]| first[depth..].iter().zip(&other[depth..]).take_while(|(a, b)| a == b).count();
            let length = group.iter().map(|&i| common(sequences[i])).min().unwrap_or(0);
            let mut spans = before;
            if length > 0 {
                let rows = batch.push(&first[depth..depth + length], depth, spans.clone());
                spans.push((rows.start as usize, length));
                group.iter().for_each(|&i| batch.rows[i].extend(rows.clone()));
            }
            let depth = depth + length;
            let mut branches: Vec<Vec<usize>> = Vec::new();
            let mut by_token = std::collections::HashMap::new();
            for i in group.into_iter().filter(|&i| sequences[i].len() > depth) {
                let branch = *by_token.entry(sequences[i][depth]).or_insert(branches.len());
                if branch == branches.len() {
                    branches.push(Vec::new());
                }
                branches[branch].push(i);
            }
            groups.extend(branches.into_iter().rev().map(|branch| (branch, depth, spans.clone())));
        }
        batch
    }

    /// Appends rows that come after the rows of `before`, from position `depth`.
    fn push(&mut self, tokens: &[u32], depth: usize, before: Vec<(usize, usize)>) -> std::ops::Range<u32> {
        let start = self.tokens.len();
        let mut keys = before;
        keys.push((start, tokens.len()));
        self.segments.push(Segment { q_start: start, q_len: tokens.len(), keys });
        self.tokens.extend_from_slice(tokens);
        self.positions.extend(depth..depth + tokens.len());
        start as u32..self.tokens.len() as u32
    }
}

/// The segments of some rows only, as queries: `needed` in ascending order; queries are counted in `needed`, keys as before.
pub(crate) fn only_queries(segments: &[Segment], needed: &[u32]) -> Vec<Segment> {
    let mut only = Vec::new();
    let mut at = 0;
    for s in segments {
        let end = s.q_start + s.q_len;
        while at < needed.len() && (needed[at] as usize) < end {
            let run = needed[at..].windows(2).take_while(|w| w[1] == w[0] + 1 && (w[1] as usize) < end).count() + 1;
            let last = needed[at] as usize + run;
            let mut keys = s.keys.clone();
            let mut beyond = end - last;
            while let Some((_, n)) = keys.last_mut().filter(|_| beyond > 0) {
                let cut = beyond.min(*n);
                *n -= cut;
                beyond -= cut;
                if *n == 0 {
                    keys.pop();
                }
            }
            only.push(Segment { q_start: at, q_len: run, keys });
            at += run;
        }
    }
    only
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_rows_hold_every_sequence_once() {
        let sequences: [&[u32]; 5] = [&[1, 2, 3, 4], &[1, 2, 5], &[1, 2, 3, 6, 7], &[9], &[1, 2, 5]];
        let batch = Batch::share(sequences);
        assert_eq!(batch.tokens, [1, 2, 3, 4, 6, 7, 5, 9]);
        for (sequence, rows) in sequences.iter().zip(&batch.rows) {
            let tokens: Vec<u32> = rows.iter().map(|&r| batch.tokens[r as usize]).collect();
            assert_eq!(&tokens, sequence);
            assert!(rows.iter().enumerate().all(|(i, &r)| batch.positions[r as usize] == i));
            // The segment of the last row sees exactly the sequence's rows, in order.
            let last = *rows.last().unwrap() as usize;
            let s = batch.segments.iter().find(|s| (s.q_start..s.q_start + s.q_len).contains(&last)).unwrap();
            let keys: Vec<u32> = s.keys.iter().flat_map(|&(a, n)| a as u32..(a + n) as u32).collect();
            assert_eq!(&keys[..rows.len()], rows);
        }
    }

    #[test]
    fn no_sequences_and_empty_ones_are_no_rows() {
        assert!(Batch::share([]).tokens.is_empty());
        assert_eq!(Batch::share([&[][..], &[4]]).tokens, [4]);
    }

    #[test]
    fn queries_of_some_rows_see_what_they_saw() {
        let segments = [
            Segment { q_start: 0, q_len: 4, keys: vec![(0, 4)] },
            Segment { q_start: 4, q_len: 3, keys: vec![(0, 4), (4, 3)] },
        ];
        let only = only_queries(&segments, &[1, 2, 4, 6]);
        let expected = [
            Segment { q_start: 0, q_len: 2, keys: vec![(0, 3)] },
            Segment { q_start: 2, q_len: 1, keys: vec![(0, 4), (4, 1)] },
            Segment { q_start: 3, q_len: 1, keys: vec![(0, 4), (4, 3)] },
        ];
        assert_eq!(only, expected);
    }
}
