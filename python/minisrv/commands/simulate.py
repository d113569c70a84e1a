"""`minisrv simulate`: how a server would do with the traffic of a trace, in virtual time."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from minisrv.bench.traces import DIVISORS, read_trace
from minisrv.checkpoint.hub import CONFIG_FILES, resolve_model
from minisrv.command_line import parse_command_line
from minisrv.commands.plan import Deployment, load_model, make_plan
from minisrv.config import MAX_PREFILL_TOKENS, ServerConfig
from minisrv.engine.gpus import GPU, find_gpu
from minisrv.engine.parallel.shard import check_divisible
from minisrv.engine.quantization import check_quantization
from minisrv.errors import ConfigError, MinisrvError
from minisrv.option_values import check_output
from minisrv.simulation.calibrate import calibrate
from minisrv.simulation.fleet import ROUTERS, Traffic, simulate
from minisrv.simulation.linear import Calibration
from minisrv.simulation.plot import draw
from minisrv.simulation.records import Bounds, Figures
from minisrv.simulation.replica import ServerShape
from minisrv.simulation.roofline import Roofline
from minisrv.simulation.step_times import StepTimes
from minisrv.simulation.sweep import Point, Result, cheapest, describe, expand, flags, table
from minisrv.start_progress import no_progress

_ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Server:
    """What is simulated: what decides the steps of a server, and how long they take."""

    shape: ServerShape
    times: StepTimes
    name: str


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures; exit status 0, 2: an option is wrong, 1: failed, 130: Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _make_parser()
    config, options = parse_command_line(parser, argv)
    if options.calibrate is None and options.trace is None:
        parser.error("--trace is missing")
    if options.gpu is None and options.step_times is None:
        parser.error("either --gpu or --step-times is missing")
    if options.plot is not None and not options.sweep:
        parser.error("--plot needs --sweep")
    try:
        if options.calibrate is not None:
            _calibrate(options.calibrate, config, options.step_times)
        if options.trace is not None:
            _simulate_all(argv, options)
    except MinisrvError as error:
        print(f"minisrv: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        raise  # nobody reads the output
    except OSError as error:
        print(f"minisrv: {error}", file=sys.stderr)
        return 1
    return 0


def _simulate_all(argv: Sequence[str], options: argparse.Namespace) -> None:
    """One simulation, or one for each point of the sweeps. Raises MinisrvError."""
    for path in (options.json, options.plot):
        check_output(path)
    points = expand(options.sweep)
    # All of them first: a wrong one ends the command.
    parsed = [parse_command_line(_make_parser(), [*argv, *flags(point)]) for point in points]
    results = []
    for point, (config, own) in zip(points, parsed, strict=True):
        result = _simulate(point, config, own)
        results.append(result)
        if options.sweep:
            print(f"{describe(point)}: {result.figures.good_share:.1%} good", flush=True)
    bounds = Bounds(options.max_ttft, options.max_itl)
    if options.sweep:
        print("\n" + table(results))
        print(f"\ngood: TTFT <= {bounds.ttft_s:g} s and mean ITL <= {bounds.itl_s:g} s")
        best = cheapest(results, options.good_share)
        enough = "none of these" if best is None else f"{best.gpus} GPUs ({describe(best.point)})"
        print(f"enough for {options.good_share:.0%} of the requests: {enough}")
    else:
        print(_table(results[0].figures, bounds))
    if options.json is not None:
        shown = [result.to_dict() for result in results]
        options.json.write_text(json.dumps(shown if options.sweep else shown[0], indent=1) + "\n")
    if options.plot is not None:
        options.plot.write_text(draw(results))


def _simulate(point: Point, config: ServerConfig, options: argparse.Namespace) -> Result:
    """Play the trace against the servers of a command line. Raises MinisrvError."""
    traffic = _read_traffic(options)
    if options.gpu is not None:
        server = _on_gpu(config, find_gpu(options.gpu), options.efficiency)
    else:
        server = _as_measured(Calibration.load(options.step_times), options)
    if not options.sweep:
        servers = server.name if options.replicas == 1 else f"{options.replicas} x {server.name}"
        print(f"{servers}: {options.trace}, {len(traffic.trace)} requests")
    began = time.perf_counter()
    result = simulate(
        traffic,
        server.shape,
        server.times,
        Bounds(options.max_ttft, options.max_itl),
        num_replicas=options.replicas,
        router=options.router,
    )
    if not options.sweep:
        print(f"{result.seconds:.0f} s simulated in {time.perf_counter() - began:.1f} s")
    return Result(point, options.replicas * config.tp, result)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minisrv simulate",
        usage="minisrv simulate [MODEL] --gpu NAME --trace FILE [options]\n"
        "       minisrv simulate --calibrate URL --step-times FILE\n"
        "       minisrv simulate --step-times FILE --trace FILE [options]",
        description="Play a trace of traffic against a simulated server: the real scheduler and "
        "cache in virtual time. The options of `minisrv serve` describe the server; those of the "
        "simulation are at the end.",
    )
    _add_servers(parser.add_argument_group("servers"))
    _add_traffic(parser.add_argument_group("traffic"))
    _add_results(parser.add_argument_group("results"))
    return parser


def _add_servers(group: argparse._ArgumentGroup) -> None:
    times = group.add_mutually_exclusive_group()
    times.add_argument("--gpu", metavar="NAME", help="GPU, such as H100")
    times.add_argument(
        "--step-times", type=Path, metavar="FILE", help="what --calibrate has measured, as JSON"
    )
    group.add_argument(
        "--calibrate",
        metavar="URL",
        help="measure the steps of a running minisrv that has nothing else to do, and write them "
        "to --step-times; takes some minutes, and --api-key if the server has one",
    )
    group.add_argument(
        "--efficiency",
        type=_share,
        default=0.7,
        metavar="X",
        help="share of the GPU's roofline that steps reach (default: 0.7)",
    )
    group.add_argument(
        "--replicas", type=_count, default=1, metavar="N", help="equal servers (default: 1)"
    )
    group.add_argument(
        "--router",
        choices=list(ROUTERS),
        default="cost",
        help="how a server is chosen for a request: cost weighs what is cached there against what "
        "is queued there (default: cost)",
    )


def _add_traffic(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="requests in Mooncake's form (JSONL), Azure's (CSV) or our own",
    )
    group.add_argument(
        "--duration", type=_positive, metavar="S", help="only the first S seconds of the trace"
    )
    group.add_argument(
        "--speed",
        type=_positive,
        default=1.0,
        metavar="X",
        help="let requests arrive X times as fast (default: 1)",
    )
    group.add_argument(
        "--divide-lengths",
        type=int,
        choices=DIVISORS,
        default=1,
        metavar="N",
        help="divide the lengths of prompts and outputs by N, a power of two",
    )


def _add_results(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-ttft",
        type=_positive,
        default=2.0,
        metavar="S",
        help="seconds to the first token within which a request is good (default: 2)",
    )
    group.add_argument(
        "--max-itl",
        type=_positive,
        default=0.1,
        metavar="S",
        help="mean seconds between tokens within which it is good (default: 0.1)",
    )
    group.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="NAME=V,V",
        help="simulate with each of these values of an option, such as replicas=1,2,4; repeatable, "
        "which simulates every combination",
    )
    group.add_argument(
        "--good-share",
        type=_share,
        default=0.9,
        metavar="X",
        help="the share of good requests from which a point of a sweep is enough (default: 0.9)",
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    group.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw a sweep as SVG, over its first option"
    )


def _read_traffic(options: argparse.Namespace) -> Traffic:
    trace = read_trace(options.trace)
    if options.duration is not None:
        trace = [request for request in trace if request.arrival_s < options.duration]
    return Traffic(trace).divided(options.divide_lengths).faster(options.speed)


def _calibrate(url: str, config: ServerConfig, path: Path | None) -> None:
    """Measure a server and write the result. Raises MinisrvError."""
    if path is None:
        raise ConfigError("--calibrate needs --step-times, the file to write")
    check_output(path)
    key = config.admin_key or next(iter(config.api_key), "")
    calibration = calibrate(url, key, print)
    calibration.save(path)
    errors = sorted(map(abs, calibration.errors()))
    print(f"{path}: {calibration.times}")
    print(f"off by {errors[len(errors) // 2]:.1%} at the median, {errors[-1]:.1%} at most")


def _as_measured(calibration: Calibration, options: argparse.Namespace) -> Server:
    """The server that was measured, except for the options that the command line gives."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    changed = {f.name: given[f.name] for f in fields(ServerShape) if f.name in given}
    shape = replace(calibration.shape, **changed)
    return Server(shape, calibration.times, f"{calibration.model} as measured")


