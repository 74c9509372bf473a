//! Faults that tests seed: with a prompt that begins so, a part of the server fails.

/// The part that fails.
#[derive(Clone, Copy)]
pub(crate) enum Fault {
    /// Taking the request.
    Submit = 20,
    /// Deciding on a step.
    Step,
    /// Deciding on a step once there are some tokens of an answer.
    Later,
    /// Deciding on a step, with the request gone from the account.
    Lost,
    /// Deciding on a step, and making the account anew after that.
    Rebuild,
    /// Taking the figures.
    Figures,
    /// Telling who listens.
    Report,
    /// Turning tokens into text.
    Text,
}

impl Fault {
    /// Tokens of an answer before [`Self::Later`].
    pub(crate) const LATER: usize = 40;

    /// The prompt.
    pub(crate) fn prompt(self) -> Vec<u32> {
        vec![7, 7, 7, 7, self as u32]
    }

    /// Whether tokens are those of a request with this fault.
    pub(crate) fn is_in(self, tokens: &[u32]) -> bool {
        tokens.starts_with(&self.prompt())
    }

    /// Panics if they are.
    pub(crate) fn fail(self, tokens: &[u32]) {
        assert!(!self.is_in(tokens), "a seeded fault");
    }
}
