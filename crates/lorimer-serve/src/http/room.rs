//! How large bodies may be, each and together.

use std::sync::Arc;

use tokio::sync::Semaphore;

/// Largest body of a request.
pub const MAX_BODY: usize = 8 << 20;

/// Bodies up to this are always read; those that are larger share [`LARGE_BODIES`].
pub const SMALL_BODY: usize = 64 << 10;

/// Bytes of large bodies that are there at a time.
pub const LARGE_BODIES: usize = 32 << 20;

/// Room for large bodies, in parts of [`SMALL_BODY`].
pub fn room() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(LARGE_BODIES / SMALL_BODY))
}
