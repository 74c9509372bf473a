//! Where the adapters that another is made of are in its object store.

use crate::adapters::names::check_name;

/// Names below the store's prefix that a part may have, the likelier first: its configuration calls it by its way from the adapter's own place, or from
/// the store's prefix, or by its whole URL in the store at `address`.
pub(super) fn names_of_part(adapter: &str, part: &str, address: &str) -> Vec<String> {
    let below = |base: &str, way: &str| -> Option<String> {
        let mut name: Vec<&str> = base.split('/').filter(|p| !p.is_empty()).collect();
        for step in way.split('/') {
            match step {
                "" | "." => {}
                ".." => drop(name.pop()?),
                step => name.push(step),
            }
        }
        Some(name.join("/"))
    };
    let tried = match part.strip_prefix(address.trim_end_matches('/')).and_then(|rest| rest.strip_prefix('/')) {
        Some(rest) => vec![below("", rest)],
        // Another store, or a folder of another machine.
        None if part.contains("://") || part.starts_with('/') => Vec::new(),
        None => vec![below(adapter, part), below("", part)],
    };
    let tried = tried.into_iter().flatten().filter(|name| name != adapter && check_name(name).is_ok());
    let mut names: Vec<String> = tried.collect();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_beside_their_adapter_or_below_the_prefix() {
        let of = |adapter: &str, part: &str| names_of_part(adapter, part, "s3://bucket/all/");
        assert_eq!(of("team/mixed", "../a"), ["team/a"]);
        assert_eq!(of("mixed", "experts/0"), ["mixed/experts/0", "experts/0"]);
        assert_eq!(of("mixed", "./b/"), ["mixed/b", "b"]);
        assert_eq!(of("mixed", "s3://bucket/all/team/c"), ["team/c"]);
        // Out of the prefix, elsewhere, of another machine, or nowhere.
        for part in ["../../a", "s3://bucket/other/c", "s3://other/all/c", "/models/a", "", "..", "a/../../../b"] {
            assert!(of("mixed", part).is_empty(), "{part}");
        }
        assert!(of("mixed", "..\\a").iter().all(|name| check_name(name).is_ok()));
    }
}
