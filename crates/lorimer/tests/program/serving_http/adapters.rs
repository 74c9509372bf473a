//! Adapters that come, go and are fetched while the server runs.

use super::*;

#[test]
fn adapters_come_and_go_while_the_server_runs() {
    let f = Fixture::new();
    let root = adapters(&f);
    let mut server = Server::start(&f, &root, &[]);
    let yes = server.answer(json!({ "model": "yes-no" }));
    let other = server.answer(json!({ "model": "tenant/bone" }));
    // vLLM's calls.
    let load = |server: &Server, name: &str, path: &str, more: Value| {
        let mut body = json!({ "lora_name": name, "lora_path": path });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/load_lora_adapter", &body)
    };
    let first = load(&server, "alias", "yes-no", json!({}));
    assert_eq!(first.status, 200, "{}", first.body);
    let content = first.json()["content_id"].as_str().unwrap().to_string();
    assert_eq!(server.answer(json!({ "model": "alias" })), yes);
    // What was recorded when it was trained is what is served; what was not recorded so is told.
    assert!(first.json()["golden_difference"].as_f64().unwrap() < 1e-3, "{}", first.body);
    let manifest = Path::new(&root).join("yes-no/lorimer.json");
    let kept = std::fs::read_to_string(&manifest).unwrap();
    let golden = |change: &dyn Fn(&mut Value)| {
        let mut manifest_now: Value = serde_json::from_str(&kept).unwrap();
        change(&mut manifest_now["golden"][0]);
        std::fs::write(&manifest, manifest_now.to_string()).unwrap();
        let answer = load(&server, "told", "yes-no", json!({ "load_inplace": true }));
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()["golden_difference"].as_f64()
    };
    assert!(golden(&|g| g["log_probabilities"][0] = json!(-9.0)).unwrap() > 1.0);
    assert_eq!(golden(&|g| g["tokens"] = json!([1u32 << 31])), None);
    assert_eq!(golden(&|g| g["first"] = json!(0)), None);
    std::fs::write(&manifest, &kept).unwrap();
    assert_eq!(server.post("/v1/unload_lora_adapter", &json!({ "lora_name": "told" })).status, 200);
    assert_eq!(load(&server, "alias", "tenant/bone", json!({})).code(), "adapter_exists");
    assert_eq!(load(&server, "alias", "tenant/bone", json!({ "load_inplace": true })).status, 200);
    assert_eq!(server.answer(json!({ "model": "alias" })), other);
    // Our own: compare and swap.
    let swap = |content: &str| {
        server.send("PUT", "/v1/adapters/alias", &json!({ "path": "yes-no", "mode": "swap", "content_id": content }))
    };
    assert_eq!((swap(&content).status, swap(&content).code()), (409, "content_changed".to_string()));
    let listed = server.get("/v1/adapters").json();
    let now =
        listed["adapters"].as_array().unwrap().iter().find(|a| a["name"] == "alias").unwrap()["content_id"].clone();
    assert_eq!(swap(now.as_str().unwrap()).status, 200);
    assert_eq!(server.answer(json!({ "model": "alias" })), yes);
    assert_eq!(server.post("/v1/unload_lora_adapter", &json!({ "lora_name": "tenant/bone" })).status, 200);
    assert_eq!(server.chat(json!({ "model": "tenant/bone" })).code(), "adapter_not_found");
    assert_eq!(server.request("DELETE", "/v1/adapters/none", "", "").status, 404);
    // What cannot be given a name, and disturbs nothing.
    let folder = Path::new(&root).join("broken");
    std::fs::create_dir(&folder).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(Path::new(&root).join("yes-no").join(file), folder.join(file)).unwrap();
    }
    let weights = folder.join("adapter_model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    for (name, path, status, code) in [
        ("new", "broken", 422, "adapter_invalid"),
        ("new", "../adapters/yes-no", 403, "path_refused"),
        ("new", "/etc", 403, "path_refused"),
        ("new", "nothing", 404, "adapter_not_found"),
        ("../new", "yes-no", 400, "invalid_name"),
        (".new", "yes-no", 400, "invalid_name"),
        ("base", "yes-no", 400, "invalid_request"),
    ] {
        let refused = load(&server, name, path, json!({}));
        assert_eq!((refused.status, refused.code().as_str()), (status, code), "{name} {path}: {}", refused.body);
        assert!(!refused.body.contains(&root), "{}", refused.body);
    }
    assert_eq!(server.answer(json!({ "model": "alias" })), yes);
    // Killed and started again, the server has the same names.
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    server = Server::start(&f, &root, &[]);
    assert_eq!(server.answer(json!({ "model": "alias" })), yes);
    assert_eq!(server.chat(json!({ "model": "tenant/bone" })).code(), "adapter_not_found");
}

