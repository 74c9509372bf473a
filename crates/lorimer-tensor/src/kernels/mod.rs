//! What the operations compute with: matrix products, element-wise work in wide registers, slices of candle's storages, and the one
//! place that asks which instructions the processor has.

pub mod cpu;
mod floats;
pub(crate) mod portable;
pub(crate) mod products;
pub(crate) mod real;
pub(crate) mod shared;
pub(crate) mod simd;
pub(crate) mod slices;
#[cfg(target_arch = "x86_64")]
pub(crate) mod tile;
#[doc(hidden)]
pub mod wide;
