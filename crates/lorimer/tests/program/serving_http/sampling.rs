//! Tokens that are banned, allowed or held back, and their log-probabilities.

use super::*;

/// What a completion of `up 3` says: its tokens by their numbers, its text, and why it ended.
fn numbers(server: &Server, more: Value) -> (Vec<u32>, String, String) {
    let ask = json!({
        "prompt": "up 3", "max_tokens": 4, "temperature": 0, "logprobs": 0, "return_tokens_as_token_ids": true, "ignore_eos": true,
    });
    let answer = server.post("/v1/completions", &with(&ask, more));
    assert_eq!(answer.status, 200, "{}", answer.body);
    let choice = answer.json()["choices"][0].clone();
    let tokens = choice["logprobs"]["tokens"].as_array().unwrap().iter();
    let tokens = tokens.map(|t| t.as_str().unwrap().strip_prefix("token_id:").unwrap().parse().unwrap());
    let text = |key: &str| choice[key].as_str().unwrap().to_string();
    (tokens.collect(), text("text"), text("finish_reason"))
}

#[test]
fn tokens_are_banned_allowed_held_back_and_end_answers() {
    let f = Fixture::new();
    let server = bare(&f);
    // As transformers goes on (tests/goldens/scoring.json).
    let (plain, text, finish) = numbers(&server, json!({}));
    assert_eq!((plain.as_slice(), finish.as_str()), (&[226, 35, 35, 35][..], "length"));
    assert_ne!(numbers(&server, json!({ "logit_bias": { "226": -100 } })).0[0], 226);
    assert_eq!(numbers(&server, json!({ "logit_bias": { "7": 100.0 } })).0, [7; 4]);
    let allowed =
        numbers(&server, json!({ "allowed_token_ids": [7, 9], "temperature": 1.5, "seed": 1, "max_tokens": 20 }));
    assert!(allowed.0.iter().all(|t| [7, 9].contains(t)) && allowed.0.contains(&7) && allowed.0.contains(&9));
    let (tokens, stopped, finish) = numbers(&server, json!({ "stop_token_ids": [35] }));
    assert_eq!((tokens.as_slice(), finish.as_str()), (&[226, 35][..], "stop"));
    let kept = numbers(&server, json!({ "stop_token_ids": [35], "include_stop_str_in_output": true })).1;
    assert!(
        kept.starts_with(&stopped) && kept.len() > stopped.len() && text.starts_with(&kept),
        "{kept:?} {stopped:?}"
    );
    let held = numbers(&server, json!({ "stop_token_ids": [226, 35], "min_tokens": 2 })).0;
    assert!(held.len() >= 2 && !held[..2].iter().any(|t| [226, 35].contains(t)), "{held:?}");
    // The end of the text, too, is held back, and texts that end the answer.
    let ended =
        numbers(&server, json!({ "ignore_eos": false, "logit_bias": { "2": 100 }, "min_tokens": 3, "max_tokens": 9 }));
    assert_eq!((ended.0.len(), ended.0[3], ended.2.as_str()), (4, 2, "stop"));
    let shown = |more: Value| numbers(&server, with(&json!({ "logit_bias": { "2": 100 }, "max_tokens": 2 }), more)).1;
    assert_eq!(shown(json!({})), "");
    assert_eq!(shown(json!({ "skip_special_tokens": false })), "<|im_end|>".repeat(2));
    assert_eq!(shown(json!({ "skip_special_tokens": false, "ignore_eos": false })), "");
    let stop = json!({ "allowed_token_ids": [35], "stop": "?", "max_tokens": 5 });
    let letter = numbers(&server, json!({ "allowed_token_ids": [35], "max_tokens": 1 })).1;
    let stop = with(&stop, json!({ "stop": letter }));
    assert_eq!(numbers(&server, stop.clone()).1, "");
    assert_eq!(numbers(&server, with(&stop, json!({ "min_tokens": 3 }))).1, letter.repeat(3));
    assert_eq!(numbers(&server, with(&stop, json!({ "include_stop_str_in_output": true }))).1, letter);
    // A prompt cut to its end is that end.
    let cut = numbers(&server, json!({ "truncate_prompt_tokens": 2 }));
    assert_eq!(cut, numbers(&server, json!({ "prompt": " 3" })));
    let whole = server.post(
        "/v1/completions",
        &json!({ "prompt": "up ".repeat(400), "max_tokens": 5, "truncate_prompt_tokens": -1 }),
    );
    assert_eq!(whole.json()["usage"]["prompt_tokens"], 507, "{}", whole.body);
    // The best of some answers is that of them whose tokens are likeliest on average.
    let drawn =
        json!({ "prompt": "up 3", "max_tokens": 4, "temperature": 1.5, "seed": 5, "logprobs": 0, "ignore_eos": true });
    let ask = |more: Value| server.post("/v1/completions", &with(&drawn, more)).json();
    let mean = |choice: &Value| {
        let own = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        own.iter().map(|p| p.as_f64().unwrap()).sum::<f64>()
    };
    let all = ask(json!({ "n": 4 }));
    let best = all["choices"].as_array().unwrap().iter().max_by(|a, b| mean(a).total_cmp(&mean(b))).unwrap();
    let chosen = ask(json!({ "best_of": 4 }));
    assert_eq!((chosen["choices"].as_array().unwrap().len(), &chosen["choices"][0]["text"]), (1, &best["text"]));
    assert_eq!(chosen["usage"]["completion_tokens"], 16);
    assert_eq!(server.post("/v1/completions", &with(&drawn, json!({ "best_of": 2, "stream": true }))).status, 400);
}

