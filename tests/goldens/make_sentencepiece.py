#!/usr/bin/env python3
"""Makes sentencepiece.gguf and sentencepiece.json: a small SentencePiece tokenizer in GGUF metadata as llama.cpp's converter
writes it, and the tokens that SentencePiece itself gives (sentencepiece 0.2, gguf 0.17 or newer).

usage: make_sentencepiece.py
"""
import json, pathlib, tempfile

import gguf
import sentencepiece

here = pathlib.Path(__file__).parent
rows = (here / "../../data/sentiment-movies.train.jsonl").read_text().splitlines()
sentences = [json.loads(row)["messages"][0]["content"].split("\n")[-1] for row in rows]
with tempfile.TemporaryDirectory() as folder:
    text = pathlib.Path(folder) / "text"
    text.write_text("\n".join(sentences))
    # Llama's own settings: BPE, byte fallback, no normalisation beyond the leading space.
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=f"{folder}/m", vocab_size=700, model_type="bpe", byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True, user_defined_symbols=["[INST]"],
        allow_whitespace_only_pieces=True, max_sentence_length=10000, minloglevel=2)
    model = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/m.model")

kinds = []
for i in range(model.vocab_size()):
    kinds.append(gguf.TokenType.CONTROL if model.is_control(i) else gguf.TokenType.UNKNOWN if model.is_unknown(i)
                 else gguf.TokenType.BYTE if model.is_byte(i)
                 else gguf.TokenType.USER_DEFINED if model.id_to_piece(i) == "[INST]" else gguf.TokenType.NORMAL)
writer = gguf.GGUFWriter(here / "sentencepiece.gguf", "llama")
writer.add_tokenizer_model("llama")
writer.add_token_list([model.id_to_piece(i).encode() for i in range(model.vocab_size())])
writer.add_token_scores([model.get_score(i) for i in range(model.vocab_size())])
writer.add_token_types(kinds)
writer.add_bos_token_id(model.bos_id())
writer.add_eos_token_id(model.eos_id())
writer.add_add_bos_token(True)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.close()

texts = ["a warm , funny film", "The  movie\nis 1234 times better — naïve café 東京 🙂", " leading and trailing ", "x", "", "tabs\tand ünïcödé", *sentences[:40]]
table = [{"text": t, "tokens": model.encode(t), "decoded": model.decode(model.encode(t))} for t in texts]
(here / "sentencepiece.json").write_text(json.dumps(table, ensure_ascii=False, indent=0))
