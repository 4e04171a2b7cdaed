"""Devices: latency_models/<name>/device.toml."""

from nas import catalog, config
from nas.config import Device
from nas.errors import ConfigError, DeviceError
from nas.space import Space


def load_device(name: str) -> Device:
    """The device `name` (of `nas.list_devices()`, or a path to a device.toml or its folder).

    That its runtime is known and installed is for `nas.measure.runtime_of` to say.

    Raises:
        DeviceError: unknown name.
        ConfigError: a mistake in the file, with its line.
    """
    known = catalog.list_devices()
    path = catalog.find(name, kind="device", file="device.toml", known=known, error=DeviceError)
    raw, text = config.load_toml(path, what="device")
    device = config.convert(raw, Device, path=path, text=text)
    for key in ("threads", "batch"):
        if (value := getattr(device, key)) < 1:
            raise ConfigError(f"{path}, line {config.line_of(text, [key])}: `{key}` is {value}: at least 1 is needed.")
    if not device.precision:
        where = config.line_of(text, ["precision"])
        raise ConfigError(f'{path}, line {where}: `precision` is empty: at least one is needed, like ["float32"].')
    return device


def precisions_of(device: Device, space: Space) -> tuple[str, ...]:
    """Those that networks of `space` have latencies in on a device: its own, or mixed, where the space's blocks are.

    Raises:
        DeviceError: blocks of the space are held in float32 or int8, and the device does not have it.
    """
    if not space.mixed:
        return tuple(p for p in device.precision if p != "mixed") or device.precision
    held = {block.graph.activations for block, _ in space.blocks().values()}
    if "mixed" not in device.precision and (lacks := sorted(held - set(device.precision))):
        raise DeviceError(
            f"stages of space {space.name!r} may be in {' and '.join(lacks)}; device {device.device!r} has "
            f"{', '.join(device.precision)}. Choose a device that has {' and '.join(sorted(held))}, or leave "
            f"{' and '.join(lacks)} out of the `precision` of the space's stages."
        )
    return ("mixed",)
