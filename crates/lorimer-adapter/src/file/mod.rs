//! Adapter files: reading and writing PEFT's folders, looking into them, converting and exporting them.

pub mod account;
pub mod bytes;
pub mod card;
pub mod convert;
pub mod dialects;
pub mod export;
pub mod frozen;
pub mod inspect;
pub mod keys;
pub mod load;
pub(crate) mod mixture;
pub mod store;
pub(crate) mod streamed;
pub mod writer;
