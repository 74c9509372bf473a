//! The store of adapters: names, confinement, replacement, bounds, and what is left after a restart.

use std::path::Path;
use std::sync::Arc;

use candle_core::DType;
use lorimer_adapter::file::store::{CONFIG_FILE, WEIGHTS_FILE};
use lorimer_model::weights::LoadDtype;
use lorimer_serve::Hosted;
use lorimer_serve::adapters::store::{Code, Put, REGISTRY_FILE, Store, StoreError, StoreSettings};
use rand::{Rng, SeedableRng};

use crate::prelude::*;
use crate::tiny;

fn model() -> Decoder {
    tiny::model_as(DType::F32, LoadDtype::Stored)
}

/// Writes an adapter that does something; another `seed`, other content.
fn write(model: &dyn BaseModel, folder: &Path, settings: &str, seed: u64) {
    let serde_json::Value::Object(settings) = serde_json::from_str(settings).unwrap() else { panic!("settings") };
    let adapter = Adapter::attach(model, methods::build("lora", &settings).unwrap(), seed).unwrap();
    tiny::move_all(&adapter);
    adapter.to_stored("tiny").unwrap().write(folder, None).unwrap();
}

fn code(result: Result<Arc<Hosted>, StoreError>) -> Code {
    result.map(|h| h.content_id.clone()).unwrap_err().code
}

fn open(root: &Path) -> Store {
    Store::open(StoreSettings::new(root)).unwrap()
}

