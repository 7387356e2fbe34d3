"""One training step here, in the authors' own code, and in the reconstruction of it (`published_step.py`).

    git clone https://github.com/meghanaasunil/iReasoner ../authors   # read at commit 02d0cf2; nothing of it is in here
    python benchmarks/authors_step.py ../authors --model random-25m --image-tokens 1024 --group-size 8 --tokens 64
    python benchmarks/authors_step.py ../authors --model tiny --images-per-step 16

The three take turns in one process, on one checkpoint, the same pictures, prompts, group size and forced lengths, in
float32 on the CPU; the first turn is a warm-up. Theirs is `IReasonerTrainer.train()` itself, as many of its steps as
there are pictures, since each of its steps takes one. All sides write a question (20 tokens), and it is counted.

Their trainer is built by their command line's own defaults and the two LoRA flags of their README. What is given to it:

- options: model, pictures, device (`cpu`), dtype (`float32`), group size, lengths; no checkpoints (`--save_every 0`);
  the proposer's cadence is set past the steps that run, so that no side has a proposer update in the timed step;
- `AutoModelForVision2Seq`, which transformers 5 no longer has: its successor `AutoModelForImageTextToText`;
- `AutoProcessor`, whose video half wants torchvision: this package's loader, which builds the same class without it;
- `min_new_tokens = max_new_tokens` in each `generate`, so that its length is forced;
- this package's prompts in place of theirs, so that all sides read the same tokens (checked);
- what the two roles wrote: tokens are drawn and decoded, then the text is replaced, by the question that the other
  sides ask and by a completion that their update reads as exactly `--tokens` tokens (checked). A random model's text
  would come back as another number. All answers are equal, so that every trajectory's steps are embedded; from 32
  tokens on there are three steps, as many as the other sides compare, below that a single one.

Reading a picture's file is not counted, and what their steps print is not shown. That they and the reconstruction make
as many calls and read as many positions is checked. What is left unequal is extra work of theirs: LoRA also in the
vision tower; dropout in updates, most of the difference where the model is not tiny (their command line reads
`LORA_DROPOUT=0` from the environment); an adapter that stays on in the reference's pass; a loss from `labels` beside
the log-softmax; an optimizer that goes tensor by tensor.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from beside import parser_for, scene, spread
from PIL import Image
from published_step import Published
from torch.optim.optimizer import register_optimizer_step_post_hook

from ireasoner.method.texts import proposer_messages, solver_messages
from ireasoner.model.backbone import load_processor
from ireasoner.model.inputs import render
from ireasoner.studies.bench import QUESTION, QUESTION_TOKENS, Bench, Phases

calls = Counter[str]()  # of the step that runs


def counted(owner: type, method: str, what: str) -> None:
    """Count the calls of a method that all sides use; of the language model, the positions that it reads as well."""
    original = getattr(owner, method)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[what] += 1
        if what == "language model":
            read = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
            calls["positions"] += read.shape[:2].numel()
        return original(*args, **kwargs)

    setattr(owner, method, call)


def completion(tokenizer: Any, prompt: str, length: int) -> str:
    """A text that has `length` tokens after the prompt: in the published form where that fits."""
    fixed, word = "<think>\nStep 1: red{}\nStep 2: red\nStep 3: red\n</think>\n<answer>7</answer>", " red"
    spare = length - len(tokenizer(fixed.format(""))["input_ids"])
    text = fixed.format(word * spare) if spare >= 0 else word * length
    ids = tokenizer(prompt + text)["input_ids"]
    assert len(ids) == len(tokenizer(prompt)["input_ids"]) + length, "their update would read another length"
    return text


class Theirs:
    """The authors' trainer, its phases timed and its texts replaced; what it does is left as it is."""

    def __init__(self, checkout: str, folder: str, scratch: str, bench: Bench, images: Sequence[Image.Image]) -> None:
        sampling = bench.config.sampling
        library: Any = sys.modules["transformers"]
        library.AutoModelForVision2Seq = library.AutoModelForImageTextToText
        sys.path.insert(0, checkout)
        train: Any = importlib.import_module("train")
        vlm: Any = importlib.import_module("vlm")
        vlm.AutoProcessor = SimpleNamespace(from_pretrained=load_processor)
        train.build_proposer_prompt = lambda _: sampling.proposer_prompt
        train.build_solver_prompt = lambda question: sampling.solver_prompt.replace("{question}", question)
        (pictures := Path(scratch, "pictures")).mkdir()
        for i, image in enumerate(images):
            image.save(pictures / f"{i}.png")
        options = {
            "solver_model": folder, "proposer_model": folder, "data_dir": pictures, "output_dir": f"{scratch}/runs",
            "device": "cpu", "device_map": "cpu", "dtype": "float32", "seed": 0, "save_every": 0,
            "total_steps": len(images), "proposer_update_freq": len(images) + 1,
            "num_solver_samples": sampling.group_size, "max_new_tokens_solver": bench.tokens,
            "max_new_tokens_proposer": QUESTION_TOKENS,
        }  # fmt: skip
        lora = ["--use_lora_solver", "--use_lora_proposer"]
        sys.argv = ["train.py", *lora, *(str(word) for k, v in options.items() for word in (f"--{k}", v))]
        self.trainer = trainer = train.IReasonerTrainer(train.build_config_from_args(train.parse_args()))
        self.core, self.phases = trainer.solver.core, Phases(perf_counter)
        asking, solving = proposer_messages(sampling.proposer_prompt), solver_messages(sampling.solver_prompt, QUESTION)
        texts = [chat[0]["content"][1]["text"] for chat in (asking, solving, solving)]
        self.prompts: dict[str, str] = dict(zip(("propose", "solve", "update"), texts, strict=True))
        rendered = [self.core._render_chat(images[0], text, add_generation_prompt=True) for text in texts[:2]]
        assert rendered == [render(bench.policy.processor, chat) for chat in (asking, solving)], "prompts differ"
        generate = self.core.model.generate
        self.core.model.generate = lambda **kw: generate(**kw, min_new_tokens=kw["max_new_tokens"])
        self.time(trainer.proposer, "generate", "propose", f"<question>{QUESTION}</question>")
        self.time(trainer.solver, "generate", "solve", completion(self.core.tokenizer, rendered[1], bench.tokens))
        self.time(trainer.solver_updater, "step", "update")
        self.time(trainer.pool, "sample_by_iter", "read picture")

    def time(self, owner: Any, method: str, phase: str, text: str | None = None) -> None:
        """Time a method of theirs, check the prompt that it is given and, if there is a text, return that instead."""
        original = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            assert kwargs.get("prompt") == self.prompts.get(phase), "prompts differ"
            with self.phases.timed(phase, within="read and reward"):
                result = original(*args, **kwargs)
            return result if text is None else text

        setattr(owner, method, call)

    def step(self, phases: Phases, _: Sequence[Image.Image]) -> None:
        """As many of their steps as there are pictures."""
        self.phases = phases
        with contextlib.redirect_stdout(io.StringIO()), phases.timed("read and reward"):
            self.trainer.train()
        del phases.took["read picture"]  # the other sides have theirs in memory


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("checkout", help="folder of the authors' code")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, bench, images = scene(asked, scratch)
        theirs = Theirs(asked.checkout, folder, scratch, bench, images)
        policy, backbone = bench.policy, bench.policy.backbone
        adapter = {k: p for k, p in theirs.core.model.named_parameters() if ".default." in k}
        before = {k: p.detach().clone() for k, p in adapter.items()}
        counted(type(backbone), "generate", "generate")
        counted(type(policy.processor).__mro__[1], "__call__", "processor")
        counted(type(policy.processor.image_processor), "__call__", "image processor")
        counted(type(backbone.base_model.visual), "forward", "vision tower")
        counted(type(policy.decoder), "forward", "language model")
        register_optimizer_step_post_hook(lambda *_: calls.update(["optimizer step"]))
        sides = {"ours": bench.ours, "theirs": theirs.step, "published": Published(bench).step}
        runs, work = {name: list[Phases]() for name in sides}, dict[str, Counter[str]]()
        for repetition in range(asked.repetitions + 1):
            for name, side in sides.items():
                calls.clear()
                side(phases := Phases(perf_counter), images)
                work[name] = calls.copy()
                if repetition:
                    runs[name].append(phases)
    changed = sum(not torch.equal(p, before[k]) for k, p in adapter.items())
    vision = sum("visual" in k for k in adapter)
    print(f"theirs: {changed} of {len(adapter)} adapter tensors changed ({vision} are in the vision tower)")
    assert changed, "theirs trained nothing"
    assert work["theirs"] == work["published"], f"the reconstruction is not what they do: {work}"
    for name, steps in runs.items():
        print(f"{name}: {', '.join(f'{k} {n}' for k, n in sorted(work[name].items()))}")
        for phase in steps[0].took:
            print(f"  {phase:20}{spread([step.took[phase] for step in steps])}")
        print(f"  {'whole step':20}{spread([step.total for step in steps])}")
    for name in ("ours", "published"):
        ratios = [a.total / b.total for a, b in zip(runs["theirs"], runs[name], strict=True)]
        print(f"theirs / {name} {spread(ratios)}")


if __name__ == "__main__":
    main()
