//! Guesses of the next tokens, checked by the same forward that computes the first of them (Leviathan et al. 2023, arXiv 2211.17192; here a guess
//! stands only where the token that is drawn is the guessed one, so that the tokens are those without guesses).
//!
//! Guesses are what came after the latest earlier place of the last tokens, in prompt or answer (prompt lookup, Saxena 2023; vLLM's `ngram`). How many are
//! made goes by how many stood: twice as many after all did, none for a while after none did. A draft model ([`super::draft`]) guesses by the same rule.

/// Tokens in a row that have to have stood before.
const LONGEST_MATCH: usize = 4;
const SHORTEST_MATCH: usize = 2;
/// Tokens before the last that are looked through.
const REACH: usize = 16 << 10;
/// Most tokens that are guessed, whatever is asked for.
const MOST: usize = 256;
/// Steps without a guess after one of which nothing stood, and most of them.
const REST: (u32, u32) = (2, 64);

/// How guesses for a request are made.
#[derive(Clone, Debug)]
pub struct Speculation {
    /// Tokens to guess next.
    length: usize,
    /// Steps that are still without.
    rest: u32,
    /// Those after the next failure.
    next_rest: u32,
}

impl Default for Speculation {
    fn default() -> Self {
        Self { length: 3, rest: 0, next_rest: REST.0 }
    }
}

impl Speculation {
    /// How many tokens to guess next, at most `most`.
    pub fn length(&mut self, most: usize) -> usize {
        if self.rest > 0 {
            self.rest -= 1;
            return 0;
        }
        self.length.min(most)
    }

    /// At most `most` tokens that may come after `tokens`.
    pub fn guess(&mut self, tokens: &[u32], most: usize) -> Vec<u32> {
        after_match(tokens, self.length(most))
    }

    /// Takes note of how many of the tokens that were guessed stood.
    pub fn stood(&mut self, stood: usize, guessed: usize) {
        match stood {
            _ if guessed == 0 => {}
            0 => {
                (self.length, self.rest) = (1, self.next_rest);
                self.next_rest = (2 * self.next_rest).min(REST.1);
            }
            n if n == guessed => (self.length, self.next_rest) = ((2 * self.length.max(n)).min(MOST), REST.0),
            n => (self.length, self.next_rest) = (n, REST.0),
        }
    }
}

/// What came after the latest earlier place of the longest run of last tokens that has one.
fn after_match(tokens: &[u32], most: usize) -> Vec<u32> {
    let tokens = &tokens[tokens.len().saturating_sub(REACH)..];
    let (Some(&last), true) = (tokens.last(), most > 0) else { return Vec::new() };
    let before = &tokens[..tokens.len() - 1];
    let mut best = (SHORTEST_MATCH - 1, 0);
    for end in (1..=before.len()).rev().filter(|&end| before[end - 1] == last) {
        let ends = before[..end].iter().rev().zip(tokens.iter().rev());
        let run = ends.take(LONGEST_MATCH).take_while(|(a, b)| a == b).count();
        if run > best.0 {
            best = (run, end);
            if run == LONGEST_MATCH {
                break;
            }
        }
    }
    if best.0 < SHORTEST_MATCH {
        return Vec::new();
    }
    // Where it goes on into the run itself, a repetition goes on.
    let mut found: Vec<u32> = tokens[best.1..].iter().copied().take(most).collect();
    let period = found.len();
    while period > 0 && found.len() < most {
        found.push(found[found.len() - period]);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_after_the_same_tokens_is_guessed() {
        assert_eq!(after_match(&[1, 2, 3, 4, 9, 1, 2, 3], 2), [4, 9]);
        // The longest run decides, of equal ones the latest.
        assert_eq!(after_match(&[7, 1, 2, 3, 8, 0, 2, 3, 5, 0, 7, 1, 2, 3], 1), [8]);
        assert_eq!(after_match(&[1, 2, 8, 1, 2, 9, 1, 2], 1), [9]);
        // One token is no run, and nothing is after the end but a repetition.
        assert!(after_match(&[5, 6, 7, 5], 3).is_empty());
        assert_eq!(after_match(&[4, 5, 6, 5, 6], 5), [5, 6, 5, 6, 5]);
        assert_eq!(after_match(&[5, 5, 5], 3), [5, 5, 5]);
        assert!(after_match(&[1, 2, 1, 2], 0).is_empty() && after_match(&[], 3).is_empty());
    }

    #[test]
    fn as_many_are_guessed_as_stand() {
        let mut speculation = Speculation::default();
        let again = [3; 40];
        assert_eq!(speculation.guess(&again, 9).len(), 3);
        speculation.stood(3, 3);
        assert_eq!((speculation.guess(&again, 9).len(), speculation.guess(&again, 4).len()), (6, 4));
        speculation.stood(2, 6);
        assert_eq!(speculation.guess(&again, 9).len(), 2);
        // None for two steps, then for four.
        for rest in [2, 4, 8] {
            speculation.stood(0, 1);
            assert!((0..rest).all(|_| speculation.guess(&again, 9).is_empty()));
            assert_eq!(speculation.guess(&again, 9).len(), 1);
        }
        (0..100).for_each(|_| speculation.stood(1, 1));
        assert_eq!(speculation.guess(&again, 9).len(), 9);
        speculation.stood(0, 2);
        assert_eq!((speculation.rest, speculation.length), (2, 1));
    }
}
