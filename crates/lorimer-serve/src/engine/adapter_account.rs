//! Which adapters are in the pool, who uses them, and which give way: the account only, which the engine and the simulator share.

use std::collections::HashMap;
use std::sync::Arc;

/// One adapter.
struct Entry {
    pages: usize,
    /// Running requests that use it.
    leases: usize,
    uses: u64,
    /// What it is worth to keep: the least worth gives way.
    value: f64,
}

/// Adapters by content. Which give way follows Greedy-Dual-Size-Frequency (Cherkasova 1998): worth = L + uses / pages, L being the worth of
/// the last that had to go, so that what was much used long ago is not kept for ever.
#[derive(Default)]
pub struct AdapterAccount {
    all: HashMap<Arc<str>, Entry>,
    pages: usize,
    level: f64,
    /// Adapters put in so far.
    pub loads: u64,
    /// Adapters that had to go so far.
    pub evictions: u64,
}

impl AdapterAccount {
    /// Leases an adapter to a request, if it is there. Whether it is.
    pub fn lease(&mut self, content: &str) -> bool {
        let level = self.level;
        let Some(entry) = self.all.get_mut(content) else { return false };
        entry.leases += 1;
        entry.uses += 1;
        entry.value = level + entry.uses as f64 / entry.pages.max(1) as f64;
        true
    }

    /// Notes a use without a lease.
    pub fn touch(&mut self, content: &str) {
        if self.lease(content) {
            self.unlease(content);
        }
    }

    /// Gives a lease back.
    pub fn unlease(&mut self, content: &str) {
        if let Some(entry) = self.all.get_mut(content) {
            debug_assert!(entry.leases > 0, "only what is leased is given back");
            entry.leases = entry.leases.saturating_sub(1);
        }
    }

    /// Notes an adapter that was not there.
    pub fn insert(&mut self, content: Arc<str>, pages: usize) {
        self.loads += 1;
        self.pages += pages;
        let entry = Entry { pages, leases: 0, uses: 0, value: self.level };
        let before = self.all.insert(content, entry);
        debug_assert!(before.is_none(), "an adapter is put in once");
    }

    /// Takes the adapter out that is worth least of those that nobody uses; its content and pages.
    pub fn evict(&mut self) -> Option<(Arc<str>, usize)> {
        let idle = self.all.iter().filter(|(_, e)| e.leases == 0);
        let least = idle.min_by(|a, b| a.1.value.total_cmp(&b.1.value).then_with(|| a.0.cmp(b.0)));
        let content = least.map(|(content, _)| content.clone())?;
        let gone = self.all.remove(&content)?;
        self.level = self.level.max(gone.value);
        self.pages -= gone.pages;
        self.evictions += 1;
        Some((content, gone.pages))
    }

    /// Number of adapters.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Pages of adapters that running requests use.
    pub fn leased_pages(&self) -> usize {
        self.all.values().filter(|e| e.leases > 0).map(|e| e.pages).sum()
    }

    /// Pages that adapters take.
    pub fn pages(&self) -> usize {
        self.pages
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_used_often_stays_unless_that_was_long_ago() {
        let mut all = AdapterAccount::default();
        for name in ["often", "once", "large"] {
            all.insert(name.into(), if name == "large" { 10 } else { 1 });
        }
        for name in ["often", "often", "often", "once", "large", "large"] {
            assert!(all.lease(name));
            all.unlease(name);
        }
        assert_eq!(all.evict().unwrap().0.as_ref(), "large");
        assert_eq!(all.evict().unwrap().0.as_ref(), "once");
        // Others come and are used twice each: in the end what was used thrice at the beginning has to go.
        let went = (0..20).any(|i| {
            let name = format!("new {i}");
            all.insert(name.as_str().into(), 1);
            for _ in 0..2 {
                all.lease(&name);
                all.unlease(&name);
            }
            all.evict().unwrap().0.as_ref() == "often"
        });
        assert!(went);
    }

    proptest! {
        /// Leased adapters stay, and the pages are those of what is there.
        #[test]
        fn leased_adapters_never_go(acts in prop::collection::vec((0u8..4, 0usize..8), 0..200)) {
            let mut all = AdapterAccount::default();
            let mut there: HashMap<String, (usize, usize)> = HashMap::new();
            for (act, n) in acts {
                let name = n.to_string();
                match act {
                    0 => if let std::collections::hash_map::Entry::Vacant(free) = there.entry(name.clone()) {
                        all.insert(name.as_str().into(), n + 1);
                        free.insert((n + 1, 0));
                    }
                    1 => {
                        let leased = all.lease(&name);
                        prop_assert_eq!(leased, there.contains_key(&name));
                        if let Some(entry) = there.get_mut(&name) { entry.1 += 1; }
                    }
                    2 => if let Some(entry) = there.get_mut(&name).filter(|e| e.1 > 0) {
                        all.unlease(&name);
                        entry.1 -= 1;
                    }
                    _ => match all.evict() {
                        Some((gone, pages)) => {
                            let entry = there.remove(gone.as_ref()).unwrap();
                            prop_assert_eq!(entry, (pages, 0));
                        }
                        None => prop_assert!(there.values().all(|e| e.1 > 0)),
                    }
                }
                prop_assert_eq!(all.pages(), there.values().map(|e| e.0).sum::<usize>());
                let leased = there.values().filter(|e| e.1 > 0).map(|e| e.0);
                prop_assert_eq!(all.leased_pages(), leased.sum::<usize>());
                prop_assert_eq!(all.len(), there.len());
            }
        }
    }
}
