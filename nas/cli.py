"""The command line. Commands hold no logic: they read files, call a function, print.

Exit codes: 0 done; 1 a defect of this program; 2 wrong use or input; 130 interrupted (the same command goes on).
"""

import functools
import json
import os
import shlex
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from nas.errors import ExecutorError, NasError
from nas.runfolder import STAGES

if TYPE_CHECKING:
    from nas.config import Experiment

GRACE_SECONDS = 8.0  # after Ctrl-C, for what is running now to end by itself

_EPILOG = "Exit codes: 0 done, 1 a defect of nas, 2 wrong use or input, 130 interrupted."


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, epilog=_EPILOG)
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of errors; anywhere on the line.")
@click.version_option(package_name="nas")
def cli() -> None:
    """From data, device and budget to a verified network."""


def _experiment_options(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def function(*, device: str | None, overrides: tuple[str, ...], **options: Any) -> None:
        short = () if device is None else (f"device={json.dumps(device)}",)
        command(overrides=(*short, *overrides), **options)

    function = click.argument("experiment", type=click.Path(path_type=Path))(function)
    function = click.option("--out", type=click.Path(path_type=Path), help="Run folder; runs/<name> if not given.")(
        function
    )
    function = click.option("--smoke", is_flag=True, help="Lay the file's [smoke] table over it: minutes, not hours.")(
        function
    )
    function = click.option("--device", metavar="NAME", help="As --set device=NAME; `nas list devices` has the names.")(
        function
    )
    return click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value.")(function)


def _stages(
    experiment: Path,
    out: Path | None,
    smoke: bool,
    overrides: tuple[str, ...],
    stages: Sequence[str] | None,
    redo: str | None = None,
) -> None:
    from nas.pipeline import STAGES, run_experiment

    resolved, path = _resolved(experiment, out, smoke, overrides)
    run_experiment(resolved, path, stages=stages or tuple(STAGES), redo=redo)


def _resolved(experiment: Path, out: Path | None, smoke: bool, overrides: tuple[str, ...]) -> tuple["Experiment", Path]:
    """The experiment and its run folder."""
    from nas.pipeline import load_experiment

    resolved = load_experiment(experiment, smoke=smoke, overrides=overrides)
    return resolved, out or Path("runs") / (f"{resolved.name}-smoke" if smoke else resolved.name)


@cli.command()
@click.option("--redo", type=click.Choice(STAGES), help="Do this stage and all after it anew.")
@click.option("--address", metavar="HOST:PORT", help="Search on this Ray cluster; `auto` finds one on this machine.")
@_experiment_options
def run(
    experiment: Path, out: Path | None, smoke: bool, overrides: tuple[str, ...], redo: str | None, address: str | None
) -> None:
    """All stages of EXPERIMENT, from data to report; what is done already is kept.

    Example: nas run experiments/quickstart.toml --set search.trials=400 --out runs/longer
    """
    _stages(experiment, out, smoke, (*_joining(address), *overrides), None, redo)


def _joining(address: str | None) -> tuple[str, ...]:
    """What --address overrides in an experiment."""
    return () if address is None else ('search.executor="ray"', f"search.address={json.dumps(address)}")


def _stage_command(name: str, text: str) -> None:
    @cli.command(name, help=f"{text}\n\nExample: nas {name} experiments/quickstart.toml")
    @_experiment_options
    def stage(experiment: Path, out: Path | None, smoke: bool, overrides: tuple[str, ...]) -> None:
        _stages(experiment, out, smoke, overrides, (name,))


@cli.command()
@click.argument("what", required=False)
@click.option("--device", metavar="NAME", help="Whose runtime, threads and batch are used (`nas list devices`).")
@click.option(
    "--as", "name", metavar="NAME", help="Whose tables they become: latency_models/NAME; DEVICE if not given."
)
@click.option("--precision", "precisions", multiple=True, help="Of the device's, those to measure; all if not given.")
@click.option("--image", default="32x32x3", show_default=True, help="Of spaces without a resolution of their own.")
@click.option("--classes", default=10, show_default=True, help="That the networks tell apart.")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Of anchors, held-out networks and the order of rounds.",
)
@click.option("--bundle", type=click.Path(path_type=Path), help="Do not measure: write all that another machine needs.")
@click.option("--import", "results", type=click.Path(path_type=Path), help="Read the results that it brought back.")
@click.option(
    "--over",
    metavar="WHERE",
    help="Measure the bundle on another machine and import: ssh://[user@]host[:port][/folder] or adb[:serial]; without "
    "Python there, ?benchmark_model=PATH behind it.",
)
@click.option("--prove", metavar="N", type=click.IntRange(min=2), help="Prove NAME's table anew, on N other networks.")
@click.option(
    "--networks",
    metavar="N",
    type=click.IntRange(min=1),
    help="Measure N whole networks, no block: a model is learned from them and from other devices' tables.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Run folder, where WHAT is an experiment.")
