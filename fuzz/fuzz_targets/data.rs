//! Any bytes as a data file; the first byte chooses its kind: `cargo fuzz run data`.
#![no_main]
use libfuzzer_sys::fuzz_target;
use lorimer_train::data::{detect, read_rows, sample};

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, content)) = bytes.split_first() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(["a.jsonl", "a.json", "a.csv", "a.parquet"][usize::from(kind % 4)]);
    std::fs::write(&path, content).unwrap();
    let Ok(rows) = read_rows(&path, Some(1000)) else { return };
    if let Ok(format) = detect(&path, &rows) {
        for row in rows.iter().filter_map(|r| r.value.as_ref().ok()) {
            let _ = sample(row, format);
        }
    }
});
