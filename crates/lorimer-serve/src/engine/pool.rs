//! One pool of pages for keys, values and adapters (S-LoRA's unified paging).
//!
//! A page holds keys and values of [`BLOCK`] tokens in one layer: first the keys, a row of `kv_heads · head_dim` numbers each, then the
//! values; in 8 bits ([`KeyDtype`]) a row is about a quarter as long. Adapters lie in the same pages, their numbers one after the other whatever their ranks. So no room is set apart for
//! either, nothing is reserved at a largest rank, and as all pages are alike none is too small or in the wrong place.

use lorimer_model::ModelShape;
use lorimer_tensor::KeyDtype;

use crate::error::{Error, Result};

/// Tokens of a page.
pub const BLOCK: usize = 16;

/// How long pages are for a model, and how many a block of tokens takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Numbers of f32 that a row, the keys or the values of a token in a layer, takes at most.
    pub row: usize,
    /// Layers of the model: the pages of a block of tokens.
    pub layers: usize,
    /// How keys and values lie in a row.
    pub dtype: KeyDtype,
}

impl Geometry {
    /// The geometry of a model whose keys and values are kept as they are.
    pub fn of(shape: &ModelShape) -> Self {
        Self::with(shape, KeyDtype::F32)
    }

    /// The geometry of a model.
    pub fn with(shape: &ModelShape, dtype: KeyDtype) -> Self {
        let rows = shape.layers.iter().map(|layer| dtype.row(layer.kv_heads, layer.head_dim));
        Self { row: rows.max().unwrap_or(0), layers: shape.layers.len(), dtype }
    }

    /// Numbers of a page.
    pub fn page(&self) -> usize {
        2 * BLOCK * self.row
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        self.page() * size_of::<f32>()
    }

    /// Tokens whose keys and values so many pages hold.
    pub fn tokens_of_pages(&self, pages: usize) -> usize {
        pages / self.layers.max(1) * BLOCK
    }

    /// Pages that so many tokens of one sequence take.
    pub fn pages_of_tokens(&self, tokens: usize) -> usize {
        self.pages_with(tokens, 0)
    }

    /// Pages that so many tokens take where a block of them takes `more` beside a page a layer.
    pub fn pages_with(&self, tokens: usize, more: usize) -> usize {
        tokens.div_ceil(BLOCK) * (self.layers + more)
    }

    /// Pages that so many numbers of an adapter take.
    pub fn pages_of_numbers(&self, numbers: usize) -> usize {
        numbers.div_ceil(self.page())
    }
}

/// What a model has of the bytes of a pool, and what a draft has that keeps keys and values of as many tokens.
pub fn shares(bytes: usize, own: Geometry, draft: Option<Geometry>) -> [usize; 2] {
    let block = |geometry: Geometry| geometry.layers * geometry.page_bytes();
    let (own, draft) = (block(own), draft.map_or(0, block));
    let share = (bytes as u128 * draft as u128) / (own as u128 + draft as u128).max(1);
    [bytes - share as usize, share as usize]
}

/// A pool of at most `bytes`: the account of its pages, and the numbers in them. Memory that was never used is not touched, so a large pool
/// costs nothing until it fills.
pub fn pool(geometry: Geometry, bytes: usize) -> Result<(Pages, Numbers)> {
    let page = geometry.page();
    let pages = bytes / geometry.page_bytes().max(1);
    // One token of one sequence, and a page for an adapter.
    if pages < geometry.layers + 1 || u32::try_from(pages).is_err() {
        return Err(Error::Pool(format!(
            "a pool of {bytes} bytes has {pages} pages of {} bytes; {} to {} can be used",
            geometry.page_bytes(),
            geometry.layers + 1,
            u32::MAX
        )));
    }
    let mut numbers: Vec<f32> = Vec::new();
    let length = pages.checked_mul(page).filter(|&n| numbers.try_reserve_exact(n).is_ok());
    let length = length.ok_or_else(|| Error::Pool(format!("there is no room for a pool of {bytes} bytes")))?;
    drop(numbers);
    Ok((Pages::new(pages as u32), Numbers { numbers: vec![0.0; length], page }))
}

/// Who uses which pages.
pub struct Pages {
    /// Pages that nobody uses; the last is given out next.
    free: Vec<u32>,
    /// How many hold each page.
    users: Vec<u32>,
}

