//! `lorimer merge a/ b/ --method NAME --output c/`: adapters that were trained here combined into one, and what is refused.

use crate::common::{Fixture, error, json, ok, run, text};

#[test]
fn trained_adapters_are_combined_into_one_that_is_used_as_any_other() {
    let f = Fixture::new();
    let (a, b, out) = (f.path("a"), f.path("b"), f.path("out"));
    json(&f.train(&a, &["--max-steps", "20", "--rank", "4"]));
    json(&f.train(&b, &["--max-steps", "20", "--rank", "2", "--seed", "1", "--target-modules", "q_proj,v_proj"]));
    let loss = |adapters: &[&str]| {
        let mut all = vec!["eval", "--model", &f.model, "--data", &f.data];
        adapters.iter().for_each(|a| all.extend(["--adapter", a]));
        json(&all)["loss"].as_f64().unwrap()
    };
    // What is combined exactly gives what both give together.
    let told = json(&["merge", &a, &b, "--method", "cat", "--weights", "0.5,-0.25", "--output", &out]);
    assert_eq!((&told["rank"], &told["modules"]), (&6.into(), &14.into()));
    assert!(told["error"].as_f64().unwrap() < 1e-6);
    assert_eq!(told["parents"][1]["missing"], 10);
    let (half, less) = (format!("{a}=0.5"), format!("{b}=-0.25"));
    assert!((loss(&[&out]) - loss(&[&half, &less])).abs() < 1e-5);
    let checked = json(&["inspect", &out]);
    assert_eq!((&checked["method"], &checked["content_matches"]), (&"lora".into(), &true.into()));
    // Weights may stand with the folders; the same bytes again.
    let again = json(&["merge", &half, &less, "--method", "cat", "--output", &out, "--overwrite"]);
    assert_eq!(again, told);
    let text = ok(&["merge", &a, &b, "--method", "svd", "--rank", "2", "--output", &f.path("svd")]);
    assert!(text.contains("14 modules of rank up to 2") && text.contains("% of the weighted sum"), "{text}");
    assert!(text.contains("sha256:") && text.contains("lacks 10 of the modules"), "{text}");
    for (method, more) in [
        ("lego", &["--rank=3", "--seed=5"][..]),
        ("ties_svd", &["--density=0.4"]),
        ("dare_linear_svd", &["--set=density=0.5", "--seed=5"]),
    ] {
        let folder = f.path(method);
        json(&[&["merge", &a, &b, "--method", method, "--output", &folder], more].concat());
        ok(&["check", &folder, "--model", &f.model]);
    }
    // The difference of an adapter and itself is nothing, which `check` says.
    let none = f.path("none");
    json(&["merge", &a, &a, "--method", "task_arithmetic", "--weights", "1,-1", "--output", &none]);
    assert!(error(&["eval", "--model", &f.model, "--data", &f.data, "--adapter", &none]).contains("changes nothing"));
}

/// Tensors of different starts are averaged with a warning, those of one start without. To be seen to fail: the cosines of a parent with itself.
#[test]
fn averages_of_different_starts_are_warned_of() {
    let f = Fixture::new();
    let (a, b, other) = (f.path("a"), f.path("b"), f.path("other"));
    json(&f.train(&a, &["--max-steps", "6", "--rank", "4"]));
    json(&f.train(&b, &["--max-steps", "12", "--rank", "4"]));
    json(&f.train(&other, &["--max-steps", "6", "--rank", "4", "--seed", "1"]));
    for (parents, warned) in [([&a, &b, &a], false), ([&a, &b, &other], true), ([&a, &other, &b], true)] {
        let out = f.path("out");
        let merge = ["merge", parents[0], parents[1], parents[2], "--method", "tensors", "--output", &out];
        let done = run(&[&merge[..], &["--overwrite"]].concat());
        assert!(done.status.success(), "{}", text(&done.stderr));
        assert_eq!(text(&done.stderr).contains("not of one start"), warned, "{}", text(&done.stderr));
        let manifest = std::fs::read(std::path::Path::new(&out).join("lorimer.json")).unwrap();
        let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
        let likeness = manifest["training"]["likeness"].as_f64().unwrap();
        assert!(if warned { likeness.abs() < 0.3 } else { likeness > 0.7 }, "{likeness}");
    }
}

#[test]
fn what_cannot_be_combined_is_one_sentence() {
    let f = Fixture::new();
    let (a, out) = (f.path("a"), f.path("out"));
    json(&f.train(&a, &["--max-steps", "2"]));
    let refused = |arguments: &[&str], part: &str| {
        let told = error(&[&["merge", "--output", &out], arguments].concat());
        assert!(told.contains(part), "{told}");
        assert!(!std::path::Path::new(&out).exists());
    };
    refused(&[], "nothing to merge");
    refused(&[&a, &a], "--method says how");
    refused(&[&a, &a, "--method", "ties"], "needs a density");
    refused(&[&a, &a, "--method", "ties", "--density", "0"], "above 0 and at most 1");
    refused(&[&a, &a, "--method", "ties", "--density", "-1"], "above 0 and at most 1");
    refused(&[&a, &a, "--method", "cat", "--rank", "3"], "`cat` has no setting `rank`");
    refused(&[&a, &a, "--method", "cat", "--model", "x"], "--model is for merging into a base");
    refused(&[&a, "--method", "cat", "--adapter", &a], "--adapter is for merging into a base");
    refused(&[&a, "--method", "cat", "--dtype", "f16"], "--dtype is for merging into a base");
    refused(&["--adapter", &a, "--method", "cat"], "--method is for combining");
    refused(&["--adapter", &a, "--overwrite"], "--overwrite is for combining");
    refused(&[&a, &a, "--method", "cat", "--weights", "1"], "1 weights for 2 adapters");
    refused(&[&format!("{a}=2"), &a, "--method", "cat", "--weights", "1,2"], "give them once");
    refused(&[&a, &a, "--method", "svd", "--rank", "2", "--set", "rank=3"], "give it once");
    refused(&[&a, &a, "--method", "lego", "--set", "gauge=loose"], "loose");
    refused(&[&a, &f.path("none"), "--method", "cat"], "there is none here");
    let bone = f.path("bone");
    json(&f.train(&bone, &["--max-steps", "2", "--method", "bone", "--rank", "4"]));
    refused(&[&a, &bone, "--method", "cat"], "--to lora");
    let told = error(&["merge", &a, "--method", "cat", "--output", &a, "--overwrite"]);
    assert!(told.contains("one of the adapters"), "{told}");
}
