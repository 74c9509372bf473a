//! The kernels of lesser processors, which `LORIMER_CPU` makes of this one.

use crate::common::{Fixture, lorimer, text};

const LEVELS: [&str; 5] = ["plain", "avx2", "avxvnni", "avx512", "vnni"];

fn at(level: &str, arguments: &[&str]) -> std::process::Output {
    lorimer(arguments).env("LORIMER_CPU", level).output().unwrap()
}

#[test]
fn a_level_that_is_none_is_refused_by_name() {
    for level in ["sse9", "", "AVX2"] {
        let out = at(level, &["methods"]);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{said}");
        assert!(
            said.contains(&format!("LORIMER_CPU `{level}`")) && said.contains("plain, avx2, avxvnni, avx512, vnni"),
            "{said}"
        );
    }
}

/// The flag, then the variable, then the machine; what is no number of threads is refused, or (in the variable, which others read too) passed over.
#[test]
fn threads_are_as_many_as_are_asked_for() {
    let threads = |flags: &[&str], variable: &str| {
        let out = lorimer(&[&["methods", "-v"], flags].concat()).env("RAYON_NUM_THREADS", variable).output().unwrap();
        let said = text(&out.stderr);
        let before = said.split(" threads, peak memory").next().unwrap_or_default();
        (out.status.code(), before.rsplit(' ').next().unwrap_or_default().parse::<usize>().ok())
    };
    let all = std::thread::available_parallelism().unwrap().get();
    assert_eq!(threads(&["--threads", "3"], "5"), (Some(0), Some(3)));
    assert_eq!(threads(&[], "5"), (Some(0), Some(5)));
    for none in ["", "0", "many"] {
        assert_eq!(threads(&[], none), (Some(0), Some(all)), "{none}");
        assert_eq!(threads(&["--threads", none], "5").0, Some(2), "{none}");
    }
}

#[test]
fn kernels_are_measured_or_the_sizes_refused() {
    let bench = |flags: &[&str]| lorimer(&[&["bench", "kernels", "--json"], flags].concat()).output().unwrap();
    let out = bench(&["--rows", "2", "--outputs", "1024", "--inputs", "256", "--storage", "Q6K", "--storage", "int4"]);
    let found: serde_json::Value =
        serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(&out.stderr)));
    let names: Vec<_> = found["kernels"].as_array().unwrap().iter().map(|line| line["storage"].clone()).collect();
    assert_eq!(names, ["Q6K", "int4"]);
    for (flags, says) in [
        (["--inputs", "576", "--storage", "Q6K"], "multiple of that"),
        (["--inputs", "33", "--storage", "f32"], "multiple of 32"),
        (["--inputs", "65536", "--outputs", "65536"], "numbers is asked for"),
        (["--rows", "65536", "--outputs", "65536"], "numbers is asked for"),
    ] {
        let out = bench(&flags);
        assert!(out.status.code() == Some(1) && text(&out.stderr).contains(says), "{flags:?}: {}", text(&out.stderr));
    }
}

/// Training and evaluation give the same numbers with every set of kernels, within the order of sums in f32.
#[test]
fn kernels_of_every_level_agree() {
    let f = Fixture::new();
    let mut losses: Vec<(f64, f64)> = Vec::new();
    for level in LEVELS {
        let output = f.path(level);
        let run = |arguments: &[&str]| -> serde_json::Value {
            let out = at(level, &[arguments, &["--json", "-q"]].concat());
            assert!(out.status.success(), "{level}: {}", text(&out.stderr));
            serde_json::from_slice(&out.stdout).unwrap()
        };
        run(&f.train(&output, &["--max-steps", "5"]));
        let loss = |adapter: &str, dtype: &str| {
            let eval = ["eval", "--model", &f.model, "--data", &f.data, "--adapter", adapter, "--dtype", dtype];
            let json = run(&eval);
            json["loss"].as_f64().unwrap_or_else(|| panic!("{json}"))
        };
        losses.push((loss(&output, "f32"), loss(&output, "int8")));
    }
    for (level, (f32, int8)) in LEVELS.iter().zip(&losses) {
        assert!((f32 - losses[0].0).abs() < 1e-4 && (int8 - losses[0].1).abs() < 1e-4, "{level}: {losses:?}");
    }
}
