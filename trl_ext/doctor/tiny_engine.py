"""
A real start of vLLM on a random Llama of 0.1M parameters, and a few tokens from it: `python -m trl_ext.doctor.tiny_engine DIRECTORY`.

Out: the model, and `answers.jsonl`, in a directory that is there.
"""

import sys
from contextlib import closing
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..aries.config import DraftsConfig, GenerationConfig, RefinementsConfig
from ..aries.generation.chains import EngineSettings, Task, answer_task
from ..aries.generation.embedded_engine import EmbeddedEngine
from ..aries.generation.refinements import Strategy


def make_model(directory: Path) -> None:
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "</s>", *"abcdefghijklm"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # of size 32, one of those that vLLM's CPU build takes
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)


def main(directory: Path) -> None:
    make_model(directory)
    prompts = directory / "prompts.jsonl"
    prompts.write_text('{"prompt_id": "p-1", "prompt": "a b c"}\n')
    config = GenerationConfig(
        max_model_len=64,
        max_num_seqs=2,
        dtype="auto" if torch.cuda.is_available() else "float32",  # vLLM's 16-bit code aborts on some CPUs
        cpu_kv_cache_gib=1,
        gpu_memory_utilization=0.2,
        enforce_eager=True,
    )
    strategy = Strategy(RefinementsConfig(strategy="parallel", turns=2))
    task = Task(prompts, directory / "answers.jsonl", strategy, [DraftsConfig(max_tokens=8)] * 2, seed=(0,))
    with closing(EmbeddedEngine(EngineSettings(str(directory), config, max_lora_rank=8))) as engine:
        answer_task(engine, task, lambda done: None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
