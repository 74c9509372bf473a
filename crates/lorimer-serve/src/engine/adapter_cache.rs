//! The cache of adapters in the pool: their account ([`AdapterAccount`]), and where each lies.

use std::collections::HashMap;
use std::sync::Arc;

use crate::engine::adapter_account::AdapterAccount;
use crate::engine::pool::Pages;

/// Adapters in the pool by content.
#[derive(Default)]
pub struct AdapterCache {
    account: AdapterAccount,
    all: HashMap<Arc<str>, Vec<u32>>,
}

impl AdapterCache {
    /// Who uses which.
    pub fn account(&mut self) -> &mut AdapterAccount {
        &mut self.account
    }

    /// How many there are, and how many came and went.
    pub fn figures(&self) -> &AdapterAccount {
        &self.account
    }

    /// Takes free pages for an adapter that is not there, which its numbers are to be written to; None where there are not enough.
    pub fn load(&mut self, content: &Arc<str>, count: usize, pages: &mut Pages) -> Option<&[u32]> {
        let taken = pages.take(count)?;
        self.account.insert(content.clone(), count);
        Some(self.all.entry(content.clone()).insert_entry(taken).into_mut())
    }

    /// Where an adapter is.
    pub fn get(&self, content: &str) -> Option<&[u32]> {
        self.all.get(content).map(Vec::as_slice)
    }

    /// Lets unused adapters go until `wanted` pages are free. Whether they are.
    pub fn make_room(&mut self, pages: &mut Pages, wanted: usize) -> bool {
        while pages.free() < wanted {
            let Some((content, _)) = self.account.evict() else { return false };
            if let Some(gone) = self.all.remove(&content) {
                pages.release(&gone);
            }
        }
        true
    }
}
