"""Training stages in this process, on the tiny model: what is trained, what it is compared with, what is saved."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BloomConfig
from trl import DPOTrainer, ModelConfig, get_quantization_config

from trl_ext.aries.config import (
    AriesConfig,
    EvaluationConfig,
    PairsConfig,
    PromptsConfig,
    ScoresConfig,
)
from trl_ext.aries.data.pairs import Pair, preference_rows
from trl_ext.aries.data.records import Answer, Chain, to_line, write_jsonl
from trl_ext.aries.data.templates import compile_template
from trl_ext.aries.policies import Policy
from trl_ext.aries.training.settings import TrainerSettings, Training, trainer_settings
from trl_ext.aries.training.train import check_step_0, make_trainer, repeat_by_weight, rows_of
from trl_ext.aries.training.train import train as run_training
from trl_ext.recipe import RecipeError
from trl_ext.trainers.judged_rows import JudgedDPOTrainer
from trl_ext.trainers.upstream import keep_nf4_trainable


SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "report_to": "none",
    "save_strategy": "no",
    "max_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 8,
}
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"], "dtype": "float32"}
FULL = {"dtype": "float32"}


@pytest.fixture
def rows(tmp_path) -> Path:
    """Eight pairs of the sorting task as the pairs stage writes them."""
    template = compile_template("{{ question }} Draft : {{ draft }} .")
    lines = []
    for i in range(8):
        prompt = [{"role": "user", "content": f"Sort : {i + 1} {i}"}]
        chain = Chain(str(i), prompt, [Answer(1, f"{i + 1} {i}", 2, "stop"), Answer(2, f"{i} {i + 1}", 2, "stop")])
        pair = Pair(chain, chain.answers[1], chain.answers[0], 1.0, 0.0)
        lines += map(to_line, preference_rows(pair, template, PairsConfig(direct_weight=2)))
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    return tmp_path / "pairs.jsonl"


@pytest.fixture
def job(tmp_path, rows, tiny_model_path):
    """A training whose policy is the tiny model, or an adapter on it, and its own reference; keywords change it."""

    def make(
        name: str,
        model_args=LORA,
        model=tiny_model_path,
        adapter=None,
        reference=None,
        trainer="dpo",
        objective_alpha=None,
        **settings,
    ):
        config = {**SETTINGS, **settings, "output_dir": str(tmp_path / f"{name}-training")}
        policy = Policy(model, adapter)
        return Training(
            TrainerSettings(trainer, config, objective_alpha),
            {"model_name_or_path": tiny_model_path, **model_args},
            policy,
            policy if reference is None else reference,
            rows=rows,
            output=tmp_path / name,
            max_dropped=0.5,
        )

    return make


def silent(done: int, total: int) -> None:
    pass


def train(training: Training) -> str:
    run_training(training, silent)
    return str(training.output)


def test_earlier_rounds_give_their_refinement_rows(job, tmp_path):
    """As often as their weights say, behind the round's own rows."""
    own = [{"turn": 0, "n": 0, "weight": 2}, {"turn": 1, "n": 1, "weight": 1}]
    earlier = [{"turn": 0, "n": 2, "weight": 1}, {"turn": 1, "n": 3, "weight": 2}, {"turn": 1, "n": 4, "weight": 0}]
    training = job("policy")
    write_jsonl(training.rows, own)
    write_jsonl(tmp_path / "earlier.jsonl", earlier)
    assert [row["n"] for row in rows_of(training)] == [0, 0, 1]
    training.earlier = [tmp_path / "earlier.jsonl"] * 2
    assert [row["n"] for row in rows_of(training)] == [0, 0, 1, 3, 3, 3, 3]


