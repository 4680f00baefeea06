"""
Reward of the IMDb study: how positive is a review?

In: prompts and the texts that continue them. Out: the classifier's probability of `POSITIVE` for both together, in the form of
any TRL reward function. The classifier is the study's, siebert/sentiment-roberta-large-english; the environment variable `IMDB_CLASSIFIER`
names another, whose positive label must be called `POSITIVE` too.
"""

import os
from functools import cache

import torch
from transformers import Pipeline, pipeline


# The ground truth of DPO's study (https://huggingface.co/papers/2305.18290, appendix C.1)
CLASSIFIER = "siebert/sentiment-roberta-large-english"
BATCH = 128


@cache
def classifier(name: str) -> Pipeline:
    device = 0 if torch.cuda.is_available() else -1
    return pipeline("text-classification", model=name, device=device, top_k=None, batch_size=BATCH)


def positive(prompts: list[str], completions: list[str], **kwargs) -> list[float]:
    """
    Args:
        prompts (`list[str]`), completions (`list[str]`):
            Beginnings of reviews, and what continues them.

    Returns:
        `list[float]`: the probability, in [0, 1], that the whole is positive.
    """
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    found = classifier(os.environ.get("IMDB_CLASSIFIER", CLASSIFIER))(texts, truncation=True)
    return [next(label["score"] for label in labels if label["label"] == "POSITIVE") for labels in found]