impl Pages {
    /// So many free pages.
    pub fn new(count: u32) -> Self {
        Self { free: (0..count).rev().collect(), users: vec![0; count as usize] }
    }

    /// Number of pages.
    pub fn count(&self) -> usize {
        self.users.len()
    }

    /// Pages that nobody uses.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes `n` pages, or none if there are not so many.
    pub fn take(&mut self, n: usize) -> Option<Vec<u32>> {
        let rest = self.free.len().checked_sub(n)?;
        let taken = self.free.split_off(rest);
        taken.iter().for_each(|&page| self.users[page as usize] = 1);
        Some(taken)
    }

    /// Uses pages once more that somebody uses.
    pub fn share(&mut self, pages: &[u32]) {
        for &page in pages {
            let users = &mut self.users[page as usize];
            debug_assert!(*users > 0, "a free page is not shared");
            *users += 1;
        }
    }

    /// Gives up one use of each page.
    pub fn release(&mut self, pages: &[u32]) {
        for &page in pages {
            let users = &mut self.users[page as usize];
            debug_assert!(*users > 0, "a free page is not released");
            *users = users.saturating_sub(1);
            if *users == 0 {
                self.free.push(page);
            }
        }
    }

    /// How many use a page.
    pub fn users(&self, page: u32) -> u32 {
        self.users[page as usize]
    }
}

/// What is in the pages.
pub struct Numbers {
    numbers: Vec<f32>,
    page: usize,
}

impl Numbers {
    /// Writes numbers over pages, one after the other.
    pub fn write(&mut self, pages: &[u32], numbers: &[f32]) {
        for (&page, part) in pages.iter().zip(numbers.chunks(self.page)) {
            self.numbers[page as usize * self.page..][..part.len()].copy_from_slice(part);
        }
    }

    /// All numbers, to compute with.
    pub fn all(&mut self) -> &mut [f32] {
        &mut self.numbers
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const GEOMETRY: Geometry = Geometry { row: 2, layers: 3, dtype: KeyDtype::F32 };

    proptest! {
        /// Whatever is taken, shared and released: pages in use are apart, none is lost, and the account is exact.
        #[test]
        fn no_page_is_lost_or_given_twice(acts in prop::collection::vec((0u8..3, 0usize..12), 0..200)) {
            let mut pool = Pages::new(40);
            let mut holders: Vec<Vec<u32>> = Vec::new();
            for (act, n) in acts {
                match act {
                    0 => {
                        let before = pool.free();
                        match pool.take(n) {
                            Some(pages) => {
                                prop_assert_eq!(pages.len(), n);
                                holders.push(pages);
                            }
                            None => prop_assert!(before < n && pool.free() == before),
                        }
                    }
                    1 if !holders.is_empty() => {
                        let pages = holders[n % holders.len()].clone();
                        pool.share(&pages);
                        holders.push(pages);
                    }
                    _ if !holders.is_empty() => {
                        let pages = holders.swap_remove(n % holders.len());
                        pool.release(&pages);
                    }
                    _ => {}
                }
                let mut users: HashMap<u32, u32> = HashMap::new();
                holders.iter().flatten().for_each(|&page| *users.entry(page).or_default() += 1);
                for page in 0..pool.count() as u32 {
                    prop_assert_eq!(pool.users(page), users.get(&page).copied().unwrap_or(0));
                }
                prop_assert_eq!(pool.free(), pool.count() - users.len());
            }
        }
    }

    #[test]
    fn what_is_written_stands_in_its_pages() {
        let (mut pool, mut written) = super::pool(GEOMETRY, 8 * GEOMETRY.page_bytes()).unwrap();
        let page = GEOMETRY.page();
        let _ = pool.take(3);
        let mine = pool.take(2).unwrap();
        let numbers: Vec<f32> = (0..page + 5).map(|i| i as f32).collect();
        written.write(&mine, &numbers);
        let all = written.all();
        assert_eq!(all[mine[0] as usize * page..][..page], numbers[..page]);
        assert_eq!(all[mine[1] as usize * page..][..5], numbers[page..]);
        assert_eq!(GEOMETRY.pages_of_numbers(page + 5), 2);
        assert_eq!(GEOMETRY.pages_of_tokens(17), 6);
    }

    #[test]
    fn a_pool_that_holds_nothing_is_refused() {
        assert!(pool(GEOMETRY, 3 * GEOMETRY.page_bytes()).is_err());
        assert!(pool(GEOMETRY, usize::MAX / 2).is_err());
    }
}
