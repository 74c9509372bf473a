//! A draft model, by the flag.

use super::*;

/// A draft that is the base, and one that `prune` made of it, change no answer; both are counted. To be seen to fail: a draft that is not asked.
#[test]
fn answers_with_a_draft_are_those_without() {
    let f = Fixture::new();
    let root = adapters(&f);
    let pruned = f.path("pruned");
    run(&[
        "prune",
        "--model",
        &f.model,
        "--method",
        "rand",
        "--ratio",
        "0.5",
        "--output",
        &pruned,
        "--keep-first",
        "0",
        "--keep-last",
        "0",
    ]);
    let of = |more: &[&str]| {
        let server = Server::start(&f, &root, more);
        let answers: Vec<String> = [("base", 0.0), ("yes-no", 0.0), ("yes-no", 0.9), ("base", 0.7)]
            .iter()
            .map(|(model, temperature)| {
                server.answer(json!({ "model": model, "temperature": temperature, "seed": 4, "max_tokens": 40, "ignore_eos": true }))
            })
            .collect();
        std::thread::sleep(Duration::from_millis(500));
        let metrics = server.get("/metrics").body;
        let count = |name: &str| -> f64 {
            let name = format!("vllm:spec_decode_num_{name}_tokens_total{{");
            metrics.lines().find(|l| l.starts_with(&name)).unwrap().split(' ').next_back().unwrap().parse().unwrap()
        };
        (answers, count("draft"), count("accepted"))
    };
    let (plain, none, _) = of(&[]);
    assert_eq!(none, 0.0);
    let (same, guessed, accepted) = of(&["--draft", &f.model, "--draft-tokens", "3"]);
    assert_eq!(plain, same);
    assert!(guessed > 60.0 && accepted > 0.4 * guessed, "{accepted} of {guessed}");
    let (same, guessed, accepted) = of(&["--draft", &pruned, "--guesses", "2", "--kv-cache-dtype", "f32"]);
    assert_eq!(plain, same);
    assert!(guessed > 0.0 && accepted <= guessed, "{accepted} of {guessed}");
}

#[test]
fn a_draft_of_other_tokens_is_refused() {
    let f = Fixture::new();
    let serve = |draft: &str, more: &[&str]| {
        error(&[&["serve", "--model", &f.model, "--draft", draft, "--port", "0"], more].concat())
    };
    let problem = serve(&common::goldens("tiny-gemma2").display().to_string(), &[]);
    assert!(problem.contains("tokenizer") && problem.contains("tokens and the base"), "{problem}");
    // As many tokens, two of them exchanged.
    let other = f.folder.path().join("other");
    std::fs::create_dir(&other).unwrap();
    for file in std::fs::read_dir(&f.model).unwrap().flatten() {
        std::fs::copy(file.path(), other.join(file.file_name())).unwrap();
    }
    let path = other.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    let names: Vec<String> = vocabulary
        .iter()
        .filter(|(_, id)| [5, 6].contains(&id.as_u64().unwrap()))
        .map(|(name, _)| name.clone())
        .collect();
    let (a, b) = (vocabulary[&names[0]].clone(), vocabulary[&names[1]].clone());
    vocabulary.insert(names[0].clone(), b);
    vocabulary.insert(names[1].clone(), a);
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let problem = serve(&other.display().to_string(), &[]);
    assert!(problem.contains("for token 5 and the base"), "{problem}");
    assert!(serve(&f.model, &["--draft-tokens", "0"]).contains("at least 1"));
    assert!(serve(&f.path("nothing"), &[]).contains("nothing"));
}
