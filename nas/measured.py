"""Tables of a device's own folder: measured here, or elsewhere from a bundle, and proved again later."""

import shutil
from pathlib import Path

import msgspec
import numpy as np
import tomli_w

from nas import catalog, config
from nas.config import Device
from nas.console import Console
from nas.errors import ConfigError, DeviceError, LatencyError
from nas.files import write_json, write_text
from nas.latency import (
    Learned,
    Proof,
    Table,
    find_sources,
    find_table,
    load_device,
    own_folder,
    place,
    precisions_of,
    table_folder,
)
from nas.measure import Plan, bundle, evaluate, for_table, hardware, prove_again, record, remote, runtime_of, tpu, whole
from nas.measure.recipe import in_words, require_version
from nas.ondevice.manifest import load_manifest
from nas.ondevice.results import Recording
from nas.ondevice.sessions import version
from nas.space import Space, load_space

STRICT = config.Latency(
    seconds=60.0, min_rounds=40, anchors=24, holdout=40, patience=4.0, max_drift=0.03, max_busy=0.25
)


def measure_space(
    space: Space,
    device: str,
    settings: config.Latency = STRICT,
    *,
    name: str | None = None,
    precisions: tuple[str, ...] | None = None,
    networks: int | None = None,
    seed: int = 0,
    command: str = "nas measure",
    console: Console | None = None,
) -> Path:
    """Measures `space` on this machine and writes its tables with their proofs; returns the space's folder.

    They go to `latency_models/<name>/<space>/` of the current folder, with a device.toml that says what was measured.
    A call that was cut off goes on from the rounds it has.

    Args:
        device: of `nas.list_devices()` or a path: its runtime, threads, batch and precisions are used.
        name: of the folder; the device's own where None, which cannot be that of the host.
        precisions: some of the device's; all where None.
        networks: so many networks are measured whole, and no block: a model is learned from them and from other
            devices' tables of the space.

    Raises:
        DeviceError: the device is another machine, or the runtime is not installed.
        LatencyError: the machine was too uneven or too busy.
    """
    console = console or Console()
    about = load_device(device)
    folder = _folder(name or Path(device).name)
    if about.runtime == tpu.RUNTIME and networks is None:
        _require_same(folder.name, about, hardware=about.hardware)
        return _estimate(space, about, settings, folder, precisions, seed=seed, command=command, console=console)
    here = hardware()
    if not about.at_hand and about.hardware != here:
        raise DeviceError(
            f"device {device} is {about.hardware!r}, this machine is {here!r}. Measure it from a bundle: `nas measure "
            f"{space.argument} --device {device} --bundle FOLDER`; or measure this one: `--device "
            f"host_{about.runtime} --as NAME`."
        )
    _require_same(folder.name, about, hardware=here)
    runtime_of(about)
    where = place(folder, space)
    sources = [] if networks is None else find_sources(space)
    done: list[Path] = []  # kept until all are, so that none is measured twice
    for precision in precisions or precisions_of(about, space):
        if networks is None:
            work = where / f".measuring.{precision}"
            plan = for_table(space, about, precision, settings, seed=seed)
        else:
            work = where / f".measuring.{precision}.networks"
            plan = whole.for_networks(space, about, precision, sources, settings, networks=networks, seed=seed)
        console.start(f"{space.name} on {about.device}, {precision}: {len(plan.graphs)} models")
        recording = record(plan, settings, folder=work, progress=console.share)
        with bundle.kept_if_accepted(work):
            table, proof = _evaluated(plan, recording, settings, sources, command=command)
        keep(table, proof, space, about, folder, console=console)
        done.append(work)
    for work in done:
        shutil.rmtree(work, ignore_errors=True)  # another that measured the same may have been quicker
    return where


def _estimate(
    space: Space,
    device: Device,
    settings: config.Latency,
    folder: Path,
    precisions: tuple[str, ...] | None,
    *,
    seed: int,
    command: str,
    console: Console,
) -> Path:
    """`measure_space` for a TPU's compiler: nothing is timed, unless this machine has that TPU."""
    where = place(folder, space)
    done: list[Path] = []
    for precision in precisions or precisions_of(device, space):
        work = where / f".estimates.{precision}"
        console.start(f"{space.name} on {device.device}, {precision}")
        table, proof = tpu.estimate_table(
            space,
            device,
            precision,
            settings,
            seed=seed,
            cache=work,
            progress=console.share,
            command=command,
        )
        keep(table, proof, space, device, folder, console=console)
        done.append(work)
    for work in done:
        shutil.rmtree(work, ignore_errors=True)  # on a TPU that is there, nothing was estimated
    return where


