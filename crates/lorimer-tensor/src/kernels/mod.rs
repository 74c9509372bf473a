//! What the operations compute with: matrix products, element-wise work in wide registers, slices of candle's storages, and the one
//! place that asks which instructions the processor has.

pub mod cpu;
pub(crate) mod products;
pub(crate) mod simd;
pub(crate) mod slices;