/// A token is its number and its bytes, not its decoded text, and always stands among the likeliest that are told with it.
#[test]
fn tokens_in_log_probabilities_are_bytes_and_stand_among_the_likeliest() {
    let f = Fixture::new();
    let server = bare(&f);
    // The tiny base writes halves of letters all the time.
    let drawn = json!({ "temperature": 2, "seed": 5, "max_tokens": 60, "ignore_eos": true });
    let chat = json!({ "messages": [{ "role": "user", "content": "up 3" }], "logprobs": true, "top_logprobs": 1 });
    let answer = server.post("/v1/chat/completions", &with(&chat, drawn.clone())).json();
    let told = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let bytes_of = |token: &Value| -> Vec<u8> { serde_json::from_value(token["bytes"].clone()).unwrap() };
    let special = |token: &&Value| !token["token"].as_str().unwrap().starts_with("<|");
    let bytes: Vec<u8> = told.iter().filter(special).flat_map(bytes_of).collect();
    assert_eq!(String::from_utf8_lossy(&bytes), answer["choices"][0]["message"]["content"].as_str().unwrap());
    let mut halves = 0;
    for token in told {
        let top = token["top_logprobs"].as_array().unwrap();
        assert!(top.iter().any(|t| t["token"] == token["token"] && t["logprob"] == token["logprob"]), "{token}");
        let (text, bytes) = (token["token"].as_str().unwrap(), bytes_of(token));
        match std::str::from_utf8(&bytes) {
            Ok(whole) => assert_eq!(text, whole),
            Err(_) => assert_eq!(text, bytes.iter().map(|b| format!("\\x{b:02x}")).collect::<String>()),
        }
        halves += usize::from(std::str::from_utf8(&bytes).is_err());
    }
    assert!(halves > 5 && told.iter().any(|t| t["top_logprobs"].as_array().unwrap().len() == 2), "{halves}");
    for likely in [0, 1, 20] {
        let ask = with(&drawn, json!({ "prompt": "up 3", "logprobs": likely }));
        let answer = server.post("/v1/completions", &ask).json();
        let told = answer["choices"][0]["logprobs"].clone();
        let [tokens, own, top] = ["tokens", "token_logprobs", "top_logprobs"].map(|key| told[key].as_array().unwrap());
        assert_eq!((tokens.len(), top.len()), (60, 60));
        for ((token, own), top) in tokens.iter().zip(own).zip(top) {
            let top = top.as_object().unwrap();
            assert_eq!(&top[token.as_str().unwrap()], own, "{token}");
            assert!((likely.max(1)..=likely + 1).contains(&top.len()), "{} of {likely}", top.len());
        }
        assert!(tokens.iter().any(|t| t.as_str().unwrap().starts_with("bytes:\\x")));
    }
}

