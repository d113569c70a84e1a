"""Offline generation: scheduler, loop, engine and text workers of the server in one process."""

from __future__ import annotations

import difflib
import gc
import logging
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from tqdm import tqdm

from minisrv.checkpoint.end_tokens import add_end_token
from minisrv.checkpoint.hub import resolve_model
from minisrv.checkpoint.model_config import load_model_config
from minisrv.checkpoint.tokenizer import load_tokenizer, needs_conversion
from minisrv.config import ServerConfig
from minisrv.detokenizer.worker import DetokenizerWorker
from minisrv.errors import ConfigError, EngineDeadError, InvalidRequestError, MinisrvError
from minisrv.llm.outputs import RequestOutput, Run, error_of, raise_failures
from minisrv.restart_limit import RestartLimit
from minisrv.sampling_params import SamplingParams
from minisrv.scheduler.channel import LocalChannel
from minisrv.scheduler.facts import model_facts
from minisrv.start_progress import no_progress
from minisrv.structured_output.vocabulary import open_vocabulary
from minisrv.tokenizer.chat_template import ChatTemplate
from minisrv.tokenizer.worker import TokenizerWorker
from minisrv.wire.arrays import token_array
from minisrv.wire.messages import AbortMsg, GenerateMsg, TokenizeMsg, UserReply

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("minisrv.llm")

Prompt = str | list[int]
Chat = list[dict[str, Any]]