def write_bundle(
    space: Space,
    device: str,
    folder: Path,
    settings: config.Latency = STRICT,
    *,
    precision: str | None = None,
    networks: int | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> Plan:
    """Writes to `folder` all that measuring `space` elsewhere needs (`nas.measure.bundle`).

    With `networks` it has that many networks to learn from, held-out ones, no block, and networks.csv: latencies that
    were measured in another way can be written there and imported (`nas import --format networks`).

    Raises:
        DeviceError: the device is unknown, or lacks the precision.
    """
    about = load_device(device)
    precision = precision or precisions_of(about, space)[0]
    if networks is None:
        plan = for_table(space, about, precision, settings, seed=seed)
    else:
        plan = whole.for_networks(space, about, precision, find_sources(space), settings, networks=networks, seed=seed)
    bundle.write(plan, folder, settings, progress=(console or Console()).share)
    if networks is not None and not (folder / whole.SHEET).exists():  # it may have been filled in since
        files = {call["name"]: call["file"] for call in load_manifest(folder)["calls"]}
        write_text(folder / whole.SHEET, whole.sheet(plan, files))
    return plan


def measure_over(
    space: Space,
    device: str,
    folder: Path,
    over: str,
    settings: config.Latency = STRICT,
    *,
    name: str,
    precision: str | None = None,
    networks: int | None = None,
    seed: int = 0,
    path: str | None = None,
    command: str = "nas measure",
    console: Console | None = None,
) -> Path:
    """`write_bundle` to `folder`, measured on another machine (`nas.measure.remote`), and `import_results`.

    Args:
        over: the way there, "ssh://user@host/folder" or "adb".
        path: of the space, if it is not one of `nas.list_spaces()`.

    Raises:
        DeviceError: the machine cannot be reached or lacks something; and as of the two.
        LatencyError: the connection was lost; and as of the two.
    """
    console = console or Console()
    folder_of = _folder(name)  # a name that cannot be is told before an hour of measuring
    _require_same(name, load_device(device), hardware=None)
    transport = remote.transport_of(over)
    plan = write_bundle(
        space, device, folder, settings, precision=precision, networks=networks, seed=seed, console=console
    )
    console.start(f"{space.name} on {transport.name}, {plan.precision}: {len(plan.graphs)} models")
    remote.measure_there(folder, transport, progress=console.share)
    import_results(folder, name=name, space=path, settings=settings, command=command, set_aside=True, console=console)
    return place(folder_of, space)


def import_results(
    path: Path,
    *,
    name: str,
    space: str | None = None,
    settings: config.Latency = STRICT,
    command: str = "nas measure --import",
    set_aside: bool = False,
    console: Console | None = None,
) -> Path:
    """The table and proof from results that a bundle's program wrote, as of `measure_space`; or benchmark_model's log.

    Args:
        space: that the bundle was made of, if not one of `nas.list_spaces()`: its path.
        settings: `max_drift` and `max_busy` decide what is refused.
        set_aside: results in the folder `path` that are refused for the machine's sake: the next call times anew.

    Raises:
        LatencyError: the file is damaged, not complete, of a space that has changed, or of too uneven a machine.
    """
    results = bundle.recorded(path) if path.is_dir() else path
    recording = bundle.read_any(results)
    if not recording.complete:
        program = "python measure.py" if results.suffix != ".log" else "sh measure.sh"
        raise LatencyError(
            f"{results}: the measuring was cut off after {len(recording.rounds)} rounds. Run `{program}` again on the "
            f"device: it goes on from there."
        )
    plan = plan_of(recording, path, space=space)
    sources = [] if plan.blocks else find_sources(plan.space)
    with bundle.kept_if_accepted(path if set_aside else None):
        table, proof = _evaluated(plan, recording, settings, sources, command=command)
    keep(table, proof, plan.space, plan.device, _folder(name), console=console or Console())
    return place(_folder(name), plan.space)


def plan_of(recording: Recording, path: Path, *, space: str | None = None) -> Plan:
    """What was timed, as the results in `path` say; `space` as of `import_results`.

    Raises:
        LatencyError: they are of a space that is not here, or has changed; or of another version of this package.
    """
    said = recording.manifest["plan"]
    if space is None and said["space"] not in catalog.list_spaces():
        raise LatencyError(f"{path}: it is of space {said['space']!r}, which is not here: give its file as WHAT.")
    of = load_space(space or said["space"], input_shape=tuple(said["input"]), classes=said["classes"])
    if of.name != said["space"]:
        raise LatencyError(
            f"{path}: it was measured for space {said['space']!r}, and WHAT is {of.name!r}: give that space; "
            f"no WHAT is needed where `nas list spaces` has it."
        )
    if of.digest != said["space_digest"]:
        raise LatencyError(
            f"{path}: it was measured for another {said['space']} (hash {said['space_digest']}; here it has "
            f"{of.digest}). Bring the space back as it was, give its file as WHAT, or measure again."
        )
    try:
        device = msgspec.convert(recording.manifest["device"], Device)
    except msgspec.ValidationError as e:
        raise LatencyError(f"{path}: its bundle was made by another version of nas: {e}. Use that, or this.") from e
    return Plan(
        of,
        device,
        said["precision"],
        np.array(said["anchors"], np.uint8),
        np.array(said["held_out"], np.uint8),
        blocks=said["blocks"],
        seed=said["seed"],
    )


def _evaluated(
    plan: Plan,
    recording: Recording,
    settings: config.Latency,
    sources: list[tuple[str, Table]],
    *,
    command: str,
) -> tuple[Table | Learned, Proof]:
    """A table where blocks were timed, else a model learned from the networks and from `sources`."""
    if plan.blocks:
        return evaluate(plan, recording, settings, command=command)
    return whole.evaluate_networks(plan, recording, sources, settings, command=command)


def prove_table(
    space: Space,
    device: str,
    settings: config.Latency = STRICT,
    *,
    networks: int = 100,
    precision: str | None = None,
    seed: int = 1,
    console: Console | None = None,
) -> tuple[Table, Proof]:
    """A table of `device`, and its proof on other random networks, timed now on this machine; it replaces the one kept.

    The proof of a table that came installed goes to the current folder (`nas.latency.own_folder`). A call that was cut
    off goes on from the rounds it has.

    Raises:
        DeviceError: the device is not this machine.
        LatencyError: the machine was too uneven; the table is of another version of the runtime.
    """
    console = console or Console()
    about = load_device(device)
    if about.hardware not in (hardware(), "host"):
        raise DeviceError(f"device {device} is {about.hardware!r}, this machine is {hardware()!r}.")
    precision = precision or precisions_of(about, space)[0]
    table, _ = find_table(device, precision, space)
    require_version(table, version(about.runtime))  # before an hour of measuring
    where = table_folder(device, precision, space)
    work = own_folder(where) / f".proving.{precision}.{networks}.{seed}"
    console.start(f"{networks} networks of {space.name} on {about.device}, {precision}")
    proof = prove_again(
        table, space, about, settings, networks=networks, seed=seed, folder=work, progress=console.share
    )
    keep_proof(proof, precision, own_folder(where))
    shutil.rmtree(work, ignore_errors=True)
    console.say(f"  {proof}")
    console.say(f"  kept in {own_folder(where) / 'proof.json'}; in full: nas report {where}{_file_of(space)}")
    return table, proof


def is_experiment(what: str) -> bool:
    """Whether `what` is the path of an experiment, not the name or path of a space."""
    if what in catalog.list_spaces() or not what.endswith(".toml"):
        return False
    raw, _ = config.load_toml(Path(what), what="experiment or space")
    return "stage" not in raw


def space_of(name: str, image: tuple[int, int, int], classes: int) -> Space:
    """The space `name` over images of that shape."""
    return load_space(name, input_shape=image, classes=classes)


def settings_of(overrides: tuple[str, ...]) -> config.Latency:
    """`STRICT` with "latency.KEY=VALUE" laid over it.

    Raises:
        ConfigError: an unknown key or a value of another type.
    """
    changed: dict[str, object] = {}
    for item in overrides:
        key, _, value = item.partition("=")
        short = key.removeprefix("latency.")
        if short not in config.Latency.__struct_fields__:
            hint = config.nearest(short, config.Latency.__struct_fields__, kind="key")
            raise ConfigError(f"--set {item}: unknown key `{key}` of latency.{hint}")
        changed[short] = value
    try:
        settings = msgspec.convert({**msgspec.to_builtins(STRICT), **changed}, config.Latency, strict=False)
    except msgspec.ValidationError as e:
        raise ConfigError(f"--set {' '.join(overrides)}: {e}.") from e
    config.check_latency(settings)
    return settings


def keep(table: Table | Learned, proof: Proof, space: Space, device: Device, folder: Path, *, console: Console) -> None:
    """Writes a table or learned model, its proof beside those of other precisions, and device.toml."""
    where = place(folder, space)
    _require_same(folder.name, device, hardware=table.hardware)
    known = load_device(str(folder)) if (folder / "device.toml").exists() else None
    if known is not None:
        table = msgspec.structs.replace(table, device=known.device)  # its owner may have called it something better
    keep_proof(proof, table.precision, table.save(where).parent)
    precisions = (*(known.precision if known else ()), table.precision)
    now = msgspec.structs.replace(
        known or _new(device, table.hardware),
        hardware=table.hardware,
        runtime_version=table.runtime_version,
        precision=tuple(dict.fromkeys(precisions)),
        source=table.command,
        date=table.date,
    )
    write_text(folder / "device.toml", tomli_w.dumps({k: v for k, v in msgspec.to_builtins(now).items() if v != ""}))
    console.say(f"  {table.basis}")
    console.say(f"  {proof}")
    if list(where.glob("table.*.json")):
        console.say(f"  in full: nas report {where}{_file_of(space)}")
    for key, why in table.unsupported.items():
        console.say(f"  unsupported: {space.blocks()[key][0].label}: {why}")


def _file_of(space: Space) -> str:
    """The option by which `nas report` finds a space that is not one of `nas list spaces`."""
    return "" if space.name in catalog.list_spaces() else f" --space {space.name}.toml"


def _new(device: Device, hardware: str) -> Device:
    """What device.toml says of hardware that was measured as `device` would be: nothing that is only of that."""
    if device.hardware == hardware:
        return device
    return Device(
        device=in_words(device, hardware),
        runtime=device.runtime,
        threads=device.threads,
        batch=device.batch,
        precision=(),
        frequency_policy=device.frequency_policy if device.at_hand else "as found",
    )


def _require_same(name: str, device: Device, *, hardware: str | None) -> None:
    """A name is of one machine and runtime.

    Args:
        hardware: that is measured; None: not known yet.

    Raises:
        DeviceError: the name is of another.
    """
    if name not in catalog.list_devices():
        return
    known = load_device(name)
    if known.runtime == device.runtime == tpu.RUNTIME:
        return
    now = {"runtime": device.runtime, "threads": device.threads, "batch": device.batch}
    if hardware is not None:
        now["hardware"] = hardware
    differs = [f"{k} {getattr(known, k)!r}, not {v!r}" for k, v in now.items() if getattr(known, k) != v]
    if differs:
        raise DeviceError(f"device {name} is of {'; '.join(differs)}. Choose another name with --as.")


def keep_proof(proof: Proof, precision: str, where: Path) -> None:
    """Writes a proof to proof.json in `where`; those of other precisions stay."""
    path = where / "proof.json"
    try:
        proofs = msgspec.json.decode(path.read_bytes())["precisions"] if path.exists() else {}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise LatencyError(f"{path}: damaged: {e}. Restore it, or remove it: proofs in it are then lost.") from e
    write_json(path, {"precisions": {**proofs, precision: msgspec.to_builtins(proof)}})


def _folder(name: str) -> Path:
    """Where the tables of a device go.

    Raises:
        DeviceError: the name is the host's, which is measured anew in every run, or cannot be a folder's.
    """
    there = [f / name for f in catalog.folders("latency_models") if (f / name / "device.toml").exists()]
    if there and load_device(str(there[0])).at_hand:
        raise DeviceError(
            f"device {name} is whatever machine a run is on, and is measured anew in every run: its tables have no "
            f"folder. Give this machine a name of its own: --as NAME."
        )
    if not name or Path(name).name != name or name.startswith("."):
        raise DeviceError(f"{name!r} cannot name a device: letters, digits, - and _ make a name.")
    return Path("latency_models") / name
