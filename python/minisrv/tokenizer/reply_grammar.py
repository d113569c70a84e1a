"""Grammars of whole replies: required calls, and text that follows reasoning.

They are written in the tokenizer process, which knows the prompt and the special tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from minisrv.checkpoint.chat_format import ChatFormat
from minisrv.checkpoint.tokenizer import HFTokenizer
from minisrv.sampling_params import Grammar
from minisrv.tokenizer.tagged_grammar import Tags, json_rule
from minisrv.wire.messages import Parts

Tools = Sequence[Mapping[str, Any]]


class ReplyGrammars:
    """Writes the grammars of one model's replies, in Lark as llguidance knows it."""

    def __init__(self, tokenizer: HFTokenizer, chat_format: ChatFormat) -> None:
        self._format = chat_format
        written = "\n".join(tokenizer.chat_templates.values())
        self._has_arguments_mark = "[ARGS]" in written
        self._has_fences = "```json" in written
        marks = (*chat_format.call_markers, *(chat_format.reasoning_markers or ()))
        self._ids = {mark: id for mark in marks if (id := tokenizer.token_id(mark)) is not None}
        self._tags = Tags.of(chat_format.tool_format, written, self._mark)

    def calls(self, tools: Tools, names: Sequence[str], parallel: bool) -> Grammar:
        """A call of one of `names`, or with `parallel` several, in the model's own form."""
        functions = [t["function"] for t in tools if t["function"]["name"] in names]
        reply, rules = self._calls(functions, parallel)
        return Grammar.lark("\n".join([f"start: {reply}", *rules]), "tools")

    def parameters(self, tools: Tools, names: Sequence[str]) -> Iterator[Grammar]:
        """The schemas of `names` one by one, under the names of their fields."""
        for i, tool in enumerate(tools):
            if tool["function"]["name"] in names:
                schema = _arguments_schema(tool["function"])
                yield Grammar.json_schema(schema, f"tools.{i}.function.parameters")

    def or_calls(self, grammar: Grammar, tools: Tools, parallel: bool) -> Grammar:
        """`grammar` for the text of a reply that may call tools instead.

        As in every reply that is free to call, nothing holds the arguments to their schema.
        """
        named = [{"name": tool["function"]["name"]} for tool in tools]
        reply, rules = self._calls(named, parallel)
        return replace(grammar, before="\n".join(["(@text | calls)", f"calls: {reply}", *rules]))

    def behind_reasoning(self, grammar: Grammar, parts: Parts) -> Grammar:
        """Apply `grammar` to what follows the reply's reasoning, if it has any."""
        is_open = bool(parts & Parts.OPEN_REASONING)
        if self._format.reasoning_markers is None or not (is_open or parts & Parts.REASONING):
            return grammar
        begin, end = self._format.reasoning_markers
        if end in self._ids:
            opening = "" if is_open else f"{self._mark(begin)} "
            rule = f"reasoning: {opening}/(?s:.*)/ {self._mark(end)}"
        else:
            # One lexeme from tag to tag, as short as possible: it ends at the first closing tag.
            opening = "" if is_open else _escape(begin)
            rule = f"reasoning[lazy]: /{opening}(?s:.*){_escape(end)}/"
        optional = "" if is_open else "?"
        text, *rules = (grammar.before or "@text").splitlines()
        body = f"(reasoning /\\n*/){optional} {text}"
        return replace(grammar, before="\n".join([body, rule, *rules]))

    def _calls(
        self, functions: Sequence[Mapping[str, Any]], parallel: bool
    ) -> tuple[str, list[str]]:
        """A reply that calls some of `functions`, and the rules that it is made of."""
        rules: list[str] = []
        for i, function in enumerate(functions):
            if self._tags is not None:
                rules += self._tags.call(f"call{i}", function["name"], _arguments_schema(function))
            else:
                rules.append(f"call{i}: {self._call(function)}")
        call = "(" + " | ".join(f"call{i}" for i in range(len(functions))) + ")"
        return self._reply(call, parallel), rules

    def _reply(self, call: str, parallel: bool) -> str:
        match self._format.tool_format:
            case "hermes" | "qwen3_coder" | "glm":
                opening, closing = self._mark("<tool_call>"), self._mark("</tool_call>")
                line = "" if self._format.tool_format == "glm" else r'"\n"'
                tagged = f"{opening} {line} {call} {line} {closing}"
                return rf'{tagged} ("\n" {tagged})*' if parallel else tagged
            case "llama":
                return f'{call} ("; " {call})*' if parallel else call
            case "deepseek":
                return self._deepseek_reply(call, parallel)
        mark = self._mark("[TOOL_CALLS]")
        if self._has_arguments_mark:
            return f"({mark} {call})+" if parallel else f"{mark} {call}"
        more = f'(", " {call})*' if parallel else ""
        return f'{mark} / ?\\[/ {call} {more} "]"'

    def _deepseek_reply(self, call: str, parallel: bool) -> str:
        begin, end = self._mark("<｜tool▁calls▁begin｜>"), self._mark("<｜tool▁calls▁end｜>")
        one = f"{self._mark('<｜tool▁call▁begin｜>')} {call} {self._mark('<｜tool▁call▁end｜>')}"
        line = r'"\n"' if self._has_fences else ""
        return f"{begin} {one} {f'({line} {one})*' if parallel else ''} {end}"

    def _call(self, function: Mapping[str, Any]) -> str:
        name = json.dumps(function["name"])
        arguments = json_rule(_arguments_schema(function))
        if self._format.tool_format == "deepseek":
            separator = self._mark("<｜tool▁sep｜>")
            if not self._has_fences:
                return f"{name} {separator} {arguments}"
            line = json.dumps(f"{function['name']}\n```json\n")
            return rf'"function" {separator} {line} {arguments} "\n```"'
        if self._format.tool_format == "mistral" and self._has_arguments_mark:
            return f"{name} {self._mark('[ARGS]')} {arguments}"
        key = "parameters" if self._format.tool_format == "llama" else "arguments"
        head = json.dumps(f'{{"name": {name}, "{key}": ')
        return f'{head} {arguments} "}}"'

    def _mark(self, text: str) -> str:
        """A mark that is a token is named by its id: llguidance lets no text spell it."""
        return f"<[{self._ids[text]}]>" if text in self._ids else json.dumps(text)


def _arguments_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    return {**(function.get("parameters") or {}), "type": "object"}


def _escape(text: str) -> str:
    """For a Lark pattern; the tags have no other characters that mean something there."""
    return re.sub(r"([/\[\]])", r"\\\1", text)