class LLM:
    """A model in this process: `LLM("demo").generate(["Hello"], max_tokens=20)`.

    model_path: a directory, a GGUF file, a hub name or demo. dtype: a torch dtype or its name; None
    is the checkpoint's. Options are those of the server, `page_size=16` for `--page-size 16`.
    Raises ConfigError for a model or option that cannot be used, TypeError for an unknown option.
    """

    def __init__(
        self,
        model_path: str | Path = "demo",
        dtype: torch.dtype | str | None = None,
        **engine_options: Any,
    ) -> None:
        config = _make_config(str(model_path), dtype, engine_options)
        model_dir = resolve_model(config.model, no_progress)
        model = load_model_config(model_dir, config.max_seq_len)
        with ExitStack() as stack:
            tokenizer_dir = _tokenizer_dir(model_dir, stack)
            tokenizer = load_tokenizer(tokenizer_dir, config.chat_template)
        model = add_end_token(model, tokenizer)
        for note in model.notes:
            logger.warning("%s", note)
        self.config = config
        self.model_config = model
        self.sampling_defaults = model.defaults_of(config.sampling_defaults)
        self.tokenizer = tokenizer
        self._model_dir = model_dir
        self._vocabulary = open_vocabulary(tokenizer, model.vocab_size, model.eos_token_ids)
        self._build_engine(config)
        self._tokenizer = TokenizerWorker(
            tokenizer,
            ChatTemplate(
                tokenizer.chat_templates,
                tokenizer.special_tokens,
                describes_tools=config.describes_tools,
            ),
            self._loop.scheduler.max_seq_len,
            model.vocab_size,
        )
        self._next_uid = 0
        self._closed = False
        self._restart_limit = RestartLimit.parse(config.restart_limit)
        self._deaths: list[float] = []
        self._dead: str | None = None  # why no engine runs, once none is started any more
        self._turning = threading.Lock()  # closing waits for the end of a turn

    def _build_engine(self, config: ServerConfig) -> None:
        """Load the model, and put around it what knows of its requests."""
        from minisrv.scheduler.build import build_loop

        self._detokenizer = DetokenizerWorker(self.tokenizer)
        self._channel = LocalChannel()
        self._loop = build_loop(
            config,
            self._model_dir,
            self._channel,
            no_progress,
            vocabulary=self._vocabulary,
            model_config=self.model_config,
        )

    @property
    def max_seq_len(self) -> int:
        """Most tokens of prompt and output together."""
        return self._loop.scheduler.max_seq_len

    @property
    def facts(self) -> dict[str, Any]:
        """What the processes of a server report of the model at their start."""
        facts = model_facts(self.model_config, self.config, self.max_seq_len)
        return {**facts, "chat_format": asdict(self._tokenizer.chat_format)}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **sampling_fields: Any,
    ) -> list[str]:
        """The text after each prompt (a string or token ids; a single one counts as a list of one).

        Fields such as `max_tokens=50` replace those of `sampling_params`; max_tokens None is the
        rest of the context. Raises InvalidRequestError, before anything runs, for a prompt or a
        parameter that cannot be served, and for n > 1. If a prompt fails while it runs, the others
        go on; at the end its error is raised, for several prompts as a PromptsFailedError that has
        the outputs of all.
        """
        requests = _requests(prompts, sampling_params, sampling_fields)
        if any(request.sampling.n > 1 for request in requests):
            raise InvalidRequestError(
                "generate returns one text per prompt; for n > 1 use generate_outputs", param="n"
            )
        return self._texts(requests, use_tqdm)

    def generate_outputs(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **sampling_fields: Any,
    ) -> list[RequestOutput]:
        """As `generate`, with token ids, finish reasons, usage and all n choices.

        The output of a prompt that failed while it ran has an `error`; nothing is raised for it.
        """
        return self._run(_requests(prompts, sampling_params, sampling_fields), use_tqdm)

    def chat(
        self,
        messages: Chat | Sequence[Chat],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
        **sampling_fields: Any,
    ) -> list[str]:
        """The reply to each conversation; a single one counts as a list of one.

        Raises as `generate`.
        """
        single = bool(messages) and isinstance(messages[0], dict)
        chats = cast("list[Chat]", [messages] if single else list(messages))
        params = _params_for(len(chats), sampling_params, sampling_fields)
        kwargs = chat_template_kwargs or {}
        requests = [
            TokenizeMsg(uid=0, messages=tuple(chat), template_kwargs=kwargs, sampling=p)
            for chat, p in zip(chats, params, strict=True)
        ]
        return self._texts(requests, use_tqdm)

    def prepare(self, request: TokenizeMsg) -> GenerateMsg:
        """Encode and check a request, and give it its uid.

        The model's defaults fill what its sampling leaves open, and a random seed its seed, so that
        another engine continues it. Raises InvalidRequestError.
        """
        self._check_usable()
        sampling = request.sampling.with_defaults(self.sampling_defaults)
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(63))
        made = self._tokenizer.handle(replace(request, uid=self._next_uid, sampling=sampling))
        if isinstance(made, UserReply):
            raise error_of(made.failures[0])
        assert isinstance(made, GenerateMsg)
        if made.sampling.grammar is not None:
            self._loop.compile_grammar(made.sampling.grammar)
        self._next_uid += sampling.n
        return made

    def stream_outputs(self, messages: Sequence[GenerateMsg]) -> Iterator[RequestOutput]:
        """Serve prepared requests together; yields each when all its choices have ended or failed.

        When the engine dies, they go on where they are on another one. Closing the iterator early
        aborts the others. Raises MinisrvError after `close`, EngineDeadError at the restart limit.
        """
        self._check_usable()
        run = Run(messages)
        self._channel.inbox.extend(messages)
        try:
            while True:
                with _delay_interrupt(), self._turning:
                    if not run.choices and (self._closed or not self._loop.busy):
                        return
                    self._check_open()
                    ended = self._turn(run)
                yield from ended
        finally:
            with _delay_interrupt(), self._turning:
                self._drop(run)

    def close(self) -> None:
        """End what runs, and free the model and its cache; the object cannot be used afterwards."""
        self._closed = True
        with self._turning:
            self._free()

    def _free(self) -> None:
        if loop := self.__dict__.pop("_loop", None):
            loop.close()
            loop.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _check_usable(self) -> None:
        if self._closed:
            raise RuntimeError("this LLM is closed")
        if self._dead is not None:
            raise EngineDeadError(self._dead)

    def _check_open(self) -> None:
        if self._closed:
            raise MinisrvError("this LLM was closed", code="server_draining")

    def _texts(self, requests: Sequence[TokenizeMsg], use_tqdm: bool) -> list[str]:
        outputs = self._run(requests, use_tqdm)
        raise_failures(outputs)
        return [output.outputs[0].text for output in outputs]

    def _run(self, requests: Sequence[TokenizeMsg], use_tqdm: bool) -> list[RequestOutput]:
        messages = []
        for index, request in enumerate(requests):
            try:
                messages.append(self.prepare(request))
            except MinisrvError as error:
                error.message = f"prompt {index}: {error.message}"
                error.args = (error.message,)
                raise
        done: dict[int, RequestOutput] = {}
        tokens = 0
        with tqdm(total=len(requests), desc="generate", unit="req", disable=not use_tqdm) as bar:
            for output in self.stream_outputs(messages):
                done[output.index] = output
                tokens += output.usage.completion_tokens
                elapsed = bar.format_dict["elapsed"] or 1e-9
                bar.set_postfix_str(f"{tokens / elapsed:.0f} tok/s", refresh=False)
                bar.update()
        for index, request in enumerate(requests):
            done[index].prompt = request.prompt if isinstance(request.prompt, str) else None
        return [done[index] for index in range(len(requests))]

    def _turn(self, run: Run) -> list[RequestOutput]:
        """Turn the loop, or replace it if its engine has died; returns the requests that ended.

        Raises EngineDeadError at the restart limit.
        """
        try:
            self._loop.turn()
            return list(self._collect(run))
        except EngineDeadError as error:
            death = error.message
        # Not in the handler: the error's traceback holds the old engine.
        self._restart_engine(death)
        if not self.config.resume:
            return run.fail_open(death)
        self._channel.inbox.extend(run.resume_open())
        return []

    def _restart_engine(self, death: str) -> None:
        """Build the engine again, with as many pages; raises EngineDeadError at the limit."""
        config = replace(self.config, num_pages=self._loop.scheduler.cache.pages.size)
        while True:
            self._deaths.append(time.monotonic())
            self._free()
            gc.collect()  # the old engine is part of reference cycles
            if not self._restart_limit.allows_restart(self._deaths):
                self._dead = death
                raise EngineDeadError(death)
            logger.warning("%s; the engine starts again", death)
            try:
                self._build_engine(config)
                return
            except EngineDeadError as error:
                death = error.message
            except Exception as error:
                self._dead = f"{death}; it cannot be started again: {error}"
                raise EngineDeadError(self._dead) from error

    def _collect(self, run: Run) -> Iterator[RequestOutput]:
        """The requests that have ended with the last turn."""
        outbox = self._channel.outbox
        while outbox:
            message = outbox.popleft()
            run.add_tokens(message)
            reply, aborts = self._detokenizer.handle(message)
            if aborts is not None:
                self._channel.inbox.append(aborts)
            if reply is not None:
                yield from run.add_texts(reply)

    def _drop(self, run: Run) -> None:
        """Abort what is still open, so that the next call finds an idle engine."""
        if self._closed or self._dead is not None:
            return
        self._channel.inbox.append(AbortMsg(uids=tuple(run.choices)))
        run.choices.clear()
        with suppress(EngineDeadError):  # the next call replaces the engine
            while self._loop.busy or self._channel.inbox:
                self._loop.turn()
                for _ in self._collect(run):
                    pass


