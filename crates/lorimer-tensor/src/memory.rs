//! Keeping freed memory for the next step.

/// Tells mimalloc to keep freed pages instead of giving them back to the system. A training step frees and takes the same
/// gigabyte again and again; on Linux a quarter of its time otherwise goes into clearing pages.
///
/// Has an effect only in programs whose global allocator is mimalloc, and only before memory is given back; call it first.
pub fn keep_freed_pages() {
    // SAFETY: setting an option before the allocator is used by other threads; the option's value is plain data.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) }
}

/// `mi_option_purge_delay` of mimalloc's `mimalloc.h` (2 and 3 agree), which the binding does not name.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