def test_a_weight_is_how_often_an_epoch_shows_a_row():
    assert repeat_by_weight([{"a": 1, "weight": 2}, {"a": 2, "weight": 0}, {"a": 3}]) == [
        {"a": 1, "weight": 2},
        {"a": 1, "weight": 2},
        {"a": 3},
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"trainer": "dpo"},
        {"trainer": "tdpo"},
        {"trainer": "self_refine_dpo"},
        {"trainer": "self_refine_dpo", "variant": "tdpo2"},
        {"trainer": "dpo", "objective_alpha": 0.8, "loss_type": ["sigmoid", "sft"]},
        {"trainer": "tdpo", "objective_alpha": 0.8},
        {"trainer": "self_refine_dpo", "variant": "tdpo2", "objective_alpha": 0.8},
    ],
    ids=lambda settings: "-".join(str(value) for key, value in settings.items() if key != "loss_type"),
)
def test_a_round_saves_its_adapter_alone_and_the_next_one_starts_from_it(job, tiny_model_path, settings):
    """
    Round 2 with `reference: previous`: TRL's "ref" adapter is the adapter of round 1, and so is the policy at step 0. What
    is saved is loadable on the base, differs from round 1's, and holds nothing else.
    """
    first = train(job("first", **settings))
    assert sorted(p.name for p in Path(first).glob("*.safetensors")) == ["adapter_model.safetensors"]
    assert not (Path(first) / "ref").exists()

    trainer_2 = make_trainer(job("second", adapter=first, **settings), silent)
    check_step_0(trainer_2)
    state = trainer_2.model.state_dict()
    saved = load_file(Path(first) / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in saved.items() if "lora_B" in name)
    for name, tensor in saved.items():
        for adapter in ("default", "ref"):
            assert torch.equal(state[name.replace(".weight", f".{adapter}.weight")], tensor)

    second = train(job("second", adapter=first, **settings))
    assert not (Path(second) / "ref").exists()
    moved = load_file(Path(second) / "adapter_model.safetensors")
    assert moved.keys() == saved.keys() and any(not torch.equal(moved[name], saved[name]) for name in saved)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_path), second)


def test_the_logistic_objective_of_dpo_is_trls_own_trainer(job):
    """With the rows judged, and nothing else: its loss is DPOTrainer's."""
    trainer = make_trainer(job("first"), silent)
    assert type(trainer) is JudgedDPOTrainer and type(trainer)._compute_loss is DPOTrainer._compute_loss


@pytest.mark.parametrize("model_args", [LORA, FULL], ids=["LoRA", "full"])
def test_the_objective_a_training_starts_with(job, tmp_path, model_args):
    """
    The pairs' rows, two direct ones and two refinements of each, in a job with `objective: squared`: the policy is its own
    reference, so whichever rows are in a batch, L_direct is ln 2 and each square (1/2)².
    """
    a_job = job("squared", model_args, objective_alpha=0.8, max_steps=4, learning_rate=0.0)
    train(a_job)
    history = json.loads((tmp_path / "squared-training" / "log_history.json").read_text())
    steps = [entry for entry in history if "loss" in entry]
    assert len(steps) == 4
    for entry in steps:
        assert entry.get("objective/direct", math.log(2)) == pytest.approx(math.log(2), abs=1e-5)
        assert entry.get("objective/refinement", 0.25) == pytest.approx(0.25, abs=1e-5)
    # An epoch: 32 rows in four batches
    mean = sum(entry["loss"] for entry in steps) / 4
    assert mean == pytest.approx(0.2 * math.log(2) + 0.8 * 2 * 0.25, abs=1e-3)


# Only the tokens that exist


def packing(trainer) -> tuple[bool, bool]:
    return trainer.padding_free, trainer.share_prompt


@pytest.mark.parametrize("objective_alpha", [None, 0.8], ids=["logistic", "squared"])
@pytest.mark.parametrize("trainer", ["tdpo", "self_refine_dpo"])
def test_batches_are_packed_where_the_model_allows(job, trainer, objective_alpha):
    """In round 1 and in round 2, unless the recipe says otherwise."""
    settings = {"trainer": trainer, "objective_alpha": objective_alpha}
    first = job("first", **settings)
    assert packing(make_trainer(first, silent)) == (True, True)
    assert packing(make_trainer(job("twice", share_prompt=False, **settings), silent)) == (True, False)
    assert packing(make_trainer(job("not", padding_free=False, **settings), silent)) == (False, False)
    assert packing(make_trainer(job("second", adapter=train(first), **settings), silent)) == (True, True)


def test_the_squares_of_dpo_are_packed(job):
    assert packing(make_trainer(job("dpo", trainer="dpo", objective_alpha=0.8), silent)) == (True, False)


