//! Keys and values of prompts that were computed before, kept in the pool until their pages are wanted.
//!
//! A tree of blocks of [`BLOCK`] tokens. Its roots are the adapters' contents with their weights, so an adapter that is replaced under the
//! same name finds nothing of the old one's. Blocks are compared token by token: no hash can stand for another prompt.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::engine::pool::{BLOCK, Pages};

/// A block in the tree, or a root.
pub type NodeId = u64;

#[derive(Debug)]
struct Node {
    /// What it is below, and its tokens: where the index has it.
    key: (NodeId, [u32; BLOCK]),
    pages: Vec<u32>,
    used: u64,
    children: usize,
}

/// The tree.
#[derive(Default)]
pub struct PrefixCache {
    nodes: HashMap<NodeId, Node>,
    index: HashMap<(NodeId, [u32; BLOCK]), NodeId>,
    roots: HashMap<Arc<str>, NodeId>,
    /// Roots with what they are of, and the blocks below each.
    below: HashMap<NodeId, (Arc<str>, usize)>,
    /// Blocks that nothing is below, by when they were used.
    leaves: BTreeSet<(u64, NodeId)>,
    next: NodeId,
    clock: u64,
}

impl PrefixCache {
    fn id(&mut self) -> NodeId {
        self.next += 1;
        self.next
    }

    /// The whole blocks that the tokens begin with, of prompts whose keys and values depend on `content` alike; at most
    /// `tokens.len() - 1` tokens, so that one is left to compute.
    pub fn find(&mut self, content: &str, tokens: &[u32]) -> Vec<NodeId> {
        self.clock += 1;
        let mut found = Vec::new();
        let Some(&(mut at)) = self.roots.get(content) else { return found };
        let most = tokens.len().saturating_sub(1) / BLOCK;
        for block in tokens.chunks_exact(BLOCK).take(most) {
            let Ok(block) = <[u32; BLOCK]>::try_from(block) else { break };
            let Some(&id) = self.index.get(&(at, block)) else { break };
            if let Some(node) = self.nodes.get_mut(&id) {
                if self.leaves.remove(&(node.used, id)) {
                    self.leaves.insert((self.clock, id));
                }
                node.used = self.clock;
            }
            found.push(id);
            at = id;
        }
        found
    }

    /// Pages of a block.
    pub fn pages(&self, id: NodeId) -> &[u32] {
        self.nodes.get(&id).map_or(&[], |node| &node.pages)
    }

    /// Puts a computed block below `parent`, or first for `content`, and uses its pages once more. Gives the block's place. Where that was
    /// filled before, the pages there take the place of `pages`, which are given back: so the cache keeps nothing for a sequence that the
    /// sequence does not hold itself. None if the parent is no longer there.
    pub fn insert(
        &mut self,
        content: &str,
        parent: Option<NodeId>,
        tokens: &[u32; BLOCK],
        pages: &mut Vec<u32>,
        pool: &mut Pages,
    ) -> Option<NodeId> {
        let above = match parent {
            Some(parent) => self.nodes.contains_key(&parent).then_some(parent)?,
            None => match self.roots.get(content) {
                Some(&root) => root,
                None => {
                    let (root, content) = (self.id(), Arc::<str>::from(content));
                    self.roots.insert(content.clone(), root);
                    self.below.insert(root, (content, 0));
                    root
                }
            },
        };
        let key = (above, *tokens);
        if let Some(&id) = self.index.get(&key) {
            let there = self.pages(id).to_vec();
            pool.share(&there);
            pool.release(&std::mem::replace(pages, there));
            return Some(id);
        }
        match (self.nodes.get_mut(&above), self.below.get_mut(&above)) {
            (Some(node), _) => {
                node.children += 1;
                self.leaves.remove(&(node.used, above));
            }
            (None, Some((_, count))) => *count += 1,
            (None, None) => {}
        }
        pool.share(pages);
        let id = self.id();
        self.clock += 1;
        self.leaves.insert((self.clock, id));
        self.nodes.insert(id, Node { key, pages: pages.to_vec(), used: self.clock, children: 0 });
        self.index.insert(key, id);
        Some(id)
    }

    /// Gives up blocks that no sequence uses, those unused for longest first and never one before those below it, until `wanted` pages
    /// are free or there is no such block. Whether they are.
    pub fn make_room(&mut self, pool: &mut Pages, wanted: usize) -> bool {
        // Blocks that a sequence uses are passed over: as many at most as there are sequences, each with one last block.
        let mut after = (0, 0);
        while pool.free() < wanted {
            let idle = |&&(_, id): &&(u64, NodeId)| self.pages(id).iter().all(|&page| pool.users(page) == 1);
            let Some(&leaf) = self.leaves.range(after..).find(idle) else { return false };
            // What it was below may be older than it.
            let above = self.remove(leaf.1, pool);
            after = above.map_or(leaf, |above| leaf.min(above));
        }
        true
    }

