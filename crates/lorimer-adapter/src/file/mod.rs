//! Adapter files: reading and writing PEFT's folders, looking into them, converting and exporting them.

pub mod bytes;
pub mod card;
pub mod convert;
pub mod export;
pub mod frozen;
pub mod inspect;
pub mod load;
mod lora_xs;
pub(crate) mod mixture;
pub mod store;