/// Adapters that come from an object store, here a folder named by its URL: fetched when asked for, and again when replaced.
#[test]
fn adapters_come_from_an_object_store() {
    let f = Fixture::new();
    let root = adapters(&f);
    let cache = f.path("cache");
    let address = format!("file://{root}");
    let start = |address: &str| Server::start(&f, address, &["--adapter-cache", &cache]);
    let server = start(&address);
    let ids: Vec<Value> =
        server.get("/v1/models").json()["data"].as_array().unwrap().iter().map(|m| m["id"].clone()).collect();
    assert_eq!(ids[1..], [json!("tenant/bone"), json!("yes-no")]);
    assert!(!Path::new(&cache).join("yes-no").exists(), "nothing is fetched unasked");
    assert_eq!(server.answer(json!({ "model": "yes-no" })), "yes");
    assert_eq!(server.send("PUT", "/v1/adapters/prod", &json!({ "path": "yes-no" })).status, 200);
    for path in ["../adapters/yes-no", "/etc", "yes-no/../yes-no"] {
        let answer = server.send("PUT", "/v1/adapters/x", &json!({ "path": path }));
        assert_eq!((answer.status, answer.code().as_str()), (403, "path_refused"), "{}", answer.body);
    }
    let bone = server.answer(json!({ "model": "tenant/bone" }));
    for file in ["adapter_model.safetensors", "adapter_config.json", "lorimer.json"] {
        std::fs::copy(format!("{root}/tenant/bone/{file}"), format!("{root}/yes-no/{file}")).unwrap();
    }
    // The first request after a while is answered as it is, and makes the server look.
    let end = Instant::now() + Duration::from_secs(20);
    while server.answer(json!({ "model": "yes-no" })) != bone {
        assert!(Instant::now() < end, "the adapter that was replaced is served on");
        std::thread::sleep(Duration::from_millis(100));
    }
    let versions = std::fs::read_dir(format!("{cache}/yes-no")).unwrap().count();
    assert_eq!(versions, 1, "what was replaced is gone");
    drop(server);
    // The name is kept, and what was fetched serves on without being fetched again.
    let server = start(&address);
    assert_eq!(server.answer(json!({ "model": "prod" })), bone);
    assert_eq!(server.answer(json!({ "adapter_id": "yes-no" })), bone);
    drop(server);
    let problem =
        error(&["serve", "--model", &f.model, "--adapters", "ftp://x/y", "--adapter-cache", &cache, "--port", "0"]);
    assert!(problem.contains("ftp://x/y"), "{problem}");
}

