"""One training step here and in TRL's GRPOTrainer: same weights, pictures, prompt, group size and forced lengths.

    pip install trl datasets                                         # beside ireasoner
    OMP_NUM_THREADS=2 python benchmarks/trl_step.py --model random-25m --image-tokens 1024 --group-size 8 --tokens 64
    OMP_NUM_THREADS=2 python benchmarks/trl_step.py --model tiny --group-size 5 --tokens 40 --images-per-step 16

Both sides take turns in one process: TRL's `train()` runs, and one of our steps before each of its own. The first pair
is a warm-up. TRL's step is from `on_step_begin` to `on_step_end`; it fetches its batch before, which is not counted.

Equal, and checked: prompt ids, completions and their tokens, adapters' shapes, and that training changes them. Equal by
setting: weights, float32, threads, LoRA, AdamW, learning rate, clipping, KL to the model without adapter, one optimizer
step a batch, no gradient checkpointing, the rewards (of the recipe `answers-only`), losses as means over trajectories.

Not equal: the tokens that are drawn, on which no time depends. TRL's KL is an estimate on the drawn token, ours exact
over the vocabulary. Ours has a proposer write a question too: `propose` is shown and not counted. TRL runs its update
in `--rows` completions at a time (all of them), ours as many tokens as its preset says (all, in these examples).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from beside import parser_for, scene, spread
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from ireasoner.method.scoring import Context, score_group
from ireasoner.method.texts import solver_messages
from ireasoner.model.backbone import load_processor
from ireasoner.model.inputs import build_prompts, encode_images
from ireasoner.studies.bench import QUESTION, Bench, Phases, readable
from ireasoner.training.config import load_recipe


class TimedGRPO(GRPOTrainer):
    """TRL's trainer, its phases timed and its model's calls noted; what it does is left as it is."""

    phases, where, calls = Phases(time.perf_counter), "", list[dict[str, Any]]()

    def note(self, name: str, module: torch.nn.Module) -> None:
        """Note every call of a part of the model: in which phase, what came in, how long it took."""

        def before(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            read = args[0] if args else kwargs["input_ids"]
            call = {"phase": self.where, "part": name, "input": [*read.shape], "seconds": -time.perf_counter()}
            if not args:
                call["image tokens"] = int((read == self.model.config.image_token_id).sum())
                call["given"] = [k for k in ("pixel_values", "mm_encoder_outputs") if kwargs.get(k) is not None]
            self.calls.append(call)
            open_calls.append(call)

        def after(*_: Any) -> None:
            open_calls.pop()["seconds"] += time.perf_counter()

        open_calls: list[dict[str, Any]] = []

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        self.where = "generate"
        with self.phases.timed("generate", within="processor, rewards"):
            self.asked, self.written = args[0], super()._generate_single_turn(*args, **kwargs)
        return self.written

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        self.where, within = ("policy", "backward") if torch.is_grad_enabled() else ("reference", "processor, rewards")
        with self.phases.timed(self.where, within=within):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        with self.phases.timed("processor, rewards", within="backward"):
            return super()._generate_and_score_completions(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.phases.timed("backward", within="optimizer, rest"):
            return super().training_step(*args, **kwargs)


class Turns(TrainerCallback):
    """One step of ours before each of TRL's."""

    def __init__(self, bench: Bench, images: Sequence[Any]) -> None:
        self.bench, self.images = bench, images
        self.trainer: Any = None  # set once it is made: it is made with this callback
        self.drawn: Any = None
        self.ours, self.theirs = list[Phases](), list[Phases]()
        sample = bench.engine.sample

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.drawn = sample(*args, **kwargs)  # the solver's comes last
            return self.drawn

        bench.engine.sample = noted  # type: ignore[method-assign]

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.ours.append(Phases(time.perf_counter))
        self.bench.ours(self.ours[-1], self.images)
        self.trainer.phases, self.trainer.calls = Phases(time.perf_counter), []
        self.whole = self.trainer.phases.timed("optimizer, rest")
        self.whole.__enter__()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.whole.__exit__(None, None, None)
        self.theirs.append(self.trainer.phases)
        policy, sampling = self.bench.policy, self.bench.config.sampling
        count = sampling.group_size
        chats = [solver_messages(sampling.solver_prompt, QUESTION)] * len(self.images)
        read = build_prompts(policy, encode_images(policy, self.images), chats).text["input_ids"]
        assert [*self.trainer.asked] == read.repeat_interleave(count, 0).tolist(), "prompts differ"
        lengths = [self.bench.tokens] * count * len(read)
        assert [len(ids) for ids in self.trainer.written[0]] == lengths, "TRL's completions are not all of that length"
        assert [len(c.token_ids) for group in self.drawn for c in group] == lengths, "ours are not all of that length"


