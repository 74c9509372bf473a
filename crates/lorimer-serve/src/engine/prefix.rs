//! Keys and values of prompts that were computed before, kept in the pool until their pages are wanted.
//!
//! A tree of blocks of [`BLOCK`] tokens. Its roots are the adapters' contents with their weights, so an adapter that is replaced under the
//! same name finds nothing of the old one's. Blocks are compared token by token: no hash can stand for another prompt.

use std::collections::HashMap;

use crate::engine::pool::{BLOCK, Pages};

/// A block in the tree, or a root.
pub type NodeId = u64;

#[derive(Debug)]
struct Node {
    parent: Option<NodeId>,
    /// Where the index has it.
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
    roots: HashMap<String, NodeId>,
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
                    let root = self.id();
                    self.roots.insert(content.to_string(), root);
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
        if let Some(above) = self.nodes.get_mut(&above) {
            above.children += 1;
        }
        pool.share(pages);
        let id = self.id();
        self.clock += 1;
        self.nodes.insert(id, Node { parent, key, pages: pages.to_vec(), used: self.clock, children: 0 });
        self.index.insert(key, id);
        Some(id)
    }

    /// Gives up blocks that no sequence uses, those unused for longest first and never one before those below it, until `wanted` pages
    /// are free or there is no such block. Whether they are.
    pub fn make_room(&mut self, pool: &mut Pages, wanted: usize) -> bool {
        while pool.free() < wanted {
            let idle = |node: &&Node| node.children == 0 && node.pages.iter().all(|&page| pool.users(page) == 1);
            let mut idle: Vec<_> = self.nodes.iter().filter(|(_, n)| idle(n)).map(|(&id, n)| (n.used, id)).collect();
            if idle.is_empty() {
                return false;
            }
            idle.sort_unstable();
            for (_, id) in idle {
                if pool.free() >= wanted {
                    break;
                }
                self.remove(id, pool);
            }
        }
        true
    }

    fn remove(&mut self, id: NodeId, pool: &mut Pages) {
        let Some(node) = self.nodes.remove(&id) else { return };
        self.index.remove(&node.key);
        pool.release(&node.pages);
        match node.parent {
            Some(parent) => {
                if let Some(above) = self.nodes.get_mut(&parent) {
                    above.children -= 1;
                }
            }
            None => {
                let root = node.key.0;
                if !self.index.keys().any(|(parent, _)| *parent == root) {
                    self.roots.retain(|_, &mut id| id != root);
                }
            }
        }
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
    }
}