/// A folder that may be read and not written is served; names that are given are told to be forgotten. To be seen to fail: an error of the
/// first write ends the call.
#[cfg(unix)]
#[test]
fn a_folder_that_may_not_be_written_is_served() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    let f = Fixture::new();
    let root = adapters(&f);
    let mode = |path: &Path, mode: u32| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    mode(f.folder.path(), 0o755);
    mode(Path::new(&root), 0o555);
    let probe = Path::new(&root).join("probe");
    let program = Path::new(&f.path("lorimer")).to_path_buf();
    let mut command =
        lorimer(&["serve", "--model", &f.model, "--adapters", &root, "--port", "0", "--pool", "4MB", "--json"]);
    if std::fs::write(&probe, b"").is_ok() {
        // Who may do everything runs it as somebody who may not, from where that one can reach it.
        std::fs::remove_file(&probe).unwrap();
        let model = f.path("model");
        std::fs::create_dir(&model).unwrap();
        for entry in std::fs::read_dir(&f.model).unwrap().flatten() {
            std::fs::copy(entry.path(), Path::new(&model).join(entry.file_name())).unwrap();
        }
        std::fs::copy(env!("CARGO_BIN_EXE_lorimer"), &program).unwrap();
        let arguments = ["serve", "--model", &model, "--adapters", &root, "--port", "0", "--pool", "4MB", "--json"];
        command = std::process::Command::new(&program);
        command.args(arguments).stdin(Stdio::null()).env("HF_HUB_OFFLINE", "1").uid(65534).gid(65534);
    }
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    let url: Value = serde_json::from_str(&line).expect("the server says where it is");
    let address = url["url"].as_str().unwrap().strip_prefix("http://").unwrap().to_string();
    let mut errors = child.stderr.take().unwrap();
    let mut server = Server { child, address, _out: out };
    assert_eq!(server.answer(json!({ "model": "yes-no" })), "yes");
    let given = server.send("PUT", "/v1/adapters/prod", &json!({ "path": "yes-no" }));
    assert_eq!((given.status, &given.json()["persisted"]), (200, &json!(false)), "{}", given.body);
    assert!(given.json()["message"].as_str().unwrap().contains("until this server ends"), "{}", given.body);
    assert_eq!(server.answer(json!({ "model": "prod" })), "yes");
    let removed = server.post("/v1/unload_lora_adapter", &json!({ "lora_name": "tenant/bone" }));
    assert_eq!((removed.status, &removed.json()["persisted"]), (200, &json!(false)), "{}", removed.body);
    assert_eq!(server.chat(json!({ "model": "tenant/bone" })).code(), "adapter_not_found");
    assert!(server.get("/health").json()["problems"][0].as_str().unwrap().contains("not kept"));
    server.child.kill().unwrap();
    let mut said = String::new();
    errors.read_to_string(&mut said).unwrap();
    assert!(said.contains("will be forgotten"), "told at start: {said}");
    mode(Path::new(&root), 0o755);
}

/// An adapter of a pruned model is served on that model only, as it is evaluated and merged there only: where another keeps equally many other units,
/// shapes do not tell. To be seen to fail: the store without `BaseRecord::check`.
#[test]
fn an_adapter_of_another_pruned_model_is_not_served() {
    let f = Fixture::new();
    let (small, other, root) = (f.path("small"), f.path("other"), f.path("adapters"));
    for (output, seed) in [(&small, "1"), (&other, "2")] {
        let keep = ["--ratio", "0.5", "--keep-first", "0", "--keep-last", "1"];
        let how = ["prune", "--model", &f.model, "--method", "rand", "--seed", seed, "--output", output];
        run(&[&how[..], &keep[..]].concat());
    }
    let own = format!("{root}/own");
    let train = ["train", "--model", &small, "--data", &f.data, "--output", &own, "--lr", "1e-2", "--max-steps", "8"];
    run(&train);
    let cases = [(&small, None), (&other, Some("ids of pruning.json differ")), (&f.model, Some("recover"))];
    for (i, (model, says)) in cases.into_iter().enumerate() {
        let served = Fixture { model: model.clone(), folder: tempfile::tempdir().unwrap(), data: f.data.clone() };
        let server = Server::start(&served, &root, &[]);
        let asked = server.chat(json!({ "model": "own" }));
        let put = server.send("PUT", &format!("/v1/adapters/named{i}"), &json!({ "path": "own" }));
        let Some(says) = says else {
            assert_eq!((asked.status, put.status), (200, 200), "{}", asked.body);
            continue;
        };
        let told = error(&["eval", "--model", model, "--adapter", &own, "--data", &f.data]);
        let told = told.strip_prefix("error: ").unwrap().replace(&format!("{root}/"), "");
        let parent = Path::new(model).parent().unwrap().display().to_string();
        let told = told.replace(&format!("{parent}/"), "");
        assert!(told.contains(says), "{told}");
        for answer in [asked, put] {
            assert_eq!((answer.status, answer.code().as_str()), (422, "adapter_invalid"), "{}", answer.body);
            assert_eq!(answer.json()["error"]["message"].as_str(), Some(told.as_str()));
        }
    }
}
