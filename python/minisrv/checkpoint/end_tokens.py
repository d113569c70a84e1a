"""Which tokens end a text, where the configuration and the tokenizer each name their own."""

from __future__ import annotations

from dataclasses import replace

from minisrv.checkpoint.model_config import ModelConfig
from minisrv.checkpoint.tokenizer import HFTokenizer


def add_end_token(model: ModelConfig, tokenizer: HFTokenizer) -> ModelConfig:
    """The model with the tokenizer's `eos_token` among its end tokens, and a note if it was not.

    A model that was tuned for chats may end its turns with a token that its config.json, copied
    from the base model, does not have. An end token that no file states counts only if it is a
    special token.
    """
    own, ids = tokenizer.eos_id, model.eos_token_ids
    if model.eos_is_assumed:
        ids = tuple(id for id in ids if id in tokenizer.special_ids)
    if own is None or own in ids or own >= model.vocab_size:
        return replace(model, eos_token_ids=ids)
    given = ", ".join(f"{tokenizer.token(id)} ({id})" for id in ids)
    added = f"{tokenizer.eos_token} ({own})"
    note = f"no end token in the configuration; the tokenizer's, {added}, ends a text"
    if ids:
        note = f"end tokens are {given} by the configuration and {added} by the tokenizer"
    return replace(model, eos_token_ids=(*ids, own), notes=(*model.notes, note))