    /// Takes a block out. Gives the block above it, if nothing is below that any more.
    fn remove(&mut self, id: NodeId, pool: &mut Pages) -> Option<(u64, NodeId)> {
        let node = self.nodes.remove(&id)?;
        self.leaves.remove(&(node.used, id));
        self.index.remove(&node.key);
        pool.release(&node.pages);
        let above = node.key.0;
        if let Some(parent) = self.nodes.get_mut(&above) {
            parent.children -= 1;
            let leaf = (parent.children == 0).then_some((parent.used, above));
            self.leaves.extend(leaf);
            return leaf;
        }
        if let Some((_, count)) = self.below.get_mut(&above) {
            *count -= 1;
            if *count == 0
                && let Some((content, _)) = self.below.remove(&above)
            {
                self.roots.remove(&content);
            }
        }
        None
    }

    /// Pages that only the cache holds.
    pub fn idle_pages(&self, pool: &Pages) -> usize {
        self.nodes.values().flat_map(|n| &n.pages).filter(|&&page| pool.users(page) == 1).count()
    }

    /// Number of blocks.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there is no block.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(first: u32) -> [u32; BLOCK] {
        std::array::from_fn(|i| first + i as u32)
    }

    #[test]
    fn prompts_are_found_by_content_and_given_up_from_their_ends() {
        let mut pool = Pages::new(8);
        let mut cache = PrefixCache::default();
        let (mut one, mut two) = (pool.take(2).unwrap(), pool.take(2).unwrap());
        let first = cache.insert("a", None, &block(0), &mut one, &mut pool).unwrap();
        let second = cache.insert("a", Some(first), &block(50), &mut two, &mut pool).unwrap();
        // Where the same is there, it is used in place of one's own.
        let mut again = pool.take(2).unwrap();
        assert_eq!(cache.insert("a", None, &block(0), &mut again, &mut pool), Some(first));
        assert_eq!((&again, pool.free()), (&one, 4));
        pool.release(&again);
        pool.release(&one);
        pool.release(&two);
        let mut tokens = [block(0), block(50)].concat();
        // One token has to be left to compute.
        assert_eq!(cache.find("a", &tokens), [first]);
        tokens.push(7);
        assert_eq!(cache.find("a", &tokens), [first, second]);
        assert!(cache.find("b", &tokens).is_empty());
        assert_eq!((pool.free(), cache.idle_pages(&pool)), (4, 4));
        // While a sequence uses the second, neither can go.
        pool.share(&two);
        assert!(!cache.make_room(&mut pool, 5));
        pool.release(&two);
        assert!(cache.make_room(&mut pool, 5));
        assert_eq!(cache.find("a", &tokens), [first]);
        assert!(cache.make_room(&mut pool, 8));
        assert!(cache.is_empty() && cache.find("a", &tokens).is_empty());
        assert!(!cache.make_room(&mut pool, 9));
        // Its root went with the last block, and a block below it is no longer taken.
        assert!(cache.roots.is_empty() && cache.below.is_empty() && cache.leaves.is_empty());
    }

    /// Beside the rule written out: of the blocks that nothing is below and nobody uses, the one unused for longest goes.
    #[test]
    fn what_was_unused_for_longest_goes_first() {
        use rand::{Rng, SeedableRng};
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(5);
        let mut pool = Pages::new(64);
        let mut cache = PrefixCache::default();
        let mut held: Vec<Vec<u32>> = Vec::new();
        for round in 0..4000 {
            let content = ["a", "b", "c"][rng.random_range(0..3)];
            let tokens: Vec<u32> =
                (0..rng.random_range(1..5)).flat_map(|_| block(rng.random_range(0..3) * 100)).collect();
            let mut parent = cache.find(content, &[tokens.as_slice(), &[0]].concat()).last().copied();
            let there = cache.find(content, &[tokens.as_slice(), &[0]].concat()).len();
            for tokens in tokens.chunks_exact(BLOCK).skip(there) {
                let Some(mut own) = pool.take(1) else { break };
                parent = cache.insert(content, parent, tokens.try_into().unwrap(), &mut own, &mut pool);
                // Some are still used.
                match rng.random_range(0..8) {
                    0 => held.push(own),
                    _ => pool.release(&own),
                }
            }
            if held.len() > 12 {
                pool.release(&held.swap_remove(0));
            }
            let wanted = rng.random_range(0..6);
            let mut expected: HashMap<NodeId, (u64, usize, NodeId, u32)> =
                cache.nodes.iter().map(|(&id, n)| (id, (n.used, n.children, n.key.0, n.pages[0]))).collect();
            let mut free = pool.free();
            while free < wanted {
                let idle = expected.iter().filter(|(_, n)| n.1 == 0 && pool.users(n.3) == 1);
                let Some((_, id)) = idle.map(|(&id, n)| (n.0, id)).min() else { break };
                let above = expected.remove(&id).unwrap().2;
                expected.entry(above).and_modify(|n| n.1 -= 1);
                free += 1;
            }
            assert_eq!(cache.make_room(&mut pool, wanted), free >= wanted, "round {round}");
            let (mut left, mut right): (Vec<_>, Vec<_>) = (cache.nodes.keys().collect(), expected.keys().collect());
            left.sort_unstable();
            right.sort_unstable();
            assert_eq!(left, right, "round {round}");
            let leaves = cache.nodes.values().filter(|n| n.children == 0).count();
            assert_eq!((leaves, cache.roots.len()), (cache.leaves.len(), cache.below.len()), "round {round}");
        }
    }
}
