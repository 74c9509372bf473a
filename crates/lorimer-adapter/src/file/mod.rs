//! Adapter files: reading and writing PEFT's folders, looking into them, converting and exporting them.

pub mod card;
pub mod convert;
pub mod export;
pub mod frozen;
pub mod inspect;
pub mod store;