/// Whatever the model would say, alone or among others, whole or streamed, with an adapter or without: the answer has the form that is asked for, and ends
/// where that is complete. To be seen to fail: `Constraint::restrict` that takes nothing out, or a clone that shares its state.
#[test]
fn answers_are_held_to_their_form() {
    let f = Fixture::new();
    let root = adapters(&f);
    let server = Server::start(&f, &root, &[]);
    let schema = json!({
        "type": "object", "additionalProperties": false, "required": ["name", "age"],
        "properties": { "name": { "enum": ["Ada", "Grace"] }, "age": { "type": "integer", "minimum": 0, "maximum": 99 } },
    });
    let fits = |text: &str| {
        let found: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert!(["Ada", "Grace"].contains(&found["name"].as_str().unwrap()), "{text}");
        assert!((0..=99).contains(&found["age"].as_i64().unwrap()) && found.as_object().unwrap().len() == 2, "{text}");
    };
    let format =
        json!({ "type": "json_schema", "json_schema": { "name": "person", "schema": schema, "strict": true } });
    let asks: Vec<Value> = (0..12)
        .map(|i| {
            let model = ["base", "yes-no", "tenant/bone"][i % 3];
            let ask = json!({ "model": model, "max_tokens": 200, "temperature": 1.5, "seed": i, "n": 1 + i % 2 });
            match i % 4 {
                0 => with(&ask, json!({ "response_format": format })),
                1 => with(&ask, json!({ "guided_json": schema.to_string() })),
                2 => with(&ask, json!({ "structured_outputs": { "json": schema }, "ignore_eos": true })),
                _ => with(&ask, json!({ "json_schema": schema })),
            }
        })
        .collect();
    let texts = |ask: &Value| -> Vec<String> {
        let answer = server.chat(ask.clone()).json();
        let choices = answer["choices"].as_array().unwrap_or_else(|| panic!("{answer}"));
        assert!(choices.iter().all(|c| c["finish_reason"] == "stop"), "{answer}");
        choices.iter().map(|c| c["message"]["content"].as_str().unwrap().to_string()).collect()
    };
    let alone: Vec<Vec<String>> = asks.iter().map(&texts).collect();
    alone.iter().flatten().for_each(|text| fits(text));
    std::thread::scope(|scope| {
        let all: Vec<_> = asks.iter().map(|ask| scope.spawn(|| texts(ask))).collect();
        let together: Vec<Vec<String>> = all.into_iter().map(|t| t.join().unwrap()).collect();
        assert_eq!(together, alone);
    });
    let streamed = server.chat(with(&asks[0], json!({ "stream": true })));
    let pieces = events(&streamed.body);
    let pieces = pieces.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str());
    assert_eq!(pieces.collect::<String>(), alone[0][0]);
    // Completions too, and other forms.
    let complete = |more: Value| {
        let ask = json!({ "prompt": "up 3", "max_tokens": 40, "temperature": 1, "seed": 7 });
        let answer = server.post("/v1/completions", &with(&ask, more)).json();
        answer["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("{answer}")).to_string()
    };
    assert!(["red", "blue "].contains(&complete(json!({ "guided_choice": ["red", "blue "] })).as_str()));
    assert!(complete(json!({ "guided_regex": "[a-c]{4}" })).bytes().all(|b| (b'a'..=b'c').contains(&b)));
    let nested = complete(json!({ "guided_grammar": "start: \"(\" start \")\" | \"x\"" }));
    assert!(nested.trim_start_matches('(').starts_with('x') || nested.bytes().all(|b| b == b'('), "{nested}");
    // llama.cpp's, in its own field and in vLLM's.
    let listed = "root ::= item{2}\nitem ::= \"- \" [a-c]{1,3} \"\\n\"";
    for more in [json!({ "grammar": listed }), json!({ "structured_outputs": { "grammar": listed } })] {
        let text = complete(more);
        let fits = |line: &str| {
            line.len() <= 5
                && line.strip_prefix("- ").is_some_and(|l| !l.is_empty() && l.bytes().all(|b| b"abc".contains(&b)))
        };
        assert!(text.lines().count() == 2 && text.ends_with('\n') && text.lines().all(fits), "{text:?}");
    }
    assert_eq!(complete(json!({ "grammar": "", "guided_choice": ["red"] })), "red");
    // What a request forbids may be all that its form allows.
    let ask = json!({ "prompt": "up 3", "max_tokens": 40, "guided_choice": ["red"], "allowed_token_ids": [2] });
    let answer = server.post("/v1/completions", &ask);
    assert_eq!((answer.status, answer.code().as_str()), (422, "form_failed"), "{}", answer.body);
    assert_eq!(server.answer(json!({ "model": "yes-no" })), "yes");
}
