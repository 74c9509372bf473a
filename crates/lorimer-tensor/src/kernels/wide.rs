//! Code compiled for wide registers, chosen at run time.

use super::cpu::{Level, level};

/// The value of an expression, compiled for registers of 512 and of 256 bits too and taken in the widest that the processor has. The values are the same:
/// nothing is contracted or reordered.
///
/// Each form is a closure of its own with one caller, which the compiler therefore compiles into it; a closure with several callers stays a function of
/// the narrowest registers. What the expression calls has to be inlined too.
#[macro_export]
macro_rules! wide {
    ($value:expr) => {
        match $crate::kernels::cpu::level() {
            level if level >= $crate::kernels::cpu::Level::Avx512 => $crate::kernels::wide::in_512(|| $value),
            level if level >= $crate::kernels::cpu::Level::Avx2 => $crate::kernels::wide::in_256(|| $value),
            _ => $crate::kernels::wide::in_any(|| $value),
        }
    };
}
pub(crate) use wide;

/// Runs `f` in the registers that every processor of the target has.
#[inline]
pub fn in_any<R>(f: impl FnOnce() -> R) -> R {
    f()
}

/// Runs `f` in registers of 512 bits. Panics where the processor has none.
#[inline]
pub fn in_512<R>(f: impl FnOnce() -> R) -> R {
    assert!(level() >= Level::Avx512);
    #[cfg(target_arch = "x86_64")]
    {
        #[inline]
        #[target_feature(enable = "avx512f")]
        fn compiled<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        // SAFETY: the processor has them.
        unsafe { compiled(f) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    f()
}

/// Runs `f` in registers of 256 bits. Panics where the processor has none.
#[inline]
pub fn in_256<R>(f: impl FnOnce() -> R) -> R {
    assert!(level() >= Level::Avx2);
    #[cfg(target_arch = "x86_64")]
    {
        #[inline]
        #[target_feature(enable = "avx2")]
        fn compiled<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        // SAFETY: the processor has them.
        unsafe { compiled(f) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    f()
}
