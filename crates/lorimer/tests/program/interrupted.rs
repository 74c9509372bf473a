//! `lorimer quantize` that is told to stop: Ctrl-C (SIGINT) and SIGTERM.
#![cfg(unix)]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use lorimer::model::weights::SafetensorsFile;

use crate::common::{Fixture, lorimer, text};

/// Every file of a folder, by its path below it.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(place) = open.pop() {
        for entry in std::fs::read_dir(place).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => open.push(path),
                false => {
                    let name = path.strip_prefix(folder).unwrap().display().to_string();
                    found.insert(name, std::fs::read(&path).unwrap());
                }
            }
        }
    }
    found
}

/// Waits until a run has made a file, or ends, or takes too long.
fn wait_until(child: &mut Child, begun: &Path) {
    let patience = Instant::now() + Duration::from_secs(120);
    while !begun.exists() && child.try_wait().unwrap().is_none() && Instant::now() < patience {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Runs until `begun` is there, then sends a signal.
fn interrupted(mut command: Command, begun: &Path, signal: &str) -> Output {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until(&mut child, begun);
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
    child.wait_with_output().unwrap()
}

/// A sentence, the exit code of a run that was broken off, nothing that looks like a result, and the same bytes from the same command as from a run that was
/// left alone. The signal comes while gradients are computed, while configurations are tried and between matrices. To be seen to fail: a run that does not
/// hear of the signal.
#[test]
fn a_run_that_is_told_to_stop_goes_on_where_it_was() {
    let f = Fixture::new();
    let many = f.path("many.jsonl");
    std::fs::write(&many, std::fs::read_to_string(&f.data).unwrap().repeat(40)).unwrap();
    let lq = ["--bits", "3", "--rank", "2", "--grid", "paper", "--steps", "3", "--fisher", &f.data, "--samples", "6"];
    let fisher = ["--bits", "3", "--rank", "2", "--fisher", &many, "--samples", "400"];
    let gptq = ["--method", "gptq", "--group-size", "16", "--calibration", &many, "--samples", "400"];
    let cases: [(&str, &[&str], &str, &str); 5] = [
        ("gradients", &fisher, "identity.json", "-INT"),
        ("killed-gradients", &fisher, "fisher.safetensors", "-KILL"),
        ("configurations", &lq, "fisher.safetensors", "-TERM"),
        ("matrices", &gptq, "matrices/0.json", "-INT"),
        ("later-matrices", &gptq, "matrices/7.json", "-TERM"),
    ];
    for (name, more, begun, signal) in cases {
        let command = |output: &str, cache: &str| {
            let mut command = lorimer(&[&["quantize", "--model", &f.model, "--output", output], more].concat());
            command.env("LORIMER_HOME", f.path(cache));
            command
        };
        let (whole, out) = (f.path(&format!("{name}.whole")), f.path(name));
        let left_alone = command(&whole, "cache-of-others").output().unwrap();
        assert!(left_alone.status.success(), "{name}: {}", text(&left_alone.stderr));
        let partial = f.folder.path().join(format!("{name}.partial"));
        let told = interrupted(command(&out, "cache"), &partial.join(begun), signal);
        let said = text(&told.stderr);
        if signal == "-KILL" {
            // Nobody was asked: the sums of some rows are there all the same.
            let sums = SafetensorsFile::open(&partial.join(begun)).unwrap();
            let rows = sums.load("rows").unwrap().unwrap().to_scalar::<i64>().unwrap();
            assert!(told.status.code().is_none() && rows > 0 && rows < 400, "{rows} rows");
        } else {
            assert_eq!(told.status.code(), Some(130), "{name}: {said}");
            assert!(said.contains("interrupted; the same command goes on from there"), "{name}: {said}");
        }
        assert!(told.stdout.is_empty() && !Path::new(&out).exists(), "{name}");
        let looks_whole =
            files(&partial).into_keys().find(|file| file.ends_with("config.json") || file.contains("output"));
        assert_eq!(looks_whole, None, "{name}");
        let again = command(&out, "cache").output().unwrap();
        assert!(again.status.success() && !partial.exists(), "{name}: {}", text(&again.stderr));
        let (mut expected, mut found) = (files(Path::new(&whole)), files(Path::new(&out)));
        // They name the folder that they are in.
        for all in [&mut expected, &mut found] {
            for named in ["quantization.json", "adapter/adapter_config.json", "adapter/lorimer.json"] {
                if let Some(bytes) = all.get_mut(named) {
                    *bytes = text(bytes).replace(&whole, &out).into_bytes();
                }
            }
        }
        assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
        for (file, bytes) in expected {
            assert!(bytes == found[&file], "{name}: {file} differs");
        }
    }
}

/// A second signal ends the run at once, and it goes on from what was kept.
#[test]
fn a_second_signal_ends_it_at_once() {
    let f = Fixture::new();
    let many = f.path("many.jsonl");
    std::fs::write(&many, std::fs::read_to_string(&f.data).unwrap().repeat(40)).unwrap();
    let out = f.path("out");
    let all = ["quantize", "--model", &f.model, "--method", "gptq", "--group-size", "16", "--calibration", &many];
    let all = [&all[..], &["--samples", "900", "--output", &out]].concat();
    let mut child = lorimer(&all).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until(&mut child, &f.folder.path().join("out.partial/identity.json"));
    for _ in 0..2 {
        let _ = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(!Path::new(&out).exists());
    assert!(lorimer(&all).output().unwrap().status.success());
}
