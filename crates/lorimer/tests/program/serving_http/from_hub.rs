//! Adapters that a server fetches from the hub when they are asked for.

use super::*;
use crate::hub::Hub;

/// The files of an adapter, with one that is none of it.
fn files(folder: &str) -> std::collections::BTreeMap<&'static str, Vec<u8>> {
    let names = ["adapter_config.json", "adapter_model.safetensors", "lorimer.json"];
    let there = names.into_iter().filter_map(|name| Some((name, std::fs::read(Path::new(folder).join(name)).ok()?)));
    there.chain([("README.md", b"an adapter".to_vec())]).collect()
}

/// A server of an empty folder that fetches from a hub.
fn start(f: &Fixture, hub: &Hub, root: &str, more: &[&str]) -> Server {
    std::fs::create_dir_all(root).unwrap();
    let variables = [("HF_ENDPOINT", hub.address.as_str()), ("HF_HUB_OFFLINE", "0"), ("HF_TOKEN", "")];
    Server::start_with(f, root, more, &variables)
}

/// What lies in a folder and below, hidden or not, but for the store's own lock and names.
fn below(folder: &str) -> Vec<String> {
    let (mut all, mut folders) = (Vec::new(), vec![std::path::PathBuf::from(folder)]);
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap().flatten() {
            match entry.file_type().unwrap().is_dir() {
                true => folders.push(entry.path()),
                false => all.push(entry.path().strip_prefix(folder).unwrap().display().to_string()),
            }
        }
    }
    all.retain(|name| !name.starts_with(".lorimer-adapters."));
    all.sort();
    all
}

/// An adapter is fetched once for all who ask, while others are answered, and stays. To be seen to fail: a fetch for each request, on the threads that
/// load adapters, or of all files.
#[test]
fn an_adapter_is_fetched_when_it_is_asked_for() {
    let f = Fixture::new();
    let own = adapters(&f);
    let hub = Hub::with(files(&format!("{own}/yes-no")));
    let root = f.path("fetched");
    let mut server = start(&f, &hub, &root, &["--allow-hub"]);
    hub.state.lock().unwrap().pause = Duration::from_millis(500);
    std::thread::scope(|scope| {
        let asking: Vec<_> = (0..8).map(|_| scope.spawn(|| server.answer(json!({ "model": "owner/name" })))).collect();
        let begun = Instant::now();
        assert_eq!(server.chat(json!({ "model": "base" })).status, 200);
        assert!(begun.elapsed() < Duration::from_secs(2), "another request waits for the hub");
        asking.into_iter().for_each(|one| assert_eq!(one.join().unwrap(), "yes"));
    });
    hub.state.lock().unwrap().pause = Duration::ZERO;
    assert_eq!(hub.state.lock().unwrap().ranges, [0], "the weights are fetched once");
    let expected = [
        "owner/name/.lorimer-hub.json",
        "owner/name/adapter_config.json",
        "owner/name/adapter_model.safetensors",
        "owner/name/lorimer.json",
    ];
    assert_eq!(below(&root), expected);
    assert_eq!(server.answer(json!({ "model": "base:owner/name@v1.0" })), "yes");
    let names: Vec<Value> =
        server.get("/v1/models").json()["data"].as_array().unwrap().iter().map(|m| m["id"].clone()).collect();
    assert_eq!(names[1..], [json!("owner/name"), json!("owner/name@v1.0")]);
    // It stays, without the hub too, until somebody takes its name away.
    server.signal("TERM");
    assert!(server.child.wait().unwrap().success());
    let asked = hub.state.lock().unwrap().asked.len();
    let server = start(&f, &hub, &root, &["--allow-hub"]);
    assert_eq!(server.answer(json!({ "adapter_id": "owner/name" })), "yes");
    assert_eq!(server.send("DELETE", "/v1/adapters/owner/name", &json!({})).status, 200);
    let taken = server.chat(json!({ "model": "owner/name" }));
    assert_eq!((taken.status, taken.code().as_str()), (404, "adapter_not_found"), "{}", taken.body);
    assert_eq!(hub.state.lock().unwrap().asked.len(), asked);
}

/// What the hub does not have, what is no adapter of the base, what is too large and what is damaged is refused in a sentence, leaves nothing behind, and
/// is not asked for again at once; names that lead elsewhere do not reach the hub. To be seen to fail: failures that are forgotten, space that
/// is not counted.
#[test]
fn what_cannot_be_fetched_is_refused() {
    let f = Fixture::new();
    let own = adapters(&f);
    let hub = Hub::with(files(&format!("{own}/yes-no")));
    let root = f.path("fetched");
    let server = start(&f, &hub, &root, &["--allow-hub"]);
    let asked = || hub.state.lock().unwrap().asked.len();
    let refused = |server: &Server, name: &str, status: u16, code: &str, says: &str| {
        let answer = server.chat(json!({ "model": name }));
        assert_eq!((answer.status, answer.code().as_str()), (status, code), "{name}: {}", answer.body);
        let message = answer.json()["error"]["message"].as_str().unwrap().to_string();
        assert!(message.contains(says) && !message.contains('\n') && !message.contains(&root), "{name}: {message}");
        assert_eq!(below(&root), [""; 0], "{name}");
        answer
    };
    for name in ["nobody/nothing", "owner/name@nowhere"] {
        refused(&server, name, 404, "adapter_not_found", "on the hub");
        let before = asked();
        let again = refused(&server, name, 404, "adapter_not_found", "on the hub");
        assert!(asked() == before && again.head.contains("retry-after: "), "{}", again.head);
    }
    let before = asked();
    for name in
        ["../owner/name", "owner/..", "owner/../../name", "/owner/name", "owner/na me", ".owner/name", "owner/.name"]
    {
        refused(&server, name, 400, "invalid_name", "is no name of an adapter");
    }
    for name in [
        "name",
        "owner/name@../x",
        "owner/name@..",
        "owner/name/more",
        "owner/name@",
        "owner/name@a@b",
        "@/name",
        "owner/@",
    ] {
        let answer = server.chat(json!({ "model": name }));
        assert!(answer.status == 404 || answer.status == 400, "{name}: {}", answer.body);
    }
    assert_eq!(asked(), before, "{:?}", hub.state.lock().unwrap().asked);
    hub.state.lock().unwrap().claimed = Some("ab".repeat(32));
    refused(&server, "owner/name@damaged", 503, "store_failed", "SHA-256");
    hub.state.lock().unwrap().claimed = None;
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/family-adapters/phi3");
    hub.state.lock().unwrap().files = files(goldens.to_str().unwrap());
    refused(&server, "owner/name@other", 422, "adapter_invalid", "");
    hub.state.lock().unwrap().files.remove("adapter_model.safetensors");
    refused(&server, "owner/name@half", 422, "adapter_invalid", "`adapter_model.safetensors`");
    drop(server);
    hub.state.lock().unwrap().files = files(&format!("{own}/yes-no"));
    let small = start(&f, &hub, &root, &["--allow-hub", "--hub-space", "2KB"]);
    refused(&small, "owner/name", 422, "limit_exceeded", "at most 2000 are taken");
    drop(small);
    // Off unless it is asked for.
    let before = asked();
    let closed = start(&f, &hub, &root, &[]);
    refused(&closed, "owner/name", 404, "adapter_not_found", "there is no adapter");
    assert_eq!(asked(), before);
    let told = error(&["serve", "--model", &f.model, "--allow-hub"]);
    assert!(told.contains("--allow-hub puts adapters into a folder"), "{told}");
}