#[test]
fn names_come_from_folders_and_at_run_time_and_outlive_a_restart() {
    let (model, root) = (model(), tempfile::tempdir().unwrap());
    for (name, seed) in [("a", 1), ("tenant/b", 2), ("deep/er/c", 3)] {
        write(&model, &root.path().join(name), r#"{"r": 2}"#, seed);
    }
    let store = open(root.path());
    assert_eq!(store.list().iter().map(|l| l.name.as_str()).collect::<Vec<_>>(), ["a", "deep/er/c", "tenant/b"]);
    let a = store.get(&model, "a").unwrap();
    assert!(Arc::ptr_eq(&a, &store.get(&model, "a").unwrap()), "read once");
    // Folders that come later are found by their names.
    write(&model, &root.path().join("late"), r#"{"r": 2}"#, 4);
    store.get(&model, "late").unwrap();
    // Another name for a folder: created, not created twice, replaced by comparison only, replaced in any case.
    let b = Path::new("tenant/b");
    let put = |name: &str, path: &Path, how: Put| store.put(&model, name, path, &how);
    let first = put("alias", Path::new("a"), Put::Create).unwrap();
    assert_eq!(first.content_id, a.content_id);
    assert_eq!(code(put("alias", b, Put::Create)), Code::AdapterExists);
    assert_eq!(code(put("alias", b, Put::Swap("sha256:other".into()))), Code::ContentChanged);
    assert_eq!(store.get(&model, "alias").unwrap().content_id, a.content_id);
    let second = put("alias", b, Put::Swap(a.content_id.clone())).unwrap();
    assert_ne!(second.content_id, a.content_id);
    assert_eq!(code(put("none", b, Put::Swap(a.content_id.clone()))), Code::AdapterNotFound);
    put("alias", Path::new("late"), Put::Upsert).unwrap();
    store.remove("a").unwrap();
    assert_eq!(store.remove("a").unwrap_err().code, Code::AdapterNotFound);
    let before: Vec<String> = store.list().into_iter().map(|l| l.name).collect();
    assert_eq!(before, ["alias", "deep/er/c", "late", "tenant/b"]);
    // A new process finds the same: names given stay given, names taken away stay away.
    let again = open(root.path());
    assert_eq!(again.list().into_iter().map(|l| l.name).collect::<Vec<_>>(), before);
    let late = again.get(&model, "late").unwrap();
    assert_eq!(again.get(&model, "alias").unwrap().content_id, late.content_id);
    assert_eq!(code(again.get(&model, "a")), Code::AdapterNotFound);
}

#[test]
fn changed_files_are_read_again_and_running_requests_keep_what_they_have() {
    let (model, root) = (model(), tempfile::tempdir().unwrap());
    let folder = root.path().join("a");
    write(&model, &folder, r#"{"r": 2}"#, 1);
    let store = open(root.path());
    let old = store.get(&model, "a").unwrap();
    write(&model, &folder, r#"{"r": 3}"#, 2);
    let new = store.get(&model, "a").unwrap();
    assert_ne!(old.content_id, new.content_id);
    assert_eq!((old.rank, new.rank), (2, 3));
    // A load that fails disturbs nothing, and is told each time.
    std::fs::write(folder.join(WEIGHTS_FILE), b"half").unwrap();
    for _ in 0..2 {
        let error = store.get(&model, "a").unwrap_err();
        assert_eq!(error.code, Code::AdapterInvalid);
        assert!(!error.message.contains(root.path().to_str().unwrap()), "{error}");
    }
    write(&model, &folder, r#"{"r": 3}"#, 2);
    assert_eq!(store.get(&model, "a").unwrap().content_id, new.content_id);
}

/// A file of the same length with the same time as the one before is another all the same: written over in place at once, moved there, and when
/// what was there had been settled for long. To be seen to fail: a stamp of lengths and times of modification only, or one that trusts a
/// file that was changed just before it was taken.
#[test]
fn files_are_told_apart_by_more_than_time_and_length() {
    let (model, root, other) = (model(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let folder = root.path().join("a");
    write(&model, &folder, r#"{"r": 2}"#, 1);
    write(&model, other.path(), r#"{"r": 2}"#, 2);
    let (first, second) = (folder.join(WEIGHTS_FILE), other.path().join(WEIGHTS_FILE));
    let modified = std::fs::metadata(&first).unwrap().modified().unwrap();
    let bytes = [&first, &second].map(|path| std::fs::read(path).unwrap());
    assert_eq!(bytes[0].len(), bytes[1].len());
    let store = open(root.path());
    let content = || store.get(&model, "a").unwrap().content_id.clone();
    let before = content();
    std::fs::write(&first, &bytes[1]).unwrap();
    let contents = [before, content()];
    assert_ne!(contents[0], contents[1]);
    let put_back = || std::fs::File::options().write(true).open(&first).unwrap().set_modified(modified).unwrap();
    // Many times within one tick of the clock.
    for i in 0..40 {
        std::fs::write(&first, &bytes[i % 2]).unwrap();
        put_back();
        assert_eq!(content(), contents[i % 2], "written over, {i}");
        assert_eq!(store.cached("a").map_or(contents[i % 2].clone(), |h| h.content_id.clone()), contents[i % 2]);
    }
    // Settled, and then changed.
    std::thread::sleep(std::time::Duration::from_millis(2300));
    assert_eq!(
        (content(), store.cached("a").is_some()),
        (contents[1].clone(), true),
        "what has settled is not read again"
    );
    std::fs::write(other.path().join("moved"), &bytes[0]).unwrap();
    std::fs::File::options().write(true).open(other.path().join("moved")).unwrap().set_modified(modified).unwrap();
    std::fs::rename(other.path().join("moved"), &first).unwrap();
    assert!(store.cached("a").is_none());
    assert_eq!(content(), contents[0], "moved there");
}

/// What another server of the same folder changes is learnt, and both keep what both gave. While one waits to write, others are answered.
#[test]
fn two_servers_over_one_folder_keep_each_others_names() {
    let (model, root) = (model(), tempfile::tempdir().unwrap());
    for (name, seed) in [("a", 1), ("b", 2)] {
        write(&model, &root.path().join(name), r#"{"r": 2}"#, seed);
    }
    let stores = [open(root.path()), open(root.path())];
    std::thread::scope(|scope| {
        for (i, store) in stores.iter().enumerate() {
            let model = &model;
            scope.spawn(move || {
                for n in 0..10 {
                    store.put(model, &format!("s{i}-{n}"), Path::new("a"), &Put::Create).unwrap();
                }
            });
        }
    });
    assert_eq!(code(stores[0].put(&model, "s1-3", Path::new("b"), &Put::Create)), Code::AdapterExists);
    assert_eq!(open(root.path()).list().len(), 22);
    stores[0].put(&model, "s1-3", Path::new("b"), &Put::Upsert).unwrap();
    stores[0].remove("s1-4").unwrap();
    stores[0].remove("b").unwrap();
    std::thread::sleep(lorimer_serve::adapters::mirror::FRESH + std::time::Duration::from_millis(100));
    assert_eq!(stores[1].list().len(), 20);
    let b = stores[0].get(&model, "s1-3").unwrap();
    assert_eq!(stores[1].get(&model, "s1-3").unwrap().content_id, b.content_id);
    assert_eq!(code(stores[1].get(&model, "s1-4")), Code::AdapterNotFound);
    assert_eq!(code(stores[1].get(&model, "b")), Code::AdapterNotFound);
    // Another server holds the names for a second.
    let lock = std::fs::File::options()
        .write(true)
        .open(root.path().join(lorimer_serve::adapters::registry::LOCK_FILE))
        .unwrap();
    lock.lock().unwrap();
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| stores[0].put(&model, "late", Path::new("a"), &Put::Create).map(|_| ()));
        for _ in 0..10 {
            let begun = std::time::Instant::now();
            stores[0].get(&model, "a").unwrap();
            assert_eq!(stores[0].list().len(), 20);
            assert!(begun.elapsed().as_secs_f64() < 0.5, "a name that is being written held up others");
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        drop(lock);
        writing.join().unwrap().unwrap();
    });
    assert!(stores[0].contains("late"));
}

#[cfg(unix)]
#[test]
fn paths_and_names_that_leave_the_root_are_refused() {
    use std::os::unix::fs::symlink;
    let (model, all) = (model(), tempfile::tempdir().unwrap());
    let (root, outside) = (all.path().join("root"), all.path().join("outside"));
    write(&model, &outside, r#"{"r": 2}"#, 1);
    write(&model, &root.join("good"), r#"{"r": 2}"#, 2);
    symlink(&outside, root.join("link")).unwrap();
    symlink(root.join("good"), root.join("inner")).unwrap();
    write(&model, &root.join("hollow"), r#"{"r": 2}"#, 3);
    std::fs::remove_file(root.join("hollow").join(WEIGHTS_FILE)).unwrap();
    symlink(outside.join(WEIGHTS_FILE), root.join("hollow").join(WEIGHTS_FILE)).unwrap();
    let store = open(&root);
    assert_eq!(store.list().iter().map(|l| l.name.as_str()).collect::<Vec<_>>(), ["good", "hollow"]);
    let long = "x".repeat(201);
    for name in ["", "..", "../outside", "/etc", "a//b", "a/./b", ".hidden", "a b", "a\0", "good/", "ä", long.as_str()]
    {
        assert_eq!(code(store.get(&model, name)), Code::InvalidName, "{name:?}");
        assert_eq!(code(store.put(&model, name, Path::new("good"), &Put::Upsert)), Code::InvalidName, "{name:?}");
        assert_eq!(store.remove(name).unwrap_err().code, Code::InvalidName, "{name:?}");
    }
    assert_eq!(code(store.get(&model, "link")), Code::AdapterNotFound);
    assert_eq!(code(store.get(&model, "hollow")), Code::PathRefused);
    for path in ["../outside", "good/../../outside", "link", "", ".", "/", outside.to_str().unwrap()] {
        let refused = code(store.put(&model, "new", Path::new(path), &Put::Upsert));
        assert!(matches!(refused, Code::PathRefused), "{path:?}: {refused:?}");
    }
    assert_eq!(code(store.put(&model, "new", Path::new("nothing"), &Put::Upsert)), Code::AdapterNotFound);
    // A link that stays inside, and a whole path that does, are what they lead to.
    store.put(&model, "new", Path::new("inner"), &Put::Create).unwrap();
    store.put(&model, "newer", &root.join("good"), &Put::Create).unwrap();
}

#[test]
fn what_is_beyond_the_bounds_is_refused_and_what_is_least_used_gives_way() {
    let (model, root) = (model(), tempfile::tempdir().unwrap());
    for i in 0..6 {
        write(&model, &root.path().join(format!("a{i}")), r#"{"r": 4}"#, i);
    }
    write(&model, &root.path().join("large"), r#"{"r": 9}"#, 9);
    let bytes = open(root.path()).get(&model, "a0").unwrap().bytes();
    let settings = StoreSettings { host_bytes: 3 * bytes.next_multiple_of(1024), ..StoreSettings::new(root.path()) };
    let store = Store::open(StoreSettings { max_rank: 8, ..settings.clone() }).unwrap();
    assert_eq!(code(store.get(&model, "large")), Code::LimitExceeded);
    for i in 0..6 {
        store.get(&model, &format!("a{i}")).unwrap();
        let (held, adapters) = store.host();
        assert!(held <= settings.host_bytes && adapters == (i + 1).min(3));
    }
    let small = Store::open(StoreSettings { host_bytes: bytes / 2, ..settings.clone() }).unwrap();
    assert_eq!(code(small.get(&model, "a0")), Code::LimitExceeded);
    let short = Store::open(StoreSettings { max_file_bytes: 100, ..settings }).unwrap();
    assert_eq!(code(short.get(&model, "a0")), Code::AdapterInvalid);
}

/// Truncated, overwritten and emptied files, adapters of another base or without effect: an error each, never a panic, and nothing is kept.
#[test]
fn damaged_adapters_are_refused() {
    let (model, root) = (model(), tempfile::tempdir().unwrap());
    let folder = root.path().join("a");
    write(&model, &folder, r#"{"r": 2}"#, 1);
    let whole = [WEIGHTS_FILE, CONFIG_FILE].map(|name| (name, std::fs::read(folder.join(name)).unwrap()));
    let store = open(root.path());
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
    let mut refused = 0;
    for i in 0..300 {
        let (name, bytes) = &whole[i % 2];
        let mut bytes = bytes.clone();
        match rng.random_range(0..3) {
            0 => bytes.truncate(rng.random_range(0..bytes.len())),
            1 => (0..rng.random_range(1..9)).for_each(|_| {
                let at = rng.random_range(0..bytes.len().min(400));
                bytes[at] = rng.random();
            }),
            _ => bytes.iter_mut().take(8).for_each(|b| *b = 0xff),
        }
        std::fs::write(folder.join(name), &bytes).unwrap();
        refused += usize::from(store.get(&model, "a").is_err());
        whole.iter().for_each(|(name, bytes)| std::fs::write(folder.join(name), bytes).unwrap());
    }
    assert!(refused > 150, "{refused}");
    store.get(&model, "a").unwrap();
    std::fs::write(root.path().join(REGISTRY_FILE), b"{").unwrap();
    let error = Store::open(StoreSettings::new(root.path())).err().unwrap();
    assert_eq!(error.code, Code::StoreFailed);
}

/// Whatever bytes an adapter's folder holds, it is served or refused, and no name stands for what was refused.
#[test]
fn ten_thousand_hostile_folders() {
    let (model, root) = (model(), tempfile::tempdir().unwrap());
    let settings = [
        ("lora", r#"{"r": 2}"#),
        ("dora", r#"{"r": 2}"#),
        ("bone", r#"{"r": 2}"#),
        ("vera", r#"{"r": 2}"#),
        ("shira", r#"{"r": 2}"#),
        ("randlora", r#"{"r": 2}"#),
    ];
    let mut whole = Vec::new();
    for (i, (name, settings)) in settings.into_iter().enumerate() {
        let adapter = tiny::attach(&model, name, settings);
        tiny::move_all(&adapter);
        let folder = root.path().join(format!("whole{i}"));
        adapter.to_stored("tiny").unwrap().write(&folder, None).unwrap();
        let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
        whole.push((read(WEIGHTS_FILE), read(CONFIG_FILE)));
    }
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(11);
    let store = open(root.path());
    let folder = root.path().join("hostile");
    std::fs::create_dir(&folder).unwrap();
    let words =
        ["null", "-1", "1e400", "\"\"", "[]", "{}", "18446744073709551615", "0", "true", "\"../x\"", "0.5", "1e9"];
    let (mut good, mut bad) = (0, 0);
    for _ in 0..10_000 {
        let (mut weights, mut config) = whole[rng.random_range(0..whole.len())].clone();
        for _ in 0..rng.random_range(1..4) {
            match rng.random_range(0..8) {
                // Bytes anywhere, the header's length, the header itself.
                0 => (0..rng.random_range(1..8)).for_each(|_| {
                    let at = rng.random_range(0..weights.len());
                    weights[at] = rng.random();
                }),
                1 => weights[..8].copy_from_slice(&(rng.random::<u64>() >> rng.random_range(0..64)).to_le_bytes()),
                2 => {
                    let header = 8..weights.len().min(400);
                    let at = rng.random_range(header);
                    weights[at] = b"0123456789,:[]{}\"aF"[rng.random_range(0..19)];
                }
                3 => weights.truncate(rng.random_range(8..=weights.len())),
                4 => weights.extend((0..rng.random_range(1..64)).map(|_| rng.random::<u8>())),
                // A value of the configuration by another, or bytes of it.
                5 | 6 => {
                    let text = String::from_utf8_lossy(&config).into_owned();
                    let colons: Vec<usize> = text.match_indices(": ").map(|(i, _)| i + 2).collect();
                    if let Some(&at) = colons.get(rng.random_range(0..colons.len().max(1))) {
                        let end = text[at..].find(['\n', ',']).map_or(text.len(), |n| at + n);
                        let word = words[rng.random_range(0..words.len())];
                        config = format!("{}{word}{}", &text[..at], &text[end..]).into_bytes();
                    }
                }
                _ => {
                    let at = rng.random_range(0..config.len());
                    config[at] = rng.random();
                }
            }
            if weights.len() < 16 || config.is_empty() {
                break;
            }
        }
        std::fs::write(folder.join(WEIGHTS_FILE), &weights).unwrap();
        std::fs::write(folder.join(CONFIG_FILE), &config).unwrap();
        match store.put(&model, "hostile-name", Path::new("hostile"), &Put::Upsert) {
            Ok(hosted) => {
                assert!(hosted.numbers.iter().all(|v| v.is_finite()));
                store.remove("hostile-name").unwrap();
                good += 1;
            }
            Err(error) => {
                assert!(
                    matches!(error.code, Code::AdapterInvalid | Code::LimitExceeded) && !error.message.is_empty(),
                    "{error:?}"
                );
                assert!(!store.contains("hostile-name"));
                bad += 1;
            }
        }
    }
    assert!(good > 100 && bad > 3000, "{good} were served, {bad} refused");
}

/// A mixture below the root, in a folder or in an object store (here a folder named by its URL): its experts are read with it and counted as what they
/// take in it; one that changes or goes is noticed. To be seen to fail: a stamp without the parts; a mirror that fetches the mixture alone.
#[test]
fn a_mixture_is_read_with_its_experts_and_follows_them() {
    let model = model();
    for mirrored in [false, true] {
        let (root, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let at = |name: &str| root.path().join(name);
        let part = |i: u64| {
            write(&model, &at(&format!("experts/{i}")), r#"{"r": 2}"#, i + 1);
            StoredAdapter::read(&at(&format!("experts/{i}"))).unwrap().into_part().unwrap()
        };
        let parts = [part(0), part(1)];
        for (name, layerwise) in [("team/mixed", true), ("other", false)] {
            let settings = serde_json::json!({ "layerwise_scalings": layerwise, "init": "peft" });
            let mut method = methods::build("xlora", settings.as_object().unwrap()).unwrap();
            method.take_parts(&parts).unwrap();
            let mixture = Adapter::attach(&model, method, 3).unwrap();
            mixture.to_stored("tiny").unwrap().write(&at(name), None).unwrap();
        }
        // Long enough ago for times to tell that a file is the same, so that not only content does.
        std::thread::sleep(std::time::Duration::from_millis(2300));
        let address = mirrored.then(|| format!("file://{}", root.path().display()));
        let folder = if mirrored { cache.path() } else { root.path() };
        let settings = StoreSettings { address, ..StoreSettings::new(folder) };
        let store = Store::open(settings.clone()).unwrap();
        assert_eq!(store.list().len(), 4);
        let first = store.get(&model, "team/mixed").unwrap();
        let numbers: usize = parts.iter().flat_map(|part| part.tensors.values()).map(|t| t.elem_count()).sum();
        assert!(first.router.is_some() && first.bytes() > 4 * numbers, "{mirrored}: {} {numbers}", first.bytes());
        assert_eq!(store.host(), (first.bytes().next_multiple_of(1024), 1));
        assert!(Arc::ptr_eq(&first, &store.get(&model, "team/mixed").unwrap()), "read once");
        // An expert is an adapter of its own as well; where memory is short, one gives way to the other.
        let tight =
            Store::open(StoreSettings { host_bytes: first.bytes().next_multiple_of(1024), ..settings }).unwrap();
        for name in ["team/mixed", "experts/0", "other", "team/mixed"] {
            tight.get(&model, name).unwrap();
            assert!(tight.host().0 <= first.bytes().next_multiple_of(1024) && tight.host().1 == 1, "{name}");
        }
        // Another expert under the old name: this mixture does not say which it was trained with, so it is served with the new one.
        write(&model, &at("experts/1"), r#"{"r": 3}"#, 9);
        let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
        let now = loop {
            let now = store.get(&model, "team/mixed").unwrap();
            if now.content_id != first.content_id {
                break now;
            }
            assert!(std::time::Instant::now() < end, "{mirrored}: the old expert is served on");
            std::thread::sleep(std::time::Duration::from_millis(200));
        };
        assert_eq!(now.rank, 5);
        // One that is not there.
        std::fs::remove_dir_all(at("experts/1")).unwrap();
        let fresh = tempfile::tempdir().unwrap();
        let folder = if mirrored { fresh.path() } else { root.path() };
        let address = mirrored.then(|| format!("file://{}", root.path().display()));
        let again = Store::open(StoreSettings { address, ..StoreSettings::new(folder) }).unwrap();
        let error = again.get(&model, "other").map(|h| h.content_id.clone()).unwrap_err();
        assert_eq!(error.code, Code::AdapterInvalid);
        assert!(error.message.contains("expert 1 should be at `../experts/1`"), "{error}");
        assert!(!error.message.contains(&root.path().display().to_string()), "{error}");
    }
}
