//! What a parameter of a change is: its role decides how it is stepped, counted and saved, not its name.

use candle_core::{Tensor, Var};

/// What a parameter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The first factor of a low-rank change, one rank a row.
    A,
    /// The second factor. LoRA+ gives it a rate of its own; a sampled rank steps a part of it and of A.
    B,
    /// A matrix between, beside or in the place of the two, a core of a tensor ring, or a block.
    Core,
    /// One factor a rank, which a threshold may close or a search may weigh.
    Gate,
    /// One factor or length an output, or one a base matrix.
    Magnitude,
    /// What computes gates from the input.
    Router,
    /// The whole weight, in the place of the base's.
    Weight,
    /// Entries of a sparse change.
    Entries,
    /// Another whole parameter in the place of the base's: an embedding, a norm, a bias, a head.
    Whole,
    /// No gradient moves it but a rule after the step ([`crate::Delta::after_step`]). It is saved, checkpointed and resumed like the others,
    /// and neither stepped nor counted.
    Buffer,
}

impl Role {
    /// Whether gradients move it.
    pub fn is_trained(self) -> bool {
        self != Self::Buffer
    }

    /// Whether it is one of the two factors of which a sampled rank steps a part.
    pub fn is_factor(self) -> bool {
        matches!(self, Self::A | Self::B)
    }
}

/// One parameter of a change.
#[derive(Clone, Copy, Debug)]
pub struct Parameter<'a> {
    /// Its key in the file, below the module's path (without `.weight`, where PEFT adds that).
    pub key: &'static str,
    /// Its values.
    pub var: &'a Var,
    /// What it is.
    pub role: Role,
}

impl<'a> Parameter<'a> {
    /// From its parts.
    pub fn new(key: &'static str, var: &'a Var, role: Role) -> Self {
        Self { key, var, role }
    }

    /// `lora_A` and `lora_B`, the two factors by PEFT's names.
    pub fn pair(a: &'a Var, b: &'a Var) -> [Self; 2] {
        [Self::new("lora_A", a, Role::A), Self::new("lora_B", b, Role::B)]
    }

    /// Of some parameters those that gradients move, by key.
    pub(crate) fn trained(all: Vec<Self>) -> Vec<(&'static str, &'a Var)> {
        all.into_iter().filter(|p| p.role.is_trained()).map(|p| (p.key, p.var)).collect()
    }

    /// Parameters as a file holds them, by key.
    pub(crate) fn stored(all: Vec<Self>) -> Vec<(&'static str, Tensor)> {
        all.into_iter().map(|p| (p.key, p.var.detach())).collect()
    }

    /// The same as one of an adapter's, of the module at `path`.
    pub(crate) fn named(self, path: &str) -> Named<'a> {
        Named { name: format!("{path}.{}", self.key), var: self.var, role: self.role }
    }
}

/// One parameter of an adapter.
#[derive(Clone, Debug)]
pub struct Named<'a> {
    /// Its path and key: unique in the adapter.
    pub name: String,
    /// Its values.
    pub var: &'a Var,
    /// What it is.
    pub role: Role,
}
