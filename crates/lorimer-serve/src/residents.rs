//! Adapters in the pool: the account of [`Residency`], and where each lies.

use std::collections::HashMap;
use std::sync::Arc;

use crate::hosted::Hosted;
use crate::pool::{Geometry, Pool};
use crate::residency::Residency;

/// Adapters in the pool by content.
#[derive(Default)]
pub struct Residents {
    account: Residency,
    all: HashMap<Arc<str>, (Arc<Hosted>, Vec<u32>)>,
}

impl Residents {
    /// Who uses which, and how many there are.
    pub fn account(&mut self) -> &mut Residency {
        &mut self.account
    }

    /// Copies an adapter that is not there into free pages of the pool. Whether there were enough.
    pub fn load(&mut self, hosted: &Arc<Hosted>, geometry: Geometry, pool: &mut Pool) -> bool {
        let Some(pages) = pool.take(hosted.pages(geometry)) else { return false };
        pool.write(&pages, &hosted.numbers);
        let content: Arc<str> = hosted.content_id.as_str().into();
        self.account.insert(content.clone(), pages.len());
        self.all.insert(content, (hosted.clone(), pages));
        true
    }

    /// Where an adapter is.
    pub fn get(&self, content: &str) -> Option<(&Hosted, &[u32])> {
        self.all.get(content).map(|(hosted, pages)| (hosted.as_ref(), pages.as_slice()))
    }

    /// Lets unused adapters go until `wanted` pages are free. Whether they are.
    pub fn make_room(&mut self, pool: &mut Pool, wanted: usize) -> bool {
        while pool.free() < wanted {
            let Some((content, _)) = self.account.evict() else { return false };
            if let Some((_, pages)) = self.all.remove(&content) {
                pool.release(&pages);
            }
        }
        true
    }

    /// Takes an adapter out unless a request uses it. Whether it was taken out.
    pub fn forget(&mut self, content: &str, pool: &mut Pool) -> bool {
        let forgotten = self.account.forget(content);
        if forgotten && let Some((_, pages)) = self.all.remove(content) {
            pool.release(&pages);
        }
        forgotten
    }
}
