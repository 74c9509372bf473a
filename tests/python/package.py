"""What the package promises, against the command line. Run by check.py."""

import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM, WORK = pathlib.Path(sys.argv.pop(1)), pathlib.Path(sys.argv.pop(1))
TINY = ROOT / "tests" / "goldens" / "tiny-llama"

import numpy

import lorimer

# A script that was begun in the background, as a check's part may be, has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROWS = [{"messages": [{"role": "user", "content": f"{i} and {i}"}, {"role": "assistant", "content": str(2 * i)}]} for i in range(24)]


def written(name: str, rows=ROWS) -> str:
    path = WORK / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def program(*arguments) -> dict:
    done = subprocess.run([PROGRAM, *map(str, arguments), "--json", "--quiet"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().removeprefix("error: "))
    return json.loads(done.stdout)


class Package(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.data = written("rows.jsonl")
        cls.base = lorimer.Base(str(TINY))
        cls.run_ = cls.base.train(cls.data, output=WORK / "adapter", rank=4, max_steps=6, batch_size=4, lr=0.05, progress=False)
        cls.adapter = cls.run_.adapter

    def test_importing_takes_less_than_three_tenths_of_a_second(self):
        times = []
        for _ in range(5):
            clock = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import lorimer"], check=True)
            times.append(time.perf_counter() - clock)
        bare = []
        for _ in range(5):
            clock = time.perf_counter()
            subprocess.run([sys.executable, "-c", "pass"], check=True)
            bare.append(time.perf_counter() - clock)
        print(f"import: {min(times) - min(bare):.3f} s over an interpreter that begins", file=sys.stderr)
        self.assertLess(min(times) - min(bare), 0.3)

    def test_the_same_settings_give_the_command_lines_bytes(self):
        flags = ["--rank=4", "--max-steps=6", "--batch-size=4", "--lr=0.05"]
        result = program("train", f"--model={TINY}", f"--data={self.data}", f"--output={WORK / 'cli'}", *flags)
        self.assertEqual(self.run_.losses, result["losses"])
        own, cli = ((WORK / name / "adapter_model.safetensors").read_bytes() for name in ("adapter", "cli"))
        self.assertEqual(own, cli)
        measured = program("eval", f"--model={TINY}", f"--data={self.data}", f"--adapter={WORK / 'cli'}")
        mine = self.base.evaluate(self.data, adapter=self.adapter)
        for key in ("loss", "perplexity", "exact_match", "examples"):
            self.assertEqual(mine[key], measured[key], key)
        answer = program("generate", f"--model={TINY}", "--prompt=3 and 3", f"--adapter={WORK / 'cli'}", "--max-tokens=12")
        mine = self.base.generate("3 and 3", adapter=WORK / "cli", max_tokens=12)
        self.assertEqual((str(mine), mine.tokens, mine.finish_reason), (answer["text"], answer["tokens"], answer["finish_reason"]))
        drawn = [self.base.generate("3 and 3", max_tokens=12, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
        self.assertEqual(drawn[0], drawn[1])
        self.assertNotEqual(drawn[0], drawn[2])

    def test_rows_may_be_dicts(self):
        run = self.base.train(ROWS, output=WORK / "dicts", rank=4, max_steps=6, batch_size=4, lr=0.05, progress=False)
        self.assertEqual(run.losses, self.run_.losses)
        self.assertEqual(self.base.evaluate(ROWS)["loss"], self.base.evaluate(self.data)["loss"])

    def test_errors_are_the_command_lines_sentences(self):
        cases = [
            (lambda: self.base.train("missing.jsonl", output=WORK / "x"), ["train", f"--model={TINY}", "--data=missing.jsonl", f"--output={WORK / 'x'}"]),
            (lambda: self.base.train(self.data, output=WORK / "adapter", progress=False), ["train", f"--model={TINY}", f"--data={self.data}", f"--output={WORK / 'adapter'}"]),
            (lambda: self.base.train(self.data, output=WORK / "x", method="lroa"), ["train", f"--model={TINY}", f"--data={self.data}", "--method=lroa"]),
            (lambda: lorimer.Adapter.load(WORK), ["inspect", str(WORK)]),
            (lambda: lorimer.Base("no/such/place/at/all"), ["generate", "--model=no/such/place/at/all", "--prompt=x"]),
            (lambda: lorimer.resize(WORK / "adapter", WORK / "x", rank=9), ["resize", str(WORK / "adapter"), "--rank=9", f"--output={WORK / 'x'}"]),
        ]
        for call, arguments in cases:
            with self.assertRaises(lorimer.Error) as own:
                call()
            with self.assertRaises(RuntimeError) as cli:
                program(*arguments)
            self.assertEqual(str(own.exception), str(cli.exception))
        with self.assertRaises(lorimer.Error) as unknown:
            self.base.train(self.data, output=WORK / "x", rnak=4)
        self.assertIn("--rnak", str(unknown.exception))
        with self.assertRaises(TypeError):
            self.base.generate("x", temprature=1.0)
        with self.assertRaises(lorimer.Error):
            self.base.generate([10**6], max_tokens=1)
        with self.assertRaises(lorimer.Error):
            self.base.generate("x", temperature=-1.0)

    def test_tensors_go_over_as_arrays(self):
        tensors = self.adapter.tensors()
        self.assertTrue(all(isinstance(array, numpy.ndarray) and array.dtype == numpy.float32 for array in tensors.values()))
        again = lorimer.Adapter.from_tensors(tensors, self.adapter.config)
        self.assertEqual(again.id, self.adapter.id)
        self.assertIsNone(again.path)
        again.save(WORK / "again")
        self.assertEqual((WORK / "again" / "adapter_model.safetensors").read_bytes(), self.adapter.safetensors())
        with self.assertRaises(lorimer.Error):
            again.save(WORK / "again")
        again.save(WORK / "again", overwrite=True)
        self.assertEqual(self.base.evaluate(ROWS, adapter=again)["loss"], self.base.evaluate(ROWS, adapter=self.adapter)["loss"])
        # Other layouts and types of the same numbers.
        turned = {name: numpy.asfortranarray(array.astype(">f4")) for name, array in tensors.items()}
        self.assertEqual(lorimer.Adapter.from_tensors(turned, self.adapter.config).id, self.adapter.id)
        halves = lorimer.Adapter.from_tensors({name: array.astype("f2") for name, array in tensors.items()}, self.adapter.config)
        self.assertEqual({array.dtype for array in halves.tensors().values()}, {numpy.dtype("f2")})
        name = next(iter(tensors))
        for bad in (numpy.full_like(tensors[name], numpy.nan), tensors[name].astype("c8")):
            with self.assertRaises((lorimer.Error, TypeError)):
                lorimer.Adapter.from_tensors({**tensors, name: bad}, self.adapter.config)
        for damaged in (b"", b"\xff" * 8, self.adapter.safetensors()[:-1]):
            with self.assertRaises(lorimer.Error):
                lorimer.Adapter.from_safetensors(damaged, self.adapter.config)

    def test_adapters_add_up_with_weights(self):
        two = {self.adapter: 0.5, lorimer.Adapter.from_tensors(self.adapter.tensors(), self.adapter.config): 0.5}
        whole = self.base.evaluate(ROWS, adapter=self.adapter)["loss"]
        self.assertAlmostEqual(self.base.evaluate(ROWS, adapter=two)["loss"], whole, places=5)

    def test_combine_merge_convert_inspect_resize(self):
        memory = lorimer.Adapter.from_tensors(self.adapter.tensors(), self.adapter.config)
        made = lorimer.combine({memory: 0.25, WORK / "adapter": 0.75}, WORK / "combined", method="cat")
        self.assertEqual(made["rank"], 8)
        whole = self.base.evaluate(ROWS, adapter=self.adapter)["loss"]
        self.assertAlmostEqual(self.base.evaluate(ROWS, adapter=WORK / "combined")["loss"], whole, places=5)
        lorimer.merge(TINY, memory, WORK / "merged")
        self.assertAlmostEqual(lorimer.Base(WORK / "merged").evaluate(ROWS)["loss"], whole, places=5)
        lorimer.convert(memory, WORK / "adapter.gguf", to="gguf", model=TINY)
        self.assertTrue((WORK / "adapter.gguf").read_bytes().startswith(b"GGUF"))
        self.assertEqual(lorimer.inspect(memory)["rank"], 4)
        lorimer.resize(memory, WORK / "small", rank=2)
        self.assertEqual(lorimer.inspect(WORK / "small")["rank"], 2)
        self.assertIn("--target-modules", lorimer.help("train"))
        self.assertTrue(self.base.check(self.adapter))

    def test_prune_recover_quantize_extract(self):
        lorimer.prune(WORK / "pruned", model=TINY, method="rand", ratio=0.5, keep_first=0, keep_last=0)
        small = lorimer.Base(WORK / "pruned").train(ROWS, output=WORK / "on-pruned", rank=2, max_steps=2, progress=False)
        lorimer.recover(small.path, WORK / "recovered", pruning=WORK / "pruned" / "pruning.json")
        self.assertEqual(lorimer.inspect(WORK / "recovered")["rank"], 2)
        self.assertGreater(self.base.evaluate(ROWS, adapter=WORK / "recovered")["loss"], 0)
        lorimer.quantize(WORK / "nf", model=TINY, method="nf", bits=4)
        self.assertGreater(lorimer.Base(WORK / "nf").evaluate(ROWS)["loss"], 0)
        lorimer.merge(TINY, self.adapter, WORK / "tuned")
        lorimer.extract(WORK / "tuned", WORK / "extracted", model=TINY, rank=4)
        whole = self.base.evaluate(ROWS, adapter=self.adapter)["loss"]
        self.assertAlmostEqual(self.base.evaluate(ROWS, adapter=WORK / "extracted")["loss"], whole, places=3)
        self.assertIn("lora", {method["name"] for method in lorimer.methods()})
        self.assertIn("peak_bytes", lorimer.command("plan", model=TINY, data=self.data))

    def test_an_engine_answers_as_one_by_one(self):
        engine = self.base.engine({"mine": self.adapter}, memory="64MB")
        prompts = [{"prompt": f"{i} and", "adapter": "mine" if i % 2 else None, "max_tokens": 5 + i} for i in range(12)]
        heard = []
        answers = engine.generate(prompts, progress=heard.append)
        for prompt, answer in zip(prompts, answers):
            alone = self.base.generate(prompt["prompt"], adapter=self.adapter if prompt["adapter"] else None, max_tokens=prompt["max_tokens"])
            self.assertEqual((str(answer), answer.tokens, answer.finish_reason), (str(alone), alone.tokens, alone.finish_reason))
        self.assertEqual([event["step"] for event in heard], list(range(1, 13)))
        with self.assertRaises(lorimer.Error) as unknown:
            engine.generate([{"prompt": "x", "adapter": "other"}])
        self.assertIn("`other`", str(unknown.exception))
        self.assertEqual(engine.adapters, ["mine"])
        self.assertTrue(engine.remove("mine") and not engine.remove("mine"))
        long = self.base.generate("1 and", max_tokens=30)
        stop = str(long)[4:7]
        self.assertEqual(engine.generate(["1 and"], max_tokens=30, stop=stop)[0], self.base.generate("1 and", max_tokens=30, stop=stop))

    def test_progress_is_heard(self):
        heard, pieces = [], []
        self.base.train(ROWS, output=WORK / "heard", rank=2, max_steps=3, eval_data=ROWS[:4], progress=heard.append)
        steps = [event for event in heard if event["kind"] == "step"]
        self.assertEqual([(event["step"], event["total"]) for event in steps], [(1, 3), (2, 3), (3, 3)])
        self.assertTrue(all(event["loss"] > 0 for event in steps))
        self.assertEqual([event["kind"] for event in heard if event["kind"] == "evaluation"], ["evaluation"])
        answer = self.base.generate("3 and 3", max_tokens=12, stream=pieces.append)
        self.assertEqual("".join(pieces), answer)

        def raises(event):
            raise KeyError("a listener's own")

        with self.assertRaises(KeyError):
            self.base.train(ROWS, output=WORK / "raises", max_steps=3, progress=raises)

    def test_ctrl_c_stops_a_run_which_goes_on_to_the_same_bytes(self):
        settings = dict(rank=4, max_steps=40, batch_size=4, lr=0.05)
        whole = self.base.train(ROWS, output=WORK / "whole", progress=False, **settings)

        def interrupt(event):
            if event["kind"] == "step" and event["step"] == 3:
                os.kill(os.getpid(), signal.SIGINT)

        with self.assertRaises(KeyboardInterrupt):
            self.base.train(ROWS, output=WORK / "parts", progress=interrupt, **settings)
        self.assertFalse((WORK / "parts" / "adapter_model.safetensors").exists())
        parts = self.base.train(ROWS, output=WORK / "parts", progress=False, resume=True, **settings)
        self.assertEqual(parts.adapter.safetensors(), whole.adapter.safetensors())
        # What leaves nothing behind ends at its next sign of life.
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        clock = time.monotonic()
        with self.assertRaises(KeyboardInterrupt):
            while True:
                self.base.generate("3 and 3", max_tokens=400, temperature=1.0)
        self.assertLess(time.monotonic() - clock, 20)

    def test_other_threads_run_meanwhile(self):
        counted, done = [0], threading.Event()

        def count():
            while not done.is_set():
                counted[0] += 1
                time.sleep(0.001)

        thread = threading.Thread(target=count)
        thread.start()
        self.base.train(ROWS, output=WORK / "meanwhile", rank=4, max_steps=30, progress=False)
        done.set()
        thread.join()
        self.assertGreater(counted[0], 10)

    def test_what_is_said_goes_to_logging(self):
        with self.assertLogs("lorimer", logging.INFO) as said:
            self.base.train(ROWS, output=WORK / "said", rank=4, max_steps=1, progress=False)
        self.assertTrue(any("rows.jsonl" in line for line in said.output))


if __name__ == "__main__":
    unittest.main(verbosity=1)