def trainer_for(turns: Turns, folder: str, scratch: Path, rows: int | None, repetitions: int) -> TimedGRPO:
    """TRL's trainer on the same model, pictures and options."""
    bench, backbone, sampling = turns.bench, turns.bench.config.backbone, turns.bench.config.sampling
    count = sampling.group_size
    learner, processor = bench.learner(), load_processor(folder)
    processor.tokenizer.padding_side = "left"
    batch = len(turns.images) * count
    text = solver_messages(sampling.solver_prompt, QUESTION)[0]["content"][1]["text"]
    chat = [{"role": "user", "content": text}]

    def reward(completions: list[Any], **_: Any) -> list[float]:
        texts = [readable(completion[0]["content"]) for completion in completions]
        groups = [texts[i : i + count] for i in range(0, len(texts), count)]
        context = Context(step_weight=0.0)
        earned = [r for group in groups for r in score_group(QUESTION, group, bench.config.recipe, context).rewards]
        # Equal rewards, as a random model's often are, would leave nothing to train on; here some always differ.
        return [reward + 0.01 * (i % count) for i, reward in enumerate(earned)]

    options = GRPOConfig(
        str(scratch), use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", report_to="none",
        logging_strategy="no", disable_tqdm=True, shuffle_dataset=False, max_steps=repetitions + 1,
        per_device_train_batch_size=rows or batch, gradient_accumulation_steps=batch // (rows or batch),
        num_generations=count, max_completion_length=bench.tokens, generation_kwargs={"min_new_tokens": bench.tokens},
        loss_type="grpo", beta=learner.kl_coef, learning_rate=learner.options.learning_rate,
        lr_scheduler_type="constant", weight_decay=learner.options.weight_decay,
        max_grad_norm=learner.options.max_grad_norm,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": [chat] * len(turns.images), "image": turns.images})
    adapted = bench.policy.model.peft_config["solver"].target_modules
    lora = LoraConfig(target_modules=adapted, r=backbone.lora_rank, lora_alpha=backbone.lora_alpha)
    trainer = TimedGRPO(folder, reward, options, data, processing_class=processor, callbacks=[turns], peft_config=lora)
    model: Any = trainer.model.get_base_model().base_model
    trainer.note("model below its output layer", model)
    trainer.note("vision tower", model.visual)
    return trainer


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--rows", type=int, help="completions in each of TRL's forward passes of the update (all)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, bench, images = scene(asked, scratch)
        bench.config = bench.config.model_copy(update={"recipe": load_recipe("answers-only")})
        turns = Turns(bench, images)
        turns.trainer = trainer = trainer_for(turns, folder, Path(scratch), asked.rows, asked.repetitions)
        parts = (turns.bench.policy.model, ".solver."), (trainer.model, ".default.")
        adapters = [{k: p for k, p in model.named_parameters() if role in k} for model, role in parts]
        before = [{k: p.detach().clone() for k, p in adapter.items()} for adapter in adapters]
        trainer.train()
    shapes = [[p.shape for p in adapter.values()] for adapter in adapters]
    assert shapes[0] == shapes[1], "adapters differ"
    for side, name in enumerate(("ours", "TRL")):
        changed = [k for k, p in adapters[side].items() if not torch.equal(p, before[side][k])]
        dtypes = {p.dtype for p in parts[side][0].parameters()}
        print(f"{name}: {len(changed)} of {len(adapters[side])} adapter tensors changed, model in {dtypes}")
        assert changed, f"{name} trained nothing"
        steps = (turns.ours, turns.theirs)[side]
        for phase in steps[0].took:
            print(f"  {phase:20}{spread([step.took[phase] for step in steps[1:]])}")
    print(*(f"TRL calls {call}" for call in trainer.calls if call["input"][-1] > 1), sep="\n")  # single tokens left out
    ours = [step.total - step.took["propose"] for step in turns.ours[1:]]
    theirs = [step.total for step in turns.theirs[1:]]
    print(f"whole step: ours {spread(ours)}, TRL {spread(theirs)}, TRL / ours", end=" ")
    print(spread([a / b for a, b in zip(theirs, ours, strict=True)]))


if __name__ == "__main__":
    main()