@pytest.mark.parametrize("objective_alpha", [None, 0.8], ids=["logistic", "squared"])
@pytest.mark.parametrize("trainer", ["tdpo", "self_refine_dpo"])
def test_packed_training_is_the_padded_one(job, trainer, objective_alpha):
    """Step by step, the losses and gradients of a round that pads its batches."""
    settings = {"trainer": trainer, "objective_alpha": objective_alpha}
    logs = []
    for name, options in (("packed", {}), ("padded", {"padding_free": False})):
        made = make_trainer(job(name, **options, **settings), silent)
        made.train()
        logs.append([(log["loss"], log["grad_norm"]) for log in made.state.log_history if "loss" in log])
    assert len(logs[0]) > 1 and logs[0] == [pytest.approx(step, rel=1e-4) for step in logs[1]]


def test_batches_are_not_packed_in_unknown_models(job, tiny_model_path, tmp_path, caplog):
    """And the log says so."""
    sizes = AutoConfig.from_pretrained(tiny_model_path).to_dict()
    same = ("vocab_size", "hidden_size")
    config = BloomConfig(n_head=4, n_layer=2, **{name: sizes[name] for name in same})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(tmp_path / "bloom")
    settings = {"model": str(tmp_path / "bloom"), "trainer": "tdpo"}
    settings["model_args"] = {**LORA, "lora_target_modules": ["query_key_value", "dense"]}
    assert packing(make_trainer(job("bloom", **settings), silent)) == (False, False)
    for option in ("padding_free", "share_prompt"):
        assert f"(`{option}: false`): it is not known to be exact for bloom" in caplog.text
        with pytest.raises(ValueError, match="not known to be exact for bloom"):
            make_trainer(job("bloom", **{option: True}, **settings), silent)


def reference_logits(trainer) -> torch.Tensor:
    """What the trainer's reference answers to a fixed text."""
    ids = torch.arange(6, 16)[None]
    model = trainer.ref_model
    if model is not None:
        return model(input_ids=ids).logits
    from trl.trainer.utils import use_adapter

    with use_adapter(trainer.model, "ref" if "ref" in trainer.model.peft_config else None):
        return trainer.model(input_ids=ids).logits


