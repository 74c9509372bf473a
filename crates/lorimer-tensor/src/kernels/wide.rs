//! Code compiled for wide registers, chosen at run time.

/// Runs `f`, compiled for AVX2 where the processor has it.
#[inline]
pub(crate) fn wide<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn avx2<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        if crate::kernels::cpu::level() >= crate::kernels::cpu::Level::Avx2 {
            // SAFETY: the processor has it.
            return unsafe { avx2(f) };
        }
    }
    f()
}
