"""Adapters to and from PEFT's models. Run by `check.py --peft` with an interpreter that has torch, transformers and PEFT."""

import pathlib
import sys
import tempfile

import numpy
import peft
import torch
import transformers

import lorimer

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "goldens" / "tiny-llama"


def main() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    base = lorimer.Base(str(TINY))
    # A text ends with the token that ends texts.
    ids = base.encode("one two three four five") + base.encode("<|im_end|>")
    torch.manual_seed(0)
    for config in (
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True, use_rslora=True),
        peft.VeraConfig(r=8, target_modules=["q_proj"]),
    ):
        own = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), config)
        for name, parameter in own.named_parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        adapter = lorimer.Adapter.from_peft(own)
        with tempfile.TemporaryDirectory() as folder:
            own.save_pretrained(folder)
            stored = lorimer.Adapter.load(folder)
        theirs, mine = stored.tensors(), adapter.tensors()
        assert theirs.keys() == mine.keys() and all(numpy.array_equal(theirs[k], mine[k]) for k in theirs)
        back = adapter.to_peft(transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32))
        with torch.no_grad():
            expected, given = own(torch.tensor([ids])).logits, back(torch.tensor([ids])).logits
        assert torch.equal(expected, given), (expected - given).abs().max()
        loss = torch.nn.functional.cross_entropy(expected[0, :-1], torch.tensor(ids[1:]))
        rows = [{"text": "one two three four five"}]
        measured = base.evaluate(rows, adapter=adapter, format="text")
        assert abs(float(loss) - measured["loss"]) < 1e-4, (float(loss), measured["loss"])
    bf16 = {name: torch.from_numpy(array.copy()).bfloat16() for name, array in mine.items()}
    again = lorimer.Adapter.from_tensors(bf16, adapter.config).tensors()
    assert all(numpy.array_equal(again[name], tensor.float().numpy()) for name, tensor in bf16.items())
    del model


if __name__ == "__main__":
    main()
