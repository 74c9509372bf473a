//! Keys and values in 8 bits, by the flag.

use super::*;

/// The same pool is told to hold more blocks, and answers are close. To be seen to fail: a flag that nothing is made of.
#[test]
fn keys_in_8_bits_take_a_third_of_the_pool() {
    let f = Fixture::new();
    let root = adapters(&f);
    let of = |more: &[&str]| {
        let server = Server::start(&f, &root, more);
        let asked = json!({ "model": "yes-no", "prompt": "up 3 down 4 up 5", "echo": true, "logprobs": 1, "max_tokens": 6, "temperature": 0 });
        let answer = server.post("/v1/completions", &asked);
        assert_eq!(answer.status, 200, "{}", answer.body);
        let choice = answer.json()["choices"][0].clone();
        let told: Vec<f64> =
            choice["logprobs"]["token_logprobs"].as_array().unwrap().iter().filter_map(Value::as_f64).collect();
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let metrics = server.get("/metrics").body;
            let line = metrics.lines().find(|l| l.starts_with("vllm:cache_config_info{")).unwrap().to_string();
            let blocks: f64 =
                line.split("num_gpu_blocks=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap();
            if blocks > 0.0 {
                let state = server.get("/v1/state").json()["kv_cache_dtype"].clone();
                return (choice["text"].clone(), told, line, state, blocks);
            }
            assert!(Instant::now() < deadline, "{metrics}");
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    let (text, told, line, state, blocks) = of(&[]);
    assert!(line.contains("cache_dtype=\"f32\"") && state == "f32", "{line}");
    let (again, others, line, state, more) = of(&["--kv-cache-dtype", "int8"]);
    assert!(line.contains("cache_dtype=\"int8\"") && state == "int8", "{line}");
    // Heads of the tiny base are narrow, so that scales count for more.
    assert!(more / blocks > 2.5, "{more} blocks and {blocks}");
    assert_eq!((text, told.len()), (again, others.len()));
    let apart = told.iter().zip(&others).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(apart > 0.0 && apart < 0.05, "{apart}");
}