@click.option("--smoke", is_flag=True, help="As for `nas run`, where WHAT is an experiment.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="latency.KEY=VALUE; or as for `nas run`.")
def measure(
    what: str | None,
    device: str | None,
    name: str | None,
    precisions: tuple[str, ...],
    image: str,
    classes: int,
    seed: int,
    bundle: Path | None,
    results: Path | None,
    over: str | None,
    prove: int | None,
    networks: int | None,
    out: Path | None,
    smoke: bool,
    overrides: tuple[str, ...],
) -> None:
    """Measure latency tables, with proof: of a space (WHAT: its name or file), or the first stage of an experiment.

    \b
    Example: nas measure experiments/quickstart.toml
    This machine:     nas measure mobilenet_v3_32 --device host_onnxruntime --as my_laptop
    Another machine:  nas measure mobilenet_v3_32 --device host_onnxruntime --precision float32 --bundle out/
                      there: python out/measure.py        here: nas measure --import out/ --as my_board
    all of it:        ... --bundle out/ --over ssh://pi@board --as my_board
    Android phone:    nas measure mobilenet_v3_32 --device host_litert --bundle out/ --as my_phone
                      --over "adb?benchmark_model=android_aarch64_benchmark_model&cpus=80"
    Still true?       nas measure mobilenet_v3_32 --device my_laptop --prove 100
    Blocks cannot be: nas measure mobilenet_v3_32 --device host_onnxruntime --networks 20 --as my_phone
    """
    from nas import measured

    command = "nas " + shlex.join(sys.argv[1:])
    if results is not None:
        _heed("for --import", "what", "results", "name", "overrides")
        if name is None:
            raise click.UsageError("--import needs --as NAME: whose tables they become.")
        settings = measured.settings_of(overrides)
        click.echo(measured.import_results(results, name=name, space=what, settings=settings, command=command))
        return
    if what is None:
        raise click.UsageError("WHAT is missing: a space, or an experiment.")
    if measured.is_experiment(what):
        _heed("where WHAT is an experiment, which has its own table", "what", "device", "out", "smoke", "overrides")
        short = () if device is None else (f"device={json.dumps(device)}",)
        _stages(Path(what), out, smoke, (*short, *overrides), ("measure",))
        return
    if device is None:
        raise click.UsageError("a space is measured on a device: --device NAME (`nas list devices`).")
    of_space = ("what", "device", "precisions", "image", "classes", "seed", "overrides")
    space = measured.space_of(what, _shape(image), classes)
    settings = measured.settings_of(overrides)
    if bundle is not None:
        _heed("with --bundle", *of_space, "bundle", "networks", *(("over", "name") if over else ()))
        if len(precisions) > 1:
            raise click.UsageError("a bundle is of one precision: give --precision once, and make a bundle of each.")
        precision = precisions[0] if precisions else None
        if over is not None:
            if name is None:
                raise click.UsageError("--over needs --as NAME: whose tables they become.")
            path = what if what.endswith(".toml") else None
            click.echo(
                measured.measure_over(
                    space, device, bundle, over, settings,
                    name=name, precision=precision, networks=networks, seed=seed, path=path, command=command,
                )
            )  # fmt: skip
            return
        plan = measured.write_bundle(space, device, bundle, settings, precision=precision, networks=networks, seed=seed)
        without = "; without Python as README.txt says" if plan.device.runtime == "litert" else ""
        click.echo(
            f"{bundle}: {len(plan.graphs)} models, {plan.precision}. Copy it to the device, run `python measure.py` in "
            f"it{without}, bring results.jsonl back, and: nas measure --import {bundle} --as NAME"
        )
    elif over is not None:
        raise click.UsageError("--over needs --bundle FOLDER: where the models and results are kept here.")
    elif prove is not None:
        _heed("with --prove", *of_space, "prove")
        for precision in precisions or (None,):
            measured.prove_table(space, device, settings, networks=prove, precision=precision, seed=seed + 1)
    else:
        _heed("where WHAT is a space", *of_space, "name", "networks")
        click.echo(
            measured.measure_space(
                space,
                device,
                settings,
                name=name,
                precisions=precisions or None,
                networks=networks,
                seed=seed,
                command=command,
            )
        )


def _heed(when: str, *known: str) -> None:
    """Nothing, if no other options than `known` were given on the line.

    Raises:
        UsageError: one would be ignored.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name not in known:
            raise click.UsageError(f"{parameter.opts[0]} has no meaning {when}. Leave it out.")


def _shape(image: str) -> tuple[int, int, int]:
    try:
        height, width, channels = map(int, image.split("x"))
    except ValueError as e:
        raise click.UsageError(f"--image {image}: HEIGHTxWIDTHxCHANNELS is needed, such as 32x32x3.") from e
    return height, width, channels


_stage_command(
    "train",
    "Train the supernet of EXPERIMENT; cut off, it goes on from its newest checkpoint. --set train.tensorboard=true "
    "writes TensorBoard events too, --set train.profile_steps=20 a jax.profiler trace of so many steps.",
)


@cli.command()
@click.argument("what")
@click.option("--device", metavar="NAME", help="Whose latency is limited; `nas list devices` has the names.")
@click.option("--data", metavar="PATH", help="Images, where WHAT is a space: its supernet is trained on them first.")
@click.option(
    "--evaluate",
    metavar="MODULE:FUNCTION",
    help="Or a function from a network to its top-1, 0 to 1: nothing is trained.",
)
@click.option("--strategy", metavar="NAME", help="`nas list strategies` has the names; as --set search.strategy=NAME.")
@click.option(
    "--trials", metavar="N", type=click.IntRange(min=1), help="Networks to evaluate; as --set search.trials=N."
)
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="[COST=]VALUE",
    help="Such as 20 or 50% (latency_ms), macs=3e8, top1=90% (at least). Repeatable.",
)
@click.option("--address", metavar="HOST:PORT", help="Search on this Ray cluster; `auto` finds one on this machine.")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder; runs/<name> if not given.")
@click.option("--redo", type=click.Choice(["search"]), help="Anew, with another strategy or other limits.")
@click.option("--smoke", is_flag=True, help="As for `nas run`, where WHAT is an experiment.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="As for `nas run`.")
def search(
    what: str,
    device: str | None,
    data: str | None,
    evaluate: str | None,
    strategy: str | None,
    trials: int | None,
    limits: tuple[str, ...],
    address: str | None,
    out: Path | None,
    redo: str | None,
    smoke: bool,
    overrides: tuple[str, ...],
) -> None:
    """Search for the most accurate networks within limits: of an experiment (WHAT), or of a space by name or file.

    \b
    Example: nas search experiments/quickstart.toml --strategy predictor --trials 100 --limit 50%
    A space, trained on images:   nas search mobilenet_v3_32 --device host_onnxruntime --data path/to/my.npz
    A space, judged by your code: nas search ofa_mobilenet_v3_w12 --device note10 --limit 20 --evaluate mine:top1
    """
    from nas import measured
    from nas.pipeline import commands

    if measured.is_experiment(what):
        _heed("where WHAT is an experiment: it names its data", *_SEARCH, "redo", "smoke", "overrides")
        short = () if device is None else (f"device={json.dumps(device)}",)
        short += () if strategy is None else (f"search.strategy={json.dumps(strategy)}",)
        short += () if trials is None else (f"search.trials={trials}",)
        experiment, path = _resolved(Path(what), out, smoke, (*short, *_joining(address), *overrides))
        commands.search_experiment(commands.limited(experiment, commands.parsed(limits)), path, redo=redo)
    elif evaluate is not None:
        _heed("with --evaluate", *_SEARCH, "evaluate")
        path = out or Path("runs") / Path(what).stem
        front = commands.search_by(
            evaluate,
            what,
            path,
            device=device,
            strategy=strategy,
            trials=trials,
            limits=commands.parsed(limits),
            address=address,
        )
        click.echo(front)
    elif data is None:
        raise click.UsageError(
            f"what evaluates the networks of {what}? Give --data PATH (its supernet is trained first), or --evaluate "
            f"MODULE:FUNCTION; or name an experiment file."
        )
    else:
        _heed("with --data", *_SEARCH, "data", "redo", "overrides")
        experiment = commands.experiment_of(
            what,
            data,
            device=device,
            strategy=strategy,
            trials=trials,
            limits=commands.parsed(limits),
            overrides=(*_joining(address), *overrides),
        )
        path = out or Path("runs") / experiment.name
        commands.search_experiment(experiment, path, stages=("measure", "train", "search"), redo=redo)


_SEARCH = ("what", "device", "strategy", "trials", "limits", "address", "out")


_stage_command("finish", "Fine-tune the winners and the baselines of EXPERIMENT, with distillation.")
_stage_command("verify", "Prove that the exported files of EXPERIMENT do what their networks do.")


@cli.command()
@click.option("--space", metavar="FILE", help="Of a table whose space is not one of `nas list spaces`.")
@_experiment_options
def report(experiment: Path, out: Path | None, smoke: bool, overrides: tuple[str, ...], space: str | None) -> None:
    """Write summary.json and report.html of EXPERIMENT; or the self-test of latency tables.

    For the latter give, in place of EXPERIMENT, the name of a device or a folder of tables; --out is then the file.

    \b
    Example: nas report experiments/quickstart.toml
    Tables:  nas report latency_models/my_laptop/mobilenet_v3_32
    """
    if experiment.suffix == ".toml":
        _stages(experiment, out, smoke, overrides, ("report",))
        return
    from nas.report import table_folders, write_table_report

    folders = table_folders(str(experiment))
    if out is not None and len(folders) > 1:
        raise click.UsageError(
            f"--out is one file; {experiment} has tables in {', '.join(map(str, folders))}: give one."
        )
    for folder in folders:
        click.echo(write_table_report(folder, space=space, out=out))


@cli.command()
@click.option("--networks", metavar="K", help="How many to train alone (fidelity.networks); trained ones are kept.")
@click.option("--seeds", metavar="N", help="Trainings of each (fidelity.seeds).")
@click.option("--epochs", metavar="E", help="Of each, in place of train.epochs (fidelity.epochs); the result says so.")
@_experiment_options
def fidelity(
    experiment: Path, out: Path | None, smoke: bool, overrides: tuple[str, ...], **options: str | None
) -> None:
    """Ask whether the trained supernet of EXPERIMENT orders networks as training each of them alone does.

    Trains K networks by the supernet's recipe, from scratch, and compares the two orders by Kendall's tau, beside the
    orders by MACs and by parameters. Not part of `nas run`: it takes K times as long as one network does.

    Example: nas fidelity experiments/quickstart.toml --networks 16
    """
    from nas.pipeline import run_fidelity

    short = tuple(f"fidelity.{name}={value}" for name, value in options.items() if value is not None)
    resolved, path = _resolved(experiment, out, smoke, (*overrides, *short))
    run_fidelity(resolved, path)


@cli.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--params", type=click.Path(path_type=Path), help="Parameters; those beside SOURCE if not given.")
@click.option("--runtime", default="onnxruntime", show_default=True, help="Whose format to write.")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    help="float32, float16, bfloat16, int8, mixed, as the runtime has them; float32 and what else is calibrated if not "
    "given.",
)
@click.option("--out", type=click.Path(path_type=Path), help="File to write, or, for an experiment, its run folder.")
@click.option("--smoke", is_flag=True, help="As for `nas run`.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="As for `nas run`.")
def export(
    source: Path,
    params: Path | None,
    runtime: str,
    precisions: tuple[str, ...],
    out: Path | None,
    smoke: bool,
    overrides: tuple[str, ...],
) -> None:
    """Write model files: of one architecture.json (or a winner's folder), or of a whole experiment (.toml).

    Example: nas export runs/quickstart/winners/winner_1 --out best.onnx
    """
    if source.suffix == ".toml":
        _heed("where SOURCE is an experiment, whose device says it", "source", "out", "smoke", "overrides")
        _stages(source, out, smoke, overrides, ("export",))
        return
    from nas.deliver import export_network

    _heed("where SOURCE is a network", "source", "params", "runtime", "precisions", "out")
    for path in export_network(source, params=params, runtime=runtime, precisions=precisions, out=out):
        click.echo(path)


@cli.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--format", "form", required=True, help="Of FILE: ofa, proxyless, csv or networks (README: Your own device)."
)
@click.option("--space", "name", required=True, help="The space whose blocks are looked up in FILE.")
@click.option("--device", required=True, metavar="NAME", help="The device that FILE is of.")
@click.option("--out", type=click.Path(path_type=Path), help="Its folder; latency_models/NAME if not given.")
@click.option("--unit", help="Of the latencies: ms, us or s. Left out: ms, which the blocks' MACs must bear out.")
@click.option("--image", default="224x224x3", show_default=True, help="Of spaces without a resolution of their own.")
@click.option("--classes", default=1000, show_default=True, help="That the networks tell apart.")
def import_(
    file: Path, form: str, name: str, device: str, out: Path | None, unit: str | None, image: str, classes: int
) -> None:
    """Make a latency table of a device that is not at hand from FILE, which others published or you measured.

    Example: nas import note10.json --format ofa --space ofa_mobilenet_v3_w12 --device note10
    """
    from nas.latency import import_file
    from nas.space import load_space

    space = load_space(name, input_shape=_shape(image), classes=classes)
    click.echo(import_file(file, form=form, space=space, device=device, out=out, unit=unit))


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--runtime", default="onnxruntime", show_default=True, help="A name of `nas list runtimes`.")
@click.option("--threads", default=1, show_default=True, help="CPUs that it is held on.")
@click.option("--batch", default=1, show_default=True, help="Images an inference.")
@click.option("--seconds", default=2.0, show_default=True, help="For throughput and energy.")
@click.option(
    "--image", metavar="HxWxC", help="Shape of an image; that of architecture.json beside MODEL if not given."
)
@click.option("--energy", is_flag=True, help="Ask for energy, which not every machine counts.")
def footprint(
    model: Path, runtime: str, threads: int, batch: int, seconds: float, image: str | None, energy: bool
) -> None:
    """Size, start, memory and throughput of a MODEL file in a runtime, measured in a process of its own.

    Example: nas footprint runs/quickstart/winners/winner_1/model.onnx --batch 8
    """
    from nas.architecture import load_architecture
    from nas.measure import footprint as measured

    shape = load_architecture(model.parent).input.shape if image is None else _shape(image)
    found = measured(model, runtime, shape, threads=threads, batch=batch, seconds=seconds, energy=energy)
    for line in found.lines():
        click.echo(line)


@cli.command("list")
@click.argument(
    "what", type=click.Choice(["spaces", "devices", "blocks", "precisions", "strategies", "runtimes", "data"])
)
def list_(what: str) -> None:
    """Names that experiment and space files may use.

    Example: nas list spaces
    """
    from nas.doctor import listing

    for line in listing(what):
        click.echo(line)


@cli.command()
@click.option("--salvage", "journal", type=click.Path(path_type=Path), help="A search journal, or its run folder.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="The new file; journal.salvaged.jsonl beside it if not given."
)
def doctor(journal: Path | None, out: Path | None) -> None:
    """Versions, cores, accelerators and runtimes of this machine, and what is missing for what.

    With --salvage: writes the intact records of a damaged search journal to a new file; the old one stays as it is.

    Example: nas doctor --salvage runs/quickstart
    """
    from nas.doctor import diagnosis, salvage

    if journal is None:
        _heed("where no journal is salvaged", "journal")
    for line in diagnosis() if journal is None else salvage(journal, out):
        click.echo(line)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits the process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    again = "nas " + shlex.join(arguments)
    debug = "--debug" in arguments  # wherever it stands
    arguments = [a for a in arguments if a != "--debug"]
    code = 0
    with _Interrupts(again):
        try:
            cli.main(arguments, prog_name="nas", standalone_mode=False)
        except click.exceptions.Exit as e:
            code = e.exit_code
        except click.ClickException as e:
            e.show()
            code = 2
        except NasError as e:
            code = 2
            if debug:
                traceback.print_exc()
            click.echo(f"error: {e}", err=True)
            if isinstance(e, ExecutorError):
                click.echo(f"go on with:\n  {again}", err=True)
        except OSError as e:
            code = 2
            if debug:
                traceback.print_exc()
            click.echo(
                f"error: the system refused: {e}. Correct that (permissions, free space, memory, open files) and run "
                f"the same command: it goes on from what is there.",
                err=True,
            )
        except (KeyboardInterrupt, click.Abort):
            code = 130
            click.echo(f"\ninterrupted; nothing that was finished is lost. Go on with:\n  {again}", err=True)
    sys.stdout.flush()
    sys.exit(code)


class _Interrupts:
    """Ctrl-C ends the program within `GRACE_SECONDS`, even in the middle of a compilation.

    Python runs signal handlers between bytecodes only, and a compilation is one call that can take a minute. A thread
    therefore reads the signal from a socket, which the system writes at once. Ending hard is safe: every file is
    written atomically, and whatever was committed is there.
    """

    def __init__(self, again: str):
        self._again = again

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()

    def __exit__(self, *_: Any) -> None:
        if hasattr(self, "_old"):
            signal.set_wakeup_fd(self._old)
            self._writer.close()

    def _watch(self) -> None:
        while received := self._reader.recv(1):
            if received[0] == signal.SIGINT:
                break
        else:
            return
        timer = threading.Timer(GRACE_SECONDS, self._end)
        timer.daemon = True
        timer.start()

    def _end(self) -> None:
        print(f"\ninterrupted; nothing that was finished is lost. Go on with:\n  {self._again}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(130)


if __name__ == "__main__":
    main()