def logits(path: str, adapter: str | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()(input_ids=torch.arange(6, 16)[None]).logits


# The trainers' own, and one that the squared objective puts in the place of DPO's
OBJECTIVES = pytest.mark.parametrize("objective_alpha", [None, 0.8], ids=["logistic", "squared"])


@OBJECTIVES
@torch.no_grad()
def test_reference_initial_without_sft_is_the_base(job, tiny_model_path, objective_alpha):
    with torch.enable_grad():
        first = train(job("first"))
    a_job = job(
        "second",
        adapter=first,
        reference=Policy(tiny_model_path, None),
        objective_alpha=objective_alpha,
    )
    trainer = make_trainer(a_job, silent)
    torch.testing.assert_close(reference_logits(trainer), logits(tiny_model_path))
    assert not torch.allclose(reference_logits(trainer), logits(tiny_model_path, first))


@OBJECTIVES
@torch.no_grad()
def test_reference_initial_after_sft_is_the_sft_adapter(job, tiny_model_path, objective_alpha):
    with torch.enable_grad():
        sft = train(job("sft"))
        first = train(job("first", adapter=sft))
    a_job = job(
        "second",
        adapter=first,
        reference=Policy(tiny_model_path, sft),
        objective_alpha=objective_alpha,
    )
    trainer = make_trainer(a_job, silent)
    torch.testing.assert_close(reference_logits(trainer), logits(tiny_model_path, sft))
    torch.testing.assert_close(
        trainer.model(input_ids=torch.arange(6, 16)[None]).logits, logits(tiny_model_path, first)
    )
    assert set(trainer.model.peft_config) == {"default", "ref"}
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainable and all(".default." in name for name in trainable)


@OBJECTIVES
@torch.no_grad()
@pytest.mark.parametrize("reference", ["previous", "initial"])
def test_full_fine_tuning(job, tiny_model_path, reference, objective_alpha):
    with torch.enable_grad():
        first = train(job("first", FULL))
    expected = first if reference == "previous" else tiny_model_path
    a_job = job(
        "second",
        FULL,
        model=first,
        reference=Policy(expected, None),
        objective_alpha=objective_alpha,
    )
    trainer = make_trainer(a_job, silent)
    torch.testing.assert_close(reference_logits(trainer), logits(expected))
    assert not torch.allclose(logits(first), logits(tiny_model_path))


def test_nf4_base_stays_frozen(job, tiny_model_path):
    """QLoRA on CPU: the base is quantized and frozen, the adapter is the product, and it loads on the 16-bit base."""
    output = train(job("nf4", {**LORA, "load_in_4bit": True}, trainer="tdpo"))
    adapter = load_file(Path(output) / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapter)
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    trainer = make_trainer(job("again", {**LORA, "load_in_4bit": True}, adapter=output), silent)
    assert type(trainer.model.get_base_model().model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    check_step_0(trainer)


@pytest.fixture
def qlora(job, tiny_model_path):
    """A QLoRA job of round `number`, which starts from the round before; its keywords are `job`'s."""

    def make(number: int, reference: str = "previous", **settings):
        adapters = [None, *(str(job(f"round_{k}").output) for k in range(1, number))]
        initial = Policy(tiny_model_path, None)
        return job(
            f"round_{number}",
            {**LORA, "load_in_4bit": True},
            adapter=adapters[-1],
            reference=initial if reference == "initial" else None,
            **settings,
        )

    return make


def base_weights(trainer) -> dict[str, torch.Tensor]:
    """Copies of everything that is no adapter: the packed NF4 weights, their scales, and the layers that stay as they are."""
    return {name: t.detach().clone() for name, t in trainer.model.state_dict().items() if "lora_" not in name}


@torch.no_grad()
def full_logit_logps(trainer, adapter: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle of step 0: log-probabilities of the first batch's answers from all the logits, by the adapter on disk."""
    base = AutoModelForCausalLM.from_pretrained(
        trainer.model.get_base_model().config._name_or_path,
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=get_quantization_config(ModelConfig(dtype="float32", load_in_4bit=True)),
    )
    model = base if adapter is None else PeftModel.from_pretrained(base, adapter)
    keep_nf4_trainable(model)
    batch = trainer.data_collator(list(trainer.train_dataset.select(range(8))))
    logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (logps * batch["completion_mask"][:, 1:]).sum(1).chunk(2)


@pytest.mark.parametrize(("trainer", "reference"), [("dpo", "previous"), ("tdpo", "initial")])
def test_three_qlora_rounds_carry_one_adapter_on_a_frozen_base(qlora, trainer, reference):
    """
    Round k starts as the product of round k−1, its reference answers as the previous or the initial policy does (oracle: all
    the logits of the NF4 base with the adapters on disk), each round moves the adapter, and after the last the base is, bit for
    bit, what it was before the first.
    """
    products, base = [None], None
    for number in (1, 2, 3):
        a_job = qlora(number, reference, trainer=trainer)
        round_trainer = make_trainer(a_job, silent)
        if number > 1:
            state, saved = (
                round_trainer.model.state_dict(),
                load_file(Path(products[-1]) / "adapter_model.safetensors"),
            )
            for name, tensor in saved.items():
                assert torch.equal(state[name.replace(".weight", ".default.weight")], tensor)
        if number > 1 or reference == "previous":
            policy, initial = (full_logit_logps(round_trainer, adapter) for adapter in (products[-1], None))
            expected = policy if reference == "previous" else initial
            batch = round_trainer.data_collator(list(round_trainer.train_dataset.select(range(8))))
            round_trainer.model.eval()
            with torch.no_grad():
                round_trainer.compute_loss(round_trainer.model, batch)
            round_trainer.model.train()
            for i, side in enumerate(("chosen", "rejected")):  # TRL trains an adapter on NF4 in bfloat16: 3 digits
                metrics = {key: values[-1] for key, values in round_trainer._metrics["eval"].items()}
                assert metrics[f"logps/{side}"] == pytest.approx(policy[i].mean().item(), rel=1e-3)
                logratio = (policy[i] - expected[i]).mean().item()
                assert metrics[f"rewards/{side}"] / round_trainer.beta == pytest.approx(logratio, abs=1e-2)

        before = base_weights(round_trainer)
        base = base or before
        train(a_job)  # with its check of step 0, which evaluates
        round_trainer.train()
        for weights in (before, base_weights(round_trainer)):
            assert weights.keys() == base.keys()
            assert all(torch.equal(weights[name], base[name]) for name in base)
        products.append(str(a_job.output))

    adapters = [load_file(Path(product) / "adapter_model.safetensors") for product in products[1:]]
    for earlier, later in zip(adapters[:-1], adapters[1:], strict=True):
        assert any(not torch.equal(earlier[name], later[name]) for name in later if "lora_B" in name)
    assert any(tensor.dtype == torch.uint8 for tensor in base.values()), "nothing was quantized"


def test_a_reference_that_is_not_the_policy_stops_the_run(job):
    trainer = make_trainer(job("first"), silent)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    with pytest.raises(RuntimeError, match="Before the first step the policy differs from its reference"):
        check_step_0(trainer)


def test_sft_rows_train_and_progress_is_reported(job, tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Sort : 2 {i}"}],
            "completion": [{"role": "assistant", "content": "1"}],
        }
        for i in range(8)
    ]
    (tmp_path / "sft.jsonl").write_text("".join(map(to_line, rows)))
    reports = []
    training = replace(job("sft", FULL, trainer="sft"), rows=tmp_path / "sft.jsonl")
    run_training(training, lambda *report: reports.append(report))
    assert reports == [(0, 2), (1, 2), (2, 2)]
    assert (tmp_path / "sft" / "model.safetensors").exists()


@pytest.mark.parametrize("trainer", ["dpo", "tdpo"])
@pytest.mark.parametrize("from_adapter", [False, True], ids=["new adapter", "the previous round's"])
def test_an_interrupted_training_continues_from_its_checkpoint(job, tmp_path, trainer, from_adapter):
    """
    Four steps in one go, and two runs with a kill after the checkpoint of step 2: the same adapter. The previous round's
    adapter has a "ref" copy beside it, and the checkpoint both. A later checkpoint that the kill tore is passed over.
    """
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "trainer": trainer}
    if from_adapter:
        settings["adapter"] = train(job("first"))
    whole = train(job("whole", **settings))

    class Killed(Exception):
        pass

    def kill_at_3(done: int, total: int) -> None:
        if done == 3:
            raise Killed

    halves = job("halves", **settings)
    with pytest.raises(Killed):
        run_training(halves, kill_at_3)
    torn = tmp_path / "halves-training" / "checkpoint-3"
    torn.mkdir()
    (torn / "adapter_model.safetensors").write_bytes(b"half")
    reports = []
    run_training(halves, lambda *report: reports.append(report))
    assert reports[0] == (2, 4)
    counts = json.loads((tmp_path / "halves-training" / "rows.json").read_text())
    assert counts == {"rows": 32, "trained_rows": 32, "processes": 1, "batch_size": 8}
    saved = [load_file(Path(path) / "adapter_model.safetensors") for path in (whole, halves.output)]
    for name in saved[0]:
        torch.testing.assert_close(saved[0][name], saved[1][name])


# Training that goes wrong


@pytest.mark.parametrize(
    ("logging_steps", "message"),
    [
        (1, r"`(loss|grad_norm)` is nan at step \d of 6"),
        (100, r"after the last step, .*lora_.* is no longer finite"),
    ],
)
def test_training_that_diverges_ends_with_a_diagnosis_and_without_a_policy(job, tmp_path, logging_steps, message):
    """Steps of 3e38, the largest float32, make products infinite; seen in the log, or where nothing is logged, in the weights."""
    settings = {"learning_rate": 3e38, "max_steps": 6, "logging_steps": logging_steps}
    a_job = job("diverged", **settings, logging_nan_inf_filter=False)
    with pytest.raises(
        RecipeError, match=f"training has diverged: {message}. .*lower `learning_rate`.*delete .*-training"
    ):
        train(a_job)
    assert not list(tmp_path.glob("diverged")) and not list(tmp_path.glob("diverged.tmp"))


def test_a_loss_that_is_no_number_is_logged_as_such():
    """transformers would log the last finite one in its place."""
    config = AriesConfig(
        output_dir="run",
        model={"model_name_or_path": "m"},
        prompts=PromptsConfig("p.jsonl"),
        evaluation=EvaluationConfig("e.jsonl"),
        training={"trainer": "dpo"},
        scores=ScoresConfig(verifier="v.py:f"),
    )
    assert trainer_settings(config, 1, "out").config["logging_nan_inf_filter"] is False


def test_training_on_what_max_length_left_is_refused(job):
    """Rows whose prompt fills `max_length`: of 8 pairs, all the refinement rows, whose prompts are longer."""
    with pytest.raises(
        RecipeError, match=r"of 32 rows of the train dataset have a prompt that alone fills `max_length`"
    ):
        train(job("left_out", max_length=8))