def _on_gpu(config: ServerConfig, gpu: GPU, efficiency: float) -> Server:
    """The server of `config` on GPUs. Raises ConfigError if its model does not fit."""
    directory = resolve_model(config.model, no_progress, CONFIG_FILES)
    model = load_model(directory, config.max_seq_len)
    check_quantization(config, model, "cuda")
    check_divisible(model, config.tp)
    memory = int(gpu.usable_gib * 2**30)
    deployment = Deployment(model, config, memory, gpu.num_sms)
    num_pages = make_plan(deployment).num_pages
    if not num_pages:
        raise ConfigError(f"the model does not fit; see minisrv plan {config.model} --gpu ...")
    itemsize = _ITEMSIZE[deployment.dtype]
    shape = ServerShape(
        num_pages=num_pages,
        page_size=config.page_size,
        max_seq_len=model.max_seq_len,
        max_prefill_tokens=config.max_prefill_tokens or MAX_PREFILL_TOKENS["cuda"],
        max_running_requests=config.max_running_requests,
        overlap_depth=1 if config.overlap_depth is None else config.overlap_depth,
        radix_cache=config.radix_cache,
        fair_keys=config.fair_keys,
    )
    times = Roofline.of(
        model,
        gpu,
        tp=config.tp,
        itemsize=itemsize,
        cache_itemsize=1 if config.kv_cache_dtype == "fp8" else itemsize,
        efficiency=efficiency,
    )
    ranks = "" if config.tp == 1 else f"{config.tp} x "
    return Server(shape, times, f"{config.model} on {ranks}{gpu.name}")


def _table(result: Figures, bounds: Bounds) -> str:
    rows = [
        ("TTFT p50 / p90 / p99", _seconds(result.ttft_p50, result.ttft_p90, result.ttft_p99)),
        ("ITL p50 / p90 / p99", _seconds(result.itl_p50, result.itl_p90, result.itl_p99)),
        ("prefix cache hit rate", f"{result.hit_rate:.1%}"),
        ("preemptions", f"{result.preemptions}"),
        ("refused", f"{result.refused}"),
        ("engine busy", f"{result.busy:.0%}"),
        ("output tokens per second", f"{result.output_rate:.0f}"),
        (
            f"TTFT <= {bounds.ttft_s:g} s, mean ITL <= {bounds.itl_s:g} s",
            f"{result.good_share:.1%} of requests, {result.goodput:.3g} per second",
        ),
    ]
    return "\n".join(f"  {name:<36} {value}" for name, value in rows)


def _seconds(*values: float) -> str:
    return " / ".join(f"{value:.3g}" for value in values) + " s"


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def _share(text: str) -> float:
    if (value := _positive(text)) > 1:
        raise ValueError
    return value