@contextmanager
def _delay_interrupt() -> Iterator[None]:
    """Delay Ctrl+C until the end of the block: it must not interrupt the scheduler mid-step."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts:
        signal.raise_signal(signal.SIGINT)


def _make_config(
    model: str, dtype: torch.dtype | str | None, options: dict[str, Any]
) -> ServerConfig:
    _check_names(ServerConfig, options, "LLM has no option")
    name = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    config = ServerConfig(**{"model": model, "dtype": name, **options})
    if config.one_shot_all_reduce_kib:
        # When a rank dies, its kernels end only with this process.
        raise ConfigError("--one-shot-all-reduce-kib can be used only by servers")
    return config


def _tokenizer_dir(model_dir: Path, stack: ExitStack) -> Path:
    """Where tokenizer.json is: the model's directory, or one that a child converts into."""
    if not needs_conversion(model_dir):
        return model_dir
    out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="minisrv-")))
    converter = "minisrv.checkpoint.convert_tokenizer"
    command = [sys.executable, "-m", converter, str(model_dir), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise ConfigError(lines[-1] if lines else "the tokenizer could not be converted")
    return out


def _check_names(owner: type[Any], names: Iterable[str], refusal: str) -> None:
    """Raise TypeError, with similar names, for the first of `names` that is not a field."""
    known = [f.name for f in fields(owner)]
    for name in names:
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=3)
            hint = f"; near names: {', '.join(similar)}" if similar else ""
            raise TypeError(f"{refusal} {name!r}{hint}")


def _requests(
    prompts: Prompt | Sequence[Prompt],
    sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    sampling_fields: dict[str, Any],
) -> list[TokenizeMsg]:
    listed = _listed(prompts)
    params = _params_for(len(listed), sampling_params, sampling_fields)
    return [
        TokenizeMsg(
            uid=0,
            prompt=prompt if isinstance(prompt, str) else token_array(prompt),
            sampling=p,
        )
        for prompt, p in zip(listed, params, strict=True)
    ]


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    listed: list[Any] = list(prompts)
    if listed and all(isinstance(item, int) and not isinstance(item, bool) for item in listed):
        return [listed]
    for i, prompt in enumerate(listed):
        ids = isinstance(prompt, list | tuple) and all(type(item) is int for item in prompt)
        if not isinstance(prompt, str) and not ids:
            raise InvalidRequestError(
                f"prompt {i} is a {type(prompt).__name__}; it must be a string or a list of "
                "token ids",
                param="prompts",
            )
    return listed


def _params_for(
    count: int,
    params: SamplingParams | Sequence[SamplingParams] | None,
    sampling_fields: dict[str, Any],
) -> list[SamplingParams]:
    """One SamplingParams per prompt."""
    _check_names(SamplingParams, sampling_fields, "there is no sampling field")
    if params is None or isinstance(params, SamplingParams):
        listed = [params or SamplingParams()] * count
    else:
        listed = list(params)
    if len(listed) != count:
        raise InvalidRequestError(
            f"there are {count} prompts and {len(listed)} sampling_params", param="sampling_params"
        )
    return [replace(p, **sampling_fields) for p in listed] if sampling_fields else listed
